"""Label-free detection as a scikit-learn estimator, for pipelines and grid searches."""

# ruff: noqa: N803 - scikit-learn calls the rows X

from typing import Any, Self

import numpy as np
from sklearn.base import BaseEstimator, OutlierMixin
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data

from jevb_jax import arguments
from jevb_jax.any_encoder import DEFAULT_SCORE, WrappedDetector, wrap
from jevb_jax.evaluation import conformal, detector_input
from jevb_jax.evaluation.score_table import ScoreSettings

_SCORES = ("knn", "mahalanobis", "norm", "residual", "ssd")


class LabelFreeDetector(OutlierMixin, BaseEstimator):
    """The scores of `jevb_jax.wrap` with scikit-learn's names and signs.

    A part of the training rows is held out. The score is fitted to the others, and the threshold is
    that of split conformal prediction on the held-out rows (docs eq. 29): at most a share
    `false_alarm_rate` of new rows like these is called an outlier, if at least
    `1 / false_alarm_rate - 1` rows were held out. With fewer, the threshold is the largest held-out
    score.

    Args:
      score_name: "mahalanobis", "knn", "ssd", "residual" or "norm" (docs/evaluation.md).
      false_alarm_rate: in (0, 1).
      held_out_share: share of the rows that set the threshold, in (0, 1).
      num_neighbors: k of "knn"; at most the number of fitted rows is used.
      num_clusters: clusters of "ssd"; at most half the number of fitted rows is used.
      residual_share: share of the features, in (0, 1), that the principal subspace of "residual"
        spans.
      random_state: which rows are held out: a number, a NumPy `RandomState`, or None.

    Attributes:
      offset_: `decision_function` is `score_samples - offset_`.
      n_features_in_: width of the rows.
      detector_: the `any_encoder.WrappedDetector`.
    """

    def __init__(
        self,
        score_name: str = DEFAULT_SCORE,
        *,
        false_alarm_rate: float = 0.05,
        held_out_share: float = 0.25,
        num_neighbors: int = 50,
        num_clusters: int = 1,
        residual_share: float = 0.5,
        random_state: Any = 0,
    ):
        """See the class. Arguments are checked in `fit`, as in scikit-learn."""
        self.score_name = score_name
        self.false_alarm_rate = false_alarm_rate
        self.held_out_share = held_out_share
        self.num_neighbors = num_neighbors
        self.num_clusters = num_clusters
        self.residual_share = residual_share
        self.random_state = random_state

    def fit(self, X: Any, y: Any = None) -> Self:
        """Fits the score and the threshold.

        Args:
          X: `[N, F]`, rows of ordinary examples.
          y: not used.

        Returns:
          The estimator.

        Raises:
          ValueError: there are fewer than three rows, they are not finite, or a setting is out of its
            range.
          DegenerateFeaturesError: the rows do not vary.
        """
        del y
        num_neighbors = arguments.whole_number("num_neighbors", self.num_neighbors, at_least=1)
        num_clusters = arguments.whole_number("num_clusters", self.num_clusters, at_least=1)
        detector_input.checked_share("residual_share", self.residual_share)
        if self.score_name not in _SCORES:
            raise ValueError(f"score_name must be one of {_SCORES}, got {self.score_name!r}")
        rows: Any = validate_data(self, X, ensure_min_samples=3, dtype=np.float64)
        rate = detector_input.checked_share("false_alarm_rate", self.false_alarm_rate)
        share = detector_input.checked_share("held_out_share", self.held_out_share)
        order = check_random_state(self.random_state).permutation(len(rows))
        # Two rows at least are fitted, and one at least is held out.
        num_held_out = min(max(1, round(share * len(rows))), len(rows) - 2)
        held_out, kept = rows[order[:num_held_out]], rows[order[num_held_out:]]
        settings = ScoreSettings(
            knn_k=(min(num_neighbors, len(kept)),),
            ssd_clusters=(max(1, min(num_clusters, len(kept) // 2)),),
            residual_share=self.residual_share,
            mixture_df=5.0,
        )
        numbered = {"knn": settings.knn_k[0], "ssd": settings.ssd_clusters[0]}
        number = f"_{numbered[self.score_name]}" if self.score_name in numbered else ""
        name = f"{self.score_name}{number}"
        fitted = wrap(np.asarray).fit(kept, settings=settings)
        scores = np.sort(fitted.ood_score(held_out, name))
        rank = min(conformal.threshold_rank(num_held_out, rate), num_held_out)
        threshold = float(scores[rank - 1])
        self.detector_ = WrappedDetector(
            fitted.encoder, fitted.scorer(name), name, rows.shape[1], rate, threshold
        )
        self.offset_ = -threshold
        return self

    def score_samples(self, X: Any) -> np.ndarray:
        """How ordinary rows are, `[N]` float64; minus the score, so smaller is stranger.

        Args:
          X: `[N, F]`.

        Raises:
          NotFittedError: `fit` comes first.
          ValueError: rows are not finite, or have another width than in `fit`.
        """
        check_is_fitted(self)
        rows: Any = validate_data(self, X, reset=False, dtype=np.float64)
        return -self.detector_.score(rows).astype(np.float64)

    def decision_function(self, X: Any) -> np.ndarray:
        """`score_samples` minus the threshold, `[N]`: negative for outliers.

        Args:
          X: `[N, F]`.
        """
        return self.score_samples(X) - self.offset_

    def predict(self, X: Any) -> np.ndarray:
        """1 for ordinary rows and -1 for outliers, `[N]` int.

        Args:
          X: `[N, F]`.
        """
        return np.where(self.decision_function(X) < 0, -1, 1)
