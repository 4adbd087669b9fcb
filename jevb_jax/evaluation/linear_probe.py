"""Linear probes: multinomial logistic regression, its penalty chosen on a validation split."""

import dataclasses
from collections.abc import Iterable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from jevb_jax import arguments
from jevb_jax.evaluation.labeled_features import (
    Split,
    check_same_width,
    checked_features,
    checked_labels,
    share_of_right,
)
from jevb_jax.evaluation.probe_solvers import (
    LBFGS_MAX_ELEMENTS,
    SOLVER_NAMES,
    ProbeParameters,
    ProbeSettings,
    Solver,
    Standardization,
    checked_settings,
    checked_strength,
    fit_lbfgs,
    fit_sgd,
    fit_standardization,
    logits_of,
    zero_parameters,
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LinearProbe:
    """Multinomial logistic regression on standardized features, and how the fit ended.

    Attributes:
      weights: `[F, C]`, for standardized features.
      bias: `[C]`.
      feature_mean: `[F]`, mean of the training features.
      feature_std: `[F]`, standard deviation of the training features; 1 for a constant feature.
      gradient_norm: `[]`, norm of the gradient of the penalized mean cross-entropy over the
        training set, at the final parameters.
      converged: `[]` bool, whether `gradient_norm` fell below the tolerance; rarely true with SGD.
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


def _checked_probe_labels(
    name: str, labels: ArrayLike, features: Array, settings: ProbeSettings
) -> Array:
    """Labels as int32. Refuses a class count whose weights would waste memory."""
    num_classes = settings.num_classes
    checked = checked_labels(name, labels, num_examples=features.shape[0], num_classes=num_classes)
    num_present = len(np.unique(checked))
    num_weights = features.shape[1] * num_classes
    if num_weights > LBFGS_MAX_ELEMENTS and num_present < num_classes / 10:
        raise ValueError(
            f"num_classes = {num_classes:,} needs {num_weights:,} weights, but {name} hold "
            f"{num_present:,} classes: number these from 0, for example by "
            "np.unique(labels, return_inverse=True)[1]"
        )
    return jax.device_put(checked.astype(np.int32))


def _fit(
    features: Array,
    labels: Array,
    standardise: Standardization,
    initial: ProbeParameters,
    *,
    l2_regularization: float,
    settings: ProbeSettings,
) -> LinearProbe:
    """Fits once; the inputs are already checked."""
    num_examples, num_features = features.shape
    spread = float(np.max(np.asarray(standardise.std)))
    if spread > float(jnp.finfo(features.dtype).max) / 8:  # XLA may read its inverse as zero
        raise ValueError(
            f"features vary by up to {spread:.3g}, which is too much for {features.dtype}: divide "
            "them by one large number"
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
        parameters, gradient_norm, num_iterations = fit_lbfgs(
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
        parameters, gradient_norm = fit_sgd(
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
            f"the fit by {SOLVER_NAMES[solver]} overflowed {features.dtype}. Divide all features "
            "by one large number, or lower l2_regularization"
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
    """Fits multinomial logistic regression on standardized features.

    Minimizes `mean cross-entropy + l2_regularization / 2 * |weights|^2`; the bias is not penalized.
    This is scikit-learn's `LogisticRegression(C=1 / (N * l2_regularization))`. Features are
    standardized by the mean and standard deviation of `features`.

    Args:
      features: `[N, F]`. The whole array is put on the device.
      labels: `[N]` integers. A class may have no example; its bias then falls until the gradient
        is within the tolerance.
      num_classes: `C`, at least 2 and above every label. The probe has weights for each class, so
        number the classes without large gaps.
      l2_regularization: strength of the penalty, at least 0. If it is 0 and the classes are
        separable, the optimum lies at infinity, and the fit ends when the gradient is within the
        tolerance.
      solver: "lbfgs" (full batch; holds two arrays `[N, F]` and several `[N, C]`), "sgd"
        (minibatches, momentum 0.9, cosine decay from one over the bound on the curvature), or
        "auto". "auto" takes SGD when features and logits together have more than
        `LBFGS_MAX_ELEMENTS` numbers.
      max_iterations: L-BFGS stops after this many iterations, with `converged` false.
      tolerance: L-BFGS stops at this gradient norm. The objective is then within
        `tolerance^2 / (2 l2_regularization)` of its minimum. Float32 may not reach 1e-6.
      num_epochs: how often SGD visits every example.
      batch_size: number of examples in one step of SGD.
      seed: sets the order in which SGD visits the examples.

    Raises:
      ValueError: shapes do not fit, a value is not finite, a label or setting is out of range, or
        the fit overflows.
      TypeError: features are not floating point, or labels are not integers.
    """
    settings = checked_settings(
        num_classes=num_classes,
        solver=solver,
        max_iterations=max_iterations,
        tolerance=tolerance,
        num_epochs=num_epochs,
        batch_size=batch_size,
        seed=seed,
    )
    strength = checked_strength(l2_regularization)
    x = checked_features("features", features)
    y = _checked_probe_labels("labels", labels, x, settings)
    return _fit(
        x,
        y,
        fit_standardization(x),
        zero_parameters(x, settings.num_classes),
        l2_regularization=strength,
        settings=settings,
    )


def probe_logits(probe: LinearProbe, features: ArrayLike) -> Array:
    """Logits of a probe, `[M, C]`, for features `[M, F]`.

    Raises:
      ValueError: the number of features is not the probe's, or a value is not finite.
      TypeError: features are not floating point.
    """
    x = checked_features("features", features)
    check_same_width("features", x, "the probe's weights", probe.weights.T)
    standardise = Standardization(probe.feature_mean, probe.feature_std)
    return _standardized_logits(ProbeParameters(probe.weights, probe.bias), standardise, x)


@jax.jit
def _standardized_logits(
    parameters: ProbeParameters, standardise: Standardization, features: Array
) -> Array:
    return logits_of(parameters, standardise(features))


def probe_accuracy(probe: LinearProbe, features: ArrayLike, labels: ArrayLike) -> float:
    """Share of rows that the probe classifies correctly; the lowest class wins a tie.

    Args:
      features: `[M, F]`.
      labels: `[M]` integers.

    Returns:
      Accuracy in [0, 1].

    Raises:
      ValueError: a label is out of range, or for the reasons of `probe_logits`.
      TypeError: labels are not integers, or features are not floating point.
    """
    logits = probe_logits(probe, features)
    num_examples, num_classes = logits.shape
    checked = checked_labels("labels", labels, num_examples=num_examples, num_classes=num_classes)
    return share_of_right(np.argmax(np.asarray(logits), axis=-1), checked)


class GridPoint(NamedTuple):
    """One strength of the penalty that was tried.

    Attributes:
      validation_accuracy: in [0, 1].
      converged: whether the fit reached its tolerance.
      num_iterations: iterations of this fit, which started from the solution of the one before.
    """

    l2_regularization: float
    validation_accuracy: float
    converged: bool
    num_iterations: int


class ProbeSelection(NamedTuple):
    """A probe whose penalty was chosen on a validation split.

    Attributes:
      probe: the chosen probe, fitted on the training split.
      l2_regularization: the chosen strength.
      validation_accuracy: in [0, 1], at the chosen strength. It is optimistic, because it is the
        largest of the grid. Report the test accuracy instead.
      grid: every strength that was tried, from the strongest to the weakest.
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
    solver: Solver | Literal["auto"] = "auto",
    max_iterations: int = 1000,
    tolerance: float = 1e-5,
    num_epochs: int = 100,
    batch_size: int = 1024,
    seed: int = 0,
) -> ProbeSelection:
    """Fits a linear probe, with the strength of the penalty that is best on a validation split.

    The strengths are fitted from the strongest to the weakest. Each fit starts at the solution of
    the fit before it. The problem is convex, so this saves time and does not change the optimum.
    The strongest wins a tie. The other arguments, and the errors, are those of `fit_linear_probe`.

    Args:
      train_features: `[N, F]`.
      train_labels: `[N]` integers.
      validation_features: `[V, F]`, taken from the training data; no row of `train_features`.
      validation_labels: `[V]` integers.
      l2_grid: strengths to try, at least one.
    """
    settings = checked_settings(
        num_classes=num_classes,
        solver=solver,
        max_iterations=max_iterations,
        tolerance=tolerance,
        num_epochs=num_epochs,
        batch_size=batch_size,
        seed=seed,
    )
    strengths = [checked_strength(one) for one in arguments.collected("l2_grid", l2_grid)]
    train_x = checked_features("train_features", train_features)
    train_y = _checked_probe_labels("train_labels", train_labels, train_x, settings)
    validation_x = checked_features("validation_features", validation_features)
    validation_y = checked_labels(
        "validation_labels",
        validation_labels,
        num_examples=validation_x.shape[0],
        num_classes=settings.num_classes,
    ).astype(np.int32)
    check_same_width("train_features", train_x, "validation_features", validation_x)

    standardise = fit_standardization(train_x)
    parameters = zero_parameters(train_x, settings.num_classes)
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
        parameters = ProbeParameters(probe.weights, probe.bias)
        probes.append(probe)
        grid.append(
            GridPoint(
                l2_regularization=l2_regularization,
                validation_accuracy=probe_accuracy(probe, validation_x, validation_y),
                converged=bool(probe.converged),
                num_iterations=int(probe.num_iterations),
            )
        )
    # `max` keeps the first of equal values, which is the strongest penalty.
    best = max(range(len(grid)), key=lambda i: grid[i].validation_accuracy)
    return ProbeSelection(
        probe=probes[best],
        l2_regularization=grid[best].l2_regularization,
        validation_accuracy=grid[best].validation_accuracy,
        grid=tuple(grid),
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
    stopped_after: int | None = None,
) -> str:
    """Sentence that says how the accuracy of a linear probe was measured.

    Args:
      solver: the solver that fitted the final probe.
      l2_regularization: the chosen strength.
      num_strengths: size of the grid it was chosen from.
      fitted: examples that the final probe was fitted on. If they are a subset, say so in the name,
        for example "10 labels per class of the train split, seed 0".
      validation: examples that chose the strength.
      evaluated: examples that were classified.
      features: name of the features, for example "representation".
      stopped_after: number of iterations of the final probe if it did not converge; None if it did.

    Returns:
      One line: "linear (multinomial logistic regression, L-BFGS), un-augmented standardized
      features, l2=0.001 of 6 chosen on validation (143), fitted on train split (1,294), evaluated
      on test (360)".
    """
    return (
        f"linear (multinomial logistic regression, {SOLVER_NAMES[solver]}), un-augmented "
        f"standardized {features}, l2={l2_regularization:g} of {num_strengths} chosen on "
        f"{validation}, fitted on {fitted}, evaluated on {evaluated}"
        + ("" if stopped_after is None else f", stopped after {stopped_after:,} iterations")
    )
