"""Thresholds with a bounded rate of false alarms."""

import math

import numpy as np
from jax.typing import ArrayLike

from jevb_jax.evaluation.detector_input import checked_share


def conformal_threshold(calibration_scores: ArrayLike, false_alarm_rate: float) -> float:
    """Threshold that a new inside score exceeds at most with the asked probability (docs eq. 29).

    Split conformal: the `ceil((n + 1)(1 - rate))`-th smallest of `n` scores. If those and the new one
    are exchangeable, the probability over both is at most `rate`, and above `rate - 1/(n + 1)` where no
    scores are equal (Vovk et al. 2005; Bates et al. 2023 for its use here).

    Args:
      calibration_scores: `[n]`, of held-out in-distribution images: not those of the fit.
      false_alarm_rate: in (0, 1).

    Returns:
      The threshold; larger scores are alarms.

    Raises:
      ValueError: scores that are not one axis, or are NaN or -inf, a rate out of range, or too few
        scores for it: it needs `n >= 1/rate - 1`; so many infinite scores that the threshold would be
        infinite, above which there is nothing.
    """
    scores = np.asarray(calibration_scores, np.float64)
    if scores.ndim != 1:
        raise ValueError(f"calibration_scores must be [n] without NaN, got shape {scores.shape}")
    num_bad = int(np.sum(np.isnan(scores) | np.isneginf(scores)))
    if num_bad:
        raise ValueError(
            f"calibration_scores must be [n] without NaN or -inf: {num_bad} of {len(scores)} are. Look "
            "for a diverged network or features that overflow"
        )
    false_alarm_rate = checked_share("false_alarm_rate", false_alarm_rate)
    # Rounded, because (99 + 1)(1 - 0.07) is 93.00000000000001 in float64.
    rank = math.ceil(round((len(scores) + 1) * (1 - false_alarm_rate), 9))
    if rank > len(scores):
        needed = math.ceil(round(1 / false_alarm_rate, 9)) - 1
        raise ValueError(
            f"a false-alarm rate of {false_alarm_rate} needs at least {needed} calibration scores, "
            f"got {len(scores)}"
        )
    threshold = float(np.sort(scores)[rank - 1])
    if math.isinf(threshold):
        raise ValueError(
            f"{np.sum(np.isinf(scores))} of {len(scores)} calibration scores are infinite, and the "
            f"threshold for a false-alarm rate of {false_alarm_rate} with them: nothing would be called "
            "outside. Look for features that overflow"
        )
    return threshold


def exceeds(scores: ArrayLike, threshold: float) -> np.ndarray:
    """Which scores are alarms: those above the threshold, and those that are no finite number.

    A score of NaN or -inf comes of a diverged network or of numbers that overflowed. Nothing says that
    its image is as usual.

    Args:
      scores: `[...]`.
      threshold: what `conformal_threshold` gave.

    Returns:
      bool `[...]`.
    """
    values = np.asarray(scores)
    return ~(np.isfinite(values) & (values <= threshold))
