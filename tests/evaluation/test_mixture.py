"""The mixture of training posteriors against a double loop in float64 with dense linear algebra."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.special
import scipy.stats

from jevb_jax.evaluation import mixture_fit
from jevb_jax.evaluation.detector_input import DegenerateFeaturesError
from jevb_jax.evaluation.mixture import TrainingMixture
from jevb_jax.paper import mass
from tests.marks import nightly

DFS = (0.5, 5.0, 127.0, np.inf)
DF_CASES = [df if df in (0.5, np.inf) else nightly(df) for df in DFS]
RADIAL: dict[str, Any] = {"radial_scale": 0.3, "radial_df": 4.0}


@jax.jit
def score(fitted: TrainingMixture, embedding: Any) -> jax.Array:
    return fitted(embedding)


def images(
    num_images: int = 9, dim: int = 6, scale: float = 0.3, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Posterior means, scales with a spread of ten, and embeddings near the means."""
    rng = np.random.default_rng(seed)
    mean = 2 * rng.normal(size=(num_images, dim))
    spread = 10 ** rng.uniform(-0.5, 0.5, size=(num_images, dim))
    embedding = mean + scale * np.linalg.norm(mean, axis=1)[:, None] * spread * rng.normal(
        size=(num_images, dim)
    )
    return mean, scale * spread, embedding


def tangent_log_density(
    u: np.ndarray, m: np.ndarray, s: np.ndarray, df: float, basis: np.ndarray
) -> float:
    """Student-t density of the tangent vector: covariance conditioned on `<m, y> = 0`, then inverted."""
    angle = np.arctan2(np.linalg.norm(u - (u @ m) * m), u @ m)
    flat = u - (u @ m) * m
    length = np.linalg.norm(flat)
    y = 2 * np.sin(angle / 2) * flat / (length if length > 0 else 1)
    along = np.diag(s**2) @ m
    covariance = basis.T @ (np.diag(s**2) - np.outer(along, along) / (m @ along)) @ basis
    factor = np.linalg.cholesky(covariance)
    squared = np.sum(np.linalg.solve(factor, basis.T @ y) ** 2)
    n = len(m) - 1
    log_determinant = np.sum(np.log(np.diag(factor)))
    if np.isinf(df):
        return float(-n / 2 * np.log(2 * np.pi) - log_determinant - squared / 2)
    gamma = scipy.special.gammaln((df + n) / 2) - scipy.special.gammaln(df / 2)
    tail = (df + n) / 2 * np.log1p(squared / df)
    return float(gamma - n / 2 * np.log(df * np.pi) - log_determinant - tail)


def pair_log_probs(
    embedding: np.ndarray,
    mean: np.ndarray,
    scale: np.ndarray,
    df: float,
    log_mass: Any,
    radial: dict[str, Any] | None = None,
) -> np.ndarray:
    """`[M, N]`, the double loop, less the log mass `[N]` of the components."""
    log_mass = np.asarray(log_mass, np.float64)
    result = np.zeros((len(embedding), len(mean)))
    for j, (mu, s) in enumerate(zip(mean, scale, strict=True)):
        rho = np.linalg.norm(mu)
        m = mu / rho
        basis = np.linalg.svd(m[None])[2][1:].T
        for i, h in enumerate(embedding):
            r = np.linalg.norm(h)
            result[i, j] = tangent_log_density(h / r, m, s, df, basis) - log_mass[j]
            if radial:
                standardized = np.log(r / rho) / radial["radial_scale"]
                t = scipy.stats.t.logpdf(standardized, radial["radial_df"])
                result[i, j] += t - np.log(radial["radial_scale"] * r)
    return result


def log_mean(log_probs: np.ndarray) -> np.ndarray:
    total = scipy.special.logsumexp(log_probs, axis=1)
    return np.asarray(total) - np.log(log_probs.shape[1])


def without_own(log_probs: np.ndarray) -> np.ndarray:
    """Mean log-density of each image under the others, `[N]`, of a square matrix of pairs."""
    return np.array([log_mean(np.delete(row, i)[None])[0] for i, row in enumerate(log_probs)])


# --- The density ---


@pytest.mark.slow
@pytest.mark.parametrize("radial", [None, RADIAL])
@pytest.mark.parametrize("scale", [0.03, nightly(0.3), 3.0])
@pytest.mark.parametrize("df", DF_CASES)
def test_score_is_the_double_loop(float64, df, scale, radial):
    # With the spread of ten, scales are 0.01 to 10.
    mean, s, embedding = images(scale=scale)
    new = np.concatenate([embedding, images(seed=5)[0]])
    fitted = mixture_fit.fit_training_mixture(mean, s, df=df, bandwidth=1.0, **(radial or {}))
    expected = -log_mean(pair_log_probs(new, mean, s, df, fitted.log_mass, radial))
    np.testing.assert_allclose(score(fitted, new), expected, rtol=1e-9, atol=1e-9)
    loc = mean / np.linalg.norm(mean, axis=1, keepdims=True)
    of_library = jax.jit(jax.vmap(lambda s, m, df: mass.directional_log_mass(s, loc=m, df=df)))
    log_mass = of_library(s, loc, np.full(len(s), df))
    np.testing.assert_allclose(fitted.log_mass, log_mass, rtol=1e-9, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("df", DF_CASES)
def test_float32_is_near_float64(df):
    for scale, dim in ((0.03, 6), (0.3, 6), (3.0, 6), (0.06, 32)):
        mean, s, embedding = images(9, dim, scale)
        new = np.concatenate([embedding, mean, images(9, dim, seed=5)[0]])
        fitted = mixture_fit.fit_training_mixture(
            mean.astype(np.float32), s.astype(np.float32), df=df, bandwidth=0.5, **RADIAL
        )
        assert fitted.location.dtype == jnp.float32
        expected = -log_mean(pair_log_probs(new, mean, 0.5 * s, df, fitted.log_mass, RADIAL))
        np.testing.assert_allclose(
            score(fitted, new.astype(np.float32)),
            expected,
            rtol=1e-5,
            atol=5e-4,
            err_msg=f"{scale}",
        )


@pytest.mark.slow
@pytest.mark.parametrize("df", DFS)
@pytest.mark.parametrize("width", [0.05, 0.4, 2.0])
def test_mass_of_equal_scales_is_a_quadrature_over_the_angle(float64, df, width):
    mean, _, embedding = images()
    scale = np.full(mean.shape, width)
    found = mixture_fit.fit_training_mixture(mean, scale, df=df, bandwidth=1.0)(embedding)
    m, e = np.eye(6)[0], np.eye(6)[1]
    basis = np.eye(6)[:, 1:]
    area = 8 * np.pi**2 / 3  # of the unit sphere of the tangent space R^5

    def integrand(angle: float) -> float:
        u = np.cos(angle) * m + np.sin(angle) * e
        density = np.exp(tangent_log_density(u, m, scale[0], df, basis))
        return float(area * density * np.sin(angle) ** 4)

    total, _ = scipy.integrate.quad(
        integrand, 0, np.pi, points=[width, 3 * width if width < 1 else 1], epsabs=1e-12, limit=400
    )
    log_mass = np.full(len(mean), np.log(total))
    expected = -log_mean(pair_log_probs(embedding, mean, scale, df, log_mass))
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("df", [0.5, np.inf])
def test_queries_at_a_location_and_at_its_antipode(df):
    mean, s, _ = images(1, 32, 0.05)
    fitted = mixture_fit.fit_training_mixture(mean, s, df=df, bandwidth=1.0)
    # Float32 would be off by 0.1 at the location if its distance were not computed a second time.
    expected = -pair_log_probs(mean, mean, s, df, fitted.log_mass)[:, 0]
    np.testing.assert_allclose(score(fitted, 5 * mean), expected, rtol=1e-5)
    # Turned towards the narrowest feature, at ever smaller angles from the antipode.
    side = np.eye(32)[np.argmin(s[0])] * np.linalg.norm(mean)
    angles = np.array([0, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2])[:, None]
    near = np.asarray(score(fitted, -mean + angles * side))
    assert np.isfinite(near).all()
    # No tangent direction makes it nearer than the widest scale does, or farther than the narrowest.
    squared = np.array([3.99 / s.max() ** 2, 4 / s.min() ** 2])
    kernel = squared / 2 if np.isinf(df) else (df + 31) / 2 * np.log1p(squared / df)
    nearest, farthest = kernel * (1 + 1e-5) - np.asarray(fitted.log_weight)
    assert np.all(near >= nearest - 1e-3 * kernel[0])
    assert np.all(near <= farthest)


@pytest.mark.slow
def test_rounding_makes_no_far_image_a_near_one():
    # Without its bounds the distance multiplied out is noise close to the antipode, below zero too.
    mean, s, _ = images(9, 32, 0.02)
    fitted = mixture_fit.fit_training_mixture(mean, s, df=np.inf, bandwidth=1.0)
    direction = (mean / np.linalg.norm(mean, axis=1, keepdims=True)).astype(np.float32)
    rng = np.random.default_rng(3)
    for angle in (0.0, 1e-5, 1e-3, 0.02, 0.04):
        opposite = -direction + (angle * rng.normal(size=direction.shape)).astype(np.float32)
        opposite /= np.linalg.norm(opposite, axis=1, keepdims=True)
        own = np.array([fitted._log_probs(u)[i] for i, u in enumerate(jnp.asarray(opposite))])
        least = np.asarray(fitted.least_precision) * 1.9
        assert np.all(own <= np.asarray(fitted.log_weight) - least), angle


@pytest.mark.slow
def test_antipode_is_a_mean_over_tangent_directions():
    mean, s, _ = images(9, 32, 0.5)
    fitted = mixture_fit.fit_training_mixture(mean, s, df=5.0, bandwidth=1.0)
    for i, m in enumerate(mean / np.linalg.norm(mean, axis=1, keepdims=True)):
        basis = np.linalg.svd(m[None])[2][1:].T
        squared = 4 * np.trace(basis.T @ np.diag(s[i] ** -2.0) @ basis) / 31
        expected = fitted.log_weight[i] - 18 * np.log1p(squared / 5)
        found = fitted._log_probs(jnp.asarray(-m, jnp.float32))[i]
        np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_many_copies_under_the_resolution_of_float32():
    # Squared distances of zero, in units of scales of 1e-4, are rounding of either sign and size ten.
    mean, s, _ = images(9, 32, 1e-4)
    for i in range(9):
        copies = np.full(9, i)
        fitted = mixture_fit.fit_training_mixture(mean[copies], s[copies], df=0.5, bandwidth=1.0)
        excess = float(score(fitted, mean[i : i + 1])[0]) + float(fitted.log_weight[0])
        assert -1e-3 < excess < np.log(9 / 4) + 1e-3  # four are computed again


@pytest.mark.slow
def test_radial_part_alone_sees_the_radius():
    mean, s, embedding = images()
    directional = mixture_fit.fit_training_mixture(mean, s, df=5.0, bandwidth=1.0)
    np.testing.assert_allclose(
        score(directional, 7 * embedding), score(directional, embedding), rtol=1e-5
    )
    both = mixture_fit.fit_training_mixture(mean, s, df=5.0, bandwidth=1.0, **RADIAL)
    assert np.all(np.abs(score(both, 7 * embedding) - score(both, embedding)) > 0.1)
    # Equal radii: the radial density is one factor for all components.
    unit = mean / np.linalg.norm(mean, axis=1, keepdims=True)
    both = mixture_fit.fit_training_mixture(unit, s, df=5.0, bandwidth=1.0, **RADIAL)
    r = np.linalg.norm(embedding, axis=1)
    expected = scipy.stats.t.logpdf(np.log(r) / 0.3, 4) - np.log(0.3 * r)
    np.testing.assert_allclose(
        score(both, embedding), score(directional, embedding) - expected, rtol=1e-5
    )


# --- Which image has which score ---


@pytest.mark.slow
def test_order_and_copies_of_training_images_do_not_matter():
    mean, s, embedding = images(9)

    def fit(index):
        return mixture_fit.fit_training_mixture(
            mean[index], s[index], df=5.0, bandwidth=1.0, **RADIAL
        )

    expected = score(fit(np.arange(9)), embedding)
    shuffled = np.random.default_rng(1).permutation(9)
    np.testing.assert_allclose(score(fit(shuffled), embedding), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(fit(np.arange(18) // 2)(embedding), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(
        fit(np.zeros(9, int))(embedding), fit(np.zeros(1, int))(embedding), rtol=1e-5, atol=1e-5
    )


@pytest.mark.slow
def test_a_score_depends_on_its_own_image_alone_and_passes_through_jit():
    mean, s, _ = images()
    embedding = images(70)[2]
    fitted = mixture_fit.fit_training_mixture(mean, s, df=5.0, bandwidth=0.5, **RADIAL)
    expected = np.asarray(score(fitted, embedding))
    np.testing.assert_allclose(fitted(embedding), expected, rtol=1e-5, atol=1e-5)
    alone = [score(fitted, embedding[i : i + 1])[0] for i in range(70)]
    np.testing.assert_allclose(alone, expected, rtol=1e-5, atol=1e-5)
    spoiled = embedding.copy()
    spoiled[3] = np.nan
    found = np.asarray(score(fitted, spoiled))
    assert np.isnan(found[3])
    np.testing.assert_allclose(np.delete(found, 3), np.delete(expected, 3), rtol=1e-5, atol=1e-5)
    assert fitted(embedding[:0]).shape == (0,)


@pytest.mark.slow
@pytest.mark.parametrize("df", [5.0, np.inf])
def test_gradients_are_finite(df):
    mean, s, embedding = images()
    fitted = mixture_fit.fit_training_mixture(mean, s, df=df, bandwidth=1.0, **RADIAL)
    special = np.concatenate([embedding, mean, -mean, np.zeros((1, 6))]).astype(np.float32)
    gradient = jax.jit(jax.grad(lambda h: jnp.sum(fitted(h))))(jnp.asarray(special))
    assert np.isfinite(gradient).all()
    assert np.isfinite(fitted(special)).all()


# --- Bandwidth ---


# Three: so few that the own image, too, is among those whose distance is computed a second time.
@pytest.mark.slow
@pytest.mark.parametrize("num_images", [3, nightly(9)])
@pytest.mark.parametrize("df", [0.5, np.inf])
@pytest.mark.parametrize("radial", [None, RADIAL])
def test_leave_one_out_is_the_loop_without_the_own_image(float64, df, radial, num_images):
    mean, s, embedding = images(num_images)
    fitted = mixture_fit.fit_training_mixture(mean, s, df=df, bandwidth=1.0, **(radial or {}))
    log_probs = pair_log_probs(embedding, mean, s, df, fitted.log_mass, radial)
    some = np.array([2, 0, num_images - 1])
    found = mixture_fit._leave_one_out(fitted, jnp.asarray(embedding[some]), jnp.asarray(some))
    np.testing.assert_allclose(found, without_own(log_probs)[some], rtol=1e-9, atol=1e-9)


# Scales that are right, forty times too narrow or too wide: inside the grid and beyond its ends.
@pytest.mark.slow
@pytest.mark.parametrize("factor", [1.0, 1 / 40, 40.0])
def test_bandwidth_is_the_best_of_the_loops(float64, factor):
    # Three clusters: the other images of one's own explain an embedding.
    centers, s, noise = images(scale=0.1)
    mean = centers[np.arange(9) % 3] + 0.3 * noise
    embedding = mean + 0.3 * np.roll(noise, 1, axis=0)
    choice = mixture_fit.choose_bandwidth(mean, factor * s, embedding, df=5.0, **RADIAL)
    loop = []
    for bandwidth in choice.grid:
        at = mixture_fit.fit_training_mixture(mean, factor * s, df=5.0, bandwidth=bandwidth)
        scale = bandwidth * factor * s
        pairs = pair_log_probs(embedding, mean, scale, 5.0, at.log_mass, RADIAL)
        loop.append(np.mean(without_own(pairs)))
    np.testing.assert_allclose(choice.log_likelihoods, loop, rtol=1e-9)
    assert choice.bandwidth == choice.grid[np.argmax(loop)]
    assert choice.log_likelihood == max(choice.log_likelihoods)
    np.testing.assert_allclose(np.diff(np.log2(choice.grid)), 0.5)
    assert choice.grid[0] <= 1 / 8 < 2 <= choice.grid[-1]
    assert 0 < np.argmax(loop) < len(loop) - 1
    fitted = mixture_fit.fit_training_mixture(
        mean, factor * s, df=5.0, embedding=embedding, **RADIAL
    )
    given = mixture_fit.fit_training_mixture(
        mean, factor * s, df=5.0, embedding=embedding, bandwidth=choice.bandwidth, **RADIAL
    )
    found: Any
    for found in (fitted, given):
        np.testing.assert_allclose(found.bandwidth, choice.bandwidth)
        np.testing.assert_allclose(found.leave_one_out, choice.log_likelihood, rtol=1e-9)
    np.testing.assert_array_equal(fitted(embedding), given(embedding))


@pytest.mark.slow
def test_bandwidth_from_a_seeded_draw_of_images(float64):
    mean, s, embedding = images()
    draw: Any = {"df": 5.0, "bandwidth": 1.0, "embedding": embedding, "num_queries": 4}
    found = [
        float(mixture_fit.fit_training_mixture(mean, s, seed=seed, **draw).leave_one_out)  # pyright: ignore[reportArgumentType]
        for seed in (0, 0, 1)
    ]
    assert found[0] == found[1] != found[2]
    rows = np.random.default_rng(0).choice(9, 4, replace=False)
    log_mass = mixture_fit.fit_training_mixture(mean, s, df=5.0, bandwidth=1.0).log_mass
    expected = without_own(pair_log_probs(embedding, mean, s, 5.0, log_mass))[rows].mean()
    np.testing.assert_allclose(found[0], expected, rtol=1e-9)


@pytest.mark.slow
def test_bandwidth_of_copies_and_of_noise():
    mean, s, _ = images()
    copies = np.repeat(mean[:1], 9, axis=0)
    with pytest.raises(DegenerateFeaturesError, match=r"still rises at a bandwidth of 0\.002"):
        mixture_fit.choose_bandwidth(copies, s, copies, df=5.0)
    # Embeddings that have nothing to do with their posteriors: uniform is best, and the search ends.
    noise = images(seed=8)[2]
    uniform = mixture_fit.choose_bandwidth(mean, s, noise, df=np.inf)
    assert 1 <= uniform.bandwidth <= 2**7
    assert np.isfinite(uniform.log_likelihoods).all()


# --- Errors ---

MEAN, SCALE, EMBEDDING = images(9)
NAN = np.where(np.arange(6) == 2, np.nan, MEAN)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"posterior_mean": np.zeros((0, 6))}, r"posterior_mean must be \[N, D\] with at least 1"),
        ({"posterior_mean": MEAN[0]}, r"posterior_mean must be \[N, D\]"),
        ({"scale_diag": SCALE[:3]}, r"share one shape \[N, D\], got \(9, 6\) and \(3, 6\)"),
        ({"posterior_mean": MEAN[:, :2], "scale_diag": SCALE[:, :2]}, "at least 3 .*, got 2"),
        ({"posterior_mean": NAN}, "posterior_mean must be finite: 9 of 9 rows"),
        ({"posterior_mean": 0 * MEAN}, "zero has no direction; leave out 9 of 9"),
        ({"scale_diag": NAN}, "scale_diag must be finite"),
        ({"scale_diag": SCALE + np.inf}, "scale_diag must be finite"),
        ({"scale_diag": SCALE - SCALE.min()}, r"scale_diag must be positive, got 0\.0"),
        ({"scale_diag": 1e-16 * SCALE}, r"scale_diag times bandwidth must be in \[1e-15"),
        ({"df": 0.0}, "df must be one positive number, got 0"),
        ({"df": np.nan}, "df must be one positive number"),
        ({"df": True}, "df must be one positive number, got True"),
        ({"bandwidth": 0.0}, "bandwidth must be one positive finite number, got 0"),
        ({"bandwidth": np.inf}, "bandwidth must be one positive finite number, got inf"),
        ({"bandwidth": np.nan}, "bandwidth must be one positive finite number"),
        ({"bandwidth": None}, "the embeddings of the training images"),
        ({"radial_scale": 0.3}, "give both radial_scale and radial_df"),
        ({"radial_df": 0.3}, "give both radial_scale and radial_df"),
        ({"radial_scale": -1.0, "radial_df": 1.0}, "radial_scale must be one positive finite"),
        ({"radial_scale": 1.0, "radial_df": 0.0}, "radial_df must be one positive number"),
        ({"embedding": NAN}, "embedding must be finite"),
        ({"embedding": EMBEDDING[:3]}, r"embedding must be \(9, 6\) as the posterior means"),
        ({"embedding": EMBEDDING, "num_queries": 0}, "num_queries must be at least 1, got 0"),
        ({"embedding": 1e39 * EMBEDDING}, r"embedding must lie within 3\.4e\+38.*: 9 of 9 rows"),
    ],
)
def test_bad_arguments(change, message):
    good: Any = {"posterior_mean": MEAN, "scale_diag": SCALE, "df": 5.0, "bandwidth": 1.0}
    with pytest.raises(ValueError, match=message):
        mixture_fit.fit_training_mixture(**{**good, **change})


@pytest.mark.parametrize("change", [{"num_queries": 5.0}, {"seed": None}])
def test_counts_that_are_no_whole_numbers(change):
    with pytest.raises(TypeError, match=f"{next(iter(change))} must be one whole number"):
        mixture_fit.fit_training_mixture(MEAN, SCALE, df=5.0, embedding=EMBEDDING, **change)


@pytest.mark.slow
def test_bad_queries():
    fitted = mixture_fit.fit_training_mixture(MEAN, SCALE, df=5.0, bandwidth=1.0)
    for bad in (EMBEDDING[:, :5], EMBEDDING[0]):
        with pytest.raises(ValueError, match=r"embedding must be \[M, 6\]"):
            fitted(bad)
    with pytest.raises(TypeError, match="embedding must be real numbers"):
        fitted(EMBEDDING + 1j)
    # No images have no scores; what float32 cannot hold is infinitely far, and NaN stays NaN.
    assert fitted(EMBEDDING[:0]).shape == (0,)
    far = fitted(np.array([[np.inf] * 6, [np.nan] * 6, [1] * 6], np.float32))
    assert np.isposinf(far[0])
    assert np.isnan(far[1])
    assert np.isfinite(far[2])


@pytest.mark.slow
def test_means_and_degrees_of_freedom_of_any_size():
    def fitted(**change: Any) -> TrainingMixture:
        given: Any = {"posterior_mean": MEAN, "scale_diag": SCALE, "df": np.inf, "bandwidth": 1.0}
        return mixture_fit.fit_training_mixture(**{**given, **change})

    expected = fitted()
    for factor in (1e300, 1e-300):
        found = fitted(posterior_mean=factor * np.asarray(MEAN, np.float64))
        np.testing.assert_allclose(found.location, expected.location, rtol=1e-6, atol=1e-7)
    np.testing.assert_array_equal(fitted(df=1e300)(EMBEDDING), expected(EMBEDDING))


@pytest.mark.slow
def test_one_image_has_a_likelihood_and_no_leave_one_out():
    one = slice(0, 1)
    fitted = mixture_fit.fit_training_mixture(MEAN[one], SCALE[one], df=5.0, bandwidth=1.0)
    expected = -pair_log_probs(EMBEDDING, MEAN[one], SCALE[one], 5.0, fitted.log_mass)[:, 0]
    np.testing.assert_allclose(fitted(EMBEDDING), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="at least 2 training images, got 1"):
        mixture_fit.choose_bandwidth(MEAN[one], SCALE[one], EMBEDDING[one], df=5.0)
