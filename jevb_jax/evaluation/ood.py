"""Scores of one image's strangeness under a model; larger is more out of distribution.

Everything is per example, `[N]`, and made without labels but for the scores that say so. Three
kinds: scores of JEVB's own terms (`uncertainty_terms` computes them once for all), scores of
features, which are fitted to in-distribution features (`fit_*` returns a callable
`features [N, F] -> [N]`, a tree of arrays that can be passed through `jax.jit`), and scores of a linear
probe's logits. `OODDetector` wraps a fit in scikit-learn's manner and calibrates a threshold.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from jevb_jax import sphere
from jevb_jax.distributions import gaussian_kl_divergence
from jevb_jax.objective import View, conditional_elbo, importance_weighted_bound

# As in `classification`: a bfloat16 product would reorder images on an accelerator.
_matmul = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


# --- JEVB's own terms -----------------------------------------------------------------------------


class UncertaintyTerms(NamedTuple):
    """JEVB's terms of images, each `[N]`, nats: means over views and samples.

    A view explains itself in all of them but the last.

    Attributes:
      directional_log_likelihood: `E_q(z | h)[log p_dir(u | z)]`.
      radial_log_likelihood: `E_q(z | h)[log p_rad(r | z)]`.
      kl: `KL(q(z | h) || p(z))`.
      posterior_entropy: differential entropy of `q(z | h)`.
      importance_weighted_bound: of `log p(h)` (docs eq. 15).
      cross_view_log_likelihood: `E_q(z | h_s)[log p(h_t | z)]` over ordered pairs of different
        views; None of a single view.
    """

    directional_log_likelihood: Array
    radial_log_likelihood: Array
    kl: Array
    posterior_entropy: Array
    importance_weighted_bound: Array
    cross_view_log_likelihood: Array | None


def uncertainty_terms(
    key: Array,
    views: View,
    *,
    num_samples: int,
    untied_scale: ArrayLike | None = None,
    **likelihood: object,
) -> UncertaintyTerms:
    """JEVB's terms of images from one or more of their views (docs eq. 22).

    Args:
      key: `[N]` keys, one for each image, so that a score does not depend on the batch.
      views: embedding, posterior_mean and posterior_scale of every view, each `[V, N, D]`.
      num_samples: draws of each posterior.
      untied_scale: as for `conditional_elbo`, a number or `[V, N, D]`.
      **likelihood: the other keyword arguments of `conditional_elbo`.

    Returns:
      `UncertaintyTerms` of `[N]`.

    Raises:
      ValueError: arrays that are not `[V, N, D]`, and as `conditional_elbo`.
    """
    shapes = {name: jnp.shape(values) for name, values in views._asdict().items()}
    if len(set(shapes.values())) > 1 or len(shapes["embedding"]) != 3:
        raise ValueError(f"views must share one shape [V, N, D], got {shapes}")
    num_views, _, dim = shapes["embedding"]
    mean, scale = views.posterior_mean, views.posterior_scale
    if untied_scale is not None:
        untied_scale = jnp.broadcast_to(jnp.asarray(untied_scale, mean.dtype), mean.shape)
    settings = {"num_samples": num_samples, **likelihood}

    def keys(purpose: ArrayLike) -> Array:
        return jax.vmap(
            lambda view: jax.vmap(jax.random.fold_in, (0, None))(key, purpose * num_views + view)
        )(jnp.arange(num_views))

    def log_likelihoods(shift: Array) -> tuple[Array, Array]:
        """The target of view `v` is view `v + shift`."""
        terms = jax.vmap(functools.partial(conditional_elbo, **settings))(  # pyright: ignore[reportArgumentType]
            keys(shift),
            jnp.roll(views.embedding, -shift, axis=0),
            mean,
            scale,
            untied_scale=untied_scale,
        )
        return terms.directional_log_likelihood, terms.radial_log_likelihood

    # One shift after the other: compiled once, and memory does not grow with the pairs of views.
    directional, radial = jax.lax.map(log_likelihoods, jnp.arange(num_views))
    bound = jax.vmap(
        functools.partial(importance_weighted_bound, **_bound_settings(settings))  # pyright: ignore[reportArgumentType]
    )(keys(num_views), views.embedding, mean, scale, untied_scale=untied_scale)
    cross_view = None
    if num_views > 1:
        cross_view = jnp.mean((directional + radial)[1:], axis=(0, 1))
    prior_scale: Any = likelihood.get("prior_scale", 1.0)
    kl = gaussian_kl_divergence(mean, scale, prior_scale=prior_scale)
    entropy = jnp.sum(jnp.log(scale), axis=-1) + dim / 2 * math.log(2 * math.pi * math.e)
    over_views = functools.partial(jnp.mean, axis=0)
    return UncertaintyTerms(
        directional_log_likelihood=over_views(directional[0]),
        radial_log_likelihood=over_views(radial[0]),
        kl=over_views(kl),
        posterior_entropy=over_views(entropy),
        importance_weighted_bound=over_views(bound),
        cross_view_log_likelihood=cross_view,
    )


def _bound_settings(settings: dict[str, object]) -> dict[str, object]:
    """What of `conditional_elbo`'s settings the bound has: no weights, always a sampled location."""
    without = ("kl_weight", "radial_weight", "location")
    return {name: value for name, value in settings.items() if name not in without}


def negative_log_likelihood_score(terms: UncertaintyTerms) -> Array:
    """`-E_q[log p_dir + log p_rad]`, `[N]`, nats (docs eq. 23): the embedding surprises its posterior."""
    return -(terms.directional_log_likelihood + terms.radial_log_likelihood)


def directional_score(terms: UncertaintyTerms) -> Array:
    """`-E_q[log p_dir]`, `[N]`, nats (docs eq. 23)."""
    return -terms.directional_log_likelihood


def radial_score(terms: UncertaintyTerms) -> Array:
    """`-E_q[log p_rad]`, `[N]`, nats (docs eq. 23)."""
    return -terms.radial_log_likelihood


def negative_elbo_score(terms: UncertaintyTerms) -> Array:
    """The negative bound, both weights one, `[N]`, nats (docs eq. 23)."""
    return negative_log_likelihood_score(terms) + terms.kl


def importance_weighted_score(terms: UncertaintyTerms) -> Array:
    """The negative importance-weighted bound, `[N]`, nats (docs eq. 23)."""
    return -terms.importance_weighted_bound


def kl_score(terms: UncertaintyTerms) -> Array:
    """`-KL(q || p)`, `[N]`, nats (docs eq. 23): high where the posterior is near the prior.

    The sign is the one that an encoder's uncertainty suggests. It is not right for every set: see
    `typicality_features`.
    """
    return -terms.kl


def posterior_entropy_score(terms: UncertaintyTerms) -> Array:
    """Differential entropy of the posterior, `[N]`, nats (docs eq. 23)."""
    return terms.posterior_entropy


def cross_view_score(terms: UncertaintyTerms) -> Array:
    """`-E_q(z | h_s)[log p(h_t | z)]` over pairs of views, `[N]`, nats: they disagree (docs eq. 23).

    Raises:
      ValueError: terms of a single view.
    """
    if terms.cross_view_log_likelihood is None:
        raise ValueError("the cross-view score needs terms of at least 2 views")
    return -terms.cross_view_log_likelihood


def typicality_features(terms: UncertaintyTerms) -> Array:
    """The vector of JEVB's terms, `[N, 5]` (`[N, 4]` of a single view), nats (docs eq. 24).

    One term alone calls images more likely that are simpler than any in the training set (Nalisnick
    et al. 2019). A density fitted to these vectors of in-distribution images, by `fit_mahalanobis` or
    `fit_whitened_knn`, calls an image strange on either side of what is usual.
    """
    columns = [
        terms.directional_log_likelihood,
        terms.radial_log_likelihood,
        terms.kl,
        terms.posterior_entropy,
    ]
    if terms.cross_view_log_likelihood is not None:
        columns.append(terms.cross_view_log_likelihood)
    return jnp.stack(columns, axis=-1)


def concentration_score(concentration: ArrayLike) -> Array:
    """VI-SimSiam's uncertainty, `-k`, high where unsure (docs eq. 23; Nakamura et al. 2023).

    Args:
      concentration: `[N]`, positive.

    Returns:
      `[N]`.
    """
    return -jnp.asarray(concentration)


# --- Features -------------------------------------------------------------------------------------

Score = Callable[[Array], Array]


class DegenerateFeaturesError(ValueError):
    """The fitted features hold nothing that a density could be fitted to."""


def _checked(name: str, features: ArrayLike) -> np.ndarray:
    """`[N, F]` float64, finite, at least two rows."""
    values = np.asarray(features, np.float64)
    if values.ndim != 2 or len(values) < 2 or values.shape[1] < 1:
        raise ValueError(f"{name} must be [N, F] with at least 2 images, got shape {values.shape}")
    num_bad = int(np.sum(~np.isfinite(values).all(axis=1)))
    if num_bad:
        raise ValueError(f"{name} must be finite: {num_bad} of {len(values)} rows hold NaN or inf")
    return values


def _directions(features: np.ndarray) -> np.ndarray:
    norm = np.linalg.norm(features, axis=1, keepdims=True)
    return features / np.where(norm == 0, 1, norm)


def feature_norm_score(features: ArrayLike) -> Array:
    """`-|x|`, `[N]`: networks answer strange images with small features (docs eq. 27; Tack et al. 2020).

    Args:
      features: `[N, F]`.
    """
    return -sphere.safe_norm(jnp.asarray(features))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DirectionNeighbours:
    """Distance between directions to the `k`-th nearest fitted image; see `fit_knn`.

    Attributes:
      bank: `[M, F]`, directions.
      k: which neighbour.
    """

    bank: Array
    k: int = dataclasses.field(metadata={"static": True})

    def __call__(self, features: ArrayLike) -> Array:
        """Distances, `[N]`."""
        direction, _ = sphere.polar_decomposition(jnp.asarray(features, self.bank.dtype))

        def distance(query: Array) -> Array:
            _, index = jax.lax.top_k(_matmul(self.bank, query), self.k)
            # Not sqrt(2 - 2 cos), which has no digits left between near duplicates.
            return sphere.safe_norm(self.bank[index[-1]] - query)

        return jax.lax.map(distance, direction, batch_size=64)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class WhitenedNeighbours:
    """Distance to the `k`-th nearest fitted image after whitening; see `fit_whitened_knn`.

    Attributes:
      mean: `[F]`, of the fitted images.
      whitening: `[F, F]`.
      bank: `[M, F]`, whitened.
      k: which neighbour.
    """

    mean: Array
    whitening: Array
    bank: Array
    k: int = dataclasses.field(metadata={"static": True})

    def __call__(self, features: ArrayLike) -> Array:
        """Distances, `[N]`."""
        shifted = jnp.asarray(features, self.bank.dtype) - self.mean[None]

        # `b.q - |b|^2 / 2`, which falls as `|b - q|` grows, as one product.
        half_squares = jnp.sum(jnp.square(self.bank), axis=-1, keepdims=True) / 2
        extended = jnp.concatenate([self.bank, -half_squares], axis=-1)

        def distance(query: Array) -> Array:
            closeness = _matmul(extended, jnp.append(query, 1.0))
            _, index = jax.lax.top_k(closeness, self.k)
            return sphere.safe_norm(self.bank[index[-1]] - query)

        return jax.lax.map(distance, _matmul(shifted, self.whitening), batch_size=64)


def fit_knn(features: ArrayLike, *, k: int = 50) -> DirectionNeighbours:
    """Distance between directions to the k-th nearest fitted image (docs eq. 25; Sun et al. 2022).

    Args:
      features: `[M, F]`, in distribution. A zero row is at distance 1 of every direction.
      k: at most `M`. The paper takes 50 for CIFAR-10 and 200 for CIFAR-100, of 50,000 images each.

    Returns:
      A score, features `[N, F]` to `[N]`, in `[0, 2]`.

    Raises:
      ValueError: not two axes, values that are not finite, `k` out of range.
    """
    bank = _checked("features", features)
    _check_k(k, len(bank))
    return DirectionNeighbours(jnp.asarray(_directions(bank), jnp.float32), k)


def fit_whitened_knn(features: ArrayLike, *, k: int = 50) -> WhitenedNeighbours:
    """Euclidean distance to the k-th nearest fitted image, after whitening (docs eq. 25).

    For few features of different units, such as `typicality_features`.

    Args:
      features: `[M, F]`, in distribution.
      k: at most `M`.

    Returns:
      A score, features `[N, F]` to `[N]`, at least 0.

    Raises:
      ValueError: as `fit_knn`; features that do not vary.
    """
    bank = _checked("features", features)
    _check_k(k, len(bank))
    mean, whitening = _mean_and_whitening(bank)
    whitened = (bank - mean) @ whitening
    return WhitenedNeighbours(
        *(jnp.asarray(x, jnp.float32) for x in (mean, whitening, whitened)), k=k
    )


def _check_k(k: int, num_images: int) -> None:
    if not 1 <= k <= num_images:
        raise ValueError(f"k must be in [1, {num_images}], the number of fitted images, got {k}")


def _whitening(residual: np.ndarray, features: np.ndarray) -> np.ndarray:
    """`[F, F]`, `W` with `W W^T` the pseudo-inverse of the covariance of `residual` `[M, F]`.

    The residual is what means leave of `features`.

    Every feature is brought to unit variance first, so that units do not matter. Directions with less
    than 1e-9 of the largest variance are then left out, and features that do not vary: a feature that
    is never active in distribution has no scale to measure its activity by.
    """
    std = np.sqrt(np.mean(np.square(residual), axis=0))
    # Below this the spread of float32 features is their rounding.
    is_alive = std > 1e-6 * np.max(np.abs(features), axis=0)
    if not is_alive.any():
        raise DegenerateFeaturesError("the fitted features do not vary: has the encoder collapsed?")
    inverse_std = np.where(is_alive, 1 / np.where(is_alive, std, 1), 0)
    scaled = residual * inverse_std
    variances, directions = np.linalg.eigh(scaled.T @ scaled / len(scaled))
    is_kept = variances > 1e-9 * variances[-1]
    inverse_root = np.where(is_kept, 1 / np.sqrt(np.where(is_kept, variances, 1)), 0)
    return inverse_std[:, None] * directions * inverse_root


def _mean_and_whitening(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    mean = features.mean(axis=0)
    return mean, _whitening(features - mean, features)


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
        shifted = jnp.asarray(features, self.center.dtype) - self.center[None]
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
        return jnp.min(distances, axis=0)


def _gaussians(means: np.ndarray, whitenings: np.ndarray) -> Gaussians:
    """From `[C, F]` means and `[C, F, F]` or `[1, F, F]` whitenings in float64."""
    center = means.mean(axis=0)
    whitened = np.einsum(
        "cf,cfg->cg",
        means - center,
        np.broadcast_to(whitenings, (len(means), *whitenings.shape[1:])),
    )
    return Gaussians(*(jnp.asarray(x, jnp.float32) for x in (center, whitenings, whitened)))


def fit_mahalanobis(features: ArrayLike) -> Gaussians:
    """Squared Mahalanobis distance to the fitted images, one Gaussian, no labels (docs eq. 24).

    Args:
      features: `[M, F]`, in distribution.

    Returns:
      A score, features `[N, F]` to `[N]`.

    Raises:
      ValueError: not two axes, values that are not finite, features that do not vary.
    """
    mean, whitening = _mean_and_whitening(_checked("features", features))
    return _gaussians(mean[None], whitening[None])


class DirectionGaussians(NamedTuple):
    """`Gaussians` of the directions of features; see `fit_ssd`."""

    gaussians: Gaussians

    def __call__(self, features: ArrayLike) -> Array:
        """Smallest squared distances, `[N]`."""
        direction, _ = sphere.polar_decomposition(jnp.asarray(features))
        return self.gaussians(direction)


def fit_ssd(features: ArrayLike, *, num_clusters: int = 1, seed: int = 0) -> DirectionGaussians:
    """SSD (docs eq. 26; Sehwag et al. 2021): Mahalanobis distance to the nearest cluster of directions.

    Clusters come from k-means; each has a mean and a covariance of its own, over all features.

    Args:
      features: `[M, F]`, in distribution.
      num_clusters: 1 is the paper's choice.
      seed: of k-means.

    Returns:
      A score, features `[N, F]` to `[N]`.

    Raises:
      ValueError: as `fit_mahalanobis`; fewer images than two for each cluster, or a cluster of one.
    """
    values = _checked("features", features)
    if not 1 <= num_clusters <= len(values) // 2:
        raise ValueError(
            f"num_clusters must be in [1, {len(values) // 2}], half the fitted images, "
            f"got {num_clusters}"
        )
    directions = _directions(values)
    cluster = np.zeros(len(directions), int)
    if num_clusters > 1:
        from sklearn.cluster import KMeans  # one score of many, and none of a served model's

        cluster = KMeans(num_clusters, n_init="auto", random_state=seed).fit_predict(directions)
    sizes = np.bincount(cluster, minlength=num_clusters)
    if sizes.min() < 2:
        raise DegenerateFeaturesError(
            f"a cluster of {sizes.min()} images has no covariance: lower num_clusters"
        )
    parts = [_mean_and_whitening(directions[cluster == c]) for c in range(num_clusters)]
    return DirectionGaussians(
        _gaussians(np.stack([mean for mean, _ in parts]), np.stack([w for _, w in parts]))
    )


class Residual(NamedTuple):
    """Length of what a principal subspace leaves of features; see `fit_residual`.

    Attributes:
      origin: `[F]`.
      directions: `[F, F - num_components]`, orthonormal, of the smallest variances.
    """

    origin: Array
    directions: Array

    def __call__(self, features: ArrayLike) -> Array:
        """Lengths, `[N]`."""
        shifted = jnp.asarray(features, self.origin.dtype) - self.origin[None]
        return sphere.safe_norm(_matmul(shifted, self.directions))


def fit_residual(
    features: ArrayLike, *, num_components: int, origin: ArrayLike | None = None
) -> Residual:
    """The residual part of ViM (docs eq. 27; Wang et al. 2022, section 4.1), which needs no logits.

    Args:
      features: `[M, F]`, in distribution.
      num_components: of the principal subspace, below `F`.
      origin: `[F]`; the mean by default. ViM takes the point where all logits are equal.

    Returns:
      A score, features `[N, F]` to `[N]`.

    Raises:
      ValueError: as `fit_mahalanobis`; `num_components` out of range.
    """
    values = _checked("features", features)
    if not 1 <= num_components < values.shape[1]:
        raise ValueError(
            f"num_components must be in [1, {values.shape[1] - 1}], below the number of features, "
            f"got {num_components}"
        )
    origin = values.mean(axis=0) if origin is None else np.asarray(origin, np.float64)
    shifted = values - origin
    _, directions = np.linalg.eigh(shifted.T @ shifted / len(shifted))
    rest = directions[:, : values.shape[1] - num_components]
    return Residual(jnp.asarray(origin, jnp.float32), jnp.asarray(rest, jnp.float32))


# --- With labels ----------------------------------------------------------------------------------


def max_softmax_score(logits: ArrayLike) -> Array:
    """`-max_c softmax(logits)_c`, `[N]` (docs eq. 28; MSP; Hendrycks and Gimpel 2017).

    Args:
      logits: `[N, C]`.
    """
    return -jnp.max(jax.nn.softmax(jnp.asarray(logits), axis=-1), axis=-1)


def max_logit_score(logits: ArrayLike) -> Array:
    """`-max_c logits_c`, `[N]` (docs eq. 28; Hendrycks et al. 2022).

    Args:
      logits: `[N, C]`.
    """
    return -jnp.max(jnp.asarray(logits), axis=-1)


def energy_score(logits: ArrayLike) -> Array:
    """`-log sum_c exp(logits_c)`, `[N]` (docs eq. 28; Liu et al. 2020, temperature 1).

    Args:
      logits: `[N, C]`.
    """
    return -jax.nn.logsumexp(jnp.asarray(logits), axis=-1)


def _class_means(features: np.ndarray, labels: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """`[C, F]` means of the classes there are, and each image's row of them `[M]`."""
    labels = np.asarray(labels)
    if labels.shape != (len(features),) or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(
            f"labels must be integers [{len(features)}], one for each image, got {labels.dtype} "
            f"{labels.shape}"
        )
    _, index = np.unique(labels, return_inverse=True)
    return np.stack([features[index == c].mean(axis=0) for c in range(index.max() + 1)]), index


def fit_class_mahalanobis(features: ArrayLike, labels: ArrayLike) -> Gaussians:
    """Squared Mahalanobis distance to the nearest class, one covariance (docs eq. 28; Lee et al. 2018).

    Args:
      features: `[M, F]`, in distribution.
      labels: `[M]` integers.

    Returns:
      A score, features `[N, F]` to `[N]`.

    Raises:
      ValueError: as `fit_mahalanobis`; labels that are not one integer for each image.
    """
    values = _checked("features", features)
    means, index = _class_means(values, labels)
    residual = values - means[index]
    return _gaussians(means, _whitening(residual, values)[None])


class RelativeMahalanobis(NamedTuple):
    """Distance to the nearest class less that to all images; see `fit_relative_mahalanobis`."""

    classes: Gaussians
    background: Gaussians

    def __call__(self, features: ArrayLike) -> Array:
        """Differences of squared distances, `[N]`."""
        return self.classes(features) - self.background(features)


def fit_relative_mahalanobis(features: ArrayLike, labels: ArrayLike) -> RelativeMahalanobis:
    """Relative Mahalanobis distance, RMD (docs eq. 28; Ren et al. 2021).

    Args:
      features: `[M, F]`, in distribution.
      labels: `[M]` integers.

    Returns:
      A score, features `[N, F]` to `[N]`.

    Raises:
      ValueError: as `fit_class_mahalanobis`.
    """
    return RelativeMahalanobis(fit_class_mahalanobis(features, labels), fit_mahalanobis(features))


class VirtualLogit(NamedTuple):
    """ViM: the scaled residual as a logit against the others; see `fit_vim`.

    Attributes:
      residual: of features that the logits are linear in.
      scale: `[]`, `alpha`.
    """

    residual: Residual
    scale: Array

    def __call__(self, features: ArrayLike, logits: ArrayLike) -> Array:
        """`alpha |residual| - log sum_c exp(logits_c)`, `[N]`, which ranks as the paper's softmax."""
        return self.scale * self.residual(features) + energy_score(logits)


def vim_origin(weights: ArrayLike, bias: ArrayLike) -> np.ndarray:
    """`-pinv(W^T) b`, where all logits are zero, for `fit_vim` (Wang et al. 2022, section 4.1).

    Softmax does not see what is added to all logits alike, so the weights of a fitted probe sum to zero
    over the classes up to rounding. The inverse leaves that direction out: of 1e-7, it would make
    an origin of rounding errors.

    Args:
      weights: `[F, C]` float32, `W`.
      bias: `[C]`.

    Returns:
      `[F]` float64.
    """
    matrix = np.asarray(weights, np.float64).T
    return -np.linalg.pinv(matrix, rcond=1e-5) @ np.asarray(bias, np.float64)


def fit_vim(
    features: ArrayLike, logits: ArrayLike, *, origin: ArrayLike, num_components: int
) -> VirtualLogit:
    """Virtual-logit matching, ViM (docs eq. 28; Wang et al. 2022).

    Args:
      features: `[M, F]`, in distribution.
      logits: `[M, C]` of them, linear in the features.
      origin: `[F]`, of `vim_origin`.
      num_components: of the principal subspace.

    Returns:
      A score, features `[N, F]` and logits `[N, C]` to `[N]`.

    Raises:
      ValueError: as `fit_residual`; features that the subspace explains wholly.
    """
    residual = fit_residual(features, num_components=num_components, origin=origin)
    length = np.asarray(residual(jnp.asarray(np.asarray(features), jnp.float32)), np.float64)
    if not length.mean() > 0:
        raise DegenerateFeaturesError(
            "the principal subspace explains every feature: lower num_components"
        )
    largest = np.asarray(logits, np.float64).max(axis=-1)
    return VirtualLogit(residual, jnp.asarray(largest.mean() / length.mean(), jnp.float32))


# --- Detection ------------------------------------------------------------------------------------


def conformal_threshold(calibration_scores: ArrayLike, false_alarm_rate: float) -> float:
    """Threshold that a new inside score exceeds at most with the asked probability (docs eq. 29).

    Split conformal: the `ceil((n + 1)(1 - rate))`-th smallest of `n` scores. If those and the new one
    are exchangeable, the probability over both is at most `rate`, and above `rate - 1/(n + 1)` where no
    scores are equal (Vovk et al. 2005; Bates et al. 2023 for its use here).

    Args:
      calibration_scores: `[n]`, of held-out in-distribution images: not those of the fit.
      false_alarm_rate: in (0, 1).

    Returns:
      The threshold; larger scores are alarms.

    Raises:
      ValueError: scores that are not one axis or hold NaN, a rate out of range, or too few scores
        for it: it needs `n >= 1/rate - 1`.
    """
    scores = np.asarray(calibration_scores, np.float64)
    if scores.ndim != 1 or np.isnan(scores).any():
        raise ValueError(f"calibration_scores must be [n] without NaN, got shape {scores.shape}")
    if not 0 < false_alarm_rate < 1:
        raise ValueError(f"false_alarm_rate must be in (0, 1), got {false_alarm_rate}")
    # Rounded, because (99 + 1)(1 - 0.07) is 93.00000000000001 in float64.
    rank = math.ceil(round((len(scores) + 1) * (1 - false_alarm_rate), 9))
    if rank > len(scores):
        needed = math.ceil(round(1 / false_alarm_rate, 9)) - 1
        raise ValueError(
            f"a false-alarm rate of {false_alarm_rate} needs at least {needed} calibration scores, "
            f"got {len(scores)}"
        )
    return float(np.sort(scores)[rank - 1])


class OODDetector:
    """A feature score that is fitted, calibrated and asked, in scikit-learn's manner.

    Args:
      fit: one of the `fit_*` functions, with its settings bound, for instance
        `functools.partial(fit_knn, k=10)`. Called with the features, and with labels where it is given
        them.

    Example:
      `detector = OODDetector(fit_mahalanobis).fit(train).calibrate(held_out)`, then
      `detector.score(new)` or `detector.is_outside(new, false_alarm_rate=0.05)`.
    """

    def __init__(self, fit: Callable[..., Score]):
        self._fit = fit
        self._score: Score | None = None
        self._calibration_scores: np.ndarray | None = None

    def fit(self, features: ArrayLike, labels: ArrayLike | None = None) -> "OODDetector":
        """Fits the score and forgets any calibration.

        Args:
          features: `[M, F]`, in distribution.
          labels: `[M]`, for the scores that need them.

        Returns:
          The detector.
        """
        self._score = self._fit(features) if labels is None else self._fit(features, labels)
        self._calibration_scores = None
        return self

    def score(self, features: ArrayLike) -> np.ndarray:
        """Scores, larger is more out of distribution.

        Args:
          features: `[N, F]`, finite.

        Returns:
          `[N]`.

        Raises:
          ValueError: nothing was fitted yet; features not `[N, F]` or not finite.
        """
        if self._score is None:
            raise ValueError("fit the detector before asking it for scores")
        values = np.asarray(features)
        if values.ndim != 2 or not np.isfinite(values).all():
            raise ValueError(f"features must be finite [N, F], got shape {values.shape}")
        return np.asarray(_apply(self._score, jnp.asarray(values, jnp.float32)))

    def calibrate(self, features: ArrayLike) -> "OODDetector":
        """Keeps the scores of held-out in-distribution images, for thresholds.

        Args:
          features: `[n, F]`, not those of the fit.

        Returns:
          The detector.
        """
        self._calibration_scores = self.score(features)
        return self

    def threshold(self, false_alarm_rate: float) -> float:
        """`conformal_threshold` of the calibration.

        Args:
          false_alarm_rate: in (0, 1).

        Returns:
          The threshold.

        Raises:
          ValueError: no calibration, and as `conformal_threshold`.
        """
        if self._calibration_scores is None:
            raise ValueError("calibrate the detector on held-out images before asking a threshold")
        return conformal_threshold(self._calibration_scores, false_alarm_rate)

    def is_outside(self, features: ArrayLike, *, false_alarm_rate: float) -> np.ndarray:
        """Which images are called out of distribution.

        Args:
          features: `[N, F]`.
          false_alarm_rate: of in-distribution images called so.

        Returns:
          bool `[N]`.
        """
        return self.score(features) > self.threshold(false_alarm_rate)


@jax.jit
def _apply(score: Score, features: Array) -> Array:
    return score(features)
