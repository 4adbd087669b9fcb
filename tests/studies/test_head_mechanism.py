"""The study of the head: correlations that are known by construction."""

import types

import numpy as np
import pytest

from studies import head_mechanism, own_scores


def test_rank_correlations_and_medians_are_those_of_the_sets(monkeypatch):
    random = np.random.default_rng(0)
    directions = random.normal(size=(30, 4))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    radius = np.arange(1.0, 31.0)
    images = {"train": directions, "test": directions * radius[:, None], "far": -directions}

    def posterior(x):
        # The geometric mean over features is one over the radius.
        factors = np.array([0.5, 2.0, 0.5, 2.0])
        return types.SimpleNamespace(scale=factors / np.linalg.norm(x, axis=1, keepdims=True))

    fake = types.SimpleNamespace(
        embed=lambda x: x,
        posterior=posterior,
        settings=types.SimpleNamespace(model=types.SimpleNamespace(head_input="embedding")),
    )
    monkeypatch.setattr(head_mechanism, "load", lambda directory: fake)
    monkeypatch.setattr(
        own_scores, "read_images", lambda model, directory: (images, {"far": "far"})
    )
    inside, outside = head_mechanism.measure("runs/a/seed_1")
    assert (inside["run"], inside["set"], inside["group"]) == ("a/seed_1", "test", "inside")
    assert inside["rank_correlation"] == pytest.approx(-1)
    assert inside["radius"] == pytest.approx(15.5)
    assert inside["scale"] == pytest.approx(np.median(1 / radius))
    assert (outside["set"], outside["group"], outside["head_input"]) == ("far", "far", "embedding")
    assert outside["radius"] == pytest.approx(1)
