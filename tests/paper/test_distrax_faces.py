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
from tests.marks import nightly

NUM_SAMPLES = 20_000
# A Kolmogorov-Smirnov test fails by chance for one seed in ten thousand; ours are fixed.
SIGNIFICANCE = 1e-4


def unit32(seed, *shape):
    return oracles.random_units(np.random.default_rng(seed), *shape).astype(np.float32)


def half_one_minus_cosine(samples, loc):
    """`(1 - cosine) / 2`, from the chord, which keeps the digits of small angles."""
    return np.sum((np.float64(samples) - loc) ** 2, -1) / 4


# Power spherical.


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dim", "concentration"),
    [(3, 0.0), nightly(3, 5.0), (3, 1e6), nightly(8, 1e4), nightly(64, 50.0), (512, 300.0)],
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


@pytest.mark.slow
def test_power_spherical_mean():
    # E[cos] = k / (D - 1 + k): 0.44248 at D = 64, k = 50.
    loc = unit32(0, 64)
    distribution = jevb_jax.PowerSpherical(loc, 50.0)
    np.testing.assert_allclose(distribution.mean(), 0.442478 * loc, rtol=1e-5, atol=1e-7)
    samples = distribution.sample(seed=jax.random.key(0), sample_shape=(NUM_SAMPLES,))
    cosine = 1 - 2 * half_one_minus_cosine(samples, loc)
    assert abs(cosine.mean() - 0.44248) <= 4 * cosine.std() / math.sqrt(NUM_SAMPLES) + 1e-5


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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
            mixed: Any = mixture.log_prob(u[0])
        components = distribution.log_prob(np.broadcast_to(u[0], (3, 4)))
        expected: Any = special.logsumexp(components + logits - special.logsumexp(logits))
        np.testing.assert_allclose(np.asarray(mixed), expected, rtol=1e-5)


@pytest.mark.slow
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


# Domain, types, indexing.


def gaussians():
    rng = np.random.default_rng(3)
    mean, scale = rng.normal(size=(2, 3, 4)).astype(np.float32)
    return jevb_jax.gaussian_posterior(mean, np.exp(scale))


def arrays_of(distribution):
    names = ("loc", "scale_diag", "df", "concentration")
    return [getattr(distribution, name) for name in names if hasattr(distribution, name)]


@pytest.mark.slow
@pytest.mark.parametrize(
    "index",
    [0, -1, slice(2), slice(None, None, -2), Ellipsis, None, np.array([2, 0]), [True, False, True]],
    ids=repr,
)
def test_indexing_is_that_of_the_parameters_along_the_batch(index):
    u = unit32(1, 3, 4)
    for distribution in (*faces(), gaussians()):
        part: Any = distribution[index]
        assert type(part) is type(distribution)
        for whole, found in zip(arrays_of(distribution), arrays_of(part), strict=True):
            np.testing.assert_array_equal(found, np.asarray(whole)[index])
        expected = np.asarray(distribution.log_prob(u))[index]
        np.testing.assert_allclose(part.log_prob(u[index]), expected, rtol=1e-5)
        assert part.batch_shape == expected.shape


@pytest.mark.slow
def test_indexing_of_two_axes_of_an_empty_batch_and_beyond_it():
    loc = np.broadcast_to(unit32(0, 4), (2, 3, 4))
    k = np.arange(6, dtype=np.float32).reshape(2, 3)
    both = jevb_jax.PowerSpherical(loc, k)
    np.testing.assert_array_equal(both[..., -1].concentration, k[..., -1])
    np.testing.assert_array_equal(both[1, None, ::2].concentration, k[1, None, ::2])
    traced = jax.jit(lambda d, i: d[i])(both, 1)
    np.testing.assert_array_equal(traced.concentration, k[1])
    assert traced.event_shape == (4,)
    # JAX's own indexing would give the last one.
    for index in (2, (0, 3), (0, 0, 0)):
        with pytest.raises(IndexError, match=r"batch shape \(2, 3\)"):
            both[index]
    empty = jevb_jax.PowerSpherical(loc[:0], k[:0])
    assert empty[:1].batch_shape == (0, 3)
    assert empty.sample(seed=jax.random.key(0)).shape == (0, 3, 4)
    with pytest.raises(IndexError):
        empty[0]


@pytest.mark.slow
@pytest.mark.nightly
def test_float32_stays_float32_where_x64_is_enabled():
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        for distribution in (*faces(), gaussians(), jevb_jax.gaussian_prior(4, 0.5)):
            assert distribution.dtype == jnp.float32
            sample, log_prob = distribution.sample_and_log_prob(
                seed=jax.random.key(0), sample_shape=(2,)
            )
            assert sample.dtype == log_prob.dtype == jnp.float32
        for distribution in (faces()[0], gaussians()):
            assert distribution.entropy().dtype == distribution.mean().dtype == jnp.float32
        divergence = gaussians().kl_divergence(jevb_jax.gaussian_prior(4))
        assert divergence.dtype == jnp.float32
        wide = jevb_jax.SphericalStudentT(np.eye(4)[0], np.ones(4), 3.0, "stereographic")
        assert wide.sample(seed=jax.random.key(0)).dtype == wide.dtype == jnp.float64
    assert jevb_jax.SphericalStudentT(np.eye(4)[0], np.ones(4), 3.0).dtype == jnp.float32


@pytest.mark.slow
def test_parameters_outside_of_their_domain_are_refused_and_nan_where_traced():
    axis, one = np.eye(4, dtype=np.float32)[0], np.ones(4, np.float32)
    builders: list[tuple[str, Any]] = [
        ("scale_diag", lambda v: jevb_jax.SphericalStudentT(axis, v * one, 5.0)),
        ("df", lambda v: jevb_jax.SphericalStudentT(axis, one, v)),
        ("concentration", lambda v: jevb_jax.PowerSpherical(axis, v)),
        ("posterior_scale", lambda v: jevb_jax.gaussian_posterior(axis, v * one)),
        ("prior_scale", lambda v: jevb_jax.gaussian_prior(4, v)),
    ]
    for name, build in builders:
        for value in (-1.0, np.nan, np.float32(-0.5)):
            with pytest.raises(ValueError, match=f"{name} must be"):
                build(value)
        assert np.isnan(
            jax.vmap(lambda v, b=build: b(v).log_prob(axis))(np.array([-1.0], np.float32))
        )
    with pytest.raises(ValueError, match="unit vectors"):
        jevb_jax.PowerSpherical(2 * axis, 1.0)
    with pytest.raises(ValueError, match="unit vectors"):
        jevb_jax.SphericalStudentT(2 * axis, one, 1.0)
    with pytest.raises(ValueError, match="dim must be a whole number"):
        jevb_jax.gaussian_prior(0)


@pytest.mark.slow
@pytest.mark.nightly
def test_gaussians_pass_through_vmap_and_jit_either_way():
    rng = np.random.default_rng(0)
    mean, scale = rng.normal(size=(2, 3, 6)).astype(np.float32)
    scale = np.exp(scale)
    whole = jevb_jax.gaussian_posterior(mean, scale)
    prior = jevb_jax.gaussian_prior(6, 0.5)
    expected = np.sum(stats.norm.logpdf(mean + 1, mean, np.float64(scale)), -1)
    made = jax.vmap(jevb_jax.gaussian_posterior)(mean, scale)
    taken = jax.vmap(lambda q, x: q.log_prob(x))(whole, mean + 1)
    made_in_jit = jax.jit(jevb_jax.gaussian_posterior)(mean, scale)
    for found in (made.log_prob(mean + 1), taken, made_in_jit.log_prob(mean + 1)):
        np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert made.batch_shape == made_in_jit.batch_shape == (3,)
    assert made.sample(seed=jax.random.key(0), sample_shape=(2,)).shape == (2, 3, 6)
    priors = jax.vmap(functools.partial(jevb_jax.gaussian_prior, 6))(
        np.array([0.5, 1, 2], np.float32)
    )
    divergence = oracles.gaussian_kl_divergence(mean, np.float64(scale), 0.5)
    np.testing.assert_allclose(whole.kl_divergence(prior), divergence, rtol=1e-5)
    np.testing.assert_allclose(made[0].kl_divergence(priors[0]), divergence[0], rtol=1e-5)
    of_each = jax.vmap(lambda q: q.kl_divergence(prior))(whole)
    np.testing.assert_allclose(of_each, divergence, rtol=1e-5)
    # What is inherited is still there.
    np.testing.assert_allclose(whole.covariance()[1], np.diag(scale[1] ** 2), rtol=1e-5)  # pyright: ignore[reportIndexIssue]
    np.testing.assert_allclose(whole.stddev(), scale)
    entropy = np.sum(stats.norm.entropy(0, np.float64(scale)), -1)
    np.testing.assert_allclose(whole.entropy(), entropy, rtol=1e-5)
    draws = np.asarray(whole.sample(seed=jax.random.key(1), sample_shape=(4000,)))
    z = (draws - mean) / scale
    assert stats.kstest(z.ravel(), "norm").pvalue > SIGNIFICANCE


# Mode, divergence, gradients of samples.


@pytest.mark.slow
@pytest.mark.nightly
def test_modes():
    loc = unit32(0, 5)
    np.testing.assert_array_equal(jevb_jax.PowerSpherical(loc, 3.0).mode(), loc)
    np.testing.assert_array_equal(jevb_jax.SphericalStudentT(loc, 0.3, 0.5).mode(), loc)
    directions = unit32(1, 4000, 5)
    near = oracles.unit(loc + 0.05 * directions[:500]).astype(np.float32)
    points = np.concatenate([directions, near, -near])
    base = np.array([1, 0.3, 0.5, 0.2, 0.8], np.float32)
    for df in (2.0, 4.0, 9.0, np.inf):
        for width in (0.3, 0.7, 0.9, 1.1, 3.0):
            density = jevb_jax.SphericalStudentT(loc, width * base, df, "stereographic")
            peak, others = float(density.log_prob(loc)), np.asarray(density.log_prob(points))
            mode = np.asarray(density.mode())
            is_pole = df < 4
            # Near the limit the points need not show which side of it the scale is on.
            if np.isnan(mode).all():
                assert is_pole or np.max(others) > peak - 1e-3
            else:
                np.testing.assert_array_equal(mode, loc)
                assert not is_pole
                assert np.max(others) <= peak + 1e-5
    pole = jevb_jax.SphericalStudentT(loc, 0.3, 2.0, "stereographic")
    assert pole.log_prob(-loc) > pole.log_prob(loc)


@pytest.mark.slow
@pytest.mark.parametrize("dim", [2, 3, 64])
def test_divergence_of_power_spherical_to_uniform_and_to_its_own_kind(dim):
    loc = np.eye(dim, dtype=np.float32)[0]
    k = np.array([0, 1e-3, 0.5, 20, 1e4], np.float32)
    found = jevb_jax.PowerSpherical(loc, k)
    exact = np.array([[oracles.power_spherical(0.0, dim, v)[1] for v in k]])
    exact = oracles.log_sphere_area(dim) - exact[0]
    uniform = jevb_jax.PowerSpherical(np.roll(loc, 1), 0.0)
    np.testing.assert_allclose(found.kl_divergence(uniform), exact, rtol=1e-5, atol=3e-5)
    assert np.all(np.asarray(found.kl_divergence(uniform)) >= 0)
    tfp: Any = pytest.importorskip("tensorflow_probability.substrates.jax")
    of_tfp = tfp.distributions.SphericalUniform(dimension=dim)
    np.testing.assert_allclose(found.kl_divergence(of_tfp), exact, rtol=1e-5, atol=3e-5)
    # To the same direction: by the Beta variable of which both are.
    b = (dim - 1) / 2
    for other in (0.5, 30.0):
        a, c = b + np.float64(k), b + other
        expected = (
            special.betaln(c, b)
            - special.betaln(a, b)
            + (a - c) * special.digamma(a)
            - (a - c) * special.digamma(a + b)
        )
        second = jevb_jax.PowerSpherical(loc, other)
        np.testing.assert_allclose(found.kl_divergence(second), expected, rtol=1e-4, atol=3e-5)
    elsewhere = jevb_jax.PowerSpherical(np.roll(loc, 1), 3.0)
    with pytest.raises(NotImplementedError, match="closed form"):
        found.kl_divergence(elsewhere)
    assert np.all(np.isnan(jax.jit(lambda p, q: p.kl_divergence(q))(found, elsewhere)))
    if dim > 2:
        student = jevb_jax.SphericalStudentT(loc, 0.3, 5.0, "stereographic")
        with pytest.raises(NotImplementedError, match="closed form"):
            student.kl_divergence(uniform)
        with pytest.raises(NotImplementedError, match="closed form"):
            student.mean()


@pytest.mark.slow
@pytest.mark.nightly
def test_gradient_of_samples_in_df_is_that_of_the_mean_cosine():
    # |y|^2 / n is Fisher-distributed with equal scales; E[cos] by quadrature in its logarithm.
    scale, dim = 0.3, 5
    n = dim - 1
    u = np.linspace(-400, 400, 400_001)

    def mean_cosine(df):
        log_density = stats.f(n, df).logpdf(np.exp(u)) + u  # pyright: ignore[reportAttributeAccessIssue]
        t = np.exp(u) * n * scale**2 / 4
        cosine = np.where(u > 100, -1.0, (1 - np.minimum(t, 1e30)) / (1 + np.minimum(t, 1e30)))
        return np.trapezoid(np.exp(log_density) * cosine, u)

    loc = unit32(0, dim)

    @jax.jit
    @functools.partial(jax.vmap, in_axes=(None, 0))
    @jax.value_and_grad
    def sampled(df, key):
        density = jevb_jax.SphericalStudentT(loc, scale, df, coordinates="stereographic")
        return jnp.mean(density.sample(seed=key, sample_shape=(2000,)) @ loc)

    keys = jax.random.split(jax.random.key(0), 10)
    for df in (4.0, 1.0, 0.3, 0.1):
        for values, exact in zip(
            sampled(df, keys),
            (mean_cosine(df), (mean_cosine(df * 1.001) - mean_cosine(df / 1.001)) / (df * 0.002)),
            strict=True,
        ):
            error = np.std(values) / 3
            assert error < 0.1
            assert abs(np.mean(values) - exact) < 5 * error + 2e-3
    # Far smaller ones, far narrower scales, and a location along the narrow axis.
    narrow = np.array([1e-25, 1, 1, 1e-3, 1], np.float32)

    def one(df, scale, loc):
        density = jevb_jax.SphericalStudentT(loc, scale, df, coordinates="stereographic")
        return jnp.sum(
            density.sample(seed=jax.random.key(0)) * np.array([1, 2, 3, 4, 5], np.float32)
        )

    gradients = jax.jit(jax.vmap(jax.grad(one, argnums=(0, 1, 2)), in_axes=(0, None, None)))(
        np.array([1e-3, 0.01, 1.9, 2, 1e6], np.float32), narrow, np.eye(5, dtype=np.float32)[0]
    )
    assert all(np.all(np.isfinite(x)) for x in gradients)
