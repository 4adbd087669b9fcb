"""Detectors by Gaussians of training features."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from jevb_jax import arguments
from jevb_jax.evaluation.detector_input import (
    FEW_IMAGES,
    LARGEST,
    LEAST_VARIANCE,
    ROUNDING,
    DegenerateFeaturesError,
    as_float32,
    at_most,
    check_alive,
    checked_fit_features,
    checked_queries,
    or_infinite,
    warn_of_few_images,
)
from jevb_jax.paper import sphere

# A bfloat16 product would reorder images on an accelerator.
_matmul = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
NUM_FOLDS = 5


_polar_decomposition = jax.jit(sphere.polar_decomposition)


class _Covariance(NamedTuple):
    """Second moments of residuals in units of their features; see `fit_mahalanobis`.

    Attributes:
      units: `[F]`.
      moments: `[F, F]`, in those units.
      shrinkage: share of the unit matrix in the covariance.
    """

    units: np.ndarray
    moments: np.ndarray
    shrinkage: float

    def whitening(self, *, background: np.ndarray | None = None) -> np.ndarray:
        """`[F, F]`, `W` with `W W^T` the inverse of the shrunk covariance.

        Args:
          background: other second moments, not below these in any direction. What leaves the fitted
            span then has twice the variance of a class.
        """
        share = self.shrinkage
        variances, directions = np.linalg.eigh(self.moments if background is None else background)
        factor = 1 if background is None else 2
        least = LEAST_VARIANCE * np.linalg.eigvalsh(self.moments)[-1]
        shrunk = variances if share == 0 else (1 - share) * variances + factor * share
        return (1 / self.units)[:, None] * directions / np.sqrt(np.maximum(shrunk, factor * least))


def covariance_of(
    residual: np.ndarray, features: np.ndarray, group: np.ndarray | None = None
) -> _Covariance:
    """Of the residuals `[M, F]` that means of groups leave of `features`; one group by default.

    Every feature is brought to unit variance, so that units do not matter.
    """
    std = np.sqrt(np.mean(np.square(residual), axis=0))
    largest = np.max(np.abs(features), axis=0)
    is_alive = std > ROUNDING * largest
    check_alive(is_alive, " within a class" if group is not None else "")
    # A feature that never varied has no unit of its own. It takes the others', or one that makes its
    # rounding the least variance.
    of_rounding = ROUNDING / math.sqrt(LEAST_VARIANCE) * largest
    units = np.where(is_alive, std, np.maximum(np.median(std[is_alive]), of_rounding))
    if units.max() > LARGEST:
        raise DegenerateFeaturesError(
            f"the fitted features vary by up to {units.max():.3g}, and float32 holds no variances beyond "
            f"{LARGEST:.0e} squared: divide all features by one number"
        )
    scaled = residual * np.where(is_alive, 1 / units, 0)
    moments = scaled.T @ scaled / len(scaled)
    group = np.zeros(len(features), int) if group is None else group
    shrinkage = _shrinkage((features / units)[:, is_alive], group)
    num_alive, freedom = int(is_alive.sum()), _freedom(features, group)
    if freedom < num_alive:
        warn_of_few_images(
            f"a covariance of {num_alive} features that vary from {len(features)} images is shrunk by "
            f"{shrinkage:.2g}, and its score is weak: only {freedom} images vary freely. Fit more than "
            f"{num_alive} different ones, better {FEW_IMAGES * num_alive}"
        )
    return _Covariance(units, moments, shrinkage)


def _freedom(features: np.ndarray, group: np.ndarray) -> int:
    """Different images, less one for the mean of each group."""
    different = {(g, row.tobytes()) for g, row in zip(group, features, strict=True)}
    return len(different) - len(np.unique(group))


def _shrinkage(scaled: np.ndarray, group: np.ndarray) -> float:
    """Share of the unit matrix that makes images left out most likely; 0 of many images.

    From features `[M, F]` that vary, in their units, and the group `[M]` of each. Copies of an image
    are left out together.
    """
    keys = {(g, row.tobytes()): i for i, (g, row) in enumerate(zip(group, scaled, strict=True))}
    kept = np.fromiter(keys.values(), int)
    sizes = np.bincount(group[kept])
    num_images, num_features = len(kept), scaled.shape[1]
    freedom = num_images - np.count_nonzero(sizes)
    if freedom >= FEW_IMAGES * num_features:
        return 0.0
    x, g = scaled[kept], group[kept]
    means = np.stack([np.bincount(g, column) for column in x.T], axis=1)
    residual = x - means[g] / sizes[g][:, None]
    is_informative = sizes[g] > 1
    weight = (sizes[g] / np.maximum(sizes[g] - 1, 1))[is_informative, None]
    scatter, directions = np.linalg.eigh(residual.T @ residual)
    squares = np.square(residual[is_informative] @ directions)
    # Hoffbeck and Landgrebe 1996: without an image the covariance loses one outer product.
    shares = np.geomspace(LEAST_VARIANCE, 1, 91)
    variances = (1 - shares) * np.maximum(scatter, 0)[:, None] / (num_images - 1) + shares
    length = squares @ (1 / variances)
    lost = np.maximum(1 - (1 - shares) * weight / (num_images - 1) * length, 1e-300)
    surprise = np.sum(np.log(variances), axis=0) + np.mean(
        np.log(lost) + np.square(weight) * length / lost, axis=0
    )
    return float(shares[np.argmin(surprise)])


def mean_and_whitening(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean `[F]`, and `W` of `fit_mahalanobis`."""
    mean = features.mean(axis=0)
    return mean, covariance_of(features - mean, features).whitening()


class Gaussians(NamedTuple):
    """Squared Mahalanobis distance to the nearest of `C` Gaussians.

    Attributes:
      center: `[F]`, near all means, subtracted first for the sake of float32.
      whitening: `[C, F, F]`, of each Gaussian, or `[1, F, F]` when they share one covariance.
      whitened_mean: `[C, F]`, `(mean - center) @ whitening`.
    """

    center: Array
    whitening: Array
    whitened_mean: Array

    def __call__(self, features: ArrayLike) -> Array:
        """Smallest squared distances, `[N]`."""
        values = checked_queries(features, len(self.center))
        shifted = values - self.center[None]
        if self.whitening.shape[0] == 1:
            whitened = _matmul(shifted, self.whitening[0])
            distances = jax.vmap(lambda mean: jnp.sum(jnp.square(whitened - mean[None]), axis=-1))(
                self.whitened_mean
            )
        else:
            distances = jax.lax.map(
                lambda one: jnp.sum(jnp.square(_matmul(shifted, one[0]) - one[1][None]), axis=-1),
                (self.whitening, self.whitened_mean),
            )
        return or_infinite(jnp.min(distances, axis=0), values)


def gaussians_of(means: np.ndarray, whitenings: np.ndarray) -> Gaussians:
    """From `[C, F]` means and `[C, F, F]` or `[1, F, F]` whitenings in float64."""
    # As float32 holds it: what its rounding loses would not be small off the span.
    center = means.mean(axis=0).astype(np.float32).astype(np.float64)
    whitened = np.einsum(
        "cf,cfg->cg",
        means - center,
        np.broadcast_to(whitenings, (len(means), *whitenings.shape[1:])),
    )
    return Gaussians(*as_float32(center, whitenings, whitened))


def fit_mahalanobis(features: ArrayLike) -> Gaussians:
    """Squared Mahalanobis distance to the fitted images, one Gaussian, no labels (docs eq. 24).

    The covariance is the images' own where there are at least three for each feature. Below, it says
    too little of the directions in which they hardly vary. There it is shrunk, as Ledoit and Wolf (2004)
    do, but by the share that makes images left out most likely (Hoffbeck and Landgrebe 1996): theirs
    would drown the small variances, which are those that tell strange images. Copies of an image count
    once.

    A deviation that leaves the span of the images is strange. It is measured by what the shrinkage puts
    there, and at least by the rounding of float32: a variance of 1e-9 of the largest. That goes for
    features that never varied, in the median unit of the others.

    Args:
      features: `[M, F]`, in distribution.

    Returns:
      A score, features `[N, F]` to `[N]`.

    Raises:
      ValueError: not two axes, values that are not finite, features that do not vary.

    Warns:
      FewImagesWarning: fewer images than features.
    """
    mean, whitening = mean_and_whitening(checked_fit_features("features", features))
    return gaussians_of(mean[None], whitening[None])


class DirectionGaussians(NamedTuple):
    """`Gaussians` of the directions of features; see `fit_ssd`."""

    gaussians: Gaussians

    def __call__(self, features: ArrayLike) -> Array:
        """Smallest squared distances, `[N]`."""
        values = checked_queries(features, len(self.gaussians.center))
        direction, _ = sphere.polar_decomposition(values)
        return or_infinite(self.gaussians(direction), values)


def fit_ssd(features: ArrayLike, *, num_clusters: int = 1, seed: int = 0) -> DirectionGaussians:
    """SSD (docs eq. 26; Sehwag et al. 2021): Mahalanobis distance to the nearest cluster of directions.

    Clusters come from k-means; each has a mean and a covariance of its own, over all features. Of fewer
    than three images for each feature, a cluster's covariance is shrunk to that within all clusters
    (Friedman 1989), and a single cluster's as that of `fit_mahalanobis`.

    Args:
      features: `[M, F]`, in distribution.
      num_clusters: 1 is the paper's choice.
      seed: decides where k-means begins.

    Returns:
      A score, features `[N, F]` to `[N]`.

    Raises:
      ValueError: as `fit_mahalanobis`; fewer images than two for each cluster, or a cluster of one; a
        seed outside [0, 2**32).
      TypeError: `num_clusters` or a seed that is not an integer.

    Warns:
      FewImagesWarning: a cluster of fewer images than features.
    """
    values = checked_fit_features("features", features)
    num_clusters = at_most("num_clusters", num_clusters, len(values) // 2, "half the fitted images")
    seed = arguments.whole_number("seed", seed, at_least=0, at_most=2**32 - 1)
    # As they will be scored: what float32 loses is no small variance, where features have much in common.
    scored, _ = _polar_decomposition(np.asarray(values, np.float32))
    directions = np.asarray(scored, np.float64)
    cluster = np.zeros(len(directions), int)
    if num_clusters > 1:
        from sklearn.cluster import KMeans  # one score of many, and none of a served model's

        cluster = KMeans(num_clusters, n_init="auto", random_state=seed).fit_predict(directions)
    sizes = np.bincount(cluster, minlength=num_clusters)
    if sizes.min() < 2:
        raise DegenerateFeaturesError(
            f"a cluster of {sizes.min()} images has no covariance: lower num_clusters"
        )
    means = np.stack([directions[cluster == c].mean(axis=0) for c in range(num_clusters)])
    return DirectionGaussians(gaussians_of(means, _cluster_whitenings(directions, means, cluster)))


def _cluster_whitenings(
    directions: np.ndarray, means: np.ndarray, cluster: np.ndarray
) -> np.ndarray:
    """`[J, F, F]`, of each cluster's covariance, shrunk to that within all clusters if it is small."""
    residual = directions - means[cluster]
    num_clusters, num_features = means.shape
    freedom = [num_different(directions[cluster == c]) - 1 for c in range(num_clusters)]
    if num_clusters > 1 and min(freedom) < 1:
        raise DegenerateFeaturesError("the images of a cluster are all equal: lower num_clusters")
    shared = None
    whitenings = []
    for c in range(num_clusters):
        own = cluster == c
        if num_clusters == 1 or freedom[c] >= FEW_IMAGES * num_features:
            whitenings.append(covariance_of(residual[own], directions[own]).whitening())
            continue
        if shared is None:
            shared = covariance_of(residual, directions, cluster).whitening()
        scaled = residual[own] @ shared
        of_shared = _Covariance(
            np.ones(num_features),
            scaled.T @ scaled / len(scaled),
            _shrinkage(scaled, np.zeros(len(scaled), int)),
        )
        whitenings.append(shared @ of_shared.whitening())
    num_small = sum(count < num_features for count in freedom)
    if num_small and num_clusters > 1:
        warn_of_few_images(
            f"{num_small} of {num_clusters} clusters have fewer different images than the "
            f"{num_features} features, the smallest {min(freedom) + 1}: their covariances are shrunk to "
            "that within all clusters. Fit more images or fewer clusters"
        )
    return np.stack(whitenings)


class Residual(NamedTuple):
    """Length of what a principal subspace leaves of features; see `fit_residual`.

    Attributes:
      origin: `[F]`.
      directions: `[F, F - num_components]`, orthonormal, of the smallest variances; more of them where
        the fitted images span fewer components.
    """

    origin: Array
    directions: Array

    def __call__(self, features: ArrayLike) -> Array:
        """Lengths, `[N]`."""
        values = checked_queries(features, len(self.origin))
        shifted = values - self.origin[None]
        return or_infinite(sphere.safe_norm(_matmul(shifted, self.directions)), values)


def fit_residual(
    features: ArrayLike, *, num_components: int, origin: ArrayLike | None = None
) -> Residual:
    """The residual part of ViM (docs eq. 27; Wang et al. 2022, section 4.1), which needs no logits.

    Components in which the images do not vary, beyond 1e-9 of the largest variance, are not part of the
    subspace: a deviation along them is no less strange than along the others.

    Args:
      features: `[M, F]`, in distribution.
      num_components: dimension of the principal subspace, below `F`.
      origin: `[F]`; the mean by default. ViM takes the point where all logits are equal.

    Returns:
      A score, features `[N, F]` to `[N]`.

    Raises:
      TypeError: `num_components` that is not an integer.
      ValueError: as `fit_mahalanobis`; `num_components` out of range; an origin that is
        not `[F]` and finite.

    Warns:
      FewImagesWarning: fewer images than features.
    """
    values, num_components, origin = checked_residual(features, num_components, origin)
    check_alive(values.std(axis=0) > ROUNDING * np.abs(values).max(axis=0))
    num_images = num_different(values)
    if num_images <= values.shape[1]:
        warn_of_few_images(
            f"a principal subspace of {values.shape[1]} features from {num_images} different images is "
            f"weak: fit more than {values.shape[1]}"
        )
    return residual_of(values, num_components, origin)


def num_different(features: np.ndarray) -> int:
    """How many rows differ from each other."""
    return len({row.tobytes() for row in features})


def checked_residual(
    features: ArrayLike, num_components: Any, origin: ArrayLike | None
) -> tuple[np.ndarray, int, np.ndarray | None]:
    """Features, components and origin, refused where no residual is left."""
    values = checked_fit_features("features", features)
    num_features = values.shape[1]
    if num_features < 2:
        raise DegenerateFeaturesError(
            "a residual needs at least 2 features, one of them outside the subspace, got 1"
        )
    count = arguments.whole_number("num_components", num_components, at_least=1)
    if count >= num_features:
        raise ValueError(
            f"num_components must be in [1, {num_features - 1}], below the number of features, "
            f"got {count}"
        )
    if origin is None:
        return values, count, None
    point = np.asarray(origin, np.float64)
    if point.shape != (num_features,) or not np.isfinite(point).all():
        raise ValueError(
            f"origin must be finite [{num_features}], one number for each feature, got shape "
            f"{point.shape}"
        )
    return values, count, point


def residual_of(values: np.ndarray, num_components: int, origin: np.ndarray | None) -> Residual:
    """What lies outside the principal subspace of values about an origin."""
    point = values.mean(axis=0) if origin is None else origin
    shifted = values - point
    variances, directions = np.linalg.eigh(shifted.T @ shifted / len(shifted))
    num_spanned = int(np.sum(variances > LEAST_VARIANCE * variances[-1]))
    rest = directions[:, : values.shape[1] - min(num_components, num_spanned)]
    return Residual(*as_float32(point, rest))
