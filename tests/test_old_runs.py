"""A run that an older version wrote: it still loads, goes on, and is evaluated.

`fixtures/run_of_2026_11.tar.xz` was made at commit 534e08d: the run of `configs/smoke.py` at its step 30
of 40, a detector saved from it, and what that version computed with both.
"""

import json
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import jevb_jax
from jevb_jax import commands
from jevb_jax.settings import run_config

FIXTURE = Path(__file__).resolve().parent / "fixtures" / "run_of_2026_11.tar.xz"


@pytest.fixture(scope="module")
def old(tmp_path_factory):
    directory = tmp_path_factory.mktemp("old")
    with tarfile.open(FIXTURE) as archive:
        archive.extractall(directory, filter="data")
    return directory / "old_run"


def images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (6, 16, 16, 3), dtype=np.uint8)


def expected(old: Path) -> Any:
    with np.load(old / "expected.npz") as file:
        return dict(file)


@pytest.mark.slow
def test_it_loads_and_says_the_same(old):
    model = jevb_jax.load(old / "run")
    found = expected(old)
    np.testing.assert_allclose(model.embed(images()), found["embeddings"], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(model.ood_score(images()), found["scores"], rtol=1e-3)


WITHOUT_OPTAX = """
import sys
sys.modules["optax"] = None  # an import of it is an error
import numpy as np
import jevb_jax
images = np.random.default_rng(0).integers(0, 256, (6, 16, 16, 3), dtype=np.uint8)
np.save(sys.argv[2], jevb_jax.load(sys.argv[1]).embed(images))
"""


@pytest.mark.slow
def test_it_loads_whatever_became_of_its_optimizer(old, tmp_path):
    # Its checkpoint names the parts of an optimizer's state as Optax did then.
    file = tmp_path / "embeddings.npy"
    subprocess.run([sys.executable, "-c", WITHOUT_OPTAX, old / "run", file], check=True)
    np.testing.assert_allclose(np.load(file), expected(old)["embeddings"], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_its_detector_loads_and_says_the_same(old):
    detector = jevb_jax.load_detector(old / "detector")
    found = expected(old)
    assert detector.threshold == pytest.approx(float(found["threshold"]))
    np.testing.assert_allclose(detector.score(images()), found["detector_scores"], rtol=1e-3)


@pytest.mark.slow
@pytest.mark.nightly
def test_it_goes_on_to_its_end_and_is_evaluated(old, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(old / "run", run)
    config = run_config.load_config(run)
    assert commands.train(config, run)
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [r["train/loss"] for r in records if r["step"] == 40 and "train/loss" in r]
    found = expected(old)
    np.testing.assert_allclose(losses, [found["loss_at_the_end"]], rtol=1e-4)
    results = json.loads((run / "results.json").read_text())
    (knn,) = (
        row["value"]
        for row in results["trained"]
        if (row["name"], row["features"]) == ("knn_20_accuracy", "representation")
    )
    assert knn == pytest.approx(float(found["knn_accuracy"]), abs=0.02)
    assert commands.evaluate(config, run, step=None)["step"] == 40
