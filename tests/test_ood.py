import numpy as np

from jevb_jax.evaluation import ood


def test_negative_kl_score_is_the_closed_form():
    rng = np.random.default_rng(0)
    mean, scale = rng.normal(size=(50, 16)), np.exp(rng.normal(size=(50, 16)))
    prior = 1.7
    kl = np.log(prior / scale) + (scale**2 + mean**2) / (2 * prior**2) - 0.5
    found = ood.negative_kl_score(
        mean.astype(np.float32), scale.astype(np.float32), prior_scale=prior
    )
    np.testing.assert_allclose(found, -kl.sum(axis=1), rtol=1e-5)


def test_larger_is_nearer_to_the_prior():
    scores = ood.negative_kl_score(np.array([[0.0], [1.0], [3.0]], np.float32), np.ones((3, 1)))
    assert scores[0] > scores[1] > scores[2]
    assert float(scores[0]) == 0
