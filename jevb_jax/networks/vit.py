"""Vision transformers."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.typing import DTypeLike

from jevb_jax.networks.layers import check_frozen, check_images, check_sizes


class TransformerBlock(nn.Module):
    """Pre-norm transformer block: self-attention, then a GELU MLP, each added to its input.

    Attributes:
      num_heads: number of attention heads; must divide the width of the input.
      mlp_dim: hidden width of the MLP.
      dtype: compute type. Attention weights are normalized in float32.
      key_bias: whether keys have a bias. It changes no output; published weights have one.
      exact_gelu: GELU by the error function, not by its approximation with tanh.
      layer_scale: learned factors of what is added to the input, one for each feature
        (LayerScale, arXiv 2103.17239).
    """

    num_heads: int
    mlp_dim: int
    dtype: DTypeLike = jnp.float32
    key_bias: bool = False
    exact_gelu: bool = False
    layer_scale: bool = False

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Maps `[batch, num_tokens, hidden_size]` to the same shape."""
        batch, num_tokens, hidden_size = tokens.shape
        heads = (batch, num_tokens, self.num_heads, hidden_size // self.num_heads)

        x = self._layer_norm("attention_norm")(tokens)
        query = self._dense(hidden_size, "query")(x).reshape(heads)
        # Softmax ignores what all keys have in common, so a key bias would have zero gradient, up
        # to noise that Adam would amplify.
        key = self._dense(hidden_size, "key", use_bias=self.key_bias)(x).reshape(heads)
        value = self._dense(hidden_size, "value")(x).reshape(heads)
        x = jax.nn.dot_product_attention(query, key, value).reshape(tokens.shape)
        x = self._dense(hidden_size, "attention_out")(x)
        tokens = tokens + self._scaled(x, "attention_scale")

        x = self._layer_norm("mlp_norm")(tokens)
        x = self._dense(self.mlp_dim, "mlp_in")(x)
        # Not `nn.gelu(x, approximate=False)`: it uses erfc, which ONNX does not have.
        x = 0.5 * x * (1 + jax.lax.erf(math.sqrt(0.5) * x)) if self.exact_gelu else nn.gelu(x)
        return tokens + self._scaled(self._dense(hidden_size, "mlp_out")(x), "mlp_scale")

    def _scaled(self, x: jax.Array, name: str) -> jax.Array:
        if not self.layer_scale:
            return x
        # The start of DINOv2 and CaiT for deep networks.
        initial = nn.initializers.constant(1e-5)
        scale = self.param(name, initial, (x.shape[-1],), jnp.float32)
        return x * scale.astype(self.dtype)[None, None]

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

    Positions are fixed 2-D sine-cosine embeddings. The output is the mean over tokens, without a
    class token. So no parameter depends on the size of the image, and smaller crops pass through
    the same network. The final LayerNorm has learned gains but no bias: the projector's BatchNorm
    would remove a bias, so that Adam would make it a random walk, an arbitrary offset of the
    representation. With a class token, learned positions at 224 pixels and the two missing kinds of
    bias, the parameter counts would be those of DeiT-Ti/16 and DeiT-S/16.

    Attributes:
      patch_size: height and width of a square patch, in pixels.
      hidden_size: width of the tokens, a multiple of `num_heads` and of 4.
      depth: number of blocks.
      num_heads: number of attention heads.
      mlp_ratio: hidden width of the MLP divided by `hidden_size`.
      frozen_stages: patches and so many first blocks get no gradient; 0 is none of them.
      dtype: compute type.

    Raises:
      ValueError: a size is below one, `hidden_size` is not such a multiple, or `frozen_stages` is
        above `depth`; when called, also if `patch_size` does not divide the sides of the image.
    """

    patch_size: int
    hidden_size: int
    depth: int
    num_heads: int
    mlp_ratio: int = 4
    frozen_stages: int = 0
    dtype: DTypeLike = jnp.float32

    def __post_init__(self) -> None:
        check_sizes(
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
        check_frozen(self.frozen_stages, self.depth)
        super().__post_init__()

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        """Maps images `[batch, h, w, c]` to representations `[batch, hidden_size]`, float32.

        `train` has no effect, because there is neither BatchNorm nor dropout. It is an argument so
        that all backbones are called in the same way.
        """
        del train
        check_images(images)
        patches, rows, columns = to_patches(images, self.patch_size)
        # A strided convolution as a matrix product, so that the initializer uses the fan-in and
        # fan-out of MoCo v3.
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
            if index + 1 == self.frozen_stages:
                tokens = jax.lax.stop_gradient(tokens)
        tokens = nn.LayerNorm(epsilon=1e-6, use_bias=False, dtype=jnp.float32, name="final_norm")(
            tokens
        )
        return tokens.mean(axis=1)


def vit_tiny(*, hidden_size: int = 192, num_heads: int = 3, depth: int = 12, **kwargs: Any) -> ViT:
    """ViT-Tiny: width 192, 3 heads, 12 blocks; `kwargs` are other attributes of `ViT`."""
    return ViT(hidden_size=hidden_size, num_heads=num_heads, depth=depth, **kwargs)


def vit_small(*, hidden_size: int = 384, num_heads: int = 6, depth: int = 12, **kwargs: Any) -> ViT:
    """ViT-Small: width 384, 6 heads, 12 blocks; `kwargs` are other attributes of `ViT`."""
    return ViT(hidden_size=hidden_size, num_heads=num_heads, depth=depth, **kwargs)


def to_patches(images: jax.Array, size: int) -> tuple[jax.Array, int, int]:
    """Cuts images into square patches.

    Args:
      images: `[batch, h, w, c]`.
      size: height and width of a patch, in pixels.

    Returns:
      `[batch, rows * columns, size * size * c]`, row by row, with the number of rows and of columns.

    Raises:
      ValueError: the size does not divide the sides of the image.
    """
    batch, height, width, channels = images.shape
    if height % size or width % size:
        raise ValueError(
            f"patch_size = {size} must divide the sides of the image, got {height}x{width}; "
            "resize or crop the images, or choose another patch_size"
        )
    rows, columns = height // size, width // size
    patches = images.reshape(batch, rows, size, columns, size, channels).swapaxes(2, 3)
    return patches.reshape(batch, rows * columns, size * size * channels), rows, columns


def sincos_position_embedding(rows: int, columns: int, *, dim: int) -> np.ndarray:
    """Fixed 2-D sine-cosine position embedding of a grid of patches (MoCo v3, arXiv 2104.02057).

    The frequencies are `w_k = 10000**(-k / (dim/4))`, `k = 0 ... dim/4 - 1`. The patch in row
    `i` and column `j` gets `[sin(j w), cos(j w), sin(i w), cos(i w)]`. It is computed in float64.

    Args:
      rows: number of rows of patches.
      columns: number of columns of patches.
      dim: width of the embedding, a multiple of 4.

    Returns:
      `[rows * columns, dim]` float32, row by row.
    """
    frequencies = 10_000.0 ** (-np.arange(dim // 4) / (dim // 4))
    row, column = np.indices((rows, columns)).reshape(2, -1, 1) * frequencies
    parts = [np.sin(column), np.cos(column), np.sin(row), np.cos(row)]
    return np.concatenate(parts, axis=1).astype(np.float32)
