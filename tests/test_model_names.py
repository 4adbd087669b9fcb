"""Encoders by name: which are found where, and what the shipped one does on real photographs."""

import numpy as np
import pytest
from sklearn.datasets import load_sample_images

import jevb_jax
from jevb_jax import model_names
from jevb_jax.runs import archive

SHIPPED = "jevb-cifar10-resnet8"
DIMENSIONS = {SHIPPED: 128, "jevb-cifar10-resnet18": 512, "simsiam-cifar10-resnet8": 128}


def write(directory, **manifest):
    arrays = {"x": np.zeros(1, np.float32)}
    archive.write_archive(directory, arrays=arrays, manifest=manifest, extra_files={})


def test_names_and_places(tmp_path, monkeypatch):
    monkeypatch.delenv(model_names.VARIABLE, raising=False)
    assert DIMENSIONS.keys() <= set(model_names.names())
    monkeypatch.setenv(model_names.VARIABLE, str(tmp_path / "release"))
    assert SHIPPED in model_names.names()  # the directory need not exist
    write(tmp_path / "release" / "mine")
    write(tmp_path / "release" / SHIPPED)
    (tmp_path / "release" / "notes").mkdir()
    assert {"mine", SHIPPED} <= set(model_names.names())
    assert "notes" not in model_names.names()
    assert model_names.find("mine") == tmp_path / "release" / "mine"
    assert model_names.find(SHIPPED) == tmp_path / "release" / SHIPPED
    for name in ("notes", "release/mine", "", "..", tmp_path / "release" / "mine"):
        assert model_names.find(name) is None
    # A directory of the same name goes before.
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    assert model_names.find("mine") is None


def test_an_unknown_name_lists_the_known_ones(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=rf"none of the encoders \[.*'{SHIPPED}'"):
        jevb_jax.load("jevb-cifar10-resnet50")


def tiles(image: np.ndarray, size: int) -> np.ndarray:
    rows, columns = (length // size for length in image.shape[:2])
    cut = image[: rows * size, : columns * size].reshape(rows, size, columns, size, 3)
    return cut.swapaxes(1, 2).reshape(-1, size, size, 3)


def test_the_weights_stay_small_enough_for_a_repository():
    shipped = (path for path in model_names._SHIPPED.rglob("*") if path.is_file())
    assert sum(path.stat().st_size for path in shipped) <= 25_000_000


@pytest.mark.slow
@pytest.mark.parametrize("name", DIMENSIONS)
def test_a_shipped_encoder_embeds_and_detects_without_any_data(name):
    model = jevb_jax.load(name)
    photographs = np.concatenate([tiles(image, 32)[::9] for image in load_sample_images().images])
    flat = np.full((40, 32, 32, 3), np.arange(40)[:, None, None, None] * 6, np.uint8)
    embeddings = model.embed(photographs)
    assert embeddings.shape == (len(photographs), DIMENSIONS[name])
    if name.startswith("jevb"):
        posterior = model.posterior(photographs[:3])
        assert np.all(posterior.scale > 0)
    scores = model.ood_score(np.concatenate([photographs, flat]))
    assert np.median(scores[: len(photographs)]) < np.median(scores[len(photographs) :])
    detector = model.detector(false_alarm_rate=0.05)
    assert detector.is_outside(flat).mean() > 0.9
