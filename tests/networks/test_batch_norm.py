"""BatchNorm with its own backward pass, against flax's and a float64 derivation of it."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import Array

from jevb_jax.networks import batch_norm
from jevb_jax.networks.batch_norm import BatchNorm

pytestmark = pytest.mark.numerics

EPSILON = 1e-5
SHAPE = (6, 5, 4, 7)

CASES = pytest.mark.parametrize(
    ("has_shortcut", "relu"), [(False, True), (True, True), (False, False), (True, False)]
)


def plain(x: Array, shortcut: Array | None, scale: Array, bias: Array, *, relu: bool) -> Any:
    """Flax's layers one after another, differentiated term by term."""
    module = nn.BatchNorm(momentum=0.0, epsilon=EPSILON, dtype=x.dtype)
    variables = {
        "params": {"scale": scale, "bias": bias},
        "batch_stats": {"mean": jnp.zeros_like(scale), "var": jnp.ones_like(scale)},
    }
    y, updated = module.apply(variables, x, use_running_average=False, mutable=["batch_stats"])
    y = y if shortcut is None else y + shortcut
    statistics = updated["batch_stats"]
    return (nn.relu(y) if relu else y), statistics["mean"], statistics["var"]


def ours(x: Array, shortcut: Array | None, scale: Array, bias: Array, *, relu: bool) -> Any:
    return batch_norm.batch_norm(x, shortcut, scale, bias, EPSILON, relu)


def inputs(has_shortcut: bool, *, mean: float = 0.3, dtype: Any = np.float32) -> Any:
    """Arrays on the grid of bfloat16, so that every type holds them exactly."""
    rng = np.random.default_rng(0)

    def draw(*shape: int, loc: float = 0.0) -> Any:
        values = rng.normal(loc, 1.0, shape).astype(jnp.bfloat16)
        return jnp.asarray(values.astype(np.float64), dtype)

    channels = SHAPE[-1:]
    x, shortcut = draw(*SHAPE, loc=mean), draw(*SHAPE) if has_shortcut else None
    wide = jnp.promote_types(dtype, jnp.float32)
    scale, bias = (draw(*channels, loc=loc).astype(wide) for loc in (1.0, 0.0))
    cotangents = (draw(*SHAPE), draw(*channels).astype(wide), draw(*channels).astype(wide))
    return (x, shortcut, scale, bias), cotangents


def gradients(function: Any, arguments: Any, cotangents: Any, relu: bool) -> list[np.ndarray]:
    _, back = jax.vjp(lambda *a: function(*a, relu=relu), *arguments)
    return [np.asarray(g, np.float64) for g in jax.tree.leaves(jax.jit(back)(cotangents))]


def distance(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


@CASES
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_values_and_statistics_are_those_of_flax_bit_for_bit(has_shortcut, relu, dtype):
    arguments, _ = inputs(has_shortcut, dtype=dtype)
    for got, expected in zip(
        ours(*arguments, relu=relu), plain(*arguments, relu=relu), strict=True
    ):
        assert got.dtype == expected.dtype
        np.testing.assert_array_equal(got, expected)


@CASES
@pytest.mark.parametrize("mean", [0.3, 40.0])
def test_gradients_are_those_of_flax_in_float64(has_shortcut, relu, mean):
    with jax.enable_x64(True):
        arguments, cotangents = inputs(has_shortcut, mean=mean, dtype=np.float64)
        expected = gradients(plain, arguments, cotangents, relu)
        got = gradients(ours, arguments, cotangents, relu)
    assert len(got) == len(expected) == 3 + has_shortcut
    for mine, theirs in zip(got, expected, strict=True):
        assert distance(mine, theirs) < 1e-11


@CASES
@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 2e-6), (jnp.bfloat16, 4e-3)])
def test_rounding_of_gradients(has_shortcut, relu, dtype, tolerance):
    # bfloat16 keeps 8 bits: a result that is rounded once is off by 2^-9 at most.
    arguments, cotangents = inputs(has_shortcut, dtype=dtype)
    got = gradients(ours, arguments, cotangents, relu)
    # The ReLU's sign is that of the rounded output: float64 takes its place only around it.
    y = plain(*arguments, relu=relu)[0]
    masked = jnp.where(y > 0, cotangents[0], 0) if relu else cotangents[0]
    with jax.enable_x64(True):
        wide, wide_cotangents = inputs(has_shortcut, dtype=np.float64)
        wide_cotangents = (jnp.asarray(np.asarray(masked, np.float64)), *wide_cotangents[1:])
        expected = gradients(plain, wide, wide_cotangents, False)
    for mine, theirs in zip(got, expected, strict=True):
        assert distance(mine, theirs) < tolerance


def test_channels_that_are_constant_or_scaled_by_zero_have_finite_gradients():
    (x, _, scale, bias), cotangents = inputs(False)
    x = x.at[..., 0].set(0.0)
    scale = scale.at[1].set(0.0)
    x_gradient, scale_gradient, bias_gradient = gradients(
        ours, (x, None, scale, bias), (cotangents[0], 0 * cotangents[1], 0 * cotangents[2]), False
    )
    assert np.isfinite(x_gradient).all()
    np.testing.assert_array_equal(scale_gradient[0], 0)
    np.testing.assert_array_equal(x_gradient[..., 1], 0)
    np.testing.assert_allclose(bias_gradient, cotangents[0].sum((0, 1, 2)), rtol=1e-5, atol=1e-5)


@CASES
def test_groups_by_vmap_are_those_of_flax_one_by_one(has_shortcut, relu):
    arguments, cotangents = inputs(has_shortcut)
    x, shortcut, scale, bias = arguments
    halves = jax.tree.map(lambda a: a.reshape(2, 3, *a.shape[1:]), (x, shortcut))

    def loss(function: Any, x: Array, shortcut: Array | None, gradient: Array) -> Array:
        return jnp.sum(function(x, shortcut, scale, bias, relu=relu)[0] * gradient)

    gradient = cotangents[0].reshape(2, 3, *SHAPE[1:])
    axes = (0, 0 if has_shortcut else None, 0)
    together = jax.vmap(jax.grad(functools.partial(loss, ours)), axes)(*halves, gradient)
    for index in range(2):
        one = jax.tree.map(lambda a, index=index: a[index], halves)
        alone = jax.grad(functools.partial(loss, plain))(*one, gradient[index])
        np.testing.assert_allclose(together[index], alone, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_second_derivatives_in_reverse_mode():
    with jax.enable_x64(True):
        (x, shortcut, scale, bias), cotangents = inputs(True, dtype=np.float64)

        def squared_gradient(function: Any, x: Array) -> Array:
            def loss(x: Array) -> Array:
                return jnp.sum(
                    function(x, shortcut, scale, bias, relu=True)[0] ** 2 * cotangents[0]
                )

            return jnp.sum(jax.grad(loss)(x) ** 2)

        mine, theirs = (
            np.asarray(jax.grad(functools.partial(squared_gradient, function))(x))
            for function in (ours, plain)
        )
    assert distance(mine, theirs) < 1e-10


@pytest.mark.parametrize(("train", "fused"), [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_module_is_that_of_flax(train, fused, dtype):
    rng = np.random.default_rng(1)
    x, shortcut = (jnp.asarray(rng.normal(size=SHAPE), jnp.float32) for _ in range(2))
    mine = BatchNorm(0.8, EPSILON, dtype, fused=fused)
    theirs = nn.BatchNorm(momentum=0.8, epsilon=EPSILON, dtype=dtype)
    variables = mine.init(jax.random.key(0), x, train=True)
    initial = theirs.init(jax.random.key(0), x, use_running_average=False)
    assert jax.tree.structure(variables) == jax.tree.structure(initial)
    jax.tree.map(np.testing.assert_array_equal, variables, initial)
    with jax.enable_x64(True):
        shapes = jax.eval_shape(lambda: mine.init(jax.random.key(0), x, train=True))
        assert {v.dtype for v in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}
    drawn = jax.tree.map(
        lambda v: jnp.asarray(rng.uniform(0.5, 2, v.shape), jnp.float32), variables
    )
    got, updated = mine.apply(drawn, x, shortcut, train=train, mutable=["batch_stats"])
    x = x.astype(dtype)
    y, expected = theirs.apply(drawn, x, use_running_average=not train, mutable=["batch_stats"])
    assert got.dtype == dtype
    np.testing.assert_array_equal(got, nn.relu(y + shortcut.astype(dtype)))
    jax.tree.map(np.testing.assert_array_equal, updated, expected)
