import dataclasses
import functools
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from jevb_jax import methods
from jevb_jax.images import arrays
from jevb_jax.images.augmentations import ViewAugmentation
from jevb_jax.networks import batch_norm
from jevb_jax.networks.joint import make_model
from jevb_jax.paper.likelihood import Likelihood
from jevb_jax.training import optimizers
from jevb_jax.training.optimizers import EarlierLength
from jevb_jax.training.step import (
    TrainState,
    apply_views,
    compiled_init,
    make_train_chunk,
    train_step,
)
from tests.marks import nightly

VIEW = ViewAugmentation(
    size=8,
    mean=(0.3,),
    std=(0.4,),
    crop_scale=(0.5, 1.0),
    jitter_probability=0,  # color takes long to compile and has tests of its own
    grayscale_probability=0,
)
SETTINGS = methods.JevbSettings(
    likelihood=Likelihood(df=5.0, radial_df=5.0, radial_scale=0.5),
    prior_scale=1.0,
    num_samples=1,
    kl_weight=1.0,
    radial_weight=1.0,
    location="sample",
    fixed_scale=None,
    kl_warmup_steps=0,
)


@functools.cache
def model():
    return make_model(
        backbone="convnet",
        width=4,
        stem="cifar",
        patch_size=4,
        projector_hidden_dims=(16,),
        projector_normalizes_output=True,
        embedding_dim=8,
        head="posterior",
        head_input="direction",
        zero_init_residual=False,
        batch_norm="fused",
        head_hidden_dim=8,
        initial_scale=1.0,
        min_scale=1e-3,
        isotropic=False,
        has_likelihood_scale=False,
        initial_radial_scale=0.5,
        dtype="float32",
    )


def step_function(**overrides: Any):
    keywords: dict[str, Any] = {
        "model": model(),
        "optimizer": optax.sgd(0.1),
        "view_augmentations": (VIEW, VIEW),
        "method": functools.partial(methods.jevb, settings=SETTINGS),
    }
    return functools.partial(train_step, **(keywords | overrides))


@functools.cache
def initial_state(ema_decay: float = 0.0) -> TrainState:
    init = compiled_init(model(), optax.sgd(0.1), (8, 8, 1), ema_decay=ema_decay)
    return init(jax.random.key(1))


@functools.cache
def images() -> jax.Array:
    return jnp.asarray(arrays.digits().images[:32])


def largest_difference(a: Any, b: Any) -> float:
    return max(
        float(jnp.max(jnp.abs(x - y)))
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


@functools.cache
def first_step() -> tuple[TrainState, dict[str, jax.Array]]:
    step = jax.jit(step_function(ema_decay=0.9))
    return step(initial_state(0.9), images(), jax.random.key(0))


@pytest.mark.slow
@pytest.mark.nightly
def test_loss_is_the_negative_weighted_elbo_per_dimension():
    state, metrics = first_step()
    # With both weights one, the objective is the bound.
    np.testing.assert_allclose(metrics["loss"], -metrics["elbo"] / 8, rtol=1e-6)
    total = metrics["directional_log_likelihood"] + metrics["radial_log_likelihood"] - metrics["kl"]
    np.testing.assert_allclose(metrics["elbo"], total, rtol=1e-5)
    assert int(state.step) == 1
    assert float(metrics["radial_scale"]) == pytest.approx(0.5, rel=1e-5)
    changed = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), state.params, initial_state().params)
    assert changed["raw_radial_scale"]


@pytest.mark.slow
def test_the_relative_step_is_how_far_the_parameters_moved():
    before, (after, metrics) = initial_state(0.9), first_step()
    start, end = (
        np.concatenate([np.ravel(x).astype(np.float64) for x in jax.tree.leaves(state.params)])
        for state in (before, after)
    )
    expected = np.linalg.norm(end - start) / np.linalg.norm(start)
    assert expected > 1e-4
    np.testing.assert_allclose(metrics["relative_step"], expected, rtol=1e-4)


@pytest.mark.slow
def test_ema_is_the_recursion():
    before, (after, _) = initial_state(0.9), first_step()
    expected = jax.tree.map(lambda a, b: 0.9 * a + 0.1 * b, before.params, after.params)
    assert largest_difference(expected, after.ema_params) < 1e-6
    assert after.evaluation_variables["params"] is after.ema_params
    assert initial_state().evaluation_variables["params"] is initial_state().params


@pytest.fixture
def frozen_statistics(monkeypatch):
    """A step whose BatchNorm uses its running statistics."""

    def apply_frozen(*args: Any, train: bool, **keywords: Any) -> Any:
        assert train
        return apply_views(*args, train=False, **keywords)

    monkeypatch.setattr("jevb_jax.training.step.apply_views", apply_frozen)


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.usefixtures("frozen_statistics")
def test_micro_batches_change_nothing_when_statistics_are_frozen():
    whole, parts = (
        jax.jit(step_function(num_micro_batches=count))(
            initial_state(), images(), jax.random.key(0)
        )
        for count in (1, 4)
    )
    # Means of means in float32: a few rounding errors of the gradient, times the learning rate.
    assert largest_difference(whole[0].params, parts[0].params) < 1e-6
    for name in whole[1]:
        if name != "embedding_std":  # a statistic of the micro-batch
            np.testing.assert_allclose(parts[1][name], whole[1][name], rtol=2e-5, err_msg=name)


@pytest.mark.slow
@pytest.mark.nightly
def test_micro_batches_normalise_by_themselves():
    step = jax.jit(step_function(num_micro_batches=4))
    parts, _ = step(initial_state(), images(), jax.random.key(0))
    assert largest_difference(parts.params, first_step()[0].params) > 1e-5


@pytest.mark.slow
@pytest.mark.nightly
def test_micro_batches_are_written_out_on_one_cpu_device(monkeypatch):
    convolutions, steps = [], []
    for count in (8, 1):
        monkeypatch.setattr(jax, "device_count", lambda count=count: count)
        step = step_function(num_micro_batches=2)
        compiled = jax.jit(step).lower(initial_state(), images(), jax.random.key(0)).compile()
        text = compiled.as_text()
        assert text is not None
        convolutions.append(text.count("convolution("))
        steps.append(compiled(initial_state(), images(), jax.random.key(0)))
    assert convolutions[1] == 2 * convolutions[0] > 0
    assert largest_difference(steps[1][0].params, steps[0][0].params) < 1e-6
    assert largest_difference(steps[1][0].batch_stats, steps[0][0].batch_stats) < 1e-6
    np.testing.assert_allclose(steps[1][1]["loss"], steps[0][1]["loss"], rtol=2e-5)


@pytest.mark.usefixtures("optimized")
def test_steps_are_compiled_with_the_options_for_gradients(monkeypatch):
    def convolve(state: Any, images: Any, key: Any) -> Any:
        del key
        kernel = jnp.ones((3, 3, 1, 8))
        views = jax.lax.conv_general_dilated(
            images.astype(jnp.float32),
            kernel,
            (1, 1),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return state, {"loss": jnp.mean(views), "gradient_norm": jnp.float32(1)}

    kernels = []
    for count in (1, 8):
        monkeypatch.setattr(jax, "device_count", lambda count=count: count)
        chunk: Any = make_train_chunk(convolve)
        rows = jnp.arange(len(images()))[None]
        lowered = chunk.lower(jnp.zeros(3), images(), rows, jnp.int32(1), jax.random.key(0))
        text = lowered.compile().as_text()
        assert text is not None
        kernels.append(text.count("ynn"))
    assert kernels[0] == 0 < kernels[1]


@pytest.mark.slow
def test_batch_norm_in_groups_is_the_network_on_each_group():
    state = initial_state()
    views = [jax.random.normal(jax.random.key(seed), (32, 8, 8, 1)) for seed in range(2)]
    apply = jax.jit(
        functools.partial(apply_views, model(), state.params, train=True),
        static_argnames="bn_group_size",
    )
    outputs, batch_stats = apply(state.batch_stats, views, bn_group_size=16)
    expected = state.batch_stats
    for view, output in zip(views, outputs, strict=True):
        alone = [apply(expected, [group]) for group in jnp.split(view, 2)]
        embeddings = np.concatenate([found[0].embedding for found, _ in alone])
        np.testing.assert_allclose(output.embedding, embeddings, atol=1e-5)
        scales = np.concatenate([found[0].prediction.posterior_scale for found, _ in alone])
        np.testing.assert_allclose(output.prediction.posterior_scale, scales, rtol=1e-5)
        expected = jax.tree.map(lambda *stats: sum(stats) / 2, *[stats for _, stats in alone])
    assert largest_difference(batch_stats, expected) < 1e-6
    whole, _ = apply(state.batch_stats, views)
    assert largest_difference(whole[0].embedding, outputs[0].embedding) > 0.01


class TwoNorms(nn.Module):
    """A layer and both kinds of BatchNorm, as small as an oracle in NumPy can be."""

    @nn.compact
    def __call__(self, x: Any, *, train: bool) -> dict[str, Any]:
        dense = nn.Dense(3, name="dense")(x)
        ours = batch_norm.BatchNorm(0.9, 1e-5, jnp.float32, relu=False, name="ours")
        flax = nn.BatchNorm(not train, momentum=0.8, use_scale=False, name="flax")
        return {"out": flax(jnp.square(ours(dense, train=train)))}


def two_norms(weights: Any, stats: Any, batches: Any) -> Any:
    """`TwoNorms` on batches one after another, each normalized by itself: NumPy, float64."""
    stats, outputs = {name: dict(one) for name, one in stats.items()}, []
    for batch in batches:
        x = np.asarray(batch, np.float64) @ np.asarray(weights["dense"]["kernel"], np.float64)
        for name, momentum in (("ours", 0.9), ("flax", 0.8)):
            mean, var = x.mean(0), x.var(0)
            for kind, new in (("mean", mean), ("var", var)):
                stats[name][kind] = momentum * stats[name][kind] + (1 - momentum) * new
            x = (x - mean) / np.sqrt(var + 1e-5)
            x = x**2 if name == "ours" else x
        outputs.append(x)
    return outputs, stats


@pytest.mark.parametrize("bn_over_views", [False, True])
def test_views_of_one_size_in_one_batch_are_the_oracle(bn_over_views):
    views = [np.random.default_rng(v).normal(v, 1 + v, (6, 4)).astype(np.float32) for v in range(4)]
    network: Any = TwoNorms()
    variables = network.init(jax.random.key(0), views[0], train=True)
    params, stats = variables["params"], variables["batch_stats"]
    expected, running = two_norms(
        params, stats, [np.concatenate(views)] if bn_over_views else views
    )
    if bn_over_views:
        expected = np.split(expected[0], 4)
    calls = []

    def apply(*arguments: Any, **keywords: Any) -> Any:
        calls.append(arguments[1].shape)
        return network.apply(*arguments, **keywords)

    spied: Any = SimpleNamespace(apply=apply)
    found: Any = apply_views(
        spied,
        params,
        stats,
        [jnp.asarray(view) for view in views],
        train=True,
        bn_over_views=bn_over_views,
    )
    assert calls == [(24, 4)]
    for output, wanted in zip(found[0], expected, strict=True):
        np.testing.assert_allclose(output["out"], wanted, atol=2e-5)
    for name in ("ours", "flax"):
        for kind, value in running[name].items():
            np.testing.assert_allclose(found[1][name][kind], value, rtol=2e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.nightly
def test_gradients_of_views_in_one_batch_are_those_of_a_pass_each():
    views = [jax.random.normal(jax.random.key(v), (6, 4)) * (1 + v) for v in range(3)]
    network: Any = TwoNorms()
    variables = network.init(jax.random.key(0), views[0], train=True)

    def total(params: Any, passes: Any) -> Any:
        outputs: list[Any] = []
        for one in passes:
            outputs += apply_views(network, params, variables["batch_stats"], one, train=True)[0]
        return sum(jnp.sum(jnp.sin(output["out"] + v)) for v, output in enumerate(outputs))

    joint, apart = (
        jax.grad(total)(variables["params"], passes) for passes in ([views], [[v] for v in views])
    )
    assert largest_difference(joint, apart) < 2e-5
    assert largest_difference(joint, jax.tree.map(jnp.zeros_like, joint)) > 0.1


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.parametrize("bn_over_views", [False, nightly(True)])
def test_groups_of_many_views_have_all_views_of_their_examples(bn_over_views):
    state = initial_state()
    views = [jax.random.normal(jax.random.key(seed), (16, 8, 8, 1)) for seed in range(3)]
    run = functools.partial(
        apply_views,
        model(),
        state.params,
        state.batch_stats,
        train=True,
        bn_over_views=bn_over_views,
    )
    grouped, _ = run(views, bn_group_size=8)
    for part in (slice(0, 8), slice(8, 16)):
        alone, _ = run([view[part] for view in views])
        for one, other in zip(grouped, alone, strict=True):
            np.testing.assert_allclose(one.embedding[part], other.embedding, atol=1e-5)


@pytest.mark.parametrize("size", [-8, 1, 5, 64])
def test_groups_that_do_not_divide_are_refused(size):
    with pytest.raises(ValueError, match=rf"bn_group_size = {size} .* divide the 32 examples"):
        step_function(bn_group_size=size)(initial_state(), images(), jax.random.key(0))


def toy_step(state: TrainState, batch: jax.Array, key: jax.Array):
    """A step of the right shape that compiles at once; not finite at step 2 if a pixel says so."""
    noise = jax.random.normal(jax.random.fold_in(key, state.step), (64,))
    pixels = batch.reshape(len(batch), -1).astype(jnp.float32) / 255
    weights = state.params["w"] + 0.1 * jnp.sin(pixels.T @ (pixels @ state.params["w"])) + noise
    bad = jnp.where((state.step == 2) & (batch[0, 0, 0, 0] == 255), jnp.nan, 1.0)
    metrics = {"loss": jnp.sum(weights) * bad, "gradient_norm": jnp.linalg.norm(weights)}
    return state._replace(step=state.step + 1, params={"w": weights * bad}), metrics


def toy_state() -> TrainState:
    return TrainState(jnp.int32(0), {"w": jnp.ones(64)}, {}, (), None, None)


def test_chunks_of_any_length_compute_the_same_bits_as_one():
    key = jax.random.key(0)
    order = np.stack([np.roll(np.arange(32), i)[:16] for i in range(6)]).astype(np.int32)
    chunk = make_train_chunk(toy_step, donate=False)
    whole = chunk(toy_state(), images(), jnp.asarray(order), jnp.int32(6), key)
    state = toy_state()
    losses = []
    for start, count in ((0, 1), (1, 3), (4, 2)):
        rows = np.zeros_like(order)
        rows[:count] = order[start : start + count]
        result = chunk(state, images(), jnp.asarray(rows), jnp.int32(count), key)
        losses += list(np.asarray(result.metrics["loss"])[:count])
        state = result.state
    np.testing.assert_array_equal(losses, whole.metrics["loss"])
    assert largest_difference(state, whole.state) == 0
    # One step a dispatch is the same mathematics, by way of another program.
    state, metrics = toy_state(), {}
    for row in order:
        state, metrics, _ = chunk(state, images(), jnp.asarray(row[None]), jnp.int32(1), key)
    np.testing.assert_allclose(metrics["loss"][0], whole.metrics["loss"][-1], rtol=1e-5)


@pytest.mark.parametrize("chunk_steps", [1, 4])
def test_a_step_that_is_not_finite_is_not_taken(chunk_steps):
    chunk = make_train_chunk(toy_step, donate=False)
    rows = jnp.zeros((chunk_steps, 8), jnp.int32)
    white = jnp.full_like(images(), 255)
    state, finite = toy_state(), []
    for _ in range(4 // chunk_steps):
        state, _, is_finite = chunk(state, white, rows, jnp.int32(chunk_steps), jax.random.key(0))
        finite.append(bool(is_finite))
    assert finite[-1] is False
    assert chunk_steps == 4 or finite[:2] == [True, True]
    assert int(state.step) == 2
    assert bool(jnp.all(jnp.isfinite(state.params["w"])))
    # A dispatch of no steps, as the loop queues behind a bad one, leaves the state as it is.
    after, _, is_finite = chunk(state, white, rows, jnp.int32(0), jax.random.key(0))
    assert bool(is_finite)
    assert largest_difference(after, state) == 0


@pytest.mark.slow
@pytest.mark.nightly
def test_small_crops_train():
    crop = dataclasses.replace(VIEW, size=6)
    _, metrics = jax.jit(step_function(view_augmentations=(VIEW, VIEW, crop)))(
        initial_state(), images(), jax.random.key(0)
    )
    assert np.isfinite(metrics["loss"])


def test_schedule():
    schedule = optimizers.make_schedule(
        learning_rate=2.0, warmup_steps=10, num_steps=110, final_learning_rate=0.5
    )
    steps = np.array([0, 5, 10, 60, 110])
    expected = [0, 1, 2, 0.5 + 1.5 * 0.5, 0.5]
    np.testing.assert_allclose([float(np.asarray(schedule(s))) for s in steps], expected, rtol=1e-6)
    with pytest.raises(ValueError, match="warm-up of 10 steps"):
        optimizers.make_schedule(
            learning_rate=1.0, warmup_steps=10, num_steps=10, final_learning_rate=0
        )


@pytest.mark.parametrize("name", ["sgd", "lars", "adamw"])
def test_weight_decay_spares_biases_batchnorm_and_scalars(name):
    params = {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2), "raw_radial_scale": jnp.ones(())}
    optimizer = optimizers.make_optimizer(
        name=name,
        schedule=optax.constant_schedule(0.1),
        momentum=0.9,
        weight_decay=0.3,
        trust_coefficient=1e-3,
        bias_rate_factor=1.0,
        max_gradient_norm=0.0,
    )
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates: Any = optimizer.update(zeros, optimizer.init(params), params)[0]
    assert float(jnp.max(updates["kernel"])) < 0
    assert float(jnp.abs(updates["bias"]).max()) == 0
    assert float(jnp.abs(updates["raw_radial_scale"])) == 0


def optimizer_updates(
    params: Any, gradients: list[Any], **settings: Any
) -> tuple[list[Any], optax.GradientTransformation]:
    """Updates of consecutive steps; the parameters stay where they are."""
    keywords: dict[str, Any] = {
        "schedule": optax.constant_schedule(0.5),
        "momentum": 0.9,
        "weight_decay": 0.01,
        "trust_coefficient": 0.02,
        "bias_rate_factor": 1.0,
        "max_gradient_norm": 0.0,
    }
    optimizer = optimizers.make_optimizer(**(keywords | settings))
    state = optimizer.init(params)
    updates = []
    for gradient in gradients:
        update, state = optimizer.update(gradient, state, params)
        updates.append(update)
    return updates, optimizer


def random_tree(seed: int, scale: float = 1.0) -> Any:
    rng = np.random.default_rng(seed)
    return {
        "backbone": {"kernel": jnp.asarray(scale * rng.normal(size=(4, 3)), jnp.float32)},
        "head": {
            "kernel": jnp.asarray(scale * rng.normal(size=(3, 2)), jnp.float32),
            "bias": jnp.asarray(scale * rng.normal(size=2), jnp.float32),
        },
    }


@pytest.mark.parametrize("name", ["lars", "larc"])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 100.0])
def test_trust_ratios_are_those_of_the_formulas(name, scale):
    params, gradients = random_tree(0), [random_tree(seed, scale) for seed in (1, 2)]
    rates = [0.5, 0.25]
    schedule = lambda step: jnp.asarray(rates)[step]  # noqa: E731
    updates, _ = optimizer_updates(params, gradients, name=name, schedule=schedule)

    def expected(parameter: Any, steps: list[Any]) -> list[np.ndarray]:
        p = np.asarray(parameter, np.float64)
        momentum, out = np.zeros_like(p), []
        for rate, gradient in zip(rates, steps, strict=True):
            g = np.asarray(gradient, np.float64)
            norm = np.linalg.norm
            if p.ndim > 1 and name == "larc":  # solo-learn: the ratio over the rate, at most one
                ratio = 0.02 * norm(p) / (norm(g) + 0.01 * norm(p))
                g = (g + 0.01 * p) * min(ratio / rate, 1)
            elif p.ndim > 1:  # You et al. 2017, of the decayed gradient
                g = g + 0.01 * p
                g = g * 0.02 * norm(p) / norm(g)
            # Optax's lars has the rate inside the momentum, SGD outside.
            momentum = 0.9 * momentum + (g * rate if name == "lars" else g)
            out.append(-(momentum if name == "lars" else rate * momentum))
        return out

    for part, leaf in (("backbone", "kernel"), ("head", "kernel"), ("head", "bias")):
        wanted = expected(params[part][leaf], [g[part][leaf] for g in gradients])
        for update, value in zip(updates, wanted, strict=True):
            np.testing.assert_allclose(update[part][leaf], value, rtol=1e-5, atol=1e-9)


def test_larc_at_rate_zero_and_of_zero_kernels():
    params = {"backbone": {"kernel": jnp.zeros((2, 2)), "other": jnp.ones((2, 2))}}
    gradients = [{"backbone": {"kernel": jnp.ones((2, 2)), "other": jnp.zeros((2, 2))}}]
    (update,), _ = optimizer_updates(params, gradients, name="larc")
    np.testing.assert_allclose(update["backbone"]["kernel"], -0.5, rtol=1e-6)
    assert float(jnp.abs(update["backbone"]["other"]).max()) == 0
    schedule = optax.constant_schedule(0.0)
    (update,), _ = optimizer_updates(params, gradients, name="larc", schedule=schedule)
    assert all(float(jnp.abs(leaf).max()) == 0 for leaf in jax.tree.leaves(update))


def test_muon_orthogonalizes_kernels_as_matrices_and_leaves_the_rest_to_adam():
    rng = np.random.default_rng(0)
    params = {
        "convolution": jnp.asarray(rng.normal(size=(3, 3, 2, 5)), jnp.float32),
        "dense": jnp.asarray(rng.normal(size=(6, 4)), jnp.float32),
        "bias": jnp.asarray(rng.normal(size=4), jnp.float32),
    }
    gradient = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), jnp.float32), params)
    (update,), _ = optimizer_updates(params, [gradient], name="muon")

    for name in ("convolution", "dense"):
        # Newton and Schulz's polynomial acts on the singular values alone.
        matrix = np.asarray(gradient[name], np.float64).reshape(-1, params[name].shape[-1])
        left, values, right = np.linalg.svd(matrix, full_matrices=False)
        values /= np.linalg.norm(values)
        for _ in range(5):
            values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
        step = 0.2 * np.sqrt(max(matrix.shape)) * (left * values) @ right
        expected = -0.5 * (step.reshape(params[name].shape) + 0.01 * np.asarray(params[name]))
        np.testing.assert_allclose(update[name], expected, rtol=1e-4, atol=1e-5)
    # Adam with Nesterov's momentum: its first step is the sign, 1 + 0.9 * 0.1 / (1 - 0.9^2) long.
    step = (1 + 0.09 / 0.19) * np.sign(gradient["bias"])
    np.testing.assert_allclose(update["bias"], -0.5 * step, rtol=1e-4)


def test_head_rate_may_stay_and_biases_may_learn_slower():
    params, gradients = random_tree(0), [random_tree(1)] * 2
    schedule = lambda step: jnp.asarray([1.0, 0.1])[step]  # noqa: E731
    settings: dict[str, Any] = {"name": "sgd", "momentum": 0.0, "weight_decay": 0.0}
    (first, second), _ = optimizer_updates(
        params, gradients, schedule=schedule, head_learning_rate=0.7, **settings
    )
    gradient = gradients[0]
    for update, rate in ((first, 1.0), (second, 0.1)):
        expected = jax.tree.map(lambda g: -0.7 * g, gradient["head"])
        assert largest_difference(update["head"], expected) < 1e-6
        expected = jax.tree.map(lambda g, r=rate: -r * g, gradient["backbone"])
        assert largest_difference(update["backbone"], expected) < 1e-6
    (slow,), _ = optimizer_updates(params, gradients[:1], bias_rate_factor=0.1, **settings)
    np.testing.assert_allclose(slow["head"]["bias"], -0.05 * gradient["head"]["bias"], rtol=1e-5)
    np.testing.assert_allclose(slow["head"]["kernel"], -0.5 * gradient["head"]["kernel"], rtol=1e-5)


def test_target_decay_is_byols_schedule():
    steps = np.array([0, 25, 50, 100])
    decays = [
        float(optimizers.target_decay_at(step, target_decay=0.96, num_steps=100)) for step in steps
    ]
    expected = 1 - 0.04 * (np.cos(np.pi * steps / 100) + 1) / 2
    np.testing.assert_allclose(decays, expected, rtol=1e-6)
    assert decays[0] == pytest.approx(0.96)
    assert decays[-1] == 1


@pytest.mark.slow
def test_target_network_is_the_recursion_and_gives_the_targets():
    init = compiled_init(model(), optax.sgd(0.1), (8, 8, 1), target_decay=0.9)
    start = init(jax.random.key(1))
    assert set(start.target_params) == {"backbone", "projector"}
    step = jax.jit(step_function(target_decay=lambda step: 0.9 + 0.01 * step))
    first, metrics = step(start, images(), jax.random.key(0))
    part = {name: first.params[name] for name in start.target_params}
    expected = jax.tree.map(lambda a, b: 0.9 * a + 0.1 * b, start.target_params, part)
    assert largest_difference(first.target_params, expected) < 1e-6
    second, _ = step(first, images(), jax.random.key(0))
    part = {name: second.params[name] for name in start.target_params}
    expected = jax.tree.map(lambda a, b: 0.91 * a + 0.09 * b, first.target_params, part)
    assert largest_difference(second.target_params, expected) < 1e-6
    # At the start the target network is the network: the first step is that without it.
    np.testing.assert_allclose(metrics["loss"], first_step()[1]["loss"], rtol=1e-5)
    other = jax.tree.map(lambda x: x + 0.1, start.target_params)
    _, moved = step(start._replace(target_params=other), images(), jax.random.key(0))
    assert float(jnp.abs(moved["loss"] - metrics["loss"])) > 1e-4
    assert largest_difference(start.target_params, other) > 0
    # Evaluation is of the network that learns.
    assert first.evaluation_variables["params"] is first.params


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.usefixtures("frozen_statistics")
def test_accumulation_leaves_the_target_network_alone():
    init = compiled_init(model(), optax.sgd(0.1), (8, 8, 1), target_decay=0.9)
    start = init(jax.random.key(1))
    whole, parts = (
        jax.jit(step_function(num_micro_batches=count, target_decay=lambda _: 0.9))(
            start, images(), jax.random.key(0)
        )[0]
        for count in (1, 4)
    )
    assert largest_difference(whole.target_params, parts.target_params) < 1e-6


def test_clipping_and_unknown_optimizer():
    optimizer = optimizers.make_optimizer(
        name="sgd",
        schedule=optax.constant_schedule(1.0),
        momentum=0.0,
        weight_decay=0.0,
        trust_coefficient=1e-3,
        bias_rate_factor=1.0,
        max_gradient_norm=1.0,
    )
    params = {"kernel": jnp.zeros(4)}
    gradients = {"kernel": jnp.full(4, 50.0)}
    updates: Any = optimizer.update(gradients, optimizer.init(params), params)[0]
    np.testing.assert_allclose(jnp.linalg.norm(updates["kernel"]), 1.0, rtol=1e-6)
    with pytest.raises(ValueError, match="sgd, lars, larc, adamw or muon"):
        optimizers.make_optimizer(
            name="adam",
            schedule=optax.constant_schedule(1.0),
            momentum=0,
            weight_decay=0,
            trust_coefficient=1e-3,
            bias_rate_factor=1.0,
            max_gradient_norm=0,
        )


@pytest.mark.slow
def test_batchnorm_normalises_each_view_by_itself():
    views = [jnp.asarray(np.random.default_rng(i).normal(i, 1 + i, (16, 8, 8, 1))) for i in (0, 1)]
    views = [view.astype(jnp.float32) for view in views]
    state = initial_state()
    together, _ = apply_views(model(), state.params, state.batch_stats, views, train=True)
    alone, _ = apply_views(model(), state.params, state.batch_stats, views[1:], train=True)
    np.testing.assert_allclose(together[1].embedding, alone[0].embedding, rtol=1e-6, atol=1e-6)


EARLIER = (EarlierLength(100, 60), EarlierLength(150, 150))


def length_at(step: int) -> int:
    """Stopped at 60 of 100 steps and extended to 150, finished, and extended to 400."""
    return 100 if step < 60 else 150 if step < 150 else 400


@pytest.mark.parametrize("earlier", [(), EARLIER])
def test_schedules_of_an_extended_run_are_those_of_each_length_at_its_steps(earlier):
    schedule = optimizers.make_schedule(
        learning_rate=0.3,
        warmup_steps=20,
        num_steps=400,
        final_learning_rate=0.02,
        earlier=earlier,
    )
    steps = range(401)
    rates = np.asarray(schedule(jnp.arange(401)))
    decays = np.asarray(
        optimizers.target_decay_at(
            jnp.arange(401), target_decay=0.96, num_steps=400, earlier=earlier
        )
    )
    for step in steps:
        length = length_at(step) if earlier else 400
        share = (step - 20) / (length - 20)
        rate = 0.3 * step / 20 if step < 20 else 0.02 + 0.14 * (1 + np.cos(np.pi * share))
        assert rates[step] == pytest.approx(rate, abs=1e-7)
        decay = 1 - 0.04 * (np.cos(np.pi * step / length) + 1) / 2
        assert decays[step] == pytest.approx(decay, abs=1e-7)
