"""One step of training: state in, state out."""

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.sharding import Mesh

from jevb_jax import parallel
from jevb_jax.images.views import View, multi_view
from jevb_jax.methods import Loss
from jevb_jax.networks.batch_norm import check_group_size, each_view_alone
from jevb_jax.networks.joint import JointEmbeddingModel, ViewOutputs
from jevb_jax.training import health
from jevb_jax.xla_options import alone_on_a_cpu, jit_once, network_options


class TrainState(NamedTuple):
    """Everything that a step reads and writes.

    Attributes:
      step: steps done, int32 scalar.
      params: parameters of the model.
      batch_stats: running statistics of BatchNorm.
      opt_state: state of the optimizer.
      ema_params: exponential moving average of `params` to evaluate with, or None when it is off.
      target_params: average of backbone and projector that gives the targets (BYOL), or None where
        targets are the other view's own embedding.
    """

    step: Array
    params: Any
    batch_stats: Any
    opt_state: Any
    ema_params: Any
    target_params: Any

    @property
    def evaluation_variables(self) -> dict[str, Any]:
        """Variables to evaluate with: the averaged parameters where there are any."""
        params = self.params if self.ema_params is None else self.ema_params
        return {"params": params, "batch_stats": self.batch_stats}


def compiled_init(
    model: JointEmbeddingModel,
    optimizer: optax.GradientTransformation,
    view_shape: tuple[int, ...],
    *,
    ema_decay: float = 0.0,
    target_decay: float = 0.0,
) -> Callable[[Array], TrainState]:
    """The state before the first step, as a function of the key that compiles once.

    One program: operation by operation, initializing a ResNet takes many times longer.

    Args:
      model: networks.
      optimizer: as given to `train_step`.
      view_shape: `(height, width, channels)` of a view, or `(F,)` of features.
      ema_decay: what the parameters' average keeps at a step; 0 is off.
      target_decay: what the target network keeps at a step; 0 is no such network.

    Returns:
      From a key to the state before the first step.
    """

    def init(key: Array) -> TrainState:
        variables = model.init(key, jnp.zeros((2, *view_shape)), train=True)
        params = variables["params"]
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            batch_stats=variables["batch_stats"],
            opt_state=optimizer.init(params),
            ema_params=jax.tree.map(jnp.copy, params) if ema_decay > 0 else None,
            target_params=jax.tree.map(jnp.copy, _target_part(params))
            if target_decay > 0
            else None,
        )

    return jit_once(init)


def _target_part(params: Any) -> Any:
    """The parameters that an embedding depends on."""
    # Features of a frozen encoder pass a backbone without parameters.
    return {name: params[name] for name in ("backbone", "projector") if name in params}


def apply_views(
    model: nn.Module,
    params: Any,
    batch_stats: Any,
    views: Sequence[Array],
    *,
    train: bool,
    bn_over_views: bool = False,
    bn_group_size: int = 0,
) -> tuple[list[ViewOutputs], Any]:
    """Runs views through the networks, those of one size together.

    Args:
      model: networks.
      params: parameters.
      batch_stats: running statistics.
      views: each `[batch, h, w, c]`, normalized, or `[batch, F]`.
      train: batch statistics (and their running update) or running ones.
      bn_over_views: whether BatchNorm normalizes all views of one size together, or each by itself.
      bn_group_size: how many consecutive examples BatchNorm normalizes together in training; 0 is all.
        Running statistics use the average of the groups' means and variances.

    Returns:
      The outputs of every view, and the updated statistics.

    Raises:
      ValueError: groups of one example, or that do not divide the batch.
    """

    def apply_group(num_views: int, batch_stats: Any, group: Array) -> Any:
        variables = {"params": params, "batch_stats": batch_stats}
        is_apart = num_views > 1 and not bn_over_views
        with each_view_alone(num_views) if is_apart else contextlib.nullcontext():
            return model.apply(variables, group, train=True, mutable=["batch_stats"])

    def apply_batch(num_views: int, batch_stats: Any, batch: Array) -> tuple[Any, Any]:
        if not train:
            variables = {"params": params, "batch_stats": batch_stats}
            return model.apply(variables, batch, train=False), batch_stats
        apply = functools.partial(apply_group, num_views)
        if bn_group_size == 0:
            output, updated = apply(batch_stats, batch)
            return output, updated["batch_stats"]
        check_group_size(bn_group_size, batch.shape[0] // num_views)
        groups = batch.reshape(-1, bn_group_size * num_views, *batch.shape[1:])
        output, updated = jax.vmap(apply, in_axes=(None, 0))(batch_stats, groups)
        output = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), output)
        return output, jax.tree.map(lambda x: x.mean(axis=0), updated["batch_stats"])

    outputs: dict[int, ViewOutputs] = {}
    for members in _passes(views, bn_over_views=bn_over_views):
        if len(members) == 1:
            outputs[members[0]], batch_stats = apply_batch(1, batch_stats, views[members[0]])
            continue
        # Example after example, each with all its views: so a batch stays spread over the devices.
        joint = jnp.stack([views[index] for index in members], axis=1)
        joint = joint.reshape(-1, *joint.shape[2:])
        output, batch_stats = apply_batch(len(members), batch_stats, joint)
        for number, index in enumerate(members):
            start = functools.partial(_every, len(members), number)
            outputs[index] = jax.tree.map(start, output)
    return [outputs[index] for index in range(len(views))], batch_stats


def _every(count: int, number: int, x: Array) -> Array:
    """View `number` of a joint batch of `count` views."""
    return x.reshape(-1, count, *x.shape[1:])[:, number]


def _passes(views: Sequence[Array], *, bn_over_views: bool) -> list[list[int]]:
    """Which views go through the networks together, by their indices.

    Two views that BatchNorm takes apart keep a pass each: their program is that of older versions,
    so old runs continue with the same bits.
    """
    of_size: dict[tuple[int, ...], list[int]] = {}
    for index, view in enumerate(views):
        of_size.setdefault(view.shape, []).append(index)
    passes = []
    for members in of_size.values():
        is_joint = bn_over_views or len(members) > 2
        passes += [members] if is_joint else [[index] for index in members]
    return passes


def train_step(
    state: TrainState,
    images: Array | tuple[Array, ...],
    key: Array,
    *,
    model: JointEmbeddingModel,
    optimizer: optax.GradientTransformation,
    view_augmentations: Sequence[View],
    method: Loss,
    num_full_views: int = 2,
    num_micro_batches: int = 1,
    bn_over_views: bool = False,
    bn_group_size: int = 0,
    ema_decay: float = 0.0,
    target_decay: Callable[[Array], Array] | None = None,
) -> tuple[TrainState, dict[str, Array]]:
    """One step of training, a pure function; the one place where examples are averaged.

    Args:
      state: before the step.
      images: `[batch, h, w, c]` uint8, or a tuple with the crops of each view; or features
        `[batch, F]` or `[batch, V, F]`.
      key: the run's key; the step folds in its own number.
      model: networks.
      optimizer: as in `compiled_init`.
      view_augmentations: what makes the full views and, where there are any, small crops.
      method: see `jevb_jax.methods`.
      num_full_views: so many of the first views are targets.
      num_micro_batches: the batch is cut into so many equal parts, and their gradients are averaged.
        BatchNorm sees one part at a time.
      bn_over_views: whether BatchNorm takes the views of one size together, see `apply_views`.
      bn_group_size: examples that BatchNorm takes together, see `apply_views`; 0 is all of a part.
      ema_decay: what the parameters' average keeps, if the state has one.
      target_decay: step -> decay of the target network, if the state has one.

    Returns:
      The state after the step, and metrics of the batch: scalars, in the method's units.
      `relative_step` is the norm of the step over that of the parameters.
    """
    batch_size = jax.tree.leaves(images)[0].shape[0]
    apply = functools.partial(
        apply_views,
        model,
        train=True,
        bn_over_views=bn_over_views,
        bn_group_size=bn_group_size,
    )
    example_keys = jax.random.split(jax.random.fold_in(key, state.step), batch_size)
    purpose_keys = jax.vmap(functools.partial(jax.random.split, num=2))(example_keys)

    def target_outputs(batch_stats: Any, views: Sequence[Array]) -> list[ViewOutputs] | None:
        """Outputs of the target network. Its BatchNorm sees the batch but keeps no statistics."""
        if state.target_params is None:
            return None
        target_params = {**state.params, **state.target_params}
        return apply(target_params, batch_stats, views)[0]

    def loss_fn(params: Any, batch_stats: Any, images: Any, keys: Array) -> tuple[Array, Any]:
        views = multi_view(keys[:, 0], images, view_augmentations)
        targets = target_outputs(batch_stats, views[:num_full_views])
        outputs, batch_stats = apply(params, batch_stats, views)
        output = method(
            keys[:, 1],
            outputs,
            outputs[:num_full_views] if targets is None else targets,
            step=state.step,
            radial_scale=_radial_scale(model, params),
        )
        metrics = {name: jnp.mean(value) for name, value in output.metrics.items()}
        metrics["loss"] = jnp.mean(output.loss)
        metrics["embedding_std"] = health.embedding_std(outputs[0].embedding)
        loss = metrics["loss"]
        return loss, (batch_stats, metrics)

    def accumulate(carry: tuple[Any, Any, Any], part: tuple[Any, Array]) -> tuple[Any, None]:
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
        # A part takes every n-th example, so that each part is spread over all devices as the batch is.
        parts = jax.tree.map(
            lambda x: x.reshape(-1, num_micro_batches, *x.shape[1:]).swapaxes(0, 1),
            (images, purpose_keys),
        )
        first = jax.tree.map(lambda x: x[0], parts)
        shapes = jax.eval_shape(loss_fn, state.params, state.batch_stats, *first)
        zero_metrics = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes[1][1])
        zero_gradients = jax.tree.map(jnp.zeros_like, state.params)
        # XLA's CPU convolutions are ten times slower inside a loop: there the parts are written out.
        (batch_stats, gradients, metrics), _ = jax.lax.scan(
            accumulate,
            (state.batch_stats, zero_gradients, zero_metrics),
            parts,
            unroll=alone_on_a_cpu(),
        )

    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema_params = (
        None
        if state.ema_params is None
        else optax.incremental_update(params, state.ema_params, 1 - ema_decay)
    )
    target_params = state.target_params
    if target_params is not None:
        if target_decay is None:
            raise ValueError("a state with target_params needs target_decay")
        target_params = optax.incremental_update(
            _target_part(params), target_params, 1 - target_decay(state.step)
        )
    metrics["gradient_norm"] = optax.tree.norm(gradients)
    # It falls by itself where parameters grow; then a run learns more slowly than its schedule says.
    metrics["relative_step"] = optax.tree.norm(updates) / optax.tree.norm(state.params)
    new_state = TrainState(
        state.step + 1, params, batch_stats, opt_state, ema_params, target_params
    )
    return new_state, metrics


def _radial_scale(model: JointEmbeddingModel, params: Any) -> Array | None:
    if model.initial_radial_scale is None:
        return None
    scale: Any = model.apply({"params": params}, method=model.radial_scale)
    return scale


class ChunkResult(NamedTuple):
    """What several steps in one dispatch give back.

    Attributes:
      state: after the last good step.
      metrics: each `[steps_per_dispatch]`, without meaning for the steps that were not asked for.
      is_finite: False if a loss or gradient was not finite. Then `state` is the one *before* that
        step, whose number is `state.step`.
    """

    state: TrainState
    metrics: dict[str, Array]
    is_finite: Array


def _is_finite(metrics: dict[str, Array]) -> Array:
    return jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["gradient_norm"])


def _select(is_finite: Array, new: TrainState, old: TrainState) -> TrainState:
    """The new state, or the old one: the state before a bad step is the evidence."""
    return jax.tree.map(lambda a, b: jnp.where(is_finite, a, b), new, old)


# From a state, a batch (images, or a tree of arrays with the examples first) and the run's key.
StepFunction = Callable[[TrainState, Any, Array], tuple[TrainState, dict[str, Array]]]


def state_shardings(state: TrainState, mesh: Mesh, *, shard_optimizer_state: bool) -> TrainState:
    """How a state lies on the devices: whole on each, or with the optimizer's part cut (ZeRO-1).

    Args:
      state: arrays or shapes.
      mesh: the devices, from `parallel.make_mesh`.
      shard_optimizer_state: whether each device keeps only a part of the optimizer's state.

    Returns:
      The same tree of shardings.
    """
    everywhere = jax.tree.map(lambda _: parallel.replicated(mesh), state)
    if not shard_optimizer_state:
        return everywhere
    return everywhere._replace(opt_state=parallel.over_data_where_divisible(mesh, state.opt_state))


def make_train_chunk(
    step_fn: StepFunction,
    *,
    donate: bool = True,
    mesh: Mesh | None = None,
    shardings: TrainState | None = None,
) -> Callable[[TrainState, Any, Array | None, Array, Array], ChunkResult]:
    """Compiles a loop of steps over examples that are on the device.

    The compiled program takes the number of steps as an argument. So it is compiled once, and a run that
    was cut anywhere computes the same bits as an uncut one. With `K = 1` there is no loop: on the CPU,
    XLA's convolutions run many times slower inside one.

    Args:
      step_fn: `(state, batch, key) -> (state, metrics)`.
      donate: whether to reuse the memory of the state that is passed in.
      mesh: the devices that share every batch; None for one device.
      shardings: how the state lies over the devices of a mesh.

    Returns:
      `chunk(state, examples, indices [K, batch], num_steps, key) -> ChunkResult`, which runs the first
      `num_steps <= K` rows of indices and stops early when a step is not finite. With none to run, the
      state comes back as it was. Examples are images `[N, h, w, c]`, or a tree of arrays `[N, ...]` as
      images with their labels. Without indices (None) they are the batches, `[K, batch, ...]`.
    """

    def chunk(
        state: TrainState, examples: Any, indices: Array | None, num_steps: Array, key: Array
    ) -> ChunkResult:
        steps = jax.tree.leaves(examples if indices is None else indices)[0].shape[0]

        def rows(array: Array, index: Array) -> Array:
            if indices is None:
                found = array[index]
            else:
                found = jnp.take(array, indices[index], axis=0, mode="clip")
            if mesh is None:
                return found
            return jax.lax.with_sharding_constraint(found, parallel.over_data(mesh))

        def run_step(state: TrainState, index: Array) -> tuple[TrainState, dict[str, Array]]:
            batch = jax.tree.map(lambda array: rows(array, index), examples)
            return step_fn(state, batch, key)

        if steps == 1:
            new_state, metrics = run_step(state, jnp.zeros((), jnp.int32))
            is_finite = _is_finite(metrics)
            return ChunkResult(
                _select(is_finite & (num_steps > 0), new_state, state),
                jax.tree.map(lambda value: value[None], metrics),
                is_finite | (num_steps == 0),
            )

        metric_shapes = jax.eval_shape(run_step, state, jnp.zeros((), jnp.int32))[1]
        buffer = jax.tree.map(lambda s: jnp.zeros((steps, *s.shape), s.dtype), metric_shapes)

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

    keywords: dict[str, Any] = {"compiler_options": network_options()}
    if mesh is not None:
        everywhere = parallel.replicated(mesh)
        keywords["out_shardings"] = ChunkResult(shardings, everywhere, everywhere)  # pyright: ignore[reportArgumentType]
    return jax.jit(chunk, donate_argnums=(0,) if donate else (), **keywords)
