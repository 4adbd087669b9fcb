"""Layers that several networks share, and checks of their inputs."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

# He initialization. Convolutions as in torchvision (kaiming_normal, fan_out). MLPs by fan_in, which
# keeps the forward variance when hidden widths differ.
_CONV_INIT = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
_DENSE_INIT = nn.initializers.variance_scaling(2.0, "fan_in", "normal")


def conv_layer(features: int, size: int, stride: int, dtype: DTypeLike, name: str) -> nn.Conv:
    """A convolution without bias, initialized as in residual networks."""
    # Explicit symmetric padding. With stride 2, "SAME" pads an even image on one side only, unlike
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


def dense_layer(features: int, dtype: DTypeLike, name: str) -> nn.Dense:
    """A dense layer with the initialization of all MLPs here."""
    return nn.Dense(features, use_bias=False, dtype=dtype, kernel_init=_DENSE_INIT, name=name)


def mlp_batch_norm(
    dtype: DTypeLike, momentum: float, epsilon: float, name: str, *, affine: bool = True
) -> nn.BatchNorm:
    """BatchNorm between the layers of a projector or a head."""
    # E[x^2] - E[x]^2 cancels if features hardly vary, as in a collapsing embedding. These arrays
    # are small, so we compute the variance in two passes. For images one pass reads the large
    # activations only once.
    return nn.BatchNorm(
        momentum=momentum,
        epsilon=epsilon,
        dtype=dtype,
        use_scale=affine,
        use_bias=affine,
        use_fast_variance=False,
        name=name,
    )


def global_average_pool(x: jax.Array) -> jax.Array:
    """Mean over height and width, `[N, C]`."""
    return x.astype(jnp.float32).mean(axis=(1, 2))


def check_sizes(**sizes: int | Sequence[int]) -> None:
    """Raises ValueError for sizes that are not positive; the message has their names."""
    for name, size in sizes.items():
        values = (size,) if isinstance(size, int) else tuple(size)
        if not values or min(values) < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")


def check_frozen(frozen_stages: int, count: int) -> None:
    """Raises ValueError unless so many of `count` stages or blocks can be frozen."""
    if not 0 <= frozen_stages <= count:
        raise ValueError(
            f"frozen_stages must be from 0 to {count}, the stages or blocks of this network, got "
            f"{frozen_stages}"
        )


def check_images(images: jax.Array) -> None:
    """Raises an error unless the images are `[N, H, W, C]` of a float type."""
    if images.ndim != 4:
        raise ValueError(f"images must be [batch, height, width, channels], got {images.shape}")
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise TypeError(
            f"images must be floating point, got {images.dtype}; normalize them first "
            "(jevb_jax.images.augmentations)"
        )


def check_features(x: jax.Array, *, train: bool) -> None:
    """Raises ValueError unless `x` is `[N, F]`, with at least two examples in training."""
    if x.ndim != 2:
        raise ValueError(f"expected [batch, features], got {x.shape}")
    if train and x.shape[0] < 2:
        raise ValueError(
            f"BatchNorm needs at least 2 examples in a training batch, got {x.shape[0]}: enlarge "
            "the batch, or use train=False"
        )
