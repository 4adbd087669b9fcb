"""BatchNorm of images with the ReLU after it, and a backward pass that spares memory's bandwidth.

On an accelerator a ResNet's convolutions take half of a step, and most of the other half is passes over
its activations between them. Differentiated term by term, BatchNorm and ReLU make more of them than they
need to: the masked gradient is stored, and its sums are taken in two passes. Here the backward pass is
written out: one pass for both sums, one for the gradient of the input, and nothing stored between them
but at the end of a block, where the shortcut needs the masked gradient anyway. The values are those of
`flax.linen.BatchNorm`, `+ shortcut` and `flax.linen.relu`, bit for bit; gradients differ by rounding.
JAX has no forward mode through a backward pass that is written out: `fused=False` leaves both to JAX.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jax.typing import DTypeLike


def _moments(x: Array) -> tuple[Array, Array]:
    """Mean and biased variance of each channel, at least float32, in one pass: E[x^2] - E[x]^2."""
    axes = tuple(range(x.ndim - 1))
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    mean = jnp.mean(x, axes)
    return mean, jnp.maximum(0.0, jnp.mean(jnp.square(x), axes) - jnp.square(mean))


def _affine(x: Array, mean: Array, var: Array, scale: Array, bias: Array, epsilon: float) -> Array:
    """`(x - mean) / sqrt(var + epsilon) * scale + bias`, in the type of `x`."""
    factor = jax.lax.rsqrt(var + epsilon) * scale
    return (_minus(x, mean) * _along(x, factor) + _along(x, bias)).astype(x.dtype)


def _output(
    x: Array,
    shortcut: Array | None,
    statistics: tuple[Array, Array],
    scale: Array,
    bias: Array,
    epsilon: float,
    relu: bool,
) -> Array:
    """`relu(BatchNorm(x) + shortcut)` with the given mean and variance."""
    y = _affine(x, *statistics, scale, bias, epsilon)
    if shortcut is not None:
        y = y + shortcut
    return nn.relu(y) if relu else y


def _along(x: Array, channels: Array) -> Array:
    """`[channels]` in the rank of `x`."""
    return jnp.expand_dims(channels, tuple(range(x.ndim - 1)))


def _minus(x: Array, mean: Array) -> Array:
    """`x - mean` in the type of the mean."""
    return x - _along(x, mean)


def _plain(
    x: Array, shortcut: Array | None, scale: Array, bias: Array, epsilon: float, relu: bool
) -> tuple[Array, Array, Array]:
    statistics = _moments(x)
    return _output(x, shortcut, statistics, scale, bias, epsilon, relu), *statistics


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def batch_norm(
    x: Array, shortcut: Array | None, scale: Array, bias: Array, epsilon: float, relu: bool
) -> tuple[Array, Array, Array]:
    """`relu(BatchNorm(x) + shortcut)` with the batch's statistics (Ioffe and Szegedy 2015).

    Can be differentiated in reverse mode alone.

    Args:
      x: `[..., channels]`; the statistics are over all axes but the last.
      shortcut: what is added, of the same shape and type, or None.
      scale: `[channels]`.
      bias: `[channels]`.
      epsilon: added to the variance.
      relu: whether the ReLU is applied.

    Returns:
      The output in the type of `x`, and the mean and the biased variance of each channel.
    """
    return _batch_norm_forward(x, shortcut, scale, bias, epsilon, relu)[0]


def _batch_norm_forward(
    x: Array, shortcut: Array | None, scale: Array, bias: Array, epsilon: float, relu: bool
) -> tuple[tuple[Array, Array, Array], Any]:
    y, mean, var = _plain(x, shortcut, scale, bias, epsilon, relu)
    # Without a shortcut the sign of the output is computed again from `x`, which is read anyway.
    return (y, mean, var), (x, None if shortcut is None else y, mean, var, scale, bias)


def _batch_norm_backward(
    epsilon: float, relu: bool, saved: Any, cotangents: tuple[Array, Array, Array]
) -> tuple[Array, Array | None, Array, Array]:
    x, y, mean, var, scale, bias = saved
    # Barriers make the compiler read what is in memory: it would compute `y` again from two arrays.
    x, y = jax.lax.optimization_barrier((x, y))
    axes = tuple(range(x.ndim - 1))
    num = x.size // x.shape[-1]
    inverse_std = jax.lax.rsqrt(var + epsilon)
    gradient, mean_gradient, var_gradient = cotangents

    def before_relu(x: Array, gradient: Array) -> Array:
        if not relu:
            return gradient
        out = _affine(x, mean, var, scale, bias, epsilon) if y is None else y
        return jnp.where(out > 0, gradient, jnp.zeros_like(gradient))

    masked = before_relu(x, gradient)
    bias_gradient = jnp.sum(masked, axes, mean.dtype)
    scale_gradient = jnp.sum(masked * _minus(x, mean), axes) * inverse_std
    if relu and y is None:
        # The barrier has the second pass compute the mask again: stored between the two passes it would
        # cost a write and gain no read.
        x, gradient, bias_gradient, scale_gradient = jax.lax.optimization_barrier(
            (x, gradient, bias_gradient, scale_gradient)
        )
        masked = before_relu(x, gradient)
    # d loss / d x = slope masked + curvature (x - mean) + offset, a channel each.
    slope = scale * inverse_std
    curvature = (2 * var_gradient - slope * inverse_std * scale_gradient) / num
    offset = (mean_gradient - slope * bias_gradient) / num
    x_gradient = _along(x, slope) * masked + _along(x, curvature) * _minus(x, mean)
    x_gradient = (x_gradient + _along(x, offset)).astype(x.dtype)
    return (
        x_gradient,
        None if y is None else masked,
        scale_gradient.astype(scale.dtype),
        bias_gradient.astype(bias.dtype),
    )


batch_norm.defvjp(_batch_norm_forward, _batch_norm_backward)


def _fused(*arguments: Any) -> Any:
    try:
        # Inside of jax.jit the refusal of forward mode comes later, and says less: the setting that
        # mends it is model.batch_norm = "plain" of a config, fused_batch_norm=False of a network.
        return batch_norm(*arguments)
    except TypeError as error:
        if "custom_vjp" not in str(error):
            raise
        raise TypeError(
            "the fused BatchNorm has no forward mode (jax.jvp, jax.jacfwd, jax.linearize): set "
            'model.batch_norm = "plain" in the config, or fused_batch_norm=False of the network'
        ) from error


class BatchNorm(nn.Module):
    """`flax.linen.BatchNorm`'s parameters, statistics and values, with `+ shortcut` and ReLU.

    Attributes:
      momentum: weight of the old running statistics.
      epsilon: added to the variance.
      dtype: type of computation and output; statistics and parameters are float32.
      scale_init: makes the first scales.
      relu: whether the ReLU is applied.
      fused: whether training's backward pass is `batch_norm`'s, in reverse mode alone, or JAX's.
    """

    momentum: float
    epsilon: float
    dtype: DTypeLike
    scale_init: nn.initializers.Initializer = nn.initializers.ones
    relu: bool = True
    fused: bool = True

    @nn.compact
    def __call__(self, x: Array, shortcut: Array | None = None, *, train: bool) -> Array:
        """Maps `[..., channels]` to the same shape.

        Args:
          x: any type; it is rounded to `dtype` first.
          shortcut: added before the ReLU, same shape.
          train: the batch's statistics, and their running update, or the running ones.

        Raises:
          TypeError: forward mode through the fused form.
        """
        shape = x.shape[-1:]
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, shape, jnp.float32)
        running_var = self.variable("batch_stats", "var", jnp.ones, shape, jnp.float32)
        scale = self.param("scale", self.scale_init, shape, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, shape, jnp.float32)
        x = x.astype(self.dtype)
        shortcut = None if shortcut is None else shortcut.astype(self.dtype)
        if not train:
            statistics = (running_mean.value, running_var.value)
            return _output(x, shortcut, statistics, scale, bias, self.epsilon, self.relu)
        form = _fused if self.fused else _plain
        y, mean, var = form(x, shortcut, scale, bias, self.epsilon, self.relu)
        if not self.is_initializing():
            running_mean.value = self._updated(running_mean.value, mean)
            running_var.value = self._updated(running_var.value, var)
        return y

    def _updated(self, old: Array, new: Array) -> Array:
        return self.momentum * old + (1 - self.momentum) * new
