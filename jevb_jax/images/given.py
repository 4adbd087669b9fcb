"""What people give as images, checked and brought to what the network's programs take."""

import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jevb_jax.images import pictures
from jevb_jax.images.preparation import cut_square

# Below a quarter of the step between two levels of 8 bits. Cubic filters, float16 and normalizing to
# and fro leave [0, 1] by less; values beyond are of another range.
_TOLERANCE = 1e-3


class GivenImages(NamedTuple):
    """Images of a call, those of one shape and type together.

    Attributes:
      stacks: each `[n, h, w, c]`, uint8, or floating point in [0, 1]; `c` is one or the network's.
      rows: for each stack `[n]`, the places of its images in the call.
      is_single: whether the call was for one image without an axis for several.
    """

    stacks: list[np.ndarray]
    rows: list[np.ndarray]
    is_single: bool

    @property
    def num_images(self) -> int:
        """How many images there are."""
        return sum(len(stack) for stack in self.stacks)


def check_images(images: Any, *, num_channels: int, square_size: int) -> GivenImages:
    """Checks images; lists, tuples, iterators and Pillow pictures become arrays.

    Args:
      images: see `Model`.
      num_channels: what the network takes; gray images are repeated to it.
      square_size: pixels a side of the square that is cut out of every image, 0 for none. An array's
        are cut by `prepared`, when their turn comes.

    Returns:
      The images.

    Raises:
      TypeError: neither numbers nor pictures, and levels of an unclear depth.
      ValueError: wrong axes, channels or range, NaN, no images.
    """
    # Not to NumPy, which would take a picture in a deque, say, for numbers, whatever its mode.
    is_collection = isinstance(images, Iterable) and not isinstance(images, str | bytes | Mapping)
    if is_collection and not _is_array(images) and not isinstance(images, list | tuple):
        images = list(images)
    if isinstance(images, np.ndarray) and images.dtype == object and images.ndim == 1:
        images = list(images)
    if _is_picture(images):
        pixels = _picture_pixels(images, num_channels, square_size, "the picture")
        return GivenImages([pixels[None]], [np.zeros(1, np.int64)], True)
    if isinstance(images, list | tuple) and any(map(_is_image, images)):
        return _check_list(images, num_channels, square_size)
    try:
        values = np.asarray(images)
    except ValueError as error:
        raise ValueError(
            f"nested lists of images must all have one size and type ({error}): give a list of arrays"
        ) from error
    values = _checked(values, num_channels, "images")
    is_single = values.ndim == 3
    stack = values[None] if is_single else values
    return GivenImages([stack], [np.arange(len(stack))], is_single)


def prepared(images: np.ndarray, square_size: int) -> np.ndarray:
    """A part of a stack as the network's programs take it.

    Args:
      images: `[n, h, w, c]` of `check_images`.
      square_size: see `Model`.

    Returns:
      `[n, h, w, c]`, or the squares that are cut out of it; uint8, or float32 in [0, 1].
    """
    if images.dtype != np.uint8:
        images = images.astype(np.float32).clip(0, 1)
    if not square_size or images.shape[1:3] == (square_size, square_size):
        return images
    return np.stack([cut_square(image, square_size) for image in images])


def _is_array(value: Any) -> bool:
    names = ("shape", "__array__", "__array_interface__", "__cuda_array_interface__", "__dlpack__")
    return _is_picture(value) or any(hasattr(value, name) for name in names)


def _is_picture(value: Any) -> bool:
    module = sys.modules.get("PIL.Image")  # whoever has a picture has imported it
    return module is not None and isinstance(value, module.Image)


def _is_image(value: Any) -> bool:
    return _is_picture(value) or len(getattr(value, "shape", ())) == 3


def _picture_pixels(picture: Any, num_channels: int, square_size: int, where: str) -> np.ndarray:
    mode = "L" if num_channels == 1 else "RGB"
    return pictures.picture_pixels(picture, mode=mode, image_size=square_size, where=where)


def _check_list(images: Any, num_channels: int, square_size: int) -> GivenImages:
    """One image after the other, so that pictures need not fit in memory as they are."""
    checked: list[np.ndarray] = []
    for number, image in enumerate(images):
        where = f"image {number}"
        if _is_picture(image):
            pixels = _picture_pixels(image, num_channels, square_size, where)
        else:
            pixels = _checked(np.asarray(image), num_channels, where)
            if pixels.ndim != 3:
                raise ValueError(f"{where} of a list must be [h, w, c], got shape {pixels.shape}")
            pixels = prepared(pixels[None], square_size)[0]
        checked.append(np.broadcast_to(pixels, (*pixels.shape[:2], num_channels)))
    by_kind: dict[Any, list[int]] = {}
    for number, image in enumerate(checked):
        by_kind.setdefault((image.shape, image.dtype), []).append(number)
    return GivenImages(
        [np.stack([checked[number] for number in numbers]) for numbers in by_kind.values()],
        [np.asarray(numbers) for numbers in by_kind.values()],
        False,
    )


def _checked(values: np.ndarray, num_channels: int, where: str) -> np.ndarray:
    """`[..., h, w, c]` uint8, or floating point in [0, 1] or a rounding beyond."""
    is_float = jnp.issubdtype(values.dtype, jnp.floating)
    is_integer = values.dtype == bool or jnp.issubdtype(values.dtype, jnp.integer)
    if not is_float and not is_integer:
        raise TypeError(
            f"{where} must be uint8, or float in [0, 1], got {values.dtype}; files are opened by "
            "PIL.Image.open"
        )
    if values.ndim not in (3, 4):
        raise ValueError(
            f"{where} must be [N, h, w, c], or one image [h, w, c], got shape {values.shape}; grey "
            "images need an axis of one channel: images[..., None]; of a Pillow picture give the "
            "picture itself, because an array of it may hold numbers of a palette"
        )
    if values.size == 0:
        raise ValueError(f"there are no pixels in {where} of shape {values.shape}")
    if values.shape[-1] not in (1, num_channels):
        raise ValueError(_wrong_channels(values.shape, num_channels, where))
    if is_float:
        _check_range(values, where)
        return values
    return _as_levels(values, where)


def _wrong_channels(shape: tuple[int, ...], num_channels: int, where: str) -> str:
    channels = "1" if num_channels == 1 else f"1 or {num_channels}"
    message = f"{where} must have {channels} channels, the last axis, got shape {shape}"
    if shape[-3] in (1, num_channels):
        return f"{message}; where channels come first: np.moveaxis(images, -3, -1)"
    if shape[-1] == 4 and num_channels == 3:
        return (
            f"{message}; of transparent images give images[..., :3], or the Pillow picture itself"
        )
    if shape[-1] == 3 and num_channels == 1:
        return f"{message}; the network was trained on grey images"
    return message


def _as_levels(values: np.ndarray, where: str) -> np.ndarray:
    if values.dtype == np.uint8:
        return values
    if values.dtype == bool:
        return np.where(values, np.uint8(255), np.uint8(0))
    low, high = int(values.min()), int(values.max())
    # 16 bits have levels of their own, and 0 and 1 may be a mask: either read as 8 bits is nearly black.
    if values.dtype == np.uint16 or (low >= 0 and high <= 1):
        raise TypeError(
            f"{where} must be uint8, or float in [0, 1], got {values.dtype} in [{low}, {high}], whose "
            "scale is not clear: divide by the largest level that a pixel may have, or give "
            "images.astype(np.uint8) if that is 255"
        )
    if low < 0 or high > 255:
        raise ValueError(
            f"{where} of integers must hold levels of 0 to 255, got [{low}, {high}] of {values.dtype}: "
            "divide by the largest level that a pixel may have"
        )
    return values.astype(np.uint8)


def _check_range(values: np.ndarray, where: str) -> None:
    low, high = float(values.min()), float(values.max())
    if np.isnan(low):
        count = int(np.sum(np.isnan(values)))
        raise ValueError(f"{where} hold NaN in {count:,} of {values.size:,} values")
    tolerance = max(_TOLERANCE, float(jnp.finfo(values.dtype).eps))
    if low < -tolerance or high > 1 + tolerance:
        advice = (
            "give pixels of 0 to 255 as uint8 or divide them by 255"
            if high > 2 and low >= -tolerance
            else "clip what a filter threw beyond, images.clip(0, 1)"
        )
        raise ValueError(
            f"float {where} must lie in [0, 1], got [{low:.7g}, {high:.7g}]: {advice}; do not "
            "normalise them, the model does"
        )


def in_order(parts: list[Any], rows: list[np.ndarray], join: Callable[..., Any]) -> Any:
    """Joins what came of the stacks, `[n, ...]` each, in the order of the call."""
    if len(parts) == 1:
        return parts[0]
    places = np.argsort(np.concatenate(rows))
    return join(lambda *values: np.concatenate(values)[places], *parts)
