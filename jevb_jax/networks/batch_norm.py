"""BatchNorm of images with the ReLU after it, and a backward pass that reads memory less often.

On an accelerator, convolutions take half of a ResNet's step. Most of the other half is passes over
the activations between them. If JAX differentiates BatchNorm and ReLU term by term, there are more
passes than necessary: the masked gradient is stored, and its sums take two passes. Here the
backward pass is written by hand: one pass for both sums, and one for the gradient of the input.
Nothing is stored between them, except at the end of a block, where the shortcut needs the masked
gradient anyway. Values equal those of `flax.linen.BatchNorm`, `+ shortcut` and `flax.linen.relu`
bit for bit; gradients differ by rounding. A function with its own backward pass has no forward mode
in JAX; `fused=False` leaves differentiation to JAX.
"""

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jax.typing import DTypeLike


def _moments(x: Array) -> tuple[Array, Array]:
    """Mean and biased variance E[x^2] - E[x]^2 of each channel, in one pass, at least float32."""
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
    """Reshapes `[channels]` to broadcast against `x`."""
    return jnp.expand_dims(channels, tuple(range(x.ndim - 1)))


def _minus(x: Array, mean: Array) -> Array:
    """`x - mean`, in the type of the mean."""
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
    """`relu(BatchNorm(x) + shortcut)` with the statistics of the batch (Ioffe and Szegedy 2015).

    Only reverse-mode differentiation is possible.

    Args:
      x: `[..., channels]`. Statistics are over all axes but the last.
      shortcut: added to the normalized values, with the shape and type of `x`; or None.
      scale: `[channels]`.
      bias: `[channels]`.
      epsilon: added to the variance.
      relu: whether the ReLU is applied.

    Returns:
      The output in the type of `x`, and the mean and biased variance of each channel.
    """
    return _batch_norm_forward(x, shortcut, scale, bias, epsilon, relu)[0]


def _batch_norm_forward(
    x: Array, shortcut: Array | None, scale: Array, bias: Array, epsilon: float, relu: bool
) -> tuple[tuple[Array, Array, Array], Any]:
    y, mean, var = _plain(x, shortcut, scale, bias, epsilon, relu)
    # Without a shortcut, the backward pass recomputes the output's sign from `x`, which it reads
    # anyway.
    return (y, mean, var), (x, None if shortcut is None else y, mean, var, scale, bias)


def _batch_norm_backward(
    epsilon: float, relu: bool, saved: Any, cotangents: tuple[Array, Array, Array]
) -> tuple[Array, Array | None, Array, Array]:
    x, y, mean, var, scale, bias = saved
    # Without the barrier the compiler would recompute `y` from two arrays, not read it from memory.
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
        # The barrier makes the second pass recompute the mask. Storing it between the passes would
        # cost a write and save no read.
        x, gradient, bias_gradient, scale_gradient = jax.lax.optimization_barrier(
            (x, gradient, bias_gradient, scale_gradient)
        )
        masked = before_relu(x, gradient)
    # d loss / d x = slope * masked + curvature * (x - mean) + offset, for each channel.
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
        # Inside of jax.jit the error for forward mode comes later and is less clear. The remedy is
        # the same: model.batch_norm = "plain" in a config, fused_batch_norm=False for a network.
        return batch_norm(*arguments)
    except TypeError as error:
        if "custom_vjp" not in str(error):
            raise
        raise TypeError(
            "the fused BatchNorm has no forward mode (jax.jvp, jax.jacfwd, jax.linearize); set "
            'model.batch_norm = "plain" in the config, or fused_batch_norm=False for the network'
        ) from error


class BatchNorm(nn.Module):
    """`flax.linen.BatchNorm`, `+ shortcut` and ReLU, with the same parameters and values.

    Attributes:
      momentum: weight of the old running statistics.
      epsilon: added to the variance.
      dtype: type of computation and output. Statistics and parameters are float32.
      scale_init: initializer of the scales.
      relu: whether the ReLU is applied.
      fused: whether training uses the backward pass of `batch_norm` (reverse mode only) or JAX's.
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
          x: any type; it is first rounded to `dtype`.
          shortcut: added before the ReLU; same shape.
          train: if True, use the statistics of the batch and update the running ones; if False, use
            the running ones.

        Raises:
          TypeError: forward-mode differentiation of the fused form.
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


def each_view_alone(num_views: int) -> AbstractContextManager[None]:
    """In this context, BatchNorm normalizes each view of a joint batch by itself, for training.

    It holds for every BatchNorm module, ours and Flax's, that is called with the statistics of the
    batch. All other layers treat examples one by one, so a joint pass equals a pass of each view.
    Running statistics take up view after view, as the passes do.

    Only BatchNorm is mapped over views. If the whole network were, JAX would put the views of a
    convolution before its examples, and XLA would gather a batch that lies on several devices.

    Args:
      num_views: the batch has all views of the first example, then those of the second, and so on.
    """

    def intercept(
        call: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext
    ) -> Any:
        module = context.module
        is_batch_norm = isinstance(module, BatchNorm | nn.BatchNorm)
        is_one_view = not isinstance(module.parent, nn.Module)  # the call of `alone`, below
        # A frozen stage reads its running statistics, and leaves them.
        is_frozen = kwargs.get("train") is False
        if not is_batch_norm or is_one_view or is_frozen or context.method_name != "__call__":
            return call(*args, **kwargs)
        alone = module.clone(parent=None)
        params = {"params": module.variables["params"]} if "params" in module.variables else {}
        running = module.variables["batch_stats"]
        zeros = jax.tree.map(jnp.zeros_like, running)

        def one_view(*arrays: Array) -> Any:
            return alone.apply(
                {**params, "batch_stats": zeros}, *arrays, **kwargs, mutable=["batch_stats"]
            )

        views = [array.reshape(-1, num_views, *array.shape[1:]) for array in args]
        y, updated = jax.vmap(one_view, in_axes=1, out_axes=(1, 0))(*views)
        for name, old in running.items():
            for share in updated["batch_stats"][name]:  # (1 - momentum) times a view's statistic
                old = module.momentum * old + share
            module.put_variable("batch_stats", name, old)
        return y.reshape(args[0].shape)

    return nn.intercept_methods(intercept)


def check_group_size(bn_group_size: int, num_examples: int) -> None:
    """Refuses groups of one example and groups that do not divide the examples.

    Args:
      bn_group_size: how many examples BatchNorm takes together.
      num_examples: how many it sees at once.

    Raises:
      ValueError: with both numbers.
    """
    if bn_group_size < 2 or num_examples % bn_group_size:
        raise ValueError(
            f"train.bn_group_size = {bn_group_size} must be at least 2 and divide the {num_examples} "
            "examples that BatchNorm sees at once (batch_size / num_micro_batches), or be 0"
        )
