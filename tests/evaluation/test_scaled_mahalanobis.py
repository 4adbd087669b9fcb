"""Mahalanobis distances of features whose lengths are raised to a power."""

import dataclasses
from typing import Any

import numpy as np
import pytest
from scipy.spatial.distance import mahalanobis

from configs import smoke
from jevb_jax.evaluation import gaussian_detectors, scaled_mahalanobis, score_json, score_table
from jevb_jax.evaluation.detector_input import DegenerateFeaturesError
from jevb_jax.settings import read
from jevb_jax.training.experiment import to_json_values


def features(count: int, *, scale: float = 1.0, seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    lengths = np.exp(random.normal(0, 0.5, (count, 1)))
    mixed = random.normal(0.3, 1, (count, 6)) @ random.normal(size=(6, 6))
    return (scale * lengths * mixed).astype(np.float32)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0, 1.5, 3.0])
@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
def test_is_the_distance_of_scipy_in_float64(beta, scale, same):
    fit, new = features(500, scale=scale), features(50, scale=scale, seed=1)

    def scaled(values: np.ndarray) -> np.ndarray:
        wide = values.astype(np.float64) / scale
        return wide / np.linalg.norm(wide, axis=1, keepdims=True) ** beta

    mean = scaled(fit).mean(axis=0)
    inverse = np.linalg.inv(np.cov(scaled(fit).T, bias=True))
    expected = [mahalanobis(one, mean, inverse) ** 2 for one in scaled(new)]
    score = scaled_mahalanobis.fit_scaled_mahalanobis(fit, exponent=beta)
    same("Mahalanobis of x / |x|^beta", score(new), expected, rtol=2e-4)


def test_zero_and_one_are_the_plain_distance_and_ssd():
    fit, new = features(300), features(40, seed=1)
    for beta, other in (
        (0, gaussian_detectors.fit_mahalanobis(fit)),
        (1, gaussian_detectors.fit_ssd(fit)),
    ):
        score = scaled_mahalanobis.fit_scaled_mahalanobis(fit, exponent=beta)
        np.testing.assert_allclose(score(new), other(new), rtol=2e-4)


def test_above_one_short_features_are_strange_and_extremes_stay_finite():
    fit = features(300)
    new = features(40, seed=1)
    score = scaled_mahalanobis.fit_scaled_mahalanobis(fit, exponent=2.0)
    assert np.all(np.asarray(score(new / 100)) > np.asarray(score(new)))
    extremes = np.stack([0 * new[0], new[0] * 1e-37, new[0] * 1e36])
    for beta in (0.0, 1.0, 4.0):
        score = scaled_mahalanobis.fit_scaled_mahalanobis(fit, exponent=beta)
        assert np.all(np.isfinite(score(extremes))), beta


@pytest.mark.parametrize("dim", [2, 5, 8])
def test_the_local_dimension_is_that_of_a_gaussian_in_a_wider_space(dim):
    random = np.random.default_rng(dim)
    embedded = random.normal(size=(1500, dim)) @ random.normal(size=(dim, 30))
    found = scaled_mahalanobis.local_dimension(embedded.astype(np.float32))
    # Published bias: a few per cent too low from eight dimensions on, at this number of points.
    assert found == pytest.approx(dim, rel=0.12)


def test_the_local_dimension_is_the_plain_double_loop(same):
    values, k = features(90), 5
    logs = []
    for n, one in enumerate(values.astype(np.float64)):
        others = np.delete(values, n, axis=0)
        near = sorted(np.linalg.norm(others - one, axis=1))[:k]
        logs += [np.log(near[-1] / one) for one in near[:-1]]
    found = scaled_mahalanobis.local_dimension(values, num_neighbors=k)
    same("local dimension", found, 1 / np.mean(logs), rtol=1e-6)
    twice = np.concatenate([values, values])  # equal rows count once
    assert scaled_mahalanobis.local_dimension(twice, num_neighbors=k) == pytest.approx(found)
    many = np.repeat(features(2500, seed=2), 2, axis=0)
    expected = scaled_mahalanobis.local_dimension(many[::3])
    assert scaled_mahalanobis.local_dimension(many) == pytest.approx(expected)


def test_the_exponent_whose_features_have_the_lowest_dimension_is_chosen():
    # A curve of directions with random lengths: only exponent 1, which removes them, leaves a curve.
    random = np.random.default_rng(0)
    angle = random.uniform(0, 2 * np.pi, (600, 1))
    curve = np.concatenate([np.cos(angle), np.sin(angle), np.cos(2 * angle)], axis=1)
    lengths = np.exp(random.normal(0, 0.5, (600, 1)))
    fit = curve / np.linalg.norm(curve, axis=1, keepdims=True) * lengths
    score = scaled_mahalanobis.fit_by_local_dimension(fit, exponents=(0.0, 0.5, 1.0, 2.0))
    assert score.exponent == 1
    fixed = scaled_mahalanobis.fit_scaled_mahalanobis(fit, exponent=1.0)
    np.testing.assert_array_equal(score(fit), fixed(fit))


def test_a_dimension_that_cannot_be_estimated_is_refused():
    rows = "more than num_neighbors=20 different rows, got 3"
    with pytest.raises(DegenerateFeaturesError, match=rows):
        scaled_mahalanobis.local_dimension(np.repeat(features(3), 30, axis=0))
    with pytest.raises(ValueError, match="num_neighbors"):
        scaled_mahalanobis.local_dimension(features(30), num_neighbors=2)
    with pytest.raises(ValueError, match="at least one number"):
        scaled_mahalanobis.fit_by_local_dimension(features(300), exponents=())
    with pytest.raises(ValueError, match=r"exponents must be in \[0, 4\]"):
        scaled_mahalanobis.fit_by_local_dimension(features(300), exponents=(1.0, 5.0))


@pytest.mark.parametrize("fitted", ["exponent", "choices"])
def test_a_saved_score_is_the_same(fitted):
    fit, new = features(300), features(40, seed=1)
    if fitted == "exponent":
        score = scaled_mahalanobis.fit_scaled_mahalanobis(fit, exponent=1.5)
    else:
        score = scaled_mahalanobis.fit_by_local_dimension(fit, exponents=(0.5, 1.0, 1.5))
    description, arrays = score_json.describe(score)
    np.testing.assert_array_equal(score_json.rebuild(description, arrays)(new), score(new))


def test_what_cannot_be_fitted_is_refused():
    fit = features(300)
    for exponent in (-0.1, 4.1, float("nan")):
        with pytest.raises(ValueError, match="exponent"):
            scaled_mahalanobis.fit_scaled_mahalanobis(fit, exponent=exponent)
    mostly_zero = fit * (np.arange(300) < 100)[:, None]
    with pytest.raises(DegenerateFeaturesError, match="no unit"):
        scaled_mahalanobis.fit_scaled_mahalanobis(mostly_zero, exponent=1.5)
    with pytest.raises(DegenerateFeaturesError, match="no unit"):
        scaled_mahalanobis.fit_by_local_dimension(mostly_zero, exponents=(0.5, 1.0))


def test_the_setting_names_the_scores():
    config: Any = smoke.get_config()
    config.ood.norm_exponents = (1.5, 2.0)
    config.ood.norm_exponent_choices = (0.5, 1.0)
    settings = read.saved_settings(to_json_values(config))
    added = {f"representation/mahalanobis_beta_{one}" for one in ("1.5", "2", "by_dimension")}
    assert added <= score_table.scores_of_run(settings, has_labels=False).keys()
    without = dataclasses.replace(settings.ood, norm_exponents=(), norm_exponent_choices=())
    table = score_table.scores_of_run(dataclasses.replace(settings, ood=without), has_labels=False)
    assert not added & table.keys()
    with pytest.raises(ValueError, match="norm_exponents"):
        score_table.score_settings(dataclasses.replace(settings.ood, norm_exponents=(5.0,)))
