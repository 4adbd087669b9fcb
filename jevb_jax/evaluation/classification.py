"""k-nearest-neighbour and linear classification of frozen features.

Every number is a function of arrays: features `[N, F]`, real and finite, and integer labels `[N]`
in `[0, num_classes)`, gaps allowed. Choices belong to a validation split (`select_linear_probe`); no
function here sees a test split and a choice at once. `knn_protocol` and `linear_protocol` give the
sentence that has to stand beside each number. Inputs are checked by value, so the public functions
are not to be jitted. Settings may be numbers of Python, NumPy or JAX, and any iterable of them.
"""

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple, overload

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.typing import ArrayLike

from jevb_jax import arguments
from jevb_jax.paper import sphere

Solver = Literal["lbfgs", "sgd"]
SOLVER_NAMES: dict[Solver, str] = {"lbfgs": "L-BFGS", "sgd": "SGD"}

# Above 2^28 numbers (1 GiB in float32) of features and logits together, "auto" takes minibatches.
LBFGS_MAX_ELEMENTS = 2**28

# TF32 or bfloat16 products would reorder neighbours and stall L-BFGS on an accelerator.
_matmul = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


@jax.jit
def _largest_of_rows(features: Array) -> Array:
    return jnp.max(jnp.abs(features), axis=-1)


def _num_rows(name: str, features: ArrayLike) -> int:
    shape = np.shape(features)
    if len(shape) != 2 or 0 in shape:
        raise ValueError(f"{name} must be a non-empty [N, F], got shape {shape}")
    return shape[0]


def _checked_features(name: str, features: ArrayLike) -> Array:
    return _features_and_largest(name, features)[0]


def _features_and_largest(name: str, features: ArrayLike) -> tuple[Array, np.ndarray]:
    """Features of float32 at least, and the largest size of a number in each row, `[N]`."""
    dtype = jnp.result_type(features)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(
            f"{name} must be floating point, got {dtype}: cast it, for example to float32"
        )
    num_rows = _num_rows(name, features)
    (checked,) = sphere.at_least_float32(features)
    largest = np.asarray(_largest_of_rows(checked))
    num_bad = int(np.sum(~np.isfinite(largest)))
    if num_bad:
        raise ValueError(
            f"{name} must be finite: {num_bad} of its {num_rows} rows hold NaN or inf. "
            "Look for a diverged network or images of the wrong range"
        )
    return checked, largest


def _integer_labels(name: str, labels: ArrayLike) -> np.ndarray:
    array = np.asarray(labels)
    if not np.issubdtype(array.dtype, np.integer):
        raise TypeError(
            f"{name} must be integers, got {array.dtype}: number the classes, for example by "
            "np.unique(labels, return_inverse=True)[1]"
        )
    return array


def _checked_labels(
    name: str, labels: ArrayLike, *, num_examples: int, num_classes: int
) -> np.ndarray:
    checked = _integer_labels(name, labels)
    if checked.shape != (num_examples,):
        raise ValueError(
            f"{name} must be [{num_examples}], one for each feature row, got shape {checked.shape}"
        )
    num_bad = int(np.sum((checked < 0) | (checked >= num_classes)))
    if num_bad:
        raise ValueError(
            f"{name} must lie in [0, {num_classes}), {num_bad} of {num_examples} do not: leave "
            "unlabelled examples out, or mend num_classes"
        )
    return checked.astype(np.int64)


def _check_same_width(first_name: str, first: Array, second_name: str, second: Array) -> None:
    if first.shape[-1] != second.shape[-1]:
        raise ValueError(
            f"{first_name} and {second_name} must have the same number of features, "
            f"got {first.shape[-1]} and {second.shape[-1]}"
        )


# --- k nearest neighbours -------------------------------------------------------------------------
#
# Neighbours are ordered by half their squared chord, `|u - v|^2 / 2 = 1 - cos`, of the directions `u`
# and `v`. A product of float32 has an absolute error of 1e-7, so it cannot order neighbours that are
# closer together than that: features with a common offset, near duplicates. It therefore only
# proposes candidates, around the bank's mean direction and each with a bound on its error. They are
# ordered by differences in float64, and where the bounds do not show that no other row can be among
# the `k` nearest, the search goes on in float64, and in the end over all rows.

# Candidates beyond k: where neighbours are not crowded, the bounds then settle every query.
_SPARE_CANDIDATES = 16
# Numbers (float64) of candidates' rows that are gathered at once: 8 MiB, which a cache holds.
_RANKED_ELEMENTS = 2**20
# Half a squared chord below this is the rounding of two float64 directions.
_SAME_DIRECTION = 1e-30


def _knn_features(name: str, features: ArrayLike) -> Array:
    """`_checked_features` that keeps float64 and has no row too small or too large to be squared.

    To be called under `jax.enable_x64`.
    """
    array = features if hasattr(features, "dtype") else np.asarray(features)
    checked, largest = _features_and_largest(name, array)
    largest = largest.astype(np.float64)
    extreme = np.flatnonzero((largest < 2.0**-100) | (largest > 2.0**400))
    if not len(extreme):
        return checked
    # By a power of two, which changes no direction, and by NumPy: XLA reads subnormals as zero.
    rows = np.asarray(checked)[extreme]
    _, exponent = np.frexp(np.max(np.abs(rows), axis=-1, keepdims=True))
    return checked.at[extreme].set(np.ldexp(rows, -exponent))


class _Bank(NamedTuple):
    """Rows to search, and what is computed of them once.

    Attributes:
      rows: `[N, F]`.
      inverse_radius: `[N]` float64, 0 for a zero row, which has no direction.
      center: `[F]` float64, mean of the rows' directions.
    """

    rows: Array
    inverse_radius: Array
    center: Array


def _inverse_radius(rows: Array) -> Array:
    square = jnp.sum(jnp.square(rows.astype(jnp.float64)), axis=-1)
    return jnp.where(square == 0, 0, 1 / jnp.sqrt(jnp.where(square == 0, 1, square)))


def _directions(rows: Array, inverse_radius: Array) -> Array:
    """`[..., F]` float64, the zero vector for a zero row."""
    return rows.astype(jnp.float64) * inverse_radius[..., None]


@jax.jit
def _prepared(rows: Array) -> _Bank:
    inverse_radius = _inverse_radius(rows)
    total = jnp.sum(_directions(rows, inverse_radius), axis=0)
    return _Bank(rows, inverse_radius, total / jnp.maximum(jnp.sum(inverse_radius > 0), 1))


def _half_squared_chord(query: Array, rows: Array, inverse_radius: Array) -> Array:
    """`1 - cos` of one row and each of others, `[K]` float64, relative error 1e-15 over the chord.

    Rounded at 36 bits, so that rows of one direction and different lengths are a tie.
    """
    query_inverse_radius = _inverse_radius(query)
    query_direction = _directions(query, query_inverse_radius)
    difference = _directions(rows, inverse_radius) - query_direction[None]
    half = jnp.sum(jnp.square(difference), axis=-1) / 2
    half = jnp.where(half < _SAME_DIRECTION, 0, half)
    half = jax.lax.reduce_precision(half, exponent_bits=11, mantissa_bits=36)
    # The cosine of a zero row is zero by definition.
    return jnp.where((inverse_radius == 0) | (query_inverse_radius == 0), 1, half)


def _mapped(function: Any, values: Any, *, size: int) -> Any:
    """`function` of each row of a tree of arrays, `size` or a few less at a time.

    Chunks are of one size, so that one program is compiled: a few last rows are done twice.
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
    """The `count` rows with the smallest values, the lower row first on a tie.

    Args:
      bank: rows.
      start: values that are not reached, `[count]`.
      first: their rows, `[count]` int32.
      count: how many.
      size: rows at a time.
      of_chunk: `(rows, inverse_radius) -> values [size]`.

    Returns:
      values and rows, each `[count]`.
    """
    num_rows = bank.rows.shape[0]
    num_chunks = -(-num_rows // size)
    # Equal chunks: otherwise the last one, moved back to be full, does again what was done before.
    size = -(-num_rows // num_chunks)

    def merge(best: tuple[Array, Array], chunk: Array) -> tuple[tuple[Array, Array], None]:
        # The last chunk starts early enough to be full, so that the bank is never copied to be
        # padded; the rows that it shares with the chunk before are out of the running.
        first_new = chunk * size
        begin = jnp.minimum(first_new, num_rows - size)
        rows = jax.lax.dynamic_slice_in_dim(bank.rows, begin, size)
        values = of_chunk(rows, jax.lax.dynamic_slice_in_dim(bank.inverse_radius, begin, size))
        is_new = begin + jnp.arange(size, dtype=jnp.int32) >= first_new
        values = jnp.where(is_new, values, jnp.inf)
        # `top_k` breaks ties by position, and the rows seen first stand first: on a tie the
        # lower row of the bank wins, whatever the chunks.
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
    """`_half_squared_chord` and row of the `k` nearest, `[M, k]`, and whether they are sure to be."""
    num_features = queries.shape[1]
    # Of a sum of products of rounded numbers, in any order; four times the textbook's bound, since
    # an accelerator may make a product of several smaller ones.
    gamma = 2 * (num_features + 16) * float(jnp.finfo(dtype).eps)
    direction_error = 2.0**-50

    def centered(rows: Array, inverse_radius: Array) -> tuple[Array, Array]:
        """Directions less the center, and half their square less what it and products can err."""
        rows = (_directions(rows, inverse_radius) - bank.center[None]).astype(dtype)
        square = jnp.sum(jnp.square(rows), axis=-1)
        return rows, square * (0.5 - gamma) - direction_error * jnp.sqrt(square)

    def candidates(query: Array) -> tuple[Array, Array]:
        """Rows with the least lower bounds on half the squared chord, and the largest of these."""
        (query,), (query_term,) = centered(query[None], _inverse_radius(query[None]))

        def lower_bounds(rows: Array, inverse_radius: Array) -> Array:
            directions, row_term = centered(rows, inverse_radius)
            lower = row_term + query_term - _matmul(directions, query)
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
        # Strictly: a row outside may not even be a tie.
        bound = bound.astype(jnp.float64)
        is_sure = half[-1] < bound - jnp.abs(bound) * 2.0**-22 - 2 * _SAME_DIRECTION
        # Every row is a tie for a zero query.
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
    """As `_search`, by `_half_squared_chord` of every row."""

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
    """Row numbers without those that repeat `k` rows before them: these win every tie with them."""
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
    """Half the squared chord and row of the `k` nearest, `[M, k]`; under `jax.enable_x64`."""
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
        """Query numbers, so many at a time; the last are repeated, so that one size is compiled."""
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


def _checked_nearest(
    names: tuple[str, str],
    bank_features: ArrayLike,
    query_features: ArrayLike,
    *,
    k: int,
    chunk_size: int,
    bank_chunk_size: int,
) -> tuple[Array, Array]:
    """`_nearest` of inputs that are not checked yet, likewise under `jax.enable_x64`."""
    chunk_size = arguments.whole_number("chunk_size", chunk_size, at_least=1)
    bank_chunk_size = arguments.whole_number("bank_chunk_size", bank_chunk_size, at_least=1)
    bank = _knn_features(names[0], bank_features)
    queries = _knn_features(names[1], query_features)
    _check_same_width(names[0], bank, names[1], queries)
    if k > bank.shape[0]:
        raise ValueError(
            f"k must be between 1 and the size of the bank, {bank.shape[0]}, got {k}: "
            "take a smaller k or a larger bank"
        )
    return _nearest(bank, queries, k=k, chunk_size=chunk_size, bank_chunk_size=bank_chunk_size)


def _result_type(*features: ArrayLike) -> Any:
    """As `sphere.at_least_float32` has it; to be called outside of `jax.enable_x64`."""
    is_wide = jnp.float64 in map(jnp.result_type, features)
    return jnp.float64 if is_wide else jnp.float32


def nearest_neighbours(
    bank_features: ArrayLike,
    query_features: ArrayLike,
    *,
    k: int,
    chunk_size: int = 256,
    bank_chunk_size: int = 65536,
) -> tuple[Array, Array]:
    """The `k` rows of a bank with the largest cosine to each query, exact.

    The order is that of cosines in float64, whatever features have in common and however near the
    neighbours are: candidates by a product of float32 around the bank's mean direction, ordered by
    differences in float64. A query whose candidates are not certain to hold all neighbours is
    searched for again in float64, and among rows nearer than that, by differences from every row:
    near duplicates in crowds take longer, up to several times.

    Memory beyond the two feature arrays is `chunk_size x bank_chunk_size` numbers, the candidates
    `[M, k + max(16, k / 8)]`, and 8 MiB; `[M, N]` is never built.

    Args:
      bank_features: `[N, F]`, of any length. A zero row has cosine zero to everything.
      query_features: `[M, F]`. float64 is not rounded, nor are subnormal numbers.
      k: neighbours, at most `N`.
      chunk_size: queries compared at once.
      bank_chunk_size: bank rows compared at once.

    Returns:
      cosine: `[M, k]`, in falling order, float32 (float64 of float64 features under x64).
      index: `[M, k]` int32, rows of the bank; on a tie the lower row comes first. Squared chords
        `2 - 2 cos` that agree to 1e-11 of themselves are a tie.

    Raises:
      ValueError: `k` outside `[1, N]`, a chunk size below one, shapes that do not fit, values that
        are not finite (with the number of such rows).
      TypeError: features that are not floating point, a `k` or a chunk size that is not a whole
        number.
    """
    dtype = _result_type(bank_features, query_features)
    with jax.enable_x64(True):
        half, index = _checked_nearest(
            ("bank_features", "query_features"),
            bank_features,
            query_features,
            k=arguments.whole_number("k", k, at_least=1),
            chunk_size=chunk_size,
            bank_chunk_size=bank_chunk_size,
        )
        return (1 - half).astype(dtype), index


@functools.partial(jax.jit, static_argnames=("ks", "num_classes"))
def _vote(
    half_squared_chord: Array,
    neighbour_labels: Array,
    temperature: Array,
    *,
    ks: tuple[int, ...],
    num_classes: int,
) -> Array:
    # Relative to the nearest neighbour: exp(1 / T) overflows float32 once T < 0.012. A difference of
    # chords is one of cosines with the digits that cosines near 1 do not have.
    weights = jnp.exp((half_squared_chord[:, :1] - half_squared_chord) / temperature)
    rows = jnp.arange(weights.shape[0])

    def add_neighbour(votes: Array, neighbour: tuple[Array, Array]) -> tuple[Array, None]:
        label, weight = neighbour
        return votes.at[rows, label].add(weight), None

    # One neighbour at a time: no [M, k, C], one order of summation, every smaller k on the way.
    votes = jnp.zeros([weights.shape[0], num_classes], weights.dtype)
    scores_of_k: dict[int, Array] = {}
    first = 0
    for k in sorted(set(ks)):
        neighbours = (neighbour_labels[:, first:k].T, weights[:, first:k].T)
        votes, _ = jax.lax.scan(add_neighbour, votes, neighbours)
        scores_of_k[k] = votes / jnp.sum(votes, axis=-1, keepdims=True)
        first = k
    return jnp.stack([scores_of_k[k] for k in ks])


class Vote(NamedTuple):
    """How neighbours choose a class.

    Attributes:
      k: neighbours.
      temperature: of the weights `exp(cosine / temperature)`, positive; None counts all alike.
    """

    k: int
    temperature: float | None


def _numbers_of_neighbours(k: Any) -> tuple[int, ...]:
    ks = (k,) if arguments.is_single(k) else arguments.collected("k", k)
    return tuple(arguments.whole_number("k", one, at_least=1) for one in ks)


def _scores_of_present_classes(
    train_features: ArrayLike,
    train_labels: ArrayLike,
    test_features: ArrayLike,
    *,
    num_classes: int,
    votes: Iterable[Vote],
    chunk_size: int,
    bank_chunk_size: int,
) -> tuple[np.ndarray, np.ndarray]:
    """The classes that have a row in the bank, `[P]`, rising, and their shares, `[len(votes), M, P]`.

    In float64, so that neighbours vote by their order however near they are; to be called under
    `jax.enable_x64`.
    """
    checked = _checked_votes(votes)
    labels = _checked_labels(
        "train_labels",
        train_labels,
        num_examples=_num_rows("train_features", train_features),
        num_classes=num_classes,
    )
    half, index = _checked_nearest(
        ("train_features", "test_features"),
        train_features,
        test_features,
        k=max(vote.k for vote in checked),
        chunk_size=chunk_size,
        bank_chunk_size=bank_chunk_size,
    )
    # Only these can win, and the labels may be numbers of a database, in the millions.
    present, number = np.unique(labels, return_inverse=True)
    neighbour_labels = number.astype(np.int32)[np.asarray(index)]
    scores = np.empty([len(checked), len(half), len(present)])
    for temperature in {vote.temperature for vote in checked}:
        places = [i for i, vote in enumerate(checked) if vote.temperature == temperature]
        scores[places] = _vote(
            half,
            neighbour_labels,
            np.asarray(np.inf if temperature is None else temperature, half.dtype),
            ks=tuple(checked[place].k for place in places),
            num_classes=len(present),
        )
    return present, scores


def _votes(k: int | Iterable[int], temperature: float | None) -> tuple[Vote, ...]:
    return tuple(Vote(one, temperature) for one in _numbers_of_neighbours(k))


def _checked_votes(votes: Iterable[Vote]) -> list[Vote]:
    return [
        Vote(arguments.whole_number("k", k, at_least=1), _checked_temperature(temperature))
        for k, temperature in arguments.collected("votes", votes)
    ]


def _checked_temperature(temperature: float | None) -> float | None:
    if temperature is None:
        return None
    checked = arguments.positive_number("temperature", temperature)
    if checked < np.finfo(np.float64).tiny:  # which XLA takes for zero
        raise ValueError(f"temperature must be at least 2.3e-308, got {checked}")
    return checked


def _predicted_labels(
    train_features: ArrayLike, train_labels: ArrayLike, test_features: ArrayLike, **settings: Any
) -> np.ndarray:
    """Labels with the most votes, `[len(votes), M]` int64; see `_scores_of_present_classes`."""
    with jax.enable_x64(True):
        present, scores = _scores_of_present_classes(
            train_features, train_labels, test_features, **settings
        )
        return present[np.argmax(scores, axis=-1)]


def knn_class_scores(
    train_features: ArrayLike,
    train_labels: ArrayLike,
    test_features: ArrayLike,
    *,
    num_classes: int,
    k: int | Iterable[int],
    temperature: float | None = 0.1,
    chunk_size: int = 256,
    bank_chunk_size: int = 65536,
) -> Array:
    """Share of the votes of the `k` nearest neighbours for each class.

    A neighbour votes with weight `exp(cosine / temperature)` (Wu et al. 2018, section 3.4; also
    DINO, whose temperature is 0.07), or all votes count alike.

    Args:
      train_features: `[N, F]`, the bank.
      train_labels: `[N]`.
      test_features: `[M, F]`.
      num_classes: `C`, above every label.
      k: neighbours, one number or any iterable of them; several cost one search, at the largest.
      temperature: of the votes, positive; None counts them alike.
      chunk_size: test rows compared at once.
      bank_chunk_size: bank rows compared at once.

    Returns:
      `[M, C]`, each row summing to one; for several `k`, `[len(k), M, C]`.

    Raises:
      ValueError: `temperature` not positive, labels out of range, no `k`; as `nearest_neighbours`.
      TypeError: labels that are not integers, features that are not floating point, settings that
        are no numbers.
    """
    num_classes = arguments.whole_number("num_classes", num_classes, at_least=1, at_most=2**31 - 1)
    dtype = _result_type(train_features, test_features)
    with jax.enable_x64(True):
        present, scores = _scores_of_present_classes(
            train_features,
            train_labels,
            test_features,
            num_classes=num_classes,
            votes=_votes(k, temperature),
            chunk_size=chunk_size,
            bank_chunk_size=bank_chunk_size,
        )
        all_scores = np.zeros([*scores.shape[:-1], num_classes], dtype)
        all_scores[..., present] = scores
        return jnp.asarray(all_scores[0] if arguments.is_single(k) else all_scores)


def knn_predict(
    train_features: ArrayLike,
    train_labels: ArrayLike,
    test_features: ArrayLike,
    *,
    num_classes: int,
    k: int | Iterable[int],
    temperature: float | None = 0.1,
    chunk_size: int = 256,
    bank_chunk_size: int = 65536,
) -> Array:
    """Class with the most votes, see `knn_class_scores`, the lowest of them on a tie.

    Args:
      train_features: see `knn_class_scores`, also for all that follow.
      train_labels: `[N]`.
      test_features: `[M, F]`.
      num_classes: `C`.
      k: one number or any iterable of them.
      temperature: as in `knn_class_scores`; None counts all votes alike.
      chunk_size: test rows compared at once.
      bank_chunk_size: bank rows compared at once.

    Returns:
      `[M]` int32; for several `k`, `[len(k), M]`.

    Raises:
      ValueError: as `knn_class_scores`.
      TypeError: as `knn_class_scores`.
    """
    num_classes = arguments.whole_number("num_classes", num_classes, at_least=1, at_most=2**31 - 1)
    predictions = jnp.asarray(
        _predicted_labels(
            train_features,
            train_labels,
            test_features,
            num_classes=num_classes,
            votes=_votes(k, temperature),
            chunk_size=chunk_size,
            bank_chunk_size=bank_chunk_size,
        ),
        jnp.int32,
    )
    return predictions[0] if arguments.is_single(k) else predictions


@overload
def knn_accuracy(
    train_features: ArrayLike,
    train_labels: ArrayLike,
    test_features: ArrayLike,
    test_labels: ArrayLike,
    *,
    num_classes: int,
    k: int,
    temperature: float | None = ...,
    chunk_size: int = ...,
    bank_chunk_size: int = ...,
) -> float: ...


@overload
def knn_accuracy(
    train_features: ArrayLike,
    train_labels: ArrayLike,
    test_features: ArrayLike,
    test_labels: ArrayLike,
    *,
    num_classes: int,
    k: Iterable[int],
    temperature: float | None = ...,
    chunk_size: int = ...,
    bank_chunk_size: int = ...,
) -> tuple[float, ...]: ...


def knn_accuracy(
    train_features: ArrayLike,
    train_labels: ArrayLike,
    test_features: ArrayLike,
    test_labels: ArrayLike,
    *,
    num_classes: int,
    k: int | Iterable[int],
    temperature: float | None = 0.1,
    chunk_size: int = 256,
    bank_chunk_size: int = 65536,
) -> float | tuple[float, ...]:
    """Share of the test rows that `knn_predict` gets right.

    Args:
      train_features: see `knn_class_scores`, also for all that follow.
      train_labels: `[N]`.
      test_features: `[M, F]`.
      test_labels: `[M]`.
      num_classes: `C`.
      k: one number or any iterable of them.
      temperature: as in `knn_class_scores`; None counts all votes alike.
      chunk_size: test rows compared at once.
      bank_chunk_size: bank rows compared at once.

    Returns:
      Accuracy in [0, 1]; for several `k`, one for each in their order.

    Raises:
      ValueError: as `knn_class_scores`, and for labels out of range.
      TypeError: as `knn_class_scores`.
    """
    accuracies = knn_accuracies(
        train_features,
        train_labels,
        test_features,
        test_labels,
        num_classes=num_classes,
        votes=_votes(k, temperature),
        chunk_size=chunk_size,
        bank_chunk_size=bank_chunk_size,
    )
    return accuracies[0] if arguments.is_single(k) else accuracies


def knn_accuracies(
    train_features: ArrayLike,
    train_labels: ArrayLike,
    test_features: ArrayLike,
    test_labels: ArrayLike,
    *,
    num_classes: int,
    votes: Sequence[Vote],
    chunk_size: int = 256,
    bank_chunk_size: int = 65536,
) -> tuple[float, ...]:
    """`knn_accuracy` by several kinds of votes, for which the neighbours are searched once.

    Args:
      train_features: see `knn_class_scores`, also for all that follow.
      train_labels: `[N]`.
      test_features: `[M, F]`.
      test_labels: `[M]`.
      num_classes: `C`.
      votes: at least one.
      chunk_size: test rows compared at once.
      bank_chunk_size: bank rows compared at once.

    Returns:
      Accuracies in [0, 1], one for each kind of votes.

    Raises:
      ValueError: as `knn_class_scores`, and for labels out of range.
      TypeError: as `knn_class_scores`.
    """
    num_classes = arguments.whole_number("num_classes", num_classes, at_least=1)
    labels = _checked_labels(
        "test_labels",
        test_labels,
        num_examples=_num_rows("test_features", test_features),
        num_classes=num_classes,
    )
    predictions = _predicted_labels(
        train_features,
        train_labels,
        test_features,
        num_classes=num_classes,
        votes=votes,
        chunk_size=chunk_size,
        bank_chunk_size=bank_chunk_size,
    )
    return tuple(float(np.mean(prediction == labels)) for prediction in predictions)


def _accuracy(predictions: ArrayLike, labels: ArrayLike) -> float:
    return float(np.mean(np.asarray(predictions) == np.asarray(labels)))


# --- linear probe ---------------------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LinearProbe:
    """Multinomial logistic regression on standardised features, and how its fit ended.

    Attributes:
      weights: `[F, C]`, for standardised features.
      bias: `[C]`.
      feature_mean: `[F]`, of the training features.
      feature_std: `[F]`, of the training features; 1 for a feature that is constant there.
      gradient_norm: `[]`, of the penalised mean cross-entropy over the training set, at the end.
      converged: `[]` bool, whether `gradient_norm` came under the tolerance. SGD seldom gets there.
      num_iterations: `[]` int, L-BFGS iterations or SGD steps.
      solver: "lbfgs" or "sgd".
    """

    weights: Array
    bias: Array
    feature_mean: Array
    feature_std: Array
    gradient_norm: Array
    converged: Array
    num_iterations: Array
    solver: Solver = dataclasses.field(metadata={"static": True})


class _Parameters(NamedTuple):
    weights: Array
    bias: Array


class _Standardisation(NamedTuple):
    mean: Array
    std: Array

    def __call__(self, features: Array) -> Array:
        """Features of mean 0 and deviation 1."""
        return (features - self.mean[None]) / self.std[None]


def _times_power_of_two(x: Array, exponent: Array) -> Array:
    """`x 2^exponent`, in two steps: the power itself may be no number of the type."""
    half = exponent // 2
    return jnp.ldexp(jnp.ldexp(x, half), exponent - half)


@jax.jit
def _standardisation(features: Array) -> _Standardisation:
    """Statistics over rows, `[F]`; features that vary by rounding error only count as constant."""
    # Divided by a power of two, which rounds nothing: squares would overflow or vanish.
    largest = jnp.max(jnp.abs(features), axis=0)
    _, exponent = jnp.frexp(largest)
    exponent = jnp.where(largest > 0, exponent, 0)
    features = _times_power_of_two(features, -exponent[None])
    # Measured from the first row: a constant feature is then exactly zero, however long the sum.
    offset = features[0]
    shifted = features - offset[None]
    shifted_mean = jnp.mean(shifted, axis=0)
    std = jnp.sqrt(jnp.mean(jnp.square(shifted - shifted_mean[None]), axis=0))
    rounding = 10 * float(jnp.finfo(features.dtype).eps) * jnp.max(jnp.abs(features), axis=0)
    return _Standardisation(
        mean=_times_power_of_two(offset + shifted_mean, exponent),
        std=jnp.where(std <= rounding, jnp.ones_like(std), _times_power_of_two(std, exponent)),
    )


def _logits(parameters: _Parameters, standardised: Array) -> Array:
    return _matmul(standardised, parameters.weights) + parameters.bias[None]


def _cross_entropy(parameters: _Parameters, standardised: Array, labels: Array) -> Array:
    """`log sum_c exp(z_c - z_y)`, `[N]`, of logits `z`, with digits however near 0 it is.

    `logsumexp(z) - z_y` errs by 1e-7 of `z`, more than the value on features that separate the classes:
    the line search of L-BFGS then finds no way down, and the fit stalls short of its tolerance.
    """
    logits = _logits(parameters, standardised)
    is_label = labels[:, None] == jnp.arange(logits.shape[-1])[None]
    margin = logits - jnp.sum(jnp.where(is_label, logits, 0), axis=-1, keepdims=True)
    # Any number gives the same value and gradient; the largest margin, at least 0, does not overflow.
    largest = jax.lax.stop_gradient(jnp.max(margin, axis=-1))
    others = jnp.sum(jnp.where(is_label, 0, jnp.exp(margin - largest[:, None])), axis=-1)
    return largest + jnp.log1p(others + jnp.expm1(-largest))


def _penalty(parameters: _Parameters, l2_regularization: Array) -> Array:
    return l2_regularization / 2 * jnp.sum(jnp.square(parameters.weights))


@jax.jit
def _fit_lbfgs(
    initial: _Parameters,
    features: Array,
    labels: Array,
    standardise: _Standardisation,
    l2_regularization: Array,
    tolerance: Array,
    max_iterations: Array,
) -> tuple[_Parameters, Array, Array]:
    standardised = standardise(features)

    def objective(parameters: _Parameters) -> Array:
        cross_entropy = _cross_entropy(parameters, standardised, labels)
        return jnp.mean(cross_entropy) + _penalty(parameters, l2_regularization)

    optimizer = optax.lbfgs()
    value_and_grad = optax.value_and_grad_from_state(objective)

    def gradient_norm(state: optax.OptState) -> Array:
        return optax.tree.norm(optax.tree.get(state, "grad"))

    def is_unfinished(carry: tuple[_Parameters, optax.OptState]) -> Array:
        _, state = carry
        num_iterations = optax.tree.get(state, "count")
        is_far = (num_iterations == 0) | (gradient_norm(state) > tolerance)
        return is_far & (num_iterations < max_iterations)

    def iterate(
        carry: tuple[_Parameters, optax.OptState],
    ) -> tuple[_Parameters, optax.OptState]:
        parameters, state = carry
        value, gradient = value_and_grad(parameters, state=state)
        updates, state = optimizer.update(
            gradient, state, parameters, value=value, grad=gradient, value_fn=objective
        )
        return optax.tree.add(parameters, updates), state

    parameters, state = jax.lax.while_loop(
        is_unfinished, iterate, (initial, optimizer.init(initial))
    )
    return parameters, gradient_norm(state), optax.tree.get(state, "count")


def _largest_eigenvalue(key: Array, features: Array, standardise: _Standardisation) -> Array:
    """Of the correlation matrix of the features, by power iteration, `[]`."""

    def correlate(_: int, vector: Array) -> Array:
        # X (v / std) - <mean, v / std> is the standardised product without a standardised copy.
        scaled = vector / standardise.std
        product = _matmul(features, scaled) - jnp.vdot(standardise.mean, scaled)
        back = _matmul(product, features) - jnp.sum(product) * standardise.mean
        image = back / standardise.std / features.shape[0]
        return image / jnp.maximum(jnp.linalg.norm(vector), float(jnp.finfo(vector.dtype).tiny))

    start = jax.random.normal(key, [features.shape[1]], features.dtype)
    return jnp.linalg.norm(jax.lax.fori_loop(0, 20, correlate, start))


@functools.partial(jax.jit, static_argnames=("num_epochs", "batch_size"))
def _fit_sgd(
    initial: _Parameters,
    features: Array,
    labels: Array,
    standardise: _Standardisation,
    l2_regularization: Array,
    key: Array,
    *,
    num_epochs: int,
    batch_size: int,
) -> tuple[_Parameters, Array]:
    num_examples = features.shape[0]
    steps_per_epoch = -(-num_examples // batch_size)
    num_padded = steps_per_epoch * batch_size - num_examples

    def batches(order: Array) -> tuple[Array, Array]:
        """Every example once: rows and weights, each `[steps_per_epoch, batch_size]`."""
        row = jnp.pad(order, (0, num_padded)).reshape(steps_per_epoch, batch_size)
        weight = jnp.pad(jnp.ones(num_examples, features.dtype), (0, num_padded))
        return row, weight.reshape(steps_per_epoch, batch_size)

    def objective(parameters: _Parameters, row: Array, weight: Array) -> Array:
        cross_entropy = _cross_entropy(parameters, standardise(features[row]), labels[row])
        # Over batch_size, not over the sum of weights: a short last batch counts for its examples
        # only.
        return jnp.vdot(weight, cross_entropy) / batch_size + _penalty(
            parameters, l2_regularization
        )

    eigenvalue_key, order_key = jax.random.split(key)
    # The Hessian of the softmax cross-entropy is at most half the correlation matrix (Böhning
    # 1992); the bias adds an eigenvalue of one half. A step of one over that bound is stable under
    # momentum 0.9.
    largest_eigenvalue = _largest_eigenvalue(eigenvalue_key, features, standardise)
    curvature = jnp.maximum(largest_eigenvalue, 1) / 2 + l2_regularization
    decay = optax.cosine_decay_schedule(1.0, num_epochs * steps_per_epoch)
    optimizer = optax.sgd(lambda step: decay(step) / curvature, momentum=0.9)

    def step(
        carry: tuple[_Parameters, optax.OptState], batch: tuple[Array, Array]
    ) -> tuple[tuple[_Parameters, optax.OptState], None]:
        parameters, state = carry
        gradient = jax.grad(objective)(parameters, *batch)
        updates, state = optimizer.update(gradient, state, parameters)
        return (optax.tree.add(parameters, updates), state), None

    def run_epoch(
        epoch: int, carry: tuple[_Parameters, optax.OptState]
    ) -> tuple[_Parameters, optax.OptState]:
        order = jax.random.permutation(jax.random.fold_in(order_key, epoch), num_examples)
        return jax.lax.scan(step, carry, batches(order))[0]

    parameters, _ = jax.lax.fori_loop(0, num_epochs, run_epoch, (initial, optimizer.init(initial)))

    def add_gradient(total: _Parameters, batch: tuple[Array, Array]) -> tuple[_Parameters, None]:
        row, weight = batch

        def summed(p: _Parameters) -> Array:
            return jnp.vdot(weight, _cross_entropy(p, standardise(features[row]), labels[row]))

        return optax.tree.add(total, jax.grad(summed)(parameters)), None

    zeros = optax.tree.zeros_like(parameters)
    total, _ = jax.lax.scan(add_gradient, zeros, batches(jnp.arange(num_examples)))
    weights_gradient = total.weights / num_examples + l2_regularization * parameters.weights
    gradient = _Parameters(weights_gradient, total.bias / num_examples)
    return parameters, optax.tree.norm(gradient)


class _ProbeSettings(NamedTuple):
    num_classes: int
    solver: Solver | Literal["auto"]
    max_iterations: int
    tolerance: float
    num_epochs: int
    batch_size: int
    seed: int


def _checked_settings(**settings: Any) -> _ProbeSettings:
    if settings["solver"] not in ("auto", *SOLVER_NAMES):
        raise ValueError(
            f"solver must be one of {('auto', *SOLVER_NAMES)}, got {settings['solver']!r}"
        )
    whole_numbers = {
        "num_classes": (2, 2**31 - 1),
        "max_iterations": (1, 2**31 - 1),
        "num_epochs": (1, None),
        "batch_size": (1, None),
        "seed": (0, arguments.LARGEST_SEED),
    }
    for name, (at_least, at_most) in whole_numbers.items():
        settings[name] = arguments.whole_number(
            name, settings[name], at_least=at_least, at_most=at_most
        )
    settings["tolerance"] = arguments.positive_number("tolerance", settings["tolerance"])
    return _ProbeSettings(**settings)


def _checked_strength(value: Any) -> float:
    strength = arguments.real_number("l2_regularization", value)
    if not (strength >= 0 and np.isfinite(strength)):
        raise ValueError(f"l2_regularization must be at least 0 and finite, got {strength}")
    return strength


def _checked_probe_labels(
    name: str, labels: ArrayLike, features: Array, settings: _ProbeSettings
) -> Array:
    """Labels, int32, of a probe whose weights have a use for the memory that they take."""
    num_classes = settings.num_classes
    checked = _checked_labels(name, labels, num_examples=features.shape[0], num_classes=num_classes)
    num_present = len(np.unique(checked))
    num_weights = features.shape[1] * num_classes
    if num_weights > LBFGS_MAX_ELEMENTS and num_present < num_classes / 10:
        raise ValueError(
            f"num_classes = {num_classes:,} makes {num_weights:,} weights, and {name} hold "
            f"{num_present:,} classes: number these from 0, for example by "
            "np.unique(labels, return_inverse=True)[1]"
        )
    return jax.device_put(checked.astype(np.int32))


def _fit(
    features: Array,
    labels: Array,
    standardise: _Standardisation,
    initial: _Parameters,
    *,
    l2_regularization: float,
    settings: _ProbeSettings,
) -> LinearProbe:
    """One fit on inputs that are checked already."""
    num_examples, num_features = features.shape
    spread = float(np.max(np.asarray(standardise.std)))
    if spread > float(jnp.finfo(features.dtype).max) / 8:  # whose inverse may be taken for zero
        raise ValueError(
            f"features vary by up to {spread:.3g}, too much for {features.dtype}: divide them by one "
            "number"
        )
    solver = settings.solver
    if solver == "auto":
        num_elements = num_examples * (num_features + settings.num_classes)
        solver = "lbfgs" if num_elements <= LBFGS_MAX_ELEMENTS else "sgd"
    l2, tolerance, max_iterations = jax.device_put(
        (
            np.asarray(l2_regularization, features.dtype),
            np.asarray(settings.tolerance, features.dtype),
            np.asarray(settings.max_iterations, np.int32),
        )
    )
    if solver == "lbfgs":
        parameters, gradient_norm, num_iterations = _fit_lbfgs(
            initial,
            features,
            labels,
            standardise,
            l2,
            tolerance,
            max_iterations,
        )
    else:
        batch_size = min(settings.batch_size, num_examples)
        parameters, gradient_norm = _fit_sgd(
            initial,
            features,
            labels,
            standardise,
            l2,
            jax.random.key(settings.seed),
            num_epochs=settings.num_epochs,
            batch_size=batch_size,
        )
        num_iterations = jnp.asarray(
            settings.num_epochs * -(-num_examples // batch_size), jnp.int32
        )
    if not np.isfinite(np.asarray(gradient_norm)):
        raise ValueError(
            f"the fit by {SOLVER_NAMES[solver]} left the numbers of {features.dtype}: divide the "
            "features by one number, or lower l2_regularization"
        )
    return LinearProbe(
        weights=parameters.weights,
        bias=parameters.bias,
        feature_mean=standardise.mean,
        feature_std=standardise.std,
        gradient_norm=gradient_norm,
        converged=gradient_norm <= tolerance,
        num_iterations=num_iterations,
        solver=solver,
    )


def _zero_parameters(features: Array, num_classes: int) -> _Parameters:
    return _Parameters(
        weights=jax.device_put(np.zeros([features.shape[1], num_classes], features.dtype)),
        bias=jax.device_put(np.zeros([num_classes], features.dtype)),
    )


def fit_linear_probe(
    features: ArrayLike,
    labels: ArrayLike,
    *,
    num_classes: int,
    l2_regularization: float,
    solver: Solver | Literal["auto"] = "auto",
    max_iterations: int = 1000,
    tolerance: float = 1e-5,
    num_epochs: int = 100,
    batch_size: int = 1024,
    seed: int = 0,
) -> LinearProbe:
    """Multinomial logistic regression on standardised features.

    Minimises `mean cross-entropy + l2_regularization / 2 * |weights|^2`; the bias is not penalised.
    That is scikit-learn's `LogisticRegression(C=1 / (N * l2_regularization))`. Features are
    standardised by the mean and standard deviation of `features`.

    Args:
      features: `[N, F]`, on the device as a whole.
      labels: `[N]`. A class without examples is allowed; its bias then only falls until the
        tolerance.
      num_classes: `C`, at least 2 and above every label. The probe has weights for each of them,
        so labels with gaps of millions are to be numbered first.
      l2_regularization: at least 0. At 0 the optimum of separable data lies at infinity, and the
        fit ends wherever the gradient falls under the tolerance.
      solver: "lbfgs" (full batch, two arrays `[N, F]` and several `[N, C]` in memory), "sgd"
        (minibatches, momentum 0.9, cosine decay from one over the bound on the curvature), or
        "auto", which takes SGD when features and logits together exceed `LBFGS_MAX_ELEMENTS`
        numbers.
      max_iterations: L-BFGS stops there, with `converged` false.
      tolerance: L-BFGS stops at this gradient norm. The objective is then within
        `tolerance^2 / (2 l2_regularization)` of its minimum. In float32, 1e-6 may be out of reach.
      num_epochs: of SGD, each visiting every example once.
      batch_size: of SGD.
      seed: of SGD's order.

    Returns:
      `LinearProbe`.

    Raises:
      ValueError: shapes that do not fit, values that are not finite, labels or settings out of
        range, a fit that overflows.
      TypeError: features that are not floating point, labels that are not integers.
    """
    settings = _checked_settings(
        num_classes=num_classes,
        solver=solver,
        max_iterations=max_iterations,
        tolerance=tolerance,
        num_epochs=num_epochs,
        batch_size=batch_size,
        seed=seed,
    )
    strength = _checked_strength(l2_regularization)
    x = _checked_features("features", features)
    y = _checked_probe_labels("labels", labels, x, settings)
    return _fit(
        x,
        y,
        _standardisation(x),
        _zero_parameters(x, settings.num_classes),
        l2_regularization=strength,
        settings=settings,
    )


def probe_logits(probe: LinearProbe, features: ArrayLike) -> Array:
    """Logits of a probe.

    Args:
      probe: fitted on features of the same width.
      features: `[M, F]`.

    Returns:
      `[M, C]`.

    Raises:
      ValueError: another number of features than the probe's, values that are not finite.
      TypeError: features that are not floating point.
    """
    x = _checked_features("features", features)
    _check_same_width("features", x, "the probe's weights", probe.weights.T)
    standardise = _Standardisation(probe.feature_mean, probe.feature_std)
    return _standardised_logits(_Parameters(probe.weights, probe.bias), standardise, x)


@jax.jit
def _standardised_logits(
    parameters: _Parameters, standardise: _Standardisation, features: Array
) -> Array:
    return _logits(parameters, standardise(features))


def probe_accuracy(probe: LinearProbe, features: ArrayLike, labels: ArrayLike) -> float:
    """Share of rows whose largest logit is the label's; the lowest class wins a tie.

    Args:
      probe: fitted on features of the same width.
      features: `[M, F]`.
      labels: `[M]`.

    Returns:
      Accuracy in [0, 1].

    Raises:
      ValueError: as `probe_logits`, and for labels out of range.
      TypeError: as `probe_logits`, and for labels that are not integers.
    """
    logits = probe_logits(probe, features)
    num_examples, num_classes = logits.shape
    checked = _checked_labels("labels", labels, num_examples=num_examples, num_classes=num_classes)
    return _accuracy(np.argmax(np.asarray(logits), axis=-1), checked)


class GridPoint(NamedTuple):
    """One regularisation strength tried.

    Attributes:
      l2_regularization: the strength.
      validation_accuracy: in [0, 1].
      converged: whether the fit reached its tolerance.
      num_iterations: of its fit, from the warm start.
    """

    l2_regularization: float
    validation_accuracy: float
    converged: bool
    num_iterations: int


class ProbeSelection(NamedTuple):
    """A probe whose regularisation was chosen on a validation split.

    Attributes:
      probe: the chosen one; fitted on the training split, or on both where `refit` was asked for.
      l2_regularization: the chosen strength.
      validation_accuracy: in [0, 1], of the chosen strength fitted on the training split alone. It
        is optimistic, being the largest of the grid: report test accuracy.
      grid: every strength tried, from the strongest to the weakest.
    """

    probe: LinearProbe
    l2_regularization: float
    validation_accuracy: float
    grid: tuple[GridPoint, ...]


def select_linear_probe(
    train_features: ArrayLike,
    train_labels: ArrayLike,
    validation_features: ArrayLike,
    validation_labels: ArrayLike,
    *,
    num_classes: int,
    l2_grid: Iterable[float] = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1e0),
    refit: bool = False,
    solver: Solver | Literal["auto"] = "auto",
    max_iterations: int = 1000,
    tolerance: float = 1e-5,
    num_epochs: int = 100,
    batch_size: int = 1024,
    seed: int = 0,
) -> ProbeSelection:
    """Linear probe with the regularisation that classifies a validation split best.

    The strengths are fitted from the strongest to the weakest, each from the solution before; the
    problem being convex, that saves time and changes no optimum. On a tie the strongest wins.

    Args:
      train_features: `[N, F]`.
      train_labels: `[N]`.
      validation_features: `[V, F]`, carved from the training data, disjoint from `train_features`.
      validation_labels: `[V]`.
      num_classes: `C`.
      l2_grid: strengths to try, at least one, in any iterable.
      refit: fit the chosen strength once more on both splits together. Leave it off where the
        labels are counted (`labels_per_class_subset`): it would spend the validation labels as
        well.
      solver: see `fit_linear_probe`, also for all that follow.
      max_iterations: of L-BFGS.
      tolerance: of L-BFGS.
      num_epochs: of SGD.
      batch_size: of SGD.
      seed: of SGD.

    Returns:
      `ProbeSelection`.

    Raises:
      ValueError: an empty grid; as `fit_linear_probe`.
      TypeError: as `fit_linear_probe`.
    """
    settings = _checked_settings(
        num_classes=num_classes,
        solver=solver,
        max_iterations=max_iterations,
        tolerance=tolerance,
        num_epochs=num_epochs,
        batch_size=batch_size,
        seed=seed,
    )
    strengths = [_checked_strength(one) for one in arguments.collected("l2_grid", l2_grid)]
    train_x = _checked_features("train_features", train_features)
    train_y = _checked_probe_labels("train_labels", train_labels, train_x, settings)
    validation_x = _checked_features("validation_features", validation_features)
    validation_y = _checked_labels(
        "validation_labels",
        validation_labels,
        num_examples=validation_x.shape[0],
        num_classes=settings.num_classes,
    ).astype(np.int32)
    _check_same_width("train_features", train_x, "validation_features", validation_x)

    standardise = _standardisation(train_x)
    parameters = _zero_parameters(train_x, settings.num_classes)
    grid: list[GridPoint] = []
    probes: list[LinearProbe] = []
    for l2_regularization in sorted(strengths, reverse=True):
        probe = _fit(
            train_x,
            train_y,
            standardise,
            parameters,
            l2_regularization=l2_regularization,
            settings=settings,
        )
        parameters = _Parameters(probe.weights, probe.bias)
        probes.append(probe)
        grid.append(
            GridPoint(
                l2_regularization=l2_regularization,
                validation_accuracy=probe_accuracy(probe, validation_x, validation_y),
                converged=bool(probe.converged),
                num_iterations=int(probe.num_iterations),
            )
        )
    # `max` keeps the first of equals, the strongest.
    best = max(range(len(grid)), key=lambda i: grid[i].validation_accuracy)
    probe = probes[best]
    if refit:
        both_x = jnp.concatenate([train_x, validation_x])
        probe = _fit(
            both_x,
            jnp.concatenate([train_y, validation_y]),
            _standardisation(both_x),
            _Parameters(probe.weights, probe.bias),
            l2_regularization=grid[best].l2_regularization,
            settings=settings,
        )
    return ProbeSelection(
        probe=probe,
        l2_regularization=grid[best].l2_regularization,
        validation_accuracy=grid[best].validation_accuracy,
        grid=tuple(grid),
    )


def labels_per_class_subset(labels: ArrayLike, *, labels_per_class: int, seed: int) -> np.ndarray:
    """Rows of a random subset with the same number of labels for each class.

    Args:
      labels: `[N]` integers, at least 0: leave unlabelled examples out. The classes are those
        present.
      labels_per_class: how many of each.
      seed: of the draw, at least 0; the same seed gives the same rows.

    Returns:
      Rising row numbers, `[labels_per_class * number of classes]` int64.

    Raises:
      ValueError: a class with fewer labels (named), negative labels, no labels, settings out of
        range.
      TypeError: labels or settings that are not integers.
    """
    labels_per_class = arguments.whole_number("labels_per_class", labels_per_class, at_least=1)
    seed = arguments.whole_number("seed", seed, at_least=0)
    array = _integer_labels("labels", labels)
    if array.ndim != 1 or not array.size or array.min() < 0:
        raise ValueError(
            "labels must be a non-empty [N] of at least 0 (leave unlabelled examples out), "
            f"got shape {array.shape}{f' with minimum {array.min()}' if array.size else ''}"
        )
    classes, counts = np.unique(array, return_counts=True)
    too_few = {int(c): int(n) for c, n in zip(classes, counts, strict=True) if n < labels_per_class}
    if too_few:
        named = dict(list(too_few.items())[:10])
        more = f" and {len(too_few) - 10:,} more" if len(too_few) > 10 else ""
        raise ValueError(
            f"every class needs {labels_per_class} labels; these classes (with their counts) have "
            f"fewer: {named}{more}. Ask for at most {counts.min()}"
        )
    generator = np.random.default_rng(seed)
    rows = [
        generator.choice(np.flatnonzero(array == c), labels_per_class, replace=False)
        for c in classes
    ]
    return np.sort(np.concatenate(rows))


# --- protocol strings -----------------------------------------------------------------------------


class Split(NamedTuple):
    """A set of examples as a protocol names it.

    Attributes:
      name: for example "train split".
      num_examples: how many.
    """

    name: str
    num_examples: int

    def __str__(self) -> str:
        return f"{self.name} ({self.num_examples:,})"


def knn_protocol(
    *, k: int, temperature: float | None, bank: Split, evaluated: Split, features: str = "features"
) -> str:
    """The sentence beside a k-NN accuracy.

    Args:
      k: neighbours.
      temperature: of the votes; None counts them alike.
      bank: examples that vote.
      evaluated: examples that the accuracy is of.
      features: which features, for example "representation".

    Returns:
      One line: "k-NN cosine, k=20, T=0.1, un-augmented features, bank=train split (1,294),
      evaluated on test (360)".
    """
    votes = "uniform votes" if temperature is None else f"T={temperature:g}"
    return (
        f"k-NN cosine, k={k}, {votes}, un-augmented {features}, bank={bank}, "
        f"evaluated on {evaluated}"
    )


def linear_protocol(
    *,
    solver: Solver,
    l2_regularization: float,
    num_strengths: int,
    fitted: Split,
    validation: Split,
    evaluated: Split,
    features: str = "features",
) -> str:
    """The sentence beside a linear accuracy.

    Args:
      solver: "lbfgs" or "sgd", whichever fitted it.
      l2_regularization: the chosen strength.
      num_strengths: size of the grid that it was chosen from.
      fitted: examples that the final probe was fitted on; say in its name when they are a subset,
        for example "10 labels per class of the train split, seed 0".
      validation: examples that chose the strength.
      evaluated: examples that the accuracy is of.
      features: which features, for example "representation".

    Returns:
      One line: "linear (multinomial logistic regression, L-BFGS), un-augmented standardised
      features, l2=0.001 of 6 chosen on validation (143), fitted on train split (1,294), evaluated
      on test (360)".
    """
    return (
        f"linear (multinomial logistic regression, {SOLVER_NAMES[solver]}), un-augmented "
        f"standardised {features}, l2={l2_regularization:g} of {num_strengths} chosen on "
        f"{validation}, fitted on {fitted}, evaluated on {evaluated}"
    )
