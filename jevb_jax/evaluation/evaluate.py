"""The evaluation of a run: accuracies, detection, and checks of the uncertainty."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from jevb_jax.evaluation import (
    detection,
    fitted_scores,
    human_votes,
    outside_sets,
    reliability,
    shifted,
)
from jevb_jax.evaluation.accuracy import (
    FEATURE_NAMES,
    Result,
    evaluated_split,
    knn_accuracies_by_name,
    knn_results,
    left_out,
    linear_results,
    r_at_1_results,
    result_of,
    right_at_1,
    why_no_knn,
    wrong_predictions,
)
from jevb_jax.evaluation.detection import OODEvaluation
from jevb_jax.evaluation.detector_input import each_warning_once
from jevb_jax.evaluation.features import FeatureExtractor, Features
from jevb_jax.evaluation.fitted_scores import FittedScores
from jevb_jax.evaluation.linear_probe import LinearProbe
from jevb_jax.evaluation.reliability import RiskCoverage
from jevb_jax.images import corruptions
from jevb_jax.images.dataset import Dataset
from jevb_jax.networks.heads import Posterior
from jevb_jax.settings.sections import EvaluationSection, OodSection
from jevb_jax.training.experiment import Experiment


class Extractors(NamedTuple):
    """Compiled forward passes of an experiment. Make them once for all its encoders.

    Attributes:
      plain: reads the un-augmented image only.
      with_terms: also reads augmented views, of `detection.view_settings`. It is `plain` if there
        are none, and if nothing is to be detected.
    """

    plain: FeatureExtractor
    with_terms: FeatureExtractor


def make_extractors(
    experiment: Experiment,
    *,
    mesh: Mesh | None = None,
    check_stop: Callable[[], None] = lambda: None,
) -> Extractors:
    """The forward passes that the evaluation of an experiment needs."""
    make = functools.partial(_extractor, experiment, mesh=mesh, check_stop=check_stop)
    plain = make()
    is_detecting = outside_sets.is_asked(experiment.settings)
    views = detection.view_settings(experiment) if is_detecting else {}
    return Extractors(plain, make(**views) if views else plain)


def _extractor(experiment: Experiment, **keywords: Any) -> FeatureExtractor:
    return FeatureExtractor(
        experiment.model,
        view=experiment.view_augmentations[0],
        batch_size=experiment.settings.evaluation.batch_size,
        **keywords,
    )


class Evaluation(NamedTuple):
    """What was measured of one encoder.

    Attributes:
      results: each has a name, features (or a score), a value and a protocol.
      train: features of the training split.
      test: features of the evaluated split; with JEVB's terms if anything is to be detected.
      probe: linear probe fitted on the representation; None for unlabeled data.
      ood: out-of-distribution detection, or None if nothing is to be detected.
      risk_coverage: curves by score and classifier; empty if nothing is to be detected.
      fitted: the label-free scores to save; None if they are not to be saved.
    """

    results: list[Result]
    train: Features
    test: Features
    probe: LinearProbe | None
    ood: OODEvaluation | None
    risk_coverage: dict[str, dict[str, RiskCoverage]]
    fitted: FittedScores | None = None


def evaluate_variables(
    experiment: Experiment, variables: Any, extractors: Extractors, *, has_intervals: bool = True
) -> Evaluation:
    """Measures k-NN, linear probes, out-of-distribution detection and the use of uncertainty.

    Args:
      experiment: data, networks and settings.
      variables: parameters and running statistics.
      extractors: forward passes from `make_extractors`.
      has_intervals: whether the metrics of detection get intervals.

    Raises:
      ValueError: the data lack the evaluated split, or the settings do not fit the data.
    """
    settings = experiment.settings.evaluation
    split, source = evaluated_split(settings, experiment.dataset)
    without = left_out(settings, experiment.dataset)
    extract, extract_terms = extractors
    train = extract(variables, experiment.dataset.train)
    validation = extract(variables, experiment.dataset.validation)
    is_same = split == "validation" and extract_terms is extract
    test = validation if is_same else extract_terms(variables, source)
    results: list[Result] = []
    probes, is_right = {}, {}
    for name in FEATURE_NAMES:
        results += knn_results(name, settings, train, test, without)
        is_right[name] = right_at_1(name, test)
        results += r_at_1_results(name, is_right[name], split)
        probes[name], linear = linear_results(name, settings, train, validation, test, without)
        results += linear
    probe = probes["representation"]
    found, curves = None, {}
    results += shifted.shifted_results(
        experiment.settings,
        extract,
        variables,
        train=train,
        class_names=experiment.dataset.train.class_names,
        probe=probe,
        without=without,
    )
    if outside_sets.is_asked(experiment.settings):
        found = detection.evaluate_ood(
            experiment,
            variables,
            extract=extract_terms,
            train=train,
            inside=test,
            inside_source=source,
            probe=probe,
            split=split,
            has_intervals=has_intervals,
        )
        results += _detection_results(found)
        errors = wrong_predictions(settings, train, test, probe)
        curves = {
            score: {
                classifier: reliability.risk_coverage_curve(values, is_error)
                for classifier, is_error in errors.items()
            }
            for score, values in found.inside.items()
        }
        results += _uncertainty_results(experiment, found, errors, curves, test, split)
        results += _url_results(found, is_right["representation"], split)
    return Evaluation(results, train, test, probe, found, curves)


def evaluate_transfer(
    settings: EvaluationSection, extract: FeatureExtractor, variables: Any, dataset: Dataset
) -> dict[str, Any]:
    """Measures k-NN and linear probes of an encoder on data that it was not trained on.

    Args:
      settings: what to measure.
      extract: forward pass of the encoder.
      variables: parameters and running statistics.
      dataset: labeled images.

    Returns:
      JSON values like those of `evaluate`, with "split", "left_out" and "trained" only.

    Raises:
      ValueError: the data have no labels, one class only, or not the evaluated split; or no
        measure of the settings is possible.
    """
    if dataset.train.labels is None:
        raise ValueError(f"{dataset.train.name} has no labels, so nothing can be evaluated on it")
    split, source = evaluated_split(settings, dataset)
    without = left_out(settings, dataset)
    if {"knn_accuracy", "linear_accuracy"} <= without.keys():
        raise ValueError(
            f"nothing can be evaluated on {dataset.train.name}: {without['knn_accuracy']}"
        )
    train = extract(variables, dataset.train)
    validation = extract(variables, dataset.validation)
    test = validation if split == "validation" else extract(variables, source)
    results: list[Result] = []
    for name in FEATURE_NAMES:
        results += knn_results(name, settings, train, test, without)
        results += r_at_1_results(name, right_at_1(name, test), split)
        results += linear_results(name, settings, train, validation, test, without)[1]
    for result in results:
        result["protocol"] = f"on {dataset.train.name}, other data: {result['protocol']}"
    return {"split": split, "left_out": without, "trained": results}


def _detection_results(found: OODEvaluation) -> list[Result]:
    """AUROC of every score, averaged over the sets of a group."""
    sets: dict[str, list[str]] = {}
    for result in found.results:
        if result.score == found.results[0].score:
            sets.setdefault(result.group, []).append(result.outside)
    return [
        result_of(
            f"auroc_{group}",
            score,
            value,
            f"mean AUROC over {_some(sets[group])}; see results.csv for each",
        )
        for score, groups in detection.group_means(found.results).items()
        for group, value in groups.items()
    ]


def _some(names: Sequence[str]) -> str:
    if len(names) <= 5:
        return ", ".join(names)
    return f"{len(names)} sets, {names[0]} to {names[-1]}"


def _uncertainty_results(
    experiment: Experiment,
    found: OODEvaluation,
    errors: dict[str, np.ndarray],
    curves: dict[str, dict[str, RiskCoverage]],
    test: Features,
    split: str,
) -> list[Result]:
    """Checks each score against errors, severity and human disagreement (docs/ood.md)."""
    results = []
    for name, scores in found.inside.items():
        for classifier, is_error in errors.items():
            if not 0 < is_error.sum() < len(is_error):
                continue  # without both errors and right answers neither number is defined
            protocol = (
                f"errors of {classifier} on {split} ({len(is_error):,}, {is_error.sum():,} errors) "
                f"against the score; larger score = less certain"
            )
            results += [
                result_of(
                    f"error_auroc_{classifier}",
                    name,
                    reliability.error_auroc(scores, is_error),
                    f"AUROC of {protocol}",
                ),
                result_of(
                    f"area_under_risk_coverage_{classifier}",
                    name,
                    curves[name][classifier].area,
                    f"mean risk over coverages, smaller is better, of {protocol}",
                ),
            ]
        results += _severity_results(experiment.settings.ood, found, name)
    results += _disagreement_results(experiment, found, len(test.representation))
    results += _spectrum_results(test, split)
    return results


def _url_results(found: OODEvaluation, is_right: np.ndarray | None, split: str) -> list[Result]:
    """R-AUROC and the crop check of the URL benchmark (docs/evaluation.md), for each score."""
    results = []
    for name, scores in found.inside.items():
        if is_right is not None and 0 < is_right.sum() < len(is_right):
            results.append(
                result_of(
                    "r_auroc",
                    name,
                    reliability.error_auroc(scores, ~is_right),
                    f"URL's R-AUROC: AUROC of the score for the errors of R@1 of the representation on "
                    f"{split} ({len(is_right):,}, {np.sum(~is_right):,} errors); larger score = less "
                    "certain",
                )
            )
        if name not in found.cropped:  # features have no crops
            continue
        cropped = found.cropped[name]
        low, high = corruptions.CENTER_CROP_SHARES
        results.append(
            result_of(
                "cropped_has_bigger_uncertainty",
                name,
                reliability.cropped_has_bigger_uncertainty(scores[: len(cropped)], cropped),
                f"URL's crop check: share of the first {len(cropped):,} images of {split} whose "
                f"enlarged center crop has a larger score; side of the crop {low:.0%} to {high:.0%}, "
                "seed 0",
            )
        )
    return results


def _spectrum_results(test: Features, split: str) -> list[Result]:
    """How the variance of the posterior scales is split between features and images."""
    if not isinstance(test.prediction, Posterior):
        return []
    scale = test.prediction.posterior_scale
    spectrum = reliability.scale_spectrum(scale)
    return [
        result_of(
            f"log_scale_{name}",
            "posterior_scale",
            getattr(spectrum, name),
            f"share of the variance of log scale over {scale.shape[0]:,} images of {split} x "
            f"{scale.shape[1]} features",
        )
        for name in ("feature_share", "image_share", "interaction_share")
    ]


def _severity_results(settings: OodSection, found: OODEvaluation, score: str) -> list[Result]:
    """Whether a score grows with the severity of each corruption."""
    results = []
    for corruption in settings.corruptions:
        sets = [f"{corruption}_{severity}" for severity in settings.severities]
        corrupted = [found.outside[name][score] for name in sets]
        scores = np.stack([found.inside[score][: len(corrupted[0])], *corrupted])
        results.append(
            result_of(
                f"severity_correlation_{corruption}",
                score,
                reliability.severity_correlation(scores),
                "Spearman correlation of the score with severity (the clean image and "
                f"{len(sets)} severities) within an image, mean over {scores.shape[1]:,} images",
            )
        )
        results.append(
            result_of(
                f"share_increased_{corruption}",
                score,
                reliability.share_increased(scores[0], scores[-1]),
                f"share of {scores.shape[1]:,} images whose score grows under {sets[-1]}",
            )
        )
    return results


def _disagreement_results(
    experiment: Experiment, found: OODEvaluation, num_images: int
) -> list[Result]:
    """Correlation of the scores with the entropy of people's votes; empty without votes."""
    path = experiment.settings.ood.human_counts_path
    if not path:
        return []
    counts = human_votes.read_votes(path, num_images=num_images)
    return [
        result_of(
            "human_disagreement_correlation",
            name,
            reliability.human_disagreement_correlation(scores, counts),
            "URL's rcorr_entropy: Spearman correlation with the entropy of people's votes "
            f"({num_images:,} images)",
        )
        for name, scores in found.inside.items()
    ]


@each_warning_once()
def evaluate(
    experiment: Experiment,
    variables: Any,
    *,
    mesh: Mesh | None = None,
    check_stop: Callable[[], None] = lambda: None,
    keeps_fitted: bool = False,
    say: Callable[[str], object] = lambda text: None,
) -> tuple[dict[str, Any], Evaluation]:
    """Evaluates a model, and the untrained model for comparison.

    Args:
      experiment: data, networks and settings.
      variables: parameters and running statistics of the trained model.
      mesh: devices that share a batch; by default the first device of this process.
      check_stop: called before every batch; raises an error to end the evaluation.
      keeps_fitted: whether the label-free scores are fitted for `Model`, and returned.
      say: tells people what is being done; the parts take seconds to minutes.

    Returns:
      results: JSON values. "split" is the evaluated split; "left_out" is from `left_out`;
        "trained" and "untrained" are lists of name, features, value and protocol; "ood" holds, for
        the trained model, each score against each set, the default score, and the score chosen
        on validation images.
      evaluation: the evaluation of the trained encoder, with its arrays.

    Raises:
      ValueError: the data lack the evaluated split, or the settings do not fit the data.
    """
    settings = experiment.settings.evaluation
    extractors = make_extractors(experiment, mesh=mesh, check_stop=check_stop)
    split, images = evaluated_split(settings, experiment.dataset)
    say(f"Evaluating the trained encoder on {len(images):,} examples of the {split} split.")
    found = evaluate_variables(experiment, variables, extractors)
    results: dict[str, Any] = {
        "split": split,
        "left_out": left_out(settings, experiment.dataset),
        "trained": found.results,
    }
    if experiment.settings.evaluation.compare_untrained:
        say("Evaluating the encoder before training.")
        untrained = experiment.initial_state()._replace(ema_params=None).evaluation_variables
        results["untrained"] = evaluate_variables(
            experiment, untrained, extractors, has_intervals=False
        ).results
    if found.ood is not None:
        results["ood"] = _ood_json(experiment, found.ood)
    if keeps_fitted:
        say("Fitting the scores that are saved with the run.")
        with_terms = extractors.with_terms
        views = detection.view_settings(experiment)
        if found.ood is None and views:
            with_terms = _extractor(experiment, **views, mesh=mesh, check_stop=check_stop)
        fitted = fitted_scores.fit(
            experiment,
            variables,
            plain=extractors.plain,
            with_terms=with_terms,
            train=found.train,
            fitted=None if found.ood is None else found.ood.scorers,
        )
        found = found._replace(fitted=fitted)
    return results, found


def _ood_json(experiment: Experiment, found: OODEvaluation) -> dict[str, Any]:
    return {
        "protocol": experiment.settings.ood.name,
        "default_score": found.default_score,
        "chosen_score": found.chosen_score,
        "choice": found.choice_protocol,
        "with_labels": sorted(found.with_labels),
        "left_out": found.left_out,
        "sets": {result.outside: result.protocol for result in found.results},
        "rows": [
            {
                "score": result.score,
                "outside": result.outside,
                "group": result.group,
                **result.metrics._asdict(),
                **{
                    name: end._asdict()
                    for name, end in (("low", result.low), ("high", result.high))
                    if end is not None
                },
            }
            for result in found.results
        ],
    }


def validation_knn(
    experiment: Experiment, variables: Any, extract: FeatureExtractor
) -> dict[str, float]:
    """k-NN accuracies of the representation on the validation split; the bank is the train split.

    Args:
      experiment: data, networks and settings.
      variables: parameters and running statistics.
      extract: `plain` of `make_extractors`.

    Returns:
      Accuracies in [0, 1] by name, for each of `evaluation.knn_k` and `evaluation.knn_uniform_k`
      that the data allow.

    Raises:
      ValueError: the data allow none.
    """
    settings = experiment.settings.evaluation
    reason = why_no_knn(settings, experiment.dataset)
    if reason:
        raise ValueError(f"k-NN on the validation split is not possible: {reason}")
    train = extract(variables, experiment.dataset.train)
    validation = extract(variables, experiment.dataset.validation)
    without = left_out(settings, experiment.dataset)
    return knn_accuracies_by_name("representation", settings, train, validation, without)
