"""The distrax distributions: densities, exact samples against SciPy's marginals, composition."""

import functools
import math
from typing import Any

import distrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special, stats

import jevb_jax
from tests import oracles

NUM_SAMPLES = 20_000
# A Kolmogorov-Smirnov test fails by chance for one seed in ten thousand; ours are fixed.
SIGNIFICANCE = 1e-4


def unit32(seed, *shape):
    return oracles.random_units(np.random.default_rng(seed), *shape).astype(np.float32)


def half_one_minus_cosine(samples, loc):
    """`(1 - cosine) / 2`, from the chord, which keeps the digits of small angles."""
    return np.sum((np.float64(samples) - loc) ** 2, -1) / 4


# Power spherical.


@pytest.mark.parametrize(
    ("dim", "concentration"), [(3, 0.0), (3, 5.0), (3, 1e6), (8, 1e4), (64, 50.0), (512, 300.0)]
)
def test_power_spherical_samples_follow_their_density(dim, concentration):
    loc = unit32(0, dim)
    distribution = jevb_jax.PowerSpherical(loc, concentration)
    samples, log_prob = distribution.sample_and_log_prob(
        seed=jax.random.key(0), sample_shape=(NUM_SAMPLES,)
    )
    assert samples.shape == (NUM_SAMPLES, dim)
    assert log_prob.shape == (NUM_SAMPLES,)
    np.testing.assert_allclose(np.linalg.norm(np.float64(samples), axis=-1), 1, atol=1e-6)
    beta = stats.beta((dim - 1) / 2, (dim - 1) / 2 + concentration)
    assert stats.kstest(half_one_minus_cosine(samples, loc), beta.cdf).pvalue > SIGNIFICANCE
    # Across the mean direction: uniform on the sphere of the tangent space.
    tangent = np.float64(samples) @ oracles.tangent_basis(loc)
    coordinate = oracles.unit(tangent)[:, 0]
    if dim > 3:
        uniform = stats.beta((dim - 2) / 2, (dim - 2) / 2)
        assert stats.kstest((1 + coordinate) / 2, uniform.cdf).pvalue > SIGNIFICANCE
    else:
        angle = np.arctan2(*tangent.T) / (2 * np.pi) % 1
        assert stats.kstest(angle, "uniform").pvalue > SIGNIFICANCE
    if concentration > 0:
        error = np.std(log_prob) / math.sqrt(NUM_SAMPLES)
        assert abs(np.mean(log_prob) + distribution.entropy()) <= 4 * error + 1e-5
    expected = jevb_jax.power_spherical_log_prob(
        samples, loc=np.broadcast_to(loc, samples.shape), concentration=concentration
    )
    np.testing.assert_allclose(log_prob, expected, rtol=1e-5, atol=1e-4)


def test_power_spherical_mean():
    # E[cos] = k / (D - 1 + k): 0.44248 at D = 64, k = 50.
    loc = unit32(0, 64)
    distribution = jevb_jax.PowerSpherical(loc, 50.0)
    np.testing.assert_allclose(distribution.mean(), 0.442478 * loc, rtol=1e-5, atol=1e-7)
    samples = distribution.sample(seed=jax.random.key(0), sample_shape=(NUM_SAMPLES,))
    cosine = 1 - 2 * half_one_minus_cosine(samples, loc)
    assert abs(cosine.mean() - 0.44248) <= 4 * cosine.std() / math.sqrt(NUM_SAMPLES) + 1e-5


@pytest.mark.parametrize("sign", [1, -1])
def test_power_spherical_samples_at_the_poles_of_the_reflection(sign):
    # A Householder reflection that maps an axis to `loc` divides by zero where they are the same.
    for axis in (0, 4):
        loc = (sign * np.eye(5)[axis]).astype(np.float32)
        samples = jevb_jax.PowerSpherical(loc, 30.0).sample(
            seed=jax.random.key(0), sample_shape=(4000,)
        )
        assert np.all(np.isfinite(samples))
        cosine = 1 - 2 * half_one_minus_cosine(samples, loc)
        assert abs(cosine.mean() - 30 / 34) <= 4 * cosine.std() / math.sqrt(4000)


def test_power_spherical_samples_are_reparameterised():
    # d E[cos] / d k = (D - 1) / (D - 1 + k)^2, through the samples.
    loc, dim = unit32(0, 8), 8

    @jax.jit
    @jax.grad
    def slope(concentration):
        samples = jevb_jax.PowerSpherical(loc, concentration).sample(
            seed=jax.random.key(0), sample_shape=(NUM_SAMPLES,)
        )
        return jnp.mean(samples @ loc)

    np.testing.assert_allclose(slope(10.0), (dim - 1) / (dim - 1 + 10.0) ** 2, rtol=0.05)


# Spherical Student-t.


@pytest.mark.parametrize("dim", [3, 8, 64])
@pytest.mark.parametrize("df", [1.5, 20.0, np.inf])
def test_spherical_student_t_samples_follow_their_density(dim, df):
    rng = np.random.default_rng(dim)
    loc = unit32(0, dim)
    scale_diag = np.exp(rng.uniform(-1.5, 0, size=dim)).astype(np.float32)
    distribution = jevb_jax.SphericalStudentT(loc, scale_diag, df, coordinates="stereographic")
    samples = distribution.sample(seed=jax.random.key(1), sample_shape=(NUM_SAMPLES,))
    assert samples.shape == (NUM_SAMPLES, dim)
    np.testing.assert_allclose(np.linalg.norm(np.float64(samples), axis=-1), 1, atol=1e-6)
    # The Mahalanobis length of a Student-t vector is Fisher-distributed; whitened, its direction is
    # uniform.
    basis = oracles.tangent_basis(loc)
    flat = np.float64(samples) @ basis
    length = 2 * np.tan(oracles.angle(samples, loc) / 2)
    y = oracles.unit(flat) * length[:, None]
    white = y @ np.linalg.cholesky(oracles.tangent_precision(scale_diag, basis))
    n = dim - 1
    squared_length = np.sum(white**2, -1) / n
    expected = stats.chi2(n, scale=1 / n) if np.isinf(df) else stats.f(n, df)
    assert stats.kstest(squared_length, expected.cdf).pvalue > SIGNIFICANCE
    direction = oracles.unit(white)
    for axis in range(min(n, 4)):
        if n > 2:
            uniform = stats.beta((n - 1) / 2, (n - 1) / 2)
            pvalue = stats.kstest((1 + direction[:, axis]) / 2, uniform.cdf).pvalue
        else:
            pvalue = stats.kstest(np.arctan2(*direction.T) / (2 * np.pi) % 1, "uniform").pvalue
        assert pvalue > SIGNIFICANCE
    correlation = direction.T @ direction / NUM_SAMPLES * n
    np.testing.assert_allclose(correlation, np.eye(n), atol=6 / math.sqrt(NUM_SAMPLES))


def test_spherical_student_t_entropy_by_sampling_matches_quadrature():
    loc, scale_diag = unit32(0, 3), np.array([0.5, 0.3, 0.8], np.float32)
    distribution = jevb_jax.SphericalStudentT(loc, scale_diag, 4.0, coordinates="stereographic")
    _, log_prob = distribution.sample_and_log_prob(
        seed=jax.random.key(0), sample_shape=(NUM_SAMPLES,)
    )
    points, weights = oracles.two_sphere_quadrature(loc, 0.02)
    density = oracles.directional_log_prob(points, loc, scale_diag, 4.0, "stereographic")
    expected = np.sum(weights * np.exp(density) * density)
    assert abs(np.mean(log_prob) - expected) <= 4 * np.std(log_prob) / math.sqrt(NUM_SAMPLES)


@pytest.mark.parametrize("coordinates", ["chordal", "stereographic"])
def test_spherical_student_t_log_prob_is_the_function(coordinates):
    loc, u = unit32(0, 5, 8), unit32(1, 5, 8)
    scale_diag = np.exp(unit32(2, 5, 8))
    distribution = jevb_jax.SphericalStudentT(loc, scale_diag, 3.0, coordinates=coordinates)
    expected = jevb_jax.directional_log_prob(
        u, loc=loc, scale_diag=scale_diag, df=3.0, coordinates=coordinates
    )
    np.testing.assert_allclose(distribution.log_prob(u), expected, rtol=1e-6)
    np.testing.assert_allclose(distribution.prob(u), np.exp(expected), rtol=1e-5)


def test_spherical_student_t_defaults_to_chordal_which_cannot_be_sampled():
    loc, scale_diag = unit32(0, 4), np.full(4, 0.5, np.float32)
    u = unit32(1, 4)
    default = jevb_jax.SphericalStudentT(loc, scale_diag, 3.0)
    expected = jevb_jax.directional_log_prob(u, loc=loc, scale_diag=scale_diag, df=3.0)
    np.testing.assert_allclose(default.log_prob(u), expected, rtol=1e-6)
    with pytest.raises(NotImplementedError, match="stereographic"):
        default.sample(seed=jax.random.key(0))


def test_bad_input_is_refused():
    axis = np.eye(4, dtype=np.float32)[0]
    with pytest.raises(ValueError, match=r"chordal.*stereographic"):
        jevb_jax.SphericalStudentT(axis, axis + 1, 1.0, coordinates="polar")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="3"):
        jevb_jax.SphericalStudentT(axis[:2], axis[:2] + 1, 1.0)
    with pytest.raises(ValueError, match="2"):
        jevb_jax.PowerSpherical(axis[:1], 1.0)


# Composition.


def faces():
    loc = unit32(0, 3, 4)
    scale_diag = np.exp(unit32(2, 3, 4))
    df = np.array([1.0, 10.0, np.inf], np.float32)
    return [
        jevb_jax.PowerSpherical(loc, np.array([0.0, 5.0, 50.0], np.float32)),
        jevb_jax.SphericalStudentT(loc, scale_diag, df, coordinates="stereographic"),
    ]


def test_shapes_and_batches():
    u = unit32(1, 3, 4)
    for distribution in faces():
        assert distribution.batch_shape == (3,)
        assert distribution.event_shape == (4,)
        sample = functools.partial(distribution.sample, seed=jax.random.key(0))
        samples = jax.eval_shape(lambda sample=sample: sample(sample_shape=(2, 5)))
        assert samples.shape == (2, 5, 3, 4)
        assert samples.dtype == jnp.float32
        assert jax.eval_shape(sample).shape == (3, 4)
        assert jax.eval_shape(distribution.log_prob, samples).shape == (2, 5, 3)
        assert jax.eval_shape(distribution.log_prob, u).shape == (3,)


def test_one_location_broadcasts_over_a_batch_of_parameters():
    loc = unit32(0, 4)
    power = jevb_jax.PowerSpherical(loc, np.array([1.0, 2.0], np.float32))
    assert power.batch_shape == (2,)
    assert jax.eval_shape(power.log_prob, loc).shape == (2,)
    assert jax.eval_shape(lambda: power.sample(seed=jax.random.key(0))).shape == (2, 4)
    student = jevb_jax.SphericalStudentT(
        loc, np.ones((2, 4), np.float32), 3.0, coordinates="stereographic"
    )
    assert student.batch_shape == (2,)
    assert jax.eval_shape(student.log_prob, loc).shape == (2,)
    assert jax.eval_shape(lambda: student.sample(seed=jax.random.key(0))).shape == (2, 4)


@pytest.mark.slow
def test_they_pass_through_jit_and_compose_with_distrax():
    u = unit32(1, 3, 4)
    for distribution in faces():
        log_prob = distribution.log_prob(u)
        through_jit = jax.jit(lambda d, u: d.log_prob(u))(distribution, u)
        np.testing.assert_allclose(through_jit, log_prob, rtol=1e-5)
        independent = distrax.Independent(distribution, reinterpreted_batch_ndims=1)
        np.testing.assert_allclose(independent.log_prob(u), np.sum(log_prob), rtol=1e-5)
        assert independent.sample(seed=jax.random.key(0)).shape == (3, 4)
        logits = np.array([0.1, 0.5, -1.0], np.float32)
        mixture = distrax.MixtureSameFamily(distrax.Categorical(logits=logits), distribution)
        with jax.numpy_rank_promotion("allow"):
            mixed = mixture.log_prob(u[0])
        components = distribution.log_prob(np.broadcast_to(u[0], (3, 4)))
        expected = special.logsumexp(components + logits - special.logsumexp(logits))
        np.testing.assert_allclose(mixed, expected, rtol=1e-5)


def test_they_compose_with_tensorflow_probability():
    u = unit32(1, 3, 4)
    for distribution in faces():
        tfp: Any = distrax.to_tfp(distribution)
        np.testing.assert_allclose(tfp.log_prob(u), distribution.log_prob(u), rtol=1e-6)
        assert tuple(tfp.event_shape) == (4,)


# Gaussians.


def test_posterior_and_prior_are_distrax_gaussians():
    rng = np.random.default_rng(0)
    mean, scale = rng.normal(size=(2, 3, 6)).astype(np.float32)
    scale = np.exp(scale)
    posterior = jevb_jax.gaussian_posterior(mean, scale)
    assert isinstance(posterior, distrax.MultivariateNormalDiag)
    with jax.numpy_rank_promotion("allow"):
        log_prob = posterior.log_prob(mean + 1)
        np.testing.assert_allclose(
            log_prob, np.sum(stats.norm.logpdf(1, 0, np.float64(scale)), -1), rtol=1e-5
        )
        for prior_scale in (None, 0.5):
            settings = {} if prior_scale is None else {"prior_scale": prior_scale}
            prior = jevb_jax.gaussian_prior(6, **settings)
            assert isinstance(prior, distrax.MultivariateNormalDiag)
            assert prior.event_shape == (6,)
            np.testing.assert_allclose(
                posterior.kl_divergence(prior),
                jevb_jax.gaussian_kl_divergence(mean, scale, **settings),
                rtol=1e-5,
            )
