"""Views of features of a frozen encoder: stored views, noise and mask."""

import dataclasses
import logging
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from jevb_jax.images.batches import load_resident
from jevb_jax.images.source import ImageSource

_logger = logging.getLogger(__name__)

# A standard deviation below this share of the mean is rounding of float32: the column is constant.
_CONSTANT = 1e-6
_BLOCK_ROWS = 4096


class ColumnStatistics(NamedTuple):
    """Mean and standard deviation of each column of features.

    Attributes:
      mean: `[F]` float32.
      std: `[F]` float32; exactly 0 for a constant column.
    """

    mean: Array | np.ndarray
    std: Array | np.ndarray


def column_statistics(source: ImageSource) -> ColumnStatistics:
    """Statistics of the columns over all examples of a source, and over all their stored views.

    Args:
      source: features, usually of the training split.

    Returns:
      Arrays of NumPy, computed in float64.

    Raises:
      ValueError: all columns are constant.
    """
    values = load_resident(source)
    rows = values.reshape(-1, values.shape[-1])
    mean = rows.mean(axis=0, dtype=np.float64)
    squares = np.zeros_like(mean)
    for start in range(0, len(rows), _BLOCK_ROWS):  # a copy in float64 may not fit into memory
        squares += ((rows[start : start + _BLOCK_ROWS] - mean) ** 2).sum(axis=0)
    std = np.sqrt(squares / len(rows))
    std[std <= _CONSTANT * np.abs(mean)] = 0
    num_constant = int(np.sum(std == 0))
    if num_constant == len(std):
        raise ValueError(f"all {len(std)} columns of the features of {source.name} are constant")
    if num_constant:
        _logger.warning(
            "%d of %d columns of the features of %s are constant in the training split. They get no "
            "noise, and are zero where columns are standardized.",
            num_constant,
            len(std),
            source.name,
        )
    return ColumnStatistics(mean.astype(np.float32), std.astype(np.float32))


@dataclasses.dataclass(frozen=True, eq=False)
class FeatureView:
    """A random view of the features of one example: a stored view, noise and mask, in this order.

    The noise is Gaussian, independent for each column. A masked column has its mean, so it says
    nothing about the example. Noise or mask of size zero are not in the compiled program.

    Attributes:
      statistics: mean and deviation of each column in the training split.
      noise_scale: standard deviation of the noise, in standard deviations of the column; at least 0.
      mask_probability: probability of each column to be masked, in [0, 1).
    """

    statistics: ColumnStatistics
    noise_scale: float
    mask_probability: float

    @property
    def num_features(self) -> int:
        """Number of columns."""
        return len(self.statistics.mean)

    def __call__(self, key: Array, features: ArrayLike) -> Array:
        """One random view.

        Args:
          key: consumed.
          features: `[F]`, or `[V, F]`, of which one view is drawn.

        Returns:
          `[F]` float32.
        """
        return self.several(key, features, count=1)[0]

    def several(self, key: Array, features: ArrayLike, *, count: int) -> Array:
        """Random views of one example, of different stored views if there are any.

        Args:
          key: consumed.
          features: `[F]`; or `[V, F]` with `V >= count`.
          count: number of views.

        Returns:
          `[count, F]` float32.

        Raises:
          ValueError: there are fewer stored views than `count`.
        """
        values = jnp.asarray(features, jnp.float32)
        key_stored, key_noise, key_mask = jax.random.split(key, 3)
        if values.ndim == 1:
            views = jnp.broadcast_to(values, (count, *values.shape))
        elif len(values) < count:
            raise ValueError(f"{count} different views need as many stored ones, got {len(values)}")
        else:
            # Ranks of float32 draws: the program does not change with x64.
            order = jnp.argsort(jax.random.uniform(key_stored, (len(values),), jnp.float32))
            views = values[order[:count]]
        if self.noise_scale > 0:
            noise = jax.random.normal(key_noise, views.shape, jnp.float32)
            views = views + self.noise_scale * jnp.asarray(self.statistics.std)[None] * noise
        if self.mask_probability > 0:
            uniform = jax.random.uniform(key_mask, views.shape, jnp.float32)
            mean = jnp.asarray(self.statistics.mean)[None]
            views = jnp.where(uniform < self.mask_probability, mean, views)
        return views

    def plain(self, features: ArrayLike) -> Array:
        """What evaluation reads: `[F]` float32, the features themselves, or the first stored view."""
        values = jnp.asarray(features, jnp.float32)
        return values if values.ndim == 1 else values[0]
