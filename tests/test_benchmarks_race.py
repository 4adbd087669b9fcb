"""The race in its small form."""

import json
from typing import Any
from unittest.mock import Mock

import pytest

from benchmarks import race
from jevb_jax.evaluation.evaluate import make_extractors
from jevb_jax.loading import load
from jevb_jax.training.experiment import build_experiment
from jevb_jax.training.loop import RunLoop

STUDY = """
from configs import smoke
from jevb_study.spec import Result, Study

def get_study():
    config = smoke.get_config()
    config.optimizer.warmup_epochs = 0.0
    return Study("tiny", {"jevb": config}, (0,), (Result("k-NN", "knn_20_accuracy"),))
"""


@pytest.mark.slow
@pytest.mark.nightly
def test_the_race_reports_the_accuracy_of_the_last_step_and_counts_the_process(tmp_path):
    study = tmp_path / "tiny.py"
    study.write_text(STUDY)
    out = tmp_path / "race"
    arguments = ["--run=jevb", "--num_epochs=1", "--seeds=3", "--target=0.05", f"--out={out}"]
    assert race.main([f"--study={study}", *arguments]) == 0
    saved = json.loads((out / "race.json").read_text())
    (row,) = saved["tables"][""]
    assert row["seed"] == 3
    assert json.loads((out / "seed_3" / "config.json").read_text())["seed"] == 3
    assert row["steps"] == 10  # of 64 of the 640 images; hardly any is kept for validation
    assert row["reached"] is True
    assert row["seconds"] > 1  # a process cannot import JAX in less
    # The same accuracy from the saved weights, by hand.
    config: Any = race.race_config(str(study), "jevb", num_epochs=1, seed=3)
    dataset: Any = build_experiment(config).dataset
    model = load(out / "seed_3")
    extract = make_extractors(build_experiment(config)).plain
    train, test = (extract(model.variables, source) for source in (dataset.train, dataset.test))
    assert row["accuracy"] == pytest.approx(uniform_knn(train, test, k=10), abs=0.011)
    assert "seconds" in (out / "race.md").read_text()


def uniform_knn(train: Any, test: Any, *, k: int) -> float:
    """By scikit-learn; ties between classes may fall differently."""
    from sklearn.neighbors import KNeighborsClassifier

    classifier = KNeighborsClassifier(k, metric="cosine")
    classifier.fit(train.representation, train.labels)
    return float(classifier.score(test.representation, test.labels))


def test_a_race_that_fails_is_closed_as_the_run_that_it_is(tmp_path, monkeypatch):
    """With the loop's own ending, so that the log and its writers tell of the failure."""
    loop = Mock(spec=RunLoop)
    loop.train.side_effect = RuntimeError("no memory")
    monkeypatch.setattr(race, "RunLoop", Mock(return_value=loop))
    for name in ("run_config", "build_experiment", "pretraining"):
        monkeypatch.setattr(race, name, Mock())
    monkeypatch.setattr(race.accuracy, "evaluated_split", lambda *_: ("test", None))
    with pytest.raises(RuntimeError, match="no memory"):
        race.run(tmp_path)
    loop.close.assert_called_once_with()


def test_an_unknown_run_is_named(tmp_path):
    study = tmp_path / "tiny.py"
    study.write_text(STUDY)
    with pytest.raises(ValueError, match=r"--run must be one of \['jevb'\], got 'byol'"):
        race.race_config(str(study), "byol", num_epochs=None, seed=0)
