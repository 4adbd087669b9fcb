"""Eigenvalues on one thread: those of SciPy, and no thread setting that stays."""

import numpy as np
import pytest
import scipy.linalg
from threadpoolctl import threadpool_info, threadpool_limits

from jevb_jax.evaluation import symmetric


def threads() -> set[int]:
    return {one["num_threads"] for one in threadpool_info() if one["user_api"] == "blas"}


@pytest.mark.parametrize("size", [1, 7, 128])
def test_it_is_scipys(size):
    rows = np.random.default_rng(0).normal(size=(3 * size, size))
    matrix = rows.T @ rows
    values, vectors = symmetric.eigh(matrix)
    np.testing.assert_allclose(values, scipy.linalg.eigh(matrix, driver="ev")[0], rtol=1e-10)
    np.testing.assert_allclose(vectors * values @ vectors.T, matrix, atol=1e-10 * values[-1])


def test_small_matrices_have_one_thread_and_large_ones_all(monkeypatch):
    seen = []
    real = np.linalg.eigh
    monkeypatch.setattr(np.linalg, "eigh", lambda matrix: (seen.append(threads()), real(matrix))[1])
    monkeypatch.setattr(symmetric, "_LARGEST_ON_ONE_THREAD", 4)
    with threadpool_limits(2, "blas"):
        symmetric.eigh(np.eye(4))
        symmetric.eigh(np.eye(5))
        assert threads() == {2}
    assert seen == [{1}, {2}]


def test_the_threads_come_back_after_an_error(monkeypatch):
    monkeypatch.setattr(np.linalg, "eigh", lambda matrix: 1 / 0)
    with threadpool_limits(2, "blas"):
        with pytest.raises(ZeroDivisionError):
            symmetric.eigh(np.eye(3))
        assert threads() == {2}
