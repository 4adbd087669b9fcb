"""Residual networks, and a small convolutional network."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from jevb_jax.networks.batch_norm import BatchNorm
from jevb_jax.networks.layers import (
    check_frozen,
    check_images,
    check_sizes,
    conv_layer,
    global_average_pool,
)


class ResidualBlock(nn.Module):
    """One residual block: `relu(shortcut(x) + branch(x))` (He et al. 2015, arXiv 1512.03385).

    The basic form is 3x3 (stride), 3x3. The bottleneck form is 1x1, 3x3 (stride), 1x1 to four times
    `features`; the stride is on the 3x3 convolution as in torchvision ("v1.5"). The shortcut is the
    identity if shapes agree, otherwise a strided 1x1 convolution and BatchNorm.

    Attributes:
      features: width of the 3x3 convolutions.
      stride: spatial stride of the block.
      bottleneck: whether to build the bottleneck form.
      zero_init_residual: whether the last BatchNorm of the branch starts with scale zero and not
        one (Goyal et al. 2017, arXiv 1706.02677). The block then starts as `relu(shortcut(x))`.
      fused_batch_norm: whether BatchNorm and ReLU have their own backward pass. It makes a step a
        few percent faster, but allows reverse mode only. Otherwise JAX differentiates them, in
        forward mode too. Values are the same; gradients differ by rounding.
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
        return conv_layer(features, size, stride, self.dtype, name)

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
    """ResNet without its classifier, with torchvision's layout and paddings.

    Attributes:
      stage_sizes: number of blocks in each stage. Each stage after the first halves the image and
        doubles the width.
      bottleneck: bottleneck blocks (ResNet-50) or basic ones (ResNet-18, 34).
      stem: "imagenet" (7x7 stride 2, 3x3 max-pool stride 2), or "cifar" (3x3 stride 1, no pool) for
        images of about 32 pixels, for which "imagenet" would leave one pixel to the last stage.
      width: width of the stem and of the first stage.
      zero_init_residual: as for `ResidualBlock`.
      fused_batch_norm: as for `ResidualBlock`.
      frozen_stages: the stem and so many first stages get no gradient, and their BatchNorm uses and
        keeps its running statistics; 0 is none of them, not even the stem.
      dtype: compute type.
      bn_momentum: weight of the old running statistics.
      bn_epsilon: added to the variance.

    Raises:
      ValueError: `stem` is unknown, there is no stage, a size is below one, or `frozen_stages` is
        above the number of stages.
    """

    stage_sizes: Sequence[int]
    bottleneck: bool
    stem: str
    width: int = 64
    zero_init_residual: bool = False
    fused_batch_norm: bool = True
    frozen_stages: int = 0
    dtype: DTypeLike = jnp.float32
    bn_momentum: float = 0.9
    bn_epsilon: float = 1e-5

    def __post_init__(self) -> None:
        if self.stem not in ("cifar", "imagenet"):
            raise ValueError(f'stem must be "cifar" or "imagenet", got {self.stem!r}')
        check_sizes(stage_sizes=self.stage_sizes, width=self.width)
        check_frozen(self.frozen_stages, len(self.stage_sizes))
        super().__post_init__()

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        """Maps images `[batch, h, w, c]` to representations `[batch, features]`, float32.

        `features` is `width * 2**(stages - 1)`, and four times that with bottlenecks: 512 for
        ResNet-18, 2048 for ResNet-50.
        """
        check_images(images)
        imagenet = self.stem == "imagenet"
        size, stride = (7, 2) if imagenet else (3, 1)
        x = conv_layer(self.width, size, stride, self.dtype, "stem_conv")(images)
        batch_norm = BatchNorm(
            self.bn_momentum,
            self.bn_epsilon,
            self.dtype,
            fused=self.fused_batch_norm,
            name="stem_bn",
        )
        x = batch_norm(x, train=train and not self.frozen_stages)
        if imagenet:
            # Flax annotates `padding` as a string but documents pairs, which it pads with -inf.
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
                )(x, train=train and stage >= self.frozen_stages)
            if stage + 1 == self.frozen_stages:
                x = jax.lax.stop_gradient(x)
        return global_average_pool(x)


def resnet8(**kwargs: Any) -> ResNet:
    """ResNet-8 for small images: basic blocks (1, 1, 1); `kwargs` are attributes of `ResNet`."""
    return ResNet(stage_sizes=(1, 1, 1), bottleneck=False, **kwargs)


def resnet18(**kwargs: Any) -> ResNet:
    """ResNet-18: basic blocks (2, 2, 2, 2); `kwargs` are other attributes of `ResNet`."""
    return ResNet(stage_sizes=(2, 2, 2, 2), bottleneck=False, **kwargs)


def resnet34(**kwargs: Any) -> ResNet:
    """ResNet-34: basic blocks (3, 4, 6, 3); `kwargs` are other attributes of `ResNet`."""
    return ResNet(stage_sizes=(3, 4, 6, 3), bottleneck=False, **kwargs)


def resnet50(**kwargs: Any) -> ResNet:
    """ResNet-50: bottleneck blocks (3, 4, 6, 3); `kwargs` are other attributes of `ResNet`."""
    return ResNet(stage_sizes=(3, 4, 6, 3), bottleneck=True, **kwargs)


class ConvNet(nn.Module):
    """Small plain network for 8x8 to 28x28 images: stages of 3x3 convolution, BatchNorm, ReLU.

    The first stage keeps the resolution, and each later stage halves it. With the defaults an 8x8
    image is processed at 8, 4 and 2 pixels, and a 28x28 image at 28, 14 and 7. The receptive field
    is 23 pixels.

    Attributes:
      widths: width of each stage.
      convs_per_stage: convolutions in a stage; the first has the stride.
      fused_batch_norm: as for `ResidualBlock`.
      frozen_stages: as for `ResNet`; there is no stem.
      dtype: compute type.
      bn_momentum: weight of the old running statistics.
      bn_epsilon: added to the variance.

    Raises:
      ValueError: there is no stage, a size is below one, or `frozen_stages` is above the number of
        stages.
    """

    widths: Sequence[int] = (32, 64, 128)
    convs_per_stage: int = 2
    fused_batch_norm: bool = True
    frozen_stages: int = 0
    dtype: DTypeLike = jnp.float32
    bn_momentum: float = 0.9
    bn_epsilon: float = 1e-5

    def __post_init__(self) -> None:
        check_sizes(widths=self.widths, convs_per_stage=self.convs_per_stage)
        check_frozen(self.frozen_stages, len(self.widths))
        super().__post_init__()

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        """Maps images `[batch, h, w, c]` to representations `[batch, widths[-1]]`, float32."""
        check_images(images)
        x = images
        for stage, features in enumerate(self.widths):
            for index in range(self.convs_per_stage):
                suffix = f"{stage + 1}_{index + 1}"
                stride = 2 if stage > 0 and index == 0 else 1
                x = conv_layer(features, 3, stride, self.dtype, f"conv{suffix}")(x)
                batch_norm = BatchNorm(
                    self.bn_momentum,
                    self.bn_epsilon,
                    self.dtype,
                    fused=self.fused_batch_norm,
                    name=f"bn{suffix}",
                )
                x = batch_norm(x, train=train and stage >= self.frozen_stages)
            if stage + 1 == self.frozen_stages:
                x = jax.lax.stop_gradient(x)
        return global_average_pool(x)
