"""The health check: which measures a run logs, and that each draw has its own key."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import smoke
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
