"""Fits the mixture, with the bandwidth at which left-out training images are most likely."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from jevb_jax import arguments
from jevb_jax.evaluation.detector_input import DegenerateFeaturesError, real_matrix
from jevb_jax.evaluation.mixture import RadialComponents, TrainingMixture
from jevb_jax.paper import densities, mass, sphere

# Number of components whose masses are computed at once.
_MASS_BATCH_SIZE = 1024
# Range of scales for which the mass can be computed in float32.
_SCALE_LIMITS = (1e-15, 1e15)
# From here on float32 cannot tell the density from a Gaussian, and would overflow.
_GAUSSIAN_DF = 1e30

# Bandwidths to try, as powers of the square root of 2: first 1/8 to 2, then up to these ends.
_FIRST_STEPS = range(-6, 3)
_STEP_LIMITS = (-18, 14)


class BandwidthChoice(NamedTuple):
    """What `choose_bandwidth` found.

    Attributes:
      bandwidth: the one with the largest log-likelihood.
      log_likelihood: nats, mean over training images at that bandwidth.
      grid: `[G]`, all bandwidths that were tried, rising.
      log_likelihoods: `[G]`, nats, for each of them.
    """

    bandwidth: float
    log_likelihood: float
    grid: np.ndarray
    log_likelihoods: np.ndarray


def fit_training_mixture(
    posterior_mean: ArrayLike,
    scale_diag: ArrayLike,
    *,
    df: float,
    bandwidth: float | None = None,
    embedding: ArrayLike | None = None,
    radial_scale: float | None = None,
    radial_df: float | None = None,
    num_queries: int = 2000,
    seed: int = 0,
) -> TrainingMixture:
    """Fits a score: likelihood under the posteriors of the training images (docs eq. 35).

    This is the VampPrior of Tomczak and Welling 2018, used as a density of embeddings.

    Args:
      posterior_mean: `[N, D]`, of in-distribution images, `D >= 3`, not zero.
      scale_diag: `[N, D]`, scales of the directional likelihood in units of the sphere, positive.
      df: degrees of freedom of the directional density, positive; `inf` is the Gaussian.
      bandwidth: factor on the scales, positive. None takes the result of `choose_bandwidth`.
      embedding: `[N, D]`, of the same images in the same order. It is required if `bandwidth` is
        None; otherwise it is only used for `leave_one_out`.
      radial_scale: relative width of the radius, positive; None leaves the radial density out.
      radial_df: degrees of freedom of the radial density, positive. Give it with `radial_scale`
        and only then.
      num_queries: largest number of training images whose leave-one-out likelihood is computed.
      seed: sets which images are drawn if there are more; an integer of at least 0.

    Returns:
      A score: embeddings `[M, D]` to `[M]`, nats.

    Raises:
      ValueError: there are no images, shapes differ, `D < 3`, values are not finite, a mean is
        zero, `df` or the bandwidth is not positive, or scales times bandwidth leave 1e-15 to 1e15;
        if embeddings are used, also for the reasons of `choose_bandwidth`.
    """
    components = _Components.of(posterior_mean, scale_diag, df, radial_scale, radial_df)
    if bandwidth is None:
        if embedding is None:
            raise ValueError(
                "give a bandwidth, or the embeddings of the training images to choose it by"
            )
        choice = _choose_bandwidth(components, embedding, num_queries, seed)
        bandwidth, leave_one_out = choice.bandwidth, choice.log_likelihood
        mixture = components.at(bandwidth)
    else:
        mixture = components.at(bandwidth)
        if embedding is None:
            return mixture
        h, own = _queries(components, embedding, num_queries, seed)
        leave_one_out = _mean_leave_one_out(mixture, h, own)
    return dataclasses.replace(
        mixture, leave_one_out=jnp.asarray(leave_one_out, mixture.location.dtype)
    )


def choose_bandwidth(
    posterior_mean: ArrayLike,
    scale_diag: ArrayLike,
    embedding: ArrayLike,
    *,
    df: float,
    radial_scale: float | None = None,
    radial_df: float | None = None,
    num_queries: int = 2000,
    seed: int = 0,
) -> BandwidthChoice:
    """Bandwidth with the largest leave-one-out likelihood, without labels or outside data.

    The method is from Duin 1976. Half octaves from 1/8 to 2 are tried. While the best is at an end,
    the search goes on: down to 2^-9, which only copies among the images can reach, and up to 2^7,
    where the density is uniform.

    The other arguments, and the errors, are those of `fit_training_mixture`.

    Args:
      num_queries: largest number of images whose likelihood is computed. All images stay
        components.

    Raises:
      ValueError: there are fewer than 2 images, or `num_queries < 1`.
      DegenerateFeaturesError: the likelihood still rises at a bandwidth of 2^-9.
    """
    components = _Components.of(posterior_mean, scale_diag, df, radial_scale, radial_df)
    return _choose_bandwidth(components, embedding, num_queries, seed)


@jax.jit
def _leave_one_out(mixture: TrainingMixture, embedding: Array, own: Array) -> Array:
    """`log 1/(N - 1) sum_(n != own) p(h | n)`, `[M]`, nats; `own[i]` is the place of row `i`."""
    return mixture._log_sum(embedding, own) - float(np.log(len(mixture.location) - 1))


def _mean_leave_one_out(mixture: TrainingMixture, embedding: Array, own: Array) -> float:
    return float(np.mean(np.asarray(_leave_one_out(mixture, embedding, own), np.float64)))


def _at_least_two(num_images: int) -> int:
    if num_images < 2:
        raise DegenerateFeaturesError(
            f"leave-one-out needs at least 2 training images, got {num_images}. Give a bandwidth and "
            "no embeddings"
        )
    return num_images


def _queries(
    components: "_Components", embedding: ArrayLike, num_queries: int, seed: int
) -> tuple[Array, Array]:
    """Embeddings of training images that are drawn, `[M, D]`, and their positions, `[M]`."""
    h = _finite_matrix("embedding", embedding)
    if h.shape != components.location.shape:
        raise ValueError(
            f"embedding must be {components.location.shape} as the posterior means, got {h.shape}"
        )
    num_images = _at_least_two(len(h))
    num_queries = arguments.whole_number("num_queries", num_queries, at_least=1)
    seed = arguments.whole_number("seed", seed, at_least=0)
    largest = float(jnp.finfo(components.dtype).max)
    num_large = int(np.sum((np.abs(h) > largest).any(axis=1)))
    if num_large:
        raise ValueError(
            f"embedding must lie within {largest:.3g}, the largest {components.dtype}: {num_large} of "
            f"{num_images} rows do not"
        )
    own = np.arange(num_images)
    if num_queries < num_images:
        drawn = np.random.default_rng(seed).choice(num_images, num_queries, replace=False)
        own = np.sort(drawn)
    return jax.device_put((h[own].astype(components.dtype), own.astype(np.int32)))


def _choose_bandwidth(
    components: "_Components", embedding: ArrayLike, num_queries: int, seed: int
) -> BandwidthChoice:
    h, own = _queries(components, embedding, num_queries, seed)

    def log_likelihood(step: int) -> float:
        return _mean_leave_one_out(components.at(2 ** (step / 2)), h, own)

    values = {step: log_likelihood(step) for step in _FIRST_STEPS}
    lowest, highest = _STEP_LIMITS
    while True:
        best = max(values, key=values.__getitem__)
        if best == min(values) and best > lowest:
            values[best - 1] = log_likelihood(best - 1)
        elif best == max(values) and best < highest:
            values[best + 1] = log_likelihood(best + 1)
        else:
            break
    if best == lowest:
        raise DegenerateFeaturesError(
            f"the leave-one-out likelihood still rises at a bandwidth of {2 ** (best / 2):.2g}. Are "
            "training images copies of each other, or has the encoder collapsed? Leave copies out, "
            "or give a bandwidth"
        )
    steps = sorted(values)
    return BandwidthChoice(
        2 ** (best / 2),
        values[best],
        2 ** (np.array(steps) / 2),
        np.array([values[step] for step in steps]),
    )


class _Components(NamedTuple):
    """Checked components in float64, before a bandwidth is chosen.

    Attributes:
      location: `[N, D]`, directions.
      log_radius: `[N]`.
      scale_diag: `[N, D]`.
      df: positive.
      radial_scale: None leaves the radial density out.
      radial_df: None leaves the radial density out.
      dtype: type of the arrays of the mixture.
    """

    location: np.ndarray
    log_radius: np.ndarray
    scale_diag: np.ndarray
    df: float
    radial_scale: float | None
    radial_df: float | None
    dtype: np.dtype

    @classmethod
    def of(
        cls,
        posterior_mean: ArrayLike,
        scale_diag: ArrayLike,
        df: float,
        radial_scale: float | None,
        radial_df: float | None,
    ) -> "_Components":
        """Checks the arguments of `fit_training_mixture`."""
        mean = _finite_matrix("posterior_mean", posterior_mean)
        scale = _finite_matrix("scale_diag", scale_diag)
        if mean.shape != scale.shape:
            raise ValueError(
                f"posterior_mean and scale_diag must share one shape [N, D], got {mean.shape} and "
                f"{scale.shape}"
            )
        if mean.shape[1] < 3:
            raise DegenerateFeaturesError(
                f"the embedding dimension D must be at least 3 (the last axis), got {mean.shape[1]}"
            )
        num_zero = int(np.sum(~np.any(mean, axis=1)))
        if num_zero:
            raise DegenerateFeaturesError(
                f"a posterior mean of zero has no direction; leave out {num_zero} of {len(mean)} rows"
            )
        if not np.all(scale > 0):
            raise DegenerateFeaturesError(f"scale_diag must be positive, got {scale.min()}")
        _require_positive("df", df, may_be_infinite=True)
        if (radial_scale is None) != (radial_df is None):
            raise ValueError(
                "give both radial_scale and radial_df, or neither to leave the radial density out, "
                f"got {radial_scale} and {radial_df}"
            )
        if radial_scale is not None and radial_df is not None:
            _require_positive("radial_scale", radial_scale)
            _require_positive("radial_df", radial_df, may_be_infinite=True)
            radial_scale, radial_df = float(radial_scale), _finite_or_gaussian(radial_df)
        # With the largest entry scaled to one, squares neither overflow nor vanish.
        size = np.max(np.abs(mean), axis=1)
        scaled = mean / size[:, None]
        norm = np.linalg.norm(scaled, axis=1)
        log_radius = np.log(size) + np.log(norm)
        given: Any = (posterior_mean, scale_diag)
        types = (x[:0] if hasattr(x, "dtype") else 0.0 for x in given)
        dtype = sphere.at_least_float32(*types)[0].dtype
        location = scaled / norm[:, None]
        return cls(
            location, log_radius, scale, _finite_or_gaussian(df), radial_scale, radial_df, dtype
        )

    def at(self, bandwidth: float) -> TrainingMixture:
        """The mixture with all scales multiplied by `bandwidth`."""
        _require_positive("bandwidth", bandwidth)
        bandwidth = float(bandwidth)
        scale = bandwidth * self.scale_diag
        smallest, largest = _SCALE_LIMITS
        if scale.min() < smallest or scale.max() > largest:
            raise DegenerateFeaturesError(
                f"scale_diag times bandwidth must be in [{smallest}, {largest}], got "
                f"[{scale.min()}, {scale.max()}]"
            )
        precision = scale**-2
        location_precision = np.sum(np.square(self.location) * precision, axis=1)
        tangent_dim = scale.shape[1] - 1

        def as_array(values: ArrayLike) -> Array:  # NumPy rounds, so that nothing is compiled
            return jax.device_put(np.asarray(values, self.dtype))

        location = as_array(self.location)
        log_peak, log_mass = _log_peak_and_mass(location, as_array(scale), as_array(self.df))
        radial = None
        if self.radial_scale is not None and self.radial_df is not None:
            radial = RadialComponents(
                as_array(self.log_radius), as_array(self.radial_scale), self.radial_df
            )
        return TrainingMixture(
            location=location,
            precision=as_array(precision),
            weighted_location=as_array(self.location * precision),
            location_precision=as_array(location_precision),
            least_precision=as_array(precision.min(axis=1)),
            greatest_precision=as_array(precision.max(axis=1)),
            mean_precision=as_array((precision.sum(axis=1) - location_precision) / tangent_dim),
            log_mass=log_mass,
            log_weight=log_peak - log_mass,
            bandwidth=as_array(bandwidth),
            df=self.df,
            radial=radial,
        )


@jax.jit
def _log_peak_and_mass(location: Array, scale_diag: Array, df: Array) -> tuple[Array, Array]:
    """Directional log-densities at the location, and logarithms of the mass; each `[N]`, nats."""

    def of_component(component: tuple[Array, Array]) -> tuple[Array, Array]:
        m, s = component
        log_peak = densities.directional_log_prob(m, loc=m, scale_diag=s, df=df)
        return log_peak, mass.directional_log_mass(s, loc=m, df=df)

    return jax.lax.map(of_component, (location, scale_diag), batch_size=_MASS_BATCH_SIZE)


def _finite_or_gaussian(df: float) -> float:
    return float(df) if df <= _GAUSSIAN_DF else np.inf


def _finite_matrix(name: str, values: ArrayLike) -> np.ndarray:
    """Finite float64 `[N, D]` with at least one row."""
    return real_matrix(name, values, least=1, of="training image", axes="[N, D]")


def _require_positive(name: str, value: float, *, may_be_infinite: bool = False) -> None:
    is_number = isinstance(value, int | float | np.integer | np.floating | np.ndarray | Array)
    if (
        not is_number
        or isinstance(value, bool)
        or np.ndim(value)
        or not value > 0
        or (np.isinf(value) and not may_be_infinite)
    ):
        finite = "" if may_be_infinite else "finite "
        raise ValueError(f"{name} must be one positive {finite}number, got {value}")
