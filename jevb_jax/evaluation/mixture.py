"""The posteriors of the training images as a density of embeddings, a mixture (docs eq. 35)."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from jevb_jax.evaluation.products import exact_matmul
from jevb_jax.paper import densities, sphere

# Queries in one step. Memory holds as many rows `[N]`.
BATCH_SIZE = 64
# For so many components of largest density the distance is computed again without cancellation. For
# more copies of an image than this, the distance is zero up to rounding, 1e-7 / scale^2.
_NUM_EXACT = 4


def student_t_kernel(squared_length: Array, df: float, n: int) -> Array:
    """Kernel `((df + n)/2) log(1 + Q/df)` of the squared length `Q`; `Q/2` at `df = inf`."""
    if np.isinf(df):
        return squared_length / 2
    return (df + n) / 2 * jnp.log1p(squared_length / df)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RadialComponents:
    """The radial densities of the training images (docs eq. 6).

    Attributes:
      log_radius: `[N]`, logarithm of the radius `rho` of each posterior mean.
      scale: `[]`, relative width.
      df: degrees of freedom, static.
    """

    log_radius: Array
    scale: Array
    df: float = dataclasses.field(metadata={"static": True})

    def log_peak(self, radius: Array) -> Array:
        """Log-density at its maximum for components with these radii, `[...]`, nats."""
        return densities.radial_log_prob(
            radius, loc=radius, scale=self.scale, df=self.df, space="log"
        )

    def kernels(self, log_radius: Array) -> Array:
        """`log_peak` minus the log-density under each component, `[N]`, for one radius `[]`."""
        distance = (log_radius[None] - self.log_radius) / self.scale
        return student_t_kernel(jnp.square(distance), self.df, 1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainingMixture:
    """Negative log-likelihood under the training images, fitted by `fit_training_mixture`.

    It is a tree of arrays and can be passed through `jax.jit`. The fit computes once what depends
    on the components only.

    Attributes:
      location: `[N, D]`, directions `m` of the posterior means.
      precision: `[N, D]`, `w = s^-2`, with the bandwidth included in the scales `s`.
      weighted_location: `[N, D]`, `m w`.
      location_precision: `[N]`, `sum_i m_i^2 w_i`.
      least_precision: `[N]`, smallest `w`.
      greatest_precision: `[N]`, largest `w`.
      mean_precision: `[N]`, mean of `w` over unit tangent directions at `m`.
      log_mass: `[N]`, nats, logarithm of the mass of the directional density on the sphere.
      log_weight: `[N]`, nats, directional log-density at `m` minus `log_mass`.
      bandwidth: `[]`, the factor that the likelihood scales were multiplied by.
      df: degrees of freedom of the directional density, static.
      radial: None leaves the radial density out.
      leave_one_out: `[]`, nats, mean leave-one-out log-likelihood of training images at this
        bandwidth; None if the fit had no embeddings.
    """

    location: Array
    precision: Array
    weighted_location: Array
    location_precision: Array
    least_precision: Array
    greatest_precision: Array
    mean_precision: Array
    log_mass: Array
    log_weight: Array
    bandwidth: Array
    df: float = dataclasses.field(metadata={"static": True})
    radial: RadialComponents | None = None
    leave_one_out: Array | None = None

    def __call__(self, embedding: ArrayLike) -> Array:
        """`-log 1/N sum_n p(h | n)`, larger is more out of distribution.

        Args:
          embedding: `[M, D]`. A zero row has no direction: its score is finite but has no meaning.
            A row with NaN scores NaN; a row with infinite values scores infinity.

        Returns:
          `[M]`, nats.

        Raises:
          ValueError: the shape is not `[M, D]`.
          TypeError: values are not real numbers.
        """
        score = float(np.log(len(self.location))) - self._log_sum(embedding, None)
        h = jnp.asarray(embedding, self.location.dtype)
        has_overflowed = jnp.isnan(score) & ~jnp.isnan(h).any(axis=-1)
        return jnp.where(has_overflowed, jnp.inf, score)

    def _log_sum(self, embedding: ArrayLike, own: Array | None) -> Array:
        """`log sum_n p(h | n)`, `[M]`. For row `i`, the component `own[i]` is left out."""
        given = jnp.result_type(embedding)
        if not (jnp.issubdtype(given, jnp.floating) or jnp.issubdtype(given, jnp.integer)):
            raise TypeError(f"embedding must be real numbers, got {given}")
        h = jnp.asarray(embedding, self.location.dtype)
        dim = self.location.shape[1]
        if h.ndim != 2 or h.shape[1] != dim:
            raise ValueError(
                f"embedding must be [M, {dim}], as wide as the fitted images, got {h.shape}"
            )
        return self._log_sum_of_rows(h, own)

    # Without `jit`, a loop would be compiled at each call.
    @jax.jit
    def _log_sum_of_rows(self, h: Array, own: Array | None) -> Array:
        """`_log_sum` of checked rows."""
        num_components = len(self.location)
        direction, radius = sphere.polar_decomposition(h)

        def of_query(query: tuple[Array, Array, Array | None]) -> Array:
            direction, log_radius, own = query
            log_prob = self._log_probs(direction)
            radial = None if self.radial is None else self.radial.kernels(log_radius)
            if radial is not None:
                log_prob = log_prob - radial
            if own is not None:
                log_prob = jnp.where(jnp.arange(num_components) == own, -jnp.inf, log_prob)
            _, nearest = jax.lax.top_k(log_prob, min(_NUM_EXACT, num_components))
            exact = self._exact_log_probs(direction, nearest)
            if radial is not None:
                exact = exact - radial[nearest]
            if own is not None:
                exact = jnp.where(nearest == own, -jnp.inf, exact)
            return jax.nn.logsumexp(log_prob.at[nearest].set(exact))

        queries = (direction, sphere.safe_log(radius), own)
        log_sum = jax.lax.map(of_query, queries, batch_size=BATCH_SIZE)
        return log_sum if self.radial is None else log_sum + self.radial.log_peak(radius)

    def _log_probs(self, direction: Array) -> Array:
        """Directional log-densities `[N]` of one direction `[D]` under all components.

        `Q = 2/(1 + c) sum_i w_i (u_i - c m_i)^2` is expanded into products.
        """
        # With this order XLA need not transpose, which would double the cost.
        cosine = jnp.clip(exact_matmul(direction, self.location.T), -1, 1)
        squared = (
            exact_matmul(jnp.square(direction), self.precision.T)
            - 2 * cosine * exact_matmul(direction, self.weighted_location.T)
            + jnp.square(cosine) * self.location_precision
        )
        # At the antipode of `m` this is 0 / 0, and all tangent directions are equivalent.
        is_antipode = 1 + cosine < float(jnp.finfo(cosine.dtype).eps) ** 0.5
        squared = 2 * squared / jnp.where(is_antipode, 1.0, 1 + cosine)
        squared_chord = 2 * (1 - cosine)
        squared = jnp.where(is_antipode, squared_chord * self.mean_precision, squared)
        # These bounds hold exactly. Rounding would break them near `m` (below zero, then NaN) and
        # near the antipode.
        squared = jnp.clip(
            squared,
            squared_chord * self.least_precision,
            squared_chord * self.greatest_precision,
        )
        return self.log_weight - student_t_kernel(squared, self.df, self.location.shape[1] - 1)

    def _exact_log_probs(self, direction: Array, index: Array) -> Array:
        """`_log_probs(direction)[index]` without cancellation, for near duplicates in float32."""
        log_prob = densities.directional_log_prob(
            direction[None],
            loc=self.location[index],
            scale_diag=1 / jnp.sqrt(self.precision[index]),
            df=self.df,
        )
        return log_prob - self.log_mass[index]
