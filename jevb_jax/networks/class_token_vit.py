"""Vision transformers with a class token and learned positions, as timm and DINOv2 publish them."""

import math
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.typing import DTypeLike

from jevb_jax.networks.layers import check_frozen, check_images, check_sizes
from jevb_jax.networks.vit import TransformerBlock, to_patches

Pool = Literal["class", "mean"]
POOLS: tuple[Pool, ...] = get_args(Pool)

_SMALL_NORMAL = nn.initializers.truncated_normal(0.02)


class PatchEmbedding(nn.Module):
    """A linear map of patches, with the kernel of the strided convolution that it is.

    Attributes:
      features: width of the tokens.
      patch_size: height and width of a patch, in pixels.
      dtype: compute type.
    """

    features: int
    patch_size: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, patches: jax.Array) -> jax.Array:
        """Maps `[batch, patches, patch_size**2 * c]` to `[batch, patches, features]`."""
        size = self.patch_size
        shape = (size, size, patches.shape[-1] // size**2, self.features)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
        matrix = kernel.reshape(-1, self.features).astype(self.dtype)
        return patches.astype(self.dtype) @ matrix + bias.astype(self.dtype)[None, None]


class ClassTokenViT(nn.Module):
    """Vision transformer in the form of published weights (arXiv 2010.11929, DeiT, DINOv2).

    It computes what timm's `VisionTransformer` computes: a class token, learned positions, biases
    everywhere, GELU by the error function, LayerNorm with epsilon 1e-6. `networks.vit_names`
    gives its weights timm's names.

    The parameter `positions` `[rows, columns, hidden_size]` has the grid of the image that the
    network was initialized with. For an image of another size, such as a small crop, positions are
    resampled by `resample_matrix`, as timm's `dynamic_img_size` does. The original DINOv2 code
    resamples without antialiasing and with an offset of 0.1 patches; its outputs at other sizes than
    518 pixels differ a little from these.

    Attributes:
      patch_size: height and width of a square patch, in pixels.
      hidden_size: width of the tokens, a multiple of `num_heads`.
      depth: number of blocks.
      num_heads: number of attention heads.
      mlp_ratio: hidden width of the MLP divided by `hidden_size`.
      layer_scale: as for `TransformerBlock`; DINOv2 has it.
      num_registers: further tokens without a position (arXiv 2309.16588). With them, the class token
        has no position either, as in timm.
      pool: the representation is the class token ("class") or the mean of the patches ("mean"), both
        after the final LayerNorm.
      frozen_stages: patches, tokens, positions and so many first blocks get no gradient; 0 is none
        of them.
      dtype: compute type.

    Raises:
      ValueError: a size is below one, `hidden_size` is not such a multiple, `pool` is unknown or
        `frozen_stages` is above `depth`; when called, also if `patch_size` does not divide the sides
        of the image.
    """

    patch_size: int
    hidden_size: int
    depth: int
    num_heads: int
    mlp_ratio: int = 4
    layer_scale: bool = False
    num_registers: int = 0
    pool: Pool = "class"
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
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"hidden_size must be a multiple of num_heads = {self.num_heads}, got "
                f"{self.hidden_size}"
            )
        if self.num_registers < 0:
            raise ValueError(f"num_registers must be at least 0, got {self.num_registers}")
        if self.pool not in POOLS:
            raise ValueError(f"pool must be one of {list(POOLS)}, got {self.pool!r}")
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
        patches = PatchEmbedding(
            self.hidden_size, self.patch_size, self.dtype, name="patch_embedding"
        )(patches)
        positions = self._positions(rows, columns).reshape(1, rows * columns, self.hidden_size)
        first = self._first_tokens().astype(self.dtype)
        first_of_each = jnp.broadcast_to(first[None], (images.shape[0], *first.shape))
        tokens = jnp.concatenate([first_of_each, patches + positions.astype(self.dtype)], axis=1)
        for index in range(self.depth):
            tokens = TransformerBlock(
                num_heads=self.num_heads,
                mlp_dim=self.mlp_ratio * self.hidden_size,
                dtype=self.dtype,
                key_bias=True,
                exact_gelu=True,
                layer_scale=self.layer_scale,
                name=f"block{index + 1}",
            )(tokens)
            if index + 1 == self.frozen_stages:
                tokens = jax.lax.stop_gradient(tokens)
        # The norm acts on each token by itself, so only those that are pooled need it.
        pooled = tokens[:, :1] if self.pool == "class" else tokens[:, first.shape[0] :]
        pooled = nn.LayerNorm(epsilon=1e-6, dtype=jnp.float32, name="final_norm")(pooled)
        return pooled.mean(axis=1)

    def _first_tokens(self) -> jax.Array:
        """The class token with its position, and the registers, `[1 + num_registers, hidden_size]`."""
        size = self.hidden_size
        token = self.param("class_token", nn.initializers.normal(1e-6), (size,), jnp.float32)
        if not self.num_registers:
            return (token + self.param("class_position", _SMALL_NORMAL, (size,), jnp.float32))[None]
        shape = (self.num_registers, size)
        registers = self.param("registers", nn.initializers.normal(1e-6), shape, jnp.float32)
        return jnp.concatenate([token[None], registers])

    def _positions(self, rows: int, columns: int) -> jax.Array:
        """The learned positions for a grid, `[rows, columns, hidden_size]`."""
        if not self.has_variable("params", "positions"):
            shape = (rows, columns, self.hidden_size)
            return self.param("positions", _SMALL_NORMAL, shape, jnp.float32)
        # Not `param`, which would demand the shape of this image.
        learned: jax.Array = self.get_variable("params", "positions")
        if learned.shape[:2] == (rows, columns):
            return learned
        return jnp.einsum(
            "ih,jw,hwd->ijd",
            resample_matrix(learned.shape[0], rows).astype(np.float32),
            resample_matrix(learned.shape[1], columns).astype(np.float32),
            learned,
            precision="highest",
        )


def timm_vit_tiny(
    *, hidden_size: int = 192, num_heads: int = 3, depth: int = 12, **kwargs: Any
) -> ClassTokenViT:
    """The network of timm's `vit_tiny_patch16_224` and `deit_tiny_patch16_224`.

    `kwargs` are other attributes of `ClassTokenViT`.
    """
    return ClassTokenViT(hidden_size=hidden_size, num_heads=num_heads, depth=depth, **kwargs)


def timm_vit_small(
    *, hidden_size: int = 384, num_heads: int = 6, depth: int = 12, **kwargs: Any
) -> ClassTokenViT:
    """The network of timm's `vit_small_patch16_224` and `deit_small_patch16_224`.

    `kwargs` are other attributes of `ClassTokenViT`.
    """
    return ClassTokenViT(hidden_size=hidden_size, num_heads=num_heads, depth=depth, **kwargs)


def dinov2_small(**kwargs: Any) -> ClassTokenViT:
    """The network of DINOv2's `dinov2_vits14`, timm's `vit_small_patch14_dinov2`.

    `kwargs` are other attributes of `ClassTokenViT`.
    """
    return timm_vit_small(layer_scale=True, **kwargs)


def dinov2_small_registers(**kwargs: Any) -> ClassTokenViT:
    """The network of `dinov2_vits14_reg`, timm's `vit_small_patch14_reg4_dinov2`: four registers.

    `kwargs` are other attributes of `ClassTokenViT`.
    """
    return timm_vit_small(layer_scale=True, num_registers=4, **kwargs)


def resample_matrix(old: int, new: int) -> np.ndarray:
    """Weights that resample a row of values, bicubic and antialiased.

    They are those of `torch.nn.functional.interpolate(mode="bicubic", antialias=True)`, the filter of
    timm's `resample_abs_pos_embed`: Keys' cubic with a = -1/2, widened by `old / new` when there are
    fewer new values than old ones. At the border the weights inside are normalized to one.

    Args:
      old: number of values, at least 1.
      new: number of resampled values, at least 1.

    Returns:
      `[new, old]` float64; its rows sum to one. The identity if `old == new`.
    """
    check_sizes(old=old, new=new)
    ratio = old / new
    widening = max(ratio, 1.0)
    centers = (np.arange(new) + 0.5) * ratio
    distances = np.abs(np.arange(old)[None] + 0.5 - centers[:, None]) / widening
    near = (1.5 * distances - 2.5) * distances**2 + 1
    far = ((-0.5 * distances + 2.5) * distances - 4) * distances + 2
    weights = np.where(distances < 1, near, np.where(distances < 2, far, 0.0))
    return weights / weights.sum(axis=1, keepdims=True)


def resample_positions(positions: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Positions for another grid, in float64 on the host.

    Args:
      positions: `[old_rows, old_columns, d]`.
      rows: height of the new grid, in patches.
      columns: its width.

    Returns:
      `[rows, columns, d]` float32.
    """
    old_rows, old_columns, _ = positions.shape
    over_rows = np.tensordot(resample_matrix(old_rows, rows), np.float64(positions), axes=1)
    both = np.einsum("jw,iwd->ijd", resample_matrix(old_columns, columns), over_rows)
    return both.astype(np.float32)


def square_side(num_patches: int) -> int | None:
    """The side of a square grid of so many patches; None where there is none."""
    side = math.isqrt(max(num_patches, 0))
    return side if side > 0 and side * side == num_patches else None
