"""Oracles: scikit-learn and NumPy float64, on scikit-learn's real digits and on random data."""

import inspect
import re
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from jevb_jax.evaluation import knn, labeled_features, linear_probe, neighbors, probe_solvers
from jevb_jax.evaluation.knn import Vote
from jevb_jax.evaluation.labeled_features import Split
from jevb_jax.evaluation.probe_solvers import ProbeParameters


def digits():
    pixels, labels = load_digits(return_X_y=True)
    return pixels.astype(np.float32), labels


def digits_splits():
    """(train 1,294, validation 143, test 360), each (features, labels)."""
    pixels, labels = digits()
    order = np.random.default_rng(0).permutation(len(labels))
    return [(pixels[rows], labels[rows]) for rows in np.split(order, [1294, 1437])]


def random_problem(seed=0, *, num_train=700, num_test=150, num_features=24, num_classes=7):
    generator = np.random.default_rng(seed)
    centers = generator.normal(size=(num_classes, num_features))
    labels = generator.integers(0, num_classes, num_train + num_test)
    features = centers[labels] + 3 * generator.normal(size=(len(labels), num_features))
    features = features.astype(np.float32)
    return (
        (features[:num_train], labels[:num_train]),
        (features[num_train:], labels[num_train:]),
        num_classes,
    )


# --- k nearest neighbours -------------------------------------------------------------------------


def sklearn_knn(train, test_features, *, k, temperature):
    weights: Any = lambda distance: np.exp((1 - distance) / temperature)  # noqa: E731
    model = KNeighborsClassifier(k, metric="cosine", algorithm="brute", weights=weights)
    model.fit(train[0].astype(np.float64), train[1])
    features = test_features.astype(np.float64)
    return model.predict(features), model.predict_proba(features)


def class_shares(x: Any, y: Any, test: Any, *, num_classes: int, **options: Any) -> np.ndarray:
    """Share of the votes that each class gets, `[len(votes), M, C]`."""
    options = {"chunk_size": 256, "bank_chunk_size": 65536} | options
    present, shares = knn._shares_of_present_classes(x, y, test, num_classes=num_classes, **options)
    scores = np.zeros([*shares.shape[:-1], num_classes])
    scores[..., present] = shares
    return scores


# Queries and bank rows at a time: all at once; dividing neither (and smaller than k); dividing
# both.
CHUNKS = [(10_000, 10_000), (37, 101), (50, 70)]


@pytest.mark.parametrize(("chunk_size", "bank_chunk_size"), CHUNKS)
def test_knn_equals_sklearn_on_random_data(chunk_size, bank_chunk_size, same):
    train, test, num_classes = random_problem()
    ks = (20, 1, 200, 700)  # unordered; 700 is the whole bank
    for temperature in (0.07, 1.0):
        scores = class_shares(
            *train,
            test[0],
            num_classes=num_classes,
            votes=[Vote(k, temperature) for k in ks],
            chunk_size=chunk_size,
            bank_chunk_size=bank_chunk_size,
        )
        for k, scores_of_k in zip(ks, scores, strict=True):
            predictions, shares = sklearn_knn(train, test[0], k=k, temperature=temperature)
            # A cosine's float32 error, 3e-7, over the temperature, then summed.
            same("k-NN, weighted votes, shares", scores_of_k, shares, atol=2e-5)
            np.testing.assert_array_equal(np.argmax(scores_of_k, axis=-1), predictions)


@pytest.mark.slow
def test_votes_that_count_alike_are_sklearns_and_share_a_search(monkeypatch, same):
    train, test, num_classes = random_problem()
    settings: Any = {"num_classes": num_classes}
    searched: list[int] = []
    search = neighbors.checked_nearest
    monkeypatch.setattr(
        knn,
        "checked_nearest",
        lambda *args, k, **keywords: (searched.append(k), search(*args, k=k, **keywords))[1],
    )
    votes = [Vote(*one) for one in ((10, None), (20, 0.1), (1, None), (5, 0.07))]
    accuracies = knn.knn_accuracies(*train, *test, votes=votes, **settings)
    assert searched == [20]
    with pytest.raises(ValueError, match="votes must hold at least one"):
        knn.knn_accuracies(*train, *test, votes=[], **settings)
    for vote, accuracy in zip(votes, accuracies, strict=True):
        assert accuracy == knn.knn_accuracies(*train, *test, votes=[vote], **settings)[0]
        if vote.temperature is None:
            model = KNeighborsClassifier(vote.k, metric="cosine", algorithm="brute").fit(*train)
            (predicted,) = knn.knn_predict(*train, test[0], votes=[vote], **settings)
            same("k-NN, equal votes, predicted classes", predicted, model.predict(test[0]))
            (shares,) = class_shares(*train, test[0], votes=[vote], **settings)
            expected = model.predict_proba(test[0])
            same("k-NN, equal votes, shares", shares, expected, rtol=1e-6)


@pytest.mark.slow
def test_knn_equals_sklearn_on_digits():
    train, _, test = digits_splits()
    ks = (1, 5, 20, 200)
    votes = [Vote(k) for k in ks]
    options = {"num_classes": 10, "chunk_size": 100, "bank_chunk_size": 500}
    predictions = knn.knn_predict(*train, test[0], votes=votes, **options)
    accuracies = knn.knn_accuracies(*train, *test, votes=votes, **options)
    for k, predictions_of_k, accuracy in zip(ks, predictions, accuracies, strict=True):
        expected, _ = sklearn_knn(train, test[0], k=k, temperature=0.1)
        np.testing.assert_array_equal(predictions_of_k, expected)
        assert accuracy == np.mean(expected == test[1])
    (one,) = knn.knn_predict(*train, test[0], votes=[Vote(20)], **options)
    np.testing.assert_array_equal(one, predictions[ks.index(20)])
    assert knn.knn_accuracies(*train, *test, votes=[Vote(20)], **options) == (accuracies[2],)
    assert knn.knn_accuracies(*train, *train, votes=[Vote(1)], num_classes=10) == (1.0,)


@pytest.mark.parametrize(("chunk_size", "bank_chunk_size"), [*CHUNKS, (4, 3), (1, 1)])
def test_ties_go_to_the_lower_row_and_the_lower_class(chunk_size, bank_chunk_size):
    # Axis-aligned rows of any length have cosines of exactly 0 and 1.
    axis = np.array([2, 0, 1, 0, 2, 2, 0, 1, 1, 0])
    bank = np.eye(3, dtype=np.float32)[axis] * np.arange(1, 11, dtype=np.float32)[:, None]
    queries = np.eye(3, dtype=np.float32)[[0, 1, 2, 2]]
    chunks = {"chunk_size": chunk_size, "bank_chunk_size": bank_chunk_size}
    cosine, index = neighbors.nearest_neighbours(bank, queries, k=7, **chunks)
    expected = queries @ np.eye(3)[axis].T
    order = np.argsort(-expected, axis=1, kind="stable")[:, :7]
    np.testing.assert_array_equal(index, order)
    np.testing.assert_array_equal(cosine, np.take_along_axis(expected, order, axis=1))
    # Two neighbours of one vote each, of different classes: the lower class, in either order.
    same = np.ones((2, 4), np.float32)
    for labels in (np.array([3, 1]), np.array([1, 3])):
        prediction = knn.knn_predict(same, labels, same[:1], num_classes=5, votes=[Vote(2)])
        assert prediction.tolist() == [[1]]


def test_neighbours_do_not_depend_on_the_chunks():
    train, test, _ = random_problem(1)
    cosine, index = neighbors.nearest_neighbours(train[0], test[0], k=200)
    for chunk_size, bank_chunk_size in CHUNKS[1:]:
        other_cosine, other_index = neighbors.nearest_neighbours(
            train[0], test[0], k=200, chunk_size=chunk_size, bank_chunk_size=bank_chunk_size
        )
        # Four float32 epsilons; neighbours closer together than that may change places.
        np.testing.assert_allclose(other_cosine, cosine, atol=5e-7)
        assert np.mean(np.asarray(other_index) != np.asarray(index)) < 1e-3


@hypothesis.settings(max_examples=30, deadline=None)
@hypothesis.given(
    bank=st.lists(st.tuples(*[st.integers(-3, 3)] * 3), min_size=11, max_size=11),
    queries=st.lists(st.tuples(*[st.integers(-3, 3)] * 3), min_size=4, max_size=4),
    bank_exponent=st.integers(-30, 30),
    query_exponent=st.integers(-30, 30),
)
def test_cosines_of_any_length_and_of_zero_rows(bank, queries, bank_exponent, query_exponent):
    bank, queries = np.array(bank, np.float64), np.array(queries, np.float64)
    cosine, index = neighbors.nearest_neighbours(
        (bank * 10.0**bank_exponent).astype(np.float32),
        (queries * 10.0**query_exponent).astype(np.float32),
        k=11,
        chunk_size=3,
        bank_chunk_size=4,
    )

    def unit(rows):
        length = np.linalg.norm(rows, axis=1, keepdims=True)
        return rows / np.where(length == 0, 1, length)

    expected = unit(queries) @ unit(bank).T
    index = np.asarray(index)
    np.testing.assert_array_equal(np.sort(index, axis=1), np.tile(np.arange(11), (4, 1)))
    np.testing.assert_allclose(cosine, np.take_along_axis(expected, index, axis=1), atol=5e-7)
    assert np.all(np.diff(cosine, axis=1) <= 0)


def exact_neighbours(bank, queries, *, k):
    """By differences of directions in extended precision; `1 - cos` and rows, the lower on a tie."""
    bank, queries = (np.asarray(x).astype(np.longdouble) for x in (bank, queries))
    lengths = [np.sqrt(np.sum(x * x, axis=1, keepdims=True)) for x in (bank, queries)]
    bank, queries = (
        x / np.where(length == 0, 1, length)
        for x, length in zip((bank, queries), lengths, strict=True)
    )
    half = np.stack([np.sum((bank - query) ** 2, axis=1) / 2 for query in queries])
    half[:, lengths[0][:, 0] == 0] = half[lengths[1][:, 0] == 0] = 1
    index = np.argsort(half, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(half, index, axis=1).astype(np.float64), index


def hard_features(name):
    """320 rows, of which what tells them apart is far below what they have in common."""
    generator = np.random.default_rng(5)
    x = generator.normal(size=(320, 16)).astype(np.float32)
    centers = 4 * generator.normal(size=(4, 16))[np.arange(320) % 4]
    if name.startswith("offset"):
        return x + np.float32(name.split()[1])
    if name.startswith("crowds"):
        return (centers + float(name.split()[1]) * x).astype(np.float32)
    return {
        "one ray": np.outer(generator.uniform(0.1, 10, 320), np.ones(16)) + 1e-5 * x,
        "any length": x * 10.0 ** generator.uniform(-30, 30, (320, 1)),
        "subnormal": x * np.float32(1e-40),
        "largest": x / np.max(np.abs(x)) * np.float32(3e38),
        "zero rows": np.where(np.arange(320)[:, None] % 5 == 0, 0, x),
        "half precision": (x + 40).astype(np.float16),
    }[name].astype(np.float16 if name == "half precision" else np.float32)


@pytest.mark.parametrize("chunks", [{}, {"chunk_size": 64, "bank_chunk_size": 83}])
@pytest.mark.parametrize(
    "name",
    [
        *("offset 0", "offset 1e3", "offset 3e4", "crowds 1e-2", "crowds 1e-4", "one ray"),
        *("any length", "subnormal", "largest", "zero rows", "half precision"),
    ],
)
def test_neighbours_are_exact_whatever_they_have_in_common(name, chunks):
    features = hard_features(name)
    bank, queries = features[:256], features[256:]
    half, expected = exact_neighbours(bank, queries, k=9)
    cosine, index = neighbors.nearest_neighbours(bank, queries, k=9, **chunks)
    if name != "half precision":  # there rows may be equal but for the oracle's rounding
        np.testing.assert_array_equal(index, expected)
    np.testing.assert_allclose(cosine, 1 - half, atol=6e-8)
    # Leave one out: a row's first neighbour is the row, or the first zero row.
    _, own = neighbors.nearest_neighbours(bank, bank[:64], k=9, **chunks)
    if name != "zero rows":
        distinct = np.unique(bank, axis=0, return_index=True)[1]
        rows = np.intersect1d(distinct, np.arange(64))
        np.testing.assert_array_equal(np.asarray(own)[rows, 0], rows)


def test_float64_features_are_not_rounded():
    features = hard_features("offset 0").astype(np.float64) + 1e9
    _, expected = exact_neighbours(features[:256], features[256:], k=9)
    cosine, index = neighbors.nearest_neighbours(features[:256], features[256:], k=9)
    np.testing.assert_array_equal(index, expected)
    assert cosine.dtype == jnp.float32


def test_crowds_of_ties_are_ordered_by_row():
    # Signs: the cosine is a whole number of agreements, so the order is known without rounding.
    generator = np.random.default_rng(6)
    signs = generator.choice([-1, 1], (320, 16))
    lengths = generator.choice([1.0, 3.0, 7.0], (256, 1)).astype(np.float32)
    bank, queries = signs[:256].astype(np.float32) * lengths, signs[256:].astype(np.float32)
    expected = np.argsort(-signs[256:] @ signs[:256].T, axis=1, kind="stable")[:, :9]
    np.testing.assert_array_equal(neighbors.nearest_neighbours(bank, queries, k=9)[1], expected)
    # One direction only, or none: every row is as near as any other.
    for same in (bank[:1] * lengths, np.zeros_like(bank)):
        _, index = neighbors.nearest_neighbours(same, queries, k=9)
        np.testing.assert_array_equal(index, np.tile(np.arange(9), (64, 1)))


@pytest.mark.parametrize("offset", [0, 1e3, 1e4])
def test_accuracy_is_that_of_the_exact_neighbours(offset):
    train, _, test = digits_splits()
    bank, queries = (x[:256] + np.float32(offset) for x in (train[0], test[0]))
    half, index = exact_neighbours(bank, queries, k=20)
    labels = train[1][:256]
    weights = np.exp((half[:, :1] - half) / 0.1)
    votes = np.stack([np.bincount(labels[i], w, 10) for i, w in zip(index, weights, strict=True)])
    expected = np.mean(votes.argmax(axis=1) == test[1][:256])
    found = knn.knn_accuracies(
        bank, labels, queries, test[1][:256], num_classes=10, votes=[Vote(20, 0.1)]
    )
    assert found == (expected,)


def test_label_numbers_with_gaps_of_billions():
    train, test, num_classes = random_problem(num_train=256, num_test=64)
    numbers = 500_000_003 * np.arange(num_classes)
    options: dict[str, Any] = {"votes": [Vote(5)]}
    expected = knn.knn_accuracies(*train, *test, num_classes=num_classes, **options)
    sparse = [(x, numbers[y]) for x, y in (train, test)]
    found = knn.knn_accuracies(*sparse[0], *sparse[1], num_classes=int(numbers[-1]) + 1, **options)
    assert found == expected
    scores = class_shares(train[0], 3 * train[1], test[0], num_classes=3 * num_classes, **options)
    plain = class_shares(*train, test[0], num_classes=num_classes, **options)
    np.testing.assert_array_equal(scores[..., ::3], plain)
    assert np.sum(scores) == pytest.approx(64, abs=1e-3)
    with pytest.raises(ValueError, match="hold 7 classes: number these from 0"):
        linear_probe.fit_linear_probe(
            train[0], 3_000_000 * train[1], num_classes=18_000_001, l2_regularization=1
        )
    for labels in (np.array(["cat", "dog"] * 128), train[1].astype(float)):
        with pytest.raises(TypeError, match=r"train_labels must be integers, got .*return_inverse"):
            knn.knn_predict(train[0], labels, test[0], num_classes=7, votes=[Vote(5)])


def test_settings_of_numpy_and_any_iterable():
    train, test, num_classes = random_problem(num_train=256, num_test=64)
    votes = [Vote(3, 0.1), Vote(5, 0.1)]
    expected = knn.knn_accuracies(*train, *test, num_classes=num_classes, votes=votes)
    of_numpy: Any = [Vote(np.int64(3), np.float32(0.1)), Vote(np.array(5), np.float32(0.1))]  # pyright: ignore[reportArgumentType]
    for same in (of_numpy, tuple(votes), (vote for vote in votes)):
        found = knn.knn_accuracies(
            *train,
            *test,
            num_classes=np.int32(num_classes),  # pyright: ignore[reportArgumentType]
            votes=same,  # pyright: ignore[reportArgumentType]
            chunk_size=np.int64(256),  # pyright: ignore[reportArgumentType]
        )
        assert found == expected
    points = [
        linear_probe.select_linear_probe(
            *train,
            *test,
            num_classes=np.int64(7),  # pyright: ignore[reportArgumentType]
            l2_grid=grid,
            max_iterations=np.int64(20),  # pyright: ignore[reportArgumentType]
        ).grid
        for grid in ((0.1, 1.0), np.logspace(-1, 0, 2), (10.0**n for n in range(-1, 1)))
    ]
    assert points[0] == points[1] == points[2]
    rows = labeled_features.labels_per_class_subset(
        train[1],
        labels_per_class=np.int64(2),  # pyright: ignore[reportArgumentType]
        seed=np.uint32(1),  # pyright: ignore[reportArgumentType]
    )
    assert len(rows) == 14
    whole: Any = 5.0
    for refused in (
        {"k": whole},
        {"k": np.float64(5)},
        {"k": True},
        {"k": "5"},
        {"num_classes": 7.0},
        {"chunk_size": 256.0},
        {"bank_chunk_size": np.float32(9)},
        {"temperature": "0.1"},
        {"temperature": np.ones(2)},
        {"votes": Vote(5)},
        {"votes": [(5, 0.1)]},
    ):
        options: dict[str, Any] = {"num_classes": 7, "k": 5, "temperature": 0.1} | refused
        votes = [Vote(options.pop("k"), options.pop("temperature"))]
        with pytest.raises(TypeError, match=f"{next(iter(refused))} must be"):
            knn.knn_predict(*train, test[0], **{"votes": votes, **options})
    for grid, message in (
        (0.1, "must be a sequence"),
        ("0.1", "must be a sequence"),
        (np.ones((2, 2)), "one axis"),
        (iter(()), "at least one"),
    ):
        with pytest.raises((TypeError, ValueError), match=f"l2_grid .*{message}"):
            linear_probe.select_linear_probe(*train, *test, num_classes=7, l2_grid=grid)  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="labels_per_class must be one whole number"):
        labeled_features.labels_per_class_subset(train[1], labels_per_class=whole, seed=0)


def test_low_temperature_does_not_overflow():
    train, test, num_classes = random_problem()
    options = {"num_classes": num_classes}
    cold = class_shares(*train, test[0], votes=[Vote(20, 1e-6)], **options)
    assert np.all(np.isfinite(cold))
    nearest = knn.knn_predict(*train, test[0], votes=[Vote(1)], **options)
    np.testing.assert_array_equal(np.argmax(cold, axis=-1), nearest)


def largest_array(compiled):
    shapes = re.findall(r"\w\d+\[([\d,]+)\]", compiled.as_text())
    return max(int(np.prod([int(size) for size in shape.split(",")])) for shape in shapes)


def temporary_bytes(compiled):
    analysis = compiled.memory_analysis()
    assert analysis is not None
    return analysis.temp_size_in_bytes


def test_memory_never_holds_all_pairs():
    num_bank, num_queries, num_features, num_candidates = 20_000, 4_096, 64, 225
    parameters = inspect.signature(neighbors.nearest_neighbours).parameters

    def compile_search(*, chunk_size, bank_chunk_size):
        with jax.enable_x64(True):
            bank = neighbors._Bank(
                jax.ShapeDtypeStruct((num_bank, num_features), jnp.float32),  # pyright: ignore[reportArgumentType]
                jax.ShapeDtypeStruct((num_bank,), jnp.float64),  # pyright: ignore[reportArgumentType]
                jax.ShapeDtypeStruct((num_features,), jnp.float64),  # pyright: ignore[reportArgumentType]
            )
            lowered = neighbors._search.lower(
                bank,
                jax.ShapeDtypeStruct((num_queries, num_features), jnp.float32),
                k=200,
                num_candidates=num_candidates,
                chunk_size=chunk_size,
                bank_chunk_size=min(bank_chunk_size, num_bank),
                dtype=jnp.float32,
            )
            # Full float32 products, which a CPU computes anyway and an accelerator only when asked.
            assert "HIGHEST" in lowered.as_text()
            return lowered.compile()

    all_pairs = num_bank * num_queries
    for chunks in (
        {name: parameters[name].default for name in ("chunk_size", "bank_chunk_size")},
        {"chunk_size": 256, "bank_chunk_size": 1000},
    ):
        compiled = compile_search(**chunks)
        pairs = chunks["chunk_size"] * chunks["bank_chunk_size"]
        inputs = num_bank * num_features
        assert largest_array(compiled) <= max(pairs, inputs)
        # Beside the bounds of one pair of chunks: their positions, masks and sorted copies; the
        # candidates; directions and their squares in float64.
        candidates = num_queries * num_candidates
        assert temporary_bytes(compiled) < 4 * (3 * pairs + 4 * candidates + 6 * inputs)
    # The measure itself: one chunk that is the whole does hold all pairs, and is seen to.
    whole = compile_search(chunk_size=num_queries, bank_chunk_size=num_bank)
    assert largest_array(whole) >= all_pairs
    assert temporary_bytes(whole) >= 4 * all_pairs


def test_knn_errors():
    train, test, num_classes = random_problem(num_train=50, num_test=10)

    def predict(
        train_x: Any = train[0],
        train_y: Any = train[1],
        test_x: Any = test[0],
        ks: tuple[int, ...] = (5,),
        temperature: float = 0.1,
        chunk_size: int = 256,
    ):
        votes = [Vote(k, temperature) for k in ks]
        return knn.knn_predict(
            train_x, train_y, test_x, num_classes=num_classes, votes=votes, chunk_size=chunk_size
        )

    for ks in ((51,), (5, 51)):
        with pytest.raises(ValueError, match="k must be between 1 and the size of the bank, 50"):
            predict(ks=ks)
    for ks in ((0,), (-1,), (5, 0)):
        with pytest.raises(ValueError, match="k must be at least 1"):
            predict(ks=ks)
    with pytest.raises(ValueError, match="votes must hold at least one"):
        predict(ks=())
    for temperature in (0.0, -1.0, np.nan, np.inf):
        with pytest.raises(ValueError, match="temperature must be positive"):
            predict(temperature=temperature)
    with pytest.raises(ValueError, match="chunk_size must be at least 1"):
        predict(chunk_size=0)
    spoilt = train[0].copy()
    spoilt[3, 1], spoilt[3, 2], spoilt[7, 0] = np.nan, np.inf, -np.inf
    with pytest.raises(ValueError, match="train_features must be finite: 2 of its 50 rows"):
        predict(train_x=spoilt)
    with pytest.raises(ValueError, match="test_features must be finite: 2 of its 50 rows"):
        predict(test_x=spoilt)
    with pytest.raises(TypeError, match="must be floating point, got int"):
        predict(test_x=test[0].astype(np.int32))
    with pytest.raises(ValueError, match="same number of features, got 24 and 23"):
        predict(test_x=test[0][:, 1:])
    with pytest.raises(ValueError, match=r"non-empty \[N, F\], got shape \(24,\)"):
        predict(test_x=test[0][0])
    with pytest.raises(ValueError, match=r"non-empty \[N, F\], got shape \(0, 24\)"):
        predict(train_x=train[0][:0], train_y=train[1][:0])
    with pytest.raises(ValueError, match=r"train_labels must be \[50\].*got shape \(49,\)"):
        predict(train_y=train[1][1:])
    with pytest.raises(TypeError, match="must be integers, got float64"):
        predict(train_y=train[1].astype(np.float64))
    unlabeled = np.where(np.arange(50) < 4, -1, train[1])
    with pytest.raises(ValueError, match=r"must lie in \[0, 7\), 4 of 50 do not"):
        predict(train_y=unlabeled)
    with pytest.raises(ValueError, match=r"test_labels must lie in \[0, 7\)"):
        knn.knn_accuracies(*train, test[0], test[1] + 7, num_classes=7, votes=[Vote(5)])


# --- linear probe ---------------------------------------------------------------------------------


def numpy_standardise(features, reference):
    reference = reference.astype(np.float64)
    std = reference.std(axis=0)
    return (features.astype(np.float64) - reference.mean(axis=0)) / np.where(std == 0, 1, std)


def sklearn_probe(features, labels, *, l2_regularization):
    inverse_strength = 1 / (len(labels) * l2_regularization)
    model = LogisticRegression(C=inverse_strength, tol=1e-10, max_iter=20_000)
    return model.fit(numpy_standardise(features, features), labels)


def numpy_objective(probe, features, labels, *, l2_regularization):
    """Penalised mean cross-entropy and the norm of its gradient, float64."""
    x = numpy_standardise(features, features)
    weights, bias = np.asarray(probe.weights, np.float64), np.asarray(probe.bias, np.float64)
    logits = x @ weights + bias
    logits -= logits.max(axis=1, keepdims=True)
    log_probability = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    one_hot = np.eye(len(bias))[labels]
    value = -np.mean(np.sum(one_hot * log_probability, axis=1))
    value += l2_regularization / 2 * np.sum(weights**2)
    residual = (np.exp(log_probability) - one_hot) / len(labels)
    gradient = np.append(x.T @ residual + l2_regularization * weights, residual.sum(axis=0))
    return value, np.linalg.norm(gradient)


def least_curvature_in_bias(oracle, features):
    """Of the cross-entropy at the optimum, float64; a constant added to every bias changes nothing."""
    p = oracle.predict_proba(numpy_standardise(features, features))
    return np.linalg.eigvalsh(np.diag(p.mean(axis=0)) - p.T @ p / len(p))[1]


@pytest.mark.slow
@pytest.mark.parametrize("l2_regularization", [1e-1, 1e-3])
def test_lbfgs_equals_sklearn_on_digits(l2_regularization):
    (features, labels), _, test = digits_splits()
    probe = linear_probe.fit_linear_probe(
        features,
        labels,
        num_classes=10,
        l2_regularization=l2_regularization,
        solver="lbfgs",
        tolerance=1e-6,
    )
    assert bool(probe.converged)
    assert 0 < int(probe.num_iterations) < 1000
    oracle = sklearn_probe(features, labels, l2_regularization=l2_regularization)
    # Strong convexity: the weights are within tolerance / l2 of the optimum. At l2 = 1e-3 that is
    # 1e-3, of coefficients up to 1.4. The bias has no penalty, and is free up to a constant.
    atol = max(1e-6 / l2_regularization, 1e-5)
    np.testing.assert_allclose(probe.weights.T, oracle.coef_, atol=atol)
    bias = np.asarray(probe.bias) - np.mean(probe.bias)
    atol = max(1e-6 / l2_regularization, 1e-6 / least_curvature_in_bias(oracle, features))
    np.testing.assert_allclose(bias, oracle.intercept_ - oracle.intercept_.mean(), atol=atol)
    standardized = numpy_standardise(test[0], features)
    predictions = np.argmax(linear_probe.probe_logits(probe, test[0]), axis=-1)
    np.testing.assert_array_equal(predictions, oracle.predict(standardized))
    assert linear_probe.probe_accuracy(probe, *test) == oracle.score(standardized, test[1])


@pytest.mark.parametrize("size", [0.0, 1.0, 30.0, 1000.0])
def test_cross_entropy_errs_relative_to_its_value(size):
    generator = np.random.default_rng(0)
    logits = (size * generator.normal(size=(40, 5))).astype(np.float32)
    labels = np.where(np.arange(40) < 20, logits.argmax(axis=1), generator.integers(0, 5, 40))
    parameters = ProbeParameters(jnp.eye(5), jnp.zeros(5))

    def total(x):
        values = probe_solvers._cross_entropy(parameters, x, jnp.asarray(labels))
        return jnp.sum(values), values

    gradient, values = jax.grad(total, has_aux=True)(jnp.asarray(logits))
    rows = np.arange(40)
    # Long doubles do not overflow here, and the label's own term, 1, is never added up.
    odds = np.exp(logits.astype(np.longdouble) - logits[rows, labels][:, None])
    odds[rows, labels] = 0
    others = odds.sum(axis=1)
    # A difference of logits is rounded, and the exponential multiplies that error.
    rtol = 1e-6 + np.finfo(np.float32).eps * np.ptp(logits)
    np.testing.assert_allclose(values, np.log1p(others).astype(float), rtol=rtol, atol=1e-37)
    expected = odds / (1 + others)[:, None]
    expected[rows, labels] = -others / (1 + others)
    np.testing.assert_allclose(gradient, expected.astype(float), rtol=rtol, atol=1e-37)


def test_few_separable_labels_are_fitted_to_the_tolerance():
    # Ten labels a class of many features: every image is surer than float32 can tell from 1. With a
    # cross-entropy that errs by its logits' rounding, L-BFGS stalls at the weak end of the grid.
    generator = np.random.default_rng(0)
    centers = generator.normal(size=(10, 512)) / 8
    labels = np.repeat(np.arange(10), 10)
    features = (centers[labels] + generator.normal(size=(100, 512))).astype(np.float32)
    selection = linear_probe.select_linear_probe(
        features, labels, features, labels, num_classes=10, l2_grid=[10.0**-n for n in range(1, 7)]
    )
    assert all(point.converged for point in selection.grid)
    assert max(point.num_iterations for point in selection.grid) < 50
    probe = linear_probe.fit_linear_probe(features, labels, num_classes=10, l2_regularization=1e-6)
    value, gradient_norm = numpy_objective(probe, features, labels, l2_regularization=1e-6)
    assert value < 1e-3
    np.testing.assert_allclose(probe.gradient_norm, gradient_norm, rtol=1e-3)


@pytest.mark.slow
def test_sgd_comes_near_lbfgs_and_is_seeded():
    (features, labels), _, test = digits_splits()
    l2_regularization = 1e-2

    def fit(**options):
        return linear_probe.fit_linear_probe(
            features, labels, num_classes=10, l2_regularization=l2_regularization, **options
        )

    def objective(probe):
        return numpy_objective(probe, features, labels, l2_regularization=l2_regularization)

    # 1294 = 6 * 200 + 94: a short last batch in every epoch.
    sgd = {"solver": "sgd", "batch_size": 200, "num_epochs": 150}
    probe, exact = fit(**sgd), fit(solver="lbfgs")
    assert (probe.solver, exact.solver) == ("sgd", "lbfgs")
    assert int(probe.num_iterations) == 7 * 150
    value, gradient_norm = objective(probe)
    least, least_gradient_norm = objective(exact)
    assert least <= value <= 1.002 * least  # measured: 1.0003
    accuracies = [linear_probe.probe_accuracy(p, *test) for p in (probe, exact)]
    assert abs(accuracies[0] - accuracies[1]) <= 2 / 360
    # What the fit says of itself, against float64.
    np.testing.assert_allclose(probe.gradient_norm, gradient_norm, rtol=1e-3)
    np.testing.assert_allclose(exact.gradient_norm, least_gradient_norm, atol=1e-6)
    assert not bool(probe.converged)
    again, other = fit(**sgd), fit(seed=1, **sgd)
    np.testing.assert_array_equal(probe.weights, again.weights)
    # Another order, 6e-4, and not only another start of the power iteration, 2e-7.
    assert np.max(np.abs(probe.weights - other.weights)) > 2e-5


@pytest.mark.slow
def test_sgd_steps_fit_the_curvature_of_correlated_features():
    (features, labels), _, num_classes = random_problem(num_features=8)
    noise = np.random.default_rng(0).normal(size=(700, 56))
    features = np.concatenate([features, features[:, :1] + 0.1 * noise], axis=1, dtype=np.float32)
    eigenvalue = probe_solvers._largest_eigenvalue(
        jax.random.key(0), jnp.asarray(features), probe_solvers.fit_standardization(features)
    )
    correlation = np.cov(numpy_standardise(features, features).T, bias=True)
    largest = np.linalg.eigvalsh(correlation).max()
    assert largest > 50
    np.testing.assert_allclose(eigenvalue, largest, rtol=1e-3)
    values = []
    for solver in ("lbfgs", "sgd"):
        probe = linear_probe.fit_linear_probe(
            features,
            labels,
            num_classes=num_classes,
            l2_regularization=1e-2,
            solver=solver,
            batch_size=200,
            num_epochs=150,
        )
        value, _ = numpy_objective(probe, features, labels, l2_regularization=1e-2)
        values.append(value)
    # Measured: 1.0004; with steps a hundred times longer, 1.004.
    assert values[0] <= values[1] <= 1.001 * values[0]


@pytest.mark.slow
def test_auto_solver_goes_by_size(monkeypatch):
    (features, labels), _, num_classes = random_problem()
    options = {"num_classes": num_classes, "l2_regularization": 0.1, "num_epochs": 2}
    elements = 700 * (24 + num_classes)
    for limit, solver in ((elements, "lbfgs"), (elements - 1, "sgd")):
        monkeypatch.setattr(linear_probe, "LBFGS_MAX_ELEMENTS", limit)
        assert linear_probe.fit_linear_probe(features, labels, **options).solver == solver


def test_an_unfinished_fit_says_so():
    (features, labels), _, num_classes = random_problem()
    options = {"num_classes": num_classes, "l2_regularization": 1e-3}
    probe = linear_probe.fit_linear_probe(features, labels, max_iterations=3, **options)
    assert not bool(probe.converged)
    assert int(probe.num_iterations) == 3
    assert probe.gradient_norm > 1e-5


def test_constant_features_and_units_do_not_matter():
    (features, labels), test, num_classes = random_problem()
    options = {"num_classes": num_classes, "l2_regularization": 1e-2, "tolerance": 1e-6}
    plain = linear_probe.fit_linear_probe(features, labels, **options)

    def disguise(x):
        # Other units, other origins, a constant column, and one that varies by its last bit.
        units = np.float32(10.0) ** np.arange(-12, 12, dtype=np.float32)
        constant = np.full((len(x), 1), 0.1, np.float32)
        last_bit = np.where(
            np.arange(len(x)) % 2 == 0, np.float32(1), np.nextafter(np.float32(1), np.float32(2))
        )[:, None].astype(np.float32)
        return np.concatenate([(x + np.float32(10)) * units[None], constant, last_bit], axis=1)

    probe = linear_probe.fit_linear_probe(disguise(features), labels, **options)
    assert bool(probe.converged)
    np.testing.assert_array_equal(probe.feature_std[24:], 1.0)
    np.testing.assert_allclose(probe.feature_mean[24:], [0.1, 1.0], rtol=1e-6)
    np.testing.assert_allclose(probe.weights[24:], 0.0, atol=1e-5)
    # An origin at 10 costs the features their last four bits, 1e-6; tolerance / l2 is 1e-4.
    np.testing.assert_allclose(probe.weights[:24], plain.weights, atol=2e-4)
    expected = linear_probe.probe_logits(plain, test[0])
    np.testing.assert_allclose(
        linear_probe.probe_logits(probe, disguise(test[0])), expected, atol=1e-3
    )


def test_standardisation_against_numpy():
    generator = np.random.default_rng(0)
    features = generator.normal(size=(3000, 6)) * 10.0 ** np.arange(-3, 3) + 5
    features[:, 2] = 1000.1
    features = features.astype(np.float32)
    statistics = probe_solvers.fit_standardization(jnp.asarray(features))
    features = features.astype(np.float64)
    np.testing.assert_allclose(statistics.mean, features.mean(axis=0), rtol=1e-6)
    std = features.std(axis=0)
    std[2] = 1
    np.testing.assert_allclose(statistics.std, std, rtol=1e-4)


@pytest.mark.parametrize("exponent", [-100, 100, 124])
def test_standardized_features_do_not_depend_on_a_power_of_two(exponent):
    features = np.random.default_rng(0).normal(size=(50, 3)).clip(-3, 3).astype(np.float32)
    expected = probe_solvers.fit_standardization(jnp.asarray(features))(features)
    scaled = np.ldexp(features, exponent)
    found = probe_solvers.fit_standardization(jnp.asarray(scaled))(scaled)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r"features vary by up to .*: divide them"):
        linear_probe.fit_linear_probe(
            np.ldexp(features, 126), np.arange(50) % 2, num_classes=2, l2_regularization=1e-3
        )


def test_an_absent_class_and_no_penalty_are_survived():
    (features, labels), _, num_classes = random_problem()
    for num, l2_regularization in ((num_classes + 2, 1e-2), (num_classes, 0.0)):
        probe = linear_probe.fit_linear_probe(
            features, labels, num_classes=num, l2_regularization=l2_regularization
        )
        assert probe.weights.shape == (24, num)
        assert np.all(np.isfinite(probe.weights))
        predictions = np.argmax(linear_probe.probe_logits(probe, features), axis=-1)
        assert set(predictions.tolist()) <= set(labels.tolist())


def test_probe_is_a_pytree_of_arrays():
    (features, labels), _, num_classes = random_problem()
    probe = linear_probe.fit_linear_probe(
        features, labels, num_classes=num_classes, l2_regularization=0.1
    )
    leaves, structure = jax.tree.flatten(probe)
    assert all(isinstance(leaf, jax.Array) for leaf in leaves)
    assert jax.tree.unflatten(structure, leaves).solver == "lbfgs"
    assert float(jax.jit(lambda p: jnp.sum(p.weights**2))(probe)) > 0


def test_probe_errors():
    (features, labels), _, num_classes = random_problem()

    def fit(x: Any = features, y: Any = labels, **options):
        options = {"num_classes": num_classes, "l2_regularization": 0.1} | options
        return linear_probe.fit_linear_probe(x, y, **options)

    for strength in (-1e-3, np.nan, np.inf):
        with pytest.raises(ValueError, match="l2_regularization must be at least 0 and finite"):
            fit(l2_regularization=strength)
    for option in ("max_iterations", "tolerance", "num_epochs", "batch_size"):
        settings: dict[str, Any] = {option: 0}
        with pytest.raises(ValueError, match=f"{option} must be (positive|at least 1)"):
            fit(**settings)
    with pytest.raises(ValueError, match=r"solver must be one of .*got 'newton'"):
        fit(solver="newton")
    with pytest.raises(ValueError, match="num_classes must be at least 2"):
        fit(num_classes=1)
    with pytest.raises(ValueError, match="features must be finite: 1 of its 700 rows"):
        fit(x=np.where(np.arange(700)[:, None] == 3, np.inf, features))
    with pytest.raises(ValueError, match=r"labels must lie in \[0, 3\)"):
        fit(num_classes=3)
    with pytest.raises(TypeError, match="must be integers"):
        fit(y=labels.astype(np.float32))
    probe = fit()
    with pytest.raises(ValueError, match="same number of features, got 23 and 24"):
        linear_probe.probe_logits(probe, features[:, 1:])
    with pytest.raises(ValueError, match="must lie in"):
        linear_probe.probe_accuracy(probe, features, labels + 1)


# --- selection ------------------------------------------------------------------------------------

GRID = (1e-1, 1e0, 1e-2, 1e1)  # unordered


def few_and_noisy():
    """A problem where weak regularisation overfits: 60 rows of 40 features, 30 of them noise."""
    generator = np.random.default_rng(2)
    labels = generator.integers(0, 3, 460)
    centers = 0.4 * generator.normal(size=(3, 40)) * (np.arange(40) < 10)
    features = (centers[labels] + generator.normal(size=(460, 40))).astype(np.float32)
    rows = np.split(np.arange(460), [60, 260])
    return [(features[r], labels[r]) for r in rows]


def test_selection_equals_sklearns_on_validation():
    train, validation, _ = few_and_noisy()
    selection = linear_probe.select_linear_probe(
        *train, *validation, num_classes=3, l2_grid=GRID, tolerance=1e-6
    )
    strengths = sorted(GRID, reverse=True)
    assert [point.l2_regularization for point in selection.grid] == strengths
    standardized = numpy_standardise(validation[0], train[0])
    train_accuracies, expected = [], []
    for l2_regularization in strengths:
        oracle = sklearn_probe(*train, l2_regularization=l2_regularization)
        expected.append(oracle.score(standardized, validation[1]))
        train_accuracies.append(oracle.score(numpy_standardise(train[0], train[0]), train[1]))
    assert [point.validation_accuracy for point in selection.grid] == expected
    assert all(point.converged for point in selection.grid)
    assert selection.validation_accuracy == max(expected)
    best = int(np.argmax(expected))
    assert selection.l2_regularization == strengths[best]
    # The case is one where choosing on the training split would choose otherwise.
    assert train_accuracies[best] < max(train_accuracies)


def test_selection_uses_the_validation_split_for_nothing_but_the_choice():
    train, validation, test = few_and_noisy()

    def select(validation, **options):
        return linear_probe.select_linear_probe(
            *train, *validation, num_classes=3, l2_grid=GRID, tolerance=1e-6, **options
        )

    selection = select(validation)
    # The chosen probe is the one fitted on the training split alone, from zero or from a warm
    # start.
    alone = linear_probe.fit_linear_probe(
        *train, num_classes=3, l2_regularization=selection.l2_regularization, tolerance=1e-6
    )
    atol = 2e-6 / selection.l2_regularization
    np.testing.assert_allclose(selection.probe.weights, alone.weights, atol=atol)
    np.testing.assert_array_equal(selection.probe.feature_mean, alone.feature_mean)
    # Other validation features of which the choice happens to be the same change no bit of the
    # probe.
    same_choice = select((validation[0][:100], validation[1][:100]))
    assert same_choice.l2_regularization == selection.l2_regularization
    np.testing.assert_array_equal(same_choice.probe.weights, selection.probe.weights)
    # Each strength starts from the solution before it, here from its own.
    twice = linear_probe.select_linear_probe(
        *train, *validation, num_classes=3, l2_grid=(1e-2, 1e-2), tolerance=1e-6
    )
    assert twice.grid[0].num_iterations > 10
    assert twice.grid[1].num_iterations <= 3
    # Validation labels do choose: the training split as validation prefers to overfit.
    overfit = select(train)
    assert overfit.l2_regularization < selection.l2_regularization
    assert overfit.validation_accuracy == 1.0
    # And it pays on a test split that took no part.
    accuracies = [linear_probe.probe_accuracy(p.probe, *test) for p in (overfit, selection)]
    assert accuracies[0] < accuracies[1]


def test_ties_take_the_strongest():
    train, _, _ = few_and_noisy()
    tied = linear_probe.select_linear_probe(
        *train, train[0][:1], train[1][:1], num_classes=3, l2_grid=(1e-4, 1e-2, 1e-3)
    )
    assert {point.validation_accuracy for point in tied.grid} == {1.0}
    assert tied.l2_regularization == 1e-2


def test_selection_errors():
    train, validation, _ = few_and_noisy()
    with pytest.raises(ValueError, match="l2_grid must hold at least one"):
        linear_probe.select_linear_probe(*train, *validation, num_classes=3, l2_grid=())
    with pytest.raises(ValueError, match="l2_regularization must be at least 0"):
        linear_probe.select_linear_probe(*train, *validation, num_classes=3, l2_grid=(0.1, -0.1))
    with pytest.raises(ValueError, match="validation_labels must lie in"):
        linear_probe.select_linear_probe(*train, validation[0], validation[1] + 1, num_classes=3)
    with pytest.raises(ValueError, match="same number of features, got 40 and 39"):
        linear_probe.select_linear_probe(*train, validation[0][:, 1:], validation[1], num_classes=3)


# --- subsets and protocols ------------------------------------------------------------------------


def test_subset_has_exactly_so_many_of_each_class_and_is_seeded():
    _, labels = digits()
    rows = labeled_features.labels_per_class_subset(labels, labels_per_class=10, seed=0)
    assert np.bincount(labels[rows]).tolist() == [10] * 10
    assert np.all(np.diff(rows) > 0)
    again = labeled_features.labels_per_class_subset(labels, labels_per_class=10, seed=0)
    np.testing.assert_array_equal(rows, again)
    other = labeled_features.labels_per_class_subset(labels, labels_per_class=10, seed=1)
    assert len(np.intersect1d(rows, other)) < 50
    # Over many draws every row of a class comes as often as any other: here 20 rows, half drawn.
    two = np.repeat([0, 5], 20)
    draws = [
        labeled_features.labels_per_class_subset(two, labels_per_class=10, seed=seed)
        for seed in range(400)
    ]
    frequency = np.bincount(np.concatenate(draws), minlength=40) / 400
    np.testing.assert_allclose(frequency, 0.5, atol=5 * np.sqrt(0.25 / 400))
    everything = labeled_features.labels_per_class_subset(two, labels_per_class=20, seed=0)
    np.testing.assert_array_equal(everything, np.arange(40))


def test_subset_errors():
    with pytest.raises(ValueError, match=r"fewer: \{1: 2, 3: 1\}. Ask for at most 1"):
        labeled_features.labels_per_class_subset(
            np.array([0, 0, 0, 1, 1, 3]), labels_per_class=3, seed=0
        )
    with pytest.raises(ValueError, match="with minimum -1"):
        labeled_features.labels_per_class_subset(np.array([0, -1]), labels_per_class=1, seed=0)
    with pytest.raises(ValueError, match="non-empty"):
        labeled_features.labels_per_class_subset(np.zeros(0, int), labels_per_class=1, seed=0)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        labeled_features.labels_per_class_subset(np.array([0, 1]), labels_per_class=0, seed=0)
    with pytest.raises(TypeError, match="must be integers"):
        labeled_features.labels_per_class_subset(np.array([0.0, 1.0]), labels_per_class=1, seed=0)


def test_protocols():
    train = Split("train split", 1294)
    validation = Split("validation", 143)
    test = Split("test", 360)
    assert knn.knn_protocol(Vote(20, 0.1), bank=train, evaluated=test) == (
        "k-NN cosine, k=20, T=0.1, un-augmented features, bank=train split (1,294), "
        "evaluated on test (360)"
    )
    uniform = knn.knn_protocol(Vote(10, None), bank=train, evaluated=test)
    assert uniform.startswith("k-NN cosine, k=10, uniform votes, un-augmented features, ")
    protocol = linear_probe.linear_protocol(
        solver="lbfgs",
        l2_regularization=1e-3,
        num_strengths=6,
        fitted=train,
        validation=validation,
        evaluated=test,
        features="representation",
    )
    assert protocol == (
        "linear (multinomial logistic regression, L-BFGS), un-augmented standardized "
        "representation, l2=0.001 of 6 chosen on validation (143), fitted on train split (1,294), "
        "evaluated on test (360)"
    )
