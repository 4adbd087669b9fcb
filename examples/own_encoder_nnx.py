"""Trains your own Flax NNX encoder on your own data, with pure functions of `jevb_jax` and Optax.

python examples/own_encoder_nnx.py
"""

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from sklearn.datasets import load_digits

import jevb_jax

DIM = 16
LIKELIHOOD = jevb_jax.Likelihood(df=5.0, radial_df=5.0, radial_scale=0.5)


class Encoder(nnx.Module):
    """Maps a vector to its embedding and to the mean and scale of the posterior q(z)."""

    def __init__(self, features: int, *, rngs: nnx.Rngs):
        """Makes the layers for inputs of shape `[batch, features]`."""
        self.hidden = nnx.Linear(features, 64, rngs=rngs)
        self.norm = nnx.LayerNorm(64, rngs=rngs)
        self.out = nnx.Linear(64, DIM, rngs=rngs)
        self.head_hidden = nnx.Linear(DIM, 64, rngs=rngs)
        self.head = nnx.Linear(64, 2 * DIM, rngs=rngs)

    def __call__(self, x: jax.Array) -> jevb_jax.View:
        """Maps `[batch, features]` to a view of `[batch, DIM]` arrays."""
        h = self.out(self.norm(nnx.relu(self.hidden(x))))
        mean, raw_scale = jnp.split(self.head(nnx.relu(self.head_hidden(h))), 2, axis=-1)
        return jevb_jax.View(h, mean, nnx.softplus(raw_scale) + 1e-3)


def loss(encoder: Encoder, key: jax.Array, x: jax.Array) -> jax.Array:
    """Negative bound, nats per dimension, of two noisy views of `x`."""
    view_key, sample_key = jax.random.split(key)
    noise = 0.2 * jax.random.normal(view_key, (2, *x.shape))
    view_1, view_2 = (encoder(x + n) for n in noise)
    terms = jevb_jax.symmetric_elbo(sample_key, view_1, view_2, LIKELIHOOD, prior_scale=2.0)
    return -terms.weighted_elbo.mean() / DIM


def main(num_steps: int = 300) -> tuple[float, float]:
    """Trains; returns the loss before and after training, on the same views."""
    x = jnp.asarray(load_digits(return_X_y=True)[0] / 16, jnp.float32)
    encoder = Encoder(x.shape[1], rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(encoder, optax.adam(1e-3), wrt=nnx.Param)

    @nnx.jit
    def step(encoder, optimizer, key):
        rows = jax.random.choice(key, len(x), (128,), replace=False)
        optimizer.update(encoder, nnx.grad(loss)(encoder, key, x[rows]))

    before = float(nnx.jit(loss)(encoder, jax.random.key(1), x))
    for key in jax.random.split(jax.random.key(2), num_steps):
        step(encoder, optimizer, key)
    after = float(nnx.jit(loss)(encoder, jax.random.key(1), x))
    print(f"loss {before:.3f} -> {after:.3f} nats per dimension")
    return before, after


if __name__ == "__main__":
    main()
