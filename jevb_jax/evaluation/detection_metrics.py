"""Metrics of out-of-distribution detection, with their conventions and their intervals.

Scores are larger for images that are more out of distribution. All metrics are computed from one
table: the distinct scores in falling order, and the number of inside and outside images with each
score. Therefore ties are exact, and a bootstrap resample is only another set of counts.

Intervals keep some width even if the scores separate the images without error: no error among ten
images does not prove that there are none.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import scipy.special
from numpy.typing import ArrayLike

from jevb_jax import arguments
from jevb_jax.evaluation.detector_input import checked_share

_CHUNK_NUMBERS = 2**15  # resampled counts in one step, few enough for the cache of a core


class OODMetrics(NamedTuple):
    """How well scores separate outside from inside images. Each metric lies in [0, 1].

    Areas under the precision-recall curve use the trapezoidal rule, as OpenOOD v1.5, pytorch-ood
    and `sklearn.metrics.auc` of `precision_recall_curve` do. They are not average precision.

    Attributes:
      auroc: probability that an outside image scores above an inside one; a tie counts one half.
        Larger is better.
      aupr_out: area with outside images as positives. Larger is better.
      aupr_in: area with inside images as positives and low scores flagged. Larger is better.
      fpr95_outside_positive: share of inside images flagged by the highest threshold that flags at
        least 95% of the outside images (OpenOOD v1.5, pytorch-ood). Smaller is better.
      fpr95_inside_positive: share of outside images accepted by the lowest threshold that accepts
        at least 95% of the inside images (ODIN, SSD, most older papers). Smaller is better.
    """

    auroc: Any
    aupr_out: Any
    aupr_in: Any
    fpr95_outside_positive: Any
    fpr95_inside_positive: Any


def _checked(name: str, scores: ArrayLike) -> np.ndarray:
    values = np.asarray(scores)
    if values.ndim != 1 or values.size == 0:
        raise ValueError(f"{name} must be [N] with at least one score, got shape {values.shape}")
    if values.dtype.kind == "V" and jnp.issubdtype(values.dtype, jnp.floating):
        values = values.astype(np.float32)  # NumPy does not count bfloat16 as a number
    if not (np.issubdtype(values.dtype, np.floating) or np.issubdtype(values.dtype, np.integer)):
        raise TypeError(f"{name} must be real numbers, got {values.dtype}")
    num_nan = int(np.isnan(values).sum())
    if num_nan:
        raise ValueError(
            f"{name}: {num_nan} of {values.size} are NaN and cannot be ranked. Did the network "
            "diverge, or is an input outside the domain of the score?"
        )
    return values


_Interval = tuple[float, float]


class _Ranked(NamedTuple):
    """For each image, the place of its score among the distinct scores in falling order."""

    inside: np.ndarray
    outside: np.ndarray
    num_places: int


def _places(inside: np.ndarray, outside: np.ndarray) -> _Ranked:
    distinct, index = np.unique(np.concatenate([inside, outside]), return_inverse=True)
    places = len(distinct) - 1 - index
    return _Ranked(places[: len(inside)], places[len(inside) :], len(distinct))


def _precision_recall_area(
    positive: np.ndarray,
    num_true: np.ndarray,
    num_false: np.ndarray,
    *,
    from_last: bool,
) -> np.ndarray:
    """Area under the precision-recall curve.

    Args:
      positive: number of positive images at each score, `[..., K]`.
      num_true: number of positive images flagged when flagging has come to that score.
      num_false: the number of negative images flagged there.
      from_last: whether flagging starts at the last score.
    """
    num_flagged = num_true + num_false
    # A resample may have no images at the first scores. Nothing is flagged there, and the curve is
    # still at its first point, where precision is one.
    is_none = num_flagged == 0
    precision = (num_true + is_none) / (num_flagged + is_none)
    first, last = (-1, 0) if from_last else (0, -1)
    later, earlier = (np.s_[..., :-1], np.s_[..., 1:])[:: 1 if from_last else -1]
    twice = precision[earlier] + precision[later]
    twice *= positive[later]
    ends = positive[..., first] * (1 + precision[..., first])
    return (twice.sum(axis=-1) + ends) / 2 / num_true[..., last]


def _dot(counts: np.ndarray, values: np.ndarray) -> np.ndarray:
    return np.einsum("...k,...k->...", counts, values, dtype=np.float64)


def _fewest(num_images: int, share: float) -> int:
    """The smallest number of images that is at least `share` of them."""
    return int(np.argmax(np.arange(num_images + 1) / num_images >= share))


def _above_and_below(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of images with at least and at most each score, from counts `[..., K]`."""
    above = np.cumsum(counts, axis=-1, dtype=np.int32)
    return above, above[..., -1:] - above + counts


def _areas(inside: np.ndarray, outside: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`aupr_out` and `aupr_in` from counts `[..., K]` in falling order of the scores."""
    (inside_above, inside_below), (outside_above, outside_below) = map(
        _above_and_below, (inside, outside)
    )
    return (
        _precision_recall_area(outside, outside_above, inside_above, from_last=False),
        _precision_recall_area(inside, inside_below, outside_below, from_last=True),
    )


def _metrics(inside: np.ndarray, outside: np.ndarray, tpr: float) -> OODMetrics:
    """Metrics from counts `[K]` in falling order of the scores."""
    (inside_above, inside_below), (outside_above, outside_below) = map(
        _above_and_below, (inside, outside)
    )
    num_inside, num_outside = int(inside_above[-1]), int(outside_above[-1])
    aupr_out, aupr_in = _areas(inside, outside)
    first = np.sum(outside_above < _fewest(num_outside, tpr))
    last = np.sum(inside_below >= _fewest(num_inside, tpr)) - 1
    return OODMetrics(
        auroc=(_dot(inside, outside_above) - _dot(inside, outside) / 2) / num_inside / num_outside,
        aupr_out=aupr_out,
        aupr_in=aupr_in,
        fpr95_outside_positive=inside_above[first] / num_inside,
        fpr95_inside_positive=outside_below[last] / num_outside,
    )


def ood_metrics(
    inside_scores: ArrayLike, outside_scores: ArrayLike, *, tpr: float = 0.95
) -> OODMetrics:
    """Metrics of the scores of inside and outside images.

    Args:
      inside_scores: `[N]` real numbers; infinite ones are ranked too.
      outside_scores: `[M]` real numbers.
      tpr: true-positive rate at which the two false-positive rates are taken.

    Raises:
      ValueError: scores are NaN, missing or not one axis, or `tpr` is outside (0, 1).
      TypeError: scores are not real numbers.
    """
    tpr = checked_share("tpr", tpr)
    inside, outside = (
        _checked("inside_scores", inside_scores),
        _checked("outside_scores", outside_scores),
    )
    *places, num_places = _places(inside, outside)
    counts = [np.bincount(part, minlength=num_places) for part in places]
    return OODMetrics(*(float(value) for value in _metrics(counts[0], counts[1], tpr)))


def bootstrap_intervals(
    inside_scores: ArrayLike,
    outside_scores: ArrayLike,
    *,
    num_resamples: int,
    level: float = 0.95,
    seed: int,
    tpr: float = 0.95,
) -> tuple[OODMetrics, OODMetrics]:
    """Confidence intervals of the metrics, over the choice of inside and outside test images.

    They do not cover the randomness of training, which several seeds measure. The percentiles of
    a plain bootstrap contain the true value far too rarely if detection is good or images are few,
    and have no width if no image is on the wrong side. Therefore:

    * AUROC: the union of two intervals. One uses DeLong's variance on the logit scale, with
      Student's t for few images (DeLong et al. 1988). The other is the score interval of Newcombe
      (2006, method 5), which also holds at an AUROC of one.
    * Areas under precision and recall: the union of three intervals. Two are bootstrap percentiles
      (Efron 1979), of the images themselves, and of the images with one more of each kind placed in
      the middle of the other kind; their tails are those of Hesterberg (2015), which are wider for
      few images. The third is the binomial interval of Boyd et al. (2013) on the logit scale, for
      as many images as the rarer kind has: resamples alone are too narrow if one kind spreads much
      less than the other.
    * Rates: the exact interval of a share (Clopper and Pearson 1934) and the interval of the
      threshold from its order statistics, combined by squares (Zou and Donner 2008).

    Simulations used normal scores with outside spreads of 1, 3 and 1/3 times the inside spread, at
    10, 100 and 1,000 images and an AUROC of 0.76 to 0.998. The 95% intervals of AUROC and of the
    areas contained the true value in more than 86% of 100 test sets each, and those of the rates in
    more than 84%. Only the areas depend on the seed. Scores with equal numbers of images share
    their draws.

    Args:
      inside_scores: `[N]`.
      outside_scores: `[M]`.
      num_resamples: draws with replacement, at least 1.
      level: intended share of test sets whose interval contains the true value.
      seed: sets the draws; an integer of at least 0.
      tpr: true-positive rate at which the two false-positive rates are taken.

    Returns:
      Lower ends and upper ends.

    Raises:
      ValueError: `level`, `num_resamples` or `seed` is out of range, or for the reasons of
        `ood_metrics`.
      TypeError: `num_resamples` or `seed` is not an integer, or scores are not real numbers.
    """
    inside, outside = (
        _checked("inside_scores", inside_scores),
        _checked("outside_scores", outside_scores),
    )
    (ends,) = bootstrap_intervals_of_scores(
        [inside], [outside], num_resamples=num_resamples, level=level, seed=seed, tpr=tpr
    )
    return ends


def bootstrap_intervals_of_scores(
    inside_scores: Sequence[ArrayLike],
    outside_scores: Sequence[ArrayLike],
    *,
    num_resamples: int,
    level: float = 0.95,
    seed: int,
    tpr: float = 0.95,
) -> list[tuple[OODMetrics, OODMetrics]]:
    """`bootstrap_intervals` of several scores of the same images, which share their draws.

    The other arguments, and the errors, are those of `bootstrap_intervals`.

    Args:
      inside_scores: `S` arrays `[N]`.
      outside_scores: `S` arrays `[M]`.

    Returns:
      Lower ends and upper ends, for each of the `S` scores.

    Raises:
      ValueError: scores are of different numbers of images.
    """
    tpr, level = checked_share("tpr", tpr), checked_share("level", level)
    num_resamples = arguments.whole_number("num_resamples", num_resamples, at_least=1)
    seed = arguments.whole_number("seed", seed, at_least=0)
    inside = [_checked("inside_scores", scores) for scores in inside_scores]
    outside = [_checked("outside_scores", scores) for scores in outside_scores]
    for name, scores in (("inside_scores", inside), ("outside_scores", outside)):
        sizes = sorted({one.size for one in scores})
        if len(sizes) > 1:
            raise ValueError(f"{name} must be of the same images, got {sizes} scores")
    ranked = [_places(*scores) for scores in zip(inside, outside, strict=True)]
    if not ranked:
        return []
    areas = _area_intervals(ranked, num_resamples, level, seed)
    return [_intervals(*one, tpr, level) for one in zip(ranked, areas, strict=True)]


def _intervals(
    ranked: _Ranked, areas: tuple[_Interval, _Interval], tpr: float, level: float
) -> tuple[OODMetrics, OODMetrics]:
    """Intervals of one score, given the bootstrap intervals of its two areas."""
    inside, outside = (
        np.bincount(places, minlength=ranked.num_places)
        for places in (ranked.inside, ranked.outside)
    )
    found = _metrics(inside, outside, tpr)
    fewest = int(min(inside.sum(), outside.sum()))
    out, into = areas
    ends = zip(
        _auroc_interval(inside, outside, level),
        _farther(out, _binomial_area_interval(found.aupr_out, fewest, level)),
        _farther(into, _binomial_area_interval(found.aupr_in, fewest, level)),
        _rate_interval(outside, inside, tpr, level),
        _rate_interval(inside[::-1], outside[::-1], tpr, level),
        strict=True,
    )
    low, high = ends
    # The metric itself must not fall outside by rounding.
    return (
        OODMetrics(*(float(min(x, y)) for x, y in zip(low, found, strict=True))),
        OODMetrics(*(float(max(x, y)) for x, y in zip(high, found, strict=True))),
    )


def _auroc_interval(inside: np.ndarray, outside: np.ndarray, level: float) -> tuple[float, float]:
    """Interval of AUROC from counts `[K]` in falling order of the scores."""
    num_inside, num_outside = int(inside.sum()), int(outside.sum())
    # For an image at each place: the share of the other kind on its right side; a tie counts half.
    of_inside = (np.cumsum(outside) - outside / 2) / num_outside
    of_outside = 1 - (np.cumsum(inside) - inside / 2) / num_inside
    auroc = float(_dot(outside, of_outside)) / num_outside
    low = _lowest_auroc(auroc, num_inside, num_outside, level)
    high = 1 - _lowest_auroc(1 - auroc, num_inside, num_outside, level)
    if min(num_inside, num_outside) < 2:
        return low, high
    parts = [
        float(_dot(counts, np.square(share - auroc))) / (count - 1) / count
        for counts, share, count in (
            (inside, of_inside, num_inside),
            (outside, of_outside, num_outside),
        )
    ]
    variance = sum(parts)
    if not (variance > 0 and 0 < auroc < 1):
        return low, high
    # Degrees of freedom of a sum of two variances, by Welch and Satterthwaite.
    df = variance**2 / sum(
        part**2 / (count - 1) for part, count in zip(parts, (num_inside, num_outside), strict=True)
    )
    quantile = float(scipy.special.stdtrit(max(df, 1.0), (1 + level) / 2))
    width = quantile * math.sqrt(variance) / (auroc * (1 - auroc))
    center = math.log(auroc / (1 - auroc))
    return (
        min(low, float(scipy.special.expit(center - width))),
        max(high, float(scipy.special.expit(center + width))),
    )


def _lowest_auroc(auroc: float, num_inside: int, num_outside: int, level: float) -> float:
    """Lowest true AUROC consistent with the measured one. The highest follows by symmetry."""
    quantile = float(scipy.special.ndtri((1 + level) / 2))

    def deviation(true: float) -> float:
        if min(num_inside, num_outside) < 2:
            return math.sqrt(true * (1 - true))  # the largest possible (van Dantzig 1951)
        pairs = ((num_inside + num_outside) / 2 - 1) * ((1 - true) / (2 - true) + true / (1 + true))
        return math.sqrt(true * (1 - true) * (1 + pairs) / (num_inside * num_outside))

    too_low, near = 0.0, auroc
    for _ in range(60):
        middle = (too_low + near) / 2
        if auroc - middle > quantile * deviation(middle):
            too_low = middle
        else:
            near = middle
    return too_low


def _rate_interval(
    positive: np.ndarray, negative: np.ndarray, tpr: float, level: float
) -> tuple[float, float]:
    """Interval of the share of negative images flagged when a share `tpr` of positives is flagged.

    The counts are `[K]`, in the order in which scores are flagged.
    """
    positive_flagged, negative_flagged = np.cumsum(positive), np.cumsum(negative)
    num_positive, num_negative = int(positive_flagged[-1]), int(negative_flagged[-1])

    def flagged(num_missed: int) -> int:
        """Number of negative images flagged when `num_missed` positive images are not flagged."""
        if num_missed < 0:
            return num_negative
        if num_missed >= num_positive:
            return 0
        return int(negative_flagged[np.searchsorted(positive_flagged, num_positive - num_missed)])

    tails = (1 - level) / 2, (1 + level) / 2
    # The number of positive images that the true threshold misses is binomial.
    below = scipy.special.bdtr(np.arange(num_positive + 1), num_positive, 1 - tpr)
    fewest, most = (int(x) for x in np.searchsorted(below, tails))
    count = flagged(num_positive - _fewest(num_positive, tpr))
    rate, low, high = (x / num_negative for x in (count, flagged(most), flagged(fewest - 1)))
    rest = num_negative - count
    least = scipy.special.betaincinv(count, rest + 1, tails[0]) if count else 0.0
    greatest = scipy.special.betaincinv(count + 1, rest, tails[1]) if rest else 1.0
    return (
        max(0.0, rate - math.hypot(rate - least, rate - low)),
        min(1.0, rate + math.hypot(greatest - rate, high - rate)),
    )


def _farther(one: tuple[float, float], other: tuple[float, float]) -> tuple[float, float]:
    """The smallest interval that contains both."""
    return min(one[0], other[0]), max(one[1], other[1])


def _binomial_area_interval(area: float, count: int, level: float) -> tuple[float, float]:
    """Interval of an area, as if it were a share of `count` images, on the logit scale."""
    if not 0 < area < 1:
        return area, area
    width = float(scipy.special.ndtri((1 + level) / 2)) / math.sqrt(count * area * (1 - area))
    center = math.log(area / (1 - area))
    return float(scipy.special.expit(center - width)), float(scipy.special.expit(center + width))


def _area_intervals(
    ranked: list[_Ranked], num_resamples: int, level: float, seed: int
) -> list[tuple[_Interval, _Interval]]:
    """Intervals of `aupr_out` and `aupr_in` of every score."""
    generators = np.random.default_rng(seed).spawn(4)
    plain = _resampled(ranked, num_resamples, generators[:2])
    # One more image of each kind, in the middle of the other kind: few images may lack such a case.
    mixed = [
        _Ranked(
            np.append(one.inside, _median(one.outside)),
            np.append(one.outside, _median(one.inside)),
            one.num_places,
        )
        for one in ranked
    ]
    fewest = min(len(ranked[0].inside), len(ranked[0].outside))
    tail = 0.0
    if fewest > 1:
        quantile = scipy.special.stdtrit(fewest - 1, (1 - level) / 2)
        tail = float(scipy.special.ndtr(quantile * math.sqrt(fewest / (fewest - 1))))
    both = np.stack([plain, _resampled(mixed, num_resamples, generators[2:])])
    found = np.quantile(both, [tail, 1 - tail], axis=2)
    lows, highs = np.min(found[0], axis=0).tolist(), np.max(found[1], axis=0).tolist()
    return [((low[0], high[0]), (low[1], high[1])) for low, high in zip(lows, highs, strict=True)]


def _median(places: np.ndarray) -> int:
    return int(np.sort(places)[len(places) // 2])


def _resampled(
    ranked: list[_Ranked], num_resamples: int, generators: list[np.random.Generator]
) -> np.ndarray:
    """`aupr_out` and `aupr_in` of every score from resampled images, `[S, num_resamples, 2]`."""
    sizes = len(ranked[0].inside), len(ranked[0].outside)
    chunk = max(1, _CHUNK_NUMBERS // max(*sizes, *(one.num_places for one in ranked)))
    areas = np.empty((len(ranked), num_resamples, 2))
    counters = [
        (_counter(one.inside, one.num_places), _counter(one.outside, one.num_places))
        for one in ranked
    ]
    for start in range(0, num_resamples, chunk):
        rows = slice(start, min(start + chunk, num_resamples))
        inside, outside = (
            _draw(generator, rows.stop - rows.start, size)
            for generator, size in zip(generators, sizes, strict=True)
        )
        for score, (count_inside, count_outside) in enumerate(counters):
            both = _areas(count_inside(inside), count_outside(outside))
            areas[score, rows] = np.stack(both, axis=-1)
    return areas


def _draw(generator: np.random.Generator, num_resamples: int, num_images: int) -> np.ndarray:
    """How often each resample contains each image, `[num_resamples, num_images]`."""
    # Drawing images and counting them is six times as fast as drawing counts (multinomial).
    drawn = generator.integers(num_images, size=(num_resamples, num_images))
    drawn += num_images * np.arange(num_resamples)[:, None]
    counts = np.bincount(drawn.ravel(), minlength=num_resamples * num_images)
    return counts.reshape(num_resamples, num_images).astype(np.int32)


def _counter(places: np.ndarray, num_places: int) -> Callable[[np.ndarray], np.ndarray]:
    """Function from how often images `[R, N]` were drawn to the counts at each place `[R, K]`."""
    order = np.argsort(places, kind="stable")
    occupied, starts = np.unique(places[order], return_index=True)
    has_ties = len(occupied) < len(places)

    def count(drawn: np.ndarray) -> np.ndarray:
        values = drawn[:, order]
        if has_ties:
            values = np.add.reduceat(values, starts, axis=1)
        counts = np.zeros((len(drawn), num_places), np.int32)
        counts[:, occupied] = values
        return counts

    return count
