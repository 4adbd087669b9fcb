"""Loss prediction: a small network on frozen features predicts which images have a large loss.

After Yoo and Kweon 2019, who train it beside the classifier, on features of several layers. Here
the encoder is frozen, and the network reads its representation alone.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from jevb_jax import arguments
from jevb_jax.evaluation.detector_input import (
    DegenerateFeaturesError,
    as_float32,
    checked_alive,
    checked_fit_features,
    checked_image_labels,
    checked_queries,
    real_matrix,
)
from jevb_jax.evaluation.products import exact_matmul
from jevb_jax.paper.scores import never_certain


class Layers(NamedTuple):
    """Parameters of the network: one hidden layer of `H` units, and one output.

    Attributes:
      hidden_weights: `[F, H]`.
      hidden_bias: `[H]`.
      output_weights: `[H]`. A bias would not change the order of images.
    """

    hidden_weights: Array
    hidden_bias: Array
    output_weights: Array


def _predict(layers: Layers, standardized: Array) -> Array:
    hidden = exact_matmul(standardized, layers.hidden_weights) + layers.hidden_bias[None]
    return exact_matmul(jax.nn.relu(hidden), layers.output_weights)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PredictedLoss:
    """A predicted order of losses, fitted by `fit_loss_prediction`.

    Attributes:
      mean: `[F]`, of the fitted features.
      inverse_std: `[F]`; 0 for a feature that does not vary, which is ignored.
      layers: parameters of the network.
    """

    mean: Array
    inverse_std: Array
    layers: Layers

    def __call__(self, features: ArrayLike) -> Array:
        """Scores, `[N]`, of features `[N, F]`; only their order has a meaning."""
        values = checked_queries(features, len(self.mean))
        standardized = (values - self.mean[None]) * self.inverse_std[None]
        score = _predict(self.layers, standardized)
        # The network may predict little for a feature that has overflowed.
        has_overflowed = ~jnp.isfinite(score) & ~jnp.isnan(values).any(axis=-1)
        is_infinite = jnp.isinf(values).any(axis=-1) & ~jnp.isnan(values).any(axis=-1)
        return never_certain(jnp.where(has_overflowed | is_infinite, jnp.inf, score))


def pairwise_ranking_loss(
    score: Array, other_score: Array, sign: Array, *, margin: float = 1.0
) -> Array:
    """Loss of pairs of images, `[P]` (docs eq. 43; Yoo and Kweon 2019).

    It is `max(0, margin - sign (score - other_score))`. A pair of equal losses has the sign 0 and
    teaches nothing. In the paper such a pair counts as if the second loss were larger.

    Args:
      score: `[P]`, predictions for the first image of each pair.
      other_score: `[P]`, for the second image.
      sign: `[P]`, sign of the loss of the first image minus that of the second.
      margin: distance of two scores above which a pair in the right order costs nothing.
    """
    return jnp.maximum(0, margin - sign * (score - other_score))


def cross_entropies(logits: ArrayLike, labels: ArrayLike) -> np.ndarray:
    """Cross-entropy of each image, `[M]` float64, nats.

    It is computed from the differences to the logit of the label, so small values of images that
    are classified with confidence keep their order.

    Args:
      logits: `[M, C]`.
      labels: `[M]` integers in [0, C).

    Raises:
      ValueError: the shapes do not fit, a value is not finite, or a label is out of range.
    """
    values = real_matrix("logits", logits, least=1, of="image", axes="[M, C]")
    given = checked_image_labels(labels, len(values))
    if given.min() < 0 or given.max() >= values.shape[1]:
        raise ValueError(
            f"labels must be in [0, {values.shape[1]}), one number for each class of the logits, got "
            f"values from {given.min()} to {given.max()}"
        )
    rows = np.arange(len(values))
    margin = values - values[rows, given][:, None]
    margin[rows, given] = -np.inf
    # log(1 + sum exp(margin)), exact for a tiny sum.
    return np.logaddexp(0, np.logaddexp.reduce(margin, axis=1))


def fit_loss_prediction(
    features: ArrayLike,
    losses: ArrayLike,
    *,
    seed: int = 0,
    num_steps: int = 1000,
    num_pairs: int = 256,
    width: int = 128,
    learning_rate: float = 1e-3,
) -> PredictedLoss:
    """Predicts which images have a large loss (docs eq. 43; after Yoo and Kweon 2019).

    A network with one hidden layer on standardized features is fitted by Adam to the order of the
    losses, `num_pairs` random pairs of different images at a step. The rate falls to zero (cosine).

    Args:
      features: `[M, F]`, in distribution.
      losses: `[M]`, of the same images. Only their order has an effect.
      seed: sets the initial parameters and the pairs; in [0, 2**63).
      num_steps: number of steps.
      num_pairs: number of pairs in a step.
      width: number of hidden units.
      learning_rate: first rate of Adam.

    Returns:
      A score: features `[N, F]` to `[N]`, larger for a larger predicted loss.

    Raises:
      ValueError: features are not finite `[M, F]` with at least 2 images, losses are not one finite
        number for each image, or a setting is out of range.
      TypeError: features or losses are not real numbers, or a count is not an integer.
      DegenerateFeaturesError: the features do not vary, or all losses are equal.
    """
    counts = {"num_steps": num_steps, "num_pairs": num_pairs, "width": width}
    counts = {name: arguments.whole_number(name, x, at_least=1) for name, x in counts.items()}
    seed = arguments.whole_number("seed", seed, at_least=0, at_most=arguments.LARGEST_SEED)
    rate = arguments.real_number("learning_rate", learning_rate)
    if not 0 < rate < np.inf:
        raise ValueError(f"learning_rate must be positive and finite, got {rate}")
    values = checked_fit_features("features", features)
    given = np.asarray(losses)
    if given.shape != (len(values),):
        raise ValueError(
            f"losses must be [{len(values)}], one number for each image, got shape {given.shape}"
        )
    targets = real_matrix("losses", given[:, None], least=2, of="images", axes="[M]")[:, 0]
    mean, std = values.mean(axis=0), values.std(axis=0)
    is_alive = checked_alive(std, values)
    # Float32 would tie losses that differ by little: the order is exact as integers.
    order, rank = np.unique(targets, return_inverse=True)
    if len(order) < 2:
        raise DegenerateFeaturesError(
            f"all losses are {order[0]:.4g}, and equal losses have no order to predict"
        )
    inverse_std = np.where(is_alive, 1 / np.where(is_alive, std, 1), 0)
    standardized = (values - mean) * inverse_std
    center, scale, inputs = as_float32(mean, inverse_std, standardized)
    key = jax.random.key(seed)  # a large seed cannot be traced
    layers = _train(inputs, jax.device_put(rank.astype(np.int32)), key, rate, **counts)
    return PredictedLoss(center, scale, layers)


@functools.partial(jax.jit, static_argnames=("num_steps", "num_pairs", "width"))
def _train(
    standardized: Array,
    rank: Array,
    key: Array,
    rate: float,
    *,
    num_steps: int,
    num_pairs: int,
    width: int,
) -> Layers:
    """Fits the network in one compiled loop."""
    import optax  # a loaded model, which only applies the score, does not need it

    num_images, num_features = standardized.shape
    initial_key, pairs_key = jax.random.split(key)
    hidden_key, output_key = jax.random.split(initial_key)
    he = jax.nn.initializers.he_normal()
    layers = Layers(
        he(hidden_key, (num_features, width), jnp.float32),
        jnp.zeros(width),
        he(output_key, (width, 1), jnp.float32)[:, 0],
    )
    optimizer = optax.adam(lambda step: rate * 0.5 * (1 + jnp.cos(jnp.pi * step / num_steps)))

    def objective(layers: Layers, first: Array, second: Array) -> Array:
        score = _predict(layers, standardized[jnp.concatenate([first, second])])
        sign = jnp.sign(rank[first] - rank[second])
        return jnp.mean(pairwise_ranking_loss(score[:num_pairs], score[num_pairs:], sign))

    def step(
        carry: tuple[Layers, optax.OptState], key: Array
    ) -> tuple[tuple[Layers, optax.OptState], None]:
        layers, state = carry
        first_key, shift_key = jax.random.split(key)
        first = jax.random.randint(first_key, (num_pairs,), 0, num_images)
        shift = jax.random.randint(shift_key, (num_pairs,), 1, num_images)
        gradient = jax.grad(objective)(layers, first, (first + shift) % num_images)
        updates, state = optimizer.update(gradient, state)
        return (optax.tree.add(layers, updates), state), None

    keys = jax.random.split(pairs_key, num_steps)
    (layers, _), _ = jax.lax.scan(step, (layers, optimizer.init(layers)), keys)
    return layers
