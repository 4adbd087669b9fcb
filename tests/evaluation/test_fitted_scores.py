"""Scores saved with a run: the same numbers without training images, or a clear error."""

import dataclasses
import functools
import io
import json
import pickle
import types
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from jax.tree_util import Partial
from rich.console import Console

from jevb_jax import commands, export
from jevb_jax import model as model_module
from jevb_jax.evaluation import fitted_scores
from jevb_jax.evaluation.fitted_scores import FittedScores
from jevb_jax.evaluation.gaussian_detectors import Gaussians
from jevb_jax.evaluation.neighbor_detectors import feature_norm_score
from jevb_jax.evaluation.score_table import OfFeature
from jevb_jax.images.arrays import digits
from jevb_jax.loading import load
from jevb_jax.model import Model
from jevb_jax.runs import archive
from jevb_jax.runs.archive import ArchiveError
from jevb_jax.settings.config_versions import versioned
from tests.test_export import small_model

DEFAULT = "jevb/mixture_and_residual"
OTHER = "embedding/mahalanobis"


class Saved(NamedTuple):
    model: Model
    fitted: FittedScores
    images: np.ndarray
    expected: dict[str, np.ndarray]


def described(model: Model, scores: Any, calibration: Any, **changes: Any) -> FittedScores:
    given: dict[str, Any] = {
        "is_fitted": {DEFAULT, OTHER},
        "first": DEFAULT,
        "max_bytes": 1_000_000,
        "weights": fitted_scores.weights_sha256(model.variables),
        "settings": fitted_scores.settings_of_fit(model.settings.ood),
        "left_out": {},
    }
    return fitted_scores.describe(scores, calibration, **(given | changes))


@pytest.fixture(scope="module")
def saved() -> Saved:
    model, images = small_model(), digits().images
    fit, calibration, new = images[:60], images[60:100], images[100:164]
    scores = {name: model.scorer(name, fit) for name in (DEFAULT, OTHER)}
    scores["embedding/norm"] = model.scorer("embedding/norm", None)
    values = {name: model.scores_of(calibration, name, scores[name]) for name in scores}
    expected = {name: model.scores_of(new, name, scores[name]) for name in scores}
    return Saved(model, described(model, scores, values), new, expected)


@pytest.fixture(autouse=True)
def no_training_images(monkeypatch):
    def no_data(**_: Any) -> Any:
        raise FileNotFoundError("train.npz")

    monkeypatch.setattr(model_module, "load_dataset", no_data)


def model_of(directory: Path, like: Model, **changes: Any) -> Model:
    read = functools.partial(fitted_scores.of_run, directory, 7)
    if changes:
        given = {"config": like.config, "variables": like.variables, "step": 7} | changes
        return Model(**given, read_fitted=read)
    model = like.with_variables(like.variables)  # with the compiled programs
    model._read_fitted = read
    return model


@pytest.mark.slow
def test_scores_and_threshold_need_no_training_images(saved, tmp_path):
    fitted_scores.write(tmp_path, 7, saved.fitted)
    model = model_of(tmp_path, saved.model)
    for name, expected in saved.expected.items():
        np.testing.assert_array_equal(model.ood_score(saved.images, name), expected, err_msg=name)
        detector = model.detector(0.1, name)
        # The 37th smallest of 40: ceil(41 * 0.9).
        assert detector.threshold == np.sort(saved.fitted.calibration[name])[36]
        np.testing.assert_array_equal(
            detector.is_outside(saved.images), expected > detector.threshold
        )
    again = pickle.loads(pickle.dumps(model))
    assert again.detector(0.1).threshold == model.detector(0.1).threshold
    # Which other scores there are depends on nothing but the file.
    with pytest.raises(ValueError, match=r"train.npz\)\. Pass fit_images= with"):
        model.ood_score(saved.images, "embedding/ssd_1")
    with pytest.raises(ValueError, match="needs at least 99 calibration scores, got 40"):
        model.detector(0.01)
    # Images that the user gives come before those of the run.
    given = saved.images[:40]
    own = model.ood_score(saved.images, OTHER, fit_images=given)
    assert not np.allclose(own, saved.expected[OTHER])
    other = model.detector(0.1, OTHER, calibration_images=given)
    assert other.threshold == np.sort(saved.expected[OTHER][:40])[36]


@pytest.mark.slow
def test_a_run_without_saved_scores_is_as_before(saved, tmp_path):
    fitted_scores.write(tmp_path, 8, saved.fitted)  # of another step
    model = model_of(tmp_path, saved.model)
    assert model.fitted_scores is None
    with pytest.raises(ValueError, match=r"train.npz\)\. Pass fit_images= with"):
        model.ood_score(saved.images)
    for changed in (model.with_variables(model.variables), model.with_square_size(12)):
        assert changed.fitted_scores is None


@pytest.mark.parametrize("damage", ["bit", "cut", "gone", "manifest", "half"])
def test_damaged_scores_are_refused_and_the_rest_works(saved, tmp_path, damage):
    path = fitted_scores.write(tmp_path, 7, saved.fitted)
    manifest = path.with_suffix(".json")
    content = bytearray(path.read_bytes())
    message = "step_7.safetensors is (not what was written|missing)"
    if damage == "bit":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    elif damage == "cut":
        path.write_bytes(content[:-1])
    elif damage == "gone":
        path.unlink()
    else:
        text = manifest.read_text()
        changed = text.replace('"step": 7', '"step": 8') if damage == "manifest" else text[:-20]
        manifest.write_text(changed)
        message = r"step_7.json is (not what was written|damaged)"
    model = model_of(tmp_path, saved.model)
    for _ in range(2):  # not only the first time
        with pytest.raises(ArchiveError, match=message + ".*evaluate the run again"):
            model.ood_score(saved.images)
    with pytest.raises(ArchiveError, match=message):
        model.detector(0.1)
    with pytest.raises(ArchiveError, match=message):
        export.export_model(model, tmp_path / "out")
    assert not (tmp_path / "out" / archive.MANIFEST).exists()
    assert model.embed(saved.images).shape == (64, 8)


def test_scores_of_other_weights_settings_or_widths_are_refused(saved, tmp_path):
    fitted_scores.write(tmp_path, 7, saved.fitted)
    moved = jax.tree.map(np.array, jax.device_get(saved.model.variables))
    leaf = moved["params"]["projector"]["dense_out"]["kernel"]
    leaf[0, 0] = np.nextafter(leaf[0, 0], np.float32(9))
    with pytest.raises(ArchiveError, match="fitted to another encoder"):
        model_of(tmp_path, saved.model, variables=moved).ood_score(saved.images)
    config = json.loads(json.dumps(saved.model.config))
    config["ood"]["mixture_df"] = 7.0
    with pytest.raises(ArchiveError, match=r"other settings .*ood\.mixture_df = 5\.0"):
        model_of(tmp_path, saved.model, config=config).detector(0.1)
    config["ood"] |= {"mixture_df": 5.0, "name": "x", "severities": [1]}  # these change no score
    assert model_of(tmp_path, saved.model, config=config).detector(0.1).threshold
    # Even a file that claims to belong to the weights.
    wider = small_model(embedding_dim=9)
    forged = fitted_scores.weights_sha256(wider.variables)
    fitted_scores.write(tmp_path, 7, dataclasses.replace(saved.fitted, weights_sha256=forged))
    with pytest.raises(ValueError, match=r"\[[NM], 8\], as wide as the fitted"):
        model_of(tmp_path, wider, config=wider.config).ood_score(saved.images)


def test_a_score_of_another_version_is_refused(saved, tmp_path):
    scorers = json.loads(json.dumps(dict(saved.fitted.scorers)))
    scorers[OTHER]["scorer"]["fields"]["more"] = None
    changed = dataclasses.replace(saved.fitted, scorers=scorers)
    fitted_scores.write(tmp_path, 7, changed)
    model = model_of(tmp_path, saved.model)
    with pytest.raises(ArchiveError, match=f"saved {OTHER} is not one of this version"):
        model.ood_score(saved.images, OTHER)
    model.ood_score(saved.images)


def test_the_default_comes_first_then_the_smallest_and_nothing_is_stored_twice(saved):
    x, zero = np.arange(1000, dtype=np.float32), np.zeros(1, np.float32)
    lengths = {"a/large": 1000, "a/small": 10, "a/default": 500, "a/twin": 500}
    scores: dict[str, Any] = {
        name: OfFeature(Gaussians(x[:length], zero, zero), "embedding")  # pyright: ignore[reportArgumentType]
        for name, length in lengths.items()
    }
    scores["a/plain"] = OfFeature(Partial(feature_norm_score), "embedding")

    def describe(max_bytes: int) -> FittedScores:
        return described(
            saved.model,
            scores,
            {name: np.ones(3) for name in scores},
            is_fitted=set(lengths),
            first="a/default",
            max_bytes=max_bytes,
            left_out={"a/constant": "does not vary"},
        )

    whole = describe(10_000)
    assert set(whole.scorers) == set(lengths)
    assert sum(array.nbytes for array in whole.arrays.values()) == 4 * (1000 + 10 + 500 + 1)
    assert whole.left_out == {"a/constant": "does not vary"}
    some = describe(4 * (500 + 10 + 1))
    assert set(some.scorers) == {"a/default", "a/small", "a/twin"}
    assert set(some.calibration) == {"a/default", "a/small", "a/twin", "a/plain"}
    assert "exceed checkpoint.fitted_megabytes" in some.left_out["a/large"]
    assert set(describe(4 * (500 + 1)).scorers) == {"a/default", "a/twin"}
    assert set(describe(4 * (10 + 1)).scorers) == {"a/small"}
    assert not describe(4 * (10 + 1) - 1).scorers


@pytest.mark.parametrize("failing", [1, 2])
def test_scores_for_which_there_is_no_room_leave_those_before(
    saved, tmp_path, monkeypatch, failing
):
    fitted_scores.write(tmp_path, 7, saved.fitted)
    before = {path.name: path.read_bytes() for path in (tmp_path / "fitted").iterdir()}
    calls = []

    def full_disk(_: int) -> None:
        calls.append(1)
        if len(calls) == failing:
            raise OSError("no space left on device")

    monkeypatch.setattr(archive.files.os, "fsync", full_disk)
    with pytest.raises(OSError, match="no space"):
        fitted_scores.write(tmp_path, 7, saved.fitted.only(DEFAULT))
    assert {p.name: p.read_bytes() for p in (tmp_path / "fitted").iterdir()} == before


def test_scores_stay_as_long_as_their_checkpoint(saved, tmp_path):
    for step in (3, 6, 13):
        fitted_scores.write(tmp_path, step, saved.fitted.only(OTHER))
    fitted_scores.remove_others(tmp_path, {3, 13})
    assert {path.name for path in (tmp_path / "fitted").iterdir()} == {
        f"step_{step}.{kind}" for step in (3, 13) for kind in ("json", "safetensors")
    }


@pytest.mark.parametrize("is_killed", [True, False])
def test_results_are_there_only_with_the_scores(saved, tmp_path, monkeypatch, is_killed):
    """results.json shows that a run is finished; a kill before it is made good by the command."""
    monkeypatch.setattr(commands.page, "write_page", lambda *_, **__: None)
    monkeypatch.setattr(commands.evidence, "gather_evidence", lambda *_: None)
    monkeypatch.setattr(commands.tables, "results_csv", lambda _: "")
    monkeypatch.setattr(commands.tables, "classification_table", lambda _: "")

    def killed(*_: Any) -> Any:
        raise KeyboardInterrupt

    if is_killed:
        monkeypatch.setattr(fitted_scores, "write", killed)
    experiment: Any = types.SimpleNamespace(
        num_train_steps=7,
        config=saved.model.config,
        settings=saved.model.settings,
        dataset=types.SimpleNamespace(train=types.SimpleNamespace(name="digits"), test=range(3)),
    )
    evaluation: Any = types.SimpleNamespace(ood=None, fitted=saved.fitted)
    results = {"step": 7, "settings_sha256": "a" * 64}
    console = Console(file=io.StringIO(), width=200)
    try:
        commands._write_results(experiment, tmp_path, results, evaluation, console)
    except KeyboardInterrupt:
        assert is_killed
    assert (tmp_path / "results.json").exists() == (not is_killed)
    assert (fitted_scores.of_run(tmp_path, 7) is None) == is_killed


def test_scores_of_an_evaluation_by_other_settings_do_not_replace_those_of_the_run(saved, tmp_path):
    def why(ood: dict[str, Any], *, megabytes: int = 100, changes: Any = ()) -> str:
        config = json.loads(json.dumps(saved.model.config))
        config["ood"] |= ood
        config["checkpoint"]["fitted_megabytes"] = megabytes
        settings = model_module.read.saved_settings(config)
        experiment: Any = types.SimpleNamespace(settings=settings)
        return commands._why_not_fitted(experiment, tmp_path, list(changes))

    assert "config.json" in why({})
    text = archive.files.to_json(versioned(saved.model.config))
    (tmp_path / "config.json").write_text(text)
    assert not why({"name": "other", "corruptions": ["contrast"], "num_bootstrap": 7})
    assert "other settings" in why({"max_fit_images": 7})
    assert "data have changed" in why({}, changes=["images"])
    assert "fitted_megabytes" in why({}, megabytes=0)


def test_an_export_carries_the_default_score(saved, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "export_serving", lambda *_, **__: b"")
    fitted_scores.write(tmp_path / "run", 7, saved.fitted)
    model = model_of(tmp_path / "run", saved.model)
    export.export_model(model, tmp_path / "out")
    export.export_model(load(tmp_path / "out"), tmp_path / "again")
    for name in ("out", "again"):
        loaded = load(tmp_path / name)
        loaded._forward = saved.model._forward  # with the compiled programs
        np.testing.assert_array_equal(loaded.ood_score(saved.images), saved.expected[DEFAULT])
        assert loaded.detector(0.1).threshold == model.detector(0.1).threshold
        carried: Any = loaded.fitted_scores
        assert set(carried.scorers) == {DEFAULT}
        assert loaded.detector(0.1, "embedding/norm").threshold
    path = tmp_path / "out" / fitted_scores.IN_EXPORT
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ArchiveError, match=r"fitted.safetensors is not what was written"):
        load(tmp_path / "out").ood_score(saved.images)


@pytest.mark.slow
def test_the_served_detector_is_that_of_the_model(saved, tmp_path):
    fitted_scores.write(tmp_path / "run", 7, saved.fitted)
    model = model_of(tmp_path / "run", saved.model)
    with pytest.raises(ValueError, match="needs at least 99 calibration scores"):
        export.export_model(model, tmp_path / "out", false_alarm_rate=0.01)
    export.export_model(model, tmp_path / "out", false_alarm_rate=0.1)
    plain, served = (
        export.read_serving(tmp_path / "out", name)
        for name in (export.SERVED, export.SERVED_DETECTOR)
    )
    detector = model.detector(0.1)
    for batch in (saved.images[:1], saved.images[:37], 255 - saved.images):
        outputs: Any = served.call(batch)
        assert set(outputs) == {*plain.call(batch), "score", "is_outside"}
        scores = detector.score(batch)
        np.testing.assert_allclose(outputs["score"], scores, rtol=1e-4)
        assert outputs["is_outside"].dtype == bool
        is_clear = np.abs(scores - detector.threshold) > 1e-3 * np.abs(scores)
        np.testing.assert_array_equal(
            outputs["is_outside"][is_clear], (scores > detector.threshold)[is_clear]
        )
    manifest = json.loads((tmp_path / "out" / archive.MANIFEST).read_text())
    assert manifest["serving_detector"]["false_alarm_rate"] == 0.1
    assert manifest["serving_detector"]["score"] == DEFAULT
    # A new export without a detector leaves none of the old one beside the new weights.
    export.export_model(model, tmp_path / "out")
    assert not (tmp_path / "out" / export.SERVED_DETECTOR).exists()
    assert (tmp_path / "out" / fitted_scores.IN_EXPORT).exists()
    export.export_model(saved.model, tmp_path / "out")
    assert not (tmp_path / "out" / fitted_scores.IN_EXPORT).exists()


def test_a_score_of_random_views_is_not_served(saved):
    detector = saved.model.detector(0.1, "embedding/norm", calibration_images=saved.images)
    changed: Any = types.SimpleNamespace(score_name="jevb/kl", scorer=None, threshold=0.0)
    export.serving_function(saved.model, detector)
    with pytest.raises(ValueError, match=r"jevb/kl needs augmented views"):
        export.serving_function(saved.model, changed)
