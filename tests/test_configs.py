"""Every config builds, is closed, and its first step is finite."""

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from configs import default
from jevb_jax import checkpoints, experiment, runner

ROOT = Path(__file__).resolve().parent.parent
NAMES = sorted(path.stem for path in (ROOT / "configs").glob("*.py") if path.stem != "__init__")


def names(config: Any) -> set[str]:
    return {key.rsplit(".0", 1)[0] for key in checkpoints.changed_keys({}, config.to_dict())}


@pytest.mark.parametrize("name", NAMES)
def test_config_has_the_keys_of_default_and_survives_json(name, tmp_path):
    config: Any = importlib.import_module(f"configs.{name}").get_config()
    assert names(config) == names(default.get_config())
    values = experiment.to_json_values(config)
    (tmp_path / "config.json").write_text(__import__("json").dumps(values))
    loaded: Any = runner.load_config(tmp_path)
    assert loaded.to_dict() == config.to_dict()
    with pytest.raises(AttributeError):
        loaded.optimizer.learning_rat = 1.0


def test_digits_experiment_is_consistent():
    config: Any = importlib.import_module("configs.digits").get_config()
    built = experiment.build_experiment(config)
    assert built.num_train_steps == built.steps_per_epoch * config.train.num_epochs
    images = built.dataset.train[0]
    assert images.shape == (8, 8, 1)
    # The normalisation of the config is that of the data.
    source = built.dataset.train
    pixels = np.stack([source[i] for i in range(len(source))]) / 255
    np.testing.assert_allclose(pixels.mean(), config.augmentation.mean[0], atol=0.01)
    np.testing.assert_allclose(pixels.std(), config.augmentation.std[0], atol=0.01)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("train.batch_size", 1, "at least 2"),
        ("train.num_micro_batches", 3, "must divide"),
        ("augmentation.mean", (0.5, 0.5, 0.5), "one value for each"),
        ("augmentation.blur_probability", (0.5,), "each of the"),
        ("optimizer.warmup_epochs", 1000.0, "must be shorter than the run"),
        ("optimizer.name", "adam", "sgd, lars or adamw"),
        ("train.batch_size", 10_000, "10"),
    ],
)
def test_settings_that_do_not_fit_are_named(key, value, message):
    config: Any = importlib.import_module("configs.digits").get_config()
    section, name = key.split(".")
    config[section][name] = value
    with pytest.raises(ValueError, match=message):
        experiment.build_experiment(config)


def test_workdir_without_a_run(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        runner.load_config(tmp_path)
