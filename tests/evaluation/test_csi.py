"""CSI's score: NumPy in float64 for the score, the views by hand, and a tiny run as a whole."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import mannwhitneyu

from jevb_jax.evaluation import csi, evaluate, readiness, score_json
from jevb_jax.evaluation.detector_input import DegenerateFeaturesError
from jevb_jax.images import batches
from jevb_jax.images.augmentations import ViewAugmentation
from jevb_jax.images.shapes import shapes
from jevb_jax.images.source import ArraySource
from jevb_jax.model import Model
from jevb_jax.training.experiment import Experiment, build_experiment
from tests.evaluation.test_detection import make_config

NAME = "embedding/csi"


def oracle(train: Any, images: Any) -> np.ndarray:
    """The published score without its classifier, image by image, with the opposite sign."""
    train, images = (np.asarray(x, np.float64) for x in (train, images))
    scores = []
    for image in images:
        total = 0.0
        for rotation in range(4):
            lengths = [np.sqrt(np.sum(x * x)) for x in train[:, rotation]]
            cosines = [
                x @ image[rotation] / (length * np.sqrt(np.sum(image[rotation] ** 2)))
                for x, length in zip(train[:, rotation], lengths, strict=True)
            ]
            size = np.sqrt(np.sum(image[rotation] ** 2))
            total += max(cosines) * size / (sum(lengths) / len(lengths))
        scores.append(-total / 4)
    return np.array(scores)


def rotations(count: int, seed: int, width: int = 6) -> np.ndarray:
    """Random features; the rotations have sizes of different order."""
    values = np.random.default_rng(seed).normal(size=(count, 4, width)) + 0.3
    return (values * np.array([1.0, 20.0, 0.1, 3.0])[:, None]).astype(np.float32)


@pytest.mark.parametrize("count", [1, 128, 300])  # within one batch of queries, a whole one, more
def test_the_score_is_the_published_one(count, same):
    train, images = rotations(50, 0), rotations(count, 1)
    found = csi.fit_csi(train)(images)
    assert found.shape == (count,)
    same("CSI", found, oracle(train, images), rtol=2e-6, atol=1e-6)


def test_a_fitted_image_scores_its_own_size():
    train = rotations(50, 0)
    sizes = np.linalg.norm(train.astype(np.float64), axis=-1)
    found = csi.fit_csi(train)(train)
    np.testing.assert_allclose(found, -np.mean(sizes / sizes.mean(axis=0), axis=1), rtol=2e-6)
    assert np.mean(found) == pytest.approx(-1, rel=1e-6)


def test_zero_and_infinite_embeddings():
    score = csi.fit_csi(rotations(20, 0))
    strange = rotations(4, 1)
    strange[0] = 0
    strange[1, 2] = np.inf
    strange[2, 2] = -np.inf
    strange[3, 0, 0] = np.nan
    found = np.asarray(score(strange))
    assert found[0] == 0  # above every image with a positive cosine
    assert np.isposinf(found[1:3]).all()
    assert np.isnan(found[3])
    train = rotations(20, 0)
    train[3, 1] = 0  # a zero row has cosine 0 to everything
    assert np.isfinite(csi.fit_csi(train)(rotations(5, 2))).all()
    train[:, 1] = 0
    with pytest.raises(DegenerateFeaturesError, match="embeddings of a rotation are zero"):
        csi.fit_csi(train)


def test_wrong_features_are_refused():
    for wrong in (np.ones((9, 6)), np.ones((9, 3, 6))):
        with pytest.raises(ValueError, match=r"rotations must be \[N, 4, D\], got shape"):
            csi.fit_csi(wrong)
    with pytest.raises(ValueError, match="at least 2 images"):
        csi.fit_csi(rotations(1, 0))
    with pytest.raises(ValueError, match="must be finite"):
        csi.fit_csi(np.full((9, 4, 6), np.nan))
    for wrong in (np.ones((9, 4, 5)), np.ones((9, 24))):
        with pytest.raises(ValueError, match=r"rotations must be \[N, 4, 6\]"):
            csi.fit_csi(rotations(9, 0))(wrong)


def augmentation(**changes: Any) -> ViewAugmentation:
    """Takes the whole image; nothing is random."""
    plain: dict[str, Any] = {
        "size": 8, "mean": (0.5,) * 3, "std": (0.25,) * 3, "crop_scale": (1.0, 1.0),
        "crop_ratio": (1.0, 1.0), "flip_probability": 0.0, "jitter_probability": 0.0,
        "grayscale_probability": 0.0,
    }  # fmt: skip
    return ViewAugmentation(**(plain | changes))


IMAGES = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), np.uint8)


@pytest.mark.slow
@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_views_are_mirrored_then_turned(flip):
    made = csi.RotatedViews(augmentation(flip_probability=flip), 1)
    views = np.asarray(made.views(0, jnp.asarray(IMAGES)))
    given = IMAGES[:, :, ::-1] if flip else IMAGES
    expected = [np.rot90(given, turns, (1, 2)) for turns in range(4)]
    np.testing.assert_allclose(views, (np.array(expected) / 255 - 0.5) / 0.25, atol=2e-5)


@pytest.mark.slow
def test_images_share_draws_and_views_do_not():
    crops = augmentation(crop_scale=(0.3, 0.6), flip_probability=0.5)
    made = csi.RotatedViews(crops, 2)
    symmetric = np.full((2, 8, 8, 3), 255, np.uint8)
    radius = np.add.outer(np.arange(-3.5, 4) ** 2, np.arange(-3.5, 4) ** 2)
    symmetric[:] = (255 * radius / radius.max())[None, :, :, None]  # turns do not change it
    views = np.stack([np.asarray(made.views(crop, jnp.asarray(symmetric))) for crop in range(2)])
    np.testing.assert_array_equal(views[:, :, 0], views[:, :, 1])
    draws = views[:, :, 0].reshape(8, -1)
    assert len(np.unique(np.round(draws, 4), axis=0)) == 8


@pytest.mark.slow
def test_embeddings_are_means_over_crops():
    made = csi.RotatedViews(augmentation(crop_scale=(0.3, 0.6)), 3)
    weights = np.random.default_rng(1).normal(size=(8 * 8 * 3, 5)).astype(np.float32)

    def embed(views: Any) -> Any:
        return jnp.tanh(views.reshape(len(views), -1) @ weights / 10)

    found = made.mean_embeddings(embed, jnp.asarray(IMAGES))
    expected = np.zeros((3, 4, 5))
    for crop in range(3):
        for rotation, views in enumerate(np.asarray(made.views(crop, jnp.asarray(IMAGES)))):
            for image, view in enumerate(views):
                expected[image, rotation] += np.tanh(view.reshape(-1).astype(float) @ weights / 10)
    np.testing.assert_allclose(found, expected / 3, atol=1e-5)


def test_settings_say_what_views_there_are():
    training = augmentation(crop_scale=(0.2, 1.0), hue=0.1)
    section = tiny("simsiam").settings.ood
    made = csi.rotated_views(section, training)
    assert made is not None
    assert made.num_crops == 2
    assert made.augmentation == dataclasses.replace(training, crop_scale=(0.54, 0.54))
    assert csi.rotated_views(dataclasses.replace(section, csi_crops=0), training) is None
    with pytest.raises(ValueError, match="num_crops must be"):
        csi.RotatedViews(training, 0)
    config = make_config()
    config.ood.csi_crops = -1
    with pytest.raises(ValueError, match=r"ood\.csi_crops must be .*0 = off"):
        build_experiment(config)


def test_images_that_are_not_square_are_refused():
    long = np.zeros((30, 8, 6, 3), np.uint8)
    with pytest.raises(ValueError, match=r"these have 8 x 6 pixels\. Set data.image_size"):
        csi.RotatedViews(augmentation(), 1).mean_embeddings(lambda x: x, jnp.asarray(long))
    made = tiny("simsiam")
    readiness.check(made)
    source = ArraySource(long, np.arange(30) % 3)
    other = dataclasses.replace(made, dataset=made.dataset._replace(train=source))
    with pytest.raises(ValueError, match="the training images have 8 x 6 pixels"):
        readiness.check(other)


def test_images_of_an_outside_set_must_be_square_too(tmp_path):
    np.savez(tmp_path / "long.npz", images=np.zeros((5, 8, 6, 3), np.uint8))
    outside = {"name": "long", "group": "far", "protocol": "", "source": "arrays"}
    config = make_config("simsiam")
    config.ood.outside = ({**outside, "paths": (str(tmp_path / "long.npz"),)},)
    readiness.check(build_experiment(config))
    config.ood.csi_crops = 1
    with pytest.raises(ValueError, match=r"ood.outside\[0\], 'long': .*its images have 8 x 6"):
        readiness.check(build_experiment(config))


@functools.cache
def tiny(method: str, num_crops: int = 2) -> Experiment:
    config = make_config(method)
    config.augmentation.flip_probability = 0.5
    config.ood.corruptions = ("contrast",)
    config.ood.severities = (5,)
    config.ood.csi_crops = num_crops
    return build_experiment(config)


def embeddings(experiment: Experiment, variables: Any, images: Any) -> np.ndarray:
    """`[N, 4, D]` float64, one crop and rotation at a time and without the extractor."""
    made = csi.rotated_views(experiment.settings.ood, experiment.view_augmentations[0])
    assert made is not None
    apply: Any = jax.jit(lambda views: experiment.model.apply(variables, views, train=False))
    views = jax.jit(made.views)
    crops = [
        [np.asarray(apply(one).embedding, np.float64) for one in views(crop, jnp.asarray(images))]
        for crop in range(made.num_crops)
    ]
    return np.swapaxes(np.mean(crops, axis=0), 0, 1)


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.parametrize("method", ["simsiam", "jevb"])
def test_a_run_reports_it_and_nothing_else_changes(method):
    experiment = tiny(method)
    variables = experiment.initial_state().evaluation_variables
    _, found = evaluate.evaluate(experiment, variables, keeps_fitted=True)
    assert found.ood is not None
    assert found.fitted is not None
    dataset: Any = experiment.dataset
    train, test, validation = (
        batches.load_resident(x) for x in (dataset.train, dataset.test, dataset.validation)
    )
    fitted = embeddings(
        experiment,
        variables,
        train[np.sort(np.random.default_rng(0).permutation(len(train))[:120])],
    )
    expected = oracle(fitted, embeddings(experiment, variables, test))
    np.testing.assert_allclose(found.ood.inside[NAME], expected, rtol=1e-4)
    assert np.std(expected) > 0
    assert NAME in {result.score for result in found.ood.results}
    # Held-out images of the same kind are not told from the test images.
    held_out = embeddings(
        experiment, variables, batches.load_resident(shapes(300, seed=7, image_size=16))
    )
    assert mannwhitneyu(expected, oracle(fitted, held_out)).pvalue > 0.01
    # The saved score, its calibration, and a loaded model give the same.
    saved = found.fitted
    np.testing.assert_allclose(
        saved.calibration[NAME],
        oracle(fitted, embeddings(experiment, variables, validation)),
        rtol=1e-4,
    )
    model = Model(experiment.config, variables, step=0, batch_size=64, read_fitted=lambda: saved)
    assert NAME in model.score_names()
    np.testing.assert_allclose(model.ood_score(test, NAME), expected, rtol=1e-4)
    own = model.ood_score(test[:5], NAME, fit_images=train[:40])
    again = embeddings(experiment, variables, train[:40])
    np.testing.assert_allclose(
        own, oracle(again, embeddings(experiment, variables, test[:5])), rtol=1e-4
    )
    # A model cuts the square out of images, as `data.image_size` did in the run.
    assert np.isfinite(model.ood_score(np.zeros((3, 16, 12, 3), np.uint8), NAME)).all()
    with pytest.raises(ValueError, match="so they must be square"):
        model.with_square_size(0).ood_score(test[:5, :, :12], NAME, fit_images=train[:40])
    # All other scores are those of a run without it.
    off = tiny(method, 0)
    _, without = evaluate.evaluate(off, variables)
    assert without.ood is not None
    assert NAME not in without.ood.inside
    assert set(without.ood.inside) == set(found.ood.inside) - {NAME}
    for name, values in without.ood.inside.items():
        np.testing.assert_allclose(
            found.ood.inside[name], values, rtol=1e-3, atol=1e-3, err_msg=name
        )


def test_it_is_saved_as_plain_arrays():
    score, images = csi.fit_csi(rotations(20, 0)), rotations(5, 1)
    again = score_json.rebuild(*score_json.describe(score))
    np.testing.assert_array_equal(again(images), score(images))
