"""Metrics against scikit-learn, pytorch-ood and a naive bootstrap."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.evaluation import metrics_by_sklearn
from jevb_jax.evaluation.ood_metrics import bootstrap_intervals, ood_metrics


def oracle(inside: np.ndarray, outside: np.ndarray, tpr: float = 0.95) -> tuple[float, ...]:
    """scikit-learn, on ranks: it refuses infinities."""
    _, ranks = np.unique(np.concatenate([inside, outside]), return_inverse=True)
    return metrics_by_sklearn(ranks[: len(inside)], ranks[len(inside) :], tpr=tpr)


def cases() -> dict[str, tuple[Any, Any]]:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=503), rng.normal(0.7, 1.3, size=211)
    inf = np.inf
    return {
        "continuous": (a, b),
        "float32": (a.astype(np.float32), b.astype(np.float32)),
        "many ties": (np.round(a), np.round(b)),
        "all tied": (np.zeros(40), np.zeros(60)),
        "separated": (np.arange(30.0), np.arange(30.0, 50.0)),
        "separated the wrong way": (np.arange(30.0, 50.0), np.arange(30.0)),
        "infinities": (np.array([-inf, 0, 1, inf, inf]), np.array([-inf, 0.5, inf])),
        "one each": (np.array([1.0]), np.array([0.0])),
        "integers": (np.arange(9), np.arange(4, 12)),
        # Neighbours in float32 are not to be merged.
        "neighbours": (np.ones(1, np.float32), np.nextafter(np.ones(1, np.float32), np.float32(2))),
    }


@pytest.mark.parametrize("name", cases())
def test_equal_to_scikit_learn(name):
    found, expected = ood_metrics(*cases()[name]), oracle(*cases()[name])
    np.testing.assert_allclose(found, expected, rtol=1e-14, atol=1e-15)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.integers(-3, 3), min_size=1, max_size=40),
    st.lists(st.integers(-3, 3), min_size=1, max_size=40),
    st.sampled_from([0.5, 0.8, 0.95]),
)
def test_equal_to_scikit_learn_with_ties(inside, outside, tpr):
    a, b = np.array(inside), np.array(outside)
    found, expected = ood_metrics(a, b, tpr=tpr), oracle(a, b, tpr)
    np.testing.assert_allclose(found, expected, rtol=1e-13, atol=1e-15)


def test_conventions_by_hand():
    # Inside 1..20, outside 10.5 and 15.5. 95% of two outside images is both: 10 inside images lie above
    # 10.5. 95% of twenty inside images is nineteen: the threshold 19 accepts both outside ones.
    found = ood_metrics(np.arange(1.0, 21), np.array([10.5, 15.5]))
    assert found.fpr95_outside_positive == 0.5
    assert found.fpr95_inside_positive == 1.0
    assert found.auroc == pytest.approx((10 + 15) / 40)


def scores_for_pytorch_ood(ties: bool) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(7)
    inside, outside = rng.normal(size=400), rng.normal(0.8, 1.2, size=300)
    return (np.round(inside, 1), np.round(outside, 1)) if ties else (inside, outside)


# auroc, aupr_out, aupr_in, fpr95 of pytorch_ood.metrics 0.4.0 (auroc, aupr positive="ood" and "id",
# fpr_at_tpr 0.95) for the scores above.
PYTORCH_OOD = {
    False: (0.6977749999999999, 0.6680705714132743, 0.7181268543568305, 0.8575),
    True: (0.6973958333333333, 0.6677188787674432, 0.7172370503855037, 0.8625),
}


@pytest.mark.parametrize("ties", [False, True])
def test_equal_to_pytorch_ood(ties):
    found = ood_metrics(*scores_for_pytorch_ood(ties))
    np.testing.assert_allclose(found[:4], PYTORCH_OOD[ties], rtol=1e-14)


def test_equal_to_the_installed_pytorch_ood():
    functional = pytest.importorskip("pytorch_ood.metrics.functional")
    torch = pytest.importorskip("torch")
    for inside, outside in (*cases().values(), scores_for_pytorch_ood(True)):
        scores = torch.from_numpy(np.concatenate([inside, outside]))
        labels = torch.from_numpy(np.repeat([0, -1], [len(inside), len(outside)]))
        expected = (
            functional.auroc(scores, labels),
            functional.aupr(scores, labels, positive="ood"),
            functional.aupr(scores, labels, positive="id"),
            functional.fpr_at_tpr(scores, labels, 0.95),
        )
        found = ood_metrics(inside, outside)[:4]
        np.testing.assert_allclose(found, [float(x) for x in expected], rtol=1e-14, atol=1e-15)


# --- Intervals ---


def test_intervals_are_those_of_a_naive_bootstrap():
    a, b = (np.round(x, 1) for x in cases()["continuous"])
    rng = np.random.default_rng(1)
    naive = np.array(
        [ood_metrics(rng.choice(a, len(a)), rng.choice(b, len(b))) for _ in range(2000)]
    )
    low, high = bootstrap_intervals(a, b, num_resamples=2000, seed=0)
    spread = naive.std(axis=0)
    for found, q in ((low, 0.025), (high, 0.975)):
        # A quantile of 2,000 draws in the tail has a standard error of about 0.06 deviations.
        assert np.all(np.abs(np.array(found) - np.quantile(naive, q, axis=0)) < 0.35 * spread)
    assert np.all(np.array(low) <= np.array(ood_metrics(a, b)))
    assert np.all(np.array(ood_metrics(a, b)) <= np.array(high))


@pytest.mark.parametrize("name", cases())
def test_intervals_are_quantiles_over_resampled_images(name, monkeypatch):
    a, b = cases()[name]
    generators = np.random.default_rng(3).spawn(2)
    drawn = np.array(
        [
            ood_metrics(
                a[generators[0].integers(len(a), size=len(a))],
                b[generators[1].integers(len(b), size=len(b))],
            )
            for _ in range(7)
        ]
    )
    for chunk_numbers in (1, 2**15):
        monkeypatch.setattr("jevb_jax.evaluation.ood_metrics._CHUNK_NUMBERS", chunk_numbers)
        found = bootstrap_intervals(a, b, num_resamples=7, level=0.8, seed=3)
        np.testing.assert_allclose(
            found, np.quantile(drawn, [0.1, 0.9], axis=0), rtol=1e-13, atol=1e-15
        )


def test_intervals_cover():
    # Two unit normals 1 apart: AUROC = Phi(1 / sqrt 2) = 0.7602.
    rng = np.random.default_rng(2)
    covered = 0
    for seed in range(200):
        low, high = bootstrap_intervals(
            rng.normal(size=150),
            rng.normal(1, 1, size=150),
            num_resamples=200,
            level=0.9,
            seed=seed,
        )
        covered += low.auroc <= 0.76025 <= high.auroc
    assert 0.9 - 4 * 0.021 < covered / 200 < 0.9 + 4 * 0.021


def test_intervals_follow_their_seed():
    a, b = cases()["many ties"]
    first = bootstrap_intervals(a, b, num_resamples=30, seed=5)
    assert first == bootstrap_intervals(a, b, num_resamples=30, seed=5)
    assert first != bootstrap_intervals(a, b, num_resamples=30, seed=6)
    assert all(0 <= x <= y <= 1 for x, y in zip(*first, strict=True))
    one = bootstrap_intervals([0.0, 1.0], [2.0], num_resamples=5, seed=0)
    assert one[0].auroc == one[1].auroc == 1


# --- Errors ---


def test_refuses():
    good = np.arange(3.0)
    for bad, message in (
        (np.array([0, np.nan, np.nan]), "inside_scores: 2 of 3 are NaN"),
        (np.zeros(0), "at least one score"),
        (np.zeros((2, 2)), "at least one score"),
    ):
        with pytest.raises(ValueError, match=message):
            ood_metrics(bad, good)
        with pytest.raises(ValueError, match=message.replace("inside", "outside")):
            ood_metrics(good, bad)
        with pytest.raises(ValueError, match=message):
            bootstrap_intervals(bad, good, num_resamples=2, seed=0)
    for bad in (np.array([1j]), np.array(["a"]), np.array([True])):
        with pytest.raises(TypeError, match="must be real numbers"):
            ood_metrics(bad, good)
    for keywords in ({"tpr": 1.0}, {"tpr": np.nan}):
        with pytest.raises(ValueError, match="tpr must be in"):
            ood_metrics(good, good, **keywords)
    with pytest.raises(ValueError, match="level must be in"):
        bootstrap_intervals(good, good, num_resamples=2, seed=0, level=0.0)
    with pytest.raises(ValueError, match="num_resamples must be at least 1"):
        bootstrap_intervals(good, good, num_resamples=0, seed=0)
