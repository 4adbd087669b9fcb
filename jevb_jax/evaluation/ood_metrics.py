"""Metrics of out-of-distribution detection, with the conventions named, and their intervals.

Scores are larger for images that are more out of distribution. Everything follows from one table:
the distinct scores in falling order, with how many inside and outside images have each. Ties are
therefore exact, and a bootstrap resample is another set of counts.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

_CHUNK_NUMBERS = 2_000_000  # of resampled counts held at once


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


def _counts(inside: np.ndarray, outside: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Inside and outside images at each distinct score, in falling order, `[K]` each."""
    distinct, index = np.unique(np.concatenate([inside, outside]), return_inverse=True)
    counts = [
        np.bincount(part, minlength=len(distinct))[::-1]
        for part in (index[: len(inside)], index[len(inside) :])
    ]
    return counts[0], counts[1]


def _area(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.sum(np.diff(x, axis=-1) * (y[..., 1:] + y[..., :-1]), axis=-1) / 2


def _precision_recall_area(positive: np.ndarray, negative: np.ndarray) -> np.ndarray:
    """From counts in the order in which a falling threshold lets images in."""
    true, false = np.cumsum(positive, axis=-1), np.cumsum(negative, axis=-1)
    # A resample may leave the first scores without images: nothing is flagged there, and the curve
    # is still at its first point, precision one.
    flagged = true + false
    precision = np.where(flagged > 0, true / np.maximum(flagged, 1), 1.0)
    recall = true / true[..., -1:]
    zero, one = np.zeros_like(recall[..., :1]), np.ones_like(recall[..., :1])
    return _area(np.concatenate([zero, recall], axis=-1), np.concatenate([one, precision], axis=-1))


def _false_positive_rate(positive: np.ndarray, negative: np.ndarray, tpr: float) -> np.ndarray:
    """At the first threshold, in the order of the counts, that lets in a share `tpr`."""
    true, false = np.cumsum(positive, axis=-1), np.cumsum(negative, axis=-1)
    first = np.argmax(true / true[..., -1:] >= tpr, axis=-1)
    at = np.take_along_axis(false, first[..., None], axis=-1)[..., 0]
    return at / false[..., -1]


def _metrics(inside: np.ndarray, outside: np.ndarray, tpr: float) -> OODMetrics:
    """From counts `[..., K]` in falling order of the scores."""
    rising = (inside[..., ::-1], outside[..., ::-1])
    true, false = np.cumsum(outside, axis=-1), np.cumsum(inside, axis=-1)
    zero = np.zeros_like(true[..., :1])
    total = true[..., -1] * false[..., -1]
    auroc = (
        _area(np.concatenate([zero, false], axis=-1), np.concatenate([zero, true], axis=-1)) / total
    )
    return OODMetrics(
        auroc=auroc,
        aupr_out=_precision_recall_area(outside, inside),
        aupr_in=_precision_recall_area(*rising),
        fpr95_outside_positive=_false_positive_rate(outside, inside, tpr),
        fpr95_inside_positive=_false_positive_rate(*rising, tpr),
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
    return OODMetrics(*(float(value) for value in _metrics(*_counts(inside, outside), tpr)))


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

    The uncertainty of the test images alone: not that of training, which seeds measure.

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
    counts = _counts(
        _checked("inside_scores", inside_scores), _checked("outside_scores", outside_scores)
    )
    generator = np.random.default_rng(seed)
    sizes = [int(part.sum()) for part in counts]
    chunk = max(1, _CHUNK_NUMBERS // len(counts[0]))
    parts = []
    for start in range(0, num_resamples, chunk):
        rows = min(chunk, num_resamples - start)
        resampled = [
            generator.multinomial(size, part / size, size=rows)
            for part, size in zip(counts, sizes, strict=True)
        ]
        parts.append(_metrics(resampled[0], resampled[1], tpr))
    tails = ((1 - level) / 2, (1 + level) / 2)
    low, high = zip(
        *(np.quantile(np.concatenate(values), tails) for values in zip(*parts, strict=True)),
        strict=True,
    )
    return OODMetrics(*map(float, low)), OODMetrics(*map(float, high))
