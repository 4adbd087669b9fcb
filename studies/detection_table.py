"""A table of detection results of several runs, made from their `results.json` alone.

python -m studies.detection_table RUN_DIRECTORY... --out=DIRECTORY
"""

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure

from jevb_jax.evaluation.outside_sets import CORRUPTED
from jevb_jax.report.tables import csv_table, markdown_table
from jevb_jax.runs import files
from jevb_study import mistakes
from jevb_study.evidence import read_run

# Prefixes of measures that check a score in other ways than detection. They belong to no outside set.
_USES = (
    "error_auroc_",
    "r_auroc",
    "area_under_risk_coverage_",
    "severity_correlation_",
    "cropped_",
    "human_",
)

# `{(run, score): {column: one value per seed}}`
Cells = Mapping[tuple[str, str], Mapping[str, Sequence[float]]]


class DetectionRun(NamedTuple):
    """A finished run that was evaluated with outside sets."""

    name: str  # METHOD in .../METHOD/seed_S, otherwise the name of the directory
    seed: int
    results: dict[str, Any]  # with "ood"
    environment: dict[str, Any]


def read_detection_run(directory: Path) -> DetectionRun:
    """Reads the directory of a run that `train.py` made.

    Raises:
      FileNotFoundError: the directory holds no finished run.
      ValueError: the run was evaluated without outside sets.
    """
    found = read_run(directory)
    if found.results is None or found.config is None or found.environment is None:
        raise FileNotFoundError(f"{directory}: give directories of finished runs")
    if "ood" not in found.results:
        raise ValueError(f"{directory} was evaluated without outside sets: see evaluate.py --ood")
    is_seed = directory.name.startswith("seed_")
    name = directory.absolute().parent.name if is_seed else directory.name
    return DetectionRun(name, found.config["seed"], found.results, found.environment)


class Number(NamedTuple):
    """A row of `table.csv`; `kind` is "auroc" or "uses"."""

    run: str
    seed: int
    kind: str
    score: str
    column: str
    value: float


def aurocs(results: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """AUROC by score and set, then by "GROUP mean". For a corruption, the mean over severities."""
    cells: dict[str, dict[str, list[float]]] = {}
    rows = results["ood"]["rows"]
    for row in rows:
        is_corrupted = row["group"] == CORRUPTED
        column = row["outside"].rpartition("_")[0] if is_corrupted else row["outside"]
        cells.setdefault(row["score"], {}).setdefault(column, []).append(row["auroc"])
    for row in rows:
        if row["group"] != CORRUPTED:
            column = f"{row['group']} mean"
            cells[row["score"]].setdefault(column, []).append(row["auroc"])
    return {
        score: {column: float(np.mean(values)) for column, values in columns.items()}
        for score, columns in cells.items()
    }


def _numbers(run: DetectionRun) -> Iterator[Number]:
    """Every number of a run, sorted by score."""
    uses: dict[str, dict[str, float]] = {}
    for row in run.results["trained"]:
        if row["name"].startswith(_USES):
            uses.setdefault(row["features"], {})[row["name"]] = row["value"]
    for kind, found in (("auroc", aurocs(run.results)), ("uses", uses)):
        for score, columns in found.items():
            for column, value in columns.items():
                yield Number(run.name, run.seed, kind, score, column, value)


def _cells(numbers: Sequence[Number], kind: str) -> Cells:
    cells: dict[tuple[str, str], dict[str, list[float]]] = {}
    for one in numbers:
        if one.kind == kind:
            row = cells.setdefault((one.run, one.score), {})
            row.setdefault(one.column, []).append(one.value)
    return cells


def _columns(cells: Cells) -> list[str]:
    return list(dict.fromkeys(column for row in cells.values() for column in row))


def _mean_and_spread(values: Sequence[float] | None) -> str:
    if not values:
        return "-"
    spread = f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else ""
    return f"{np.mean(values):.3f}{spread}"


def _table(cells: Cells) -> list[str]:
    columns = _columns(cells)
    rows = [
        [name, score, *(_mean_and_spread(row.get(column)) for column in columns)]
        for (name, score), row in cells.items()
    ]
    return markdown_table(["run", "score", *(c.replace("_", " ") for c in columns)], rows)


def _facts(runs: Sequence[DetectionRun], command: str) -> list[str]:
    first = runs[0].results
    commits = sorted({str(run.environment["commit"]) for run in runs})
    devices = sorted({" ".join(run.environment["devices"]) for run in runs})
    lines = [
        f"* command: `{command}`",
        f"* commit of training: {', '.join(commits)}",
        f"* jax: {', '.join(sorted({run.environment['versions']['jax'] for run in runs}))}; "
        f"devices: {', '.join(devices)}",
        f"* seeds: {', '.join(sorted({str(run.seed) for run in runs}))}",
        f"* split: {first['split']}; protocol: {first['ood']['protocol']}",
    ]
    for run in runs:
        found = run.results["ood"]
        lines.append(
            f"* {run.name}, seed {run.seed}: default score `{found['default_score']}`, chosen score "
            f"{found['chosen_score'] or 'none (no set to choose on)'}; with labels: "
            f"{', '.join(found['with_labels'])}; left out: {found['left_out'] or 'none'}"
        )
    return lines


def _footnotes(runs: Sequence[DetectionRun]) -> Iterator[str]:
    """Descriptions of the outside sets with the largest half-width of an AUROC interval."""
    widths: dict[str, float] = {}
    for run in runs:
        for row in run.results["ood"]["rows"]:
            width = (row["high"]["auroc"] - row["low"]["auroc"]) / 2
            widths[row["outside"]] = max(widths.get(row["outside"], 0.0), width)
    protocols = {name: text for run in runs for name, text in run.results["ood"]["sets"].items()}
    for name, text in protocols.items():
        yield f"* {name}: {text}; largest half-width of an interval of AUROC: {widths[name]:.3f}"


def _figure(cells: Cells) -> Figure:
    """One panel for each mean over a group, with one row for each score and a marker for each run."""
    means = [column for column in _columns(cells) if column.endswith(" mean")]
    scores = list(dict.fromkeys(score for _, score in cells))
    num_panels = max(len(means), 1)
    figure = Figure(figsize=(5 + 3 * num_panels, 1.5 + 0.22 * len(scores)), layout="tight")
    axes = figure.subplots(1, num_panels, sharey=True, squeeze=False)[0]
    for axis, column in zip(axes, means, strict=False):
        for marker, name in zip("osD^vPX*<>", dict.fromkeys(n for n, _ in cells), strict=False):
            points = [
                (np.mean(row[column]), scores.index(score))
                for (run, score), row in cells.items()
                if run == name and column in row
            ]
            x, y = [x for x, _ in points], [y for _, y in points]
            axis.plot(x, y, marker, label=name, markerfacecolor="none", linestyle="none")
        axis.axvline(0.5, color="0.5", linewidth=0.8)
        axis.set_xlabel(f"AUROC, {column}")
        axis.grid(axis="y", linewidth=0.4)
        axis.set_yticks(range(len(scores)), scores)
    axes[0].invert_yaxis()
    axes[0].legend(fontsize="small")
    return figure


def write_detection_table(runs: Sequence[DetectionRun], out: Path, *, command: str) -> None:
    """Writes `table.md`, `table.csv` and `detection.png`.

    Args:
      runs: at least one; all have the same split and protocol.
      out: directory, made if it does not exist.
      command: the command that made the table.

    Raises:
      ValueError: no runs, or runs of different splits or protocols.
    """
    kinds = {(run.results["split"], run.results["ood"]["protocol"]) for run in runs}
    if len(kinds) != 1:
        raise ValueError(f"expected runs of one split and protocol, got {sorted(kinds)}")
    numbers = [number for run in runs for number in _numbers(run)]
    detection = _cells(numbers, "auroc")
    lines = [
        "# Detection",
        "",
        *_facts(runs, command),
        "",
        "AUROC; a corruption is the mean over its severities; ± is the standard deviation over seeds.",
        "",
        *_table(detection),
        "",
        "# What the scores mean apart from detection",
        "",
        *_table(_cells(numbers, "uses")),
        "",
        *_footnotes(runs),
    ]
    out.mkdir(parents=True, exist_ok=True)
    files.write_text_atomically(out / "table.csv", csv_table(Number._fields, numbers))
    _figure(detection).savefig(out / "detection.png", format="png", dpi=150)
    files.write_text_atomically(out / "table.md", "\n".join(lines) + "\n")


def main(arguments: Sequence[str]) -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser("python -m studies.detection_table", description=__doc__)
    parser.add_argument("runs", nargs="+", type=files.to_path)
    parser.add_argument("--out", required=True, type=files.to_path)
    flags = parser.parse_args(arguments)
    command = f"python -m studies.detection_table {' '.join(arguments)}"
    with mistakes.as_messages():
        runs = [read_detection_run(directory) for directory in flags.runs]
        write_detection_table(runs, flags.out, command=command)


if __name__ == "__main__":
    main(sys.argv[1:])
