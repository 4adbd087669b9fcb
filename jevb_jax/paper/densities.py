"""Log-densities of the model, in nats, as pure functions of arrays.

`D` is the embedding dimension, `n = D - 1`. Arguments with shapes marked `#batch` broadcast against
each other. bfloat16 and float16 become float32; float64 stays. Equation numbers are those of
`docs/mathematics.md`.
"""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Float, Real

from jevb_jax.paper import domain, mass, special, sphere

Space = Literal["log", "linear"]
SPACES: tuple[Space, ...] = ("log", "linear")


def _student_t_log_normalizer(df: Float[Array, "*batch"], n: int) -> Float[Array, "*batch"]:
    """`lgamma((df + n)/2) - lgamma(df/2) - (n/2) log(df pi)`, also for `df = inf`.

    `log_gamma_ratio(df/2, n/2)` is `lgamma((df + n)/2) - lgamma(df/2) - (n/2) log(df/2)`. The rest
    is `(n/2) log(df/2) - (n/2) log(df pi) = -(n/2) log(2 pi)`: the logarithms of `df` cancel. At
    `df = inf` the ratio is zero, and this is the normalizer of the Gaussian.
    """
    half_n = jnp.full_like(df, n / 2)
    return special.log_gamma_ratio(df / 2, half_n) - half_n * float(np.log(2 * np.pi))


def _student_t_kernel(
    squared_length: Float[Array, "*batch"],
    df: Float[Array, "*batch"],
    n: int,
    *,
    log_unit: Float[Array, "*batch"],
    longest_gaussian: float | None = None,
) -> Float[Array, "*batch"]:
    """`((df + n)/2) log(1 + Q/df)`, or `Q/2` at `df = inf`.

    Up to `Q = df` the kernel is computed as a function of `1 / df`, so that the Gaussian is the
    value of the same smooth expression at zero:

        ((df + n)/2) log1p(Q/df) = (1 + n/df)/2 * Q * log1p(Q/df)/(Q/df)

    For larger `Q` the slope of this form would be a difference of two nearly equal numbers, so the
    kernel is computed directly.

    Args:
      squared_length: `Q exp(-log_unit)`.
      df: at least 1e-12; `inf` is the Gaussian.
      n: dimension.
      log_unit: zero unless `Q` would overflow.
      longest_gaussian: upper limit of `Q` at `df = inf`.
    """
    # Selected and not divided: at `inf` the slope in df is zero, even where the slope in 1/df
    # overflows.
    is_infinite = jnp.isinf(df)
    finite = jnp.where(is_infinite, 1.0, df)
    inverse_df = jnp.where(is_infinite, 0.0, 1 / finite)

    # First the values that overflow. Elsewhere `far` is zero and `Q` is unchanged. No branch gets a
    # value that only another branch can represent, because its gradient would be NaN.
    zero = jnp.zeros_like(squared_length)
    is_extreme = log_unit > 0
    log_length = sphere.safe_log(squared_length) + log_unit
    is_far = is_extreme & ~is_infinite & (log_length >= jnp.log(finite))
    log_ratio = jnp.where(is_far, log_length - jnp.log(finite), zero)
    far = jnp.where(is_far, log_ratio + jnp.log1p(jnp.exp(-log_ratio)), zero)

    is_exponentiated = is_extreme & ~is_far & (squared_length > float(jnp.finfo(df.dtype).tiny))
    log_length = jnp.where(is_exponentiated, log_length, zero)
    if longest_gaussian is not None:
        held = jnp.minimum(log_length, float(np.log(longest_gaussian)))
        log_length = jnp.where(is_infinite, held, log_length)
    # For a scale of NaN, `log_unit` is zero, so the NaN stays in the result.
    squared_length = jnp.where(
        is_extreme, jnp.where(is_exponentiated, jnp.exp(log_length), zero), squared_length
    )
    if longest_gaussian is not None:
        held = jnp.minimum(squared_length, longest_gaussian)
        squared_length = jnp.where(is_infinite, held, squared_length)

    # Then the kernel for `Q` above and below `df`.
    is_long = ~is_infinite & ~is_extreme & (squared_length >= df)
    long = jnp.log1p(jnp.where(is_long, squared_length, zero) * inverse_df)
    short = jnp.where(is_long | is_far, zero, squared_length)
    ratio = special.log1p_ratio(jnp.where(is_infinite, zero, short) * inverse_df)
    return (1 + n * inverse_df) / 2 * short * ratio + (finite + n) / 2 * (long + far)


# One program: called on arrays, each of its hundred operations would be compiled for each shape.
@functools.partial(jax.jit, static_argnames=("n", "longest_gaussian"))
def _student_t_log_density(
    squared_length: Float[Array, "*batch"],
    df: Float[Array, "*batch"],
    n: int,
    *,
    log_unit: Float[Array, "*batch"],
    longest_gaussian: float | None = None,
) -> Float[Array, "*batch"]:
    """Log-density in `R^n` of a Student-t with unit scale at the squared length `Q`."""
    kernel = _student_t_kernel(
        squared_length, df, n, log_unit=log_unit, longest_gaussian=longest_gaussian
    )
    return _student_t_log_normalizer(df, n) - kernel


def directional_log_prob(
    direction: Real[ArrayLike, "*#batch D"],
    *,
    loc: Real[ArrayLike, "*#batch D"],
    scale_diag: Real[ArrayLike, "*#batch #D"] | Real[ArrayLike, ""],
    df: Real[ArrayLike, "*#batch"],
    coordinates: sphere.Coordinates = "chordal",
    tails: mass.Tails = "joint",
    normalized: bool = False,
) -> Float[Array, "*#batch"]:
    """Heavy-tailed log-density of a direction with a scale for each feature (docs eq. 4 and 33).

    This is the Student-t density of the tangent coordinates of `direction` at `loc`. Its precision
    is the compression of `diag(scale_diag^-2)` to the tangent space. With equal scales and
    `df -> inf` it has the von Mises-Fisher kernel of concentration `scale^-2`.

    Args:
      direction: unit vectors `u`, `D >= 3`.
      loc: unit vectors `m`.
      scale_diag: `s`, positive, in units of the sphere: 1 is about one radian. A number or
        `[..., 1]` is the same scale for all features.
      df: degrees of freedom, at least 1e-12; `inf` is the Gaussian limit.
      coordinates: "chordal" (eq. 2) gives a sub-density on the sphere. Its mass is at most one,
        near one if the scale is small, and `exp(-17)` at the scales of a model with `D = 128`.
        "stereographic" (eq. 3) gives mass one exactly; with equal scales and `df = D - 1` it is the
        spherical Cauchy. With `df < D - 1` the density has a pole at the antipode of `loc`. If the
        scale is small, the pole has little mass.
      tails: "joint" is one Student-t of the whole tangent vector. "feature" is a product of one
        Student-t for each coordinate (eq. 33), in chordal coordinates only. Both have the same
        Gaussian limit.
      normalized: divide by the mass (eq. 31), so that the density has mass one.

    Returns:
      Nats. At the antipode of `loc` the tangent direction is undefined. The squared length there is
      its mean over tangent directions, which is exact if the scales are equal. In stereographic
      coordinates, `Q` of the Gaussian is limited there to 2e22 in float32.

    Raises:
      ValueError: `D < 3` (the mass would exceed one); a known scale or `df` is too small; known
        directions are not unit vectors; shapes do not broadcast; or `coordinates` and `tails` are
        unknown or do not fit each other. Traced scales and `df` that are too small give NaN.
    """
    mass.check_tails(tails, coordinates)
    u, m, s, df_array = sphere.at_least_float32(direction, loc, scale_diag, df)
    s = domain.positive("scale_diag", scale_diag, s)
    df = domain.degrees_of_freedom("df", df, df_array)
    u, m, s, df = domain.broadcast({"direction": u, "loc": m}, {"df": df}, {"scale_diag": s})
    domain.sphere_of(u.shape[-1], 3, "directional_log_prob")
    domain.unit_vectors("direction", direction)
    domain.unit_vectors("loc", loc)

    n = u.shape[-1] - 1
    squares, log_unit, log_volume = sphere.bounded_tangent_squares(u, m, s, coordinates=coordinates)
    # This is - sum log s + (1/2) log sum (m s)^2. A latent of exactly zero has no direction; the
    # guard keeps value and gradient finite there.
    log_determinant = sphere.safe_log(sphere.safe_norm(m * s)) - jnp.sum(jnp.log(s), axis=-1)
    if tails == "joint":
        # At the antipode, stereographic coordinates are 1e23 scales away in float32. Beyond this
        # length the Gaussian is practically zero, and its gradient would overflow.
        longest = float(jnp.finfo(df.dtype).max) ** 0.58 if coordinates == "stereographic" else None
        log_student_t = _student_t_log_density(
            jnp.sum(squares, axis=-1), df, n, log_unit=log_unit, longest_gaussian=longest
        )
    else:
        df_of_features, unit = (
            jnp.broadcast_to(x[..., None], squares.shape) for x in (df, log_unit)
        )
        factors = _student_t_log_density(squares, df_of_features, 1, log_unit=unit)
        # There are D factors but only n dimensions: divide by the Gaussian along m.
        log_student_t = jnp.sum(factors, axis=-1) + float(np.log(2 * np.pi)) / 2
    log_prob = log_student_t + log_determinant
    if coordinates == "stereographic":
        return log_prob + n * log_volume
    if normalized:
        log_prob = log_prob - mass.directional_log_mass(s, loc=m, df=df, tails=tails)
    return log_prob


def student_t_log_prob(
    x: Real[ArrayLike, "*#batch"],
    *,
    df: Real[ArrayLike, "*#batch"],
    loc: Real[ArrayLike, "*#batch"],
    scale: Real[ArrayLike, "*#batch"],
) -> Float[Array, "*#batch"]:
    """Log-density of the one-dimensional Student-t in nats, accurate for every `df` (docs eq. 5).

    In float32 `jax.scipy.stats.t.logpdf` is off by 0.02 at df = 1e5 and by 0.9 at 1e7.

    Args:
      x: where the density is evaluated.
      df: degrees of freedom, at least 1e-12; `inf` is the Gaussian.
      loc: the center.
      scale: positive.

    Raises:
      ValueError: a known scale or `df` is too small, or shapes do not broadcast. Traced ones
        that are too small give NaN.
    """
    x, nu, m, s = sphere.at_least_float32(x, df, loc, scale)
    nu = domain.degrees_of_freedom("df", df, nu)
    s = domain.positive("scale", scale, s)
    x, nu, m, s = domain.broadcast({}, {"x": x, "df": nu, "loc": m, "scale": s})
    # Subtract halves: the difference of two numbers near the largest would overflow.
    log_distance = sphere.safe_log(jnp.abs(x / 2 - m / 2)) + float(np.log(2))
    log_length, is_extreme = _log_length(log_distance - jnp.log(s), nu)
    one = jnp.ones_like(s)
    # The branch that is not taken gets a harmless argument. Otherwise its gradient could be NaN.
    x, m = (jnp.where(is_extreme, jnp.zeros_like(s), value) for value in (x, m))
    squared = jnp.square(_quotient(x - m, jnp.where(is_extreme, one, s)))
    squared = jnp.where(is_extreme, one, squared)
    log_prob = _student_t_log_density(squared, nu, 1, log_unit=log_length)
    return log_prob - jnp.log(s)


def _quotient(x: Array, scale: Array) -> Array:
    """`x / scale`, with a slope in `scale` that neither over- nor underflows.

    That slope has a factor `scale^-2`, which is lost beyond 1e19 in float32. Here x and scale are
    first divided by a power of two near the scale, so that the factor is near one.
    """
    unit = sphere.power_of_two_below(scale)
    return (x / unit) / (scale / unit)


def _log_length(log_distance: Array, df: Array) -> tuple[Array, Array]:
    """Log of the squared distance if its square would overflow, else zero; and whether it would.

    The slope of the Gaussian is twice the distance, which does not overflow.
    """
    threshold = 0.34 * float(np.log(jnp.finfo(df.dtype).max))
    is_extreme = (log_distance > threshold) & ~jnp.isinf(df)
    return jnp.where(is_extreme, 2 * log_distance, jnp.zeros_like(df)), is_extreme


def radial_log_prob(
    radius: Real[ArrayLike, "*#batch"],
    *,
    loc: Real[ArrayLike, "*#batch"],
    scale: Real[ArrayLike, "*#batch"],
    df: Real[ArrayLike, "*#batch"],
    space: Space = "log",
) -> Float[Array, "*#batch"]:
    """Student-t log-density of an embedding's radius (docs eq. 6).

    Args:
      radius: `r`, positive. Zero is read as the smallest normal number, because the density of
        "log" is unbounded there.
      loc: `rho`, radius of the latent, positive.
      scale: positive. A relative width in "log", a length in "linear".
      df: degrees of freedom, at least 1e-12; `inf` is the Gaussian.
      space: With "log", `log r` is Student-t about `log loc`, exactly normalized on `r > 0`. With
        "linear", `r` is Student-t about `loc`; the mass below zero is lost, so this is a
        sub-density.

    Returns:
      Nats (per unit of radius).

    Raises:
      ValueError: `space` is unknown, a known radius is negative, a known scale or `df` is too
        small, or shapes do not broadcast. Traced ones give NaN.
    """
    domain.choice("space", space, SPACES)
    r, rho, s, nu = sphere.at_least_float32(radius, loc, scale, df)
    r, rho = domain.radius("radius", radius, r), domain.radius("loc", loc, rho)
    s, nu = domain.positive("scale", scale, s), domain.degrees_of_freedom("df", df, nu)
    r, rho, s, nu = domain.broadcast({}, {"radius": r, "loc": rho, "scale": s, "df": nu})
    if space == "linear":
        return student_t_log_prob(r, df=nu, loc=rho, scale=s)
    log_radius, log_loc = sphere.safe_log(r), sphere.safe_log(rho)
    log_prob = student_t_log_prob(log_radius, df=nu, loc=log_loc, scale=s)
    return log_prob - log_radius


def multivariate_student_t_log_prob(
    value: Real[ArrayLike, "*#batch D"],
    *,
    loc: Real[ArrayLike, "*#batch D"],
    scale_diag: Real[ArrayLike, "*#batch #D"] | Real[ArrayLike, ""],
    df: Real[ArrayLike, "*#batch"],
) -> Float[Array, "*#batch"]:
    """Log-density in `R^D` of a Student-t with a diagonal scale matrix (docs eq. 16).

    This is the unfactorized likelihood of the ablation. It is not a product over features: the
    whole vector has one heavy tail. Source: Kotz and Nadarajah 2004, eq. 1.1.

    Args:
      value: `h`.
      loc: `z`.
      scale_diag: `s`, positive; the standard deviations at `df = inf`. A number or `[..., 1]` is
        the same scale for all features.
      df: degrees of freedom, at least 1e-12; `inf` is the Gaussian.

    Returns:
      Nats.

    Raises:
      ValueError: a known scale or `df` is too small, or shapes do not broadcast. Traced ones
        that are too small give NaN.
    """
    x, mean, scale, nu = sphere.at_least_float32(value, loc, scale_diag, df)
    scale = domain.positive("scale_diag", scale_diag, scale)
    nu = domain.degrees_of_freedom("df", df, nu)
    x, mean, scale, nu = domain.broadcast(
        {"value": x, "loc": mean}, {"df": nu}, {"scale_diag": scale}
    )
    dim = x.shape[-1]
    # In a unit below the smallest scale, so that the quotients cannot overflow.
    unit = sphere.power_of_two_below(jnp.min(scale, axis=-1))
    distance = sphere.safe_norm((x - mean) / (scale / unit[..., None]))
    log_length, is_extreme = _log_length(sphere.safe_log(distance) - jnp.log(unit), nu)
    # The branch that is not taken gets a harmless argument. Otherwise its gradient could be NaN.
    held_x, held_mean, held_scale = (
        jnp.where(is_extreme[..., None], jnp.ones_like(scale), value) for value in (x, mean, scale)
    )
    deviation = _quotient(held_x - held_mean, held_scale)
    quadratic = jnp.sum(jnp.square(deviation), axis=-1)
    quadratic = jnp.where(is_extreme, jnp.ones_like(quadratic), quadratic)
    log_normalized = _student_t_log_density(quadratic, nu, dim, log_unit=log_length)
    return log_normalized - jnp.sum(jnp.log(scale), axis=-1)


def gaussian_kl_divergence(
    posterior_mean: Real[ArrayLike, "*#batch D"],
    posterior_scale: Real[ArrayLike, "*#batch #D"] | Real[ArrayLike, ""],
    *,
    prior_scale: Real[ArrayLike, "*#batch #D"] | Real[ArrayLike, ""] = 1.0,
) -> Float[Array, "*#batch"]:
    """`KL( N(mean, diag(scale^2)) || N(0, prior_scale^2 I) )` in closed form (docs eq. 7).

    Args:
      posterior_mean: `mu`.
      posterior_scale: `sigma`, standard deviations, positive. A number or `[..., 1]` is the same
        scale for all features.
      prior_scale: `p`, standard deviation of the prior, positive.

    Returns:
      Nats, at least zero; zero only if posterior and prior are equal.

    Raises:
      ValueError: a known scale is not positive, or shapes do not broadcast. Traced scales that are
        not positive give NaN.
    """
    mu, sigma, p = sphere.at_least_float32(posterior_mean, posterior_scale, prior_scale)
    sigma = domain.positive("posterior_scale", posterior_scale, sigma)
    p = domain.positive("prior_scale", prior_scale, p)
    mu, sigma, p = domain.broadcast(
        {"posterior_mean": mu}, {}, {"posterior_scale": sigma, "prior_scale": p}
    )
    # This is mu^2/p^2 + (sigma^2/p^2 - 1 - log(sigma^2/p^2)); the bracket would cancel if computed
    # so.
    return jnp.sum(jnp.square(_quotient(mu, p)) + _variance_term(sigma, p), axis=-1) / 2


def _variance_term(
    sigma: Float[Array, "*batch D"], p: Float[Array, "*batch D"]
) -> Float[Array, "*batch D"]:
    """`t^2 - 1 - log t^2` with `t = sigma / p`, at least zero.

    It is computed from `v = t^2 - 1`, so that nothing cancels near `t = 1` and no summand is
    negative.
    """
    ratio = _quotient(sigma, p)
    excess = (ratio - 1) * (ratio + 1)
    is_near = jnp.abs(excess) < 0.5
    near = jnp.where(is_near, excess, jnp.zeros_like(excess))
    # Far below one the quotient underflows, but the difference of the logarithms does not.
    is_tiny = ratio < float(jnp.finfo(ratio.dtype).eps)
    far = jnp.where(is_near | is_tiny, jnp.ones_like(ratio), ratio)
    log_ratio = jnp.where(is_tiny, jnp.log(sigma) - jnp.log(p), jnp.log(far))
    return jnp.where(is_near, near - jnp.log1p(near), excess - 2 * log_ratio)


def _power_spherical_shapes(concentration: Array, dim: int) -> tuple[Array, Array]:
    """Shapes `a` and `b` of docs eq. 9: the marginal of `(1 + <mu, z>)/2` is Beta(a, b)."""
    beta = jnp.full_like(concentration, (dim - 1) / 2)
    return beta + concentration, beta


def _power_spherical_log_base(alpha: Array, beta: Array) -> Array:
    """Log-normalizer of `((1 + c) / 2)^k`: `lgamma(a + b) - lgamma(a) - b log(4 pi)`."""
    log_gamma_difference = special.log_gamma_ratio(alpha, beta) + beta * jnp.log(alpha)
    return log_gamma_difference - beta * float(np.log(4 * np.pi))


def power_spherical_log_prob(
    direction: Real[ArrayLike, "*#batch D"],
    *,
    loc: Real[ArrayLike, "*#batch D"],
    concentration: Real[ArrayLike, "*#batch"],
) -> Float[Array, "*#batch"]:
    """Log-density of the power spherical distribution (docs eq. 9; De Cao and Aziz 2020, eq. 8).

    Args:
      direction: unit vectors `u`, `D >= 2`.
      loc: unit vectors `m`, the mean direction.
      concentration: `k`, at least zero (zero is uniform), finite.

    Returns:
      Nats. At the antipode of `loc`, where the density is zero, a large negative number.

    Raises:
      ValueError: `D < 2`, a known concentration is negative or not finite, known directions are not
        unit vectors, or shapes do not broadcast. Traced concentrations out of range give NaN.
    """
    u, m, k = sphere.at_least_float32(direction, loc, concentration)
    k = domain.concentration("concentration", concentration, k)
    u, m, k = domain.broadcast({"direction": u, "loc": m}, {"concentration": k})
    dim = u.shape[-1]
    domain.sphere_of(dim, 2, "power_spherical_log_prob")
    domain.unit_vectors("direction", direction)
    domain.unit_vectors("loc", loc)
    one_minus, one_plus = sphere.cosine_complements(u, m)
    is_near = one_minus < 1
    log_half_one_plus = jnp.where(
        is_near,
        jnp.log1p(-jnp.where(is_near, one_minus, jnp.zeros_like(one_minus)) / 2),
        sphere.safe_log(one_plus / 2),
    )
    alpha, beta = _power_spherical_shapes(k, dim)
    return _power_spherical_log_base(alpha, beta) + k * log_half_one_plus


def power_spherical_entropy(
    concentration: Real[ArrayLike, "*batch"], *, dim: int
) -> Float[Array, "*batch"]:
    """Differential entropy of the power spherical distribution (docs eq. 10).

    Args:
      concentration: `k`, at least zero, finite.
      dim: embedding dimension `D >= 2`.

    Returns:
      Nats; the logarithm of the sphere's area at concentration zero.

    Raises:
      ValueError: `dim` is not a whole number of at least 2, or a known concentration is negative or
        not finite.
    """
    dim = domain.whole_number("dim", dim, 2)
    (k,) = sphere.at_least_float32(concentration)
    concentration = domain.concentration("concentration", concentration, k)
    alpha, beta = _power_spherical_shapes(concentration, dim)
    expected = -special.digamma_difference(alpha, beta)  # E[ log((1 + c)/2) ], mean log of a Beta
    return -_power_spherical_log_base(alpha, beta) - concentration * expected
