"""k-nearest-neighbour and linear classification of frozen features.

Every number is a function of arrays: features `[N, F]`, real and finite, and integer labels `[N]`
in `[0, num_classes)`. Choices belong to a validation split (`select_linear_probe`); no function
here sees a test split and a choice at once. `knn_protocol` and `linear_protocol` give the sentence
that has to stand beside each number. Inputs are checked by value, so the public functions are not
to be jitted.
"""

import dataclasses
import functools
import operator
from collections.abc import Sequence
from typing import Literal, NamedTuple, overload

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.typing import ArrayLike

from jevb_jax import sphere

Solver = Literal["lbfgs", "sgd"]
SOLVER_NAMES: dict[Solver, str] = {"lbfgs": "L-BFGS", "sgd": "SGD"}

# Above 2^28 numbers (1 GiB in float32) of features and logits together, "auto" takes minibatches.
LBFGS_MAX_ELEMENTS = 2**28

# TF32 or bfloat16 products would reorder neighbours and stall L-BFGS on an accelerator.
_matmul = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


@jax.jit
def _num_rows_not_finite(features: Array) -> Array:
    return jnp.sum(~jnp.all(jnp.isfinite(features), axis=-1))


def _checked_features(name: str, features: ArrayLike) -> Array:
    dtype = jnp.result_type(features)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(
            f"{name} must be floating point, got {dtype}: cast it, for example to float32"
        )
    (checked,) = sphere.at_least_float32(features)
    if checked.ndim != 2 or 0 in checked.shape:
        raise ValueError(f"{name} must be a non-empty [N, F], got shape {checked.shape}")
    num_bad = int(_num_rows_not_finite(checked))
    if num_bad:
        raise ValueError(
            f"{name} must be finite: {num_bad} of its {checked.shape[0]} rows hold NaN or inf. "
            "Look for a diverged network or images of the wrong range"
        )
    return checked


def _checked_labels(name: str, labels: ArrayLike, *, num_examples: int, num_classes: int) -> Array:
    checked = np.asarray(labels)
    if not np.issubdtype(checked.dtype, np.integer):
        raise TypeError(f"{name} must be integers, got {checked.dtype}")
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
    return jnp.asarray(checked, jnp.int32)


def _check_same_width(first_name: str, first: Array, second_name: str, second: Array) -> None:
    if first.shape[-1] != second.shape[-1]:
        raise ValueError(
            f"{first_name} and {second_name} must have the same number of features, "
            f"got {first.shape[-1]} and {second.shape[-1]}"
        )


def _check_positive(**values: float) -> None:
    for name, value in values.items():
        if not (value > 0 and np.isfinite(value)):
            raise ValueError(f"{name} must be positive and finite, got {value}")


# --- k nearest neighbours -------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames=("k", "chunk_size", "bank_chunk_size"))
def _nearest_neighbours(
    bank: Array, queries: Array, *, k: int, chunk_size: int, bank_chunk_size: int
) -> tuple[Array, Array]:
    num_bank = bank.shape[0]
    num_bank_chunks = -(-num_bank // bank_chunk_size)
    # Equal chunks: otherwise the last one, moved back to be full, does again what was done before.
    bank_chunk_size = -(-num_bank // num_bank_chunks)

    def of_one_query(query: Array) -> tuple[Array, Array]:
        query_direction, _ = sphere.polar_decomposition(query)

        def merge(best: tuple[Array, Array], chunk: Array) -> tuple[tuple[Array, Array], None]:
            # The last chunk starts early enough to be full, so that the bank is never copied to be
            # padded; the rows that it shares with the chunk before are out of the running.
            first_new = chunk * bank_chunk_size
            start = jnp.minimum(first_new, num_bank - bank_chunk_size)
            rows = jax.lax.dynamic_slice_in_dim(bank, start, bank_chunk_size)
            directions, _ = sphere.polar_decomposition(rows)
            is_new = start + jnp.arange(bank_chunk_size) >= first_new
            cosine = jnp.where(is_new, _matmul(directions, query_direction), -jnp.inf)
            chunk_cosine, position = jax.lax.top_k(cosine, min(k, bank_chunk_size))
            # `top_k` breaks ties by position, and the rows seen first stand first: on a tie the
            # lower row of the bank wins, whatever the chunks.
            best_cosine, best_index = best
            cosines = jnp.concatenate([best_cosine, chunk_cosine])
            indices = jnp.concatenate([best_index, start + position])
            best_cosine, position = jax.lax.top_k(cosines, k)
            return (best_cosine, indices[position]), None

        nothing = (jnp.full([k], -jnp.inf, bank.dtype), jnp.zeros([k], jnp.int32))
        best, _ = jax.lax.scan(merge, nothing, jnp.arange(num_bank_chunks))
        return best

    return jax.lax.map(of_one_query, queries, batch_size=chunk_size)


def nearest_neighbours(
    bank_features: ArrayLike,
    query_features: ArrayLike,
    *,
    k: int,
    chunk_size: int = 256,
    bank_chunk_size: int = 65536,
) -> tuple[Array, Array]:
    """The `k` rows of a bank with the largest cosine to each query, exact.

    Memory beyond the two feature arrays is `chunk_size x bank_chunk_size`, and `[M, k]` for the
    result; `[M, N]` is never built.

    Args:
      bank_features: `[N, F]`. A zero row has cosine zero to everything.
      query_features: `[M, F]`.
      k: neighbours, at most `N`.
      chunk_size: queries compared at once.
      bank_chunk_size: bank rows compared at once.

    Returns:
      cosine: `[M, k]`, in falling order.
      index: `[M, k]` int32, rows of the bank; on a tie the lower row comes first.

    Raises:
      ValueError: `k` outside `[1, N]`, a chunk size below one, shapes that do not fit, values that
        are not finite (with the number of such rows).
      TypeError: features that are not floating point.
    """
    bank = _checked_features("bank_features", bank_features)
    queries = _checked_features("query_features", query_features)
    _check_same_width("bank_features", bank, "query_features", queries)
    _check_positive(chunk_size=chunk_size, bank_chunk_size=bank_chunk_size)
    if not 1 <= k <= bank.shape[0]:
        raise ValueError(
            f"k must be between 1 and the size of the bank, {bank.shape[0]}, got {k}: "
            "take a smaller k or a larger bank"
        )
    return _nearest_neighbours(
        bank,
        queries,
        k=k,
        chunk_size=min(chunk_size, queries.shape[0]),
        bank_chunk_size=min(bank_chunk_size, bank.shape[0]),
    )


@functools.partial(jax.jit, static_argnames=("ks", "num_classes"))
def _vote(
    cosine: Array,
    neighbour_labels: Array,
    temperature: Array,
    *,
    ks: tuple[int, ...],
    num_classes: int,
) -> Array:
    # Relative to the nearest neighbour: exp(1 / T) overflows float32 once T < 0.012.
    weights = jnp.exp((cosine - cosine[:, :1]) / temperature)
    rows = jnp.arange(cosine.shape[0])

    def add_neighbour(votes: Array, neighbour: tuple[Array, Array]) -> tuple[Array, None]:
        label, weight = neighbour
        return votes.at[rows, label].add(weight), None

    # One neighbour at a time: no [M, k, C], one order of summation, every smaller k on the way.
    votes = jnp.zeros([cosine.shape[0], num_classes], cosine.dtype)
    scores_of_k: dict[int, Array] = {}
    first = 0
    for k in sorted(set(ks)):
        neighbours = (neighbour_labels[:, first:k].T, weights[:, first:k].T)
        votes, _ = jax.lax.scan(add_neighbour, votes, neighbours)
        scores_of_k[k] = votes / jnp.sum(votes, axis=-1, keepdims=True)
        first = k
    return jnp.stack([scores_of_k[k] for k in ks])


def knn_class_scores(
    train_features: ArrayLike,
    train_labels: ArrayLike,
    test_features: ArrayLike,
    *,
    num_classes: int,
    k: int | Sequence[int],
    temperature: float = 0.1,
    chunk_size: int = 256,
    bank_chunk_size: int = 65536,
) -> Array:
    """Share of the votes of the `k` nearest neighbours for each class.

    A neighbour votes with weight `exp(cosine / temperature)` (Wu et al. 2018, section 3.4; also
    DINO, whose temperature is 0.07).

    Args:
      train_features: `[N, F]`, the bank.
      train_labels: `[N]`.
      test_features: `[M, F]`.
      num_classes: `C`.
      k: neighbours; several at once cost one search, at the largest.
      temperature: of the votes, positive.
      chunk_size: test rows compared at once.
      bank_chunk_size: bank rows compared at once.

    Returns:
      `[M, C]`, each row summing to one; for a sequence of `k`, `[len(k), M, C]`.

    Raises:
      ValueError: `temperature` not positive, labels out of range, no `k`; as `nearest_neighbours`.
      TypeError: labels that are not integers, features that are not floating point.
    """
    ks = (operator.index(k),) if not isinstance(k, Sequence) else tuple(map(operator.index, k))
    if not ks or min(ks) < 1:
        raise ValueError(f"k must be at least 1, one number or a sequence of them, got {k}")
    _check_positive(temperature=temperature)
    bank = _checked_features("train_features", train_features)
    queries = _checked_features("test_features", test_features)
    labels = _checked_labels(
        "train_labels", train_labels, num_examples=bank.shape[0], num_classes=num_classes
    )
    cosine, index = nearest_neighbours(
        bank,
        queries,
        k=max(ks),
        chunk_size=chunk_size,
        bank_chunk_size=bank_chunk_size,
    )
    scores = _vote(
        cosine,
        labels[index],
        jnp.asarray(temperature, cosine.dtype),
        ks=ks,
        num_classes=num_classes,
    )
    return scores if isinstance(k, Sequence) else scores[0]


def knn_predict(
    train_features: ArrayLike,
    train_labels: ArrayLike,
    test_features: ArrayLike,
    *,
    num_classes: int,
    k: int | Sequence[int],
    temperature: float = 0.1,
    chunk_size: int = 256,
    bank_chunk_size: int = 65536,
) -> Array:
    """Class with the most votes in `knn_class_scores`, the lowest of them on a tie.

    Args:
      train_features: see `knn_class_scores`, also for all that follow.
      train_labels: `[N]`.
      test_features: `[M, F]`.
      num_classes: `C`.
      k: one number or several.
      temperature: of the votes.
      chunk_size: test rows compared at once.
      bank_chunk_size: bank rows compared at once.

    Returns:
      `[M]` int32; for a sequence of `k`, `[len(k), M]`.

    Raises:
      ValueError: as `knn_class_scores`.
      TypeError: as `knn_class_scores`.
    """
    scores = knn_class_scores(
        train_features,
        train_labels,
        test_features,
        num_classes=num_classes,
        k=k,
        temperature=temperature,
        chunk_size=chunk_size,
        bank_chunk_size=bank_chunk_size,
    )
    return jnp.argmax(scores, axis=-1).astype(jnp.int32)


@overload
def knn_accuracy(
    train_features: ArrayLike,
    train_labels: ArrayLike,
    test_features: ArrayLike,
    test_labels: ArrayLike,
    *,
    num_classes: int,
    k: int,
    temperature: float = ...,
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
    k: Sequence[int],
    temperature: float = ...,
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
    k: int | Sequence[int],
    temperature: float = 0.1,
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
      k: one number or several.
      temperature: of the votes.
      chunk_size: test rows compared at once.
      bank_chunk_size: bank rows compared at once.

    Returns:
      Accuracy in [0, 1]; for a sequence of `k`, one for each in its order.

    Raises:
      ValueError: as `knn_class_scores`, and for labels out of range.
      TypeError: as `knn_class_scores`.
    """
    queries = _checked_features("test_features", test_features)
    labels = _checked_labels(
        "test_labels", test_labels, num_examples=queries.shape[0], num_classes=num_classes
    )
    predictions = knn_predict(
        train_features,
        train_labels,
        queries,
        num_classes=num_classes,
        k=k,
        temperature=temperature,
        chunk_size=chunk_size,
        bank_chunk_size=bank_chunk_size,
    )
    if not isinstance(k, Sequence):
        return _accuracy(predictions, labels)
    return tuple(_accuracy(prediction, labels) for prediction in predictions)


def _accuracy(predictions: Array, labels: Array) -> float:
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
        return (features - self.mean[None]) / self.std[None]


@jax.jit
def _standardisation(features: Array) -> _Standardisation:
    """Statistics over rows, `[F]`; features that vary by rounding error only count as constant."""
    # Measured from the first row: a constant feature is then exactly zero, however long the sum.
    offset = features[0]
    shifted = features - offset[None]
    shifted_mean = jnp.mean(shifted, axis=0)
    std = jnp.sqrt(jnp.mean(jnp.square(shifted - shifted_mean[None]), axis=0))
    rounding = 10 * float(jnp.finfo(features.dtype).eps) * jnp.max(jnp.abs(features), axis=0)
    return _Standardisation(
        mean=offset + shifted_mean, std=jnp.where(std <= rounding, jnp.ones_like(std), std)
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


def _check_settings(settings: _ProbeSettings, l2_grid: Sequence[float]) -> None:
    for l2_regularization in l2_grid:
        if not (l2_regularization >= 0 and np.isfinite(l2_regularization)):
            raise ValueError(
                f"l2_regularization must be at least 0 and finite, got {l2_regularization}"
            )
    if settings.solver not in ("auto", *SOLVER_NAMES):
        raise ValueError(
            f"solver must be one of {('auto', *SOLVER_NAMES)}, got {settings.solver!r}"
        )
    if settings.num_classes < 2:
        raise ValueError(f"num_classes must be at least 2, got {settings.num_classes}")
    _check_positive(
        max_iterations=settings.max_iterations,
        tolerance=settings.tolerance,
        num_epochs=settings.num_epochs,
        batch_size=settings.batch_size,
    )


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
    solver = settings.solver
    if solver == "auto":
        num_elements = num_examples * (num_features + settings.num_classes)
        solver = "lbfgs" if num_elements <= LBFGS_MAX_ELEMENTS else "sgd"
    l2 = jnp.asarray(l2_regularization, features.dtype)
    tolerance = jnp.asarray(settings.tolerance, features.dtype)
    if solver == "lbfgs":
        parameters, gradient_norm, num_iterations = _fit_lbfgs(
            initial,
            features,
            labels,
            standardise,
            l2,
            tolerance,
            jnp.asarray(settings.max_iterations, jnp.int32),
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
        weights=jnp.zeros([features.shape[1], num_classes], features.dtype),
        bias=jnp.zeros([num_classes], features.dtype),
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
      num_classes: `C`, at least 2.
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
        range.
      TypeError: features that are not floating point, labels that are not integers.
    """
    settings = _ProbeSettings(
        num_classes, solver, max_iterations, tolerance, num_epochs, batch_size, seed
    )
    _check_settings(settings, [l2_regularization])
    x = _checked_features("features", features)
    y = _checked_labels("labels", labels, num_examples=x.shape[0], num_classes=num_classes)
    return _fit(
        x,
        y,
        _standardisation(x),
        _zero_parameters(x, num_classes),
        l2_regularization=l2_regularization,
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
    return _logits(_Parameters(probe.weights, probe.bias), standardise(x))


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
    return _accuracy(jnp.argmax(logits, axis=-1), checked)


class GridPoint(NamedTuple):
    """One regularisation strength tried.

    Attributes:
      l2_regularization: the strength.
      validation_accuracy: in [0, 1].
      converged: of its fit.
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
    l2_grid: Sequence[float] = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1e0),
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
      l2_grid: strengths to try, at least one.
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
    settings = _ProbeSettings(
        num_classes, solver, max_iterations, tolerance, num_epochs, batch_size, seed
    )
    if not l2_grid:
        raise ValueError("l2_grid must hold at least one strength, got none")
    _check_settings(settings, l2_grid)
    train_x = _checked_features("train_features", train_features)
    train_y = _checked_labels(
        "train_labels", train_labels, num_examples=train_x.shape[0], num_classes=num_classes
    )
    validation_x = _checked_features("validation_features", validation_features)
    validation_y = _checked_labels(
        "validation_labels",
        validation_labels,
        num_examples=validation_x.shape[0],
        num_classes=num_classes,
    )
    _check_same_width("train_features", train_x, "validation_features", validation_x)

    standardise = _standardisation(train_x)
    parameters = _zero_parameters(train_x, num_classes)
    grid: list[GridPoint] = []
    probes: list[LinearProbe] = []
    for l2_regularization in sorted(l2_grid, reverse=True):
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
                l2_regularization=float(l2_regularization),
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
      seed: of the draw; the same seed gives the same rows.

    Returns:
      Rising row numbers, `[labels_per_class * number of classes]` int64.

    Raises:
      ValueError: a class with fewer labels (named), negative labels, no labels.
      TypeError: labels that are not integers.
    """
    array = np.asarray(labels)
    if not np.issubdtype(array.dtype, np.integer):
        raise TypeError(f"labels must be integers, got {array.dtype}")
    if array.ndim != 1 or not array.size or array.min() < 0:
        raise ValueError(
            "labels must be a non-empty [N] of at least 0 (leave unlabelled examples out), "
            f"got shape {array.shape}{f' with minimum {array.min()}' if array.size else ''}"
        )
    if labels_per_class < 1:
        raise ValueError(f"labels_per_class must be at least 1, got {labels_per_class}")
    classes, counts = np.unique(array, return_counts=True)
    too_few = {int(c): int(n) for c, n in zip(classes, counts, strict=True) if n < labels_per_class}
    if too_few:
        raise ValueError(
            f"every class needs {labels_per_class} labels; these classes (with their counts) have "
            f"fewer: {too_few}. Ask for at most {counts.min()}"
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
    *, k: int, temperature: float, bank: Split, evaluated: Split, features: str = "features"
) -> str:
    """The sentence beside a k-NN accuracy.

    Args:
      k: neighbours.
      temperature: of the votes.
      bank: examples that vote.
      evaluated: examples that the accuracy is of.
      features: which features, for example "representation".

    Returns:
      One line: "k-NN cosine, k=20, T=0.1, un-augmented features, bank=train split (1,294),
      evaluated on test (360)".
    """
    return (
        f"k-NN cosine, k={k}, T={temperature:g}, un-augmented {features}, bank={bank}, "
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
      solver: of the probe.
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
