"""Operations on pixels without randomness."""

from collections.abc import Sequence
from typing import Literal

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from jevb_jax.images.preparation import square_cut

Interpolation = Literal["bilinear", "bicubic"]
Adjustment = Literal["brightness", "contrast", "saturation", "hue"]
INTERPOLATIONS: tuple[Interpolation, ...] = ("bilinear", "bicubic")

# ITU-R 601-2 luma, with the digits of torchvision.
_LUMA = (0.2989, 0.587, 0.114)


def _check_image(image: Array) -> None:
    if image.ndim != 3 or image.shape[-1] < 1:
        raise ValueError(
            f"an image must be [height, width, channels], got shape {image.shape}; use vmap for a batch"
        )


def to_float(image: ArrayLike) -> Array:
    """Converts an image to float32 in [0, 1].

    Args:
      image: `[h, w, c]`, uint8, uint16, or float in [0, 1].

    Raises:
      TypeError: the image has another integer type.
      ValueError: the shape is not that of an image.
    """
    image = jnp.asarray(image)
    _check_image(image)
    if image.dtype in (jnp.uint8, jnp.uint16):
        return image.astype(jnp.float32) / int(jnp.iinfo(image.dtype).max)
    if not jnp.issubdtype(image.dtype, jnp.floating):
        raise TypeError(f"images must be uint8, uint16, or float in [0, 1], got {image.dtype}")
    return image.astype(jnp.float32)


def _filter(distance: Array, interpolation: Interpolation) -> Array:
    """Pillow's triangle or Catmull-Rom (a = -1/2) kernel; `distance` is in source samples."""
    x = jnp.abs(distance)
    if interpolation == "bilinear":
        return jnp.maximum(1 - x, 0)
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return jnp.where(x < 1, near, jnp.where(x < 2, far, jnp.zeros_like(x)))


def _resize_weights(
    start: ArrayLike,
    length: ArrayLike,
    *,
    source_size: int,
    size: int,
    interpolation: Interpolation,
    first: int = 0,
    count: int | None = None,
) -> Array:
    """Weights `[size, source_size]` that cut out `[start, start + length)` and resize it to `size`.

    With `count`, only that many rows of the weights are computed, from row `first` on.

    When the image shrinks, the kernel becomes wider (antialiasing). The weights are normalized over
    the samples of the cut only, as if Pillow resized an image that was cropped before.
    """
    start, length = (jnp.asarray(v, jnp.float32) for v in (start, length))
    scale = length / size
    support = jnp.maximum(scale, 1.0)
    rows = first + jnp.arange(size if count is None else count, dtype=jnp.float32)
    center = start + (rows + 0.5) * scale
    sample = jnp.arange(source_size, dtype=jnp.float32)
    distance = (sample[None, :] + 0.5 - center[:, None]) / support
    is_inside = (sample >= start) & (sample < start + length)
    weights = jnp.where(is_inside[None, :], _filter(distance, interpolation), 0.0)
    return weights / jnp.sum(weights, axis=1, keepdims=True)


def _resample(image: Array, rows: Array, columns: Array, interpolation: Interpolation) -> Array:
    """Applies weights along height and width, as two small matrix products without gather."""
    # Channels in the middle, so that neither product has to transpose.
    resized = jnp.einsum("ih,hcw->icw", rows, jnp.moveaxis(image, 2, 1), precision="highest")
    resized = jnp.einsum("icw,jw->icj", resized, columns, precision="highest")
    resized = jnp.moveaxis(resized, 1, 2)
    return jnp.clip(resized, 0, 1) if interpolation == "bicubic" else resized


def check_interpolation(interpolation: str) -> None:
    """Raises ValueError for an unknown interpolation."""
    if interpolation not in INTERPOLATIONS:
        raise ValueError(f"interpolation must be one of {INTERPOLATIONS}, got {interpolation!r}")


def resized_crop(
    image: ArrayLike,
    top: ArrayLike,
    left: ArrayLike,
    height: ArrayLike,
    width: ArrayLike,
    *,
    size: int,
    interpolation: Interpolation = "bilinear",
    flip: ArrayLike = False,
) -> Array:
    """Crops a box and resizes it, antialiased, as `torchvision.transforms.functional.resized_crop`.

    Args:
      image: `[h, w, c]`.
      top: first row of the box, an integer; may be traced, like the next three.
      left: first column of the box.
      height: rows of the box, at least 1. The box lies inside the image.
      width: columns of the box, at least 1.
      size: height and width of the result in pixels.
      interpolation: "bilinear", or "bicubic", which is clipped to [0, 1].
      flip: mirror the result left to right; costs nothing.

    Returns:
      `[size, size, c]` float32.

    Raises:
      ValueError: the interpolation is unknown.
    """
    check_interpolation(interpolation)
    image = to_float(image)
    top, left, height, width = (jnp.asarray(v, jnp.float32) for v in (top, left, height, width))
    rows = _resize_weights(
        top, height, source_size=image.shape[0], size=size, interpolation=interpolation
    )
    columns = _resize_weights(
        left, width, source_size=image.shape[1], size=size, interpolation=interpolation
    )
    columns = jnp.where(jnp.asarray(flip), columns[::-1], columns)
    return _resample(image, rows, columns, interpolation)


def to_planes(image: Array) -> Array:
    """Puts channels first: `[H, W, C]` to `[C, H, W]`."""
    return jnp.moveaxis(image, -1, 0)


def from_planes(planes: Array) -> Array:
    """Puts channels last: `[C, H, W]` to `[H, W, C]`."""
    return jnp.moveaxis(planes, 0, -1)


def luma(planes: Array) -> Array:
    """Luma `[h, w]` of `[c, h, w]`; the mean of channels that are not red, green and blue."""
    if len(planes) == 1:
        return planes[0]
    if len(planes) != 3:
        return jnp.mean(planes, axis=0)
    return _LUMA[0] * planes[0] + _LUMA[1] * planes[1] + _LUMA[2] * planes[2]


def to_grayscale(image: Array) -> Array:
    """The luma in every channel, `[h, w, c]`; an image with one channel is returned as it is."""
    return jnp.broadcast_to(luma(to_planes(image))[..., None], image.shape)


def blend(planes: Array, other: Array, factor: ArrayLike) -> Array:
    """Blends `[c, h, w]` with `[h, w]` or a number."""
    other = jnp.broadcast_to(other, planes.shape[1:])[None]
    return jnp.clip(other + jnp.asarray(factor, planes.dtype) * (planes - other), 0, 1)


def turn_hue(planes: Array, shift: ArrayLike) -> Array:
    """Shifts the hue of `[3, H, W]` by a share of the color circle."""
    red, green, blue = planes
    value = jnp.maximum(jnp.maximum(red, green), blue)
    chroma = value - jnp.minimum(jnp.minimum(red, green), blue)
    divisor = jnp.where(chroma > 0, chroma, jnp.ones_like(chroma))
    sextant = jnp.where(
        value == red,
        (green - blue) / divisor,
        jnp.where(value == green, 2 + (blue - red) / divisor, 4 + (red - green) / divisor),
    )
    sextant = sextant + 6 * jnp.asarray(shift, planes.dtype)
    # HSV to RGB without branches: a channel is `value` minus the chroma times a trapezoid of the
    # hue.
    channels = []
    for offset in (5.0, 3.0, 1.0):
        k = offset + sextant
        k = k - 6 * jnp.floor(k / 6)
        channels.append(value - chroma * jnp.clip(jnp.minimum(k, 4 - k), 0, 1))
    return jnp.stack(channels)


def gaussian_blur(image: ArrayLike, sigma: ArrayLike, *, kernel_size: int) -> Array:
    """Separable Gaussian blur with reflected borders, as torchvision's.

    Args:
      image: `[h, w, c]`.
      sigma: standard deviation in pixels, positive; may be traced.
      kernel_size: number of taps, odd, at most `2 * side - 1`.

    Returns:
      `[h, w, c]` float32.

    Raises:
      ValueError: the kernel size is even or too large for the image.
    """
    image = to_float(image)
    half = kernel_size // 2
    if kernel_size % 2 != 1 or half >= min(image.shape[:2]):
        raise ValueError(
            f"kernel_size must be odd and at most 2 * side - 1, got {kernel_size} for an image of "
            f"shape {image.shape}"
        )
    offsets = jnp.arange(-half, half + 1, dtype=jnp.float32)
    kernel = jnp.exp(-jnp.square(offsets / jnp.asarray(sigma, jnp.float32)) / 2)
    kernel = kernel / jnp.sum(kernel)
    planes = to_planes(image)
    for axis in (1, 2):
        # A matrix product, because convolutions with one channel are slow on every backend.
        length = planes.shape[axis]
        reflected = np.pad(np.arange(length), half, mode="reflect")
        taps = np.stack([reflected[i : i + kernel_size] for i in range(length)])
        weights = (
            jnp.zeros((length, length), jnp.float32)
            .at[np.arange(length)[:, None], taps]
            .add(jnp.broadcast_to(kernel, taps.shape))
        )
        product = "ih,chw->ciw" if axis == 1 else "jw,chw->chj"
        planes = jnp.einsum(product, weights, planes, precision="highest")
    return from_planes(planes)


def solarize(image: ArrayLike, *, threshold: float = 0.5) -> Array:
    """Inverts values of at least `threshold`. `[h, w, c]`."""
    image = to_float(image)
    return jnp.where(image >= threshold, 1 - image, image)


def normalize(image: ArrayLike, *, mean: Sequence[float], std: Sequence[float]) -> Array:
    """`(image - mean) / std`, channel by channel. `[h, w, c]`.

    Raises:
      ValueError: there is not one mean and one std for each channel.
    """
    image = to_float(image)
    if not len(mean) == len(std) == image.shape[-1]:
        raise ValueError(
            f"mean and std need one value for each of {image.shape[-1]} channels, got {mean}, {std}"
        )
    mean_of_plane, std_of_plane = (
        jnp.asarray(values, jnp.float32)[:, None, None] for values in (mean, std)
    )
    return from_planes((to_planes(image) - mean_of_plane) / std_of_plane)


def center_view(
    image: ArrayLike,
    *,
    size: int,
    mean: Sequence[float],
    std: Sequence[float],
    interpolation: Interpolation = "bilinear",
) -> Array:
    """The normalized view for evaluation, cut as in `images.preparation`.

    The image is resized, antialiased, until its shorter side is `size`, and the center is cut out.
    A square image is used as a whole.

    Args:
      image: `[h, w, c]` uint8, or float in [0, 1].
      size: height and width of the view in pixels.
      mean: subtracted from the pixels, one value for each channel.
      std: the pixels are divided by it, one value for each channel.
      interpolation: "bilinear" or "bicubic".

    Returns:
      `[size, size, c]` float32.
    """
    image = to_float(image)
    if image.shape[:2] != (size, size):
        image = _resample(image, *_square_weights(image, size, interpolation), interpolation)
    return normalize(image, mean=mean, std=std)


def cut_levels(image: ArrayLike, *, size: int) -> Array:
    """The square of a uint8 image: `preparation.cut_square` on the device.

    It follows Pillow's order of directions, and rounds after each of them as Pillow does. A value
    midway between two levels may be rounded to the other one, a difference of 1/255.

    Args:
      image: `[h, w, c]` uint8.
      size: height and width of the square in pixels.

    Returns:
      `[size, size, c]` uint8.
    """
    image = jnp.asarray(image)
    height, width = image.shape[:2]
    cut = square_cut(height, width, size)
    if min(height, width) == size:
        return image[cut.top : cut.top + size, cut.left : cut.left + size]
    rows, columns = _square_weights(image, size, "bilinear")

    def rounded(levels: Array) -> Array:
        return jnp.clip(jnp.floor(levels + 0.5), 0, 255)

    across = jnp.einsum("hwc,jw->hjc", image.astype(jnp.float32), columns, precision="highest")
    down = jnp.einsum("ih,hjc->ijc", rows, rounded(across), precision="highest")
    return rounded(down).astype(jnp.uint8)


def cut_floats(image: ArrayLike, *, size: int) -> Array:
    """The square of a float image in [0, 1]: `preparation.cut_square` on the device.

    Args:
      image: `[h, w, c]`.
      size: height and width of the square in pixels.

    Returns:
      `[size, size, c]` float32.
    """
    image = to_float(image)
    if image.shape[:2] == (size, size):
        return image
    return _resample(image, *_square_weights(image, size, "bilinear"), "bilinear")


def _square_weights(image: Array, size: int, interpolation: Interpolation) -> tuple[Array, Array]:
    """Weights of rows `[size, h]` and columns `[size, w]` for the square of `square_cut`."""
    height, width = image.shape[:2]
    cut = square_cut(height, width, size)
    rows, columns = (
        _resize_weights(
            0.0,
            source,
            source_size=source,
            size=resized,
            interpolation=interpolation,
            first=first,
            count=size,
        )
        for source, resized, first in zip(
            (height, width), (cut.height, cut.width), (cut.top, cut.left), strict=True
        )
    )
    return rows, columns
