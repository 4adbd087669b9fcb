"""Scores of many images: fits every entry of a table, then applies the scores in batches."""

from typing import Any, NamedTuple

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
from jevb_jax.evaluation.score_table import ScoreEntry, ScoreFunction, TrainingData
from jevb_jax.images.source import ImageSource


class Scorers(NamedTuple):
    """Scores by name, `family/score`.

    Attributes:
      scores: functions from `Features` to `[N]`; they are trees of arrays.
      with_labels: names of the scores that were fitted with labels.
      left_out: why a score is missing, by its name. For example, features that do not vary have no
        density.
      with_views: names of the scores that read augmented views.
    """

    scores: dict[str, ScoreFunction]
    with_labels: frozenset[str]
    left_out: dict[str, str]
    with_views: frozenset[str] = frozenset()


def make_scorers(table: dict[str, ScoreEntry], train: TrainingData) -> Scorers:
    """Fits every score of a table to training images.

    Args:
      table: from `score_table`, without the scores that need labels if `train` has none.
      train: features of in-distribution training images; for JEVB with `terms`.

    Raises:
      ValueError: a setting does not fit the features.
    """
    scores: dict[str, ScoreFunction] = {}
    left_out: dict[str, str] = {}
    for name, entry in table.items():
        try:
            scores[name] = entry.make(train)
        except DegenerateFeaturesError as error:
            left_out[name] = str(error)
    with_labels = frozenset(name for name, entry in table.items() if entry.needs_labels)
    with_views = frozenset(name for name, entry in table.items() if entry.needs_views)
    return Scorers(scores, with_labels, left_out, with_views)


@jax.jit
def _score_group(scores: dict[str, ScoreFunction], features: Features) -> dict[str, Array]:
    return {name: score(features) for name, score in scores.items()}


def _score_batch(scorers: Scorers, features: Features) -> dict[str, Array]:
    """Every score, in one program for each group of scores that always stand together in a table.

    Two tables of a run are seldom equal: one may leave out the scores that need labels or views, or
    one that cannot be fitted. What is equal is compiled once.
    """
    groups: dict[tuple[bool, bool], dict[str, ScoreFunction]] = {}
    for name, score in scorers.scores.items():
        group = (name in scorers.with_labels, name in scorers.with_views)
        groups.setdefault(group, {})[name] = score
    values: dict[str, Array] = {}
    for (_, with_views), scores in groups.items():
        read = features if with_views else features._replace(terms=None, rotations=None)
        values |= _score_group(scores, read)
    return {name: values[name] for name in scorers.scores}


def score_images(
    extract: FeatureExtractor, variables: Any, source: ImageSource, scorers: Scorers
) -> dict[str, np.ndarray]:
    """Every score of every image of a source, `[N]` by the name of the score.

    Args:
      extract: forward pass; for JEVB with terms.
      variables: parameters and running statistics.
      source: images, read in batches.
      scorers: fitted scores.
    """
    parts: dict[str, list[np.ndarray]] = {name: [] for name in scorers.scores}
    for features, mask in extract.stream(variables, source):
        for name, values in jax.device_get(_score_batch(scorers, features)).items():
            parts[name].append(values[mask])
    return {name: _joined(values) for name, values in parts.items()}


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(parts) if parts else np.zeros(0, np.float32)


def score_features(
    features: Features, scorers: Scorers, *, batch_size: int
) -> dict[str, np.ndarray]:
    """Every score of features that are in memory, `[N]` by the name of the score.

    Args:
      features: features of `N` images; for JEVB with terms.
      scorers: fitted scores.
      batch_size: number of images scored at once.

    Raises:
      ValueError: `batch_size` is below one.
      TypeError: `batch_size` is not an integer.
    """
    batch_size = arguments.whole_number("batch_size", batch_size, at_least=1)
    num_images = len(features.representation)
    batch_size = useful_batch_size(batch_size, num_images)
    unlabeled = features._replace(labels=None)
    parts: list[dict[str, np.ndarray]] = []
    for start in range(0, num_images, batch_size):
        # The last batch repeats its last row, so that only one batch size is compiled.
        rows = np.minimum(np.arange(start, start + batch_size), num_images - 1)
        batch = jax.tree.map(lambda values, rows=rows: values[rows], unlabeled)
        # On the device where streamed features are, so that both use one compiled program.
        batch = jax.device_put(batch, jax.local_devices()[0])
        parts.append(jax.device_get(_score_batch(scorers, batch)))
    return {name: _joined([part[name] for part in parts])[:num_images] for name in scorers.scores}
