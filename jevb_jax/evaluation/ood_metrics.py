"""Metrics of out-of-distribution detection, with the conventions named, and their intervals.

Scores are larger for images that are more out of distribution. Everything follows from one table:
the distinct scores in falling order, with how many inside and outside images have each. Ties are
therefore exact, and a bootstrap resample is another set of counts.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

_CHUNK_NUMBERS = 2**15  # of resampled counts worked on at once, few enough for a core's cache


class OODMetrics(NamedTuple):
    """How well scores tell outside from inside images, each in [0, 1].

    Areas under precision and recall are by the trapezoidal rule, as OpenOOD v1.5, pytorch-ood and
    `sklearn.metrics.auc` of `precision_recall_curve` have them (not average precision).

    Attributes:
      auroc: probability that an outside image scores above an inside one, ties half. Larger is better,
        as of the two that follow.
      aupr_out: outside images are the positive ones.
      aupr_in: inside images are the positive ones, and low scores name them.
      fpr95_outside_positive: share of inside images flagged by the highest threshold that flags at
        least 95% of the outside ones: OpenOOD v1.5 and pytorch-ood. Smaller is better, as of the next.
      fpr95_inside_positive: share of outside images accepted by the lowest threshold that accepts at
        least 95% of the inside ones: ODIN, SSD and most older papers.
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
    if not (np.issubdtype(values.dtype, np.floating) or np.issubdtype(values.dtype, np.integer)):
        raise TypeError(f"{name} must be real numbers, got {values.dtype}")
    num_nan = int(np.isnan(values).sum())
    if num_nan:
        raise ValueError(
            f"{name}: {num_nan} of {values.size} are NaN, which have no rank. Look for a diverged "
            "network or a score outside its domain"
        )
    return values


def _places(inside: np.ndarray, outside: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    """Of every image the place of its score among the `K` distinct ones in falling order, and `K`."""
    distinct, index = np.unique(np.concatenate([inside, outside]), return_inverse=True)
    places = len(distinct) - 1 - index
    return places[: len(inside)], places[len(inside) :], len(distinct)


def _precision_recall_area(
    positive: np.ndarray, num_true: np.ndarray, num_false: np.ndarray
) -> np.ndarray:
    """From positive images at each score and images flagged there, in the order of the flagging."""
    # A resample may leave the first scores without images: nothing is flagged there, and the curve
    # is still at its first point, precision one.
    num_flagged = num_true + num_false
    precision = np.where(num_flagged > 0, num_true / np.maximum(num_flagged, 1), 1.0)
    ends = _dot(positive, precision) + _dot(positive[..., 1:], precision[..., :-1])
    return (ends + positive[..., 0]) / 2 / num_true[..., -1]


def _dot(counts: np.ndarray, values: np.ndarray) -> np.ndarray:
    return np.einsum("...k,...k->...", counts, values, dtype=np.float64)


def _fewest(num_images: int, share: float) -> int:
    """The smallest count that is at least a share of the images."""
    return int(np.argmax(np.arange(num_images + 1) / num_images >= share))


def _at(values: np.ndarray, place: np.ndarray) -> np.ndarray:
    return np.take_along_axis(values, place[..., None], axis=-1)[..., 0]


def _metrics(inside: np.ndarray, outside: np.ndarray, tpr: float) -> OODMetrics:
    """From counts `[..., K]` in falling order of the scores, of as many images in every row."""
    # Images that score at least so much, and at most.
    inside_above, outside_above = (np.cumsum(x, axis=-1, dtype=np.int32) for x in (inside, outside))
    num_inside, num_outside = (int(x.flat[-1]) for x in (inside_above, outside_above))
    inside_below = num_inside - inside_above + inside
    outside_below = num_outside - outside_above + outside
    rising = (x[..., ::-1] for x in (inside, inside_below, outside_below))
    first = np.sum(outside_above < _fewest(num_outside, tpr), axis=-1)
    last = np.sum(inside_below >= _fewest(num_inside, tpr), axis=-1) - 1
    return OODMetrics(
        auroc=(_dot(inside, outside_above) - _dot(inside, outside) / 2) / num_inside / num_outside,
        aupr_out=_precision_recall_area(outside, outside_above, inside_above),
        aupr_in=_precision_recall_area(*rising),
        fpr95_outside_positive=_at(inside_above, first) / num_inside,
        fpr95_inside_positive=_at(outside_below, last) / num_outside,
    )


def _check_share(name: str, value: float) -> None:
    if not 0 < value < 1:
        raise ValueError(f"{name} must be in (0, 1), got {value}")


def ood_metrics(
    inside_scores: ArrayLike, outside_scores: ArrayLike, *, tpr: float = 0.95
) -> OODMetrics:
    """Metrics of scores of inside and outside images.

    Args:
      inside_scores: `[N]`, real; infinities are ranked.
      outside_scores: `[M]`.
      tpr: of the two rates at 95%, in another share if asked.

    Returns:
      Numbers.

    Raises:
      ValueError: NaN scores, no scores, more than one axis, `tpr` outside (0, 1).
      TypeError: scores that are not real numbers.
    """
    _check_share("tpr", tpr)
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
    """Percentile bootstrap of the metrics, over inside and over outside images (Efron 1979).

    The uncertainty of the test images alone: not that of training, which seeds measure. A seed draws
    the same images for every score of as many images.

    Args:
      inside_scores: `[N]`.
      outside_scores: `[M]`.
      num_resamples: draws with replacement, at least 1.
      level: share of resamples within the interval.
      seed: of the draws.
      tpr: as for `ood_metrics`.

    Returns:
      Lower and upper ends.

    Raises:
      ValueError: as `ood_metrics`; no resamples, `level` outside (0, 1).
      TypeError: as `ood_metrics`.
    """
    _check_share("tpr", tpr)
    _check_share("level", level)
    if num_resamples < 1:
        raise ValueError(f"num_resamples must be at least 1, got {num_resamples}")
    *places, num_places = _places(
        _checked("inside_scores", inside_scores), _checked("outside_scores", outside_scores)
    )
    # Drawing images and counting them is six times as fast as drawing the counts (multinomial).
    generators = np.random.default_rng(seed).spawn(2)
    chunk = max(1, _CHUNK_NUMBERS // num_places)
    parts = []
    for start in range(0, num_resamples, chunk):
        rows = min(chunk, num_resamples - start)
        inside, outside = (
            np.stack(
                [
                    np.bincount(
                        place[generator.integers(len(place), size=len(place))], minlength=num_places
                    )
                    for _ in range(rows)
                ]
            )
            for place, generator in zip(places, generators, strict=True)
        )
        parts.append(_metrics(inside, outside, tpr))
    tails = ((1 - level) / 2, (1 + level) / 2)
    low, high = zip(
        *(np.quantile(np.concatenate(values), tails) for values in zip(*parts, strict=True)),
        strict=True,
    )
    return OODMetrics(*map(float, low)), OODMetrics(*map(float, high))
