"""k-NN classification: the nearest neighbors vote for a class."""

import functools
from collections.abc import Iterable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from jevb_jax import arguments
from jevb_jax.evaluation.labeled_features import Split, checked_labels, number_of_rows
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


@dataclass(frozen=True)
class Vote:
    """How neighbors choose a class.

    Attributes:
      k: number of neighbors.
      temperature: a neighbor's vote weighs `exp(cosine / temperature)` (Wu et al. 2018, section
        3.4; DINO does the same at 0.07). Positive. With None every vote weighs the same.
    """

    k: int
    temperature: float | None = 0.1


def _checked(vote: Vote) -> Vote:
    if not isinstance(vote, Vote):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"votes must be a sequence of Vote(k, temperature), got {vote!r} in it")
    k = arguments.whole_number("k", vote.k, at_least=1)
    if vote.temperature is None:
        return Vote(k, None)
    temperature = arguments.positive_number("temperature", vote.temperature)
    if temperature < np.finfo(np.float64).tiny:  # XLA reads a smaller number as zero
        raise ValueError(f"temperature must be at least 2.3e-308, got {temperature}")
    return Vote(k, temperature)


def _shares_of_present_classes(
    train_features: ArrayLike,
    train_labels: ArrayLike,
    test_features: ArrayLike,
    *,
    num_classes: int,
    votes: Iterable[Vote],
    chunk_size: int,
    bank_chunk_size: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the classes that occur in the bank, and the share of the votes for each.

    The classes are `[P]`, in rising order; the shares are float64 `[len(votes), M, P]`: single
    precision would lose the order of neighbors that are very close together.
    """
    votes = [_checked(vote) for vote in arguments.collected("votes", votes)]
    labels = checked_labels(
        "train_labels",
        train_labels,
        num_examples=number_of_rows("train_features", train_features),
        num_classes=num_classes,
    )
    # Only these classes can win. Labels may be ids of a database, in the millions.
    present, number = np.unique(labels, return_inverse=True)
    with jax.enable_x64(True):
        half, index = checked_nearest(
            ("train_features", "test_features"),
            train_features,
            test_features,
            k=max(vote.k for vote in votes),
            chunk_size=chunk_size,
            bank_chunk_size=bank_chunk_size,
        )
        neighbor_labels = number.astype(np.int32)[np.asarray(index)]
        shares = np.empty([len(votes), len(half), len(present)])
        for temperature in {vote.temperature for vote in votes}:
            places = [i for i, vote in enumerate(votes) if vote.temperature == temperature]
            shares[places] = _vote(
                half,
                neighbor_labels,
                np.asarray(np.inf if temperature is None else temperature, half.dtype),
                ks=tuple(votes[place].k for place in places),
                num_classes=len(present),
            )
    return present, shares


def knn_predict(
    train_features: ArrayLike,
    train_labels: ArrayLike,
    test_features: ArrayLike,
    *,
    num_classes: int,
    votes: Iterable[Vote],
    chunk_size: int = 256,
    bank_chunk_size: int = 65536,
) -> np.ndarray:
    """Class with the most votes; the lowest class wins a tie.

    Args:
      train_features: `[N, F]`, the bank.
      train_labels: `[N]` integers in `[0, num_classes)`.
      test_features: `[M, F]`.
      num_classes: `C`.
      votes: one or more kinds of votes. All of them cost one search, for the largest `k`.
      chunk_size: test rows compared at once.
      bank_chunk_size: bank rows compared at once.

    Returns:
      `[len(votes), M]` integers.

    Raises:
      ValueError: a temperature is not positive, a label is out of range, or there are no votes;
        also for the reasons of `nearest_neighbours`.
      TypeError: labels are not integers, features are not floating point, or a setting is not a
        number.
    """
    present, shares = _shares_of_present_classes(
        train_features,
        train_labels,
        test_features,
        num_classes=arguments.whole_number("num_classes", num_classes, at_least=1),
        votes=votes,
        chunk_size=chunk_size,
        bank_chunk_size=bank_chunk_size,
    )
    return present[np.argmax(shares, axis=-1)]


def knn_accuracies(
    train_features: ArrayLike,
    train_labels: ArrayLike,
    test_features: ArrayLike,
    test_labels: ArrayLike,
    *,
    num_classes: int,
    votes: Iterable[Vote],
    chunk_size: int = 256,
    bank_chunk_size: int = 65536,
) -> tuple[float, ...]:
    """Share of the test rows that `knn_predict` gets right.

    The other arguments, and the errors, are those of `knn_predict`.

    Args:
      test_labels: `[M]` integers in `[0, num_classes)`.

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
    predictions = knn_predict(
        train_features,
        train_labels,
        test_features,
        num_classes=num_classes,
        votes=votes,
        chunk_size=chunk_size,
        bank_chunk_size=bank_chunk_size,
    )
    return tuple(float(np.mean(prediction == labels)) for prediction in predictions)


def knn_protocol(vote: Vote, *, bank: Split, evaluated: Split, features: str = "features") -> str:
    """Sentence that says how a k-NN accuracy was measured.

    Args:
      vote: how neighbors voted.
      bank: the examples that vote.
      evaluated: the examples that were classified.
      features: name of the features, for example "representation".

    Returns:
      One line: "k-NN cosine, k=20, T=0.1, un-augmented features, bank=train split (1,294),
      evaluated on test (360)".
    """
    weights = "uniform votes" if vote.temperature is None else f"T={vote.temperature:g}"
    return (
        f"k-NN cosine, k={vote.k}, {weights}, un-augmented {features}, bank={bank}, "
        f"evaluated on {evaluated}"
    )
