"""Numbers that say whether representations and posteriors are alive."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from jevb_jax.paper import densities, domain, sphere
from jevb_jax.paper.objective import ElboTerms

# A scale is `softplus(raw) + min_scale`. Below this many times `min_scale`, the part that the network
# can move is less than a tenth of the floor.
FLOOR_MARGIN = 1.1


class PosteriorSummary(NamedTuple):
    """What the posteriors of a set of images look like, one number each, `[]`.

    Attributes:
      scale_mean: mean standard deviation, over images and features.
      scale_anisotropy: mean over images of the standard deviation over features of `log scale`:
        0 when every feature is equally uncertain.
      scale_spread: standard deviation over images of the mean over features of `log scale`: 0 when
        every image is equally uncertain, and then the uncertainty cannot rank images.
      mean_rms: root mean square of the posterior means, near the prior's scale when the latent
        is used in full, 0 when the posterior has fallen onto the prior's mean.
      kl_per_dimension: mean over images of `KL(q || p) / D`, nats per dimension; 0 on posterior
        collapse.
      signal_to_noise: mean over images of `|mu| / sqrt(sum_i sigma_i^2)`: near 0 the direction of a
        sample tells nothing about the image.
    """

    scale_mean: Array
    scale_anisotropy: Array
    scale_spread: Array
    mean_rms: Array
    kl_per_dimension: Array
    signal_to_noise: Array


def _as_matrix(name: str, values: ArrayLike) -> Array:
    (matrix,) = sphere.at_least_float32(values)
    if matrix.ndim != 2 or matrix.shape[0] < 2:
        raise ValueError(f"{name} must be [N, D] with at least 2 images, got shape {matrix.shape}")
    return matrix


def embedding_std(embedding: ArrayLike) -> Array:
    """Spread of the directions, SimSiam's collapse signal (Chen and He 2021, figure 2).

    The standard deviation over images of each coordinate of `h / |h|`, averaged over coordinates,
    times `sqrt(D)`.

    Args:
      embedding: `[N, D]`, `N >= 2`. A zero vector counts as the direction zero.

    Returns:
      `[]`, in `[0, 1]`: 1 when the directions fill the sphere evenly, 0 when they are all the same.
      It does not see dimensional collapse onto a few axes as zero: read it with `effective_rank`.

    Raises:
      ValueError: not two axes, or fewer than two images.
    """
    direction, _ = sphere.polar_decomposition(_as_matrix("embedding", embedding))
    return jnp.mean(jnp.std(direction, axis=0)) * float(np.sqrt(direction.shape[-1]))


def effective_rank(embedding: ArrayLike) -> Array:
    """Exponential of the entropy of the normalized singular values (Roy and Vetterli 2007).

    `exp(-sum_i p_i log p_i)` with `p_i = sigma_i / sum_j sigma_j`. It is RankMe (Garrido et al. 2023,
    eq. 1) of the centered embedding, without the paper's 1e-7 added to `p`. The mean over images is
    subtracted first, so that a large common offset is not a direction.

    Singular values below the rounding error of `embedding` itself count as zero. Otherwise a
    constant embedding would seem to have full rank: centering leaves only rounding noise of it.

    Args:
      embedding: `[N, D]` with `N > D`.

    Returns:
      `[]`, in `[1, D]`; 1 at full collapse. The cost is that of a QR of `[N, D]` and an SVD of
      `[D, D]`: meant for a logging cadence, not for every step.

    Raises:
      ValueError: `N <= D`: the number of images would bound the value, and it would say nothing about
        the representation. Or not two axes.
    """
    matrix = _as_matrix("embedding", embedding)
    num_images, dim = matrix.shape
    if num_images <= dim:
        raise ValueError(
            f"effective_rank needs more images than dimensions, got N = {num_images}, D = {dim}: "
            f"the value would be bounded by N. Give it more than {dim} images, for instance the "
            "embeddings of several batches together"
        )
    # The largest entry becomes one, so squares neither overflow nor underflow. Large numbers are first
    # divided by four, because the reciprocal of the largest floats underflows.
    largest = jnp.max(jnp.abs(matrix))
    quarter = jnp.where(largest > 1, 0.25, jnp.ones_like(largest))
    largest, matrix = largest * quarter, matrix * quarter
    matrix = matrix / jnp.where(largest == 0, jnp.ones_like(largest), largest)
    rounding = 4 * float(jnp.finfo(matrix.dtype).eps) * jnp.sqrt(jnp.sum(jnp.square(matrix)))
    matrix = matrix - jnp.mean(matrix, axis=0, keepdims=True)
    # Eigenvalues of the Gram matrix would be cheaper, but in float32 they lose every singular value
    # under 3e-4 of the largest; the triangular factor keeps them down to 1e-7.
    singular_values = jnp.linalg.svd(jnp.linalg.qr(matrix, mode="r"), compute_uv=False)
    # Not `where(> rounding, ...)`: a NaN must stay one.
    singular_values = jnp.where(singular_values <= rounding, 0, singular_values)
    total = jnp.sum(singular_values)
    shares = singular_values / jnp.where(total == 0, jnp.ones_like(total), total)
    return jnp.exp(jnp.sum(jax.scipy.special.entr(shares)))


def posterior_summary(
    posterior_mean: ArrayLike, posterior_scale: ArrayLike, *, prior_scale: ArrayLike = 1.0
) -> PosteriorSummary:
    """Size and spread of the posterior scales, and how far the posterior has left the prior.

    Args:
      posterior_mean: `[N, D]`.
      posterior_scale: `[N, D]`, standard deviations, positive.
      prior_scale: standard deviation of the prior.

    Returns:
      `PosteriorSummary` of scalars.

    Raises:
      ValueError: shapes that differ, not two axes, fewer than two images, a known `prior_scale` that
        is not positive.
    """
    mean = _as_matrix("posterior_mean", posterior_mean)
    scale = _as_matrix("posterior_scale", posterior_scale)
    if mean.shape != scale.shape:
        raise ValueError(
            "posterior_mean and posterior_scale must share one shape [N, D], "
            f"got {mean.shape} and {scale.shape}"
        )
    (prior,) = sphere.at_least_float32(prior_scale)
    prior_scale = domain.positive("prior_scale", prior_scale, prior)
    log_scale = jnp.log(scale)
    # Under `jit` a scale that diverged gives NaN; outside of it, an error.
    kl = jax.jit(densities.gaussian_kl_divergence)(mean, scale, prior_scale=prior_scale)
    return PosteriorSummary(
        scale_mean=jnp.mean(scale),
        scale_anisotropy=jnp.mean(jnp.std(log_scale, axis=-1)),
        scale_spread=jnp.std(jnp.mean(log_scale, axis=-1)),
        mean_rms=sphere.safe_norm(mean.ravel()) / float(np.sqrt(mean.size)),
        kl_per_dimension=jnp.mean(kl) / mean.shape[-1],
        signal_to_noise=jnp.mean(sphere.safe_norm(mean) / sphere.safe_norm(scale)),
    )


def embedding_log_radius(embedding: ArrayLike) -> Array:
    """Mean over images of `log(|h| / sqrt(D))`: 0 where the features have variance one.

    Args:
      embedding: `[N, D]`, `N >= 2`. A radius of zero counts as the smallest normal number.

    Returns:
      `[]`.

    Raises:
      ValueError: not two axes, or fewer than two images.
    """
    matrix = _as_matrix("embedding", embedding)
    log_radius = sphere.safe_log(sphere.safe_norm(matrix))
    return jnp.mean(log_radius) - float(np.log(matrix.shape[-1])) / 2


def share_at_floor(scale: ArrayLike, *, min_scale: float) -> Array:
    """Share of scales that are `FLOOR_MARGIN * min_scale` or less.

    Args:
      scale: positive, any shape.
      min_scale: the floor, `model.min_scale`.

    Returns:
      `[]`, in `[0, 1]`.

    Raises:
      ValueError: no scales, a known `min_scale` that is negative or not finite.
    """
    (values,) = sphere.at_least_float32(scale)
    if not values.size:
        raise ValueError(f"scale must hold at least one scale, got shape {values.shape}")
    domain.weight("min_scale", min_scale)
    is_low = (values <= FLOOR_MARGIN * min_scale).astype(values.dtype)
    return jnp.mean(jnp.where(jnp.isnan(values), values, is_low))  # a NaN must stay one


def representation_health(embedding: ArrayLike) -> dict[str, Array]:
    """The signals of collapse and the radius together, ready to be logged.

    Args:
      embedding: `[N, D]`, `N >= 2`.

    Returns:
      Scalars by name: `embedding_std`, `embedding_log_radius` and, if `N > D`, `effective_rank`.

    Raises:
      ValueError: not two axes, or fewer than two images.
    """
    matrix = _as_matrix("embedding", embedding)
    values = {
        "embedding_std": embedding_std(matrix),
        "embedding_log_radius": embedding_log_radius(matrix),
    }
    if matrix.shape[0] > matrix.shape[1]:
        values["effective_rank"] = effective_rank(matrix)
    return values


class PairHealth(NamedTuple):
    """How the directional term sees pairs of views, one number each, `[]`.

    All but the cosine are of the factorized likelihood with chordal coordinates and joint tails. The
    health check of a run with another density logs the cosine alone.

    Attributes:
      cosine: mean of `<m, u>`, the latent's direction against the target's.
      residual_over_df: mean of `Q / df`, or of `Q / (D - 1)` at `df = inf`. Far above 1 the residuals
        are in the tail, where a pair's weight falls as `1 / Q`.
      effective_pairs: share of pairs that carry the gradient, `(sum w)^2 / (N sum w^2)` of the weights
        `w = (df + n) / (df + Q)`, `n = D - 1`: 1 when all weigh alike, as in the Gaussian limit.
    """

    cosine: Array
    residual_over_df: Array
    effective_pairs: Array


def pair_health(
    target_embedding: ArrayLike, latent: ArrayLike, scale_diag: ArrayLike, *, df: ArrayLike
) -> PairHealth:
    """Residuals and weights of the chordal directional term with joint tails (docs eq. 2 and 4).

    Args:
      target_embedding: `[N, D]`.
      latent: `[N, D]`, of the other view: a sample, or the posterior's mean.
      scale_diag: `[N, D]`, of the directional term, in units of the sphere.
      df: degrees of freedom, `inf` allowed.

    Returns:
      `PairHealth` of scalars.

    Raises:
      ValueError: not two axes, fewer than two images, shapes that do not broadcast, a `df` that is no
        number or not positive, a known scale that is not positive.
    """
    if np.ndim(df):
        raise ValueError(f"df must be a number, got shape {np.shape(df)}")
    (nu,) = sphere.at_least_float32(df)
    nu = domain.degrees_of_freedom("df", df, nu)
    direction, _ = sphere.polar_decomposition(_as_matrix("target_embedding", target_embedding))
    loc, _ = sphere.polar_decomposition(_as_matrix("latent", latent))
    squared_length, _ = sphere.scaled_tangent_squared_length(
        direction, loc, _as_matrix("scale_diag", scale_diag), coordinates="chordal"
    )
    n = loc.shape[-1] - 1
    is_gaussian = jnp.isinf(nu)
    df = jnp.where(is_gaussian, 1.0, nu).astype(squared_length.dtype)
    weight = jnp.where(is_gaussian, 1.0, (df + n) / (df + squared_length))
    return PairHealth(
        cosine=jnp.mean(jnp.sum(direction * loc, axis=-1)),
        residual_over_df=jnp.mean(squared_length) / jnp.where(is_gaussian, n, df),
        effective_pairs=jnp.square(jnp.mean(weight)) / jnp.mean(jnp.square(weight)),
    )


def term_gradient_norms(
    terms_of: Callable[[Array], ElboTerms], representation: ArrayLike
) -> dict[str, Array]:
    """How strongly each term of the bound moves the encoder.

    `sqrt(mean_i |d term_i / d x|^2 mean_i |x_i|^2)`: nats for a relative change of one. Relative, because
    the projector's BatchNorm makes the units of the representation arbitrary.

    Args:
      terms_of: representation `[N, F]` to terms `[N]`.
      representation: `[N, F]`.

    Returns:
      Scalars by the term's name.
    """
    x = _as_matrix("representation", representation)
    terms, pull_back = jax.vjp(terms_of, x)
    size = jnp.mean(jnp.sum(jnp.square(x), axis=-1))
    names = ("directional_log_likelihood", "radial_log_likelihood", "kl")
    zero = jax.tree.map(jnp.zeros_like, terms)
    one_term_each = [zero._replace(**{name: jnp.ones_like(getattr(terms, name))}) for name in names]
    # The way back is compiled once for all terms.
    (gradients,) = jax.vmap(pull_back)(jax.tree.map(lambda *rows: jnp.stack(rows), *one_term_each))
    norms = jnp.sqrt(jnp.mean(jnp.sum(jnp.square(gradients), axis=-1), axis=-1) * size)
    return dict(zip(names, norms, strict=True))
