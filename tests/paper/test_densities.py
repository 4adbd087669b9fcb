"""Densities against SciPy, mpmath and quadrature in float64, then float32 against both."""

import functools
import math
from typing import Any

import distrax
import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, stats

from jevb_jax import (
    directional_log_prob,
    gaussian_kl_divergence,
    multivariate_student_t_log_prob,
    power_spherical_entropy,
    power_spherical_log_prob,
    radial_log_prob,
    student_t_log_prob,
)
from jevb_jax.paper import mass
from tests import oracles
from tests.marks import nightly

COORDINATES = ("chordal", "stereographic")

# Errors in float32, whose rounding is 1.2e-7. Values: relative to the sum of the terms' sizes, some
# ten roundings. Gradients: relative to the largest entry of the vector.
VALUE_TOLERANCE = 1.5e-6
GRADIENT_TOLERANCE = 3e-5
DF_GRID = np.array([0.1, 1, 10, 1e2, 1e3, 1e4, 1e5, 1e6, 1e7, 1e8, np.inf])
# Powers of two, so that scaling a vector by one is exact: 6e-5 to 16384.
SCALE_GRID = 2.0 ** np.arange(-14, 15, 4)


pytestmark = pytest.mark.usefixtures("strict_dtypes")


def relative_error(actual, expected):
    """Relative to `max(1, |expected|)`."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    return np.abs(actual - expected) / np.maximum(1, np.abs(expected))


def assert_close(actual, expected, tolerance):
    error = relative_error(actual, expected)
    assert np.all(error <= tolerance), f"largest error {np.max(error):.3g} > {tolerance:.3g}"


@functools.partial(jax.jit, static_argnames="coordinates")
def directional(direction, loc, scale_diag, df, coordinates):
    """One number for each row of four arrays."""
    return directional_log_prob(
        direction, loc=loc, scale_diag=scale_diag, df=df, coordinates=coordinates
    )


@functools.partial(jax.jit, static_argnames="coordinates")
def directional_with_gradients(direction, loc, scale_diag, df, coordinates):
    f = functools.partial(directional, coordinates=coordinates)
    return jax.vmap(jax.value_and_grad(f, argnums=(0, 1, 2, 3)))(direction, loc, scale_diag, df)


# Directional: values.


@pytest.mark.parametrize("coordinates", COORDINATES)
@pytest.mark.parametrize("dim", [3, 4, 8, 40])
def test_directional_matches_scipy_in_the_tangent_space(float64, dim, coordinates):
    rng = np.random.default_rng(dim)
    u, m = oracles.random_units(rng, 2, 9, dim)
    scale = np.exp(rng.normal(size=(9, dim)))
    df = np.array([0.1, 0.5, 1, 2, dim - 1, 10, 30, 300, np.inf])
    expected = [
        oracles.scipy_directional_log_prob(*row, coordinates)
        for row in zip(u, m, scale, df, strict=True)
    ]
    assert_close(directional(u, m, scale, df, coordinates), expected, 1e-11)


@pytest.mark.numerics
@pytest.mark.slow
@pytest.mark.parametrize("coordinates", COORDINATES)
@pytest.mark.parametrize("dim", [3, nightly(6)])
def test_directional_values_and_gradients_match_forty_digits(float64, dim, coordinates):
    # Scales from 1e-4 to 1e4 within one vector. Derivatives along one random tangent of the sphere
    # for the direction and for the location, in all log scales and in log df.
    rng = np.random.default_rng(dim)
    df = np.array([0.1, 3, 1e3, 1e8, np.inf])
    u, m = oracles.random_units(rng, 2, len(df), dim)
    scale = 10 ** rng.uniform(-4, 4, size=u.shape)
    log_scale_step = rng.normal(size=u.shape)
    u_step, m_step = (
        v - np.sum(v * p, -1, keepdims=True) * p
        for v, p in zip(rng.normal(size=(2, *u.shape)), (u, m), strict=True)
    )
    value, (du, dm, ds, ddf) = directional_with_gradients(u, m, scale, df, coordinates)
    finite_df = np.where(np.isinf(df), 0, df)
    actual = np.stack(
        [
            np.sum(du * u_step, -1),
            np.sum(dm * m_step, -1),
            np.sum(ds * scale * log_scale_step, -1),
            ddf * finite_df,
        ],
        -1,
    )
    steps = np.zeros((4, 4))
    np.fill_diagonal(steps, 1)
    with mpmath.workdps(40):
        h = mpmath.mpf(10) ** -12
        for i in range(len(df)):

            def shifted(t_u, t_m, t_s, t_df, i=i):
                def mp(values):
                    return [mpmath.mpf(float(v)) for v in values]

                moved_u = [a + t_u * b for a, b in zip(mp(u[i]), mp(u_step[i]), strict=True)]
                moved_m = [a + t_m * b for a, b in zip(mp(m[i]), mp(m_step[i]), strict=True)]
                pairs = zip(mp(scale[i]), mp(log_scale_step[i]), strict=True)
                moved_s = [a * mpmath.exp(t_s * b) for a, b in pairs]
                moved_df = mpmath.mpf(float(df[i])) * mpmath.exp(t_df)
                return oracles.mp_directional_log_prob(
                    moved_u, moved_m, moved_s, moved_df, coordinates
                )

            assert_close(value[i], float(shifted(0, 0, 0, 0)), 1e-11)
            for k in range(4):
                ahead, behind = (
                    shifted(*[sign * h * int(j == k) for j in range(4)]) for sign in (1, -1)
                )
                assert_close(actual[i, k], float((ahead - behind) / (2 * h)), 1e-10)


@pytest.mark.parametrize("dim", [512, nightly(4096)])
def test_directional_determinant_in_many_dimensions(float64, dim):
    rng = np.random.default_rng(0)
    u, m = oracles.random_units(rng, 2, dim)
    scale = np.exp(rng.normal(size=dim))
    expected = oracles.directional_log_prob(u, m, scale, 3.0, "chordal")
    assert_close(directional(u, m, scale, 3.0, "chordal"), expected, 1e-10)


@pytest.mark.parametrize("dim", [3, 64])
def test_directional_isotropic_is_a_function_of_the_cosine(float64, dim):
    rng = np.random.default_rng(0)
    u, m = oracles.random_units(rng, 2, 20, dim)
    cosine = np.sum(u * m, -1)
    n, df, scale = dim - 1, 3.0, 0.7
    log_normalizer = (
        math.lgamma((df + n) / 2)
        - math.lgamma(df / 2)
        - n / 2 * math.log(df * math.pi)
        - n * math.log(scale)
    )
    chordal = log_normalizer - (df + n) / 2 * np.log1p(2 * (1 - cosine) / (df * scale**2))
    squared = 4 * (1 - cosine) / (1 + cosine)
    stereographic = (
        log_normalizer
        - (df + n) / 2 * np.log1p(squared / (df * scale**2))
        + n * np.log(2 / (1 + cosine))
    )
    scale_diag = np.full_like(u, scale)
    assert_close(directional(u, m, scale_diag, df, "chordal"), chordal, 1e-12)
    assert_close(directional(u, m, scale_diag, df, "stereographic"), stereographic, 1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("dim", [3, 8, 100])
def test_chordal_gaussian_limit_is_von_mises_fisher_up_to_its_constant(float64, dim):
    rng = np.random.default_rng(0)
    u, m = oracles.random_units(rng, 2, 20, dim)
    scale = 0.3
    cosines = np.sum(u * m, axis=-1)
    fisher = [oracles.von_mises_fisher(cosine, dim, scale**-2)[0] for cosine in cosines]
    difference = directional(u, m, np.full_like(u, scale), np.inf, "chordal") - np.array(fisher)
    assert_close(difference, np.full(20, np.mean(difference)), 1e-11)


@pytest.mark.parametrize("dim", [3, 8, 100])
def test_stereographic_with_df_n_is_the_spherical_cauchy(float64, dim):
    # Kato and McCullagh (2020): gamma(D/2) / (2 pi^(D/2)) ((1 - a^2) / (1 + a^2 - 2 a c))^(D - 1).
    # Its scale s, of stereographic coordinates of length 2 tan(angle / 2): (1 - a) / (1 + a) =
    # s sqrt(n) / 2.
    rng = np.random.default_rng(0)
    u, m = oracles.random_units(rng, 2, 20, dim)
    n, scale = dim - 1, 0.11
    ratio = scale * math.sqrt(n) / 2
    a = (1 - ratio) / (1 + ratio)
    cosine = np.sum(u * m, -1)
    expected = -oracles.log_sphere_area(dim) + n * np.log((1 - a**2) / (1 + a**2 - 2 * a * cosine))
    actual = directional(u, m, np.full_like(u, scale), float(n), "stereographic")
    assert_close(actual, expected, 1e-11)


@pytest.mark.parametrize("coordinates", COORDINATES)
def test_directional_symmetries(float64, coordinates):
    rng = np.random.default_rng(0)
    u, m = oracles.random_units(rng, 2, 7, 6)
    rotation = stats.special_ortho_group(6, seed=1).rvs()
    isotropic = np.full_like(u, 0.4)
    scale = np.exp(rng.normal(size=u.shape))
    permutation = rng.permutation(6)
    f = functools.partial(directional, df=2.5, coordinates=coordinates)
    assert_close(f(u @ rotation.T, m @ rotation.T, isotropic), f(u, m, isotropic), 1e-12)
    permuted = f(u[:, permutation], m[:, permutation], scale[:, permutation])
    assert_close(permuted, f(u, m, scale), 1e-12)
    # Not a symmetry: the axes carry the scale, so permuting it alone must show.
    assert np.all(np.abs(f(u, m, scale[:, permutation]) - f(u, m, scale)) > 1e-3)
    assert np.all(np.abs(f(u @ rotation.T, m @ rotation.T, scale) - f(u, m, scale)) > 1e-3)


# Directional: mass.


# Stereographic densities with df < D - 1 have an integrable pole at the antipode; for df < 1 it is
# too steep for the quadrature, not for the density.


@pytest.mark.parametrize("df", [0.3, 1.0, 2.0, 30.0, np.inf])
def test_mass_on_the_two_sphere(float64, df):
    # D = 3: chordal coordinates are equal-area, so the chordal mass is that of a disc of radius 2.
    rng = np.random.default_rng(0)
    m = oracles.random_units(rng, 3)
    for scale in (0.01, 0.3, 1.0, 4.0):
        isotropic = np.full(3, scale)
        anisotropic = scale * np.exp(rng.uniform(-0.5, 0.5, size=3))
        points, weights = oracles.two_sphere_quadrature(m, scale / 20)
        loc = np.broadcast_to(m, points.shape)

        def mass(scale_diag, coordinates, points=points, weights=weights, loc=loc):
            scale_diag = np.broadcast_to(scale_diag, points.shape)
            log_prob = directional(points, loc, scale_diag, df, coordinates)
            return np.sum(weights * np.exp(log_prob))

        disc = (
            -math.expm1(-2 / scale**2)
            if np.isinf(df)
            else -math.expm1(-df / 2 * math.log1p(4 / (df * scale**2)))
        )
        np.testing.assert_allclose(mass(isotropic, "chordal"), disc, atol=1e-10)
        chordal = mass(anisotropic, "chordal")
        assert chordal <= 1 + 1e-10
        if scale == 0.01 and df >= 2:
            np.testing.assert_allclose(chordal, 1, atol=1e-4)
        if df >= 1:
            for scale_diag in (isotropic, anisotropic):
                np.testing.assert_allclose(mass(scale_diag, "stereographic"), 1, atol=1e-6)


@pytest.mark.parametrize("dim", [3, nightly(4), nightly(8), 30])
def test_isotropic_mass_by_one_dimensional_quadrature(float64, dim):
    m, across = np.eye(dim)[:2]
    theta, weights = oracles.polar_angle_quadrature(1e-3)
    points = np.cos(theta)[:, None] * m + np.sin(theta)[:, None] * across
    ring = np.exp(oracles.log_sphere_area(dim - 1)) * np.sin(theta) ** (dim - 2)
    loc = np.broadcast_to(m, points.shape)
    for df, scale in ((1.0, 0.1), (4.0, 0.4), (dim - 1.0, 1.5), (np.inf, 0.3)):
        chordal, stereographic = (
            np.sum(
                weights
                * ring
                * np.exp(directional(points, loc, np.full_like(points, scale), df, coordinates))
            )
            for coordinates in COORDINATES
        )
        # dS = cos(theta / 2)^(D - 3) dy in chordal coordinates.
        lost = np.cos(theta / 2) ** (dim - 3)
        area = oracles.log_sphere_area(dim - 1)
        squared_length = (2 * np.sin(theta / 2) / scale) ** 2
        flat = oracles.student_t_log_density(squared_length, df, dim - 1)
        length = 2 * np.sin(theta / 2)
        shell = np.exp(area + flat) * length ** (dim - 2) * np.cos(theta / 2) * scale ** (1 - dim)
        np.testing.assert_allclose(chordal, np.sum(weights * shell * lost), rtol=1e-10)
        assert 0 < chordal <= 1 + 1e-10
        np.testing.assert_allclose(stereographic, 1, atol=1e-6)


@pytest.mark.parametrize("dim", [4, 8])
@pytest.mark.parametrize("df", [1.0, 5.0, np.inf])
def test_anisotropic_mass_by_importance_sampling(float64, dim, df):
    # Proposal: an isotropic Student-t of heavier tails in the tangent space, laid on the sphere
    # stereographically.
    rng = np.random.default_rng(dim)
    num_samples, n = 60_000, dim - 1
    proposal_df, proposal_scale = min(df, 3), 0.7
    m = oracles.random_units(rng, dim)
    scale_diag = np.exp(rng.uniform(math.log(0.25), math.log(0.7), size=dim))
    heavy = np.sqrt(proposal_df / rng.chisquare(proposal_df, size=(num_samples, 1)))
    y = proposal_scale * heavy * rng.normal(size=(num_samples, n))
    squared = np.sum(y**2, -1)
    points = oracles.from_tangent(y, m, "stereographic")
    log_proposal = (
        oracles.student_t_log_density(squared / proposal_scale**2, proposal_df, n)
        - n * math.log(proposal_scale)
        + n * np.log1p(squared / 4)
    )
    loc, scale_diag = (np.broadcast_to(v, points.shape) for v in (m, scale_diag))
    for coordinates in COORDINATES:
        log_prob = directional(points, loc, scale_diag, df, coordinates)
        weight = np.exp(np.asarray(log_prob) - log_proposal)
        mean, standard_error = weight.mean(), weight.std() / math.sqrt(num_samples)
        assert standard_error < 0.02
        if coordinates == "chordal":
            assert mean <= 1 + 4 * standard_error
        else:
            assert abs(mean - 1) <= 4 * standard_error


# Directional: float32 over the whole domain.


@functools.cache
def directional_grid(dim):
    """Every df with every scale at five places, as float32 rows; and what the oracle needs."""
    rng = np.random.default_rng(dim)
    m = oracles.random_units(rng, dim).astype(np.float32)
    base_scale = np.exp(rng.uniform(-0.7, 0.7, size=dim)).astype(np.float32)
    rows = []
    for scale in SCALE_GRID:
        near = oracles.unit(m + scale * base_scale * rng.normal(size=dim))
        far = oracles.random_units(rng, dim)
        beyond = oracles.unit(-m + 1e-3 * oracles.random_units(rng, dim))
        rows += [(u, scale, df) for u in (near, far, beyond, m, -m) for df in DF_GRID]
    u, scale, df = (np.stack(column).astype(np.float32) for column in zip(*rows, strict=True))
    scale_diag = scale[:, None] * base_scale
    return u, np.broadcast_to(m, u.shape), scale_diag, df


def sum_of_terms(scale_diag):
    """The size of what the log-density adds up, to which its rounding error is relative."""
    return 1 + np.sum(np.abs(np.log(np.float64(scale_diag))), axis=-1)


def is_antipode(u, m):
    return np.all(u == -m, axis=-1)


def grid_oracle(dim, u, m, scale_diag, df, coordinates):
    """All rows share the location and the shape of the scale, and so one dense precision matrix."""
    basis = oracles.tangent_basis(m[0])
    precision = oracles.tangent_precision(scale_diag[0] / scale_diag[0, 0], basis)
    y = oracles.tangent_coordinates(u, m, coordinates, basis)
    squared_length = np.einsum("bi,ij,bj->b", y, precision, y)
    # At the antipode the squared scaled length is its mean over the tangent directions.
    mean_squared_length = 4 * np.trace(precision) / (dim - 1)
    squared_length = np.where(is_antipode(u, m), mean_squared_length, squared_length)
    value = (
        oracles.student_t_log_density(squared_length / scale_diag[:, 0] ** 2, df, dim - 1)
        + np.linalg.slogdet(precision)[1] / 2
        - (dim - 1) * np.log(scale_diag[:, 0])
    )
    if coordinates == "stereographic":
        value = value - 2 * (dim - 1) * np.log(np.cos(oracles.angle(u, m) / 2))
    return value


@pytest.mark.numerics
@pytest.mark.slow
@pytest.mark.parametrize(
    ("dim", "coordinates"),
    [
        (3, "chordal"),
        (4096, "stereographic"),
        nightly(4096, "chordal"),
        nightly(3, "stereographic"),
        *(nightly(dim, coordinates) for dim in (8, 128) for coordinates in COORDINATES),
    ],
)
def test_directional_over_the_domain(dim, coordinates):
    rows32 = directional_grid(dim)
    rows64 = tuple(x.astype(np.float64) for x in rows32)
    u, m, scale_diag, df = rows64
    outputs = jax.tree.leaves(directional_with_gradients(*rows32, coordinates))
    assert {x.dtype for x in outputs} == {jnp.dtype("float32")}
    value, *gradients = (np.asarray(x, np.float64) for x in outputs)
    for array in (value, *gradients):
        assert np.all(np.isfinite(array))
    with jax.enable_x64(True):
        outputs = jax.tree.leaves(directional_with_gradients(*rows64, coordinates))
        unit_m = oracles.unit(m)
        unit_u = np.where(is_antipode(u, m)[:, None], -unit_m, oracles.unit(u))
        at_units = directional(unit_u, unit_m, scale_diag, df, coordinates)
    exact_value, *exact_gradients = (np.asarray(x) for x in outputs)
    # The stereographic point at infinity is kept finite by a guard that follows the precision.
    rows = ~is_antipode(u, m) if coordinates == "stereographic" else np.full(len(u), True)

    def assert_within(actual, expected, size, tolerance):
        error = np.abs(actual - expected)[rows] / size[rows]
        assert np.all(error <= tolerance), f"largest error {np.max(error):.3g} > {tolerance:.3g}"

    terms = np.maximum(np.abs(exact_value), sum_of_terms(scale_diag))
    assert_within(value, exact_value, terms, VALUE_TOLERANCE)
    # The gradients in direction and location add up and cancel terms of size n u and n m.
    summands = dim * np.max(np.abs(u), -1, keepdims=True)
    for gradient, exact, least in zip(
        gradients[:3], exact_gradients[:3], (summands, summands, 1), strict=True
    ):
        size = np.maximum(np.maximum(1, least), np.max(np.abs(exact), -1, keepdims=True))
        assert_within(gradient, exact, size, GRADIENT_TOLERANCE)
    # The derivative in df is a difference of terms of size n / df.
    size = np.maximum(np.maximum(1, np.abs(exact_gradients[3])), dim / df)
    assert_within(gradients[3], exact_gradients[3], size, GRADIENT_TOLERANCE)

    if dim <= 128:
        expected = grid_oracle(dim, u, m, scale_diag, df, coordinates)
        assert_within(np.asarray(at_units), expected, terms, 1e-9)
        # Rounding the two unit vectors to float32 moves the value along its gradient.
        moved = sum(np.linalg.norm(g, axis=-1) for g in exact_gradients[:2])
        assert_within(value, expected, terms + moved * 1.2e-7 / VALUE_TOLERANCE, VALUE_TOLERANCE)


@pytest.mark.parametrize("coordinates", COORDINATES)
def test_directional_at_the_location_depends_on_the_scale_only(float64, coordinates):
    rng = np.random.default_rng(0)
    m = oracles.random_units(rng, 4, 8)
    scale = np.exp(rng.normal(size=m.shape))
    precision = oracles.tangent_precision(scale, oracles.tangent_basis(m))
    for df in (0.5, 1e4, np.inf):
        expected = oracles.student_t_log_density(np.zeros(4), df, 7)
        expected = expected + np.linalg.slogdet(precision)[1] / 2
        assert_close(directional(m, m, scale, df, coordinates), expected, 1e-12)


def test_isotropic_chord_at_the_antipode_is_two(float64):
    m = oracles.random_units(np.random.default_rng(0), 4, 8)
    actual = directional(-m, m, np.full_like(m, 0.5), np.inf, "chordal")
    expected = -7 / 2 * math.log(2 * math.pi) - 7 * math.log(0.5) - 0.5 * 4 / 0.25
    assert_close(actual, np.full(4, expected), 1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("coordinates", COORDINATES)
def test_directional_at_the_zero_embedding_is_finite(coordinates):
    # `polar_decomposition` gives direction zero at the zero vector.
    rng = np.random.default_rng(0)
    m = oracles.random_units(rng, len(DF_GRID), 8).astype(np.float32)
    args = (np.zeros_like(m), m, np.full_like(m, 0.1), DF_GRID.astype(np.float32))
    value, gradients = directional_with_gradients(*args, coordinates)
    for array in (value, *gradients):
        assert np.all(np.isfinite(array))


@pytest.mark.slow
@pytest.mark.parametrize("coordinates", COORDINATES)
def test_directional_is_continuous_into_the_gaussian(float64, coordinates):
    # Derivation: log p_df - log p_inf = (n (n - 2) - 2 n Q + Q^2) / (4 df) + O(df^-2).
    rng = np.random.default_rng(0)
    n = 7
    u, m = oracles.random_units(rng, 2, 5, n + 1)
    scale = np.exp(rng.uniform(-0.5, 0.5, size=u.shape))
    basis = oracles.tangent_basis(m)
    y = oracles.tangent_coordinates(u, m, coordinates, basis)
    precision = oracles.tangent_precision(scale, basis)
    q = np.einsum("bi,bij,bj->b", y, precision, y)
    slope = (n * (n - 2) - 2 * n * q + q**2) / 4

    def at(df):
        return directional_with_gradients(u, m, scale, np.full(5, df), coordinates)

    limit, limit_gradients = at(np.inf)
    np.testing.assert_array_equal(limit_gradients[3], 0)
    for df in (1e5, 1e6, 1e7, 1e8, 1e10):
        value, gradients = at(df)
        # 1e-11: rounding of the value, seen through the difference.
        np.testing.assert_allclose(value - limit, slope / df, rtol=1e3 / df, atol=1e-11)
        np.testing.assert_allclose(-gradients[3] * df**2, slope, rtol=1e-2, atol=1e-3 * df / 1e5)
        for gradient, limit_gradient in zip(gradients[:3], limit_gradients[:3], strict=True):
            np.testing.assert_allclose(gradient, limit_gradient, atol=1e4 / df)


@pytest.mark.slow
def test_directional_shapes_and_types():
    rng = np.random.default_rng(0)
    u, m = oracles.random_units(rng, 2, 2, 5, 4).astype(np.float32)
    scale = np.exp(rng.normal(size=u.shape)).astype(np.float32)
    df = np.array([[1, 2, 3, 4, np.inf]] * 2, np.float32)
    value = directional(u, m, scale, df, "chordal")
    assert value.shape == (2, 5)
    for i in range(5):
        column = directional(u, m, scale, df[0, i], "chordal")[:, i]
        np.testing.assert_allclose(value[:, i], column, rtol=1e-6)
    for number in (3, 3.0, np.float64(3.0)):
        with_number = directional(u, m, scale, number, "chordal")
        np.testing.assert_allclose(with_number[:, 2], value[:, 2], rtol=1e-6)
    default = directional_log_prob(u, loc=m, scale_diag=scale, df=df)
    np.testing.assert_allclose(default, value, rtol=1e-6)
    half = [jnp.asarray(x, jnp.bfloat16) for x in (u, m, scale, df)]
    promoted = directional(*half, "chordal")
    assert promoted.dtype == jnp.float32
    expected = directional(*(x.astype(jnp.float32) for x in half), "chordal")
    np.testing.assert_allclose(promoted, expected, rtol=1e-6)

    def dtype_of(dtype):
        args = (jnp.zeros((5, 4), dtype), jnp.zeros((5, 4), dtype), jnp.ones((5, 4), dtype))
        return jax.eval_shape(functools.partial(directional, coordinates="chordal"), *args, 2).dtype

    assert dtype_of(jnp.float16) == jnp.float32
    with jax.enable_x64(True):
        assert dtype_of(jnp.float64) == jnp.float64
        assert dtype_of(jnp.float32) == jnp.float32


def test_directional_refuses_bad_input():
    u = jnp.eye(3)[0]
    for dim in (1, 2):
        flat = jnp.eye(dim)[0]
        with pytest.raises(ValueError, match="3"):
            directional_log_prob(flat, loc=flat, scale_diag=flat + 1, df=1.0)
    with pytest.raises(ValueError, match=r"chordal.*stereographic") as error:
        directional_log_prob(u, loc=u, scale_diag=u + 1, df=1.0, coordinates="polar")  # type: ignore[arg-type]
    assert "polar" in str(error.value)


# One-dimensional Student-t and the radius.


@pytest.mark.slow
def test_multivariate_student_t_matches_scipy(float64):
    rng = np.random.default_rng(0)
    for dim in (3, 64):  # one dimension is below
        x, loc = rng.normal(size=(2, 5, dim))
        scale = np.exp(rng.normal(size=(5, dim)))
        for df in (0.5, 5.0, 1e4, np.inf):
            found = multivariate_student_t_log_prob(x, loc=loc, scale_diag=scale, df=df)
            for i in range(5):
                frozen: Any = stats.multivariate_t
                exact = frozen(loc[i], np.diag(scale[i] ** 2), df=df).logpdf(x[i])
                np.testing.assert_allclose(found[i], exact, rtol=1e-10)
    # df may differ between examples; in one dimension it is the Student-t.
    df = np.array([0.5, 1.0, 5.0, 1e4, np.inf])
    x, loc, scale = rng.normal(size=5), rng.normal(size=5), np.exp(rng.normal(size=5))
    one = multivariate_student_t_log_prob(
        x[:, None], loc=loc[:, None], scale_diag=scale[:, None], df=df
    )
    np.testing.assert_allclose(one, student_t_log_prob(x, df=df, loc=loc, scale=scale), rtol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("df", [0.1, nightly(5.0), nightly(1e8), np.inf])
def test_multivariate_student_t_is_finite_in_float32(df):
    rng = np.random.default_rng(1)
    x, loc = rng.normal(size=(2, 6, 512)).astype(np.float32)
    x[0] = loc[0]  # at the mode
    scale = np.broadcast_to(10.0 ** np.arange(-4, 2)[:, None], x.shape).astype(np.float32)

    def total(x, loc, scale):
        return jnp.sum(multivariate_student_t_log_prob(x, loc=loc, scale_diag=scale, df=df))

    found = multivariate_student_t_log_prob(x, loc=loc, scale_diag=scale, df=df)
    wide = (value.astype(np.float64) for value in (x, loc, scale))
    wide_x, wide_loc, wide_scale = wide
    quadratic = np.sum(((wide_x - wide_loc) / wide_scale) ** 2, axis=1)
    kernel = oracles.student_t_log_density(quadratic, df, 512)
    exact = kernel - np.sum(np.log(wide_scale), axis=1)
    # Relative to the summed terms: log(scale) and the kernel may cancel.
    size = np.abs(kernel) + np.sum(np.abs(np.log(wide_scale)), axis=1)
    assert np.max(np.abs(found - exact) / size) < 1e-5
    for gradient in jax.grad(total, argnums=(0, 1, 2))(x, loc, scale):
        assert np.all(np.isfinite(gradient))


def test_student_t_matches_scipy(float64):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(8, 50)) * 10
    df = np.logspace(-1, 6, 8)[:, None] + np.zeros((1, 50))
    loc, scale = rng.normal(size=(8, 50)), 10 ** rng.uniform(-4, 4, size=(8, 50))
    # SciPy's own normaliser loses digits by cancellation: 1e-9 at df = 1e6.
    expected = stats.t.logpdf(x, df, loc, scale)
    assert_close(student_t_log_prob(x, df=df, loc=loc, scale=scale), expected, 1e-9)
    gaussian = student_t_log_prob(x, df=np.inf, loc=loc, scale=scale)
    assert_close(gaussian, stats.norm.logpdf(x, loc, scale), 1e-13)
    exact = oracles.student_t_log_density(((x - loc) / scale) ** 2, df, 1) - np.log(scale)
    assert_close(student_t_log_prob(x, df=df, loc=loc, scale=scale), exact, 1e-13)


@pytest.mark.parametrize("space", ["log", "linear"])
def test_radial_matches_scipy(float64, space):
    rng = np.random.default_rng(0)
    radius, loc = 10 ** rng.uniform(-3, 3, size=(2, 200))
    scale = 10 ** rng.uniform(-2, 2, size=200)
    for df in (0.1, 1.0, 3.0, 100.0, 1e4, np.inf):
        expected = oracles.radial_log_prob(radius, loc, scale, df, space)
        actual = radial_log_prob(radius, loc=loc, scale=scale, df=df, space=space)
        assert_close(actual, expected, 1e-11)


@functools.partial(jax.jit, static_argnames="space")
def radial(radius, loc, scale, df, space):
    return radial_log_prob(radius, loc=loc, scale=scale, df=df, space=space)


@pytest.mark.parametrize("df", [0.5, 3.0, np.inf])
@pytest.mark.parametrize("scale", [0.05, 1.0, 3.0])
def test_radial_mass(float64, df, scale):
    # In x = (log radius - log loc) / scale = sinh(t), whose double exponential reaches far into the
    # tail; the rest of the tail is SciPy's.
    loc = 2.0
    distribution = stats.norm if np.isinf(df) else stats.t(df)

    def mass(lowest, highest, radius, radius_slope, space):
        t, weights = oracles.panels(np.linspace(np.arcsinh(lowest), np.arcsinh(highest), 101), 12)
        x = np.sinh(t)
        log_prob = radial(radius(x), loc, scale, df, space)
        return np.sum(weights * np.exp(log_prob) * radius_slope(x) * np.cosh(t))

    edge = 600 / scale
    log_mass = mass(
        -edge,
        edge,
        lambda x: loc * np.exp(scale * x),
        lambda x: loc * np.exp(scale * x) * scale,
        "log",
    )
    np.testing.assert_allclose(
        log_mass + distribution.cdf(-edge) + distribution.sf(edge), 1, atol=1e-8
    )
    linear_mass = mass(
        -loc / scale, 1e9, lambda x: loc + scale * x, lambda x: np.full_like(x, scale), "linear"
    )
    linear_mass += distribution.sf(1e9)
    np.testing.assert_allclose(linear_mass, distribution.sf(-loc / scale), atol=1e-8)
    assert linear_mass < 1 + 1e-9


@pytest.mark.numerics
@pytest.mark.slow
@pytest.mark.parametrize("space", ["log", nightly("linear")])
def test_radial_float32_over_the_domain(space):
    length = np.array([0, 1e-20, 1e-4, 0.7, 1, 30, 1e4])
    grid = np.meshgrid(length, length, SCALE_GRID, DF_GRID)
    args = [x.ravel().astype(np.float32) for x in grid]
    f = jax.jit(
        jax.vmap(jax.value_and_grad(functools.partial(radial, space=space), argnums=(0, 1, 2, 3)))
    )
    value, gradients = f(*args)
    for array in (value, *gradients):
        assert np.all(np.isfinite(array))
    # Zero is read as the smallest normal number of the precision at hand.
    rows = (args[0] > 0) & (args[1] > 0) if space == "log" else np.full(len(args[0]), True)
    with jax.enable_x64(True):
        exact_value, exact_gradients = f(*(x.astype(np.float64) for x in args))
    assert_close(value[rows], exact_value[rows], 1e-5)
    # Derivatives in the logarithm of the scale; those in the scale are 1 / scale times as rough.
    units = (1, 1, args[2].astype(np.float64), 1)
    for gradient, exact, unit in zip(gradients, exact_gradients, units, strict=True):
        gradient, exact = np.asarray(gradient, np.float64) * unit, np.asarray(exact) * unit
        assert_close(gradient[rows], exact[rows], 1e-4)


def test_radial_refuses_an_unknown_space():
    with pytest.raises(ValueError, match=r"log.*linear") as error:
        radial_log_prob(1.0, loc=1.0, scale=1.0, df=1.0, space="square")  # type: ignore[arg-type]
    assert "square" in str(error.value)


# KL between Gaussians.


@pytest.mark.slow
def test_kl_matches_distrax_and_the_entropies(float64):
    rng = np.random.default_rng(0)
    mean, scale = rng.normal(size=(6, 9)), np.exp(rng.normal(size=(6, 9)))
    for prior_scale in (1.0, 0.3, 5.0):
        actual = gaussian_kl_divergence(mean, scale, prior_scale=prior_scale)
        assert actual.shape == (6,)
        assert_close(actual, oracles.gaussian_kl_divergence(mean, scale, prior_scale), 1e-12)
        posterior = distrax.MultivariateNormalDiag(mean, scale)
        prior = distrax.MultivariateNormalDiag(np.zeros(9), np.full(9, prior_scale))
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            expected = posterior.kl_divergence(prior)
        assert_close(actual, expected, 1e-12)
    default = gaussian_kl_divergence(mean, scale)
    assert_close(default, oracles.gaussian_kl_divergence(mean, scale, 1.0), 1e-12)


def test_kl_matches_monte_carlo(float64):
    rng = np.random.default_rng(0)
    mean, scale, prior_scale = np.array([0.5, -1, 2]), np.array([0.3, 1.5, 1]), 0.8
    z = rng.normal(mean, scale, size=(100_000, 3))
    log_ratio = np.sum(
        stats.norm.logpdf(z, mean, scale) - stats.norm.logpdf(z, 0, prior_scale), axis=-1
    )
    standard_error = log_ratio.std() / math.sqrt(len(z))
    actual = gaussian_kl_divergence(mean, scale, prior_scale=prior_scale)
    assert abs(actual - log_ratio.mean()) <= 4 * standard_error


def test_kl_is_of_the_posterior_from_the_prior():
    # KL(N(0, 1/4) || N(0, 1)) = log 2 + 1/8 - 1/2; the other way round it is 2 - log 2 - 1/2.
    zero = np.zeros(1, np.float32)
    forward = gaussian_kl_divergence(zero, zero + 0.5)
    backward = gaussian_kl_divergence(zero, zero + 1, prior_scale=0.5)
    np.testing.assert_allclose(forward, math.log(2) - 0.375, rtol=1e-6)
    np.testing.assert_allclose(backward, 1.5 - math.log(2), rtol=1e-6)


@pytest.mark.numerics
def test_kl_keeps_its_digits_near_zero():
    # In float32, x^2 - 1 - log(x^2) as written would have an error of 1e-7 here, a tenth of it.
    scale = 1 + np.linspace(-1e-3, 1e-3, 8, dtype=np.float32)
    zero = np.zeros_like(scale)
    expected = oracles.gaussian_kl_divergence(zero[:, None], scale.astype(np.float64)[:, None], 1.0)
    actual = kl_divergence(zero[:, None], scale[:, None], 1.0)
    np.testing.assert_allclose(actual, expected, rtol=2e-3)


@jax.jit
def kl_divergence(mean, scale, prior_scale):
    return gaussian_kl_divergence(mean, scale, prior_scale=prior_scale)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(-3, 3, width=32), min_size=4, max_size=4),
    st.lists(st.floats(2.0**-10, 2.0**10, width=32), min_size=4, max_size=4),
    st.sampled_from([0.25, 1.0, 3.0]),
)
def test_kl_is_zero_iff_equal(mean, scale, prior_scale):
    mean, scale = np.array(mean), np.array(scale)
    kl = float(kl_divergence(mean, scale, prior_scale))
    expected = oracles.gaussian_kl_divergence(mean, scale, prior_scale)
    assert_close(kl, expected, 1e-6)
    assert kl >= 0
    if expected > 1e-6:
        assert kl > 0
    assert float(kl_divergence(np.zeros(4), np.full(4, prior_scale), prior_scale)) == 0


# Von Mises-Fisher and power spherical.

SPHERE_DIMS = (3, nightly(8), nightly(65), 4096)
CONCENTRATIONS = (0.0, 1e-6, 1e-3, 0.1, 1.0, 10.0, 100.0, 1e3, 1e4, 1e5)


def sphere_pairs(dim, concentrations):
    """For each concentration: at the mean, at a typical angle, anywhere, and at the antipode."""
    rng = np.random.default_rng(dim)
    m = oracles.random_units(rng, dim)
    rows = []
    for k in concentrations:
        near = oracles.unit(m + rng.normal(size=dim) / math.sqrt(k + 1e-3))
        rows += [(u, k) for u in (m, near, oracles.random_units(rng, dim), -m)]
    u, k = (np.stack(column).astype(np.float32) for column in zip(*rows, strict=True))
    m = np.broadcast_to(np.float32(m), u.shape)
    return u, m, k, np.cos(oracles.angle(u, m))


def input_rounding(u, m, k):
    """What rounding both unit vectors to float32 can move `k cos(angle)` by."""
    return 2.4e-7 * k * np.sin(oracles.angle(u, m))


power_spherical_h = jax.jit(power_spherical_entropy, static_argnames="dim")


def test_power_spherical_check_value():
    entropy = power_spherical_h(np.float32(50), dim=64)
    np.testing.assert_allclose(entropy, -47.7297, atol=1e-4)


@jax.jit
def power_spherical_with_gradients(direction, loc, concentration):
    def f(direction, loc, concentration):
        return power_spherical_log_prob(direction, loc=loc, concentration=concentration)

    def entropy(concentration):
        return power_spherical_entropy(concentration, dim=direction.shape[-1])

    return (
        *jax.vmap(jax.value_and_grad(f, argnums=(0, 1, 2)))(direction, loc, concentration),
        *jax.vmap(jax.value_and_grad(entropy))(concentration),
    )


@pytest.mark.numerics
@pytest.mark.slow
@pytest.mark.parametrize("dim", SPHERE_DIMS)
def test_power_spherical_over_the_domain(dim):
    u, m, k, cosine = sphere_pairs(dim, (*CONCENTRATIONS, 1e6))
    one_plus = 2 * np.cos(oracles.angle(u, m) / 2) ** 2
    del cosine
    expected = [oracles.power_spherical(c - 1, dim, kk) for c, kk in zip(one_plus, k, strict=True)]
    expected, expected_entropy = np.array(expected).T
    outputs = power_spherical_with_gradients(u, m, k)
    for array in jax.tree.leaves(outputs):
        assert array.dtype == jnp.float32
        assert np.all(np.isfinite(array))
    value, _, entropy, _ = outputs
    # At the antipode the density is zero and its logarithm whatever the guard makes of it.
    rows = ~is_antipode(u, m)
    error = np.abs(np.asarray(value, np.float64) - expected)[rows]
    tolerance = 2e-6 * np.maximum(1, np.abs(expected)) + input_rounding(u, m, k)
    assert np.all(error <= tolerance[rows])
    by_concentration = np.asarray(value).reshape(-1, 4)[k.reshape(-1, 4)[:, 0] >= 1]
    assert np.all(by_concentration[:, 3] < by_concentration[:, :3].min(axis=1) - 10)
    assert_close(entropy, expected_entropy, 2e-5)
    with jax.enable_x64(True):
        args = (oracles.unit(u), oracles.unit(m), np.float64(k))
        value, gradients, entropy, entropy_gradient = power_spherical_with_gradients(*args)
        assert value.dtype == jnp.float64
    assert_close(value[rows], expected[rows], 1e-9)
    assert_close(entropy, expected_entropy, 1e-10)
    # Derivatives in the concentration by central differences of the oracle, in log k.
    step = 1e-6
    for i in np.flatnonzero(rows & (k >= 0.1) & (k <= 1e4))[::5]:
        ahead, behind = (
            np.array(
                oracles.power_spherical(one_plus[i] - 1, dim, float(k[i]) * math.exp(sign * step))
            )
            for sign in (1, -1)
        )
        slope = (ahead - behind) / (2 * step)
        actual = np.array([gradients[2][i], entropy_gradient[i]]) * np.float64(k[i])
        np.testing.assert_allclose(actual, slope, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dim", [2, 3, 8, 64])
def test_power_spherical_integrates_to_one_and_has_its_entropy(float64, dim):
    m = np.eye(dim)[0]
    log_ring_area = oracles.log_sphere_area(dim - 1) if dim > 2 else math.log(2)
    for k in (0.0, 0.5, 50.0, 1e4):

        def integrand(theta, power, k=k):
            point = np.cos(theta) * m + np.sin(theta) * np.eye(dim)[1]
            log_prob = power_spherical(point, m, k)
            ring = np.exp(float(log_prob) + log_ring_area) * np.sin(theta) ** (dim - 2)
            return ring * (-float(log_prob)) ** power

        edge = min(3.1, 12 * math.sqrt((dim + 1) / (k + 1)))
        mass, entropy = (
            integrate.quad(integrand, 0, edge, args=(power,), limit=60, epsabs=1e-6)[0]
            + integrate.quad(integrand, edge, np.pi, args=(power,), limit=60, epsabs=1e-6)[0]
            for power in (0, 1)
        )
        np.testing.assert_allclose(mass, 1, atol=1e-5)
        np.testing.assert_allclose(power_spherical_h(k, dim=dim), entropy, rtol=1e-4)


@jax.jit
def power_spherical(direction, loc, concentration):
    return power_spherical_log_prob(direction, loc=loc, concentration=concentration)


def test_power_spherical_entropy_matches_monte_carlo(float64):
    # Exact sampling (De Cao and Aziz 2020): (1 + cosine) / 2 is Beta(beta + k, beta).
    rng = np.random.default_rng(0)
    dim, k, num_samples = 64, 50.0, 100_000
    cosine = 2 * rng.beta((dim - 1) / 2 + k, (dim - 1) / 2, size=num_samples) - 1
    standard_error = cosine.std() / math.sqrt(num_samples)
    assert abs(cosine.mean() - 0.44248) <= 4 * standard_error + 1e-5
    axes = np.eye(dim)[:2]
    points = cosine[:, None] * axes[0] + np.sqrt(1 - cosine**2)[:, None] * axes[1]
    loc = np.broadcast_to(axes[0], points.shape)
    log_prob = np.asarray(power_spherical(points, loc, k))
    standard_error = log_prob.std() / math.sqrt(num_samples)
    entropy = power_spherical_h(np.float64(k), dim=dim)
    assert abs(log_prob.mean() + float(entropy)) <= 4 * standard_error


# Tails and mass.


def feature_log_prob(direction, loc, scale_diag, df):
    """The product over tangent coordinates in the space around the sphere, by SciPy."""
    y = tangent_vector(direction, loc)
    factors = stats.norm.logpdf(y, scale=scale_diag)
    if not np.isinf(df):
        factors = stats.t.logpdf(y, df, scale=scale_diag)
    along = np.sum(np.square(loc * scale_diag))
    return np.sum(factors) - stats.norm.logpdf(0, scale=math.sqrt(along))


def tangent_vector(direction, loc):
    """Chordal coordinates as a vector of the space around the sphere."""
    basis = oracles.tangent_basis(loc)
    return basis @ oracles.tangent_coordinates(direction, loc, "chordal", basis)


@pytest.mark.slow
@pytest.mark.parametrize("dim", [3, 8, 40])
def test_feature_wise_tails_match_scipy(float64, dim):
    rng = np.random.default_rng(dim)
    u, m = oracles.random_units(rng, 2, 6, dim)
    scale = np.exp(rng.normal(size=(6, dim)))
    df = np.array([0.1, 1, 5, 300, 1e6, np.inf])
    expected = [feature_log_prob(*row) for row in zip(u, m, scale, df, strict=True)]
    actual = directional_log_prob(u, loc=m, scale_diag=scale, df=df, tails="feature")
    assert_close(actual, expected, 1e-10)


@pytest.mark.slow
def test_both_tails_share_their_gaussian_limit(float64):
    rng = np.random.default_rng(0)
    u, m = oracles.random_units(rng, 2, 5, 16)
    scale = np.exp(rng.normal(size=(5, 16)))
    joint, feature = (
        directional_log_prob(u, loc=m, scale_diag=scale, df=math.inf, tails=tails)
        for tails in ("joint", "feature")
    )
    np.testing.assert_allclose(joint, feature, rtol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize(("tails", "force"), [("joint", 5 / 15), ("feature", 5.0)])
def test_force_that_holds_a_scale_up_far_in_the_tail(float64, tails, force):
    # A common scale far below the residuals: the slope in its logarithm, for each tangent dimension.
    rng = np.random.default_rng(0)
    u, m = oracles.random_units(rng, 2, 16)

    def log_prob(log_scale):
        scale = jnp.full(16, jnp.exp(log_scale))
        return directional_log_prob(u, loc=m, scale_diag=scale, df=5.0, tails=tails)

    slope = jax.grad(log_prob)(math.log(1e-7)) / 15
    # Feature-wise there are D factors, and the hyperplane gives one power of the scale back.
    expected = (16 * 5 + 1) / 15 if tails == "feature" else force
    np.testing.assert_allclose(slope, expected, rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("tails", ["joint", nightly("feature")])
def test_values_and_gradients_of_normalized_densities_are_finite(tails):
    rng = np.random.default_rng(0)
    df, width = (
        axis.ravel().astype(np.float32)
        for axis in np.meshgrid([0.5, 5.0, 1e8, np.inf], [1e-4, 1.0, 1e4], indexing="ij")
    )
    density = {"df": df, "tails": tails, "normalized": True}

    @jax.jit
    def values_and_gradients(u, m, s):
        def total(u, m, s):
            values = directional_log_prob(u, loc=m, scale_diag=s, **density)
            return jnp.sum(values), values

        return jax.grad(total, argnums=(0, 1, 2), has_aux=True)(u, m, s)

    for dim in (3, 128):
        units = oracles.random_units(rng, 2, len(df), dim)
        u, m = (jnp.asarray(x, jnp.float32) for x in units)
        scale = jnp.asarray(width[:, None], jnp.float32) * jnp.ones_like(u)
        for direction in (u, m, -m):
            gradients, values = values_and_gradients(direction, m, scale)
            assert np.all(np.isfinite(values))
            assert all(np.all(np.isfinite(gradient)) for gradient in gradients)


# Far tails.


def mp_student_t(x, df, loc, scale):
    """Value and derivatives in all four, by hand, in sixty digits."""
    with mpmath.workdps(60):
        x, nu, loc, s = (mpmath.mpf(float(v)) for v in (x, df, loc, scale))
        z = (x - loc) / s
        if mpmath.isinf(nu):
            value = -(z**2) / 2 - mpmath.log(2 * mpmath.pi) / 2 - mpmath.log(s)
            return [float(v) for v in (value, -z / s, 0, z / s, (z**2 - 1) / s)]
        q = z**2 / nu
        pull = (nu + 1) / nu * z / (1 + q)
        value = (
            mpmath.loggamma((nu + 1) / 2)
            - mpmath.loggamma(nu / 2)
            - mpmath.log(nu * mpmath.pi) / 2
            - (nu + 1) / 2 * mpmath.log1p(q)
            - mpmath.log(s)
        )
        of_df = (
            mpmath.digamma((nu + 1) / 2)
            - mpmath.digamma(nu / 2)
            - 1 / nu
            - mpmath.log1p(q)
            + (nu + 1) / nu * q / (1 + q)
        ) / 2
        return [float(v) for v in (value, -pull / s, of_df, pull / s, (z * pull - 1) / s)]


@pytest.mark.numerics
def test_student_t_and_its_gradients_far_in_the_tail_in_float32():
    distances = (0.0, 0.9, 1.1, 30.0, 1e4, 1e9, 1e13, 3e15, 1e18, 3e19, 1e30)
    rows = [
        (distance, df, 0.0, scale)
        for distance in distances
        for df in (0.2, 1.0, 5.0, 1e3, 1e8, np.inf)
        for scale in (1.0, 1e-6)
        # The square of a Gaussian deviation, and its derivatives, overflow where they should.
        if np.isfinite(df) or distance / scale < 1e14
    ]
    arguments = np.array(rows, np.float32).T

    @jax.jit
    @jax.vmap
    def found(x, df, loc, scale):
        def f(x, df, loc, scale):
            return student_t_log_prob(x, df=df, loc=loc, scale=scale)

        value, gradients = jax.value_and_grad(f, argnums=(0, 1, 2, 3))(x, df, loc, scale)
        return jnp.stack([value, *gradients])

    actual = np.float64(found(*arguments))
    expected = np.array([mp_student_t(*row) for row in arguments.T])
    for name, index in (("value", 0), ("x", 1), ("df", 2), ("loc", 3), ("scale", 4)):
        # Of value, df and scale what is added may cancel: roundings of its size.
        added = {0: 10.0, 2: 1 / arguments[1] + 1e-37, 4: 1 / arguments[3]}.get(index, 1e-37)
        size = np.maximum(np.abs(expected[:, index]), added)
        error = np.abs(actual[:, index] - expected[:, index]) / size  # pyright: ignore[reportIndexIssue]
        assert np.max(error) < 3e-5, (name, arguments[:, np.argmax(error)], np.max(error))


@pytest.mark.numerics
@pytest.mark.slow
def test_student_t_between_the_ends_of_float32():
    # The difference overflows in the first row, what is not selected in the second, and the square of
    # the scale in the rest.
    rows = [
        (3e38, 3.0, -3e38, 1.0),
        (-3e38, 5.0, 1e3, 1e-20),
        (3e36, 0.5, 1.0, 1e30),
        (1e-15, 3.0, 0.0, 1e-20),
        (1e25, 3.0, 0.0, 1e24),
    ]
    for row in rows:
        row = np.array(row, np.float32)
        value, slopes = jax.value_and_grad(
            lambda q: student_t_log_prob(q[0], df=q[1], loc=q[2], scale=q[3])
        )(row)
        expected = mp_student_t(*row)
        np.testing.assert_allclose([value, *slopes], expected, rtol=3e-5, atol=1e-37)
    for x, loc in ((3e38, 1.0), (2e38, 1e38)):
        vector, mean = (np.array([v, 0, 0], np.float32) for v in (x, loc))
        slope = jax.grad(
            lambda v, m=mean: multivariate_student_t_log_prob(v, loc=m, scale_diag=1.0, df=3.0)
        )(vector)
        np.testing.assert_allclose(slope, [-6 / (x - loc), 0, 0], rtol=1e-5, atol=1e-37)


@pytest.mark.numerics
@pytest.mark.slow
@pytest.mark.parametrize("coordinates", ["chordal", nightly("stereographic")])
def test_directional_gradients_far_in_the_tail_match_sixty_digits(coordinates):
    # Scales at a model's floor and far below it, across from the location and next to its antipode.
    m = np.eye(4, dtype=np.float32)[0]
    across = np.array([0, 0.6, 0.8, 0], np.float32)
    beyond = np.array([-1, 1e-4, 2e-4, 0], np.float32)  # nearer, the guard of the antipode shows
    ratios = np.array([1, 0.5, 2, 1], np.float32)
    rows = [
        (u, width, df)
        for u in (across, beyond)
        for width in (1e-4, 1e-12, 1e-20, 1e-30)
        for df in (0.5, 5.0)
    ]
    u = np.stack([row[0] for row in rows])
    scale = np.stack([np.float32(row[1]) * ratios for row in rows])
    df = np.array([row[2] for row in rows], np.float32)
    value, gradients = directional_with_gradients(
        u, np.broadcast_to(m, u.shape), scale, df, coordinates
    )
    actual = np.stack([value, np.sum(gradients[2] * scale, -1), gradients[3] * df], -1)
    with mpmath.workdps(90):
        h = mpmath.mpf(10) ** -25
        for i, found in enumerate(actual):
            point, scales = ([mpmath.mpf(float(x)) for x in v] for v in (u[i], scale[i]))

            def shifted(of_scale, of_df, i=i, point=point, scales=scales):
                return oracles.mp_directional_log_prob(
                    point,
                    [mpmath.mpf(float(x)) for x in m],
                    [s * mpmath.exp(of_scale) for s in scales],
                    mpmath.mpf(float(df[i])) * mpmath.exp(of_df),
                    coordinates,
                )

            expected = [
                shifted(0, 0),
                (shifted(h, 0) - shifted(-h, 0)) / (2 * h),
                (shifted(0, h) - shifted(0, -h)) / (2 * h),
            ]
            np.testing.assert_allclose(found, [float(v) for v in expected], rtol=2e-5, atol=2e-4)
    for gradient in gradients:
        assert np.all(np.isfinite(gradient))


@pytest.mark.numerics
@pytest.mark.slow
def test_multivariate_student_t_far_in_the_tail():
    x = np.array([[3e25, -1e25, 0], [1e37, 2e37, 1e37], [2e4, 1, 1]], np.float32)
    scale = np.array([[1, 2, 1e-3], [1e-10, 1e-10, 1e-5], [1e-3, 1, 5]], np.float32)
    df = np.float32(3.0)

    def total(x, scale, df):
        return jnp.sum(multivariate_student_t_log_prob(x, loc=0 * x, scale_diag=scale, df=df))

    found = multivariate_student_t_log_prob(x, loc=0 * x, scale_diag=scale, df=df)
    of_x, of_scale, of_df = jax.grad(total, argnums=(0, 1, 2))(x, scale, df)
    z = [
        [mpmath.mpf(float(a)) / mpmath.mpf(float(b)) for a, b in zip(*r, strict=True)]
        for r in zip(x, scale, strict=True)
    ]
    q = [mpmath.fsum(v**2 for v in row) / 3 for row in z]
    exact = [
        mpmath.loggamma(3)
        - mpmath.loggamma(1.5)
        - 1.5 * mpmath.log(3 * mpmath.pi)
        - 3 * mpmath.log1p(v)
        - mpmath.fsum(mpmath.log(float(s)) for s in row)
        for v, row in zip(q, scale, strict=True)
    ]
    np.testing.assert_allclose(found, [float(v) for v in exact], rtol=2e-6)
    pull = np.array([[float(2 * v / (1 + w)) for v in row] for row, w in zip(z, q, strict=True)])
    np.testing.assert_allclose(of_x * scale, -pull, rtol=2e-5, atol=1e-37)
    stretch = np.array(
        [[float(2 * v**2 / (1 + w)) for v in row] for row, w in zip(z, q, strict=True)]
    )
    np.testing.assert_allclose(of_scale * scale, stretch - 1, rtol=1e-4, atol=1e-5)
    slope = mpmath.fsum(
        (mpmath.digamma(3) - mpmath.digamma(1.5) - 1 - mpmath.log1p(v) + 2 * v / (1 + v)) / 2
        for v in q
    )
    np.testing.assert_allclose(of_df, float(slope), rtol=1e-5)  # pyright: ignore[reportArgumentType]


@pytest.mark.numerics
@pytest.mark.slow
def test_kl_of_scales_whose_quotient_underflows():
    for scale, prior in ((1e-30, 1e30), (1.3e-38, 3e37), (1e-20, 1e20), (1e-5, 1e5)):
        of_scale, of_prior = (np.float64(np.float32(v)) for v in (scale, prior))
        value, slopes = jax.value_and_grad(
            lambda s, p: gaussian_kl_divergence(np.zeros(1, np.float32), s, prior_scale=p),
            argnums=(0, 1),
        )(np.float32(scale), np.float32(prior))
        np.testing.assert_allclose(value, np.log(of_prior) - np.log(of_scale) - 0.5, rtol=1e-6)
        # Above 1e38 the slope of the prior is subnormal.
        expected = [-1 / of_scale, 1 / of_prior]
        np.testing.assert_allclose(slopes, expected, rtol=1e-5, atol=1e-38)


# The domain.

AXIS = np.eye(4, dtype=np.float32)[0]
ONES = np.ones(4, np.float32)
# Every argument that has a domain: a call, and what is not allowed beside NaN.
GUARDED: dict[str, tuple[Any, tuple[float, ...]]] = {
    "directional scale_diag": (
        lambda v: directional_log_prob(AXIS, loc=AXIS, scale_diag=v * ONES, df=3.0),
        (0.0, -1.0, np.inf),
    ),
    "directional df": (
        lambda v: directional_log_prob(AXIS, loc=AXIS, scale_diag=ONES, df=v),
        (0.0, -2.0),
    ),
    "student df": (lambda v: student_t_log_prob(1.0, df=v, loc=0.0, scale=1.0), (0.0, -2.0)),
    "student scale": (
        lambda v: student_t_log_prob(1.0, df=5.0, loc=0.0, scale=v),
        (0.0, -1.0, np.inf),
    ),
    "radial radius": (lambda v: radial_log_prob(v, loc=1.0, scale=1.0, df=3.0), (-1.0,)),
    "radial linear radius": (
        lambda v: radial_log_prob(v, loc=1.0, scale=1.0, df=3.0, space="linear"),
        (-1.0,),
    ),
    "radial loc": (lambda v: radial_log_prob(1.0, loc=v, scale=1.0, df=3.0), (-1.0,)),
    "radial scale": (lambda v: radial_log_prob(1.0, loc=1.0, scale=v, df=3.0), (0.0, -1.0)),
    "radial df": (lambda v: radial_log_prob(1.0, loc=1.0, scale=1.0, df=v), (0.0, -1.0)),
    "multivariate scale_diag": (
        lambda v: multivariate_student_t_log_prob(AXIS, loc=ONES, scale_diag=v * ONES, df=3.0),
        (0.0, -1.0),
    ),
    "multivariate df": (
        lambda v: multivariate_student_t_log_prob(AXIS, loc=ONES, scale_diag=ONES, df=v),
        (0.0, -1.0),
    ),
    "kl posterior_scale": (
        lambda v: gaussian_kl_divergence(AXIS, v * ONES),
        (0.0, -0.9, -1.0, -2.0, np.inf),
    ),
    "kl prior_scale": (
        lambda v: gaussian_kl_divergence(AXIS, ONES, prior_scale=v),
        (0.0, -1.0, np.inf),
    ),
    "spherical concentration": (
        lambda v: power_spherical_log_prob(AXIS, loc=AXIS, concentration=v),
        (-0.5, np.inf),
    ),
    "entropy concentration": (lambda v: power_spherical_entropy(v, dim=4), (-0.5, np.inf)),
}


@pytest.mark.parametrize("name", GUARDED)
def test_outside_of_the_domain_is_refused_and_nan_where_traced(name):
    call, outside = GUARDED[name]
    argument = name.split()[-1]
    is_data = argument in ("radius", "loc")
    for value in (*outside, *(() if is_data else (np.nan,))):
        for known in (np.float32(value), jnp.float32(value)):
            with pytest.raises(ValueError, match=f"{argument} must be"):
                call(known)
    values = jnp.asarray([*outside, np.nan, 1.5], jnp.float32)
    found = jax.jit(jax.vmap(call))(values)
    assert np.all(np.isnan(found[:-1]))
    np.testing.assert_allclose(found[-1], call(np.float32(1.5)), rtol=1e-5)


def test_directions_must_have_norm_one_where_they_are_known():
    long = np.array([3, 0, 0, 0], np.float32)
    for call in (
        lambda u, m: directional_log_prob(u, loc=m, scale_diag=ONES, df=1.0),
        lambda u, m: power_spherical_log_prob(u, loc=m, concentration=1.0),
    ):
        for name, pair in (("direction", (long, AXIS)), ("loc", (AXIS, long))):
            with pytest.raises(ValueError, match=f"{name} must be unit vectors.*norm 3"):
                call(*pair)
        assert np.isfinite(call(0 * AXIS, AXIS))  # the direction of a zero embedding
    with pytest.raises(ValueError, match=r"last axis.*\(4,\).*\(1,\)"):
        directional_log_prob(AXIS, loc=AXIS[:1], scale_diag=ONES, df=1.0)
    with pytest.raises(ValueError, match=r"last axis"):
        gaussian_kl_divergence(np.zeros((5, 1), np.float32), np.ones((5, 7), np.float32))
    with pytest.raises(ValueError, match=r"broadcast.*df \(3,\)"):
        directional_log_prob(
            np.tile(AXIS, (2, 1)), loc=AXIS, scale_diag=ONES, df=np.ones(3, np.float32)
        )


@pytest.mark.slow
def test_every_argument_broadcasts_against_the_batch():
    rng = np.random.default_rng(0)
    u = oracles.random_units(rng, 2, 1, 4).astype(np.float32)
    m = oracles.random_units(rng, 3, 4).astype(np.float32)
    scale = np.exp(rng.normal(size=(5, 1, 1, 4))).astype(np.float32)
    k = np.array([0.5, 3, 40], np.float32)

    def apart(function, *arrays, last):
        """One call for each element of the batch `[5, 2, 3]`."""
        shape = (5, 2, 3)
        full = [
            np.broadcast_to(x, (*shape, x.shape[-1]) if is_vector else shape)
            for x, is_vector in zip(arrays, last, strict=True)
        ]
        flat = [x.reshape(30, *x.shape[3:]) for x in full]
        return np.asarray(function(*flat)).reshape(shape)

    def directional(u, m, s, df):
        return directional_log_prob(u, loc=m, scale_diag=s, df=df)

    def multivariate(u, m, s, df):
        return multivariate_student_t_log_prob(u, loc=m, scale_diag=s, df=df)

    for function in (directional, multivariate):
        whole = function(u, m, scale, k)
        expected = apart(function, u, m, scale, k, last=(True, True, True, False))
        np.testing.assert_allclose(whole, expected, rtol=1e-5, atol=1e-5)
        # One scale for all features, as a number and as a column.
        same = function(u, m, 0.5, k)
        np.testing.assert_allclose(same, function(u, m, 0.5 * ONES, k), rtol=1e-6)
        np.testing.assert_allclose(same, function(u, m, 0.5 * ONES[:1], k), rtol=1e-6)
    whole = power_spherical_log_prob(u[0, 0], loc=m[0], concentration=k)
    single = [power_spherical_log_prob(u[0, 0], loc=m[0], concentration=v) for v in k]
    np.testing.assert_allclose(whole, single, rtol=1e-5)
    assert power_spherical_log_prob(u, loc=m, concentration=k[:, None, None]).shape == (3, 2, 3)
    assert radial_log_prob(2.0, loc=k, scale=1.0, df=k[:, None]).shape == (3, 3)
    assert student_t_log_prob(2.0, loc=k, scale=1.0, df=k[:, None]).shape == (3, 3)


@pytest.mark.slow
def test_float32_stays_float32_where_x64_is_enabled():
    with jax.enable_x64(True):
        for name, (call, _) in GUARDED.items():
            value, slope = jax.eval_shape(jax.value_and_grad(call), jnp.float32(1.5))
            assert value.dtype == slope.dtype == jnp.float32, name
        for tails in mass.TAILS:

            def of_scale(s, tails=tails):
                density = {"loc": AXIS, "df": 3.0, "tails": tails, "normalized": True}
                return directional_log_prob(AXIS, scale_diag=s, **density)

            value, slope = jax.eval_shape(jax.value_and_grad(of_scale), ONES)
            assert value.dtype == slope.dtype == jnp.float32


@pytest.mark.slow
def test_degrees_of_freedom_go_down_to_a_stated_number():
    # Far below it terms overflow in float32: the density was NaN, or off by thousands of nats.
    arguments: dict[str, Any] = {"loc": 0.0, "scale": 1.0}
    for df in (1e-37, 1e-30, 9e-13):
        with pytest.raises(ValueError, match="df must be positive, at least 1e-12"):
            student_t_log_prob(2.0, df=df, **arguments)
        traced = jax.jit(functools.partial(student_t_log_prob, **arguments))(2.0, df=df)
        assert np.isnan(traced)
    found, slope = jax.value_and_grad(lambda df: student_t_log_prob(2.0, df=df, **arguments))(1e-12)
    # Far out in the tail, p = df / (2 |x|).
    np.testing.assert_allclose(found, np.log(1e-12 / 4), rtol=1e-6)
    np.testing.assert_allclose(slope, 1e12, rtol=1e-5)
    u, m = oracles.random_units(np.random.default_rng(0), 2, 512).astype(np.float32)
    value, slope = jax.jit(
        jax.value_and_grad(
            lambda df: directional_log_prob(u, loc=m, scale_diag=0.1, df=df, coordinates="chordal")
        )
    )(1e-12)
    exact = oracles.directional_log_prob(
        np.float64(u), np.float64(m), np.full(512, 0.1), 1e-12, "chordal"
    )
    np.testing.assert_allclose(value, exact, rtol=1e-5)
    assert np.isfinite(slope)
