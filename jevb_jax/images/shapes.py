"""Procedural images: shapes with textures, drawn from a seed."""

import math
from dataclasses import dataclass

import numpy as np

from jevb_jax.images.random_bits import SHAPES, random_bits
from jevb_jax.images.source import ArraySource


@dataclass(frozen=True, eq=False, kw_only=True)
class ShapesSource(ArraySource):
    """Procedural images whose labels are uncertain by a known amount, made by `shapes`.

    Attributes:
      label_probabilities: float32 `[N, 10]`, the distribution that each label was drawn from. At
        most two classes have mass, `1 - ambiguity / 2` and `ambiguity / 2`.
      ambiguity: float32 `[N]` in [0, 1]; 0 is certain, 1 is an even choice between two classes.
    """

    label_probabilities: np.ndarray
    ambiguity: np.ndarray


_SHAPE_NAMES = ("disc", "square", "triangle", "ring", "cross")
_TEXTURE_NAMES = ("plain", "striped")
_SHAPE_CLASSES = tuple(f"{texture} {shape}" for shape in _SHAPE_NAMES for texture in _TEXTURE_NAMES)


def shapes(num_examples: int, *, seed: int, image_size: int = 32) -> ShapesSource:
    """Draws colored shapes with known uncertainty of their labels.

    There are ten classes: disc, square, triangle, ring and cross, each plain or striped. Position,
    size, rotation, colors, stripes and the gradient of the background are nuisances. Every image is
    the pixelwise mean of two classes drawn with the same nuisances, with weights
    `1 - ambiguity / 2` and `ambiguity / 2`. Its label is one of the two, drawn with these
    probabilities, so no classifier can know the label better than `label_probabilities`. Half of
    the images have ambiguity exactly 0. For the others it is uniform on (0, 1), so the best
    possible mean accuracy is 0.875.

    Image `i` depends only on `(seed, i)`, not on `num_examples`. The random bits are the same
    everywhere. Pixels may differ by one gray level between machines that round differently.

    Args:
      num_examples: number of images, at least 1.
      seed: non-negative integer.
      image_size: height and width in pixels, at least 8.

    Returns:
      images uint8 `[num_examples, image_size, image_size, 3]`, labels, and the two arrays of
      `ShapesSource`.

    Raises:
      ValueError: `num_examples` or `image_size` is too small.
    """
    if num_examples < 1 or image_size < 8:
        raise ValueError(
            f"expected num_examples >= 1 and image_size >= 8, got {num_examples} and {image_size}"
        )
    # Compute whole blocks and cut the result. An image then always has the same place in an array
    # of the same shape, so that vectorized loops cannot round it differently.
    block = max(1, 2**18 // image_size**2)
    num_blocks = -(-num_examples // block)
    columns = 21  # number of uniform random numbers for one image
    bits = random_bits(num_blocks * block * columns, seed, SHAPES)
    uniform = ((bits >> np.uint64(11)) * 2.0**-53).reshape(num_blocks, block, columns)
    parts = [_draw_shapes(draws, image_size) for draws in uniform]
    images, labels, probabilities, ambiguity = (
        np.concatenate(arrays)[:num_examples] for arrays in zip(*parts, strict=True)
    )
    return ShapesSource(
        images,
        labels,
        _SHAPE_CLASSES,
        "shapes",
        label_probabilities=probabilities,
        ambiguity=ambiguity,
    )


def _draw_shapes(
    uniform: np.ndarray, image_size: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Images, labels, label probabilities and ambiguity from uniform numbers `[block, 21]`."""
    rows = np.arange(len(uniform))
    # In float64, because float32 rounds the largest uniform numbers to 1, which would be class 10.
    first = (uniform[:, 0] * 10).astype(np.int64)
    second = (first + 1 + (uniform[:, 1] * 9).astype(np.int64)) % 10
    u = iter(uniform[:, 2:].astype(np.float32).T)
    ambiguity = np.maximum(0, 2 * next(u) - 1)
    labels = np.where(next(u) < ambiguity / 2, second, first)
    probabilities = np.zeros((len(uniform), 10), np.float32)
    probabilities[rows, first] = 1 - ambiguity / 2
    probabilities[rows, second] = ambiguity / 2

    # Geometry in pixels around the shape's center; every shape fits in a circle of this radius.
    radius = image_size * (0.24 + 0.14 * next(u))
    center_x = radius + (image_size - 2 * radius) * next(u)
    center_y = radius + (image_size - 2 * radius) * next(u)
    angle, phase = 2 * np.pi * next(u), next(u)
    period = _per_image(image_size * (0.14 + 0.06 * next(u)))
    pixel = np.arange(image_size, dtype=np.float32) + 0.5
    x = pixel[None, None, :] - _per_image(center_x)
    y = pixel[None, :, None] - _per_image(center_y)
    cos, sin = _per_image(np.cos(angle)), _per_image(np.sin(angle))
    across, along = cos * x + sin * y, cos * y - sin * x

    # A light shape on a gradient of two dark colors, or the negative of that.
    colors = [
        _hsv_to_rgb(next(u), 0.5 + 0.5 * next(u), 0.7 + 0.3 * next(u)),
        _hsv_to_rgb(next(u), 0.8 * next(u), 0.4 * next(u)),
        _hsv_to_rgb(next(u), 0.8 * next(u), 0.4 * next(u)),
    ]
    negative = next(u)[:, None] < 0.5
    plain, corner_1, corner_2 = (
        np.where(negative, 1 - color, color)[:, None, None, :] for color in colors
    )
    slope = 2 * np.pi * next(u)
    centered = (pixel / image_size - 0.5) / math.sqrt(2)
    gradient = (
        0.5
        + _per_image(np.cos(slope)) * centered[None, None, :]
        + _per_image(np.sin(slope)) * centered[None, :, None]
    )[..., None]
    background = corner_1 * (1 - gradient) + corner_2 * gradient

    # Stripes of the complementary color; their coverage follows from the distance to the nearest
    # edge.
    wave = np.mod(across / period + _per_image(phase), 1)
    stripe = np.clip(0.5 + (np.abs(wave - 0.5) - 0.25) * period, 0, 1)[..., None]
    striped = plain * (1 - stripe) + (1 - plain) * stripe

    masks = _shape_masks(across, along, _per_image(radius))
    image = np.zeros_like(background)
    for which, weight in ((first, 1 - ambiguity / 2), (second, ambiguity / 2)):
        mask = masks[which // 2, rows][..., None]
        texture = np.where(_per_image(which % 2 == 1)[..., None], striped, plain)
        image += _per_image(weight)[..., None] * (background + mask * (texture - background))
    images = np.rint(np.clip(image, 0, 1) * 255).astype(np.uint8)
    return images, labels, probabilities, ambiguity


def _shape_masks(x: np.ndarray, y: np.ndarray, radius: np.ndarray) -> np.ndarray:
    """Antialiased coverage `[5, block, H, W]` by each shape at pixel coordinates `[block, H, W]`.

    If the center of a pixel lies `d` outside the edge, its coverage is `clip(1/2 - d, 0, 1)`. This
    is exact for straight edges along the grid, and within a few gray levels otherwise.
    """
    distance = np.sqrt(x * x + y * y)
    abs_x, abs_y = np.abs(x), np.abs(y)
    half_width, arm = 0.28 * radius, 0.95 * radius
    outside = (
        distance - 0.8 * radius,
        np.maximum(abs_x, abs_y) - 0.7 * radius,
        np.maximum(y, math.sqrt(0.75) * abs_x - 0.5 * y) - 0.5 * radius,
        np.abs(distance - 0.72 * radius) - 0.2 * radius,
        np.minimum(
            np.maximum(abs_x - half_width, abs_y - arm), np.maximum(abs_x - arm, abs_y - half_width)
        ),
    )
    return np.clip(0.5 - np.stack(outside), 0, 1)


def _per_image(values: np.ndarray) -> np.ndarray:
    """One value for each image, `[block]`, in a shape that broadcasts with `[block, H, W]`."""
    return values[:, None, None]


def _hsv_to_rgb(hue: np.ndarray, saturation: np.ndarray, value: np.ndarray) -> np.ndarray:
    """Colors `[n, 3]` in [0, 1] from hue, saturation and value, each `[n]` in [0, 1]."""
    sector = np.mod(hue[:, None] * 6 + np.array([5, 3, 1], np.float32), 6)
    fall = np.clip(np.minimum(sector, 4 - sector), 0, 1)
    return value[:, None] * (1 - saturation[:, None] * fall)
