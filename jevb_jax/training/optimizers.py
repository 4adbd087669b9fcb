"""Optimizers and schedules."""

import operator
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import optax.contrib
from jax import Array
from jax.typing import ArrayLike

from jevb_jax.training.stages import scale_by_stage

_ADAM_RMS = 0.2  # root mean square of AdamW's steps per unit of the learning rate (Liu et al. 2025)


class EarlierLength(NamedTuple):
    """The planned length of a run before it was extended.

    Attributes:
      num_steps: steps that were planned.
      until_step: the schedules of this length hold before this step, those of the next from it on.
    """

    num_steps: int
    until_step: int


def make_schedule(
    *,
    learning_rate: float,
    warmup_steps: int,
    num_steps: int,
    final_learning_rate: float,
    earlier: Sequence[EarlierLength] = (),
) -> optax.Schedule:
    """Linear warm-up from zero, then a cosine; a function of the step alone.

    Args:
      learning_rate: peak.
      warmup_steps: steps of the warm-up, less than `num_steps`.
      num_steps: steps of the run.
      final_learning_rate: value at the end.
      earlier: planned lengths before the run was extended, in their order. From an extension on, the
        rate is that of a run that had the new length from its start. So it jumps up where the
        shorter cosine had already come down.

    Returns:
      step -> learning rate.

    Raises:
      ValueError: the warm-up is not shorter than the run.
    """
    if not 0 <= warmup_steps < num_steps:
        raise ValueError(
            f"the warm-up of {warmup_steps} steps must be shorter than the run of {num_steps} "
            "steps: lower optimizer.warmup_epochs or raise train.num_epochs"
        )

    def of_length(num_steps: int) -> optax.Schedule:
        return optax.warmup_cosine_decay_schedule(
            0.0 if warmup_steps else learning_rate,
            learning_rate,
            warmup_steps,
            num_steps,
            final_learning_rate,
        )

    if not earlier:
        return of_length(num_steps)
    rates = [*(of_length(one.num_steps) for one in earlier), of_length(num_steps)]

    def schedule(step: ArrayLike) -> Array:
        return _by_length(step, [rate(step) for rate in rates], earlier)

    return schedule


def _by_length(
    step: ArrayLike, values: Sequence[ArrayLike], earlier: Sequence[EarlierLength]
) -> Array:
    """Chooses among values, one for each length of a run: the one that holds at a step."""
    chosen = jnp.asarray(values[-1])
    for value, length in zip(values[-2::-1], earlier[::-1], strict=True):
        chosen = jnp.where(jnp.asarray(step) < length.until_step, value, chosen)
    return chosen


def target_decay_at(
    step: ArrayLike,
    *,
    target_decay: float,
    num_steps: int,
    earlier: Sequence[EarlierLength] = (),
) -> Array:
    """Decay of the target network's average at a step (docs eq. 18; Grill et al. 2020, section 3.2).

    `1 - (1 - target_decay) (cos(pi step / num_steps) + 1) / 2` rises from `target_decay` to one. It
    depends on the step alone, so neither resuming nor gradient accumulation changes it.

    Args:
      step: steps done.
      target_decay: the decay at step 0.
      num_steps: steps of the run.
      earlier: see `make_schedule`. At an extension the decay falls back from where the shorter run
        had it.

    Returns:
      `[]`.
    """
    length: ArrayLike = num_steps
    if earlier:
        length = _by_length(step, [*(one.num_steps for one in earlier), num_steps], earlier)
    share = jnp.asarray(step, jnp.float32) / jnp.asarray(length, jnp.float32)
    return 1 - (1 - target_decay) * (jnp.cos(jnp.pi * share) + 1) / 2


def decayed(params: Any) -> Any:
    """Which parameters weight decay and LARS apply to: matrices and kernels only.

    Args:
      params: parameters.

    Returns:
      The same tree of booleans: False on biases, BatchNorm's scales, the radial scale, and learned
      positions and tokens.
    """
    return jax.tree_util.tree_map_with_path(_is_kernel, params)


def _is_kernel(path: Any, leaf: Array) -> bool:
    name = jax.tree_util.keystr(path[-1:], simple=True)
    return leaf.ndim > 1 and name not in ("positions", "registers")


def scale_by_clipped_trust_ratio(
    schedule: optax.Schedule, *, weight_decay: float, trust_coefficient: float
) -> optax.GradientTransformation:
    """LARC: the trust ratio only ever lowers the learning rate (solo-learn's `clip_lr`).

    Each kernel's gradient `g` becomes `(g + wd p) min(1, eta |p| / (|g| + wd |p|) / learning_rate)`;
    other parameters' gradients stay as they are, without weight decay.

    Args:
      schedule: learning rate by step.
      weight_decay: `wd`.
      trust_coefficient: `eta`.

    Returns:
      An Optax transformation, to be followed by SGD with the same schedule.
    """

    def init(params: Any) -> optax.ScaleByScheduleState:
        del params
        return optax.ScaleByScheduleState(jnp.zeros((), jnp.int32))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        if params is None:
            raise ValueError("update needs the parameters as its third argument")
        learning_rate = jnp.asarray(schedule(state.count))

        def one(gradient: Array, parameter: Array, is_kernel: bool) -> Array:
            if not is_kernel:
                return gradient
            norm, gradient_norm = jnp.linalg.norm(parameter), jnp.linalg.norm(gradient)
            # A warm-up starts at a learning rate of zero: nothing is clipped then, and nothing moves.
            rate = trust_coefficient * norm
            limit = learning_rate * (gradient_norm + weight_decay * norm)
            ratio = jnp.where(limit > rate, rate / jnp.where(limit > rate, limit, 1.0), 1.0)
            is_zero = (norm == 0) | (gradient_norm == 0)
            scaled = (gradient + weight_decay * parameter) * ratio
            return jnp.where(is_zero, gradient, scaled)

        updates = jax.tree.map(one, updates, params, decayed(params))
        return updates, optax.ScaleByScheduleState(optax.safe_increment(state.count))

    return optax.GradientTransformation(init, update)


def make_optimizer(
    *,
    name: str,
    schedule: optax.Schedule,
    momentum: float,
    weight_decay: float,
    trust_coefficient: float,
    bias_rate_factor: float,
    max_gradient_norm: float,
    head_learning_rate: float | None = None,
    layer_decay: float = 1.0,
    frozen_stages: int = 0,
) -> optax.GradientTransformation:
    """The optimizer of a run.

    Args:
      name: "sgd", "lars", "larc", "adamw" or "muon". Muon (Jordan 2024) moves every kernel by its
        orthogonalized momentum, at the size of AdamW's steps (Liu et al. 2025), so it takes AdamW's
        learning rates; it leaves biases and scalars to Adam with Nesterov's momentum.
      schedule: learning rate by step.
      momentum: read by sgd, lars and larc.
      weight_decay: masked by `decayed`; part of the gradient in all but adamw and muon.
      trust_coefficient: norm of a step over norm of the weights; lars and larc alone use it.
      bias_rate_factor: multiplies the learning rate of biases, BatchNorm and scalars; Barlow Twins
        takes 0.024.
      max_gradient_norm: global norm to which gradients are clipped; 0 is off.
      head_learning_rate: constant learning rate of the head (SimSiam's predictor); None follows the
        schedule.
      layer_decay: see `stages.scale_by_stage`; 1 is off.
      frozen_stages: see `stages.scale_by_stage`; 0 is off.

    Returns:
      An Optax transformation.

    Raises:
      ValueError: unknown name.
    """

    def update(schedule: optax.Schedule) -> optax.GradientTransformation:
        if name == "sgd":
            return optax.chain(
                optax.add_decayed_weights(weight_decay, mask=decayed),
                optax.sgd(schedule, momentum=momentum),
            )
        if name == "lars":
            return optax.lars(
                schedule,
                weight_decay=weight_decay,
                weight_decay_mask=decayed,
                trust_coefficient=trust_coefficient,
                trust_ratio_mask=decayed,
                momentum=momentum,
            )
        if name == "larc":
            return optax.chain(
                scale_by_clipped_trust_ratio(
                    schedule, weight_decay=weight_decay, trust_coefficient=trust_coefficient
                ),
                optax.sgd(schedule, momentum=momentum),
            )
        if name == "adamw":
            return optax.adamw(schedule, weight_decay=weight_decay, mask=decayed)
        if name == "muon":
            return optax.contrib.muon(
                schedule,
                weight_decay=weight_decay,
                muon_weight_dimension_numbers=_as_matrices,
                consistent_rms=_ADAM_RMS,
            )
        raise ValueError(f"optimizer.name must be sgd, lars, larc, adamw or muon, got {name!r}")

    steps: list[optax.GradientTransformation] = []
    if max_gradient_norm > 0:
        steps.append(optax.clip_by_global_norm(max_gradient_norm))
    if head_learning_rate is None:
        steps.append(update(schedule))
    else:
        parts: dict[Hashable, optax.GradientTransformation] = {
            "head": update(lambda _: jnp.asarray(head_learning_rate)),
            "rest": update(schedule),
        }
        steps.append(optax.partition(parts, _head_or_rest))
    if bias_rate_factor != 1:
        steps.append(optax.masked(optax.scale(bias_rate_factor), _not_decayed))
    if layer_decay != 1 or frozen_stages:
        steps.append(scale_by_stage(layer_decay=layer_decay, frozen_stages=frozen_stages))
    return steps[0] if len(steps) == 1 else optax.chain(*steps)


def _as_matrices(params: Any) -> Any:
    """Which axes of a kernel Muon takes as rows: all but the last, so a convolution is one matrix."""

    def axes(path: Any, leaf: Array) -> optax.contrib.MuonDimensionNumbers | None:
        if not _is_kernel(path, leaf):
            return None
        return optax.contrib.MuonDimensionNumbers(tuple(range(leaf.ndim - 1)), leaf.ndim - 1)

    return jax.tree_util.tree_map_with_path(axes, params)


def _not_decayed(params: Any) -> Any:
    return jax.tree.map(operator.not_, decayed(params))


def _head_or_rest(params: Any) -> Any:
    def part(path: Any, leaf: Array) -> str:
        del leaf
        return "head" if path[0].key == "head" else "rest"

    return jax.tree.map_with_path(part, params)
