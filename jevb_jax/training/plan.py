"""The plan of a training loop: what it must know of a run or of a fine-tune, and nothing more."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
import optax
from jax import Array

from jevb_jax.images.batches import fits_resident
from jevb_jax.images.crop_boxes import HostCrops
from jevb_jax.images.source import ImageSource
from jevb_jax.runs import metrics_writers
from jevb_jax.settings.sections import InputSection
from jevb_jax.training.step import StepFunction, TrainState


class Measured(NamedTuple):
    """What a measurement found.

    Attributes:
      values: scalars for the log, by their full names.
      lines: what to print for people.
      is_to_be_saved: whether the loop saves this state now, whatever `save_every_steps` says.
    """

    values: Mapping[str, float]
    lines: Sequence[str] = ()
    is_to_be_saved: bool = False


class Measurement(Protocol):
    """Something that the loop measures now and then; it may remember what it found."""

    @property
    def every_steps(self) -> int:
        """Steps between two measurements, at least 1; the last step is always measured."""
        ...

    @property
    def at_start(self) -> bool:
        """Whether the state before the first step is measured too."""
        ...

    @property
    def status(self) -> str:
        """A few words for the progress line, or nothing."""
        ...

    def resume(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Takes up what the log of a resumed run says, up to the step that it resumes from."""
        ...

    def measure(self, state: TrainState, last: Mapping[str, float]) -> Measured:
        """Measures a state; every process does.

        Args:
          state: its steps are known to be finite.
          last: what the step before it logged, `train/loss` and so on; empty at the start.
        """
        ...

    def closing_lines(self, step: int) -> Sequence[str]:
        """What to print when the run has come to its last step."""
        ...


@dataclasses.dataclass(frozen=True)
class Plan:
    """What `loop.RunLoop` is to do. The data order and the keys follow from `seed` and the step.

    Attributes:
      config: plain JSON values, written into every checkpoint.
      seed: see above.
      source: training images.
      labels: `[N]`, one for each training image, or None where the step takes images alone.
      input: how images come to the devices.
      batch_size: examples a step, over all devices.
      num_steps: steps of the whole run.
      schedule: learning rate by step, for the log.
      initial_state: makes the state before the first step.
      train_step: `(state, batch, key) -> (state, metrics)`. A batch is images, or the pair of images
        and labels. The metrics have `loss` and `gradient_norm`.
      log_every_steps: 0 logs the last step alone.
      save_every_steps: 0 saves at the end alone.
      keep_latest: newest checkpoints to keep.
      keep_best: best checkpoints to keep beside them, by `score`.
      keep_steps: steps whose checkpoints stay in any case.
      steps_per_dispatch: steps in one compiled call; 0 is 1 on a CPU and 10 elsewhere.
      shard_optimizer_state: see `step.state_shardings`.
      saves_start: whether the state before the first step is saved.
      measurements: what is measured while training, in this order.
      score: larger is better; needed where `keep_best` is above 0. -inf: never one of the best.
      score_name: what the log calls a score.
      writers: who else gets the metrics, each of `metrics_writers.NAMES`.
      crops: what the host cuts out of whole pictures; a batch is then a tuple of the crops of each
        view, and images are streamed. None: a batch is images of one size.
    """

    config: Mapping[str, Any]
    seed: int
    source: ImageSource
    labels: np.ndarray | None
    input: InputSection
    batch_size: int
    num_steps: int
    schedule: optax.Schedule
    initial_state: Callable[[], TrainState]
    train_step: StepFunction
    log_every_steps: int
    save_every_steps: int
    keep_latest: int
    keep_best: int = 0
    keep_steps: Sequence[int] = ()
    steps_per_dispatch: int = 0
    shard_optimizer_state: bool = False
    saves_start: bool = False
    measurements: Sequence[Measurement] = ()
    score: Callable[[TrainState], float] | None = None
    score_name: str = "score"
    writers: Sequence[str] = (metrics_writers.AUTO,)
    crops: HostCrops | None = None

    def __post_init__(self) -> None:
        """Refuses a plan that cannot be followed."""
        if self.keep_best and self.score is None:
            raise ValueError(f"keep_best = {self.keep_best} needs a score")
        if self.crops is not None and self.input.placement == "resident":
            raise ValueError(
                "crops of whole pictures are streamed, but input.placement is resident"
            )

    @property
    def key(self) -> Array:
        """The key of the run: a step folds its own number in."""
        return jax.random.key(self.seed)


def is_resident(source: ImageSource, section: InputSection) -> bool:
    """Whether the images of a source are held on the devices, not streamed.

    Args:
      source: images.
      section: the settings that say so.

    Returns:
      True for `placement` "resident", and for "auto" where the images are few enough.
    """
    if section.placement != "auto":
        return section.placement == "resident"
    return fits_resident(source, limit_bytes=section.resident_limit_bytes)
