"""Checks before the first step that a run can be evaluated as its config asks.

Training takes hours, and the evaluation after it reads files and settings that training does not.
Whatever would stop the evaluation is an error here. Measures that the data do not allow are no
error: the evaluation leaves them out.
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jevb_jax.evaluation import (
    accuracy,
    csi,
    detection,
    human_votes,
    outside_sets,
    score_table,
    shifted,
)
from jevb_jax.images import corruptions
from jevb_jax.images.source import ImageSource, image_shape, is_of_features
from jevb_jax.images.views import check_source
from jevb_jax.training.experiment import Experiment


def check(experiment: Experiment) -> None:
    """Raises the errors that the evaluation at the end would raise. Loads each outside set once.

    Raises:
      ValueError: a setting does not fit the networks or the data; the message names it.
      FileNotFoundError: a file of `ood.outside`, `ood.choice` or `ood.human_counts_path` is
        missing.
    """
    jax.eval_shape(experiment.initial_state)  # raises if the networks do not take the views
    settings, dataset = experiment.settings, experiment.dataset
    for section, name in (("checkpoint", "keep_best"), ("train", "knn_every_epochs")):
        given = getattr(getattr(settings, section), name)
        reason = accuracy.why_no_knn(settings.evaluation, dataset) if given else ""
        if reason:
            raise ValueError(
                f"{section}.{name} = {given} needs k-NN on the validation split: {reason}. Set it to 0"
            )
    split, evaluated = accuracy.evaluated_split(settings.evaluation, dataset)
    outside_sets.other_classes(dataset, split)  # raises if the split has none of them
    if settings.ood.csi_crops:
        csi.check_square("the training images", *image_shape(dataset.train)[:2])
    is_detecting = outside_sets.is_asked(settings)
    if settings.ood.default_score or is_detecting:  # `Model` reads it without detection, too
        _check_default_score(experiment)
    if is_detecting:
        _check_detection(experiment, evaluated)


def _check_default_score(experiment: Experiment) -> None:
    settings = experiment.settings
    without = accuracy.left_out(settings.evaluation, experiment.dataset)
    # The scores that need labels are made of the probe of this accuracy.
    reason = without.get("linear_accuracy", "")
    names = score_table.scores_of_run(settings, has_labels=not reason)
    name = score_table.default_score(settings)
    if name in names:
        return
    known = score_table.scores_of_run(settings, has_labels=True)
    if name in known:
        raise ValueError(f"ood.default_score = {name!r} needs a linear probe, but {reason}")
    whose = "" if settings.ood.default_score else f", the default of {settings.method}"
    raise ValueError(f"ood.default_score must be one of {sorted(names)}, got {name!r}{whose}")


def _check_detection(experiment: Experiment, evaluated: ImageSource) -> None:
    settings, dataset = experiment.settings.ood, experiment.dataset
    num_fitted = len(detection.fit_rows(len(dataset.train), settings.max_fit_images))
    for name, counts in (("knn_k", settings.knn_k), ("ssd_clusters", settings.ssd_clusters)):
        if max(counts, default=0) > num_fitted:
            raise ValueError(
                f"ood.{name} = {counts} must be at most {num_fitted:,}, the number of images that "
                "scores are fitted to (the training images, at most ood.max_fit_images)"
            )
    without = accuracy.left_out(experiment.settings.evaluation, dataset)
    measured = shifted.measured_sets(experiment.settings, without)
    for part, sets in (("outside", settings.outside), ("choice", settings.choice)):
        for number, description in enumerate(sets):
            is_measured = part == "outside" and description in measured
            where = f"ood.{part}[{number}]"
            _check_outside_set(where, description, experiment, is_measured=is_measured)
    for name in settings.corruptions:
        # The largest severity needs the largest image.
        _check_corruption(name, settings.severities[-1], image_shape(evaluated))
    if settings.human_counts_path:
        human_votes.read_votes(settings.human_counts_path, num_images=len(evaluated))


def _check_outside_set(
    where: str, description: Mapping[str, Any], experiment: Experiment, *, is_measured: bool
) -> None:
    """Loads a set. `is_measured` says whether accuracy is measured on it, too."""
    try:
        alike = experiment.settings.data.alike
        source = outside_sets.load_outside_set(alike=alike, **description).source
        if is_measured:
            shifted.training_labels(source, experiment.dataset.train.class_names)
        check_source(source, experiment.view_augmentations[0])
        if is_of_features(source) and source[0].shape != experiment.dataset.train[0].shape:
            raise ValueError(
                f"its features are {source[0].shape}, and those of the training split are "
                f"{experiment.dataset.train[0].shape}"
            )
        if experiment.settings.ood.csi_crops:
            csi.check_square("its images", *image_shape(source)[:2])
    except (ValueError, TypeError, FileNotFoundError) as error:
        raise type(error)(f"{where}, {description['name']!r}: {error}") from error


def _check_corruption(name: str, severity: int, shape: tuple[int, int, int]) -> None:
    def corrupt(key: Any, image: Any) -> Any:
        return corruptions.CORRUPTIONS[name](key, image, severity=severity)

    try:
        jax.eval_shape(corrupt, jax.random.key(0), jax.ShapeDtypeStruct(shape, np.float32))
    except ValueError as error:
        raise ValueError(f"ood.corruptions, {name}, severity {severity}: {error}") from error
