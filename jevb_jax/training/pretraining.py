"""Pre-training as a plan of the training loop: its health checks, k-NN and checkpoints."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jevb_jax.training.alarms import ALARM_WARMUP_STEPS, health_alarms, judge, logged_health
from jevb_jax.training.experiment import Experiment
from jevb_jax.training.health_check import health_check
from jevb_jax.training.plan import Measured, Measurement, Plan
from jevb_jax.training.step import TrainState


class HealthWatch:
    """Measures the health of a state; says which alarms rose or cleared since the last time.

    Attributes:
      alarms: those that the last check raised, messages by name.
    """

    at_start = False

    def __init__(
        self,
        check: Callable[[TrainState], Mapping[str, Any]],
        *,
        every_steps: int,
        embedding_dim: int,
    ):
        """Takes the check of `health_check.health_check`.

        Args:
          check: from a state to health measures by name.
          embedding_dim: D, by which the alarms judge.
        """
        self.check = check
        self.every_steps = every_steps
        self.alarms: dict[str, str] = {}
        self._embedding_dim = embedding_dim
        self._rank: float | None = None

    @property
    def status(self) -> str:
        """The effective rank."""
        return "" if self._rank is None else f"rank {self._rank:.1f}"

    def resume(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Takes up the alarms of the last check in the log, so that none is said twice."""
        for record in records:
            if values := logged_health(record):
                raised = health_alarms(
                    values, step=record["step"], embedding_dim=self._embedding_dim
                )
                self.alarms = {alarm.name: alarm.message for alarm in raised}

    def measure(self, state: TrainState, last: Mapping[str, float]) -> Measured:
        """See `plan.Measurement`."""
        del last
        step = int(state.step)
        values = {name: float(value) for name, value in self.check(state).items()}
        judged = judge(values, step=step, embedding_dim=self._embedding_dim)
        self._rank = values.get("effective_rank")
        values |= {f"alarm_{name}": float(message is not None) for name, message in judged.items()}
        raised = {name: message for name, message in judged.items() if message is not None}
        lines = [
            f"Health alarm at step {step}, {name}: {message}"
            for name, message in raised.items()
            if name not in self.alarms
        ]
        lines += [
            f"Health alarm cleared at step {step}: {name}"
            for name in self.alarms
            if name not in raised
        ]
        self.alarms = raised
        return Measured({f"health/{name}": value for name, value in values.items()}, lines)

    def closing_lines(self, step: int) -> Sequence[str]:
        """The alarms at the end."""
        if step < ALARM_WARMUP_STEPS:
            return []
        lines = [f"  {name}: {message}" for name, message in self.alarms.items()]
        return [f"Health alarms at the end: {len(lines) or 'none'}", *lines]


class KnnWatch:
    """Measures k-NN accuracies on the validation split, once for each step.

    Attributes:
      every_steps: see `plan.Measurement`; 0 where k-NN only scores checkpoints.
    """

    at_start = False
    status = ""

    def __init__(
        self,
        validate: Callable[[TrainState], dict[str, float]],
        *,
        best_measure: str,
        every_steps: int,
    ):
        """Takes the function that measures.

        Args:
          validate: from a state to accuracies by name.
          best_measure: the accuracy that scores a checkpoint.
        """
        self.every_steps = every_steps
        self._validate = validate
        self._best_measure = best_measure
        self._latest: tuple[int, dict[str, float]] | None = None

    def _accuracies(self, state: TrainState) -> dict[str, float]:
        step = int(state.step)
        if self._latest is None or self._latest[0] != step:
            self._latest = step, self._validate(state)
        return self._latest[1]

    def resume(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Needs nothing of the log."""

    def measure(self, state: TrainState, last: Mapping[str, float]) -> Measured:
        """See `plan.Measurement`."""
        del last
        return Measured({f"validation/{k}": v for k, v in self._accuracies(state).items()})

    def score(self, state: TrainState) -> float:
        """The accuracy by which the best checkpoints are kept."""
        return self._accuracies(state)[self._best_measure]

    def closing_lines(self, step: int) -> Sequence[str]:
        """Nothing."""
        del step
        return []


def make_plan(
    experiment: Experiment,
    *,
    validate: Callable[[TrainState], dict[str, float]],
    best_measure: str,
    start: Mapping[str, Any] | None = None,
) -> Plan:
    """The plan of a run.

    Args:
      experiment: what the run is.
      validate: k-NN accuracies of a state by name, on the validation split.
      best_measure: the one of them by which the best checkpoints are kept.
      start: weights to start from, of all parts or of the backbone alone. They are saved as step 0,
        because the place that they come from may be moved or deleted later.

    Returns:
      The plan.
    """
    settings = experiment.settings
    train = settings.train
    knn = KnnWatch(
        validate,
        best_measure=best_measure,
        every_steps=train.knn_every_epochs * experiment.steps_per_epoch,
    )
    measurements: list[Measurement] = []
    check = health_check(experiment)
    if check is not None:
        measurements.append(
            HealthWatch(
                check,
                every_steps=train.health_every_steps,
                embedding_dim=settings.model.embedding_dim,
            )
        )
    if knn.every_steps:
        measurements.append(knn)

    def initial_state() -> TrainState:
        state = experiment.initial_state()
        return state if start is None else started_from(state, start)

    return Plan(
        config=experiment.config,
        seed=settings.seed,
        source=experiment.dataset.train,
        labels=None,
        input=settings.input,
        batch_size=train.batch_size,
        num_steps=experiment.num_train_steps,
        schedule=experiment.schedule,
        initial_state=initial_state,
        train_step=experiment.train_step,
        log_every_steps=train.log_every_steps,
        save_every_steps=settings.checkpoint.every_steps,
        keep_latest=settings.checkpoint.keep_latest,
        keep_best=settings.checkpoint.keep_best,
        keep_steps=[length.until_step for length in experiment.earlier],
        steps_per_dispatch=train.steps_per_dispatch,
        shard_optimizer_state=train.shard_optimizer_state,
        saves_start=start is not None,
        measurements=measurements,
        score=knn.score,
        score_name="validation/knn_accuracy",
        writers=train.writers,
        crops=experiment.host_crops,
    )


def started_from(state: TrainState, variables: Mapping[str, Any]) -> TrainState:
    """A state before the first step with other weights, in its averages too.

    Args:
      state: with weights drawn by the seed.
      variables: `params` and `batch_stats` of all parts, or of some; the other parts stay. So do the
        statistics of the columns of features, which are of the training split of the new run: its
        views are made with them.

    Returns:
      The state.
    """

    def copied(tree: Any) -> Any:  # own memory for each: a step reuses the memory of its state
        return jax.tree.map(jnp.copy, tree)

    params = {**state.params, **variables["params"]}
    batch_stats = {**state.batch_stats, **variables["batch_stats"]}
    if "backbone" not in state.params:  # features of a frozen encoder
        batch_stats["backbone"] = state.batch_stats["backbone"]
    return state._replace(
        params=copied(params),
        batch_stats=copied(batch_stats),
        ema_params=None if state.ema_params is None else copied(params),
        target_params=None
        if state.target_params is None
        else copied({name: params[name] for name in state.target_params}),
    )
