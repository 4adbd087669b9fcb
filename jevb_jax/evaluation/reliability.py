"""Does the uncertainty mean anything? The checks of the URL benchmark (Kirchhof et al. 2023).

Pure functions of arrays on the host, in float64. An uncertainty is `[N]`, larger = less certain; any
score of `score_table` can stand in for it.
"""

import warnings
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike


def _real(name: str, values: ArrayLike) -> np.ndarray:
    """float64, or integers as they are: large ones that differ must not become equal."""
    array = np.asarray(values)
    if np.issubdtype(array.dtype, np.integer):
        return array
    # bfloat16 and the like are no subtype of NumPy's.
    if array.dtype.kind not in "fbV" or array.dtype.names is not None:
        raise TypeError(f"{name} must be real numbers, got {array.dtype}")
    return array.astype(np.float64)


def _checked(name: str, values: ArrayLike) -> np.ndarray:
    checked = _real(name, values)
    if checked.ndim != 1 or checked.size == 0:
        raise ValueError(f"{name} must be [N] with at least one image, got shape {checked.shape}")
    num_nan = int(np.isnan(checked).sum())
    if num_nan:
        raise ValueError(f"{name}: {num_nan} of {checked.size} are NaN, which have no rank")
    return checked


def _checked_errors(uncertainty: ArrayLike, is_error: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    values, errors = _checked("uncertainty", uncertainty), np.asarray(is_error)
    if errors.shape != values.shape or errors.dtype != np.bool_:
        raise ValueError(
            f"is_error must be bool [{len(values)}], one for each image, got {errors.dtype} of shape "
            f"{errors.shape}"
        )
    return values, errors


def error_auroc(uncertainty: ArrayLike, is_error: ArrayLike) -> float:
    """Probability that a wrongly classified image is less certain than a right one.

    Errors are a classifier's, fitted on training images. The R-AUROC of Kirchhof et al. (2023) is
    another number: its errors are those of the nearest neighbor within the test images.

    Args:
      uncertainty: `[N]`.
      is_error: `[N]` bool.

    Returns:
      In [0, 1]; ties count half.

    Raises:
      ValueError: NaN, shapes that differ, no errors or nothing but errors.
    """
    values, errors = _checked_errors(uncertainty, is_error)
    if errors.all() or not errors.any():
        raise ValueError(
            f"AUROC needs right and wrong images, got {errors.sum()} wrong of {len(errors)}"
        )
    # Ranks keep infinities apart from NaN, which scikit-learn refuses together.
    from scipy.stats import rankdata  # both slow to import
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(errors, rankdata(values)))


class RiskCoverage(NamedTuple):
    """Share of errors among the most certain images.

    Attributes:
      coverage: `[N]`, `n / N`, the share that is kept.
      risk: `[N]`, of errors among the `n` most certain; where certainties are equal, expected over
        their orders.
      area: mean risk over coverages (AURC; Geifman and El-Yaniv 2017). Smaller is better.
      excess: `area` less that of an order with all errors last (E-AURC), at least 0.
    """

    coverage: np.ndarray
    risk: np.ndarray
    area: float
    excess: float


def risk_coverage_curve(uncertainty: ArrayLike, is_error: ArrayLike) -> RiskCoverage:
    """Error of a classifier that may abstain on the images it is least certain of.

    Args:
      uncertainty: `[N]`.
      is_error: `[N]` bool.

    Returns:
      `RiskCoverage`; its last risk is the plain error rate.

    Raises:
      ValueError: NaN, shapes that differ.
    """
    values, errors = _checked_errors(uncertainty, is_error)
    _, group, size = np.unique(values, return_inverse=True, return_counts=True)
    wrong = np.bincount(group, weights=errors)
    # An image's expected error is its group's share: the sum of any n first is then right.
    expected = np.repeat(wrong / size, size)
    kept = np.arange(1, len(values) + 1)
    risk = np.cumsum(expected) / kept
    best = np.maximum(kept - np.sum(~errors), 0) / kept
    return RiskCoverage(
        kept / len(values), risk, float(risk.mean()), float(risk.mean() - best.mean())
    )


def _rank_correlation(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Spearman's along the first axis, of arrays that broadcast; 0 where one of the two is constant."""
    from scipy import stats  # slow to import

    if len(a) < 2:
        return np.zeros(np.broadcast_shapes(a.shape, b.shape)[1:])
    ranks = stats.rankdata(a, axis=0), stats.rankdata(b, axis=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.ConstantInputWarning)
        found: Any = stats.pearsonr(*ranks, axis=0)
    return np.where(np.isnan(found.statistic), 0, found.statistic)


class SeverityCorrelation(NamedTuple):
    """Spearman's correlation of uncertainty with severity.

    Attributes:
      mean_per_image: within each image over severities, averaged; 0 for an image whose uncertainty
        never changes, since it then says nothing of severity.
      pooled: over all images and severities together.
    """

    mean_per_image: float
    pooled: float


def severity_correlation(uncertainty: ArrayLike) -> SeverityCorrelation:
    """Whether uncertainty grows as images are degraded.

    Args:
      uncertainty: `[S + 1, N]`, of severity 0 (the image itself) to S, `S >= 1`.

    Returns:
      `SeverityCorrelation`, each in [-1, 1].

    Raises:
      ValueError: another shape, NaN.
    """
    values = _real("uncertainty", uncertainty)
    if values.ndim != 2 or values.shape[0] < 2 or values.shape[1] < 1:
        raise ValueError(f"uncertainty must be [S + 1, N] with S >= 1, got shape {values.shape}")
    _checked("uncertainty", values.ravel())
    severity = np.arange(len(values), dtype=np.float64)
    each = _rank_correlation(severity[:, None], values)
    severities = np.repeat(severity, values.shape[1])
    pooled = _rank_correlation(severities, values.ravel())
    return SeverityCorrelation(float(np.mean(each)), float(pooled))


def share_increased(uncertainty: ArrayLike, degraded_uncertainty: ArrayLike) -> float:
    """Share of images that are less certain once degraded, ties half (URL's crop check).

    Args:
      uncertainty: `[N]`.
      degraded_uncertainty: `[N]`, of the same images, cropped or corrupted.

    Returns:
      In [0, 1].

    Raises:
      ValueError: NaN, lengths that differ.
    """
    before = _checked("uncertainty", uncertainty)
    after = _checked("degraded_uncertainty", degraded_uncertainty)
    if before.shape != after.shape:
        raise ValueError(f"both must be of the same images, got {len(before)} and {len(after)}")
    return float(np.mean((after > before) + 0.5 * (after == before)))


def label_entropy(counts: ArrayLike) -> np.ndarray:
    """Entropy of people's votes for an image.

    Args:
      counts: `[N, C]`, votes for each class, at least one an image; counts or shares.

    Returns:
      `[N]`, nats, in [0, log C], relative error 1e-15 however small. Entropies that agree to their
      rounding error are equal, so that the same votes in another order of the classes are a tie.

    Raises:
      ValueError: another shape, no images, counts that are negative or not finite, an image without
        votes.
      TypeError: counts that are not real numbers.
    """
    votes = _real("counts", counts).astype(np.float64)
    if (
        votes.ndim != 2
        or not len(votes)
        or not ((votes >= 0) & np.isfinite(votes)).all()
        or not (votes > 0).any(axis=1).all()
    ):
        raise ValueError(
            "counts must be [N, C], finite, not negative, with a vote for each image, got shape "
            f"{votes.shape}"
        )
    # One order of summation whatever the order of the classes, the largest last. A power of two is
    # divided out, lest the sum overflow.
    votes = np.sort(votes, axis=1)
    votes = np.ldexp(votes, -np.frexp(votes[:, -1:])[1])
    total = votes.sum(axis=1, keepdims=True)
    share = votes / total
    # log of a share near 1 by what is left of it: 1 - 1e-15 has no digits.
    rest = votes[:, :-1].sum(axis=1, keepdims=True) / total
    log_share = np.log(np.where(share > 0, share, 1))
    is_most = rest[:, 0] < 0.5
    log_share[is_most, -1] = np.log1p(-rest[is_most, 0])
    return _rounding_joined(0 - np.sum(share * log_share, axis=1), relative=8 * votes.shape[1])


def _rounding_joined(values: np.ndarray, *, relative: float) -> np.ndarray:
    """Values at least 0 `[N]`, those equal that differ by less than so many roundings."""
    unique, inverse = np.unique(values, return_inverse=True)
    is_new = np.diff(unique) > relative * np.finfo(np.float64).eps * unique[1:]
    first = np.flatnonzero(np.concatenate([[True], is_new]))
    return unique[first][np.cumsum(np.concatenate([[0], is_new])).astype(int)][inverse]


def human_disagreement_correlation(uncertainty: ArrayLike, counts: ArrayLike) -> float:
    """Spearman's correlation of uncertainty with the entropy of people's votes (CIFAR-10H).

    Args:
      uncertainty: `[N]`.
      counts: `[N, C]`, votes in the order of the images.

    Returns:
      In [-1, 1]; 0 where one of the two is constant.

    Raises:
      ValueError: as `label_entropy`; NaN, lengths that differ.
    """
    values, entropy = _checked("uncertainty", uncertainty), label_entropy(counts)
    if len(values) != len(entropy):
        raise ValueError(f"{len(values)} uncertainties and votes for {len(entropy)} images")
    return float(_rank_correlation(values, entropy))


class ScaleSpectrum(NamedTuple):
    """How posterior scales are spread over features and over images.

    The three shares split the variance of `log scale` over the table images x features (a two-way
    analysis of variance) and sum to one; all are 0 where scales vary by the rounding of their type
    only, or not at all.

    Attributes:
      feature_scale: `[D]`, each feature's geometric mean over images, falling.
      image_scale: `[N]`, each image's geometric mean over features, falling.
      feature_share: due to features: some are always less certain.
      image_share: due to images: some are less certain in every feature. An isotropic scale has
        nothing else.
      interaction_share: the rest: which features are uncertain depends on the image.
    """

    feature_scale: np.ndarray
    image_scale: np.ndarray
    feature_share: float
    image_share: float
    interaction_share: float


def scale_spectrum(posterior_scale: ArrayLike) -> ScaleSpectrum:
    """Whether the anisotropy of the posterior is used, and by whom.

    Args:
      posterior_scale: `[N, D]`, positive.

    Returns:
      `ScaleSpectrum`.

    Raises:
      ValueError: another shape, values that are not positive and finite.
    """
    # Scales that are equal but for the rounding of their own type do not vary.
    dtype = getattr(posterior_scale, "dtype", np.float64)
    rounding = float(jnp.finfo(dtype).eps) if jnp.issubdtype(dtype, jnp.floating) else 0.0
    scale = _real("posterior_scale", posterior_scale).astype(np.float64)
    if scale.ndim != 2 or scale.size == 0 or not ((scale > 0) & np.isfinite(scale)).all():
        raise ValueError(f"posterior_scale must be [N, D], positive, finite, got {scale.shape}")
    log_scale = np.log(scale)
    by_feature, by_image = log_scale.mean(axis=0), log_scale.mean(axis=1)
    total = log_scale.var()
    largest = max(1.0, float(np.max(np.abs(log_scale))))
    does_vary = total > max(rounding, 4 * np.finfo(np.float64).eps * largest) ** 2
    shares = np.array([by_feature.var(), by_image.var()]) / total if does_vary else np.zeros(2)
    rest = max(0.0, 1 - float(shares.sum())) if does_vary else 0.0
    return ScaleSpectrum(
        feature_scale=np.exp(np.sort(by_feature)[::-1]),
        image_scale=np.exp(np.sort(by_image)[::-1]),
        feature_share=float(shares[0]),
        image_share=float(shares[1]),
        interaction_share=rest,
    )
