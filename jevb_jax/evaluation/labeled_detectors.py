"""Detectors that need labels, or the logits of a classifier."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from jevb_jax.evaluation.detector_input import (
    FEW_IMAGES,
    ROUNDING,
    DegenerateFeaturesError,
    checked_alive,
    checked_fit_features,
    checked_image_labels,
    checked_queries,
    compiled_call,
    or_infinite,
    real_matrix,
)
from jevb_jax.evaluation.gaussian_detectors import (
    NUM_FOLDS,
    DirectionGaussians,
    Gaussians,
    Residual,
    checked_residual,
    covariance_of,
    directions_of,
    fit_residual,
    gaussians_of,
    num_different,
    residual_of,
)
from jevb_jax.paper.scores import dtype_of, never_certain, real_numbers
from jevb_jax.paper.tracing import is_traced


def _logits(logits: ArrayLike, *, least: int = 1) -> Array:
    """Logits `[..., C]`, at least float32."""
    values = real_numbers("logits", logits)
    if values.ndim < 1 or values.shape[-1] < least:
        raise ValueError(
            f"logits must be [N, C] with at least {least} class{'es' * (least > 1)}, got shape "
            f"{values.shape}"
        )
    return values


def max_softmax_score(logits: ArrayLike) -> Array:
    """Score `log(1 - max_c softmax(logits)_c)`, `[N]`, nats (docs eq. 28).

    This is the maximum softmax probability, MSP (Hendrycks and Gimpel 2017). The score ranks images
    as the paper's `-max softmax` does. That is -1 in float32 as soon as a logit leads by 17, so all
    images of a confident network would tie.

    Args:
      logits: `[N, C]`, or log-probabilities, with at least 2 classes.

    Raises:
      ValueError: there is only one class, whose probability is always one.
      TypeError: logits are not real numbers.
    """
    values = _logits(_without_common_part(logits), least=2)
    is_best = jax.nn.one_hot(jnp.argmax(values, axis=-1), values.shape[-1], dtype=bool)
    margin = values - jnp.max(values, axis=-1, keepdims=True)
    # A class with probability zero (-inf) must still give a finite score; only overflow may not.
    margin = jnp.maximum(margin, float(jnp.finfo(margin.dtype).min))
    # The logarithm of the odds against the best class.
    odds = jax.nn.logsumexp(jnp.where(is_best, -jnp.inf, margin), axis=-1)
    has_overflowed = ~jnp.isfinite(jnp.max(values, axis=-1)) & ~jnp.isnan(values).any(axis=-1)
    return jnp.where(has_overflowed, jnp.inf, -jax.nn.softplus(-odds))


def _without_common_part(logits: ArrayLike) -> ArrayLike:
    """Logits minus the largest of their row, for types with more digits than float32."""
    dtype = dtype_of(logits)
    is_integer = jnp.issubdtype(dtype, jnp.integer) and dtype.itemsize >= 4
    is_long = dtype == np.float64 and not isinstance(logits, Array)
    if is_traced(logits) or not (is_integer or is_long) or 0 in (np.shape(logits) or (0,)):
        return logits
    values = np.asarray(logits)
    largest = np.max(values, axis=-1, keepdims=True)
    if is_integer:
        # The difference of two integers fits into the unsigned type, whatever their signs.
        return -(largest.astype(np.uint64) - values.astype(np.uint64)).astype(np.float64)
    return values - np.where(np.isfinite(largest), largest, 0)


def max_logit_score(logits: ArrayLike) -> Array:
    """Score `-max_c logits_c`, `[N]` (docs eq. 28; Hendrycks et al. 2022), for logits `[N, C]`.

    Raises:
      ValueError: there are no classes.
      TypeError: logits are not real numbers.
    """
    return never_certain(-jnp.max(_logits(logits), axis=-1))


def energy_score(logits: ArrayLike) -> Array:
    """Score `-log sum_c exp(logits_c)`, `[N]` (docs eq. 28; Liu et al. 2020, temperature 1).

    Args:
      logits: `[N, C]`, before softmax. With log-probabilities the score is zero for every image.

    Raises:
      ValueError: there are no classes, or the values are log-probabilities. The latter is not
        checked while the call is compiled.
      TypeError: logits are not real numbers.
    """
    values = _logits(logits)
    score = -jax.nn.logsumexp(values, axis=-1)
    _refuse_log_probabilities(logits, score, values.shape[-1])
    return never_certain(score)


def _refuse_log_probabilities(logits: ArrayLike, energy: Array, num_classes: int) -> None:
    """Raises if the energies of several images are all zero. Does nothing during compilation."""
    if is_traced(energy) or energy.size < 2:
        return
    # The mean of C rounding errors, in the type of the argument.
    given = dtype_of(logits)
    is_float = jnp.issubdtype(given, jnp.floating)
    eps = max(float(jnp.finfo(x).eps) for x in (given if is_float else energy.dtype, energy.dtype))
    if bool(jnp.all(jnp.abs(energy) <= 4 * eps * (1 + math.log(num_classes)))):
        raise ValueError(
            "logits must be the outputs before log_softmax, got log-probabilities. Their energy is "
            "zero for every image"
        )


def _class_means(features: np.ndarray, labels: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Mean of each class that occurs, `[C, F]`, and class number of each image, `[M]`."""
    _, index = np.unique(checked_image_labels(labels, len(features)), return_inverse=True)
    return np.stack([features[index == c].mean(axis=0) for c in range(index.max() + 1)]), index


def fit_class_mahalanobis(features: ArrayLike, labels: ArrayLike) -> Gaussians:
    """Squared Mahalanobis distance to the nearest class mean (docs eq. 28; Lee et al. 2018).

    The classes share one covariance. As in `fit_mahalanobis`, it is shrunk if there are few images,
    and deviations outside the span of the images count as strange.

    Args:
      features: `[M, F]`, in distribution.
      labels: `[M]` integers.

    Returns:
      A score: features `[N, F]` to `[N]`.

    Raises:
      ValueError: labels are not one integer for each image, no class has two different images, or
        for the reasons of `fit_mahalanobis`.

    Warns:
      FewImagesWarning: the number of images minus the number of classes is below that of features.
    """
    values = checked_fit_features("features", features)
    means, index = _class_means(values, labels)
    covariance = covariance_of(values - means[index], values, index)
    return gaussians_of(means, covariance.whitening()[None])


def fit_class_mahalanobis_plus_plus(features: ArrayLike, labels: ArrayLike) -> DirectionGaussians:
    """Mahalanobis++: `fit_class_mahalanobis` of directions (docs eq. 38; Mueller and Hein 2025).

    Features before the classifier are scaled to length one. The distance is that to the nearest
    class mean, with one covariance for all classes. Without labels, that is with one mean for all
    images, Mahalanobis++ is `fit_ssd` with one cluster.

    Args:
      features: `[M, F]`, in distribution.
      labels: `[M]` integers.

    Returns:
      A score: features `[N, F]` to `[N]`.

    Raises:
      ValueError: for the reasons of `fit_class_mahalanobis`.

    Warns:
      FewImagesWarning: as `fit_class_mahalanobis`.
    """
    directions = directions_of(checked_fit_features("features", features))
    means, index = _class_means(directions, labels)
    covariance = covariance_of(directions - means[index], directions, index)
    return DirectionGaussians(gaussians_of(means, covariance.whitening()[None]))


class RelativeMahalanobis(NamedTuple):
    """Distance to the nearest class minus distance to all images, by `fit_relative_mahalanobis`."""

    classes: Gaussians
    background: Gaussians

    def __call__(self, features: ArrayLike) -> Array:
        """Differences of squared distances, `[N]`."""
        values = checked_queries(features, len(self.classes.center))
        return or_infinite(self.classes(values) - self.background(values), values)


def fit_relative_mahalanobis(features: ArrayLike, labels: ArrayLike) -> RelativeMahalanobis:
    """Relative Mahalanobis distance, RMD (docs eq. 28; Ren et al. 2021).

    If there are few images, both covariances are shrunk by the same weight, the one of
    `fit_class_mahalanobis`. Outside the span of the images the background has twice the variance of
    the classes. Otherwise the two distances would cancel there, and the deviation would not count.

    Args:
      features: `[M, F]`, in distribution.
      labels: `[M]` integers.

    Returns:
      A score: features `[N, F]` to `[N]`.

    Raises:
      ValueError: for the reasons of `fit_class_mahalanobis`.
    """
    values = checked_fit_features("features", features)
    means, index = _class_means(values, labels)
    covariance = covariance_of(values - means[index], values, index)
    mean = values.mean(axis=0)
    scaled = (values - mean) / covariance.units
    background = covariance.whitening(background=scaled.T @ scaled / len(scaled))
    return RelativeMahalanobis(
        gaussians_of(means, covariance.whitening()[None]),
        gaussians_of(mean[None], background[None]),
    )


class VirtualLogit(NamedTuple):
    """ViM: the scaled residual as one more logit; fitted by `fit_vim`.

    Attributes:
      residual: residual of the features outside the principal subspace.
      scale: `[]`, the paper's `alpha`.
    """

    residual: Residual
    scale: Array

    def __call__(self, features: ArrayLike, logits: ArrayLike) -> Array:
        """`alpha |residual| - log sum_c exp(logits_c)`, `[N]`, which ranks as the paper's softmax.

        A score is infinite if logits without NaN overflow. Log-probabilities raise a ValueError, as
        in `energy_score`.
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
        return never_certain(jnp.where(jnp.isnan(score) & has_number, jnp.inf, score))


def vim_origin(weights: ArrayLike, bias: ArrayLike) -> np.ndarray:
    """Origin `-pinv(W^T) b`, where all logits are zero (Wang et al. 2022, section 4.1).

    Softmax ignores a number added to all logits, so the weights of a fitted probe sum to zero over
    the classes, except for rounding. The pseudo-inverse leaves this direction out. A singular value
    of 1e-7 would otherwise make the origin a multiple of rounding errors.

    Args:
      weights: `W`, `[F, C]` float32.
      bias: `b`, `[C]`.

    Returns:
      `[F]` float64.

    Raises:
      ValueError: the shapes do not fit each other, or values are not finite.
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

    `alpha` scales the mean residual to the mean of the largest logits. A subspace leaves too small
    residuals of the images that it was fitted to. With fewer than three images for each feature,
    `alpha` is therefore computed from images left out of the subspace, in five folds.

    Args:
      features: `[M, F]`, in distribution.
      logits: `[M, C]`, linear in the features. Probabilities and their logarithms are not.
      origin: `[F]`, from `vim_origin`.
      num_components: dimension of the principal subspace.

    Returns:
      A score: features `[N, F]` and logits `[N, C]` to `[N]`.

    Raises:
      ValueError: the subspace explains all features; logits are not finite `[M, C]`, or are
        probabilities; the largest logits are not positive on average, which would invert the score;
        or for the reasons of `fit_residual`.

    Warns:
      FewImagesWarning: there are fewer images than features.
    """
    values, num_components, point = checked_residual(features, num_components, origin)
    scores = real_matrix("logits", logits, least=1, of="image", axes="[N, C]")
    if len(scores) != len(values):
        raise ValueError(
            f"logits must be [{len(values)}, C], one row for each image, got shape {scores.shape}"
        )
    # Features that do not vary have logits of zero; the advice below is not for them.
    checked_alive(values.std(axis=0), values)
    largest = float(scores.max(axis=-1).mean())
    if not largest > 0:
        raise ValueError(
            f"the largest logit of an image must be positive on average, got {largest:.4g}, which "
            "would invert the score. Did you give log-probabilities? If they are logits, subtract "
            "from weights and bias their means over the classes, and compute origin and logits from "
            "the result"
        )
    is_probability = (scores.min() >= 0) and np.allclose(scores.sum(axis=-1), 1, rtol=0, atol=1e-2)
    if is_probability and scores.shape[1] > 1:
        raise ValueError(
            "logits must be linear in the features, got probabilities (each row sums to one). Give "
            "the logits before softmax"
        )
    residual = fit_residual(values, num_components=num_components, origin=point)
    length = _lengths(residual, values)
    if num_different(values) < FEW_IMAGES * values.shape[1]:
        fold = np.arange(len(values)) % NUM_FOLDS
        length = np.concatenate(
            [
                _lengths(residual_of(values[fold != i], num_components, point), values[fold == i])
                for i in range(min(NUM_FOLDS, len(values)))
            ]
        )
    mean = float(length.mean())
    size = float(np.linalg.norm(values - np.asarray(residual.origin, np.float64), axis=1).mean())
    if not mean > ROUNDING * size:
        raise DegenerateFeaturesError(
            "the principal subspace explains every feature; lower num_components"
        )
    return VirtualLogit(residual, jnp.asarray(largest / mean, jnp.float32))


def _lengths(residual: Residual, features: np.ndarray) -> np.ndarray:
    return np.asarray(compiled_call(residual, np.asarray(features, np.float32)), np.float64)
