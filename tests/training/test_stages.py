"""Rates by depth, and frozen stages."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from configs import smoke
from jevb_jax.networks.batch_norm import each_view_alone
from jevb_jax.networks.class_token_vit import ClassTokenViT
from jevb_jax.networks.resnet import ConvNet, ResNet
from jevb_jax.networks.vit import ViT
from jevb_jax.training import experiment, from_settings, optimizers, stages
from tests.marks import nightly

VIT_OPTIONS: Any = {"patch_size": 4, "hidden_size": 8, "depth": 2, "num_heads": 2}
# Each has two stages, or two blocks.
NETWORKS: dict[str, nn.Module] = {
    "resnet": ResNet(stage_sizes=(1, 2), bottleneck=False, stem="cifar", width=4),
    "convnet": ConvNet(widths=(4, 6)),
    "vit": ViT(**VIT_OPTIONS),
    "class_token_vit": ClassTokenViT(**VIT_OPTIONS, num_registers=1),
}
# The first parts of a network that belong to stages 0, 1 and 2, and to none; written out by hand.
PARTS = {
    "resnet": (
        {"stem_conv", "stem_bn"},
        {"stage1_block1"},
        {"stage2_block1", "stage2_block2"},
        set(),
    ),
    "convnet": (
        set(),
        {"conv1_1", "bn1_1", "conv1_2", "bn1_2"},
        {"conv2_1", "bn2_1", "conv2_2", "bn2_2"},
        set(),
    ),
    "vit": ({"patch_embedding"}, {"block1"}, {"block2"}, {"final_norm"}),
    "class_token_vit": (
        {"patch_embedding", "class_token", "positions", "registers"},
        {"block1"},
        {"block2"},
        {"final_norm"},
    ),
}


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def params_of(name: str) -> dict[str, Any]:
    """Ones, in the shapes of a network."""
    images = jnp.zeros((2, 8, 8, 3))
    shapes = jax.eval_shape(lambda: NETWORKS[name].init(jax.random.key(0), images, train=True))
    ones: Any = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), shapes["params"])
    others = {"projector": {"dense1": {"kernel": jnp.ones((2, 2))}}, "head": {"bias": jnp.ones(2)}}
    return {"backbone": ones, **others}


@pytest.mark.parametrize("frozen", [0, 1])
@pytest.mark.parametrize("name", NETWORKS)
def test_steps_shrink_towards_the_first_stage(name, frozen):
    params = params_of(name)
    assert set().union(*PARTS[name]) == set(params["backbone"])
    optimizer = optimizers.make_optimizer(
        name="sgd",
        schedule=optax.constant_schedule(0.5),
        momentum=0.0,
        weight_decay=0.25,
        trust_coefficient=1e-3,
        bias_rate_factor=1.0,
        max_gradient_norm=0.0,
        layer_decay=0.5,
        frozen_stages=frozen,
    )
    gradients = jax.tree.map(jnp.ones_like, params)
    updates: Any = optimizer.update(gradients, optimizer.init(params), params)[0]
    factors = [0.0, 0.0, 1.0, 1.0] if frozen else [0.25, 0.5, 1.0, 1.0]
    for factor, parts in zip(factors, PARTS[name], strict=True):
        for part in parts:
            for path, leaf in jax.tree.leaves_with_path({part: updates["backbone"][part]}):
                is_decayed = leaf.ndim > 1 and part not in ("positions", "registers")
                expected = -0.5 * factor * (1.25 if is_decayed else 1.0)
                np.testing.assert_allclose(leaf, expected, rtol=1e-6, err_msg=str(path))
    np.testing.assert_allclose(updates["projector"]["dense1"]["kernel"], -0.625)
    np.testing.assert_allclose(updates["head"]["bias"], -0.5)


def test_one_and_zero_change_nothing():
    """Not even the structure of the state: old runs go on."""
    keywords: dict[str, Any] = {
        "name": "adamw",
        "schedule": optax.constant_schedule(0.5),
        "momentum": 0.0,
        "weight_decay": 0.25,
        "trust_coefficient": 1e-3,
        "bias_rate_factor": 1.0,
        "max_gradient_norm": 0.0,
    }
    params = params_of("resnet")
    plain = optimizers.make_optimizer(**keywords)
    off = optimizers.make_optimizer(**keywords, layer_decay=1.0, frozen_stages=0)
    assert jax.tree.structure(plain.init(params)) == jax.tree.structure(off.init(params))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adamw", nightly("muon"), nightly("lars")])
def test_positions_and_tokens_are_no_kernels(name):
    """No weight decay, no trust ratio and no orthogonal steps: without a gradient, they stay."""
    params = params_of("class_token_vit")
    optimizer = optimizers.make_optimizer(
        name=name,
        schedule=optax.constant_schedule(0.5),
        momentum=0.0,
        weight_decay=0.25,
        trust_coefficient=1e-3,
        bias_rate_factor=1.0,
        max_gradient_norm=0.0,
    )
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates: Any = optimizer.update(zeros, optimizer.init(params), params)[0]
    moved = updates["backbone"]
    for part in ("positions", "registers", "class_token"):
        np.testing.assert_array_equal(moved[part], 0)
    assert (np.abs(moved["patch_embedding"]["kernel"]) > 0).all()


def test_statistics_of_frozen_stages_are_those_before():
    """A mean over groups of equal numbers may round; this takes the old ones whatever it does."""
    names = ("stem_bn", "stage1_block1", "stage2_block1")
    old: Any = {"backbone": dict.fromkeys(names, 1.0), "projector": {"bn1": 1.0}}
    new = jax.tree.map(lambda value: value + 1e-7, old)
    kept = stages.keep_frozen(old, new, frozen_stages=1)
    assert [kept["backbone"][name] == 1.0 for name in names] == [True, True, False]
    assert kept["projector"] == new["projector"]
    assert stages.keep_frozen(old, new, frozen_stages=0) == new


def test_a_fine_tune_has_stages_too():
    tree = {"backbone": {"stage3_block1": {"conv1": {"kernel": 1}}}, "kernel": 1}
    found = {str(path): stages.stage_of(path) for path, _ in jax.tree.leaves_with_path(tree)}
    assert list(found.values()) == [3, None]


@pytest.mark.slow
@pytest.mark.parametrize("name", [name if name == "resnet" else nightly(name) for name in NETWORKS])
def test_a_frozen_network_computes_as_in_evaluation_and_learns_nothing(name):
    module, images = NETWORKS[name], normal(3, 8, 8, 3)
    variables: Any = jax.jit(lambda: module.init(jax.random.key(0), images, train=False))()
    variables = jax.tree.map(lambda leaf: leaf + 0.1, variables)
    frozen = [module.clone(frozen_stages=count) for count in (1, 2)]

    @jax.jit
    def passes(variables: Any) -> Any:
        expected = module.apply(variables, images, train=False)
        whole = frozen[1].apply(variables, images, train=True, mutable=["batch_stats"])
        with each_view_alone(3):  # the same batch as three views of one image
            views = frozen[1].apply(variables, images, train=True, mutable=["batch_stats"])

        def total(params: Any) -> jax.Array:
            given = {**variables, "params": params}
            output: Any = frozen[0].apply(given, images, train=True, mutable=["batch_stats"])[0]
            return (output**2).sum()

        return expected, (whole, views), jax.grad(total)(variables["params"])

    expected, all_frozen, gradient = passes(variables)
    before = variables.get("batch_stats", {})
    for found, kept in all_frozen:
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
        jax.tree.map(np.testing.assert_array_equal, kept.get("batch_stats", {}), before)
    of_stage = [
        [np.abs(leaf).max() for part in parts for leaf in jax.tree.leaves(gradient[part])]
        for parts in PARTS[name]
    ]
    assert not any(of_stage[0] + of_stage[1])
    assert max(of_stage[2]) > 0
    with pytest.raises(ValueError, match=r"frozen_stages must be from 0 to 2, .* got 3"):
        module.clone(frozen_stages=3)


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.parametrize(("group_size", "over_views"), [(2, False), (0, True)])
def test_a_step_leaves_frozen_stages_as_they_are(group_size, over_views):
    config: Any = smoke.get_config()
    config.model.backbone = "resnet8"
    config.init.workdir, config.init.frozen_stages = "runs/x", 2
    config.optimizer.warmup_epochs = 0.0
    config.augmentation.num_views = 3  # a joint pass, in which BatchNorm takes each view alone
    config.train.batch_size = 14
    config.train.bn_group_size, config.train.bn_over_views = group_size, over_views
    made = experiment.build_experiment(config)
    of_run, loaded = made.model, from_settings.make_network(made.settings)
    # A fine-tune trains the loaded encoder whole.
    assert [one.backbone.frozen_stages for one in (of_run, loaded)] == [2, 0]  # pyright: ignore[reportAttributeAccessIssue]
    state = jax.jit(made.initial_state)()
    drawn = jax.tree.map(lambda leaf: leaf + np.abs(normal(*leaf.shape)), state.batch_stats)
    state = state._replace(batch_stats=drawn)
    images = jnp.asarray(np.stack([made.dataset.train[index] for index in range(14)]))
    after, _ = jax.jit(made.train_step)(state, images, made.key)
    changed = {
        jax.tree_util.keystr(path, simple=True, separator="."): not np.array_equal(a, b)
        for (path, a), b in zip(
            jax.tree.leaves_with_path((state.params, state.batch_stats)),
            jax.tree.leaves((after.params, after.batch_stats)),
            strict=True,
        )
    }
    frozen = {name for name in changed if any(s in name for s in ("stem_", "stage1", "stage2"))}
    assert len(frozen) > 20
    assert {name for name, is_changed in changed.items() if not is_changed} == frozen
