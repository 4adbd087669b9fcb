"""Projector, inference network and predictors, and their outputs."""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from jevb_jax.networks.layers import check_features, check_sizes, dense_layer, mlp_batch_norm
from jevb_jax.paper import sphere

_MIN_CONCENTRATION = 1e-3

HeadName = Literal["posterior", "vector", "direction", "none"]
HeadInput = Literal["direction", "embedding", "direction_and_radius"]
HEAD_INPUTS: tuple[HeadInput, ...] = ("direction", "embedding", "direction_and_radius")


class Posterior(NamedTuple):
    """Parameters of the diagonal Gaussian q(z given view).

    Attributes:
      posterior_mean: `[batch, dim]`, float32.
      posterior_scale: `[batch, dim]`, float32, a standard deviation above the network's
        `min_scale`.
      likelihood_scale: `[batch, dim]`, float32, above `min_scale`: a separate scale of the
        likelihood, in the units of the latent. None if it is tied to the posterior's.
    """

    posterior_mean: jax.Array
    posterior_scale: jax.Array
    likelihood_scale: jax.Array | None = None


class DirectionalPrediction(NamedTuple):
    """Parameters of the predicted distribution of the other view's direction.

    Attributes:
      direction: `[batch, dim]`, float32, not normalized.
      concentration: `[batch]`, float32, positive; low if the network is uncertain.
    """

    direction: jax.Array
    concentration: jax.Array


class Projector(nn.Module):
    """MLP from representation to embedding, by default SimSiam's (Chen and He, arXiv 2011.10566).

    Each hidden layer is dense without bias, BatchNorm and ReLU. The last layer is dense without
    bias, then BatchNorm without scale and bias in float32. So in training every feature of the
    embedding has mean 0 and variance 1 over the batch. BYOL, VICReg and Barlow Twins leave out the
    last BatchNorm.

    Attributes:
      hidden_dims: widths of the hidden layers.
      embedding_dim: width of the embedding.
      normalize_output: whether to end with BatchNorm.
      dtype: compute type of all but the last BatchNorm.
      bn_momentum: weight of the old running statistics.
      bn_epsilon: added to the variance.

    Raises:
      ValueError: a size is below one; when called, also if the input is not `[batch, features]`, or
        for a training batch of one example, whose variance is zero.
    """

    hidden_dims: Sequence[int] = (2048, 2048)
    embedding_dim: int = 2048
    normalize_output: bool = True
    dtype: DTypeLike = jnp.float32
    bn_momentum: float = 0.9
    bn_epsilon: float = 1e-5

    def __post_init__(self) -> None:
        if self.hidden_dims:
            check_sizes(hidden_dims=self.hidden_dims)
        check_sizes(embedding_dim=self.embedding_dim)
        super().__post_init__()

    @nn.compact
    def __call__(self, representation: jax.Array, *, train: bool) -> jax.Array:
        """Maps `[batch, features]` to embeddings `[batch, embedding_dim]`, float32."""
        check_features(representation, train=train and not self.is_initializing())
        x = representation
        for index, features in enumerate(self.hidden_dims, start=1):
            x = dense_layer(features, self.dtype, f"dense{index}")(x)
            x = mlp_batch_norm(self.dtype, self.bn_momentum, self.bn_epsilon, f"bn{index}")(
                x, use_running_average=not train
            )
            x = nn.relu(x)
        x = dense_layer(self.embedding_dim, self.dtype, "dense_out")(x)
        if not self.normalize_output:
            return x.astype(jnp.float32)
        return mlp_batch_norm(
            jnp.float32, self.bn_momentum, self.bn_epsilon, "bn_out", affine=False
        )(x, use_running_average=not train)


class _Head(nn.Module):
    """Common part of all heads: a hidden layer of dense without bias, BatchNorm and ReLU.

    Attributes:
      hidden_dim: width of the hidden layer.
      dim: width of the output.
      dtype: compute type of the hidden layer. Outputs are computed in float32.
      bn_momentum: weight of the old running statistics.
      bn_epsilon: added to the variance.

    Raises:
      ValueError: a size is below one; when called, for the reasons of `Projector`.
    """

    hidden_dim: int
    dim: int
    dtype: DTypeLike = jnp.float32
    bn_momentum: float = 0.9
    bn_epsilon: float = 1e-5

    def __post_init__(self) -> None:
        check_sizes(hidden_dim=self.hidden_dim, dim=self.dim)
        super().__post_init__()

    def _hidden(self, embedding: jax.Array, *, train: bool) -> jax.Array:
        """Maps `[batch, features]` to `[batch, hidden_dim]`. Call it in a compact method."""
        check_features(embedding, train=train and not self.is_initializing())
        x = dense_layer(self.hidden_dim, self.dtype, "dense")(embedding)
        x = mlp_batch_norm(self.dtype, self.bn_momentum, self.bn_epsilon, "bn")(
            x, use_running_average=not train
        )
        return nn.relu(x)


class InferenceNetwork(_Head):
    """Amortized posterior: from an embedding to mean and standard deviation of a diagonal Gaussian.

    A hidden layer (dense without bias, BatchNorm, ReLU) is followed by two dense heads in float32;
    `posterior_scale = softplus(raw_scale) + min_scale`. The kernel of the scale head starts at
    zero, so every input starts with the scale `initial_scale`. The kernel still learns from the
    first step: its gradient is the hidden layer times the gradient of the output, which is not
    zero. Only the gradient *through* it to the hidden layer is zero in that step.

    Attributes (besides `hidden_dim`, `dim`, `dtype`, `bn_momentum` and `bn_epsilon`):
      initial_scale: value of `posterior_scale` at initialization.
      min_scale: lower bound of `posterior_scale`, at least 0.
      isotropic: one scale for all features of an image.
      has_likelihood_scale: whether there is a third head, built like the scale head, for a
        likelihood whose scale is not tied to the posterior's.

    Raises:
      ValueError: a size is below one, `min_scale < 0`, or `initial_scale <= min_scale`; when
        called, for the reasons of `Projector`.
    """

    initial_scale: float = 1.0
    min_scale: float = 1e-3
    isotropic: bool = False
    has_likelihood_scale: bool = False

    def __post_init__(self) -> None:
        inverse_softplus_above(self.initial_scale, self.min_scale, name="initial_scale")
        super().__post_init__()

    @nn.compact
    def __call__(self, embedding: jax.Array, *, train: bool) -> Posterior:
        """Maps embeddings `[batch, features]` to a `Posterior` of `[batch, dim]` arrays."""
        x = self._hidden(embedding, train=train)
        posterior_mean = nn.Dense(self.dim, dtype=jnp.float32, name="mean_head")(x)
        posterior_scale = self._scale(x, "raw_scale_head")
        if not self.has_likelihood_scale:
            return Posterior(posterior_mean, posterior_scale)
        likelihood_scale = self._scale(x, "raw_likelihood_scale_head")
        return Posterior(posterior_mean, posterior_scale, likelihood_scale)

    def _scale(self, x: jax.Array, name: str) -> jax.Array:
        """Maps `[batch, hidden_dim]` to scales `[batch, dim]`."""
        raw_initial = inverse_softplus_above(
            self.initial_scale, self.min_scale, name="initial_scale"
        )
        raw_scale = nn.Dense(
            1 if self.isotropic else self.dim,
            dtype=jnp.float32,
            kernel_init=nn.initializers.zeros,
            bias_init=nn.initializers.constant(raw_initial),
            name=name,
        )(x)
        scale = nn.softplus(raw_scale) + self.min_scale
        return jnp.broadcast_to(scale, (x.shape[0], self.dim))


def head_features(embedding: jax.Array, head_input: HeadInput) -> jax.Array:
    """The part of an embedding that a head with an uncertainty reads (docs eq. 30).

    The direction is `sqrt(D) h / |h|`, so that its features have the size of the embedding's. A
    head that reads only the direction gives the same output for `h` and `10 h`. Then the radius
    affects only the radial term, as the factorized likelihood requires.

    Args:
      embedding: `[batch, D]`.
      head_input: "direction"; or "embedding", which is `h` itself, and gives flat images confident
        posteriors because their embeddings are long (docs/ood.md); or "direction_and_radius", the
        direction and `sqrt(D) (r^2 - D) / (r^2 + D)`, a bounded function of the radius that is zero
        at its usual size.

    Returns:
      `[batch, D]`, or `[batch, D + 1]`.

    Raises:
      ValueError: `head_input` is unknown.
    """
    if head_input not in HEAD_INPUTS:
        raise ValueError(f"head_input must be one of {HEAD_INPUTS}, got {head_input!r}")
    if head_input == "embedding":
        return embedding
    root_dim = math.sqrt(embedding.shape[-1])
    direction, radius = sphere.polar_decomposition(embedding)
    if head_input == "direction":
        return root_dim * direction
    # The tanh of log(r / sqrt(D)), computed so that no radius overflows.
    log_radius = sphere.safe_log(radius) - math.log(root_dim)
    return root_dim * jnp.concatenate([direction, jnp.tanh(log_radius)[:, None]], axis=-1)


class Predictor(_Head):
    """MLP from the embedding of one view to that of the other (SimSiam, arXiv 2011.10566; BYOL).

    A hidden layer (dense without bias, BatchNorm, ReLU), then dense with bias, in float32. The last
    layer of the original BYOL has no bias.
    """

    @nn.compact
    def __call__(self, embedding: jax.Array, *, train: bool) -> jax.Array:
        """Maps embeddings `[batch, features]` to predictions `[batch, dim]`, float32."""
        x = self._hidden(embedding, train=train)
        return nn.Dense(self.dim, dtype=jnp.float32, name="out")(x)


class DirectionalPredictor(_Head):
    """SimSiam's predictor with a second head for the concentration (VI-SimSiam, arXiv 2203.11437).

    `concentration = softplus(raw) + 1e-3`. The lower bound 1e-3 is our choice.
    """

    @nn.compact
    def __call__(self, embedding: jax.Array, *, train: bool) -> DirectionalPrediction:
        """Maps embeddings `[batch, features]` to a `DirectionalPrediction`."""
        x = self._hidden(embedding, train=train)
        direction = nn.Dense(self.dim, dtype=jnp.float32, name="direction_head")(x)
        raw = nn.Dense(1, dtype=jnp.float32, name="raw_concentration_head")(x)
        return DirectionalPrediction(direction, nn.softplus(raw[:, 0]) + _MIN_CONCENTRATION)


def inverse_softplus_above(value: float, minimum: float, *, name: str) -> float:
    """Solves `softplus(raw) + minimum = value` for `raw`, in float64."""
    if not 0 <= minimum < value < math.inf:
        raise ValueError(
            f"{name} must be finite and above its minimum, which must be at least 0; got {value} "
            f"with minimum {minimum}"
        )
    excess = value - minimum
    return excess + math.log(-math.expm1(-excess))
