"""The numbers that pixels are: bytes, 16 bits, or floats, and which of them are black and white."""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

Dtype = Literal["uint8", "uint16", "float32"]
DTYPES: tuple[Dtype, ...] = ("uint8", "uint16", "float32")
_LARGEST: dict[str, int] = {"uint8": 255, "uint16": 65_535, "float32": 1}
_BLOCK_ROWS = 256


@dataclass(frozen=True)
class Levels:
    """What the numbers of images mean.

    Attributes:
      dtype: type of the numbers.
      value_range: the values of black and white, of uint16 and float32; () for 0 and 65,535, or 0
        and 1. Bytes are always 0 to 255.

    Raises:
      ValueError: the range is not that of two finite, rising numbers, or is given for uint8.
    """

    dtype: Dtype = "uint8"
    value_range: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if not self.value_range:
            return
        if self.dtype == "uint8":
            raise ValueError(f"uint8 images have the range 0 to 255, got {self.value_range}")
        is_pair = len(self.value_range) == 2 and all(map(math.isfinite, self.value_range))
        if not is_pair or self.value_range[0] >= self.value_range[1]:
            raise ValueError(
                f"value_range must be (black, white), two rising numbers, got {self.value_range}"
            )

    @property
    def _ends(self) -> tuple[float, float]:
        low, high = self.value_range or (0, _LARGEST[self.dtype])
        return float(low), float(high)

    def as_stored(self, values: np.ndarray, *, where: str) -> np.ndarray:
        """Images as the library holds them: all bytes, all 16 bits, or float32 in [0, 1].

        Args:
          values: `[N, ...]` of `dtype`.
          where: what holds them, for messages.

        Raises:
          ValueError: a value is NaN or outside of `value_range`; the message has its row.
        """
        if self.dtype == "uint8" or (self.dtype == "uint16" and not self.value_range):
            return values
        is_kept = self.dtype == "float32" and not self.value_range
        stored = values if is_kept else np.empty(values.shape, self.dtype)
        for start in range(0, len(values), _BLOCK_ROWS):
            block = values[start : start + _BLOCK_ROWS]
            self._check(block, start, where)
            if not is_kept:
                stored[start : start + len(block)] = self.from_unit(self._to_unit(block))
        return stored

    def to_unit(self, values: np.ndarray, *, where: str) -> np.ndarray:
        """Values of one image, `[...]` of `dtype`, as float32 in [0, 1]; errors as `as_stored`."""
        self._check(values[None], None, where)
        return self._to_unit(values)

    def from_unit(self, values: np.ndarray) -> np.ndarray:
        """float32 values, clipped to [0, 1], as the library holds them."""
        clipped = values.clip(0, 1)
        if self.dtype == "float32":
            return clipped.astype(np.float32)
        return np.rint(clipped * _LARGEST[self.dtype]).astype(self.dtype)

    def _to_unit(self, values: np.ndarray) -> np.ndarray:
        low, high = self._ends
        return ((values - np.float64(low)) / (high - low)).astype(np.float32)

    def _check(self, block: np.ndarray, first_row: int | None, where: str) -> None:
        low, high = self._ends
        is_inside = (block >= low) & (block <= high)  # False for NaN
        if is_inside.all():
            return
        place = np.unravel_index(int(np.argmin(is_inside)), block.shape)
        of = "" if first_row is None else f" of image {first_row + int(place[0])}"
        raise ValueError(
            f"{where}: the value {block[place]:.6g}{of} is outside of the range {low:g} to {high:g}; "
            "data.value_range gives the values of black and white"
        )


def dtype_of(images: np.ndarray) -> Dtype:
    """The type of images that the library holds.

    Raises:
      TypeError: no images are of this type.
    """
    for dtype in DTYPES:
        if images.dtype == dtype:
            return dtype
    raise TypeError(f"images must be {', '.join(DTYPES)}, got {images.dtype}")


def unit_of_stored(images: np.ndarray) -> np.ndarray:
    """Images as the library holds them, as floats in [0, 1]; floats stay as they are."""
    if images.dtype in (np.uint8, np.uint16):
        return images.astype(np.float32) / _LARGEST[images.dtype.name]
    return images


def shown_channels(images: np.ndarray) -> np.ndarray:
    """The channels that people see: of two channels the first, of more than three the first three.

    Args:
      images: `[..., c]`.

    Returns:
      `[..., 1]` or `[..., 3]`.
    """
    return images[..., : 3 if images.shape[-1] >= 3 else 1]


def for_people(images: np.ndarray) -> np.ndarray:
    """Images that can be shown: uint8 `[..., 1]` or `[..., 3]`.

    Args:
      images: `[..., h, w, c]` as the library holds them. See `shown_channels`.
    """
    shown = shown_channels(images)
    return shown if shown.dtype == np.uint8 else Levels().from_unit(unit_of_stored(shown))
