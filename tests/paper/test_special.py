"""Special functions against mpmath, SciPy and their limits; the densities test them in use."""

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest

from jevb_jax.paper import domain, special

pytestmark = pytest.mark.numerics

A = np.array(
    [domain.LEAST_DF / 2, 1e-3, 0.1, 0.5, 1.0, 2.5, 7.9, 8.1, 64.0, 1e3, 1e5, 1e7, 1e12], np.float32
)
B = np.array([0.0, 0.5, 1.0, 3.0, 64.0, 2048.0], np.float32)


def exact_log_gamma_ratio(a: float, b: float) -> tuple[float, float]:
    """`lgamma(a + b) - lgamma(a) - b log a` and its derivative in `a`."""
    with mpmath.workdps(50):
        x, y = mpmath.mpf(a), mpmath.mpf(b)
        value = mpmath.loggamma(x + y) - mpmath.loggamma(x) - y * mpmath.log(x)
        slope = mpmath.digamma(x + y) - mpmath.digamma(x) - y / x
        return float(value), float(slope)


def test_log_gamma_ratio_and_its_slope_in_float32():
    a, b = (v.ravel() for v in np.meshgrid(A, B))
    expected = np.array(
        [exact_log_gamma_ratio(float(x), float(y)) for x, y in zip(a, b, strict=True)]
    )
    found = jax.jit(special.log_gamma_ratio)(a, b)
    # A few roundings of the largest of the terms that are summed: b log(1 + 8 / a), Stirling's 1/100.
    size = np.abs(expected[:, 0]) + b * np.log1p(8 / a.astype(np.float64)) + 0.01
    assert np.all(np.abs(found - expected[:, 0]) <= 1e-6 * size)
    slope = jax.jit(jax.vmap(jax.grad(special.log_gamma_ratio)))(a, b)
    # Likewise of its derivative, about b / a.
    size = np.abs(expected[:, 1]) + b / a.astype(np.float64) * 8 / (a + 8.0)
    assert np.all(np.abs(slope - expected[:, 1]) <= 1e-6 * size)


@pytest.mark.slow
def test_log_gamma_ratio_at_infinity():
    values = special.log_gamma_ratio(jnp.full(3, jnp.inf), jnp.asarray([0.5, 1.0, 64.0]))
    np.testing.assert_array_equal(values, np.zeros(3))


def test_digamma_difference_where_the_entropy_uses_it():
    a, b = (v.ravel() for v in np.meshgrid(A, B))
    a, b = a[a >= b / 1.0001], b[a >= b / 1.0001]  # alpha = beta + concentration
    found = jax.jit(jax.vmap(special.digamma_difference))(a, b)
    with mpmath.workdps(50):
        expected = [
            float(mpmath.digamma(mpmath.mpf(float(x)) + float(y)) - mpmath.digamma(float(x)))
            for x, y in zip(a, b, strict=True)
        ]
    np.testing.assert_allclose(found, expected, rtol=3e-6)


@pytest.mark.slow
def test_log1p_ratios():
    x = np.array([0.0, 1e-30, 1e-6, 1e-3, 0.3, 0.999, 1.0, 1.001, 7.0, 1e6, 1e30], np.float32)
    with mpmath.workdps(60):
        logs = [mpmath.log(1 + mpmath.mpf(float(v))) for v in x]
        exact = [mpmath.mpf(float(v)) for v in x]
        first = [float(log / v) if v else 1.0 for log, v in zip(logs, exact, strict=True)]
        second = [
            float((log - v) / v**2) if v else -0.5 for log, v in zip(logs, exact, strict=True)
        ]
    np.testing.assert_allclose(special.log1p_ratio(jnp.asarray(x)), first, rtol=5e-7)
    np.testing.assert_allclose(special.log1p_second_ratio(jnp.asarray(x)), second, rtol=5e-7)
    assert float(jax.grad(special.log1p_ratio)(0.0)) == pytest.approx(-0.5)
    assert float(jax.grad(special.log1p_second_ratio)(0.0)) == pytest.approx(1 / 3, rel=1e-5)
