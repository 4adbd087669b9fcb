"""Eigenvalues of symmetric matrices in NumPy, without threads that wait for each other."""

import functools

import numpy as np
from threadpoolctl import ThreadpoolController

# Rows. Up to here one thread was faster than two; larger matrices were not measured.
_LARGEST_ON_ONE_THREAD = 512


@functools.cache
def _threads() -> ThreadpoolController:
    return ThreadpoolController()


def eigh(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`numpy.linalg.eigh`, on one thread for a matrix of up to 512 rows.

    OpenBLAS divides small matrices among all threads, too. On two cores, 128 rows then took four
    times the processor time and four times as long, and 512 rows three and two times.

    Args:
      matrix: `[F, F]` float64, symmetric.

    Returns:
      Eigenvalues `[F]` in rising order, and their vectors in the columns of `[F, F]`.

    Raises:
      numpy.linalg.LinAlgError: the algorithm does not converge.
    """
    if len(matrix) > _LARGEST_ON_ONE_THREAD:
        return np.linalg.eigh(matrix)
    with _threads().limit(limits=1, user_api="blas"):
        return np.linalg.eigh(matrix)
