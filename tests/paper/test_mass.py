"""The mass of the directional densities: against quadrature over the angle, and Monte Carlo."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest

from jevb_jax import directional_log_mass, directional_log_prob, uniform_log_prob
from tests import oracles
from tests.marks import nightly

DFS = (0.5, 1.0, 5.0, 127.0, 1e4, math.inf)
# Between others that the default suite has.
slow = functools.partial(pytest.param, marks=pytest.mark.slow)
SCALES = np.array([1e-3, 1e-2, 0.1, 0.3, 1.0, 10.0, 900.0])


pytestmark = pytest.mark.usefixtures("strict_dtypes")


@functools.partial(jax.jit, static_argnames="tails")
def log_mass(scale_diag, loc, df, tails: Any = "joint"):
    return directional_log_mass(scale_diag, loc=loc, df=df, tails=tails)


def random_case(rng, dim, *, sigma, spread):
    """Scales with a spread of that factor about `sigma / sqrt(D)`, and a location."""
    logs = rng.uniform(-0.5, 0.5, dim) * math.log(spread)
    return np.exp(logs) * sigma / math.sqrt(dim), oracles.random_units(rng, dim)


def grid(*axes):
    """Every combination of the axes, each `[N]`: one compilation serves them all."""
    return [axis.ravel() for axis in np.meshgrid(*axes, indexing="ij")]


def equal_scales(dim, dtype):
    """The mass for every `df` and scale, and what the quadrature has for it."""
    df, scale = grid(DFS, SCALES)
    loc = oracles.random_units(np.random.default_rng(dim), len(df), dim).astype(dtype)
    scale_diag = np.broadcast_to(scale[:, None], loc.shape).astype(dtype)
    expected = [
        oracles.equal_scale_log_mass(dim, *pair, 100_000) for pair in zip(scale, df, strict=True)
    ]
    return log_mass(scale_diag, loc, df.astype(dtype)), expected


@pytest.mark.parametrize("dim", [3, nightly(4), nightly(5), nightly(16), 128, nightly(512), 4096])
def test_equal_scales_agree_with_quadrature_over_the_angle(dim, float64):
    actual, expected = equal_scales(dim, np.float64)
    np.testing.assert_allclose(actual, expected, atol=1e-6, rtol=1e-9)


@pytest.mark.parametrize("df", [0.5, 5.0, math.inf])
@pytest.mark.parametrize("dim", [3, 128])
def test_the_mass_of_very_wide_densities_falls_with_the_volume_they_cover(dim, df, float64):
    scale = np.array([2e3, 1e6])
    expected = [oracles.equal_scale_log_mass(dim, one, df, 100_000) for one in scale]
    loc = oracles.random_units(np.random.default_rng(dim), len(scale), dim)
    actual = log_mass(np.broadcast_to(scale[:, None], loc.shape), loc, df)
    # Above a scale of 1e3 the density counts as flat; the squared length is 2 on average.
    flat = 1e-6 * (1 if math.isinf(df) else 1 + dim / df)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=flat + 1e-6)


@pytest.mark.numerics
@pytest.mark.parametrize("dim", [3, nightly(4), nightly(16), nightly(128), 4096])
def test_float32_keeps_an_error_of_a_few_roundings_for_each_dimension(dim):
    actual, expected = equal_scales(dim, np.float32)
    np.testing.assert_allclose(actual, expected, atol=3e-6 + 1e-6 * dim, rtol=1e-6)


@pytest.mark.numerics
@pytest.mark.parametrize(("df", "expected"), [(5.0, -16.637), (127.0, -36.2), (math.inf, -42.4)])
def test_values_of_the_design(df, expected, float64):
    # D = 128 at sigma = 1.76, computed apart from this project.
    loc = np.eye(128)[0]
    actual = log_mass(np.full(128, 1.76 / math.sqrt(128)), loc, df)
    np.testing.assert_allclose(actual, expected, atol=0.05 if df > 5 else 2e-3)


def test_the_gaussian_mass_is_the_normaliser_of_von_mises_and_fisher(float64):
    dim, scale = 32, 0.2
    k = 1 / mpmath.mpf(scale) ** 2
    order = mpmath.mpf(dim) / 2 - 1
    # The density at its peak is (2 pi s^2)^(-n/2); that of von Mises and Fisher has mass one.
    log_bessel = mpmath.log(mpmath.besseli(order, k)) - k
    log_peak = order * mpmath.log(k) - (order + 1) * mpmath.log(2 * mpmath.pi) - log_bessel
    expected = -(dim - 1) / mpmath.mpf(2) * mpmath.log(2 * mpmath.pi * scale**2) - log_peak
    actual = log_mass(np.full(dim, scale), np.eye(dim)[3], math.inf)
    np.testing.assert_allclose(actual, float(expected), rtol=1e-10)


# Stated in docs/mathematics.md: the largest errors of the approximation, in nats.
JOINT_ERROR = 0.012
FEATURE_ERROR = {16: 0.2, 64: 0.06, 128: 0.03}


@pytest.mark.parametrize("dim", [nightly(4), 8, nightly(32), slow(128)])
def test_unequal_scales_agree_with_monte_carlo(dim, float64):
    rng = np.random.default_rng(dim)
    cases = [
        (df, *random_case(rng, dim, sigma=sigma, spread=spread))
        for df in (1.0, 5.0, math.inf)
        for spread, sigma in ((3.0, 1.0), (10.0, 0.3), (10.0, 2.0))
    ]
    dfs, scales, locs = (np.array(values) for values in zip(*cases, strict=True))
    for (df, scale, loc), actual in zip(cases, log_mass(scales, locs, dfs), strict=True):
        expected, error = oracles.joint_log_mass(rng, scale, loc, df, num_draws=600, num_nodes=40)
        assert error < 0.01
        assert abs(actual - expected) < JOINT_ERROR + 4 * error


@pytest.mark.slow
@pytest.mark.parametrize("dim", [d if d == 128 else nightly(d) for d in FEATURE_ERROR])
def test_feature_wise_tails_agree_with_monte_carlo(dim, float64):
    rng = np.random.default_rng(dim)
    cases = [
        (df, *random_case(rng, dim, sigma=sigma, spread=spread))
        for df in (1.0, 5.0, 20.0)
        for spread, sigma in ((1.0, 1.0), (10.0, 0.3), (10.0, 2.0))
    ]
    dfs, scales, locs = (np.array(values) for values in zip(*cases, strict=True))
    found = log_mass(scales, locs, dfs, tails="feature")
    for (df, scale, loc), actual in zip(cases, found, strict=True):
        expected, error = oracles.feature_log_mass(rng, scale, loc, df, num_draws=10_000)
        assert error < 0.03
        assert abs(actual - expected) < FEATURE_ERROR[dim] + 4 * error


@pytest.mark.slow
def test_both_tails_share_their_gaussian_limit(float64):
    rng = np.random.default_rng(0)
    scale, loc = random_case(rng, 32, sigma=1.0, spread=10)
    np.testing.assert_allclose(
        log_mass(scale, loc, math.inf, tails="feature"), log_mass(scale, loc, math.inf), rtol=1e-12
    )
    for tails in ("joint", "feature"):
        near = log_mass(scale, loc, 1e7, tails=tails)
        np.testing.assert_allclose(near, log_mass(scale, loc, math.inf, tails=tails), atol=1e-4)


@pytest.mark.slow
def test_the_normalized_density_integrates_to_one(float64):
    loc = oracles.random_units(np.random.default_rng(0), 3)
    points, weights = oracles.two_sphere_quadrature(loc, 1e-3)
    for scale, tolerance in ((np.full(3, 0.4), 1e-6), (np.array([0.2, 0.5, 1.0]), 0.015)):
        for df in (1.0, 5.0, math.inf):
            log_density = directional_log_prob(points, loc=loc, scale_diag=scale, df=df)
            total = np.sum(weights * np.exp(log_density - log_mass(scale, loc, df)))
            np.testing.assert_allclose(total, 1, atol=tolerance)
    normalized = directional_log_prob(points[:9], loc=loc, scale_diag=scale, df=df, normalized=True)
    np.testing.assert_allclose(normalized, (log_density - log_mass(scale, loc, df))[:9], rtol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("dim", [3, nightly(16), 512])
def test_gradient_in_a_common_scale_is_that_of_the_quadrature(dim, float64):
    df = np.array([0.5, 5.0, math.inf])
    loc = oracles.random_units(np.random.default_rng(0), len(df), dim)
    scale, step = 0.15, 1e-4

    def total(log_scale):
        return jnp.sum(log_mass(jnp.exp(log_scale)[:, None] + jnp.zeros(loc.shape), loc, df))

    ends = np.array(
        [
            [oracles.equal_scale_log_mass(dim, scale * math.exp(s * step), one) for one in df]
            for s in (1, -1)
        ]
    )
    slope = (ends[0] - ends[1]) / (2 * step)
    gradient = jax.jit(jax.grad(total))(np.full(len(df), math.log(scale)))
    np.testing.assert_allclose(gradient, slope, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("tails", [nightly("joint"), "feature"])
def test_gradient_is_that_of_the_value_though_the_tilt_is_held(tails, float64):
    # The value hardly depends on the tilt, which has no gradient: they differ by its error alone.
    rng = np.random.default_rng(1)
    scale, loc = random_case(rng, 64, sigma=1.0, spread=10)
    direction = rng.normal(size=64)
    gradient = jax.grad(lambda log_s: log_mass(jnp.exp(log_s), loc, 5.0, tails=tails))(
        np.log(scale)
    )
    step = 1e-4
    ends = [log_mass(scale * np.exp(s * step * direction), loc, 5.0, tails) for s in (1, -1)]
    slope = float(ends[0] - ends[1]) / (2 * step)
    size = np.linalg.norm(gradient) * np.linalg.norm(direction)
    assert abs(gradient @ direction - slope) < 5e-3 * size


@pytest.mark.slow
@pytest.mark.parametrize("tails", ["joint", "feature"])
@pytest.mark.parametrize("dim", [3, nightly(128), nightly(4096)])
def test_values_and_gradients_are_finite_over_the_domain(dim, tails):
    rng = np.random.default_rng(dim)
    degrees = [1e-12, 1e-3, 0.5, 5.0, 1e8, math.inf]
    df, width = grid(degrees, [1e-15, 1e-6, 1e-2, 1.0, 1e3, 1e15])
    spread = np.exp(rng.uniform(-1, 1, (len(df), dim)))
    scale = jnp.asarray(width[:, None] * spread / spread.max(), jnp.float32)
    loc = jnp.asarray(oracles.random_units(rng, len(df), dim), jnp.float32)
    axis = jnp.zeros_like(loc).at[:, 0].set(1.0)
    df = jnp.asarray(df, jnp.float32)

    @jax.jit
    def gradients(scale, loc, df):
        mass = functools.partial(log_mass, tails=tails)
        return jax.grad(lambda *args: jnp.sum(mass(*args)), argnums=(0, 1, 2))(scale, loc, df)

    for location in (loc, axis):
        assert np.all(np.isfinite(log_mass(scale, location, df, tails=tails)))
        for gradient in gradients(scale, location, df):
            assert np.all(np.isfinite(gradient))


@pytest.mark.slow
def test_batches_broadcast_and_rows_are_independent():
    rng = np.random.default_rng(0)
    scale = jnp.asarray(rng.uniform(0.05, 0.5, (5, 7, 16)), jnp.float32)
    loc = jnp.asarray(oracles.random_units(rng, 7, 16), jnp.float32)
    df = jnp.asarray([0.5, 1, 2, 5, 30, 1e4, np.inf], jnp.float32)
    whole = log_mass(scale, loc, df)
    assert whole.shape == (5, 7)
    np.testing.assert_allclose(log_mass(scale[2, 3], loc[3], df[3]), whole[2, 3], rtol=1e-5)


@pytest.mark.parametrize(("tails", "df"), [("joint", 5.0), ("feature", math.inf)])
def test_a_tiny_scale_along_the_location_does_not_change_the_mass(tails, df):
    # Along an axis, the hyperplane has the other features: the scale there does not matter.
    tiny = np.geomspace(1e-20, 1.0, 21)
    scale = np.stack([np.ones(21), np.ones(21), tiny], axis=-1)
    loc = np.broadcast_to(np.eye(3)[2], scale.shape)
    actual = log_mass(*np.array([scale, loc], np.float32), np.float32(df), tails=tails)
    # P(|y| < 2) of a Student-t in the plane.
    outside = math.exp(-2) if math.isinf(df) else (1 + 4 / df) ** (-df / 2)
    np.testing.assert_allclose(actual, np.full(21, math.log1p(-outside)), atol=1e-5)
    # If features share the scale along the location, only the quotients of their scales matter.
    pair = np.stack([np.full(21, 0.3), tiny, 3 * tiny], axis=-1)
    mixed = np.broadcast_to([0.0, 0.6, 0.8], pair.shape)
    actual = log_mass(*np.array([pair, mixed], np.float32), np.float32(df), tails=tails)
    np.testing.assert_allclose(actual[:15], np.full(15, actual[15]), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("tails", [nightly("joint"), "feature"])
def test_a_location_without_a_direction_is_finite(tails):
    scale, zero = jnp.full((1, 16), 0.3, jnp.float32), jnp.zeros((1, 16), jnp.float32)

    def total(scale, loc):
        return jnp.sum(log_mass(scale, loc, jnp.float32(5.0), tails=tails))

    value, gradients = jax.jit(jax.value_and_grad(total, argnums=(0, 1)))(scale, zero)
    assert np.isfinite(value)
    assert all(np.all(np.isfinite(gradient)) for gradient in gradients)


def test_stereographic_density_fills_the_sphere():
    mass = directional_log_mass(
        np.full((2, 4), 0.3), loc=np.eye(4)[:2], df=5.0, coordinates="stereographic"
    )
    np.testing.assert_array_equal(mass, np.zeros(2))


def test_uniform_log_prob():
    np.testing.assert_allclose(uniform_log_prob(128), 127.05, atol=0.005)
    for dim in (1, 2, 3, 512):
        np.testing.assert_allclose(uniform_log_prob(dim), -oracles.log_sphere_area(dim), rtol=1e-12)


def test_bad_input_is_refused():
    scale, loc = np.full(8, 0.1), np.eye(8)[0]
    with pytest.raises(ValueError, match="D >= 3"):
        directional_log_mass(scale[:2], loc=loc[:2], df=5.0)
    for df in (0.0, -1.0, np.array([1.0, -2.0])):
        with pytest.raises(ValueError, match="df must be positive"):
            directional_log_mass(scale, loc=loc, df=df)
    with pytest.raises(ValueError, match="tails must be one of"):
        directional_log_mass(scale, loc=loc, df=5.0, tails="heavy")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="coordinates must be one of"):
        directional_log_mass(scale, loc=loc, df=5.0, coordinates="polar")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="feature"):
        directional_log_mass(scale, loc=loc, df=5.0, tails="feature", coordinates="stereographic")
    with pytest.raises(ValueError, match="at least 1"):
        uniform_log_prob(0)


def test_scales_that_are_not_positive_are_refused_and_nan_where_traced():
    loc, one = np.eye(4, dtype=np.float32)[0], np.ones(4, np.float32)
    for value in (0.0, -0.5, np.nan, np.inf):
        with pytest.raises(ValueError, match="scale_diag must be positive"):
            directional_log_mass(np.float32(value) * one, loc=loc, df=5.0)
    with pytest.raises(ValueError, match="unit vectors"):
        directional_log_mass(one, loc=2 * loc, df=5.0)
    with pytest.raises(ValueError, match="whole number"):
        uniform_log_prob(3.5)  # pyright: ignore[reportArgumentType]
    bad = np.stack([-one, one * np.array([1, 1, -1, 1], np.float32), one])
    found = log_mass(bad, loc, np.array([5, 5, -1], np.float32))
    assert found.shape == (3,)
    assert np.all(np.isnan(found))
    stereographic = jax.jit(
        lambda s: directional_log_mass(s, loc=loc, df=5.0, coordinates="stereographic")
    )
    np.testing.assert_array_equal(stereographic(bad), [np.nan, np.nan, 0])
    of_df = directional_log_mass(one, loc=loc, df=np.array([1, 5], np.float32))
    np.testing.assert_allclose(of_df[1], directional_log_mass(one, loc=loc, df=5.0), rtol=1e-6)
