"""Accuracy on other images of the same classes, such as those of CIFAR-10-C and CIFAR-10.1."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jevb_jax.evaluation import accuracy
from jevb_jax.evaluation.accuracy import Result
from jevb_jax.evaluation.features import FeatureExtractor, Features
from jevb_jax.evaluation.linear_probe import LinearProbe
from jevb_jax.evaluation.outside_sets import SHIFTED, load_outside_set
from jevb_jax.images.source import ImageSource
from jevb_jax.settings.sections import RunSettings


def measured_sets(settings: RunSettings, without: Mapping[str, str]) -> list[Mapping[str, Any]]:
    """Descriptions of the sets on which accuracy is measured.

    Args:
      settings: names the sets.
      without: measures that the data do not allow, from `accuracy.left_out`.
    """
    if {"knn_accuracy", "linear_accuracy"} <= without.keys():
        return []
    return [one for one in settings.ood.outside if one["group"] == SHIFTED]


def training_labels(source: ImageSource, class_names: Sequence[str] | None) -> np.ndarray:
    """Labels as the training images number their classes, `[N]`.

    Args:
      source: labeled images.
      class_names: names of the training classes. If both sides have names, classes are matched by
        name; otherwise by number.

    Raises:
      ValueError: there are no labels, or a class is none of the training classes.
    """
    labels, names = source.labels, source.class_names
    if labels is None:
        raise ValueError(
            f"accuracy is measured on the group {SHIFTED!r}, but {source.name} has no labels. Give "
            "labels or another group"
        )
    if names is None or class_names is None or tuple(names) == tuple(class_names):
        return labels
    number = {name: place for place, name in enumerate(class_names)}
    unknown = sorted({names[label] for label in np.unique(labels)} - number.keys())
    if unknown:
        raise ValueError(
            f"{len(unknown)} classes of {source.name} are no training classes, for example "
            f"{unknown[:3]}; the training images have {list(class_names)[:3]} and so on. Name the "
            "classes alike, leave some out by exclude_labels, or give the set another group"
        )
    return np.array([number.get(name, -1) for name in names])[labels]


def shifted_results(
    settings: RunSettings,
    extract: FeatureExtractor,
    variables: Any,
    *,
    train: Features,
    class_names: Sequence[str] | None,
    probe: LinearProbe | None,
    without: dict[str, str],
) -> list[Result]:
    """Accuracies on every set of `ood.outside` of the group "shifted", and their means.

    One set is in memory at a time.

    Args:
      settings: names the sets and the measures.
      extract: forward pass without the terms of a method.
      variables: parameters and running statistics.
      train: features of the training split.
      class_names: names of the training classes, or None.
      probe: linear probe fitted on the representation of the training split, or None.
      without: measures that the data do not allow, from `accuracy.left_out`.

    Returns:
      `MEASURE_on_SET` for each set, and if there are several, `MEASURE_shifted`, their mean.

    Raises:
      ValueError: for the reasons of `training_labels`.
    """
    sets = measured_sets(settings, without)
    by_measure: dict[str, list[float]] = {}
    results: list[Result] = []
    for description in sets:
        outside = load_outside_set(alike=settings.data.alike, **description)
        labels = training_labels(outside.source, class_names)
        features = extract(variables, outside.source)._replace(labels=labels)
        found = accuracy.shifted_accuracies(settings.evaluation, train, features, probe, without)
        for measure, value in found.items():
            by_measure.setdefault(measure, []).append(value)
            protocol = (
                f"{measure} as on the evaluated split, nothing fitted or chosen here, on "
                f"{outside.protocol} ({len(outside.source):,})"
            )
            name = f"{measure}_on_{outside.name}"
            results.append(accuracy.result_of(name, "representation", value, protocol))
    return results + (_means(by_measure, sets) if len(sets) > 1 else [])


def _means(by_measure: dict[str, list[float]], sets: Sequence[Any]) -> list[Result]:
    first, last = sets[0]["name"], sets[-1]["name"]
    return [
        accuracy.result_of(
            f"{measure}_shifted",
            "representation",
            float(np.mean(values)),
            f"mean of {measure} over {len(values)} sets, {first} to {last}",
        )
        for measure, values in by_measure.items()
    ]
