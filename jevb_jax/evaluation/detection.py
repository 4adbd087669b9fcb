"""Detection: scores of inside and outside images, and how well the scores separate them."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np
from jax import Array

from jevb_jax import arguments, methods
from jevb_jax.evaluation import csi
from jevb_jax.evaluation.detection_metrics import (
    OODMetrics,
    bootstrap_intervals_of_scores,
    ood_metrics,
)
from jevb_jax.evaluation.features import (
    FeatureExtractor,
    Features,
    TermsSettings,
)
from jevb_jax.images import batches, corruptions, views
from jevb_jax.images.levels import dtype_of
from jevb_jax.images.source import ArraySource, ImageSource, Subset, is_of_features
from jevb_jax.methods import METHODS
from jevb_jax.networks.joint import JointEmbeddingModel, ViewOutputs
from jevb_jax.paper.objective import View
from jevb_jax.paper.scores import UncertaintyTerms, uncertainty_terms
from jevb_jax.settings.sections import OodSection

if TYPE_CHECKING:  # these import Optax and ml_collections, which a loaded model does not need
    from jevb_jax.evaluation.linear_probe import LinearProbe
    from jevb_jax.training.experiment import Experiment

from jevb_jax.evaluation.outside_sets import (
    CORRUPTED,
    OutsideSet,
    corrupted_sets,
    load_outside_set,
    other_classes,
)
from jevb_jax.evaluation.score_table import TrainingData, default_score, scores_of_run
from jevb_jax.evaluation.scoring import Scorers, make_scorers, score_features, score_images


class SetResult(NamedTuple):
    """Metrics of one score against one outside set.

    Attributes:
      score: name of the score.
      outside: name of the outside set.
      group: group of the outside set.
      metrics: point estimates.
      low: lower ends of the intervals by `bootstrap_intervals`, or None without intervals.
      high: upper ends of the intervals, or None.
      protocol: sentence that says how the metrics were measured.
    """

    score: str
    outside: str
    group: str
    metrics: OODMetrics
    low: OODMetrics | None
    high: OODMetrics | None
    protocol: str


def compare(
    inside: dict[str, np.ndarray],
    outside: dict[str, np.ndarray],
    outside_set: OutsideSet,
    *,
    inside_name: str,
    num_bootstrap: int,
) -> list[SetResult]:
    """Metrics of every score against one outside set.

    Args:
      inside: scores of in-distribution images, by the name of the score.
      outside: scores of the images of the set, by the name of the score.
      outside_set: the set.
      inside_name: name of the in-distribution images in the protocol.
      num_bootstrap: resamples for the intervals; 0 gives no intervals.

    Returns:
      One result for each score.
    """
    intervals: Sequence[tuple[OODMetrics | None, OODMetrics | None]] = [(None, None)] * len(inside)
    protocol = (
        f"outside: {outside_set.protocol} ({len(outside_set.source):,}); "
        "larger score = more out of distribution"
    )
    if num_bootstrap:
        intervals = bootstrap_intervals_of_scores(
            list(inside.values()),
            [outside[name] for name in inside],
            num_resamples=num_bootstrap,
            level=0.95,
            seed=0,
        )
        protocol += (
            f"; 95% intervals over images, {num_bootstrap} resamples for the areas of precision and "
            "recall"
        )
    return [
        SetResult(
            name,
            outside_set.name,
            outside_set.group,
            ood_metrics(scores, outside[name]),
            low,
            high,
            f"inside: {inside_name} ({len(scores):,}); {protocol}",
        )
        for (name, scores), (low, high) in zip(inside.items(), intervals, strict=True)
    ]


def group_means(results: Sequence[SetResult]) -> dict[str, dict[str, float]]:
    """Mean AUROC over the sets of each group, as OpenOOD averages near and far sets.

    Returns:
      AUROC by score and group; groups keep the order in which they first appear.
    """
    values: dict[str, dict[str, list[float]]] = {}
    for result in results:
        groups = values.setdefault(result.score, {})
        groups.setdefault(result.group, []).append(result.metrics.auroc)
    return {
        score: {group: float(np.mean(aurocs)) for group, aurocs in groups.items()}
        for score, groups in values.items()
    }


class OODEvaluation(NamedTuple):
    """What `evaluate_ood` found.

    Attributes:
      results: one for each score and set.
      inside: scores of the evaluated in-distribution images, by score.
      outside: scores of the outside images, by set and score.
      default_score: the score that was chosen before any result was known.
      chosen_score: the score that is best for validation images against the sets of `ood.choice`,
        or None.
      choice_protocol: sentence that says how `chosen_score` was chosen.
      with_labels: names of the scores that were fitted with labels.
      left_out: why a score is missing, by its name.
      cropped: scores of the center crops of the first inside images, by score.
      scorers: the fitted scores.
    """

    results: list[SetResult]
    inside: dict[str, np.ndarray]
    outside: dict[str, dict[str, np.ndarray]]
    default_score: str
    chosen_score: str | None
    choice_protocol: str
    with_labels: frozenset[str]
    left_out: dict[str, str]
    cropped: dict[str, np.ndarray]
    scorers: Scorers | None = None


def terms_settings(experiment: "Experiment") -> TermsSettings | None:
    """How the terms of the run's method are computed; None for a method without such terms."""
    if METHODS[experiment.settings.method].head != "posterior":
        return None
    return jevb_terms_settings(
        experiment.model,
        experiment.jevb_settings,
        experiment.settings.ood,
        augmentation=experiment.view_augmentations[0],
    )


def view_settings(experiment: "Experiment") -> dict[str, Any]:
    """What a pass over augmented views computes, keywords of `FeatureExtractor`; often empty."""
    section, augmentation = experiment.settings.ood, experiment.view_augmentations[0]
    asked = {
        "terms": terms_settings(experiment),
        "rotated": csi.rotated_views(section, augmentation),
    }
    return {name: one for name, one in asked.items() if one is not None}


def jevb_terms_settings(
    model: JointEmbeddingModel,
    settings: methods.JevbSettings,
    section: OodSection,
    *,
    augmentation: views.View,
) -> TermsSettings:
    """How JEVB's terms are computed.

    Args:
      model: networks.
      settings: the objective. The terms use neither the weight of the KL nor its warm-up.
      section: numbers of views and samples.
      augmentation: makes all views but the first, which is the un-augmented image.
    """

    def terms_of(variables: Any, key: Array, views: ViewOutputs) -> UncertaintyTerms:
        radial_scale: Any = model.apply(variables, method=model.radial_scale)
        return uncertainty_terms(
            key,
            View(views.embedding, views.posterior_mean, views.posterior_scale),
            settings.likelihood_at(radial_scale),
            num_samples=section.num_samples,
            prior_scale=settings.prior_scale,
            untied_scale=settings.untied_scale(views),
            location=settings.location,
        )

    return TermsSettings(terms_of=terms_of, augmentation=augmentation, num_views=section.num_views)


def fit_rows(num_images: int, most: int) -> np.ndarray:
    """Rows of the training images that scores are fitted to; always the same rows.

    Args:
      num_images: number of images in the training split.
      most: largest number of rows; 0 for all.

    Returns:
      `[M]` row numbers, rising.

    Raises:
      ValueError: `most` is below zero.
      TypeError: `most` is not an integer.
    """
    most = arguments.whole_number("ood.max_fit_images", most, at_least=0)
    if not 0 < most < num_images:
        return np.arange(num_images)
    return np.sort(np.random.default_rng(0).permutation(num_images)[:most])


def features_to_fit(
    experiment: "Experiment", variables: Any, extract: FeatureExtractor, train: Features
) -> Features:
    """Features of the images that scores are fitted to, with what augmented views give."""
    rows = fit_rows(len(train.representation), experiment.settings.ood.max_fit_images)
    if view_settings(experiment):
        return extract(variables, Subset(experiment.dataset.train, rows))
    return jax.tree.map(lambda values: values[rows], train)


def _sets(experiment: "Experiment", inside: ImageSource, split: str) -> Iterator[OutsideSet]:
    """The outside sets of a config. Each is loaded or made only when it is needed."""
    settings = experiment.settings.ood
    left_out = other_classes(experiment.dataset, split)
    if left_out is not None:
        yield left_out
    for description in settings.outside:
        yield load_outside_set(alike=experiment.settings.data.alike, **description)
    if settings.corruptions:
        count = min(len(inside), settings.num_corrupted_images)
        images = batches.load_resident(Subset(inside, np.arange(count)))
        yield from corrupted_sets(images, settings.corruptions, settings.severities, of=split)


def _score_crops(
    extract: FeatureExtractor,
    variables: Any,
    inside: ImageSource,
    scorers: Scorers,
    *,
    num_images: int,
) -> dict[str, np.ndarray]:
    """Scores of the center crops of the first inside images, at most `num_images`."""
    if is_of_features(inside):
        return {}
    rows = np.arange(min(len(inside), num_images))
    images = batches.load_resident(Subset(inside, rows))
    crops = corruptions.center_crops(images, seed=0)
    crops = ArraySource(crops, name="center crops", dtype=dtype_of(images))
    return score_images(extract, variables, crops, scorers)


def _no_numbers(
    name: str,
    inside: dict[str, np.ndarray],
    outside: Sequence[dict[str, np.ndarray]],
    *,
    kind: str = "outside",
) -> str:
    """Why a score cannot be ranked: it is NaN for some images. Empty if it can."""
    for where, scores in (
        ("inside", inside[name]),
        *((kind, values[name]) for values in outside),
    ):
        count = int(np.isnan(scores).sum())
        if count:
            return (
                f"{count} of {len(scores)} scores of {where} images are NaN. Did the network diverge, "
                "or are features outside the domain of the score?"
            )
    return ""


def _choose(
    experiment: "Experiment", variables: Any, extract: FeatureExtractor, scorers: Scorers
) -> tuple[str | None, str]:
    """The label-free score with the best mean AUROC on `ood.choice`, and its protocol."""
    descriptions = experiment.settings.ood.choice
    if not descriptions:
        return None, ""
    validation = experiment.dataset.validation
    inside = score_images(extract, variables, validation, scorers)
    alike = experiment.settings.data.alike
    sets = [load_outside_set(alike=alike, **description) for description in descriptions]
    outside = [score_images(extract, variables, one.source, scorers) for one in sets]
    candidates = [name for name in scorers.scores if name not in scorers.with_labels]
    # A score that is NaN for some image cannot be chosen.
    candidates = [name for name in candidates if not _no_numbers(name, inside, outside)]
    if not candidates:
        return None, ""
    mean = {
        name: np.mean([ood_metrics(inside[name], scores[name]).auroc for scores in outside])
        for name in candidates
    }
    names = ", ".join(one.protocol for one in sets)
    return max(candidates, key=lambda name: mean[name]), (
        f"best mean AUROC of {len(candidates)} label-free scores on validation ({len(validation):,}) "
        f"against {names}"
    )


def evaluate_ood(
    experiment: "Experiment",
    variables: Any,
    *,
    extract: FeatureExtractor,
    train: Features,
    inside: Features,
    inside_source: ImageSource,
    probe: "LinearProbe | None",
    split: str,
    has_intervals: bool = True,
) -> OODEvaluation:
    """Measures every score against every outside set of the config.

    Args:
      experiment: data, networks and settings.
      variables: parameters and running statistics.
      extract: forward pass that computes what `view_settings` says.
      train: features of the training split.
      inside: features of the evaluated in-distribution images by `extract`.
      inside_source: the images of `inside`.
      probe: linear probe fitted on the representation, or None.
      split: name of the evaluated split.
      has_intervals: whether the metrics get intervals.

    Raises:
      ValueError: the settings or the outside sets do not fit the run.
    """
    settings = experiment.settings.ood
    fit_features = features_to_fit(experiment, variables, extract, train)
    table = scores_of_run(experiment.settings, has_labels=probe is not None)
    scorers = make_scorers(table, TrainingData(fit_features, probe))
    default = default_score(experiment.settings)
    if default not in scorers.scores and default not in scorers.left_out:
        raise ValueError(
            f"ood.default_score must be one of {sorted(scorers.scores)}, got {default!r}"
        )
    inside_scores = score_features(
        inside, scorers, batch_size=experiment.settings.evaluation.batch_size
    )
    results: list[SetResult] = []
    outside_scores: dict[str, dict[str, np.ndarray]] = {}
    not_numbers: dict[str, str] = {}
    for outside in _sets(experiment, inside_source, split):
        if outside.name in outside_scores:
            raise ValueError(f"two outside sets are called {outside.name!r}")
        scores = score_images(extract, variables, outside.source, scorers)
        outside_scores[outside.name] = scores
        for name in scores:
            reason = _no_numbers(name, inside_scores, [scores])
            if reason:
                not_numbers.setdefault(name, reason)
        # Corrupted images are compared with the images they were made from.
        count = len(outside.source) if outside.group == CORRUPTED else None
        ranked = [name for name in scores if name not in not_numbers]
        results += compare(
            {name: inside_scores[name][:count] for name in ranked},
            scores,
            outside,
            inside_name=f"{experiment.dataset.train.name}, {split}",
            num_bootstrap=settings.num_bootstrap if has_intervals else 0,
        )
    cropped = _score_crops(
        extract, variables, inside_source, scorers, num_images=settings.num_corrupted_images
    )
    for name in cropped:
        reason = _no_numbers(name, inside_scores, [cropped], kind="cropped")
        if reason:
            not_numbers.setdefault(name, reason)
    # A score that is NaN on one set is left out of all sets: its means would be over other sets.
    results = [result for result in results if result.score not in not_numbers]
    inside_scores, cropped, *numbers = (
        {name: values for name, values in scores.items() if name not in not_numbers}
        for scores in (inside_scores, cropped, *outside_scores.values())
    )
    outside_scores = dict(zip(outside_scores, numbers, strict=True))
    chosen, choice_protocol = _choose(experiment, variables, extract, scorers)
    return OODEvaluation(
        results=results,
        inside=inside_scores,
        outside=outside_scores,
        default_score=default,
        chosen_score=chosen,
        choice_protocol=choice_protocol,
        with_labels=scorers.with_labels,
        left_out=scorers.left_out | not_numbers,
        cropped=cropped,
        scorers=scorers,
    )
