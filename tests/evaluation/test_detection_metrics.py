"""Metrics against scikit-learn and pytorch-ood; intervals derived again with SciPy, and by simulation."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.evaluation import metrics_by_sklearn
from jevb_jax.evaluation import detection_metrics as ood_metrics_module
from jevb_jax.evaluation.detection_metrics import (
    bootstrap_intervals,
    bootstrap_intervals_of_scores,
    ood_metrics,
)
from tests.marks import nightly


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
def test_equal_to_scikit_learn(name, same):
    found, expected = ood_metrics(*cases()[name]), oracle(*cases()[name])
    same("AUROC, AUPR and FPR95", found, expected, rtol=1e-14, atol=1e-15)


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


def auroc_interval(a: np.ndarray, b: np.ndarray, level: float) -> tuple[float, float]:
    """Image by image: the score interval's ends as roots, and DeLong's variance from placements."""
    n, m = len(a), len(b)
    above = (b[None, :] > a[:, None]) + 0.5 * (b[None, :] == a[:, None])
    found = above.mean()
    z = scipy.stats.norm.ppf((1 + level) / 2)

    def excess(t: float) -> float:
        pairs = ((n + m) / 2 - 1) * ((1 - t) / (2 - t) + t / (1 + t))
        variance = t * (1 - t) * ((1 + pairs) / (n * m) if min(n, m) > 1 else 1)
        return (found - t) ** 2 - z**2 * variance

    grid = np.linspace(0, 1, 40_001)
    inside = grid[np.array([excess(t) for t in grid]) <= 1e-15]
    low, high = min(inside.min(), found), max(inside.max(), found)
    if min(n, m) < 2 or above.mean(axis=0).std() + above.mean(axis=1).std() == 0:
        return low, high
    parts = [above.mean(axis=1).var(ddof=1) / n, above.mean(axis=0).var(ddof=1) / m]
    df = sum(parts) ** 2 / (parts[0] ** 2 / (n - 1) + parts[1] ** 2 / (m - 1))
    width = scipy.stats.t.ppf((1 + level) / 2, max(df, 1)) * np.sqrt(sum(parts))
    ends = scipy.special.logit(found) + np.array([-1, 1]) * width / found / (1 - found)
    return min(low, scipy.special.expit(ends[0])), max(high, scipy.special.expit(ends[1]))


def rate_interval(positive: np.ndarray, negative: np.ndarray, level: float) -> tuple[float, float]:
    """Of the negative images at least as high as the threshold that 95% of the positive ones reach."""
    n, m = len(negative), len(positive)
    missed = scipy.stats.binom(m, 0.05)
    # A threshold with fewer images below it, or more, is too unlikely.
    fewest, most = (int(missed.ppf(q)) for q in ((1 - level) / 2, (1 + level) / 2))
    ordered = np.sort(positive)
    highest = 1.0 if fewest == 0 else np.mean(negative >= ordered[fewest - 1])
    lowest = 0.0 if most >= m else np.mean(negative >= ordered[most])
    needed = next(count for count in range(m + 1) if count / m >= 0.95)
    count = int(np.sum(negative >= ordered[m - needed]))
    rate = count / n
    share = scipy.stats.binomtest(count, n).proportion_ci(level, "exact")
    return (
        max(0, rate - np.hypot(rate - share.low, rate - lowest)),
        min(1, rate + np.hypot(share.high - rate, highest - rate)),
    )


@pytest.mark.parametrize("name", cases())
def test_intervals_of_auroc_and_rates_are_derived_again(name):
    a, b = cases()[name]
    low, high = bootstrap_intervals(a, b, num_resamples=1, level=0.8, seed=3)
    found = [(lo, hi) for lo, hi in zip(low, high, strict=True)]
    np.testing.assert_allclose(found[0], auroc_interval(a, b, 0.8), atol=3e-5)  # of the grid
    np.testing.assert_allclose(found[3], rate_interval(b, a, 0.8), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(found[4], rate_interval(-a, -b, 0.8), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", cases())
def test_intervals_of_areas_are_of_resampled_images(name, monkeypatch):
    a, b = cases()[name]
    generators = np.random.default_rng(3).spawn(4)

    def drawn(a: np.ndarray, b: np.ndarray, first: Any, second: Any) -> list[tuple[float, float]]:
        return [
            ood_metrics(
                a[first.integers(len(a), size=len(a))], b[second.integers(len(b), size=len(b))]
            )[1:3]
            for _ in range(7)
        ]

    falling = [np.sort(x)[::-1] for x in (a, b)]
    more = [np.append(x, y[len(y) // 2]) for x, y in ((a, falling[1]), (b, falling[0]))]
    both = np.array([drawn(a, b, *generators[:2]), drawn(*more, *generators[2:])])
    few, tail = min(len(a), len(b)), 0.0
    if few > 1:
        t = scipy.stats.t.ppf(0.1, few - 1)
        tail = float(scipy.stats.norm.cdf(t * np.sqrt(few / (few - 1))))
    ends = np.quantile(both, [tail, 1 - tail], axis=1)
    itself = ood_metrics(a, b)[1:3]
    for chunk_numbers in (1, 2**15):
        monkeypatch.setattr("jevb_jax.evaluation.detection_metrics._CHUNK_NUMBERS", chunk_numbers)
        low, high = bootstrap_intervals(a, b, num_resamples=7, level=0.8, seed=3)
        lowest, highest = (
            np.minimum(ends[0].min(axis=0), itself),
            np.maximum(ends[1].max(axis=0), itself),
        )
        for index, area in enumerate(itself):
            if 0 < area < 1:  # the deviation of a share, by the slope of its log odds
                deviation = np.sqrt(area * (1 - area) / min(len(a), len(b)))
                width = scipy.stats.norm.ppf(0.9) * deviation / (area * (1 - area))
                odds = scipy.special.logit(area) + np.array([-width, width])
                low_end, high_end = scipy.special.expit(odds)
                lowest[index] = min(lowest[index], low_end)
                highest[index] = max(highest[index], high_end)
        np.testing.assert_allclose(low[1:3], lowest, rtol=1e-12)
        np.testing.assert_allclose(high[1:3], highest, rtol=1e-12)


def held(
    num_inside: int,
    num_outside: int,
    auroc: float,
    *,
    spread: float = 1.0,
    num_tests: int = 150,
    num_resamples: int = 1,
) -> np.ndarray:
    """Share of 95% intervals that hold the true metrics: normal scores of inside and outside images."""
    shift = np.hypot(1, spread) * scipy.stats.norm.ppf(auroc)
    rng = np.random.default_rng(num_inside + num_outside)
    level = scipy.stats.norm.ppf(0.95)
    # In a set of many images of the same shares, which decide the areas.
    many = [rng.normal(size=50 * num_inside), shift + spread * rng.normal(size=50 * num_outside)]
    true = np.array(
        [
            auroc,
            *ood_metrics(*many)[1:3],
            scipy.stats.norm.sf(shift - spread * level),
            scipy.stats.norm.cdf((level - shift) / spread),
        ]
    )
    hits = np.zeros(5)
    for seed in range(num_tests):
        low, high = bootstrap_intervals(
            rng.normal(size=num_inside),
            shift + spread * rng.normal(size=num_outside),
            num_resamples=num_resamples,
            seed=seed,
        )
        wide = np.array(low) < np.array(high)  # however well they are told apart
        assert wide[0]
        assert wide[3:].all()
        hits += (np.array(low) <= true) & (true <= np.array(high))
    return hits / num_tests


@pytest.mark.parametrize(
    ("num_inside", "num_outside", "auroc"), [(10, 10, 0.998), (100, 20, 0.95), (20, 100, 0.76)]
)
def test_intervals_hold_the_truth(num_inside, num_outside, auroc):
    # Of 150 intervals that hold it in 95%, fewer than 88% hold it once in two thousand draws.
    assert np.all(held(num_inside, num_outside, auroc)[[0, 3, 4]] > 0.88)


@pytest.mark.slow
@pytest.mark.parametrize("spread", [1.0, nightly(3.0), nightly(0.3)])
@pytest.mark.parametrize("auroc", [0.76, nightly(0.9), nightly(0.98), 0.998])
@pytest.mark.parametrize(
    ("num_inside", "num_outside"), [(10, 10), (100, 100), (1000, 1000), (10, 1000), (1000, 10)]
)
def test_intervals_hold_the_truth_of_every_size(num_inside, num_outside, auroc, spread):
    share = held(num_inside, num_outside, auroc, spread=spread, num_tests=100, num_resamples=60)
    assert np.all(share > [0.86, 0.86, 0.86, 0.84, 0.84])


def test_intervals_follow_their_seed():
    a, b = cases()["many ties"]
    first = bootstrap_intervals(a, b, num_resamples=30, seed=5)
    assert first == bootstrap_intervals(a, b, num_resamples=30, seed=5)
    other = bootstrap_intervals(a, b, num_resamples=30, seed=6)
    for these, those in zip(first, other, strict=True):
        assert these[0] == those[0]  # no draw in it
    # Areas of one have no binomial interval: the draws alone decide.
    apart = np.arange(30.0), np.arange(30.0) + 40
    lows = [bootstrap_intervals(*apart, num_resamples=30, seed=n)[0][1:3] for n in (5, 5, 6)]
    assert lows[0] == lows[1] != lows[2]
    assert all(0 <= x <= y <= 1 for x, y in zip(*first, strict=True))


def test_bfloat16_scores_are_ranked_as_they_are():
    half = [jnp.asarray(x, jnp.bfloat16) for x in cases()["continuous"]]
    assert ood_metrics(*half) == ood_metrics(*(np.asarray(x, np.float32) for x in half))


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
    for num_resamples, error, message in (
        (0, ValueError, "at least 1"),
        (20.0, TypeError, "one whole number"),
        (True, TypeError, "one whole number"),
    ):
        with pytest.raises(error, match=f"num_resamples must be {message}"):
            bootstrap_intervals(good, good, num_resamples=num_resamples, seed=0)  # pyright: ignore[reportArgumentType]
    for seed, error in ((None, TypeError), (-1, ValueError), (1.0, TypeError)):
        with pytest.raises(error, match="seed must be"):
            bootstrap_intervals(good, good, num_resamples=2, seed=seed)  # pyright: ignore[reportArgumentType]
    bootstrap_intervals(good, good, num_resamples=2, seed=jnp.int32(0))  # pyright: ignore[reportArgumentType]
    bootstrap_intervals(good, good, num_resamples=np.int64(2), seed=0)  # pyright: ignore[reportArgumentType]


def test_draws_of_tied_scores_take_no_more_memory(monkeypatch):
    asked: list[tuple[int, int]] = []
    draw = ood_metrics_module._draw
    monkeypatch.setattr(
        ood_metrics_module, "_draw", lambda g, *size: (asked.append(size), draw(g, *size))[1]
    )
    ties = np.arange(5000) % 3
    bootstrap_intervals(ties, ties[:50], num_resamples=30, seed=0)
    assert sum(rows for rows, size in asked if size == 5000) == 30
    assert max(rows * size for rows, size in asked) <= ood_metrics_module._CHUNK_NUMBERS


def test_several_scores_at_once_have_the_intervals_that_each_has_alone():
    rng = np.random.default_rng(5)
    inside = [rng.normal(size=30), rng.integers(0, 6, 30), np.full(30, 2.0)]
    outside = [1 + rng.normal(size=21), rng.integers(2, 8, 21), np.arange(21.0)]
    settings: dict[str, Any] = {"num_resamples": 40, "seed": 2, "level": 0.9}
    together = bootstrap_intervals_of_scores(inside, outside, **settings)
    for one, *scores in zip(together, inside, outside, strict=True):
        np.testing.assert_allclose(one, bootstrap_intervals(*scores, **settings), rtol=1e-12)
    with pytest.raises(
        ValueError, match=r"outside_scores must be of the same images, got \[20, 21\]"
    ):
        bootstrap_intervals_of_scores(inside, [*outside[:2], outside[2][1:]], **settings)
    assert bootstrap_intervals_of_scores([], [], **settings) == []
