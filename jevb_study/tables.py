"""The table of a study, for people (Markdown) and for programs (CSV)."""

import collections
import difflib
from collections.abc import Sequence
from typing import Any

import numpy as np

from jevb_jax.report import tables
from jevb_study.evidence import Evidence
from jevb_study.spec import Logged, Result

# A sentence names at most so many numbers; an evaluation has hundreds.
_MOST_NAMES = 12


def in_digits_of(value: float, near: float) -> str:
    """A number with as many digits as suit a number of the size of `near`."""
    size = abs(near)
    return (
        f"{value:.3e}" if size >= 1e5 or 0 < size < 1e-2 else f"{value:.{4 if size < 10 else 2}f}"
    )


def _cell(values: Sequence[float], num_finished: int) -> str:
    """Mean ± sample standard deviation; n is added where it differs from that of the row."""
    if not values:
        return "-"
    mean = float(np.mean(values))
    spread = in_digits_of(float(np.std(values, ddof=1)), mean) if len(values) > 1 else "-"
    count = "" if len(values) == num_finished else f" (n = {len(values)})"
    return f"{in_digits_of(mean, mean)} ± {spread}{count}"


def _facts(evidence: Evidence, command: str) -> list[str]:
    """How the numbers were made, and which runs had other settings than the study has now."""
    environments = [data.environment for data in evidence.found if data.environment]
    dirty = {True: " with uncommitted changes", False: ""}
    facts = {
        "commit": {
            f"{e['commit'] or 'unknown'}{dirty[e['uncommitted_changes']]}" for e in environments
        },
        "jax": {e["versions"]["jax"] for e in environments},
        "device": {f"{len(e['devices'])} x {e['devices'][0]}" for e in environments},
    }
    return [
        f"command: `{command}`",
        f"seeds: {', '.join(map(str, evidence.study.seeds))}",
        *(f"{name}: {', '.join(sorted(values))}" for name, values in facts.items()),
        *(
            f"{run.name}, seed {run.seed} ran with {key} = {old!r}; now {new!r}"
            for run in evidence.plan
            for key, (old, new) in evidence.runs[run.name][run.seed].changes(run.config).items()
        ),
    ]


def _footnotes(evidence: Evidence) -> list[str]:
    """Descriptions of the measures, with their protocols."""
    lines = []
    finished = [data for data in evidence.found if data.results is not None]
    for measure in evidence.study.measures:
        if isinstance(measure, Logged):
            what = f"{measure.take} logged value of `{measure.key}`"
        else:
            entries = [entry for data in finished if (entry := data.entry(measure))]
            texts = collections.Counter(entry["protocol"] for entry in entries)
            what = f"`{measure.name}`, {measure.features}, {measure.encoder} encoder"
            for text, count in texts.items():
                what += f"; {text}" + (f" ({count} of {len(entries)})" if len(texts) > 1 else "")
        if all(data.value(measure) is None for data in finished):
            what += " (no finished run has it)"
        lines.append(f"{measure.label}: {what}")
    return lines


def _row_name(name: str, features: str) -> str:
    """A number of `results.json` as --measure takes it."""
    return name + ("" if features == "representation" else f":{features}")


def _nearest(wanted: Sequence[str], names: set[str]) -> str:
    """The names, or if they are many, those that are most like the wanted ones."""
    if len(names) <= _MOST_NAMES:
        return ", ".join(sorted(names)) or "no numbers"
    count = -(-_MOST_NAMES // max(len(wanted), 1))
    near = {
        name
        for one in wanted
        for name in difflib.get_close_matches(one, sorted(names), n=count, cutoff=0)
    }
    return f"{len(names)} names, the most similar are {', '.join(sorted(near))}"


def absent_measures(evidence: Evidence) -> str:
    """A sentence about measures that no finished run has, with names like theirs; or ""."""
    finished = [data for data in evidence.found if data.results is not None]
    absent = [
        measure
        for measure in evidence.study.measures
        if finished and all(data.value(measure) is None for data in finished)
    ]
    if not absent:
        return ""
    logged = {key for data in finished for record in data.records for key in record if "/" in key}
    found = {
        _row_name(row["name"], row["features"])
        for data in finished
        for row in (data.results or {}).get("trained", ())
    }
    wanted = [_row_name(one.name, one.features) for one in absent if isinstance(one, Result)]
    wanted_logged = [one.key for one in absent if isinstance(one, Logged)]
    told = f"No finished run has {', '.join((*wanted, *wanted_logged))}."
    if wanted:
        told += f" results.json has {_nearest(wanted, found)}."
    if wanted_logged:
        told += f" metrics.jsonl has {_nearest(wanted_logged, logged)}."
    return told


def markdown_table(evidence: Evidence, command: str) -> str:
    """`table.md`: how the numbers were made, means over seeds, protocols, figures."""
    study = evidence.study
    labels = [measure.label for measure in study.measures]
    rows = []
    for name in (*study.runs, *study.averages):
        columns = [[*evidence.values(name, label).values()] for label in labels]
        if name in study.averages:
            num_finished = max(map(len, columns))
        else:
            num_finished = sum(one.results is not None for one in evidence.runs[name].values())
        cells = [_cell(values, num_finished) for values in columns]
        rows.append([name, evidence.status(name), *cells])
    lines = [
        f"# {study.title}",
        "",
        *(f"* {fact}" for fact in _facts(evidence, command)),
        "",
        "Mean ± sample standard deviation over the finished seeds.",
        "",
        *tables.markdown_table(["run", "finished", *labels], rows),
        "",
        *(f"* {note}" for note in _footnotes(evidence)),
    ]
    for figure in study.figures:
        lines += ["", f"![{figure.title}]({figure.name}.png)"]
    return "\n".join(lines) + "\n"


def csv_table(evidence: Evidence) -> str:
    """`table.csv`: mean, sample standard deviation, count and the value of every seed."""
    study = evidence.study
    parts = ("mean", "std", "n", *(f"seed {seed}" for seed in study.seeds))
    labels = [measure.label for measure in study.measures]
    rows: list[list[Any]] = []
    for run in (*study.runs, *study.averages):
        rows.append([run, evidence.status(run)])
        for label in labels:
            values = evidence.values(run, label)
            numbers = list(values.values())
            mean = float(np.mean(numbers)) if numbers else ""
            spread = float(np.std(numbers, ddof=1)) if len(numbers) > 1 else ""
            seeds = (values.get(seed, "") for seed in study.seeds)
            rows[-1] += [mean, spread, len(numbers), *seeds]
    header = ["run", "finished", *(f"{label}: {part}" for label in labels for part in parts)]
    return tables.csv_table(header, rows)
