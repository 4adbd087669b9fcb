"""Mahalanobis distances of features whose lengths are raised to a power."""

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


def fit_scaled_mahalanobis(features: ArrayLike, *, exponent: float) -> ScaledGaussians:
    """Mahalanobis distance of `x / |x|^beta` (docs eq. 44; arXiv 2510.15202).

    With `beta` 0 this is `fit_mahalanobis`, and with 1 `fit_ssd` with one cluster. Above 1, short
    features are far from the others. The source chooses `beta` from in-distribution data by a rule that
    we do not have: choose it on validation sets (`ood.choice`).

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
    values = np.asarray(checked_fit_features("features", features), np.float32)
    power = jnp.asarray(beta, jnp.float32)
    scaled, unit = _scaled_to_fit(jnp.asarray(values), power)
    if not unit > 0:
        raise DegenerateFeaturesError(
            "more than half of the features are zero, so they have no unit"
        )
    mean, whitening = mean_and_whitening(np.asarray(scaled, np.float64))
    return ScaledGaussians(gaussians_of(mean[None], whitening[None]), power, unit)


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
