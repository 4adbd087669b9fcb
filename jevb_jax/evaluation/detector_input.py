"""What is asked of features and numbers before a detector is fitted to them."""

import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from jevb_jax import arguments
from jevb_jax.paper.scores import real_numbers

# Degrees of freedom of a covariance for each feature, below which it is shrunk.
FEW_IMAGES = 3
# Least variance of a direction, of the largest: the rounding of float32 features.
LEAST_VARIANCE = 1e-9
# Feature-wise spread, of the largest value, that is rounding and nothing else.
ROUNDING = 1e-6
# Sizes of features whose squares and inverses float32 holds with all of their digits.
SMALLEST, LARGEST = 1e-30, 1e30
_PACKAGE = str(Path(__file__).parents[1]) + os.sep


def checked_share(name: str, value: Any) -> float:
    """A setting that is a share, as a Python number.

    Args:
      name: what the message calls the setting.
      value: one real number in (0, 1). Of fewer bits than Python's it is taken as the decimal number
        that it shows: 0.8 in float32 is a little more, and would ask for one image more.

    Returns:
      The share.

    Raises:
      ValueError: anything else.
    """
    is_number = isinstance(value, int | float | np.integer | np.floating | np.ndarray | Array)
    if not is_number or np.ndim(value) or not 0 < value < 1:
        raise ValueError(f"{name} must be in (0, 1), got {value!r}")
    return float(str(np.asarray(value)[()]))


def real_matrix(
    name: str, values: ArrayLike, *, least: int, of: str, axes: str = "[N, F]"
) -> np.ndarray:
    """`[N, F]` float64 of finite real numbers, for a fit.

    Args:
      name: what the message calls the argument.
      values: `[N, F]`, of any real type.
      least: rows that are needed.
      of: what a row is, for the message.
      axes: their names, for the message.

    Returns:
      The values.

    Raises:
      ValueError: other shapes, too few rows, values that are not finite.
      TypeError: values that are not real numbers.
    """
    array = np.asarray(values)
    if not (jnp.issubdtype(array.dtype, jnp.floating) or jnp.issubdtype(array.dtype, jnp.integer)):
        raise TypeError(f"{name} must be real numbers, got {array.dtype}")
    if array.ndim != 2 or len(array) < least or array.shape[1] < 1:
        raise ValueError(
            f"{name} must be {axes} with at least {least} {of}, got shape {array.shape}"
        )
    matrix = array.astype(np.float64)
    num_bad = int(np.sum(~np.isfinite(matrix).all(axis=1)))
    if num_bad:
        raise ValueError(f"{name} must be finite: {num_bad} of {len(matrix)} rows hold NaN or inf")
    return matrix


def checked_queries(features: ArrayLike, width: int) -> Array:
    """`[N, F]` float32, as wide as the fitted features."""
    values = real_numbers("features", features)
    if values.ndim != 2 or values.shape[1] != width:
        raise ValueError(
            f"features must be [N, {width}], as wide as those of the fit, got shape {values.shape}"
        )
    return values.astype(jnp.float32)


def or_infinite(score: Array, features: Array) -> Array:
    """Infinite where the arithmetic overflowed, which differences of infinities would make NaN."""
    has_overflowed = jnp.isnan(score) & ~jnp.isnan(features).any(axis=-1)
    return jnp.where(has_overflowed, jnp.inf, score)


Score = Callable[[Array], Array]


class DegenerateFeaturesError(ValueError):
    """The fitted features cannot carry the score: they do not vary, or their images are too few."""


class FewImagesWarning(UserWarning):
    """A covariance of fewer images than features: it is shrunk, and what it says is weak."""


def checked_fit_features(name: str, features: ArrayLike) -> np.ndarray:
    """`[N, F]` float64, finite, at least two rows, rounded to float32 as the scored ones will be."""
    values = real_matrix(name, features, least=2, of="images")
    largest = float(jnp.finfo(jnp.float32).max)
    num_large = int(np.sum((np.abs(values) > largest).any(axis=1)))
    if num_large:
        raise ValueError(
            f"{name} must lie within {largest:.3g}, the largest float32: {num_large} of {len(values)} "
            "rows do not. Divide all features by one number"
        )
    most = float(np.abs(values).max())
    if 0 < most < SMALLEST:
        raise DegenerateFeaturesError(
            f"{name} must reach {SMALLEST}, below which float32 loses digits, and none is larger than "
            f"{most:.3g}. Multiply all features by one number"
        )
    return values.astype(np.float32).astype(np.float64)


def unit_directions(features: np.ndarray) -> np.ndarray:
    """Rows of length one; a row of zeros stays."""
    norm = np.linalg.norm(features, axis=1, keepdims=True)
    return features / np.where(norm == 0, 1, norm)


def at_most(name: str, value: Any, most: int, what: str) -> int:
    """A count in [1, most]; more than the images allow is their fault, and not the setting's alone."""
    count = arguments.whole_number(name, value)
    if not 1 <= count <= most:
        kind = ValueError if count < 1 else DegenerateFeaturesError
        raise kind(f"{name} must be in [1, {most}], {what}, got {count}")
    return count


@jax.jit
def compiled_call(score: Score, features: Array) -> Array:
    """A fitted score, in one program and not in one for each operation."""
    return score(features)


def as_float32(*values: np.ndarray) -> list[Array]:
    """Arrays of a fit, which float32 must hold."""
    with np.errstate(over="ignore"):  # which is what is looked for
        arrays = [np.asarray(x, np.float32) for x in values]
    if not all(np.isfinite(x).all() for x in arrays):
        raise DegenerateFeaturesError(
            "the fitted features vary by less than float32 can tell: multiply all by one number"
        )
    return [jax.device_put(x) for x in arrays]  # `jnp.asarray` compiles a program for each shape


def check_alive(is_alive: np.ndarray, where: str = "") -> None:
    """Refuses features `[F]` none of which varies by more than its rounding."""
    if not is_alive.any():
        raise DegenerateFeaturesError(
            f"the fitted features do not vary{where}: has the encoder collapsed?"
        )


def warn_of_few_images(message: str) -> None:
    """A `FewImagesWarning` at the line outside this package that asked for the fit."""
    frame, level = sys._getframe(), 0
    while frame is not None and frame.f_code.co_filename.startswith(_PACKAGE):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, FewImagesWarning, stacklevel=level + 1)
