"""The place of the backbone where features of a frozen encoder are given."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from jevb_jax.networks.layers import check_sizes


class FrozenFeatures(nn.Module):
    """Passes features on, standardized by statistics of the training split. It has no parameters.

    Mean and standard deviation are `batch_stats`, so they are saved, exported and checked with the
    weights. They are set before the first step and never change. A column whose deviation is zero
    becomes zero.

    Attributes:
      num_features: F, at least 1.
      standardize: False passes features on as they are.

    Raises:
      ValueError: `num_features` is below one.
    """

    num_features: int
    standardize: bool = True

    def __post_init__(self) -> None:
        check_sizes(num_features=self.num_features)
        super().__post_init__()

    @nn.compact
    def __call__(self, features: jax.Array, *, train: bool) -> jax.Array:
        """Maps features `[batch, F]` to representations `[batch, F]`, float32."""
        del train  # nothing depends on the batch
        if features.ndim != 2 or features.shape[1] != self.num_features:
            raise ValueError(
                f"expected features [batch, {self.num_features}], got {features.shape}"
            )
        shape = (self.num_features,)
        mean = self.variable("batch_stats", "mean", jnp.zeros, shape, jnp.float32).value
        std = self.variable("batch_stats", "std", jnp.ones, shape, jnp.float32).value
        features = features.astype(jnp.float32)
        if not self.standardize:
            return features
        is_constant = std == 0
        scaled = (features - mean[None]) / jnp.where(is_constant, 1, std)[None]
        return jnp.where(is_constant[None], 0, scaled)
