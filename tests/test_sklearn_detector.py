"""The estimator against scikit-learn's own checks and its own detectors."""

import numpy as np
import pytest
from sklearn.covariance import EmpiricalCovariance
from sklearn.decomposition import PCA
from sklearn.exceptions import NotFittedError
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.utils.estimator_checks import parametrize_with_checks

from jevb_jax.sklearn_detector import LabelFreeDetector


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::jevb_jax.evaluation.detector_input.FewImagesWarning")
@parametrize_with_checks([LabelFreeDetector()])
def test_scikit_learn_s_checks(estimator, check):
    check(estimator)


def rows(seed: int, count: int, shift: float = 0.0) -> np.ndarray:
    mixing = np.random.default_rng(0).normal(size=(8, 8))
    return np.random.default_rng(seed).normal(size=(count, 8)) @ mixing + shift


def held_out(count: int, num: int) -> np.ndarray:
    return np.random.RandomState(0).permutation(count)[:num]


def test_scores_are_those_of_a_covariance_of_the_rows_that_are_not_held_out():
    train, test = rows(1, 400), rows(2, 100)
    detector = LabelFreeDetector().fit(train)
    covariance = EmpiricalCovariance().fit(np.delete(train, held_out(400, 100), axis=0))
    np.testing.assert_allclose(
        -detector.score_samples(test), covariance.mahalanobis(test), rtol=1e-3
    )
    # Of 100 held-out scores, the 96th: (100 + 1) * 0.95 is 95.95.
    scores = np.sort(covariance.mahalanobis(train[held_out(400, 100)]))
    np.testing.assert_allclose(-detector.offset_, scores[95], rtol=1e-3)


@pytest.mark.parametrize("score", ["mahalanobis", "knn", "ssd", "residual"])
def test_false_alarms_and_outliers(score):
    detector = LabelFreeDetector(score, false_alarm_rate=0.1, num_neighbors=5).fit(rows(1, 800, 5))
    assert np.mean(detector.predict(rows(2, 4000, 5)) == -1) == pytest.approx(0.1, abs=0.05)
    values = detector.decision_function(np.concatenate([rows(3, 50, 5), rows(4, 50, -9)]))
    assert roc_auc_score(np.arange(100) < 50, values) > 0.9


def test_more_neighbors_than_rows_are_as_many_as_there_can_be():
    few = rows(1, 60)  # 45 are fitted
    assert LabelFreeDetector("knn", num_neighbors=500).fit(few).detector_.score_name == "knn_45"


def test_in_a_pipeline_and_a_grid_search():
    pipeline = make_pipeline(PCA(4), LabelFreeDetector())
    mixed = np.concatenate([rows(5, 100), rows(6, 100, 20.0)])
    labels = np.repeat([1, -1], 100)

    def auroc(estimator, *_):
        return roc_auc_score(labels, estimator.decision_function(mixed))

    grid = {"labelfreedetector__score_name": ["norm", "mahalanobis"]}
    search = GridSearchCV(pipeline, grid, scoring=auroc, cv=2).fit(rows(1, 200))
    assert search.best_params_ == {"labelfreedetector__score_name": "mahalanobis"}
    assert set(search.predict(mixed)) <= {1, -1}


def test_mistakes_are_named():
    with pytest.raises(NotFittedError):
        LabelFreeDetector().predict(rows(1, 3))
    with pytest.raises(ValueError, match="score_name must be one of"):
        LabelFreeDetector("mahalonobis").fit(rows(1, 30))
    with pytest.raises(ValueError, match="false_alarm_rate must be in"):
        LabelFreeDetector(false_alarm_rate=5.0).fit(rows(1, 30))
    with pytest.raises(ValueError, match=r"^num_neighbors must be at least 1, got 0"):
        LabelFreeDetector(num_neighbors=0).fit(rows(1, 30))
    with pytest.raises(ValueError, match=r"^num_clusters must be at least 1, got 0"):
        LabelFreeDetector(num_clusters=0).fit(rows(1, 30))
    with pytest.raises(ValueError, match="minimum of 3 is required"):
        LabelFreeDetector().fit(rows(1, 2))
    few = LabelFreeDetector().fit(rows(1, 30))  # eight are held out, and 19 are needed
    assert few.offset_ == few.score_samples(rows(1, 30)[held_out(30, 8)]).min()
