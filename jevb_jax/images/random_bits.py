"""Random numbers on the host: a pure function of a seed and of what they are used for."""

import numpy as np

# One stream of random bits for each purpose, so that one seed never gives the same numbers to two.
ORDER, VALIDATION, TRAIN_SUBSET, TEST_SUBSET, DIGITS_TEST, SHAPES = range(6)


def permutation(num_examples: int, seed: int, *purpose: int) -> np.ndarray:
    """A random order of examples, int64 `[num_examples]`."""
    return np.argsort(random_bits(num_examples, seed, *purpose), kind="stable")


def random_bits(count: int, seed: int, *purpose: int) -> np.ndarray:
    """uint64 `[count]`. A longer call starts with the same numbers as a shorter one."""
    return np.random.Philox(np.random.SeedSequence(seed, spawn_key=purpose)).random_raw(count)
