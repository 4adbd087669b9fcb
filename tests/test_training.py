import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jevb_jax import augmentations, data, objective, training
from jevb_jax.networks import make_model

VIEW = augmentations.ViewAugmentation(
    size=8,
    mean=(0.3,),
    std=(0.4,),
    crop_scale=(0.5, 1.0),
    saturation=0,
    hue=0,
    grayscale_probability=0,
)
SETTINGS = training.ObjectiveSettings(
    df=5.0,
    radial_df=5.0,
    scale_units="sphere",
    prior_scale=1.0,
    coordinates="chordal",
    space="log",
    num_samples=1,
    kl_weight=1.0,
    radial_weight=1.0,
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
        embedding_dim=8,
        inference_hidden_dim=8,
        initial_scale=1.0,
        min_scale=1e-3,
        initial_radial_scale=0.5,
        dtype="float32",
    )


def step_function(**overrides: Any):
    keywords: dict[str, Any] = {
        "model": model(),
        "optimizer": optax.sgd(0.1),
        "view_augmentations": (VIEW, VIEW),
        "settings": SETTINGS,
    }
    return functools.partial(training.train_step, **(keywords | overrides))


@functools.cache
def initial_state(ema_decay: float = 0.0) -> training.TrainState:
    return training.init_state(
        jax.random.key(1), model(), optax.sgd(0.1), (8, 8, 1), ema_decay=ema_decay
    )


@functools.cache
def images() -> jax.Array:
    return jnp.asarray(data.digits().images[:32])


def largest_difference(a: Any, b: Any) -> float:
    return max(
        float(jnp.max(jnp.abs(x - y)))
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


@functools.cache
def first_step() -> tuple[training.TrainState, dict[str, jax.Array]]:
    step = jax.jit(step_function(ema_decay=0.9))
    return step(initial_state(0.9), images(), jax.random.key(0))


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


def test_ema_is_the_recursion():
    before, (after, _) = initial_state(0.9), first_step()
    expected = jax.tree.map(lambda a, b: 0.9 * a + 0.1 * b, before.params, after.params)
    assert largest_difference(expected, after.ema_params) < 1e-6
    assert after.evaluation_variables["params"] is after.ema_params
    assert initial_state().evaluation_variables["params"] is initial_state().params


@pytest.mark.slow
def test_micro_batches_change_nothing_when_statistics_are_frozen():
    whole, parts = (
        jax.jit(step_function(num_micro_batches=count, use_batch_statistics=False))(
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
def test_micro_batches_normalise_by_themselves():
    step = jax.jit(step_function(num_micro_batches=4))
    parts, _ = step(initial_state(), images(), jax.random.key(0))
    assert largest_difference(parts.params, first_step()[0].params) > 1e-5


def toy_step(state: training.TrainState, batch: jax.Array, key: jax.Array):
    """A step of the right shape that compiles at once; not finite at step 2 if a pixel says so."""
    noise = jax.random.normal(jax.random.fold_in(key, state.step), (64,))
    pixels = batch.reshape(len(batch), -1).astype(jnp.float32) / 255
    weights = state.params["w"] + 0.1 * jnp.sin(pixels.T @ (pixels @ state.params["w"])) + noise
    bad = jnp.where((state.step == 2) & (batch[0, 0, 0, 0] == 255), jnp.nan, 1.0)
    metrics = {"loss": jnp.sum(weights) * bad, "gradient_norm": jnp.linalg.norm(weights)}
    return state._replace(step=state.step + 1, params={"w": weights * bad}), metrics


def toy_state() -> training.TrainState:
    return training.TrainState(jnp.int32(0), {"w": jnp.ones(64)}, {}, (), None)


def test_chunks_of_any_length_compute_the_same_bits_as_one():
    key = jax.random.key(0)
    order = np.stack([np.roll(np.arange(32), i)[:16] for i in range(6)]).astype(np.int32)
    chunk = training.make_train_chunk(toy_step, donate=False)
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
    chunk = training.make_train_chunk(toy_step, donate=False)
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
    after, _, _ = chunk(toy_state(), images(), rows, jnp.int32(0), jax.random.key(0))
    assert largest_difference(after, toy_state()) == 0


@pytest.mark.slow
def test_small_crops_train():
    crop = dataclasses.replace(VIEW, size=6)
    _, metrics = jax.jit(step_function(view_augmentations=(VIEW, VIEW, crop)))(
        initial_state(), images(), jax.random.key(0)
    )
    assert np.isfinite(metrics["loss"])


def test_multi_view_elbo_is_symmetric_plus_small_crops():
    key = jax.random.split(jax.random.key(0), 5)
    views: list[Any] = [
        objective.View(*jax.random.normal(jax.random.key(i), (3, 5, 6)))._replace(
            posterior_scale=jnp.full((5, 6), 0.5)
        )
        for i in range(3)
    ]
    settings: dict[str, Any] = SETTINGS.keywords(0) | {"radial_scale": 0.5}
    two = training.multi_view_elbo(key, views[:2], **settings)
    np.testing.assert_allclose(
        two.elbo, objective.symmetric_elbo(key, views[0], views[1], **settings).elbo, rtol=1e-6
    )
    three = training.multi_view_elbo(key, views, **settings)
    # KL terms need no sampling: sources are view 1, view 2 and twice the crop.
    kls = [
        objective.conditional_elbo(
            key, v.embedding, v.posterior_mean, v.posterior_scale, **settings
        )
        for v in views
    ]
    expected = (kls[0].kl + kls[1].kl + 2 * kls[2].kl) / 4
    np.testing.assert_allclose(three.kl, expected, rtol=1e-5)


def test_kl_warmup():
    settings = dataclasses.replace(SETTINGS, kl_weight=0.5, kl_warmup_steps=10)
    weights = [float(settings.keywords(step)["kl_weight"]) for step in (0, 5, 10, 100)]
    np.testing.assert_allclose(weights, [0, 0.25, 0.5, 0.5])


def test_schedule():
    schedule = training.make_schedule(
        learning_rate=2.0, warmup_steps=10, num_steps=110, final_learning_rate=0.5
    )
    steps = np.array([0, 5, 10, 60, 110])
    expected = [0, 1, 2, 0.5 + 1.5 * 0.5, 0.5]
    np.testing.assert_allclose([float(np.asarray(schedule(s))) for s in steps], expected, rtol=1e-6)
    with pytest.raises(ValueError, match="warm-up of 10 steps"):
        training.make_schedule(
            learning_rate=1.0, warmup_steps=10, num_steps=10, final_learning_rate=0
        )


@pytest.mark.parametrize("name", ["sgd", "lars", "adamw"])
def test_weight_decay_spares_biases_batchnorm_and_scalars(name):
    params = {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2), "raw_radial_scale": jnp.ones(())}
    optimizer = training.make_optimizer(
        name=name,
        schedule=optax.constant_schedule(0.1),
        momentum=0.9,
        weight_decay=0.3,
        max_gradient_norm=0.0,
    )
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates: Any = optimizer.update(zeros, optimizer.init(params), params)[0]
    assert float(jnp.max(updates["kernel"])) < 0
    assert float(jnp.abs(updates["bias"]).max()) == 0
    assert float(jnp.abs(updates["raw_radial_scale"])) == 0


def test_clipping_and_unknown_optimizer():
    optimizer = training.make_optimizer(
        name="sgd",
        schedule=optax.constant_schedule(1.0),
        momentum=0.0,
        weight_decay=0.0,
        max_gradient_norm=1.0,
    )
    params = {"kernel": jnp.zeros(4)}
    gradients = {"kernel": jnp.full(4, 50.0)}
    updates: Any = optimizer.update(gradients, optimizer.init(params), params)[0]
    np.testing.assert_allclose(jnp.linalg.norm(updates["kernel"]), 1.0, rtol=1e-6)
    with pytest.raises(ValueError, match="sgd, lars or adamw"):
        training.make_optimizer(
            name="adam",
            schedule=optax.constant_schedule(1.0),
            momentum=0,
            weight_decay=0,
            max_gradient_norm=0,
        )


def test_batchnorm_normalises_each_view_by_itself():
    views = [jnp.asarray(np.random.default_rng(i).normal(i, 1 + i, (16, 8, 8, 1))) for i in (0, 1)]
    views = [view.astype(jnp.float32) for view in views]
    state = initial_state()
    together, _ = training.apply_views(model(), state.params, state.batch_stats, views, train=True)
    alone, _ = training.apply_views(model(), state.params, state.batch_stats, views[1:], train=True)
    np.testing.assert_allclose(together[1].embedding, alone[0].embedding, rtol=1e-6, atol=1e-6)
