"""The queue of runs at full size, in a small form: what an accelerator runs once must not fail there."""

import csv
import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jevb_jax.runs import files
from jevb_study import run
from jevb_study.train_one import ASKED_CONFIG, train_one
from studies import full_size, full_size_screening
from studies.changed_settings import changed

STUDIES = {"full_size": full_size, "full_size_screening": full_size_screening}

# The rest is as at full size: data files, outside sets, scores, optimizer, precision, target.
SMALL = {
    "augmentation__image_size": 16,
    "augmentation__small_crop_size": 8,
    "model__backbone": "convnet",
    "model__width": 4,
    "model__projector_hidden_dims": (16,),
    "model__embedding_dim": 16,
    "model__head_hidden_dim": 16,
    "train__batch_size": 96,
    "train__num_epochs": 1,
    "train__knn_every_epochs": 1,
    "train__health_every_steps": 2,
    "train__health_num_images": 64,
    "optimizer__warmup_epochs": 0.0,
    "evaluation__batch_size": 64,
    "evaluation__few_label_seeds": 1,
    "ood__corruptions": ("contrast",),
    "ood__num_corrupted_images": 20,
    "ood__num_bootstrap": 2,
}


def write_sets(folder: Path, outside: Any) -> None:
    """Every file that the studies name, with random images: the names and forms of the real ones."""
    draws = np.random.default_rng(0)
    folder.mkdir()
    shapes = {"cifar10_train": (320, 32, 32, 3), "cifar10_test": (60, 32, 32, 3)}
    for one in outside:
        (path,) = one["paths"]
        is_gray = one["name"] in ("mnist", "fashion_mnist")
        shapes[Path(path).stem] = (40, 28, 28, 1) if is_gray else (40, 32, 32, 3)
    for name, shape in shapes.items():
        images = draws.integers(0, 256, shape, dtype=np.uint8)
        np.savez(folder / f"{name}.npz", images=images, labels=np.arange(shape[0]) % 10)


# A case takes two CPU minutes of compiling, so all are nightly. They are the programs of the queue; its
# other runs differ in numbers alone.
@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.filterwarnings("ignore:.*clusters have fewer different images:UserWarning")
@pytest.mark.parametrize(
    ("name", "runs"),
    [
        ("full_size", ("jevb_narrow", "simsiam", "emp_ssl_muon")),
        ("full_size_screening", ("jevb_sgd_0.5", "jevb_muon_crops")),
    ],
)
def test_every_number_of_the_table_is_measured(tmp_path, monkeypatch, name, runs):
    monkeypatch.chdir(tmp_path)
    study = STUDIES[name].get_study().part(runs=runs, seeds=None)
    small = {key: changed(config, SMALL) for key, config in study.runs.items()}
    study = dataclasses.replace(study, runs=small)
    write_sets(tmp_path / "data", full_size.run_config("jevb").ood.outside)
    monkeypatch.setattr(run, "load_study", lambda _: study)
    for planned in study.plan(tmp_path / "out"):
        planned.directory.mkdir(parents=True)
        files.write_json_atomically(planned.directory / ASKED_CONFIG, planned.config)
        train_one(planned.directory)
    assert run.main(["queue", "--out=out"]) == 0  # finds all done, and reports
    rows = {row["run"]: row for row in csv.DictReader((tmp_path / "out/table.csv").open())}
    for run_name in runs:
        for measure in study.measures:
            value = rows[run_name][f"{measure.label}: seed 0"]
            belongs_to_jevb = measure.label.startswith(("jevb/", "posterior", "signal"))
            is_expected = run_name.startswith("jevb") or not belongs_to_jevb
            assert bool(value) == is_expected, (run_name, measure.label)
            assert not value or math.isfinite(float(value)), (run_name, measure.label)
    for figure in study.figures:
        assert (tmp_path / f"out/{figure.name}.png").is_file()
