"""Detection of several runs side by side, from their `results.json` alone.

python -m studies.detection_table RUN_DIRECTORY... --out=DIRECTORY
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure

from jevb_jax import files, messages
from jevb_jax.evaluation.ood_protocol import CORRUPTED
from jevb_jax.report import tables

_USES = "uses"  # of uncertainty: measures of one score, not of a set
_PREFIXES = ("error_auroc_", "area_under_risk_coverage_", "severity_correlation_", "human_")


class DetectionRun(NamedTuple):
    """What one run found.

    Attributes:
      name: `METHOD` of `.../METHOD/seed_S`, else the directory's own name.
      seed: `config.seed` of the run.
      results: as `results.json` holds them, with "ood".
      environment: as `environment.json` holds it.
    """

    name: str
    seed: int
    results: dict[str, Any]
    environment: dict[str, Any]


def read_run(directory: Path) -> DetectionRun:
    """Reads a run directory.

    Args:
      directory: where a finished run lies.

    Returns:
      The run.

    Raises:
      FileNotFoundError: the run is not finished, or this is no run.
      ValueError: it was evaluated without outside sets.
    """
    path = directory / "results.json"
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: give directories of finished runs")
    results, environment, config = (
        files.read_json(directory / name)
        for name in ("results.json", "environment.json", "config.json")
    )
    if "ood" not in results:
        raise ValueError(f"{directory} was evaluated without outside sets: see evaluate.py --ood")
    is_seed = directory.name.startswith("seed_")
    name = directory.absolute().parent.name if is_seed else directory.name
    return DetectionRun(name, config["seed"], results, environment)


def aurocs(run: DetectionRun) -> dict[str, dict[str, float]]:
    """AUROC of each score: by set, then averages of the groups; a corruption is one average.

    Args:
      run: of `read_run`.

    Returns:
      `{score: {column: AUROC}}`; averages of groups are named "GROUP mean".
    """
    cells: dict[str, dict[str, list[float]]] = {}
    for row in run.results["ood"]["rows"]:
        is_corrupted = row["group"] == CORRUPTED
        column = row["outside"].rpartition("_")[0] if is_corrupted else row["outside"]
        groups = cells.setdefault(row["score"], {})
        groups.setdefault(column, []).append(row["auroc"])
    for row in run.results["ood"]["rows"]:
        if row["group"] != CORRUPTED:
            groups = cells[row["score"]]
            groups.setdefault(f"{row['group']} mean", []).append(row["auroc"])
    return {
        score: {column: float(np.mean(values)) for column, values in groups.items()}
        for score, groups in cells.items()
    }


def half_widths(runs: Sequence[DetectionRun]) -> dict[str, float]:
    """The largest half-width of a bootstrap interval of AUROC, by set.

    Args:
      runs: of `read_run`.

    Returns:
      `{set: half-width}`, corruptions by their severity's own name.
    """
    found: dict[str, float] = {}
    for run in runs:
        for row in run.results["ood"]["rows"]:
            width = (row["high"]["auroc"] - row["low"]["auroc"]) / 2
            found[row["outside"]] = max(found.get(row["outside"], 0.0), width)
    return found


def uses(run: DetectionRun) -> dict[str, dict[str, float]]:
    """Checks of what a score means, apart from detection.

    Args:
      run: of `read_run`.

    Returns:
      `{score: {measure: value}}`.
    """
    found: dict[str, dict[str, float]] = {}
    for row in run.results["trained"]:
        if row["name"].startswith(_PREFIXES):
            found.setdefault(row["features"], {})[row["name"]] = row["value"]
    return found


def _over_seeds(
    by_run: Sequence[tuple[str, Mapping[str, Mapping[str, float]]]],
) -> dict[tuple[str, str], dict[str, list[float]]]:
    """`{(run, score): {column: one value a seed}}`, scores in the order of their run."""
    cells: dict[tuple[str, str], dict[str, list[float]]] = {}
    for name, scores in by_run:
        for score, values in scores.items():
            row = cells.setdefault((name, score), {})
            for column, value in values.items():
                row.setdefault(column, []).append(value)
    return cells


def _cell(values: Sequence[float] | None) -> str:
    if not values:
        return "-"
    spread = f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else ""
    return f"{np.mean(values):.3f}{spread}"


def _table(cells: Mapping[tuple[str, str], Mapping[str, Sequence[float]]]) -> list[str]:
    columns = list(dict.fromkeys(column for row in cells.values() for column in row))
    return tables.markdown_table(
        ["run", "score", *(column.replace("_", " ") for column in columns)],
        [
            [name, score, *(_cell(row.get(column)) for column in columns)]
            for (name, score), row in cells.items()
        ],
    )


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


def _figure(cells: Mapping[tuple[str, str], Mapping[str, Sequence[float]]]) -> Figure:
    """One panel for each mean over a group: scores below one another, a marker for each run."""
    means = [
        column
        for column in dict.fromkeys(c for row in cells.values() for c in row)
        if column.endswith(" mean")
    ]
    scores = list(dict.fromkeys(score for _, score in cells))
    figure = Figure(figsize=(5 + 3 * max(len(means), 1), 1.5 + 0.22 * len(scores)), layout="tight")
    axes = figure.subplots(1, max(len(means), 1), sharey=True, squeeze=False)[0]
    for axis, column in zip(axes, means, strict=False):
        for marker, name in zip("osD^vPX*<>", dict.fromkeys(n for n, _ in cells), strict=False):
            points = [
                (np.mean(row[column]), scores.index(score))
                for (run, score), row in cells.items()
                if run == name and column in row
            ]
            axis.plot(
                [x for x, _ in points],
                [y for _, y in points],
                marker,
                label=name,
                markerfacecolor="none",
                linestyle="none",
            )
        axis.axvline(0.5, color="0.5", linewidth=0.8)
        axis.set_xlabel(f"AUROC, {column}")
        axis.grid(axis="y", linewidth=0.4)
        axis.set_yticks(range(len(scores)), scores)
    axes[0].invert_yaxis()
    axes[0].legend(fontsize="small")
    return figure


def write_detection_report(runs: Sequence[DetectionRun], out: Path, *, command: str) -> None:
    """Writes `table.md`, `table.csv` and `detection.png`.

    Args:
      runs: at least one, of the same split and protocol.
      out: directory, made if it does not exist.
      command: what made the report.

    Raises:
      ValueError: no runs, or runs of different splits or protocols.
    """
    kinds = {(run.results["split"], run.results["ood"]["protocol"]) for run in runs}
    if len(kinds) != 1:
        raise ValueError(f"expected runs of one split and protocol, got {sorted(kinds)}")
    detection = _over_seeds([(run.name, aurocs(run)) for run in runs])
    meaning = _over_seeds([(run.name, uses(run)) for run in runs])
    widths = half_widths(runs)
    protocols = {name: text for run in runs for name, text in run.results["ood"]["sets"].items()}
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
        *_table(meaning),
        "",
        *(
            f"* {name}: {text}; largest half-width of an interval of AUROC: {widths[name]:.3f}"
            for name, text in protocols.items()
        ),
    ]
    values = [
        (run.name, run.seed, kind, score, column, value)
        for run in runs
        for kind, found in (("auroc", aurocs(run)), (_USES, uses(run)))
        for score, row in found.items()
        for column, value in row.items()
    ]
    text = tables.csv_table(("run", "seed", "kind", "score", "column", "value"), values)
    out.mkdir(parents=True, exist_ok=True)
    files.write_text_atomically(out / "table.csv", text)
    _figure(detection).savefig(out / "detection.png", format="png", dpi=150)
    files.write_text_atomically(out / "table.md", "\n".join(lines) + "\n")


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=files.to_path)
    parser.add_argument("--out", required=True, type=files.to_path)
    arguments = parser.parse_args(argv)
    command = f"python -m studies.detection_table {' '.join(sys.argv[1:])}"
    try:
        runs = [read_run(directory) for directory in arguments.runs]
        write_detection_report(runs, arguments.out, command=command)
    except Exception as error:
        message = messages.for_person(
            error, packages=("jevb_jax", "configs", "studies", "__main__")
        )
        if message is None:
            raise
        parser.exit(1, f"{message}\n")


if __name__ == "__main__":
    main()
