"""Checks images and features that users give, and converts them for the network's programs."""

import hashlib
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jevb_jax.images import decoding
from jevb_jax.images.levels import Levels, unit_of_stored
from jevb_jax.images.preparation import cut_square
from jevb_jax.images.source import checked_features

# Images may leave [0, 1] by so much: less than a quarter of the step between two 8-bit levels.
# Cubic filters, float16, and normalizing forth and back stay below; larger deviations are another
# range.
_TOLERANCE = 1e-3


class GivenImages(NamedTuple):
    """Images of one call, grouped by shape and type; or the features of one call, one group.

    Attributes:
      stacks: each `[n, h, w, c]`, uint8, uint16, or floating point in [0, 1]. `c` is 1 or the network's
        number of channels. Features are one stack, `[n, F]` or `[n, V, F]` float32.
      rows: for each stack `[n]`, the positions of its images in the call.
      is_single: whether the call gave one image without a batch axis.
    """

    stacks: list[np.ndarray]
    rows: list[np.ndarray]
    is_single: bool

    @property
    def num_images(self) -> int:
        """The number of images."""
        return sum(len(stack) for stack in self.stacks)


def refuse_shared(fitted: GivenImages, calibration: GivenImages) -> None:
    """Raises ValueError if an image is among both, bit for bit.

    A score is too low for an image that it is fitted to, and a threshold from such scores is too.
    """

    def keys(images: GivenImages) -> list[tuple[Any, ...]]:
        return [
            (x.dtype, x.shape, hashlib.sha256(x.tobytes()).digest())
            for stack in images.stacks
            for x in stack
        ]

    known = set(keys(fitted))
    count = sum(key in known for key in keys(calibration))
    if count:
        raise ValueError(
            f"{count} of {calibration.num_images} calibration_images are also fit_images. The score is "
            "too low for images that it is fitted to, so the threshold would be too low. Give other "
            "images, and remove copies"
        )


def check_images(
    images: Any,
    *,
    num_channels: int,
    square_size: int,
    exif: decoding.Exif = "apply",
    levels: Levels | None = None,
) -> GivenImages:
    """Checks images; lists, tuples, iterators and Pillow pictures become arrays.

    Args:
      images: as for `Model`.
      num_channels: the network's number of channels.
      square_size: height and width of the square to cut out of each image, 0 for none. Squares of
        arrays are cut later, by `prepared`.
      exif: whether the orientation in EXIF of a picture is applied or ignored.
      levels: type and range of the images of the run; bytes by default.

    Raises:
      TypeError: images are neither numbers nor pictures, or their range of levels is unclear.
      ValueError: axes, channels or range are wrong, a value is NaN, or there are no images.
    """
    # Do not call NumPy yet: it would turn pictures in, say, a deque into numbers, whatever their
    # mode.
    is_collection = isinstance(images, Iterable) and not isinstance(images, str | bytes | Mapping)
    if is_collection and not _is_array(images) and not isinstance(images, list | tuple):
        images = list(images)
    if isinstance(images, np.ndarray) and images.dtype == object and images.ndim == 1:
        images = list(images)

    levels = levels or Levels()

    def read(where: str, picture: Any) -> np.ndarray:
        modes = {1: "L", 3: "RGB", 4: "RGBA"}
        if num_channels not in modes:
            raise ValueError(
                f"{where}: a picture has 1, 3 or 4 channels, but the network was trained on "
                f"{num_channels}; give arrays [h, w, {num_channels}]"
            )
        is_deep = picture.mode.startswith(("I", "F"))
        return decoding.picture_pixels(
            picture,
            mode=modes[num_channels],
            image_size=square_size,
            exif=exif,
            levels=levels if is_deep else Levels(),
            where=where,
        )

    if _is_picture(images):
        pixels = read("the picture", images)
        return GivenImages([pixels[None]], [np.zeros(1, np.int64)], True)
    if isinstance(images, list | tuple) and any(map(_is_image, images)):
        return _check_list(images, num_channels, square_size, levels, read)
    try:
        values = np.asarray(images)
    except ValueError as error:
        raise ValueError(
            f"nested lists of images must all have one size and type ({error}); give a list of arrays"
        ) from error
    values = _checked(values, num_channels, levels, "images")
    is_single = values.ndim == 3
    stack = values[None] if is_single else values
    return GivenImages([stack], [np.arange(len(stack))], is_single)


def check_features(features: Any, *, num_features: int, num_stored_views: int) -> GivenImages:
    """Checks features that a user gives to a model of features.

    Args:
      features: floating point `[N, F]`, or `[F]` of one example; or `[N, V, F]` if the model was
        trained on stored views. Anything that NumPy can read.
      num_features: F of the model.
      num_stored_views: V of the model, 1 if it was not trained on stored views.

    Raises:
      TypeError: they are not floating point.
      ValueError: a shape is wrong, a value is not finite, or there are no rows.
    """
    values = np.asarray(features)
    if not jnp.issubdtype(values.dtype, jnp.floating):
        raise TypeError(f"features must be floating point, got {values.dtype}")
    wanted = f"[N, {num_features}], or [{num_features}] of one example"
    if num_stored_views > 1:
        wanted += f", or [N, {num_stored_views}, {num_features}]"
    is_shaped = values.ndim in (1, 2) or (
        values.ndim == 3 and num_stored_views > 1 and values.shape[1] == num_stored_views
    )
    if not is_shaped or values.shape[-1] != num_features:
        raise ValueError(
            f"the model was trained on {num_features} features in a row: expected {wanted}, got shape "
            f"{values.shape}"
        )
    is_single = values.ndim == 1
    stack = values[None] if is_single else values
    if not len(stack):
        raise ValueError(f"there are no rows in features of shape {values.shape}")
    return GivenImages(
        [checked_features(stack, where="features")], [np.arange(len(stack))], is_single
    )


def prepared(images: np.ndarray, square_size: int) -> np.ndarray:
    """Converts a part of a stack to what the network's programs take.

    Args:
      images: `[n, h, w, c]`, from `check_images`.
      square_size: as for `check_images`.

    Returns:
      `[n, h, w, c]`, or the squares cut out of the images; uint8, or float32 in [0, 1].
    """
    if images.dtype != np.uint8:
        images = unit_of_stored(images).astype(np.float32).clip(0, 1)
    if not square_size or images.shape[1:3] == (square_size, square_size):
        return images
    return np.stack([cut_square(image, square_size) for image in images])


def _is_array(value: Any) -> bool:
    names = ("shape", "__array__", "__array_interface__", "__cuda_array_interface__", "__dlpack__")
    return _is_picture(value) or any(hasattr(value, name) for name in names)


def _is_picture(value: Any) -> bool:
    module = sys.modules.get("PIL.Image")  # loaded already if there are any pictures
    return module is not None and isinstance(value, module.Image)


def _is_image(value: Any) -> bool:
    return _is_picture(value) or len(getattr(value, "shape", ())) == 3


def _check_list(
    images: Any,
    num_channels: int,
    square_size: int,
    levels: Levels,
    read: Callable[[str, Any], np.ndarray],
) -> GivenImages:
    """Checks one image after the other, so that the pictures need not fit into memory together."""
    checked: list[np.ndarray] = []
    for number, image in enumerate(images):
        where = f"image {number}"
        if _is_picture(image):
            pixels = read(where, image)
        else:
            pixels = _checked(np.asarray(image), num_channels, levels, where)
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


def _checked(values: np.ndarray, num_channels: int, levels: Levels, where: str) -> np.ndarray:
    """`[..., h, w, c]` uint8 or uint16, or floating point in [0, 1] up to the tolerance."""
    is_float = jnp.issubdtype(values.dtype, jnp.floating)
    is_integer = values.dtype == bool or jnp.issubdtype(values.dtype, jnp.integer)
    if not is_float and not is_integer:
        raise TypeError(
            f"{where} must be uint8, or float in [0, 1], got {values.dtype}; open files by "
            "PIL.Image.open"
        )
    if values.ndim not in (3, 4):
        raise ValueError(
            f"{where} must be [N, h, w, c], or one image [h, w, c], got shape {values.shape}. Gray "
            "images need an axis with one channel: images[..., None]. Give a Pillow picture itself, "
            "because an array of it may hold indices of a palette"
        )
    if values.size == 0:
        raise ValueError(f"there are no pixels in {where} of shape {values.shape}")
    if values.shape[-1] not in (1, num_channels):
        raise ValueError(_wrong_channels(values.shape, num_channels, where))
    if levels.dtype == "uint16" and values.dtype == np.uint16:
        return levels.from_unit(levels.to_unit(values, where=where))
    if levels.value_range and levels.dtype == "float32" and is_float:
        return levels.to_unit(values.astype(np.float32), where=where)
    if is_float:
        _check_range(values, where)
        return values
    return _as_levels(values, where)


def _wrong_channels(shape: tuple[int, ...], num_channels: int, where: str) -> str:
    channels = "1 channel" if num_channels == 1 else f"1 or {num_channels} channels"
    message = f"{where} must have {channels} in the last axis, got shape {shape}"
    if shape[-1] == 3 and num_channels == 1:
        return f"{message}; the network was trained on gray images"
    if shape[-3] in (1, 3, num_channels):
        return f"{message}; if channels come first, give np.moveaxis(images, -3, -1)"
    if shape[-1] == 4 and num_channels == 3:
        return (
            f"{message}; for transparent images give images[..., :3], or the Pillow picture itself"
        )
    if len(shape) == 3:
        return f"{message}; many gray images need an axis with one channel: images[..., None]"
    return message


def _as_levels(values: np.ndarray, where: str) -> np.ndarray:
    if values.dtype == np.uint8:
        return values
    if values.dtype == bool:
        return np.where(values, np.uint8(255), np.uint8(0))
    low, high = int(values.min()), int(values.max())
    # 16-bit images have a larger range, and values 0 and 1 may be a mask. Read as 8 bits, both
    # would be nearly black.
    if values.dtype == np.uint16 or (low >= 0 and high <= 1):
        raise TypeError(
            f"{where} must be uint8, or float in [0, 1], got {values.dtype} in [{low}, {high}]. The "
            "scale is not clear: divide by the largest possible level, or give "
            "images.astype(np.uint8) if that level is 255"
        )
    if low < 0 or high > 255:
        raise ValueError(
            f"{where} of integers must hold levels of 0 to 255, got [{low}, {high}] of {values.dtype}. "
            "Divide by the largest possible level"
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
            "give pixels of 0 to 255 as uint8, or divide them by 255"
            if high > 2 and low >= -tolerance
            else "clip the excess of a filter by images.clip(0, 1)"
        )
        raise ValueError(
            f"float {where} must lie in [0, 1], got [{low:.7g}, {high:.7g}]: {advice}. Do not "
            "normalize them; the model does"
        )


def in_order(parts: list[Any], rows: list[np.ndarray], join: Callable[..., Any]) -> Any:
    """Joins the results for the stacks, `[n, ...]` each, in the order of the images of the call."""
    if len(parts) == 1:
        return parts[0]
    places = np.argsort(np.concatenate(rows))
    return join(lambda *values: np.concatenate(values)[places], *parts)
