"""The null test: equal images are told apart by no score, and fitted ones are recognized."""

import numpy as np
import pytest

import jevb_jax
from jevb_jax.images.dataset import load_dataset
from studies import null_test


def test_rows_are_of_validation_against_test_images_and_fitted_ones_stand_apart():
    random = np.random.default_rng(0)
    scores = {
        "train": {"a": np.zeros(50), "b": random.normal(size=50)},
        "validation": {"a": np.arange(50.0), "b": random.normal(size=50) - 9},
        "test": {"a": np.arange(50.0), "b": random.normal(size=50)},
    }
    first, second = null_test.null_rows(scores)
    assert first[:2] == ("a", "0.5000")
    assert float(first[2]) < 0.5 < float(first[3])
    assert float(first[4]) == pytest.approx(0.99)
    assert second[:2] == ("b", "1.0000")
    assert float(second[2]) > 0.5
    said = null_test.summary([first, second])
    assert said.startswith("1 of 2 intervals leave 0.5 out (b).")
    assert null_test.summary([first]).startswith("0 of 1 intervals leave 0.5 out.")


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.filterwarnings("ignore::jevb_jax.evaluation.detector_input.FewImagesWarning")
def test_a_split_is_scored_by_what_the_training_images_say(monkeypatch):
    dataset = load_dataset(source="shapes", image_size=16, num_train_examples=1200)
    monkeypatch.setattr(null_test, "load_dataset", lambda **_: dataset)
    scores = null_test.score_splits(jevb_jax.load("jevb-cifar10-resnet8"), 100)
    assert {len(values) for one in scores.values() for values in one.values()} == {100}
    rows = {row[0]: [float(cell) for cell in row[1:]] for row in null_test.null_rows(scores)}
    assert {name.split("/")[0] for name in rows} == {"embedding", "jevb", "probe", "representation"}
    # A covariance of few images knows them well; a norm, which is not fitted, knows none.
    assert rows["embedding/mahalanobis"][3] > 0.8
    assert rows["embedding/norm"][3] < 0.65
    assert abs(rows["embedding/norm"][0] - 0.5) < 0.15
