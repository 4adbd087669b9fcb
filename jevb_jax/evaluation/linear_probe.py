"""Linear probes: multinomial logistic regression, its strength chosen on validation."""

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
    """Multinomial logistic regression on standardized features, and how its fit ended.

    Attributes:
      weights: `[F, C]`, for standardized features.
      bias: `[C]`.
      feature_mean: `[F]`, of the training features.
      feature_std: `[F]`, of the training features; 1 for a feature that is constant there.
      gradient_norm: `[]`, of the penalized mean cross-entropy over the training set, at the end.
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


def _checked_probe_labels(
    name: str, labels: ArrayLike, features: Array, settings: ProbeSettings
) -> Array:
    """Labels, int32, of a probe whose weights have a use for the memory that they take."""
    num_classes = settings.num_classes
    checked = checked_labels(name, labels, num_examples=features.shape[0], num_classes=num_classes)
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
    standardise: Standardization,
    initial: ProbeParameters,
    *,
    l2_regularization: float,
    settings: ProbeSettings,
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
    """Multinomial logistic regression on standardized features.

    Minimizes `mean cross-entropy + l2_regularization / 2 * |weights|^2`; the bias is not penalized.
    That is scikit-learn's `LogisticRegression(C=1 / (N * l2_regularization))`. Features are
    standardized by the mean and standard deviation of `features`.

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
      num_epochs: how often SGD visits every example.
      batch_size: examples in a step of SGD.
      seed: decides the order in which SGD visits examples.

    Returns:
      `LinearProbe`.

    Raises:
      ValueError: shapes that do not fit, values that are not finite, labels or settings out of
        range, a fit that overflows.
      TypeError: features that are not floating point, labels that are not integers.
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
    x = checked_features("features", features)
    check_same_width("features", x, "the probe's weights", probe.weights.T)
    standardise = Standardization(probe.feature_mean, probe.feature_std)
    return _standardised_logits(ProbeParameters(probe.weights, probe.bias), standardise, x)


@jax.jit
def _standardised_logits(
    parameters: ProbeParameters, standardise: Standardization, features: Array
) -> Array:
    return logits_of(parameters, standardise(features))


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
    checked = checked_labels("labels", labels, num_examples=num_examples, num_classes=num_classes)
    return share_of_right(np.argmax(np.asarray(logits), axis=-1), checked)


class GridPoint(NamedTuple):
    """One regularization strength tried.

    Attributes:
      l2_regularization: the strength.
      validation_accuracy: in [0, 1].
      converged: whether the fit reached its tolerance.
      num_iterations: how many its fit took, from the warm start.
    """

    l2_regularization: float
    validation_accuracy: float
    converged: bool
    num_iterations: int


class ProbeSelection(NamedTuple):
    """A probe whose regularization was chosen on a validation split.

    Attributes:
      probe: the chosen one; fitted on the training split, or on both where `refit` was asked for.
      l2_regularization: the chosen strength.
      validation_accuracy: in [0, 1], of the chosen strength fitted on the training split alone. It
        is optimiztic, being the largest of the grid: report test accuracy.
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
    """Linear probe with the regularization that classifies a validation split best.

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
      max_iterations: where L-BFGS ends at the latest.
      tolerance: norm of the gradient at which L-BFGS ends.
      num_epochs: how often SGD visits every example.
      batch_size: examples in a step of SGD.
      seed: decides the order in which SGD visits examples.

    Returns:
      `ProbeSelection`.

    Raises:
      ValueError: an empty grid; as `fit_linear_probe`.
      TypeError: as `fit_linear_probe`.
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
    # `max` keeps the first of equals, the strongest.
    best = max(range(len(grid)), key=lambda i: grid[i].validation_accuracy)
    probe = probes[best]
    if refit:
        both_x = jnp.concatenate([train_x, validation_x])
        probe = _fit(
            both_x,
            jnp.concatenate([train_y, validation_y]),
            fit_standardization(both_x),
            ProbeParameters(probe.weights, probe.bias),
            l2_regularization=grid[best].l2_regularization,
            settings=settings,
        )
    return ProbeSelection(
        probe=probe,
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
      One line: "linear (multinomial logistic regression, L-BFGS), un-augmented standardized
      features, l2=0.001 of 6 chosen on validation (143), fitted on train split (1,294), evaluated
      on test (360)".
    """
    return (
        f"linear (multinomial logistic regression, {SOLVER_NAMES[solver]}), un-augmented "
        f"standardised {features}, l2={l2_regularization:g} of {num_strengths} chosen on "
        f"{validation}, fitted on {fitted}, evaluated on {evaluated}"
    )
