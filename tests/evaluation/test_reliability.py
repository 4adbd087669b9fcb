"""Checks of uncertainty against SciPy, scikit-learn and loops over random orders."""

from typing import Any

import mpmath
import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from jevb_jax.evaluation import neighbors, reliability

levels = st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=2, max_size=30)


def split(pairs: list[tuple[int, bool]]) -> tuple[np.ndarray, np.ndarray]:
    values, errors = zip(*pairs, strict=True)
    return np.array(values, float), np.array(errors)


@settings(max_examples=60, deadline=None)
@given(levels)
def test_error_auroc_is_scikit_learns(pairs):
    values, errors = split(pairs)
    if errors.all() or not errors.any():
        with pytest.raises(ValueError, match="needs right and wrong images"):
            reliability.error_auroc(values, errors)
        return
    expected = roc_auc_score(errors, values)
    assert reliability.error_auroc(values, errors) == pytest.approx(expected, abs=1e-14)
    with_infinity = np.where(values == values.max(), np.inf, values)
    assert reliability.error_auroc(with_infinity, errors) == pytest.approx(expected, abs=1e-14)


def test_error_auroc_of_many_images_with_ties(same):
    rng = np.random.default_rng(0)
    values, errors = np.round(rng.normal(size=2000), 2), rng.random(2000) < 0.2
    same(
        "R-AUROC",
        reliability.error_auroc(values, errors),
        roc_auc_score(errors, values),
        atol=1e-14,
    )


@settings(max_examples=60, deadline=None)
@given(levels)
def test_risk_coverage_without_ties_is_a_loop(pairs):
    values, errors = split(pairs)
    values = values + np.arange(len(values)) / 100
    found = reliability.risk_coverage_curve(values, errors)
    order = sorted(range(len(values)), key=lambda i: values[i])
    risk = [np.mean([errors[i] for i in order[:n]]) for n in range(1, len(order) + 1)]
    np.testing.assert_allclose(found.risk, risk, atol=1e-14)
    np.testing.assert_allclose(found.coverage, np.arange(1, len(order) + 1) / len(order))
    assert found.area == pytest.approx(np.mean(risk), abs=1e-14)


def test_risk_with_ties_is_the_mean_over_orders():
    rng = np.random.default_rng(0)
    values, errors = rng.integers(0, 3, 12).astype(float), rng.random(12) < 0.4
    curves = [
        reliability.risk_coverage_curve(values + 1e-6 * rng.random(12), errors).risk
        for _ in range(4000)
    ]
    found = reliability.risk_coverage_curve(values, errors).risk
    error = 4 * np.std(curves, axis=0) / np.sqrt(4000) + 1e-12
    assert np.all(np.abs(found - np.mean(curves, axis=0)) < error)
    assert found[-1] == pytest.approx(errors.mean())


def test_perfect_and_useless_orders():
    errors = np.array([False, False, True])
    assert reliability.risk_coverage_curve([1, 2, 3], errors).area == pytest.approx(1 / 9)
    assert reliability.risk_coverage_curve([1, 1, 1], errors).area == pytest.approx(1 / 3)
    assert reliability.risk_coverage_curve([1, 2, 3], ~errors).area > 0.5


def test_severity_correlation_is_scipys():
    rng = np.random.default_rng(1)
    values = rng.integers(0, 5, (6, 40)) + 0.5 * np.arange(6)[:, None]
    values[:, 0] = 3  # never changes
    found = reliability.severity_correlation(values)
    each = [scipy.stats.spearmanr(np.arange(6), column)[0] for column in values.T[1:]]
    assert found == pytest.approx(np.sum(each) / 40, abs=1e-13)
    assert reliability.severity_correlation(np.arange(8.0).reshape(4, 2)) == pytest.approx(1)


def test_share_increased():
    assert reliability.share_increased([1, 2, 3, 4], [2, 2, 2, 5]) == pytest.approx(2.5 / 4)


def test_only_a_larger_uncertainty_of_the_crop_counts(same):
    found = reliability.cropped_has_bigger_uncertainty([1, 2, 3, np.inf], [2, 2, 2, np.inf])
    same("crops are less certain", found, 1 / 4)
    rng = np.random.default_rng(0)
    whole, crop = rng.integers(0, 9, (2, 200)).astype(float)
    found = reliability.cropped_has_bigger_uncertainty(whole, crop)
    expected = sum(c > w for w, c in zip(whole, crop, strict=True)) / 200
    same("crops are less certain", found, expected)


def test_right_at_1_is_a_loop_over_images(same):
    rng = np.random.default_rng(3)
    features, labels = rng.normal(size=(40, 3)).astype(np.float32), rng.integers(0, 3, 40)
    features[7] = features[5]  # a copy is another image
    unit = features.astype(np.float64)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    expected = []
    for i in range(40):
        others = [j for j in range(40) if j != i]
        nearest = max(others, key=lambda j: unit[i] @ unit[j])
        expected.append(labels[nearest] == labels[i])
    found = reliability.right_at_1(neighbors.nearest_others(features), labels)
    same("R@1, right or wrong", found, expected)
    assert 0 < found.mean() < 1
    # Three copies: none is its own neighbor.
    np.testing.assert_array_equal(
        neighbors.nearest_others(np.array([[1, 0], [2, 0], [3, 0]], np.float32)) == np.arange(3),
        False,
    )


def test_right_at_1_refuses_an_image_as_its_own_neighbor():
    for call, error, message in (
        (lambda: reliability.right_at_1([0, 0], [1, 1]), ValueError, "rows of other images"),
        (lambda: reliability.right_at_1([1, 2], [1, 1]), ValueError, "rows of other images"),
        (lambda: reliability.right_at_1([1, 0], [1]), ValueError, r"must be \[N\]"),
        (lambda: reliability.right_at_1([1.0, 0.0], [1, 1]), TypeError, "must be integers"),
        (lambda: neighbors.nearest_others(np.ones((1, 2), np.float32)), ValueError, "k must be"),
    ):
        with pytest.raises(error, match=message):
            call()


def test_disagreement_is_scipys(same):
    rng = np.random.default_rng(2)
    counts = rng.multinomial(50, rng.dirichlet(np.full(10, 0.2), 60).mean(axis=0), size=60)
    counts[0] = [50, *[0] * 9]
    values = rng.normal(size=60)
    entropy = scipy.stats.entropy(counts, axis=1)
    np.testing.assert_allclose(reliability.label_entropy(counts), entropy, atol=1e-14)
    found = reliability.human_disagreement_correlation(values, counts)
    expected = scipy.stats.spearmanr(values, entropy)[0]
    same("people's entropy, rank correlation", found, expected, atol=1e-13)
    assert reliability.human_disagreement_correlation(np.ones(60), counts) == 0


def test_equal_entropies_are_a_tie_and_tiny_differences_are_not():
    rng = np.random.default_rng(4)
    row = np.array([31, 11, 5, 2, 1, 1, 0, 0, 0, 0])
    permuted = np.stack([rng.permutation(row) for _ in range(300)])
    for votes in (permuted, permuted / 51, 3 * permuted):
        assert len(np.unique(reliability.label_entropy(votes))) == 1
        values = votes[:, 8].astype(float)
        assert reliability.human_disagreement_correlation(values, votes) == 0
    # Two bits either way.
    two_bits = reliability.label_entropy([[4, 1, 1, 1, 1], [2, 0, 2, 2, 2]])
    assert two_bits[0] == two_bits[1] == pytest.approx(2 * np.log(2), rel=1e-15)
    # One vote among so many: the entropy falls with each, by 1e-8 of itself.
    most = 10**8 + np.arange(5)
    votes = np.stack([most, np.ones(5, int)], axis=1)
    with mpmath.workdps(50):
        exact = [float(_exact_entropy(int(n))) for n in most]
    found = reliability.label_entropy(votes)
    np.testing.assert_allclose(found, exact, rtol=1e-15)
    assert reliability.human_disagreement_correlation(-np.arange(5.0), votes) == 1
    assert reliability.label_entropy([[7, 0], [1e308, 1e308]]).tolist() == [0, np.log(2)]
    # Integers beyond the digits of float64 keep their order.
    large = np.array([2**60, 2**60 + 1])
    assert reliability.error_auroc(large, np.array([False, True])) == 1


def _exact_entropy(most: int) -> Any:
    shares = [mpmath.mpf(count) / (most + 1) for count in (most, 1)]
    return -sum(share * mpmath.log(share) for share in shares)


def test_spectrum_of_scales_that_hardly_vary():
    rng = np.random.default_rng(5)
    by_image = np.exp(1e-8 * rng.normal(size=(50, 1))) * np.ones((1, 8))
    assert reliability.scale_spectrum(by_image).image_share == pytest.approx(1, abs=1e-6)
    rounded = np.float32(0.3) * (1 + 6e-8 * rng.integers(0, 2, (50, 8))).astype(np.float32)
    assert reliability.scale_spectrum(rounded) == (0, 0, 0)


def test_spectrum_splits_the_variance():
    rng = np.random.default_rng(3)
    by_image, by_feature = rng.normal(size=(50, 1)), 2 * rng.normal(size=(1, 8))
    rest = rng.normal(size=(50, 8))
    log_scale = by_image + by_feature + 0.5 * rest
    found = reliability.scale_spectrum(np.exp(log_scale))
    total = np.sum((log_scale - log_scale.mean()) ** 2)
    features = 50 * np.sum((log_scale.mean(axis=0) - log_scale.mean()) ** 2) / total
    images = 8 * np.sum((log_scale.mean(axis=1) - log_scale.mean()) ** 2) / total
    expected = (features, images, 1 - features - images)
    shares = (found.feature_share, found.image_share, found.interaction_share)
    np.testing.assert_allclose(shares, expected, atol=1e-12)
    isotropic = reliability.scale_spectrum(np.exp(np.broadcast_to(by_image, (50, 8))))
    assert (isotropic.feature_share, isotropic.image_share) == pytest.approx((0, 1), abs=1e-12)
    assert reliability.scale_spectrum(np.full((4, 3), 0.3)).image_share == 0


def test_refuses():
    wrong = np.array([True, False])
    for values in (["1", "2"], np.array([1j, 2])):
        with pytest.raises(TypeError, match="uncertainty must be real numbers"):
            reliability.error_auroc(values, wrong)
    for call, message in (
        (lambda: reliability.error_auroc([0, np.nan], wrong), "1 of 2 are NaN"),
        (lambda: reliability.error_auroc([0, 1, 2], wrong), r"must be bool \[3\]"),
        (lambda: reliability.risk_coverage_curve([0, 1], wrong.astype(int)), r"must be bool \[2\]"),
        (lambda: reliability.severity_correlation([[0, 1]]), r"must be \[S \+ 1, N\]"),
        (lambda: reliability.severity_correlation([[0], [np.nan]]), "1 of 2 are NaN"),
        (lambda: reliability.share_increased([0, 1], [0]), "one value for each image, got 2 and 1"),
        (lambda: reliability.cropped_has_bigger_uncertainty([0], [0, 1]), "got 1 and 2 values"),
        (lambda: reliability.label_entropy([[0, 0], [1, 0]]), "a vote for each image"),
        (lambda: reliability.label_entropy([[-1, 2]]), "a vote for each image"),
        (lambda: reliability.label_entropy([[np.inf, 2]]), "finite"),
        (lambda: reliability.label_entropy(np.ones((0, 2))), "a vote for each image"),
        (lambda: reliability.human_disagreement_correlation([1], [[1, 0], [0, 1]]), "for 2 images"),
        (lambda: reliability.scale_spectrum([[1.0, 0.0]]), "positive, finite"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
