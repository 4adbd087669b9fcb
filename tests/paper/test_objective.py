"""The bounds against quadrature in float64; their claims by gradients, swaps and permutations."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jevb_jax import (
    ElboTerms,
    Likelihood,
    View,
    conditional_elbo,
    embedding_log_prob,
    importance_weighted_bound,
    likelihood_scale,
    symmetric_elbo,
)
from jevb_jax.paper import domain, objective
from tests import oracles
from tests.marks import nightly

GOLDEN = -4.414604111322816  # embedding_log_prob at the literal inputs of test_golden, nats
MODEL = Likelihood(df=4.0, radial_df=3.0, radial_scale=0.5)
NUMBERS = ("df", "radial_df", "radial_scale")


pytestmark = pytest.mark.usefixtures("strict_dtypes")


def views(seed, batch=4, dim=5, dtype: Any = jnp.float64):
    rng = np.random.default_rng(seed)

    def view():
        return View(
            embedding=jnp.asarray(rng.normal(size=(batch, dim)), dtype),
            posterior_mean=jnp.asarray(rng.normal(size=(batch, dim)), dtype),
            posterior_scale=jnp.asarray(np.exp(rng.uniform(-1.5, 0, size=(batch, dim))), dtype),
        )

    return view(), view()


def example_keys(seed, batch=4):
    return jax.random.split(jax.random.key(seed), batch)


def model(**settings):
    return dataclasses.replace(MODEL, **settings)


def assert_terms_close(actual, expected, rtol=1e-12):
    for name, left, right in zip(ElboTerms._fields, actual, expected, strict=True):
        np.testing.assert_allclose(left, right, rtol=rtol, atol=rtol, err_msg=name)


# Values.


def expected_terms(target, mean, scale, *, scale_units, coordinates, space, df, radial_df):
    """Exact expectations over the posterior of one example, by quadrature."""
    points, weights = oracles.gaussian_quadrature(mean, scale)
    likelihood_scale = scale / (math.sqrt(len(mean)) if scale_units == "sphere" else 1)
    length = np.linalg.norm(points, axis=-1)
    directional = oracles.directional_log_prob(
        oracles.unit(target), oracles.unit(points), likelihood_scale, df, coordinates
    )
    radial = oracles.radial_log_prob(np.linalg.norm(target), length, 0.5, radial_df, space)
    deviations = [
        math.sqrt(np.sum(weights * (f - np.sum(weights * f)) ** 2)) for f in (directional, radial)
    ]
    return np.sum(weights * directional), np.sum(weights * radial), *deviations


@pytest.mark.numerics
@pytest.mark.parametrize(
    ("scale_units", "coordinates", "space", "df", "radial_df"),
    [
        ("sphere", "chordal", "log", 4.0, 3.0),
        nightly("unit", "stereographic", "linear", 1.0, np.inf),
        ("sphere", "stereographic", "log", np.inf, 2.0),
    ],
)
def test_conditional_elbo_matches_quadrature(
    float64, scale_units, coordinates, space, df, radial_df
):
    rng = np.random.default_rng(0)
    batch, num_samples = 3, 40_000
    settings: dict[str, Any] = {
        "scale_units": scale_units,
        "coordinates": coordinates,
        "space": space,
        "df": df,
        "radial_df": radial_df,
    }
    # Posteriors some standard deviations away from zero, where the integrand has its singularity.
    mean = 2 * oracles.random_units(rng, batch, 3)
    scale = rng.uniform(0.15, 0.35, size=(batch, 3))
    target = rng.normal(size=(batch, 3)) + mean
    terms = conditional_elbo(
        jax.random.key(0),
        target,
        mean,
        scale,
        Likelihood(radial_scale=0.5, **settings),
        prior_scale=0.7,
        num_samples=num_samples,
    )
    for i in range(batch):
        directional, radial, *deviations = expected_terms(target[i], mean[i], scale[i], **settings)
        standard_errors = [deviation / math.sqrt(num_samples) for deviation in deviations]
        # One part in ten thousand on top, the error of the quadrature.
        assert abs(terms.directional_log_likelihood[i] - directional) <= (
            4 * standard_errors[0] + 1e-4 * abs(directional)
        )
        assert abs(terms.radial_log_likelihood[i] - radial) <= (
            4 * standard_errors[1] + 1e-4 * abs(radial)
        )
    kl = oracles.gaussian_kl_divergence(mean, scale, 0.7)
    np.testing.assert_allclose(terms.kl, kl, rtol=1e-12)


@pytest.mark.slow
def test_a_sharp_posterior_gives_the_densities_at_its_mean(float64):
    rng = np.random.default_rng(0)
    mean = oracles.random_units(rng, 4, 6) * np.array([[0.5], [1], [2], [3]])
    scale = 1e-7 * np.exp(rng.normal(size=mean.shape))
    target = rng.normal(size=mean.shape)
    terms = conditional_elbo(jax.random.key(0), target, mean, scale, MODEL)
    radius, loc = (np.linalg.norm(x, axis=-1) for x in (target, mean))
    radial = oracles.radial_log_prob(radius, loc, 0.5, 3.0, "log")
    np.testing.assert_allclose(terms.radial_log_likelihood, radial, rtol=1e-5)
    directional = oracles.directional_log_prob(
        oracles.unit(target), oracles.unit(mean), scale / math.sqrt(6), 4.0, "chordal"
    )
    np.testing.assert_allclose(terms.directional_log_likelihood, directional, rtol=1e-5)


@pytest.mark.slow
def test_terms_add_up(float64):
    view_1, view_2 = views(0)
    for terms in (
        conditional_elbo(
            jax.random.key(0),
            view_2.embedding,
            view_1.posterior_mean,
            view_1.posterior_scale,
            MODEL,
            kl_weight=0.1,
            radial_weight=0.3,
        ),
        symmetric_elbo(jax.random.key(0), view_1, view_2, MODEL, kl_weight=0.1, radial_weight=0.3),
    ):
        assert isinstance(terms, ElboTerms)
        for value in (*terms, terms.log_likelihood, terms.elbo, terms.weighted_elbo):
            assert value is not None
            assert value.shape == (4,)
            assert value.dtype == jnp.float64
        directional, radial = terms.directional_log_likelihood, terms.radial_log_likelihood
        np.testing.assert_allclose(terms.log_likelihood, directional + radial, rtol=1e-14)
        np.testing.assert_allclose(terms.elbo, terms.log_likelihood - terms.kl, rtol=1e-14)
        np.testing.assert_allclose(
            terms.weighted_elbo, directional + 0.3 * radial - 0.1 * terms.kl, rtol=1e-14
        )
        assert np.all(np.abs(terms.weighted_elbo - terms.elbo) > 0.1)


@pytest.mark.slow
def test_weights_change_the_objective_and_not_the_bound(float64):
    view_1, view_2 = views(0)
    plain = symmetric_elbo(jax.random.key(0), view_1, view_2, MODEL)
    weighted = symmetric_elbo(
        jax.random.key(0), view_1, view_2, MODEL, kl_weight=0.0, radial_weight=2.0
    )
    np.testing.assert_array_equal(plain.elbo, weighted.elbo)
    np.testing.assert_array_equal(plain.weighted_elbo, plain.elbo)
    np.testing.assert_allclose(
        weighted.weighted_elbo,
        plain.directional_log_likelihood + 2 * plain.radial_log_likelihood,
        rtol=1e-14,
    )


@pytest.mark.slow
def test_scale_units(float64):
    # "sphere" divides sigma by sqrt(D). A latent of a sharp posterior hardly moves, so scaling
    # sigma up by sqrt(D) under "sphere" is "unit".
    view_1, view_2 = views(0)
    mean, scale = view_1.posterior_mean, 1e-7 * view_1.posterior_scale
    unit = conditional_elbo(
        jax.random.key(0), view_2.embedding, mean, scale, model(scale_units="unit")
    ).directional_log_likelihood
    default, sphere = (
        conditional_elbo(
            jax.random.key(0), view_2.embedding, mean, scale * math.sqrt(5), likelihood
        ).directional_log_likelihood
        for likelihood in (MODEL, model(scale_units="sphere"))
    )
    np.testing.assert_allclose(unit, sphere, rtol=1e-6)
    np.testing.assert_array_equal(default, sphere)


# Keys, swaps, permutations.


@pytest.mark.slow
def test_symmetric_elbo_is_the_average_of_both_directions(float64):
    view_1, view_2 = views(0)
    keys = tuple(jax.random.split(jax.random.key(3)))
    actual = symmetric_elbo(keys, view_1, view_2, MODEL)
    forward, backward = (
        conditional_elbo(
            key, target.embedding, source.posterior_mean, source.posterior_scale, MODEL
        )
        for key, source, target in ((keys[0], view_1, view_2), (keys[1], view_2, view_1))
    )
    average = jax.tree.map(lambda a, b: (a + b) / 2, forward, backward)
    assert_terms_close(actual, average)
    assert np.all(np.abs(forward.elbo - backward.elbo) > 1e-3)


@pytest.mark.slow
def test_swapping_views_with_their_keys_changes_nothing(float64):
    view_1, view_2 = views(0)
    key_1, key_2 = jax.random.split(jax.random.key(3))
    before = symmetric_elbo((key_1, key_2), view_1, view_2, MODEL)
    assert_terms_close(symmetric_elbo((key_2, key_1), view_2, view_1, MODEL), before, rtol=1e-14)
    without_their_keys = symmetric_elbo((key_1, key_2), view_2, view_1, MODEL)
    assert np.all(np.abs(without_their_keys.elbo - before.elbo) > 1e-6)


@pytest.mark.slow
def test_one_key_gives_the_two_views_different_noise(float64):
    # With the same noise for both, swapping the views would change nothing.
    view_1, view_2 = views(0)
    before = symmetric_elbo(jax.random.key(3), view_1, view_2, MODEL)
    swapped = symmetric_elbo(jax.random.key(3), view_2, view_1, MODEL)
    assert np.all(np.abs(before.elbo - swapped.elbo) > 1e-6)


@pytest.mark.slow
def test_views_may_be_any_object_with_their_attributes(float64):
    class Output:
        def __init__(self, view):
            self.embedding, self.posterior_mean, self.posterior_scale = view

    view_1, view_2 = views(0)

    key = jax.random.key(0)
    assert_terms_close(
        symmetric_elbo(key, Output(view_1), Output(view_2), MODEL),
        symmetric_elbo(key, view_1, view_2, MODEL),
    )


@pytest.mark.slow
def test_examples_are_independent_of_the_rest_of_the_batch(float64):
    view_1, view_2 = views(0)
    for key in (jax.random.key(0), example_keys(0)):
        before = symmetric_elbo(key, view_1, view_2, MODEL)

        def others_replaced(x):
            return jnp.concatenate([x[:1], 7.0 - 3 * x[1:]])

        changed_1, changed_2 = (
            View(
                others_replaced(view.embedding),
                others_replaced(view.posterior_mean),
                jnp.concatenate([view.posterior_scale[:1], 2 * view.posterior_scale[1:]]),
            )
            for view in (view_1, view_2)
        )
        after = symmetric_elbo(key, changed_1, changed_2, MODEL)
        first_before, first_after = (
            jax.tree.map(lambda x: x[0], terms) for terms in (before, after)
        )
        assert_terms_close(first_after, first_before, rtol=1e-14)
        assert np.all(np.abs(after.elbo[1:] - before.elbo[1:]) > 1e-3)
    # And alone in its batch: the key is the example's own.
    alone = symmetric_elbo(
        example_keys(0)[:1],
        *jax.tree.map(lambda x: x[:1], (view_1, view_2)),
        likelihood=MODEL,
    )
    assert_terms_close(jax.tree.map(lambda x: x[0], alone), first_before)


@pytest.mark.slow
@pytest.mark.nightly
def test_samples_one_after_the_other_are_samples_side_by_side(float64, monkeypatch):
    view_1, view_2 = views(11)
    args = view_2.embedding, view_1.posterior_mean, view_1.posterior_scale
    weights = jnp.arange(1.0, 5.0)

    def values_and_gradients(side_by_side):
        monkeypatch.setattr(objective, "_SIDE_BY_SIDE_ELEMENTS", side_by_side)
        compiled: Any = objective._over_samples
        compiled.clear_cache()

        def weighted(*args):
            terms = conditional_elbo(example_keys(3), *args, likelihood=MODEL, num_samples=3)
            bound = importance_weighted_bound(
                example_keys(4), *args, likelihood=MODEL, num_samples=3
            )
            return jnp.sum(weights * terms.elbo) + jnp.sum(weights * bound), (terms, bound)

        run = jax.value_and_grad(weighted, argnums=(0, 1, 2), has_aux=True)
        return str(jax.make_jaxpr(run)(*args)).count("scan["), jax.jit(run)(*args)

    num_loops, in_turn = values_and_gradients(0)
    _, in_twos_and_one = values_and_gradients(4 * 5 * 2)
    num_other_loops, together = values_and_gradients(4 * 5 * 3)
    assert num_loops >= num_other_loops + 2  # the bounds' own; sampling may have some
    for other in (in_turn, in_twos_and_one):
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-12), other, together
        )


@pytest.mark.slow
def test_each_sample_costs_the_memory_of_its_noise():
    batch, dim = 64, 2048  # a sample alone exceeds what is kept side by side
    array = jax.ShapeDtypeStruct((batch, dim), jnp.float32)
    keys = jax.eval_shape(lambda: example_keys(0, batch))

    def arrays(num_samples):
        def loss(mean, scale, target, keys):
            terms = conditional_elbo(keys, target, mean, scale, MODEL, num_samples=num_samples)
            return jnp.mean(terms.elbo)

        compiled = (
            jax.jit(jax.grad(loss, argnums=(0, 1))).lower(array, array, array, keys).compile()
        )
        memory: Any = compiled.memory_analysis()
        return memory.temp_size_in_bytes / (4 * batch * dim)

    # Drawing noise takes it a few times; side by side a sample costs eighteen arrays.
    assert (arrays(12) - arrays(6)) / 6 < 9


@pytest.mark.slow
@pytest.mark.parametrize("num_samples", [nightly(1), 3])
def test_permuting_the_batch_with_its_keys_permutes_the_terms(float64, num_samples):
    view_1, view_2 = views(0)
    keys = example_keys(0)
    order = np.array([2, 0, 3, 1])
    permuted = jax.tree.map(lambda x: x[order], (view_1, view_2))
    before = symmetric_elbo(keys, view_1, view_2, MODEL, num_samples=num_samples)
    after = symmetric_elbo(keys[order], *permuted, likelihood=MODEL, num_samples=num_samples)
    assert_terms_close(after, jax.tree.map(lambda x: x[order], before))
    args = (view_1.embedding, view_1.posterior_mean, view_1.posterior_scale)
    before = importance_weighted_bound(keys, *args, MODEL, num_samples=num_samples)
    after = importance_weighted_bound(
        keys[order], *(x[order] for x in args), likelihood=MODEL, num_samples=num_samples
    )
    np.testing.assert_allclose(after, before[order], rtol=1e-12)


@pytest.mark.slow
def test_samples_differ_between_examples_keys_and_draws(float64):
    rng = np.random.default_rng(0)
    same = [np.broadcast_to(rng.normal(size=5), (4, 5)) for _ in range(2)]
    scale = np.full((4, 5), 0.5)
    one = conditional_elbo(jax.random.key(0), *same, posterior_scale=scale, likelihood=MODEL).elbo
    other = conditional_elbo(jax.random.key(1), *same, posterior_scale=scale, likelihood=MODEL).elbo
    assert len({*np.asarray(one), *np.asarray(other)}) == 8
    # Averaging draws that are independent shrinks the spread over keys by sqrt(num_samples).
    keys = jax.random.split(jax.random.key(5), 400)
    same = [np.broadcast_to(x[:1], (400, 5)) for x in same]
    spreads = [
        np.std(
            conditional_elbo(keys, *same, scale[0] + np.zeros((400, 1)), MODEL, num_samples=k).elbo
        )
        for k in (1, 16)
    ]
    # Four standard errors of a ratio of standard deviations from 400 values each: 4 * 5%.
    np.testing.assert_allclose(spreads[0] / spreads[1], 4, rtol=0.25)


# Gradients.


@pytest.mark.slow
def test_no_gradient_reaches_the_target_and_some_reaches_the_online_branch(float64):
    view_1, view_2 = views(0)

    def loss(view_1, view_2):
        terms = symmetric_elbo(jax.random.key(0), view_1, view_2, MODEL)
        return -jnp.mean(terms.weighted_elbo)

    for gradient in jax.jit(jax.grad(loss, argnums=(0, 1)))(view_1, view_2):
        np.testing.assert_array_equal(gradient.embedding, 0)
        assert np.all(np.abs(gradient.posterior_mean) > 1e-6)
        assert np.all(np.abs(gradient.posterior_scale) > 1e-6)

    def conditional_loss(target, mean, scale):
        return jnp.sum(conditional_elbo(jax.random.key(0), target, mean, scale, MODEL).elbo)

    args = (view_2.embedding, view_1.posterior_mean, view_1.posterior_scale)
    gradients = jax.jit(jax.grad(conditional_loss, argnums=(0, 1, 2)))(*args)
    np.testing.assert_array_equal(gradients[0], 0)
    # Reparameterised: with its key, the estimate is a smooth function of mean and scale.
    step, rng = 1e-6, np.random.default_rng(1)
    value = jax.jit(conditional_loss)
    for i in (1, 2):
        shift = rng.normal(size=args[i].shape)
        ahead, behind = (
            value(*(x + sign * step * shift if j == i else x for j, x in enumerate(args)))
            for sign in (1, -1)
        )
        np.testing.assert_allclose(
            np.sum(gradients[i] * shift), (ahead - behind) / (2 * step), rtol=1e-6
        )


@pytest.mark.slow
def test_model_parameters_receive_gradients(float64):
    view_1, view_2 = views(0)

    def loss(df, radial_df, radial_scale):
        terms = symmetric_elbo(
            jax.random.key(0),
            view_1,
            view_2,
            Likelihood(df=df, radial_df=radial_df, radial_scale=radial_scale),
        )
        return jnp.mean(terms.elbo)

    at = np.array([4.0, 3.0, 0.5])
    gradient = np.array(jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(*at))
    value = jax.jit(loss)
    for i in range(3):
        step = 1e-6 * np.eye(3)[i]
        slope = (value(*(at + step)) - value(*(at - step))) / 2e-6
        np.testing.assert_allclose(gradient[i], slope, rtol=1e-5)
        assert abs(slope) > 1e-4


@pytest.mark.numerics
@pytest.mark.slow
def test_zero_and_degenerate_embeddings_give_finite_terms_and_gradients():
    # Zero targets, targets at the mean and at its antipode, tiny and huge ones, tiny scales.
    mean = oracles.random_units(np.random.default_rng(0), 6, 8).astype(np.float32)
    target = mean * np.array([[0], [1], [-1], [1e-20], [1e20], [-1]], np.float32)
    scale = np.full_like(mean, 1e-4)
    scale[0] = 1

    def loss(mean, scale, df):
        likelihood = Likelihood(df=df, radial_df=df, radial_scale=0.1)
        terms = conditional_elbo(jax.random.key(0), target, mean, scale, likelihood)
        return jnp.sum(terms.elbo), terms

    value_and_gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    for df in (0.1, 1e8, np.inf):
        (value, terms), gradients = value_and_gradients(mean, scale, np.float32(df))
        for array in (value, *terms, *gradients):
            assert np.all(np.isfinite(array))


# The importance-weighted bound.


def log_marginal_likelihood(embedding, scale, *, df, radial_df, radial_scale, prior_scale):
    """`log E_prior p(h | z)`: the prior is isotropic, so radius and direction integrate apart."""
    points, weights = oracles.two_sphere_quadrature(oracles.unit(embedding), 0.01)
    log_prob = oracles.directional_log_prob(
        oracles.unit(embedding), points, scale / math.sqrt(3), df, "chordal"
    )
    directional = np.sum(weights * np.exp(log_prob)) / (4 * math.pi)
    length, weights = oracles.panels(np.linspace(1e-9, 9 * prior_scale, 60), 12)
    chi = stats.maxwell.pdf(length, scale=prior_scale)
    log_prob = oracles.radial_log_prob(
        np.linalg.norm(embedding), length, radial_scale, radial_df, "log"
    )
    return math.log(directional) + math.log(np.sum(weights * chi * np.exp(log_prob)))


@pytest.mark.slow
def test_importance_weighted_bound_rises_from_the_elbo_to_the_marginal_likelihood(float64):
    rng = np.random.default_rng(0)
    embedding, mean = np.array([0.9, -0.3, 0.5]), np.array([0.7, 0.1, 0.4])
    scale = rng.uniform(0.8, 1.0, size=3)
    numbers = {name: getattr(MODEL, name) for name in NUMBERS}
    prior: Any = {"prior_scale": 1.1}
    repeats = 4000
    args = [np.broadcast_to(x, (repeats, 3)) for x in (embedding, mean, scale)]

    def estimates(num_samples):
        keys = example_keys(num_samples, repeats)
        return np.asarray(
            importance_weighted_bound(
                keys, *args, likelihood=MODEL, num_samples=num_samples, **prior
            )
        )

    def mean_and_error(x):
        return x.mean(), x.std() / math.sqrt(len(x))

    counts = (1, 4, 16, 64)
    bounds = [estimates(k) for k in counts]
    means, errors = zip(*(mean_and_error(x) for x in bounds), strict=True)
    for i in range(3):
        assert means[i + 1] - means[i] > 4 * math.hypot(errors[i], errors[i + 1])
    elbo_mean, elbo_error = mean_and_error(
        np.asarray(
            conditional_elbo(example_keys(9, repeats), *args, likelihood=MODEL, **prior).elbo
        )
    )
    assert abs(means[0] - elbo_mean) <= 4 * math.hypot(errors[0], elbo_error)
    # For any number of samples the exponential of the bound is unbiased.
    log_marginal = log_marginal_likelihood(embedding, scale, **numbers, **prior)
    for x in bounds:
        weight, error = mean_and_error(np.exp(x - log_marginal))
        assert error < 0.03
        assert abs(weight - 1) <= 4 * error
    assert means[-1] <= log_marginal + 4 * errors[-1]
    assert log_marginal - means[-1] < 0.1 * (log_marginal - means[0])


# The density of an embedding.


@pytest.mark.parametrize("coordinates", ["chordal", "stereographic"])
@pytest.mark.parametrize("space", ["log", "linear"])
def test_embedding_log_prob_matches_the_oracle(float64, coordinates, space):
    rng = np.random.default_rng(0)
    embedding, latent = rng.normal(size=(2, 5, 4))
    scale_diag = np.exp(rng.normal(size=(5, 4)))
    actual = embedding_log_prob(
        embedding, latent, model(coordinates=coordinates, space=space), scale_diag=scale_diag
    )
    radius = np.linalg.norm(embedding, axis=-1)
    expected = (
        oracles.directional_log_prob(
            oracles.unit(embedding), oracles.unit(latent), scale_diag, 4.0, coordinates
        )
        + oracles.radial_log_prob(radius, np.linalg.norm(latent, axis=-1), 0.5, 3.0, space)
        - 3 * np.log(radius)
    )
    np.testing.assert_allclose(actual, expected, rtol=1e-11)


def test_embedding_log_prob_integrates_to_one_in_three_dimensions(float64):
    # In cartesian-free form: r^2 dr dS, with radii on a logarithmic grid.
    latent, scale_diag = np.array([0.5, -1.0, 0.8]), np.array([0.4, 0.7, 0.5])
    points, weights = oracles.two_sphere_quadrature(oracles.unit(latent), 0.05, num_azimuths=32)
    log_radius, radius_weights = oracles.panels(np.linspace(-12, 12, 13), 6)
    radius = np.exp(log_radius)
    embedding = (radius[:, None, None] * points).reshape(-1, 3)
    likelihood = Likelihood(df=2.0, radial_df=np.inf, radial_scale=0.8, coordinates="stereographic")
    log_prob = jax.jit(embedding_log_prob)(
        embedding,
        np.broadcast_to(latent, embedding.shape),
        likelihood,
        scale_diag=np.broadcast_to(scale_diag, embedding.shape),
    )
    volume = (radius_weights * radius**3)[:, None] * weights
    np.testing.assert_allclose(np.sum(volume.ravel() * np.exp(log_prob)), 1, atol=1e-5)


@pytest.mark.slow
def test_unfactorised_elbo_matches_quadrature(float64):
    rng = np.random.default_rng(3)
    num_samples = 40_000
    mean, target = rng.normal(size=(2, 3))
    scale = rng.uniform(0.2, 0.5, size=3)
    terms = conditional_elbo(
        jax.random.key(0),
        target[None],
        mean[None],
        scale[None],
        model(scale_units="unit", likelihood="unfactorised"),
        num_samples=num_samples,
    )
    points, weights = oracles.gaussian_quadrature(mean, scale)
    frozen: Any = stats.multivariate_t
    values = frozen(np.zeros(3), np.diag(scale**2), df=4.0).logpdf(target - points)
    exact = np.sum(weights * values)
    error = math.sqrt(np.sum(weights * (values - exact) ** 2) / num_samples)
    assert abs(terms.directional_log_likelihood[0] - exact) < 5 * error
    assert error < 0.01
    assert np.all(np.asarray(terms.radial_log_likelihood) == 0)


@pytest.mark.slow
def test_location_at_the_mean_needs_no_sample(float64):
    source, target = views(5)
    arguments = (target.embedding, source.posterior_mean, source.posterior_scale)
    first, second = (
        conditional_elbo(jax.random.key(seed), *arguments, MODEL, location="mean", num_samples=3)
        for seed in (0, 1)
    )
    expected = oracles.directional_log_prob(
        oracles.unit(np.asarray(target.embedding)),
        oracles.unit(np.asarray(source.posterior_mean)),
        np.asarray(source.posterior_scale) / math.sqrt(5),
        4.0,
        "chordal",
    )
    for terms in (first, second):
        np.testing.assert_allclose(terms.directional_log_likelihood, expected, rtol=1e-9)
    # The radial term still has the sample's radius.
    sampled = conditional_elbo(jax.random.key(0), *arguments, MODEL, num_samples=3)
    np.testing.assert_allclose(
        first.radial_log_likelihood, sampled.radial_log_likelihood, rtol=1e-12
    )
    assert np.all(np.asarray(first.radial_log_likelihood != second.radial_log_likelihood))


@pytest.mark.slow
def test_untied_scale(float64):
    source, target = views(6)
    rng = np.random.default_rng(6)
    own = np.exp(rng.normal(size=(4, 5)))
    arguments = (target.embedding, source.posterior_mean)
    key = jax.random.key(0)

    def untied(posterior_scale, untied_scale, likelihood=MODEL, **settings):
        return conditional_elbo(
            key, *arguments, posterior_scale, likelihood, untied_scale=untied_scale, **settings
        )

    # A scale equal to the posterior's is the tied one; a number is the same for all features.
    tied = conditional_elbo(key, *arguments, source.posterior_scale, MODEL)
    assert_terms_close(untied(source.posterior_scale, source.posterior_scale), tied)
    flat = jnp.full((4, 5), 0.7)
    assert_terms_close(untied(source.posterior_scale, 0.7), untied(source.posterior_scale, flat))
    expected = oracles.directional_log_prob(
        oracles.unit(np.asarray(target.embedding)),
        oracles.unit(np.asarray(source.posterior_mean)),
        own,
        4.0,
        "chordal",
    )
    found = untied(source.posterior_scale, own, model(scale_units="unit"), location="mean")
    np.testing.assert_allclose(found.directional_log_likelihood, expected, rtol=1e-9)
    np.testing.assert_allclose(found.kl, tied.kl, rtol=1e-12)


@pytest.mark.slow
def test_symmetric_elbo_takes_an_untied_scale_for_each_view(float64):
    view_1, view_2 = views(7)
    scales = (2 * view_1.posterior_scale, 3 * view_2.posterior_scale)
    keys = (example_keys(0), example_keys(1))
    both = symmetric_elbo(keys, view_1, view_2, MODEL, untied_scale=scales)
    halves = [
        conditional_elbo(key, target.embedding, *source[1:], MODEL, untied_scale=scale)
        for key, source, target, scale in zip(
            keys, (view_1, view_2), (view_2, view_1), scales, strict=True
        )
    ]
    assert_terms_close(both, jax.tree.map(lambda a, b: (a + b) / 2, *halves))


@pytest.mark.numerics
def test_golden():
    # Literal inputs, so that a change of any constant shows. To regenerate after a change that is
    # meant: print `expected`, which is the oracles', never the package's own output.
    embedding = np.array([0.3, -1.2, 0.5, 2.0], np.float32)
    latent = np.array([0.1, -0.9, 1.1, 1.4], np.float32)
    scale_diag = np.array([0.5, 0.25, 1.0, 2.0], np.float32)
    actual = embedding_log_prob(
        embedding,
        latent,
        Likelihood(df=5.0, radial_df=3.0, radial_scale=0.2),
        scale_diag=scale_diag,
    )
    wide_embedding, wide_latent, wide_scale = (
        x.astype(np.float64) for x in (embedding, latent, scale_diag)
    )
    radius, loc = np.linalg.norm(wide_embedding), np.linalg.norm(wide_latent)
    expected = (
        oracles.directional_log_prob(wide_embedding, wide_latent, wide_scale, 5.0, "chordal")
        + oracles.radial_log_prob(radius, loc, 0.2, 3.0, "log")
        - 3 * np.log(radius)
    )
    np.testing.assert_allclose(actual, GOLDEN, rtol=1e-6)
    np.testing.assert_allclose(expected, GOLDEN, rtol=1e-9)


# Types and errors.


@pytest.mark.slow
def test_half_precision_is_promoted():
    view_1, view_2 = views(0, dtype=jnp.float32)
    halves = jax.tree.map(lambda x: x.astype(jnp.bfloat16), (view_1, view_2))
    promoted = jax.tree.map(lambda x: x.astype(jnp.float32), halves)
    actual = symmetric_elbo(jax.random.key(0), *halves, likelihood=MODEL)
    assert {x.dtype for x in jax.tree.leaves(actual)} == {jnp.dtype("float32")}
    assert_terms_close(
        actual, symmetric_elbo(jax.random.key(0), *promoted, likelihood=MODEL), rtol=1e-6
    )


def test_settings_that_do_not_exist_are_refused():
    choices: dict[str, tuple[str, ...]] = {
        "scale_units": ("sphere", "unit"),
        "coordinates": ("chordal", "stereographic"),
        "space": ("log", "linear"),
        "tails": ("joint", "feature"),
        "likelihood": ("factorised", "unfactorised"),
    }
    for name, allowed in choices.items():
        with pytest.raises(ValueError, match=f"{name} must be one of .*nonsense") as error:
            model(**{name: "nonsense"})
        for value in allowed:
            assert value in str(error.value)
    with pytest.raises(ValueError, match="feature"):
        model(tails="feature", coordinates="stereographic")
    source, target = views(0, dtype=jnp.float32)
    with pytest.raises(ValueError, match="location must be one of"):
        conditional_elbo(jax.random.key(0), target.embedding, *source[1:], MODEL, location="mode")  # pyright: ignore[reportArgumentType]


def test_a_likelihood_is_a_pytree_of_its_numbers():
    leaves, structure = jax.tree.flatten(model(tails="feature"))
    assert leaves == [4.0, 3.0, 0.5]
    assert jax.tree.unflatten(structure, leaves) == model(tails="feature")
    doubled = jax.tree.map(lambda number: 2 * number, model(normalized=True))
    assert doubled == Likelihood(df=8.0, radial_df=6.0, radial_scale=1.0, normalized=True)
    # Choices are static: another one is another program, other numbers are not.
    traces = []

    @jax.jit
    def df_of(likelihood):
        traces.append(likelihood.tails)
        return likelihood.df

    for likelihood in (MODEL, model(df=9.0), model(tails="feature"), model(radial_scale=2.0)):
        assert float(df_of(likelihood)) == likelihood.df
    assert traces == ["joint", "feature"]


def test_bad_input_is_refused():
    def trace(function, *args, **settings):
        jax.eval_shape(lambda: function(*args, MODEL, **settings))

    view_1, view_2 = views(0, dtype=jnp.float32)
    args = (view_2.embedding, view_1.posterior_mean, view_1.posterior_scale)
    key = jax.random.key(0)
    for num_samples in (0, -1):
        for function in (conditional_elbo, importance_weighted_bound):
            with pytest.raises(ValueError, match="num_samples"):
                trace(function, key, *args, num_samples=num_samples)
    for wrong in (args[0][:, :3], args[0][:1], args[0][None]):  # the last two would broadcast
        with pytest.raises(ValueError, match=r"target_embedding, .*\[batch, D\].*\(4, 5\)"):
            trace(conditional_elbo, key, wrong, *args[1:])
    with pytest.raises(ValueError, match="3"):
        trace(conditional_elbo, key, *(x[:, :2] for x in args))
    with pytest.raises(ValueError, match="4"):
        trace(conditional_elbo, example_keys(0, 3), *args)


# Mass and information.


@pytest.mark.slow
@pytest.mark.parametrize("tails", ["joint", nightly("feature")])
def test_normalized_terms_differ_by_the_mass_and_share_the_information(float64, tails):
    view_1, view_2 = views(0, dim=16)
    target, mean, scale = view_2.embedding, view_1.posterior_mean, view_1.posterior_scale
    key = jax.random.key(0)
    plain, divided = (
        conditional_elbo(key, target, mean, scale, model(tails=tails, normalized=normalized))
        for normalized in (False, True)
    )
    log_mass: Any = plain.directional_log_mass
    difference = divided.directional_log_likelihood - plain.directional_log_likelihood
    np.testing.assert_allclose(difference, -log_mass, rtol=1e-10)
    uniform = -oracles.log_sphere_area(16)
    for terms in (plain, divided):
        information: Any = terms.predictive_information
        np.testing.assert_allclose(
            information, divided.directional_log_likelihood - uniform, rtol=1e-10
        )


@pytest.mark.slow
def test_a_posterior_that_says_nothing_has_no_information(float64):
    # Targets uniform on the sphere, apart from the latents: by Gibbs not above zero, in the mean.
    rng = np.random.default_rng(0)
    target = jnp.asarray(rng.normal(size=(4000, 8)))
    zero, one = jnp.zeros_like(target), jnp.ones_like(target)

    @jax.jit
    def predictive_information(sigma):
        terms: Any = conditional_elbo(jax.random.key(0), target, zero, sigma * one, MODEL)
        return terms.predictive_information

    for sigma in (0.3, 1.0, 30.0):
        information = np.asarray(predictive_information(sigma))
        assert information.mean() < 4 * information.std() / math.sqrt(len(information)) + 1e-9
    np.testing.assert_allclose(information.mean(), 0, atol=0.02)  # so wide that it is uniform


def test_information_of_an_unfactorised_likelihood_is_left_out(float64):
    view_1, view_2 = views(0)
    terms = symmetric_elbo(jax.random.key(0), view_1, view_2, model(likelihood="unfactorised"))
    assert terms.predictive_information is None
    assert terms.directional_log_mass is None


@pytest.mark.slow
def test_the_mass_has_a_gradient_only_where_it_is_divided_by(float64):
    view_1, view_2 = views(0, dim=8)

    def log_mass(scale, normalized):
        terms: Any = conditional_elbo(
            jax.random.key(0),
            view_2.embedding,
            view_1.posterior_mean,
            scale,
            model(normalized=normalized),
        )
        return jnp.sum(terms.directional_log_mass)

    scale = view_1.posterior_scale
    gradient = jax.jit(jax.grad(log_mass), static_argnums=1)
    assert not np.any(gradient(scale, False))
    assert np.all(gradient(scale, True))


# Empty batches, one float type, the domain.


@pytest.mark.slow
@pytest.mark.parametrize("num_samples", [nightly(1), 3])
def test_a_batch_of_no_examples_has_no_terms(num_samples):
    view_1, view_2 = (View(*(jnp.zeros((0, 5), jnp.float32) for _ in range(3))) for _ in range(2))
    args = (view_2.embedding, *view_1[1:])
    key = jax.random.key(0)
    settings: Any = {"num_samples": num_samples}
    for likelihood, untied in (
        (MODEL, None),
        (model(likelihood="unfactorised"), None),
        (MODEL, 0.5),
    ):
        terms = conditional_elbo(key, *args, likelihood, untied_scale=untied, **settings)
        assert terms.elbo.shape == terms.weighted_elbo.shape == (0,)
    assert symmetric_elbo(key, view_1, view_2, MODEL, **settings).elbo.shape == (0,)
    assert importance_weighted_bound(key, *args, MODEL, **settings).shape == (0,)
    empty = jnp.zeros((0, 5), jnp.float32)
    assert embedding_log_prob(empty, empty, MODEL, scale_diag=empty).shape == (0,)
    total = jax.grad(lambda x: jnp.sum(conditional_elbo(key, x, x, x, MODEL, **settings).elbo))(
        empty
    )
    assert total.shape == (0, 5)


@pytest.mark.slow
def test_terms_share_the_widest_type_that_was_given():
    view_1, view_2 = views(0, dtype=jnp.float32)
    args = (view_2.embedding, *view_1[1:])
    with jax.enable_x64(True):

        def dtypes(likelihood=MODEL, prior_scale: Any = 1.0):
            bound = functools.partial(importance_weighted_bound, num_samples=2)
            both = jax.eval_shape(
                lambda *args: (
                    conditional_elbo(
                        jax.random.key(0), *args, likelihood=likelihood, prior_scale=prior_scale
                    ),
                    bound(jax.random.key(0), *args, likelihood=likelihood, prior_scale=prior_scale),
                ),
                *args,
            )
            return {x.dtype for x in jax.tree.leaves(both)}

        wide = np.float64(1.5)
        assert dtypes() == {jnp.dtype("float32")}
        assert dtypes(prior_scale=wide) == {jnp.dtype("float64")}
        for name in NUMBERS:
            assert dtypes(model(**{name: wide})) == {jnp.dtype("float64")}


def with_setting(function, name, value, *args):
    """A call with one setting changed, of the likelihood or of the bound."""
    if name in NUMBERS:
        return function(*args, model(**{name: value}))
    return function(*args, MODEL, **{name: value})


@pytest.mark.slow
def test_arguments_outside_of_their_domain_are_refused_and_nan_where_traced():
    view_1, view_2 = views(0, dtype=jnp.float32)
    target, mean, scale = view_2.embedding, *view_1[1:]
    key = jax.random.key(0)

    def of_setting(name, value):
        return with_setting(conditional_elbo, name, value, key, target, mean, scale)

    settings = ("df", "radial_df", "radial_scale", "prior_scale", "untied_scale")
    for name in settings:
        for value in (0.0, -1.0, np.nan, jnp.float32(-2.0)):
            with pytest.raises(ValueError, match=f"{name} must be positive"):
                of_setting(name, value)
    for name in ("kl_weight", "radial_weight"):
        for value in (-0.1, np.nan, np.inf):
            with pytest.raises(ValueError, match=f"{name} must be at least zero"):
                of_setting(name, value)
    for bad in (-scale, scale.at[2, 1].set(jnp.nan), scale.at[0, 0].set(0.0)):
        for function in (
            lambda bad: conditional_elbo(key, target, mean, bad, MODEL),
            lambda bad: importance_weighted_bound(key, target, mean, bad, MODEL, num_samples=2),
            lambda bad: likelihood_scale(bad),
        ):
            with pytest.raises(ValueError, match="posterior_scale must be positive"):
                function(bad)
    for value in (0, 1.5, "two"):
        with pytest.raises(ValueError, match="num_samples must be a whole number"):
            of_setting("num_samples", value)
    assert of_setting("num_samples", np.int64(1)).elbo.shape == (4,)

    @jax.jit
    def traced(values, scale):
        weighed = [of_setting(name, values[i]).weighted_elbo for i, name in enumerate(settings)]
        terms = conditional_elbo(key, target, mean, scale, MODEL)
        bound = importance_weighted_bound(key, target, mean, scale, MODEL, num_samples=2)
        return [*weighed, terms.weighted_elbo, terms.kl, bound]

    for found in traced(-np.ones(len(settings), np.float32), -scale):
        assert np.all(np.isnan(found))
    for found in traced(np.ones(len(settings), np.float32), scale):
        assert np.all(np.isfinite(found))


@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        ("df", ((4, 1), (1, 4), (3,), (4, 5))),
        ("radial_df", ((4, 1), (1, 4), (3,))),
        ("radial_scale", ((4, 1), (1, 4), (3,))),
        ("prior_scale", ((2, 4, 5), (4,), (3, 5))),
        ("untied_scale", ((2, 4, 5), (4,))),
        ("kl_weight", ((4, 1), (3,))),
        ("radial_weight", ((4, 1), (3,))),
    ],
)
def test_a_setting_never_enlarges_the_batch(name, shapes):
    view_1, view_2 = views(0, dtype=jnp.float32)
    args = (jax.random.key(0), view_2.embedding, *view_1[1:])
    functions: list[Any] = [conditional_elbo]
    if not name.endswith("weight"):
        functions.append(functools.partial(importance_weighted_bound, num_samples=2))
    for function in functions:
        for shape in shapes:
            value = np.full(shape, 0.5, np.float32)
            call = functools.partial(with_setting, function, name, value, *args)
            with pytest.raises(ValueError, match=f"{name} must be a number"):
                jax.eval_shape(call)


def test_keys_and_counts_of_other_kinds():
    view_1, view_2 = views(0, dtype=jnp.float32)
    args = (view_2.embedding, *view_1[1:])
    for key in (0, None, [1, 2]):
        with pytest.raises(ValueError, match="key must be made by"):
            conditional_elbo(key, *args, MODEL)  # pyright: ignore[reportArgumentType]
    for count in (np.array(2), jnp.int32(2), 2.0):
        assert domain.whole_number("num_samples", count, 1) == 2
    for count in (np.array(2.5), jnp.int32(0), np.ones(1)):
        with pytest.raises(ValueError, match="num_samples must be a whole number"):
            domain.whole_number("num_samples", count, 1)


@pytest.mark.slow
def test_embedding_log_prob_broadcasts():
    rng = np.random.default_rng(0)
    embedding, latent = rng.normal(size=(2, 3, 4)).astype(np.float32)
    df = np.array([[1.0], [5.0]], np.float32)
    whole = embedding_log_prob(
        embedding[0],
        latent,
        Likelihood(df=df, radial_df=3.0, radial_scale=df[:, 0, None]),
        scale_diag=0.5,
    )
    assert whole.shape == (2, 3)
    single = embedding_log_prob(
        embedding[0],
        latent[1],
        Likelihood(df=5.0, radial_df=3.0, radial_scale=5.0),
        scale_diag=np.full(4, 0.5, np.float32),
    )
    np.testing.assert_allclose(whole[1, 1], single, rtol=1e-5)


def test_unfactorised_embedding_log_prob_is_a_density_of_the_whole_vector(float64):
    rng = np.random.default_rng(0)
    embedding, latent = rng.normal(size=(2, 4))
    scale = np.exp(rng.normal(size=4))
    found = embedding_log_prob(
        embedding, latent, model(likelihood="unfactorised"), scale_diag=scale
    )
    frozen: Any = stats.multivariate_t
    expected = frozen(latent, np.diag(scale**2), df=4.0).logpdf(embedding)
    np.testing.assert_allclose(found, expected, rtol=1e-11)
