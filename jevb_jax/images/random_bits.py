"""Random numbers on the host: a pure function of a seed, a purpose and a number."""

import numpy as np

# One stream of random bits per purpose: the same seed never gives two of them the same numbers.
ORDER, VALIDATION, TRAIN_SUBSET, TEST_SUBSET, DIGITS_TEST, SHAPES = range(6)


def permutation(num_examples: int, seed: int, *purpose: int) -> np.ndarray:
    """The order of examples of a seed and a purpose, int64 `[num_examples]`."""
    return np.argsort(random_bits(num_examples, seed, *purpose), kind="stable")


def random_bits(count: int, seed: int, *purpose: int) -> np.ndarray:
    """uint64 `[count]`; a longer call begins with the same numbers as a shorter one."""
    return np.random.Philox(np.random.SeedSequence(seed, spawn_key=purpose)).random_raw(count)
