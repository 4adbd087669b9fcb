"""The densities as `distrax.Distribution`s, which compose with distrax and TFP.

Only these classes need distrax; the pure functions do not. Each class holds only arrays, no shapes.
So instances can be passed to and returned from `jit` and `vmap`, and indexed along their batch.
"""

import math
from typing import Any

import distrax
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Float, Key, Real
from tensorflow_probability.substrates import jax as tfp

from jevb_jax.paper import densities, domain, special, sphere
from jevb_jax.paper.tracing import is_traced


def _indexed(batch_shape: tuple[int, ...], index: Any, *arrays: Array) -> list[Array]:
    """`array[index]` along the batch axes only, for arrays `[*batch_shape, ...]`.

    The rules are those of NumPy: an index out of range is an error, where JAX would clip it.
    """
    size = math.prod(batch_shape)
    positions = (jnp if is_traced(index) else np).arange(size).reshape(batch_shape)
    try:
        positions = positions[index]
    except IndexError as error:
        raise IndexError(f"index {index!r} does not fit the batch shape {batch_shape}") from error
    return [x.reshape((size, *x.shape[len(batch_shape) :]))[positions] for x in arrays]


class _DiagonalGaussian(distrax.MultivariateNormalDiag):
    """`distrax.MultivariateNormalDiag` in the float type of its parameters, with any batch shape.

    The parent class stores shapes as data that `vmap` cannot change, and its unit scale is float64
    if x64 is enabled. Therefore we build the parent from the parameters only when it is needed.
    """

    def __init__(self, loc: Float[Array, "*batch D"], scale_diag: Float[Array, "*batch D"]):
        # Does not call the parent's `__init__`; the class docstring says why.
        self._loc = loc
        self._scale_diag = scale_diag

    def _parent(self) -> distrax.MultivariateNormalDiag:
        return distrax.MultivariateNormalDiag(self._loc, self._scale_diag)

    @property
    def distribution(self) -> Any:
        """The standard normal distribution that is transformed."""
        return self._parent().distribution

    @property
    def bijector(self) -> Any:
        """The transformation of the standard normal."""
        return self._parent().bijector

    @property
    def scale(self) -> Any:
        """The scale as a bijector."""
        return self._parent().scale

    @property
    def loc(self) -> Float[Array, "*batch D"]:
        """Mean."""
        return self._loc

    @property
    def scale_diag(self) -> Float[Array, "*batch D"]:
        """Standard deviations."""
        return self._scale_diag

    @property
    def event_shape(self) -> tuple[int, ...]:
        """`(D,)`."""
        return self._loc.shape[-1:]

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """Shape of the parameters without `D`."""
        return self._loc.shape[:-1]

    @property
    def dtype(self) -> Any:
        """Float type of parameters and samples."""
        return self._loc.dtype

    def log_prob(self, value: Real[ArrayLike, "*#batch D"]) -> Float[Array, "*#batch"]:
        """Log-density in nats."""
        x, loc, scale = sphere.at_least_float32(value, self._loc, self._scale_diag)
        x, loc, scale = domain.broadcast({"value": x, "loc": loc, "scale_diag": scale}, {})
        squares = jnp.square((x - loc) / scale)
        constant = self._loc.shape[-1] / 2 * math.log(2 * math.pi)
        return -jnp.sum(squares / 2 + jnp.log(scale), axis=-1) - constant

    def entropy(self) -> Float[Array, "*batch"]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Differential entropy in nats."""
        constant = self._loc.shape[-1] / 2 * math.log(2 * math.pi * math.e)
        return jnp.sum(jnp.log(self._scale_diag), axis=-1) + constant

    def variance(self) -> Float[Array, "*batch D"]:
        """Variances."""
        return jnp.square(self._scale_diag)

    def stddev(self) -> Float[Array, "*batch D"]:
        """Standard deviations."""
        return self._scale_diag

    def _sample_n(self, key: Key[Array, ""], n: int) -> Float[Array, "n *batch D"]:
        shape = (n, *self._loc.shape)
        loc, scale = (jnp.broadcast_to(x, shape) for x in (self._loc, self._scale_diag))
        return loc + scale * jax.random.normal(key, shape, self._loc.dtype)

    def _sample_n_and_log_prob(self, key: Array, n: int) -> tuple[Array, Array]:
        sample = self._sample_n(key, n)
        return sample, self.log_prob(sample)

    def __getitem__(self, index: Any) -> "_DiagonalGaussian":
        return _DiagonalGaussian(*_indexed(self.batch_shape, index, self._loc, self._scale_diag))


@tfp.distributions.RegisterKL(_DiagonalGaussian, _DiagonalGaussian)
def _gaussian_kl(
    first: _DiagonalGaussian, second: _DiagonalGaussian, name: str | None = None
) -> Array:
    del name
    means = sphere.at_least_float32(first.loc, second.loc)
    first_loc, second_loc = domain.broadcast(
        {"loc of the first": means[0], "loc of the second": means[1]}, {}
    )
    return densities.gaussian_kl_divergence(
        first_loc - second_loc, first.scale_diag, prior_scale=second.scale_diag
    )


def gaussian_posterior(
    posterior_mean: Real[ArrayLike, "*#batch D"],
    posterior_scale: Real[ArrayLike, "*#batch #D"] | Real[ArrayLike, ""],
) -> distrax.MultivariateNormalDiag:
    """The posterior `q(z | h) = N(mean, diag(scale^2))` as a distribution over `[D]`.

    Args:
      posterior_mean: `mu`.
      posterior_scale: `sigma`, standard deviations, positive.

    Raises:
      ValueError: a known scale is not positive, or shapes do not broadcast. Traced scales that are
        not positive become NaN.
    """
    mean, scale = sphere.at_least_float32(posterior_mean, posterior_scale)
    scale = domain.positive("posterior_scale", posterior_scale, scale)
    mean, scale = domain.broadcast({"posterior_mean": mean}, {}, {"posterior_scale": scale})
    return _DiagonalGaussian(mean, scale)


def gaussian_prior(
    dim: int, prior_scale: Real[ArrayLike, "*batch"] = 1.0
) -> distrax.MultivariateNormalDiag:
    """The prior `p(z) = N(0, prior_scale^2 I)` as a distribution over `[D]`.

    Args:
      dim: `D`.
      prior_scale: standard deviation, positive; several make a batch of priors.

    Raises:
      ValueError: `dim` is not a whole number above zero, or a known scale is not positive.
    """
    dim = domain.whole_number("dim", dim, 1)
    (scale,) = sphere.at_least_float32(prior_scale)
    scale = domain.positive("prior_scale", prior_scale, scale)
    scale = jnp.broadcast_to(scale[..., None], (*scale.shape, dim))
    return _DiagonalGaussian(jnp.zeros_like(scale), scale)


class _OnSphere(distrax.Distribution):
    """Common properties of the distributions of directions."""

    _loc: Float[Array, "*batch D"]

    @property
    def loc(self) -> Float[Array, "*batch D"]:
        """The location, unit vectors."""
        return self._loc

    @property
    def event_shape(self) -> tuple[int, ...]:
        """`(D,)`."""
        return self._loc.shape[-1:]

    @property
    def dtype(self) -> Any:
        """Float type of parameters and samples."""
        return self._loc.dtype


class PowerSpherical(_OnSphere):
    """Power spherical distribution on `S^(D-1)` (De Cao and Aziz 2020), with an exact sampler.

    Args:
      loc: unit vectors, the mean direction, `D >= 2`.
      concentration: at least zero (zero is uniform), finite.

    Raises:
      ValueError: `D < 2`, a known `loc` is not a unit vector, a known concentration is negative or
        not finite, or shapes do not broadcast. Traced concentrations out of range become NaN.
    """

    def __init__(
        self, loc: Real[ArrayLike, "*#batch D"], concentration: Real[ArrayLike, "*#batch"]
    ):
        super().__init__()
        m, k = sphere.at_least_float32(loc, concentration)
        domain.unit_vectors("loc", loc)
        k = domain.concentration("concentration", concentration, k)
        self._loc, self._concentration = domain.broadcast({"loc": m}, {"concentration": k})
        domain.sphere_of(self._loc.shape[-1], 2, "PowerSpherical")

    @property
    def concentration(self) -> Float[Array, "*batch"]:
        """Concentration, at least zero."""
        return self._concentration

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """Shape of the parameters without `D`."""
        return self._concentration.shape

    def __getitem__(self, index: Any) -> "PowerSpherical":
        return PowerSpherical(*_indexed(self.batch_shape, index, self._loc, self._concentration))

    def log_prob(self, value: Real[ArrayLike, "*#batch D"]) -> Float[Array, "*#batch"]:
        """Log-density in nats, by `power_spherical_log_prob`."""
        return densities.power_spherical_log_prob(
            value, loc=self._loc, concentration=self._concentration
        )

    def entropy(self) -> Float[Array, "*batch"]:
        """Differential entropy in nats."""
        return densities.power_spherical_entropy(self._concentration, dim=self._loc.shape[-1])

    def mean(self) -> Float[Array, "*batch D"]:
        """Mean vector, `k / (D - 1 + k)` times the mean direction."""
        length = self._concentration / (self._loc.shape[-1] - 1 + self._concentration)
        return length[..., None] * self._loc

    def mode(self) -> Float[Array, "*batch D"]:
        """The mean direction. At concentration zero every direction is a mode."""
        return self._loc

    def _sample_n(self, key: Key[Array, ""], n: int) -> Float[Array, "n *batch D"]:
        key_near, key_far, key_tangent = jax.random.split(key, 3)
        dtype = self._loc.dtype
        shape = (n, *self._loc.shape)
        beta = (self._loc.shape[-1] - 1) / 2
        # (1 + c)/2 ~ Beta(beta + k, beta), by two gamma variables, so that (1 - c)/2 keeps its
        # digits.
        near = jax.random.gamma(
            key_near, jnp.broadcast_to(beta + self._concentration, shape[:-1]), dtype=dtype
        )
        far = jax.random.gamma(key_far, jnp.full(shape[:-1], beta, dtype), dtype=dtype)
        half_one_plus, half_one_minus = near / (near + far), far / (near + far)
        sine = 2 * jnp.sqrt(half_one_plus * half_one_minus)
        loc = jnp.broadcast_to(self._loc, shape)
        tangent = _unit_tangent(jax.random.normal(key_tangent, shape, dtype), loc)
        # cos = 1 - 2 (1 - c)/2. For small angles this adds a small correction to loc.
        return loc - 2 * half_one_minus[..., None] * loc + sine[..., None] * tangent


@tfp.distributions.RegisterKL(PowerSpherical, PowerSpherical)
def _power_spherical_kl(
    first: PowerSpherical, second: PowerSpherical, name: str | None = None
) -> Array:
    """`KL(first || second)` if `second` is uniform or has the same mean direction as `first`.

    The mean of `log(1 + c)` is known only for the cosine `c` to the mean direction of `first`.
    Other pairs raise an error, or give NaN if the values are traced.
    """
    del name
    first_loc, second_loc, k, other = sphere.at_least_float32(
        first.loc, second.loc, first.concentration, second.concentration
    )
    first_loc, second_loc, k, other = domain.broadcast(
        {"loc of the first": first_loc, "loc of the second": second_loc},
        {"concentration of the first": k, "concentration of the second": other},
    )
    is_known = (other == 0) | jnp.all(first_loc == second_loc, axis=-1)
    if not is_traced(is_known) and not np.all(is_known):
        raise NotImplementedError(
            "KL between power spherical distributions has a closed form only if the second is uniform "
            "(concentration zero) or both have the same loc. Otherwise estimate it by the mean of "
            "first.log_prob(x) - second.log_prob(x) over samples x of the first"
        )
    half = jnp.full_like(k, (first_loc.shape[-1] - 1) / 2)

    def log_base(k: Array) -> Array:
        return special.log_gamma_ratio(half + k, half) + half * jnp.log(half + k)

    # The mean of log((1 + c)/2) is that of the logarithm of a Beta variable.
    mean_log = -special.digamma_difference(half + k, half)
    divergence = log_base(k) - log_base(other) + (k - other) * mean_log
    # Rounding could make a difference of nearly equal numbers negative.
    return jnp.where(is_known, jnp.maximum(divergence, 0.0), jnp.full_like(k, jnp.nan))


@tfp.distributions.RegisterKL(PowerSpherical, tfp.distributions.SphericalUniform)
def _power_spherical_kl_to_uniform(
    first: PowerSpherical, second: Any, name: str | None = None
) -> Array:
    del name
    if tuple(second.event_shape) != first.event_shape:
        raise ValueError(
            f"both must be on one sphere, got event shapes {first.event_shape} and "
            f"{tuple(second.event_shape)}"
        )
    uniform = PowerSpherical(first.loc, jnp.zeros_like(first.concentration))
    shape = jnp.broadcast_shapes(first.batch_shape, tuple(second.batch_shape))
    return jnp.broadcast_to(_power_spherical_kl(first, uniform), shape)


class SphericalStudentT(_OnSphere):
    """The directional term as a distribution: Student-t in tangent coordinates of the sphere.

    With "stereographic" coordinates it is a distribution with an exact sampler. If `df < D - 1`,
    its density has a pole at the antipode of `loc`. With "chordal" coordinates it is a sub-density,
    which has a `log_prob` but no exact sampler.

    Args:
      loc: unit vectors, `D >= 3`.
      scale_diag: positive. A number or `[..., 1]` is the same scale for all features.
      df: degrees of freedom, positive, may be `inf`.
      coordinates: "chordal" or "stereographic".

    Raises:
      ValueError: `D < 3`, a known `loc` is not a unit vector, a known scale or `df` is not
        positive, shapes do not broadcast, or `coordinates` is unknown. Traced scales and `df` that
        are not positive become NaN.
    """

    def __init__(
        self,
        loc: Real[ArrayLike, "*#batch D"],
        scale_diag: Real[ArrayLike, "*#batch #D"] | Real[ArrayLike, ""],
        df: Real[ArrayLike, "*#batch"],
        coordinates: sphere.Coordinates = "chordal",
    ):
        super().__init__()
        domain.choice("coordinates", coordinates, sphere.COORDINATES)
        m, s, nu = sphere.at_least_float32(loc, scale_diag, df)
        domain.unit_vectors("loc", loc)
        s = domain.positive("scale_diag", scale_diag, s)
        nu = domain.degrees_of_freedom("df", df, nu)
        self._loc, self._scale_diag, self._df = domain.broadcast(
            {"loc": m}, {"df": nu}, {"scale_diag": s}
        )
        domain.sphere_of(self._loc.shape[-1], 3, "SphericalStudentT")
        self._coordinates: sphere.Coordinates = coordinates

    @property
    def scale_diag(self) -> Float[Array, "*batch D"]:
        """Scales."""
        return self._scale_diag

    @property
    def df(self) -> Float[Array, "*batch"]:
        """Degrees of freedom."""
        return self._df

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """Shape of the parameters without `D`."""
        return self._df.shape

    def __getitem__(self, index: Any) -> "SphericalStudentT":
        arrays = _indexed(self.batch_shape, index, self._loc, self._scale_diag, self._df)
        return SphericalStudentT(*arrays, coordinates=self._coordinates)

    def log_prob(self, value: Real[ArrayLike, "*#batch D"]) -> Float[Array, "*#batch"]:
        """Log-density in nats, by `directional_log_prob`."""
        return densities.directional_log_prob(
            value,
            loc=self._loc,
            scale_diag=self._scale_diag,
            df=self._df,
            coordinates=self._coordinates,
        )

    def mode(self) -> Float[Array, "*batch D"]:
        """Where the density is largest: `loc`, or NaN if the density is larger elsewhere.

        Chordal densities have their mode at `loc`. Stereographic densities do if `df >= D - 1` and
        the largest variance of a tangent coordinate is at most `2 (1/n + 1/df)`, `n = D - 1`. Wider
        ones have two maxima, one on each side of `loc`. Those with `df < D - 1` have a pole at the
        antipode.
        """
        if self._coordinates == "chordal":
            return self._loc
        n = self._loc.shape[-1] - 1
        largest = jnp.max(self._scale_diag, axis=-1, keepdims=True)
        scale = self._scale_diag / largest
        along, _ = sphere.polar_decomposition(scale * self._loc)
        # The covariance given <m, y> = 0 is S (1 - w w^T) S, with w the direction of S m.
        projection = jnp.eye(n + 1, dtype=scale.dtype) - along[..., None] * along[..., None, :]
        covariance = scale[..., None] * projection * scale[..., None, :]
        widest = jnp.max(jnp.linalg.eigvalsh(covariance), axis=-1) * jnp.square(largest[..., 0])
        # The tolerance covers rounding of scales and eigenvalues at the limit itself.
        limit = 2 * (1 / n + 1 / self._df) * (1 + 1e-5)
        is_mode = (self._df >= n) & (widest <= limit)
        return jnp.where(is_mode[..., None], self._loc, jnp.full_like(self._loc, jnp.nan))

    def mean(self) -> Array:
        """Raises NotImplementedError, because there is no closed form."""
        raise NotImplementedError(
            "the mean of SphericalStudentT has no closed form. In stereographic coordinates take the "
            "mean of samples, which lies along loc"
        )

    def entropy(self) -> Array:
        """Raises NotImplementedError, because there is no closed form."""
        raise NotImplementedError(
            "the entropy of SphericalStudentT has no closed form. In stereographic coordinates take "
            "minus the mean of log_prob over samples"
        )

    def kl_divergence(self, other_dist: Any, **kwargs: Any) -> Array:
        """Raises NotImplementedError, because there is no closed form."""
        del kwargs
        raise NotImplementedError(
            f"the KL of SphericalStudentT to {type(other_dist).__name__} has no closed form. In "
            "stereographic coordinates take the mean of log_prob(x) - other.log_prob(x) over samples x; "
            "the uniform log-density is uniform_log_prob(D)"
        )

    def _sample_n(self, key: Key[Array, ""], n: int) -> Float[Array, "n *batch D"]:
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
        # N(0, S^2) given <m, x> = 0 has a precision that is the compression of S^-2 to the tangent
        # space. With x = S g, the condition is that g is orthogonal to S m.
        along, _ = sphere.polar_decomposition(scale_diag * loc)
        normal = jax.random.normal(key_normal, shape, dtype)
        normal = normal - jnp.sum(normal * along, axis=-1, keepdims=True) * along
        tangent = scale_diag * normal
        log_tail = _log_heavy_tail(key_gamma, jnp.broadcast_to(self._df, shape[:-1]))
        # Inverse stereographic projection: t = tan(angle / 2) is half the length and may overflow.
        # Above one we compute with its reciprocal.
        half = sphere.safe_norm(tangent) / 2
        is_zero = half == 0
        half = jnp.where(is_zero, 1.0, half)
        is_far = ~is_zero & (log_tail > -jnp.log(half))
        near = half * jnp.exp(jnp.where(is_far, 0.0, log_tail))
        far = jnp.exp(-jnp.where(is_far, log_tail, 0.0)) / half
        tangens = jnp.where(is_zero, 0.0, jnp.where(is_far, far, near))
        square = jnp.square(tangens)
        cosine = jnp.where(is_far, square - 1, 1 - square) / (1 + square)
        sine = 2 * tangens / (1 + square)
        tangent = _unit_tangent(tangent, loc)
        return cosine[..., None] * loc + sine[..., None] * tangent


def _log_heavy_tail(key: Array, df: Array) -> Array:
    """Log of `sqrt(df / chi-square)`, the width of a Student-t. Its gradient is always finite.

    A gamma variable with a shape below one may underflow. Then we draw one with the shape plus one
    and multiply it by `U^(1 / shape)`, `U` uniform (Marsaglia and Tsang 2000, section 6), in
    logarithms.
    """
    is_gaussian = jnp.isinf(df)
    shape = jnp.where(is_gaussian, 1.0, df / 2)
    is_small = shape < 1
    log_gamma = jax.random.loggamma(key, jnp.where(is_small, shape + 1, shape), dtype=df.dtype)
    exponential = jax.random.exponential(jax.random.fold_in(key, 1), df.shape, df.dtype)
    log_gamma = log_gamma - jnp.where(is_small, exponential / jnp.where(is_small, shape, 1.0), 0.0)
    return jnp.where(is_gaussian, 0.0, (jnp.log(shape) - log_gamma) / 2)


def _unit_tangent(x: Array, loc: Array) -> Array:
    """The part of `x` orthogonal to `loc`, of norm one.

    It is projected twice: if `x` is nearly parallel to `loc`, the first projection leaves an error.
    """
    x, _ = sphere.polar_decomposition(x)
    for _ in range(2):
        x = x - jnp.sum(x * loc, axis=-1, keepdims=True) * loc
        x, _ = sphere.polar_decomposition(x)
    return x
