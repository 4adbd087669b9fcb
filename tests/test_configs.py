"""Every config builds, is closed, and its first step is finite."""

import dataclasses
import importlib
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import (
    adjacent,
    continued,
    default,
    finetune_default,
    one_class,
    ood,
    recipes,
    transfer,
)
from jevb_jax import methods
from jevb_jax.runs import checkpoints
from jevb_jax.settings import config_versions, read, run_config
from jevb_jax.training import experiment, from_settings
from tests.marks import nightly

ROOT = Path(__file__).resolve().parent.parent
NAMES = sorted(
    path.stem
    for path in (ROOT / "configs").glob("*.py")
    if path.stem not in ("__init__", "ood", "recipes", "saved", "transfer")
    and not path.stem.startswith("finetune_")
)


def names(config: Any) -> set[str]:
    return {key.rsplit(".0", 1)[0] for key in checkpoints.changed_keys({}, config.to_dict())}


CASES = [
    *((name, ()) for name in NAMES),
    *((name, (method,)) for name in ("cifar10", "imagenet") for method in recipes.METHODS),
    *(("continued", (network,)) for network in continued._NETWORKS),
]


def test_settings_that_came_later_are_added_as_json_has_them():
    saved = experiment.to_json_values(default.get_config())
    for section, before in config_versions._BEFORE.items():
        saved[section] = {k: v for k, v in saved[section].items() if k not in before}
    completed = config_versions.completed_config(saved)
    assert completed.keys() == saved.keys()
    assert json.loads(json.dumps(completed)) == completed
    assert completed["evaluation"]["knn_uniform_k"] == []


@pytest.mark.parametrize(("name", "arguments"), CASES)
def test_config_has_the_keys_of_default_and_survives_json(name, arguments, tmp_path):
    config: Any = importlib.import_module(f"configs.{name}").get_config(*arguments)
    assert names(config) == names(default.get_config())
    values = experiment.to_json_values(config)
    (tmp_path / "config.json").write_text(json.dumps(values))
    loaded: Any = run_config.load_config(tmp_path)
    assert loaded.to_dict() == config.to_dict()
    with pytest.raises(AttributeError):
        loaded.optimizer.learning_rat = 1.0


@pytest.mark.parametrize("name", ["finetune_cifar10", "finetune_digits"])
@pytest.mark.parametrize("mode", ["full", "frozen"])
def test_config_of_a_fine_tune_has_the_keys_of_its_default(name, mode):
    config: Any = importlib.import_module(f"configs.{name}").get_config(mode)
    assert names(config) == names(finetune_default.get_config())
    assert config.init.frozen == (mode == "frozen")
    assert names(transfer.get_config()) == names(config.data)


@pytest.mark.parametrize("protocol", ood.PROTOCOLS)
def test_protocol_of_detection_fits_the_section(protocol):
    section: Any = ood.get_config(protocol)
    whole: Any = default.get_config()
    assert set(section.to_dict()) == set(whole.ood.to_dict())
    assert section.outside or section.corruptions
    names = [one["name"] for one in section.outside]
    assert len(set(names)) == len(names)
    assert all({"name", "group", "source", "protocol"} <= one.keys() for one in section.outside)
    if "openood" in protocol:
        assert [one["group"] for one in section.outside].count("near") == 1 + (
            "tfds" not in protocol
        )
        is_by_list = all("list" in one["protocol"] for one in section.outside)
        assert is_by_list
        assert ("not OpenOOD's list" in section.outside[0]["protocol"]) == ("tfds" in protocol)


def test_one_class_names_its_class():
    config: Any = one_class.get_config("cifar10,7")
    assert (config.data.tfds_name, config.data.inlier_class) == ("cifar10", 7)
    for bad in ("digits", "svhn,1", "digits,x"):
        with pytest.raises(ValueError, match="expected digits or cifar10, a comma and a class"):
            one_class.get_config(bad)
    with pytest.raises(ValueError, match="protocol must be one of"):
        ood.get_config("imagenet")


def test_adjacent_leaves_a_quarter_of_the_classes_outside():
    drawn = set()
    for seed in range(20):
        inside = adjacent.inside_classes(10, seed)
        assert len(set(inside)) == 8
        assert set(inside) <= set(range(10))
        assert inside == tuple(sorted(inside))
        drawn.add(inside)
    assert len(drawn) > 5
    assert [len(adjacent.inside_classes(n, 0)) for n in (2, 3, 100)] == [1, 2, 75]
    config: Any = adjacent.get_config("digits,3")
    assert config.data.inlier_classes == adjacent.inside_classes(10, 3)
    dataset: Any = experiment.build_experiment(config).dataset
    assert set(np.unique(dataset.train.labels)) == set(config.data.inlier_classes)
    for bad in ("digits", "svhn,1", "digits,x"):
        with pytest.raises(ValueError, match="expected digits or cifar10, a comma and a seed"):
            adjacent.get_config(bad)


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
        ("train.bn_group_size", 100, "bn_group_size = 100 must"),
        ("augmentation.mean", (0.5, 0.5, 0.5), "one value for each"),
        ("augmentation.blur_probability", (0.5,), "for views 1, 3, ... and for views 2, 4"),
        ("optimizer.warmup_epochs", 1000.0, "must be shorter than the run"),
        ("optimizer.name", "adam", "sgd, lars, larc, adamw or muon"),
        ("train.batch_size", 10_000, "10"),
        ("train.target_decay", 1.0, "target_decay"),
        ("jevb.likelihood_scale", "free", "tied, untied or fixed"),
        ("evaluation.split", "train", "test or validation"),
    ],
)
def test_settings_that_do_not_fit_are_named(key, value, message):
    config: Any = importlib.import_module("configs.digits").get_config()
    section, name = key.split(".")
    config[section][name] = value
    with pytest.raises(ValueError, match=message):
        experiment.build_experiment(config)


@pytest.mark.parametrize(
    "method",
    [m if m in ("jevb", "vicreg", "emp_ssl") else nightly(m) for m in recipes.METHODS],
)
@pytest.mark.parametrize("name", ["cifar10", "imagenet"])
def test_recipe_builds_its_own_method(name, method):
    config: Any = importlib.import_module(f"configs.{name}").get_config(method)
    config.data.update({"source": "shapes", "tfds_name": "", "image_size": 16})
    config.data.update({"num_train_examples": 5000, "num_test_examples": 20})
    config.augmentation.crop_from = "square"  # shapes have no files
    config.evaluation.knn_k = (5,)
    built = experiment.build_experiment(config)
    assert built.config["method"] == method
    shapes = jax.eval_shape(built.initial_state)
    assert ("head" in shapes.params) == (method not in ("vicreg", "barlow_twins", "emp_ssl"))
    assert ("raw_radial_scale" in shapes.params) == (method == "jevb")
    assert (shapes.target_params is not None) == (method in ("byol", "jevb"))
    is_normalized = "bn_out" in shapes.batch_stats["projector"]
    assert is_normalized == (method in ("jevb", "simsiam", "vi_simsiam", "fastsiam"))
    num_views = {"fastsiam": 4, "emp_ssl": 20}.get(method, 2)
    assert len(built.view_augmentations) == num_views
    with pytest.raises(ValueError, match="must be one of"):
        importlib.import_module(f"configs.{name}").get_config("moco")


@pytest.mark.parametrize(
    "network", ["resnet18", "timm_vit_tiny", nightly("deit_small"), nightly("dinov2_small")]
)
def test_what_continues_from_weights_has_their_network(network):
    config: Any = continued.get_config(network)
    config.data.train_paths = ("pictures",)
    settings = read.run_settings(experiment.to_json_values(config))
    backbone = from_settings.make_network(settings).backbone
    images = jnp.zeros((1, 224, 224, 3))
    variables = jax.eval_shape(lambda: backbone.init(jax.random.key(0), images, train=False))
    params: Any = variables["params"]
    if "patch_embedding" in params:
        patch = 14 if "dinov2" in network else 16
        assert params["patch_embedding"]["kernel"].shape[:3] == (patch, patch, 3)
        assert params["positions"].shape[:2] == (224 // patch, 224 // patch)
    else:
        assert params["stem_conv"]["kernel"].shape == (7, 7, 3, 64)
    # timm's own ViTs alone were trained with one half; timm's `default_cfg` says so.
    assert (config.augmentation.mean[0] == 0.5) == network.startswith("timm_vit")
    with pytest.raises(ValueError, match=r"must be one of resnet18, .* got 'vit'"):
        continued.get_config("vit")


# The losses of the others, and JEVB's steps, have tests of their own.
@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.parametrize("method", recipes.METHODS)
def test_first_steps_of_every_method(method):
    """The tiny form of each recipe: three finite steps, in which all that should learn moves."""
    config: Any = importlib.import_module("configs.cifar10").get_config(method)
    small: Any = importlib.import_module("configs.smoke").get_config()
    config.data = small.data
    config.augmentation.image_size = 16
    config.model.update({"backbone": "convnet", "width": 4, "projector_hidden_dims": (16,)})
    config.model.update({"embedding_dim": 16, "head_hidden_dim": 8})
    config.augmentation.num_views = min(config.augmentation.num_views, 3)
    config.train.batch_size = 64
    config.optimizer.warmup_epochs = 0.0
    config.evaluation.knn_k = (5,)
    built = experiment.build_experiment(config)
    source = built.dataset.train
    images = jnp.asarray(np.stack([source[i] for i in range(64)]))
    step = jax.jit(built.train_step)
    start = state = built.initial_state()
    for _ in range(3):
        state, metrics = step(state, images, built.key)
        assert all(np.all(np.isfinite(value)) for value in metrics.values()), metrics
    moved = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), start.params, state.params)
    assert all(jax.tree.leaves(moved)), moved


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "moco"}, "method must be one of"),
        ({"method": "byol"}, "needs train.target_decay"),
        ({"method": "vicreg", "train.target_decay": 0.9}, "no target network"),
        ({"augmentation.num_views": 1}, "augmentation.num_views must be an integer of at least 2"),
    ],
)
def test_methods_that_do_not_fit_are_named(changes, message):
    config: Any = importlib.import_module("configs.digits").get_config()
    config.update_from_flattened_dict(changes)
    with pytest.raises(ValueError, match=message):
        experiment.build_experiment(config)


def test_a_method_of_two_views_refuses_more(monkeypatch):
    of_two = dataclasses.replace(methods.METHODS["simsiam"], takes_many_views=False)
    monkeypatch.setitem(methods.METHODS, "simsiam", of_two)
    for name in ("num_views", "num_small_crops"):
        config: Any = importlib.import_module("configs.digits").get_config()
        config.update_from_flattened_dict({"method": "simsiam", f"augmentation.{name}": 3})
        with pytest.raises(ValueError, match=f"ignore all but two views.*{name} = 3"):
            experiment.build_experiment(config)


def test_views_alternate_between_the_two_probabilities():
    config: Any = importlib.import_module("configs.digits").get_config()
    config.augmentation.update(
        {"num_views": 5, "num_small_crops": 2, "blur_probability": (0.1, 0.7)}
    )
    settings = read.run_settings(experiment.to_json_values(config))
    views = from_settings.view_augmentations(settings.augmentation)
    assert [view.blur_probability for view in views] == [0.1, 0.7, 0.1, 0.7, 0.1, 0.1, 0.1]
    assert [view.size == views[0].size for view in views] == [True] * 5 + [False] * 2


def test_workdir_without_a_run(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        run_config.load_config(tmp_path)
