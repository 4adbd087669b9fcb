"""Label-free detection with an encoder that was trained elsewhere."""

import dataclasses
import functools
import math
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from jevb_jax import arguments, extras
from jevb_jax.detector import TrainedDetector
from jevb_jax.evaluation import conformal, detector_input, score_json
from jevb_jax.evaluation.features import Features
from jevb_jax.evaluation.score_table import (
    ScoreEntry,
    ScoreFunction,
    ScoreSettings,
    TrainingData,
    score_table,
)
from jevb_jax.runs import archive, files
from jevb_jax.runs.archive import ArchiveError
from jevb_jax.xla_options import in_single_precision

if TYPE_CHECKING:
    from jevb_jax.any_encoder_training import TrainedEncoder

DEFAULT_SCORE = "mahalanobis"
_DEFAULT_SETTINGS = ScoreSettings(
    knn_k=(50,), ssd_clusters=(1, 10), residual_share=0.5, mixture_df=5.0
)
_FAMILY = "representation/"


def wrap(features_fn: Callable[[Any], Any], *, batch_size: int = 256) -> "WrappedEncoder":
    """Gives any encoder our label-free detectors.

    Args:
      features_fn: from a batch of images to features `[n, F]`: a Flax, Equinox or PyTorch module, an
        ONNX session, or a plain function. Whatever it takes as a batch is handed on as it is. Its
        result must be real numbers that NumPy can read. For features that exist already, it is
        `numpy.asarray`.
      batch_size: number of images in a call.

    Returns:
      The encoder. `fit` comes next.

    Raises:
      TypeError: `features_fn` cannot be called.
      ValueError: `batch_size` is below one.
    """
    if not callable(features_fn):
        raise TypeError(
            f"features_fn must be a function of images, got {type(features_fn).__name__}. For features "
            "that exist already, it is numpy.asarray"
        )
    return WrappedEncoder(features_fn, arguments.whole_number("batch_size", batch_size, at_least=1))


@dataclasses.dataclass(frozen=True)
class WrappedEncoder:
    """An encoder, from `wrap`.

    Attributes:
      features_fn: see `wrap`.
      batch_size: number of images in a call.
    """

    features_fn: Callable[[Any], Any]
    batch_size: int

    def features(self, images: Any) -> np.ndarray:
        """Features of images, `[N, F]` float32.

        Args:
          images: a sequence with a length and slices, such as an array, a tensor or a list.

        Raises:
          ValueError: there are no images; or the result of `features_fn` is not `[n, F]`, of one
            width for all batches, or cannot be read by NumPy.
          TypeError: the result is not real numbers, or images have no length.
        """
        if not hasattr(images, "__len__"):
            raise TypeError(
                "images must have a length and slices, such as an array, a tensor or a list, got "
                f"{type(images).__name__}"
            )
        if len(images) == 0:
            raise ValueError("there must be at least one image, got none")
        parts = []
        for start in range(0, len(images), self.batch_size):
            batch = images[start : start + self.batch_size]
            parts.append(_checked_features(self.features_fn(batch), len(batch)))
            if parts[-1].shape[1] != parts[0].shape[1]:
                raise ValueError(
                    "features_fn must return features of one width, got "
                    f"{parts[0].shape[1]} and {parts[-1].shape[1]}"
                )
        return np.concatenate(parts)

    def fit(self, images: Any, *, settings: ScoreSettings | None = None) -> "FittedEncoder":
        """Takes in-distribution images as the training images of every score.

        A score itself is fitted when it is first asked for.

        Args:
          images: as for `features`; at least two, and better several times as many as features.
          settings: numbers of neighbors, clusters and so on; the defaults of `configs/default.py`
            if None.

        Raises:
          ValueError: for the reasons of `features`, or features hold NaN.
        """
        found = self.features(images)
        detector_input.checked_fit_features("features", found)
        return FittedEncoder(self, found, settings or _DEFAULT_SETTINGS)

    def train(self, images: Any, **settings: Any) -> "TrainedEncoder":
        """Trains JEVB's projector and inference network on the features of images, without labels.

        This gives the encoder a posterior and JEVB's own scores. The encoder itself stays as it is.

        Args:
          images: as for `features`; at least eight.
          **settings: of `sklearn_transformer.JEVBTransformer`, for example `num_epochs`.

        Raises:
          ModuleNotFoundError: the extra `train` is not installed.
          TypeError: there is no such setting.
          ValueError: for the reasons of `features`, features hold NaN, or a setting is out of its
            range.
        """
        with extras.explained():
            from jevb_jax.any_encoder_training import train_on_features
        found = self.features(images)
        detector_input.checked_fit_features("features", found)
        return train_on_features(self, found, **settings)

    def load_detector(
        self, directory: str | os.PathLike[str]
    ) -> "WrappedDetector | TrainedDetector":
        """Reads what `save` of a detector wrote. The encoder itself is not in it.

        Args:
          directory: where it was saved.

        Returns:
          A detector of the kind that was saved: from `fit`, or from `train`.

        Raises:
          FileNotFoundError: nothing was saved there.
          ArchiveError: there is no such detector, or it is damaged or of another version.
        """
        path = files.to_path(directory)
        if not archive.is_archive(path):
            raise FileNotFoundError(f"{path} holds no {archive.MANIFEST}; save a detector first")
        manifest = archive.read_manifest(path)
        if "detector" in manifest:
            from jevb_jax import loading  # only this needs the networks

            of_features = loading.load_detector(path)
            if not of_features.model.num_features:
                raise ArchiveError(
                    f"{path} holds a detector with an encoder of its own: read it with "
                    "jevb_jax.load_detector(directory)"
                )
            return TrainedDetector(self, of_features)
        if archive.WRAPPED not in manifest:
            raise ArchiveError(f"{path} holds no detector of a wrapped encoder")
        saved, arrays = manifest[archive.WRAPPED], archive.read_arrays(path, manifest)
        try:
            threshold = float(arrays.pop("threshold"))
            scorer = score_json.rebuild(saved["scorer"], arrays)
            return WrappedDetector(
                self,
                scorer,
                saved["score"],
                saved["num_features"],
                saved["false_alarm_rate"],
                threshold,
            )
        except (KeyError, score_json.SavedScoreError) as error:
            raise ArchiveError(
                f"the detector in {path} is not one of this version: {error}"
            ) from error


@dataclasses.dataclass(frozen=True, eq=False)
class FittedEncoder:
    """An encoder and the features of its training images, from `WrappedEncoder.fit`.

    Attributes:
      encoder: computes the features.
      train_features: `[N, F]`, of in-distribution images.
      settings: numbers of neighbors, clusters and so on.
    """

    encoder: WrappedEncoder
    train_features: np.ndarray
    settings: ScoreSettings

    def __repr__(self) -> str:
        rows, width = self.train_features.shape
        return f"FittedEncoder({rows} images, {width} features)"

    @functools.cached_property
    def _entries(self) -> dict[str, ScoreEntry]:
        table = score_table("simsiam", self.settings, num_views=1)  # a method without own scores
        return {
            name.removeprefix(_FAMILY): entry
            for name, entry in table.items()
            if name.startswith(_FAMILY) and not entry.needs_labels
        }

    @functools.cached_property
    def _scorers(self) -> dict[str, ScoreFunction]:
        return {}

    def score_names(self) -> list[str]:
        """Names of the scores; `docs/evaluation.md` says what each is."""
        return list(self._entries)

    @in_single_precision
    def scorer(self, score: str) -> ScoreFunction:
        """A score, fitted to the training images at the first call.

        Args:
          score: one of `score_names()`.

        Raises:
          ValueError: the score is unknown.
          DegenerateFeaturesError: it cannot be fitted to the training features.
        """
        if score not in self._entries:
            raise ValueError(f"score must be one of {self.score_names()}, got {score!r}")
        if score not in self._scorers:
            train = TrainingData(_as_features(self.train_features))
            self._scorers[score] = self._entries[score].make(train)
        return self._scorers[score]

    @in_single_precision
    def ood_score(self, images: Any, score: str = DEFAULT_SCORE) -> np.ndarray:
        """How strange images are, `[N]` float32; larger is stranger.

        Args:
          images: as for `WrappedEncoder.features`.
          score: one of `score_names()`.

        Raises:
          ValueError: for the reasons of `features`; the score is unknown; or features have another
            width than those of the training images.
          DegenerateFeaturesError: the score cannot be fitted to the training features.
        """
        scorer = self.scorer(score)
        return _scores(self.encoder, scorer, images, self.train_features.shape[1])

    @in_single_precision
    def detector(
        self,
        calibration_images: Any,
        false_alarm_rate: float = 0.05,
        score: str = DEFAULT_SCORE,
    ) -> "WrappedDetector":
        """A detector with a threshold by split conformal prediction (docs eq. 29).

        At most `false_alarm_rate` of new images like the calibration images are called strange.

        Args:
          calibration_images: in-distribution images. They must not be among those of `fit`, which is
            not checked.
          false_alarm_rate: in (0, 1).
          score: as for `ood_score`.

        Raises:
          ValueError: there are fewer than `1 / false_alarm_rate - 1` calibration images, or for the
            reasons of `ood_score`.
        """
        rate = conformal.checked_rate(false_alarm_rate, len(calibration_images))
        threshold = conformal.conformal_threshold(self.ood_score(calibration_images, score), rate)
        width = self.train_features.shape[1]
        return WrappedDetector(self.encoder, self.scorer(score), score, width, rate, threshold)


@dataclasses.dataclass(frozen=True, eq=False)
class WrappedDetector:
    """Says which images are out of distribution; made by `FittedEncoder.detector`.

    Attributes:
      encoder: computes the features.
      scorer: the fitted score.
      score_name: its name, for example "mahalanobis".
      num_features: F, the width of the features.
      false_alarm_rate: largest share of in-distribution images to call strange.
      threshold: larger scores are alarms.
    """

    encoder: WrappedEncoder
    scorer: ScoreFunction
    score_name: str
    num_features: int
    false_alarm_rate: float
    threshold: float

    def __repr__(self) -> str:
        return (
            f"WrappedDetector({self.score_name}, threshold {self.threshold:.6g}, "
            f"false_alarm_rate {self.false_alarm_rate:g}, {self.num_features} features)"
        )

    @in_single_precision
    def score(self, images: Any) -> np.ndarray:
        """How strange images are, `[N]`; as `FittedEncoder.ood_score`."""
        return _scores(self.encoder, self.scorer, images, self.num_features)

    def is_outside(self, images: Any) -> np.ndarray:
        """Which images are called out of distribution, bool `[N]`.

        A score that is not finite is an alarm.
        """
        return conformal.exceeds(self.score(images), self.threshold)

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Writes the score and the threshold, without pickle, for `WrappedEncoder.load_detector`.

        Args:
          directory: created if it does not exist. An older detector in it is replaced.

        Raises:
          ValueError: the directory holds a run or a model.
          ArchiveError: it holds a damaged model or detector.
        """
        target = files.to_path(directory)
        archive.check_free(target, kind="wrapped detector")
        description, arrays = score_json.describe(self.scorer)
        arrays["threshold"] = np.asarray(self.threshold, np.float64)
        entry = {
            "score": self.score_name,
            "num_features": self.num_features,
            "false_alarm_rate": self.false_alarm_rate,
            "scorer": description,
        }
        archive.write_archive(
            target, arrays=arrays, manifest={archive.WRAPPED: entry}, extra_files={}
        )


def _checked_features(output: Any, num_images: int) -> np.ndarray:
    """What `features_fn` returned for a batch, as float32 `[n, F]`."""
    try:
        array = np.asarray(output)
    # Libraries raise what they like here: torch TypeError and RuntimeError.
    except Exception as error:
        raise ValueError(
            f"NumPy cannot read what features_fn returned ({type(output).__name__}: {error}). For "
            "PyTorch, return features.detach().cpu()"
        ) from error
    if not (
        jax.numpy.issubdtype(array.dtype, jax.numpy.floating)
        or jax.numpy.issubdtype(array.dtype, jax.numpy.integer)
    ):
        raise TypeError(f"features must be real numbers, got {array.dtype}")
    if array.ndim != 2 or len(array) != num_images or array.shape[1] == 0:
        raise ValueError(
            f"features_fn must return [n, F], one row for each of the {num_images} images, got shape "
            f"{array.shape}. Average feature maps over their pixels first"
        )
    return array.astype(np.float32)


def _as_features(values: np.ndarray) -> Features:
    return Features(representation=values, embedding=None, prediction=None, terms=None, labels=None)


@jax.jit
def _apply(scorer: ScoreFunction, features: Features) -> jax.Array:
    return scorer(features)


def _scores(
    encoder: WrappedEncoder, scorer: ScoreFunction, images: Any, num_features: int
) -> np.ndarray:
    """Scores, computed in batches of one size, so that one program is compiled."""
    features = encoder.features(images)
    if features.shape[1] != num_features:
        raise ValueError(
            f"features must have the width of the fitted ones, {num_features}, got "
            f"{features.shape[1]}"
        )
    size = encoder.batch_size
    count = math.ceil(len(features) / size) * size
    padded = np.pad(features, ((0, count - len(features)), (0, 0)), mode="edge")
    parts = [
        np.asarray(_apply(scorer, _as_features(padded[start : start + size])))
        for start in range(0, count, size)
    ]
    return np.concatenate(parts)[: len(features)]
