"""JEVB on vectors instead of images: scikit-learn's 178 wines with 13 chemical measurements each.

python examples/tabular.py

A view of a row adds noise and replaces some measurements by those of other rows. Afterwards a linear
classifier is fitted to a few labels, on the raw measurements, the embedding or the posterior's mean.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_wine
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split

import jevb_jax

DIM = 16
LIKELIHOOD = jevb_jax.Likelihood(df=5.0, radial_df=5.0, radial_scale=0.5)


class Encoder(nn.Module):
    """Maps measurements to the embedding and to the posterior."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jevb_jax.View:
        """Maps `[batch, 13]` to a view of `[batch, DIM]` arrays."""
        x = nn.LayerNorm()(nn.relu(nn.Dense(64)(x)))
        h = nn.Dense(DIM)(nn.LayerNorm()(nn.relu(nn.Dense(64)(x))))
        mean, raw_scale = jnp.split(nn.Dense(2 * DIM)(nn.relu(nn.Dense(64)(h))), 2, axis=-1)
        return jevb_jax.View(h, mean, nn.softplus(raw_scale) + 1e-3)


def noise_and_mask(key: jax.Array, x: jax.Array) -> jax.Array:
    """A view of every row: 30% of the entries come from another row; noise of scale 0.1 is added."""
    noise_key, mask_key, row_key = jax.random.split(key, 3)
    other = jax.random.permutation(row_key, x, independent=True)
    masked = jnp.where(jax.random.bernoulli(mask_key, 0.3, x.shape), other, x)
    return masked + 0.1 * jax.random.normal(noise_key, x.shape)


def loss(params: Any, key: jax.Array, x: jax.Array) -> jax.Array:
    """Negative bound, nats per dimension, of two views of `x`."""
    key_1, key_2, sample_key = jax.random.split(key, 3)
    views: Any = [Encoder().apply(params, noise_and_mask(k, x)) for k in (key_1, key_2)]
    terms = jevb_jax.symmetric_elbo(sample_key, *views, likelihood=LIKELIHOOD, prior_scale=2.0)
    return -terms.weighted_elbo.mean() / DIM


def few_label_accuracy(features: np.ndarray, labels: np.ndarray, is_train: np.ndarray) -> float:
    """Test accuracy of a linear classifier with 2 labels per class, mean over 20 draws of labels."""
    x, y = features[is_train], labels[is_train]
    x_mean, x_std = x.mean(axis=0), x.std(axis=0)
    accuracies = []
    for seed in range(20):
        rows, _ = train_test_split(np.arange(len(y)), train_size=6, stratify=y, random_state=seed)
        probe = LogisticRegression(max_iter=1000).fit((x[rows] - x_mean) / x_std, y[rows])
        accuracies.append(probe.score((features[~is_train] - x_mean) / x_std, labels[~is_train]))
    return float(np.mean(accuracies))


def main(num_steps: int = 1000) -> dict[str, float]:
    """Trains on the training rows without labels; returns the accuracy for each kind of features."""
    data, labels = load_wine(return_X_y=True)
    train_rows, _ = train_test_split(
        np.arange(len(labels)), test_size=0.4, stratify=labels, random_state=0
    )
    is_train = np.isin(np.arange(len(labels)), train_rows)
    mean, std = data[is_train].mean(axis=0), data[is_train].std(axis=0)
    x = jnp.asarray((data - mean) / std, jnp.float32)
    x_train = x[is_train]
    untrained, optimizer = Encoder().init(jax.random.key(0), x[:2]), optax.adam(1e-3)
    params, state = untrained, optimizer.init(untrained)

    @jax.jit
    def step(params, state, key):
        updates, state = optimizer.update(jax.grad(loss)(params, key, x_train), state)
        return optax.apply_updates(params, updates), state

    for key in jax.random.split(jax.random.key(1), num_steps):
        params, state = step(params, state, key)
    outputs: Any = [Encoder().apply(p, x) for p in (untrained, params)]
    before, after = outputs
    features = {
        "raw measurements": x,
        "embedding, untrained": before.embedding,
        "embedding": after.embedding,
        "posterior mean": after.posterior_mean,
    }
    accuracies = {
        name: few_label_accuracy(np.asarray(values), labels, is_train)
        for name, values in features.items()
    }
    for name, accuracy in accuracies.items():
        print(f"{name:22s} {accuracy:.3f}")
    return accuracies


if __name__ == "__main__":
    main()
