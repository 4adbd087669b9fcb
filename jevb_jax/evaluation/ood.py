"""Scores of one image's strangeness under a model; larger is more out of distribution.

Everything is per example, `[N]`, and made without labels but for the scores that say so. Three
kinds: scores of JEVB's own terms (`uncertainty_terms` computes them once for all), scores of
features, which are fitted to in-distribution features (`fit_*` returns a callable
`features [N, F] -> [N]`, a tree of arrays that can be passed through `jax.jit`), and scores of a linear
probe's logits. `conformal_threshold` says from which score on an image is called strange.

Fits and scores of features work on float32 numbers, whatever type was given. Half precision and
integers are promoted. A score of features without NaN is no NaN: where its arithmetic overflows it is
infinite, which is infinitely strange.
"""

import dataclasses
import functools
import math
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from jevb_jax import arguments
from jevb_jax.paper import sphere
from jevb_jax.paper.densities import gaussian_kl_divergence
from jevb_jax.paper.likelihood import Likelihood
from jevb_jax.paper.objective import Location, View, conditional_elbo, importance_weighted_bound
from jevb_jax.paper.tracing import is_traced

# As in `classification`: a bfloat16 product would reorder images on an accelerator.
_matmul = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)

# Degrees of freedom of a covariance for each feature, below which it is shrunk.
_FEW_IMAGES = 3
# Least variance of a direction, of the largest: the rounding of float32 features.
_LEAST_VARIANCE = 1e-9
# Feature-wise spread, of the largest value, that is rounding and nothing else.
_ROUNDING = 1e-6
# Sizes of features whose squares and inverses float32 holds with all of their digits.
_SMALLEST, _LARGEST = 1e-30, 1e30
# Neighbours beyond the k-th whose distances are computed again without cancellation.
_NUM_SPARE = 32
_NUM_FOLDS = 5
_PACKAGE = str(Path(__file__).parents[1]) + os.sep


# --- What is given --------------------------------------------------------------------------------


def checked_share(name: str, value: Any) -> float:
    """A setting that is a share, as a Python number.

    Args:
      name: of the setting, for the message.
      value: one real number in (0, 1). Of fewer bits than Python's it is taken as the decimal number
        that it shows: 0.8 in float32 is a little more, and would ask for one image more.

    Returns:
      The share.

    Raises:
      ValueError: anything else.
    """
    is_number = isinstance(value, int | float | np.integer | np.floating | np.ndarray | Array)
    if not is_number or np.ndim(value) or not 0 < value < 1:
        raise ValueError(f"{name} must be in (0, 1), got {value!r}")
    return float(str(np.asarray(value)[()]))


def real_matrix(
    name: str, values: ArrayLike, *, least: int, of: str, axes: str = "[N, F]"
) -> np.ndarray:
    """`[N, F]` float64 of finite real numbers, for a fit.

    Args:
      name: of the argument, for the message.
      values: `[N, F]`, of any real type.
      least: rows that are needed.
      of: what a row is, for the message.
      axes: their names, for the message.

    Returns:
      The values.

    Raises:
      ValueError: other shapes, too few rows, values that are not finite.
      TypeError: values that are not real numbers.
    """
    array = np.asarray(values)
    if not (jnp.issubdtype(array.dtype, jnp.floating) or jnp.issubdtype(array.dtype, jnp.integer)):
        raise TypeError(f"{name} must be real numbers, got {array.dtype}")
    if array.ndim != 2 or len(array) < least or array.shape[1] < 1:
        raise ValueError(
            f"{name} must be {axes} with at least {least} {of}, got shape {array.shape}"
        )
    matrix = array.astype(np.float64)
    num_bad = int(np.sum(~np.isfinite(matrix).all(axis=1)))
    if num_bad:
        raise ValueError(f"{name} must be finite: {num_bad} of {len(matrix)} rows hold NaN or inf")
    return matrix


def _dtype(values: Any) -> np.dtype:
    return np.dtype(values.dtype if hasattr(values, "dtype") else np.asarray(values).dtype)


def _numbers(name: str, values: ArrayLike) -> Array:
    """As floats of at least 32 bits, which neither tie nor wrap."""
    dtype = _dtype(values)
    if not (jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)):
        raise TypeError(f"{name} must be real numbers, got {dtype}")
    (numbers,) = sphere.at_least_float32(values)
    return numbers


def _queries(features: ArrayLike, width: int) -> Array:
    """`[N, F]` float32, as wide as the fitted features."""
    values = _numbers("features", features)
    if values.ndim != 2 or values.shape[1] != width:
        raise ValueError(
            f"features must be [N, {width}], as wide as those of the fit, got shape {values.shape}"
        )
    return values.astype(jnp.float32)


def _or_infinite(score: Array, features: Array) -> Array:
    """Infinite where the arithmetic overflowed, which differences of infinities would make NaN."""
    has_overflowed = jnp.isnan(score) & ~jnp.isnan(features).any(axis=-1)
    return jnp.where(has_overflowed, jnp.inf, score)


def _never_certain(score: Array) -> Array:
    """Infinite where it is minus infinity: an overflow does not say that an image is as usual."""
    return jnp.where(jnp.isneginf(score), jnp.inf, score)


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
    likelihood: Likelihood,
    *,
    num_samples: int,
    prior_scale: ArrayLike = 1.0,
    untied_scale: ArrayLike | None = None,
    location: Location = "sample",
) -> UncertaintyTerms:
    """JEVB's terms of images from one or more of their views (docs eq. 22).

    Args:
      key: one typed key, whose draws serve all images; or `[N]` keys, one for each image. Either way a
        score does not depend on the batch.
      views: embedding, posterior_mean and posterior_scale of every view, each `[V, N, D]`.
      likelihood: see `conditional_elbo`.
      num_samples: draws of each posterior.
      prior_scale: standard deviation of the prior.
      untied_scale: as for `conditional_elbo`, a number or `[V, N, D]`.
      location: as for `conditional_elbo`; the importance-weighted bound is always of samples.

    Returns:
      `UncertaintyTerms` of `[N]`.

    Raises:
      ValueError: arrays that are not `[V, N, D]`, and as `conditional_elbo`.
    """
    shapes = {name: jnp.shape(values) for name, values in views._asdict().items()}
    if len(set(shapes.values())) > 1 or len(shapes["embedding"]) != 3:
        raise ValueError(f"views must share one shape [V, N, D], got {shapes}")
    num_views, _, dim = shapes["embedding"]
    if num_views < 1:
        raise ValueError(f"terms need at least 1 view, the first axis of views, got {shapes}")
    num_samples = arguments.whole_number("num_samples", num_samples, at_least=1)
    views = View(*sphere.at_least_float32(*views))
    mean, scale = views.posterior_mean, views.posterior_scale
    if untied_scale is not None:
        untied_scale = jnp.broadcast_to(jnp.asarray(untied_scale, mean.dtype), mean.shape)

    fold_in = jax.random.fold_in if key.ndim == 0 else jax.vmap(jax.random.fold_in, (0, None))

    def of_views(function: Callable[..., Any], purpose: ArrayLike, embedding: Array) -> Any:
        """A function of the keys of a purpose and of the arrays of every view, its values `[V, N]`."""
        keys = jax.vmap(lambda view: fold_in(key, purpose * num_views + view))(
            jnp.arange(num_views)
        )
        if key.ndim:
            return jax.vmap(function)(keys, embedding, mean, scale, untied_scale)

        def of_image(key: Array, *arrays: Array | None) -> Any:
            batch_of_one = jax.tree.map(lambda x: x[None], arrays)
            return jax.tree.map(lambda x: x[0], function(key[None], *batch_of_one))

        # The draws depend on the key alone: they are made once, not for each image.
        of_images = jax.vmap(of_image, in_axes=(None, 0, 0, 0, 0))
        return jax.vmap(of_images)(keys, embedding, mean, scale, untied_scale)

    def log_likelihood(
        key: Array, target: Array, mean: Array, scale: Array, untied_scale: Array | None
    ) -> tuple[Array, Array]:
        terms = conditional_elbo(
            key,
            target,
            mean,
            scale,
            likelihood,
            prior_scale=prior_scale,
            num_samples=num_samples,
            untied_scale=untied_scale,
            location=location,
        )
        return terms.directional_log_likelihood, terms.radial_log_likelihood

    def log_likelihoods(shift: Array) -> tuple[Array, Array]:
        """The target of view `v` is view `v + shift`."""
        return of_views(log_likelihood, shift, jnp.roll(views.embedding, -shift, axis=0))

    def log_bound(
        key: Array, embedding: Array, mean: Array, scale: Array, untied_scale: Array | None
    ) -> Array:
        return importance_weighted_bound(
            key,
            embedding,
            mean,
            scale,
            likelihood,
            num_samples=num_samples,
            prior_scale=prior_scale,
            untied_scale=untied_scale,
        )

    # One shift after the other: compiled once, and memory does not grow with the pairs of views.
    directional, radial = jax.lax.map(log_likelihoods, jnp.arange(num_views))
    bound = of_views(log_bound, num_views, views.embedding)
    cross_view = None
    if num_views > 1:
        cross_view = jnp.mean((directional + radial)[1:], axis=(0, 1))
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
    return _never_certain(-terms.kl)


def posterior_entropy_score(terms: UncertaintyTerms) -> Array:
    """Differential entropy of the posterior, `[N]`, nats (docs eq. 23)."""
    return _never_certain(terms.posterior_entropy)


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
    return _never_certain(-_numbers("concentration", concentration))


# --- Features -------------------------------------------------------------------------------------

Score = Callable[[Array], Array]


class DegenerateFeaturesError(ValueError):
    """The fitted features cannot carry the score: they do not vary, or their images are too few."""


class FewImagesWarning(UserWarning):
    """A covariance of fewer images than features: it is shrunk, and what it says is weak."""


def _checked(name: str, features: ArrayLike) -> np.ndarray:
    """`[N, F]` float64, finite, at least two rows, rounded to float32 as the scored ones will be."""
    values = real_matrix(name, features, least=2, of="images")
    largest = float(jnp.finfo(jnp.float32).max)
    num_large = int(np.sum((np.abs(values) > largest).any(axis=1)))
    if num_large:
        raise ValueError(
            f"{name} must lie within {largest:.3g}, the largest float32: {num_large} of {len(values)} "
            "rows do not. Divide all features by one number"
        )
    most = float(np.abs(values).max())
    if 0 < most < _SMALLEST:
        raise DegenerateFeaturesError(
            f"{name} must reach {_SMALLEST}, below which float32 loses digits, and none is larger than "
            f"{most:.3g}. Multiply all features by one number"
        )
    return values.astype(np.float32).astype(np.float64)


def _directions(features: np.ndarray) -> np.ndarray:
    norm = np.linalg.norm(features, axis=1, keepdims=True)
    return features / np.where(norm == 0, 1, norm)


def feature_norm_score(features: ArrayLike) -> Array:
    """`-|x|`, `[N]`: networks answer strange images with small features (docs eq. 27; Tack et al. 2020).

    Args:
      features: `[N, F]`.
    """
    return _never_certain(-sphere.safe_norm(_numbers("features", features)))


def _kth_distances(bank: Array, centered: Array, queries: Array, k: int, center: Array) -> Array:
    """Distance of each query to the k-th nearest row of a bank, exact.

    Candidates are found by one product, `b.q - |b|^2 / 2`, which falls as `|b - q|` grows. It has few
    digits between near duplicates, so they are put in order by their differences. Where rounding could
    have kept a nearer row from being a candidate, the differences of all rows are taken.

    Args:
      bank: `[M, F]`.
      centered: `[M, F + 1]`, of `_centered`.
      queries: `[N, F]`.
      k: which neighbour.
      center: `[F]`, near the bank.

    Returns:
      `[N]`.
    """
    num_rows = len(bank)
    rounding = _product_rounding(bank.shape[1])

    def distances(rows: Array, query: Array) -> Array:
        # Not sqrt(2 - 2 cos), which has no digits left between near duplicates.
        return sphere.safe_norm(rows - query[None])

    def of_candidates(query: Array) -> tuple[Array, Array]:
        """The distance, and whether no row that is not a candidate can be nearer."""
        shifted = query - center
        square = jnp.sum(jnp.square(shifted))
        closeness = _matmul(centered, jnp.append(shifted, 1.0))
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
    """`[M, F + 1]`, a bank less its center, and less half of its squared length.

    The last is raised by the most that the product with a row can come out too small.
    """
    rest = bank - center
    share = 0.5 - _product_rounding(bank.shape[1])
    return np.concatenate([rest, -share * np.sum(np.square(rest), axis=1, keepdims=True)], axis=1)


def _product_rounding(width: int) -> float:
    """Of a float32 sum of products in any order, relative to their sizes: twice the textbook's bound."""
    return (width + 16) * float(jnp.finfo(jnp.float32).eps)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DirectionNeighbours:
    """Distance between directions to the `k`-th nearest fitted image; see `fit_knn`.

    Attributes:
      bank: `[M, F]`, directions.
      center: `[F]`, their mean.
      centered: `[M, F + 1]`, the bank less its center, and less half of its squared length.
      k: which neighbour.
    """

    bank: Array
    center: Array
    centered: Array
    k: int = dataclasses.field(metadata={"static": True})

    def __call__(self, features: ArrayLike) -> Array:
        """Distances, `[N]`."""
        values = _queries(features, self.bank.shape[1])
        direction, _ = sphere.polar_decomposition(values)
        distance = _kth_distances(self.bank, self.centered, direction, self.k, self.center)
        return _or_infinite(distance, values)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class WhitenedNeighbours:
    """Distance to the `k`-th nearest fitted image after whitening; see `fit_whitened_knn`.

    Attributes:
      mean: `[F]`, of the fitted images.
      whitening: `[F, F]`.
      bank: `[M, F]`, whitened.
      centered: `[M, F + 1]`, the bank, and less half of its squared length.
      k: which neighbour.
    """

    mean: Array
    whitening: Array
    bank: Array
    centered: Array
    k: int = dataclasses.field(metadata={"static": True})

    def __call__(self, features: ArrayLike) -> Array:
        """Distances, `[N]`."""
        values = _queries(features, len(self.mean))
        center = jnp.zeros_like(self.mean)
        whitened = _matmul(values - self.mean[None], self.whitening)
        distance = _kth_distances(self.bank, self.centered, whitened, self.k, center)
        return _or_infinite(distance, values)


def fit_knn(features: ArrayLike, *, k: int = 50) -> DirectionNeighbours:
    """Distance between directions to the k-th nearest fitted image (docs eq. 25; Sun et al. 2022).

    Args:
      features: `[M, F]`, in distribution. A zero row is at distance 1 of every direction.
      k: at most `M`. The paper takes 50 for CIFAR-10 and 200 for CIFAR-100, of 50,000 images each.

    Returns:
      A score, features `[N, F]` to `[N]`, in `[0, 2]`.

    Raises:
      ValueError: not two axes, values that are not finite, `k` out of range.
      TypeError: `k` that is not an integer.
    """
    values = _checked("features", features)
    k = _checked_k(k, len(values))
    # Centered as rounded, so that the differences are those of the bank that is asked.
    bank = _directions(values).astype(np.float32)
    center = bank.mean(axis=0, dtype=np.float64).astype(np.float32)
    centered = _centered(bank.astype(np.float64), center.astype(np.float64))
    return DirectionNeighbours(
        *(jax.device_put(np.asarray(x, np.float32)) for x in (bank, center, centered)), k=k
    )


def fit_whitened_knn(features: ArrayLike, *, k: int = 50) -> WhitenedNeighbours:
    """Euclidean distance to the k-th nearest fitted image, after whitening (docs eq. 25).

    For few features of different units, such as `typicality_features`. The covariance is that of
    `fit_mahalanobis`.

    Args:
      features: `[M, F]`, in distribution.
      k: at most `M`.

    Returns:
      A score, features `[N, F]` to `[N]`, at least 0.

    Raises:
      ValueError: as `fit_knn`; features that do not vary.
    """
    bank = _checked("features", features)
    k = _checked_k(k, len(bank))
    mean, whitening = _mean_and_whitening(bank)
    mean = mean.astype(np.float32).astype(np.float64)
    whitened = ((bank - mean) @ whitening).astype(np.float32)
    centered = _centered(whitened.astype(np.float64), np.zeros_like(mean))
    return WhitenedNeighbours(*_as_float32(mean, whitening, whitened, centered), k=k)


def _checked_k(k: Any, num_images: int) -> int:
    return _at_most("k", k, num_images, "the number of fitted images")


def _at_most(name: str, value: Any, most: int, what: str) -> int:
    """A count in [1, most]; more than the images allow is their fault, and not the setting's alone."""
    count = arguments.whole_number(name, value)
    if not 1 <= count <= most:
        kind = ValueError if count < 1 else DegenerateFeaturesError
        raise kind(f"{name} must be in [1, {most}], {what}, got {count}")
    return count


_polar_decomposition = jax.jit(sphere.polar_decomposition)


@jax.jit
def _compiled_call(score: Score, features: Array) -> Array:
    """A fitted score, in one program and not in one for each operation."""
    return score(features)


def _as_float32(*values: np.ndarray) -> list[Array]:
    """Arrays of a fit, which float32 must hold."""
    with np.errstate(over="ignore"):  # which is what is looked for
        arrays = [np.asarray(x, np.float32) for x in values]
    if not all(np.isfinite(x).all() for x in arrays):
        raise DegenerateFeaturesError(
            "the fitted features vary by less than float32 can tell: multiply all by one number"
        )
    return [jax.device_put(x) for x in arrays]  # `jnp.asarray` compiles a program for each shape


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
        least = _LEAST_VARIANCE * np.linalg.eigvalsh(self.moments)[-1]
        shrunk = variances if share == 0 else (1 - share) * variances + factor * share
        return (1 / self.units)[:, None] * directions / np.sqrt(np.maximum(shrunk, factor * least))


def _covariance(
    residual: np.ndarray, features: np.ndarray, group: np.ndarray | None = None
) -> _Covariance:
    """Of the residuals `[M, F]` that means of groups leave of `features`; one group by default.

    Every feature is brought to unit variance, so that units do not matter.
    """
    std = np.sqrt(np.mean(np.square(residual), axis=0))
    largest = np.max(np.abs(features), axis=0)
    is_alive = std > _ROUNDING * largest
    _check_alive(is_alive, " within a class" if group is not None else "")
    # A feature that never varied has no unit of its own. It takes the others', or one that makes its
    # rounding the least variance.
    of_rounding = _ROUNDING / math.sqrt(_LEAST_VARIANCE) * largest
    units = np.where(is_alive, std, np.maximum(np.median(std[is_alive]), of_rounding))
    if units.max() > _LARGEST:
        raise DegenerateFeaturesError(
            f"the fitted features vary by up to {units.max():.3g}, and float32 holds no variances beyond "
            f"{_LARGEST:.0e} squared: divide all features by one number"
        )
    scaled = residual * np.where(is_alive, 1 / units, 0)
    moments = scaled.T @ scaled / len(scaled)
    group = np.zeros(len(features), int) if group is None else group
    shrinkage = _shrinkage((features / units)[:, is_alive], group)
    num_alive, freedom = int(is_alive.sum()), _freedom(features, group)
    if freedom < num_alive:
        _warn(
            f"a covariance of {num_alive} features that vary from {len(features)} images is shrunk by "
            f"{shrinkage:.2g}, and its score is weak: only {freedom} images vary freely. Fit more than "
            f"{num_alive} different ones, better {_FEW_IMAGES * num_alive}"
        )
    return _Covariance(units, moments, shrinkage)


def _check_alive(is_alive: np.ndarray, where: str = "") -> None:
    """Refuses features `[F]` none of which varies by more than its rounding."""
    if not is_alive.any():
        raise DegenerateFeaturesError(
            f"the fitted features do not vary{where}: has the encoder collapsed?"
        )


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
    if freedom >= _FEW_IMAGES * num_features:
        return 0.0
    x, g = scaled[kept], group[kept]
    means = np.stack([np.bincount(g, column) for column in x.T], axis=1)
    residual = x - means[g] / sizes[g][:, None]
    is_informative = sizes[g] > 1
    weight = (sizes[g] / np.maximum(sizes[g] - 1, 1))[is_informative, None]
    scatter, directions = np.linalg.eigh(residual.T @ residual)
    squares = np.square(residual[is_informative] @ directions)
    # Hoffbeck and Landgrebe 1996: without an image the covariance loses one outer product.
    shares = np.geomspace(_LEAST_VARIANCE, 1, 91)
    variances = (1 - shares) * np.maximum(scatter, 0)[:, None] / (num_images - 1) + shares
    length = squares @ (1 / variances)
    lost = np.maximum(1 - (1 - shares) * weight / (num_images - 1) * length, 1e-300)
    surprise = np.sum(np.log(variances), axis=0) + np.mean(
        np.log(lost) + np.square(weight) * length / lost, axis=0
    )
    return float(shares[np.argmin(surprise)])


def _warn(message: str) -> None:
    """A `FewImagesWarning` at the line outside this package that asked for the fit."""
    frame, level = sys._getframe(), 0
    while frame is not None and frame.f_code.co_filename.startswith(_PACKAGE):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, FewImagesWarning, stacklevel=level + 1)


def _mean_and_whitening(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    mean = features.mean(axis=0)
    return mean, _covariance(features - mean, features).whitening()


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
        values = _queries(features, len(self.center))
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
        return _or_infinite(jnp.min(distances, axis=0), values)


def _gaussians(means: np.ndarray, whitenings: np.ndarray) -> Gaussians:
    """From `[C, F]` means and `[C, F, F]` or `[1, F, F]` whitenings in float64."""
    # As float32 holds it: what its rounding loses would not be small off the span.
    center = means.mean(axis=0).astype(np.float32).astype(np.float64)
    whitened = np.einsum(
        "cf,cfg->cg",
        means - center,
        np.broadcast_to(whitenings, (len(means), *whitenings.shape[1:])),
    )
    return Gaussians(*_as_float32(center, whitenings, whitened))


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
    mean, whitening = _mean_and_whitening(_checked("features", features))
    return _gaussians(mean[None], whitening[None])


class DirectionGaussians(NamedTuple):
    """`Gaussians` of the directions of features; see `fit_ssd`."""

    gaussians: Gaussians

    def __call__(self, features: ArrayLike) -> Array:
        """Smallest squared distances, `[N]`."""
        values = _queries(features, len(self.gaussians.center))
        direction, _ = sphere.polar_decomposition(values)
        return _or_infinite(self.gaussians(direction), values)


def fit_ssd(features: ArrayLike, *, num_clusters: int = 1, seed: int = 0) -> DirectionGaussians:
    """SSD (docs eq. 26; Sehwag et al. 2021): Mahalanobis distance to the nearest cluster of directions.

    Clusters come from k-means; each has a mean and a covariance of its own, over all features. Of fewer
    than three images for each feature, a cluster's covariance is shrunk to that within all clusters
    (Friedman 1989), and a single cluster's as that of `fit_mahalanobis`.

    Args:
      features: `[M, F]`, in distribution.
      num_clusters: 1 is the paper's choice.
      seed: of k-means.

    Returns:
      A score, features `[N, F]` to `[N]`.

    Raises:
      ValueError: as `fit_mahalanobis`; fewer images than two for each cluster, or a cluster of one; a
        seed outside [0, 2**32).
      TypeError: `num_clusters` or a seed that is not an integer.

    Warns:
      FewImagesWarning: a cluster of fewer images than features.
    """
    values = _checked("features", features)
    num_clusters = _at_most(
        "num_clusters", num_clusters, len(values) // 2, "half the fitted images"
    )
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
    return DirectionGaussians(_gaussians(means, _cluster_whitenings(directions, means, cluster)))


def _cluster_whitenings(
    directions: np.ndarray, means: np.ndarray, cluster: np.ndarray
) -> np.ndarray:
    """`[J, F, F]`, of each cluster's covariance, shrunk to that within all clusters if it is small."""
    residual = directions - means[cluster]
    num_clusters, num_features = means.shape
    freedom = [_num_different(directions[cluster == c]) - 1 for c in range(num_clusters)]
    if num_clusters > 1 and min(freedom) < 1:
        raise DegenerateFeaturesError("the images of a cluster are all equal: lower num_clusters")
    shared = None
    whitenings = []
    for c in range(num_clusters):
        own = cluster == c
        if num_clusters == 1 or freedom[c] >= _FEW_IMAGES * num_features:
            whitenings.append(_covariance(residual[own], directions[own]).whitening())
            continue
        if shared is None:
            shared = _covariance(residual, directions, cluster).whitening()
        scaled = residual[own] @ shared
        of_shared = _Covariance(
            np.ones(num_features),
            scaled.T @ scaled / len(scaled),
            _shrinkage(scaled, np.zeros(len(scaled), int)),
        )
        whitenings.append(shared @ of_shared.whitening())
    num_small = sum(count < num_features for count in freedom)
    if num_small and num_clusters > 1:
        _warn(
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
        values = _queries(features, len(self.origin))
        shifted = values - self.origin[None]
        return _or_infinite(sphere.safe_norm(_matmul(shifted, self.directions)), values)


def fit_residual(
    features: ArrayLike, *, num_components: int, origin: ArrayLike | None = None
) -> Residual:
    """The residual part of ViM (docs eq. 27; Wang et al. 2022, section 4.1), which needs no logits.

    Components in which the images do not vary, beyond 1e-9 of the largest variance, are not part of the
    subspace: a deviation along them is no less strange than along the others.

    Args:
      features: `[M, F]`, in distribution.
      num_components: of the principal subspace, below `F`.
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
    values, num_components, origin = _checked_residual(features, num_components, origin)
    _check_alive(values.std(axis=0) > _ROUNDING * np.abs(values).max(axis=0))
    num_images = _num_different(values)
    if num_images <= values.shape[1]:
        _warn(
            f"a principal subspace of {values.shape[1]} features from {num_images} different images is "
            f"weak: fit more than {values.shape[1]}"
        )
    return _residual(values, num_components, origin)


def _num_different(features: np.ndarray) -> int:
    return len({row.tobytes() for row in features})


def _checked_residual(
    features: ArrayLike, num_components: Any, origin: ArrayLike | None
) -> tuple[np.ndarray, int, np.ndarray | None]:
    values = _checked("features", features)
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


def _residual(values: np.ndarray, num_components: int, origin: np.ndarray | None) -> Residual:
    point = values.mean(axis=0) if origin is None else origin
    shifted = values - point
    variances, directions = np.linalg.eigh(shifted.T @ shifted / len(shifted))
    num_spanned = int(np.sum(variances > _LEAST_VARIANCE * variances[-1]))
    rest = directions[:, : values.shape[1] - min(num_components, num_spanned)]
    return Residual(*_as_float32(point, rest))


# --- With labels ----------------------------------------------------------------------------------


def _logits(logits: ArrayLike, *, least: int = 1) -> Array:
    """`[..., C]`, floats of at least 32 bits."""
    values = _numbers("logits", logits)
    if values.ndim < 1 or values.shape[-1] < least:
        raise ValueError(
            f"logits must be [N, C] with at least {least} class{'es' * (least > 1)}, got shape "
            f"{values.shape}"
        )
    return values


def max_softmax_score(logits: ArrayLike) -> Array:
    """`log(1 - max_c softmax(logits)_c)`, `[N]`, nats (docs eq. 28; MSP; Hendrycks and Gimpel 2017).

    It ranks as the paper's `-max softmax`, which is -1 in float32 once a logit leads by 17: of sure
    networks all images would tie.

    Args:
      logits: `[N, C]`, or log-probabilities, with at least 2 classes.

    Raises:
      ValueError: a single class, whose probability is always one.
      TypeError: logits that are not real numbers.
    """
    values = _logits(_without_common_part(logits), least=2)
    is_best = jax.nn.one_hot(jnp.argmax(values, axis=-1), values.shape[-1], dtype=bool)
    margin = values - jnp.max(values, axis=-1, keepdims=True)
    # A class that is ruled out (-inf) leaves a number: only an overflow is no answer.
    margin = jnp.maximum(margin, float(jnp.finfo(margin.dtype).min))
    # The logarithm of the odds against the best class.
    odds = jax.nn.logsumexp(jnp.where(is_best, -jnp.inf, margin), axis=-1)
    has_overflowed = ~jnp.isfinite(jnp.max(values, axis=-1)) & ~jnp.isnan(values).any(axis=-1)
    return jnp.where(has_overflowed, jnp.inf, -jax.nn.softplus(-odds))


def _without_common_part(logits: ArrayLike) -> ArrayLike:
    """Logits less the largest of their row, where they have more digits than float32 would keep."""
    dtype = _dtype(logits)
    is_integer = jnp.issubdtype(dtype, jnp.integer) and dtype.itemsize >= 4
    is_long = dtype == np.float64 and not isinstance(logits, Array)
    if is_traced(logits) or not (is_integer or is_long) or 0 in (np.shape(logits) or (0,)):
        return logits
    values = np.asarray(logits)
    largest = np.max(values, axis=-1, keepdims=True)
    if is_integer:
        # Differences of integers of any sign lie within the unsigned ones, which wrap to them.
        return -(largest.astype(np.uint64) - values.astype(np.uint64)).astype(np.float64)
    return values - np.where(np.isfinite(largest), largest, 0)


def max_logit_score(logits: ArrayLike) -> Array:
    """`-max_c logits_c`, `[N]` (docs eq. 28; Hendrycks et al. 2022).

    Args:
      logits: `[N, C]`.

    Raises:
      ValueError: no classes.
      TypeError: logits that are not real numbers.
    """
    return _never_certain(-jnp.max(_logits(logits), axis=-1))


def energy_score(logits: ArrayLike) -> Array:
    """`-log sum_c exp(logits_c)`, `[N]` (docs eq. 28; Liu et al. 2020, temperature 1).

    Args:
      logits: `[N, C]`, as the network gives them. Of log-probabilities the sum is one for every image.

    Raises:
      ValueError: no classes; log-probabilities, unless the call is being compiled.
      TypeError: logits that are not real numbers.
    """
    values = _logits(logits)
    score = -jax.nn.logsumexp(values, axis=-1)
    _refuse_log_probabilities(logits, score, values.shape[-1])
    return _never_certain(score)


def _refuse_log_probabilities(logits: ArrayLike, energy: Array, num_classes: int) -> None:
    """Raises if the energies of several images are all zero, unless they are being compiled."""
    if is_traced(energy) or energy.size < 2:
        return
    # A mean of C rounding errors of the type that was given.
    given = _dtype(logits)
    is_float = jnp.issubdtype(given, jnp.floating)
    eps = max(float(jnp.finfo(x).eps) for x in (given if is_float else energy.dtype, energy.dtype))
    if bool(jnp.all(jnp.abs(energy) <= 4 * eps * (1 + math.log(num_classes)))):
        raise ValueError(
            "logits must be as the network gives them, got log-probabilities, whose energy is zero "
            "for every image: give the logits before log_softmax"
        )


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

    The covariance is shrunk where images are few, and measures what leaves their span, as that of
    `fit_mahalanobis`.

    Args:
      features: `[M, F]`, in distribution.
      labels: `[M]` integers.

    Returns:
      A score, features `[N, F]` to `[N]`.

    Raises:
      ValueError: as `fit_mahalanobis`; labels that are not one integer for each image; no class with
        two different images.

    Warns:
      FewImagesWarning: fewer images, less one for each class, than features.
    """
    values = _checked("features", features)
    means, index = _class_means(values, labels)
    covariance = _covariance(values - means[index], values, index)
    return _gaussians(means, covariance.whitening()[None])


class RelativeMahalanobis(NamedTuple):
    """Distance to the nearest class less that to all images; see `fit_relative_mahalanobis`."""

    classes: Gaussians
    background: Gaussians

    def __call__(self, features: ArrayLike) -> Array:
        """Differences of squared distances, `[N]`."""
        values = _queries(features, len(self.classes.center))
        return _or_infinite(self.classes(values) - self.background(values), values)


def fit_relative_mahalanobis(features: ArrayLike, labels: ArrayLike) -> RelativeMahalanobis:
    """Relative Mahalanobis distance, RMD (docs eq. 28; Ren et al. 2021).

    Where images are few, both covariances are shrunk by one share, that of `fit_class_mahalanobis`.
    What leaves the span of the images has twice the variance in the background, so that it is strange
    here too, and does not cancel.

    Args:
      features: `[M, F]`, in distribution.
      labels: `[M]` integers.

    Returns:
      A score, features `[N, F]` to `[N]`.

    Raises:
      ValueError: as `fit_class_mahalanobis`.
    """
    values = _checked("features", features)
    means, index = _class_means(values, labels)
    covariance = _covariance(values - means[index], values, index)
    mean = values.mean(axis=0)
    scaled = (values - mean) / covariance.units
    background = covariance.whitening(background=scaled.T @ scaled / len(scaled))
    return RelativeMahalanobis(
        _gaussians(means, covariance.whitening()[None]), _gaussians(mean[None], background[None])
    )


class VirtualLogit(NamedTuple):
    """ViM: the scaled residual as a logit against the others; see `fit_vim`.

    Attributes:
      residual: of features that the logits are linear in.
      scale: `[]`, `alpha`.
    """

    residual: Residual
    scale: Array

    def __call__(self, features: ArrayLike, logits: ArrayLike) -> Array:
        """`alpha |residual| - log sum_c exp(logits_c)`, `[N]`, which ranks as the paper's softmax.

        Infinite where logits without NaN overflow. Log-probabilities are refused as by `energy_score`.
        """
        length, values = self.residual(features), _logits(logits)
        if values.shape[:-1] != length.shape:
            raise ValueError(
                f"logits must be [{len(length)}, C], one row for each image, got shape {values.shape}"
            )
        energy = -jax.nn.logsumexp(values, axis=-1)
        _refuse_log_probabilities(logits, energy, values.shape[-1])
        has_number = ~jnp.isnan(length) & ~jnp.isnan(values).any(axis=-1)
        score = self.scale * length + energy
        return _never_certain(jnp.where(jnp.isnan(score) & has_number, jnp.inf, score))


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

    Raises:
      ValueError: shapes that do not belong together, values that are not finite.
    """
    matrix = real_matrix("weights", weights, least=1, of="feature", axes="[F, C]")
    offset = np.asarray(bias, np.float64)
    if offset.shape != matrix.shape[1:] or not np.isfinite(offset).all():
        raise ValueError(
            f"bias must be finite [{matrix.shape[1]}], one number for each class of weights "
            f"{matrix.shape}, got shape {offset.shape}"
        )
    return -np.linalg.pinv(matrix.T, rcond=1e-5) @ offset


def fit_vim(
    features: ArrayLike, logits: ArrayLike, *, origin: ArrayLike, num_components: int
) -> VirtualLogit:
    """Virtual-logit matching, ViM (docs eq. 28; Wang et al. 2022).

    `alpha` brings residuals to the size of the largest logits. Of fewer than three images for each
    feature, the residuals that it takes are those of images left out of the subspace, five folds in
    turn: a subspace leaves too little of the images that it was fitted to.

    Args:
      features: `[M, F]`, in distribution.
      logits: `[M, C]` of them, linear in the features: not probabilities, nor their logarithms.
      origin: `[F]`, of `vim_origin`.
      num_components: how many directions the principal subspace has.

    Returns:
      A score, features `[N, F]` and logits `[N, C]` to `[N]`.

    Raises:
      ValueError: as `fit_residual`; features that the subspace explains wholly; logits that are not
        `[M, C]` and finite, that are probabilities, or whose largest are not positive on average,
        which would turn the score upside down.

    Warns:
      FewImagesWarning: fewer images than features.
    """
    values, num_components, point = _checked_residual(features, num_components, origin)
    scores = real_matrix("logits", logits, least=1, of="image", axes="[N, C]")
    if len(scores) != len(values):
        raise ValueError(
            f"logits must be [{len(values)}, C], one row for each image, got shape {scores.shape}"
        )
    largest = float(scores.max(axis=-1).mean())
    if not largest > 0:
        raise ValueError(
            f"the largest logit of an image must be positive on average, got {largest:.4g}, which would "
            "turn the score upside down: give logits and not log-probabilities; of logits as they are, "
            "subtract from weights and bias their means over the classes, and take origin and logits "
            "from those"
        )
    is_probability = (scores.min() >= 0) and np.allclose(scores.sum(axis=-1), 1, rtol=0, atol=1e-2)
    if is_probability and scores.shape[1] > 1:
        raise ValueError(
            "logits must be linear in the features, got probabilities, each row of which sums to one: "
            "give the logits before softmax"
        )
    residual = fit_residual(values, num_components=num_components, origin=point)
    length = _lengths(residual, values)
    if _num_different(values) < _FEW_IMAGES * values.shape[1]:
        fold = np.arange(len(values)) % _NUM_FOLDS
        length = np.concatenate(
            [
                _lengths(_residual(values[fold != i], num_components, point), values[fold == i])
                for i in range(min(_NUM_FOLDS, len(values)))
            ]
        )
    mean = float(length.mean())
    size = float(np.linalg.norm(values - np.asarray(residual.origin, np.float64), axis=1).mean())
    if not mean > _ROUNDING * size:
        raise DegenerateFeaturesError(
            "the principal subspace explains every feature: lower num_components"
        )
    return VirtualLogit(residual, jnp.asarray(largest / mean, jnp.float32))


def _lengths(residual: Residual, features: np.ndarray) -> np.ndarray:
    return np.asarray(_compiled_call(residual, np.asarray(features, np.float32)), np.float64)


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
      ValueError: scores that are not one axis, or are NaN or -inf, a rate out of range, or too few
        scores for it: it needs `n >= 1/rate - 1`; so many infinite scores that the threshold would be
        infinite, above which there is nothing.
    """
    scores = np.asarray(calibration_scores, np.float64)
    if scores.ndim != 1:
        raise ValueError(f"calibration_scores must be [n] without NaN, got shape {scores.shape}")
    num_bad = int(np.sum(np.isnan(scores) | np.isneginf(scores)))
    if num_bad:
        raise ValueError(
            f"calibration_scores must be [n] without NaN or -inf: {num_bad} of {len(scores)} are. Look "
            "for a diverged network or features that overflow"
        )
    false_alarm_rate = checked_share("false_alarm_rate", false_alarm_rate)
    # Rounded, because (99 + 1)(1 - 0.07) is 93.00000000000001 in float64.
    rank = math.ceil(round((len(scores) + 1) * (1 - false_alarm_rate), 9))
    if rank > len(scores):
        needed = math.ceil(round(1 / false_alarm_rate, 9)) - 1
        raise ValueError(
            f"a false-alarm rate of {false_alarm_rate} needs at least {needed} calibration scores, "
            f"got {len(scores)}"
        )
    threshold = float(np.sort(scores)[rank - 1])
    if math.isinf(threshold):
        raise ValueError(
            f"{np.sum(np.isinf(scores))} of {len(scores)} calibration scores are infinite, and the "
            f"threshold for a false-alarm rate of {false_alarm_rate} with them: nothing would be called "
            "outside. Look for features that overflow"
        )
    return threshold


def exceeds(scores: ArrayLike, threshold: float) -> np.ndarray:
    """Which scores are alarms: those above the threshold, and those that are no finite number.

    A score of NaN or -inf comes of a diverged network or of numbers that overflowed. Nothing says that
    its image is as usual.

    Args:
      scores: `[...]`.
      threshold: of `conformal_threshold`.

    Returns:
      bool `[...]`.
    """
    values = np.asarray(scores)
    return ~(np.isfinite(values) & (values <= threshold))
