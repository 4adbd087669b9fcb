"""The loop on plans of toy steps: which examples a step sees, what is saved and logged."""

import contextlib
import dataclasses
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import Array
from rich.console import Console

from jevb_jax import parallel
from jevb_jax.images.batch_order import batch_indices
from jevb_jax.images.source import ArraySource
from jevb_jax.runs import metrics_writers
from jevb_jax.runs.metrics_log import MetricsLog
from jevb_jax.settings.sections import InputSection
from jevb_jax.training.loop import RunLoop
from jevb_jax.training.plan import Measured, Plan
from jevb_jax.training.step import TrainState

NUM_IMAGES = 40


def section(placement: Any) -> InputSection:
    return InputSection(
        placement=placement,
        resident_limit_bytes=10**6,
        num_workers=0,
        prefetch_batches=2,
        accept_changed_data=False,
    )


def initial_state() -> TrainState:
    return TrainState(jnp.zeros((), jnp.int32), {"sum": jnp.zeros(())}, {}, (), None, None)


def step(state: TrainState, batch: Any, key: Array) -> tuple[TrainState, dict[str, Array]]:
    """Counts, and logs what it sees: image i is all i, and its label is 2 i."""
    del key
    images, labels = batch if isinstance(batch, tuple) else (batch, None)
    pixels = images[:, 0, 0, 0].astype(jnp.float32)
    wrong = jnp.zeros(()) if labels is None else jnp.abs(labels - 2 * pixels).max()
    params = {"sum": state.params["sum"] + pixels.sum()}
    metrics = {"loss": wrong, "gradient_norm": pixels.sum(), "first": pixels[0]}
    return state._replace(step=state.step + 1, params=params), metrics


def plan(placement: str = "resident", *, has_labels: bool = True, **changes: Any) -> Plan:
    images = np.broadcast_to(
        np.arange(NUM_IMAGES, dtype=np.uint8)[:, None, None, None], (NUM_IMAGES, 2, 2, 1)
    )
    made = Plan(
        config={"a": 1},
        seed=3,
        source=ArraySource(np.ascontiguousarray(images)),
        labels=2 * np.arange(NUM_IMAGES) if has_labels else None,
        input=section(placement),
        batch_size=8,
        num_steps=12,
        schedule=optax.constant_schedule(0.1),
        initial_state=initial_state,
        train_step=step,
        log_every_steps=1,
        save_every_steps=5,
        keep_latest=20,
    )
    return dataclasses.replace(made, **changes)


def run_loop(made: Plan, directory: Path) -> RunLoop:
    console = Console(file=io.StringIO(), width=200)
    return RunLoop(
        made, directory, console, parallel.make_mesh(), parallel.StopRequest(), lambda: None
    )


def trained(made: Plan, directory: Path) -> tuple[TrainState, list[int], list[dict[str, Any]]]:
    """The last state, the saved steps and the log."""
    loop = run_loop(made, directory)
    try:
        state = loop.train(loop.restore())
        steps = loop.checkpointer.steps()
    finally:
        loop.close()
    return state, steps, MetricsLog.read(directory / "metrics.jsonl")


@pytest.mark.parametrize("placement", ["resident", "stream", "auto"])
@pytest.mark.parametrize("has_labels", [True, False])
@pytest.mark.parametrize("steps_per_dispatch", [1, 4])
def test_every_step_sees_its_own_images_with_their_own_labels(
    tmp_path, placement, has_labels, steps_per_dispatch
):
    made = plan(placement, has_labels=has_labels, steps_per_dispatch=steps_per_dispatch)
    state, saved, records = trained(made, tmp_path)
    order = [batch_indices(i, num_examples=NUM_IMAGES, batch_size=8, seed=3) for i in range(12)]
    assert [r["step"] for r in records] == list(range(1, 13))
    assert [r["train/loss"] for r in records] == [0] * 12
    assert [r["train/first"] for r in records] == [rows[0] for rows in order]
    assert float(state.params["sum"]) == sum(rows.sum() for rows in order)
    assert saved == [5, 10, 12]


class Watch:
    """Measures the step; asks for a save where it is told to."""

    status = ""

    def __init__(self, every_steps: int, *, at_start: bool, saves: Sequence[int] = ()):
        self.every_steps = every_steps
        self.at_start = at_start
        self.saves = saves
        self.resumed: list[Any] = []

    def resume(self, records: Sequence[Any]) -> None:
        self.resumed = list(records)

    def measure(self, state: TrainState, last: Any) -> Measured:
        number = int(state.step)
        assert last == {} if number == 0 else last["train/loss"] == 0
        return Measured({"watch": float(number)}, [f"at {number}"], number in self.saves)

    def closing_lines(self, step: int) -> Sequence[str]:
        return [f"closed at {step}"]


@pytest.mark.parametrize("steps_per_dispatch", [1, 5])
def test_what_is_measured_when_and_saved_because_of_it(tmp_path, steps_per_dispatch):
    watch = Watch(3, at_start=True, saves=[0, 6])
    made = plan(
        measurements=[watch],
        saves_start=True,
        num_steps=11,
        save_every_steps=4,
        steps_per_dispatch=steps_per_dispatch,
    )
    loop = run_loop(made, tmp_path)
    state = loop.train(loop.restore())
    assert loop.checkpointer.steps() == [0, 4, 6, 8, 11]
    loop.checkpointer.close()
    loop.log.close()
    console: Any = loop.console
    out = console.file.getvalue()
    assert [line for line in out.splitlines() if line.startswith(("at", "closed"))] == [
        "at 0", "at 3", "at 6", "at 9", "at 11", "closed at 11",
    ]  # fmt: skip
    records = MetricsLog.read(tmp_path / "metrics.jsonl")
    assert [r["watch"] for r in records if "watch" in r] == [0, 3, 6, 9, 11]
    assert int(state.step) == 11

    again = run_loop(made, tmp_path)
    assert int(again.restore().step) == 11
    assert watch.resumed == records
    again.checkpointer.close()
    again.log.close()


def test_only_states_with_a_score_are_kept_as_the_best(tmp_path):
    scores = {0: 0.5, 4: 0.75}
    made = plan(
        keep_latest=1,
        keep_best=1,
        saves_start=True,
        save_every_steps=4,
        score=lambda state: scores.get(int(state.step), -math.inf),
        score_name="validation/best",
    )
    _, saved, records = trained(made, tmp_path)
    assert saved == [4, 12]
    logged = {r["step"]: r["validation/best"] for r in records if "validation/best" in r}
    assert logged == scores
    with pytest.raises(ValueError, match="keep_best = 1 needs a score"):
        plan(keep_best=1)


def test_a_run_killed_before_its_first_save_logs_its_start_once(tmp_path, monkeypatch):
    made = plan(measurements=[Watch(3, at_start=True)], saves_start=True)
    loop = run_loop(made, tmp_path)
    monkeypatch.setattr(loop, "save", lambda state: (_ for _ in ()).throw(InterruptedError))
    with pytest.raises(InterruptedError):
        loop.restore()
    loop.checkpointer.close()
    loop.log.close()
    _, _, records = trained(made, tmp_path)
    assert [r["watch"] for r in records if r["step"] == 0] == [0]


@pytest.mark.parametrize("ending", ["finished", "stopped", "failed"])
def test_writers_get_the_config_every_line_and_how_it_ended(tmp_path, monkeypatch, ending):
    told: list[Any] = []

    class Recorder:
        def log(self, step: int, values: Any) -> None:
            told.append({"step": step, **values})

        def forget_after(self, step: int) -> None:
            told.append(f"forget after {step}")

        def finish(self, ending: str) -> None:
            told.append(ending)

    def open_writers(names: Any, run: Any) -> list[Recorder]:
        assert (names, run.workdir, run.config) == (("wandb",), tmp_path, {"a": 1})
        return [Recorder()]

    monkeypatch.setattr(metrics_writers, "open_writers", open_writers)
    loop = run_loop(plan(writers=("wandb",)), tmp_path)
    if ending == "stopped":
        monkeypatch.setattr(loop.stop, "is_requested", lambda: True)
    if ending == "failed":
        monkeypatch.setattr(loop, "save", lambda state: (_ for _ in ()).throw(InterruptedError))
    try:
        with contextlib.suppress(InterruptedError):
            loop.train(loop.restore())
    finally:
        loop.close()
    assert told == ["forget after -1", *MetricsLog.read(tmp_path / "metrics.jsonl"), ending]
    assert len(told) == {"finished": 14, "stopped": 3, "failed": 7}[ending]
