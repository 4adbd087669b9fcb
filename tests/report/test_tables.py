"""Tables, read again."""

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from jevb_jax.report import tables

ROOT = Path(__file__).resolve().parent.parent.parent


def measured(name: str, features: str, value: float, protocol: str = "p") -> dict[str, Any]:
    return {"name": name, "features": features, "value": value, "protocol": protocol}


def metrics(value: float) -> dict[str, float]:
    names = ("auroc", "aupr_out", "aupr_in", "fpr95_outside_positive", "fpr95_inside_positive")
    return {name: value + index / 100 for index, name in enumerate(names)}


RESULTS: dict[str, Any] = {
    "split": "test",
    "left_out": {"linear_5_labels_per_class_accuracy": "there is one class"},
    "trained": [
        measured("knn_20_accuracy", "representation", 1 / 3, "k = 20, of 7"),
        measured("linear_accuracy", "embedding", 0.5),
        measured("auroc_far", "b/labeled", 0.75),
        measured("auroc_far", "a/default", 0.25),
        measured("error_auroc_linear", "a/default", 0.125),
        measured("severity_correlation_blur", "a/default", 0.625),
    ],
    "untrained": [measured("knn_20_accuracy", "representation", 0.1)],
    "ood": {
        "protocol": "P",
        "default_score": "a/default",
        "chosen_score": "a/default",
        "with_labels": ["b/labeled"],
        "sets": {"mnist": 'all "of" it'},
        "rows": [
            {"score": "a/default", "outside": "mnist", "group": "far", **metrics(0.3)}
            | {"low": metrics(0.2), "high": metrics(0.4)}
        ],
    },
}


def test_markdown():
    lines = tables.markdown_table(["run", "AUROC"], [["a|b", "0.5"], ["c", "-"]])
    assert lines == ["| run | AUROC |", "|---|---|", r"| a\|b | 0.5 |", "| c | - |"]
    with pytest.raises(ValueError, match=r"2 columns, but a row of 1: \['c'\]"):
        tables.markdown_table(["run", "AUROC"], [["c"]])


@pytest.mark.parametrize("path", sorted((ROOT / "docs" / "results").glob("*/table.md")), ids=str)
def test_published_markdown_tables_come_out_the_same(path):
    blocks: list[list[str]] = []
    previous = ""
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("|"):
            if not previous.startswith("|"):
                blocks.append([])
            blocks[-1].append(line)
        previous = line
    assert blocks
    for header, _, *rows in blocks:
        cells = [[cell.strip() for cell in row[1:-1].split("|")] for row in (header, *rows)]
        assert tables.markdown_table(cells[0], cells[1:]) == [
            header,
            "|" + "---|" * len(cells[0]),
            *rows,
        ]


def test_csv():
    text = tables.csv_table(["a", "b"], [[1 / 3, None], ['say "x", y', 2]])
    assert text == 'a,b\n0.3333333333333333,\n"say ""x"", y",2\n'
    with pytest.raises(ValueError, match="2 columns, but a row of 3"):
        tables.csv_table(["a", "b"], [[1, 2, 3]])


def test_results_csv_holds_every_number_with_all_its_digits():
    rows = list(csv.DictReader(io.StringIO(tables.results_csv(json.loads(json.dumps(RESULTS))))))
    assert len(rows) == 6 + 1 + 5
    of_features = [row for row in rows if not row["set"]]
    expected = [(which, row) for which in ("trained", "untrained") for row in RESULTS[which]]
    for row, (which, source) in zip(of_features, expected, strict=True):
        assert row["encoder"] == which
        assert float(row["value"]) == source["value"]
        assert (row["features_or_score"], row["measure"]) == (source["features"], source["name"])
        assert row["protocol"] == source["protocol"]
        assert row["low"] == row["high"] == ""
    (found,) = RESULTS["ood"]["rows"]
    for row in rows[7:]:
        assert (row["features_or_score"], row["set"]) == ("a/default", "mnist")
        assert float(row["value"]) == found[row["measure"]]
        assert float(row["low"]) == found["low"][row["measure"]]
        assert float(row["high"]) == found["high"][row["measure"]]
        assert row["protocol"] == 'all "of" it'
    plain = {key: RESULTS[key] for key in ("split", "trained")}
    assert len(tables.results_csv(plain).splitlines()) == 1 + 6


def shown(table: Any) -> str:
    console = Console(record=True, width=160)
    console.print(table)
    return console.export_text()


def test_measures_stand_beside_those_of_the_untrained_encoder():
    assert [tuple(row) for row in tables.measure_rows(RESULTS)] == [
        ("knn_20_accuracy", "representation", 0.1, 1 / 3, "k = 20, of 7"),
        ("linear_accuracy", "embedding", None, 0.5, "p"),
    ]
    text = " ".join(shown(tables.classification_table(RESULTS)).split())
    assert "0.1000" in text
    assert "0.3333" in text
    assert "Not evaluated: linear_5_labels_per_class_accuracy: there is one class." in text


def test_an_encoder_that_was_not_measured_has_no_column():
    def headers(results):
        return [column.header for column in tables.classification_table(results).columns]

    assert headers(RESULTS) == ["features", "measure", "untrained", "trained"]
    for untrained in ([], [measured("knn_20_accuracy", "jevb/a score", 0.1)]):
        assert headers(RESULTS | {"untrained": untrained}) == ["features", "measure", "trained"]
    assert headers({"split": "test", "trained": []}) == ["features", "measure", "trained"]


def test_several_shifted_sets_are_shown_by_their_mean():
    names = ("linear_accuracy", "linear_accuracy_on_a", "linear_accuracy_on_b")
    rows = [
        {"name": name, "features": "representation", "value": 0.5, "protocol": ""}
        for name in (*names, "linear_accuracy_shifted")
    ]
    found = tables.measure_rows({"trained": rows})
    assert [row.name for row in found] == ["linear_accuracy", "linear_accuracy_shifted"]
    assert [row.name for row in tables.measure_rows({"trained": rows[:2]})] == list(names[:2])
    assert tables.results_csv({"trained": rows}).count("linear_accuracy_on_") == 2


def test_scores_fitted_with_labels_stand_below_the_others():
    table = tables.detection_table(RESULTS)
    assert [column.header for column in table.columns] == [
        *("score", "auroc far", "error auroc linear")
    ]
    cells = [list(column.cells) for column in table.columns]
    assert cells[0] == ["a/default *+", "b/labeled"]
    assert cells[1:] == [["0.250", "0.750"], ["0.125", ""]]
    assert "test split against P" in shown(table)
