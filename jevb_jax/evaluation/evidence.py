"""Arrays that the page of a run draws and that `results.json` does not hold.

They are images, curves, and the embedding in the plane. They are computed here, once.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from jevb_jax.evaluation.accuracy import evaluated_split
from jevb_jax.evaluation.detection import OODEvaluation
from jevb_jax.evaluation.evaluate import Evaluation
from jevb_jax.evaluation.neighbors import nearest_neighbours
from jevb_jax.evaluation.outside_sets import CORRUPTED
from jevb_jax.evaluation.reliability import RiskCoverage
from jevb_jax.images import batches
from jevb_jax.images.levels import for_people
from jevb_jax.images.source import ImageSource, is_of_features, num_classes
from jevb_jax.methods import METHODS
from jevb_jax.networks.heads import Posterior
from jevb_jax.settings.sections import OodSection
from jevb_jax.training.experiment import Experiment

_NUM_GALLERY = 16
_NUM_QUERIES = 4
_NUM_NEIGHBORS = 8
_NUM_MAPPED = 2000
_MOST_DRAWN_SETS = 6
# Drawn beside the default score: it shows how a likelihood alone fails.
_PATHOLOGY = "jevb/negative_elbo"


class Separation(NamedTuple):
    """One score of inside images against one outside set.

    Attributes:
      outside_set: name of the set.
      inside: `[N]`, scores of the inside images that the set is compared with; larger = more out of
        distribution.
      outside: `[M]`, scores of the outside images.
      auroc: the value in the results.
      flagged: `[T]`, share of inside images at or above each threshold, rising. With `found` it is
        the ROC curve.
      found: `[T]`, share of outside images at or above each threshold.
    """

    outside_set: str
    inside: np.ndarray
    outside: np.ndarray
    auroc: float
    flagged: np.ndarray
    found: np.ndarray


class SeverityCurve(NamedTuple):
    """Uncertainty of images against the severity of a corruption.

    Attributes:
      corruption: name of the corruption.
      severity: `[S]`; 0 is the clean image.
      mean: `[S]`, over images.
      lower_quartile: `[S]`, over images.
      upper_quartile: `[S]`, over images.
    """

    corruption: str
    severity: np.ndarray
    mean: np.ndarray
    lower_quartile: np.ndarray
    upper_quartile: np.ndarray


class ScoredImages(NamedTuple):
    """Images in the order of their uncertainty.

    Attributes:
      images: uint8 `[K, h, w, c]`, c = 1 or 3.
      labels: names of the classes, or None.
      uncertainty: `[K]`.
    """

    images: np.ndarray
    labels: list[str] | None
    uncertainty: np.ndarray


class Neighbors(NamedTuple):
    """An image and its nearest training images, the nearest first.

    Attributes:
      image: uint8 `[h, w, c]`, c = 1 or 3.
      label: name of the class, or None.
      images: uint8 `[K, h, w, c]`.
      labels: names of the classes, or None.
      cosine: `[K]`, between representations.
    """

    image: np.ndarray
    label: str | None
    images: np.ndarray
    labels: list[str] | None
    cosine: np.ndarray


class EmbeddingMap(NamedTuple):
    """The embedding in the plane.

    Attributes:
      coordinates: `[N, 2]`, from `embedding_map`.
      labels: `[N]` integers that index `class_names`, or None.
      class_names: empty without labels.
      uncertainty: `[N]`, or None.
    """

    coordinates: np.ndarray
    labels: np.ndarray | None
    class_names: tuple[str, ...]
    uncertainty: np.ndarray | None


class Evidence(NamedTuple):
    """What the page of a run draws; None or empty if there is nothing to draw.

    Attributes:
      uncertainty_score: name of the score that is the uncertainty below; larger = less certain.
      separations: for each score, one element for each outside set that is drawn.
      risk_coverage: by classifier.
      severity: one curve for each corruption.
      most_uncertain: the most uncertain first.
      least_uncertain: the least uncertain first.
      neighbors: training images nearest to the first few images.
      embedding_map: the first few thousand images in the plane.
      posterior_scale: `[N, D]`, standard deviations of the images of `embedding_map`.
      prior_scale: standard deviation of the prior.
      not_drawn: sentences that name what a reader would look for and why it is not there.
    """

    uncertainty_score: str | None = None
    separations: Mapping[str, Sequence[Separation]] = MappingProxyType({})
    risk_coverage: Mapping[str, RiskCoverage] = MappingProxyType({})
    severity: Sequence[SeverityCurve] = ()
    most_uncertain: ScoredImages | None = None
    least_uncertain: ScoredImages | None = None
    neighbors: Sequence[Neighbors] = ()
    embedding_map: EmbeddingMap | None = None
    posterior_scale: np.ndarray | None = None
    prior_scale: float | None = None
    not_drawn: Sequence[str] = ()


def separation(
    outside_set: str, inside: np.ndarray, outside: np.ndarray, *, auroc: float
) -> Separation:
    """A score against an outside set, with the ROC curve.

    Args:
      outside_set: name of the set.
      inside: `[N]`, scores.
      outside: `[M]`, scores.
      auroc: the value in the results.

    Returns:
      `Separation`; images with equal scores are one point of the curve.

    Raises:
      ValueError: a score is not finite.
    """
    from sklearn.metrics import roc_curve  # slow to import

    for where, scores in (("inside", inside), ("outside", outside)):
        count = int(np.size(scores) - np.isfinite(scores).sum())
        if count:
            raise ValueError(
                f"{count} of {np.size(scores)} scores of {where} images are not finite "
                f"(outside set {outside_set!r})"
            )
    is_outside = np.repeat([0, 1], [len(inside), len(outside)])
    flagged, found, _ = roc_curve(is_outside, np.concatenate([inside, outside]))
    return Separation(outside_set, inside, outside, auroc, flagged, found)


def embedding_map(embedding: np.ndarray) -> np.ndarray:
    """The embedding in the plane: the first two principal components of the directions `h / |h|`.

    The map is linear: distances may shrink but never grow. It is deterministic: the sign of each
    component, which the decomposition leaves open, makes its largest loading positive.

    Args:
      embedding: `[N, D]`, finite, `N >= 2`, `D >= 2`. A zero vector has the direction zero.

    Returns:
      `[N, 2]`, float64.

    Raises:
      ValueError: the shape is wrong, or a value is not finite.
    """
    values = np.asarray(embedding, dtype=np.float64)
    if values.ndim != 2 or min(values.shape) < 2 or not np.isfinite(values).all():
        raise ValueError(
            "embedding must be [N, D], finite, with N >= 2 and D >= 2, got shape "
            f"{values.shape} with {np.size(values) - np.isfinite(values).sum()} values not finite"
        )
    # Scale the largest entry to one first, so that squares neither overflow nor underflow.
    largest = np.abs(values).max(axis=1, keepdims=True)
    values = values / np.where(largest == 0, 1, largest)
    radius = np.linalg.norm(values, axis=1, keepdims=True)
    directions = values / np.where(radius == 0, 1, radius)
    centered = directions - directions.mean(axis=0)
    components = np.linalg.svd(centered, full_matrices=False)[2][:2]
    largest_loading = components[np.arange(2), np.abs(components).argmax(axis=1)]
    return centered @ (components * np.where(largest_loading < 0, -1, 1)[:, None]).T


def _drawn_sets(found: OODEvaluation, severities: tuple[int, ...]) -> list[str]:
    """Outside sets to draw: other data first, then corruptions at their highest severity."""
    corrupted = {result.outside for result in found.results if result.group == CORRUPTED}
    worst = max(severities, default=0)
    names = [name for name in found.outside if name not in corrupted]
    names += [name for name in found.outside if name in corrupted and name.endswith(f"_{worst}")]
    return names[:_MOST_DRAWN_SETS]


def _not_finite(*scores: np.ndarray) -> str:
    """How many scores are infinite, in words; empty if none is. They have a rank and no place."""
    count = sum(int(np.sum(~np.isfinite(one))) for one in scores)
    return f"{count:,} of {sum(map(len, scores)):,} scores are infinite" if count else ""


def _separations(
    found: OODEvaluation, severities: tuple[int, ...]
) -> tuple[dict[str, list[Separation]], list[str]]:
    """What is drawn for each score, and sentences about what is not."""
    results = {(result.score, result.outside): result for result in found.results}
    scores = dict.fromkeys((found.default_score, found.chosen_score, _PATHOLOGY))
    drawn: dict[str, list[Separation]] = {}
    not_drawn = []
    for score in scores:
        if score is None or score not in found.inside:
            continue
        for name in _drawn_sets(found, severities):
            result, outside = results[score, name], found.outside[name][score]
            # Corrupted images are compared with the images they were made from.
            count = len(outside) if result.group == CORRUPTED else None
            inside = found.inside[score][:count]
            if reason := _not_finite(inside, outside):
                not_drawn.append(f"{score} against {name} is not drawn: {reason}.")
                continue
            one = separation(name, inside, outside, auroc=result.metrics.auroc)
            drawn.setdefault(score, []).append(one)
    return drawn, not_drawn


def _severity_curves(
    found: OODEvaluation, score: str, ood_settings: OodSection
) -> tuple[tuple[SeverityCurve, ...], list[str]]:
    """One curve for each corruption whose scores are finite, and sentences about the others."""
    severities = ood_settings.severities
    curves, not_drawn = [], []
    for corruption in ood_settings.corruptions:
        corrupted = [found.outside[f"{corruption}_{level}"][score] for level in severities]
        values = np.stack([found.inside[score][: len(corrupted[0])], *corrupted])
        if reason := _not_finite(*values):
            not_drawn.append(f"{score} by severity of {corruption} is not drawn: {reason}.")
            continue
        lower, upper = np.quantile(values, (0.25, 0.75), axis=1)
        severity = np.array([0, *severities])
        curves.append(SeverityCurve(corruption, severity, values.mean(axis=1), lower, upper))
    return tuple(curves), not_drawn


def _class_names(source: ImageSource) -> tuple[str, ...]:
    if source.labels is None:
        return ()
    return source.class_names or tuple(map(str, range(num_classes(source))))


def _labels_of(source: ImageSource, rows: np.ndarray, names: tuple[str, ...]) -> list[str] | None:
    return None if source.labels is None else [names[source.labels[row]] for row in rows]


def _neighbors(
    evaluation: Evaluation, source: ImageSource, bank: ImageSource
) -> tuple[Neighbors, ...]:
    """Nearest training images of the first few evaluated images."""
    cosine, index = nearest_neighbours(
        evaluation.train.representation,
        evaluation.test.representation[:_NUM_QUERIES],
        k=min(_NUM_NEIGHBORS, len(bank)),
    )
    names = _class_names(bank)
    labels = _labels_of(source, np.arange(len(index)), names)
    return tuple(
        Neighbors(
            for_people(source[query]),
            None if labels is None else labels[query],
            for_people(batches.gather(bank, rows)),
            _labels_of(bank, rows, names),
            np.asarray(cosine[query]),
        )
        for query, rows in enumerate(np.asarray(index))
    )


def gather_evidence(experiment: Experiment, evaluation: Evaluation) -> Evidence:
    """Computes what the page of a run draws.

    Args:
      experiment: data and settings.
      evaluation: results of the trained encoder.

    A score may be infinite, and an embedding may have one dimension: what cannot be drawn is left
    out. It must not cost the results, which are written after the page.
    """
    settings, bank = experiment.settings, experiment.dataset.train
    source = evaluated_split(settings.evaluation, experiment.dataset)[1]
    found, prediction = evaluation.ood, evaluation.test.prediction
    labels = evaluation.test.labels
    names = _class_names(bank)
    has_pictures = not is_of_features(bank)
    evidence = Evidence(neighbors=_neighbors(evaluation, source, bank) if has_pictures else ())
    uncertainty = None
    if isinstance(prediction, Posterior):
        evidence = evidence._replace(
            posterior_scale=np.asarray(prediction.posterior_scale)[:_NUM_MAPPED],
            prior_scale=settings.jevb.prior_scale,
        )
    if found is not None:
        separations, not_drawn = _separations(found, settings.ood.severities)
        evidence = evidence._replace(separations=separations)
        score = METHODS[settings.method].uncertainty_score or found.default_score
        if score in found.inside:
            uncertainty = found.inside[score]
            order = np.argsort(-uncertainty, kind="stable")
            most, least = (
                ScoredImages(
                    for_people(batches.gather(source, rows)),
                    _labels_of(source, rows, names),
                    uncertainty[rows],
                )
                if has_pictures
                else None
                for rows in (order[:_NUM_GALLERY], order[::-1][:_NUM_GALLERY])
            )
            severity, without = _severity_curves(found, score, settings.ood)
            not_drawn += without
            if reason := _not_finite(uncertainty[:_NUM_MAPPED]):
                not_drawn.append(f"The map is not shaded by {score}: {reason}.")
            evidence = evidence._replace(
                uncertainty_score=score,
                risk_coverage=evaluation.risk_coverage[score],
                severity=severity,
                most_uncertain=most,
                least_uncertain=least,
            )
        evidence = evidence._replace(not_drawn=not_drawn)
    embedding = np.asarray(evaluation.test.embedding)[:_NUM_MAPPED]
    if min(embedding.shape) < 2 or not np.isfinite(embedding).all():
        return evidence  # one image, or embeddings on a line, have no map
    shade = None if uncertainty is None else uncertainty[:_NUM_MAPPED]
    return evidence._replace(
        embedding_map=EmbeddingMap(
            embedding_map(embedding),
            None if labels is None else labels[:_NUM_MAPPED],
            names,
            shade if shade is not None and np.isfinite(shade).all() else None,
        )
    )
