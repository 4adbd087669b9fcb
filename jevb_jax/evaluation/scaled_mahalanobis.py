"""Mahalanobis distances of features whose lengths are raised to a power."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from jevb_jax import arguments
from jevb_jax.evaluation.detector_input import (
    DegenerateFeaturesError,
    checked_fit_features,
    checked_queries,
    or_infinite,
)
from jevb_jax.evaluation.gaussian_detectors import Gaussians, gaussians_of, mean_and_whitening
from jevb_jax.paper import sphere


class ScaledGaussians(NamedTuple):
    """`Gaussians` of features whose lengths are raised to a power, fitted by `fit_scaled_mahalanobis`.

    Attributes:
      gaussians: fitted to the scaled features.
      exponent: `beta`, scalar.
      unit: the median length of the fitted features, scalar. A common factor changes no distance; this
        one keeps the scaled features near one.
    """

    gaussians: Gaussians
    exponent: Array
    unit: Array

    def __call__(self, features: ArrayLike) -> Array:
        """Squared distance of each row, `[N]`."""
        values = checked_queries(features, len(self.gaussians.center))
        return or_infinite(self.gaussians(_scaled(values, self.exponent, self.unit)), values)


# Lengths are read between a millionth and a million of the unit, so that no power overflows.
_LENGTHS = (1e-6, 1e6)


def _scaled(values: Array, exponent: Array, unit: Array) -> Array:
    direction, radius = sphere.polar_decomposition(values)
    length = jnp.clip(radius / unit, *_LENGTHS) ** (1 - exponent)
    return direction * length[:, None]


@jax.jit
def _scaled_to_fit(values: Array, exponent: Array) -> tuple[Array, Array]:
    _, radius = sphere.polar_decomposition(values)
    unit = jnp.median(radius)
    return _scaled(values, exponent, unit), unit


def scaled_features(features: ArrayLike, *, exponent: float) -> Array:
    """`x / |x|^beta` up to a common factor, `[M, F]` (docs eq. 44).

    Args:
      features: `[M, F]`, in distribution.
      exponent: `beta`, in [0, 4].

    Raises:
      ValueError: the exponent is outside its range, or the features are no finite matrix.
      DegenerateFeaturesError: more than half of the features are zero.
      TypeError: the exponent is not a number.
    """
    (beta,) = checked_exponents("exponent", (exponent,))
    return _checked_and_scaled(features, beta)[0]


def _checked_and_scaled(features: ArrayLike, beta: float) -> tuple[Array, Array]:
    """Scaled features and their unit."""
    values = np.asarray(checked_fit_features("features", features), np.float32)
    scaled, unit = _scaled_to_fit(jnp.asarray(values), jnp.asarray(beta, jnp.float32))
    if not unit > 0:
        raise DegenerateFeaturesError(
            "more than half of the features are zero, so they have no unit"
        )
    return scaled, unit


def fit_scaled_mahalanobis(features: ArrayLike, *, exponent: float) -> ScaledGaussians:
    """Mahalanobis distance of `x / |x|^beta` (docs eq. 44; arXiv 2510.15202).

    With `beta` 0 this is `fit_mahalanobis`, and with 1 `fit_ssd` with one cluster. Above 1, short
    features are far from the others. `fit_by_local_dimension` chooses `beta`.

    Args:
      features: `[M, F]`, in distribution.
      exponent: `beta`, in [0, 4].

    Returns:
      A score: features `[N, F]` to `[N]`.

    Raises:
      ValueError: the exponent is outside its range, more than half of the features are zero, or for
        the reasons of `fit_mahalanobis`.
      TypeError: the exponent is not a number.

    Warns:
      FewImagesWarning: there are fewer images than features.
    """
    (beta,) = checked_exponents("exponent", (exponent,))
    power = jnp.asarray(beta, jnp.float32)
    scaled, unit = _checked_and_scaled(features, beta)
    mean, whitening = mean_and_whitening(np.asarray(scaled, np.float64))
    return ScaledGaussians(gaussians_of(mean[None], whitening[None]), power, unit)


# More rows change the estimate little, and the search is quadratic in them.
_MOST_ROWS = 2000


def local_dimension(features: ArrayLike, *, num_neighbors: int = 20) -> float:
    """Local intrinsic dimension of a set of features (docs eq. 45).

    The estimator of maximum likelihood by Levina and Bickel (2004), with the mean over points that
    MacKay and Ghahramani (2005) correct: over the inverse dimensions. It reads the ratios of the
    distances from a point to its nearest neighbors. Equal rows count as one.

    Args:
      features: `[M, F]`, float; at least `num_neighbors + 1` different rows. At most 2,000 rows, evenly
        spaced, are read.
      num_neighbors: neighbors of each point, at least 3.

    Raises:
      ValueError: there are too few neighbors.
      DegenerateFeaturesError: there are too few different rows.
    """
    from sklearn.neighbors import NearestNeighbors  # a training starts without it

    k = arguments.whole_number("num_neighbors", num_neighbors, at_least=3)
    values = np.asarray(features, np.float64)
    step = max(1, -(-len(values) // _MOST_ROWS))
    rows = np.unique(values[::step], axis=0)
    if len(rows) <= k:
        raise DegenerateFeaturesError(
            f"the local dimension needs more than num_neighbors={k} different rows, got {len(rows)}"
        )
    search = NearestNeighbors(n_neighbors=k, algorithm="brute").fit(rows)
    distances, _ = search.kneighbors()  # of each row to the others
    with np.errstate(divide="ignore"):  # rows that differ in the last bits may have distance zero
        inverse = np.mean(np.log(distances[:, -1:] / distances[:, :-1]), axis=1)
    return float(1 / np.mean(inverse[np.isfinite(inverse)]))


def fit_by_local_dimension(features: ArrayLike, *, exponents: Sequence[float]) -> ScaledGaussians:
    """`fit_scaled_mahalanobis` with the exponent whose features have the lowest local dimension.

    The source (arXiv 2510.15202) chooses `beta` by a measure of in-distribution features that is made of
    their spectrum and their local intrinsic dimension. Its formula is not in the abstract, which is all
    that we have. This rule (docs eq. 45) is ours. It reads neither labels nor outside images.

    Args:
      features: `[M, F]`, in distribution.
      exponents: the values of `beta` to choose from, each in [0, 4].

    Raises:
      ValueError: there is no exponent, or for the reasons of `local_dimension` and
        `fit_scaled_mahalanobis`.
      TypeError: an exponent is not a number.
    """
    betas = checked_exponents("exponents", tuple(exponents))
    if not betas:
        raise ValueError("exponents must name at least one number in [0, 4], got none")
    dimensions = {beta: local_dimension(scaled_features(features, exponent=beta)) for beta in betas}
    return fit_scaled_mahalanobis(features, exponent=min(dimensions, key=dimensions.__getitem__))


def checked_exponents(name: str, exponents: tuple[float, ...]) -> tuple[float, ...]:
    """Exponents `beta` of `fit_scaled_mahalanobis`, as Python numbers.

    Raises:
      ValueError: one is outside [0, 4].
      TypeError: one is not a number.
    """
    found = tuple(arguments.real_number(name, one) for one in exponents)
    for beta in found:
        if not 0 <= beta <= 4:
            raise ValueError(f"{name} must be in [0, 4], got {beta}")
    return found
