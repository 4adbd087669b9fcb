"""Scores of one image's strangeness under a model; larger is more out of distribution.

Each is per example, `[N]`, of un-augmented images, without labels.
"""

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jevb_jax import distributions


def negative_kl_score(
    posterior_mean: ArrayLike, posterior_scale: ArrayLike, *, prior_scale: float = 1.0
) -> Array:
    """`-KL(q(z | h) || p(z))`: high where the image moves the posterior little from the prior.

    Args:
      posterior_mean: `[N, D]`.
      posterior_scale: `[N, D]`.
      prior_scale: of the prior.

    Returns:
      `[N]`, nats.
    """
    return -distributions.gaussian_kl_divergence(
        posterior_mean, posterior_scale, prior_scale=prior_scale
    )


def negative_concentration_score(concentration: ArrayLike) -> Array:
    """VI-SimSiam's uncertainty, `-k` (Nakamura et al. 2023): high where the direction is unsure.

    Args:
      concentration: `[N]`, positive.

    Returns:
      `[N]`.
    """
    return -jnp.asarray(concentration)
