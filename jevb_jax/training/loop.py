"""The loop: takes steps, logs, saves, and stops on what is not finite."""

import contextlib
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh
from rich.console import Console

from jevb_jax import messages, parallel
from jevb_jax.images import batch_order
from jevb_jax.images.batches import fits_resident, load_resident, stream_batches
from jevb_jax.images.workers import ReadAhead
from jevb_jax.parallel import StoppedError
from jevb_jax.runs import files
from jevb_jax.runs.array_names import flatten_names
from jevb_jax.runs.checkpoints import Checkpointer
from jevb_jax.runs.metrics_log import MetricsLog, ProgressLine
from jevb_jax.settings.sections import RunSettings
from jevb_jax.training.alarms import ALARM_WARMUP_STEPS, health_alarms, judge, logged_health
from jevb_jax.training.experiment import Experiment
from jevb_jax.training.health_check import health_check
from jevb_jax.training.step import TrainState, make_train_chunk, state_shardings


class NonFiniteError(RuntimeError):
    """The loss or its gradient is NaN or infinite."""


def _steps_per_dispatch(settings: RunSettings) -> int:
    """Steps in one compiled call: loops of convolutions are slow on the CPU alone."""
    asked = settings.train.steps_per_dispatch
    return asked or (1 if jax.default_backend() == "cpu" else 10)


class _Batches:
    """Images on the devices, and row numbers into them, for the steps of one dispatch.

    Nothing is read before the first `take`.
    """

    def __init__(self, experiment: Experiment, start_step: int, mesh: Mesh):
        self._over_data = parallel.over_data(mesh, axis=1)
        settings = experiment.settings
        source = experiment.dataset.train
        self._batch_size = settings.train.batch_size
        self._batch_indices = functools.partial(
            batch_order.batch_indices,
            num_examples=len(source),
            batch_size=self._batch_size,
            seed=settings.seed,
        )
        self._chunk_steps = _steps_per_dispatch(settings)
        placement = settings.input.placement
        fits = fits_resident(source, limit_bytes=settings.input.resident_limit_bytes)
        self._is_resident = placement == "resident" or (placement == "auto" and fits)
        self._load = lambda: parallel.put(load_resident(source), parallel.replicated(mesh))
        self._open = functools.partial(
            stream_batches,
            source,
            start_step=start_step,
            num_steps=experiment.num_train_steps - start_step,
            batch_size=self._batch_size,
            seed=settings.seed,
            num_workers=settings.input.num_workers,
            prefetch_batches=settings.input.prefetch_batches,
            rows=parallel.local_rows(self._batch_size),
        )
        self._resident: Array | None = None
        self._stream: ReadAhead[np.ndarray] | None = None

    def take(self, step: int, num_steps: int) -> tuple[Array, Array | None]:
        """What `step.make_train_chunk` takes for the next steps.

        All images and `indices [steps_per_dispatch, batch]`, or the batches themselves and None.
        """
        if self._is_resident:
            resident = self._resident = self._load() if self._resident is None else self._resident
            indices = np.zeros((self._chunk_steps, self._batch_size), np.int32)
            for row in range(num_steps):
                indices[row] = self._batch_indices(step + row)
            return resident, parallel.put(indices, self._over_data)
        if self._stream is None:
            self._stream = self._open()
        batches = [next(self._stream) for _ in range(num_steps)]
        padding = [batches[-1]] * (self._chunk_steps - num_steps)
        return parallel.put_local_rows(np.stack(batches + padding), self._over_data), None

    def close(self) -> None:
        """Ends threads and workers that read ahead."""
        if self._stream is not None:
            self._stream.close()


def _write_evidence(workdir: Path, experiment: Experiment, state: TrainState) -> Path:
    """Sets aside the state before a step that was not finite, and what its batch was."""
    step = int(state.step)
    directory = workdir / f"nonfinite_step_{step}"
    arrays = parallel.to_host(flatten_names(state))
    if not parallel.is_main():
        return directory
    directory.mkdir(exist_ok=True)
    files.write_arrays_atomically(directory / "state.npz", arrays)
    settings = experiment.settings
    indices = batch_order.batch_indices(
        step,
        num_examples=len(experiment.dataset.train),
        batch_size=settings.train.batch_size,
        seed=settings.seed,
    )
    step_key = jax.random.fold_in(experiment.key, step)
    files.write_json_atomically(
        directory / "batch.json",
        {
            "step": step,
            "seed": settings.seed,
            "step_key": np.asarray(jax.random.key_data(step_key)).tolist(),
            "train_indices": indices.tolist(),
        },
    )
    return directory


def _status(metrics: dict[str, float], rank: float | None, images_per_second: float) -> str:
    values = {name.removeprefix("train/"): value for name, value in metrics.items()}
    texts = [f"{images_per_second:,.0f} images/s  loss {values.pop('loss'):.4f}"]
    del values["gradient_norm"]
    values.pop("learning_rate", None)
    texts += [f"{n.removesuffix('_log_likelihood')} {v:.3g}" for n, v in values.items()]
    if rank is not None:
        texts.append(f"rank {rank:.1f}")
    return "  ".join(texts)


def _next_boundary(step: int, *intervals: int) -> int:
    """The first step after `step` that is a multiple of any interval."""
    return min((step // interval + 1) * interval for interval in intervals)


class _SpeedMeter:
    """Images a second over intervals of a second or more; metrics of steps may arrive in bursts."""

    def __init__(self) -> None:
        self.images_per_second = 0.0
        self._num_images = 0
        self._start = time.monotonic()

    def add(self, num_images: int) -> None:
        self._num_images += num_images
        seconds = time.monotonic() - self._start
        if seconds >= 1 or not self.images_per_second:
            self.images_per_second = self._num_images / seconds
            self._num_images = 0
            self._start = time.monotonic()


class _Dispatch(NamedTuple):
    """Steps handed to the device, whose metrics are still to be fetched."""

    first_step: int
    num_steps: int
    metrics: dict[str, Array]
    is_finite: Array


class RunLoop:
    """One process's work on a run directory."""

    def __init__(
        self,
        experiment: Experiment,
        workdir: Path,
        console: Console,
        mesh: Mesh,
        stop: parallel.StopRequest,
        check_held: Callable[[], None],
        validate: Callable[[TrainState], dict[str, float]],
        best_measure: str,
        start: dict[str, Any] | None = None,
    ):
        """Opens the logs and the checkpoints of a directory.

        Args:
          experiment: what the run is.
          workdir: its directory.
          console: where people read.
          mesh: the devices.
          stop: what a signal asks for.
          check_held: raises where the directory is no longer this process's own.
          validate: accuracies of a state by name, on the validation split.
          best_measure: the one of them by which the best checkpoints are kept.
          start: weights of another run to start from.
        """
        self.validate = validate
        self.best_measure = best_measure
        self.experiment = experiment
        self.start = start
        self.mesh = mesh
        self.check_held = check_held
        self.stop = stop
        self.embedding_dim = experiment.settings.model.embedding_dim
        self.workdir = workdir
        self.console = console
        self.log = MetricsLog(workdir, is_writer=parallel.is_main())
        settings = experiment.settings.checkpoint
        self.checkpointer = Checkpointer(
            workdir / "checkpoints",
            keep_latest=settings.keep_latest,
            keep_best=settings.keep_best,
            keep_steps=[length.until_step for length in experiment.earlier],
        )
        self.rank: float | None = None
        self.alarms: dict[str, str] = {}  # raised at the last health check: messages by name
        self.check_health = health_check(experiment)
        self.learning_rate = jax.jit(experiment.schedule)
        self.latest_knn: tuple[int, dict[str, float]] | None = None  # step, accuracies

    def shardings(self, state: TrainState) -> TrainState:
        """How the state lies over the devices."""
        is_cut = self.experiment.settings.train.shard_optimizer_state
        return state_shardings(state, self.mesh, shard_optimizer_state=is_cut)

    def restore(self) -> TrainState:
        """The latest whole checkpoint's state, or the initial one."""
        template = self.experiment.initial_state()
        template = parallel.put(template, self.shardings(template))
        restored = self.checkpointer.restore_latest(template)
        step, state = (0, template) if restored is None else restored
        if restored is not None:
            self.checkpointer.discard_after(step)
            self.say(f"Resuming {self.workdir} at step {step}.")
        self.log.truncate_after(step)
        for record in MetricsLog.read(self.workdir / "metrics.jsonl"):
            if values := logged_health(record):
                alarms = health_alarms(
                    values, step=record["step"], embedding_dim=self.embedding_dim
                )
                self.alarms = {alarm.name: alarm.message for alarm in alarms}
        if restored is None and self.start is not None:
            state = parallel.put(_started_from(template, self.start), self.shardings(template))
            self.save(state)  # whatever becomes of the other run, this one starts here
        return state

    def save(self, state: TrainState) -> None:
        """Starts a checkpoint of a state whose metrics are known to be finite."""
        parallel.on_main(self.check_held)
        score = None
        if self.experiment.settings.checkpoint.keep_best:
            score = self.validation_knn(state)[self.best_measure]
            self.log.write(int(state.step), {"validation/knn_accuracy": score})
        self.log.flush()
        self.checkpointer.save(int(state.step), state, config=self.experiment.config, score=score)

    def record(self, dispatch: _Dispatch, state: TrainState) -> dict[str, float]:
        """Fetches a dispatch's metrics, logs them, and stops on a step that was not finite.

        `state` is the latest one, which no later dispatch has consumed.
        """
        first_step, num_steps, metrics, is_finite = jax.device_get(dispatch)
        rows = num_steps if is_finite else int(state.step) - first_step + 1
        every = self.experiment.settings.train.log_every_steps
        values: dict[str, float] = {}
        for row in range(rows):
            step = first_step + row + 1
            values = {f"train/{name}": float(array[row]) for name, array in metrics.items()}
            is_bad = not is_finite and row == rows - 1
            if (every and step % every == 0) or step == self.experiment.num_train_steps or is_bad:
                values["train/learning_rate"] = float(self.learning_rate(np.int32(step - 1)))
                self.log.write(step, values)
        if not is_finite:
            directory = _write_evidence(self.workdir, self.experiment, state)
            raise NonFiniteError(
                f"step {int(state.step)}: the loss is {values['train/loss']} and the norm of "
                f"its gradient {values['train/gradient_norm']}. Nothing was saved after it; the state "
                f"before the step and the keys of its batch are in {directory}. Lower "
                "optimizer.learning_rate, lengthen optimizer.warmup_epochs or set "
                "optimizer.max_gradient_norm, and start in another directory."
            )
        return values

    def validation_knn(self, state: TrainState) -> dict[str, float]:
        """k-NN accuracies of a state by name, computed once a step; all processes do."""
        step = int(state.step)
        if self.latest_knn is None or self.latest_knn[0] != step:
            self.latest_knn = step, self.validate(state)
        return self.latest_knn[1]

    def record_knn(self, state: TrainState) -> None:
        """Logs the k-NN accuracies of a state."""
        values = self.validation_knn(state)
        self.log.write(
            int(state.step), {f"validation/{name}": value for name, value in values.items()}
        )

    def record_health(self, state: TrainState) -> None:
        """Logs the health of a state and its alarms; says which alarms rose or cleared."""
        step = int(state.step)
        values = {name: float(value) for name, value in self.check_health(state).items()}
        judged = judge(values, step=step, embedding_dim=self.embedding_dim)
        self.rank = values.get("effective_rank")
        values |= {f"alarm_{name}": float(message is not None) for name, message in judged.items()}
        self.log.write(step, {f"health/{name}": value for name, value in values.items()})
        raised = {name: message for name, message in judged.items() if message is not None}
        for name, message in raised.items():
            if name not in self.alarms:
                self.say(f"Health alarm at step {step}, {name}: {message}")
        for name in self.alarms:
            if name not in raised:
                self.say(f"Health alarm cleared at step {step}: {name}")
        self.alarms = raised

    def say(self, text: str) -> None:
        """Prints a line in which nothing is markup, whatever the width."""
        messages.say(self.console, text)

    def train(self, state: TrainState) -> TrainState:
        """Runs the loop from a state to the end of the run or to a request to stop."""
        settings = self.experiment.settings.train
        num_steps = self.experiment.num_train_steps
        health_every = settings.health_every_steps if self.check_health is not None else 0
        save_every = self.experiment.settings.checkpoint.every_steps
        knn_every = settings.knn_every_epochs * self.experiment.steps_per_epoch
        boundaries = [every for every in (health_every, save_every, knn_every) if every]
        chunk = make_train_chunk(
            self.experiment.train_step, mesh=self.mesh, shardings=self.shardings(state)
        )
        step = int(state.step)
        batches = _Batches(self.experiment, step, self.mesh)
        key = parallel.put_key(self.experiment.key, self.mesh)
        pending: _Dispatch | None = None
        is_finite = parallel.put(np.asarray(True), parallel.replicated(self.mesh))
        is_stopping = False
        meter = _SpeedMeter()
        with (
            contextlib.closing(batches),
            ProgressLine(self.console, total_steps=num_steps, initial_step=step) as progress,
        ):

            def settle(dispatch: _Dispatch) -> None:
                values = self.record(dispatch, state)
                meter.add(dispatch.num_steps * settings.batch_size)
                end = dispatch.first_step + dispatch.num_steps
                progress.update(end, _status(values, self.rank, meter.images_per_second))

            while step < num_steps and not is_stopping:
                count = min(_steps_per_dispatch(self.experiment.settings), num_steps - step)
                if boundaries:
                    count = min(count, _next_boundary(step, *boundaries) - step)
                try:
                    with self.stop.interrupting():
                        images, indices = batches.take(step, count)
                except StoppedError:
                    break
                # After a bad step, known so far to the device only, nothing more runs.
                allowed = jnp.where(is_finite, np.int32(count), np.int32(0))
                state, metrics, is_finite = chunk(state, images, indices, allowed, key)
                # The metrics of the dispatch before are fetched while this one computes.
                if pending is not None:
                    settle(pending)
                pending = _Dispatch(step, count, metrics, is_finite)
                step += count
                is_save = save_every and step % save_every == 0
                is_last = step == num_steps
                is_health = health_every and (step % health_every == 0 or is_last)
                is_knn = knn_every and (step % knn_every == 0 or is_last)
                if is_save or is_health or is_knn:
                    settle(pending)
                    pending = None
                if is_health:
                    self.record_health(state)
                if is_knn:
                    self.record_knn(state)
                is_stopping = self.stop.is_requested()
                if is_save and step < num_steps and not is_stopping:
                    self.save(state)
            if pending is not None:
                settle(pending)
            # Before the workers are ended, which may take them a while.
            self.save(state)
            self.checkpointer.wait()
        if health_every and step == num_steps >= ALARM_WARMUP_STEPS:
            lines = [f"  {name}: {message}" for name, message in self.alarms.items()]
            self.say("\n".join([f"Health alarms at the end: {len(lines) or 'none'}", *lines]))
        return state


def _started_from(state: TrainState, variables: dict[str, Any]) -> TrainState:
    """A state before the first step with the weights of another run, averages likewise."""

    def copied(tree: Any) -> Any:  # each its own memory: a step gives away what it is passed
        return jax.tree.map(jnp.copy, tree)

    params = variables["params"]
    return state._replace(
        params=copied(params),
        batch_stats=copied(variables["batch_stats"]),
        ema_params=None if state.ema_params is None else copied(params),
        target_params=None
        if state.target_params is None
        else copied({name: params[name] for name in state.target_params}),
    )
