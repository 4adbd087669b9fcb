"""Polar decomposition against NumPy float64, from the zero vector to the ends of float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jevb_jax import polar_decomposition
from jevb_jax.paper import sphere
from tests import oracles

# A float32 sum of 4096 squares and a square root.
RTOL = 1e-6

polar = jax.jit(polar_decomposition)
polar_jacobian = jax.jit(jax.vmap(jax.jacrev(polar_decomposition)))


pytestmark = [pytest.mark.usefixtures("strict_dtypes"), pytest.mark.numerics]


@pytest.mark.parametrize("dim", [1, 3, 128, 4096])
def test_matches_float64_from_1e_minus_30_to_1e30(dim):
    x = np.random.default_rng(dim).normal(size=(61, dim)) * np.logspace(-30, 30, 61)[:, None]
    x = x.astype(np.float32)
    direction, radius = polar(x)
    assert direction.dtype == radius.dtype == jnp.float32
    expected_radius = np.linalg.norm(np.float64(x), axis=-1)
    np.testing.assert_allclose(radius, expected_radius, rtol=RTOL)
    np.testing.assert_allclose(direction, oracles.unit(x), rtol=RTOL, atol=1e-7)
    np.testing.assert_allclose(np.linalg.norm(np.float64(direction), axis=-1), 1, rtol=RTOL)
    np.testing.assert_allclose(radius[:, None] * direction, x, rtol=RTOL)


def test_leading_dimensions_are_batch_dimensions():
    x = np.random.default_rng(0).normal(size=(2, 5, 4)).astype(np.float32)
    direction, radius = polar(x)
    assert direction.shape == (2, 5, 4)
    assert radius.shape == (2, 5)
    single_direction, single_radius = polar_decomposition(x[1, 3])
    np.testing.assert_allclose(direction[1, 3], single_direction, rtol=RTOL)
    np.testing.assert_allclose(radius[1, 3], single_radius, rtol=RTOL)


def test_zero_vector_has_zero_direction_zero_radius_and_finite_gradients():
    x = jnp.zeros((31, 5))
    direction, radius = polar(x)
    np.testing.assert_array_equal(direction, 0)
    np.testing.assert_array_equal(radius, 0)
    for jacobian in polar_jacobian(x):
        assert np.all(np.isfinite(jacobian))


def test_gradients_match_the_derivation_over_the_range():
    # d radius / dx = direction;  d direction / dx = (1 - direction direction^T) / radius.
    magnitude = np.logspace(-30, 30, 31)
    x = np.random.default_rng(0).normal(size=(31, 5)) * magnitude[:, None]
    x = x.astype(np.float32)
    jacobian = polar_jacobian(x)
    direction, radius = oracles.unit(x), np.linalg.norm(np.float64(x), axis=-1)
    projection = np.eye(5) - direction[:, :, None] * direction[:, None, :]
    np.testing.assert_allclose(jacobian[1], direction, rtol=1e-5, atol=1e-6)
    assert np.all(np.isfinite(jacobian[0]))
    scaled = np.float64(jacobian[0]) * radius[:, None, None]
    np.testing.assert_allclose(scaled, projection, rtol=1e-5, atol=1e-6)


def test_precision_is_at_least_float32():
    x = np.random.default_rng(0).normal(size=(4, 300))
    for dtype in (jnp.bfloat16, jnp.float16):
        half = jnp.asarray(x, dtype)
        direction, radius = polar(half)
        assert direction.dtype == radius.dtype == jnp.float32
        np.testing.assert_allclose(radius, np.linalg.norm(np.float64(half), axis=-1), rtol=RTOL)
        unit = half / jnp.sqrt(300).astype(dtype)
        for found in (sphere.safe_log(jnp.abs(half)), *sphere.cosine_complements(unit, -unit)):
            assert found.dtype == jnp.float32
    with jax.enable_x64(True):
        direction, radius = polar(x)
        assert direction.dtype == radius.dtype == jnp.float64
        np.testing.assert_allclose(radius, np.linalg.norm(x, axis=-1), rtol=1e-14)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=4, max_size=4))
def test_round_trip_of_any_vector(values):
    x = np.array(values, np.float32)
    # XLA on the CPU flushes subnormal numbers to zero.
    x[np.abs(x) < np.finfo(np.float32).tiny] = 0
    direction, radius = polar(x)
    expected_radius = np.linalg.norm(np.float64(x))
    np.testing.assert_allclose(radius, expected_radius, rtol=RTOL)
    if expected_radius > 0:
        np.testing.assert_allclose(direction, x / expected_radius, rtol=RTOL, atol=1e-7)
    else:
        np.testing.assert_array_equal(direction, 0)


def test_safe_log_keeps_a_nan_and_is_finite_at_zero():
    found = sphere.safe_log(jnp.asarray([jnp.nan, 0.0, 1e-40, 2.0], jnp.float32))
    assert np.isnan(found[0])
    smallest = np.log(np.finfo(np.float32).tiny)
    np.testing.assert_allclose(found[1:], [smallest, smallest, np.log(2)], rtol=1e-6)
    gradient = jax.grad(lambda x: jnp.sum(sphere.safe_log(x)))(jnp.asarray([0.0, 2.0]))
    np.testing.assert_allclose(gradient, [0, 0.5])


ENDS = np.array([1.2e-38, 3e-38, 1e-34, 1e-28, 1e28, 1e34, 1e38, 1.5e38])


@pytest.mark.parametrize("shape", [(1, 1, 1, 0), (1, -0.5, 0.25, 1e-4)])
def test_vectors_at_the_ends_of_float32_keep_direction_radius_and_gradients(shape):
    x = (ENDS[:, None] * np.array(shape)).astype(np.float32)
    x[np.abs(x) < np.finfo(np.float32).tiny] = 0
    direction, radius = polar(x)
    expected = np.linalg.norm(np.float64(x), axis=-1)
    np.testing.assert_allclose(radius, expected, rtol=RTOL)
    np.testing.assert_allclose(direction, oracles.unit(x), rtol=RTOL, atol=1e-7)
    jacobian = polar_jacobian(x)
    np.testing.assert_allclose(jacobian[1], oracles.unit(x), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        jax.grad(lambda x: jnp.sum(sphere.safe_norm(x)))(x), oracles.unit(x), rtol=1e-5, atol=1e-6
    )
    unit = oracles.unit(x)
    scaled = np.float64(jacobian[0]) * expected[:, None, None]
    projection = np.eye(4) - unit[:, :, None] * unit[:, None, :]
    # Above, entries of the gradient are subnormal; at the smallest they overflow.
    rows = (expected > 1e-37) & (expected < 1e30)
    np.testing.assert_allclose(scaled[rows], projection[rows], rtol=1e-5, atol=1e-5)


def test_a_negative_number_has_no_logarithm_and_no_vector_no_direction():
    assert np.isnan(jax.jit(sphere.safe_log)(jnp.float32(-1.0)))
    with pytest.raises(ValueError, match="D >= 1"):
        polar_decomposition(np.float32(3.0))


def test_vectors_of_other_widths_and_complex_ones_are_refused():
    with pytest.raises(ValueError, match="must be the same for all vectors"):
        sphere.cosine_complements(np.ones((3, 4), np.float32) / 2, np.ones((3, 1), np.float32))
    with pytest.raises(ValueError, match="real numbers are needed"):
        polar_decomposition(np.array([1j, 2, 0]))


def test_tangent_squares_take_positive_scales_only():
    axis = np.eye(3, dtype=np.float32)[0]

    def length(scale):
        return sphere.scaled_tangent_squared_length(axis, axis, scale, coordinates="chordal")[0]

    with pytest.raises(ValueError, match="scale_diag must be positive"):
        length(np.array([1, -1, 1], np.float32))
    assert np.isnan(jax.jit(length)(np.array([1, -1, 1], np.float32)))


def test_squared_lengths_agree_with_the_coordinates_also_where_they_nearly_overflow():
    u, m = oracles.random_units(np.random.default_rng(0), 2, 5).astype(np.float32)
    for coordinates in ("chordal", "stereographic"):
        y = oracles.tangent_coordinates(np.float64(u), np.float64(m), coordinates)
        for scale in (1e-18, 1e-16, 1e-3, 1.0, 1e10):
            found, _ = sphere.scaled_tangent_squared_length(
                u, m, np.float32(scale), coordinates=coordinates
            )
            np.testing.assert_allclose(found, np.sum((y / scale) ** 2), rtol=1e-5)
        for scale, expected in ((1e-30, np.inf), (1.0, 0.0)):
            where = u if np.isinf(expected) else m
            found, _ = sphere.scaled_tangent_squared_length(
                where, m, np.float32(scale), coordinates=coordinates
            )
            np.testing.assert_allclose(found, expected, atol=1e-12)
        # Without a distance there is none in any unit.
        found, _ = sphere.scaled_tangent_squared_length(
            m, m, np.float32(1e-30), coordinates=coordinates
        )
        assert float(found) == 0


def test_a_power_of_two_is_at_or_below_its_number():
    x = np.array([1.2e-38, 1e-30, 0.3, 1.0, 1.4999, 1.5, 1.9999, 2.0, 3e38], np.float32)
    found = np.asarray(sphere.power_of_two_below(jnp.asarray(x)))
    assert np.all(found <= x)
    mantissa, _ = np.frexp(found)
    np.testing.assert_array_equal(mantissa, 0.5)
    assert np.all(found >= x / 4)
    assert np.all(jax.vmap(jax.grad(sphere.power_of_two_below))(jnp.asarray(x)) == 0)
