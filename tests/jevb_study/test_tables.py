"""The table of a study, against NumPy."""

import csv
import dataclasses
import io

import numpy as np
import pytest
from PIL import Image

from jevb_study import tables
from jevb_study.run import write_report
from jevb_study.spec import Result, Study
from tests.jevb_study.fabricated import MEASURES, config, directory, fabricate, rows


def test_average_of_runs_is_taken_seed_by_seed(tmp_path):
    made = Study(
        title="One class",
        runs={f"class_{c}": config(df=float(c)) for c in (1, 2)},
        seeds=(0, 1),
        measures=MEASURES[:1],
        averages={"mean": ("class_1", "class_2")},
    )
    values = {("class_1", 0): 0.5, ("class_1", 1): 0.7, ("class_2", 0): 0.6}
    for (name, seed), accuracy in values.items():
        fabricate(tmp_path, made, name, seed, accuracy=accuracy)
    write_report(made, tmp_path, command="x")
    assert rows(tmp_path)["mean"] == ["mean of 2 runs", "0.5500 ± -"]  # seed 1 is not there yet
    fabricate(tmp_path, made, "class_2", 1, accuracy=0.9)
    write_report(made, tmp_path, command="x")
    spread = np.std([0.55, 0.8], ddof=1)
    assert rows(tmp_path)["mean"] == ["mean of 2 runs", f"0.6750 ± {spread:.4f}"]
    assert "mean,mean of 2 runs,0.675" in (tmp_path / "table.csv").read_text()
    for averages in ({"class_1": ("class_2",)}, {"mean": ("class_3",)}, {"mean": ()}):
        with pytest.raises(ValueError, match="needs a name of its own and runs among"):
            dataclasses.replace(made, averages=averages)


def test_table_agrees_with_numpy(fabricated):
    made, out = fabricated
    write_report(made, out, command="python -m jevb_study --this")
    table = rows(out)
    assert table["run"] == ["finished", *(measure.label for measure in MEASURES)]
    mean, spread = np.mean([0.5, 0.52, 0.57]), np.std([0.5, 0.52, 0.57], ddof=1)
    assert table["t"][:2] == ["3 of 3", f"{mean:.4f} ± {spread:.4f}"]
    assert table["t"][2] == f"{mean / 2:.4f} ± {spread / 2:.4f}"
    assert table["t"][3:] == ["5.0000 ± 1.0000", "10.00 ± 1.00", "3.0000 ± 0.0000"]
    assert table["simsiam"][3:] == ["-", "-", "-"]  # it logs no rank
    unfinished = "1 of 3; seed 1 unfinished at step 10; seed 2 not started"
    assert table["cauchy"] == [
        unfinished, "0.4000 ± -", "0.2000 ± -", "20.50 ± -", "20.50 ± -", "2.0000 ± -"
    ]  # fmt: skip
    assert table["gaussian"][0] == "1 of 3; 2 failed: NonFiniteError at step 20, 21"
    assert table["gaussian"][1] == "0.3000 ± -"  # of the finished seed alone

    text = (out / "table.md").read_text()
    for fact in (
        "# Tails",
        "command: `python -m jevb_study --this`",
        "seeds: 0, 1, 2",
        "commit: abc123",
        "jax: 0.10.2",
        "device: 1 x cpu",
        "linear: `linear_accuracy`, representation, trained encoder; probe on test\n",
        "; seed 0 on test (6 of 8); seed 1 on test (2 of 8)",
        "rank: last logged value of `health/effective_rank`",
    ):
        assert fact in text, fact
    for figure in made.figures:
        assert f"({figure.name}.png)" in text
        with Image.open(out / f"{figure.name}.png") as image:
            assert min(image.size) > 300

    by_run = {r["run"]: r for r in csv.DictReader(io.StringIO((out / "table.csv").read_text()))}
    assert float(by_run["t"]["linear: mean"]) == mean
    assert float(by_run["t"]["linear: std"]) == spread
    assert [by_run["t"][f"linear: seed {s}"] for s in range(3)] == ["0.5", "0.52", "0.57"]
    cauchy = [by_run["cauchy"][f"linear: {p}"] for p in ("mean", "std", "n", "seed 0", "seed 1")]
    assert cauchy == ["0.4", "", "1", "0.4", ""]
    assert by_run["gaussian"]["rank: n"] == "1"


def test_a_measure_of_some_seeds_or_of_no_run_says_so(fabricated):
    made, out = fabricated
    (directory(out, "t", 2) / "metrics.jsonl").unlink()
    made = Study("x", made.runs, made.seeds, (*MEASURES, Result("typo", "linear_acuracy")))
    write_report(made, out, command="")
    assert rows(out)["t"][3] == "5.5000 ± 0.7071 (n = 2)"
    assert rows(out)["t"][6] == "-"
    text = (out / "table.md").read_text()
    assert text.count("(no finished run has it)") == 1
    assert "typo: `linear_acuracy`, representation, trained encoder (no finished" in text


@pytest.mark.parametrize(
    ("value", "near", "text"),
    [
        (0.5, 0.5, "0.5000"), (0.0, 0.0, "0.0000"), (-9.99999, -9.99999, "-10.0000"),
        (1.25, 12.0, "1.25"), (2e-5, 2e-5, "2.000e-05"), (1.0, 3e6, "1.000e+00"),
    ],
)  # fmt: skip
def test_digits_suit_the_mean(value, near, text):
    assert tables.in_digits_of(value, near) == text
