"""Scores against scikit-learn, SciPy and NumPy in float64; the threshold by simulation."""

import dataclasses
import functools
import types
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.covariance import EmpiricalCovariance
from sklearn.neighbors import NearestNeighbors

from jevb_jax.evaluation import (
    conformal,
    detection_metrics,
    evaluate,
    gaussian_detectors,
    labeled_detectors,
    mixture_fit,
    neighbor_detectors,
)
from jevb_jax.evaluation.detector_input import DegenerateFeaturesError, FewImagesWarning
from jevb_jax.evaluation.gaussian_detectors import Residual
from jevb_jax.evaluation.labeled_detectors import VirtualLogit
from jevb_jax.paper.likelihood import Likelihood
from jevb_jax.paper.objective import View, importance_weighted_bound
from jevb_jax.paper.scores import (
    UncertaintyTerms,
    concentration_score,
    cross_view_score,
    directional_score,
    importance_weighted_score,
    kl_score,
    negative_elbo_score,
    negative_log_likelihood_score,
    posterior_entropy_score,
    radial_score,
    typicality_features,
    uncertainty_terms,
)
from tests import oracles
from tests.marks import nightly

V, N, D = 3, 5, 6
LIKELIHOOD = Likelihood(df=5.0, radial_df=4.0, radial_scale=0.4)


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def correlated(seed: int, num_images: int, dim: int = 7) -> np.ndarray:
    """Features of unequal variances, off the origin, that depend on each other."""
    mixing = np.random.default_rng(99).normal(size=(dim, dim)) * np.linspace(0.1, 5, dim)
    return (normal(seed, num_images, dim) @ mixing + 3).astype(np.float32)


def keys(count: int = N) -> jax.Array:
    return jax.random.split(jax.random.key(3), count)


def views(num_views: int = V) -> View:
    e, m = normal(0, num_views, N, D), normal(1, num_views, N, D)
    return View(*(jnp.asarray(x) for x in (e, m, np.exp(normal(2, num_views, N, D)))))


@functools.partial(jax.jit, static_argnames="num_samples")
def compute(
    keys: jax.Array, views: View, num_samples: int = 4, untied_scale: float | None = None
) -> UncertaintyTerms:
    return uncertainty_terms(
        keys, views, LIKELIHOOD, num_samples=num_samples, untied_scale=untied_scale
    )


@functools.cache
def terms(num_views: int = V) -> UncertaintyTerms:
    return compute(keys(), views(num_views), num_samples=4 if num_views > 1 else 2000)


# --- JEVB's own terms ---


@pytest.mark.slow
def test_terms_are_means_over_views_and_ordered_pairs():
    # A posterior without width samples its mean, so the likelihood is one number.
    e, m, _ = views()
    narrow = View(e, m, jnp.full((V, N, D), 1e-6))
    found: Any = uncertainty_terms(keys(), narrow, LIKELIHOOD, num_samples=2, untied_scale=0.8)

    def log_likelihood(target: int, source: int) -> tuple[np.ndarray, np.ndarray]:
        h, z = np.asarray(e[target], np.float64), np.asarray(m[source], np.float64)
        r, rho = np.linalg.norm(h, axis=1), np.linalg.norm(z, axis=1)
        s = np.full((N, D), 0.8 / np.sqrt(D))
        directional = oracles.directional_log_prob(
            h / r[:, None], z / rho[:, None], s, LIKELIHOOD.df, "chordal"
        )
        x = (np.log(r) - np.log(rho)) / LIKELIHOOD.radial_scale
        radial = scipy.stats.t.logpdf(x, LIKELIHOOD.radial_df)
        return directional, radial - np.log(LIKELIHOOD.radial_scale * r)

    own = [log_likelihood(v, v) for v in range(V)]
    pairs = [sum(log_likelihood(t, s)) for t in range(V) for s in range(V) if s != t]
    tolerance: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-4}  # from the width of 1e-6, and float32
    np.testing.assert_allclose(
        found.directional_log_likelihood, np.mean([a for a, _ in own], axis=0), **tolerance
    )
    np.testing.assert_allclose(
        found.radial_log_likelihood, np.mean([b for _, b in own], axis=0), **tolerance
    )
    np.testing.assert_allclose(
        found.cross_view_log_likelihood, np.mean(np.asarray(pairs), axis=0), **tolerance
    )


@pytest.mark.slow
def test_kl_and_entropy_are_scipys():
    _, m, s = (np.asarray(x, np.float64) for x in views())
    entropy = [[scipy.stats.norm(0, s[v, i]).entropy().sum() for i in range(N)] for v in range(V)]
    np.testing.assert_allclose(terms().posterior_entropy, np.mean(entropy, axis=0), rtol=1e-5)
    kl = (np.log(1 / s) + (s**2 + m**2) / 2 - 0.5).sum(axis=-1)
    np.testing.assert_allclose(terms().kl, kl.mean(axis=0), rtol=1e-5)


@pytest.mark.slow
def test_terms_of_an_image_do_not_depend_on_its_neighbours():
    order = np.array([3, 1, 4, 0, 2])
    shuffled: Any = compute(keys()[order], View(*(x[:, order] for x in views())))
    for name, value in terms()._asdict().items():
        np.testing.assert_allclose(
            getattr(shuffled, name), value[order], rtol=1e-5, atol=1e-5, err_msg=name
        )


@pytest.mark.slow
@pytest.mark.parametrize("untied_scale", [nightly(None), 0.5])
def test_one_key_serves_all_images(untied_scale):
    key = jax.random.key(7)
    shared = compute(key, views(), untied_scale=untied_scale)
    repeated: Any = compute(jnp.broadcast_to(key, (N,)), views(), untied_scale=untied_scale)
    for name, value in shared._asdict().items():
        np.testing.assert_allclose(
            value, getattr(repeated, name), rtol=1e-5, atol=1e-5, err_msg=name
        )


@pytest.mark.slow
@pytest.mark.parametrize("has_one_key", [True, nightly(False)])
def test_numbers_of_each_image_are_its_own(has_one_key):
    key = jax.random.key(7) if has_one_key else keys()
    df = np.array([0.7, 2.0, 5.0, 50.0, 1e4], np.float32)
    prior = np.exp(normal(8, N, D))
    likelihood = dataclasses.replace(LIKELIHOOD, df=df)
    found = uncertainty_terms(key, views(), likelihood, num_samples=2, prior_scale=prior)
    for image in (0, 3):
        # The same numbers for all images, of which one is looked at.
        one = dataclasses.replace(LIKELIHOOD, df=df[image])
        alone = uncertainty_terms(key, views(), one, num_samples=2, prior_scale=prior[image])
        for name, value in found._asdict().items():
            np.testing.assert_allclose(
                value[image], getattr(alone, name)[image], rtol=1e-5, atol=1e-5, err_msg=name
            )
    wrong = dataclasses.replace(LIKELIHOOD, df=df[:2])
    with pytest.raises(ValueError, match=r"df must be a number or \[N\]"):
        uncertainty_terms(key, views(), wrong, num_samples=2)


@pytest.mark.slow
def test_the_bounds_and_a_single_view():
    # The importance-weighted bound is at least the ELBO, both with little noise of 2,000 samples.
    bound = terms(1).importance_weighted_bound
    assert np.all(bound >= -negative_elbo_score(terms(1)) - 0.05)
    assert terms(1).cross_view_log_likelihood is None


@pytest.mark.slow
def test_unfactorised_bound_reaches_the_exact_evidence():
    # p(h | z) = N(z, s^2), p(z) = N(0, p^2): log p(h) is a Gaussian's.
    h, prior, s = normal(5, N, 3), 1.5, 0.7
    variance = 1 / (1 / prior**2 + 1 / s**2)
    mean = jnp.asarray(variance / s**2 * h)  # the exact posterior: no Monte Carlo error at all
    gaussian = Likelihood(
        df=np.inf, radial_df=5.0, radial_scale=1.0, scale_units="unit", likelihood="unfactorised"
    )
    scale = jnp.full_like(mean, variance**0.5)
    bound = importance_weighted_bound(
        keys(), h, mean, scale, gaussian, num_samples=3, prior_scale=prior, untied_scale=s
    )
    evidence = scipy.stats.norm.logpdf(h, scale=np.hypot(prior, s)).sum(axis=1)
    np.testing.assert_allclose(bound, evidence, rtol=1e-4)


@pytest.mark.slow
def test_scores_have_their_sign():
    t = terms()
    a, b, kl = t.directional_log_likelihood, t.radial_log_likelihood, t.kl
    for score, value in (
        (negative_log_likelihood_score, -(a + b)),
        (directional_score, -a),
        (radial_score, -b),
        (negative_elbo_score, -(a + b - kl)),
        (importance_weighted_score, -t.importance_weighted_bound),
        (kl_score, -kl),
        (posterior_entropy_score, t.posterior_entropy),
        (cross_view_score, -np.asarray(t.cross_view_log_likelihood)),
    ):
        np.testing.assert_allclose(score(t), value, rtol=1e-6)
    np.testing.assert_array_equal(concentration_score(np.array([1.0, 9.0])), [-1, -9])
    assert typicality_features(t).shape == (N, 5)
    assert typicality_features(terms(1)).shape == (N, 4)
    with pytest.raises(ValueError, match="at least 2 views"):
        cross_view_score(terms(1))


def test_views_must_share_a_shape():
    e, m, s = views()
    for bad in (View(e[0], m[0], s[0]), View(e, m[:2], s)):
        with pytest.raises(ValueError, match=r"one shape \[V, N, D\]"):
            uncertainty_terms(keys(), bad, LIKELIHOOD, num_samples=1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"likelihood": dataclasses.replace(LIKELIHOOD, df=-1.0)}, "df must be positive"),
        ({"prior_scale": 0.0}, "prior_scale must be positive"),
        ({"untied_scale": -2.0}, "untied_scale must be positive"),
        ({"num_samples": 0}, "num_samples must be"),
        ({"location": "median"}, "location must be"),
    ],
)
def test_wrong_settings_of_terms_are_named(changes, message):
    settings: dict[str, Any] = {"likelihood": LIKELIHOOD, "num_samples": 1, **changes}
    with pytest.raises(ValueError, match=message):
        uncertainty_terms(keys(), views(), **settings)


@pytest.mark.slow
def test_a_scale_that_is_not_positive_spoils_its_own_image_only():
    e, m, s = views()
    expected: Any = compute(keys(), views())
    for wrong in (-1.0, 0.0):
        found: Any = compute(keys(), View(e, m, s.at[0, 2].set(wrong)))
        for value, other in zip(found, expected, strict=True):
            assert np.isnan(value[2])
            np.testing.assert_array_equal(np.delete(value, 2), np.delete(other, 2))


# --- Features ---


def test_mahalanobis_is_scikit_learns(same):
    train, new = correlated(0, 400), correlated(1, 50)
    oracle = EmpiricalCovariance().fit(train.astype(np.float64))
    found = gaussian_detectors.fit_mahalanobis(train)(new)
    same("Mahalanobis", found, oracle.mahalanobis(new.astype(np.float64)), rtol=1e-4)


def test_mahalanobis_knows_no_units_and_no_dead_features():
    train, new = correlated(0, 400), correlated(1, 50)
    found = gaussian_detectors.fit_mahalanobis(train)(new)
    units = np.geomspace(1e-3, 1e3, 7).astype(np.float32)
    np.testing.assert_allclose(
        gaussian_detectors.fit_mahalanobis(train * units)(new * units), found, rtol=5e-3
    )
    dead = functools.partial(np.pad, pad_width=((0, 0), (0, 3)))
    np.testing.assert_allclose(
        gaussian_detectors.fit_mahalanobis(dead(train))(dead(new)), found, rtol=1e-4
    )


@pytest.mark.parametrize("k", [1, 5, 60])
def test_knn_is_scikit_learns(k, same):
    train, new = normal(0, 60, 8), np.concatenate([normal(1, 150, 8), normal(0, 60, 8)[:3]])
    unit = [x / np.linalg.norm(x.astype(np.float64), axis=1, keepdims=True) for x in (train, new)]
    distances, _ = (
        NearestNeighbors(n_neighbors=k, algorithm="brute").fit(unit[0]).kneighbors(unit[1])
    )
    # Where a distance is zero scikit-learn's own is the square root of a rounding error.
    found = neighbor_detectors.fit_knn(train, k=k)(new)
    same("k-NN distance", found, distances[:, -1], rtol=1e-5, atol=2e-7)


@pytest.mark.slow
def test_whitened_knn_is_scikit_learns_after_whitening():
    train, new = correlated(0, 300).astype(np.float64), correlated(1, 70).astype(np.float64)
    covariance = np.cov(train.T, bias=True)
    oracle = NearestNeighbors(
        n_neighbors=5, algorithm="brute", metric="mahalanobis",
        metric_params={"VI": np.linalg.inv(covariance)},
    ).fit(train)  # fmt: skip
    distances, _ = oracle.kneighbors(new)
    found = neighbor_detectors.fit_whitened_knn(train, k=5)(new.astype(np.float32))
    np.testing.assert_allclose(found, distances[:, -1], rtol=1e-3)


def test_ssd_is_a_loop_over_clusters(same):
    centers = np.array([[4, 0, 0, 0], [0, 4, 0, 0], [0, 0, 4, 0]], np.float32)
    which = np.arange(300) % 3
    train = (centers[which] + 0.3 * normal(0, 300, 4)).astype(np.float64)
    new = (centers[which[:40]] + normal(1, 40, 4)).astype(np.float32)
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (train, new.astype(np.float64))]
    distances = [
        EmpiricalCovariance().fit(unit[0][which == c]).mahalanobis(unit[1]) for c in range(3)
    ]
    found = gaussian_detectors.fit_ssd(train, num_clusters=3)(new)
    np.testing.assert_allclose(found, np.min(distances, axis=0), rtol=2e-3)
    one = EmpiricalCovariance().fit(unit[0]).mahalanobis(unit[1])
    found = gaussian_detectors.fit_ssd(train)(new)
    same("Mahalanobis++, without labels", found, one, rtol=2e-3)
    np.testing.assert_allclose(gaussian_detectors.fit_ssd(train)(7 * new), one, rtol=2e-3)


def authors_ssd(train: np.ndarray, new: np.ndarray, rcond: float = 1e-15) -> np.ndarray:
    """The authors' `get_eval_results` and `get_scores_one_cluster`, written again in float64."""
    train, new = (x.astype(np.float64) for x in (train, new))
    train, new = (x / (np.linalg.norm(x, axis=1, keepdims=True) + 1e-10) for x in (train, new))
    mean, std = train.mean(axis=0), train.std(axis=0)
    train, new = ((x - mean) / (std + 1e-10) for x in (train, new))
    inverse = np.linalg.pinv(np.cov(train.T, bias=True), rcond=rcond)
    shifted = new - train.mean(axis=0)
    return np.einsum("nf,fg,ng->n", shifted, inverse, shifted)


def test_published_ssd_is_the_authors_code_and_ours_where_images_are_many(same):
    train, new = correlated(0, 400), correlated(1, 50)
    found = gaussian_detectors.fit_published_ssd(train)(new)
    same("SSD, as published", found, authors_ssd(train, new), rtol=2e-3)
    np.testing.assert_allclose(gaussian_detectors.fit_ssd(train)(new), found, rtol=1e-4)
    np.testing.assert_allclose(
        gaussian_detectors.fit_published_ssd(train)(7 * new), found, rtol=2e-3
    )


@pytest.mark.filterwarnings("ignore::jevb_jax.evaluation.detector_input.FewImagesWarning")
def test_published_ssd_does_not_see_what_leaves_the_span():
    # A copy and a dead feature, and at last fewer images than features.
    def padded(x: np.ndarray) -> np.ndarray:
        return np.concatenate([x, x[:, :1], np.zeros((len(x), 1), np.float32)], axis=1)

    for num_images in (400, 6):
        train, new = padded(correlated(0, num_images)), padded(correlated(1, 50))
        found = np.asarray(gaussian_detectors.fit_published_ssd(train)(new))
        np.testing.assert_allclose(found, authors_ssd(train, new, rcond=1e-9), rtol=1e-2)
        ours = np.asarray(gaussian_detectors.fit_ssd(train)(new))
        assert np.allclose(ours, found, rtol=1e-2) == (num_images == 400)
    train = padded(correlated(0, 400))
    strange = padded(correlated(1, 50))
    strange[:, -1] = 5
    found = np.asarray(gaussian_detectors.fit_published_ssd(train)(strange))
    np.testing.assert_allclose(found, authors_ssd(train, strange, rcond=1e-9), rtol=1e-2)
    assert np.asarray(gaussian_detectors.fit_ssd(train)(strange)).min() > 100 * found.max()


def test_published_ssd_warns_of_few_images_and_refuses_none_that_vary():
    with pytest.warns(FewImagesWarning, match="does not shrink"):
        gaussian_detectors.fit_published_ssd(correlated(0, 7))
    with pytest.raises(DegenerateFeaturesError, match="do not vary"):
        gaussian_detectors.fit_published_ssd(np.ones((60, 3), np.float32))


def test_residual_is_what_the_principal_components_leave():
    train, new = correlated(0, 400).astype(np.float64), correlated(1, 50).astype(np.float64)
    _, _, axes = np.linalg.svd(train - train.mean(axis=0))
    shifted = new - train.mean(axis=0)
    expected = np.linalg.norm(shifted - shifted @ axes[:4].T @ axes[:4], axis=1)
    found = gaussian_detectors.fit_residual(train, num_components=4)(new.astype(np.float32))
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_logit_scores_are_scipys():
    logits = 30 * normal(0, 40, 10)
    x = logits.astype(np.float64)
    np.testing.assert_allclose(
        labeled_detectors.energy_score(logits),
        -np.asarray(scipy.special.logsumexp(x, axis=1)),
        rtol=1e-6,
    )
    expected = scipy.special.softmax(x, axis=1).max(axis=1)
    found = np.asarray(labeled_detectors.max_softmax_score(logits), np.float64)
    np.testing.assert_allclose(-np.expm1(found), expected, rtol=1e-5)
    np.testing.assert_array_equal(labeled_detectors.max_logit_score(logits), -logits.max(axis=1))
    np.testing.assert_allclose(
        neighbor_detectors.feature_norm_score(logits), -np.linalg.norm(x, axis=1), rtol=1e-6
    )


def labeled() -> tuple[np.ndarray, np.ndarray]:
    labels = np.arange(400) % 4 * 10 + 3  # classes need not be 0, 1, ...
    return correlated(0, 400) + 2 * normal(7, 50, 7)[labels], labels


def test_class_mahalanobis_and_rmd_are_the_papers(same):
    (train, labels), new = labeled(), correlated(1, 50)
    x, q = train.astype(np.float64), new.astype(np.float64)
    means = {c: x[labels == c].mean(axis=0) for c in np.unique(labels)}
    shared = sum((x[labels == c] - m).T @ (x[labels == c] - m) for c, m in means.items()) / len(x)
    precision = np.linalg.inv(np.asarray(shared))
    to_classes = np.min(
        [np.einsum("nf,fg,ng->n", q - m, precision, q - m) for m in means.values()], 0
    )
    found = labeled_detectors.fit_class_mahalanobis(train, labels)(new)
    same("Mahalanobis to the nearest class", found, to_classes, rtol=1e-3)
    relative = to_classes - EmpiricalCovariance().fit(x).mahalanobis(q)
    found = labeled_detectors.fit_relative_mahalanobis(train, labels)(new)
    same("relative Mahalanobis", found, relative, rtol=1e-3, atol=1e-2)


def test_mahalanobis_plus_plus_is_the_distance_between_directions(same):
    (train, labels), new = labeled(), correlated(1, 50)
    x, q = (
        x / np.linalg.norm(x, axis=1, keepdims=True)
        for x in (train.astype(np.float64), new.astype(np.float64))
    )
    means = {c: x[labels == c].mean(axis=0) for c in np.unique(labels)}
    centered = x - np.stack([means[c] for c in labels])
    oracle = EmpiricalCovariance(assume_centered=True).fit(centered)
    expected = np.min([oracle.mahalanobis(q - mean) for mean in means.values()], axis=0)
    score = labeled_detectors.fit_class_mahalanobis_plus_plus(train, labels)
    same("Mahalanobis++, with labels", score(new), expected, rtol=2e-3)
    np.testing.assert_allclose(score(3 * new), expected, rtol=2e-3)
    one = labeled_detectors.fit_class_mahalanobis_plus_plus(train, np.zeros(400, int))
    np.testing.assert_allclose(one(new), gaussian_detectors.fit_ssd(train)(new), rtol=1e-5)


@pytest.mark.slow
def test_vim_is_the_published_code_written_again():
    train, new, w, b = correlated(0, 400), correlated(1, 50), normal(2, 7, 3), normal(3, 3)
    x, q = train.astype(np.float64), new.astype(np.float64)
    u = -np.linalg.pinv(w.T.astype(np.float64)) @ b
    values, vectors = np.linalg.eigh(
        EmpiricalCovariance(assume_centered=True).fit(x - u).covariance_
    )
    null = vectors[:, np.argsort(-values)[4:]]
    alpha = (x @ w + b).max(axis=1).mean() / np.linalg.norm((x - u) @ null, axis=1).mean()
    expected = np.linalg.norm((q - u) @ null, axis=1) * alpha - scipy.special.logsumexp(
        q @ w + b, axis=1
    )
    score = labeled_detectors.fit_vim(train, train @ w + b, origin=u, num_components=4)
    np.testing.assert_allclose(score(new, new @ w + b), expected, rtol=1e-4, atol=1e-4)


def test_vim_origin_is_the_published_one_and_not_of_rounding_errors():
    w, b = normal(0, 16, 10), normal(1, 10)
    np.testing.assert_allclose(
        labeled_detectors.vim_origin(w, b), -np.linalg.pinv(w.T.astype(np.float64)) @ b, rtol=1e-12
    )
    # Of a softmax probe: weights and biases that sum to zero over the classes, up to rounding.
    w, b = w - w.mean(axis=1, keepdims=True), b - b.mean()
    origin = labeled_detectors.vim_origin(w, b)
    exact = w.astype(np.float64) - w.astype(np.float64).mean(axis=1, keepdims=True)
    np.testing.assert_allclose(origin @ exact + b, 0, atol=1e-5)
    np.testing.assert_allclose(origin, np.linalg.lstsq(exact.T, -b, rcond=1e-9)[0], atol=1e-5)
    for seed in range(2, 6):
        noisy = [(x + 1e-6 * normal(seed, *x.shape)).astype(np.float32) for x in (w, b)]
        np.testing.assert_allclose(labeled_detectors.vim_origin(*noisy), origin, atol=1e-4)


FITS = {
    "knn": neighbor_detectors.fit_knn,
    "whitened_knn": neighbor_detectors.fit_whitened_knn,
    "mahalanobis": gaussian_detectors.fit_mahalanobis,
    "ssd": functools.partial(gaussian_detectors.fit_ssd, num_clusters=2),
    "published_ssd": gaussian_detectors.fit_published_ssd,
    "residual": functools.partial(gaussian_detectors.fit_residual, num_components=3),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FITS)
def test_fitted_scores_are_per_example_trees_and_refuse_bad_features(name):
    train, new = correlated(0, 200), correlated(1, 70)
    score = FITS[name](train)
    found = jax.jit(lambda score, x: score(x))(score, jnp.asarray(new))
    assert found.shape == (70,)
    np.testing.assert_allclose(score(new[40:45]), found[40:45], rtol=1e-5, atol=1e-5)
    assert np.all(np.isfinite(score(np.zeros((2, 7), np.float32))))
    with pytest.raises(ValueError, match="1 of 200 rows hold NaN or inf"):
        FITS[name](np.where(np.arange(1400).reshape(200, 7) == 9, np.nan, train))
    for bad in (train[0], train[:1]):
        with pytest.raises(ValueError, match=r"\[N, F\] with at least 2 images"):
            FITS[name](bad)


def test_settings_out_of_range_and_features_without_variance():
    train = correlated(0, 200)
    for fit, message in (
        (functools.partial(neighbor_detectors.fit_knn, k=201), r"k must be in \[1, 200\]"),
        (functools.partial(neighbor_detectors.fit_whitened_knn, k=0), r"k must be in \[1, 200\]"),
        (functools.partial(gaussian_detectors.fit_residual, num_components=7), r"in \[1, 6\]"),
        (functools.partial(gaussian_detectors.fit_ssd, num_clusters=101), r"in \[1, 100\]"),
        (
            functools.partial(labeled_detectors.fit_class_mahalanobis, labels=np.zeros(3, int)),
            "labels must be",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            fit(train)
    constant = np.ones((60, 3), np.float32)
    residual = functools.partial(gaussian_detectors.fit_residual, num_components=2)
    for fit in (
        gaussian_detectors.fit_mahalanobis,
        neighbor_detectors.fit_whitened_knn,
        gaussian_detectors.fit_ssd,
        residual,
    ):
        with pytest.raises(DegenerateFeaturesError, match="do not vary"):
            fit(constant)
    # Below, float32 has no digits; above, no inverse of a variance.
    for fit in (
        gaussian_detectors.fit_mahalanobis,
        neighbor_detectors.fit_knn,
        gaussian_detectors.fit_ssd,
        residual,
    ):
        with pytest.raises(DegenerateFeaturesError, match="Multiply all features"):
            fit(train.astype(np.float64) * 1e-38)
    with pytest.raises(DegenerateFeaturesError, match="Divide all features"):
        gaussian_detectors.fit_mahalanobis(train.astype(np.float64) * 1e36)
    for seed, error in ((-1, ValueError), (1.0, TypeError), (None, TypeError), (2**32, ValueError)):
        with pytest.raises(error, match="seed must be"):
            gaussian_detectors.fit_ssd(train, num_clusters=2, seed=seed)  # pyright: ignore[reportArgumentType]


@pytest.mark.slow
def test_typicality_is_right_on_both_sides():
    # In-distribution terms around 0; one set has too high, one too low a likelihood.
    rng = np.random.default_rng(0)
    inside, train = rng.normal(size=(2, 1000, 4)).astype(np.float32)
    likely, unlikely = inside + np.float32(5), inside - np.float32(5)
    for fit in (gaussian_detectors.fit_mahalanobis, neighbor_detectors.fit_whitened_knn):
        score = fit(train)
        limit = np.quantile(score(inside), 0.95)
        assert np.mean(np.asarray(score(likely)) > limit) > 0.99
        assert np.mean(np.asarray(score(unlikely)) > limit) > 0.99
    assert np.mean(-likely[:, 0] > np.quantile(-inside[:, 0], 0.95)) == 0  # one side alone


# --- Few images, and what leaves their span ---


def left_out(x: np.ndarray) -> np.ndarray:
    """The shrunk inverse covariance `[F, F]`: every image left out in turn, one share at a time."""
    std = x.std(axis=0)
    z = x / std

    def covariance(rows: np.ndarray, share: float) -> np.ndarray:
        return (1 - share) * np.cov(rows.T, bias=True) + share * np.eye(x.shape[1])

    def log_likelihood(share: float) -> float:
        return sum(
            scipy.stats.multivariate_normal.logpdf(z[i], rest.mean(axis=0), covariance(rest, share))  # pyright: ignore[reportArgumentType]
            for i in range(len(z))
            for rest in [np.delete(z, i, axis=0)]
        )

    best = max(np.geomspace(1e-9, 1, 91)[20:], key=log_likelihood)
    return np.linalg.inv(covariance(z, best)) / np.outer(std, std)


@pytest.mark.parametrize("num_images", [20, 5])
@pytest.mark.filterwarnings("ignore::jevb_jax.evaluation.detector_input.FewImagesWarning")
def test_few_images_are_shrunk_by_what_explains_images_left_out(num_images):
    train, new = correlated(0, num_images).astype(np.float64), correlated(1, 50).astype(np.float64)
    shifted = new - train.mean(axis=0)
    expected = np.einsum("nf,fg,ng->n", shifted, left_out(train), shifted)
    np.testing.assert_allclose(gaussian_detectors.fit_mahalanobis(train)(new), expected, rtol=1e-3)
    # Copies say nothing new.
    copies = np.tile(train, (40, 1))
    np.testing.assert_allclose(gaussian_detectors.fit_mahalanobis(copies)(new), expected, rtol=1e-3)


DENSITIES = {
    "mahalanobis": gaussian_detectors.fit_mahalanobis,
    "class": lambda x: labeled_detectors.fit_class_mahalanobis(x, np.arange(len(x)) % 2),
    "plus_plus": lambda x: labeled_detectors.fit_class_mahalanobis_plus_plus(
        x, np.arange(len(x)) % 2
    ),
    "relative": lambda x: labeled_detectors.fit_relative_mahalanobis(x, np.arange(len(x)) % 2),
    "whitened_knn": functools.partial(neighbor_detectors.fit_whitened_knn, k=2),
    "ssd": gaussian_detectors.fit_ssd,
    "clusters": functools.partial(gaussian_detectors.fit_ssd, num_clusters=2),
    "residual": functools.partial(gaussian_detectors.fit_residual, num_components=12),
}


def spectrum(num_images: int, rng: np.random.Generator, factor: float = 1.0) -> np.ndarray:
    """24 features with variances over three decades; a factor on the smaller half is strange."""
    std = np.geomspace(1, 0.03, 24) * np.where(np.arange(24) < 12, 1, factor)
    turn = np.linalg.qr(np.random.default_rng(5).normal(size=(24, 24)))[0]
    return (rng.normal(size=(num_images, 24)) * std) @ turn + 0.3


@pytest.mark.slow
@pytest.mark.parametrize("name", DENSITIES)
def test_as_few_images_as_features_tell_strange_ones(name):
    rng = np.random.default_rng(0)
    train, inside, outside = (spectrum(*x) for x in ((24, rng), (200, rng), (200, rng, 4.0)))  # pyright: ignore[reportArgumentType]
    with pytest.warns(FewImagesWarning) as caught:
        score = DENSITIES[name](train)
    assert caught[0].filename == __file__
    found = np.asarray(score(inside)), np.asarray(score(outside))
    assert detection_metrics.ood_metrics(*found).auroc > 0.9


def test_a_warning_of_few_images_is_emitted_once_in_an_evaluation(monkeypatch):
    few = normal(0, 8, 12)
    fits = (few, few + 0.1 * normal(1, 8, 12), normal(0, 7, 12))  # the second has another share

    def fit_all() -> Any:
        for x in fits:
            gaussian_detectors.fit_mahalanobis(x)
        return types.SimpleNamespace(results=[], ood=None)

    def warned(work: Callable[[], Any]) -> int:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            work()
        assert {one.category for one in caught} == {FewImagesWarning}
        return len(caught)

    def fit_twice(*_: Any) -> Any:
        fit_all()
        return fit_all()

    def evaluation() -> None:
        section = types.SimpleNamespace(compare_untrained=False)
        asked: Any = types.SimpleNamespace(
            settings=types.SimpleNamespace(evaluation=section), dataset=None
        )
        evaluate.evaluate(asked, None)

    monkeypatch.setattr(evaluate, "make_extractors", lambda *_, **__: None)
    monkeypatch.setattr(evaluate, "evaluated_split", lambda *_: ("test", range(3)))
    monkeypatch.setattr(evaluate, "left_out", lambda *_: {})
    monkeypatch.setattr(evaluate, "evaluate_variables", fit_twice)
    assert warned(fit_all) == 3
    for _ in range(2):  # the next evaluation warns again
        assert warned(evaluation) == 2
    assert warned(fit_all) == 3


@pytest.mark.slow
@pytest.mark.parametrize("num_images", [300, 9])
@pytest.mark.parametrize("name", DENSITIES)
@pytest.mark.filterwarnings("ignore::jevb_jax.evaluation.detector_input.FewImagesWarning")
def test_what_leaves_the_span_is_strange(name, num_images):
    # Seven features that a plane of three spans, a copy, a dead one and one that never moves.
    plane = normal(3, 3, 7)

    def on_the_plane(seed: int, count: int) -> np.ndarray:
        x = normal(seed, count, 3) @ plane
        return np.concatenate([x, x[:, :1], np.zeros((count, 1)), np.full((count, 1), 4)], axis=1)

    fit = functools.partial(gaussian_detectors.fit_residual, num_components=5)
    score = (DENSITIES | {"residual": fit})[name](on_the_plane(0, num_images))
    off = np.linalg.svd(plane)[2][-1]
    directions = [*np.eye(10)[7:], np.append(off, [off[0], 0, 0])]
    if name in ("ssd", "clusters", "plus_plus"):
        del directions[2]  # a direction of the same plane, of a shorter image
    inside = on_the_plane(1, 64)
    strange = [inside + size * one for one in directions for size in (1, 1e3, 1e30)]
    found = np.asarray(score(np.concatenate([inside, *strange]).astype(np.float32))).reshape(-1, 64)
    assert np.all(found[1:].min(axis=1) > found[0].max())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mahalanobis", "whitened_knn", "residual"])
def test_dead_features_change_nothing_where_they_are_dead(name):
    train, new = correlated(0, 400), correlated(1, 50)
    dead = functools.partial(np.pad, pad_width=((0, 0), (0, 3)), constant_values=2)
    found = (
        DENSITIES[name]
        if name != "residual"
        else functools.partial(gaussian_detectors.fit_residual, num_components=4)
    )
    np.testing.assert_allclose(found(dead(train))(dead(new)), found(train)(new), rtol=1e-4)


def test_what_cannot_be_fitted_is_refused():
    train = correlated(0, 40)
    equal = np.repeat(train[:2], 20, axis=0)
    for fit in (
        functools.partial(gaussian_detectors.fit_ssd, num_clusters=2),
        functools.partial(labeled_detectors.fit_class_mahalanobis, labels=np.repeat([0, 1], 20)),
        functools.partial(labeled_detectors.fit_relative_mahalanobis, labels=np.repeat([0, 1], 20)),
    ):
        with pytest.raises(DegenerateFeaturesError, match=r"are all equal|do not vary"):
            fit(equal)
    with pytest.raises(DegenerateFeaturesError, match="at least 2 features"):
        gaussian_detectors.fit_residual(train[:, :1], num_components=1)


@pytest.mark.slow
@pytest.mark.parametrize("offset", [0, 300])
def test_neighbours_are_found_under_an_offset_and_among_near_duplicates(offset):
    train, new = ((0.3 * normal(seed, 400, 16) + offset).astype(np.float32) for seed in (0, 1))
    unit = [np.asarray(x, np.float64) for x in (train, new)]
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in unit]
    distances = np.sort(np.linalg.norm(unit[0][None] - unit[1][:, None], axis=-1), axis=1)
    # A direction has a rounding error of 1e-7 itself.
    for k in (1, 7):
        np.testing.assert_allclose(
            neighbor_detectors.fit_knn(train, k=k)(new), distances[:, k - 1], rtol=1e-5, atol=4e-7
        )


@pytest.mark.slow
def test_neighbours_in_two_far_crowds():
    # A product of float32 does not tell the members of a crowd apart, wherever the center is.
    rng = np.random.default_rng(0)
    heart = rng.normal(size=(2, 1, 16))
    train, new = (
        (heart + 1e-3 * rng.uniform(size=(2, n, 1)) * rng.normal(size=(2, n, 16)))
        .reshape(-1, 16)
        .astype(np.float32)
        for n in (400, 20)
    )
    unit = [np.asarray(x, np.float64) for x in (train, new)]
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in unit]
    distances = np.sort(np.linalg.norm(unit[0][None] - unit[1][:, None], axis=-1), axis=1)
    found = neighbor_detectors.fit_knn(train, k=5)(new)
    np.testing.assert_allclose(found, distances[:, 4], rtol=5e-3)


@pytest.mark.slow
def test_directions_of_features_with_much_in_common():
    rng = np.random.default_rng(0)
    train, inside, outside = (1e4 + s * rng.normal(size=(200, 6)) for s in (1, 1, 3))
    score = gaussian_detectors.fit_ssd(train)
    found = detection_metrics.ood_metrics(score(inside), score(outside)).auroc
    # In float64, without the direction of the offset, in which directions do not vary.
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (train, inside, outside)]
    centered = [x - unit[0].mean(axis=0) for x in unit]
    inverse = np.linalg.pinv(centered[0].T @ centered[0], rcond=1e-6)
    lengths = [np.einsum("ni,ij,nj->n", x, inverse, x) for x in centered[1:]]
    assert abs(found - detection_metrics.ood_metrics(*lengths).auroc) < 0.02


# --- Logits ---


def test_max_softmax_keeps_the_order_of_sure_networks():
    mpmath = pytest.importorskip("mpmath")
    margins = np.array([0, 1e-3, 1, 5, 17, 28, 90, 99.5, 1e3, 1e4], np.float32)
    logits = np.stack([margins, np.zeros_like(margins), np.full_like(margins, -3)], axis=1) + 7
    found = np.asarray(labeled_detectors.max_softmax_score(logits), np.float64)
    with mpmath.workdps(50):
        for row, score in zip(logits, found, strict=True):
            first, *rest = sorted((mpmath.mpf(float(x)) for x in row), reverse=True)
            others = mpmath.fsum(mpmath.exp(x - first) for x in rest)
            assert score == pytest.approx(float(mpmath.log(others / (1 + others))), rel=1e-6)
    assert np.all(np.diff(found) < 0)


LOGIT_SCORES = (
    labeled_detectors.max_softmax_score,
    labeled_detectors.max_logit_score,
    labeled_detectors.energy_score,
)


@pytest.mark.slow
@pytest.mark.parametrize("score", LOGIT_SCORES)
def test_logits_of_every_type_are_promoted(score):
    logits = np.array([[3, 0, 2], [101, 100, 7], [120, 2, 1], [9, 9, 9]])
    for values in (
        logits.astype(np.int8), logits.astype(np.uint8), logits.astype(np.int64),
        jnp.asarray(logits, jnp.bfloat16), logits.astype(np.float16),
    ):  # fmt: skip
        found = score(values)
        assert found.dtype == jnp.float32
        np.testing.assert_array_equal(found, score(logits.astype(np.float32)))
    assert score(np.zeros((0, 3), np.float32)).shape == (0,)
    for bad in (logits > 3, logits + 1j):
        with pytest.raises(TypeError, match="logits must be real numbers"):
            score(bad)
    with pytest.raises(ValueError, match="logits must be"):
        score(np.zeros((4, 0), np.float32))


@pytest.mark.slow
def test_digits_that_all_logits_share_are_not_lost():
    margins = np.array([1, 3, 7])
    expected = -np.log1p(np.exp(margins.astype(np.float64)))
    for base, kind in ((2**40, np.int64), (2**63, np.uint64), (2**30, np.int32), (1e9, np.float64)):
        logits = np.full((3, 2), base, kind)
        logits[:, 0] += margins.astype(kind)
        np.testing.assert_allclose(labeled_detectors.max_softmax_score(logits), expected, rtol=1e-6)
    ends = np.iinfo(np.int64)
    np.testing.assert_allclose(
        labeled_detectors.max_softmax_score(np.array([[ends.max, ends.min]])), [-(2.0**64)]
    )


@pytest.mark.slow
def test_an_overflow_is_never_inside():
    inf = np.inf
    logits = np.array([[inf, 0], [inf, inf], [-inf, -inf], [3, 1]], np.float32)
    for score in LOGIT_SCORES:
        found = np.asarray(score(logits))
        assert np.isposinf(found[:3]).all()
        assert np.isfinite(found[3])
    # A class that is ruled out leaves all to the other.
    ruled_out = np.asarray(
        labeled_detectors.max_softmax_score(np.array([[0, -inf], [99, 0]], np.float32))
    )
    assert -inf < ruled_out[0] < ruled_out[1] == -99
    assert np.isposinf(neighbor_detectors.feature_norm_score(np.array([[inf, 1.0]])))
    assert np.isposinf(concentration_score(np.array([inf])))
    huge = jnp.full(1, inf)
    terms = UncertaintyTerms(huge, huge, huge, -huge, huge, None)
    assert np.isposinf(kl_score(terms))
    assert np.isposinf(posterior_entropy_score(terms))
    residual = Residual(jnp.zeros(2), jnp.eye(2)[:, :1])
    vim = VirtualLogit(residual, jnp.asarray(1e9, jnp.float32))
    features = np.array([[3e38, 0], [1, 1], [1, 1]], np.float32)
    found = np.asarray(vim(features, np.array([[inf, 0], [inf, 0], [1, 0]], np.float32)))
    assert np.isposinf(found).tolist() == [True, True, False]


@pytest.mark.slow
def test_half_precision_features_and_terms_are_promoted():
    half = jnp.asarray(correlated(0, 60), jnp.bfloat16)
    whole = np.asarray(half, np.float32)
    for fit in (*FITS.values(), lambda _: neighbor_detectors.feature_norm_score):
        np.testing.assert_array_equal(fit(half)(half), fit(whole)(whole))
    np.testing.assert_array_equal(concentration_score(np.array([3, 5], np.uint8)), [-3, -5])
    assert concentration_score(jnp.ones(2, jnp.bfloat16)).dtype == jnp.float32
    found = uncertainty_terms(
        keys(), View(*(x.astype(jnp.bfloat16) for x in views())), LIKELIHOOD, num_samples=1
    )
    assert {x.dtype for x in jax.tree.leaves(found)} == {jnp.dtype(jnp.float32)}


def test_log_probabilities_are_no_logits():
    train, w, b = correlated(0, 200), normal(2, 7, 3), normal(3, 3)
    logits = train @ w + b
    sure = np.asarray(jax.nn.log_softmax(logits))
    fit = functools.partial(
        labeled_detectors.fit_vim,
        train,
        origin=labeled_detectors.vim_origin(w, b),
        num_components=4,
    )
    for values, message in (
        (sure, "Did you give log-probabilities"),
        (np.exp(sure), "got probabilities"),
        (logits[:1], "one row for each image"),
        (np.where(logits > 1, np.nan, logits), "logits must be finite"),
    ):
        with pytest.raises(ValueError, match=message):
            fit(values)
    with pytest.raises(ValueError, match="before log_softmax"):
        labeled_detectors.energy_score(sure)
    with pytest.raises(ValueError, match="before log_softmax"):
        labeled_detectors.energy_score(jnp.asarray(sure, jnp.bfloat16))
    with pytest.raises(ValueError, match="at least 2 classes"):
        labeled_detectors.max_softmax_score(logits[:, :1])
    with pytest.raises(ValueError, match="one row for each image"):
        fit(logits)(train, logits[:1])
    with pytest.raises(ValueError, match="before log_softmax"):
        fit(logits)(train, sure)
    for origin in (np.zeros(1), np.full(7, np.nan)):
        with pytest.raises(ValueError, match=r"origin must be finite \[7\]"):
            gaussian_detectors.fit_residual(train, num_components=4, origin=origin)
    with pytest.raises(ValueError, match="one number for each class"):
        labeled_detectors.vim_origin(w, b[:1])


@pytest.mark.slow
def test_features_that_no_score_can_be_fitted_to_are_no_fault_of_a_setting():
    # Only `DegenerateFeaturesError` leaves a score out; another error ends a whole evaluation.
    flat, line = np.zeros((30, 5), np.float32), np.eye(30, 5, dtype=np.float32)
    infinite = np.where(np.arange(5) < 1, np.inf, line)
    fit = functools.partial(mixture_fit.fit_training_mixture, df=5.0, embedding=line)
    cases: list[tuple[Callable[[], object], str]] = [
        (
            lambda: labeled_detectors.fit_vim(
                flat, np.zeros((30, 3)), origin=np.zeros(5), num_components=2
            ),
            "do not vary",
        ),
        (lambda: gaussian_detectors.fit_mahalanobis(infinite), "must be finite: 30 of 30"),
        (lambda: gaussian_detectors.fit_mahalanobis(line[:1]), "with at least 2 images"),
        (lambda: fit(flat, np.ones((30, 5))), "has no direction"),
        (lambda: fit(line + 1, np.full((30, 5), 1e-30)), "scale_diag times bandwidth"),
        (lambda: fit(line + 1, flat), "scale_diag must be positive"),
        (lambda: fit(line[:, :2] + 1, np.ones((30, 2)), embedding=line[:, :2]), "at least 3"),
    ]
    for make, message in cases:
        with pytest.raises(DegenerateFeaturesError, match=message):
            make()


def test_vim_weighs_few_images_as_many():
    # Alpha is of images that the subspace was not fitted to; its own leave it nothing.
    rng = np.random.default_rng(0)
    w, b = rng.normal(size=(24, 3)), np.array([4.0, 4, 4])
    alpha = []
    for count in (2000, 30):
        x = spectrum(count, rng)
        score = labeled_detectors.fit_vim(x, x @ w + b, origin=np.full(24, 0.3), num_components=20)
        alpha.append(float(score.scale))
    assert alpha[1] == pytest.approx(alpha[0], rel=0.4)
    flat = normal(0, 90, 3) @ normal(1, 3, 24)
    with pytest.raises(DegenerateFeaturesError, match="explains every feature"):
        labeled_detectors.fit_vim(flat, flat @ w + b, origin=np.zeros(24), num_components=20)


# --- What is no count, no number, or of another width ---


@pytest.mark.parametrize("bad", [7.0, np.float32(7), True, np.True_, "7", None])
def test_counts_are_integers_and_a_wrong_one_spoils_no_right_one(bad):
    train = normal(0, 60, 8)
    for fit, name in (
        (neighbor_detectors.fit_knn, "k"),
        (neighbor_detectors.fit_whitened_knn, "k"),
        (gaussian_detectors.fit_residual, "num_components"),
        (gaussian_detectors.fit_ssd, "num_clusters"),
    ):
        with pytest.raises(TypeError, match=f"{name} must be one whole number"):
            fit(train, **{name: bad})
    for k in (np.int64(7), 7):
        assert np.all(np.isfinite(neighbor_detectors.fit_knn(train, k=k)(train[:2])))  # pyright: ignore[reportArgumentType]


@pytest.mark.slow
@pytest.mark.parametrize("name", [*DENSITIES, "knn"])
def test_features_of_another_width_are_refused_and_no_images_have_no_scores(name):
    train = correlated(0, 40, 14)
    score = (DENSITIES | {"knn": functools.partial(neighbor_detectors.fit_knn, k=2)})[name](train)
    for bad in (
        train[:, :1],
        train[:, :13],
        np.pad(train, ((0, 0), (0, 1))),
        train[0],
        train[None],
    ):
        with pytest.raises(ValueError, match=r"features must be \[N, 14\]"):
            score(bad)
    assert score(train[:0]).shape == (0,)
    with pytest.raises(TypeError, match="real numbers"):
        score(train + 1j)
    far = np.asarray(score(1e37 * train[:3]))
    assert not np.isnan(far).any()


# --- Detection ---


def test_features_beyond_float32_fit_no_score_and_none_is_usual():
    train = correlated(0, 200)
    for fit in (*FITS.values(), functools.partial(neighbor_detectors.fit_knn, k=3)):
        with pytest.raises(ValueError, match=r"beyond|must lie within"):
            fit(np.where(np.arange(7) == 2, 1e39, train.astype(np.float64)))
    score = gaussian_detectors.fit_mahalanobis(train)
    threshold = conformal.conformal_threshold(score(correlated(1, 100)), 0.05)
    far = score(np.full((2, 7), [[3e38], [-3e38]], np.float32))
    assert conformal.exceeds(far, threshold).all()


def test_threshold_of_infinite_scores():
    scores = np.append(np.arange(97.0), [np.inf] * 3)
    assert conformal.conformal_threshold(scores, 0.05) == 95
    with pytest.raises(ValueError, match="3 of 100 calibration scores are infinite"):
        conformal.conformal_threshold(scores, 0.02)
    found = conformal.exceeds([1.0, 95.0, 95.5, np.inf, -np.inf, np.nan], 95.0)  # pyright: ignore[reportArgumentType]
    assert found.tolist() == [False, False, True, True, True, True]


@pytest.mark.parametrize("kind", [np.float16, np.float32, jnp.float32])
def test_shares_of_few_bits_are_the_decimal_numbers_that_they_show(kind):
    scores = np.arange(99.0)
    for rate in (0.05, 0.3, 0.7):
        assert conformal.conformal_threshold(scores, kind(rate)) == conformal.conformal_threshold(
            scores, rate
        )
    for tpr in (0.7, 0.8, 0.95):
        expected = detection_metrics.ood_metrics(scores[:10], scores[:10] + 0.5, tpr=tpr)
        assert (
            detection_metrics.ood_metrics(scores[:10], scores[:10] + 0.5, tpr=kind(tpr)) == expected
        )


@pytest.mark.parametrize(("n", "rate"), [(19, 0.05), (99, 0.07), (200, 0.1), (50, 0.5)])
def test_threshold_keeps_its_false_alarm_rate(n, rate):
    rng = np.random.default_rng(n)
    draws = rng.standard_cauchy((20_000, n + 1))  # of no use of its shape is made
    rank = int(np.ceil((n + 1) * (1 - rate) - 1e-9))
    alarm = draws[:, -1] > np.sort(draws[:, :-1], axis=1)[:, rank - 1]
    assert conformal.conformal_threshold(draws[0, :-1], rate) == np.sort(draws[0, :-1])[rank - 1]
    error = 4 * np.sqrt(rate * (1 - rate) / len(draws))
    assert rate - 1 / (n + 1) - error < alarm.mean() < rate + error


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=60),
    st.floats(0.02, 0.98),
)
def test_at_most_the_rate_of_calibration_scores_and_a_new_one_are_above(scores, rate):
    n = len(scores)
    if (n + 1) * rate < 1 - 1e-9:
        with pytest.raises(ValueError, match="needs at least"):
            conformal.conformal_threshold(scores, rate)
        return
    threshold = conformal.conformal_threshold(scores, rate)
    # Exchangeability: the new score is any of the n + 1, so the count above bounds the probability.
    assert np.sum(np.asarray(scores) > threshold) + 1 <= (n + 1) * rate + 1 + 1e-6


def test_threshold_refuses():
    with pytest.raises(ValueError, match="needs at least 99 calibration scores, got 98"):
        conformal.conformal_threshold(np.arange(98.0), 0.01)
    assert conformal.conformal_threshold(np.arange(99.0), 0.01) == 98
    for rate in (0.0, 1.0, np.nan, True, "0.1", [0.1]):
        with pytest.raises(ValueError, match="false_alarm_rate must be in"):
            conformal.conformal_threshold(np.arange(9.0), rate)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="without NaN or -inf: 2 of 3"):
        conformal.conformal_threshold([0.0, np.nan, -np.inf], 0.5)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"must be one axis, \[n\], got shape \(2, 3\)"):
        conformal.conformal_threshold(np.zeros((2, 3)), 0.5)
    for scores in (np.array([0.0, np.nan]), np.array([0.0, -np.inf])):
        with pytest.raises(ValueError, match=r"must be \[n\] without NaN"):
            conformal.conformal_threshold(scores, 0.5)
