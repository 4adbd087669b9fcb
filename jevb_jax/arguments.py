"""Settings as callers write them: numbers of Python, NumPy or JAX, and any iterable of them.

Each function returns plain Python numbers, or refuses by the setting's name. A float where a whole
number belongs is refused even if it is whole: `5.0 == 5`, so a compiled function would take one for
the other.
"""

import math
import operator
from collections.abc import Iterable
from typing import Any

import numpy as np

# What `jax.random.key` takes.
LARGEST_SEED = 2**63 - 1


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool) or getattr(value, "dtype", None) == np.bool_


def whole_number(
    name: str, value: Any, *, at_least: int | None = None, at_most: int | None = None
) -> int:
    """One whole number.

    Args:
      name: what messages call the setting.
      value: an integer of Python or NumPy, or an integer array of no axes.
      at_least: smallest that is allowed, or None.
      at_most: largest that is allowed, or None.

    Returns:
      The number.

    Raises:
      TypeError: anything else, also a float or a bool.
      ValueError: out of range.
    """
    try:
        if _is_bool(value):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise TypeError(
            f"{name} must be one whole number, got {value!r}: write it without a point, or "
            "give it as int(...)"
        ) from None
    if (at_least is not None and number < at_least) or (at_most is not None and number > at_most):
        low = "" if at_least is None else f"at least {at_least}"
        high = "" if at_most is None else f"at most {at_most}"
        raise ValueError(f"{name} must be {' and '.join(filter(None, (low, high)))}, got {number}")
    return number


def real_number(name: str, value: Any) -> float:
    """One real number, which may be infinite or NaN.

    Args:
      name: what messages call the setting.
      value: a number of Python or NumPy, or a real array of no axes.

    Returns:
      The number.

    Raises:
      TypeError: anything else, also a string, a bool or a complex number.
    """
    try:
        if _is_bool(value) or isinstance(value, str | bytes) or np.ndim(value) != 0:
            raise TypeError
        return float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be one real number, got {value!r}") from None


def positive_number(name: str, value: Any) -> float:
    """One real number above zero and finite.

    Args:
      name: what messages call the setting.
      value: as for `real_number`.

    Returns:
      The number.

    Raises:
      TypeError: as `real_number`.
      ValueError: not positive, infinite or NaN.
    """
    number = real_number(name, value)
    if not (number > 0 and math.isfinite(number)):
        raise ValueError(f"{name} must be positive and finite, got {number}")
    return number


def is_single(values: Any) -> bool:
    """Whether a setting is one number and not a collection: an array of no axes is one number."""
    return not isinstance(values, Iterable) or getattr(values, "ndim", None) == 0


def collected(name: str, values: Any) -> tuple[Any, ...]:
    """The members of any iterable, read once: a list, a range, an array of one axis, a generator.

    Args:
      name: what messages call the setting.
      values: an iterable, not empty.

    Returns:
      Its members.

    Raises:
      TypeError: one number, a string or a mapping.
      ValueError: nothing in it, or an array of several axes.
    """
    if is_single(values) or isinstance(values, str | bytes | dict):
        raise TypeError(f"{name} must be a sequence, for example a tuple or a list, got {values!r}")
    if getattr(values, "ndim", 1) != 1:
        raise ValueError(f"{name} must have one axis, got an array of shape {values.shape}")
    members = tuple(values)
    if not members:
        raise ValueError(f"{name} must hold at least one number, got none")
    return members
