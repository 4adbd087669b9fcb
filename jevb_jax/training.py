"""Training: the state, the pure step, and the only loop.

A run is a pure function of its config: the batch, the augmentation and the posterior's samples of step
`t` follow from `(seed, t)` alone. So a checkpoint needs no more than the state and its step.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.typing import ArrayLike

from jevb_jax import augmentations, health, objective
from jevb_jax.networks import JointEmbeddingModel, ViewOutputs


class TrainState(NamedTuple):
    """Everything that a step reads and writes.

    Attributes:
      step: steps done, int32 scalar.
      params: parameters of the model.
      batch_stats: running statistics of BatchNorm.
      opt_state: state of the optimizer.
      ema_params: exponential moving average of `params`, or None when it is off.
    """

    step: Array
    params: Any
    batch_stats: Any
    opt_state: Any
    ema_params: Any

    @property
    def evaluation_variables(self) -> dict[str, Any]:
        """Variables to evaluate with: the averaged parameters where there are any."""
        params = self.params if self.ema_params is None else self.ema_params
        return {"params": params, "batch_stats": self.batch_stats}


@dataclasses.dataclass(frozen=True)
class ObjectiveSettings:
    """Keyword arguments of the objective and the warm-up of its KL; see `conditional_elbo`."""

    df: float
    radial_df: float
    scale_units: objective.ScaleUnits
    prior_scale: float
    coordinates: Any
    space: Any
    num_samples: int
    kl_weight: float
    radial_weight: float
    kl_warmup_steps: int

    def keywords(self, step: ArrayLike) -> dict[str, Any]:
        """Arguments of `symmetric_elbo` at `step`, all but the radial scale, which is learned."""
        settings = dataclasses.asdict(self)
        warmup_steps = settings.pop("kl_warmup_steps")
        if warmup_steps:
            share = jnp.minimum(1.0, jnp.asarray(step, jnp.float32) / warmup_steps)
            settings["kl_weight"] = self.kl_weight * share
        return settings


def multi_view_elbo(
    key: Array, views: Sequence[ViewOutputs], **settings: Any
) -> objective.ElboTerms:
    """Mean of `elbo(t | s)` over targets `t` in the first two views and sources `s != t`.

    With two views it is `symmetric_elbo`. Further views are smaller crops: sources only.

    Args:
      key: `[batch]` keys, one for each example.
      views: two views, then small crops.
      **settings: see `conditional_elbo`.

    Returns:
      `ElboTerms` of `[batch]` arrays.
    """
    terms = objective.symmetric_elbo(key, views[0], views[1], **settings)
    num_pairs = 2
    total = jax.tree.map(lambda value: num_pairs * value, terms)
    for index, small in enumerate(views[2:]):
        for target in views[:2]:
            pair_keys = jax.vmap(jax.random.fold_in, (0, None))(key, num_pairs + index)
            pair = objective.conditional_elbo(
                pair_keys,
                target.embedding,
                small.posterior_mean,
                small.posterior_scale,
                **settings,
            )
            total = jax.tree.map(jnp.add, total, pair)
            num_pairs += 1
    return jax.tree.map(lambda value: value / num_pairs, total)


def make_schedule(
    *, learning_rate: float, warmup_steps: int, num_steps: int, final_learning_rate: float
) -> optax.Schedule:
    """Linear warm-up from zero, then a cosine; a function of the step alone.

    Args:
      learning_rate: peak.
      warmup_steps: steps of the warm-up, less than `num_steps`.
      num_steps: steps of the run.
      final_learning_rate: value at the end.

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
    return optax.warmup_cosine_decay_schedule(
        0.0 if warmup_steps else learning_rate,
        learning_rate,
        warmup_steps,
        num_steps,
        final_learning_rate,
    )


def decayed(params: Any) -> Any:
    """Mask of the parameters that weight decay and LARS adapt: matrices and kernels only.

    Args:
      params: parameters.

    Returns:
      The same tree of booleans: False on biases, BatchNorm's scales and the radial scale.
    """
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)


def make_optimizer(
    *,
    name: str,
    schedule: optax.Schedule,
    momentum: float,
    weight_decay: float,
    max_gradient_norm: float,
) -> optax.GradientTransformation:
    """The optimizer of a run.

    Args:
      name: "sgd", "lars" or "adamw".
      schedule: learning rate by step.
      momentum: of sgd and lars.
      weight_decay: masked by `decayed`; coupled (in the gradient) in sgd and lars, decoupled in adamw.
      max_gradient_norm: global norm to which gradients are clipped; 0 is off.

    Returns:
      An Optax transformation.

    Raises:
      ValueError: unknown name.
    """
    if name == "sgd":
        update = optax.chain(
            optax.add_decayed_weights(weight_decay, mask=decayed),
            optax.sgd(schedule, momentum=momentum),
        )
    elif name == "lars":
        update = optax.lars(
            schedule,
            weight_decay=weight_decay,
            weight_decay_mask=decayed,
            trust_ratio_mask=decayed,
            momentum=momentum,
        )
    elif name == "adamw":
        update = optax.adamw(schedule, weight_decay=weight_decay, mask=decayed)
    else:
        raise ValueError(f"optimizer.name must be sgd, lars or adamw, got {name!r}")
    if max_gradient_norm > 0:
        return optax.chain(optax.clip_by_global_norm(max_gradient_norm), update)
    return update


def init_state(
    key: Array,
    model: JointEmbeddingModel,
    optimizer: optax.GradientTransformation,
    view_shape: tuple[int, int, int],
    *,
    ema_decay: float = 0.0,
) -> TrainState:
    """The state before the first step.

    Args:
      key: consumed.
      model: networks.
      optimizer: as given to `train_step`.
      view_shape: `(height, width, channels)` of a view.
      ema_decay: of the parameters' average; 0 is off.

    Returns:
      The state.
    """
    # Compiled: operation by operation, initialising a ResNet takes many times longer.
    init = jax.jit(functools.partial(model.init, train=True))
    variables = init(key, jnp.zeros((2, *view_shape)))
    params = variables["params"]
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        batch_stats=variables["batch_stats"],
        opt_state=optimizer.init(params),
        ema_params=jax.tree.map(jnp.copy, params) if ema_decay > 0 else None,
    )


def apply_views(
    model: nn.Module, params: Any, batch_stats: Any, views: Sequence[Array], *, train: bool
) -> tuple[list[ViewOutputs], Any]:
    """Runs each view through the networks in turn: BatchNorm normalises a view by itself.

    Args:
      model: networks.
      params: parameters.
      batch_stats: running statistics.
      views: each `[batch, h, w, c]`, normalised.
      train: batch statistics (and their running update) or running ones.

    Returns:
      The outputs of every view, and the updated statistics.
    """
    outputs = []
    for view in views:
        variables = {"params": params, "batch_stats": batch_stats}
        if train:
            output, updated = model.apply(variables, view, train=True, mutable=["batch_stats"])
            batch_stats = updated["batch_stats"]
        else:
            output = model.apply(variables, view, train=False)
        outputs.append(output)
    return outputs, batch_stats


def train_step(
    state: TrainState,
    images: Array,
    key: Array,
    *,
    model: JointEmbeddingModel,
    optimizer: optax.GradientTransformation,
    view_augmentations: Sequence[augmentations.ViewAugmentation],
    settings: ObjectiveSettings,
    num_micro_batches: int = 1,
    ema_decay: float = 0.0,
    use_batch_statistics: bool = True,
) -> tuple[TrainState, dict[str, Array]]:
    """One step of training, a pure function; the one place where examples are averaged.

    Args:
      state: before the step.
      images: `[batch, h, w, c]` uint8.
      key: the run's key; the step folds in its own number.
      model: networks.
      optimizer: as in `init_state`.
      view_augmentations: of view 1, view 2 and, optionally, small crops.
      settings: of the objective.
      num_micro_batches: equal parts whose gradients are averaged; it divides the batch. BatchNorm sees
        one part at a time.
      ema_decay: of the parameters' average, if the state has one.
      use_batch_statistics: False freezes BatchNorm at its running statistics.

    Returns:
      The state after the step, and metrics of the batch: scalars, likelihoods and bounds in nats, the
      loss in nats per dimension.
    """
    batch_size = images.shape[0]
    example_keys = jax.random.split(jax.random.fold_in(key, state.step), batch_size)
    purpose_keys = jax.vmap(functools.partial(jax.random.split, num=2))(example_keys)
    keywords = settings.keywords(state.step)

    def loss_fn(params: Any, batch_stats: Any, images: Array, keys: Array) -> tuple[Array, Any]:
        views = augmentations.multi_view(keys[:, 0], images, view_augmentations)
        outputs, batch_stats = apply_views(
            model, params, batch_stats, views, train=use_batch_statistics
        )
        radial_scale = model.apply({"params": params}, method=model.radial_scale)
        terms = multi_view_elbo(keys[:, 1], outputs, radial_scale=radial_scale, **keywords)
        embedding = outputs[0].embedding
        loss = -jnp.mean(terms.weighted_elbo) / embedding.shape[-1]
        metrics = {
            "loss": loss,
            "elbo": jnp.mean(terms.elbo),
            "directional_log_likelihood": jnp.mean(terms.directional_log_likelihood),
            "radial_log_likelihood": jnp.mean(terms.radial_log_likelihood),
            "kl": jnp.mean(terms.kl),
            "posterior_scale": jnp.mean(outputs[0].posterior_scale),
            "radial_scale": radial_scale,
            "embedding_std": health.embedding_std(embedding),
        }
        return loss, (batch_stats, metrics)

    def accumulate(carry: tuple[Any, Any, Any], part: tuple[Array, Array]) -> tuple[Any, None]:
        batch_stats, gradients, metrics = carry
        (_, (batch_stats, part_metrics)), part_gradients = jax.value_and_grad(
            loss_fn, has_aux=True
        )(state.params, batch_stats, *part)
        add = functools.partial(jax.tree.map, lambda a, b: a + b / num_micro_batches)
        return (batch_stats, add(gradients, part_gradients), add(metrics, part_metrics)), None

    if num_micro_batches == 1:
        (_, (batch_stats, metrics)), gradients = jax.value_and_grad(loss_fn, has_aux=True)(
            state.params, state.batch_stats, images, purpose_keys
        )
    else:
        parts = jax.tree.map(
            lambda x: x.reshape(num_micro_batches, batch_size // num_micro_batches, *x.shape[1:]),
            (images, purpose_keys),
        )
        shapes = jax.eval_shape(loss_fn, state.params, state.batch_stats, parts[0][0], parts[1][0])
        zero_metrics = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes[1][1])
        zero_gradients = jax.tree.map(jnp.zeros_like, state.params)
        (batch_stats, gradients, metrics), _ = jax.lax.scan(
            accumulate, (state.batch_stats, zero_gradients, zero_metrics), parts
        )

    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema_params = (
        None
        if state.ema_params is None
        else optax.incremental_update(params, state.ema_params, 1 - ema_decay)
    )
    metrics["gradient_norm"] = optax.tree.norm(gradients)
    return TrainState(state.step + 1, params, batch_stats, opt_state, ema_params), metrics


class ChunkResult(NamedTuple):
    """What several steps in one dispatch give back.

    Attributes:
      state: after the last good step.
      metrics: each `[steps_per_dispatch]`; entries from the number of steps asked for on are zero.
      is_finite: False if a loss or gradient was not finite. Then `state` is the one *before* that
        step, whose number is `state.step`.
    """

    state: TrainState
    metrics: dict[str, Array]
    is_finite: Array


def _is_finite(metrics: dict[str, Array]) -> Array:
    return jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["gradient_norm"])


def _select(is_finite: Array, new: TrainState, old: TrainState) -> TrainState:
    """The new state, or the old one: a step that is not finite is not taken but kept as evidence."""
    return jax.tree.map(lambda a, b: jnp.where(is_finite, a, b), new, old)


StepFunction = Callable[[TrainState, Array, Array], tuple[TrainState, dict[str, Array]]]


def make_train_chunk(
    step_fn: StepFunction, *, donate: bool = True
) -> Callable[[TrainState, Array, Array, Array, Array], ChunkResult]:
    """Compiles a loop of steps over images that are on the device.

    The number of steps is an argument of the compiled program, not a constant: one compilation serves
    every chunk, and a run cut anywhere computes the same bits as an uncut one. With `K = 1` there is
    no loop: on the CPU, XLA's convolutions inside a loop run many times slower than outside.

    Args:
      step_fn: `(state, images, key) -> (state, metrics)`.
      donate: reuse the memory of the state that is passed in.

    Returns:
      `chunk(state, images [N, h, w, c], indices [K, batch], num_steps, key) -> ChunkResult`, which runs
      the first `num_steps <= K` rows of indices and stops early when a step is not finite. With none
      to run, the state comes back as it was.
    """

    def chunk(
        state: TrainState, images: Array, indices: Array, num_steps: Array, key: Array
    ) -> ChunkResult:
        def run_step(state: TrainState, index: Array) -> tuple[TrainState, dict[str, Array]]:
            return step_fn(state, jnp.take(images, indices[index], axis=0, mode="clip"), key)

        if indices.shape[0] == 1:
            new_state, metrics = run_step(state, jnp.zeros((), jnp.int32))
            is_finite = _is_finite(metrics)
            return ChunkResult(
                _select(is_finite & (num_steps > 0), new_state, state),
                jax.tree.map(lambda value: value[None], metrics),
                is_finite,
            )

        metric_shapes = jax.eval_shape(run_step, state, jnp.zeros((), jnp.int32))[1]
        buffer = jax.tree.map(
            lambda s: jnp.zeros((indices.shape[0], *s.shape), s.dtype), metric_shapes
        )

        def body(carry: tuple[Array, TrainState, dict[str, Array], Array]) -> Any:
            index, state, buffer, _ = carry
            new_state, metrics = run_step(state, index)
            is_finite = _is_finite(metrics)
            state = _select(is_finite, new_state, state)
            buffer = jax.tree.map(lambda b, m: b.at[index].set(m), buffer, metrics)
            return index + 1, state, buffer, is_finite

        def keep_going(carry: tuple[Array, TrainState, dict[str, Array], Array]) -> Array:
            index, _, _, is_finite = carry
            return (index < num_steps) & is_finite

        start = (jnp.zeros((), jnp.int32), state, buffer, jnp.asarray(True))
        _, state, metrics, is_finite = jax.lax.while_loop(keep_going, body, start)
        return ChunkResult(state, metrics, is_finite)

    return jax.jit(chunk, donate_argnums=(0,) if donate else ())
