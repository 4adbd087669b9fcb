"""Converts settings to plain Python numbers; they may be of Python, NumPy or JAX, or any iterable.

An error names the setting. A float is refused where a whole number is expected, even if it is
whole: `5.0 == 5`, so a compiled function would confuse the two.
"""

import math
import operator
from collections.abc import Iterable
from typing import Any

import numpy as np

# The largest seed that `jax.random.key` accepts.
LARGEST_SEED = 2**63 - 1


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool) or getattr(value, "dtype", None) == np.bool_


def whole_number(
    name: str, value: Any, *, at_least: int | None = None, at_most: int | None = None
) -> int:
    """Checks one whole number.

    Args:
      name: name of the setting in messages.
      value: an integer of Python or NumPy, or an integer array without axes.
      at_least: smallest allowed value, or None.
      at_most: largest allowed value, or None.

    Raises:
      TypeError: the value is something else, for example a float or a bool.
      ValueError: the value is out of range.
    """
    try:
        if _is_bool(value):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise TypeError(
            f"{name} must be one whole number, got {value!r}; write it without a decimal point, or "
            "convert it by int(...)"
        ) from None
    if (at_least is not None and number < at_least) or (at_most is not None and number > at_most):
        low = "" if at_least is None else f"at least {at_least}"
        high = "" if at_most is None else f"at most {at_most}"
        raise ValueError(f"{name} must be {' and '.join(filter(None, (low, high)))}, got {number}")
    return number


def real_number(name: str, value: Any) -> float:
    """Checks one real number, which may be infinite or NaN.

    Args:
      name: name of the setting in messages.
      value: a number of Python or NumPy, or a real array without axes.

    Raises:
      TypeError: the value is something else, for example a string, a bool or a complex number.
    """
    try:
        if _is_bool(value) or isinstance(value, str | bytes) or np.ndim(value) != 0:
            raise TypeError
        return float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be one real number, got {value!r}") from None


def positive_number(name: str, value: Any) -> float:
    """Checks one real number that is positive and finite.

    Args:
      name: name of the setting in messages.
      value: as for `real_number`.

    Raises:
      TypeError: the value is not a real number.
      ValueError: the value is not positive, or infinite or NaN.
    """
    number = real_number(name, value)
    if not (number > 0 and math.isfinite(number)):
        raise ValueError(f"{name} must be positive and finite, got {number}")
    return number


def is_single(values: Any) -> bool:
    """Whether a setting is one number, or an array without axes, and not a collection."""
    return not isinstance(values, Iterable) or getattr(values, "ndim", None) == 0


def collected(name: str, values: Any) -> tuple[Any, ...]:
    """The members of an iterable, which is read once.

    Args:
      name: name of the setting in messages.
      values: a non-empty iterable, for example a list, a range, an array with one axis, a
        generator.

    Raises:
      TypeError: the value is one number, a string or a mapping.
      ValueError: the iterable is empty, or is an array with several axes.
    """
    if is_single(values) or isinstance(values, str | bytes | dict):
        raise TypeError(f"{name} must be a sequence, for example a tuple or a list, got {values!r}")
    if getattr(values, "ndim", 1) != 1:
        raise ValueError(f"{name} must have one axis, got an array of shape {values.shape}")
    members = tuple(values)
    if not members:
        raise ValueError(f"{name} must hold at least one number, got none")
    return members
