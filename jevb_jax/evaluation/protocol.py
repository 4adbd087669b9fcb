"""Every evaluation of a run, each number beside the sentence that says how it was made.

Validation data chooses (`evaluation.split`); test data reports, once. The same numbers for the
encoder before training show what training added.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from rich.table import Table
from sklearn.metrics import roc_auc_score

from jevb_jax import data
from jevb_jax.evaluation import classification, corruptions, ood
from jevb_jax.evaluation.features import FeatureExtractor, Features
from jevb_jax.experiment import HEADS, Experiment

Result = dict[str, Any]
_FEATURE_NAMES = ("representation", "embedding")
_OOD_SEVERITY = 4


def _extractor(experiment: Experiment) -> FeatureExtractor:
    view = experiment.view_augmentations[0]
    return FeatureExtractor(
        experiment.model,
        image_size=view.size,
        mean=view.mean,
        std=view.std,
        batch_size=experiment.config["evaluation"]["batch_size"],
    )


def _result(name: str, features: str, value: float, protocol: str) -> Result:
    return {"name": name, "features": features, "value": value, "protocol": protocol}


def _knn(name: str, settings: dict[str, Any], train: Features, test: Features) -> list[Result]:
    """k-NN accuracy for every k."""
    bank, queries = getattr(train, name), getattr(test, name)
    if train.labels is None or test.labels is None:
        return []
    ks = settings["knn_k"]
    accuracies = classification.knn_accuracy(
        bank,
        train.labels,
        queries,
        test.labels,
        num_classes=int(train.labels.max()) + 1,
        k=ks,
        temperature=settings["knn_temperature"],
    )
    return [
        _result(
            f"knn_{k}_accuracy",
            name,
            accuracy,
            classification.knn_protocol(
                k=k,
                temperature=settings["knn_temperature"],
                bank=classification.Split("train split", len(bank)),
                evaluated=classification.Split(settings["split"], len(queries)),
                features=name,
            ),
        )
        for k, accuracy in zip(ks, accuracies, strict=True)
    ]


def _linear(
    name: str,
    settings: dict[str, Any],
    train: Features,
    validation: Features,
    test: Features,
    rows: np.ndarray | None,
    fitted_name: str,
) -> tuple[float, str]:
    """Test accuracy and protocol of one linear probe, fitted on `rows` of the training split."""
    if train.labels is None or validation.labels is None or test.labels is None:
        raise ValueError("a linear probe needs labels")
    x, y = getattr(train, name), train.labels
    if rows is not None:
        x, y = x[rows], y[rows]
    selection = classification.select_linear_probe(
        x,
        y,
        getattr(validation, name),
        validation.labels,
        num_classes=int(train.labels.max()) + 1,
        l2_grid=settings["l2_grid"],
    )
    accuracy = classification.probe_accuracy(selection.probe, getattr(test, name), test.labels)
    protocol = classification.linear_protocol(
        solver=selection.probe.solver,
        l2_regularization=selection.l2_regularization,
        num_strengths=len(settings["l2_grid"]),
        fitted=classification.Split(fitted_name, len(y)),
        validation=classification.Split("validation", len(validation.labels)),
        evaluated=classification.Split(settings["split"], len(test.labels)),
        features=name,
    )
    return accuracy, protocol


def _linear_results(
    name: str, settings: dict[str, Any], train: Features, validation: Features, test: Features
) -> list[Result]:
    """The probe on all labels, and the mean over seeds of probes on a few labels a class."""
    if train.labels is None:
        return []
    accuracy, protocol = _linear(name, settings, train, validation, test, None, "train split")
    results = [_result("linear_accuracy", name, accuracy, protocol)]
    per_class = settings["labels_per_class"]
    if per_class > 0:
        accuracies = []
        for seed in range(settings["few_label_seeds"]):
            rows = classification.labels_per_class_subset(
                train.labels, labels_per_class=per_class, seed=seed
            )
            fitted_name = f"{per_class} labels per class of the train split, seed {seed}"
            accuracy, protocol = _linear(name, settings, train, validation, test, rows, fitted_name)
            accuracies.append(accuracy)
        results.append(
            _result(
                f"linear_{per_class}_labels_per_class_accuracy",
                name,
                float(np.mean(accuracies)),
                f"mean of {len(accuracies)} seeds (standard deviation "
                f"{np.std(accuracies):.4f}), the last of them: {protocol}",
            )
        )
    return results


def _ood_score(experiment: Experiment) -> tuple[str, Callable[[Features], np.ndarray] | None]:
    """Name and function of the method's own uncertainty, if it has one."""
    head = HEADS[experiment.config["method"]]
    prior_scale = experiment.config["jevb"]["prior_scale"]

    def negative_kl(features: Features) -> np.ndarray:
        mean, scale, _ = features.prediction
        return np.asarray(ood.negative_kl_score(mean, scale, prior_scale=prior_scale))

    def negative_concentration(features: Features) -> np.ndarray:
        concentration = features.prediction.concentration
        return np.asarray(ood.negative_concentration_score(concentration))

    if head == "posterior":
        return "-KL(q || p)", negative_kl
    if head == "direction":
        return "-concentration", negative_concentration
    return "", None


def _evaluated_split(experiment: Experiment) -> tuple[str, data.ImageSource]:
    """Name and source of the split that is reported."""
    split = experiment.config["evaluation"]["split"]
    source = getattr(experiment.dataset, split)
    if source is None:
        raise ValueError(f"the data set has no {split} part: nothing can be evaluated")
    return split, source


def _ood_results(
    experiment: Experiment, variables: Any, extract: FeatureExtractor, test: Features
) -> list[Result]:
    """AUROC of the method's own score, images against corrupted copies of them."""
    names = experiment.config["evaluation"]["corruptions"]
    score_name, score = _ood_score(experiment)
    if not names or score is None:
        return []
    split, source = _evaluated_split(experiment)
    images = data.load_resident(source)
    inside = score(test)
    results = []
    for name in names:
        corrupted = corruptions.corrupt(images, name, severity=_OOD_SEVERITY, seed=0)
        outside = score(extract(variables, data.ArraySource(corrupted)))
        is_outside = np.concatenate([np.zeros(len(inside)), np.ones(len(outside))])
        results.append(
            _result(
                f"auroc_{name}",
                "prediction",
                float(roc_auc_score(is_outside, np.concatenate([inside, outside]))),
                f"AUROC of the score {score_name}, larger = more out of distribution; inside: {split} "
                f"({len(inside):,}); outside: the same with {name}, severity {_OOD_SEVERITY} of 5; "
                "no choice made on outside images",
            )
        )
    return results


def _evaluate_variables(
    experiment: Experiment, variables: Any, extract: FeatureExtractor
) -> list[Result]:
    settings = experiment.config["evaluation"]
    dataset = experiment.dataset
    split, source = _evaluated_split(experiment)
    train = extract(variables, dataset.train)
    validation = extract(variables, dataset.validation)
    test = validation if split == "validation" else extract(variables, source)
    results: list[Result] = []
    for name in _FEATURE_NAMES:
        results += _knn(name, settings, train, test)
        results += _linear_results(name, settings, train, validation, test)
    return results + _ood_results(experiment, variables, extract, test)


def evaluate(experiment: Experiment, variables: Any) -> dict[str, Any]:
    """k-NN, linear probes and out-of-distribution AUROC of a model, and of the untrained one.

    Args:
      experiment: data, networks and settings.
      variables: parameters and running statistics.

    Returns:
      JSON values: "split", and "trained" and "untrained", each a list of name, features, value and
      protocol.

    Raises:
      ValueError: the data set has no such split, or settings that do not fit it.
    """
    extract = _extractor(experiment)
    results: dict[str, Any] = {
        "split": experiment.config["evaluation"]["split"],
        "trained": _evaluate_variables(experiment, variables, extract),
    }
    if experiment.config["evaluation"]["compare_untrained"]:
        untrained = experiment.initial_state()._replace(ema_params=None).evaluation_variables
        results["untrained"] = _evaluate_variables(experiment, untrained, extract)
    return results


def validation_knn_accuracy(experiment: Experiment, variables: Any) -> float:
    """k-NN accuracy of the representation on the validation split, bank = train split.

    Args:
      experiment: data, networks and settings; the first of `evaluation.knn_k` is used.
      variables: parameters and running statistics.

    Returns:
      Accuracy in [0, 1].

    Raises:
      ValueError: the data have no labels.
    """
    settings = experiment.config["evaluation"]
    extract = _extractor(experiment)
    train = extract(variables, experiment.dataset.train)
    validation = extract(variables, experiment.dataset.validation)
    if train.labels is None or validation.labels is None:
        raise ValueError("checkpoint.keep_best needs labels: set it to 0 for unlabelled data")
    return classification.knn_accuracy(
        train.representation,
        train.labels,
        validation.representation,
        validation.labels,
        num_classes=int(train.labels.max()) + 1,
        k=int(settings["knn_k"][0]),
        temperature=settings["knn_temperature"],
    )


def results_table(results: dict[str, Any]) -> Table:
    """The results as a table for people, trained beside untrained.

    Args:
      results: of `evaluate`.

    Returns:
      A rich table.
    """
    table = Table(title=f"{results['split']} split; protocols in results.json")
    for column in ("features", "measure"):
        table.add_column(column)
    for column in ("untrained", "trained"):
        table.add_column(column, justify="right")
    before = results.get("untrained")
    for row, result in enumerate(results["trained"]):
        untrained = "" if before is None else f"{before[row]['value']:.4f}"
        table.add_row(result["features"], result["name"], untrained, f"{result['value']:.4f}")
    return table
