"""Markdown and CSV tables of any rows; tables of a run's results as CSV and for the terminal."""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from rich.table import Table

from jevb_jax.evaluation.accuracy import FEATURE_NAMES, left_out_lines
from jevb_jax.evaluation.detection_metrics import OODMetrics


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table.

    Args:
      header: names of the columns.
      rows: cells; vertical bars in them are escaped.

    Returns:
      Lines without line ends.

    Raises:
      ValueError: a row of another length than the header.
    """

    def line(cells: Sequence[str]) -> str:
        if len(cells) != len(header):
            raise ValueError(f"{len(header)} columns, but a row of {len(cells)}: {list(cells)}")
        return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"

    return [line(header), "|" + "---|" * len(header), *map(line, rows)]


def csv_table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Text of a CSV table; each line ends with a line feed.

    Args:
      header: names of the columns.
      rows: cells; a float is written with all its digits, None as an empty cell.

    Returns:
      The text.

    Raises:
      ValueError: a row of another length than the header.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    for row in rows:
        if len(row) != len(header):
            raise ValueError(f"{len(header)} columns, but a row of {len(row)}: {list(row)}")
        writer.writerow(row)
    return text.getvalue()


# --- Results of a run ---


class MeasureRow(NamedTuple):
    """A measure of the trained encoder and of the untrained one.

    Attributes:
      name: such as "linear_accuracy".
      features: the features that were measured.
      untrained: value before training, or None.
      trained: value after training.
      protocol: how it was measured.
    """

    name: str
    features: str
    untrained: float | None
    trained: float
    protocol: str


def measure_rows(results: Mapping[str, Any]) -> list[MeasureRow]:
    """Measures of features. Measures of scores are in `detection_table`.

    Accuracies on each of several shifted sets are left to `results.csv`; their mean is here.

    Args:
      results: the content of `results.json`.

    Returns:
      The rows, in the order of the results.
    """
    means = {row["name"] for row in results["trained"] if row["name"].endswith("_shifted")}
    before = {(row["features"], row["name"]): row["value"] for row in results.get("untrained", ())}
    return [
        MeasureRow(
            row["name"],
            row["features"],
            before.get((row["features"], row["name"])),
            row["value"],
            row["protocol"],
        )
        for row in results["trained"]
        if row["features"] in FEATURE_NAMES
        and not ("_on_" in row["name"] and f"{row['name'].split('_on_')[0]}_shifted" in means)
    ]


def encoder_columns(
    rows: Sequence[MeasureRow],
) -> tuple[tuple[str, ...], list[tuple[float | None, ...]]]:
    """The names of the columns of encoders, and the values of each row.

    The untrained encoder has a column only if something was measured for it.
    """
    if any(row.untrained is not None for row in rows):
        return ("untrained", "trained"), [(row.untrained, row.trained) for row in rows]
    return ("trained",), [(row.trained,) for row in rows]


_CSV_COLUMNS = (
    "encoder",
    "features_or_score",
    "measure",
    "set",
    "value",
    "low",
    "high",
    "protocol",
)


def results_csv(results: Mapping[str, Any]) -> str:
    """Every number of the results in one table.

    Args:
      results: the content of `results.json`.

    Returns:
      CSV text, with a header.
    """
    rows: list[Sequence[Any]] = [
        (encoder, row["features"], row["name"], "", row["value"], "", "", row["protocol"])
        for encoder in ("trained", "untrained")
        for row in results.get(encoder, ())
    ]
    found = results.get("ood", {"rows": ()})
    for row in found["rows"]:
        protocol = found["sets"][row["outside"]]
        for metric in OODMetrics._fields:
            values = (row[metric], row["low"][metric], row["high"][metric])
            rows.append(("trained", row["score"], metric, row["outside"], *values, protocol))
    return csv_table(_CSV_COLUMNS, rows)


def classification_table(results: Mapping[str, Any]) -> Table:
    """k-NN and linear accuracies for the terminal, after training, and before if they were measured.

    Args:
      results: the content of `results.json`.

    Returns:
      A rich table.
    """
    table = Table(
        title=f"{results['split']} split; protocols in results.json",
        caption="\n".join(left_out_lines(results.get("left_out", {}))) or None,
    )
    for column in ("features", "measure"):
        table.add_column(column)
    rows = measure_rows(results)
    columns, values_of_rows = encoder_columns(rows)
    for column in columns:
        table.add_column(column, justify="right")
    for row, values in zip(rows, values_of_rows, strict=True):
        cells = ("" if value is None else f"{value:.4f}" for value in values)
        table.add_row(row.features, row.name, *cells)
    return table


def detection_table(results: Mapping[str, Any]) -> Table:
    """All scores for the terminal: AUROC of each group of sets, AUROC of errors, the crop check.

    Args:
      results: the content of `results.json`, with "ood".

    Returns:
      A rich table. `*` marks the default score and `+` the score that was chosen on validation
      images. Scores below the line were fitted with labels.
    """
    found = results["ood"]
    rows: dict[str, dict[str, float]] = {}
    for row in results["trained"]:
        if row["name"].startswith(("auroc_", "error_auroc_", "r_auroc", "cropped_")):
            rows.setdefault(row["features"], {})[row["name"]] = row["value"]
    columns = list(dict.fromkeys(name for values in rows.values() for name in values))
    table = Table(
        title=f"{results['split']} split against {found['protocol']}",
        caption="* default of the method, + chosen on validation images; all sets are in results.csv",
    )
    table.add_column("score", no_wrap=True)
    for column in columns:
        table.add_column(column.replace("_", " "), justify="right")
    with_labels = set(found["with_labels"])
    for is_labeled in (False, True):
        names = [name for name in rows if (name in with_labels) == is_labeled]
        for name in names:
            mark = ("*" if name == found["default_score"] else "") + (
                "+" if name == found["chosen_score"] else ""
            )
            values = [rows[name].get(column) for column in columns]
            table.add_row(
                f"{name} {mark}".strip(),
                *("" if value is None else f"{value:.3f}" for value in values),
                end_section=name == names[-1],
            )
    return table
