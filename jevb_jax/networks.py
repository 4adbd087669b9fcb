"""Flax Linen networks: image -> representation -> embedding -> what a head says of another view.

Three parts make a `JointEmbeddingModel`: a backbone (`ResNet`, `ConvNet` or `ViT`) gives the
`representation`, a `Projector` maps it to the `embedding`, and a head maps the embedding to a
prediction: JEVB's `InferenceNetwork` to the parameters of the diagonal Gaussian posterior, the
`Predictor` of SimSiam and BYOL to a vector, the `DirectionalPredictor` of VI-SimSiam to a direction
and its concentration; VICReg and Barlow Twins have none. `make_model` builds them from plain values
and is the only place where names become modules.

Conventions shared by every module here:

* Images are floating point `[batch, height, width, channels]`, already normalised; any number of
  channels.
* `dtype` is the compute type (`float32` or `bfloat16`). Parameters, BatchNorm statistics and
  outputs are always float32.
* `train` decides one thing: whether BatchNorm uses (and updates) the statistics of the batch or the
  running ones. Gradients flow either way, so training with frozen statistics is `train=False`.
  There is no dropout.
* `batch_stats` holds BatchNorm's running mean and variance and nothing else. The running variance
  averages the *biased* batch variance (divided by N), as Flax does; PyTorch averages the unbiased
  one. `bn_momentum` is the weight of the old value: 0.9 here is 0.1 in PyTorch.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.typing import DTypeLike

from jevb_jax.normalization import BatchNorm
from jevb_jax.paper import sphere

_MIN_RADIAL_SCALE = 1e-3
_MIN_CONCENTRATION = 1e-3

HeadName = Literal["posterior", "vector", "direction", "none"]
HeadInput = Literal["direction", "embedding", "direction_and_radius"]
HEAD_INPUTS: tuple[HeadInput, ...] = ("direction", "embedding", "direction_and_radius")

# He initialisation. Convolutions as torchvision (kaiming_normal, fan_out); MLPs by fan_in, which
# keeps the forward variance when hidden widths differ.
_CONV_INIT = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
_DENSE_INIT = nn.initializers.variance_scaling(2.0, "fan_in", "normal")


class Posterior(NamedTuple):
    """Diagonal Gaussian q(z given view), as its parameters.

    Attributes:
        posterior_mean: `[batch, dim]`, float32.
        posterior_scale: `[batch, dim]`, float32, a standard deviation, above the network's
            `min_scale`.
        likelihood_scale: `[batch, dim]`, float32, above `min_scale`: a scale of the likelihood, in
            the latent's units, that is not the posterior's; None where the two are tied.
    """

    posterior_mean: jax.Array
    posterior_scale: jax.Array
    likelihood_scale: jax.Array | None = None


class DirectionalPrediction(NamedTuple):
    """Distribution of the other view's direction, as its parameters.

    Attributes:
        direction: `[batch, dim]`, float32, not normalised.
        concentration: `[batch]`, float32, positive; low where the network is unsure.
    """

    direction: jax.Array
    concentration: jax.Array


class ViewOutputs(NamedTuple):
    """Everything the model says about one batch of views; all float32.

    Attributes:
        representation: `[batch, features]`, the backbone's pooled output, never normalised. Used
            for evaluation.
        embedding: `[batch, dim]`, the projector's output. JEVB's likelihood is a density over it.
        prediction: what the head makes of the embedding: a `Posterior`, a vector `[batch, dim]`, a
            `DirectionalPrediction`, or None without a head.
    """

    representation: jax.Array
    embedding: jax.Array
    prediction: Any

    @property
    def posterior_mean(self) -> jax.Array:
        """Of a `Posterior`, `[batch, dim]`."""
        return self.prediction.posterior_mean

    @property
    def posterior_scale(self) -> jax.Array:
        """Of a `Posterior`, `[batch, dim]`, a standard deviation, positive."""
        return self.prediction.posterior_scale


def parameter_count(params: Any) -> int:
    """Number of scalars in a tree of arrays or of `jax.ShapeDtypeStruct`s."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


class ResidualBlock(nn.Module):
    """One residual block: `relu(shortcut(x) + branch(x))` (He et al. 2015, arXiv 1512.03385).

    Basic: 3x3 (stride), 3x3. Bottleneck: 1x1, 3x3 (stride), 1x1 to four times `features`; the
    stride sits on the 3x3 as in torchvision ("v1.5"). The shortcut is the identity where shapes
    agree, else a strided 1x1 convolution and BatchNorm.

    Attributes:
        features: width of the 3x3 convolutions.
        stride: spatial stride of the block.
        bottleneck: whether to build the bottleneck form.
        zero_init_residual: whether the last BatchNorm of the branch starts with scale zero instead
            of one (Goyal et al. 2017, arXiv 1706.02677), so that at the start the block is
            `relu(shortcut(x))`.
        fused_batch_norm: whether BatchNorm and ReLU have a backward pass of their own, a few percent
            of a step faster and in reverse mode alone; without it JAX differentiates them, in forward
            mode too. Values are the same, gradients differ by rounding.
        dtype: compute type.
        bn_momentum: weight of the old running statistics.
        bn_epsilon: added to the variance.
    """

    features: int
    stride: int
    bottleneck: bool
    zero_init_residual: bool = False
    fused_batch_norm: bool = True
    dtype: DTypeLike = jnp.float32
    bn_momentum: float = 0.9
    bn_epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Maps `[batch, h, w, c]` to `[batch, ceil(h / stride), ceil(w / stride), features]`.

        With bottlenecks the last axis is `4 * features`.
        """
        if self.bottleneck:
            layers = (
                (1, self.features, 1),
                (3, self.features, self.stride),
                (1, 4 * self.features, 1),
            )
        else:
            layers = ((3, self.features, self.stride), (3, self.features, 1))

        *first, (size, features, stride) = layers
        branch = x
        for index, layer in enumerate(first, start=1):
            branch = self._conv(*layer, f"conv{index}")(branch)
            branch = self._batch_norm(f"bn{index}")(branch, train=train)
        last = len(layers)
        branch = self._conv(size, features, stride, f"conv{last}")(branch)
        shortcut = x
        if self.stride != 1 or x.shape[-1] != features:
            shortcut = self._conv(1, features, self.stride, "shortcut_conv")(x)
            shortcut = self._batch_norm("shortcut_bn", relu=False)(shortcut, train=train)
        ones, zeros = nn.initializers.ones, nn.initializers.zeros
        scale_init = zeros if self.zero_init_residual else ones
        return self._batch_norm(f"bn{last}", scale_init=scale_init)(branch, shortcut, train=train)

    def _conv(self, size: int, features: int, stride: int, name: str) -> nn.Conv:
        return _conv(features, size, stride, self.dtype, name)

    def _batch_norm(self, name: str, **options: Any) -> BatchNorm:
        return BatchNorm(
            self.bn_momentum,
            self.bn_epsilon,
            self.dtype,
            fused=self.fused_batch_norm,
            name=name,
            **options,
        )


class ResNet(nn.Module):
    """ResNet without its classifier, torchvision's layout and paddings.

    Attributes:
        stage_sizes: number of blocks in each stage; each stage after the first halves the image and
            doubles the width.
        bottleneck: bottleneck blocks (ResNet-50) or basic ones (ResNet-18, 34).
        stem: "imagenet" (7x7 stride 2, 3x3 max-pool stride 2) or "cifar" (3x3 stride 1, no pool),
            for images of about 32 pixels, where the other would leave one pixel to the last stage.
        width: width of the stem and of the first stage.
        zero_init_residual: see `ResidualBlock`.
        fused_batch_norm: see `ResidualBlock`.
        dtype: compute type.
        bn_momentum: weight of the old running statistics.
        bn_epsilon: added to the variance.

    Raises:
        ValueError: unknown `stem`, no stage, or a size below one.
    """

    stage_sizes: Sequence[int]
    bottleneck: bool
    stem: str
    width: int = 64
    zero_init_residual: bool = False
    fused_batch_norm: bool = True
    dtype: DTypeLike = jnp.float32
    bn_momentum: float = 0.9
    bn_epsilon: float = 1e-5

    def __post_init__(self) -> None:
        if self.stem not in ("cifar", "imagenet"):
            raise ValueError(f'stem must be "cifar" or "imagenet", got {self.stem!r}')
        _check_sizes(stage_sizes=self.stage_sizes, width=self.width)
        super().__post_init__()

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        """Maps images `[batch, h, w, c]` to representations `[batch, features]`, float32.

        `features` is `width * 2**(stages - 1)`, four times that with bottlenecks: 512 for
        ResNet-18, 2048 for ResNet-50.
        """
        _check_images(images)
        imagenet = self.stem == "imagenet"
        size, stride = (7, 2) if imagenet else (3, 1)
        x = _conv(self.width, size, stride, self.dtype, "stem_conv")(images)
        batch_norm = BatchNorm(
            self.bn_momentum,
            self.bn_epsilon,
            self.dtype,
            fused=self.fused_batch_norm,
            name="stem_bn",
        )
        x = batch_norm(x, train=train)
        if imagenet:
            # Flax annotates `padding` as a string and documents pairs, which it pads with -inf.
            padding: Any = ((1, 1), (1, 1))
            x = nn.max_pool(x, (3, 3), strides=(2, 2), padding=padding)

        for stage, num_blocks in enumerate(self.stage_sizes):
            for block in range(num_blocks):
                x = ResidualBlock(
                    features=self.width * 2**stage,
                    stride=2 if stage > 0 and block == 0 else 1,
                    bottleneck=self.bottleneck,
                    zero_init_residual=self.zero_init_residual,
                    fused_batch_norm=self.fused_batch_norm,
                    dtype=self.dtype,
                    bn_momentum=self.bn_momentum,
                    bn_epsilon=self.bn_epsilon,
                    name=f"stage{stage + 1}_block{block + 1}",
                )(x, train=train)
        return _global_average_pool(x)


def resnet8(**kwargs: Any) -> ResNet:
    """ResNet-8: basic blocks (1, 1, 1), for small images; `kwargs` are `ResNet`'s other attributes."""
    return ResNet(stage_sizes=(1, 1, 1), bottleneck=False, **kwargs)


def resnet18(**kwargs: Any) -> ResNet:
    """ResNet-18: basic blocks (2, 2, 2, 2); `kwargs` are `ResNet`'s other attributes."""
    return ResNet(stage_sizes=(2, 2, 2, 2), bottleneck=False, **kwargs)


def resnet34(**kwargs: Any) -> ResNet:
    """ResNet-34: basic blocks (3, 4, 6, 3); `kwargs` are `ResNet`'s other attributes."""
    return ResNet(stage_sizes=(3, 4, 6, 3), bottleneck=False, **kwargs)


def resnet50(**kwargs: Any) -> ResNet:
    """ResNet-50: bottleneck blocks (3, 4, 6, 3); `kwargs` are `ResNet`'s other attributes."""
    return ResNet(stage_sizes=(3, 4, 6, 3), bottleneck=True, **kwargs)


class ConvNet(nn.Module):
    """Small plain network for 8x8 to 28x28 images: stages of 3x3 convolution, BatchNorm, ReLU.

    The first stage keeps the resolution and every later one halves it, so the default sees an 8x8
    image at 8, 4 and 2 pixels and a 28x28 one at 28, 14 and 7; its receptive field is 23 pixels.

    Attributes:
        widths: width of each stage.
        convs_per_stage: convolutions in a stage; the stride is on the first.
        fused_batch_norm: see `ResidualBlock`.
        dtype: compute type.
        bn_momentum: weight of the old running statistics.
        bn_epsilon: added to the variance.

    Raises:
        ValueError: no stage, or a size below one.
    """

    widths: Sequence[int] = (32, 64, 128)
    convs_per_stage: int = 2
    fused_batch_norm: bool = True
    dtype: DTypeLike = jnp.float32
    bn_momentum: float = 0.9
    bn_epsilon: float = 1e-5

    def __post_init__(self) -> None:
        _check_sizes(widths=self.widths, convs_per_stage=self.convs_per_stage)
        super().__post_init__()

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        """Maps images `[batch, h, w, c]` to representations `[batch, widths[-1]]`, float32."""
        _check_images(images)
        x = images
        for stage, features in enumerate(self.widths):
            for index in range(self.convs_per_stage):
                suffix = f"{stage + 1}_{index + 1}"
                stride = 2 if stage > 0 and index == 0 else 1
                x = _conv(features, 3, stride, self.dtype, f"conv{suffix}")(x)
                batch_norm = BatchNorm(
                    self.bn_momentum,
                    self.bn_epsilon,
                    self.dtype,
                    fused=self.fused_batch_norm,
                    name=f"bn{suffix}",
                )
                x = batch_norm(x, train=train)
        return _global_average_pool(x)


class TransformerBlock(nn.Module):
    """Pre-norm transformer block: self-attention, then a GELU MLP, each added to its input.

    Attributes:
        num_heads: heads; must divide the input's width.
        mlp_dim: hidden width of the MLP.
        dtype: compute type; attention weights are normalised in float32.
    """

    num_heads: int
    mlp_dim: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Maps `[batch, num_tokens, hidden_size]` to the same shape."""
        batch, num_tokens, hidden_size = tokens.shape
        heads = (batch, num_tokens, self.num_heads, hidden_size // self.num_heads)

        x = self._layer_norm("attention_norm")(tokens)
        query = self._dense(hidden_size, "query")(x).reshape(heads)
        # Softmax ignores what all keys share, so a key bias has zero gradient: noise that Adam
        # would amplify.
        key = self._dense(hidden_size, "key", use_bias=False)(x).reshape(heads)
        value = self._dense(hidden_size, "value")(x).reshape(heads)
        x = jax.nn.dot_product_attention(query, key, value).reshape(tokens.shape)
        tokens = tokens + self._dense(hidden_size, "attention_out")(x)

        x = self._layer_norm("mlp_norm")(tokens)
        x = nn.gelu(self._dense(self.mlp_dim, "mlp_in")(x))
        return tokens + self._dense(hidden_size, "mlp_out")(x)

    def _layer_norm(self, name: str) -> nn.LayerNorm:
        return nn.LayerNorm(epsilon=1e-6, dtype=self.dtype, name=name)

    def _dense(self, features: int, name: str, *, use_bias: bool = True) -> nn.Dense:
        return nn.Dense(
            features,
            use_bias=use_bias,
            dtype=self.dtype,
            kernel_init=nn.initializers.xavier_uniform(),
            name=name,
        )


class ViT(nn.Module):
    """Vision transformer (arXiv 2010.11929), in the plain form of Beyer et al. (arXiv 2205.01580).

    Positions are fixed 2-D sine-cosine embeddings and the output is the mean over tokens, with no
    class token: no parameter depends on the image's size, so smaller crops go through the same
    network. Gains of the final LayerNorm are learned but it has no bias: the projector's BatchNorm
    would remove it, leaving it a random walk under Adam and an arbitrary offset in the
    representation. With a class token, learned positions at 224 pixels and the two kinds of bias
    left out, the parameter counts would be those of DeiT-Ti/16 and DeiT-S/16.

    Attributes:
        patch_size: side of a square patch, pixels.
        hidden_size: token width; a multiple of `num_heads` and of 4.
        depth: number of blocks.
        num_heads: attention heads.
        mlp_ratio: hidden width of the MLP over `hidden_size`.
        dtype: compute type.

    Raises:
        ValueError: a size below one, or `hidden_size` not divisible as above; when called, an image
            whose sides `patch_size` does not divide.
    """

    patch_size: int
    hidden_size: int
    depth: int
    num_heads: int
    mlp_ratio: int = 4
    dtype: DTypeLike = jnp.float32

    def __post_init__(self) -> None:
        _check_sizes(
            patch_size=self.patch_size,
            hidden_size=self.hidden_size,
            depth=self.depth,
            num_heads=self.num_heads,
            mlp_ratio=self.mlp_ratio,
        )
        if self.hidden_size % self.num_heads or self.hidden_size % 4:
            raise ValueError(
                f"hidden_size must be a multiple of num_heads = {self.num_heads} and of 4 "
                f"(sine and cosine on two axes), got {self.hidden_size}"
            )
        super().__post_init__()

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        """Maps images `[batch, h, w, c]` to representations `[batch, hidden_size]`, float32.

        `train` changes nothing (neither BatchNorm nor dropout) and is there so that all backbones
        are called alike.
        """
        del train
        _check_images(images)
        batch, height, width, channels = images.shape
        size = self.patch_size
        if height % size or width % size:
            raise ValueError(
                f"patch_size = {size} must divide the image's sides, got {height}x{width}; "
                "resize or crop the images, or choose another patch_size"
            )
        rows, columns = height // size, width // size
        # A strided convolution written as a matrix product, so that the initialiser sees the fans
        # of MoCo v3.
        patches = images.reshape(batch, rows, size, columns, size, channels).swapaxes(2, 3)
        patches = patches.reshape(batch, rows * columns, size * size * channels)
        tokens = nn.Dense(
            self.hidden_size,
            dtype=self.dtype,
            kernel_init=nn.initializers.xavier_uniform(),
            name="patch_embedding",
        )(patches)
        positions = sincos_position_embedding(rows, columns, dim=self.hidden_size)
        tokens = tokens + jnp.asarray(positions[None], self.dtype)

        for index in range(self.depth):
            tokens = TransformerBlock(
                num_heads=self.num_heads,
                mlp_dim=self.mlp_ratio * self.hidden_size,
                dtype=self.dtype,
                name=f"block{index + 1}",
            )(tokens)
        tokens = nn.LayerNorm(epsilon=1e-6, use_bias=False, dtype=jnp.float32, name="final_norm")(
            tokens
        )
        return tokens.mean(axis=1)


def vit_tiny(*, hidden_size: int = 192, num_heads: int = 3, depth: int = 12, **kwargs: Any) -> ViT:
    """ViT-Tiny: width 192, 3 heads, 12 blocks; `kwargs` are `ViT`'s other attributes."""
    return ViT(hidden_size=hidden_size, num_heads=num_heads, depth=depth, **kwargs)


def vit_small(*, hidden_size: int = 384, num_heads: int = 6, depth: int = 12, **kwargs: Any) -> ViT:
    """ViT-Small: width 384, 6 heads, 12 blocks; `kwargs` are `ViT`'s other attributes."""
    return ViT(hidden_size=hidden_size, num_heads=num_heads, depth=depth, **kwargs)


def sincos_position_embedding(
    rows: int, columns: int, *, dim: int, max_period: float = 10_000.0
) -> np.ndarray:
    """Fixed 2-D sine-cosine position embedding of a grid of patches (MoCo v3, arXiv 2104.02057).

    With frequencies `w_k = max_period**(-k / (dim/4))`, `k = 0 ... dim/4 - 1`, the patch in row `i`
    and column `j` gets `[sin(j w), cos(j w), sin(i w), cos(i w)]`. A constant, computed in float64.

    Args:
        rows: number of patches down.
        columns: number of patches across.
        dim: width of the embedding, a multiple of 4.
        max_period: bound of the slowest period over 2 pi, in patches.

    Returns:
        `[rows * columns, dim]` float32, row by row.
    """
    frequencies = max_period ** (-np.arange(dim // 4) / (dim // 4))
    row, column = np.indices((rows, columns)).reshape(2, -1, 1) * frequencies
    parts = [np.sin(column), np.cos(column), np.sin(row), np.cos(row)]
    return np.concatenate(parts, axis=1).astype(np.float32)


class Projector(nn.Module):
    """MLP from representation to embedding, by default SimSiam's (Chen and He, arXiv 2011.10566).

    Dense without bias, BatchNorm, ReLU for each hidden layer; then dense without bias and BatchNorm
    without scale and bias, in float32, so that in training every feature of the embedding has mean
    0 and variance 1 over the batch. BYOL, VICReg and Barlow Twins end with the dense layer.

    Attributes:
        hidden_dims: widths of the hidden layers.
        embedding_dim: width of the embedding.
        normalize_output: whether to end with BatchNorm.
        dtype: compute type of all but the last BatchNorm.
        bn_momentum: weight of the old running statistics.
        bn_epsilon: added to the variance.

    Raises:
        ValueError: a size below one; when called, an input that is not `[batch, features]`, or
            training on a batch of one example, whose batch variance is zero.
    """

    hidden_dims: Sequence[int] = (2048, 2048)
    embedding_dim: int = 2048
    normalize_output: bool = True
    dtype: DTypeLike = jnp.float32
    bn_momentum: float = 0.9
    bn_epsilon: float = 1e-5

    def __post_init__(self) -> None:
        if self.hidden_dims:
            _check_sizes(hidden_dims=self.hidden_dims)
        _check_sizes(embedding_dim=self.embedding_dim)
        super().__post_init__()

    @nn.compact
    def __call__(self, representation: jax.Array, *, train: bool) -> jax.Array:
        """Maps `[batch, features]` to embeddings `[batch, embedding_dim]`, float32."""
        _check_features(representation, train=train and not self.is_initializing())
        x = representation
        for index, features in enumerate(self.hidden_dims, start=1):
            x = _dense(features, self.dtype, f"dense{index}")(x)
            x = _mlp_batch_norm(self.dtype, self.bn_momentum, self.bn_epsilon, f"bn{index}")(
                x, use_running_average=not train
            )
            x = nn.relu(x)
        x = _dense(self.embedding_dim, self.dtype, "dense_out")(x)
        if not self.normalize_output:
            return x.astype(jnp.float32)
        return _mlp_batch_norm(
            jnp.float32, self.bn_momentum, self.bn_epsilon, "bn_out", affine=False
        )(x, use_running_average=not train)


class _Head(nn.Module):
    """What every head has: a bottleneck of dense without bias, BatchNorm and ReLU.

    Attributes:
        hidden_dim: width of the hidden layer.
        dim: width of the output.
        dtype: compute type of the hidden layer; outputs are computed in float32.
        bn_momentum: weight of the old running statistics.
        bn_epsilon: added to the variance.

    Raises:
        ValueError: a size below one; when called, as `Projector`.
    """

    hidden_dim: int
    dim: int
    dtype: DTypeLike = jnp.float32
    bn_momentum: float = 0.9
    bn_epsilon: float = 1e-5

    def __post_init__(self) -> None:
        _check_sizes(hidden_dim=self.hidden_dim, dim=self.dim)
        super().__post_init__()

    def _hidden(self, embedding: jax.Array, *, train: bool) -> jax.Array:
        """Maps `[batch, features]` to `[batch, hidden_dim]`; called in a compact method."""
        _check_features(embedding, train=train and not self.is_initializing())
        x = _dense(self.hidden_dim, self.dtype, "dense")(embedding)
        x = _mlp_batch_norm(self.dtype, self.bn_momentum, self.bn_epsilon, "bn")(
            x, use_running_average=not train
        )
        return nn.relu(x)


class InferenceNetwork(_Head):
    """Amortised posterior: embedding -> mean and standard deviation of a diagonal Gaussian.

    A bottleneck MLP (dense without bias, BatchNorm, ReLU) and two dense heads in float32;
    `posterior_scale = softplus(raw_scale) + min_scale`. The scale head starts with a zero kernel,
    so every input starts at `initial_scale` exactly. The kernel is not dead: its gradient is the
    hidden layer times the gradient of the output, non-zero at once; only the gradient *through* it
    to the hidden layer waits for the first step.

    Attributes (beside `hidden_dim`, `dim`, `dtype`, `bn_momentum` and `bn_epsilon`):
        initial_scale: value of `posterior_scale` at initialisation.
        min_scale: lower bound of `posterior_scale`, at least 0.
        isotropic: one scale for all features of an image.
        has_likelihood_scale: a third head, made like that of the scale, for a likelihood whose scale
            is not tied to the posterior's.

    Raises:
        ValueError: a size below one, `min_scale < 0`, or `initial_scale <= min_scale`; when called,
            as `Projector`.
    """

    initial_scale: float = 1.0
    min_scale: float = 1e-3
    isotropic: bool = False
    has_likelihood_scale: bool = False

    def __post_init__(self) -> None:
        _inverse_softplus_above(self.initial_scale, self.min_scale, name="initial_scale")
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
        """`[batch, hidden_dim]` to scales `[batch, dim]`."""
        raw_initial = _inverse_softplus_above(
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
    """What a head that states an uncertainty sees of an embedding (docs eq. 30).

    The direction is `sqrt(D) h / |h|`, so that its features are of the size of the embedding's. A
    head that sees it alone says the same of `h` and of `10 h`: the radius reaches the radial term
    and nothing else, as the factorised likelihood promises.

    Args:
        embedding: `[batch, D]`.
        head_input: "direction"; "embedding", `h` as it is, by which flat images, whose embeddings
            are long, get sure posteriors (docs/ood.md); or "direction_and_radius", the direction and
            `sqrt(D) (r^2 - D) / (r^2 + D)`, a bounded function of the radius that is zero at its
            usual size.

    Returns:
        `[batch, D]`, or `[batch, D + 1]`.

    Raises:
        ValueError: unknown `head_input`.
    """
    if head_input not in HEAD_INPUTS:
        raise ValueError(f"head_input must be one of {HEAD_INPUTS}, got {head_input!r}")
    if head_input == "embedding":
        return embedding
    root_dim = math.sqrt(embedding.shape[-1])
    direction, radius = sphere.polar_decomposition(embedding)
    if head_input == "direction":
        return root_dim * direction
    # The tanh of log(r / sqrt(D)), written so that no radius overflows.
    log_radius = sphere.safe_log(radius) - math.log(root_dim)
    return root_dim * jnp.concatenate([direction, jnp.tanh(log_radius)[:, None]], axis=-1)


class Predictor(_Head):
    """Bottleneck MLP from one view's embedding to the other's (SimSiam, arXiv 2011.10566; BYOL).

    Dense without bias, BatchNorm, ReLU; then dense with bias, in float32. BYOL's own last layer has
    no bias.
    """

    @nn.compact
    def __call__(self, embedding: jax.Array, *, train: bool) -> jax.Array:
        """Maps embeddings `[batch, features]` to predictions `[batch, dim]`, float32."""
        x = self._hidden(embedding, train=train)
        return nn.Dense(self.dim, dtype=jnp.float32, name="out")(x)


class DirectionalPredictor(_Head):
    """SimSiam's predictor with a second head for the concentration (VI-SimSiam, arXiv 2203.11437).

    `concentration = softplus(raw) + 1e-3`: the floor is ours.
    """

    @nn.compact
    def __call__(self, embedding: jax.Array, *, train: bool) -> DirectionalPrediction:
        """Maps embeddings `[batch, features]` to a `DirectionalPrediction`."""
        x = self._hidden(embedding, train=train)
        direction = nn.Dense(self.dim, dtype=jnp.float32, name="direction_head")(x)
        raw = nn.Dense(1, dtype=jnp.float32, name="raw_concentration_head")(x)
        return DirectionalPrediction(direction, nn.softplus(raw[:, 0]) + _MIN_CONCENTRATION)


class JointEmbeddingModel(nn.Module):
    """Backbone, projector and head, and the learned scale of the radial likelihood.

    `params` has the entries `backbone`, `projector`, and for JEVB `head` and the scalar
    `raw_radial_scale`.

        variables = model.init(key, images, train=False)
        outputs, updates = model.apply(variables, images, train=True, mutable=["batch_stats"])
        scale = model.apply({"params": variables["params"]}, method="radial_scale")

    Attributes:
        backbone: images to representations.
        projector: representations to embeddings.
        head: embeddings to a prediction, or None.
        head_input: what the head sees of the embedding, see `head_features`.
        initial_radial_scale: value of `radial_scale()` at initialisation, above 1e-3; None for a
            method without a radial likelihood.

    Raises:
        ValueError: `initial_radial_scale <= 1e-3`.
    """

    backbone: nn.Module
    projector: nn.Module
    head: nn.Module | None
    initial_radial_scale: float | None = 0.5
    head_input: HeadInput = "embedding"

    def __post_init__(self) -> None:
        self._initial_raw_radial_scale()
        super().__post_init__()

    def setup(self) -> None:
        """Creates the radial scale here, not on use, so that `init` always returns it."""
        raw = self._initial_raw_radial_scale()
        if raw is not None:
            initializer = nn.initializers.constant(raw)
            self.raw_radial_scale = self.param("raw_radial_scale", initializer, (), jnp.float32)

    def __call__(self, images: jax.Array, *, train: bool) -> ViewOutputs:
        """Maps images `[batch, height, width, channels]` to `ViewOutputs`.

        Args:
            images: floating point and normalised.
            train: whether BatchNorm uses the batch's statistics (pass `mutable=["batch_stats"]` to
                `apply`) or the running ones, in which case no output depends on the other images of
                the batch.
        """
        return self.outputs_of(self.backbone(images, train=train), train=train)

    def outputs_of(self, representation: jax.Array, *, train: bool) -> ViewOutputs:
        """Maps representations `[batch, features]` to `ViewOutputs`; `train` as in a call."""
        embedding = self.projector(representation, train=train)
        if self.head is None:
            return ViewOutputs(representation, embedding, None)
        prediction = self.head(head_features(embedding, self.head_input), train=train)
        return ViewOutputs(representation, embedding, prediction)

    def radial_scale(self) -> jax.Array:
        """Scale of the radial likelihood, a float32 scalar above 1e-3 that depends on no image."""
        return nn.softplus(self.raw_radial_scale) + _MIN_RADIAL_SCALE

    def _initial_raw_radial_scale(self) -> float | None:
        if self.initial_radial_scale is None:
            return None
        return _inverse_softplus_above(
            self.initial_radial_scale, _MIN_RADIAL_SCALE, name="initial_radial_scale"
        )


def make_model(
    *,
    backbone: str,
    width: int,
    stem: str,
    patch_size: int,
    projector_hidden_dims: Sequence[int],
    projector_normalizes_output: bool,
    embedding_dim: int,
    head: HeadName,
    head_input: HeadInput,
    head_hidden_dim: int,
    initial_scale: float,
    min_scale: float,
    isotropic: bool,
    has_likelihood_scale: bool,
    initial_radial_scale: float,
    dtype: str,
    zero_init_residual: bool,
    batch_norm: str,
) -> JointEmbeddingModel:
    """Builds the model from plain values: the one place where names become modules.

    Args:
        backbone: "resnet8", "resnet18", "resnet34", "resnet50", "convnet", "vit_tiny" or
            "vit_small".
        width: width of the first stage (ResNet: 64; ConvNet: 32, doubled twice) or of the tokens
            (ViT: 192, 384); 0 is the network's own.
        stem: "cifar" or "imagenet"; read by the ResNets only.
        patch_size: pixels; read by the ViTs only.
        projector_hidden_dims: widths of the projector's hidden layers.
        projector_normalizes_output: whether the projector ends with BatchNorm.
        embedding_dim: width of embedding and prediction.
        head: "posterior" (JEVB), "vector" (SimSiam, BYOL), "direction" (VI-SimSiam) or "none".
        head_input: see `head_features`; read by "posterior" and "direction". A head that predicts a
            vector sees the embedding, as published.
        head_hidden_dim: width of the head's hidden layer.
        initial_scale: of a posterior, at initialisation.
        min_scale: its lower bound.
        isotropic: one scale for all features of an image's posterior.
        has_likelihood_scale: see `InferenceNetwork`.
        initial_radial_scale: radial scale at initialisation, with a posterior.
        dtype: compute type, "float32" or "bfloat16".
        zero_init_residual: see `ResidualBlock`; read by the ResNets only.
        batch_norm: "fused" or "plain", see `ResidualBlock.fused_batch_norm`; read by the ResNets and
            the ConvNet only.

    Raises:
        ValueError: an unknown name, or a value that a module refuses.
    """
    resnets: dict[str, Callable[..., ResNet]] = {
        "resnet8": resnet8,
        "resnet18": resnet18,
        "resnet34": resnet34,
        "resnet50": resnet50,
    }
    vits: dict[str, Callable[..., ViT]] = {"vit_tiny": vit_tiny, "vit_small": vit_small}
    dtypes = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
    if dtype not in dtypes:
        raise ValueError(f"dtype must be one of {list(dtypes)}, got {dtype!r}")
    if batch_norm not in ("fused", "plain"):
        raise ValueError(f'batch_norm must be "fused" or "plain", got {batch_norm!r}')
    if width < 0:
        raise ValueError(f"width must be positive, or 0 for the network's own, got {width}")
    compute_dtype = dtypes[dtype]
    options: dict[str, Any]

    if backbone in resnets:
        options = {"width": width} if width else {}
        backbone_module = resnets[backbone](
            stem=stem,
            zero_init_residual=zero_init_residual,
            fused_batch_norm=batch_norm == "fused",
            dtype=compute_dtype,
            **options,
        )
    elif backbone in vits:
        options = {"hidden_size": width} if width else {}
        backbone_module = vits[backbone](patch_size=patch_size, dtype=compute_dtype, **options)
    elif backbone == "convnet":
        options = {"widths": (width, 2 * width, 4 * width)} if width else {}
        backbone_module = ConvNet(
            fused_batch_norm=batch_norm == "fused", dtype=compute_dtype, **options
        )
    else:
        known = [*resnets, "convnet", *vits]
        raise ValueError(f"backbone must be one of {known}, got {backbone!r}")

    projector = Projector(
        hidden_dims=tuple(projector_hidden_dims),
        embedding_dim=embedding_dim,
        normalize_output=projector_normalizes_output,
        dtype=compute_dtype,
    )
    head_options: dict[str, Any] = {
        "hidden_dim": head_hidden_dim,
        "dim": embedding_dim,
        "dtype": compute_dtype,
    }
    head_module: nn.Module | None
    if head == "posterior":
        head_module = InferenceNetwork(
            initial_scale=initial_scale,
            min_scale=min_scale,
            isotropic=isotropic,
            has_likelihood_scale=has_likelihood_scale,
            **head_options,
        )
    elif head == "vector":
        head_module = Predictor(**head_options)
    elif head == "direction":
        head_module = DirectionalPredictor(**head_options)
    elif head == "none":
        head_module = None
    else:
        raise ValueError(f"head must be posterior, vector, direction or none, got {head!r}")

    return JointEmbeddingModel(
        backbone=backbone_module,
        projector=projector,
        head=head_module,
        initial_radial_scale=initial_radial_scale if head == "posterior" else None,
        head_input=head_input if head in ("posterior", "direction") else "embedding",
    )


def _conv(features: int, size: int, stride: int, dtype: DTypeLike, name: str) -> nn.Conv:
    # Explicit symmetric padding: with stride 2, "SAME" pads an even image on one side only, unlike
    # torchvision.
    return nn.Conv(
        features,
        (size, size),
        strides=(stride, stride),
        padding=((size // 2, size // 2),) * 2,
        use_bias=False,
        dtype=dtype,
        kernel_init=_CONV_INIT,
        name=name,
    )


def _dense(features: int, dtype: DTypeLike, name: str) -> nn.Dense:
    return nn.Dense(features, use_bias=False, dtype=dtype, kernel_init=_DENSE_INIT, name=name)


def _mlp_batch_norm(
    dtype: DTypeLike, momentum: float, epsilon: float, name: str, *, affine: bool = True
) -> nn.BatchNorm:
    # E[x^2] - E[x]^2 cancels when features hardly vary, which is what a collapsing embedding does:
    # here, where arrays are small, take the two-pass variance. Images keep the one-pass one, which
    # reads their large activations once.
    return nn.BatchNorm(
        momentum=momentum,
        epsilon=epsilon,
        dtype=dtype,
        use_scale=affine,
        use_bias=affine,
        use_fast_variance=False,
        name=name,
    )


def _global_average_pool(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float32).mean(axis=(1, 2))


def _inverse_softplus_above(value: float, minimum: float, *, name: str) -> float:
    """Solves `softplus(raw) + minimum = value` for `raw`, in float64."""
    if not 0 <= minimum < value < math.inf:
        raise ValueError(
            f"{name} must be finite and above its minimum, itself at least 0: got {value} with "
            f"minimum {minimum}"
        )
    excess = value - minimum
    return excess + math.log(-math.expm1(-excess))


def _check_sizes(**sizes: int | Sequence[int]) -> None:
    for name, size in sizes.items():
        values = (size,) if isinstance(size, int) else tuple(size)
        if not values or min(values) < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")


def _check_images(images: jax.Array) -> None:
    if images.ndim != 4:
        raise ValueError(f"images must be [batch, height, width, channels], got {images.shape}")
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise TypeError(
            f"images must be floating point, got {images.dtype}; normalise them first "
            "(jevb_jax.augmentations)"
        )


def _check_features(x: jax.Array, *, train: bool) -> None:
    if x.ndim != 2:
        raise ValueError(f"expected [batch, features], got {x.shape}")
    if train and x.shape[0] < 2:
        raise ValueError(
            f"BatchNorm needs at least 2 examples in a training batch, got {x.shape[0]}: enlarge "
            "the batch, or use train=False"
        )
