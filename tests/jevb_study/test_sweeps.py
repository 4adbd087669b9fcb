"""Studies that the command line describes."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any, cast

import pytest

from configs import smoke
from jevb_jax.training.experiment import to_json_values
from jevb_study import run, tables
from jevb_study.evidence import read_evidence
from jevb_study.spec import Comparison, Logged, Result, Study, Sweep
from tests.jevb_study.fabricated import directory, fabricate, rows


def study_of(monkeypatch, tmp_path: Path, *options: str) -> Study:
    """What `jevb-study` would run."""
    found: list[Study] = []
    monkeypatch.setattr(run, "run_study", lambda study, *_, **__: found.append(study) or 0)
    assert run.main(["--config=smoke", *options, f"--out={tmp_path}"]) == 0
    return found[0]


def test_every_combination_is_a_run_and_nothing_else_changes(monkeypatch, tmp_path):
    options = ("--vary=jevb.df=1,inf", "--vary=method=jevb,simsiam", "--seeds=3, 5")
    made = study_of(monkeypatch, tmp_path, *options, "--set=train.num_epochs=2")
    assert made.seeds == (3, 5)
    for df, method in ((1.0, "jevb"), (1.0, "simsiam"), (math.inf, "jevb"), (math.inf, "simsiam")):
        text = "inf" if df == math.inf else "1"
        config = made.runs[f"jevb.df={text}+method={method}"]
        expected: Any = smoke.get_config()
        expected.jevb.df, expected.method, expected.train.num_epochs = df, method, 2
        assert to_json_values(config) == to_json_values(expected)
    assert len(made.runs) == 4
    (figure,) = made.figures
    assert isinstance(figure, Comparison)


def test_one_setting_with_numbers_is_drawn_as_a_curve(monkeypatch, tmp_path):
    made = study_of(monkeypatch, tmp_path, "--vary=jevb.df=1,5,inf")
    (figure,) = made.figures
    assert isinstance(figure, Sweep)
    assert dict(figure.runs) == {
        1: "jevb.df=1", 5: "jevb.df=5", math.inf: "jevb.df=inf"
    }  # fmt: skip
    assert figure.log_x
    labels = [measure.label for measure in made.measures]
    assert labels == [
        "linear_accuracy", "knn_20_accuracy", "knn_10_uniform_accuracy", "effective rank"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("model.projector_hidden_dims=(8,),(8, 16)", [(8,), (8, 16)]),
        ("model.projector_hidden_dims=[8,16]", [(8, 16)]),
        ("jevb.normalized=True,False", [True, False]),
        ("jevb.kl_weight=1e-3,0.1", [1e-3, 0.1]),
        ("train.batch_size=8", [8]),
        ("model.head_input=direction,embedding", ["direction", "embedding"]),
    ],
)
def test_values_have_the_types_of_the_setting(monkeypatch, tmp_path, text, value):
    setting = text.partition("=")[0]
    made = study_of(monkeypatch, tmp_path, f"--vary={text}")
    section, name = setting.split(".")
    configs = cast(list[Any], list(made.runs.values()))
    assert [config[section][name] for config in configs] == value


def test_the_report_has_the_measures_that_are_asked_for(tmp_path):
    options = ["--config=smoke", "--vary=jevb.df=1,2", f"--out={tmp_path}", "--report_only",
               "--measure=linear_accuracy", "--measure=health/effective_rank"]  # fmt: skip
    made = Study("x", {"jevb.df=1": smoke.get_config()}, (0,), ())
    fabricate(tmp_path, made, "jevb.df=1", 0, accuracy=0.5, ranks=(3.0, 4.0))
    assert run.main(options) == 0
    assert rows(tmp_path)["jevb.df=1"][1:] == ["0.5000 ± -", "4.0000 ± -"]
    assert rows(tmp_path)["jevb.df=2"][0] == "0 of 1; seed 0 not started"
    assert (tmp_path / "sweep.png").is_file()
    assert directory(tmp_path, "jevb.df=1", 0).is_dir()


def test_a_measure_that_no_run_has_is_told_with_those_that_there_are(tmp_path):
    measures = (Result("acuracy", "linear_acuracy"), Logged("health/rank", "health/rank"))
    made = Study("x", {"a": smoke.get_config()}, (0,), measures)
    assert tables.absent_measures(read_evidence(made, tmp_path)) == ""  # nothing is known yet
    fabricate(tmp_path, made, "a", 0, accuracy=0.5, ranks=(3.0,))
    told = tables.absent_measures(read_evidence(made, tmp_path))
    assert told.startswith("No finished run has linear_acuracy, health/rank. results.json has ")
    assert "linear_accuracy" in told
    assert "health/effective_rank" in told
    only = dataclasses.replace(made, measures=(Logged("health/rank", "health/rank"),))
    assert "results.json" not in tables.absent_measures(read_evidence(only, tmp_path))
    there = dataclasses.replace(made, measures=(Result("accuracy", "linear_accuracy"),))
    assert tables.absent_measures(read_evidence(there, tmp_path)) == ""


def test_of_many_numbers_the_most_similar_are_told(tmp_path):
    measures = (Result("far", "auroc_far", "jevb/likelihood"), Result("x", "nothing_like_it"))
    made = Study("x", {"a": smoke.get_config()}, (0,), measures)
    fabricate(tmp_path, made, "a", 0, accuracy=0.5, ranks=(3.0,))
    path = directory(tmp_path, "a", 0) / "results.json"
    results = json.loads(path.read_text())
    results["trained"] += [
        {**results["trained"][0], "name": f"auroc_{group}", "features": f"jevb/score_{i}"}
        for group in ("near", "far")
        for i in range(100)
    ] + [{**results["trained"][0], "name": "auroc_far", "features": "jevb/likelihod"}]
    path.write_text(json.dumps(results))
    told = tables.absent_measures(read_evidence(made, tmp_path))
    assert "auroc_far:jevb/likelihod" in told
    assert " names, the most similar are " in told
    assert len(told) < 1000


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--vary=jevb.dff=1,2"], r"no setting jevb\.dff; did you mean jevb\.df"),
        (["--vary=jevb.df"], "--vary takes SETTING=VALUE, got --vary=jevb.df"),
        (["--set=jevb.df=1,2"], "--set takes one value"),
        (["--vary=jevb.df=few"], r"jevb\.df cannot be 'few'"),
        (["--vary=jevb.df=1,1"], "every value must occur once"),
        (["--vary=jevb.df=1", "--vary=jevb.df=2"], "give each setting once"),
        (["--vary=jevb.df=-1,1"], r"run jevb\.df=-1: .*jevb\.df"),
        (["--seeds=0,x"], "--seeds takes whole numbers"),
        (["--seeds=0,0"], "seed must occur once"),
        (["--config=nowhere"], "--config must name a config file"),
    ],
)
def test_mistakes_are_told_before_anything_runs(tmp_path, options, says):
    with pytest.raises(SystemExit, match=says):
        run.main(["--config=smoke", *options, f"--out={tmp_path}/out"])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["file.py", "--config=smoke"],
        ["file.py", "--set=seed=1"],
        ["--config=smoke", "--runs=a"],
    ],
)
def test_a_file_or_a_config(tmp_path, options, capsys):
    with pytest.raises(SystemExit, match="2"):
        run.main([*options, f"--out={tmp_path}/out"])
    assert "study file" in capsys.readouterr().err
