"""Trains your own Equinox encoder on your own data, with pure functions of `jevb_jax` and Optax.

python examples/own_encoder_equinox.py      (pip install equinox)
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from sklearn.datasets import load_digits

import jevb_jax

DIM = 16
LIKELIHOOD = jevb_jax.Likelihood(df=5.0, radial_df=5.0, radial_scale=0.5)


class Encoder(eqx.Module):
    """Maps a vector to its embedding and to the mean and scale of the posterior q(z)."""

    embed: eqx.nn.Sequential
    head: eqx.nn.Sequential

    def __init__(self, features: int, *, key: jax.Array):
        """Makes the layers for inputs of shape `[features]`."""
        relu = eqx.nn.Lambda(jax.nn.relu)
        keys = jax.random.split(key, 4)
        self.embed = eqx.nn.Sequential(
            [
                eqx.nn.Linear(features, 64, key=keys[0]),
                relu,
                eqx.nn.LayerNorm(64),
                eqx.nn.Linear(64, DIM, key=keys[1]),
            ]
        )
        self.head = eqx.nn.Sequential(
            [eqx.nn.Linear(DIM, 64, key=keys[2]), relu, eqx.nn.Linear(64, 2 * DIM, key=keys[3])]
        )

    def __call__(self, x: jax.Array) -> jevb_jax.View:
        """Maps `[features]` to a view of `[DIM]` arrays; `vmap` it over a batch."""
        h = self.embed(x)
        mean, raw_scale = jnp.split(self.head(h), 2)
        return jevb_jax.View(h, mean, jax.nn.softplus(raw_scale) + 1e-3)


def loss(encoder: Encoder, key: jax.Array, x: jax.Array) -> jax.Array:
    """Negative bound, nats per dimension, of two noisy views of `x`."""
    view_key, sample_key = jax.random.split(key)
    noise = 0.2 * jax.random.normal(view_key, (2, *x.shape))
    view_1, view_2 = (jax.vmap(encoder)(x + n) for n in noise)
    terms = jevb_jax.symmetric_elbo(sample_key, view_1, view_2, LIKELIHOOD, prior_scale=2.0)
    return -terms.weighted_elbo.mean() / DIM


def main(num_steps: int = 300) -> tuple[float, float]:
    """Trains; returns the loss before and after training, on the same views."""
    x = jnp.asarray(load_digits(return_X_y=True)[0] / 16, jnp.float32)
    encoder, optimizer = Encoder(x.shape[1], key=jax.random.key(0)), optax.adam(1e-3)
    state = optimizer.init(eqx.filter(encoder, eqx.is_array))

    @eqx.filter_jit
    def step(encoder, state, key):
        rows = jax.random.choice(key, len(x), (128,), replace=False)
        updates, state = optimizer.update(eqx.filter_grad(loss)(encoder, key, x[rows]), state)
        return eqx.apply_updates(encoder, updates), state

    before = float(eqx.filter_jit(loss)(encoder, jax.random.key(1), x))
    for key in jax.random.split(jax.random.key(2), num_steps):
        encoder, state = step(encoder, state, key)
    after = float(eqx.filter_jit(loss)(encoder, jax.random.key(1), x))
    print(f"loss {before:.3f} -> {after:.3f} nats per dimension")
    return before, after


if __name__ == "__main__":
    main()
