"""The training loop: it takes steps, logs, saves, and stops at a step that is not finite."""

import contextlib
import functools
import math
import time
from collections.abc import Callable, Mapping
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
from jevb_jax.images.batches import load_resident, stream_batches
from jevb_jax.images.workers import ReadAhead
from jevb_jax.parallel import StoppedError
from jevb_jax.runs import files
from jevb_jax.runs.array_names import flatten_names
from jevb_jax.runs.checkpoints import Checkpointer
from jevb_jax.runs.metrics_log import MetricsLog, ProgressLine
from jevb_jax.runs.metrics_writers import Ending
from jevb_jax.training.plan import Measurement, Plan, is_resident
from jevb_jax.training.step import TrainState, make_train_chunk, state_shardings


class NonFiniteError(RuntimeError):
    """The loss or its gradient is NaN or infinite."""


def _steps_per_dispatch(plan: Plan) -> int:
    """Steps in one compiled call. Convolutions inside a loop are slow on a CPU, and only there."""
    return plan.steps_per_dispatch or (1 if jax.default_backend() == "cpu" else 10)


def _row_numbers(plan: Plan, step: int) -> np.ndarray:
    """Which training examples a step sees."""
    return batch_order.batch_indices(
        step, num_examples=len(plan.source), batch_size=plan.batch_size, seed=plan.seed
    )


class _Batches:
    """The batches of each dispatch, on the devices. Nothing is read before the first `take`."""

    def __init__(self, plan: Plan, start_step: int, mesh: Mesh):
        self._plan = plan
        self._over_data = parallel.over_data(mesh, axis=1)
        self._everywhere = parallel.replicated(mesh)
        self._chunk_steps = _steps_per_dispatch(plan)
        self._labels = None if plan.labels is None else plan.labels.astype(np.int32)
        self._local_rows = parallel.local_rows(plan.batch_size)
        self._is_resident = plan.crops is None and is_resident(plan.source, plan.input)
        self._open = functools.partial(
            stream_batches,
            plan.source,
            start_step=start_step,
            num_steps=plan.num_steps - start_step,
            batch_size=plan.batch_size,
            seed=plan.seed,
            num_workers=plan.input.num_workers,
            prefetch_batches=plan.input.prefetch_batches,
            rows=self._local_rows,
            crops=plan.crops,
        )
        self._resident: Any = None
        self._stream: ReadAhead[Any] | None = None

    def take(self, step: int, num_steps: int) -> tuple[Any, Array | None]:
        """What `step.make_train_chunk` takes for the next steps.

        All images and `indices [steps_per_dispatch, batch]`, or the batches themselves and None. With
        labels, a pair of images and labels stands for the images.
        """
        if self._is_resident:
            return self._take_resident(step, num_steps)
        return self._take_streamed(step, num_steps), None

    def _take_resident(self, step: int, num_steps: int) -> tuple[Any, Array]:
        if self._resident is None:
            images = load_resident(self._plan.source)
            examples = images if self._labels is None else (images, self._labels)
            self._resident = parallel.put(examples, self._everywhere)
        indices = np.zeros((self._chunk_steps, self._plan.batch_size), np.int32)
        for row in range(num_steps):
            indices[row] = _row_numbers(self._plan, step + row)
        return self._resident, parallel.put(indices, self._over_data)

    def _take_streamed(self, step: int, num_steps: int) -> Any:
        if self._stream is None:
            self._stream = self._open()
        missing = self._chunk_steps - num_steps
        images = [next(self._stream) for _ in range(num_steps)]

        def put(*steps: np.ndarray) -> Array:
            return parallel.put_local_rows(np.stack(steps), self._over_data)

        stacked = jax.tree.map(put, *images, *[images[-1]] * missing)
        if self._labels is None:
            return stacked
        labels = [
            self._labels[_row_numbers(self._plan, step + row)[self._local_rows]]
            for row in range(num_steps)
        ]
        return stacked, parallel.put_local_rows(
            np.stack(labels + [labels[-1]] * missing), self._over_data
        )

    def close(self) -> None:
        """Ends threads and workers that read ahead."""
        if self._stream is not None:
            self._stream.close()


def _write_evidence(workdir: Path, plan: Plan, state: TrainState) -> Path:
    """Writes the state before a step that was not finite, and which batch the step saw."""
    step = int(state.step)
    directory = workdir / f"nonfinite_step_{step}"
    arrays = parallel.to_host(flatten_names(state))
    if not parallel.is_main():
        return directory
    directory.mkdir(exist_ok=True)
    files.write_arrays_atomically(directory / "state.npz", arrays)
    step_key = jax.random.fold_in(plan.key, step)
    files.write_json_atomically(
        directory / "batch.json",
        {
            "step": step,
            "seed": plan.seed,
            "step_key": np.asarray(jax.random.key_data(step_key)).tolist(),
            "train_indices": _row_numbers(plan, step).tolist(),
        },
    )
    return directory


def _next_boundary(step: int, *intervals: int) -> int:
    """The first step after `step` that is a multiple of any interval."""
    return min((step // interval + 1) * interval for interval in intervals)


class _SpeedMeter:
    """Images a second, over at least a second each time: metrics may arrive in bursts."""

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
    """Steps that the device works on; their metrics are not fetched yet."""

    first_step: int
    num_steps: int
    metrics: dict[str, Array]
    is_finite: Array


class RunLoop:
    """The work of one process on a training directory."""

    def __init__(
        self,
        plan: Plan,
        workdir: Path,
        console: Console,
        mesh: Mesh,
        stop: parallel.StopRequest,
        check_held: Callable[[], None],
    ):
        """Opens the log and the checkpoints of a directory.

        Args:
          plan: what to do.
          workdir: an existing directory.
          console: where people read.
          mesh: the devices.
          stop: tells the loop that a signal came.
          check_held: raises where another process has taken the directory over.
        """
        self.plan = plan
        self.mesh = mesh
        self.check_held = check_held
        self.stop = stop
        self.workdir = workdir
        self.console = console
        self.log = MetricsLog(
            workdir, is_writer=parallel.is_main(), writers=plan.writers, config=plan.config
        )
        self._ending: Ending = "failed"
        self.checkpointer = Checkpointer(
            workdir / "checkpoints",
            keep_latest=plan.keep_latest,
            keep_best=plan.keep_best,
            keep_steps=plan.keep_steps,
        )
        self.learning_rate = jax.jit(plan.schedule)

    def shardings(self, state: TrainState) -> TrainState:
        """How the state lies over the devices."""
        is_cut = self.plan.shard_optimizer_state
        return state_shardings(state, self.mesh, shard_optimizer_state=is_cut)

    def restore(self) -> TrainState:
        """The state of the latest whole checkpoint, or the initial one."""
        template = self.plan.initial_state()
        template = parallel.put(template, self.shardings(template))
        restored = self.checkpointer.restore_latest(template)
        if restored is None:
            self.log.truncate_after(-1)  # a run killed before its first save leaves lines
            for measurement in self.plan.measurements:
                if measurement.at_start:
                    self.measure(measurement, template, {})
            if self.plan.saves_start:
                self.save(template)
            return template
        step, state = restored
        self.checkpointer.discard_after(step)
        rest = "" if step < self.plan.num_steps else " Its training is finished."
        self.say(f"Resuming {self.workdir} at step {step}.{rest}")
        self.log.truncate_after(step)
        records = MetricsLog.read(self.workdir / "metrics.jsonl")
        for measurement in self.plan.measurements:
            measurement.resume(records)
        return state

    def save(self, state: TrainState) -> None:
        """Starts a checkpoint of a state whose metrics are known to be finite."""
        parallel.on_main(self.check_held)
        score = None
        if self.plan.keep_best and self.plan.score is not None:
            score = self.plan.score(state)
            if score > -math.inf:
                self.log.write(int(state.step), {self.plan.score_name: score})
        self.log.flush()
        self.checkpointer.save(int(state.step), state, config=self.plan.config, score=score)

    def record(self, dispatch: _Dispatch, state: TrainState) -> dict[str, float]:
        """Fetches the metrics of a dispatch, logs them, and stops at a step that was not finite.

        `state` is the latest one: no later dispatch has used its memory.
        """
        first_step, num_steps, metrics, is_finite = jax.device_get(dispatch)
        rows = num_steps if is_finite else int(state.step) - first_step + 1
        every = self.plan.log_every_steps
        values: dict[str, float] = {}
        for row in range(rows):
            step = first_step + row + 1
            values = {f"train/{name}": float(array[row]) for name, array in metrics.items()}
            is_bad = not is_finite and row == rows - 1
            if (every and step % every == 0) or step == self.plan.num_steps or is_bad:
                values["train/learning_rate"] = float(self.learning_rate(np.int32(step - 1)))
                self.log.write(step, values)
        if not is_finite:
            directory = _write_evidence(self.workdir, self.plan, state)
            raise NonFiniteError(
                f"step {int(state.step)}: the loss is {values['train/loss']} and the norm of "
                f"its gradient {values['train/gradient_norm']}. This step was not applied; the "
                f"state before the step and the keys of its batch are in {directory}. Lower "
                "optimizer.learning_rate, lengthen optimizer.warmup_epochs or set "
                "optimizer.max_gradient_norm, and start in another directory."
            )
        return values

    def measure(
        self, measurement: Measurement, state: TrainState, last: Mapping[str, float]
    ) -> bool:
        """Measures a state, logs and prints what was found; True if the state is to be saved."""
        found = measurement.measure(state, last)
        self.log.write(int(state.step), found.values)
        for line in found.lines:
            self.say(line)
        return found.is_to_be_saved

    def say(self, text: str) -> None:
        """Prints a line in which nothing is markup, whatever the width."""
        messages.say(self.console, text)

    def status(self, metrics: dict[str, float], images_per_second: float) -> str:
        """The progress line: speed, loss and its terms, and what the measurements say."""
        values = {name.removeprefix("train/"): value for name, value in metrics.items()}
        texts = [f"{images_per_second:,.0f} images/s  loss {values.pop('loss'):.4f}"]
        del values["gradient_norm"]
        for name in ("learning_rate", "relative_step"):
            values.pop(name, None)
        texts += [f"{n.removesuffix('_log_likelihood')} {v:.3g}" for n, v in values.items()]
        texts += [one.status for one in self.plan.measurements if one.status]
        return "  ".join(texts)

    def train(self, state: TrainState) -> TrainState:
        """Takes steps from a state to the end of the run, or until a signal asks to stop."""
        plan = self.plan
        save_every = plan.save_every_steps
        boundaries = [one.every_steps for one in plan.measurements]
        boundaries += [save_every] if save_every else []
        chunk = make_train_chunk(plan.train_step, mesh=self.mesh, shardings=self.shardings(state))
        step = int(state.step)
        batches = _Batches(plan, step, self.mesh)
        key = parallel.put_key(plan.key, self.mesh)
        pending: _Dispatch | None = None
        is_finite = parallel.put(np.asarray(True), parallel.replicated(self.mesh))
        is_stopping = False
        meter = _SpeedMeter()
        with (
            contextlib.closing(batches),
            ProgressLine(self.console, total_steps=plan.num_steps, initial_step=step) as progress,
        ):

            def settle(dispatch: _Dispatch) -> dict[str, float]:
                values = self.record(dispatch, state)
                meter.add(dispatch.num_steps * plan.batch_size)
                end = dispatch.first_step + dispatch.num_steps
                progress.update(end, self.status(values, meter.images_per_second))
                return values

            while step < plan.num_steps and not is_stopping:
                count = min(_steps_per_dispatch(plan), plan.num_steps - step)
                if boundaries:
                    count = min(count, _next_boundary(step, *boundaries) - step)
                try:
                    with self.stop.interrupting():
                        examples, indices = batches.take(step, count)
                except StoppedError:
                    break
                # After a bad step, known so far to the device only, nothing more runs.
                allowed = jnp.where(is_finite, np.int32(count), np.int32(0))
                state, metrics, is_finite = chunk(state, examples, indices, allowed, key)
                # The metrics of the dispatch before are fetched while this one computes.
                if pending is not None:
                    settle(pending)
                pending = _Dispatch(step, count, metrics, is_finite)
                step += count
                is_last = step == plan.num_steps
                is_save = bool(save_every) and step % save_every == 0
                due = [m for m in plan.measurements if is_last or step % m.every_steps == 0]
                if due or is_save:
                    last = settle(pending)
                    pending = None
                    for measurement in due:
                        is_save |= self.measure(measurement, state, last)
                is_stopping = self.stop.is_requested()
                if is_save and not is_last and not is_stopping:
                    self.save(state)
            if pending is not None:
                settle(pending)
            # Before the workers are ended, which may take them a while.
            self.save(state)
            self.checkpointer.wait()
        self._ending = "finished" if step == plan.num_steps else "stopped"
        if step == plan.num_steps:
            for measurement in plan.measurements:
                for line in measurement.closing_lines(step):
                    self.say(line)
        return state

    def close(self) -> None:
        """Closes the checkpoints and the log. Call it after an error, too."""
        try:
            self.checkpointer.close()
        finally:
            self.log.close(self._ending)
