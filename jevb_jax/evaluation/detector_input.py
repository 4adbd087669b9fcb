"""Checks of features and settings before a detector is fitted, and of the arrays of the fit."""

import contextlib
import contextvars
import os
import sys
import warnings
from collections.abc import Callable, Hashable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from jevb_jax import arguments
from jevb_jax.paper.scores import real_numbers

# A covariance with fewer degrees of freedom for each feature than this is shrunk.
FEW_IMAGES = 3
# Smallest variance of a direction, relative to the largest: the rounding of float32 features.
LEAST_VARIANCE = 1e-9
# A feature that varies by less than this, relative to its largest value, varies only by rounding.
ROUNDING = 1e-6
# Sizes of features whose squares and inverses are normal numbers of float32.
SMALLEST, LARGEST = 1e-30, 1e30
_PACKAGE = str(Path(__file__).parents[1]) + os.sep
# What was said since `each_warning_once` began; None outside of it.
_SAID: contextvars.ContextVar[set[Hashable] | None] = contextvars.ContextVar("said", default=None)


class DegenerateFeaturesError(ValueError):
    """The score cannot be fitted to these features; an evaluation leaves it out.

    They do not vary, are not finite or too large, or there are too few images.
    """


class FewImagesWarning(UserWarning):
    """A covariance of fewer images than features was shrunk, and its score is weak."""


def checked_share(name: str, value: Any) -> float:
    """Checks a setting that is a share in (0, 1) and returns it as a Python float.

    A NumPy or JAX scalar of fewer bits counts as the decimal number that it prints: float32(0.8) is
    read as 0.8. Its exact value, 0.800000012, would ask for one image more.

    Raises:
      ValueError: `value` is not one real number in (0, 1).
    """
    is_number = isinstance(value, int | float | np.integer | np.floating | np.ndarray | Array)
    if not is_number or np.ndim(value) or not 0 < value < 1:
        raise ValueError(f"{name} must be in (0, 1), got {value!r}")
    return float(str(np.asarray(value)[()]))


def real_matrix(
    name: str, values: ArrayLike, *, least: int, of: str, axes: str = "[N, F]"
) -> np.ndarray:
    """Values of a fit as finite float64 `[N, F]`.

    Args:
      name: name of the argument in messages.
      values: `[N, F]`, of any real type.
      least: smallest number of rows.
      of: what the rows are, in messages, for example "images".
      axes: names of the axes, in messages.

    Raises:
      ValueError: the shape is wrong.
      DegenerateFeaturesError: rows are too few, or values are not finite.
      TypeError: values are not real numbers.
    """
    array = np.asarray(values)
    if not (jnp.issubdtype(array.dtype, jnp.floating) or jnp.issubdtype(array.dtype, jnp.integer)):
        raise TypeError(f"{name} must be real numbers, got {array.dtype}")
    is_matrix = array.ndim == 2 and array.shape[1] >= 1
    if not is_matrix or len(array) < least:
        raise (DegenerateFeaturesError if is_matrix else ValueError)(
            f"{name} must be {axes} with at least {least} {of}, got shape {array.shape}"
        )
    matrix = array.astype(np.float64)
    num_bad = int(np.sum(~np.isfinite(matrix).all(axis=1)))
    if num_bad:
        raise DegenerateFeaturesError(
            f"{name} must be finite: {num_bad} of {len(matrix)} rows hold NaN or inf"
        )
    return matrix


def checked_queries(features: ArrayLike, width: int) -> Array:
    """Features `[N, F]` as float32; they must be as wide as the fitted features."""
    values = real_numbers("features", features)
    if values.ndim != 2 or values.shape[1] != width:
        raise ValueError(
            f"features must be [N, {width}], as wide as the fitted features, got shape {values.shape}"
        )
    return values.astype(jnp.float32)


def or_infinite(score: Array, features: Array) -> Array:
    """The score, with inf in place of NaN unless the features are NaN.

    Such a NaN is a difference of infinities: the arithmetic has overflowed.
    """
    has_overflowed = jnp.isnan(score) & ~jnp.isnan(features).any(axis=-1)
    return jnp.where(has_overflowed, jnp.inf, score)


Score = Callable[[Array], Array]


def checked_fit_features(name: str, features: ArrayLike) -> np.ndarray:
    """Finite `[N, F]` float64 with at least two rows, rounded to float32 as scored features are."""
    values = real_matrix(name, features, least=2, of="images")
    largest = float(jnp.finfo(jnp.float32).max)
    num_large = int(np.sum((np.abs(values) > largest).any(axis=1)))
    if num_large:
        raise DegenerateFeaturesError(
            f"{name} must lie within {largest:.3g}, the largest float32, but {num_large} of "
            f"{len(values)} rows do not. Divide all features by one number"
        )
    most = float(np.abs(values).max())
    if 0 < most < SMALLEST:
        raise DegenerateFeaturesError(
            f"the largest of {name} is {most:.3g}, but it must be at least {SMALLEST}: float32 loses "
            "digits below. Multiply all features by one number"
        )
    return values.astype(np.float32).astype(np.float64)


def unit_directions(features: np.ndarray) -> np.ndarray:
    """Rows scaled to length one. A zero row stays zero."""
    norm = np.linalg.norm(features, axis=1, keepdims=True)
    return features / np.where(norm == 0, 1, norm)


def at_most(name: str, value: Any, most: int, what: str) -> int:
    """Checks a count in [1, most].

    A count above `most` raises DegenerateFeaturesError and not a plain ValueError, because the
    images are too few for it.
    """
    count = arguments.whole_number(name, value)
    if not 1 <= count <= most:
        kind = ValueError if count < 1 else DegenerateFeaturesError
        raise kind(f"{name} must be in [1, {most}], {what}, got {count}")
    return count


@jax.jit
def compiled_call(score: Score, features: Array) -> Array:
    """Applies a fitted score as one compiled program."""
    return score(features)


def as_float32(*values: np.ndarray) -> list[Array]:
    """Arrays of a fit as float32 on the device. An overflow raises DegenerateFeaturesError."""
    with np.errstate(over="ignore"):  # the overflow is checked below
        arrays = [np.asarray(x, np.float32) for x in values]
    if not all(np.isfinite(x).all() for x in arrays):
        raise DegenerateFeaturesError(
            "the fitted features vary too little for float32. Multiply all features by one number"
        )
    return [jax.device_put(x) for x in arrays]  # `jnp.asarray` compiles a program for each shape


def checked_alive(std: np.ndarray, features: np.ndarray, where: str = "") -> np.ndarray:
    """Which features vary by more than rounding, `[F]` bool.

    Args:
      std: `[F]`, deviations of the features, or of what is left of them without their means.
      features: `[N, F]`.
      where: what the deviations are within, for the message.

    Raises:
      DegenerateFeaturesError: none does.
    """
    is_alive = std > ROUNDING * np.abs(features).max(axis=0)
    if not is_alive.any():
        raise DegenerateFeaturesError(
            f"the fitted features do not vary{where}: has the encoder collapsed?"
        )
    return is_alive


def checked_image_labels(labels: ArrayLike, num_images: int) -> np.ndarray:
    """Labels `[num_images]`, integers; anything else raises ValueError."""
    array = np.asarray(labels)
    if array.shape != (num_images,) or not np.issubdtype(array.dtype, np.integer):
        raise ValueError(
            f"labels must be integers [{num_images}], one for each image, got {array.dtype} "
            f"{array.shape}"
        )
    return array


@contextlib.contextmanager
def each_warning_once() -> Iterator[None]:
    """Emits each `FewImagesWarning` once while it lasts, however often its score is fitted.

    An evaluation fits a score for detection and again for `Model`. Python's own filter does not see
    that the two warnings are one: a share in them may differ in its last digit, and libraries reset it.
    """
    token = _SAID.set(set())
    try:
        yield
    finally:
        _SAID.reset(token)


def warn_of_few_images(message: str, *, about: Hashable) -> None:
    """Emits `FewImagesWarning` for the line outside of this package that asked for the fit.

    Args:
      message: the warning.
      about: what the warning is about; see `each_warning_once`.
    """
    said = _SAID.get()
    if said is not None:
        if about in said:
            return
        said.add(about)
    frame, level = sys._getframe(), 0
    while frame is not None and frame.f_code.co_filename.startswith(_PACKAGE):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, FewImagesWarning, stacklevel=level + 1)
