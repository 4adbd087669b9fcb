"""The study of collapse takes apart the gradients that it says it takes apart."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jevb_jax import directional_log_prob
from studies import collapse
from tests import oracles
from tests.marks import nightly

DIM = 8


def gradients(function):
    """Of the sum over four pairs, in the sampled directions and in the scales."""
    rng = np.random.default_rng(0)
    u, m = (jnp.asarray(x, jnp.float32) for x in oracles.random_units(rng, 2, 4, DIM))
    s = jnp.asarray(rng.uniform(0.2, 0.6, (4, DIM)), jnp.float32)
    return jax.jit(jax.grad(lambda m, s: jnp.sum(function(u, m, s)), argnums=(0, 1)))(m, s)


@pytest.mark.parametrize("directions", ["student", nightly("gaussian")])
@pytest.mark.parametrize("scale", ["student", "gaussian"])
def test_each_gradient_is_that_of_its_own_density(directions, scale):
    def split(u, m, s):
        return collapse.split_log_prob(u, m, s, directions=directions, scale=scale)

    dfs = {"student": collapse.DF, "gaussian": math.inf}
    of_directions, of_scale = gradients(split)
    for index, (name, found) in enumerate(((directions, of_directions), (scale, of_scale))):
        whole = gradients(
            lambda u, m, s, name=name: directional_log_prob(u, loc=m, scale_diag=s, df=dfs[name])
        )
        np.testing.assert_allclose(found, whole[index], rtol=1e-4, atol=1e-4)


def test_a_pair_is_weighed_by_the_slope_of_the_student_kernel():
    # Of -((df + n)/2) log(1 + Q/df), beside the Gaussian's -1/2.
    squared = np.array([0.5, 3.0, 20.0, 400.0])
    weights = collapse.pair_weights(jnp.asarray(squared), df=5.0, n=7)
    slope = [
        (np.log1p((q - 1e-4) / 5) - np.log1p((q + 1e-4) / 5)) * (5 + 7) / 2 / 2e-4 for q in squared
    ]
    np.testing.assert_allclose(weights, -2 * np.array(slope), rtol=1e-4)
