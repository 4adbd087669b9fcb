"""k-NN classification: the nearest neighbors vote for a class."""

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
    # Weights are relative to the nearest neighbor, because exp(1 / T) overflows float32 for
    # T < 0.012. We subtract chords and not cosines: cosines near 1 have too few digits.
    weights = jnp.exp((half_squared_chord[:, :1] - half_squared_chord) / temperature)
    rows = jnp.arange(weights.shape[0])

    def add_neighbour(votes: Array, neighbour: tuple[Array, Array]) -> tuple[Array, None]:
        label, weight = neighbour
        return votes.at[rows, label].add(weight), None

    # Adding one neighbor at a time needs no array [M, k, C], fixes the order of summation, and
    # passes every smaller k on the way.
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
      k: number of neighbors.
      temperature: a neighbor's vote weighs `exp(cosine / temperature)`. Positive. With None every
        vote weighs the same.
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
    """Returns the classes that occur in the bank and the share of the votes for each.

    The classes are `[P]`, in rising order; the shares are `[len(votes), M, P]`. Call this under
    `jax.enable_x64`: float64 keeps the order of neighbors that are very close together.
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
    # Only these classes can win. Labels may be ids of a database, in the millions.
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
    if checked < np.finfo(np.float64).tiny:  # XLA reads a smaller number as zero
        raise ValueError(f"temperature must be at least 2.3e-308, got {checked}")
    return checked


def _predicted_labels(
    train_features: ArrayLike, train_labels: ArrayLike, test_features: ArrayLike, **settings: Any
) -> np.ndarray:
    """Labels with the most votes, `[len(votes), M]` int64."""
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
    """Share of the votes of the `k` nearest neighbors that each class gets.

    A neighbor votes with weight `exp(cosine / temperature)` (Wu et al. 2018, section 3.4; DINO
    does the same at temperature 0.07).

    Args:
      train_features: `[N, F]`, the bank.
      train_labels: `[N]` integers.
      test_features: `[M, F]`.
      num_classes: `C`. Labels lie in `[0, C)`.
      k: number of neighbors, or several such numbers. Several cost one search, for the largest.
      temperature: positive. With None every vote weighs the same.
      chunk_size: test rows compared at once.
      bank_chunk_size: bank rows compared at once.

    Returns:
      `[M, C]`, each row sums to one. For several `k`: `[len(k), M, C]`.

    Raises:
      ValueError: `temperature` is not positive, a label is out of range, or there is no `k`; also
        for the reasons of `nearest_neighbours`.
      TypeError: labels are not integers, features are not floating point, or a setting is not a
        number.
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
    """Class with the most votes; the lowest class wins a tie.

    Arguments and errors are those of `knn_class_scores`.

    Returns:
      `[M]` int32. For several `k`: `[len(k), M]`.
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

    The other arguments, and the errors, are those of `knn_class_scores`.

    Args:
      test_labels: `[M]` integers in `[0, num_classes)`.

    Returns:
      Accuracy in [0, 1]. For several `k`: one accuracy for each, in the same order.
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
    """Accuracies of several kinds of votes from one search for neighbors.

    The other arguments, and the errors, are those of `knn_class_scores`.

    Args:
      test_labels: `[M]` integers in `[0, num_classes)`.
      votes: at least one.

    Returns:
      Accuracies in [0, 1], one for each element of `votes`.
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
    """Sentence that says how a k-NN accuracy was measured.

    Args:
      temperature: as for `knn_class_scores`.
      bank: the examples that vote.
      evaluated: the examples that were classified.
      features: name of the features, for example "representation".

    Returns:
      One line: "k-NN cosine, k=20, T=0.1, un-augmented features, bank=train split (1,294),
      evaluated on test (360)".
    """
    votes = "uniform votes" if temperature is None else f"T={temperature:g}"
    return (
        f"k-NN cosine, k={k}, {votes}, un-augmented {features}, bank={bank}, "
        f"evaluated on {evaluated}"
    )
