"""Mahalanobis distances of features whose lengths are raised to a power."""

import dataclasses
from typing import Any

import numpy as np
import pytest
from scipy.spatial.distance import mahalanobis

from configs import smoke
from jevb_jax.evaluation import (
    gaussian_detectors,
    saved_scores,
    scaled_mahalanobis,
    score_table,
)
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
def test_is_the_distance_of_scipy_in_float64(beta, scale):
    fit, new = features(500, scale=scale), features(50, scale=scale, seed=1)

    def scaled(values: np.ndarray) -> np.ndarray:
        wide = values.astype(np.float64) / scale
        return wide / np.linalg.norm(wide, axis=1, keepdims=True) ** beta

    mean = scaled(fit).mean(axis=0)
    inverse = np.linalg.inv(np.cov(scaled(fit).T, bias=True))
    expected = [mahalanobis(one, mean, inverse) ** 2 for one in scaled(new)]
    score = scaled_mahalanobis.fit_scaled_mahalanobis(fit, exponent=beta)
    np.testing.assert_allclose(score(new), expected, rtol=2e-4)


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


def test_a_saved_score_is_the_same():
    fit, new = features(300), features(40, seed=1)
    score = scaled_mahalanobis.fit_scaled_mahalanobis(fit, exponent=1.5)
    description, arrays = saved_scores.describe(score)
    np.testing.assert_array_equal(saved_scores.rebuild(description, arrays)(new), score(new))


def test_what_cannot_be_fitted_is_refused():
    fit = features(300)
    for exponent in (-0.1, 4.1, float("nan")):
        with pytest.raises(ValueError, match="exponent"):
            scaled_mahalanobis.fit_scaled_mahalanobis(fit, exponent=exponent)
    mostly_zero = fit * (np.arange(300) < 100)[:, None]
    with pytest.raises(DegenerateFeaturesError, match="no unit"):
        scaled_mahalanobis.fit_scaled_mahalanobis(mostly_zero, exponent=1.5)


def test_the_setting_names_the_scores():
    config: Any = smoke.get_config()
    config.ood.norm_exponents = (1.5, 2.0)
    settings = read.saved_settings(to_json_values(config))
    added = {"representation/mahalanobis_beta_1.5", "representation/mahalanobis_beta_2"}
    assert added <= score_table.scores_of_run(settings, has_labels=False).keys()
    without = dataclasses.replace(settings.ood, norm_exponents=())
    table = score_table.scores_of_run(dataclasses.replace(settings, ood=without), has_labels=False)
    assert not added & table.keys()
    with pytest.raises(ValueError, match="norm_exponents"):
        score_table.score_settings(dataclasses.replace(settings.ood, norm_exponents=(5.0,)))
