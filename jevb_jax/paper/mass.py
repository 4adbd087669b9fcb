"""The mass on the sphere of the directional densities, which are sub-densities if it is below one.

A directional density of `densities` is a density of tangent coordinates `y` at `m`. In chordal
coordinates the sphere contains only a part of it (docs eq. 31):

    M = E[ 1{|y| < 2} (1 - |y|^2 / 4)^((D - 3) / 2) ]

At the scales that a model learns, `log M` is tens of nats, and it depends on the scales. No
likelihood can be interpreted without it.

With equal scales `M` is one integral over the angle, computed exactly here. With unequal scales the
squared length `T = |y|^2` is a weighted sum of squares. We tilt its distribution by the factor
`exp(-theta T)`, which moves it to where the integrand is large. Then we replace it by a multiple of
a chi-square with the same mean and variance. The result is the sum of the exact normalizer of the
tilt and of one integral over the angle.
"""

import functools
import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Float, Real

from jevb_jax.paper import domain, special, sphere

Tails = Literal["joint", "feature"]
TAILS: tuple[Tails, ...] = ("joint", "feature")

# The integrand over the angle has a peak of unit width and at worst exponential tails. Nodes spaced
# by sinh cover both.
_ANGLE_NODES = np.linspace(-4.2, 4.2, 97)
# The same for log(chi-square / df), whose left tail is longer.
_MIXTURE_NODES = np.linspace(-4.4, 2.6, 41)
_TILT_STEPS = 6
# Smaller scales are replaced by the lower limit. Above the upper limit the density is flat on the
# sphere, and the mass falls as scale^-(D - 1).
_LOG_SCALE_LIMITS = (math.log(1e-6), math.log(1e3))
# Gaussians wider than e^11 contribute nothing under the tilt; powers of their width would overflow.
_LEAST_LOG_SHARE = -22.0
# A node beyond has no weight at any df that is accepted; its exponential would overflow.
_LARGEST_LOG_SHARE = 80.0


def uniform_log_prob(dim: int) -> float:
    """Log-density of the uniform distribution on the sphere `S^(D - 1)` (docs eq. 32).

    Args:
      dim: embedding dimension `D`, at least 1.

    Returns:
      `lgamma(D/2) - log 2 - (D/2) log pi`, nats; for example 127.05 at `D = 128`.

    Raises:
      ValueError: `dim` is not a whole number of at least 1.
    """
    dim = domain.whole_number("the embedding dimension D", dim, 1)
    return math.lgamma(dim / 2) - math.log(2) - dim / 2 * math.log(math.pi)


def _nodes(values: np.ndarray, like: Array) -> Array:
    """Nodes `[K]` as `[1, ..., 1, K]`, with an axis of length one for each axis of `like`."""
    return jnp.asarray(values.reshape((1,) * like.ndim + (-1,)), like.dtype)


class _Features(NamedTuple):
    """The features `y_i` under the tilt, without the condition `<m, y> = 0`.

    Attributes:
      log_normalizer: `[...]`, `sum_i log E[exp(-theta y_i^2)]`.
      second: `[..., D]`, `E[y_i^2]`.
      shrinkage: `[..., D]`, `E[y_i^2] / s_i^2`.
      half_variance: `[..., D]`, half the variance of `y_i^2`; for a Gaussian the square of
        `second`.
    """

    log_normalizer: Array
    second: Array
    shrinkage: Array
    half_variance: Array


class _ChiSquare(NamedTuple):
    """`T = sum_i y_i^2` under the tilt: `width` times a chi-square of `dof` degrees of freedom.

    Attributes:
      log_tilt: `[...]`, `log E[exp(-theta T)]`.
      width: `[...]`.
      dof: `[...]`.
    """

    log_tilt: Array
    width: Array
    dof: Array


def _on_hyperplane(features: _Features, shares: Array) -> _ChiSquare:
    """`T` given `<m, y> = 0`.

    The moments are exact for Gaussian features. For others the condition is applied as if they were
    Gaussian.

    Args:
      features: the features under the tilt.
      shares: `[..., D]`, of each feature in the squared scale along `m`, by which the density was
        divided: `(m_i s_i)^2 / sum_j (m_j s_j)^2`. Shares and not squares, because the squares of
        tiny scales along `m` underflow, and only their quotients matter.
    """
    second, of_shares = features.second, shares * features.shrinkage
    # A latent of exactly zero has no direction; the guard keeps value and gradient finite there.
    has_direction = jnp.sum(shares, axis=-1) != 0
    along = jnp.where(has_direction, jnp.sum(of_shares, axis=-1), 1.0)
    lost = jnp.sum(of_shares * second, axis=-1) / along
    lost_twice = jnp.sum(of_shares * jnp.square(second), axis=-1) / along
    mean = jnp.sum(second, axis=-1) - lost
    half_variance = jnp.sum(features.half_variance, axis=-1) - 2 * lost_twice + jnp.square(lost)
    log_tilt = features.log_normalizer - jnp.log(along) / 2
    return _ChiSquare(log_tilt, half_variance / mean, jnp.square(mean) / half_variance)


def _gaussian_features(squared_scale: Array, tilt: Array) -> _Features:
    """Features `N(0, s_i^2)` tilted by `exp(-tilt y_i^2)`, which are Gaussian too."""
    excess = 2 * tilt[..., None] * squared_scale
    shrinkage = 1 / (1 + excess)
    second = squared_scale * shrinkage
    log_normalizer = -jnp.sum(jnp.log1p(excess), axis=-1) / 2
    return _Features(log_normalizer, second, shrinkage, jnp.square(second))


def _student_features(squared_scale: Array, tilt: Array, df: Array) -> _Features:
    """Features `s_i t_df` tilted by `exp(-tilt y_i^2)`, as mixtures of Gaussians `N(0, s_i^2 w)`.

    `df / w` is a chi-square with `df` degrees of freedom. Its logarithm is summed over nodes.
    """
    nodes = _nodes(_MIXTURE_NODES, df)
    is_infinite = jnp.isinf(df)
    finite = jnp.where(is_infinite, 1.0, df)
    deviation = jnp.where(is_infinite, 0.0, jnp.sqrt(2 / finite))
    log_share = jnp.minimum(deviation[..., None] * jnp.sinh(nodes), _LARGEST_LOG_SHARE)
    mixing = jnp.exp(-jnp.maximum(log_share, _LEAST_LOG_SHARE))
    log_density = (finite / 2)[..., None] * (log_share - jnp.expm1(log_share))
    log_density = jnp.where(is_infinite[..., None], 0.0, log_density)
    weight = jax.nn.softmax(log_density + jnp.log(jnp.cosh(nodes)), axis=-1)

    def add(sums: tuple[Array, ...], node: tuple[Array, Array]) -> tuple[tuple[Array, ...], None]:
        weight, mixing = node
        root = jax.lax.rsqrt(1 + 2 * (tilt * mixing)[..., None] * squared_scale)
        variance = mixing[..., None] * jnp.square(root)
        zeroth = weight[..., None] * root
        first = zeroth * variance
        return (sums[0] + zeroth, sums[1] + first, sums[2] + first * variance), None

    zero = jnp.zeros_like(squared_scale)
    over_nodes = (jnp.moveaxis(weight, -1, 0), jnp.moveaxis(mixing, -1, 0))
    (total, first, second), _ = jax.lax.scan(add, (zero, zero, zero), over_nodes)
    shrinkage = first / total
    mean = squared_scale * shrinkage
    fourth = 3 * jnp.square(squared_scale) * second / total
    half_variance = (fourth - jnp.square(mean)) / 2
    return _Features(jnp.sum(jnp.log(total), axis=-1), mean, shrinkage, half_variance)


def _peak(rate: Array, dof: Array, inverse_df: Array, n: int) -> Array:
    """The `x = |y|^2 / 4` in (0, 1) at which the integrand over `logit(x)` is largest.

    It is the smaller root of `dof - (dof + n + B) x + B (1 - n/df) x^2`, where `B` is `rate`.
    """
    # In units of 1 + B, so that no square overflows.
    unit = 1 + rate
    part = (rate + n - dof) / unit
    root = jnp.sqrt(jnp.square(part) + 4 * n * (dof / unit) * ((1 + rate * inverse_df) / unit))
    return 2 * (dof / unit) / ((dof + n + rate) / unit + root)


def _log_angle_integral(
    log_width: Array, rate: Array, dof: Array, df: Array, inverse_df: Array, n: int
) -> Array:
    """`log E[(1 - |y|^2/4)_+^((n - 2)/2)]` for `|y|^2 = w T`, `T` of the width and `dof` given.

    With `x = |y|^2 / 4` and `v = logit(x)` the integrand is
    `x^(dof/2) (1 - x)^(n/2) (1 + B x / df)^(-(df + dof)/2)`, analytic in `v`. It is computed
    relative to its peak, so that nothing cancels.

    Args:
      log_width: `[...]`, log of the width of `T` under the tilt, for the normalizer.
      rate: `[...]`, `B`: 4 divided by the width of `T` after the tilt is removed.
      dof: `[...]`, degrees of freedom of `T`.
      df: `[...]`, degrees of freedom of the mixing variable `w`.
      inverse_df: `[...]`, zero at `df = inf`.
      n: `D - 1`.
    """
    # The value does not depend on this reference point, so the point needs no gradient.
    share = jax.lax.stop_gradient(_peak(rate, dof, inverse_df, n))
    growth = 1 + rate * inverse_df * share
    rest = 1 - share
    kernel_rest = rest / growth  # 1 - q, with q the share in units of the kernel
    kernel_share = share * (1 + rate * inverse_df) / growth
    gap = share * rest * rate / growth  # df (q - x)
    tail = 1 + dof * inverse_df
    curvature = (dof + n) / 2 * share * rest + tail * gap * (kernel_rest - share) / 2
    deviation = jax.lax.stop_gradient(1 / jnp.sqrt(curvature))

    nodes = _nodes(_ANGLE_NODES, share)
    step = deviation[..., None] * jnp.sinh(nodes)
    is_right = nodes > 0
    decay = jnp.exp(-jnp.abs(step))
    change = jnp.expm1(-jnp.abs(step))

    def of_nodes(value: Array) -> Array:
        return value[..., None]

    # To the right in terms of 1 - x, to the left in terms of x: both are sums of positive numbers.
    near = jnp.where(is_right, of_nodes(rest), of_nodes(share))
    far = jnp.where(is_right, of_nodes(share), of_nodes(rest))
    kernel_near, kernel_far = of_nodes(kernel_share), of_nodes(kernel_rest)
    log_far = jnp.where(
        decay > 0.5, jnp.log1p(near * jnp.minimum(change, 0.0)), jnp.log(far + near * decay)
    )
    denominator = jnp.where(is_right, far + near * decay, kernel_far + kernel_near * decay)
    excess = -of_nodes(gap) * change / denominator
    kernel = of_nodes(tail) * excess * special.log1p_ratio(excess * of_nodes(inverse_df)) / 2
    linear = jnp.where(is_right, -n / 2, of_nodes(dof) / 2) * step
    relative = (
        linear
        - of_nodes(dof + n) / 2 * log_far
        + jnp.where(is_right, -kernel, kernel)
        + jnp.log(jnp.cosh(nodes))
    )
    spacing = float(_ANGLE_NODES[1] - _ANGLE_NODES[0])
    log_integral = jax.nn.logsumexp(relative, axis=-1) + jnp.log(deviation * spacing)

    half = dof / 2
    at_peak = (
        half * (1 + jnp.log(4 * share / dof) - log_width)
        + n / 2 * jnp.log1p(-share)
        - tail / 2 * rate * share * special.log1p_ratio(rate * share * inverse_df)
    )
    normalizer = special.log_gamma_ratio(df / 2, half) - special.log_gamma_remainder(half)
    return normalizer + at_peak + log_integral


def directional_log_mass(
    scale_diag: Real[ArrayLike, "*#batch #D"] | Real[ArrayLike, ""],
    *,
    loc: Real[ArrayLike, "*#batch D"],
    df: Real[ArrayLike, "*#batch"],
    tails: Tails = "joint",
    coordinates: sphere.Coordinates = "chordal",
) -> Float[Array, "*#batch"]:
    """Log of the mass that a directional density has on the sphere (docs eq. 31).

    Args:
      scale_diag: positive, in units of the sphere. A number or `[..., 1]` is the same scale for all
        features.
      loc: unit vectors `m`, `D >= 3`.
      df: degrees of freedom, at least 1e-12; `inf` is the Gaussian.
      tails: "joint" or "feature", as for `densities.directional_log_prob`.
      coordinates: "chordal" or "stereographic". Stereographic coordinates fill the sphere, so the
        result is zero.

    Returns:
      Nats. With joint tails it is at most zero. It is exact up to quadrature if the scales are
      equal, otherwise an approximation; `docs/mathematics.md` states its error. A largest scale
      below 1e-6 counts as 1e-6. Above 1e3 the density counts as flat, which adds
      `1e-6 (1 + D / df)` nats to the error. The error is measured from `df = 0.5`. With
      feature-wise tails it grows without bound toward zero.

    Raises:
      ValueError: `D < 3`, a known scale or `df` is too small, `loc` is not a unit vector, shapes
        do not broadcast, or `tails` and `coordinates` are unknown or do not fit each other. Traced
        scales and `df` that are too small give NaN.
    """
    check_tails(tails, coordinates)
    s, m, df_array = sphere.at_least_float32(scale_diag, loc, df)
    s = domain.positive("scale_diag", scale_diag, s)
    df = domain.degrees_of_freedom("df", df, df_array)
    m, s, df = domain.broadcast({"loc": m}, {"df": df}, {"scale_diag": s})
    dim = s.shape[-1]
    domain.sphere_of(dim, 3, "directional_log_mass")
    domain.unit_vectors("loc", loc)
    if coordinates == "stereographic":
        is_nan = jnp.isnan(df) | jnp.any(jnp.isnan(s), axis=-1)
        return jnp.where(is_nan, jnp.full_like(df, jnp.nan), jnp.zeros_like(df))
    return _chordal_log_mass(s, m, df, is_joint=tails == "joint")


class _Problem(NamedTuple):
    """The arguments of the mass, in units in which nothing overflows.

    Attributes:
      squares: `[..., D]`, squared scales relative to the largest.
      log_largest: `[...]`, log of the largest scale.
      shares: `[..., D]`, of each feature in the squared scale along `m`.
      feature_df: `[...]`, degrees of freedom of the tails of single features; `inf` for joint
        tails.
      kernel_df: `[...]`, degrees of freedom of the tail of the whole vector; `inf` for feature-wise
        tails.
    """

    squares: Array
    log_largest: Array
    shares: Array
    feature_df: Array
    kernel_df: Array

    @property
    def inverse_kernel_df(self) -> Array:
        """`1 / kernel_df`, `[...]`; zero with zero slope at `inf`."""
        is_infinite = jnp.isinf(self.kernel_df)
        return jnp.where(is_infinite, 0.0, 1 / jnp.where(is_infinite, 1.0, self.kernel_df))

    def tilted(self, tilt: Array, *, of_students: bool) -> _ChiSquare:
        """The squared length under a tilt, for features that are Student-t or Gaussian."""
        if of_students:
            features = _student_features(self.squares, tilt, self.feature_df)
        else:
            features = _gaussian_features(self.squares, tilt)
        return _on_hyperplane(features, self.shares)

    def rate(self, square: _ChiSquare, tilt: Array) -> Array:
        """`4 / width` after the tilt is removed; kept positive, also if the moments give less."""
        rounding = 8 * float(jnp.finfo(tilt.dtype).eps)
        untilted = jnp.maximum(1 / square.width - 2 * tilt, rounding / square.width)
        return 4 * untilted * jnp.exp(-2 * self.log_largest)

    def next_tilt(self, tilt: Array, *, of_students: bool) -> Array:
        """One step toward the tilt at which the mean of `T` is at the peak of the integrand."""
        square = self.tilted(tilt, of_students=of_students)
        rate, inverse_df = self.rate(square, tilt), self.inverse_kernel_df
        share = _peak(rate, square.dof, inverse_df, self.squares.shape[-1] - 1)
        # Given |y|^2 = w T, 1/w is a Gamma variable with E[1/w] = (df + dof) / (df + B share).
        mixing = (1 + square.dof * inverse_df) / (1 + rate * share * inverse_df)
        target = 4 * share * mixing * jnp.exp(-2 * self.log_largest)
        step = (square.width * square.dof / target - 1) / (2 * square.width)
        return jnp.maximum(tilt + step, 0.0)


def _tilt(problem: _Problem, *, is_joint: bool) -> Array:
    """The tilt to where the integrand is large, `[...]`.

    Every tilt would be valid; this one makes the error small. Therefore it needs no gradient. Its
    steps are a loop, which compiles several times faster than the same steps unrolled.
    """
    held = jax.lax.stop_gradient(problem)
    tilt = jax.lax.fori_loop(
        0,
        _TILT_STEPS,
        lambda _, tilt: held.next_tilt(tilt, of_students=False),
        jnp.zeros_like(held.log_largest),
    )
    if is_joint:
        return tilt
    return jax.lax.fori_loop(0, 2, lambda _, tilt: held.next_tilt(tilt, of_students=True), tilt)


@functools.partial(jax.jit, static_argnames="is_joint")
def _chordal_log_mass(s: Array, m: Array, df: Array, *, is_joint: bool) -> Array:
    """`directional_log_mass` as one compiled program; `s` and `m` `[..., D]`, `df` `[...]`.

    Called one by one, its hundreds of small operations would each be compiled for each shape.
    """
    n = s.shape[-1] - 1
    # Scales relative to the largest, so that no square overflows.
    largest = jnp.max(s, axis=-1)
    relative = s / largest[..., None]
    log_scale = jnp.log(largest)
    beyond = jnp.maximum(log_scale - _LOG_SCALE_LIMITS[1], 0.0)
    along, _ = sphere.polar_decomposition(m * relative)
    infinite = jnp.full_like(df, jnp.inf)
    problem = _Problem(
        squares=jnp.square(relative),
        log_largest=jnp.clip(log_scale, *_LOG_SCALE_LIMITS),
        shares=jnp.square(along),
        feature_df=infinite if is_joint else df,
        kernel_df=df if is_joint else infinite,
    )
    tilt = _tilt(problem, is_joint=is_joint)
    square = problem.tilted(tilt, of_students=not is_joint)
    log_integral = _log_angle_integral(
        jnp.log(square.width) + 2 * problem.log_largest,
        problem.rate(square, tilt),
        square.dof,
        problem.kernel_df,
        problem.inverse_kernel_df,
        n,
    )
    return square.log_tilt + log_integral - n * beyond


def check_tails(tails: str, coordinates: str) -> None:
    """Raises ValueError if `tails` is unknown, or feature-wise in stereographic coordinates."""
    domain.choice("tails", tails, TAILS)
    domain.choice("coordinates", coordinates, sphere.COORDINATES)
    if tails == "feature" and coordinates != "chordal":
        raise ValueError('tails = "feature" needs coordinates = "chordal", where its mass is known')
