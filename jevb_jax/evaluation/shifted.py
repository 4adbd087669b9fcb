"""Accuracy on other images of the same classes, such as those of CIFAR-10-C and CIFAR-10.1."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from jevb_jax.evaluation import accuracy
from jevb_jax.evaluation.accuracy import Result
from jevb_jax.evaluation.features import FeatureExtractor, Features
from jevb_jax.evaluation.linear_probe import LinearProbe
from jevb_jax.evaluation.outside_sets import SHIFTED, load_outside_set
from jevb_jax.settings.sections import RunSettings


def shifted_results(
    settings: RunSettings,
    extract: FeatureExtractor,
    variables: Any,
    *,
    train: Features,
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
      probe: linear probe fitted on the representation of the training split, or None.
      without: measures that the data do not allow, from `accuracy.left_out`.

    Returns:
      `MEASURE_on_SET` for each set, and if there are several, `MEASURE_shifted`, their mean.
    """
    sets = [one for one in settings.ood.outside if one["group"] == SHIFTED]
    by_measure: dict[str, list[float]] = {}
    results: list[Result] = []
    for description in sets:
        outside = load_outside_set(**description)
        features = extract(variables, outside.source)
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
