"""JEVB as a scikit-learn transformer."""

import pickle
from typing import Any

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.exceptions import NotFittedError
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GridSearchCV
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.utils.estimator_checks import parametrize_with_checks

from jevb_jax.sklearn_transformer import JEVBTransformer

SMALL: dict[str, Any] = {"embedding_dim": 8, "hidden_dim": 16, "num_epochs": 2, "batch_size": 64}


@pytest.fixture(scope="module")
def rows() -> np.ndarray:
    digits: Any = load_digits()
    return digits.data[:500]


@pytest.fixture(scope="module")
def fitted(rows) -> JEVBTransformer:
    return JEVBTransformer(**SMALL).fit(rows[:300])


# Each trains several times.
@pytest.mark.slow
@pytest.mark.nightly
@parametrize_with_checks(
    [JEVBTransformer(4, hidden_dim=8, num_epochs=1, batch_size=8)],
    expected_failed_checks=lambda _: {
        "check_methods_subset_invariance": "differs in the last digits of float32"
    },
)
def test_scikit_learn_s_checks(estimator, check):
    check(estimator)


@pytest.mark.slow
def test_embedding_and_score_are_those_of_the_model(fitted, rows):
    new = rows[300:]
    embedding = fitted.transform(new)
    assert embedding.shape == (200, 8)
    np.testing.assert_array_equal(embedding, fitted.model_.embed(new.astype(np.float32)))
    expected = fitted.model_.ood_score(
        new.astype(np.float32), fit_images=rows[:300].astype(np.float32)
    )
    np.testing.assert_allclose(-fitted.score_samples(new), expected, rtol=1e-5)
    assert fitted.model_.posterior(new.astype(np.float32)).mean.shape == (200, 8)
    with pytest.raises(ValueError, match="X has 5 features, but JEVBTransformer is expecting 64"):
        fitted.transform(rows[:, :5])
    assert fitted.n_features_in_ == 64
    assert list(fitted.get_feature_names_out()[:2]) == ["jevbtransformer0", "jevbtransformer1"]


@pytest.mark.slow
def test_strange_rows_have_low_scores(fitted, rows):
    noise = np.random.default_rng(0).uniform(0, 16, (200, 64))
    scores = fitted.score_samples(np.concatenate([rows[300:], noise]))
    assert roc_auc_score(np.arange(400) < 200, scores) > 0.9


@pytest.mark.slow
@pytest.mark.nightly
def test_the_same_seed_gives_the_same_and_a_copy_is_the_same(fitted, rows):
    estimator: Any = clone(fitted)
    again = estimator.fit(rows[:300])
    copied = pickle.loads(pickle.dumps(fitted))
    other: Any = clone(fitted)
    other.set_params(random_state=1).fit(rows[:300])
    for one in (again, copied):
        np.testing.assert_array_equal(one.transform(rows), fitted.transform(rows))
        np.testing.assert_array_equal(one.score_samples(rows), fitted.score_samples(rows))
    assert not np.allclose(other.transform(rows), fitted.transform(rows), atol=1e-3)


@pytest.mark.slow
@pytest.mark.nightly
def test_in_a_pipeline_and_a_grid_search_with_settings_of_the_config(rows):
    digits: Any = load_digits()
    pipeline = make_pipeline(JEVBTransformer(**SMALL), KNeighborsClassifier())
    grid = {"jevbtransformer__config": [{"jevb.df": 3.0}, {"method": "simsiam"}]}
    # SimSiam has no posterior, so the score is one that every method has.
    pipeline.set_params(jevbtransformer__score_name="embedding/mahalanobis")
    search = GridSearchCV(pipeline, grid, cv=2).fit(rows, digits.target[:500])
    assert search.best_score_ > 0.5
    assert np.isfinite(search.cv_results_["mean_test_score"]).all()


def test_mistakes_are_named_before_anything_is_trained(rows):
    with pytest.raises(NotFittedError):
        JEVBTransformer().transform(rows)
    for changed, says in (
        ({"score_name": "jevb/no"}, "score_name must be one of .*jevb/kl"),
        ({"embedding_dim": 2}, r"embedding_dim = 2 must be at least 3"),
        ({"num_epochs": 0}, "num_epochs must be at least 1, got 0"),
        ({"mask_probability": 1.5}, "mask_probability"),
        ({"batch_size": 1}, "batch_size must be at least 2, got 1"),
        ({"learning_rate": "fast"}, "learning_rate"),
    ):
        with pytest.raises((ValueError, TypeError), match=says):
            JEVBTransformer(**{**SMALL, **changed}).fit(rows)
    with pytest.raises(ValueError, match=r"jevb\.no_such is no setting"):
        JEVBTransformer(config={"jevb.no_such": 1}).fit(rows)
    with pytest.raises(ValueError, match="minimum of 8 is required"):
        JEVBTransformer().fit(rows[:7])
    with pytest.raises(ValueError, match="contains NaN"):
        JEVBTransformer().fit(np.where(rows == 0, np.nan, rows))
    with pytest.raises(ValueError, match="beyond float32"):
        JEVBTransformer().fit(rows * 1e39)
