"""Checks whether the uncertainty means anything, after the URL benchmark (Kirchhof et al. 2023).

They are pure functions of arrays on the host, in float64. An uncertainty is `[N]`; larger = less
certain. Any score of `score_table` can be used.
"""

import warnings
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from jevb_jax.evaluation import detection_metrics


def _real(name: str, values: ArrayLike) -> np.ndarray:
    """Values as float64. Integers stay, because large ones could become equal."""
    array = np.asarray(values)
    if np.issubdtype(array.dtype, np.integer):
        return array
    # bfloat16 and similar types are not subtypes of NumPy's floating types.
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


def _checked_pair(
    first_name: str, first: ArrayLike, second_name: str, second: ArrayLike
) -> tuple[np.ndarray, np.ndarray]:
    before, after = _checked(first_name, first), _checked(second_name, second)
    if before.shape != after.shape:
        raise ValueError(
            f"both must have one value for each image, got {len(before)} and {len(after)} values"
        )
    return before, after


def _checked_errors(uncertainty: ArrayLike, is_error: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    values, errors = _checked("uncertainty", uncertainty), np.asarray(is_error)
    if errors.shape != values.shape or errors.dtype != np.bool_:
        raise ValueError(
            f"is_error must be bool [{len(values)}], one for each image, got {errors.dtype} of shape "
            f"{errors.shape}"
        )
    return values, errors


def error_auroc(uncertainty: ArrayLike, is_error: ArrayLike) -> float:
    """Probability that a wrongly classified image is less certain than a correctly classified one.

    With the errors `~right_at_1(...)`, this is the R-AUROC of the URL benchmark (Kirchhof et al. 2023;
    docs eq. 39). With the errors of a classifier fitted on training images, it is another number.

    Args:
      uncertainty: `[N]`.
      is_error: `[N]` bool.

    Returns:
      A number in [0, 1]; ties count half.

    Raises:
      ValueError: a value is NaN, shapes differ, or the images are all right or all wrong.
    """
    values, errors = _checked_errors(uncertainty, is_error)
    if errors.all() or not errors.any():
        raise ValueError(
            f"AUROC needs right and wrong images, got {errors.sum()} wrong of {len(errors)}"
        )
    return detection_metrics.ood_metrics(values[~errors], values[errors]).auroc


def right_at_1(nearest_other: ArrayLike, labels: ArrayLike) -> np.ndarray:
    """Whether the nearest other image of the same set has the same label (docs eq. 39).

    Its mean is R@1 of the URL benchmark (Kirchhof et al. 2023; `recall_at_one` of mkirchhof/url).
    Neither training images nor a fit are used.

    Args:
      nearest_other: `[N]`, rows, from `neighbors.nearest_others`.
      labels: `[N]`, integers.

    Returns:
      `[N]` bool. An image that is alone in its class is never right.

    Raises:
      ValueError: shapes differ, or a row number is out of range or that of the image itself.
      TypeError: labels or rows are not integers.
    """
    rows, classes = np.asarray(nearest_other), np.asarray(labels)
    for name, values in (("nearest_other", rows), ("labels", classes)):
        if not np.issubdtype(values.dtype, np.integer):
            raise TypeError(f"{name} must be integers, got {values.dtype}")
    if rows.ndim != 1 or rows.shape != classes.shape:
        raise ValueError(
            f"nearest_other and labels must be [N], got shapes {rows.shape} and {classes.shape}"
        )
    if ((rows < 0) | (rows >= len(rows)) | (rows == np.arange(len(rows)))).any():
        raise ValueError(f"nearest_other must be rows of other images, below {len(rows)}")
    return classes[rows] == classes


class RiskCoverage(NamedTuple):
    """Share of errors among the most certain images.

    Attributes:
      coverage: `[N]`, `n / N`, the share of images that is kept.
      risk: `[N]`, share of errors among the `n` most certain images. For ties it is the expectation
        over their orders.
      area: mean risk over coverages (AURC; Geifman and El-Yaniv 2017). Smaller is better.
    """

    coverage: np.ndarray
    risk: np.ndarray
    area: float


def risk_coverage_curve(uncertainty: ArrayLike, is_error: ArrayLike) -> RiskCoverage:
    """Error of a classifier that may abstain on the images it is least certain about.

    Args:
      uncertainty: `[N]`.
      is_error: `[N]` bool.

    Returns:
      `RiskCoverage`; its last risk is the ordinary error rate.

    Raises:
      ValueError: a value is NaN, or shapes differ.
    """
    values, errors = _checked_errors(uncertainty, is_error)
    _, group, size = np.unique(values, return_inverse=True, return_counts=True)
    wrong = np.bincount(group, weights=errors)
    # Each image of a tie gets the share of errors in the tie; the sum of the first n is then right.
    expected = np.repeat(wrong / size, size)
    kept = np.arange(1, len(values) + 1)
    risk = np.cumsum(expected) / kept
    return RiskCoverage(kept / len(values), risk, float(risk.mean()))


def _rank_correlation(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Spearman's correlation along the first axis, with broadcasting; 0 if an input is constant."""
    from scipy import stats  # slow to import

    if len(a) < 2:
        return np.zeros(np.broadcast_shapes(a.shape, b.shape)[1:])
    ranks = stats.rankdata(a, axis=0), stats.rankdata(b, axis=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.ConstantInputWarning)
        found: Any = stats.pearsonr(*ranks, axis=0)
    return np.where(np.isnan(found.statistic), 0, found.statistic)


def severity_correlation(uncertainty: ArrayLike) -> float:
    """Whether uncertainty grows as images are degraded, by Spearman's correlation with severity.

    Args:
      uncertainty: `[S + 1, N]`, for severities 0 (the image itself) to `S >= 1`.

    Returns:
      Correlation over the severities of each image, averaged, in [-1, 1]. An image whose
      uncertainty never changes counts as 0, because it says nothing about severity.

    Raises:
      ValueError: the shape is wrong, or a value is NaN.
    """
    values = _real("uncertainty", uncertainty)
    if values.ndim != 2 or values.shape[0] < 2 or values.shape[1] < 1:
        raise ValueError(f"uncertainty must be [S + 1, N] with S >= 1, got shape {values.shape}")
    _checked("uncertainty", values.ravel())
    severity = np.arange(len(values), dtype=np.float64)
    return float(np.mean(_rank_correlation(severity[:, None], values)))


def share_increased(uncertainty: ArrayLike, degraded_uncertainty: ArrayLike) -> float:
    """Share of images that are less certain after degradation; ties count half.

    Args:
      uncertainty: `[N]`.
      degraded_uncertainty: `[N]`, of the same images after cropping or corruption.

    Returns:
      A number in [0, 1].

    Raises:
      ValueError: a value is NaN, or lengths differ.
    """
    before, after = _checked_pair(
        "uncertainty", uncertainty, "degraded_uncertainty", degraded_uncertainty
    )
    return float(np.mean((after > before) + 0.5 * (after == before)))


def cropped_has_bigger_uncertainty(uncertainty: ArrayLike, cropped_uncertainty: ArrayLike) -> float:
    """Share of images that are less certain after cropping; a tie does not count (docs eq. 39).

    It is the check of the URL benchmark, with crops from `corruptions.center_crops`.
    `share_increased` counts a tie half.

    Args:
      uncertainty: `[N]`.
      cropped_uncertainty: `[N]`, of the crops of the same images.

    Returns:
      A number in [0, 1].

    Raises:
      ValueError: a value is NaN, or lengths differ.
    """
    whole, cropped = _checked_pair(
        "uncertainty", uncertainty, "cropped_uncertainty", cropped_uncertainty
    )
    return float(np.mean(cropped > whole))


def label_entropy(counts: ArrayLike) -> np.ndarray:
    """Entropy of people's votes for each image.

    Args:
      counts: `[N, C]`, votes for each class, as counts or shares. Each image has a vote.

    Returns:
      `[N]`, nats, in [0, log C], with a relative error of 1e-15. Entropies that differ only by
      rounding are made equal, so that the same votes in another order of classes are a tie.

    Raises:
      ValueError: the shape is wrong, there are no images, a count is negative or not finite, or an
        image has no votes.
      TypeError: counts are not real numbers.
    """
    votes = _real("counts", counts).astype(np.float64)
    if (
        votes.ndim != 2
        or not len(votes)
        or not ((votes >= 0) & np.isfinite(votes)).all()
        or not (votes > 0).any(axis=1).all()
    ):
        raise ValueError(
            "counts must be [N, C], finite and not negative, with a vote for each image, got shape "
            f"{votes.shape}"
        )
    # Sum in an order that does not depend on the order of the classes, the largest last. Divide by
    # a power of two, so that the sum does not overflow.
    votes = np.sort(votes, axis=1)
    votes = np.ldexp(votes, -np.frexp(votes[:, -1:])[1])
    total = votes.sum(axis=1, keepdims=True)
    share = votes / total
    # For a share near 1, take the logarithm by the rest: the share itself lacks the digits.
    rest = votes[:, :-1].sum(axis=1, keepdims=True) / total
    log_share = np.log(np.where(share > 0, share, 1))
    is_most = rest[:, 0] < 0.5
    log_share[is_most, -1] = np.log1p(-rest[is_most, 0])
    return _rounding_joined(0 - np.sum(share * log_share, axis=1), relative=8 * votes.shape[1])


def _rounding_joined(values: np.ndarray, *, relative: float) -> np.ndarray:
    """Makes values `[N]` equal that differ by fewer roundings than `relative`."""
    unique, inverse = np.unique(values, return_inverse=True)
    is_new = np.diff(unique) > relative * np.finfo(np.float64).eps * unique[1:]
    first = np.flatnonzero(np.concatenate([[True], is_new]))
    return unique[first][np.cumsum(np.concatenate([[0], is_new])).astype(int)][inverse]


def human_disagreement_correlation(uncertainty: ArrayLike, counts: ArrayLike) -> float:
    """Spearman's correlation of uncertainty with the entropy of people's votes (CIFAR-10H).

    It is URL's `rcorr_entropy`: the entropy of the votes of each image, as shares, against the
    uncertainty, over all images. URL gives NaN where one of the two is constant.

    Args:
      uncertainty: `[N]`.
      counts: `[N, C]`, votes in the order of the images.

    Returns:
      A number in [-1, 1]; 0 if one of the two is constant.

    Raises:
      ValueError: a value is NaN, lengths differ, or for the reasons of `label_entropy`.
    """
    values, entropy = _checked("uncertainty", uncertainty), label_entropy(counts)
    if len(values) != len(entropy):
        raise ValueError(
            f"there must be votes for each image, got {len(values)} uncertainties and votes for "
            f"{len(entropy)} images"
        )
    return float(_rank_correlation(values, entropy))


class ScaleSpectrum(NamedTuple):
    """How posterior scales vary over features and over images.

    The three shares split the variance of `log scale` in the table of images and features (a
    two-way analysis of variance). They sum to one. All are 0 if the scales vary at most by
    rounding.

    Attributes:
      feature_share: share of the features: some features are always less certain.
      image_share: share of the images: some images are less certain in all features. An isotropic
        scale has only this share.
      interaction_share: the rest: which features are uncertain depends on the image.
    """

    feature_share: float
    image_share: float
    interaction_share: float


def scale_spectrum(posterior_scale: ArrayLike) -> ScaleSpectrum:
    """Splits the variance of posterior scales between features and images.

    Args:
      posterior_scale: `[N, D]`, positive.

    Raises:
      ValueError: the shape is wrong, or a value is not positive and finite.
    """
    # Scales that differ only by the rounding of their own type do not vary.
    dtype = getattr(posterior_scale, "dtype", np.float64)
    rounding = float(jnp.finfo(dtype).eps) if jnp.issubdtype(dtype, jnp.floating) else 0.0
    scale = _real("posterior_scale", posterior_scale).astype(np.float64)
    if scale.ndim != 2 or scale.size == 0 or not ((scale > 0) & np.isfinite(scale)).all():
        raise ValueError(
            f"posterior_scale must be [N, D], positive, finite, got shape {scale.shape}"
        )
    log_scale = np.log(scale)
    by_feature, by_image = log_scale.mean(axis=0), log_scale.mean(axis=1)
    total = log_scale.var()
    largest = max(1.0, float(np.max(np.abs(log_scale))))
    does_vary = total > max(rounding, 4 * np.finfo(np.float64).eps * largest) ** 2
    shares = np.array([by_feature.var(), by_image.var()]) / total if does_vary else np.zeros(2)
    rest = max(0.0, 1 - float(shares.sum())) if does_vary else 0.0
    return ScaleSpectrum(
        feature_share=float(shares[0]),
        image_share=float(shares[1]),
        interaction_share=rest,
    )
