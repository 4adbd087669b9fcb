"""Checks of features and labels, and subsets with few labels."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from jevb_jax import arguments
from jevb_jax.paper import sphere


@jax.jit
def _largest_of_rows(features: Array) -> Array:
    return jnp.max(jnp.abs(features), axis=-1)


def number_of_rows(name: str, features: ArrayLike) -> int:
    """`N` of features `[N, F]`. Another shape is an error."""
    shape = np.shape(features)
    if len(shape) != 2 or 0 in shape:
        raise ValueError(f"{name} must be a non-empty [N, F], got shape {shape}")
    return shape[0]


def checked_features(name: str, features: ArrayLike) -> Array:
    """Features `[N, F]`, at least float32. A value that is not finite is an error."""
    return features_and_largest(name, features)[0]


def features_and_largest(name: str, features: ArrayLike) -> tuple[Array, np.ndarray]:
    """Features, at least float32, and the largest absolute value in each row, `[N]`."""
    dtype = jnp.result_type(features)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(
            f"{name} must be floating point, got {dtype}. Cast them, for example to float32"
        )
    num_rows = number_of_rows(name, features)
    (checked,) = sphere.at_least_float32(features)
    largest = np.asarray(_largest_of_rows(checked))
    num_bad = int(np.sum(~np.isfinite(largest)))
    if num_bad:
        raise ValueError(
            f"{name} must be finite: {num_bad} of its {num_rows} rows hold NaN or inf. "
            "Did the network diverge, or are the images outside [0, 1]?"
        )
    return checked, largest


def _integer_labels(name: str, labels: ArrayLike) -> np.ndarray:
    array = np.asarray(labels)
    if not np.issubdtype(array.dtype, np.integer):
        raise TypeError(
            f"{name} must be integers, got {array.dtype}: number the classes, for example by "
            "np.unique(labels, return_inverse=True)[1]"
        )
    return array


def checked_labels(
    name: str, labels: ArrayLike, *, num_examples: int, num_classes: int
) -> np.ndarray:
    """Labels `[num_examples]`, each in `[0, num_classes)`. Anything else is an error."""
    checked = _integer_labels(name, labels)
    if checked.shape != (num_examples,):
        raise ValueError(
            f"{name} must be [{num_examples}], one for each feature row, got shape {checked.shape}"
        )
    num_bad = int(np.sum((checked < 0) | (checked >= num_classes)))
    if num_bad:
        raise ValueError(
            f"{name} must lie in [0, {num_classes}), {num_bad} of {num_examples} do not. Leave "
            "out the examples without a label, or correct num_classes"
        )
    return checked.astype(np.int64)


def check_same_width(first_name: str, first: Array, second_name: str, second: Array) -> None:
    """Raises ValueError if the features have different widths."""
    if first.shape[-1] != second.shape[-1]:
        raise ValueError(
            f"{first_name} and {second_name} must have the same number of features, "
            f"got {first.shape[-1]} and {second.shape[-1]}"
        )


def result_dtype(*features: ArrayLike) -> Any:
    """Floating-point type of results, by `sphere.at_least_float32`.

    Call it outside of `jax.enable_x64`.
    """
    is_wide = jnp.float64 in map(jnp.result_type, features)
    return jnp.float64 if is_wide else jnp.float32


def share_of_right(predictions: ArrayLike, labels: ArrayLike) -> float:
    """Accuracy of predictions `[N]`, in [0, 1]."""
    return float(np.mean(np.asarray(predictions) == np.asarray(labels)))


def labels_per_class_subset(labels: ArrayLike, *, labels_per_class: int, seed: int) -> np.ndarray:
    """Rows of a random subset that has the same number of labels for each class.

    Args:
      labels: `[N]` integers, at least 0, so without unlabeled examples. The classes are the values
        that occur.
      labels_per_class: number of labels for each class.
      seed: sets the draw; at least 0. The same seed gives the same rows.

    Returns:
      Row numbers in rising order, `[labels_per_class * number of classes]` int64.

    Raises:
      ValueError: a class has fewer labels, a label is negative, there are no labels, or a setting
        is out of range.
      TypeError: labels or settings are not integers.
    """
    labels_per_class = arguments.whole_number("labels_per_class", labels_per_class, at_least=1)
    seed = arguments.whole_number("seed", seed, at_least=0)
    array = _integer_labels("labels", labels)
    if array.ndim != 1 or not array.size or array.min() < 0:
        raise ValueError(
            "labels must be a non-empty [N] of integers >= 0, without unlabeled examples; "
            f"got shape {array.shape}{f' with minimum {array.min()}' if array.size else ''}"
        )
    classes, counts = np.unique(array, return_counts=True)
    too_few = {int(c): int(n) for c, n in zip(classes, counts, strict=True) if n < labels_per_class}
    if too_few:
        named = dict(list(too_few.items())[:10])
        more = f" and {len(too_few) - 10:,} more" if len(too_few) > 10 else ""
        raise ValueError(
            f"every class needs {labels_per_class} labels; these classes (with their counts) have "
            f"fewer: {named}{more}. Ask for at most {counts.min()}"
        )
    generator = np.random.default_rng(seed)
    rows = [
        generator.choice(np.flatnonzero(array == c), labels_per_class, replace=False)
        for c in classes
    ]
    return np.sort(np.concatenate(rows))


class Split(NamedTuple):
    """A set of examples, as a protocol names it, for example "train split (1,294)"."""

    name: str
    num_examples: int

    def __str__(self) -> str:
        return f"{self.name} ({self.num_examples:,})"
