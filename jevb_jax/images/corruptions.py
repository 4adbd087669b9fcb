"""Corrupted copies of images: out-of-distribution sets that need no download.

Each corruption is a pure function `(key, image, *, severity) -> image` of float32 images
`[h, w, c]` in [0, 1], with severities 1 to 5. Corruptions that Hendrycks and Dietterich (2019) have
too follow theirs, but the levels are our own: lengths are shares of the side of the image, so that
they mean the same for digits of 8 pixels and photographs of 32.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.scipy.ndimage import map_coordinates

from jevb_jax import arguments
from jevb_jax.images import pixels as pixels_module
from jevb_jax.images.levels import DTYPES
from jevb_jax.images.pixels import resized_crop
from jevb_jax.paper.tracing import is_traced

NUM_SEVERITIES = 5
_BATCH_SIZE = 500  # number of images corrupted at once
_NOISE_STD = (0.04, 0.08, 0.12, 0.18, 0.26)
_CONTRAST = (0.75, 0.5, 0.4, 0.3, 0.15)
_TILES = (2, 2, 4, 4, 8)
_BLUR_SIGMA = (0.04, 0.055, 0.07, 0.09, 0.12)  # share of the shorter side
_PIXELS = (0.8, 0.65, 0.5, 0.4, 0.25)  # share of the pixels of each side that is kept
_DEGREES = (8.0, 16.0, 30.0, 45.0, 90.0)
_CROP_AREA = (0.8, 0.6, 0.4, 0.25, 0.15)  # share of the area of the image
# Least and largest side of a center crop, as a share of the shorter side of the image: `crop_min`
# and `crop_max` of the URL benchmark.
CENTER_CROP_SHARES = (0.1, 0.75)


def _checked_severity(severity: Any) -> int:
    number = arguments.whole_number("severity", severity)
    if not 1 <= number <= NUM_SEVERITIES:
        raise ValueError(f"severity must be 1 to {NUM_SEVERITIES}, got {number}")
    return number


def _level(table: tuple[float, ...], severity: int | Array) -> Any:
    """The level of a severity. A traced severity gives an array: one program serves all five."""
    if not is_traced(severity):
        return table[_checked_severity(severity) - 1]
    return jnp.asarray(table, jnp.float32)[severity - 1]


def gaussian_noise(key: Array, image: Array, *, severity: int | Array) -> Array:
    """Adds independent Gaussian noise to every value."""
    noise = jax.random.normal(key, image.shape, image.dtype)
    return jnp.clip(image + _level(_NOISE_STD, severity) * noise, 0, 1)


def contrast(key: Array, image: Array, *, severity: int | Array) -> Array:
    """Moves every value toward the mean of its channel in the image."""
    del key
    mean = jnp.mean(image, axis=(0, 1), keepdims=True)
    return mean + _level(_CONTRAST, severity) * (image - mean)


def patch_shuffle(key: Array, image: Array, *, severity: int) -> Array:
    """Permutes square tiles: local texture stays, global shape is lost.

    Raises:
      ValueError: the tiles do not divide the sides of the image.
    """
    tiles = int(_level(_TILES, severity))
    height, width, channels = image.shape
    if height % tiles or width % tiles:
        raise ValueError(f"patch_shuffle needs sides divisible by {tiles}, got {height} x {width}")
    shape = (tiles, height // tiles, tiles, width // tiles, channels)
    patches = image.reshape(shape).swapaxes(1, 2).reshape(tiles * tiles, *shape[1::2], channels)
    patches = jax.random.permutation(key, patches, axis=0)
    return patches.reshape(tiles, tiles, *shape[1::2], channels).swapaxes(1, 2).reshape(image.shape)


def gaussian_blur(key: Array, image: Array, *, severity: int) -> Array:
    """Blurs with a Gaussian, cut off at three standard deviations."""
    del key
    sigma = _level(_BLUR_SIGMA, severity) * min(image.shape[:2])
    return pixels_module.gaussian_blur(image, sigma, kernel_size=2 * math.ceil(3 * sigma) + 1)


def _box_weights(size: int, pixels: int) -> np.ndarray:
    """`[size, size]` matrix that replaces each value by the mean of its box, for `pixels` boxes."""
    edges = np.linspace(0, size, pixels + 1)
    low, high = (
        np.maximum.outer(edges[:-1], np.arange(size)),
        np.minimum.outer(edges[1:], np.arange(1, size + 1)),
    )
    shrink = np.clip(high - low, 0, None) * pixels / size
    grow = np.floor((np.arange(size) + 0.5) * pixels / size).astype(int)
    return shrink[grow]


def pixelate(key: Array, image: Array, *, severity: int) -> Array:
    """Averages over fewer and larger pixels."""
    del key
    kept = _level(_PIXELS, severity)
    rows, columns = (
        jnp.asarray(_box_weights(side, max(1, round(kept * side))), image.dtype)
        for side in image.shape[:2]
    )
    return jnp.einsum("ij,jkc,lk->ilc", rows, image, columns, precision="highest")


def rotation(key: Array, image: Array, *, severity: int | Array) -> Array:
    """Rotates left or right about the center, bilinear; reflection fills the corners."""
    degrees = _level(_DEGREES, severity) * jax.random.rademacher(key, (), image.dtype)
    cosine, sine = jnp.cos(jnp.deg2rad(degrees)), jnp.sin(jnp.deg2rad(degrees))
    center = [(side - 1) / 2 for side in image.shape[:2]]
    y, x = (
        grid - middle
        for grid, middle in zip(
            jnp.meshgrid(
                *(jnp.arange(side, dtype=image.dtype) for side in image.shape[:2]), indexing="ij"
            ),
            center,
            strict=True,
        )
    )
    coordinates = [cosine * y + sine * x + center[0], cosine * x - sine * y + center[1]]
    turn = functools.partial(map_coordinates, coordinates=coordinates, order=1, mode="reflect")
    return jnp.clip(jax.vmap(turn, in_axes=-1, out_axes=-1)(image), 0, 1)


def crop(key: Array, image: Array, *, severity: int | Array) -> Array:
    """Cuts out a square at a random place and resizes it to the size of the image.

    Raises:
      ValueError: the image is not square.
    """
    height, width = image.shape[:2]
    if height != width:
        raise ValueError(f"crop needs square images, got {height} x {width}")
    sides = tuple(max(1, round(math.sqrt(area) * height)) for area in _CROP_AREA)
    side = jnp.asarray(_level(sides, severity), jnp.int32)
    top, left = jax.random.randint(key, (2,), 0, height - side + 1)
    return resized_crop(image, top, left, side, side, size=height)


CORRUPTIONS: dict[str, Callable[..., Array]] = {
    "contrast": contrast,
    "crop": crop,
    "gaussian_blur": gaussian_blur,
    "gaussian_noise": gaussian_noise,
    "patch_shuffle": patch_shuffle,
    "pixelate": pixelate,
    "rotation": rotation,
}


# For these the severity is an argument of one program; for the others it changes sizes, and each
# severity is compiled.
_TRACED = ("contrast", "crop", "gaussian_noise", "rotation")


def _corrupt_batch(keys: Array, images: Array, severity: int | Array, *, name: str) -> Array:
    def one(key: Array, image: Array) -> Array:
        corrupted = CORRUPTIONS[name](key, image.astype(jnp.float32) / 255, severity=severity)
        return jnp.round(corrupted * 255).astype(jnp.uint8)

    return jax.vmap(one)(keys, images)


_corrupt_traced = jax.jit(_corrupt_batch, static_argnames=("name",))
_corrupt_static = jax.jit(_corrupt_batch, static_argnames=("name", "severity"))


def corrupt(images: np.ndarray, name: str, *, severity: int, seed: int) -> np.ndarray:
    """Corrupts every image with its own key, in batches.

    Args:
      images: `[N, h, w, c]` uint8, at least one.
      name: a key of `CORRUPTIONS`.
      severity: 1 (mild) to 5.
      seed: sets the keys, at least 0; image `i` has the key `fold_in(key, i)`.

    Returns:
      `[N, h, w, c]` uint8.

    Raises:
      ValueError: the name is unknown, `severity` or `seed` is out of range, images have a wrong
        shape or are none, or the corruption does not support their sides.
      TypeError: images are not uint8, or `severity` or `seed` is not a whole number.
    """
    if name not in CORRUPTIONS:
        raise ValueError(f"corruption must be one of {sorted(CORRUPTIONS)}, got {name!r}")
    severity = _checked_severity(severity)
    seed = arguments.whole_number("seed", seed, at_least=0, at_most=arguments.LARGEST_SEED)
    images = _checked_images(images)
    corrupt_batch = _corrupt_traced if name in _TRACED else _corrupt_static
    parts = []
    for index in _batches(len(images)):
        keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.asarray(index))
        corrupted = corrupt_batch(keys, jnp.asarray(images[index]), severity, name=name)
        parts.append(np.asarray(corrupted))
    return np.concatenate(parts)[: len(images)]


@jax.jit
def _crop_batch(images: Array, top: Array, left: Array, side: Array) -> Array:
    def one(image: Array, top: Array, left: Array, side: Array) -> Array:
        size = min(image.shape[:2])
        crop = resized_crop(image, top, left, side, side, size=size)
        if not jnp.issubdtype(images.dtype, jnp.integer):
            return crop.astype(images.dtype)
        return jnp.round(crop * int(jnp.iinfo(images.dtype).max)).astype(images.dtype)

    return jax.vmap(one)(images, top, left, side)


def center_crops(images: np.ndarray, *, seed: int) -> np.ndarray:
    """Crops the center of every image and enlarges it, as the URL benchmark does (docs eq. 39).

    The side of the square is a share of the shorter side of the image, uniform in
    `CENTER_CROP_SHARES`. It is a share of the side and not of the area, and the place is the center,
    as in `validate.py` of mkirchhof/url (Kirchhof et al. 2023). The draws of the shares are ours. A
    crop is enlarged bilinearly to the square that the evaluation would cut out of the whole image.

    Args:
      images: `[N, h, w, c]` uint8, uint16, or float32 in [0, 1]; at least one.
      seed: sets the shares, at least 0.

    Returns:
      `[N, s, s, c]` of the same type, where `s` is the shorter of `h` and `w`.

    Raises:
      ValueError: images have a wrong shape or are none, or `seed` is out of range.
      TypeError: images are of another type, or `seed` is not a whole number.
    """
    seed = arguments.whole_number("seed", seed, at_least=0, at_most=arguments.LARGEST_SEED)
    images = _checked_images(images, DTYPES)
    height, width = images.shape[1:3]
    share = np.random.default_rng(seed).uniform(*CENTER_CROP_SHARES, size=len(images))
    side = np.maximum(1, np.rint(share * min(height, width))).astype(np.int32)
    # As torchvision's center_crop: half a pixel is rounded to even.
    top, left = (np.rint((length - side) / 2).astype(np.int32) for length in (height, width))
    parts = [
        np.asarray(_crop_batch(*(jnp.asarray(x[rows]) for x in (images, top, left, side))))
        for rows in _batches(len(images))
    ]
    return np.concatenate(parts)[: len(images)]


def _checked_images(images: np.ndarray, dtypes: Sequence[str] = ("uint8",)) -> np.ndarray:
    images = np.asarray(images)
    if images.dtype.name not in dtypes:
        raise TypeError(f"images must be {' or '.join(dtypes)}, got {images.dtype}")
    if images.ndim != 4 or 0 in images.shape:
        raise ValueError(f"images must be a non-empty [N, h, w, c], got shape {images.shape}")
    return images


def _batches(num_images: int) -> Iterator[np.ndarray]:
    """Rows of batches of one size; the last batch repeats its last image, so that one is compiled."""
    size = min(num_images, _BATCH_SIZE)
    for start in range(0, num_images, size):
        yield np.minimum(np.arange(start, start + size), num_images - 1)
