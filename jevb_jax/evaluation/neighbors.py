"""Exact nearest neighbors by cosine, computed in chunks so that memory stays bounded."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from jevb_jax import arguments
from jevb_jax.evaluation.labeled_features import (
    check_same_width,
    features_and_largest,
    result_dtype,
)
from jevb_jax.evaluation.products import exact_matmul

#
# Neighbors are ordered by half of the squared chord, `|u - v|^2 / 2 = 1 - cos`, between directions
# `u` and `v`. A float32 product has an absolute error of 1e-7, so it cannot order neighbors that
# are closer than that (features with a common offset, near duplicates). Therefore float32 products
# only find candidates: they use directions relative to the mean direction of the bank, and each has
# a bound on its error. Differences in float64 then order the candidates. If the bounds do not prove
# that the `k` nearest are among the candidates, the search is repeated in float64, and at last over
# all rows.

# Number of candidates beyond k. With so many, the bounds prove most queries.
_SPARE_CANDIDATES = 16
# How many float64 numbers of candidate rows are gathered at once: 8 MiB, which fit into a cache.
_RANKED_ELEMENTS = 2**20
# Half a squared chord below this is only the rounding of two float64 directions.
_SAME_DIRECTION = 1e-30


def _knn_features(name: str, features: ArrayLike) -> Array:
    """Features that keep float64, with rows scaled so that their squares are finite and not zero.

    Call it under `jax.enable_x64`.
    """
    array = features if hasattr(features, "dtype") else np.asarray(features)
    checked, largest = features_and_largest(name, array)
    largest = largest.astype(np.float64)
    extreme = np.flatnonzero((largest < 2.0**-100) | (largest > 2.0**400))
    if not len(extreme):
        return checked
    # Scale by a power of two, which does not change the direction, and in NumPy, because XLA reads
    # subnormal numbers as zero.
    rows = np.asarray(checked)[extreme]
    _, exponent = np.frexp(np.max(np.abs(rows), axis=-1, keepdims=True))
    return checked.at[extreme].set(np.ldexp(rows, -exponent))


class _Bank(NamedTuple):
    """Rows to search, and what is computed from them once.

    Attributes:
      rows: `[N, F]`.
      inverse_radius: `[N]` float64; 0 for a zero row, which has no direction.
      center: `[F]` float64, mean of the directions of the rows.
    """

    rows: Array
    inverse_radius: Array
    center: Array


def _inverse_radius(rows: Array) -> Array:
    square = jnp.sum(jnp.square(rows.astype(jnp.float64)), axis=-1)
    return jnp.where(square == 0, 0, 1 / jnp.sqrt(jnp.where(square == 0, 1, square)))


def _directions(rows: Array, inverse_radius: Array) -> Array:
    """Directions, `[..., F]` float64; the zero vector for a zero row."""
    return rows.astype(jnp.float64) * inverse_radius[..., None]


@jax.jit
def _prepared(rows: Array) -> _Bank:
    inverse_radius = _inverse_radius(rows)
    total = jnp.sum(_directions(rows, inverse_radius), axis=0)
    return _Bank(rows, inverse_radius, total / jnp.maximum(jnp.sum(inverse_radius > 0), 1))


def _half_squared_chord(query: Array, rows: Array, inverse_radius: Array) -> Array:
    """`1 - cos` between one row and each of `K` others, `[K]` float64.

    The chord has a relative error of 1e-15. The result is rounded to 36 bits, so that rows with the
    same direction and different lengths are a tie.
    """
    query_inverse_radius = _inverse_radius(query)
    query_direction = _directions(query, query_inverse_radius)
    difference = _directions(rows, inverse_radius) - query_direction[None]
    half = jnp.sum(jnp.square(difference), axis=-1) / 2
    half = jnp.where(half < _SAME_DIRECTION, 0, half)
    half = jax.lax.reduce_precision(half, exponent_bits=11, mantissa_bits=36)
    # The cosine with a zero row is zero by definition.
    return jnp.where((inverse_radius == 0) | (query_inverse_radius == 0), 1, half)


def _mapped(function: Any, values: Any, *, size: int) -> Any:
    """Applies `function` to each row of a tree of arrays, in chunks of at most `size` rows.

    All chunks have one size, so that only one program is compiled; a few rows are computed twice.
    """
    num_rows = jax.tree.leaves(values)[0].shape[0]
    num_chunks = -(-num_rows // size)
    size = -(-num_rows // num_chunks)
    rows = jnp.minimum(jnp.arange(num_chunks * size, dtype=jnp.int32), num_rows - 1)

    def of_chunk(rows: Array) -> Any:
        return jax.vmap(function)(jax.tree.map(lambda x: x[rows], values))

    mapped = jax.lax.map(of_chunk, rows.reshape(num_chunks, size))
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:num_rows], mapped)


def _over_bank(
    bank: _Bank, start: Any, first: Any, *, count: int, size: int, of_chunk: Any
) -> tuple[Array, Array]:
    """The `count` rows of the bank with the smallest values; the lower row number wins a tie.

    Args:
      start: initial values, `[count]`, larger than any value of a row.
      first: initial row numbers, `[count]` int32.
      size: number of rows in a chunk.
      of_chunk: `(rows, inverse_radius) -> values [size]`.

    Returns:
      values and row numbers, each `[count]`.
    """
    num_rows = bank.rows.shape[0]
    num_chunks = -(-num_rows // size)
    # Chunks of equal size. Otherwise the last chunk would repeat much of the chunk before it.
    size = -(-num_rows // num_chunks)

    def merge(best: tuple[Array, Array], chunk: Array) -> tuple[tuple[Array, Array], None]:
        # The last chunk starts early enough to be full, so that the bank need not be copied and
        # padded. Rows that it shares with the chunk before it are excluded.
        first_new = chunk * size
        begin = jnp.minimum(first_new, num_rows - size)
        rows = jax.lax.dynamic_slice_in_dim(bank.rows, begin, size)
        values = of_chunk(rows, jax.lax.dynamic_slice_in_dim(bank.inverse_radius, begin, size))
        is_new = begin + jnp.arange(size, dtype=jnp.int32) >= first_new
        values = jnp.where(is_new, values, jnp.inf)
        # `top_k` breaks ties by position. Rows seen before come first here, so the lower row of the
        # bank wins a tie, whatever the chunk size is.
        negative, position = jax.lax.top_k(-values, min(count, size))
        merged = jnp.concatenate([best[0], -negative])
        indices = jnp.concatenate([best[1], begin + position])
        negative, position = jax.lax.top_k(-merged, count)
        return (-negative, indices[position]), None

    chunks = jnp.arange(num_chunks, dtype=jnp.int32)
    return jax.lax.scan(merge, (start, first), chunks)[0]


@functools.partial(
    jax.jit, static_argnames=("k", "num_candidates", "chunk_size", "bank_chunk_size", "dtype")
)
def _search(
    bank: _Bank,
    queries: Array,
    *,
    k: int,
    num_candidates: int,
    chunk_size: int,
    bank_chunk_size: int,
    dtype: Any,
) -> tuple[Array, Array, Array]:
    """Finds the `k` nearest rows of each query by candidates.

    Returns:
      `_half_squared_chord` and row number, each `[M, k]`, and `[M]` bool: whether they are proven
      to be the nearest.
    """
    num_features = queries.shape[1]
    # Bound on the error of a sum of products of rounded numbers, in any order. It is four times the
    # textbook bound, because an accelerator may split a product into several smaller ones.
    gamma = 2 * (num_features + 16) * float(jnp.finfo(dtype).eps)
    direction_error = 2.0**-50

    def centered(rows: Array, inverse_radius: Array) -> tuple[Array, Array]:
        """Directions minus the center, and a lower bound on half of their square."""
        rows = (_directions(rows, inverse_radius) - bank.center[None]).astype(dtype)
        square = jnp.sum(jnp.square(rows), axis=-1)
        return rows, square * (0.5 - gamma) - direction_error * jnp.sqrt(square)

    def candidates(query: Array) -> tuple[Array, Array]:
        """Rows with the smallest lower bounds, and the largest of these bounds."""
        (query,), (query_term,) = centered(query[None], _inverse_radius(query[None]))

        def lower_bounds(rows: Array, inverse_radius: Array) -> Array:
            directions, row_term = centered(rows, inverse_radius)
            lower = row_term + query_term - exact_matmul(directions, query)
            return jnp.where(inverse_radius == 0, 1, lower).astype(jnp.float32)

        lower, index = _over_bank(
            bank,
            jnp.full([num_candidates], jnp.inf, jnp.float32),
            jnp.zeros([num_candidates], jnp.int32),
            count=num_candidates,
            size=bank_chunk_size,
            of_chunk=lower_bounds,
        )
        return lower[-1], index

    def rank(candidate: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        query, bound, index = candidate
        half = _half_squared_chord(query, bank.rows[index], bank.inverse_radius[index])
        half, index = (x[:k] for x in jax.lax.sort((half, index), num_keys=2))
        # Strictly smaller, so that a row outside the candidates is not even a tie.
        bound = bound.astype(jnp.float64)
        is_sure = half[-1] < bound - jnp.abs(bound) * 2.0**-22 - 2 * _SAME_DIRECTION
        # All rows are a tie for a zero query.
        is_zero = _inverse_radius(query) == 0
        index = jnp.where(is_zero, jnp.arange(k, dtype=jnp.int32), index)
        return half, index, is_sure | is_zero | (num_candidates == bank.rows.shape[0])

    bound, index = _mapped(candidates, queries, size=chunk_size)
    ranked_at_once = max(1, min(chunk_size, _RANKED_ELEMENTS // (num_candidates * num_features)))
    return _mapped(rank, (queries, bound, index), size=ranked_at_once)


@functools.partial(jax.jit, static_argnames=("k", "bank_chunk_size"))
def _search_all(
    bank: _Bank, queries: Array, *, k: int, bank_chunk_size: int
) -> tuple[Array, Array]:
    """Finds the `k` nearest rows of each query by `_half_squared_chord` of every row."""

    def of_one_query(query: Array) -> tuple[Array, Array]:
        return _over_bank(
            bank,
            jnp.full([k], jnp.inf, jnp.float64),
            jnp.zeros([k], jnp.int32),
            count=k,
            size=bank_chunk_size,
            of_chunk=functools.partial(_half_squared_chord, query),
        )

    return jax.lax.map(of_one_query, queries)


def _rows_that_can_win(rows: np.ndarray, k: int) -> np.ndarray:
    """Row numbers without the rows that repeat `k` earlier rows, because these win every tie."""
    copies: dict[bytes, int] = {}
    kept = []
    for number, row in enumerate(rows):
        key = row.tobytes()
        count = copies.get(key, 0)
        copies[key] = count + 1
        if count < k:
            kept.append(number)
    return np.array(kept)


def _nearest(
    bank_rows: Array, queries: Array, *, k: int, chunk_size: int, bank_chunk_size: int
) -> tuple[Array, Array]:
    """Half the squared chord and row number of the `k` nearest, each `[M, k]`.

    Call it under `jax.enable_x64`.
    """
    bank = _prepared(bank_rows)
    num_rows, num_queries = bank_rows.shape[0], queries.shape[0]
    chunk_size = min(chunk_size, num_queries)
    settings = {
        "k": k,
        "num_candidates": min(num_rows, k + max(_SPARE_CANDIDATES, k // 8)),
        "chunk_size": chunk_size,
    }
    half, index, is_sure = _search(
        bank,
        queries,
        **settings,
        bank_chunk_size=min(bank_chunk_size, num_rows),
        dtype=jnp.float32,
    )
    left = np.flatnonzero(~np.asarray(is_sure))
    if not len(left):
        return half, index
    all_half, all_index = np.array(half), np.array(index)

    def groups(left: np.ndarray, size: int) -> list[np.ndarray]:
        """Query numbers in groups of one size, so that one program is compiled; the last repeat."""
        padded = np.concatenate([left, np.repeat(left[-1:], -len(left) % size)])
        return list(padded.reshape(-1, size))

    still_left = []
    for group in groups(left, chunk_size):
        all_half[group], all_index[group], is_sure = _search(
            bank,
            queries[group],
            **settings,
            bank_chunk_size=min(-(-bank_chunk_size // 2), num_rows),
            dtype=jnp.float64,
        )
        still_left.append(group[~np.asarray(is_sure)])
    left = np.unique(np.concatenate(still_left))
    if len(left):
        kept = _rows_that_can_win(np.asarray(bank_rows), k)
        bank = _Bank(bank.rows[kept], bank.inverse_radius[kept], bank.center)
        for group in groups(left, min(32, num_queries)):
            all_half[group], position = _search_all(
                bank, queries[group], k=k, bank_chunk_size=min(bank_chunk_size, len(kept))
            )
            all_index[group] = kept[np.asarray(position)]
    return jnp.asarray(all_half), jnp.asarray(all_index)


def checked_nearest(
    names: tuple[str, str],
    bank_features: ArrayLike,
    query_features: ArrayLike,
    *,
    k: int,
    chunk_size: int,
    bank_chunk_size: int,
) -> tuple[Array, Array]:
    """Checks the inputs and returns `_nearest`. Call it under `jax.enable_x64`."""
    chunk_size = arguments.whole_number("chunk_size", chunk_size, at_least=1)
    bank_chunk_size = arguments.whole_number("bank_chunk_size", bank_chunk_size, at_least=1)
    bank = _knn_features(names[0], bank_features)
    queries = _knn_features(names[1], query_features)
    check_same_width(names[0], bank, names[1], queries)
    if k > bank.shape[0]:
        raise ValueError(
            f"k must be between 1 and the size of the bank, {bank.shape[0]}, got {k}: "
            "take a smaller k or a larger bank"
        )
    return _nearest(bank, queries, k=k, chunk_size=chunk_size, bank_chunk_size=bank_chunk_size)


def nearest_neighbours(
    bank_features: ArrayLike,
    query_features: ArrayLike,
    *,
    k: int,
    chunk_size: int = 256,
    bank_chunk_size: int = 65536,
) -> tuple[Array, Array]:
    """The `k` rows of a bank with the largest cosine to each query, exactly.

    Rows are ordered by the cosine in float64, even if features share a large offset or neighbors
    are very close together. Float32 products find candidates, and differences in float64 order
    them. A query whose candidates are not proven to hold all neighbors is searched again in
    float64, and if need be by differences from every row. Therefore crowds of near duplicates take
    up to several times as long.

    Besides the two feature arrays, memory holds `chunk_size x bank_chunk_size` numbers, the
    candidates `[M, k + max(16, k / 8)]`, and 8 MiB. An array `[M, N]` is never built.

    Args:
      bank_features: `[N, F]`, of any length. A zero row has cosine zero with every row.
      query_features: `[M, F]`. Float64 and subnormal numbers keep their precision.
      k: number of neighbors, at most `N`.
      chunk_size: queries compared at once.
      bank_chunk_size: bank rows compared at once.

    Returns:
      cosine: `[M, k]`, in falling order, float32 (float64 for float64 features under x64).
      index: `[M, k]` int32, rows of the bank. The lower row comes first on a tie. Squared chords
        `2 - 2 cos` with a relative difference below 1e-11 are a tie.

    Raises:
      ValueError: `k` is outside `[1, N]`, a chunk size is below one, shapes do not fit, or values
        are not finite.
      TypeError: features are not floating point, or `k` or a chunk size is not a whole number.
    """
    dtype = result_dtype(bank_features, query_features)
    with jax.enable_x64(True):
        half, index = checked_nearest(
            ("bank_features", "query_features"),
            bank_features,
            query_features,
            k=arguments.whole_number("k", k, at_least=1),
            chunk_size=chunk_size,
            bank_chunk_size=bank_chunk_size,
        )
        return (1 - half).astype(dtype), index


def nearest_others(features: ArrayLike) -> np.ndarray:
    """The row nearest to each row by cosine, other than itself, `[N]`.

    Args:
      features: `[N, F]`, `N >= 2`. A copy of a row counts as another row.

    Raises:
      ValueError: there are fewer than two rows, or for the reasons of `nearest_neighbours`.
      TypeError: features are not floating point.
    """
    _, index = nearest_neighbours(features, features, k=2)
    first, second = np.asarray(index).T
    # A row with copies may not be the first, or not even the second, of its own neighbors.
    return np.where(first == np.arange(len(first)), second, first)
