"""Log-densities of the model, in nats, as pure functions over arrays.

Shapes: `...` is any batch shape, `D` the embedding dimension, `n = D - 1`. Scalars broadcast against
the batch shape. bfloat16 and float16 are promoted to float32, float64 is kept. Equation numbers are
those of `docs/mathematics.md`.
"""

from typing import Literal

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from jevb_jax import mass, special, sphere

Space = Literal["log", "linear"]
SPACES: tuple[Space, ...] = ("log", "linear")


def _require_sphere(dim: int, minimum: int, name: str) -> None:
    if dim < minimum:
        raise ValueError(
            f"{name} needs an embedding dimension D >= {minimum} (the last axis), got D = {dim}"
        )


def _student_t_log_kernel_and_normalizer(squared_length: Array, df: Array, n: int) -> Array:
    """Student-t log-density in `R^n` at squared length `Q`, unit scale, `df = inf` included.

    Written in `1 / df`, so that the Gaussian is the value at zero of the same smooth expression:
    `((df + n)/2) log1p(Q/df) = (1 + n/df)/2 * Q * log1p(Q/df)/(Q/df)`.
    """
    # Selected and not divided: at `inf` the slope in df is zero, even where the slope in 1/df overflows.
    is_infinite = jnp.isinf(df)
    inverse_df = jnp.where(is_infinite, 0.0, 1 / jnp.where(is_infinite, 1.0, df))
    # At the antipode stereographic coordinates are 1e23 scales away in float32. Past this length the
    # Gaussian is as good as zero; its square would overflow and the gradient be NaN.
    longest = float(jnp.finfo(df.dtype).max) ** 0.45
    squared_length = jnp.where(is_infinite, jnp.minimum(squared_length, longest), squared_length)
    half_n = jnp.full_like(df, n / 2)
    log_normalizer = special.log_gamma_ratio(df / 2, half_n) - half_n * float(np.log(2 * np.pi))
    kernel = (
        (1 + n * inverse_df) / 2 * squared_length * special.log1p_ratio(squared_length * inverse_df)
    )
    return log_normalizer - kernel


def directional_log_prob(
    direction: ArrayLike,
    *,
    loc: ArrayLike,
    scale_diag: ArrayLike,
    df: ArrayLike,
    coordinates: sphere.Coordinates = "chordal",
    tails: mass.Tails = "joint",
    normalized: bool = False,
) -> Array:
    """Heavy-tailed, anisotropic von Mises-Fisher-style log-density of a direction (docs eq. 4 and 33).

    The Student-t density of the tangent coordinates of `direction` at `loc`, whose precision is the
    compression of `diag(scale_diag^-2)` to the tangent space. With equal scales and `df -> inf` it has
    the von Mises-Fisher kernel of concentration `scale^-2`.

    Args:
      direction: `[..., D]` unit vectors `u`, `D >= 3`.
      loc: `[..., D]` unit vectors `m`.
      scale_diag: `[..., D]`, positive; on the unit sphere, so 1 is about one radian.
      df: degrees of freedom, positive, `inf` for the Gaussian limit; broadcasts against `[...]`.
      coordinates: "chordal" (eq. 2) is a sub-density on the sphere: its mass is at most one, near
        one when the scale is small, and `exp(-17)` at the scales of a model with `D = 128`.
        "stereographic" (eq. 3) has mass one exactly; with equal scales and `df = D - 1` it is the
        spherical Cauchy.
      tails: "joint" is one Student-t of the whole tangent vector; "feature" is a product of a
        Student-t for each coordinate (eq. 33), chordal only. They share the Gaussian limit.
      normalized: divides by the mass (eq. 31), so that the density has mass one.

    Returns:
      `[...]`, nats. At the antipode of `loc` the tangent direction is undefined; the squared length
      there is its mean over tangent directions (exact when the scales are equal).

    Raises:
      ValueError: `D < 3`, where the chordal bound fails, `df <= 0`, unknown `coordinates` or `tails`,
        feature-wise tails in stereographic coordinates.
    """
    mass.check_tails(tails, coordinates)
    mass.check_df(df)
    u, m, s, df = sphere.at_least_float32(direction, loc, scale_diag, df)
    u, m, s = jnp.broadcast_arrays(*_equal_rank(u, m, s))
    dim = u.shape[-1]
    _require_sphere(dim, 3, "directional_log_prob")
    n = dim - 1
    df = jnp.broadcast_to(df, u.shape[:-1])
    squares, log_volume = sphere.scaled_tangent_squares(u, m, s, coordinates=coordinates)
    # A latent of exactly zero has no direction; the guard keeps its value and gradient finite.
    log_determinant = sphere.safe_log(sphere.safe_norm(m * s)) - jnp.sum(jnp.log(s), axis=-1)
    if tails == "joint":
        squared_length = jnp.sum(squares, axis=-1)
        log_prob = _student_t_log_kernel_and_normalizer(squared_length, df, n)
    else:
        of_features = jnp.broadcast_to(df[..., None], squares.shape)
        factors = _student_t_log_kernel_and_normalizer(squares, of_features, 1)
        # D factors, and a hyperplane of n dimensions: the Gaussian along m is divided out.
        log_prob = jnp.sum(factors, axis=-1) + float(np.log(2 * np.pi)) / 2
    log_prob = log_prob + log_determinant
    if coordinates == "stereographic":
        return log_prob + n * log_volume
    if normalized:
        log_prob = log_prob - mass.directional_log_mass(s, loc=m, df=df, tails=tails)
    return log_prob


def _equal_rank(*values: Array) -> tuple[Array, ...]:
    """Prepends axes of length one, so that arrays broadcast without implicit rank promotion."""
    rank = max(value.ndim for value in values)
    return tuple(value.reshape((1,) * (rank - value.ndim) + value.shape) for value in values)


def student_t_log_prob(x: ArrayLike, *, df: ArrayLike, loc: ArrayLike, scale: ArrayLike) -> Array:
    """Log-density of the one-dimensional Student-t, accurate for every `df` (docs eq. 5).

    `jax.scipy.stats.t.logpdf` in float32 is off by 0.02 at df = 1e5 and by 0.9 at 1e7.

    Args:
      x: `[...]`.
      df: degrees of freedom, positive; `inf` is the Gaussian.
      loc: broadcasts against `x`.
      scale: positive, broadcasts against `x`.

    Returns:
      `[...]`, nats.
    """
    x, df, loc, scale = jnp.broadcast_arrays(
        *_equal_rank(*sphere.at_least_float32(x, df, loc, scale))
    )
    squared = jnp.square((x - loc) / scale)
    return _student_t_log_kernel_and_normalizer(squared, df, 1) - jnp.log(scale)


def radial_log_prob(
    radius: ArrayLike, *, loc: ArrayLike, scale: ArrayLike, df: ArrayLike, space: Space = "log"
) -> Array:
    """Student-t log-density of an embedding's radius (docs eq. 6).

    Args:
      radius: `[...]`, positive. Zero is read as the smallest normal number: the density of "log"
        grows without limit there.
      loc: radius of the latent, positive, broadcasts against `radius`.
      scale: positive: relative width in "log", a length in "linear".
      df: degrees of freedom, positive; `inf` is the Gaussian.
      space: "log": `log r` is Student-t about `log loc`, exactly normalised on `r > 0`. "linear": `r`
        is Student-t about `loc`; the mass below zero is lost, a sub-density.

    Returns:
      `[...]`, nats (per unit of radius).

    Raises:
      ValueError: unknown `space`.
    """
    if space not in SPACES:
        raise ValueError(f"space must be one of {SPACES}, got {space!r}")
    radius, loc, scale, df = sphere.at_least_float32(radius, loc, scale, df)
    if space == "linear":
        return student_t_log_prob(radius, df=df, loc=loc, scale=scale)
    log_radius, log_loc = sphere.safe_log(radius), sphere.safe_log(loc)
    log_prob = student_t_log_prob(log_radius, df=df, loc=log_loc, scale=scale)
    return log_prob - jnp.broadcast_to(log_radius, log_prob.shape)


def multivariate_student_t_log_prob(
    value: ArrayLike, *, loc: ArrayLike, scale_diag: ArrayLike, df: ArrayLike
) -> Array:
    """Log-density in `R^D` of a Student-t with a diagonal scale matrix (docs eq. 16).

    Not a product over features: one heavy tail for the whole vector. The unfactorised likelihood of
    the ablation.

    Args:
      value: `[..., D]`.
      loc: `[..., D]`.
      scale_diag: `[..., D]`, positive; at `df = inf` the standard deviations.
      df: degrees of freedom, positive, `inf` is the Gaussian; broadcasts against `[...]`.

    Returns:
      `[...]`, nats. Source: Kotz and Nadarajah 2004, eq. 1.1.
    """
    x, mean, scale, df = sphere.at_least_float32(value, loc, scale_diag, df)
    x, mean, scale = jnp.broadcast_arrays(*_equal_rank(x, mean, scale))
    dim = x.shape[-1]
    df = jnp.broadcast_to(df, x.shape[:-1])
    quadratic = jnp.sum(jnp.square((x - mean) / scale), axis=-1)
    log_normalized = _student_t_log_kernel_and_normalizer(quadratic, df, dim)
    return log_normalized - jnp.sum(jnp.log(scale), axis=-1)


def gaussian_kl_divergence(
    posterior_mean: ArrayLike, posterior_scale: ArrayLike, *, prior_scale: ArrayLike = 1.0
) -> Array:
    """`KL( N(mean, diag(scale^2)) || N(0, prior_scale^2 I) )` in closed form (docs eq. 7).

    Args:
      posterior_mean: `[..., D]`.
      posterior_scale: `[..., D]`, standard deviations, positive.
      prior_scale: standard deviation of the prior, positive; a number, or broadcasts against `[..., D]`.

    Returns:
      `[...]`, nats, at least zero, and zero only where the two are equal.
    """
    mean, scale, prior = sphere.at_least_float32(posterior_mean, posterior_scale, prior_scale)
    mean, scale, prior = jnp.broadcast_arrays(*_equal_rank(mean, scale, prior))
    ratio = scale / prior
    # t^2 - 1 - log t^2 from v = t^2 - 1: each summand stays non-negative near t = 1.
    excess = (ratio - 1) * (ratio + 1)
    is_near = jnp.abs(excess) < 0.5
    near = jnp.where(is_near, excess, jnp.zeros_like(excess))
    far = jnp.where(is_near, jnp.ones_like(ratio), ratio)
    variance_term = jnp.where(is_near, near - jnp.log1p(near), excess - 2 * jnp.log(far))
    return jnp.sum(jnp.square(mean / prior) + variance_term, axis=-1) / 2


def von_mises_fisher_log_prob(
    direction: ArrayLike, *, loc: ArrayLike, concentration: ArrayLike
) -> Array:
    """Log-density of the von Mises-Fisher distribution on the unit sphere (docs eq. 8).

    Args:
      direction: `[..., D]` unit vectors, `D >= 2`.
      loc: `[..., D]` unit vectors, the mean direction.
      concentration: at least zero (zero is uniform), finite; broadcasts against `[...]`.

    Returns:
      `[...]`, nats. Source: Mardia and Jupp, Directional Statistics, eq. 9.3.4.

    Raises:
      ValueError: `D < 2`.
    """
    u, m, concentration = sphere.at_least_float32(direction, loc, concentration)
    u, m = jnp.broadcast_arrays(*_equal_rank(u, m))
    dim = u.shape[-1]
    _require_sphere(dim, 2, "von_mises_fisher_log_prob")
    concentration = jnp.broadcast_to(concentration, u.shape[:-1])
    one_minus, _ = sphere.cosine_complements(u, m)
    # k c + log C(k), with k taken out of both: k (c - 1) - log( I(k) e^-k / k^order ) - ...
    log_bessel = special.log_scaled_bessel_i(dim / 2 - 1, concentration)
    return -concentration * one_minus - log_bessel - dim / 2 * float(np.log(2 * np.pi))


def _power_spherical_shapes(concentration: Array, dim: int) -> tuple[Array, Array]:
    """`a` and `b` of model docs: the marginal of `(1 + <mu, z>)/2` is Beta(a, b)."""
    beta = jnp.full_like(concentration, (dim - 1) / 2)
    return beta + concentration, beta


def _power_spherical_log_base(alpha: Array, beta: Array) -> Array:
    """Log-normaliser of `((1 + c) / 2)^k`: `lgamma(a + b) - lgamma(a) - b log(4 pi)`."""
    log_gamma_difference = special.log_gamma_ratio(alpha, beta) + beta * jnp.log(alpha)
    return log_gamma_difference - beta * float(np.log(4 * np.pi))


def power_spherical_log_prob(
    direction: ArrayLike, *, loc: ArrayLike, concentration: ArrayLike
) -> Array:
    """Log-density of the power spherical distribution (docs eq. 9; De Cao and Aziz 2020, eq. 8).

    Args:
      direction: `[..., D]` unit vectors, `D >= 2`.
      loc: `[..., D]` unit vectors, the mean direction.
      concentration: at least zero (zero is uniform), finite; broadcasts against `[...]`.

    Returns:
      `[...]`, nats; at the antipode of `loc`, where the density is zero, a large negative number.

    Raises:
      ValueError: `D < 2`.
    """
    u, m, concentration = sphere.at_least_float32(direction, loc, concentration)
    u, m = jnp.broadcast_arrays(*_equal_rank(u, m))
    dim = u.shape[-1]
    _require_sphere(dim, 2, "power_spherical_log_prob")
    concentration = jnp.broadcast_to(concentration, u.shape[:-1])
    one_minus, one_plus = sphere.cosine_complements(u, m)
    is_near = one_minus < 1
    log_half_one_plus = jnp.where(
        is_near,
        jnp.log1p(-jnp.where(is_near, one_minus, jnp.zeros_like(one_minus)) / 2),
        sphere.safe_log(one_plus / 2),
    )
    alpha, beta = _power_spherical_shapes(concentration, dim)
    return _power_spherical_log_base(alpha, beta) + concentration * log_half_one_plus


def power_spherical_entropy(concentration: ArrayLike, *, dim: int) -> Array:
    """Differential entropy of the power spherical distribution (docs eq. 10).

    Args:
      concentration: `[...]`, at least zero, finite.
      dim: embedding dimension `D >= 2`.

    Returns:
      `[...]`, nats; the logarithm of the sphere's area at concentration zero.

    Raises:
      ValueError: `dim < 2`.
    """
    _require_sphere(dim, 2, "power_spherical_entropy")
    (concentration,) = sphere.at_least_float32(concentration)
    alpha, beta = _power_spherical_shapes(concentration, dim)
    expected = -special.digamma_difference(alpha, beta)  # E[ log((1 + c)/2) ], a Beta's mean log
    return -_power_spherical_log_base(alpha, beta) - concentration * expected
