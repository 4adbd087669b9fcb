"""Trains your own Flax Linen encoder on your own data, with pure functions of `jevb_jax` and Optax.

python examples/own_encoder_linen.py
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from sklearn.datasets import load_digits

import jevb_jax

DIM = 16
LIKELIHOOD = jevb_jax.Likelihood(df=5.0, radial_df=5.0, radial_scale=0.5)


class Encoder(nn.Module):
    """Maps a vector to its embedding and to the mean and scale of the posterior q(z)."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jevb_jax.View:
        """Maps `[batch, features]` to a view of `[batch, DIM]` arrays."""
        h = nn.Dense(DIM)(nn.LayerNorm()(nn.relu(nn.Dense(64)(x))))
        mean, raw_scale = jnp.split(nn.Dense(2 * DIM)(nn.relu(nn.Dense(64)(h))), 2, axis=-1)
        return jevb_jax.View(h, mean, nn.softplus(raw_scale) + 1e-3)


def loss(params: Any, key: jax.Array, x: jax.Array) -> jax.Array:
    """Negative bound, nats per dimension, of two noisy views of `x`."""
    view_key, sample_key = jax.random.split(key)
    noise = 0.2 * jax.random.normal(view_key, (2, *x.shape))
    views: Any = [Encoder().apply(params, x + n) for n in noise]
    terms = jevb_jax.symmetric_elbo(sample_key, *views, likelihood=LIKELIHOOD, prior_scale=2.0)
    return -terms.weighted_elbo.mean() / DIM


def main(num_steps: int = 300) -> tuple[float, float]:
    """Trains; returns the loss before and after training, on the same views."""
    x = jnp.asarray(load_digits(return_X_y=True)[0] / 16, jnp.float32)
    params, optimizer = Encoder().init(jax.random.key(0), x[:2]), optax.adam(1e-3)
    state = optimizer.init(params)

    @jax.jit
    def step(params, state, key):
        rows = jax.random.choice(key, len(x), (128,), replace=False)
        updates, state = optimizer.update(jax.grad(loss)(params, key, x[rows]), state)
        return optax.apply_updates(params, updates), state

    before = float(jax.jit(loss)(params, jax.random.key(1), x))
    for key in jax.random.split(jax.random.key(2), num_steps):
        params, state = step(params, state, key)
    after = float(jax.jit(loss)(params, jax.random.key(1), x))
    print(f"loss {before:.3f} -> {after:.3f} nats per dimension")
    return before, after


if __name__ == "__main__":
    main()
