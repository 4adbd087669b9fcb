"""Every evaluation of a run, each number beside the sentence that says how it was made.

Validation data chooses (`evaluation.split`); test data reports, once. The same numbers for the
encoder before training show what training added.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from jevb_jax.evaluation import classification, ood_protocol, uncertainty
from jevb_jax.evaluation.features import FeatureExtractor, Features, TermsSettings
from jevb_jax.evaluation.ood_protocol import OODEvaluation
from jevb_jax.images.dataset import Dataset
from jevb_jax.images.source import ImageSource
from jevb_jax.networks.heads import Posterior
from jevb_jax.runs import files
from jevb_jax.settings.sections import EvaluationSection, OodSection
from jevb_jax.training.experiment import Experiment

Result = dict[str, Any]
FEATURE_NAMES = ("representation", "embedding")


class Extractors(NamedTuple):
    """Compiled forward passes of an experiment, to be made once for all its encoders.

    Attributes:
      plain: of the un-augmented image.
      with_terms: of JEVB's views too; `plain` where nothing is to be detected, and of other methods.
    """

    plain: FeatureExtractor
    with_terms: FeatureExtractor


def make_extractors(
    experiment: Experiment,
    *,
    mesh: Mesh | None = None,
    check_stop: Callable[[], None] = lambda: None,
) -> Extractors:
    """The forward passes that the evaluation of an experiment needs; see `FeatureExtractor`."""
    make = functools.partial(_extractor, experiment, mesh=mesh, check_stop=check_stop)
    plain = make()
    is_detecting = ood_protocol.is_asked(experiment.settings)
    terms = ood_protocol.terms_settings(experiment) if is_detecting else None
    return Extractors(plain, plain if terms is None else make(terms=terms))


def _extractor(
    experiment: Experiment, *, terms: TermsSettings | None = None, **placement: Any
) -> FeatureExtractor:
    view = experiment.view_augmentations[0]
    return FeatureExtractor(
        experiment.model,
        image_size=view.size,
        mean=view.mean,
        std=view.std,
        batch_size=experiment.settings.evaluation.batch_size,
        terms=terms,
        **placement,
    )


def _result(name: str, features: str, value: float, protocol: str) -> Result:
    return {"name": name, "features": features, "value": value, "protocol": protocol}


# --- What can be evaluated ------------------------------------------------------------------------


def evaluated_split(settings: EvaluationSection, dataset: Dataset) -> tuple[str, ImageSource]:
    """Name and source of the split that is reported.

    Args:
      settings: what is measured, and how.
      dataset: images.

    Returns:
      `evaluation.split`; for unlabelled data without test images the validation split, which
      nothing is then chosen on.

    Raises:
      ValueError: labelled data have no such split.
    """
    split = settings.split
    source = getattr(dataset, split)
    if source is None and dataset.train.labels is None:
        return "validation", dataset.validation
    if source is None:
        raise ValueError(
            f"{dataset.train.name} has no {split} part, which evaluation.split asks for: give "
            "test images, or set evaluation.split to 'validation'"
        )
    return split, source


def _few_label_measure(settings: EvaluationSection) -> str:
    return f"linear_{settings.labels_per_class}_labels_per_class_accuracy"


def left_out(settings: EvaluationSection, dataset: Dataset) -> dict[str, str]:
    """What of the evaluation the data do not allow; known before any training.

    Args:
      settings: what is measured, and how.
      dataset: images.

    Returns:
      Why, by the name of the measure; everything else is evaluated.
    """
    reasons: dict[str, str] = {}
    if getattr(dataset, settings.split) is None and dataset.train.labels is None:
        reasons["split"] = (
            f"there are no {settings.split} images: what needs no labels is evaluated on the "
            "validation split"
        )
    train, validation = dataset.train.labels, dataset.validation.labels
    if train is None or validation is None:
        return reasons | dict.fromkeys(
            ("knn_accuracy", "linear_accuracy"), "the images have no labels"
        )
    classes, counts = np.unique(train, return_counts=True)
    if len(classes) == 1:
        return reasons | dict.fromkeys(
            ("knn_accuracy", "linear_accuracy"),
            f"all training images are of one class, {classes[0]}",
        )
    for name, vote in _knn_measures(settings).items():
        if vote.k > len(train):
            reasons[name] = f"there are {len(train):,} training images"
    if not np.isin(validation, classes).any():
        reasons["linear_accuracy"] = "no validation image is of a class of the training images"
    elif counts.min() < settings.labels_per_class:
        rarest = classes[np.argmin(counts)]
        names = dataset.train.class_names
        name = rarest if names is None else names[rarest]
        num_rare = int(np.sum(counts < settings.labels_per_class))
        reasons[_few_label_measure(settings)] = (
            f"class {name} has {counts.min():,} training images, and {num_rare:,} of "
            f"{len(classes):,} classes have too few: set evaluation.labels_per_class to at most "
            f"{counts.min():,}, or to 0"
        )
    return reasons


def best_measure(settings: EvaluationSection) -> str:
    """The k-NN accuracy by which `checkpoint.keep_best` ranks: that of the first `knn_k`.

    Args:
      settings: what is measured, and how.

    Returns:
      Its name.
    """
    return next(iter(_knn_measures(settings)))


def why_no_knn(settings: EvaluationSection, dataset: Dataset) -> str:
    """Why the data do not allow `best_measure`, or nothing.

    Args:
      settings: what is measured, and how.
      dataset: images.

    Returns:
      A reason of `left_out`.
    """
    reasons = left_out(settings, dataset)
    return reasons.get("knn_accuracy", reasons.get(best_measure(settings), ""))


def left_out_lines(reasons: dict[str, str]) -> list[str]:
    """Sentences for people of what `left_out` returns, one for each reason."""
    names: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        names.setdefault(reason, []).append(name)
    return [
        f"Not as asked: {reason}."
        if measures == ["split"]
        else f"Not evaluated: {', '.join(measures)}: {reason}."
        for reason, measures in names.items()
    ]


def _numbered(train: Features, other: Features) -> np.ndarray:
    """Labels of `other` `[N]` as numbers of the `C` classes of `train`; `C` where it has none such.

    Labels may be numbers of a database, in the millions: arrays then have an entry for each class
    that occurs.
    """
    classes = np.unique(_labels(train))
    labels = _labels(other)
    number = np.minimum(np.searchsorted(classes, labels), len(classes) - 1)
    return np.where(classes[number] == labels, number, len(classes))


def _labels(features: Features) -> np.ndarray:
    if features.labels is None:
        raise ValueError("k-NN and linear probes need labels")
    return features.labels


# --- Classification -------------------------------------------------------------------------------


def _knn_measures(settings: EvaluationSection) -> dict[str, classification.Vote]:
    """The votes of every k-NN accuracy, by its name."""
    weighted, uniform = settings.knn_k, settings.knn_uniform_k
    temperature = settings.knn_temperature
    return {
        **{f"knn_{k}_accuracy": classification.Vote(k, temperature) for k in weighted},
        **{f"knn_{k}_uniform_accuracy": classification.Vote(k, None) for k in uniform},
    }


def _knn_accuracies(
    name: str,
    settings: EvaluationSection,
    train: Features,
    other: Features,
    without: dict[str, str],
) -> dict[str, float]:
    """Every k-NN accuracy by its name, of one search."""
    measures = {key: one for key, one in _knn_measures(settings).items() if key not in without}
    if "knn_accuracy" in without or not measures:
        return {}
    labels = _numbered(train, train)
    accuracies = classification.knn_accuracies(
        getattr(train, name),
        labels,
        getattr(other, name),
        _numbered(train, other),
        num_classes=int(labels.max()) + 2,  # with one for those that the training images lack
        votes=tuple(measures.values()),
    )
    return dict(zip(measures, accuracies, strict=True))


def _knn(
    name: str, settings: EvaluationSection, train: Features, test: Features, without: dict[str, str]
) -> list[Result]:
    """k-NN accuracy for every k, with its protocol."""
    measures = _knn_measures(settings)
    return [
        _result(
            measure,
            name,
            accuracy,
            classification.knn_protocol(
                k=measures[measure].k,
                temperature=measures[measure].temperature,
                bank=classification.Split("train split", len(getattr(train, name))),
                evaluated=classification.Split(settings.split, len(getattr(test, name))),
                features=name,
            ),
        )
        for measure, accuracy in _knn_accuracies(name, settings, train, test, without).items()
    ]


def _predicted(probe: classification.LinearProbe, features: Any) -> np.ndarray:
    return np.argmax(np.asarray(classification.probe_logits(probe, features)), axis=-1)


def _linear(
    name: str,
    settings: EvaluationSection,
    train: Features,
    validation: Features,
    test: Features,
    rows: np.ndarray | None,
    fitted_name: str,
) -> tuple[classification.LinearProbe, float, str]:
    """A linear probe fitted on `rows` of the training split, its test accuracy and protocol."""
    x, y = getattr(train, name), _numbered(train, train)
    num_classes = int(y.max()) + 1
    if rows is not None:
        x, y = x[rows], y[rows]
    validation_y = _numbered(train, validation)
    is_known = validation_y < num_classes  # of another class no probe is right
    selection = classification.select_linear_probe(
        x,
        y,
        getattr(validation, name)[is_known],
        validation_y[is_known],
        num_classes=num_classes,
        l2_grid=settings.l2_grid,
    )
    test_y = _numbered(train, test)
    accuracy = float(np.mean(_predicted(selection.probe, getattr(test, name)) == test_y))
    protocol = classification.linear_protocol(
        solver=selection.probe.solver,
        l2_regularization=selection.l2_regularization,
        num_strengths=len(settings.l2_grid),
        fitted=classification.Split(fitted_name, len(y)),
        validation=classification.Split("validation", int(is_known.sum())),
        evaluated=classification.Split(settings.split, len(test_y)),
        features=name,
    )
    return selection.probe, accuracy, protocol


def _linear_results(
    name: str,
    settings: EvaluationSection,
    train: Features,
    validation: Features,
    test: Features,
    without: dict[str, str],
) -> tuple[classification.LinearProbe | None, list[Result]]:
    """The probe on all labels, and the mean over seeds of probes on a few labels a class."""
    if "linear_accuracy" in without:
        return None, []
    probe, accuracy, protocol = _linear(
        name, settings, train, validation, test, None, "train split"
    )
    results = [_result("linear_accuracy", name, accuracy, protocol)]
    per_class = settings.labels_per_class
    few_labels = _few_label_measure(settings)
    if per_class > 0 and few_labels not in without:
        accuracies = []
        for seed in range(settings.few_label_seeds):
            rows = classification.labels_per_class_subset(
                _labels(train), labels_per_class=per_class, seed=seed
            )
            fitted_name = f"{per_class} labels per class of the train split, seed {seed}"
            _, accuracy, protocol = _linear(
                name, settings, train, validation, test, rows, fitted_name
            )
            accuracies.append(accuracy)
        results.append(
            _result(
                few_labels,
                name,
                float(np.mean(accuracies)),
                f"mean of {len(accuracies)} seeds (standard deviation "
                f"{np.std(accuracies):.4f}), the last of them: {protocol}",
            )
        )
    return probe, results


class Evaluation(NamedTuple):
    """What was measured of one encoder.

    Attributes:
      results: each a name, features (or a score), value and protocol.
      train: features of the training split.
      test: features of the evaluated split, with JEVB's terms if anything is to be detected.
      probe: of the representation, or None where there is none, as for unlabelled data.
      ood: out-of-distribution detection, or None where nothing is to be detected.
      risk_coverage: by score, then by classifier; empty where nothing is to be detected.
    """

    results: list[Result]
    train: Features
    test: Features
    probe: classification.LinearProbe | None
    ood: OODEvaluation | None
    risk_coverage: dict[str, dict[str, uncertainty.RiskCoverage]]


def evaluate_variables(
    experiment: Experiment, variables: Any, extractors: Extractors, *, has_intervals: bool = True
) -> Evaluation:
    """k-NN, linear probes, out-of-distribution detection and the use of uncertainty.

    Args:
      experiment: data, networks and settings.
      variables: parameters and running statistics.
      extractors: of `make_extractors`.
      has_intervals: whether detection gets intervals.

    Returns:
      The evaluation.

    Raises:
      ValueError: the data set has no such split, or settings that do not fit it.
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
    probes = {}
    for name in FEATURE_NAMES:
        results += _knn(name, settings, train, test, without)
        probes[name], linear = _linear_results(name, settings, train, validation, test, without)
        results += linear
    probe = probes["representation"]
    found, curves = None, {}
    if ood_protocol.is_asked(experiment.settings):
        found = ood_protocol.evaluate_ood(
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
                classifier: uncertainty.risk_coverage_curve(values, is_error)
                for classifier, is_error in errors.items()
            }
            for score, values in found.inside.items()
        }
        results += _uncertainty_results(experiment, found, errors, curves, test, split)
    return Evaluation(results, train, test, probe, found, curves)


def evaluate_transfer(
    settings: EvaluationSection, extract: FeatureExtractor, variables: Any, dataset: Dataset
) -> dict[str, Any]:
    """k-NN and linear probes of an encoder on data that it was not trained on.

    Args:
      settings: what is measured, and how.
      extract: the encoder's forward pass.
      variables: parameters and running statistics.
      dataset: labelled images.

    Returns:
      As `evaluate`, without detection: "split", "left_out" and "trained".

    Raises:
      ValueError: no labels or one class, no such split, or settings that no data allow.
    """
    if dataset.train.labels is None:
        raise ValueError(f"{dataset.train.name} has no labels: nothing can be evaluated on it")
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
        results += _knn(name, settings, train, test, without)
        results += _linear_results(name, settings, train, validation, test, without)[1]
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
        _result(
            f"auroc_{group}",
            score,
            value,
            f"mean AUROC over {_some(sets[group])}; see results.csv for each",
        )
        for score, groups in ood_protocol.group_means(found.results).items()
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
    curves: dict[str, dict[str, uncertainty.RiskCoverage]],
    test: Features,
    split: str,
) -> list[Result]:
    """Whether each score means anything: errors, severity and human disagreement (docs/ood.md)."""
    results = []
    for name, scores in found.inside.items():
        for classifier, is_error in errors.items():
            if not 0 < is_error.sum() < len(is_error):
                continue  # no errors, or nothing but errors: neither number exists
            protocol = (
                f"errors of {classifier} on {split} ({len(is_error):,}, {is_error.sum():,} errors) "
                f"against the score; larger score = less certain"
            )
            results += [
                _result(
                    f"error_auroc_{classifier}",
                    name,
                    uncertainty.error_auroc(scores, is_error),
                    f"AUROC of {protocol}",
                ),
                _result(
                    f"area_under_risk_coverage_{classifier}",
                    name,
                    curves[name][classifier].area,
                    f"mean risk over coverages, smaller is better, of {protocol}",
                ),
            ]
        results += _severity_results(experiment.settings.ood, found, name)
    results += _disagreement_results(experiment, found)
    results += _spectrum_results(test, split)
    return results


def _spectrum_results(test: Features, split: str) -> list[Result]:
    """What the anisotropy of the posterior is used for."""
    if not isinstance(test.prediction, Posterior):
        return []
    scale = test.prediction.posterior_scale
    spectrum = uncertainty.scale_spectrum(scale)
    return [
        _result(
            f"log_scale_{name}",
            "posterior_scale",
            getattr(spectrum, name),
            f"share of the variance of log scale over {scale.shape[0]:,} images of {split} x "
            f"{scale.shape[1]} features",
        )
        for name in ("feature_share", "image_share", "interaction_share")
    ]


def wrong_predictions(
    settings: EvaluationSection,
    train: Features,
    test: Features,
    probe: classification.LinearProbe | None,
) -> dict[str, np.ndarray]:
    """Which images k-NN and the linear probe of the representation get wrong.

    Args:
      settings: what is measured, and how.
      train: features of the training split.
      test: features of the evaluated split.
      probe: of the representation, or None.

    Returns:
      `[N]` bool by the name of the classifier; nothing for unlabelled data.
    """
    if train.labels is None or test.labels is None or probe is None:
        return {}
    labels, test_labels = _numbered(train, train), _numbered(train, test)
    wrong = {"linear": _predicted(probe, test.representation) != test_labels}
    k = settings.knn_k[0]
    if k > len(labels):
        return wrong
    nearest = classification.knn_predict(
        train.representation,
        labels,
        test.representation,
        num_classes=int(labels.max()) + 1,
        k=k,
        temperature=settings.knn_temperature,
    )
    return {f"{k}_nn": np.asarray(nearest) != test_labels} | wrong


def _severity_results(settings: OodSection, found: OODEvaluation, score: str) -> list[Result]:
    """Whether a score grows with the severity of each corruption."""
    results = []
    for corruption in settings.corruptions:
        sets = [f"{corruption}_{severity}" for severity in settings.severities]
        corrupted = [found.outside[name][score] for name in sets]
        scores = np.stack([found.inside[score][: len(corrupted[0])], *corrupted])
        results.append(
            _result(
                f"severity_correlation_{corruption}",
                score,
                uncertainty.severity_correlation(scores).mean_per_image,
                f"Spearman correlation of the score with severity (0 and {len(sets)} severities) "
                f"within an image, mean over {scores.shape[1]:,} images",
            )
        )
        results.append(
            _result(
                f"share_increased_{corruption}",
                score,
                uncertainty.share_increased(scores[0], scores[-1]),
                f"share of {scores.shape[1]:,} images whose score grows under {sets[-1]}",
            )
        )
    return results


def _disagreement_results(experiment: Experiment, found: OODEvaluation) -> list[Result]:
    """Correlation of the scores with the entropy of people's votes, if the config names them."""
    path = experiment.settings.ood.human_counts_path
    if not path:
        return []
    with files.to_path(path).open("rb") as stream, np.load(stream, allow_pickle=False) as file:
        counts = file["cifar10h_counts"]
    num_images = len(next(iter(found.inside.values())))
    if len(counts) != num_images:
        raise ValueError(
            f"{path} holds votes for {len(counts):,} images and {num_images:,} were evaluated: they "
            "must be the whole test set, in its order"
        )
    return [
        _result(
            "human_disagreement_correlation",
            name,
            uncertainty.human_disagreement_correlation(scores, counts),
            f"Spearman correlation with the entropy of people's votes ({num_images:,} images)",
        )
        for name, scores in found.inside.items()
    ]


def evaluate(
    experiment: Experiment,
    variables: Any,
    *,
    mesh: Mesh | None = None,
    check_stop: Callable[[], None] = lambda: None,
) -> tuple[dict[str, Any], Evaluation]:
    """`evaluate_variables` of a model, and of the untrained one.

    Args:
      experiment: data, networks and settings.
      variables: parameters and running statistics.
      mesh: see `FeatureExtractor`.
      check_stop: likewise.

    Returns:
      results: JSON values: "split"; "left_out", see `left_out`; "trained" and "untrained", each a
        list of name, features, value and protocol; "ood", of the trained one: each score against
        each set, the score fixed before and the one chosen on validation images.
      evaluation: of the trained one, with its arrays.

    Raises:
      ValueError: the data set has no such split, or settings that do not fit it.
    """
    settings = experiment.settings.evaluation
    extractors = make_extractors(experiment, mesh=mesh, check_stop=check_stop)
    found = evaluate_variables(experiment, variables, extractors)
    results: dict[str, Any] = {
        "split": evaluated_split(settings, experiment.dataset)[0],
        "left_out": left_out(settings, experiment.dataset),
        "trained": found.results,
    }
    if experiment.settings.evaluation.compare_untrained:
        untrained = experiment.initial_state()._replace(ema_params=None).evaluation_variables
        results["untrained"] = evaluate_variables(
            experiment, untrained, extractors, has_intervals=False
        ).results
    if found.ood is not None:
        results["ood"] = _ood_json(experiment, found.ood)
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
    """k-NN accuracies of the representation on the validation split, bank = train split.

    Args:
      experiment: data, networks and settings.
      variables: parameters and running statistics.
      extract: the plain one of `make_extractors`.

    Returns:
      Those of `evaluation.knn_k` and `evaluation.knn_uniform_k` that the data allow, in [0, 1], by
      their names.

    Raises:
      ValueError: they allow none.
    """
    settings = experiment.settings.evaluation
    reason = why_no_knn(settings, experiment.dataset)
    if reason:
        raise ValueError(f"no k-NN on the validation split: {reason}")
    train = extract(variables, experiment.dataset.train)
    validation = extract(variables, experiment.dataset.validation)
    without = left_out(settings, experiment.dataset)
    return _knn_accuracies("representation", settings, train, validation, without)
