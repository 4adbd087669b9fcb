"""Copies of a run's metrics for other programs: TensorBoard, Weights & Biases, MLflow, Trackio.

`metrics.jsonl` has every number; what is here is a copy of it. So a writer that fails (no network, a
full disk) is a warning, and the training goes on without it. A writer is opened with the first
number. Its library is imported only then, and only if `train.writers` names it.

Projects, servers and log-ins are those of each library, by its own environment variables, such as
`WANDB_MODE=offline` and `MLFLOW_TRACKING_URI`. The identities of the remote runs are in
`writers.json` of the run directory, so that a resumed run continues them. It sends the numbers since
its last checkpoint again; they are the same.
"""

import contextlib
import importlib
import importlib.util
import logging
import os
import queue
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

from jevb_jax.extras import EXTRAS
from jevb_jax.runs import files
from jevb_jax.runs.dotted_keys import flatten

Ending = Literal["finished", "stopped", "failed"]

AUTO = "auto"  # TensorBoard where tensorboardX is installed
IDENTITIES = "writers.json"
_PACKAGES = {
    "tensorboard": "tensorboardX",
    "wandb": "wandb",
    "mlflow": "mlflow",
    "trackio": "trackio",
}
NAMES = (AUTO, *_PACKAGES)
_PROJECT = "jevb_jax"  # unless the library's environment variable names another
_FINISH_SECONDS = 60  # what a network that fails may cost at the end of a training

_logger = logging.getLogger(__name__)


class WrittenRun(NamedTuple):
    """What a writer is told about a run.

    Attributes:
      workdir: directory of the run, from `files.to_path`.
      config: plain values.
    """

    workdir: Path
    config: Mapping[str, Any]


class Writer(Protocol):
    """Takes the metrics of a run. It may raise anything: `Guarded` turns that into a warning."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Takes scalars by name after `step` steps; a step may come several times."""
        ...

    def forget_after(self, step: int) -> None:
        """The run goes on from this step: what comes now replaces what was logged after it."""
        ...

    def finish(self, ending: Ending) -> None:
        """Sends what waits, and says how the training ended. Nothing is logged afterwards."""
        ...


def check(names: Sequence[str], workdir: Path) -> None:
    """Refuses writers that cannot work, before anything is written.

    Args:
      names: `train.writers`, each of `NAMES`.
      workdir: directory of the run, from `files.to_path`.

    Raises:
      ValueError: a package is not installed, or TensorBoard events are to go into an object store.
    """
    for name in names:
        if name == AUTO:
            continue
        package = _PACKAGES[name]
        if not _is_installed(package):
            extra = EXTRAS[package]
            raise ValueError(
                f"train.writers names {name}, but {package} is not installed: pip install "
                f"'jevb-jax[{extra}]' (in a checkout: '.[{extra}]'), or leave {name} out"
            )
        if name == "tensorboard" and files.is_remote(workdir):
            raise ValueError(
                f"train.writers names tensorboard, but {workdir} is in an object store, which cannot "
                "append events: leave tensorboard out"
            )


def _is_installed(package: str) -> bool:
    # A folder `wandb` of the working directory looks like a package without an origin.
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None


def open_writers(names: Sequence[str], run: WrittenRun) -> "list[Guarded]":
    """The writers of a run. Each is opened at its first number.

    Args:
      names: `train.writers`, each of `NAMES`.
      run: the run.

    Returns:
      Writers that never raise.
    """
    has_events = _is_installed("tensorboardX") and not files.is_remote(run.workdir)
    meant = dict.fromkeys("tensorboard" if name == AUTO else name for name in names)
    if "tensorboard" not in names and not has_events:
        meant.pop("tensorboard", None)
    makers: dict[str, Callable[[WrittenRun], Writer]] = {
        "tensorboard": TensorBoard,
        "wandb": WeightsAndBiases,
        "mlflow": MLflow,
        "trackio": Trackio,
    }
    return [Guarded(name, lambda make=makers[name]: make(run)) for name in meant]


class Guarded:
    """A writer whose failure is one warning; after it, the writer gets nothing more."""

    def __init__(self, name: str, make: Callable[[], Writer]):
        """Prepares the writer.

        Args:
          name: for the warning.
          make: opens the writer; called at the first number.
        """
        self._name = name
        self._make = make
        self._writer: Writer | None = None
        self._forgotten_after: int | None = None  # from before it was opened
        self._is_broken = False

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Passes scalars on, see `Writer.log`."""
        if self._is_broken:
            return
        with self._guard():
            if self._writer is None:
                self._writer = self._make()
                if self._forgotten_after is not None:
                    self._writer.forget_after(self._forgotten_after)
            self._writer.log(step, values)

    def forget_after(self, step: int) -> None:
        """Passes it on, see `Writer.forget_after`."""
        self._forgotten_after = step
        if self._writer is not None and not self._is_broken:
            with self._guard():
                self._writer.forget_after(step)

    def finish(self, ending: Ending) -> None:
        """Passes it on, see `Writer.finish`."""
        if self._writer is not None and not self._is_broken:
            with self._guard():
                self._writer.finish(ending)

    @contextlib.contextmanager
    def _guard(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # noqa: BLE001 - whatever a library of others raises
            self._is_broken = True
            told = f"{type(error).__name__}: {error}".splitlines()[0]
            _logger.warning(
                "%s takes no more metrics of this process (%s). The work goes on, and metrics.jsonl "
                "has every number.",
                self._name,
                told,
            )


class TensorBoard:
    """Event files under `tensorboard/`, which a thread of tensorboardX writes soon after `log`."""

    def __init__(self, run: WrittenRun):
        """Imports tensorboardX; the first file is made with the first number."""
        self._directory = run.workdir / "tensorboard"
        self._make_writer = importlib.import_module("tensorboardX").SummaryWriter
        self._purge_step: int | None = None
        self._writer: Any = None

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """See `Writer.log`. It raises the error of the thread, for example for a full disk."""
        if self._writer is None:
            self._writer = self._make_writer(
                str(self._directory),
                purge_step=self._purge_step,
                # No limit: if the thread died, a full queue would wait forever.
                max_queue=0,
                # tensorboardX names files by the second; a second file would replace the first.
                filename_suffix=f".{time.time_ns()}",
            )
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def forget_after(self, step: int) -> None:
        """Hides what was written after this step."""
        self.finish()
        self._purge_step = step + 1

    def finish(self, ending: Ending = "finished") -> None:
        """Closes the file; events have no word for how a run ended."""
        del ending
        if self._writer is not None:
            self._writer.close()
            self._writer = None


class WeightsAndBiases:
    """A run of Weights & Biases; offline with `WANDB_MODE=offline`, in `wandb/` of the run.

    Numbers go to a process of wandb, so the training does not wait for the network.
    """

    def __init__(self, run: WrittenRun):
        """Begins the remote run, or continues it."""
        wandb = importlib.import_module("wandb")
        identity = _identity(run.workdir, "wandb", lambda: secrets.token_hex(4))
        self._run: Any = wandb.init(
            id=identity,
            resume="allow",
            project=os.environ.get("WANDB_PROJECT", _PROJECT),
            name=os.environ.get("WANDB_NAME", run.workdir.name),
            dir=os.environ.get("WANDB_DIR")
            or (None if files.is_remote(run.workdir) else str(run.workdir)),
            config=dict(run.config),
            reinit="create_new",  # another run of this process goes on
            settings=wandb.Settings(
                console="off", finish_timeout=_FINISH_SECONDS, finish_timeout_raises=False
            ),
        )
        # wandb takes rising steps only, so steps that the server already has are skipped; their
        # numbers are the same.
        self._first_step: int = self._run.starting_step

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """See `Writer.log`."""
        if step >= self._first_step:
            self._run.log(dict(values), step=step)

    def forget_after(self, step: int) -> None:
        """Nothing: the same numbers come again."""

    def finish(self, ending: Ending) -> None:
        """Waits for the upload, but not longer than a minute."""
        self._run.finish(exit_code=0 if ending == "finished" else 1)


class Trackio:
    """A run of Trackio, in its local database or where `TRACKIO_SPACE_ID` says."""

    def __init__(self, run: WrittenRun):
        """Begins the run, or continues it. Trackio knows runs by their names."""
        trackio = importlib.import_module("trackio")
        name = _identity(
            run.workdir, "trackio", lambda: f"{run.workdir.name}-{secrets.token_hex(3)}"
        )
        self._run: Any = trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", _PROJECT),
            name=name,
            config=files.from_json(files.to_json(run.config)),
            resume="allow",
            embed=False,
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """See `Writer.log`."""
        self._run.log(dict(values), step=step)

    def forget_after(self, step: int) -> None:
        """Nothing: the same numbers come again."""

    def finish(self, ending: Ending) -> None:
        """Sends what waits; Trackio has no word for how a run ended."""
        del ending
        self._run.finish()


_MLFLOW_ENDINGS = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}
_MLFLOW_BATCH = 1000  # metrics in a request, MLflow's limit
_MLFLOW_PARAMETERS = 100  # in a request


class MLflow:
    """A run of MLflow, at `MLFLOW_TRACKING_URI`.

    Its client waits for the server, so a thread talks to it and the training does not wait. An
    error of the thread is raised by the next call.
    """

    def __init__(self, run: WrittenRun):
        """Starts the thread, which begins the remote run or continues it."""
        self._run = run
        self._waiting: queue.SimpleQueue[tuple[int, int, Mapping[str, float]] | Ending] = (
            queue.SimpleQueue()
        )
        self._error: Exception | None = None
        mlflow = importlib.import_module("mlflow")
        self._thread = threading.Thread(
            target=self._work, args=(mlflow,), name="mlflow", daemon=True
        )
        self._thread.start()

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """See `Writer.log`."""
        self._raise_error()
        self._waiting.put((step, time.time_ns() // 1_000_000, dict(values)))

    def forget_after(self, step: int) -> None:
        """Nothing: the same numbers come again."""

    def finish(self, ending: Ending) -> None:
        """Waits until everything is sent, but not longer than a minute."""
        self._waiting.put(ending)
        self._thread.join(_FINISH_SECONDS)
        self._raise_error()
        if self._thread.is_alive():
            raise TimeoutError(f"not everything was sent within {_FINISH_SECONDS} seconds")

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    def _work(self, mlflow: Any) -> None:
        try:
            client = mlflow.MlflowClient()
            run_id = self._begin(client, mlflow.entities)
            ending: Ending | None = None
            while ending is None:
                metrics = []
                one = self._waiting.get()
                while True:
                    if isinstance(one, str):
                        ending = one
                        break
                    step, milliseconds, values = one
                    metrics += [
                        mlflow.entities.Metric(name, value, milliseconds, step)
                        for name, value in values.items()
                    ]
                    if self._waiting.empty() or len(metrics) > _MLFLOW_BATCH // 2:
                        break
                    one = self._waiting.get()
                for start in range(0, len(metrics), _MLFLOW_BATCH):
                    client.log_batch(run_id, metrics=metrics[start : start + _MLFLOW_BATCH])
            client.set_terminated(run_id, _MLFLOW_ENDINGS[ending])
        except Exception as error:  # noqa: BLE001 - raised by the next call of the training's thread
            self._error = error

    def _begin(self, client: Any, entities: Any) -> str:
        """The identity of the remote run, which is running now."""
        workdir = self._run.workdir
        found = _identities(workdir).get("mlflow")
        if found is not None:
            client.update_run(found, status="RUNNING")
            return found
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", _PROJECT)
        experiment = client.get_experiment_by_name(name)
        number = client.create_experiment(name) if experiment is None else experiment.experiment_id
        run_id = client.create_run(number, run_name=workdir.name).info.run_id
        _identity(workdir, "mlflow", lambda: run_id)
        settings = flatten(self._run.config)
        parameters = [entities.Param(key, str(value)) for key, value in settings.items()]
        for start in range(0, len(parameters), _MLFLOW_PARAMETERS):
            client.log_batch(run_id, params=parameters[start : start + _MLFLOW_PARAMETERS])
        return run_id


def _identities(workdir: Path) -> dict[str, str]:
    path = workdir / IDENTITIES
    return files.read_json(path) if path.exists() else {}


def _identity(workdir: Path, name: str, make: Callable[[], str]) -> str:
    """The saved identity of a remote run; a new one is saved before anything is sent to it."""
    with _IDENTITIES_LOCK:
        found = _identities(workdir)
        if name not in found:
            found[name] = make()
            files.write_json_atomically(workdir / IDENTITIES, found)
    return found[name]


_IDENTITIES_LOCK = threading.Lock()  # MLflow's thread saves too
