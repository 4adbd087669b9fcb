"""k-NN classification: votes of the nearest neighbors."""

import functools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from jevb_jax import arguments
from jevb_jax.evaluation.labeled_features import Split, checked_labels, number_of_rows, result_dtype
from jevb_jax.evaluation.neighbors import checked_nearest


@functools.partial(jax.jit, static_argnames=("ks", "num_classes"))
def _vote(
    half_squared_chord: Array,
    neighbour_labels: Array,
    temperature: Array,
    *,
    ks: tuple[int, ...],
    num_classes: int,
) -> Array:
    # Relative to the nearest neighbor: exp(1 / T) overflows float32 once T < 0.012. A difference of
    # chords is one of cosines with the digits that cosines near 1 do not have.
    weights = jnp.exp((half_squared_chord[:, :1] - half_squared_chord) / temperature)
    rows = jnp.arange(weights.shape[0])

    def add_neighbour(votes: Array, neighbour: tuple[Array, Array]) -> tuple[Array, None]:
        label, weight = neighbour
        return votes.at[rows, label].add(weight), None

    # One neighbor at a time: no [M, k, C], one order of summation, every smaller k on the way.
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
    """How neighbors choose a class.

    Attributes:
      k: neighbors.
      temperature: votes weigh `exp(cosine / temperature)`; positive, or None: all count alike.
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

    In float64, so that neighbors vote by their order however near they are; to be called under
    `jax.enable_x64`.
    """
    checked = _checked_votes(votes)
    labels = checked_labels(
        "train_labels",
        train_labels,
        num_examples=number_of_rows("train_features", train_features),
        num_classes=num_classes,
    )
    half, index = checked_nearest(
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
    """Share of the votes of the `k` nearest neighbors for each class.

    A neighbor votes with weight `exp(cosine / temperature)` (Wu et al. 2018, section 3.4; also
    DINO, whose temperature is 0.07), or all votes count alike.

    Args:
      train_features: `[N, F]`, the bank.
      train_labels: `[N]`.
      test_features: `[M, F]`.
      num_classes: `C`, above every label.
      k: neighbors, one number or any iterable of them; several cost one search, at the largest.
      temperature: see `Vote`, positive; None counts all votes alike.
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
    dtype = result_dtype(train_features, test_features)
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
    """`knn_accuracy` by several kinds of votes, for which the neighbors are searched once.

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
    labels = checked_labels(
        "test_labels",
        test_labels,
        num_examples=number_of_rows("test_features", test_features),
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


def knn_protocol(
    *, k: int, temperature: float | None, bank: Split, evaluated: Split, features: str = "features"
) -> str:
    """The sentence beside a k-NN accuracy.

    Args:
      k: neighbors.
      temperature: see `Vote`; None counts all votes alike.
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
