"""Which images a step sees: a pure function of seed and step."""

import functools

import numpy as np

from jevb_jax.images.random_bits import ORDER, permutation


def steps_per_epoch(num_examples: int, batch_size: int) -> int:
    """Returns the number of whole batches in an epoch; what remains of its order is dropped.

    Raises:
        ValueError: `batch_size` is below 1 or above `num_examples`.
    """
    if batch_size < 1:
        raise ValueError(f"expected batch_size >= 1, got {batch_size}")
    if batch_size > num_examples:
        raise ValueError(
            f"batch_size {batch_size} is larger than the {num_examples} training examples: "
            "choose a smaller batch"
        )
    return num_examples // batch_size


def batch_indices(step: int, *, num_examples: int, batch_size: int, seed: int) -> np.ndarray:
    """Returns the examples of training step `step`, a pure function of its arguments.

    Epoch `step // steps_per_epoch` has its own permutation of all examples, a pure function of
    `(seed, epoch)`; no example comes twice in an epoch, and the few that are dropped at its end
    differ from epoch to epoch. The permutation sorts Philox's raw 64-bit output, which NumPy
    guarantees not to change (it gives no guarantee for `Generator.permutation`), so that a run
    resumes in the same order on another machine or NumPy version.

    Args:
        step: number of the step, from 0.
        num_examples: size of the training set.
        batch_size: number of examples in a step.
        seed: non-negative integer.

    Returns:
        int32 `[batch_size]`.

    Raises:
        ValueError: negative step, or as `steps_per_epoch`.
    """
    if step < 0:
        raise ValueError(f"expected step >= 0, got {step}")
    epoch, position = divmod(step, steps_per_epoch(num_examples, batch_size))
    order = _epoch_order(num_examples, seed, epoch)
    return order[position * batch_size : (position + 1) * batch_size].copy()


@functools.lru_cache(maxsize=2)  # two, because prefetching straddles the border of epochs
def _epoch_order(num_examples: int, seed: int, epoch: int) -> np.ndarray:
    return permutation(num_examples, seed, ORDER, epoch).astype(np.int32)
