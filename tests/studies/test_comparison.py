"""The page of comparisons is what its generator writes, and its numbers are those of the tables."""

import csv
import re
from pathlib import Path

import pytest

from studies import anchors, comparison
from studies.published_numbers import Ours

DOCS = Path(__file__).parents[2] / "docs"


def test_the_page_is_up_to_date(tmp_path):
    assert comparison.main([f"--out={tmp_path / 'page.md'}"]) == 0
    assert (tmp_path / "page.md").read_text() == (DOCS / "comparison.md").read_text(), (
        "run `python -m studies.comparison --out=docs/comparison.md`"
    )


def seeds_of(one: Ours) -> list[float]:
    """The numbers of the single seeds in a table, by another way than the page's."""
    with (DOCS / "results" / one.table).open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["run"] == one.run]
    if "seed" in rows[0]:
        score, column = one.measure.split(", ")
        return [float(r["value"]) for r in rows if (r["score"], r["column"]) == (score, column)]
    if "measure" in rows[0]:
        return [float(row["value"]) for row in rows if row["measure"] == one.measure]
    return [float(v) for k, v in rows[0].items() if k.startswith(f"{one.measure}: seed ") and v]


def test_every_number_of_ours_is_the_mean_of_its_seeds():
    for question in comparison.QUESTIONS:
        for one in question.ours:
            assert (DOCS / one.page).exists()
            seeds = seeds_of(one)
            if seeds:  # the mean over classes has none of its own
                mean = sum(seeds) / len(seeds)
                value = float(one.value.split(" ")[0].replace(",", ""))
                assert value == pytest.approx(mean, abs=5e-4), one
                assert one.value.endswith(f"n = {len(seeds)}") == (len(seeds) > 1)


def test_a_number_that_no_table_has_is_named():
    missing = Ours("x", "uncertainty/table.csv", "direction", "colour", "", "")
    with pytest.raises(ValueError, match=r"uncertainty/table\.csv has no 'colour' of the run 'dir"):
        _ = missing.value
    with pytest.raises(ValueError, match="of the run 'nobody'"):
        _ = Ours("x", "uncertainty/table.csv", "nobody", "own, near", "", "").value


def test_the_table_of_differences_has_every_protocol_that_a_test_compares():
    tests = Path(__file__).parents[1] / "evaluation"
    compared = {
        name
        for path in tests.glob("test_*.py")
        for name in re.findall(r'\bsame\(\s*"([^"]+)"', path.read_text(encoding="utf-8"))
    }
    assert compared == set(anchors.REFERENCES)
    row = {"protocol": "R-AUROC", "values": "1", "largest difference": "0.0e+00"}
    with pytest.raises(ValueError, match="only one of the table of protocols and REFERENCES has"):
        anchors.difference_lines([row])
    lines = anchors.difference_lines([row], {"R-AUROC": "a loop"})
    assert "| R-AUROC | a loop | 1 | 0.0e+00 |" in lines[2]


def test_an_anchor_is_reached_by_a_number_that_is_as_large():
    reached = [one.what for one in anchors.ANCHORS if one.is_reached]
    assert reached == ["R-AUROC", "crops are less certain", "people's entropy"]
    assert "\n3 of 8. " in "\n" + anchors.anchor_lines()[1]
