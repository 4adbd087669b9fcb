"""A detector of strange images, and the writing of a model to a directory."""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from safetensors import numpy as safetensors

from jevb_jax.evaluation import conformal, score_json
from jevb_jax.evaluation.score_table import ScoreFunction
from jevb_jax.runs import archive, files
from jevb_jax.runs.array_names import flatten_names
from jevb_jax.xla_options import in_single_precision

DETECTOR = "detector.safetensors"


class WrittenModel(Protocol):
    """The parts of a `Model` that are written."""

    config: dict[str, Any]
    variables: Any
    step: int
    square_size: int
    recorded_data: Mapping[str, Any] | None


@dataclasses.dataclass(frozen=True)
class Detector:
    """Says which images are out of distribution; made by `Model.detector`.

    It can be pickled. `save` and `jevb_jax.load_detector` store it without pickle.

    Attributes:
      model: the `Model` that computes the features.
      scorer: the fitted score, a function of features.
      score_name: name of the score, for example "jevb/kl".
      false_alarm_rate: largest share of in-distribution images to call strange.
      threshold: larger scores are alarms.
    """

    model: Any
    scorer: ScoreFunction
    score_name: str
    false_alarm_rate: float
    threshold: float

    def __repr__(self) -> str:
        return (
            f"Detector({self.score_name}, threshold {self.threshold:.6g}, "
            f"false_alarm_rate {self.false_alarm_rate:g}, {self.model})"
        )

    @in_single_precision
    def score(self, images: Any) -> np.ndarray:
        """How strange images are, `[N]`; `[]` for one image. Larger is stranger.

        Args:
          images: as for `Model`.
        """
        return self.model.scores_of(images, self.score_name, self.scorer)

    def is_outside(self, images: Any) -> np.ndarray:
        """Which images are called out of distribution, bool `[N]`; `[]` for one image.

        A score that is not finite is an alarm.

        Args:
          images: as for `Model`.
        """
        return conformal.exceeds(self.score(images), self.threshold)

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Writes the detector with its model, for `load_detector`.

        The files are those of an export and `detector.safetensors`. `jevb_jax.load` reads only the
        model from them.

        Args:
          directory: a local directory or one in an object store; created if it does not exist. An
            older detector in it is replaced.

        Raises:
          ValueError: the directory holds a run, an export or a classifier.
          TypeError: the score is not one of `Model.score_names`.
        """
        target = files.to_path(directory)
        archive.check_free(target, kind="detector")
        description, arrays = score_json.describe(self.scorer)
        arrays["threshold"] = np.asarray(self.threshold, np.float64)
        write_model(
            self.model,
            target,
            manifest={
                "detector": {
                    "score": self.score_name,
                    "false_alarm_rate": self.false_alarm_rate,
                    "scorer": description,
                }
            },
            extra_files={DETECTOR: safetensors.save(arrays)},
        )


class FeatureEncoder(Protocol):
    """An encoder as `jevb_jax.wrap` makes it."""

    def features(self, images: Any) -> np.ndarray:
        """Features of images, `[N, F]` float32."""
        ...


@dataclasses.dataclass(frozen=True, eq=False)
class TrainedDetector:
    """A detector for images of a wrapped encoder; made by `TrainedEncoder.detector`.

    Attributes:
      encoder: computes the features.
      detector: on these features, by a model that was trained on features.
    """

    encoder: FeatureEncoder
    detector: Detector

    def __repr__(self) -> str:
        return f"TrainedDetector({self.detector})"

    @property
    def score_name(self) -> str:
        """Name of the score, for example "jevb/kl"."""
        return self.detector.score_name

    @property
    def false_alarm_rate(self) -> float:
        """Largest share of in-distribution images to call strange."""
        return self.detector.false_alarm_rate

    @property
    def threshold(self) -> float:
        """Larger scores are alarms."""
        return self.detector.threshold

    def score(self, images: Any) -> np.ndarray:
        """How strange images are, `[N]`; as `TrainedEncoder.ood_score`."""
        return self.detector.score(self.encoder.features(images))

    def is_outside(self, images: Any) -> np.ndarray:
        """Which images are called out of distribution, bool `[N]`.

        A score that is not finite is an alarm.
        """
        return self.detector.is_outside(self.encoder.features(images))

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Writes JEVB's networks, the score and the threshold, for `WrappedEncoder.load_detector`.

        The encoder is not saved. Arguments and errors are those of `Detector.save`.
        """
        self.detector.save(directory)


def write_model(
    model: WrittenModel,
    directory: Path,
    *,
    manifest: Mapping[str, Any],
    extra_files: Mapping[str, bytes],
) -> None:
    """Writes the archive form of a model, which `load` reads.

    Args:
      model: the model.
      directory: as for `archive.write_archive`.
      manifest: entries to add to the manifest.
      extra_files: contents of other files by name.
    """
    variables = flatten_names(jax.device_get(model.variables))
    archive.write_archive(
        directory,
        arrays={name: np.asarray(leaf) for name, leaf in variables.items()},
        manifest={
            "config": model.config,
            "step": model.step,
            "square_size": model.square_size,
            "recorded_data": model.recorded_data,
            **manifest,
        },
        extra_files=extra_files,
    )
