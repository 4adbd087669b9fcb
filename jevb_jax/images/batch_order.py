"""The images of each training step: a pure function of seed and step."""

import functools

import numpy as np

from jevb_jax.images.random_bits import ORDER, permutation


def steps_per_epoch(num_examples: int, batch_size: int) -> int:
    """Number of whole batches in an epoch. The remaining examples of the epoch are dropped.

    Raises:
      ValueError: `batch_size` is below 1 or above `num_examples`.
    """
    if batch_size < 1:
        raise ValueError(f"expected batch_size >= 1, got {batch_size}")
    if batch_size > num_examples:
        raise ValueError(
            f"batch_size {batch_size} is larger than the {num_examples} training examples; "
            "choose a smaller batch"
        )
    return num_examples // batch_size


def batch_indices(step: int, *, num_examples: int, batch_size: int, seed: int) -> np.ndarray:
    """The examples of training step `step`, int32 `[batch_size]`.

    Each epoch has its own permutation of all examples, which depends only on `(seed, epoch)`. No
    example occurs twice in an epoch, and the examples dropped at its end change from epoch to
    epoch. The permutation sorts the raw 64-bit output of Philox, which NumPy promises not to change
    (it makes no promise for `Generator.permutation`). So a run resumes in the same order on another
    machine and with another version of NumPy.

    Args:
      step: number of the step, from 0.
      num_examples: size of the training set.
      batch_size: number of examples in a step.
      seed: non-negative integer.

    Raises:
      ValueError: `step` is negative, or for the reasons of `steps_per_epoch`.
    """
    if step < 0:
        raise ValueError(f"expected step >= 0, got {step}")
    epoch, position = divmod(step, steps_per_epoch(num_examples, batch_size))
    order = _epoch_order(num_examples, seed, epoch)
    return order[position * batch_size : (position + 1) * batch_size].copy()


@functools.lru_cache(maxsize=2)  # two, because prefetching may reach into the next epoch
def _epoch_order(num_examples: int, seed: int, epoch: int) -> np.ndarray:
    return permutation(num_examples, seed, ORDER, epoch).astype(np.int32)
