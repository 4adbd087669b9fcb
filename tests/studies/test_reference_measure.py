"""The study of the measure: the change of coordinates, and rows from the public parts of a model."""

import types

import numpy as np
import pytest
from scipy import special, stats

from studies import own_scores, reference_measure

DIM = 6


def test_a_gaussian_of_the_embedding_is_a_uniform_direction_and_a_chi_radius():
    h = np.random.default_rng(0).normal(size=(50, DIM))
    radius = np.linalg.norm(h, axis=1)
    area = 2 * np.pi ** (DIM / 2) / special.gamma(DIM / 2)
    polar = np.log(area) - stats.chi.logpdf(radius, DIM)
    euclidean = -stats.multivariate_normal(np.zeros(DIM)).logpdf(h)
    np.testing.assert_allclose(
        reference_measure.over_embedding(polar, radius, DIM), euclidean, rtol=1e-12
    )
    np.testing.assert_allclose(
        reference_measure.over_direction_and_radius(euclidean, radius, DIM), polar, rtol=1e-12
    )


@pytest.mark.slow
@pytest.mark.nightly
def test_every_density_is_taken_over_both_measures(monkeypatch):
    """Embeddings stand for images; the outside set points the same way and is three times as long."""
    random = np.random.default_rng(1)
    axes = np.array([3.0, 2.0, 1.0, 0.5, 0.4, 0.3], np.float32)
    drawn = {name: axes * random.normal(size=(60, DIM)).astype(np.float32) for name in "abc"}
    images = {"train": drawn["a"], "test": drawn["b"], "long": 3 * drawn["c"]}
    fake = types.SimpleNamespace(
        embed=lambda x: x,
        posterior=lambda x: types.SimpleNamespace(mean=x, scale=np.ones_like(x)),
        variables={},
        network=types.SimpleNamespace(apply=lambda variables, method: 0.5, radial_scale=None),
        settings=types.SimpleNamespace(jevb=types.SimpleNamespace(df=5.0, radial_df=5.0)),
    )
    monkeypatch.setattr(reference_measure, "load", lambda directory: fake)
    monkeypatch.setattr(
        own_scores, "read_images", lambda model, directory: (images, {"long": "far"})
    )
    rows = reference_measure.measure("runs/x/seed_0")
    found = {(row["density"], row["measure"]): row for row in rows}
    assert len(found) == len(rows) == 7
    alone = found.pop(("training mixture without its radial part", reference_measure.DIRECTION))
    assert alone["far"] == pytest.approx(0.5, abs=0.2)  # directions of one distribution
    for row in rows:
        assert row["run"] == "x/seed_0"
        assert row["long"] == row["far"]
    for density in {density for density, _ in found}:
        polar, euclidean = (
            found[density, one] for one in (reference_measure.POLAR, reference_measure.EUCLIDEAN)
        )
        # Long embeddings lose less over direction and radius.
        assert polar["far"] < euclidean["far"], density
    own = found["Gaussian of the embedding", reference_measure.EUCLIDEAN]["far"]
    covariance = np.cov(images["train"].T, bias=True)
    center = images["train"].mean(axis=0)
    inside, outside = (
        np.einsum("ni,ij,nj->n", x - center, np.linalg.inv(covariance), x - center)
        for x in (images["test"], images["long"])
    )
    assert own == pytest.approx(np.mean(outside[:, None] > inside[None]), abs=1e-6)
