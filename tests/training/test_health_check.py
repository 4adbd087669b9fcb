"""The health check: which measures a run logs, and that each draw has its own key."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import smoke
from jevb_jax.methods import MethodOutput
from jevb_jax.paper.objective import ElboTerms
from jevb_jax.training import health_check
from jevb_jax.training.experiment import build_experiment


@pytest.mark.parametrize(
    ("changes", "is_described"),
    [
        ({}, True),
        ({"likelihood": "unfactorised"}, False),
        ({"coordinates": "stereographic"}, False),
        ({"tails": "feature"}, False),
    ],
)
def test_residuals_of_pairs_are_logged_for_their_own_density_only(
    changes, is_described, monkeypatch
):
    # Tracing the augmentations would take most of the time.
    views = jnp.zeros((2, 4, 8, 8, 3))
    monkeypatch.setattr(health_check, "multi_view", lambda *_: tuple(views))
    config: Any = smoke.get_config()
    config.jevb.update(changes)
    experiment = build_experiment(config)
    values = functools.partial(health_check._pair_values, experiment)
    images = jax.ShapeDtypeStruct((4, *experiment.dataset.train[0].shape), np.uint8)
    found = jax.eval_shape(values, jax.eval_shape(experiment.initial_state), images)
    of_density = {"pair_residual_over_df", "pair_effective_pairs"}
    assert found.keys() & of_density == (of_density if is_described else set())
    assert {"pair_cosine", "gradient_kl"} <= found.keys()


@pytest.mark.slow
def test_no_two_draws_of_the_check_are_the_same_numbers(monkeypatch):
    experiment = build_experiment(smoke.get_config())
    drawn: dict[str, Any] = {}

    def views(keys, images, augmentations):
        drawn["views"] = [jax.random.fold_in(key, view) for key in keys for view in range(2)]
        return tuple(jnp.zeros((2, len(images), 8, 8, 3)))

    def method(keys, *_, **__):
        drawn["information"] = [one for key in keys for one in jax.random.split(key)]
        return MethodOutput(jnp.zeros(4), {})

    def bound(key, target, *_, **__):
        drawn["bound"] = [key, *jax.random.split(key, len(target))]
        return ElboTerms(*[jnp.zeros(len(target))] * 5)

    def normal(key, shape):
        drawn["latents"] = [key]
        return jnp.zeros(shape)

    monkeypatch.setattr(health_check, "multi_view", views)
    monkeypatch.setattr(health_check, "conditional_elbo", bound)
    state = jax.tree.map(
        lambda leaf: jnp.ones(leaf.shape, leaf.dtype), jax.eval_shape(experiment.initial_state)
    )
    images = jnp.zeros((4, 8, 8, 3), jnp.uint8)
    of_fake = dataclasses.replace(experiment, method=method)
    health_check._information_values(of_fake, state, images)
    monkeypatch.setattr(jax.random, "normal", normal)
    health_check._pair_values(experiment, state, images)
    assert len(drawn) == 4
    data = [tuple(np.asarray(jax.random.key_data(key))) for keys in drawn.values() for key in keys]
    assert len(set(data)) == len(data)
