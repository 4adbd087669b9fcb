"""Scores of one image's strangeness under JEVB; larger is more out of distribution.

Each is per example, `[N]`, in nats, of un-augmented images, without labels.
"""

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
