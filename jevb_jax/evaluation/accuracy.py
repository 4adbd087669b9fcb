"""Accuracies by k-NN and linear probes, and which measures the data do not allow."""

from typing import Any

import numpy as np

from jevb_jax.evaluation import knn, labeled_features, linear_probe, neighbors, reliability
from jevb_jax.evaluation.features import Features
from jevb_jax.evaluation.knn import Vote
from jevb_jax.evaluation.labeled_features import Split
from jevb_jax.evaluation.linear_probe import LinearProbe
from jevb_jax.images.dataset import Dataset
from jevb_jax.images.source import ImageSource
from jevb_jax.settings.sections import EvaluationSection

Result = dict[str, Any]
FEATURE_NAMES = ("representation", "embedding")


def result_of(name: str, features: str, value: float, protocol: str) -> Result:
    """One number with the name of its features and a sentence that says how it was measured."""
    return {"name": name, "features": features, "value": value, "protocol": protocol}


def evaluated_split(settings: EvaluationSection, dataset: Dataset) -> tuple[str, ImageSource]:
    """Name and images of the split that is reported.

    Returns:
      `evaluation.split` and its images. Unlabeled data without test images give the validation
      split instead: without labels, nothing is chosen on it.

    Raises:
      ValueError: the data are labeled and do not have the split.
    """
    split = settings.split
    source = getattr(dataset, split)
    if source is None and dataset.train.labels is None:
        return "validation", dataset.validation
    if source is None:
        raise ValueError(
            f"{dataset.train.name} has no {split} part, which evaluation.split asks for. Give "
            "test images, or set evaluation.split to 'validation'"
        )
    return split, source


def _few_label_measure(settings: EvaluationSection) -> str:
    return f"linear_{settings.labels_per_class}_labels_per_class_accuracy"


def left_out(settings: EvaluationSection, dataset: Dataset) -> dict[str, str]:
    """Measures that the data do not allow. Nothing needs to be trained to know them.

    Returns:
      The reason for each measure that is left out, by its name.
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
    """Name of the accuracy that `checkpoint.keep_best` compares: k-NN with the first `knn_k`."""
    return next(iter(_knn_measures(settings)))


def why_no_knn(settings: EvaluationSection, dataset: Dataset) -> str:
    """Why the data do not allow `best_measure`; an empty string if they do."""
    reasons = left_out(settings, dataset)
    return reasons.get("knn_accuracy", reasons.get(best_measure(settings), ""))


def left_out_lines(reasons: dict[str, str]) -> list[str]:
    """Sentences that report the result of `left_out`, one for each reason."""
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
    """Labels of `other`, `[N]`, as numbers 0 to `C - 1` of the `C` classes of `train`.

    A label that does not occur in `train` becomes `C`. Labels may be ids of a database, in the
    millions; after this, arrays need an entry only for each class that occurs.
    """
    classes = np.unique(_labels(train))
    labels = _labels(other)
    number = np.minimum(np.searchsorted(classes, labels), len(classes) - 1)
    return np.where(classes[number] == labels, number, len(classes))


def _labels(features: Features) -> np.ndarray:
    if features.labels is None:
        raise ValueError("k-NN and linear probes need labels")
    return features.labels


def _knn_measures(settings: EvaluationSection) -> dict[str, Vote]:
    """How the neighbors vote, for each k-NN accuracy by its name."""
    weighted, uniform = settings.knn_k, settings.knn_uniform_k
    temperature = settings.knn_temperature
    return {
        **{f"knn_{k}_accuracy": Vote(k, temperature) for k in weighted},
        **{f"knn_{k}_uniform_accuracy": Vote(k, None) for k in uniform},
    }


def knn_accuracies_by_name(
    name: str,
    settings: EvaluationSection,
    train: Features,
    other: Features,
    without: dict[str, str],
) -> dict[str, float]:
    """Every k-NN accuracy by its name, from one search for neighbors."""
    measures = {key: one for key, one in _knn_measures(settings).items() if key not in without}
    if "knn_accuracy" in without or not measures:
        return {}
    labels = _numbered(train, train)
    accuracies = knn.knn_accuracies(
        getattr(train, name),
        labels,
        getattr(other, name),
        _numbered(train, other),
        num_classes=int(labels.max()) + 2,  # one more, for classes that the training images lack
        votes=tuple(measures.values()),
    )
    return dict(zip(measures, accuracies, strict=True))


def knn_results(
    name: str, settings: EvaluationSection, train: Features, test: Features, without: dict[str, str]
) -> list[Result]:
    """k-NN accuracy for every k, each with a sentence that says how it was measured."""
    measures = _knn_measures(settings)
    return [
        result_of(
            measure,
            name,
            accuracy,
            knn.knn_protocol(
                measures[measure],
                bank=Split("train split", len(getattr(train, name))),
                evaluated=Split(settings.split, len(getattr(test, name))),
                features=name,
            ),
        )
        for measure, accuracy in knn_accuracies_by_name(
            name, settings, train, test, without
        ).items()
    ]


def _predicted(probe: LinearProbe, features: Any) -> np.ndarray:
    return np.argmax(np.asarray(linear_probe.probe_logits(probe, features)), axis=-1)


def _linear(
    name: str,
    settings: EvaluationSection,
    train: Features,
    validation: Features,
    test: Features,
    rows: np.ndarray | None,
    fitted_name: str,
) -> tuple[LinearProbe, float, str]:
    """Fits a linear probe on `rows` of the training split: probe, test accuracy, protocol."""
    x, y = getattr(train, name), _numbered(train, train)
    num_classes = int(y.max()) + 1
    if rows is not None:
        x, y = x[rows], y[rows]
    validation_y = _numbered(train, validation)
    is_known = validation_y < num_classes  # no probe can be right about another class
    selection = linear_probe.select_linear_probe(
        x,
        y,
        getattr(validation, name)[is_known],
        validation_y[is_known],
        num_classes=num_classes,
        l2_grid=settings.l2_grid,
    )
    test_y = _numbered(train, test)
    accuracy = float(np.mean(_predicted(selection.probe, getattr(test, name)) == test_y))
    protocol = linear_probe.linear_protocol(
        solver=selection.probe.solver,
        l2_regularization=selection.l2_regularization,
        num_strengths=len(settings.l2_grid),
        fitted=Split(fitted_name, len(y)),
        validation=Split("validation", int(is_known.sum())),
        evaluated=Split(settings.split, len(test_y)),
        features=name,
        stopped_after=None if selection.probe.converged else int(selection.probe.num_iterations),
    )
    return selection.probe, accuracy, protocol


def linear_results(
    name: str,
    settings: EvaluationSection,
    train: Features,
    validation: Features,
    test: Features,
    without: dict[str, str],
) -> tuple[LinearProbe | None, list[Result]]:
    """The probe fitted on all labels, its accuracy, and the mean accuracy with few labels a class.

    The probe is None if the data do not allow `linear_accuracy`.
    """
    if "linear_accuracy" in without:
        return None, []
    probe, accuracy, protocol = _linear(
        name, settings, train, validation, test, None, "train split"
    )
    results = [result_of("linear_accuracy", name, accuracy, protocol)]
    per_class = settings.labels_per_class
    few_labels = _few_label_measure(settings)
    if per_class > 0 and few_labels not in without:
        accuracies = []
        for seed in range(settings.few_label_seeds):
            rows = labeled_features.labels_per_class_subset(
                _labels(train), labels_per_class=per_class, seed=seed
            )
            fitted_name = f"{per_class} labels per class of the train split, seed {seed}"
            _, accuracy, protocol = _linear(
                name, settings, train, validation, test, rows, fitted_name
            )
            accuracies.append(accuracy)
        results.append(
            result_of(
                few_labels,
                name,
                float(np.mean(accuracies)),
                f"mean of {len(accuracies)} seeds (standard deviation "
                f"{np.std(accuracies):.4f}), the last of them: {protocol}",
            )
        )
    return probe, results


def wrong_predictions(
    settings: EvaluationSection,
    train: Features,
    test: Features,
    probe: LinearProbe | None,
) -> dict[str, np.ndarray]:
    """Which images k-NN and the linear probe of the representation get wrong.

    Args:
      train: features of the training split.
      test: features of the evaluated split.
      probe: fitted on the representation, or None.

    Returns:
      `[N]` bool for each classifier, by its name. Empty without labels or without a probe.
    """
    if train.labels is None or test.labels is None or probe is None:
        return {}
    labels, test_labels = _numbered(train, train), _numbered(train, test)
    wrong = {"linear": _predicted(probe, test.representation) != test_labels}
    k = settings.knn_k[0]
    if k > len(labels):
        return wrong
    (nearest,) = knn.knn_predict(
        train.representation,
        labels,
        test.representation,
        num_classes=int(labels.max()) + 1,
        votes=[Vote(k, settings.knn_temperature)],
    )
    return {f"{k}_nn": nearest != test_labels} | wrong


def shifted_accuracies(
    settings: EvaluationSection,
    train: Features,
    shifted: Features,
    probe: LinearProbe | None,
    without: dict[str, str],
) -> dict[str, float]:
    """Accuracies of the representation on images from elsewhere; nothing is fitted to them.

    Args:
      settings: which k-NN accuracies.
      train: features of the training split, the neighbors.
      shifted: features of labeled images. A label that no training image has counts as an error.
      probe: fitted on the representation of the training split, or None.
      without: measures to leave out, from `left_out`.

    Returns:
      Every k-NN accuracy, and with a probe "linear_accuracy".
    """
    found = knn_accuracies_by_name("representation", settings, train, shifted, without)
    if probe is not None:
        is_right = _predicted(probe, shifted.representation) == _numbered(train, shifted)
        found["linear_accuracy"] = float(np.mean(is_right))
    return found


def right_at_1(name: str, evaluated: Features) -> np.ndarray | None:
    """Which images have the label of their nearest other image, `[N]` bool, for URL's measures.

    Args:
      name: name of the features, for example "representation".
      evaluated: features of the evaluated images.

    Returns:
      None if the images have no labels or are fewer than two.
    """
    if evaluated.labels is None or len(evaluated.labels) < 2:
        return None
    nearest = neighbors.nearest_others(getattr(evaluated, name))
    return reliability.right_at_1(nearest, evaluated.labels)


def r_at_1_results(name: str, is_right: np.ndarray | None, split: str) -> list[Result]:
    """R@1 of the URL benchmark; empty without `is_right` of `right_at_1`."""
    if is_right is None:
        return []
    evaluated = Split(split, len(is_right))
    protocol = (
        f"URL's R@1: share of {evaluated} whose nearest other image of {split} by cosine has the same "
        f"label, un-augmented {name}, nothing is fitted"
    )
    return [result_of("r_at_1", name, float(np.mean(is_right)), protocol)]
