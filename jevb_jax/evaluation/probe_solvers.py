"""Solvers for a linear probe: L-BFGS, and SGD for large features."""

import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from jevb_jax import arguments
from jevb_jax.evaluation.products import exact_matmul

Solver = Literal["lbfgs", "sgd"]
SOLVER_NAMES: dict[Solver, str] = {"lbfgs": "L-BFGS", "sgd": "SGD"}

# Features and logits together with more than 2^28 numbers (1 GiB in float32): "auto" takes SGD.
LBFGS_MAX_ELEMENTS = 2**28


class ProbeParameters(NamedTuple):
    """Weights `[F, C]` and bias `[C]`."""

    weights: Array
    bias: Array


class Standardization(NamedTuple):
    """Mean and standard deviation of every feature, `[F]`."""

    mean: Array
    std: Array

    def __call__(self, features: Array) -> Array:
        """Features with mean 0 and standard deviation 1."""
        return (features - self.mean[None]) / self.std[None]


def _times_power_of_two(x: Array, exponent: Array) -> Array:
    """`x 2^exponent`, in two steps, because `2^exponent` itself may overflow or underflow."""
    half = exponent // 2
    return jnp.ldexp(jnp.ldexp(x, half), exponent - half)


@jax.jit
def fit_standardization(features: Array) -> Standardization:
    """Mean and deviation over rows. A feature that varies only by rounding counts as constant."""
    # Divide by a power of two, which rounds nothing. Squares would otherwise overflow or vanish.
    largest = jnp.max(jnp.abs(features), axis=0)
    _, exponent = jnp.frexp(largest)
    exponent = jnp.where(largest > 0, exponent, 0)
    features = _times_power_of_two(features, -exponent[None])
    # Measure from the first row: a constant feature is then exactly zero, however many rows.
    offset = features[0]
    shifted = features - offset[None]
    shifted_mean = jnp.mean(shifted, axis=0)
    std = jnp.sqrt(jnp.mean(jnp.square(shifted - shifted_mean[None]), axis=0))
    rounding = 10 * float(jnp.finfo(features.dtype).eps) * jnp.max(jnp.abs(features), axis=0)
    return Standardization(
        mean=_times_power_of_two(offset + shifted_mean, exponent),
        std=jnp.where(std <= rounding, jnp.ones_like(std), _times_power_of_two(std, exponent)),
    )


def logits_of(parameters: ProbeParameters, standardized: Array) -> Array:
    """Logits, `[N, C]`."""
    return exact_matmul(standardized, parameters.weights) + parameters.bias[None]


def _cross_entropy(parameters: ProbeParameters, standardized: Array, labels: Array) -> Array:
    """Cross-entropy `log sum_c exp(z_c - z_y)`, `[N]`, of logits `z`. It is accurate near 0 too.

    `logsumexp(z) - z_y` has an error of `1e-7 z`. For classes that are separated this is more than
    the value itself: the line search of L-BFGS then finds no descent, and the fit stalls.
    """
    logits = logits_of(parameters, standardized)
    is_label = labels[:, None] == jnp.arange(logits.shape[-1])[None]
    margin = logits - jnp.sum(jnp.where(is_label, logits, 0), axis=-1, keepdims=True)
    # Any shift gives the same value and gradient. The largest margin (at least 0) cannot overflow.
    largest = jax.lax.stop_gradient(jnp.max(margin, axis=-1))
    others = jnp.sum(jnp.where(is_label, 0, jnp.exp(margin - largest[:, None])), axis=-1)
    return largest + jnp.log1p(others + jnp.expm1(-largest))


def _penalty(parameters: ProbeParameters, l2_regularization: Array) -> Array:
    return l2_regularization / 2 * jnp.sum(jnp.square(parameters.weights))


@jax.jit
def fit_lbfgs(
    initial: ProbeParameters,
    features: Array,
    labels: Array,
    standardise: Standardization,
    l2_regularization: Array,
    tolerance: Array,
    max_iterations: Array,
) -> tuple[ProbeParameters, Array, Array]:
    """Minimizes the penalized cross-entropy: parameters, gradient norm, number of iterations."""
    standardized = standardise(features)

    def objective(parameters: ProbeParameters) -> Array:
        cross_entropy = _cross_entropy(parameters, standardized, labels)
        return jnp.mean(cross_entropy) + _penalty(parameters, l2_regularization)

    optimizer = optax.lbfgs()
    value_and_grad = optax.value_and_grad_from_state(objective)

    def gradient_norm(state: optax.OptState) -> Array:
        return optax.tree.norm(optax.tree.get(state, "grad"))

    def is_unfinished(carry: tuple[ProbeParameters, optax.OptState]) -> Array:
        _, state = carry
        num_iterations = optax.tree.get(state, "count")
        is_far = (num_iterations == 0) | (gradient_norm(state) > tolerance)
        return is_far & (num_iterations < max_iterations)

    def iterate(
        carry: tuple[ProbeParameters, optax.OptState],
    ) -> tuple[ProbeParameters, optax.OptState]:
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


def _largest_eigenvalue(key: Array, features: Array, standardise: Standardization) -> Array:
    """Largest eigenvalue of the correlation matrix of the features, `[]`, by power iteration."""

    def correlate(_: int, vector: Array) -> Array:
        # This is the product with standardized features, without a standardized copy of them.
        scaled = vector / standardise.std
        product = exact_matmul(features, scaled) - jnp.vdot(standardise.mean, scaled)
        back = exact_matmul(product, features) - jnp.sum(product) * standardise.mean
        image = back / standardise.std / features.shape[0]
        return image / jnp.maximum(jnp.linalg.norm(vector), float(jnp.finfo(vector.dtype).tiny))

    start = jax.random.normal(key, [features.shape[1]], features.dtype)
    return jnp.linalg.norm(jax.lax.fori_loop(0, 20, correlate, start))


@functools.partial(jax.jit, static_argnames=("num_epochs", "batch_size"))
def fit_sgd(
    initial: ProbeParameters,
    features: Array,
    labels: Array,
    standardise: Standardization,
    l2_regularization: Array,
    key: Array,
    *,
    num_epochs: int,
    batch_size: int,
) -> tuple[ProbeParameters, Array]:
    """Minimizes the penalized cross-entropy by SGD: final parameters and their gradient norm."""
    num_examples = features.shape[0]
    steps_per_epoch = -(-num_examples // batch_size)
    num_padded = steps_per_epoch * batch_size - num_examples

    def batches(order: Array) -> tuple[Array, Array]:
        """Rows and weights of one epoch, each `[steps_per_epoch, batch_size]`; every row once."""
        row = jnp.pad(order, (0, num_padded)).reshape(steps_per_epoch, batch_size)
        weight = jnp.pad(jnp.ones(num_examples, features.dtype), (0, num_padded))
        return row, weight.reshape(steps_per_epoch, batch_size)

    def objective(parameters: ProbeParameters, row: Array, weight: Array) -> Array:
        cross_entropy = _cross_entropy(parameters, standardise(features[row]), labels[row])
        # Divide by batch_size and not by the sum of the weights, so that the examples of a short
        # last batch weigh as much as all others.
        return jnp.vdot(weight, cross_entropy) / batch_size + _penalty(
            parameters, l2_regularization
        )

    eigenvalue_key, order_key = jax.random.split(key)
    # The Hessian of the softmax cross-entropy is at most half the correlation matrix (Böhning
    # 1992), and the bias adds an eigenvalue of one half. A step size of one over this bound is
    # stable with momentum 0.9.
    largest_eigenvalue = _largest_eigenvalue(eigenvalue_key, features, standardise)
    curvature = jnp.maximum(largest_eigenvalue, 1) / 2 + l2_regularization
    decay = optax.cosine_decay_schedule(1.0, num_epochs * steps_per_epoch)
    optimizer = optax.sgd(lambda step: decay(step) / curvature, momentum=0.9)

    def step(
        carry: tuple[ProbeParameters, optax.OptState], batch: tuple[Array, Array]
    ) -> tuple[tuple[ProbeParameters, optax.OptState], None]:
        parameters, state = carry
        gradient = jax.grad(objective)(parameters, *batch)
        updates, state = optimizer.update(gradient, state, parameters)
        return (optax.tree.add(parameters, updates), state), None

    def run_epoch(
        epoch: int, carry: tuple[ProbeParameters, optax.OptState]
    ) -> tuple[ProbeParameters, optax.OptState]:
        order = jax.random.permutation(jax.random.fold_in(order_key, epoch), num_examples)
        return jax.lax.scan(step, carry, batches(order))[0]

    parameters, _ = jax.lax.fori_loop(0, num_epochs, run_epoch, (initial, optimizer.init(initial)))

    def add_gradient(
        total: ProbeParameters, batch: tuple[Array, Array]
    ) -> tuple[ProbeParameters, None]:
        row, weight = batch

        def summed(p: ProbeParameters) -> Array:
            return jnp.vdot(weight, _cross_entropy(p, standardise(features[row]), labels[row]))

        return optax.tree.add(total, jax.grad(summed)(parameters)), None

    zeros = optax.tree.zeros_like(parameters)
    total, _ = jax.lax.scan(add_gradient, zeros, batches(jnp.arange(num_examples)))
    weights_gradient = total.weights / num_examples + l2_regularization * parameters.weights
    gradient = ProbeParameters(weights_gradient, total.bias / num_examples)
    return parameters, optax.tree.norm(gradient)


class ProbeSettings(NamedTuple):
    """Arguments of `fit_linear_probe` that say how to fit."""

    num_classes: int
    solver: Solver | Literal["auto"]
    max_iterations: int
    tolerance: float
    num_epochs: int
    batch_size: int
    seed: int


def checked_settings(**given: Any) -> ProbeSettings:
    """Checks the settings of a probe; an error names the setting."""
    if given["solver"] not in ("auto", *SOLVER_NAMES):
        raise ValueError(
            f"solver must be one of {('auto', *SOLVER_NAMES)}, got {given['solver']!r}"
        )
    whole_numbers = {
        "num_classes": (2, 2**31 - 1),
        "max_iterations": (1, 2**31 - 1),
        "num_epochs": (1, None),
        "batch_size": (1, None),
        "seed": (0, arguments.LARGEST_SEED),
    }
    for name, (at_least, at_most) in whole_numbers.items():
        given[name] = arguments.whole_number(name, given[name], at_least=at_least, at_most=at_most)
    given["tolerance"] = arguments.positive_number("tolerance", given["tolerance"])
    return ProbeSettings(**given)


def checked_strength(value: Any) -> float:
    """Checks the strength of the penalty, which is at least 0."""
    strength = arguments.real_number("l2_regularization", value)
    if not (strength >= 0 and np.isfinite(strength)):
        raise ValueError(f"l2_regularization must be at least 0 and finite, got {strength}")
    return strength


def zero_parameters(features: Array, num_classes: int) -> ProbeParameters:
    """Zero weights and bias, where a search starts."""
    return ProbeParameters(
        weights=jax.device_put(np.zeros([features.shape[1], num_classes], features.dtype)),
        bias=jax.device_put(np.zeros([num_classes], features.dtype)),
    )
