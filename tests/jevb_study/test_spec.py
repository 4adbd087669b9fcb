"""What a study file may say, and that ours can be run."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jevb_jax.training import experiment
from jevb_study.spec import Comparison, Curves, Logged, Study, Sweep, load_study
from tests.jevb_study.fabricated import config

STUDIES = [
    path
    for path in sorted((Path(__file__).resolve().parents[2] / "studies").glob("*.py"))
    if "def get_study(" in path.read_text(encoding="utf-8")
]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"runs": {}}, "at least one run"),
        ({"seeds": ()}, "one seed"),
        ({"seeds": (1, 2, 1)}, r"every seed .*\[1\]"),
        ({"runs": {"a/b": config()}}, "a/b"),
        ({"runs": {"": config()}}, "file names"),
        ({"runs": {"a": config(), "b": config()}}, "runs a and b have the same config"),
        ({"measures": (Logged("x", "k"), Logged("x", "l"))}, r"measure .*\['x'\]"),
        ({"figures": (Comparison("c", "", ("a", "z"), ("m",)),)}, r"figure c: no runs \['z'\]"),
        ({"figures": (Comparison("c", "", ("a",), ("n",)),)}, r"no measures \['n'\] among \['m'\]"),
        ({"figures": (Sweep("s", "", "x", {1.0: "z"}, ("m",)),)}, r"no runs \['z'\]"),
        ({"figures": (Sweep("s", "", "x", {1.0: "a"}, ("m",), references=("y",)),)}, "'y'"),
        ({"figures": (Curves("c", "", ("z",), ("k",)),)}, r"\['z'\] among \['a'\]"),
        ({"figures": (Curves("c", "", ("a",), ()),)}, "nothing to draw"),
        ({"figures": (Curves("c", "", ("a",), ("k",)),) * 2}, r"figure .*\['c'\]"),
    ],
)
def test_what_does_not_fit_is_named(changes, message):
    fitting = {"runs": {"a": config()}, "seeds": (0,), "measures": (Logged("m", "k"),)}
    Study("fits", **fitting)
    with pytest.raises(ValueError, match=message):
        Study("does not", **(fitting | changes))


def test_a_part_has_its_runs_and_what_can_be_drawn_of_them(fabricated):
    whole, directory = fabricated
    averages = {"both tails": ("cauchy", "t"), "two": ("t", "simsiam")}
    whole = dataclasses.replace(whole, averages=averages)
    part = whole.part(runs=["t", "simsiam"], seeds=[2, 0])
    assert [(run.name, run.seed) for run in part.plan(directory)] == [
        ("simsiam", 0),
        ("t", 0),
        ("simsiam", 2),
        ("t", 2),
    ]
    of_whole = {run[:2]: run for run in whole.plan(directory)}
    assert all(run == of_whole[run[:2]] for run in part.plan(directory))
    rows, sweep, curves = part.figures
    assert isinstance(rows, Comparison)
    assert rows.runs == ["simsiam", "t"]
    assert isinstance(sweep, Sweep)
    assert (sweep.runs, sweep.references) == ({5.0: "t"}, ["simsiam"])
    assert isinstance(curves, Curves)
    assert curves.runs == ["t"]
    assert part.averages == {"two": ("t", "simsiam")}
    assert [figure.name for figure in whole.part(runs=["simsiam"], seeds=None).figures] == ["all"]
    assert whole.part(runs=None, seeds=None).plan(directory) == whole.plan(directory)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"runs": ["t", "no"]}, r"some of the study's runs, \['simsiam', .*got \['t', 'no'\]"),
        ({"runs": []}, r"study's runs.*got \[\]"),
        ({"seeds": [3]}, r"some of the study's seeds, \[0, 1, 2\], got \[3\]"),
    ],
)
def test_a_part_that_the_study_does_not_have_is_refused(fabricated, asked, message):
    with pytest.raises(ValueError, match=message):
        fabricated[0].part(**{"runs": None, "seeds": None, **asked})


@pytest.mark.slow
@pytest.mark.parametrize("path", STUDIES, ids=lambda p: p.stem)
def test_study_builds_every_run(path, tmp_path):
    runs: Any = load_study(path).runs
    small = {"source": "shapes", "image_size": 16, "num_test_examples": 200}
    for made in runs.values():
        if made.data.source == "features":
            views = (2,) if "views" in made.data.train_paths[0] else ()
            features = np.random.default_rng(0).normal(size=(300, *views, 4)).astype(np.float32)
            np.savez(tmp_path / "f.npz", features=features, labels=np.arange(300) % 10)
            np.savez(tmp_path / "g.npz", features=features[::-1], labels=np.arange(300) % 10)
            made.data.train_paths = (str(tmp_path / "f.npz"),)
            made.data.test_paths = (str(tmp_path / "g.npz"),)
            made.train.batch_size = 128
        elif made.data.source != "digits":  # digits are at hand
            # Of one class, still more than the 200 neighbours of its k-NN.
            num_images = 300 if made.data.inlier_class < 0 else 4000
            made.data.update(small | {"num_train_examples": num_images})
            made.augmentation.crop_from = "square"  # shapes have no files
            made.train.batch_size = 128
        built = experiment.build_experiment(made)
        assert built.num_train_steps > 0
        assert built.config["method"] == made.method
