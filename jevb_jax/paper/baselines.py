"""Losses of seven other methods as published, each as named terms with a `loss`.

The gradient of targets is stopped here. Terms are `[batch]` if the method has a loss for each
example; VICReg, Barlow Twins and EMP-SSL couple the examples of a batch. Results are float32 or float64.
Equation numbers are those of `docs/mathematics.md`.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Float, Real

from jevb_jax.paper import densities, domain, sphere

# By default accelerators multiply float32 matrices in TensorFloat-32 or bfloat16.
_matmul = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


class SimSiamTerms(NamedTuple):
    """Cosine similarities, in [-1, 1].

    Attributes:
      similarity_2_given_1: between the prediction from view 1 and the target of view 2.
      similarity_1_given_2: between the prediction from view 2 and the target of view 1.
    """

    similarity_2_given_1: Float[Array, " batch"]
    similarity_1_given_2: Float[Array, " batch"]

    @property
    def loss(self) -> Float[Array, " batch"]:
        """Negative mean similarity, to be minimized."""
        return -(self.similarity_2_given_1 + self.similarity_1_given_2) / 2


class ByolTerms(NamedTuple):
    """Squared distances of unit vectors, in [0, 4].

    Attributes:
      distance_2_given_1: between the prediction from view 1 and the target of view 2.
      distance_1_given_2: between the prediction from view 2 and the target of view 1.
    """

    distance_2_given_1: Float[Array, " batch"]
    distance_1_given_2: Float[Array, " batch"]

    @property
    def loss(self) -> Float[Array, " batch"]:
        """Sum of both distances, to be minimized."""
        return self.distance_2_given_1 + self.distance_1_given_2


class VISimSiamTerms(NamedTuple):
    """Log-likelihoods of directions, in nats; larger is better.

    Attributes:
      log_likelihood_2_given_1: for the target of view 2 and the prediction from view 1.
      log_likelihood_1_given_2: for the target of view 1 and the prediction from view 2.
    """

    log_likelihood_2_given_1: Float[Array, " batch"]
    log_likelihood_1_given_2: Float[Array, " batch"]

    @property
    def loss(self) -> Float[Array, " batch"]:
        """Negative mean log-likelihood, in nats, to be minimized."""
        return -(self.log_likelihood_2_given_1 + self.log_likelihood_1_given_2) / 2


class VICRegTerms(NamedTuple):
    """Terms of VICReg, without their weights.

    Attributes:
      invariance: squared difference of the views, mean over features.
      variance: how far standard deviations fall below one, mean over features and views.
      covariance: sum of squared off-diagonal covariances divided by `D`, summed over views.
      invariance_weight: weight of `invariance` in the loss.
      variance_weight: weight of `variance` in the loss.
      covariance_weight: weight of `covariance` in the loss.
    """

    invariance: Float[Array, " batch"]
    variance: Float[Array, ""]
    covariance: Float[Array, ""]
    invariance_weight: float
    variance_weight: float
    covariance_weight: float

    @property
    def loss(self) -> Float[Array, ""]:
        """Weighted sum, to be minimized."""
        return (
            self.invariance_weight * jnp.mean(self.invariance)
            + self.variance_weight * self.variance
            + self.covariance_weight * self.covariance
        )


class BarlowTwinsTerms(NamedTuple):
    """Terms of Barlow Twins, without the weight.

    Attributes:
      invariance: `sum_i (C_ii - 1)^2`.
      redundancy: `sum_i sum_(j != i) C_ij^2`.
      redundancy_weight: weight of `redundancy` in the loss.
    """

    invariance: Float[Array, ""]
    redundancy: Float[Array, ""]
    redundancy_weight: float

    @property
    def loss(self) -> Float[Array, ""]:
        """Weighted sum, to be minimized."""
        return self.invariance + self.redundancy_weight * self.redundancy


class FastSiamTerms(NamedTuple):
    """Cosine similarities of each view, in [-1, 1].

    Attributes:
      similarity: between the prediction from a view and the mean target of the other views.
    """

    similarity: Float[Array, "views batch"]

    @property
    def loss(self) -> Float[Array, " batch"]:
        """Negative mean similarity over views, to be minimized."""
        return -jnp.mean(self.similarity, axis=0)


class EmpSslTerms(NamedTuple):
    """Terms of EMP-SSL, without the weight; both grow as the loss falls.

    Attributes:
      similarity: cosine between a crop and the mean over crops, mean over crops.
      coding_rate: nats for the directions of a batch, mean over crops.
      invariance_weight: weight of `similarity` in the loss.
    """

    similarity: Float[Array, " batch"]
    coding_rate: Float[Array, ""]
    invariance_weight: float

    @property
    def loss(self) -> Float[Array, ""]:
        """Negative weighted sum, to be minimized."""
        return -self.invariance_weight * jnp.mean(self.similarity) - self.coding_rate


def _matrices(
    minimum_batch: int = 0, **values: Real[ArrayLike, "batch D"]
) -> tuple[Float[Array, "batch D"], ...]:
    """The arguments as arrays of one shape, at least float32.

    Losses with one value for each example also accept an empty batch, and return no values.
    """
    arrays = sphere.at_least_float32(*values.values())
    domain.same_matrices(minimum_batch, **dict(zip(values, arrays, strict=True)))
    return arrays


def _positive(name: str, given: ArrayLike, like: Array) -> Array:
    """A setting that must be positive, in the type of `like`. At zero, a gradient would be NaN."""
    (value,) = sphere.at_least_float32(given)
    return domain.positive(name, given, value).astype(like.dtype)


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

    A zero vector has similarity 0 to every vector.

    Args:
      prediction_1: output of the predictor for view 1; need not be normalized.
      prediction_2: output of the predictor for view 2.
      target_1: embedding of view 1. Its gradient is stopped.
      target_2: embedding of view 2. Its gradient is stopped.

    Raises:
      ValueError: shapes differ or are not `[batch, D]`.
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
    """BYOL's normalized squared error in both directions (docs eq. 18; Grill et al. 2020, eq. 2).

    The distance `|p - t|^2` of unit vectors equals `2 - 2 cos`, but does not lose digits.

    Args:
      prediction_1: output of the predictor for view 1; need not be normalized.
      prediction_2: output of the predictor for view 2.
      target_1: embedding of view 1 by the averaged network. Its gradient is stopped, so the loss is
        the same function for every kind of target.
      target_2: embedding of view 2 by the averaged network. Its gradient is stopped.

    Raises:
      ValueError: shapes differ or are not `[batch, D]`.
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
    """VI-SimSiam's power spherical log-likelihood (docs eq. 19; Nakamura et al. 2023).

    The paper is arXiv 2203.11437.

    Args:
      direction_1: direction predicted from view 1, `D >= 2`; it is normalized here.
      concentration_1: concentration predicted from view 1, at least zero.
      direction_2: direction predicted from view 2.
      concentration_2: concentration predicted from view 2.
      target_1: embedding of view 1; it is normalized here, and its gradient is stopped.
      target_2: embedding of view 2.

    Raises:
      ValueError: shapes differ, `D < 2`, or a known concentration is negative or not finite. A
        traced one gives NaN.
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
    epsilon: float = 1e-4,
) -> VICRegTerms:
    """VICReg (docs eq. 20; Bardes et al. 2022, arXiv 2105.04906, eq. 1 to 6).

    The published weights belong to the official code, so the scale is that of the code. Its
    variance term is the mean over the two views, where the paper has the sum, and its invariance
    term is the mean over features, where the paper has the sum.

    The covariance term contains the fourth power of the embedding. In float32 it overflows if
    entries exceed about 1e9.

    Args:
      embedding_1: embedding of view 1, `batch >= 2`.
      embedding_2: embedding of view 2. No gradient is stopped.
      invariance_weight: weight of the mean squared difference.
      variance_weight: weight of the hinge on standard deviations.
      covariance_weight: weight of the off-diagonal covariances.
      epsilon: added to the variance before the square root, positive.

    Raises:
      ValueError: shapes differ or are not `[batch, D]`, the batch has fewer than two examples, or a
        known weight is negative or not finite, or a known `epsilon` is not positive and finite.
    """
    views = _matrices(2, embedding_1=embedding_1, embedding_2=embedding_2)
    domain.weight("invariance_weight", invariance_weight)
    domain.weight("variance_weight", variance_weight)
    domain.weight("covariance_weight", covariance_weight)
    added = _positive("epsilon", epsilon, views[0])
    batch, dim = views[0].shape
    variance, covariance = [], []
    for view in views:
        centered = view - jnp.mean(view, axis=0, keepdims=True)
        matrix = _matmul(centered.T, centered) / (batch - 1)
        std = jnp.sqrt(jnp.diagonal(matrix) + added)
        variance.append(jnp.mean(jax.nn.relu(1 - std)))
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

    Each view is normalized over the batch like BatchNorm without scale and bias, in two passes.

    Args:
      embedding_1: embedding of view 1, `batch >= 2`.
      embedding_2: embedding of view 2. No gradient is stopped.
      redundancy_weight: weight of the off-diagonal correlations.
      epsilon: added to the variance, as in BatchNorm; positive.

    Raises:
      ValueError: shapes differ or are not `[batch, D]`, the batch has fewer than two examples, or a
        known weight is negative or not finite, or a known `epsilon` is not positive and finite.
    """
    views = _matrices(2, embedding_1=embedding_1, embedding_2=embedding_2)
    domain.weight("redundancy_weight", redundancy_weight)
    added = _positive("epsilon", epsilon, views[0])
    normalized = []
    for view in views:
        centered = view - jnp.mean(view, axis=0, keepdims=True)
        variance = jnp.mean(jnp.square(centered), axis=0, keepdims=True)
        normalized.append(centered * jax.lax.rsqrt(variance + added))
    correlation = _matmul(normalized[0].T, normalized[1]) / views[0].shape[0]
    return BarlowTwinsTerms(
        invariance=jnp.sum(jnp.square(jnp.diagonal(correlation) - 1)),
        redundancy=_off_diagonal_squares(correlation),
        redundancy_weight=redundancy_weight,
    )


def _off_diagonal_squares(matrix: Array) -> Array:
    """Sum of squares off the diagonal. A difference of two sums could become negative."""
    return jnp.sum(jnp.square(matrix) * (1 - jnp.eye(matrix.shape[0], dtype=matrix.dtype)))


def fastsiam_loss(
    predictions: Real[ArrayLike, "views batch D"], targets: Real[ArrayLike, "full batch D"]
) -> FastSiamTerms:
    """FastSiam's negative cosine to a mean target (docs eq. 40; Pototzky et al. 2022).

    The target of a view is the mean of the other views' embeddings, which are not normalized
    before it. With two views, this is SimSiam.

    Args:
      predictions: outputs of the predictor for the full views, in the order of `targets`, then for
        small crops. The target of a crop is the mean over all full views.
      targets: embeddings of the full views, at least two. Their gradients are stopped.

    Raises:
      ValueError: shapes do not fit, or there are fewer than two targets.
    """
    p, t = sphere.at_least_float32(predictions, targets)
    if p.ndim != 3 or t.ndim != 3 or p.shape[1:] != t.shape[1:] or not 2 <= len(t) <= len(p):
        raise ValueError(
            "fastsiam_loss needs predictions [views, batch, D] and targets [full, batch, D] with "
            f"2 <= full <= views, got {p.shape} and {t.shape}"
        )
    is_other = ~np.eye(len(p), len(t), dtype=bool)
    share = jnp.asarray(is_other / is_other.sum(axis=1, keepdims=True), t.dtype)
    mean = jnp.einsum("vt,tbd->vbd", share, t, precision=jax.lax.Precision.HIGHEST)
    return FastSiamTerms(jnp.sum(_unit(p) * _unit_target(mean), axis=-1))


def emp_ssl_loss(
    embeddings: Real[ArrayLike, "crops batch D"],
    *,
    invariance_weight: float = 200.0,
    squared_epsilon: float = 0.2,
) -> EmpSslTerms:
    """EMP-SSL (docs eq. 41; Tong et al. 2023, arXiv 2304.03977), as in the official code.

    Args:
      embeddings: of all crops; they are normalized here. No gradient is stopped.
      invariance_weight: weight of the similarity to the mean over crops.
      squared_epsilon: squared distortion of the coding rate. The official code calls it `eps`.

    Raises:
      ValueError: not three axes, fewer than two crops, no examples, a known weight that is negative
        or not finite, or a known `squared_epsilon` that is not positive and finite.
    """
    (z,) = sphere.at_least_float32(embeddings)
    if z.ndim != 3 or len(z) < 2 or z.shape[1] < 1:
        raise ValueError(
            "embeddings must be [crops, batch, D] with 2 crops or more of at least 1 example, got "
            f"{z.shape}"
        )
    domain.weight("invariance_weight", invariance_weight)
    squared = _positive("squared_epsilon", squared_epsilon, z)
    z = _unit(z)
    similarity = jnp.sum(z * _unit(jnp.mean(z, axis=0))[None], axis=-1)
    batch, dim = z.shape[1:]
    transposed = jnp.swapaxes(z, 1, 2)
    # det(I + a Z^T Z) = det(I + a Z Z^T) (Sylvester): take the smaller of the two matrices.
    gram = _matmul(z, transposed) if batch < dim else _matmul(transposed, z)
    matrix = jnp.eye(gram.shape[-1], dtype=z.dtype)[None] + dim / batch / squared * gram
    factor = jnp.linalg.cholesky(matrix)
    # Half the log-determinant is the sum of the logarithms of the factor's diagonal.
    rate = jnp.sum(jnp.log(jnp.diagonal(factor, axis1=1, axis2=2)), axis=-1)
    return EmpSslTerms(jnp.mean(similarity, axis=0), jnp.mean(rate), invariance_weight)
