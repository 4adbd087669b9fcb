"""Oracles: known spectra, NumPy float64 and SciPy."""

import functools
import math

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from jevb_jax import ElboTerms
from jevb_jax.training import health
from jevb_jax.training.alarms import alarm_history, health_alarms, judge


def embedding_with_spectrum(singular_values, *, num_images, seed=0, offset=0.0):
    """Float64 `[num_images, D]` whose centered singular values are exactly the given ones."""
    generator = np.random.default_rng(seed)
    dim = len(singular_values)
    # Orthogonal to the ones vector, so that centring changes nothing.
    left = generator.normal(size=(num_images, dim))
    left, _ = np.linalg.qr(left - left.mean(axis=0, keepdims=True))
    right, _ = np.linalg.qr(generator.normal(size=(dim, dim)))
    return left * np.asarray(singular_values)[None] @ right.T + offset


def numpy_effective_rank(matrix):
    singular_values = np.linalg.svd(np.asarray(matrix, np.float64), compute_uv=False)
    shares = singular_values[singular_values > 0] / singular_values.sum()
    return np.exp(-np.sum(shares * np.log(shares)))


@pytest.mark.parametrize("rank", [1, 2, 7, 63, 64])
def test_isotropic_of_rank_k_has_effective_rank_k(rank):
    embedding = embedding_with_spectrum([3.0] * rank + [0.0] * (64 - rank), num_images=65)
    value = health.effective_rank(jnp.asarray(embedding, jnp.float32))
    # Rounding to float32 adds 64 singular values of up to 1e-7: 64 * 1e-7 * log(1e7) = 1e-4.
    np.testing.assert_allclose(value, rank, rtol=2e-4)


@pytest.mark.parametrize("ratio", [0.5, 0.8, 0.97])
def test_geometric_spectrum(ratio):
    spectrum = ratio ** np.arange(64)
    embedding = embedding_with_spectrum(spectrum, num_images=200)
    shares = spectrum / spectrum.sum()
    expected = np.exp(-np.sum(shares * np.log(shares)))
    np.testing.assert_allclose(numpy_effective_rank(embedding), expected, rtol=1e-12)
    value = health.effective_rank(jnp.asarray(embedding, jnp.float32))
    np.testing.assert_allclose(value, expected, rtol=2e-4)


def test_small_singular_values_that_a_gram_matrix_would_lose():
    # 63 values 1e-4 of the largest carry 0.6% of the mass; their eigenvalues are 1e-8 of the
    # largest, under float32's epsilon.
    embedding = embedding_with_spectrum([1.0] + [1e-4] * 63, num_images=200)
    value = health.effective_rank(jnp.asarray(embedding, jnp.float32))
    np.testing.assert_allclose(value, numpy_effective_rank(embedding), rtol=2e-4)


def test_centering_removes_a_common_offset():
    spectrum = 0.9 ** np.arange(16)
    embedding = embedding_with_spectrum(spectrum, num_images=300, offset=5.0)
    embedding = np.asarray(embedding, np.float32)
    centered = embedding - embedding.mean(axis=0, dtype=np.float64)
    # The offset's rounding, 5 * 6e-8, stands against entries of about 0.05.
    expected = numpy_effective_rank(centered)
    np.testing.assert_allclose(health.effective_rank(embedding), expected, rtol=1e-4)
    # Otherwise one direction, the offset, would hide the others.
    assert numpy_effective_rank(embedding) < expected / 3


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30, 3e38])
def test_effective_rank_has_no_units(scale):
    embedding = embedding_with_spectrum(0.9 ** np.arange(16), num_images=40)
    embedding *= scale / np.max(np.abs(embedding))
    value = health.effective_rank(jnp.asarray(embedding, jnp.float32))
    np.testing.assert_allclose(value, numpy_effective_rank(embedding / scale), rtol=1e-4)


def test_collapse_is_reported_as_collapse():
    generator = np.random.default_rng(0)
    point = generator.normal(size=(1, 32)).astype(np.float32)
    same = np.repeat(point, 100, axis=0)
    # One unit in the last place, as parallel reductions leave it: full rank once centered.
    noisy = np.nextafter(same, generator.choice(np.array([-9, 9], np.float32), same.shape))
    assert numpy_effective_rank(noisy - noisy.mean(axis=0, dtype=np.float64)) > 10
    for embedding in (same, noisy, np.zeros_like(same)):
        np.testing.assert_allclose(health.effective_rank(embedding), 1.0, rtol=1e-4)
        # Rounding of the mean and of the directions: a few float32 epsilons, times sqrt(32).
        np.testing.assert_allclose(health.embedding_std(embedding), 0.0, atol=2e-6)
    on_a_line = generator.normal(size=(100, 1)) * point
    np.testing.assert_allclose(health.effective_rank(on_a_line), 1.0, rtol=1e-4)


@pytest.mark.parametrize("dim", [3, 64, 512])
def test_embedding_std_is_one_on_the_uniform_sphere(dim):
    # Radii differ by orders of magnitude and must not matter.
    generator = np.random.default_rng(dim)
    embedding = generator.normal(size=(4000, dim)) * np.exp(3 * generator.normal(size=(4000, 1)))
    value = health.embedding_std(jnp.asarray(embedding, jnp.float32))
    # Standard error of a standard deviation, 1 / sqrt(2 N) = 1.1%, over D = 3 coordinates at worst.
    np.testing.assert_allclose(value, 1.0, rtol=0.02)
    direction = embedding / np.linalg.norm(embedding, axis=1, keepdims=True)
    expected = direction.std(axis=0).mean() * np.sqrt(dim)
    np.testing.assert_allclose(value, expected, rtol=1e-5)


@pytest.mark.slow
@hypothesis.settings(max_examples=25, deadline=None)
@hypothesis.given(
    seed=st.integers(0, 2**32 - 1),
    log_scale=st.floats(-30, 30),
    num_zero=st.integers(0, 20),
    offset=st.floats(0, 100),
)
def test_bounds_hold_with_zero_vectors_and_any_scale(seed, log_scale, num_zero, offset):
    generator = np.random.default_rng(seed)
    embedding = (generator.normal(size=(20, 6)) + offset) * 10.0**log_scale
    embedding[:num_zero] = 0
    embedding = embedding.astype(np.float32)
    assert 0 <= health.embedding_std(embedding) <= 1 + 1e-5
    assert 1 - 1e-5 <= health.effective_rank(embedding) <= 6 * (1 + 1e-5)


@pytest.mark.parametrize("shape", [(64, 64), (10, 64)])
def test_too_few_images_are_refused(shape):
    with pytest.raises(ValueError, match=f"more images than dimensions.*N = {shape[0]}, D = 64"):
        health.effective_rank(jnp.ones(shape))
    with pytest.raises(ValueError, match="more images than dimensions"):
        # By static shapes: at trace time, before anything runs.
        jax.eval_shape(health.effective_rank, jax.ShapeDtypeStruct(shape, jnp.float32))


@pytest.mark.parametrize("shape", [(8,), (1, 8), (2, 3, 4)])
def test_wrong_shapes_are_refused(shape):
    for call in (health.embedding_std, health.effective_rank):
        with pytest.raises(ValueError, match=r"\[N, D\] with at least 2 images"):
            call(jnp.ones(shape))
    with pytest.raises(ValueError, match=r"posterior_mean must be \[N, D\]"):
        health.posterior_summary(jnp.ones(shape), jnp.ones(shape))


@pytest.mark.slow
def test_nan_stays_nan():
    embedding = np.random.default_rng(0).normal(size=(20, 4)).astype(np.float32)
    embedding[3, 1] = np.nan
    assert np.isnan(health.embedding_std(embedding))
    assert np.isnan(health.effective_rank(embedding))
    summary = health.posterior_summary(embedding, np.exp(embedding))
    assert all(np.isnan(value) for value in summary)


@pytest.mark.parametrize("prior_scale", [1.0, 2.5])
def test_posterior_summary_against_numpy_and_scipy(prior_scale):
    generator = np.random.default_rng(0)
    mean = generator.normal(size=(50, 8)) * 3
    log_scale = generator.normal(size=(50, 8)) + generator.normal(size=(50, 1)) * 2
    summary = health.posterior_summary(
        jnp.asarray(mean, jnp.float32),
        jnp.asarray(np.exp(log_scale), jnp.float32),
        prior_scale=prior_scale,
    )
    np.testing.assert_allclose(summary.scale_mean, np.exp(log_scale).mean(), rtol=1e-5)
    np.testing.assert_allclose(summary.scale_anisotropy, log_scale.std(axis=1).mean(), rtol=1e-5)
    np.testing.assert_allclose(summary.scale_spread, log_scale.mean(axis=1).std(), rtol=1e-5)
    np.testing.assert_allclose(summary.mean_rms, np.linalg.norm(mean) / np.sqrt(400), rtol=1e-5)
    # KL = -entropy of q - E_q log p, the latter exact from two Gauss-Hermite nodes (a quadratic).
    entropy = scipy.stats.norm.entropy(scale=np.exp(log_scale))
    log_prior = [
        scipy.stats.norm.logpdf(mean + sign * np.exp(log_scale), scale=prior_scale)
        for sign in (-1, 1)
    ]
    expected = np.mean(-entropy - np.mean(log_prior, axis=0))
    np.testing.assert_allclose(summary.kl_per_dimension, expected, rtol=1e-5)


def test_posterior_summary_at_the_prior_is_all_zero_but_the_scale():
    summary = health.posterior_summary(jnp.zeros((5, 3)), jnp.full((5, 3), 2.0), prior_scale=2.0)
    np.testing.assert_allclose(summary, [2.0, 0.0, 0.0, 0.0, 0.0, 0.0], atol=1e-6)


@pytest.mark.slow
def test_posterior_summary_tells_the_two_kinds_of_spread_apart():
    per_feature = jnp.broadcast_to(jnp.array([[0.1, 1.0, 10.0]]), (4, 3))
    per_image = jnp.broadcast_to(jnp.array([[0.1], [1.0], [10.0]]), (3, 4))
    expected = np.log(10) * np.sqrt(2 / 3)
    anisotropic = health.posterior_summary(jnp.zeros((4, 3)), per_feature)
    np.testing.assert_allclose(anisotropic.scale_anisotropy, expected, rtol=1e-5)
    np.testing.assert_allclose(anisotropic.scale_spread, 0.0, atol=1e-6)
    heteroscedastic = health.posterior_summary(jnp.zeros((3, 4)), per_image)
    np.testing.assert_allclose(heteroscedastic.scale_anisotropy, 0.0, atol=1e-6)
    np.testing.assert_allclose(heteroscedastic.scale_spread, expected, rtol=1e-5)


def test_posterior_summary_refuses_unequal_shapes():
    with pytest.raises(ValueError, match="must share one shape"):
        health.posterior_summary(jnp.zeros((4, 3)), jnp.ones((4, 2)))


def test_representation_health_jits_and_equals_its_parts():
    embedding = np.random.default_rng(0).normal(size=(40, 8)).astype(np.float32)
    values = jax.jit(health.representation_health)(embedding)
    assert values.keys() == {"embedding_std", "effective_rank", "embedding_log_radius"}
    for name, value in values.items():
        assert value.shape == ()
        np.testing.assert_allclose(value, getattr(health, name)(embedding), rtol=1e-5, err_msg=name)


def test_representation_health_of_few_images_leaves_out_the_rank_alone():
    embedding = np.random.default_rng(0).normal(size=(8, 8)).astype(np.float32)
    assert health.representation_health(embedding).keys() == {
        "embedding_std",
        "embedding_log_radius",
    }


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_log_radius_against_numpy(scale):
    embedding = np.random.default_rng(0).normal(size=(30, 9)) * scale
    value = health.embedding_log_radius(jnp.asarray(embedding, jnp.float32))
    expected = np.mean(np.log(np.linalg.norm(embedding, axis=1) / 3))
    np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-6)
    # Zero vectors are the smallest normal number, and a NaN stays one.
    zero = health.embedding_log_radius(jnp.zeros((4, 9)))
    np.testing.assert_allclose(zero, np.log(np.finfo(np.float32).tiny / 3), rtol=1e-5)
    assert np.isnan(health.embedding_log_radius(jnp.full((4, 9), jnp.nan)))


def test_share_at_floor():
    scale = jnp.array([[1.0, 1.09, 1.11, 7.0], [1.0, 2.0, 2.0, 2.0]])
    assert float(health.share_at_floor(scale, min_scale=1.0)) == pytest.approx(3 / 8)
    # Of an isotropic posterior the features of an image are at the floor together.
    isotropic = jnp.broadcast_to(jnp.array([[0.5], [0.9]]), (2, 6))
    assert float(health.share_at_floor(isotropic, min_scale=0.5)) == pytest.approx(1 / 2)
    assert float(health.share_at_floor(scale, min_scale=0.0)) == 0
    assert np.isnan(health.share_at_floor(scale.at[1, 1].set(jnp.nan), min_scale=1.0))


def test_settings_outside_of_their_domain_are_refused():
    values = np.abs(np.random.default_rng(0).normal(size=(6, 4))) + 0.1
    for bad in (-1.0, 0.0, math.nan):
        with pytest.raises(ValueError, match="prior_scale must be positive"):
            health.posterior_summary(values, values, prior_scale=bad)
        with pytest.raises(ValueError, match="df must be positive"):
            health.pair_health(values, values, values, df=bad)
    with pytest.raises(ValueError, match="df must be a number"):
        health.pair_health(values, values, values, df=np.full(6, 3.0))
    for bad in (-1.0, math.nan):
        with pytest.raises(ValueError, match="min_scale must be at least zero"):
            health.share_at_floor(values, min_scale=bad)
    with pytest.raises(ValueError, match="at least one scale"):
        health.share_at_floor(values[:0], min_scale=0.1)
    # A diverged posterior is no error, and its size is known where its square is not.
    summary = health.posterior_summary(values * 1e25, -values)
    assert np.isnan(summary.kl_per_dimension)
    np.testing.assert_allclose(summary.mean_rms, 1e25 * np.sqrt(np.mean(values**2)), rtol=1e-5)


def test_half_precision_is_promoted():
    embedding = np.random.default_rng(0).normal(size=(40, 8))
    half = jnp.asarray(embedding, jnp.bfloat16)
    assert health.effective_rank(half).dtype == jnp.float32
    full = np.asarray(half, np.float32)
    np.testing.assert_allclose(health.effective_rank(half), health.effective_rank(full), rtol=1e-6)
    np.testing.assert_allclose(health.embedding_std(half), health.embedding_std(full), rtol=1e-6)


def test_signal_to_noise():
    mean = jnp.array([[3.0, 4.0], [0.0, 0.0]])
    scale = jnp.array([[0.6, 0.8], [1.0, 1.0]])
    assert float(health.posterior_summary(mean, scale).signal_to_noise) == pytest.approx(2.5)


def pair_oracle(target, latent, scale, df):
    """Residuals through an explicit basis of the tangent space, in float64."""
    n = target.shape[1] - 1
    cosines, quadratics = [], []
    for h, z, s in zip(target, latent, scale, strict=True):
        u, m = h / np.linalg.norm(h), z / np.linalg.norm(z)
        c = u @ m
        y = np.sqrt(2 / (1 + c)) * (u - c * m)
        cosines.append(c)
        quadratics.append(y @ np.diag(s**-2.0) @ y)
    q = np.array(quadratics)
    w = np.ones_like(q) if np.isinf(df) else (df + n) / (df + q)
    ratio = np.mean(q) / (n if np.isinf(df) else df)
    return np.mean(cosines), ratio, np.sum(w) ** 2 / (len(w) * np.sum(w**2))


@pytest.mark.parametrize("df", [0.5, 5.0, 1e4, np.inf])
def test_pair_health_matches_the_oracle(df):
    rng = np.random.default_rng(0)
    target, latent = rng.normal(size=(2, 9, 6))
    scale = np.exp(rng.normal(size=(9, 6)))
    found = jax.jit(functools.partial(health.pair_health, df=df))(target, latent, scale)
    np.testing.assert_allclose(found, pair_oracle(target, latent, scale, df), rtol=2e-5)
    # Identical views: no residual, and all pairs weigh the same.
    same = health.pair_health(target, 3 * target, scale, df=df)
    np.testing.assert_allclose(same, [1, 0, 1], rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="at least 2 images"):
        health.pair_health(target[:1], latent[:1], scale[:1], df=df)


def test_effective_pairs_is_the_share_that_pulls():
    # One pair agrees, nineteen are far in the tail: nearly all the weight is on the one.
    target = np.ones((20, 8))
    latent = np.tile(np.array([1.0, -1.0] * 4), (20, 1))
    latent[0] = 1.0
    found = health.pair_health(target, latent, np.full((20, 8), 1e-3), df=1.0)
    assert float(found.effective_pairs) == pytest.approx(1 / 20, rel=1e-3)
    assert float(found.residual_over_df) > 1e5


def test_term_gradient_norms_are_those_of_known_terms():
    x = np.random.default_rng(0).normal(size=(7, 4))

    def terms_of(x):
        one = jnp.ones(len(x))
        return ElboTerms(3 * jnp.sum(x, axis=1), 0 * x[:, 0], jnp.sum(x**2, axis=1) / 2, one, one)

    found = jax.jit(functools.partial(health.term_gradient_norms, terms_of))(x)
    size = np.mean(np.sum(x**2, axis=1))
    expected = {
        "directional_log_likelihood": np.sqrt(9 * 4 * size),
        "radial_log_likelihood": 0.0,
        "kl": size,
    }
    assert found.keys() == expected.keys()
    for name, value in found.items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-5, atol=1e-6, err_msg=name)
    # Free of the units of the representation.
    scaled = health.term_gradient_norms(lambda y: terms_of(y / 10), 10 * x)
    np.testing.assert_allclose(scaled["kl"], expected["kl"], rtol=1e-5)


# The last checks of healthy runs (`docs/results` and the digits), by method.
REPRESENTATION = {"embedding_std": 0.98, "effective_rank": 38.5, "embedding_log_radius": -0.1}
JEVB = {
    **REPRESENTATION,
    "posterior_kl_per_dimension": 0.096,
    "posterior_scale_at_floor": 0.0,
    "likelihood_scale_at_floor": 0.0,
    "radial_width": 0.55,
}
VI_SIMSIAM = {**REPRESENTATION, "concentration_mean": 8.5}


def alarms(values, *, embedding_dim=128, step=100):
    raised = health_alarms(values, step=step, embedding_dim=embedding_dim)
    assert all(alarm.message.count("\n") == 0 and "Try " in alarm.message for alarm in raised)
    return {alarm.name: alarm.message for alarm in raised}


def test_a_method_is_judged_by_the_alarms_of_its_values():
    def judged(values):
        return judge(values, step=100, embedding_dim=128)

    jevb = ("collapse", "posterior_is_prior", "scale_at_floor", "radius_drift")
    assert judged(JEVB) == dict.fromkeys(jevb)
    assert judged(VI_SIMSIAM) == {"collapse": None, "concentration": None}
    assert judged(REPRESENTATION) == {"collapse": None}
    assert judged({"effective_rank": 1.0}) == {}
    information = {"predictive_information": 0.5}
    assert judged(information) == {}  # too early
    assert judge(information, step=200, embedding_dim=128) == {"no_information": None}


@pytest.mark.parametrize("value", [-0.1, -50.0, math.nan])
def test_a_likelihood_below_the_uniform_density_raises_an_alarm(value):
    raised = alarms({**VI_SIMSIAM, "predictive_information": value}, step=200)
    assert set(raised) == {"no_information"}
    assert "below zero" in raised["no_information"]


# D, embedding_std, effective rank, KL per dimension: `docs/results`; then the lowest that healthy runs of
# smoke and digits had at any step from 20 on.
@pytest.mark.parametrize(
    ("dim", "std", "rank", "kl"),
    [
        (128, 0.9861, 41.22, 0.0967),  # prior 4
        (128, 0.9881, 22.41, 2.5364),  # KL weight 0.03
        (128, 0.9664, 32.45, 0.0652),  # untied
        (128, 0.7792, 39.24, None),  # BYOL
        (128, 0.9744, 21.50, None),  # VI-SimSiam
        (256, 0.7812, 96.57, None),  # VICReg
        (16, 0.8943, 8.63, 0.0581),
        (64, 0.5322, 9.67, 0.0316),
    ],
)
def test_healthy_runs_raise_nothing(dim, std, rank, kl):
    values = {**REPRESENTATION, "embedding_std": std, "effective_rank": rank}
    if kl is not None:
        values = {**JEVB, **values, "posterior_kl_per_dimension": kl}
    assert alarms(values, embedding_dim=dim) == {}


def test_the_published_partial_collapse_is_seen():
    # `docs/results/ablations`: the location at the posterior's mean.
    values = {
        "embedding_std": 0.5902,
        "effective_rank": 5.6477,
        "posterior_kl_per_dimension": 0.0514,
    }
    assert "5.65 of D = 128" in alarms({**JEVB, **values})["collapse"]


@pytest.mark.parametrize(
    ("value", "name", "edges"),
    [
        ("embedding_std", "collapse", (0.3, None)),
        ("effective_rank", "collapse", (6.0, None)),
        # 0.5 nats an image, over D; 128 is a power of two, so nothing is rounded.
        ("posterior_kl_per_dimension", "posterior_is_prior", (0.5 / 128, None)),
        ("posterior_scale_at_floor", "scale_at_floor", (None, 0.1)),
        ("likelihood_scale_at_floor", "scale_at_floor", (None, 0.1)),
        ("embedding_log_radius", "radius_drift", (-math.log(5), math.log(5))),
        ("radial_width", "radius_drift", (2e-3, 3.0)),
        ("concentration_mean", "concentration", (0.05, None)),
    ],
)
def test_thresholds_and_values_that_are_not_finite(value, name, edges):
    healthy = VI_SIMSIAM if name == "concentration" else JEVB
    for edge, outwards in zip(edges, (-math.inf, math.inf), strict=True):
        if edge is not None:
            beyond = math.nextafter(edge, outwards)
            assert alarms({**healthy, value: edge}) == {}
            assert alarms({**healthy, value: beyond}).keys() == {name}, beyond
    for bad in (math.nan, math.inf, -math.inf):
        found = alarms({**healthy, value: bad})
        assert name in found, bad
        assert found.keys() <= {name, "collapse"}  # a radius without limit is both
    assert "nan" in alarms({**healthy, value: math.nan})[name]


def test_thresholds_that_depend_on_the_dimension():
    def rank(value, dim):
        return alarms({**REPRESENTATION, "effective_rank": value}, embedding_dim=dim).keys()

    # In few dimensions a fifth of them, else six.
    assert rank(3.21, 16) == rank(6.01, 64) == rank(6.01, 2048) == set()
    assert rank(3.19, 16) == rank(5.99, 64) == rank(5.99, 2048) == {"collapse"}

    # The KL of an image counts, whatever the dimension.
    def kl(value, dim):
        values = {**JEVB, "posterior_kl_per_dimension": value}
        return alarms(values, embedding_dim=dim).keys()

    assert kl(0.001, 2048) == kl(0.1, 16) == set()
    assert kl(0.001, 128) == kl(0.0002, 2048) == {"posterior_is_prior"}

    # Mean cosine k / (D - 1 + k) of 0.999.
    def concentration(value, dim):
        return alarms({**VI_SIMSIAM, "concentration_mean": value}, embedding_dim=dim).keys()

    assert concentration(998 * 63, 64) == concentration(1000 * 63, 128) == set()
    assert concentration(1000 * 63, 64) == {"concentration"}


def test_embeddings_that_shrink_to_a_point_have_collapsed():
    # Directions may look healthy (VICReg's invariance alone: std 0.75, rank 10).
    point = {**REPRESENTATION, "embedding_log_radius": math.log(0.0099)}
    assert "0.0099 sqrt(D)" in alarms(point)["collapse"]
    assert alarms({**point, "embedding_log_radius": math.log(0.0101)}) == {}
    # Of few images, without a rank, and of logs without a radius.
    assert alarms({"embedding_std": 0.1}).keys() == {"collapse"}
    assert alarms({"embedding_std": 0.9}) == {}


def test_nothing_is_judged_before_the_running_statistics_have_settled():
    sick = {**JEVB, "embedding_std": 0.16}
    for step in (0, 1, 19):
        assert judge(sick, step=step, embedding_dim=64) == {}
        assert health_alarms(sick, step=step, embedding_dim=64) == []
    assert alarms(sick, step=20).keys() == {"collapse"}


def test_history_has_a_period_for_every_time_an_alarm_was_raised():
    def record(step, **changes):
        values = {**JEVB, **changes, "alarm_collapse": 0.0}
        return {"step": step, **{f"health/{name}": value for name, value in values.items()}}

    records = [
        record(10, embedding_std=0.1),  # too early
        {"step": 20, "train/loss": 1.0},
        record(20),
        record(40, embedding_std=0.2),
        {"step": 50, "train/loss": 1.0},
        record(60, embedding_std=0.1, posterior_kl_per_dimension=0.0),
        record(80, posterior_kl_per_dimension=0.0),
        record(100, embedding_std=math.nan, posterior_kl_per_dimension=0.0),
    ]
    history = alarm_history(records, embedding_dim=128)
    assert [(period.step, period.name) for period in history] == [
        (40, "collapse"),
        (60, "posterior_is_prior"),
        (100, "collapse"),
    ]
    first, prior, last = (period.message for period in history)
    assert first.startswith("embedding_std 0.2 is not above 0.3")
    assert first.endswith(" Cleared at step 80.")
    assert prior.startswith("KL(q || p) 0 nats")
    assert prior.endswith(" Not cleared by the last health check.")
    assert last.startswith("embedding_std nan")
    assert alarm_history([], embedding_dim=128) == []
