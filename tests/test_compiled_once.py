"""What people call on arrays is compiled at the first call only, also where it has a loop."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest

from jevb_jax.evaluation import csi, gaussian_detectors, mixture_fit, neighbor_detectors
from jevb_jax.paper import objective, scores
from jevb_jax.paper.likelihood import Likelihood

LIKELIHOOD = Likelihood(df=5.0, radial_df=3.0, radial_scale=0.3)
NUM_IMAGES, DIM = 12, 4
NUM_QUERIES = 1100  # more than any score takes at once


def rows(seed: int, *shape: int) -> np.ndarray:
    shape = shape or (NUM_IMAGES, DIM)
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def scale(seed: int, *shape: int) -> np.ndarray:
    return np.abs(rows(seed, *shape)) + 0.1


def of_fitted(fitted: Any, *shape: int) -> Callable[[int], Any]:
    return lambda seed: fitted(rows(seed, NUM_QUERIES, *(shape or (DIM,))))


def several_gaussians() -> Any:
    whitenings = np.stack([np.eye(DIM), 2 * np.eye(DIM)])
    return gaussian_detectors.gaussians_of(rows(0, 2, DIM).astype(np.float64), whitenings)


def mixture() -> Any:
    return mixture_fit.fit_training_mixture(
        rows(0), scale(1), df=5.0, bandwidth=1.0, radial_scale=0.3, radial_df=3.0
    )


def elbo(seed: int) -> Any:
    given = rows(seed), rows(seed + 1), scale(seed)
    return objective.conditional_elbo(jax.random.key(seed), *given, LIKELIHOOD, num_samples=3)


def bound(seed: int) -> Any:
    given = rows(seed), rows(seed + 1), scale(seed)
    return objective.importance_weighted_bound(
        jax.random.key(seed), *given, LIKELIHOOD, num_samples=3
    )


def terms(seed: int) -> Any:
    shape = (2, NUM_IMAGES, DIM)
    given: Any = rows(seed, *shape), rows(seed + 1, *shape), scale(seed, *shape)
    views = scores.View(*given)
    return scores.uncertainty_terms(jax.random.key(seed), views, LIKELIHOOD, num_samples=3)


@pytest.mark.slow
@pytest.mark.parametrize(
    "make",
    [
        lambda: of_fitted(neighbor_detectors.fit_knn(rows(0), k=2)),
        lambda: of_fitted(neighbor_detectors.fit_whitened_knn(rows(0), k=2)),
        lambda: of_fitted(csi.fit_csi(rows(0, NUM_IMAGES, 4, DIM)), 4, DIM),
        lambda: of_fitted(several_gaussians()),
        lambda: of_fitted(mixture()),
        lambda: elbo,
        pytest.param(lambda: bound, marks=pytest.mark.nightly),
        pytest.param(lambda: terms, marks=pytest.mark.nightly),
    ],
    ids=["knn", "whitened_knn", "csi", "gaussians", "mixture", "elbo", "bound", "terms"],
)
def test_a_second_call_compiles_nothing(make, monkeypatch):
    monkeypatch.setattr(objective, "_SIDE_BY_SIDE_ELEMENTS", 1)  # samples in a loop
    over_samples: Any = objective._over_samples
    over_samples.clear_cache()
    compiled: list[Any] = []

    def note(event: str, duration_secs: float, **about: Any) -> None:
        if event.endswith("backend_compile_duration"):
            compiled.append(about.get("fun_name", "?"))

    function = make()
    jax.block_until_ready(jax.tree.leaves(function(1)))
    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        jax.block_until_ready(jax.tree.leaves(function(3)))
    finally:
        jax.monitoring.unregister_event_duration_listener(note)
        over_samples.clear_cache()
    assert not compiled
