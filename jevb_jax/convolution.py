"""The convolution of the networks, in chunks of images where a CPU needs that."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

# XLA's kernel gradient on a CPU falls off a cliff where a batch outgrows the cache: of a 3x3
# convolution of 64 channels at 32x32, one core makes 26 Gflop/s with 16 images (4 MiB) and 5 with 64.
_MAX_CHUNK_BYTES = 4 * 2**20

# Each chunk is compiled.
_MAX_CHUNKS = 32


def alone_on_a_cpu() -> bool:
    """Whether one CPU device is all there is."""
    return jax.default_backend() == "cpu" and jax.device_count() == 1


def chunk_images(num_images: int, image_bytes: int, *, max_bytes: int, max_chunks: int) -> int:
    """How many images go through a convolution at once.

    Args:
      num_images: of the batch, at least one.
      image_bytes: of the larger of a convolution's input and output, one image, positive.
      max_bytes: of a chunk, unless one image has more or there were more than `max_chunks`.
      max_chunks: at least one.

    Returns:
      From one to `num_images`.
    """
    fitting = max(1, max_bytes // image_bytes)
    return min(num_images, max(fitting, math.ceil(num_images / max_chunks)))


def chunked_convolution(
    x: jax.Array,
    kernel: jax.Array,
    window_strides: Sequence[int],
    padding: Any,
    *,
    max_bytes: int = _MAX_CHUNK_BYTES,
    max_chunks: int = _MAX_CHUNKS,
    **options: Any,
) -> jax.Array:
    """`lax.conv_general_dilated` of consecutive chunks of the batch, one after the other.

    Values are those of the whole batch; gradients too, except that the kernel's is summed chunk by
    chunk. A training step of ResNet-18 (width 64, CIFAR stem) on one core took 0.53 of the time at a
    batch of 64. Chunks are written out: inside a loop XLA's CPU convolutions are ten times slower.

    Args:
      x: images `[batch, height, width, channels]`.
      kernel: as `lax.conv_general_dilated` takes it, like the other arguments.
      window_strides: of the convolution.
      padding: of the convolution.
      max_bytes: of float32 values in the larger of a chunk's input and output.
      max_chunks: however large the batch.
      **options: of `lax.conv_general_dilated`.

    Returns:
      The convolution of the whole batch.
    """

    def convolve(images: jax.Array) -> jax.Array:
        return lax.conv_general_dilated(images, kernel, window_strides, padding, **options)

    # A serving form is exported for any size of batch, and needs no gradient.
    if not isinstance(x.shape[0], int):
        return convolve(x)
    output = jax.eval_shape(convolve, x)
    # XLA computes bfloat16 in float32 on a CPU.
    image_bytes = 4 * max(math.prod(x.shape[1:]), math.prod(output.shape[1:]))
    size = chunk_images(x.shape[0], image_bytes, max_bytes=max_bytes, max_chunks=max_chunks)
    if size == x.shape[0]:
        return convolve(x)
    return jnp.concatenate([convolve(x[i : i + size]) for i in range(0, x.shape[0], size)])


def convolution(
    x: jax.Array, kernel: jax.Array, window_strides: Sequence[int], padding: Any, **options: Any
) -> jax.Array:
    """`chunked_convolution` where that is faster, on one CPU device; else `lax.conv_general_dilated`.

    A batch that lies on several devices is not cut: its chunks would have to move between them.
    """
    convolve = chunked_convolution if alone_on_a_cpu() else lax.conv_general_dilated
    return convolve(x, kernel, window_strides, padding, **options)
