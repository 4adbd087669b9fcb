"""Scores of many images: every entry of a table fitted, then applied batch by batch."""

from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np
from jax import Array

from jevb_jax import arguments
from jevb_jax.evaluation.detector_input import DegenerateFeaturesError
from jevb_jax.evaluation.features import (
    FeatureExtractor,
    Features,
    useful_batch_size,
)
from jevb_jax.images.source import ImageSource

if TYPE_CHECKING:  # a loaded model scores without Optax and ml_collections, which these import
    pass

from jevb_jax.evaluation.score_table import ScoreEntry, ScoreFunction, TrainingData


class Scorers(NamedTuple):
    """Scores by name, `family/score`.

    Attributes:
      scores: `Features -> [N]`, trees of arrays.
      with_labels: names of those that were fitted with labels.
      left_out: why, by name: features that do not vary have no density, and too few images no k-th
        neighbor.
    """

    scores: dict[str, ScoreFunction]
    with_labels: frozenset[str]
    left_out: dict[str, str]


def make_scorers(table: dict[str, ScoreEntry], train: TrainingData) -> Scorers:
    """Every score of a table, fitted to training images.

    Args:
      table: what `score_table` gives, without the scores that `train` has no labels for.
      train: features of in-distribution training images, with `terms` for JEVB.

    Returns:
      The scores.

    Raises:
      ValueError: settings that do not fit the features.
    """
    scores: dict[str, ScoreFunction] = {}
    left_out: dict[str, str] = {}
    for name, entry in table.items():
        try:
            scores[name] = entry.make(train)
        except DegenerateFeaturesError as error:
            left_out[name] = str(error)
    with_labels = frozenset(name for name, entry in table.items() if entry.needs_labels)
    return Scorers(scores, with_labels, left_out)


@jax.jit
def _score_batch(scores: dict[str, ScoreFunction], features: Features) -> dict[str, Array]:
    return {name: score(features) for name, score in scores.items()}


def score_images(
    extract: FeatureExtractor, variables: Any, source: ImageSource, scorers: Scorers
) -> dict[str, np.ndarray]:
    """Every score of every image of a source, streamed.

    Args:
      extract: with terms for JEVB.
      variables: parameters and running statistics.
      source: images.
      scorers: fitted scores, from `make_scorers`.

    Returns:
      `[N]` by the score's name.
    """
    parts: dict[str, list[np.ndarray]] = {name: [] for name in scorers.scores}
    for features, mask in extract.stream(variables, source):
        for name, values in jax.device_get(_score_batch(scorers.scores, features)).items():
            parts[name].append(values[mask])
    return {name: _joined(values) for name, values in parts.items()}


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(parts) if parts else np.zeros(0, np.float32)


def score_features(
    features: Features, scorers: Scorers, *, batch_size: int
) -> dict[str, np.ndarray]:
    """Every score of features that are at hand.

    Args:
      features: those of `N` images, with terms for JEVB.
      scorers: fitted scores, from `make_scorers`.
      batch_size: images at a time.

    Returns:
      `[N]` by the score's name.

    Raises:
      ValueError: `batch_size` below one.
      TypeError: it is not an integer.
    """
    batch_size = arguments.whole_number("batch_size", batch_size, at_least=1)
    num_images = len(features.representation)
    batch_size = useful_batch_size(batch_size, num_images)
    unlabelled = features._replace(labels=None)
    parts: list[dict[str, np.ndarray]] = []
    for start in range(0, num_images, batch_size):
        # The last batch repeats its last row, so that everything is compiled for one size.
        rows = np.minimum(np.arange(start, start + batch_size), num_images - 1)
        batch = jax.tree.map(lambda values, rows=rows: values[rows], unlabelled)
        # Where features that are streamed are too: one compiled program serves both.
        batch = jax.device_put(batch, jax.local_devices()[0])
        parts.append(jax.device_get(_score_batch(scorers.scores, batch)))
    return {name: _joined([part[name] for part in parts])[:num_images] for name in scorers.scores}
