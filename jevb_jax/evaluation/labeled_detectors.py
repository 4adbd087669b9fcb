"""Detectors that need labels or a classifier's logits."""

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
    checked_fit_features,
    checked_queries,
    compiled_call,
    or_infinite,
    real_matrix,
)
from jevb_jax.evaluation.gaussian_detectors import (
    NUM_FOLDS,
    Gaussians,
    Residual,
    checked_residual,
    covariance_of,
    fit_residual,
    gaussians_of,
    num_different,
    residual_of,
)
from jevb_jax.paper.scores import dtype_of, never_certain, real_numbers
from jevb_jax.paper.tracing import is_traced


def _logits(logits: ArrayLike, *, least: int = 1) -> Array:
    """`[..., C]`, floats of at least 32 bits."""
    values = real_numbers("logits", logits)
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
    dtype = dtype_of(logits)
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
    return never_certain(-jnp.max(_logits(logits), axis=-1))


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
    return never_certain(score)


def _refuse_log_probabilities(logits: ArrayLike, energy: Array, num_classes: int) -> None:
    """Raises if the energies of several images are all zero, unless they are being compiled."""
    if is_traced(energy) or energy.size < 2:
        return
    # A mean of C rounding errors of the type that was given.
    given = dtype_of(logits)
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
    values = checked_fit_features("features", features)
    means, index = _class_means(values, labels)
    covariance = covariance_of(values - means[index], values, index)
    return gaussians_of(means, covariance.whitening()[None])


class RelativeMahalanobis(NamedTuple):
    """Distance to the nearest class less that to all images; see `fit_relative_mahalanobis`."""

    classes: Gaussians
    background: Gaussians

    def __call__(self, features: ArrayLike) -> Array:
        """Differences of squared distances, `[N]`."""
        values = checked_queries(features, len(self.classes.center))
        return or_infinite(self.classes(values) - self.background(values), values)


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
    """ViM: the scaled residual as a logit against the others; see `fit_vim`.

    Attributes:
      residual: what the principal subspace leaves of the features that the logits are linear in.
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
        return never_certain(jnp.where(jnp.isnan(score) & has_number, jnp.inf, score))


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
    values, num_components, point = checked_residual(features, num_components, origin)
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
            "the principal subspace explains every feature: lower num_components"
        )
    return VirtualLogit(residual, jnp.asarray(largest / mean, jnp.float32))


def _lengths(residual: Residual, features: np.ndarray) -> np.ndarray:
    return np.asarray(compiled_call(residual, np.asarray(features, np.float32)), np.float64)
