"""Losses of five neighbors, as published, in the shape of the objective: named terms and a `loss`.

Stop-gradients are applied here, to targets. Where a method is per example so are its terms, `[batch]`;
VICReg and Barlow Twins couple the examples of a batch. All is float32 or wider. Equation numbers are
those of `docs/mathematics.md`.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Float, Real

from jevb_jax.paper import densities, domain, sphere

# Accelerators multiply float32 matrices in TensorFloat-32 or bfloat16 unless told otherwise.
_matmul = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


class SimSiamTerms(NamedTuple):
    """Cosine similarities, in [-1, 1].

    Attributes:
      similarity_2_given_1: of the prediction from view 1 with the target of view 2.
      similarity_1_given_2: of the prediction from view 2 with the target of view 1.
    """

    similarity_2_given_1: Float[Array, " batch"]
    similarity_1_given_2: Float[Array, " batch"]

    @property
    def loss(self) -> Float[Array, " batch"]:
        """Negative mean similarity, minimised."""
        return -(self.similarity_2_given_1 + self.similarity_1_given_2) / 2


class ByolTerms(NamedTuple):
    """Squared distances of unit vectors, in [0, 4].

    Attributes:
      distance_2_given_1: of the prediction from view 1 to the target of view 2.
      distance_1_given_2: of the prediction from view 2 to the target of view 1.
    """

    distance_2_given_1: Float[Array, " batch"]
    distance_1_given_2: Float[Array, " batch"]

    @property
    def loss(self) -> Float[Array, " batch"]:
        """Sum of both, minimised."""
        return self.distance_2_given_1 + self.distance_1_given_2


class VISimSiamTerms(NamedTuple):
    """Log-likelihoods of directions, nats, larger is better.

    Attributes:
      log_likelihood_2_given_1: of the target of view 2 under the prediction from view 1.
      log_likelihood_1_given_2: of the target of view 1 under the prediction from view 2.
    """

    log_likelihood_2_given_1: Float[Array, " batch"]
    log_likelihood_1_given_2: Float[Array, " batch"]

    @property
    def loss(self) -> Float[Array, " batch"]:
        """Negative mean log-likelihood, nats, minimised."""
        return -(self.log_likelihood_2_given_1 + self.log_likelihood_1_given_2) / 2


class VICRegTerms(NamedTuple):
    """Terms of VICReg, unweighted.

    Attributes:
      invariance: mean squared difference of the views over features.
      variance: how far standard deviations fall short of the target, mean over features and views.
      covariance: squared off-diagonal covariances over `D`, summed over views.
      invariance_weight: factor of the difference between the views.
      variance_weight: factor of the hinge on standard deviations.
      covariance_weight: factor of the squared covariances.
    """

    invariance: Float[Array, " batch"]
    variance: Float[Array, ""]
    covariance: Float[Array, ""]
    invariance_weight: float
    variance_weight: float
    covariance_weight: float

    @property
    def loss(self) -> Float[Array, ""]:
        """Weighted sum, minimised."""
        return (
            self.invariance_weight * jnp.mean(self.invariance)
            + self.variance_weight * self.variance
            + self.covariance_weight * self.covariance
        )


class BarlowTwinsTerms(NamedTuple):
    """Terms of Barlow Twins.

    Attributes:
      invariance: `sum_i (C_ii - 1)^2`.
      redundancy: `sum_i sum_(j != i) C_ij^2`, unweighted.
      redundancy_weight: factor of the squared correlations off the diagonal.
    """

    invariance: Float[Array, ""]
    redundancy: Float[Array, ""]
    redundancy_weight: float

    @property
    def loss(self) -> Float[Array, ""]:
        """Weighted sum, minimised."""
        return self.invariance + self.redundancy_weight * self.redundancy


def _matrices(
    minimum_batch: int = 0, **values: Real[ArrayLike, "batch D"]
) -> tuple[Float[Array, "batch D"], ...]:
    """The arguments as arrays of one shape, float32 or wider.

    Losses for each example take a batch of none, and give none.
    """
    arrays = sphere.at_least_float32(*values.values())
    domain.same_matrices(minimum_batch, **dict(zip(values, arrays, strict=True)))
    return arrays


def _unit(x: Array) -> Array:
    return sphere.polar_decomposition(x)[0]


def _unit_target(x: Array) -> Array:
    return jax.lax.stop_gradient(_unit(x))


def simsiam_loss(
    prediction_1: Real[ArrayLike, "batch D"],
    prediction_2: Real[ArrayLike, "batch D"],
    target_1: Real[ArrayLike, "batch D"],
    target_2: Real[ArrayLike, "batch D"],
) -> SimSiamTerms:
    """SimSiam's symmetric negative cosine (docs eq. 17; Chen and He 2021, eq. 1 and 4).

    Args:
      prediction_1: of the predictor on view 1; not normalized.
      prediction_2: on view 2.
      target_1: embedding of view 1; its gradient is stopped.
      target_2: of view 2.

    Returns:
      `SimSiamTerms`. A zero vector has similarity 0 to all.

    Raises:
      ValueError: shapes that differ or are not `[batch, D]`.
    """
    p_1, p_2, t_1, t_2 = _matrices(
        prediction_1=prediction_1, prediction_2=prediction_2, target_1=target_1, target_2=target_2
    )
    return SimSiamTerms(
        jnp.sum(_unit(p_1) * _unit_target(t_2), axis=-1),
        jnp.sum(_unit(p_2) * _unit_target(t_1), axis=-1),
    )


def byol_loss(
    prediction_1: Real[ArrayLike, "batch D"],
    prediction_2: Real[ArrayLike, "batch D"],
    target_1: Real[ArrayLike, "batch D"],
    target_2: Real[ArrayLike, "batch D"],
) -> ByolTerms:
    """BYOL's normalized squared error, both directions (docs eq. 18; Grill et al. 2020, eq. 2).

    Args:
      prediction_1: of the predictor on view 1; not normalized.
      prediction_2: on view 2.
      target_1: the averaged network's embedding of view 1. No gradient is asked of that
        network, but its gradient is stopped here too: the loss is then the same function of any target.
      target_2: of view 2.

    Returns:
      `ByolTerms`: `|p - t|^2` of unit vectors, which is `2 - 2 cos` without its cancellation.

    Raises:
      ValueError: shapes that differ or are not `[batch, D]`.
    """
    p_1, p_2, t_1, t_2 = _matrices(
        prediction_1=prediction_1, prediction_2=prediction_2, target_1=target_1, target_2=target_2
    )
    return ByolTerms(
        jnp.sum(jnp.square(_unit(p_1) - _unit_target(t_2)), axis=-1),
        jnp.sum(jnp.square(_unit(p_2) - _unit_target(t_1)), axis=-1),
    )


def vi_simsiam_loss(
    direction_1: Real[ArrayLike, "batch D"],
    concentration_1: Real[ArrayLike, " batch"],
    direction_2: Real[ArrayLike, "batch D"],
    concentration_2: Real[ArrayLike, " batch"],
    target_1: Real[ArrayLike, "batch D"],
    target_2: Real[ArrayLike, "batch D"],
) -> VISimSiamTerms:
    """VI-SimSiam's power spherical log-likelihood (docs eq. 19; Nakamura et al. 2023, arXiv 2203.11437).

    Args:
      direction_1: predicted from view 1, `D >= 2`; normalized here.
      concentration_1: at least zero, of that prediction.
      direction_2: predicted from view 2.
      concentration_2: at least zero, of that prediction.
      target_1: embedding of view 1; normalized here, its gradient stopped.
      target_2: of view 2.

    Returns:
      `VISimSiamTerms`, nats.

    Raises:
      ValueError: shapes that differ, `D < 2`, or a known concentration that is negative or not finite.
        Traced ones have the value NaN.
    """
    m_1, m_2, t_1, t_2 = _matrices(
        direction_1=direction_1, direction_2=direction_2, target_1=target_1, target_2=target_2
    )
    k_1, k_2 = sphere.at_least_float32(concentration_1, concentration_2)
    k_1 = domain.concentration("concentration_1", concentration_1, k_1)
    k_2 = domain.concentration("concentration_2", concentration_2, k_2)
    if not k_1.shape == k_2.shape == m_1.shape[:1]:
        raise ValueError(
            f"concentration_1 and concentration_2 must be [batch] = {m_1.shape[:1]}, got {k_1.shape} "
            f"and {k_2.shape}"
        )
    log_prob = densities.power_spherical_log_prob
    return VISimSiamTerms(
        log_prob(_unit_target(t_2), loc=_unit(m_1), concentration=k_1),
        log_prob(_unit_target(t_1), loc=_unit(m_2), concentration=k_2),
    )


def vicreg_loss(
    embedding_1: Real[ArrayLike, "batch D"],
    embedding_2: Real[ArrayLike, "batch D"],
    *,
    invariance_weight: float = 25.0,
    variance_weight: float = 25.0,
    covariance_weight: float = 1.0,
    target_std: float = 1.0,
    epsilon: float = 1e-4,
) -> VICRegTerms:
    """VICReg (docs eq. 20; Bardes et al. 2022, arXiv 2105.04906, eq. 1 to 6).

    The scale is that of the official code, to which the published weights belong: its variance term is
    the mean over the two views, where the paper sums them, and its invariance term the mean over
    features, where the paper sums those.

    The covariance term has the fourth power of the embedding, and overflows in float32 where entries
    exceed about 1e9.

    Args:
      embedding_1: of view 1, `batch >= 2`.
      embedding_2: of view 2. No gradient is stopped.
      invariance_weight: factor of the mean squared difference.
      variance_weight: what the hinge on standard deviations counts.
      covariance_weight: what the off-diagonal covariances count.
      target_std: standard deviation below which the hinge acts.
      epsilon: added to the variance under the root.

    Returns:
      `VICRegTerms`.

    Raises:
      ValueError: shapes that differ or are not `[batch, D]`; a batch of one or none; a known weight,
        `epsilon` or `target_std` that is negative or not finite.
    """
    views = _matrices(2, embedding_1=embedding_1, embedding_2=embedding_2)
    domain.weight("invariance_weight", invariance_weight)
    domain.weight("variance_weight", variance_weight)
    domain.weight("covariance_weight", covariance_weight)
    domain.weight("target_std", target_std)
    domain.weight("epsilon", epsilon)
    batch, dim = views[0].shape
    variance, covariance = [], []
    for view in views:
        centered = view - jnp.mean(view, axis=0, keepdims=True)
        matrix = _matmul(centered.T, centered) / (batch - 1)
        std = jnp.sqrt(jnp.diagonal(matrix) + epsilon)
        variance.append(jnp.mean(jax.nn.relu(target_std - std)))
        covariance.append(_off_diagonal_squares(matrix) / dim)
    return VICRegTerms(
        invariance=jnp.mean(jnp.square(views[0] - views[1]), axis=-1),
        variance=(variance[0] + variance[1]) / 2,
        covariance=covariance[0] + covariance[1],
        invariance_weight=invariance_weight,
        variance_weight=variance_weight,
        covariance_weight=covariance_weight,
    )


def barlow_twins_loss(
    embedding_1: Real[ArrayLike, "batch D"],
    embedding_2: Real[ArrayLike, "batch D"],
    *,
    redundancy_weight: float = 0.0051,
    epsilon: float = 1e-5,
) -> BarlowTwinsTerms:
    """Barlow Twins (docs eq. 21; Zbontar et al. 2021, arXiv 2103.03230, eq. 1 and 2).

    Each view is normalized over the batch as BatchNorm without scale and bias does it, in two passes.

    Args:
      embedding_1: of view 1, `batch >= 2`.
      embedding_2: of view 2. No gradient is stopped.
      redundancy_weight: what the off-diagonal correlations count.
      epsilon: added to the variance, BatchNorm's.

    Returns:
      `BarlowTwinsTerms`.

    Raises:
      ValueError: shapes that differ or are not `[batch, D]`; a batch of one or none; a known weight or
        `epsilon` that is negative or not finite.
    """
    views = _matrices(2, embedding_1=embedding_1, embedding_2=embedding_2)
    domain.weight("redundancy_weight", redundancy_weight)
    domain.weight("epsilon", epsilon)
    normalized = []
    for view in views:
        centered = view - jnp.mean(view, axis=0, keepdims=True)
        variance = jnp.mean(jnp.square(centered), axis=0, keepdims=True)
        normalized.append(centered * jax.lax.rsqrt(variance + epsilon))
    correlation = _matmul(normalized[0].T, normalized[1]) / views[0].shape[0]
    return BarlowTwinsTerms(
        invariance=jnp.sum(jnp.square(jnp.diagonal(correlation) - 1)),
        redundancy=_off_diagonal_squares(correlation),
        redundancy_weight=redundancy_weight,
    )


def _off_diagonal_squares(matrix: Array) -> Array:
    """Sum of the squares off the diagonal; not a difference of two sums, which could be negative."""
    return jnp.sum(jnp.square(matrix) * (1 - jnp.eye(matrix.shape[0], dtype=matrix.dtype)))
