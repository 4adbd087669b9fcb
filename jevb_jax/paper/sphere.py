"""Geometry of the unit sphere: polar decomposition, and squared lengths in the tangent space.

`D` is the embedding dimension, `S^(D-1)` the unit sphere, `u` a direction on it, `m` the location.
Every function converts bfloat16 and float16 to float32 and keeps float64.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Float, Real

from jevb_jax.paper import domain

Coordinates = Literal["chordal", "stereographic"]
COORDINATES: tuple[Coordinates, ...] = ("chordal", "stereographic")


def at_least_float32(*values: Real[ArrayLike, "..."]) -> tuple[Float[Array, "..."], ...]:
    """Casts to one common float type: the widest given type, at least float32.

    Args:
      *values: numbers or arrays. Python numbers never widen the result.

    Raises:
      ValueError: a value is complex; its imaginary part would be lost.
    """
    if any(jnp.iscomplexobj(value) for value in values):
        raise ValueError("real numbers are needed, got complex ones; give their real parts")
    # Not by promotion, which `jax.numpy_dtype_promotion("strict")` would refuse.
    is_wide = any(
        getattr(value, "dtype", None) == jnp.float64 and not getattr(value, "weak_type", False)
        for value in values
    )
    dtype = jax.dtypes.canonicalize_dtype(jnp.float64 if is_wide else jnp.float32)
    return tuple(jnp.asarray(value, dtype) for value in values)


def _scaled(x: Array) -> tuple[Array, Array, Array]:
    """`x` scaled, the norm of the scaled vector (one for the zero vector), and the radius of `x`.

    Squares of the scaled vector and derivatives of its norm neither overflow nor underflow,
    whatever the size of `x`.
    """
    if x.ndim < 1 or x.shape[-1] < 1:
        raise ValueError(f"expected vectors [..., D] with D >= 1, got shape {x.shape}")
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(x), axis=-1))
    is_zero = largest == 0
    # The scale is the size of the largest entry. Near the ends of the float type, its reciprocal or
    # the product of that with a cotangent would be lost; there the scale is a fixed power of two.
    limits = jnp.finfo(x.dtype)
    power = round(0.7 * limits.maxexp)
    is_long = largest > float(limits.max) ** 0.75
    is_short = largest < float(limits.tiny) ** 0.75
    one = jnp.ones_like(largest)
    lift = jnp.where(is_long, 2.0**-power, jnp.where(is_short, 2.0**power, one))
    lowered = jnp.where(is_long, 2.0**power, jnp.where(is_short, 2.0**-power, one))
    divisor = jnp.where(is_long | is_short, one, largest)
    scaled = x * lift[..., None] / divisor[..., None]
    # Without the barrier XLA would take constant factors of a constant `x` out of the sum of
    # squares, which would overflow again.
    scaled = jax.lax.optimization_barrier(scaled)
    squared = jnp.sum(jnp.square(scaled), axis=-1)
    # The branch that is not taken gets a harmless argument. Otherwise its gradient could be NaN.
    norm = jnp.sqrt(jnp.where(is_zero, jnp.ones_like(squared), squared))
    return scaled, norm, jnp.where(is_zero, jnp.zeros_like(largest), divisor) * norm * lowered


def safe_norm(x: Real[ArrayLike, "*batch D"]) -> Float[Array, "*batch"]:
    """Norm over the last axis. Value and gradient are finite, and zero at the zero vector."""
    _, _, radius = _scaled(*at_least_float32(x))
    return radius


def safe_log(x: Real[ArrayLike, "*shape"]) -> Float[Array, "*shape"]:
    """Logarithm for `x >= 0`. Below the smallest normal number it is constant, with zero gradient.

    NaN and negative numbers give NaN.
    """
    (x,) = at_least_float32(x)
    smallest = float(jnp.finfo(x.dtype).tiny)
    is_small = x <= smallest
    log = jnp.log(jnp.where(is_small, jnp.ones_like(x), x))
    log = jnp.where(is_small, jnp.full_like(x, np.log(smallest)), log)
    return jnp.where(x < 0, jnp.full_like(x, jnp.nan), log)


def polar_decomposition(
    x: Real[ArrayLike, "*batch D"],
) -> tuple[Float[Array, "*batch D"], Float[Array, "*batch"]]:
    """Splits vectors into direction and radius, `x = radius * direction` (docs eq. 1).

    Args:
      x: finite.

    Returns:
      direction: unit vectors; the zero vector for `x = 0`, which has no direction.
      radius: at least zero. Gradients of direction and radius are finite everywhere.
    """
    scaled, norm, radius = _scaled(*at_least_float32(x))
    return scaled / norm[..., None], radius


def cosine_complements(
    direction: Real[ArrayLike, "*#batch D"], loc: Real[ArrayLike, "*#batch D"]
) -> tuple[Float[Array, "*#batch"], Float[Array, "*#batch"]]:
    """`1 - c` and `1 + c` with `c = <loc, direction>`, both without cancellation.

    They are half the squared chords to `loc` and to its antipode. Computed as `1 - <m, u>`, the
    first would have no correct digit in float32 for angles below 1e-3.

    Args:
      direction: unit vectors `u`.
      loc: unit vectors `m`.

    Returns:
      `1 - c` and `1 + c`, each in `[0, 2]`.

    Raises:
      ValueError: shapes do not broadcast.
    """
    u, m = at_least_float32(direction, loc)
    direction, loc = domain.broadcast({"direction": u, "loc": m}, {})
    one_minus = jnp.sum(jnp.square(direction - loc), axis=-1) / 2
    one_plus = jnp.sum(jnp.square(direction + loc), axis=-1) / 2
    return one_minus, one_plus


class TangentSquares(NamedTuple):
    """`(y_i / s_i)^2`, in a unit in which they do not overflow.

    Attributes:
      squares: `(y_i / s_i)^2 / exp(log_unit)`.
      log_unit: exactly zero if no square can overflow.
      log_volume: `log(2 / (1 + c))`, the log-Jacobian for each tangent dimension that normalizes
        stereographic coordinates on the sphere.
    """

    squares: Float[Array, "*batch D"]
    log_unit: Float[Array, "*batch"]
    log_volume: Float[Array, "*batch"]


def power_of_two_below(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """A power of two from a quarter of `x` to `x`, for `x` of at least the smallest normal number.

    A division by it is exact. It has no gradient.
    """
    limits = jnp.finfo(x.dtype)
    half = jnp.maximum(jax.lax.stop_gradient(x) / 2, float(limits.tiny))
    return jax.lax.reduce_precision(half, limits.nexp, 0)


def bounded_tangent_squares(
    direction: Float[Array, "*batch D"],
    loc: Float[Array, "*batch D"],
    scale_diag: Float[Array, "*batch D"],
    *,
    coordinates: Coordinates,
) -> TangentSquares:
    """`(y_i / s_i)^2` of the tangent coordinates `y` of `direction` at `loc`; their sum is `Q`.

    Chordal (Lambert) coordinates have `|y| = |u - m|`, stereographic ones `|y| = 2 tan(angle / 2)`
    (docs eq. 2 and 3). Both are `u - c m` times a power of `2 / (1 + c)`: its square root in
    chordal coordinates, the factor itself in stereographic ones. We need only squares, so we take
    no root.

    At the antipode `u = -m` all tangent directions are equivalent, so each square is its mean over
    them. A guard of one squared rounding error makes the transition smooth, and keeps
    `|y|^2 = 2 (1 - c)` exact for every angle. Where tiny scales or the antipode would overflow, the
    squares have another unit.

    Args:
      direction: unit vectors `u`.
      loc: unit vectors `m`.
      scale_diag: `s`, positive.
      coordinates: "chordal" or "stereographic".

    Raises:
      ValueError: `coordinates` is not one of the two.
    """
    squares, stretch = _residual_squares_and_stretch(direction, loc, coordinates)
    num_factors = 2 if coordinates == "stereographic" else 1
    unit = jnp.minimum(power_of_two_below(jnp.min(scale_diag, axis=-1)), 1.0)
    log_volume = jnp.log(stretch)
    log_unit = num_factors * log_volume - 2 * jnp.log(unit)
    is_extreme = log_unit > 0.68 * float(np.log(jnp.finfo(scale_diag.dtype).max))
    log_unit = jnp.where(is_extreme, log_unit, jnp.zeros_like(log_unit))
    one = jnp.ones_like(stretch)
    s = scale_diag / jnp.where(is_extreme, unit, one)[..., None]
    factor = jnp.where(is_extreme, one, stretch)[..., None]
    # (u - c m)^2 / s^2 * 2/(1 + c): eq. 2, squared and scaled. Divide twice by s, because the slope
    # in s of a division by s^2 has a factor s^-4, which overflows.
    scaled = squares / s / s * factor
    if coordinates == "stereographic":  # eq. 3 has the factor where eq. 2 has its square root
        scaled = scaled * factor
    return TangentSquares(scaled, log_unit, log_volume)


def _residual_squares_and_stretch(
    u: Float[Array, "*batch D"], m: Float[Array, "*batch D"], coordinates: Coordinates
) -> tuple[Float[Array, "*batch D"], Float[Array, "*batch"]]:
    """Squares of `u - c m`, and `2 / (1 + c)`, the two parts of eq. 2 and 3."""
    domain.choice("coordinates", coordinates, COORDINATES)
    n = u.shape[-1] - 1
    one_minus, one_plus = cosine_complements(u, m)
    guard = jnp.asarray(float(jnp.finfo(u.dtype).eps) ** 2, u.dtype)
    # u - c m, computed from the nearer pole, so that its rounding error shrinks with its length.
    residual = jnp.where(
        (one_minus < one_plus)[..., None],
        (u - m) + one_minus[..., None] * m,
        (u + m) - one_plus[..., None] * m,
    )
    mean_direction = (1 - jnp.square(m)) / n  # the average of e_i^2 over unit tangent vectors e
    squares = jnp.square(residual) + guard * one_minus[..., None] * mean_direction
    return squares, 2 / (one_plus + guard)


def scaled_tangent_squared_length(
    direction: Real[ArrayLike, "*#batch D"],
    loc: Real[ArrayLike, "*#batch D"],
    scale_diag: Real[ArrayLike, "*#batch #D"] | Real[ArrayLike, ""],
    *,
    coordinates: Coordinates,
) -> tuple[Float[Array, "*#batch"], Float[Array, "*#batch"]]:
    """`Q = sum_i (y_i / s_i)^2` of tangent coordinates (docs eq. 2 and 3).

    Args:
      direction: unit vectors `u`.
      loc: unit vectors `m`.
      scale_diag: `s`, positive.
      coordinates: "chordal" or "stereographic".

    Returns:
      squared_length: `Q`; `inf` where it overflows.
      log_volume: as in `TangentSquares`.

    Raises:
      ValueError: `coordinates` is unknown, a known scale is not positive, or shapes do not
        broadcast. Traced scales that are not positive give NaN.
    """
    u, m, s = at_least_float32(direction, loc, scale_diag)
    s = domain.positive("scale_diag", scale_diag, s)
    u, m, s = domain.broadcast({"direction": u, "loc": m}, {}, {"scale_diag": s})
    squares, log_unit, log_volume = bounded_tangent_squares(u, m, s, coordinates=coordinates)
    total = jnp.sum(squares, axis=-1)
    # The branch that is not taken gets a harmless argument. Otherwise its gradient could be NaN.
    is_in_unit = (log_unit > 0) & (total > 0)
    held = jnp.where(is_in_unit, total, jnp.ones_like(total))
    return jnp.where(is_in_unit, jnp.exp(jnp.log(held) + log_unit), total), log_volume
