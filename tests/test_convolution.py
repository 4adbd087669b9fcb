"""Chunks of a convolution against the whole: values, derivatives, every shape, and where it is used."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from jevb_jax import networks
from jevb_jax.convolution import chunk_images, chunked_convolution, convolution

DIMENSION_NUMBERS = ("NHWC", "HWIO", "NHWC")


def convolve(function, size, stride, *, dtype=None):
    def call(x, kernel):
        x, kernel = (a if dtype is None else a.astype(dtype) for a in (x, kernel))
        padding = ((size // 2, size // 2),) * 2
        return function(x, kernel, (stride, stride), padding, dimension_numbers=DIMENSION_NUMBERS)

    return call


def arrays(num_images, size, *, channels=3, features=4, side=6):
    generator = np.random.default_rng(0)
    shapes = (num_images, side, side, channels), (size, size, channels, features)
    return [jnp.asarray(generator.normal(size=shape), jnp.float32) for shape in shapes]


def num_convolutions(function, *args):
    return str(jax.make_jaxpr(function)(*args)).count("conv_general_dilated[")


# An image of 6 x 6 x 3 floats, and the kernel's output of 6 x 6 x 4 at stride 1: 576 bytes.
@pytest.mark.parametrize(
    ("size", "stride", "max_bytes", "chunks"),
    [
        (3, 1, 576 * 2, 4),
        (3, 1, 576 * 7, 1),
        (3, 1, 1, 7),
        (3, 2, 432 * 3, 3),
        (1, 1, 576 * 3, 3),
        (1, 2, 432 * 6, 2),
        (7, 2, 432 * 4, 2),
    ],
)
def test_chunks_equal_the_whole_batch(size, stride, max_bytes, chunks):
    x, kernel = arrays(7, size)
    whole = convolve(lax.conv_general_dilated, size, stride)
    cut = convolve(functools.partial(chunked_convolution, max_bytes=max_bytes), size, stride)
    assert num_convolutions(cut, x, kernel) == chunks

    expected, pull_back = jax.vjp(whole, x, kernel)
    actual, pull_back_cut = jax.vjp(cut, x, kernel)
    np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=1e-6)
    cotangent = jnp.asarray(np.random.default_rng(1).normal(size=expected.shape), jnp.float32)
    # A kernel's gradient is a sum of up to 7 * 36 products of normal numbers.
    for a, b in zip(pull_back_cut(cotangent), pull_back(cotangent), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4)

    for a, b in zip(
        jax.jvp(cut, (x, kernel), (x[::-1], kernel[::-1])),
        jax.jvp(whole, (x, kernel), (x[::-1], kernel[::-1])),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(
        jax.vmap(cut, (None, 0))(x, jnp.stack([kernel, -kernel])),
        jnp.stack([expected, -expected]),
        rtol=1e-6,
        atol=1e-6,
    )


def test_chunks_of_bfloat16_are_bfloat16_and_as_long_as_those_of_float32():
    x, kernel = arrays(7, 3)
    cut = functools.partial(chunked_convolution, max_bytes=576 * 2)
    actual = convolve(cut, 3, 1, dtype=jnp.bfloat16)
    assert num_convolutions(actual, x, kernel) == 4
    whole = convolve(lax.conv_general_dilated, 3, 1, dtype=jnp.bfloat16)
    assert actual(x, kernel).dtype == jnp.bfloat16
    np.testing.assert_array_equal(
        actual(x, kernel).astype(jnp.float32), whole(x, kernel).astype(jnp.float32)
    )


@settings(deadline=None)
@given(
    num_images=st.integers(1, 5000),
    image_bytes=st.integers(1, 2**24),
    max_bytes=st.integers(1, 2**24),
    max_chunks=st.integers(1, 64),
)
def test_chunks_are_within_both_limits(num_images, image_bytes, max_bytes, max_chunks):
    limits = {"max_bytes": max_bytes, "max_chunks": max_chunks}
    size = chunk_images(num_images, image_bytes, **limits)
    assert 1 <= size <= num_images
    assert math.ceil(num_images / size) <= max_chunks
    if size * image_bytes > max_bytes:
        # One image fewer would make too many chunks, or there is but one.
        assert size == 1 or math.ceil(num_images / (size - 1)) > max_chunks
    elif size < num_images:
        assert (size + 1) * image_bytes > max_bytes


@pytest.mark.parametrize(
    ("backend", "num_devices", "chunks"), [("cpu", 1, 8), ("cpu", 8, 1), ("gpu", 1, 1)]
)
def test_networks_cut_batches_on_one_cpu_device_alone(monkeypatch, backend, num_devices, chunks):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(jax, "device_count", lambda: num_devices)
    images = jax.ShapeDtypeStruct((128, 32, 32, 3), jnp.float32)
    kernel = jax.ShapeDtypeStruct((3, 3, 3, 64), jnp.float32)
    assert num_convolutions(convolve(convolution, 3, 1), images, kernel) == chunks

    block = networks.ResidualBlock(features=64, stride=1, bottleneck=False)
    x = jax.ShapeDtypeStruct((128, 32, 32, 64), jnp.float32)
    variables = jax.eval_shape(functools.partial(block.init, train=False), jax.random.key(0), x)
    apply = functools.partial(block.apply, train=False)
    assert num_convolutions(apply, variables, x) == 2 * chunks


def test_an_exported_convolution_takes_any_size_of_batch(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    x, kernel = arrays(7, 3)
    (batch,) = jax.export.symbolic_shape("b")
    images = jax.ShapeDtypeStruct((batch, 6, 6, 3), jnp.float32)
    cut = convolve(convolution, 3, 1)
    exported = jax.export.export(jax.jit(lambda x: cut(x, kernel)))(images)
    np.testing.assert_allclose(
        exported.call(x), convolve(lax.conv_general_dilated, 3, 1)(x, kernel), rtol=1e-6, atol=1e-6
    )
