"""The densities as `distrax.Distribution`s, so that they compose with distrax and TFP.

Only these classes need distrax; the pure functions do not.
"""

import distrax
import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jevb_jax import distributions, sphere


def gaussian_posterior(
    posterior_mean: Array, posterior_scale: Array
) -> distrax.MultivariateNormalDiag:
    """`q(z | h) = N(mean, diag(scale^2))`.

    Args:
      posterior_mean: `[..., D]`.
      posterior_scale: `[..., D]`, standard deviations, positive.

    Returns:
      A distribution over `[D]` of batch shape `[...]`.
    """
    return distrax.MultivariateNormalDiag(posterior_mean, posterior_scale)


def gaussian_prior(dim: int, prior_scale: float = 1.0) -> distrax.MultivariateNormalDiag:
    """`p(z) = N(0, prior_scale^2 I)`.

    Args:
      dim: `D`.
      prior_scale: standard deviation, positive.

    Returns:
      A distribution over `[D]`.
    """
    return distrax.MultivariateNormalDiag(jnp.zeros(dim), jnp.full(dim, prior_scale))


def _unit_sphere_check(loc: Array, minimum_dim: int, name: str) -> None:
    if loc.ndim < 1 or loc.shape[-1] < minimum_dim:
        raise ValueError(f"{name} needs loc [..., D] with D >= {minimum_dim}, got {loc.shape}")


class PowerSpherical(distrax.Distribution):
    """Power spherical distribution on `S^(D-1)` (De Cao and Aziz 2020), sampled exactly."""

    def __init__(self, loc: ArrayLike, concentration: ArrayLike):
        """Initialises the distribution.

        Args:
          loc: `[..., D]` unit vectors, the mean direction, `D >= 2`.
          concentration: at least zero (zero is uniform); broadcasts against `[...]`.

        Raises:
          ValueError: `D < 2`.
        """
        super().__init__()
        self._loc, concentration = sphere.at_least_float32(loc, concentration)
        _unit_sphere_check(self._loc, 2, "PowerSpherical")
        batch_shape = jnp.broadcast_shapes(self._loc.shape[:-1], concentration.shape)
        self._loc = jnp.broadcast_to(self._loc, (*batch_shape, self._loc.shape[-1]))
        self._concentration = jnp.broadcast_to(concentration, batch_shape)

    @property
    def loc(self) -> Array:
        """Mean direction, `[..., D]`."""
        return self._loc

    @property
    def concentration(self) -> Array:
        """Concentration, `[...]`."""
        return self._concentration

    @property
    def event_shape(self) -> tuple[int, ...]:
        """`(D,)`."""
        return self._loc.shape[-1:]

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """`[...]`."""
        return self._concentration.shape

    def log_prob(self, value: Array) -> Array:
        """See `power_spherical_log_prob`."""
        return distributions.power_spherical_log_prob(
            value, loc=self._loc, concentration=self._concentration
        )

    def entropy(self) -> Array:
        """Differential entropy in nats, `[...]`."""
        return distributions.power_spherical_entropy(self._concentration, dim=self._loc.shape[-1])

    def mean(self) -> Array:
        """Mean vector, `k / (D - 1 + k)` times the mean direction, `[..., D]`."""
        length = self._concentration / (self._loc.shape[-1] - 1 + self._concentration)
        return length[..., None] * self._loc

    def _sample_n(self, key: Array, n: int) -> Array:
        key_near, key_far, key_tangent = jax.random.split(key, 3)
        dtype = self._loc.dtype
        shape = (n, *self._loc.shape)
        beta = (self._loc.shape[-1] - 1) / 2
        # (1 + c)/2 ~ Beta(beta + k, beta) through two gammas, so that (1 - c)/2 keeps its digits.
        near = jax.random.gamma(
            key_near, jnp.broadcast_to(beta + self._concentration, shape[:-1]), dtype=dtype
        )
        far = jax.random.gamma(key_far, jnp.full(shape[:-1], beta, dtype), dtype=dtype)
        half_one_plus, half_one_minus = near / (near + far), far / (near + far)
        sine = 2 * jnp.sqrt(half_one_plus * half_one_minus)
        loc = jnp.broadcast_to(self._loc, shape)
        tangent = _unit_tangent(jax.random.normal(key_tangent, shape, dtype), loc)
        # cos = 1 - 2 (1 - c)/2, added to loc as a small correction where it is one.
        return loc - 2 * half_one_minus[..., None] * loc + sine[..., None] * tangent


class SphericalStudentT(distrax.Distribution):
    """The directional term as a distribution: Student-t in tangent coordinates of the sphere.

    "stereographic" coordinates make it a distribution, sampled exactly. "chordal" ones make it a
    sub-density, which has a `log_prob` but no exact sampler.
    """

    def __init__(
        self,
        loc: ArrayLike,
        scale_diag: ArrayLike,
        df: ArrayLike,
        coordinates: sphere.Coordinates = "chordal",
    ):
        """Initialises the distribution.

        Args:
          loc: `[..., D]` unit vectors, `D >= 3`.
          scale_diag: `[..., D]`, positive.
          df: degrees of freedom, positive, may be `inf`; broadcasts against `[...]`.
          coordinates: "chordal" or "stereographic".

        Raises:
          ValueError: `D < 3` or unknown coordinates.
        """
        super().__init__()
        if coordinates not in sphere.COORDINATES:
            raise ValueError(
                f"coordinates must be one of {sphere.COORDINATES}, got {coordinates!r}"
            )
        loc, scale_diag, df = sphere.at_least_float32(loc, scale_diag, df)
        _unit_sphere_check(loc, 3, "SphericalStudentT")
        batch_shape = jnp.broadcast_shapes(loc.shape[:-1], scale_diag.shape[:-1], df.shape)
        self._loc = jnp.broadcast_to(loc, (*batch_shape, loc.shape[-1]))
        self._scale_diag = jnp.broadcast_to(scale_diag, self._loc.shape)
        self._df = jnp.broadcast_to(df, batch_shape)
        self._coordinates: sphere.Coordinates = coordinates

    @property
    def loc(self) -> Array:
        """Location, `[..., D]`."""
        return self._loc

    @property
    def scale_diag(self) -> Array:
        """Scales, `[..., D]`."""
        return self._scale_diag

    @property
    def df(self) -> Array:
        """Degrees of freedom, `[...]`."""
        return self._df

    @property
    def event_shape(self) -> tuple[int, ...]:
        """`(D,)`."""
        return self._loc.shape[-1:]

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """`[...]`."""
        return self._df.shape

    def log_prob(self, value: Array) -> Array:
        """See `directional_log_prob`."""
        return distributions.directional_log_prob(
            value,
            loc=self._loc,
            scale_diag=self._scale_diag,
            df=self._df,
            coordinates=self._coordinates,
        )

    def _sample_n(self, key: Array, n: int) -> Array:
        if self._coordinates == "chordal":
            raise NotImplementedError(
                "the chordal density is a sub-density (its mass is below one) and has no exact "
                "sampler; use coordinates='stereographic'"
            )
        key_normal, key_gamma = jax.random.split(key)
        shape = (n, *self._loc.shape)
        dtype = self._loc.dtype
        loc = jnp.broadcast_to(self._loc, shape)
        scale_diag = jnp.broadcast_to(self._scale_diag, shape)
        normal = scale_diag * jax.random.normal(key_normal, shape, dtype)
        # N(0, S^2) conditioned on <m, x> = 0 has the compression of S^-2 to the tangent space as its
        # precision: x - S^2 m <m, x> / <m, S^2 m>.
        variance_loc = jnp.square(scale_diag) * loc
        along = jnp.sum(normal * loc, axis=-1) / jnp.sum(variance_loc * loc, axis=-1)
        tangent = normal - along[..., None] * variance_loc
        is_gaussian = jnp.broadcast_to(jnp.isinf(self._df), shape[:-1])
        finite_df = jnp.where(is_gaussian, 1.0, jnp.broadcast_to(self._df, shape[:-1]))
        chi_square_per_df = jax.random.gamma(key_gamma, finite_df / 2) / (finite_df / 2)
        heavy_tail = jnp.where(is_gaussian, 1.0, jax.lax.rsqrt(chi_square_per_df))
        length = sphere.safe_norm(tangent) * heavy_tail
        tangent = _unit_tangent(tangent, loc)
        # Inverse stereographic projection: |y| = 2 tan(angle / 2).
        angle = 2 * jnp.arctan(length / 2)
        return jnp.cos(angle)[..., None] * loc + jnp.sin(angle)[..., None] * tangent


def _unit_tangent(x: Array, loc: Array) -> Array:
    """The part of `x` orthogonal to `loc`, of norm one.

    Projected twice: where `x` is nearly parallel to `loc`, rounding in the first leaves a rest.
    """
    for _ in range(2):
        x = x - jnp.sum(x * loc, axis=-1, keepdims=True) * loc
        x, _ = sphere.polar_decomposition(x)
    return x
