"""Detectors that fit Gaussians to training features."""

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
    checked_alive,
    checked_fit_features,
    checked_queries,
    or_infinite,
    warn_of_few_images,
)
from jevb_jax.evaluation.products import exact_matmul
from jevb_jax.evaluation.symmetric import eigh
from jevb_jax.paper import sphere

NUM_FOLDS = 5


_polar_decomposition = jax.jit(sphere.polar_decomposition)


class _Covariance(NamedTuple):
    """Second moments of residuals, with each feature in its own unit.

    Attributes:
      units: `[F]`, the unit of each feature.
      moments: `[F, F]`, in these units.
      shrinkage: weight of the unit matrix in the shrunk covariance.
    """

    units: np.ndarray
    moments: np.ndarray
    shrinkage: float

    def whitening(self, *, background: np.ndarray | None = None) -> np.ndarray:
        """`W`, `[F, F]`, with `W W^T` the inverse of the shrunk covariance.

        Args:
          background: second moments to use instead, at least as large as these in every direction.
            With `background`, a direction that no image spans gets twice the variance that it has
            without.
        """
        share = self.shrinkage
        variances, directions = eigh(self.moments if background is None else background)
        factor = 1 if background is None else 2
        own = variances if background is None else eigh(self.moments)[0]
        least = LEAST_VARIANCE * own[-1]
        shrunk = variances if share == 0 else (1 - share) * variances + factor * share
        return (1 / self.units)[:, None] * directions / np.sqrt(np.maximum(shrunk, factor * least))


def covariance_of(
    residual: np.ndarray, features: np.ndarray, group: np.ndarray | None = None
) -> _Covariance:
    """Covariance of the residuals `[M, F]` of `features` about the means of groups.

    By default all images are one group. Every feature is scaled to unit variance, so that its unit
    does not matter.
    """
    std = np.sqrt(np.mean(np.square(residual), axis=0))
    largest = np.max(np.abs(features), axis=0)
    is_alive = checked_alive(std, features, " within a class" if group is not None else "")
    # A constant feature has no unit. It gets the median unit of the others, or a larger one at
    # which its rounding has the least variance.
    of_rounding = ROUNDING / math.sqrt(LEAST_VARIANCE) * largest
    units = np.where(is_alive, std, np.maximum(np.median(std[is_alive]), of_rounding))
    if units.max() > LARGEST:
        raise DegenerateFeaturesError(
            f"the fitted features vary by up to {units.max():.3g}, but float32 holds variances only up "
            f"to {LARGEST:.0e} squared. Divide all features by one number"
        )
    scaled = residual * np.where(is_alive, 1 / units, 0)
    moments = scaled.T @ scaled / len(scaled)
    group = np.zeros(len(features), int) if group is None else group
    shrinkage = _shrinkage((features / units)[:, is_alive], group)
    num_alive, freedom = int(is_alive.sum()), _freedom(features, group)
    if freedom < num_alive:
        warn_of_few_images(
            f"the covariance of {num_alive} features from {len(features)} images is shrunk by "
            f"{shrinkage:.2g} and its score is weak, because it has only {freedom} degrees of freedom. "
            f"Fit more than {num_alive} different images, better {FEW_IMAGES * num_alive}",
            about=("covariance", num_alive, len(features), freedom),
        )
    return _Covariance(units, moments, shrinkage)


def _freedom(features: np.ndarray, group: np.ndarray) -> int:
    """Degrees of freedom: the number of different images minus one for each group."""
    different = {(g, row.tobytes()) for g, row in zip(group, features, strict=True)}
    return len(different) - len(np.unique(group))


def _shrinkage(scaled: np.ndarray, group: np.ndarray) -> float:
    """Weight of the unit matrix that makes left-out images most likely; 0 for many images.

    Args:
      scaled: `[M, F]`, features that vary, in their units.
      group: `[M]`. Copies of an image within a group count once.
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
    scatter, directions = eigh(residual.T @ residual)
    squares = np.square(residual[is_informative] @ directions)
    # Hoffbeck and Landgrebe 1996: leaving out an image removes one outer product.
    shares = np.geomspace(LEAST_VARIANCE, 1, 91)
    variances = (1 - shares) * np.maximum(scatter, 0)[:, None] / (num_images - 1) + shares
    length = squares @ (1 / variances)
    lost = np.maximum(1 - (1 - shares) * weight / (num_images - 1) * length, 1e-300)
    surprise = np.sum(np.log(variances), axis=0) + np.mean(
        np.log(lost) + np.square(weight) * length / lost, axis=0
    )
    return float(shares[np.argmin(surprise)])


def mean_and_whitening(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean `[F]` and whitening `[F, F]` of one Gaussian, as `fit_mahalanobis` uses them."""
    mean = features.mean(axis=0)
    return mean, covariance_of(features - mean, features).whitening()


@jax.jit
def _distances_one_by_one(features: Array, whitening: Array, whitened_mean: Array) -> Array:
    """Squared distances `[C, N]` to `C` Gaussians, in the memory of one; see `Gaussians`."""
    return jax.lax.map(
        lambda one: jnp.sum(jnp.square(exact_matmul(features, one[0]) - one[1][None]), axis=-1),
        (whitening, whitened_mean),
    )


class Gaussians(NamedTuple):
    """Squared Mahalanobis distance to the nearest of `C` Gaussians.

    Attributes:
      center: `[F]`, near all means; subtracted first, which keeps digits in float32.
      whitening: `[C, F, F]`, or `[1, F, F]` if the Gaussians share a covariance.
      whitened_mean: `[C, F]`, `(mean - center) @ whitening`.
    """

    center: Array
    whitening: Array
    whitened_mean: Array

    def __call__(self, features: ArrayLike) -> Array:
        """Smallest squared distance of each row, `[N]`."""
        values = checked_queries(features, len(self.center))
        shifted = values - self.center[None]
        if self.whitening.shape[0] == 1:
            whitened = exact_matmul(shifted, self.whitening[0])
            distances = jax.vmap(lambda mean: jnp.sum(jnp.square(whitened - mean[None]), axis=-1))(
                self.whitened_mean
            )
        else:
            distances = _distances_one_by_one(shifted, self.whitening, self.whitened_mean)
        return or_infinite(jnp.min(distances, axis=0), values)


def gaussians_of(means: np.ndarray, whitenings: np.ndarray) -> Gaussians:
    """Gaussians from float64 means `[C, F]` and whitenings `[C, F, F]` or `[1, F, F]`."""
    # Round the center to float32 first: off the span, the error of a later rounding is not small.
    center = means.mean(axis=0).astype(np.float32).astype(np.float64)
    whitened = np.einsum(
        "cf,cfg->cg",
        means - center,
        np.broadcast_to(whitenings, (len(means), *whitenings.shape[1:])),
    )
    return Gaussians(*as_float32(center, whitenings, whitened))


def fit_mahalanobis(features: ArrayLike) -> Gaussians:
    """Squared Mahalanobis distance to one Gaussian of the fitted images (docs eq. 24).

    With at least three images for each feature, the covariance is that of the images. With fewer,
    it says too little about directions in which the images hardly vary, and it is shrunk toward
    the unit matrix. Ledoit and Wolf (2004) shrink too, but their weight would drown the small
    variances, which reveal strange images. We use the weight that makes left-out images most likely
    (Hoffbeck and Landgrebe 1996). Copies of an image count once.

    A deviation outside the span of the images is strange. Its variance is the one that shrinkage
    gives it, and at least the rounding of float32, which is 1e-9 of the largest variance. The same
    holds for constant features; their unit is the median unit of the others.

    Args:
      features: `[M, F]`, in distribution.

    Returns:
      A score: features `[N, F]` to `[N]`.

    Raises:
      ValueError: features are not `[M, F]`, are not finite, or do not vary.

    Warns:
      FewImagesWarning: there are fewer images than features.
    """
    mean, whitening = mean_and_whitening(checked_fit_features("features", features))
    return gaussians_of(mean[None], whitening[None])


def directions_of(values: np.ndarray) -> np.ndarray:
    """Directions of checked features, `[M, F]` float64.

    They are computed in float32, as those of scored images will be. If features share a large
    offset, float32 loses digits, and this loss is not small against the variances.
    """
    scored, _ = _polar_decomposition(np.asarray(values, np.float32))
    return np.asarray(scored, np.float64)


class DirectionGaussians(NamedTuple):
    """`Gaussians` of the directions of features, fitted by `fit_ssd` and related functions."""

    gaussians: Gaussians

    def __call__(self, features: ArrayLike) -> Array:
        """Smallest squared distance of each row, `[N]`."""
        values = checked_queries(features, len(self.gaussians.center))
        direction, _ = sphere.polar_decomposition(values)
        return or_infinite(self.gaussians(direction), values)


def fit_ssd(features: ArrayLike, *, num_clusters: int = 1, seed: int = 0) -> DirectionGaussians:
    """SSD: Mahalanobis distance to the nearest cluster of directions (docs eq. 26).

    The method is from Sehwag et al. 2021. k-means finds the clusters. Each has its own mean and
    full covariance. With fewer than three images for each feature, the covariance of a cluster is
    shrunk toward the one within all clusters (Friedman 1989). A single cluster is shrunk as in
    `fit_mahalanobis`.

    Args:
      features: `[M, F]`, in distribution.
      num_clusters: 1 is the paper's choice.
      seed: sets the start of k-means.

    Returns:
      A score: features `[N, F]` to `[N]`.

    Raises:
      ValueError: there are fewer than two images for each cluster, a cluster has one image only,
        the seed is outside [0, 2**32), or for the reasons of `fit_mahalanobis`.
      TypeError: `num_clusters` or `seed` is not an integer.

    Warns:
      FewImagesWarning: a cluster has fewer images than features.
    """
    values = checked_fit_features("features", features)
    num_clusters = at_most("num_clusters", num_clusters, len(values) // 2, "half the fitted images")
    seed = arguments.whole_number("seed", seed, at_least=0, at_most=2**32 - 1)
    directions = directions_of(values)
    cluster = np.zeros(len(directions), int)
    if num_clusters > 1:
        from sklearn.cluster import KMeans  # only this score needs it, and only to be fitted

        cluster = KMeans(num_clusters, n_init="auto", random_state=seed).fit_predict(directions)
    sizes = np.bincount(cluster, minlength=num_clusters)
    if sizes.min() < 2:
        raise DegenerateFeaturesError(
            f"a cluster of {sizes.min()} images has no covariance; lower num_clusters"
        )
    means = np.stack([directions[cluster == c].mean(axis=0) for c in range(num_clusters)])
    return DirectionGaussians(gaussians_of(means, _cluster_whitenings(directions, means, cluster)))


def fit_published_ssd(features: ArrayLike) -> DirectionGaussians:
    """SSD exactly as published: one cluster and a pseudo-inverse (docs eq. 37; Sehwag et al. 2021).

    We follow the authors' code (`eval_ssd.py` of inspire-group/SSD): features before the head are
    scaled to length one, each is then divided by its standard deviation over the fitted images, and
    the distance uses the pseudo-inverse of the covariance of the result.

    This equals `fit_ssd` with one cluster if the images span all features and there are three
    images for each. Otherwise it differs in two ways. The covariance is never shrunk. A deviation
    outside the span of the images adds nothing, while for `fit_ssd` it is strange.

    Assumption: a variance below 1e-9 of the largest, the rounding of float32, counts as zero. The
    authors' limit is 1e-15, so they divide by rounding errors if features depend on each other.

    Args:
      features: `[M, F]`, in distribution.

    Returns:
      A score: features `[N, F]` to `[N]`.

    Raises:
      ValueError: for the reasons of `fit_mahalanobis`.

    Warns:
      FewImagesWarning: there are fewer images than features.
    """
    directions = directions_of(checked_fit_features("features", features))
    num_images, num_features = num_different(directions), directions.shape[1]
    mean = directions.mean(axis=0)
    residual = directions - mean
    std = np.sqrt(np.mean(np.square(residual), axis=0))
    is_alive = checked_alive(std, directions)
    if num_images <= num_features:
        warn_of_few_images(
            f"the published form of SSD does not shrink its covariance, and its score is weak: it has "
            f"{num_features} features and only {num_images} different images. Fit more images, or "
            "take fit_ssd",
            about=("published SSD", num_features, num_images),
        )
    units = np.where(is_alive, std, 1)
    standardized = residual * (is_alive / units)
    variances, axes = eigh(standardized.T @ standardized / len(standardized))
    is_spanned = variances > LEAST_VARIANCE * variances[-1]
    inverse = is_spanned / np.sqrt(np.where(is_spanned, variances, 1))
    whitening = (is_alive / units)[:, None] * axes * inverse
    return DirectionGaussians(gaussians_of(mean[None], whitening[None]))


def _cluster_whitenings(
    directions: np.ndarray, means: np.ndarray, cluster: np.ndarray
) -> np.ndarray:
    """Whitening of each cluster, `[J, F, F]`; a small cluster is shrunk toward all clusters."""
    residual = directions - means[cluster]
    num_clusters, num_features = means.shape
    freedom = [num_different(directions[cluster == c]) - 1 for c in range(num_clusters)]
    if num_clusters > 1 and min(freedom) < 1:
        raise DegenerateFeaturesError("the images of a cluster are all equal; lower num_clusters")
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
            f"{num_features} features (the smallest has {min(freedom) + 1}). Their covariances are "
            "shrunk toward the one within all clusters. Fit more images or fewer clusters",
            about=("clusters", num_clusters, num_features),
        )
    return np.stack(whitenings)


class Residual(NamedTuple):
    """Length of the part of a feature vector outside a principal subspace.

    Attributes:
      origin: `[F]`.
      directions: `[F, F - num_components]`, orthonormal, with the smallest variances. There are
        more of them if the fitted images span fewer components.
    """

    origin: Array
    directions: Array

    def __call__(self, features: ArrayLike) -> Array:
        """Lengths, `[N]`."""
        values = checked_queries(features, len(self.origin))
        shifted = values - self.origin[None]
        return or_infinite(sphere.safe_norm(exact_matmul(shifted, self.directions)), values)


def fit_residual(
    features: ArrayLike, *, num_components: int, origin: ArrayLike | None = None
) -> Residual:
    """Residual outside a principal subspace, the part of ViM without logits (docs eq. 27).

    The method is from Wang et al. 2022, section 4.1. Components with a variance below 1e-9 of the
    largest are not part of the subspace: the images do not vary there, so a deviation is as strange
    as in any other excluded direction.

    Args:
      features: `[M, F]`, in distribution.
      num_components: dimension of the principal subspace, below `F`.
      origin: `[F]`, by default the mean. ViM takes the point where all logits are equal.

    Returns:
      A score: features `[N, F]` to `[N]`.

    Raises:
      TypeError: `num_components` is not an integer.
      ValueError: `num_components` is out of range, `origin` is not finite `[F]`, or for the reasons
        of `fit_mahalanobis`.

    Warns:
      FewImagesWarning: there are fewer images than features.
    """
    values, num_components, origin = checked_residual(features, num_components, origin)
    checked_alive(values.std(axis=0), values)
    num_images = num_different(values)
    if num_images <= values.shape[1]:
        warn_of_few_images(
            f"a principal subspace of {values.shape[1]} features is weak if it is fitted to "
            f"{num_images} different images. Fit more than {values.shape[1]}",
            about=("subspace", values.shape[1], num_images),
        )
    return residual_of(values, num_components, origin)


def num_different(features: np.ndarray) -> int:
    """Number of different rows."""
    return len({row.tobytes() for row in features})


def checked_residual(
    features: ArrayLike, num_components: Any, origin: ArrayLike | None
) -> tuple[np.ndarray, int, np.ndarray | None]:
    """Checks the arguments of `fit_residual`. Without a residual it raises an error."""
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
    """`Residual` of finite float64 values about an origin; the mean if it is None."""
    point = values.mean(axis=0) if origin is None else origin
    shifted = values - point
    variances, directions = eigh(shifted.T @ shifted / len(shifted))
    num_spanned = int(np.sum(variances > LEAST_VARIANCE * variances[-1]))
    rest = directions[:, : values.shape[1] - min(num_components, num_spanned)]
    return Residual(*as_float32(point, rest))
