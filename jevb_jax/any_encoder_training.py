"""JEVB trained on the features of an encoder that was trained elsewhere."""

import dataclasses
import functools
from typing import Any

import numpy as np
from rich.console import Console

from jevb_jax.detector import Detector, FeatureEncoder, TrainedDetector
from jevb_jax.evaluation import conformal, score_table
from jevb_jax.evaluation.score_table import ScoreFunction
from jevb_jax.model import GaussianPosterior, Model
from jevb_jax.runs.waiting import Waiting
from jevb_jax.sklearn_transformer import JEVBTransformer


@dataclasses.dataclass(frozen=True, eq=False)
class TrainedEncoder:
    """An encoder with JEVB's posterior, from `WrappedEncoder.train`.

    Attributes:
      encoder: computes the features.
      model: JEVB's networks on features. `jevb_jax.export.export_model` saves it.
      train_features: `[N, F]`, on which it was trained, and to which scores are fitted.
    """

    encoder: FeatureEncoder
    model: Model
    train_features: np.ndarray

    def __repr__(self) -> str:
        return f"TrainedEncoder({len(self.train_features)} images, {self.model})"

    def embed(self, images: Any) -> np.ndarray:
        """JEVB's embedding, `[N, D]` float32.

        Args:
          images: as for `WrappedEncoder.features`.

        Raises:
          ValueError: for the reasons of `features`, or they have another width than in training.
        """
        return self.model.embed(self.encoder.features(images))

    def posterior(self, images: Any) -> GaussianPosterior:
        """Mean and scale of the Gaussian posterior, each `[N, D]`; arguments as for `embed`."""
        return self.model.posterior(self.encoder.features(images))

    def score_names(self) -> list[str]:
        """Names of the scores, JEVB's own among them; `docs/evaluation.md` says what each is."""
        return self.model.score_names()

    def _name(self, score: str | None) -> str:
        return score_table.default_score(self.model.settings) if score is None else score

    @functools.cached_property
    def _scorers(self) -> dict[str, ScoreFunction]:
        return {}

    def _scorer(self, name: str) -> ScoreFunction:
        if name not in self._scorers:
            entries = score_table.scores_of_run(self.model.settings, has_labels=False)
            if name not in entries:
                raise ValueError(f"score must be one of {self.score_names()}, got {name!r}")
            fitted_to = self.train_features if entries[name].is_fitted else None
            self._scorers[name] = self.model.scorer(name, fitted_to)
        return self._scorers[name]

    def ood_score(self, images: Any, score: str | None = None) -> np.ndarray:
        """How strange images are, `[N]` float32; larger is stranger.

        Args:
          images: as for `embed`.
          score: one of `score_names()`; JEVB's default score if None.

        Raises:
          ValueError: the score is unknown, or for the reasons of `embed`.
        """
        name = self._name(score)
        scorer = self._scorer(name)
        return self.model.scores_of(self.encoder.features(images), name, scorer)

    def detector(
        self, calibration_images: Any, false_alarm_rate: float = 0.05, score: str | None = None
    ) -> TrainedDetector:
        """A detector with a threshold by split conformal prediction (docs eq. 29).

        Args:
          calibration_images: in-distribution images that were not trained on, which is not checked.
          false_alarm_rate: largest expected share of such images that are called strange, in (0, 1).
          score: as for `ood_score`.

        Raises:
          ValueError: there are fewer than `1 / false_alarm_rate - 1` calibration images, or for the
            reasons of `ood_score`.
        """
        rate = conformal.checked_rate(false_alarm_rate, len(calibration_images))
        name = self._name(score)
        threshold = conformal.conformal_threshold(self.ood_score(calibration_images, name), rate)
        of_features = Detector(self.model, self._scorer(name), name, rate, threshold)
        return TrainedDetector(self.encoder, of_features)


def train_on_features(
    encoder: FeatureEncoder, features: np.ndarray, **settings: Any
) -> TrainedEncoder:
    """Trains JEVB on features; arguments and errors are those of `JEVBTransformer`."""
    with Waiting(Console(stderr=True), "Training on features", in_logs=False):
        transformer = JEVBTransformer(**settings).fit(features)
    return TrainedEncoder(encoder, transformer.model_, features)
