"""The evaluation of a tiny run: its numbers again with scikit-learn, from the features it extracts."""

import dataclasses
import functools
import importlib
from typing import Any

import chex
import jax
import numpy as np
import pytest
from rich.console import Console
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from configs import ood
from jevb_jax.evaluation import accuracy, evaluate, linear_probe, shifted
from jevb_jax.evaluation.evaluate import Features
from jevb_jax.images import pixels
from jevb_jax.images.dataset import Dataset
from jevb_jax.images.source import ArraySource
from jevb_jax.report import tables
from jevb_jax.settings import read
from jevb_jax.settings.sections import EvaluationSection
from jevb_jax.training.experiment import Experiment, build_experiment


def make_experiment(**sections: dict[str, Any]) -> Experiment:
    config: Any = importlib.import_module("configs.smoke").get_config()
    config.data.num_train_examples = 150
    config.data.num_test_examples = 70
    config.train.batch_size = 32
    config.train.health_every_steps = 0
    config.evaluation.batch_size = 64  # divides none of the splits
    config.evaluation.knn_k = (5, 20)
    config.evaluation.l2_grid = (1e-2,)
    config.ood.corruptions = ()  # detection has a test module of its own
    config.evaluation.labels_per_class = 3
    config.evaluation.compare_untrained = True
    for section, values in sections.items():
        for key, value in values.items():
            config[section][key] = value
    return build_experiment(config)


@functools.cache
def tiny() -> Experiment:
    return make_experiment()


@functools.cache
def features() -> Any:
    experiment = tiny()
    extract = evaluate.make_extractors(experiment).plain
    variables = experiment.initial_state().evaluation_variables
    dataset: Any = experiment.dataset
    return tuple(extract(variables, s) for s in (dataset.train, dataset.validation, dataset.test))


@functools.cache
def results() -> dict[str, Any]:
    return evaluate.evaluate(tiny(), tiny().initial_state().evaluation_variables)[0]


def value(name: str, of: str, which: str = "trained") -> float:
    (found,) = [r for r in results()[which] if r["name"] == name and r["features"] == of]
    return found["value"]


@pytest.mark.slow
def test_features_are_of_every_image_once_in_order():
    experiment = tiny()
    variables = experiment.initial_state().evaluation_variables
    source = experiment.dataset.test
    assert source is not None
    view: Any = experiment.view_augmentations[0]
    images = np.stack([source[i] for i in range(len(source))])
    views = jax.vmap(lambda x: pixels.center_view(x, size=view.size, mean=view.mean, std=view.std))(
        images
    )
    direct: Any = experiment.model.apply(variables, views, train=False)
    found = features()[2]
    assert len(found.representation) == 70
    expected: Any = (direct.representation, direct.embedding, direct.prediction)
    chex.assert_trees_all_close(tuple(found)[:3], expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(found.labels, source.labels)
    unlabeled = evaluate.make_extractors(experiment).plain(variables, ArraySource(images[:3]))
    assert unlabeled.labels is None
    np.testing.assert_allclose(unlabeled.embedding, found.embedding[:3], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("of", ["representation", "embedding"])
def test_knn(of):
    train, _, test = features()
    bank, queries = (getattr(f, of).astype(np.float64) for f in (train, test))
    bank, queries = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (bank, queries))
    similarity = queries @ bank.T
    for k in (5, 20):
        predicted = []
        for row in similarity:
            nearest = np.argsort(-row)[:k]
            votes = np.bincount(
                train.labels[nearest], np.exp(row[nearest] / 0.1), minlength=train.labels.max() + 1
            )
            predicted.append(votes.argmax())
        expected = np.mean(np.array(predicted) == test.labels)
        assert value(f"knn_{k}_accuracy", of) == pytest.approx(expected, abs=1e-6)


@pytest.mark.slow
def test_linear_probe():
    train, _, test = features()
    scaler = StandardScaler().fit(train.representation)
    # The loss is a mean and the penalty l2 / 2: C = 1 / (l2 * N).
    classifier = LogisticRegression(C=1 / (1e-2 * len(train.labels)), max_iter=5000, tol=1e-8)
    classifier.fit(scaler.transform(train.representation), train.labels)
    expected = classifier.score(scaler.transform(test.representation), test.labels)
    # One example of 70 may lie on a boundary.
    assert value("linear_accuracy", "representation") == pytest.approx(expected, abs=1.5 / 70)


def random_features(seed: int, classes: np.ndarray) -> Features:
    generator = np.random.default_rng(seed)
    x = generator.normal(size=(len(classes), 6)) + np.eye(6)[classes // 10] * 1.5
    return Features(x.astype(np.float32), x.astype(np.float32), None, None, classes)


@pytest.mark.slow
def test_shifted_sets_are_classified_by_what_was_fitted_elsewhere(tmp_path):
    """Two files as CIFAR-10-C has them, in two rows of severities; the oracle is NumPy's 1-NN."""
    generator = np.random.default_rng(0)
    labels = 10 * generator.integers(0, 5, 40)
    labels[7] = 50  # a class without training images: always an error
    np.save(tmp_path / "labels.npy", labels)
    images = np.zeros((40, 8, 8, 3), np.uint8)
    images[:, 0, 0, 0] = np.arange(40)
    np.save(tmp_path / "noise.npy", images)
    files = (str(tmp_path / "noise.npy"), str(tmp_path / "labels.npy"))
    sets = [
        ood.outside_set(f"noise_{s}", "shifted", "arrays", paths=files, rows=(20 * s - 20, 20 * s))
        for s in (1, 2)
    ]
    sets += [ood.outside_set("far", "far", "arrays", paths=("nowhere.npz",))]
    settings = tiny().settings
    settings = dataclasses.replace(
        settings,
        evaluation=dataclasses.replace(settings.evaluation, knn_k=(1,), knn_uniform_k=()),
        ood=dataclasses.replace(settings.ood, outside=tuple(sets)),
    )
    train = random_features(1, 10 * generator.integers(0, 5, 300))
    whole = random_features(2, labels)
    probe, _ = accuracy.linear_results(
        "representation", settings.evaluation, train, train, train, {}
    )
    assert probe is not None
    assert train.labels is not None

    def extract(_: Any, source: Any) -> Features:
        rows = [int(source[i][0, 0, 0]) for i in range(len(source))]
        np.testing.assert_array_equal(source.labels, labels[rows])
        x = whole.representation[rows]
        return Features(x, x, None, None, source.labels)

    fake: Any = extract
    found = shifted.shifted_results(
        settings, fake, None, train=train, class_names=None, probe=probe, without={}
    )
    numbers = {one["name"]: one["value"] for one in found}
    weights, bias, mean, std = (
        np.asarray(part, np.float64)
        for part in (probe.weights, probe.bias, probe.feature_mean, probe.feature_std)
    )
    logits = (whole.representation - mean) / std @ weights + bias
    linear = 10 * np.argmax(logits, axis=1) == labels
    bank, queries = (
        x / np.linalg.norm(x, axis=1, keepdims=True)
        for x in (train.representation.astype(np.float64), whole.representation.astype(np.float64))
    )
    nearest = train.labels[np.argmax(queries @ bank.T, axis=1)] == labels
    assert not linear[7]
    assert not nearest[7]
    assert set(numbers) == {
        f"{measure}_{where}"
        for measure in ("knn_1_accuracy", "linear_accuracy")
        for where in ("on_noise_1", "on_noise_2", "shifted")
    }
    for measure, is_right in (("knn_1_accuracy", nearest), ("linear_accuracy", linear)):
        parts = [is_right[:20].mean(), is_right[20:].mean()]
        assert numbers[f"{measure}_on_noise_1"] == pytest.approx(parts[0])
        assert numbers[f"{measure}_on_noise_2"] == pytest.approx(parts[1])
        assert numbers[f"{measure}_shifted"] == pytest.approx(np.mean(parts))
    assert all("noise" in one["protocol"] for one in found)


def test_classes_of_shifted_sets_are_matched_by_name():
    images = np.zeros((4, 8, 8, 3), np.uint8)
    source = ArraySource(images, np.array([0, 1, 1, 0]), ("cat", "dog"), name="sketches")
    np.testing.assert_array_equal(
        shifted.training_labels(source, ("dog", "bird", "cat")), [2, 0, 0, 2]
    )
    for names in (None, ("cat", "dog")):
        np.testing.assert_array_equal(shifted.training_labels(source, names), source.labels)
    unnamed = ArraySource(images, np.array([0, 1, 1, 0]))
    np.testing.assert_array_equal(shifted.training_labels(unnamed, ("a", "b")), [0, 1, 1, 0])
    with pytest.raises(ValueError, match=r"1 classes of sketches are no training .*\['dog'\]"):
        shifted.training_labels(source, ("cat", "bird"))
    with pytest.raises(ValueError, match="has no labels"):
        shifted.training_labels(ArraySource(images), ("cat", "bird"))


@pytest.mark.slow
def test_every_number_has_its_protocol_and_its_untrained_pair():
    found = results()
    assert set(found) == {"split", "left_out", "trained", "untrained"}
    assert found["left_out"] == {}
    # These variables are the untrained ones.
    assert [r["value"] for r in found["trained"]] == [r["value"] for r in found["untrained"]]
    names = [(r["name"], r["features"]) for r in found["trained"]]
    assert len(names) == len(set(names)) == 12
    for result in found["trained"]:
        assert 0 <= result["value"] <= 1
        assert "70" in result["protocol"], result
        assert "test" in result["protocol"]
    few = [r for r in found["trained"] if "3_labels" in r["name"]]
    assert all("mean of 2 seeds" in r["protocol"] for r in few)
    console = Console(record=True, width=160)
    console.print(tables.classification_table(found))
    text = console.export_text()
    assert text.count("accuracy") == 10
    assert f"{found['trained'][0]['value']:.4f}" in text


@pytest.mark.slow
def test_validation_score_for_the_best_checkpoint():
    experiment = tiny()
    variables = experiment.initial_state().evaluation_variables
    extract = evaluate.make_extractors(experiment).plain
    scores = evaluate.validation_knn(experiment, variables, extract)
    assert list(scores) == ["knn_5_accuracy", "knn_20_accuracy", "knn_10_uniform_accuracy"]
    score = scores["knn_5_accuracy"]
    train, validation, _ = features()
    assert score * len(validation.labels) == pytest.approx(round(score * len(validation.labels)))
    assert score != pytest.approx(value("knn_5_accuracy", "representation"), abs=1e-9)
    assert score > 1.5 / (train.labels.max() + 1) / 2


def synthetic(labels: Any, *, test_labels: Any = None) -> tuple[Dataset, Any]:
    """A data set of black images, and features that separate its classes."""
    centers = np.random.default_rng(0).normal(size=(40, 6)) * 10

    def source(labels: Any) -> ArraySource:
        return ArraySource(np.zeros((len(labels), 2, 2, 1), np.uint8), np.asarray(labels))

    def extract(_: Any, of: Any) -> Any:
        rng = np.random.default_rng(len(of))
        classes = np.unique(labels, return_inverse=True)[0]
        x = centers[np.searchsorted(classes, of.labels)] + rng.normal(size=(len(of), 6))
        x = x.astype(np.float32)
        return Features(x, x, None, None, of.labels)

    test = source(labels if test_labels is None else test_labels)
    return Dataset(train=source(labels), validation=source(labels), test=test), extract


SETTINGS = EvaluationSection(
    split="test",
    batch_size=8,
    knn_k=(3,),
    knn_temperature=0.1,
    knn_uniform_k=(2,),
    l2_grid=(1e-2,),
    labels_per_class=4,
    few_label_seeds=2,
    compare_untrained=False,
)


def transfer_values(settings: EvaluationSection, dataset: Any, extract: Any) -> dict[str, float]:
    found = evaluate.evaluate_transfer(settings, extract, None, dataset)
    return {r["name"]: r["value"] for r in found["trained"] if r["features"] == "embedding"}


def test_a_probe_that_did_not_converge_says_so(monkeypatch):
    dataset, extract = synthetic(np.arange(60) % 3)
    train, test = extract(None, dataset.train), extract(None, dataset.test)
    settings = dataclasses.replace(SETTINGS, labels_per_class=0)
    stopped = functools.partial(linear_probe.select_linear_probe, max_iterations=2)
    protocols = []
    for select in (linear_probe.select_linear_probe, stopped):
        monkeypatch.setattr(linear_probe, "select_linear_probe", select)
        _, (row,) = accuracy.linear_results("representation", settings, train, train, test, {})
        protocols.append(row["protocol"])
    whole, cut = protocols
    assert whole.endswith("evaluated on test (60)")
    assert cut == f"{whole}, stopped after 2 iterations"


@pytest.mark.slow
def test_rare_classes_and_sparse_numbers_leave_out_one_row_and_change_no_other():
    labels = np.concatenate([np.arange(60) % 3, np.full(3, 3)])
    whole = transfer_values(dataclasses.replace(SETTINGS, labels_per_class=2), *synthetic(labels))
    assert set(whole) == {
        "knn_3_accuracy",
        "knn_2_uniform_accuracy",
        "linear_accuracy",
        "linear_2_labels_per_class_accuracy",
        "r_at_1",
    }
    rare = transfer_values(SETTINGS, *synthetic(labels))
    assert set(rare) == {"knn_3_accuracy", "knn_2_uniform_accuracy", "linear_accuracy", "r_at_1"}
    assert rare.items() <= whole.items()
    sparse = labels * 2_700_001 + 5
    assert transfer_values(SETTINGS, *synthetic(sparse)) == rare
    # A test class that the training images lack is never right, and nothing else changes.
    dataset, extract = synthetic(labels)
    unknown = ArraySource(np.zeros((63, 2, 2, 1), np.uint8), labels + 7 * (labels == 1))
    base = extract

    def lacking(variables: Any, of: Any) -> Any:
        return base(variables, dataset.test)._replace(labels=of.labels)

    found = evaluate.evaluate_transfer(
        SETTINGS,
        lambda v, of: lacking(v, of) if of is unknown else base(v, of),  # pyright: ignore[reportArgumentType]
        None,
        dataset._replace(test=unknown),
    )
    values = {r["name"]: r["value"] for r in found["trained"] if r["features"] == "embedding"}
    # R@1 compares test images with each other and reads no label of a training image.
    assert values.pop("r_at_1") == rare.pop("r_at_1")
    assert values == {name: pytest.approx(value - 20 / 63) for name, value in rare.items()}


def test_what_is_left_out_is_known_from_the_data():
    labels = np.concatenate([np.arange(60) % 3, np.full(3, 3)])
    dataset, _ = synthetic(labels)
    settings = dataclasses.replace(SETTINGS, knn_k=(3, 64), knn_uniform_k=(70,))
    reasons = accuracy.left_out(settings, dataset)
    few_labels = "linear_4_labels_per_class_accuracy"
    assert set(reasons) == {"knn_64_accuracy", "knn_70_uniform_accuracy", few_labels}
    assert "class 3 has 3 training images, and 1 of 4 classes" in reasons[few_labels]
    line, _ = accuracy.left_out_lines(reasons)
    assert line == (
        "Not evaluated: knn_64_accuracy, knn_70_uniform_accuracy: there are 63 training images."
    )
    assert accuracy.why_no_knn(settings, dataset) == ""
    few = dataclasses.replace(settings, knn_k=(64, 3))
    assert accuracy.why_no_knn(few, dataset) == "there are 63 training images"
    assert accuracy.left_out(dataclasses.replace(SETTINGS, labels_per_class=3), dataset) == {}
    one_class, one_extract = synthetic(np.zeros(20, int))
    assert set(accuracy.left_out(SETTINGS, one_class)) == {"knn_accuracy", "linear_accuracy"}
    with pytest.raises(ValueError, match=r"nothing can be evaluated on .* one class, 0"):
        evaluate.evaluate_transfer(SETTINGS, one_extract, None, one_class)
    images = ArraySource(np.zeros((9, 2, 2, 1), np.uint8))
    unlabeled = Dataset(train=images, validation=images, test=None)
    assert set(accuracy.left_out(SETTINGS, unlabeled)) == {
        "split",
        "knn_accuracy",
        "linear_accuracy",
    }
    assert accuracy.evaluated_split(SETTINGS, unlabeled) == ("validation", images)
    with pytest.raises(ValueError, match=r"has no test part.*set evaluation.split"):
        accuracy.evaluated_split(SETTINGS, dataset._replace(test=None))


def test_a_section_alone_is_checked():
    for wrong in ({"knn_k": ()}, {"l2_grid": (-1.0,)}, {"few_label_seeds": 0}):
        with pytest.raises(ValueError, match=f"evaluation.{next(iter(wrong))} must"):
            read.evaluation_section(vars(SETTINGS) | wrong)
