"""The boxes of random crops: drawn on the device, and the same ones on the host.

A run that crops whole pictures cuts the boxes out where the files are read, in processes that have
no use for a device. NumPy draws them there, from the same threefry bits that JAX draws on the device.
"""

import dataclasses
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jevb_jax.images.pixels import Interpolation

_CROP_ATTEMPTS = 10

# Who resizes a crop on the host: Pillow, or a package whose vector instructions do it faster.
Resizer = Literal["pillow", "simd"]
RESIZERS: tuple[Resizer, ...] = ("pillow", "simd")


def sample_crop(
    key: Array,
    *,
    height: int,
    width: int,
    scale: tuple[float, float] = (0.2, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> tuple[Array, Array, Array, Array]:
    """Draws the box of `torchvision.transforms.RandomResizedCrop.get_params`.

    It tries ten times: the area is uniform in `scale`, the aspect ratio log-uniform in `ratio`. The
    first box that fits into the image gets a uniform place. If none fits, the box is the largest
    central one with a ratio in range.

    Args:
      key: consumed.
      height: height of the image in pixels.
      width: width of the image in pixels.
      scale: range of the box's share of the image area.
      ratio: range of width / height.

    Returns:
      `top, left, height, width`, int32 scalars.
    """
    key_area, key_ratio, key_top, key_left = jax.random.split(key, 4)
    share = _attempts(key_area, *scale)
    log_low, log_high = np.log(ratio).tolist()
    area = height * width * share
    aspect = jnp.exp(_attempts(key_ratio, log_low, log_high))
    widths = jnp.round(jnp.sqrt(area * aspect)).astype(jnp.int32)
    heights = jnp.round(jnp.sqrt(area / aspect)).astype(jnp.int32)
    fits = (widths > 0) & (widths <= width) & (heights > 0) & (heights <= height)
    first = jnp.argmax(fits)
    fallback = _fallback(height, width, ratio)
    has_fit = jnp.any(fits)
    crop_height = jnp.where(has_fit, heights[first], fallback[0])
    crop_width = jnp.where(has_fit, widths[first], fallback[1])
    top = jax.random.randint(key_top, (), 0, height - crop_height + 1, jnp.int32)
    left = jax.random.randint(key_left, (), 0, width - crop_width + 1, jnp.int32)
    top = jnp.where(has_fit, top, (height - crop_height) // 2)
    left = jnp.where(has_fit, left, (width - crop_width) // 2)
    return top, left, crop_height, crop_width


def _attempts(key: Array, low: float, high: float) -> Array:
    """A uniform number for each attempt, `[10]` float32.

    As JAX draws bits by default, sixteen numbers begin with the same ten. On a CPU they compile in
    a quarter of the time, because a power of two fits into vector registers.
    """
    padded = 1 << (_CROP_ATTEMPTS - 1).bit_length()
    return jax.random.uniform(key, (padded,), jnp.float32, low, high)[:_CROP_ATTEMPTS]


def _fallback(height: int, width: int, ratio: tuple[float, float]) -> tuple[int, int]:
    """Height and width of the largest box with a ratio in range."""
    image_ratio = width / height
    if image_ratio < ratio[0]:
        return min(round(width / ratio[0]), height), width
    if image_ratio > ratio[1]:
        return height, min(round(height * ratio[1]), width)
    return height, width


class Box(NamedTuple):
    """A box of whole pixels.

    Attributes:
      top: first row.
      left: first column.
      height: rows, at least 1.
      width: columns, at least 1.
    """

    top: int
    left: int
    height: int
    width: int


@dataclasses.dataclass(frozen=True, eq=False)
class ExampleCrops:
    """The crops of all views of one example; where they lie depends on the size of its image.

    Attributes:
      sizes: height and width of each of the V views in pixels.
      ratio: range of width / height.
      interpolation: "bilinear" or "bicubic".
      shares: `[V, 10]` float32, shares of the image area to try.
      aspects: `[V, 10]` float32, ratios of width to height to try.
      places: `[V, 2, 2]` uint32, bits for the top and for the left of the box.
      resizer: who resizes the crops.
    """

    sizes: tuple[int, ...]
    ratio: tuple[float, float]
    interpolation: Interpolation
    shares: np.ndarray
    aspects: np.ndarray
    places: np.ndarray
    resizer: Resizer = "pillow"

    def boxes(self, *, height: int, width: int) -> list[Box]:
        """The box of each view, by the rule of `sample_crop`.

        Args:
          height: height of the image in pixels.
          width: width of the image in pixels.

        Returns:
          Boxes inside the image.
        """
        found = []
        area = np.float32(height * width)
        # Float by float: the first attempt mostly fits, and arrays of ten take as long to start.
        for shares, aspects, places in zip(self.shares, self.aspects, self.places, strict=True):
            for share, aspect in zip(shares, aspects, strict=True):
                wide = round(np.sqrt(area * share * aspect).item())
                tall = round(np.sqrt(area * share / aspect).item())
                if 0 < wide <= width and 0 < tall <= height:
                    top = _integer(places[0], height - tall + 1)
                    left = _integer(places[1], width - wide + 1)
                    break
            else:
                tall, wide = _fallback(height, width, self.ratio)
                top, left = (height - tall) // 2, (width - wide) // 2
            found.append(Box(top, left, tall, wide))
        return found


@dataclasses.dataclass(frozen=True)
class HostCrops:
    """The crops of all views of a run, for the host to cut out of whole pictures.

    A box is the one that `train_step` would draw on the device for an image of that size. It is a
    function of the key of the run, the step, the row of the example in the batch and the view. Only
    where the device rounds the last bit of a float otherwise is it another one, as it is between
    two kinds of devices (docs/settings.md has the counts).

    Attributes:
      key: the two words of the run's threefry key, from `key_words`.
      sizes: height and width of each view in pixels.
      scales: for each view the range of the crop's share of the image area.
      ratio: range of width / height.
      interpolation: "bilinear" or "bicubic".
      resizer: who resizes the crops; "simd" has "bilinear" alone.

    Raises:
      ValueError: there are no views, or not a scale for each; or the resizer has no such
        interpolation.
    """

    key: tuple[int, int]
    sizes: tuple[int, ...]
    scales: tuple[tuple[float, float], ...]
    ratio: tuple[float, float]
    interpolation: Interpolation
    resizer: Resizer = "pillow"

    def __post_init__(self) -> None:
        """Checks the number of scales, and the interpolation."""
        if not self.sizes or len(self.sizes) != len(self.scales):
            raise ValueError(
                f"expected a size and a scale for each view, got {self.sizes} and {self.scales}"
            )
        if self.resizer == "simd" and self.interpolation != "bilinear":
            raise ValueError(
                f'the resizer "simd" is bilinear, got "{self.interpolation}": take "pillow"'
            )

    def of_examples(self, step: int, rows: np.ndarray) -> list[ExampleCrops]:
        """The crops of some examples of a batch.

        Args:
          step: number of the step, from 0.
          rows: integers `[n]`, rows of the examples in the whole batch, over all processes.

        Returns:
          The crops for each of the rows in turn.
        """
        # The same chain of keys as in `step.train_step` and `augmentations.multi_view`.
        of_step = _child(np.array([self.key], np.uint32), step)
        of_example = _child(_child(of_step, rows), 0)
        of_view = _child(of_example[:, None], np.arange(len(self.sizes)))
        of_crop = _child(_child(of_view, 0), 0)
        low, high = np.asarray(self.scales, np.float32).T[..., None]
        shares = _uniform(_child(of_crop, 0), low, high)
        logs = np.log(self.ratio).astype(np.float32)
        # NumPy's exponential of floats rounds otherwise on other processors; that of doubles, once
        # it is rounded to floats, does not.
        aspects = np.exp(_uniform(_child(of_crop, 1), *logs).astype(np.float64)).astype(np.float32)
        places = np.stack([_integer_bits(_child(of_crop, number)) for number in (2, 3)], axis=-2)
        return [
            ExampleCrops(self.sizes, self.ratio, self.interpolation, *one, self.resizer)
            for one in zip(shares, aspects, places, strict=True)
        ]


def key_words(key: Array) -> tuple[int, int]:
    """The two words of a threefry key, from which NumPy draws the bits that JAX draws.

    Args:
      key: of `jax.random.key`.

    Raises:
      ValueError: JAX is set to draw other bits.
    """
    words = np.asarray(jax.random.key_data(key))
    halves = np.asarray(jax.random.key_data(jax.random.split(key)))
    if words.shape != (2,) or not np.array_equal(_child(words[None], np.arange(2)), halves):
        raise ValueError(
            'augmentation.crop_from = "image" draws its boxes by threefry, as JAX does by default, but '
            f"JAX is set to draw other bits, by {jax.random.key_impl(key)}: leave "
            "jax_default_prng_impl at threefry2x32 and jax_threefry_partitionable at True"
        )
    first, second = words.tolist()
    return first, second


_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))


def _threefry(keys: np.ndarray, low: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The two words of Threefry-2x32 with 20 rounds (Salmon et al. 2011) for counters `(0, low)`.

    Args:
      keys: `[..., 2]` uint32.
      low: uint32, of a shape that broadcasts with `[...]`.
    """
    schedule = [keys[..., 0], keys[..., 1]]
    schedule.append(schedule[0] ^ schedule[1] ^ np.uint32(0x1BD11BDA))
    first = np.broadcast_to(schedule[0], np.broadcast_shapes(schedule[0].shape, low.shape))
    second = low + schedule[1]
    for group in range(5):
        for distance in _ROTATIONS[group % 2]:
            first = first + second
            second = (second << np.uint32(distance)) | (second >> np.uint32(32 - distance))
            second = second ^ first
        first = first + schedule[(group + 1) % 3]
        second = second + schedule[(group + 2) % 3] + np.uint32(group + 1)
    return first, second


def _child(keys: np.ndarray, number: int | np.ndarray) -> np.ndarray:
    """`jax.random.fold_in(key, number)`, which is `jax.random.split(key, n)[number]` too."""
    return np.stack(_threefry(keys, np.asarray(number).astype(np.uint32)), axis=-1)


def _bits(keys: np.ndarray, count: int) -> np.ndarray:
    """`jax.random.bits(key, (count,))` for each key, `[..., count]` uint32."""
    first, second = _threefry(keys[..., None, :], np.arange(count, dtype=np.uint32))
    return first ^ second


def _uniform(keys: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """`jax.random.uniform(key, (10,), float32, low, high)` for each key."""
    bits = (_bits(keys, _CROP_ATTEMPTS) >> np.uint32(9)) | np.float32(1).view(np.uint32)
    unit = bits.view(np.float32) - np.float32(1)
    return np.maximum(low, unit * (high - low) + low)


def _integer_bits(keys: np.ndarray) -> np.ndarray:
    """The bits of which `jax.random.randint` makes one integer, `[..., 2]` uint32."""
    return np.stack([_bits(_child(keys, half), 1)[..., 0] for half in (0, 1)], axis=-1)


def _integer(bits: np.ndarray, span: int) -> int:
    """The integer in `[0, span)` of `jax.random.randint`."""
    high, low = bits.tolist()
    multiplier = (2**16 % span) ** 2 % 2**32 % span
    return (high % span * multiplier % 2**32 + low % span) % 2**32 % span
