"""Detectors by the distance to training features."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from jevb_jax.evaluation.detector_input import (
    as_float32,
    at_most,
    checked_fit_features,
    checked_queries,
    or_infinite,
    unit_directions,
)
from jevb_jax.evaluation.gaussian_detectors import mean_and_whitening
from jevb_jax.evaluation.products import exact_matmul
from jevb_jax.paper import sphere
from jevb_jax.paper.scores import never_certain, real_numbers

# For so many neighbors beyond the k-th the distance is computed again without cancellation.
_NUM_SPARE = 32


def feature_norm_score(features: ArrayLike) -> Array:
    """Score `-|x|`, `[N]`, for features `x`, `[N, F]` (docs eq. 27; Tack et al. 2020).

    Networks often give small features for strange images.
    """
    return never_certain(-sphere.safe_norm(real_numbers("features", features)))


@functools.partial(jax.jit, static_argnames="k")
def _kth_distances(bank: Array, centered: Array, queries: Array, center: Array, *, k: int) -> Array:
    """Exact distance of each query to the k-th nearest row of a bank, `[N]`.

    One product, `b.q - |b|^2 / 2`, finds candidates: it falls as `|b - q|` grows. Between near
    duplicates it has few digits, so the differences `b - q` order the candidates. If rounding may
    have excluded a nearer row, the differences of all rows are computed.

    Args:
      bank: `[M, F]`.
      centered: `[M, F + 1]`, from `_centered`.
      queries: `[N, F]`.
      center: `[F]`, near the bank.
      k: which neighbor; 1 is the nearest.
    """
    num_rows = len(bank)
    rounding = _product_rounding(bank.shape[1])

    def distances(rows: Array, query: Array) -> Array:
        # Not sqrt(2 - 2 cos): it has no digits left between near duplicates.
        return sphere.safe_norm(rows - query[None])

    def of_candidates(query: Array) -> tuple[Array, Array]:
        """The distance, and whether all rows outside the candidates are proven to be farther."""
        shifted = query - center
        square = jnp.sum(jnp.square(shifted))
        closeness = exact_matmul(centered, jnp.append(shifted, 1.0))
        highest, index = jax.lax.top_k(closeness, min(k + _NUM_SPARE, num_rows))
        distance = jnp.sort(distances(bank[index], query))[k - 1]
        bound = square / 2 - highest[-1] - rounding * square
        is_sure = (jnp.square(distance) / 2 < bound) | (distance == 0) | ~jnp.isfinite(distance)
        return distance, is_sure | (len(index) == num_rows)

    def of_all(query: Array) -> Array:
        every = jax.lax.map(lambda row: distances(row[None], query)[0], bank, batch_size=1024)
        return -jax.lax.top_k(-every, k)[0][-1]

    found, is_sure = jax.lax.map(of_candidates, queries, batch_size=64)

    def searched_again() -> Array:
        def one(values: tuple[Array, Array, Array]) -> Array:
            query, distance, is_sure = values
            return jax.lax.cond(is_sure, lambda: distance, lambda: of_all(query))

        return jax.lax.map(one, (queries, found, is_sure))

    return jax.lax.cond(jnp.all(is_sure), lambda: found, searched_again)


def _centered(bank: np.ndarray, center: np.ndarray) -> np.ndarray:
    """The bank minus its center, and in a last column minus half the squared length, `[M, F + 1]`.

    The last column is increased by the largest amount that rounding can take from the product.
    """
    rest = bank - center
    share = 0.5 - _product_rounding(bank.shape[1])
    return np.concatenate([rest, -share * np.sum(np.square(rest), axis=1, keepdims=True)], axis=1)


def _product_rounding(width: int) -> float:
    """Relative error bound of a float32 sum of products in any order: twice the textbook bound."""
    return (width + 16) * float(jnp.finfo(jnp.float32).eps)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DirectionNeighbours:
    """Distance between directions to the `k`-th nearest fitted image, fitted by `fit_knn`.

    Attributes:
      bank: `[M, F]`, directions.
      center: `[F]`, mean of the directions.
      centered: `[M, F + 1]`, from `_centered`.
      k: which neighbor; 1 is the nearest.
    """

    bank: Array
    center: Array
    centered: Array
    k: int = dataclasses.field(metadata={"static": True})

    def __call__(self, features: ArrayLike) -> Array:
        """Distances, `[N]`."""
        values = checked_queries(features, self.bank.shape[1])
        direction, _ = sphere.polar_decomposition(values)
        distance = _kth_distances(self.bank, self.centered, direction, self.center, k=self.k)
        return or_infinite(distance, values)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class WhitenedNeighbours:
    """Distance to the `k`-th nearest fitted image after whitening, fitted by `fit_whitened_knn`.

    Attributes:
      mean: `[F]`, mean of the fitted images.
      whitening: `[F, F]`.
      bank: `[M, F]`, whitened.
      centered: `[M, F + 1]`, from `_centered` with center zero.
      k: which neighbor; 1 is the nearest.
    """

    mean: Array
    whitening: Array
    bank: Array
    centered: Array
    k: int = dataclasses.field(metadata={"static": True})

    def __call__(self, features: ArrayLike) -> Array:
        """Distances, `[N]`."""
        values = checked_queries(features, len(self.mean))
        center = jnp.zeros_like(self.mean)
        whitened = exact_matmul(values - self.mean[None], self.whitening)
        distance = _kth_distances(self.bank, self.centered, whitened, center, k=self.k)
        return or_infinite(distance, values)


def fit_knn(features: ArrayLike, *, k: int = 50) -> DirectionNeighbours:
    """Distance between directions to the k-th nearest fitted image (docs eq. 25; Sun et al. 2022).

    Args:
      features: `[M, F]`, in distribution. A zero row has distance 1 from every direction.
      k: at most `M`. The paper takes 50 for CIFAR-10 and 200 for CIFAR-100, each with 50,000
        images.

    Returns:
      A score: features `[N, F]` to `[N]`, in `[0, 2]`.

    Raises:
      ValueError: features are not `[M, F]` or not finite, or `k` is out of range.
      TypeError: `k` is not an integer.
    """
    values = checked_fit_features("features", features)
    k = _checked_k(k, len(values))
    # Center after rounding, so that differences are those of the bank that is searched.
    bank = unit_directions(values).astype(np.float32)
    center = bank.mean(axis=0, dtype=np.float64).astype(np.float32)
    centered = _centered(bank.astype(np.float64), center.astype(np.float64))
    return DirectionNeighbours(
        *(jax.device_put(np.asarray(x, np.float32)) for x in (bank, center, centered)), k=k
    )


def fit_whitened_knn(features: ArrayLike, *, k: int = 50) -> WhitenedNeighbours:
    """Euclidean distance to the k-th nearest fitted image, after whitening (docs eq. 25).

    It is meant for few features with different units, such as `typicality_features`. The covariance
    is that of `fit_mahalanobis`.

    Args:
      features: `[M, F]`, in distribution.
      k: at most `M`.

    Returns:
      A score: features `[N, F]` to `[N]`, at least 0.

    Raises:
      ValueError: features do not vary, or for the reasons of `fit_knn`.
    """
    bank = checked_fit_features("features", features)
    k = _checked_k(k, len(bank))
    mean, whitening = mean_and_whitening(bank)
    mean = mean.astype(np.float32).astype(np.float64)
    whitened = ((bank - mean) @ whitening).astype(np.float32)
    centered = _centered(whitened.astype(np.float64), np.zeros_like(mean))
    return WhitenedNeighbours(*as_float32(mean, whitening, whitened, centered), k=k)


def _checked_k(k: Any, num_images: int) -> int:
    return at_most("k", k, num_images, "the number of fitted images")
