"""Arrays in eight bits: rounded once, and from then on stored without loss.

A kernel of 8 bits is a whole number in [-127, 127] times a scale for each of its output channels, the
last axis. Scales have the 8 bits of precision of bfloat16, so each product is exact in float32. This
makes rounding and storing two separate acts: `rounded` changes weights, and is asked for; `pack`
stores any weights that are already of this form in a quarter of the bytes, and gives back every bit.
"""

from collections.abc import Mapping

import numpy as np

LARGEST = 127
_SCALE_OF = ":scale"  # ends the name of the scales of a packed array
# Scales are rounded up by less than a part in 128, so the largest number in a channel is one of these.
_LARGEST_FOUND = (127, 126)
_LARGEST_MAGNITUDE = 1e38  # so that no product overflows


def rounded(array: np.ndarray) -> np.ndarray:
    """The nearest array of 8 bits.

    Args:
      array: `[..., C]` float32 of at least two dimensions.

    Returns:
      An array of the same shape and type, which `pack` stores in a quarter of the bytes. No value moves
      by more than 1/252 of the largest magnitude in its channel, but a channel below 1.5e-36 becomes
      zero. Rounding again changes nothing.

    Raises:
      ValueError: the array is not of this type, or holds NaN, infinity or magnitudes above 1e38.
    """
    array = np.asarray(array)
    if array.dtype != np.float32 or array.ndim < 2:
        raise ValueError(
            f"only float32 arrays of two dimensions or more are rounded, got {array.dtype} "
            f"{list(array.shape)}"
        )
    if not np.isfinite(array).all():
        raise ValueError("an array with NaN or infinity cannot be rounded to 8 bits")
    if _packed(array) is not None:
        return array
    largest = _largest(array)
    if largest.max(initial=0) > _LARGEST_MAGNITUDE:
        raise ValueError(f"magnitudes above {_LARGEST_MAGNITUDE:g} cannot be rounded to 8 bits")
    scale = _bfloat16_above(largest / np.float32(LARGEST))
    result = _whole(array, scale).astype(np.float32) * scale
    return np.where(largest < LARGEST * np.finfo(np.float32).tiny, np.float32(0), result)


def pack(arrays: Mapping[str, np.ndarray]) -> tuple[dict[str, np.ndarray], list[str]]:
    """Replaces arrays of 8 bits by whole numbers and scales.

    Args:
      arrays: by name.

    Returns:
      Arrays by name, and the names of those that are packed: int8, with their scales `[C]` float32 as
      `NAME:scale`. `unpack` gives back every bit. Other arrays stay as they are.
    """
    stored: dict[str, np.ndarray] = {}
    names = []
    for name, array in arrays.items():
        packed = _packed(array)
        if packed is None:
            stored[name] = array
        else:
            stored[name], stored[name + _SCALE_OF] = packed
            names.append(name)
    return stored, names


def unpack(stored: Mapping[str, np.ndarray], names: list[str]) -> dict[str, np.ndarray]:
    """The arrays before `pack`.

    Raises:
      KeyError: an array or its scales are missing.
    """
    scales = {name + _SCALE_OF for name in names}
    arrays = {name: array for name, array in stored.items() if name not in scales}
    for name in names:
        arrays[name] = stored[name].astype(np.float32) * stored[name + _SCALE_OF]
    return arrays


def _largest(array: np.ndarray) -> np.ndarray:
    """The largest magnitude of each channel, `[C]`."""
    return np.abs(array).max(axis=_all_but_last(array), initial=0)


def _all_but_last(array: np.ndarray) -> tuple[int, ...]:
    return tuple(range(array.ndim - 1))


def _whole(array: np.ndarray, scale: np.ndarray) -> np.ndarray:
    return np.rint(array / scale).astype(np.int8)


def _bits(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array, np.float32).view(np.uint32)


def _bfloat16_above(scale: np.ndarray) -> np.ndarray:
    """The smallest value of bfloat16 that is not smaller; at least the smallest normal number."""
    normal = np.maximum(scale.astype(np.float32), np.finfo(np.float32).tiny)
    up = (_bits(normal) + np.uint32(0xFFFF)) & np.uint32(0xFFFF0000)
    return up.view(np.float32)


def _packed(array: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """Whole numbers `[..., C]` int8 and scales `[C]`, if they give back every bit; else None."""
    array = np.asarray(array)
    if array.dtype != np.float32 or array.ndim < 2 or not array.size:
        return None
    largest = _largest(array)
    if not np.isfinite(largest).all():
        return None
    scale = np.ones_like(largest)
    whole = np.zeros(array.shape, np.int8)
    found = largest == 0
    for steps in _LARGEST_FOUND:
        candidate = largest / np.float32(steps)
        # Only a scale of bfloat16 gives exact products. Most arrays end here, after a look at each value.
        (tried,) = np.nonzero(~found & (_bfloat16_above(candidate) == candidate))
        numbers = _whole(array[..., tried], candidate[tried])
        same = _bits(numbers.astype(np.float32) * candidate[tried]) == _bits(array[..., tried])
        fits = same.all(axis=_all_but_last(array))
        scale[tried[fits]] = candidate[tried[fits]]
        whole[..., tried[fits]] = numbers[..., fits]
        found[tried[fits]] = True
    if not found.all() or np.signbit(array[..., largest == 0]).any():  # -0.0 has no whole number
        return None
    return whole, scale
