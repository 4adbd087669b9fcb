"""Random views of images: the operations of `pixels` with random parameters."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from jevb_jax.images.crop_boxes import sample_crop
from jevb_jax.images.pixels import (
    Adjustment,
    Interpolation,
    blend,
    check_interpolation,
    from_planes,
    gaussian_blur,
    luma,
    normalize,
    resized_crop,
    solarize,
    to_float,
    to_grayscale,
    to_planes,
    turn_hue,
)
from jevb_jax.paper import domain
from jevb_jax.xla_options import jit_once


def random_resized_crop(
    key: Array,
    image: ArrayLike,
    *,
    size: int,
    scale: tuple[float, float] = (0.2, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    interpolation: Interpolation = "bilinear",
    flip_probability: float = 0.0,
) -> Array:
    """Crops a random box (see `sample_crop`), resizes it, and mirrors it with a probability.

    Args:
      key: consumed.
      image: `[h, w, c]`.
      size: height and width of the result in pixels.
      scale: range of the box's share of the image area.
      ratio: range of width / height.
      interpolation: "bilinear" or "bicubic".
      flip_probability: probability to exchange left and right. The resize includes it at no cost.

    Returns:
      `[size, size, c]` float32.
    """
    image = to_float(image)
    key_crop, key_flip = jax.random.split(key)
    box = sample_crop(
        key_crop, height=image.shape[0], width=image.shape[1], scale=scale, ratio=ratio
    )
    flip = _bernoulli(key_flip, flip_probability) if flip_probability > 0 else False
    return resized_crop(image, *box, size=size, interpolation=interpolation, flip=flip)


def _bernoulli(key: Array, probability: float) -> Array:
    """A random bool, drawn in float32, so that x64 does not change it."""
    return jax.random.bernoulli(key, jnp.asarray(probability, jnp.float32))


def _apply_with_probability(
    key: Array, image: Array, transform: Callable[[Array], Array], probability: float
) -> Array:
    """`transform(image)` with a probability; 0 and 1 are decided when the function is traced."""
    if probability <= 0:
        return image
    changed = transform(image)
    if probability >= 1:
        return changed
    is_changed = _bernoulli(key, probability)
    return from_planes(jnp.where(is_changed, to_planes(changed), to_planes(image)))


def random_horizontal_flip(key: Array, image: ArrayLike, *, probability: float = 0.5) -> Array:
    """Mirrors left to right with a probability. `[h, w, c]`."""
    return _apply_with_probability(key, to_float(image), lambda x: x[:, ::-1], probability)


def color_jitter(
    key: Array,
    image: ArrayLike,
    *,
    brightness: float = 0.4,
    contrast: float = 0.4,
    saturation: float = 0.4,
    hue: float = 0.1,
    probability: float = 0.8,
) -> Array:
    """Changes brightness, contrast, saturation and hue by random factors in random order.

    Args:
      key: consumed.
      image: `[h, w, c]`. Only brightness and contrast change unless it has three channels.
      brightness: at least 0; the factor is uniform in `[max(0, 1 - brightness), 1 + brightness]`.
      contrast: at least 0, used like `brightness`.
      saturation: at least 0, used like `brightness`.
      hue: at most 0.5; the shift is uniform in `[-hue, hue]`, in turns of the color circle.
      probability: probability that anything changes, in [0, 1].

    Returns:
      `[h, w, c]` float32.
    """
    image = to_float(image)
    key_apply, key_order, key_factors = jax.random.split(key, 3)
    ranges: list[tuple[Adjustment, float, float]] = [
        ("brightness", max(0.0, 1 - brightness), 1 + brightness),
        ("contrast", max(0.0, 1 - contrast), 1 + contrast),
        ("saturation", max(0.0, 1 - saturation), 1 + saturation),
        ("hue", -hue, hue),
    ]
    if image.shape[-1] != 3:
        ranges = ranges[:2]
    active = [one for one in ranges if one[1] < one[2]]
    if not active or probability <= 0:
        return image
    uniform = jax.random.uniform(key_factors, (len(active),), jnp.float32)
    factors = jnp.stack(
        [low + uniform[i] * (high - low) for i, (_, low, high) in enumerate(active)]
    )
    order = jax.random.permutation(key_order, len(active))
    names: list[Adjustment] = [name for name, _, _ in active]

    def jitter(image: Array) -> Array:
        return from_planes(_adjust_in_order(to_planes(image), names, factors, order))

    return _apply_with_probability(key_apply, image, jitter, probability)


def _adjust_in_order(
    planes: Array, names: Sequence[Adjustment], factors: Array, order: Array
) -> Array:
    """Adjusts colors in an order that is known only when the program runs.

    Under vmap a branch computes all its cases. Every adjustment at every position would be 16
    computations. Brightness, contrast and saturation are each a blend, with black, with the mean
    or with the gray image. So one blend at each position is enough, and the hue is turned once,
    between the blends before it and the blends after it.

    Args:
      planes: `[c, h, w]`.
      names: the adjustments, each once.
      factors: `[len(names)]`, in the order of `names`.
      order: `[len(names)]`, positions in `names` in the order in which the adjustments act.

    Returns:
      `[c, h, w]`.
    """

    def is_at(position: int, name: Adjustment) -> Array | bool:
        return order[position] == names.index(name) if name in names else False

    def blend_at(planes: Array, position: int, is_active: Array | bool) -> Array:
        """The blend at a position. A blend with black by the factor one changes no bit."""
        gray = luma(planes)
        other = jnp.where(is_at(position, "saturation"), gray, jnp.zeros_like(gray))
        other = jnp.where(is_at(position, "contrast"), jnp.mean(gray), other)
        return blend(
            planes,
            jnp.where(is_active, other, jnp.zeros_like(other)),
            jnp.where(is_active, factors[order[position]], jnp.ones_like(factors[0])),
        )

    last = len(names) - 1
    if "hue" not in names:
        for position in range(last + 1):
            planes = blend_at(planes, position, True)
        return planes
    hue = names.index("hue")
    hue_position = jnp.argmax(order == hue)
    for position in range(last):
        planes = blend_at(planes, position, position < hue_position)
    planes = turn_hue(planes, factors[hue])
    for position in range(1, last + 1):
        planes = blend_at(planes, position, position > hue_position)
    return planes


def random_grayscale(key: Array, image: ArrayLike, *, probability: float = 0.2) -> Array:
    """Removes color with a probability, where there are three channels. `[h, w, c]`."""
    image = to_float(image)
    if image.shape[-1] != 3:
        return image
    return _apply_with_probability(key, image, to_grayscale, probability)


def random_gaussian_blur(
    key: Array,
    image: ArrayLike,
    *,
    kernel_size: int,
    sigma: tuple[float, float] = (0.1, 2.0),
    probability: float = 0.5,
) -> Array:
    """Blurs `[h, w, c]` with a probability; the width in pixels is uniform in `sigma`."""
    key_apply, key_sigma = jax.random.split(key)
    width = jax.random.uniform(key_sigma, (), jnp.float32, minval=sigma[0], maxval=sigma[1])
    return _apply_with_probability(
        key_apply,
        to_float(image),
        lambda x: gaussian_blur(x, width, kernel_size=kernel_size),
        probability,
    )


def random_solarize(
    key: Array, image: ArrayLike, *, threshold: float = 0.5, probability: float = 0.2
) -> Array:
    """Solarizes with a probability. `[h, w, c]`."""
    return _apply_with_probability(
        key, to_float(image), lambda x: solarize(x, threshold=threshold), probability
    )


@dataclasses.dataclass(frozen=True)
class ViewAugmentation:
    """One augmented view: crop, flip, jitter, gray, blur, solarize, normalize, in this order.

    The order is that of SimSiam (Chen and He 2021) and BYOL (Grill et al. 2020). If the probability
    or strength of an operation is zero, the operation is not in the compiled program.

    Attributes:
      size: height and width of the view in pixels.
      mean: subtracted from the pixels, one value for each channel.
      std: the pixels are divided by it, one positive value for each channel.
      crop_scale: range of the crop's share of the image area, within (0, 1].
      crop_ratio: range of the crop's width / height.
      interpolation: "bilinear" or "bicubic", both antialiased.
      flip_probability: probability to exchange left and right.
      jitter_probability: probability that colors change at all.
      brightness: strength, at least 0.
      contrast: strength, at least 0.
      saturation: strength, at least 0.
      hue: strength, in [0, 0.5].
      grayscale_probability: probability to remove color.
      blur_probability: probability to blur.
      blur_sigma: range of the standard deviation of the blur, in pixels.
      blur_kernel_size: number of taps, odd. 0 takes the odd number nearest to a tenth of `size`, at
        least 3.
      solarize_probability: probability to invert bright values.
      solarize_threshold: values at or above it are inverted, in [0, 1].

    Raises:
      ValueError: a value is out of range.
    """

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_scale: tuple[float, float] = (0.2, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    interpolation: Interpolation = "bilinear"
    flip_probability: float = 0.5
    jitter_probability: float = 0.8
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.4
    hue: float = 0.1
    grayscale_probability: float = 0.2
    blur_probability: float = 0.0
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    blur_kernel_size: int = 0
    solarize_probability: float = 0.0
    solarize_threshold: float = 0.5

    def __post_init__(self) -> None:
        """Checks every range."""
        check_interpolation(self.interpolation)
        for name, minimum in (("size", 1), ("blur_kernel_size", 0)):
            count = domain.whole_number(name, getattr(self, name), minimum)
            object.__setattr__(self, name, count)
        if not self.mean or len(self.mean) != len(self.std):
            raise ValueError(
                f"mean and std need one value for each channel, got {self.mean} and {self.std}"
            )
        if not all(0 < std < math.inf for std in self.std):
            raise ValueError(f"std must be positive and finite, got {self.std}")
        if not all(math.isfinite(mean) for mean in self.mean):
            raise ValueError(f"mean must be finite, got {self.mean}")
        low, high = self.crop_scale
        if not 0 < low <= high <= 1:
            raise ValueError(f"crop_scale must be a range within (0, 1], got {self.crop_scale}")
        for name in ("crop_ratio", "blur_sigma"):
            low, high = getattr(self, name)
            if not 0 < low <= high < math.inf:
                raise ValueError(f"{name} must be a positive, finite range, got {(low, high)}")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name.endswith("_probability") and not 0 <= value <= 1:
                raise ValueError(f"{field.name} must be in [0, 1], got {value}")
        for name in ("brightness", "contrast", "saturation", "hue"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be at least 0 and finite, got {getattr(self, name)}")
        if self.hue > 0.5:
            raise ValueError(f"hue must be in [0, 0.5], got {self.hue}")
        if math.isnan(self.solarize_threshold):
            raise ValueError("solarize_threshold must be a number, got nan")
        if self.blur_kernel_size and self.blur_kernel_size % 2 == 0:
            raise ValueError(f"blur_kernel_size must be 0 or odd, got {self.blur_kernel_size}")

    @property
    def skipped(self) -> tuple[str, ...]:
        """Names of color operations that are asked for, but need red, green and blue."""
        asked = {
            "saturation": self.saturation and self.jitter_probability,
            "hue": self.hue and self.jitter_probability,
            "grayscale_probability": self.grayscale_probability,
        }
        return tuple(name for name, value in asked.items() if value and len(self.mean) != 3)

    @property
    def _kernel_size(self) -> int:
        return self.blur_kernel_size or max(3, 2 * round((self.size / 10 - 1) / 2) + 1)

    def __call__(self, key: Array, image: ArrayLike) -> Array:
        """Makes one view of one image.

        Args:
          key: consumed.
          image: `[h, w, c]` uint8, uint16, or float in [0, 1].

        Returns:
          `[size, size, c]` float32, normalized.
        """
        keys = jax.random.split(key, 5)
        view = random_resized_crop(
            keys[0],
            image,
            size=self.size,
            scale=self.crop_scale,
            ratio=self.crop_ratio,
            interpolation=self.interpolation,
            flip_probability=self.flip_probability,
        )
        return self._colored(keys, view)

    def of_crop(self, key: Array, crop: ArrayLike) -> Array:
        """Makes the view of which the host has cut out the crop (`crop_boxes.HostCrops`).

        Args:
          key: consumed; everything but the crop is as in a call with this key.
          crop: `[size, size, c]` uint8, uint16, or float in [0, 1].

        Returns:
          `[size, size, c]` float32, normalized.
        """
        keys = jax.random.split(key, 5)
        key_flip = jax.random.split(keys[0])[1]
        view = random_horizontal_flip(key_flip, crop, probability=self.flip_probability)
        return self._colored(keys, view)

    def _colored(self, keys: Array, view: Array) -> Array:
        """All that follows the crop and the flip."""
        _, key_jitter, key_gray, key_blur, key_solarize = keys
        view = color_jitter(
            key_jitter,
            view,
            brightness=self.brightness,
            contrast=self.contrast,
            saturation=self.saturation,
            hue=self.hue,
            probability=self.jitter_probability,
        )
        view = random_grayscale(key_gray, view, probability=self.grayscale_probability)
        if self.blur_probability > 0:
            view = random_gaussian_blur(
                key_blur,
                view,
                kernel_size=self._kernel_size,
                sigma=self.blur_sigma,
                probability=self.blur_probability,
            )
        view = random_solarize(
            key_solarize,
            view,
            threshold=self.solarize_threshold,
            probability=self.solarize_probability,
        )
        return normalize(view, mean=self.mean, std=self.std)


def augment(keys: Array, images: ArrayLike, augmentation: Callable[[Array, Array], Array]) -> Array:
    """Makes one view of every image of a batch.

    Args:
      keys: `[batch]`, one key for each image, so that a view does not depend on the other images.
      images: `[batch, h, w, c]`.
      augmentation: the augmentation of all images.

    Returns:
      `[batch, size, size, c]` float32.
    """
    return jax.vmap(augmentation)(keys, jnp.asarray(images))


def multi_view(
    keys: Array,
    images: ArrayLike | tuple[ArrayLike, ...],
    augmentations: Sequence[ViewAugmentation],
) -> tuple[Array, ...]:
    """Makes several views of every image of a batch, for example two views and smaller crops.

    Args:
      keys: `[batch]` keys; view `v` of an image uses `fold_in(key, v)`.
      images: `[batch, h, w, c]`; or a tuple with the crops of each view that the host has cut out,
        `[batch, size, size, c]`.
      augmentations: one for each view; their sizes may differ.

    Returns:
      One `[batch, size, size, c]` float32 for each view.
    """
    views: dict[int, Array] = {}
    for augmentation, alike in _alike(augmentations).items():
        make = augmentation.of_crop if isinstance(images, tuple) else augmentation
        if len(alike) <= 2:
            for index in alike:
                own_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, index)
                own = images[index] if isinstance(images, tuple) else images
                views[index] = augment(own_keys, own, make)
            continue
        # One program for all of them: it compiles as fast as one view.
        fold_in = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))
        own_keys = fold_in(keys, jnp.asarray(alike))
        if isinstance(images, tuple):
            crops = jnp.stack([jnp.asarray(images[index]) for index in alike], axis=1)
            joint = jax.vmap(jax.vmap(make))(own_keys, crops)
        else:
            joint = jax.vmap(jax.vmap(make, (0, None)))(own_keys, jnp.asarray(images))
        views |= {index: joint[:, number] for number, index in enumerate(alike)}
    return tuple(views[index] for index in range(len(augmentations)))


def _alike(augmentations: Sequence[ViewAugmentation]) -> dict[ViewAugmentation, list[int]]:
    """The numbers of the views that each augmentation makes."""
    found: dict[ViewAugmentation, list[int]] = {}
    for index, augmentation in enumerate(augmentations):
        found.setdefault(augmentation, []).append(index)
    return found


def visible_views(
    images: ArrayLike | tuple[ArrayLike, ...],
    augmentations: Sequence[ViewAugmentation],
    *,
    seed: int = 0,
) -> list[np.ndarray]:
    """Views of a few images for people to look at, without normalization.

    Args:
      images: `[N, h, w, c]`, or the crops of each view, as for `multi_view`.
      augmentations: one for each view.
      seed: sets the random views.

    Returns:
      `[N, size, size, c]` in [0, 1] for each view.
    """
    keys = jax.random.split(jax.random.key(seed), len(jax.tree.leaves(images)[0]))
    # Compile the whole: single operations take two to four times as long.
    views = jit_once(functools.partial(multi_view, augmentations=augmentations))(keys, images)
    return [
        np.clip(np.asarray(view) * np.asarray(one.std) + np.asarray(one.mean), 0, 1)
        for view, one in zip(views, augmentations, strict=True)
    ]
