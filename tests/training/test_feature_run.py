"""Runs on features of a frozen encoder: settings, networks, and one run from file to verdict."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jevb_jax
from configs import features as config_of_features
from configs import finetune_digits
from jevb_jax import commands, export
from jevb_jax.evaluation import readiness
from jevb_jax.model import Model
from jevb_jax.networks.frozen import FrozenFeatures
from jevb_jax.settings import config_versions, read
from jevb_jax.training import experiment, from_settings, pretraining

WIDTH = 6


def examples(count: int, *, seed: int, shift: float = 0.0, views: int = 0) -> dict[str, Any]:
    """Features around three centers; the last column is constant."""
    draw = np.random.default_rng(seed)
    labels = draw.integers(0, 3, count)
    shape = (count, views, WIDTH) if views else (count, WIDTH)
    centers = 3 * np.random.default_rng(0).normal(size=(3, WIDTH))[labels]
    values = draw.normal(size=shape) + (centers[:, None] if views else centers) + shift
    values[..., -1] = 7
    return {"features": values.astype(np.float32), "labels": labels}


def config_of(directory: Any, *, views: int = 0) -> Any:
    for name, count, shift in (("train", 300, 0), ("test", 80, 0), ("outside", 60, 9.0)):
        made = examples(count, seed=count, shift=shift, views=views)
        np.savez(directory / f"{name}.npz", **made)
    config: Any = config_of_features.get_config()
    config.data.train_paths = (str(directory / "train.npz"),)
    config.data.test_paths = (str(directory / "test.npz"),)
    config.data.validation_fraction = 0.2
    config.model.projector_hidden_dims = (16,)
    config.model.embedding_dim = 4
    config.model.head_hidden_dim = 8
    config.train.batch_size = 64
    config.train.num_epochs = 3
    config.train.steps_per_dispatch = 1
    return config


def outside(directory: Any, **changes: Any) -> dict[str, Any]:
    paths = (str(directory / "outside.npz"),)
    one = {"name": "far", "group": "far", "source": "features", "protocol": "", "paths": paths}
    return one | changes


def test_the_network_standardizes_as_numpy_and_zeroes_a_constant_column():
    values = examples(40, seed=1)["features"]
    mean, std = values.mean(axis=0, dtype=np.float64), values.std(axis=0, dtype=np.float64)
    std[-1] = 0
    statistics = {"mean": jnp.float32(mean), "std": jnp.float32(std)}
    network = FrozenFeatures(num_features=WIDTH)
    seen: Any = network.apply({"batch_stats": statistics}, values + 1, train=False)
    expected = (values[:, :-1] + 1 - mean[:-1]) / std[:-1]
    np.testing.assert_allclose(seen[:, :-1], expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(seen[:, -1], 0)
    kept: Any = FrozenFeatures(num_features=WIDTH, standardize=False).apply(
        {"batch_stats": statistics}, values, train=True
    )
    np.testing.assert_array_equal(kept, values)
    with pytest.raises(ValueError, match=r"expected features \[batch, 6\], got \(40, 5\)"):
        network.apply({"batch_stats": statistics}, values[:, :5], train=False)


@pytest.mark.slow
def test_a_step_changes_weights_and_no_statistics(tmp_path):
    config = config_of(tmp_path, views=3)
    config.train.target_decay = 0.9
    config.optimizer.warmup_epochs = 0.0
    made = experiment.build_experiment(config)
    section = made.settings.feature_views
    assert (section.num_features, section.num_stored_views) == (WIDTH, 3)
    assert made.config["feature_views"]["num_features"] == WIDTH
    train: Any = np.stack([made.dataset.train[i] for i in range(len(made.dataset.train))])
    state = made.initial_state()
    np.testing.assert_allclose(
        state.batch_stats["backbone"]["mean"],
        train.reshape(-1, WIDTH).mean(axis=0, dtype=np.float64),
        rtol=1e-5,
    )
    new, metrics = jax.jit(made.train_step)(state, train[:64], made.key)
    assert np.isfinite(metrics["loss"])
    jax.tree.map(
        np.testing.assert_array_equal,
        new.batch_stats["backbone"],
        state.batch_stats["backbone"],
    )
    assert "backbone" not in new.params
    moved = [
        not np.array_equal(a, b)
        for a, b in zip(jax.tree.leaves(new.params), jax.tree.leaves(state.params), strict=True)
    ]
    assert all(moved)
    model = Model(made.config, state.evaluation_variables, step=0)
    with pytest.raises(ValueError, match=r"the run has 3 stored ones: give features \[N, 3, 6\]"):
        model.ood_score(train[:5, 0], "jevb/kl")


def test_a_run_that_starts_from_another_standardizes_by_its_own_training_split(tmp_path):
    made: Any = experiment.build_experiment(config_of(tmp_path))
    # From the shapes alone: nothing is compiled.
    shapes = jax.eval_shape(made.initial_state)
    drawn = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    columns = {name: jnp.asarray(value) for name, value in made.statistics._asdict().items()}
    drawn.batch_stats["backbone"] = columns
    other = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), drawn)
    start = {"params": other.params, "batch_stats": other.batch_stats}
    state = pretraining.started_from(drawn, start)
    jax.tree.map(np.testing.assert_array_equal, state.batch_stats["backbone"], columns)
    # The views of training, and those of the loaded model, are made with the same statistics.
    saved = from_settings.saved_statistics(made.settings, state.evaluation_variables)
    for view in made.view_augmentations:
        jax.tree.map(np.testing.assert_array_equal, view.statistics, saved)
    jax.tree.map(np.testing.assert_array_equal, state.params, other.params)
    for name in other.batch_stats.keys() - {"backbone"}:
        jax.tree.map(
            np.testing.assert_array_equal, state.batch_stats[name], other.batch_stats[name]
        )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.backbone": "resnet8"}, r'"features" and model.backbone = "identity" need each'),
        ({"data.source": "arrays"}, r'"features" and model.backbone = "identity" need each'),
        ({"augmentation.num_small_crops": 2}, r"num_small_crops = 2 is for images, .* set it to 0"),
        (
            {"ood.corruptions": ("contrast",)},
            r"ood.corruptions .* is for images, .* set it to \(\)",
        ),
        ({"ood.csi_crops": 10}, r"ood.csi_crops = 10 is for images"),
        ({"data.image_size": 32}, r"data.image_size = 32 is for images"),
        ({"data.train_paths": ()}, r"data.train_paths must name .npz or .npy files"),
        ({"init.workdir": "a.safetensors"}, r"features have none: give a run"),
        ({"feature_views.mask_probability": 1.0}, r"mask_probability must be a number in \[0, 1\)"),
        (
            {"feature_views.mask_probability": 0.0, "feature_views.noise_scale": 0.0},
            r"one view of each example, and .* set one of them above 0",
        ),
        ({"feature_views.num_features": 5}, r"num_features = 5, but .*train.npz has 6"),
    ],
)
def test_settings_that_do_not_fit_features(changes, message, tmp_path):
    config = config_of(tmp_path)
    config.update_from_flattened_dict(changes)
    with pytest.raises(ValueError, match=message):
        experiment.build_experiment(config)


def test_other_settings_that_do_not_fit_features(tmp_path):
    config = config_of(tmp_path, views=2)
    config.augmentation.num_views = 3
    with pytest.raises(ValueError, match=r"num_views = 3 needs as many stored views .* has 2"):
        experiment.build_experiment(config)
    config.augmentation.num_views = 2
    config.ood.outside = (outside(tmp_path, source="arrays"),)
    with pytest.raises(
        ValueError, match=r"ood.outside\[0\].source = 'arrays', but the data are fea"
    ):
        experiment.build_experiment(config)
    config.ood.outside = (outside(tmp_path),)
    np.savez(tmp_path / "outside.npz", features=examples(9, seed=1)["features"])
    with pytest.raises(ValueError, match=r"'far': its features are \(6,\), .* are \(2, 6\)"):
        readiness.check(experiment.build_experiment(config))
    finetune: Any = finetune_digits.get_config("full")
    finetune.init.workdir = "encoder"
    finetune.data.source, finetune.data.train_paths = "features", ("a.npz",)
    with pytest.raises(ValueError, match=r"'features' is for train.py: a fine-tune needs images"):
        read.finetune_settings(experiment.to_json_values(finetune))
    config = experiment.to_json_values(config_of(tmp_path))
    old = {name: section for name, section in config.items() if name != "feature_views"}
    completed = config_versions.saved_config(old, "config.json")
    assert completed["feature_views"] == config["feature_views"]
    assert dataclasses.asdict(read.saved_settings(completed).feature_views)["standardize"]


@pytest.mark.slow
@pytest.mark.nightly
def test_a_run_from_files_to_verdicts(tmp_path):
    config = config_of(tmp_path)
    config.ood.outside = (outside(tmp_path),)
    config.evaluation.update({"compare_untrained": False, "l2_grid": (1e-3,)})
    config.evaluation.update({"labels_per_class": 0, "knn_k": (5,), "knn_uniform_k": ()})
    config.train.health_every_steps = 0
    config.ood.update({"num_views": 2, "num_samples": 2, "ssd_clusters": (1,), "num_bootstrap": 2})
    run = tmp_path / "run"
    assert commands.train(config, run)
    assert (run / "report.html").exists()
    assert not (run / "views.png").exists()
    model = jevb_jax.load(run)
    assert (model.num_features, model.image_size) == (WIDTH, 0)
    assert "features 6" in repr(model)
    inside, strange = examples(90, seed=5)["features"], examples(90, seed=6, shift=9)["features"]
    assert model.embed(inside).shape == (90, 4)
    np.testing.assert_allclose(model.embed(inside[3]), model.embed(inside)[3], atol=1e-5)
    assert (model.posterior(inside).scale > 0).all()
    for score in (None, "representation/mahalanobis"):
        assert model.ood_score(inside, score).shape == (90,)
    detector = model.detector(0.1, "representation/mahalanobis")
    assert detector.is_outside(strange).mean() > 0.9
    assert detector.is_outside(inside).mean() < 0.4
    for bad, message in ((inside[:, :5], "trained on 6 features"), (inside * np.nan, "row 0")):
        with pytest.raises(ValueError, match=message):
            model.embed(bad)
    export.export_model(model, tmp_path / "export")
    served = export.read_serving(tmp_path / "export").call(inside)
    np.testing.assert_allclose(served["embedding"], model.embed(inside), atol=1e-5)
    with pytest.raises(ValueError, match="no height and width"):
        export.export_model(model, tmp_path / "other", height=8)
