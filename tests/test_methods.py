"""Each method takes the right outputs of the right views; targets get no gradient."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jevb_jax import methods
from jevb_jax.networks.heads import DirectionalPrediction, Posterior
from jevb_jax.networks.joint import ViewOutputs
from jevb_jax.paper import baselines, objective
from jevb_jax.paper.likelihood import Likelihood

BATCH, DIM = 6, 5
SETTINGS = methods.JevbSettings(
    likelihood=Likelihood(df=5.0, radial_df=5.0, radial_scale=0.5),
    prior_scale=1.0,
    num_samples=1,
    kl_weight=1.0,
    radial_weight=1.0,
    location="sample",
    fixed_scale=None,
    kl_warmup_steps=0,
)
KEYS = jax.random.split(jax.random.key(0), BATCH)
JEVB = functools.partial(methods.jevb, settings=SETTINGS)
ALL: dict[str, tuple[Any, str]] = {
    "jevb": (JEVB, "posterior"),
    "simsiam": (methods.simsiam, "vector"),
    "byol": (methods.byol, "vector"),
    "vi_simsiam": (methods.vi_simsiam, "direction"),
    "vicreg": (
        functools.partial(
            methods.vicreg, invariance_weight=2.0, variance_weight=3.0, covariance_weight=5.0
        ),
        "none",
    ),
    "barlow_twins": (
        functools.partial(methods.barlow_twins, redundancy_weight=0.1, loss_weight=1.0),
        "none",
    ),
    "fastsiam": (methods.fastsiam, "vector"),
    "emp_ssl": (
        functools.partial(methods.emp_ssl, invariance_weight=2.0, squared_epsilon=0.2),
        "none",
    ),
}
PAIRED = ("jevb", "simsiam", "byol", "vi_simsiam", "vicreg", "barlow_twins")


def view(seed: int, head: str = "posterior", *, untied: bool = False) -> ViewOutputs:
    normal = jnp.asarray(np.random.default_rng(seed).normal(size=(5, BATCH, DIM)), jnp.float32)
    predictions: dict[str, Any] = {
        "posterior": Posterior(
            normal[2], jnp.exp(normal[3]), jnp.exp(normal[4]) if untied else None
        ),
        "vector": normal[2],
        "direction": DirectionalPrediction(normal[2], jnp.exp(normal[3, :, 0])),
        "none": None,
    }
    return ViewOutputs(normal[0], normal[1], predictions[head])


def run(name: str, views: Any, targets: Any, radial_scale: Any = 0.5) -> methods.MethodOutput:
    function, head = ALL[name]
    scale = jnp.asarray(radial_scale) if head == "posterior" else None
    return function(KEYS, views, targets, step=jnp.asarray(0), radial_scale=scale)


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_losses_are_per_example_or_one_and_metrics_are_finite(name):
    views = [view(seed, ALL[name][1]) for seed in (1, 2)]
    output = run(name, views, views)
    assert output.loss.shape in ((BATCH,), ())
    assert (output.loss.shape == ()) == (ALL[name][1] == "none")
    for value in (output.loss, *output.metrics.values()):
        assert value.shape in ((BATCH,), ())
        assert np.all(np.isfinite(value))


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_gradients_reach_the_views_and_never_the_targets(name):
    head = ALL[name][1]
    views = [view(seed, head) for seed in (1, 2)]

    def loss(embeddings: Any, predictions: Any, targets: Any) -> jax.Array:
        online = [
            v._replace(embedding=e, prediction=p)
            for v, e, p in zip(views, embeddings, predictions, strict=True)
        ]
        wanted = [v._replace(embedding=t) for v, t in zip(views, targets, strict=True)]
        return jnp.mean(run(name, online, wanted).loss)

    embeddings = tuple(v.embedding for v in views)
    gradients = jax.grad(loss, argnums=(0, 1, 2))(
        embeddings, tuple(v.prediction for v in views), embeddings
    )
    assert all(np.all(np.asarray(leaf) == 0) for leaf in jax.tree.leaves(gradients[2]))
    # A head's method sees the online embedding through its predictions alone.
    online = gradients[1] if head != "none" else gradients[0]
    assert all(np.any(np.asarray(leaf) != 0) for leaf in jax.tree.leaves(online))
    if head != "none":
        assert all(np.all(np.asarray(leaf) == 0) for leaf in jax.tree.leaves(gradients[0]))


def test_each_prediction_meets_the_other_views_target():
    views = [view(seed, "vector") for seed in (1, 2)]
    targets = [view(seed, "vector") for seed in (3, 4)]
    direct = baselines.simsiam_loss(
        views[0].prediction, views[1].prediction, targets[0].embedding, targets[1].embedding
    )
    np.testing.assert_array_equal(run("simsiam", views, targets).loss, direct.loss)

    def unit(x: Any) -> np.ndarray:
        return np.asarray(x) / np.linalg.norm(x, axis=1, keepdims=True)

    cosines = sum(
        (unit(views[a].prediction) * unit(targets[1 - a].embedding)).sum(1) for a in (0, 1)
    )
    np.testing.assert_allclose(run("simsiam", views, targets).loss, -cosines / 2, rtol=1e-5)
    byol = run("byol", views, targets)
    np.testing.assert_allclose(byol.loss, 4 - 2 * cosines, rtol=1e-5)
    np.testing.assert_allclose(byol.metrics["cosine_similarity"], cosines / 2, rtol=1e-4, atol=1e-6)
    directional = [view(seed, "direction") for seed in (1, 2)]
    found = run("vi_simsiam", directional, targets)
    (m1, k1), (m2, k2) = (v.prediction for v in directional)
    expected = baselines.vi_simsiam_loss(m1, k1, m2, k2, *(t.embedding for t in targets))
    np.testing.assert_array_equal(found.loss, expected.loss)


@pytest.mark.slow
def test_jevb_loss_is_the_weighted_bound_per_dimension():
    views, targets = [view(1), view(2)], [view(3), view(4)]
    function = functools.partial(
        methods.jevb, settings=dataclasses.replace(SETTINGS, kl_weight=0.3, radial_weight=0.0)
    )
    found = function(KEYS, views, targets, step=0, radial_scale=jnp.asarray(0.5))
    sources = [
        objective.View(t.embedding, v.posterior_mean, v.posterior_scale)
        for v, t in zip(views, targets, strict=True)
    ]
    terms = objective.symmetric_elbo(
        KEYS, *sources, likelihood=SETTINGS.likelihood, kl_weight=0.3, radial_weight=0.0
    )
    np.testing.assert_allclose(found.loss, -terms.weighted_elbo / DIM, rtol=1e-6)
    np.testing.assert_allclose(found.metrics["elbo"], terms.elbo, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("fixed_scale", [None, 0.7])
def test_jevb_scale_of_the_likelihood_can_be_its_own(fixed_scale):
    settings = dataclasses.replace(SETTINGS, fixed_scale=fixed_scale)
    views = [view(1, untied=fixed_scale is None), view(2, untied=fixed_scale is None)]
    found = methods.jevb(
        KEYS, views, views, step=0, radial_scale=jnp.asarray(0.5), settings=settings
    )
    scales: Any = [fixed_scale if fixed_scale else v.prediction.likelihood_scale for v in views]
    # The KL knows nothing of the likelihood's scale; the likelihood nothing of another posterior's.
    tied = run("jevb", [view(1), view(2)], [view(1), view(2)])
    np.testing.assert_array_equal(found.metrics["kl"], tied.metrics["kl"])
    pairs = jax.vmap(jax.random.split)(KEYS)
    expected = [
        objective.conditional_elbo(
            pairs[:, source],
            views[1 - source].embedding,
            views[source].posterior_mean,
            views[source].posterior_scale,
            SETTINGS.likelihood,
            untied_scale=scales[source],
        ).directional_log_likelihood
        for source in (0, 1)
    ]
    np.testing.assert_allclose(
        found.metrics["directional_log_likelihood"], sum(expected) / 2, rtol=1e-5
    )


@pytest.mark.slow
def test_multi_view_elbo_is_symmetric_plus_small_crops():
    views = [view(seed) for seed in (1, 2, 3)]
    keywords: Any = {"step": 0, "radial_scale": jnp.asarray(0.5), "settings": SETTINGS}
    three = methods.multi_view_elbo(KEYS, views, views[:2], **keywords)
    # KL terms need no sampling: sources are view 1, view 2 and twice the crop.
    kls = [
        objective.conditional_elbo(
            KEYS,
            v.embedding,
            v.posterior_mean,
            v.posterior_scale,
            SETTINGS.likelihood,
        ).kl
        for v in views
    ]
    np.testing.assert_allclose(three.kl, (kls[0] + kls[1] + 2 * kls[2]) / 4, rtol=1e-5)
    # The crop is no target: its embedding changes nothing.
    moved = [*views[:2], views[2]._replace(embedding=-views[2].embedding)]
    again = methods.multi_view_elbo(KEYS, moved, moved[:2], **keywords)
    np.testing.assert_array_equal(again.elbo, three.elbo)


def loss_of_pair(name: str, source: Any, target: Any, number: int) -> Any:
    """The loss of one source and one target, by the pure functions."""
    p, t = source.prediction, target.embedding
    if name == "simsiam":
        return baselines.simsiam_loss(p, p, t, t).loss
    if name == "byol":
        return baselines.byol_loss(p, p, t, t).loss
    if name == "vi_simsiam":
        m, k = p
        return baselines.vi_simsiam_loss(m, k, m, k, t, t).loss
    if name == "vicreg":
        terms = baselines.vicreg_loss(
            source.embedding, t, invariance_weight=2, variance_weight=3, covariance_weight=5
        )
        return terms.loss
    if name == "barlow_twins":
        return baselines.barlow_twins_loss(source.embedding, t, redundancy_weight=0.1).loss
    keys = jax.vmap(jax.random.fold_in, (0, None))(KEYS, number)
    posterior = (source.posterior_mean, source.posterior_scale)
    return -objective.conditional_elbo(keys, t, *posterior, SETTINGS.likelihood).elbo / DIM


@pytest.mark.slow
@pytest.mark.parametrize("name", PAIRED)
def test_many_views_are_the_mean_over_pairs(name):
    head = ALL[name][1]
    full, crop = [view(seed, head) for seed in (1, 2, 3)], view(4, head)
    targets = full if head == "none" else [view(seed, head) for seed in (5, 6, 7)]
    found = run(name, [*full, crop], targets).loss
    # Pairs by hand; the crop's come first in the numbers of their keys.
    sources = {
        0: (full[0], (1, 2)),
        1: (full[1], (0, 2)),
        2: (full[2], (0, 1)),
        3: (crop, (0, 1, 2)),
    }
    first = {0: 7, 1: 11, 2: 15, 3: 3}
    losses = [
        loss_of_pair(name, source, targets[t], first[s] + t)
        for s, (source, others) in sources.items()
        for t in others
        if name != "jevb" or {s, t} != {0, 1}
    ]
    if name == "jevb":  # the first two views are a symmetric bound, with keys of its own
        views = [
            objective.View(t.embedding, v.posterior_mean, v.posterior_scale)
            for v, t in zip(full[:2], targets[:2], strict=True)
        ]
        both = objective.symmetric_elbo(KEYS, *views, likelihood=SETTINGS.likelihood)
        losses += [-both.elbo / DIM] * 2
    assert len(losses) == 9
    np.testing.assert_allclose(found, np.mean(np.stack(losses), axis=0), rtol=2e-5, atol=1e-6)


def test_fastsiam_of_two_views_is_simsiam():
    views, targets = ([view(seed, "vector") for seed in seeds] for seeds in ((1, 2), (3, 4)))
    simsiam = run("simsiam", views, targets)
    np.testing.assert_allclose(run("fastsiam", views, targets).loss, simsiam.loss, rtol=1e-5)


def test_kl_warmup():
    settings = dataclasses.replace(SETTINGS, kl_weight=0.5, kl_warmup_steps=10)
    weights = [settings.elbo_settings(step).get("kl_weight") for step in (0, 5, 10, 100)]
    np.testing.assert_allclose(np.asarray(weights), [0, 0.25, 0.5, 0.5])


def test_jevb_needs_a_radial_scale():
    views = [view(1), view(2)]
    with pytest.raises(ValueError, match="radial scale"):
        methods.jevb(KEYS, views, views, step=0, radial_scale=None, settings=SETTINGS)
