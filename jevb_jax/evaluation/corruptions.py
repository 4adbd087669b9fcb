"""Corrupted copies of images: out-of-distribution sets that need no download.

Each corruption is a pure function `(key, image float32 [h, w, c] in [0, 1], *, severity) -> image`,
with severity 1 to 5, after Hendrycks and Dietterich (2019) where they have one of the name.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

NUM_SEVERITIES = 5
_NOISE_STD = (0.04, 0.08, 0.12, 0.18, 0.26)
_CONTRAST = (0.75, 0.5, 0.4, 0.3, 0.15)
_TILES = (2, 2, 4, 4, 8)


def _level(table: tuple[float, ...], severity: int) -> float:
    if not 1 <= severity <= NUM_SEVERITIES:
        raise ValueError(f"severity must be 1 to {NUM_SEVERITIES}, got {severity}")
    return table[severity - 1]


def gaussian_noise(key: Array, image: Array, *, severity: int) -> Array:
    """Adds independent Gaussian noise to every value."""
    noise = jax.random.normal(key, image.shape, image.dtype)
    return jnp.clip(image + _level(_NOISE_STD, severity) * noise, 0, 1)


def contrast(key: Array, image: Array, *, severity: int) -> Array:
    """Pulls every value towards the image's mean of its channel."""
    del key
    mean = jnp.mean(image, axis=(0, 1), keepdims=True)
    return mean + _level(_CONTRAST, severity) * (image - mean)


def patch_shuffle(key: Array, image: Array, *, severity: int) -> Array:
    """Permutes square tiles: local texture stays, global shape goes.

    Raises:
      ValueError: the image's sides do not divide into the tiles.
    """
    tiles = int(_level(_TILES, severity))
    height, width, channels = image.shape
    if height % tiles or width % tiles:
        raise ValueError(f"patch_shuffle needs sides that {tiles} divides, got {height} x {width}")
    shape = (tiles, height // tiles, tiles, width // tiles, channels)
    patches = image.reshape(shape).swapaxes(1, 2).reshape(tiles * tiles, *shape[1::2], channels)
    patches = jax.random.permutation(key, patches, axis=0)
    return patches.reshape(tiles, tiles, *shape[1::2], channels).swapaxes(1, 2).reshape(image.shape)


CORRUPTIONS: dict[str, Callable[..., Array]] = {
    "contrast": contrast,
    "gaussian_noise": gaussian_noise,
    "patch_shuffle": patch_shuffle,
}


def corrupt(images: np.ndarray, name: str, *, severity: int, seed: int) -> np.ndarray:
    """Corrupts every image, each with a key of its own.

    Args:
      images: `[N, h, w, c]` uint8.
      name: one of `CORRUPTIONS`.
      severity: 1 (mild) to 5.
      seed: of the keys.

    Returns:
      `[N, h, w, c]` uint8.

    Raises:
      ValueError: unknown name, or a severity out of range.
    """
    if name not in CORRUPTIONS:
        raise ValueError(f"corruption must be one of {sorted(CORRUPTIONS)}, got {name!r}")

    @jax.jit
    def apply(keys: Array, batch: Array) -> Array:
        def one(key: Array, image: Array) -> Array:
            corrupted = CORRUPTIONS[name](key, image.astype(jnp.float32) / 255, severity=severity)
            return jnp.round(corrupted * 255).astype(jnp.uint8)

        return jax.vmap(one)(keys, batch)

    return np.asarray(apply(jax.random.split(jax.random.key(seed), len(images)), images))
