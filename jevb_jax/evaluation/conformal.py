"""Thresholds with a bounded rate of false alarms."""

import math

import numpy as np
from jax.typing import ArrayLike

from jevb_jax.evaluation.detector_input import checked_share


def conformal_threshold(calibration_scores: ArrayLike, false_alarm_rate: float) -> float:
    """Threshold that a new inside score exceeds with at most the given probability (docs eq. 29).

    Split conformal prediction: the threshold is the `ceil((n + 1)(1 - rate))`-th smallest of `n`
    scores. If these and the new score are exchangeable, the probability over both is at most
    `rate`. It is more than `rate - 1/(n + 1)` if no scores are equal (Vovk et al. 2005; Bates et
    al. 2023 use it for detection).

    Args:
      calibration_scores: `[n]`, of in-distribution images that nothing was fitted to.
      false_alarm_rate: in (0, 1).

    Returns:
      The threshold. Larger scores are alarms.

    Raises:
      ValueError: scores are not `[n]`, or some are NaN or -inf; the rate is out of range; there are
        fewer than `1/rate - 1` scores; or so many scores are infinite that the threshold would be
        infinite too, and nothing would exceed it.
    """
    scores = np.asarray(calibration_scores, np.float64)
    if scores.ndim != 1:
        raise ValueError(f"calibration_scores must be one axis, [n], got shape {scores.shape}")
    num_bad = int(np.sum(np.isnan(scores) | np.isneginf(scores)))
    if num_bad:
        raise ValueError(
            f"calibration_scores must be [n] without NaN or -inf: {num_bad} of {len(scores)} are "
            "NaN or -inf. Did the network diverge, or do the features overflow?"
        )
    rate = checked_rate(false_alarm_rate, len(scores))
    threshold = float(np.sort(scores)[threshold_rank(len(scores), rate) - 1])
    if math.isinf(threshold):
        raise ValueError(
            f"{np.sum(np.isinf(scores))} of {len(scores)} calibration scores are infinite, so the "
            f"threshold for a false-alarm rate of {rate} is infinite too, and no image "
            "could exceed it. Look for features that overflow"
        )
    return threshold


def threshold_rank(num_scores: int, false_alarm_rate: float) -> int:
    """Which of `n` calibration scores, counted from 1 upwards, is the threshold.

    Args:
      num_scores: `n`.
      false_alarm_rate: in (0, 1).

    Returns:
      `ceil((n + 1)(1 - rate))`, which is above `n` if there are too few scores for the rate.
    """
    # Round, because (99 + 1)(1 - 0.07) is 93.00000000000001 in float64.
    return math.ceil(round((num_scores + 1) * (1 - false_alarm_rate), 9))


def checked_rate(false_alarm_rate: float, num_scores: int) -> float:
    """A rate of false alarms for which there can be a threshold. Call it before long work.

    Args:
      false_alarm_rate: in (0, 1).
      num_scores: number of calibration scores that there will be.

    Returns:
      The rate as a Python float.

    Raises:
      ValueError: the rate is out of range, or there are fewer than `1/rate - 1` scores.
    """
    rate = checked_share("false_alarm_rate", false_alarm_rate)
    if threshold_rank(num_scores, rate) > num_scores:
        needed = math.ceil(round(1 / rate, 9)) - 1
        raise ValueError(
            f"a false-alarm rate of {rate} needs at least {needed} calibration scores, got "
            f"{num_scores}"
        )
    return rate


def exceeds(scores: ArrayLike, threshold: float) -> np.ndarray:
    """Which scores are alarms: scores above the threshold, and all scores that are not finite.

    A score of NaN or -inf comes from a diverged network or from numbers that overflowed. It is an
    alarm, because nothing shows that its image is ordinary.

    Args:
      scores: `[...]`.
      threshold: the value from `conformal_threshold`.

    Returns:
      bool `[...]`.
    """
    values = np.asarray(scores)
    return ~(np.isfinite(values) & (values <= threshold))
