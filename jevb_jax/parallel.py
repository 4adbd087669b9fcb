"""Devices and processes: one mesh axis over all of them, layout of arrays, start-up, agreement.

Only the examples are split. The state is the same on every device. A batch is cut into equal,
consecutive parts, one for each device, in the order of processes. Operations that couple examples
(BatchNorm, VICReg, Barlow Twins) are written for the global batch, and XLA adds the communication.
"""

import contextlib
import glob
import importlib.util
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import FrameType
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

DATA_AXIS = "data"


class MainProcessError(RuntimeError):
    """Process 0 failed; its own output says why."""


class StoppedError(RuntimeError):
    """A signal ended work before it had results. What the work saved before, it can resume from."""


# --- Start-up -------------------------------------------------------------------------------------


def detect_cluster(environ: Mapping[str, str], *, has_tpu: bool) -> str | None:
    """The launcher that started several processes which do not know about each other yet.

    Args:
      environ: environment variables.
      has_tpu: whether this machine has TPU chips.

    Returns:
      "tpu", "slurm" or "kubernetes"; None for a single process, as on a laptop.
    """
    hosts = environ.get("TPU_WORKER_HOSTNAMES", "")
    # A TPU VM without the list of hosts asks its metadata server.
    if has_tpu and (not hosts or "," in hosts):
        return "tpu"
    if int(environ.get("SLURM_NTASKS", "1")) > 1 and "SLURM_PROCID" in environ:
        return "slurm"
    if "KUBERNETES_SERVICE_HOST" in environ and "JOB_COMPLETION_INDEX" in environ:
        return "kubernetes"
    return None


def has_tpu() -> bool:
    """Whether TPU chips and their driver are present. Does not initialize any device."""
    chips = glob.glob("/dev/accel*") + glob.glob("/dev/vfio/[0-9]*")
    return bool(chips) and importlib.util.find_spec("libtpu") is not None


def start_processes(
    environ: Mapping[str, str],
    *,
    coordinator_address: str | None,
    num_processes: int | None,
    process_id: int | None,
    heartbeat_timeout_seconds: int,
) -> None:
    """Joins the processes of a run, before any device is initialized.

    Uses the three arguments if they are given, otherwise the launcher from `detect_cluster`.
    Without both, there is only this process.

    Args:
      environ: environment variables.
      coordinator_address: "host:port" of process 0.
      num_processes: number of processes that train together.
      process_id: number of this process, from 0.
      heartbeat_timeout_seconds: seconds that a process may be silent before the others end.

    Raises:
      ValueError: only some of the three are given, or one is out of range.
    """
    given = {
        "coordinator_address": coordinator_address,
        "num_processes": num_processes,
        "process_id": process_id,
    }
    missing = [name for name, value in given.items() if value is None]
    keywords: dict[str, Any] = {"heartbeat_timeout_seconds": heartbeat_timeout_seconds}
    if len(missing) == len(given):
        cluster = detect_cluster(environ, has_tpu=has_tpu())
        if cluster is None:
            return
        if cluster == "kubernetes" and importlib.util.find_spec("kubernetes") is None:
            raise ValueError(
                "this is an indexed job of Kubernetes, but the package `kubernetes`, which reads its "
                "size, is not installed. Install it, or give --coordinator_address, --num_processes "
                "and --process_id"
            )
    elif missing:
        raise ValueError(
            "give all of --coordinator_address, --num_processes and --process_id, or none; missing: "
            + ", ".join(f"--{name}" for name in missing)
        )
    else:
        if num_processes is None or process_id is None or not 0 <= process_id < num_processes:
            raise ValueError(
                f"--process_id must be in [0, {num_processes}) and different in each process, got "
                f"{process_id}"
            )
        keywords |= given
    # CPUs communicate by Gloo; other platforms ignore this setting.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(**keywords)


def is_main() -> bool:
    """Whether this process writes the files of the run."""
    return jax.process_index() == 0


# --- Layout ---------------------------------------------------------------------------------------


def make_mesh(devices: Sequence[Any] | None = None) -> Mesh:
    """One axis, `data`, over devices; the devices of a process are consecutive.

    Args:
      devices: by default all devices of all processes.
    """
    devices = jax.devices() if devices is None else devices
    ordered = sorted(devices, key=lambda device: (device.process_index, device.id))
    return Mesh(np.asarray(ordered), (DATA_AXIS,), axis_types=(AxisType.Auto,))


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def over_data(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """One axis of the array split over the devices."""
    return NamedSharding(mesh, PartitionSpec(*(None,) * axis, DATA_AXIS))


def over_data_where_divisible(mesh: Mesh, tree: Any) -> Any:
    """Splits each array along its first axis that the number of devices divides (ZeRO-1).

    Args:
      mesh: from `make_mesh`.
      tree: arrays or their shapes.

    Returns:
      A tree of shardings; arrays without such an axis are replicated.
    """

    def layout(leaf: Any) -> NamedSharding:
        axes = [axis for axis, size in enumerate(leaf.shape) if size and size % mesh.size == 0]
        return over_data(mesh, axes[0]) if axes else replicated(mesh)

    return jax.tree.map(layout, tree)


def check_divisible(batch_size: int, num_micro_batches: int, mesh: Mesh) -> None:
    """Raises ValueError if the devices cannot share a global batch equally."""
    parts = mesh.size * num_micro_batches
    if batch_size % parts:
        micro = f" x train.num_micro_batches = {num_micro_batches}" * (num_micro_batches > 1)
        raise ValueError(
            f"train.batch_size = {batch_size} is global and must be a multiple of {parts}, for "
            f"{mesh.size} devices{micro}"
        )


def put(tree: Any, shardings: Any) -> Any:
    """Puts arrays that are equal on every process on the devices.

    Args:
      tree: arrays on the host or a local device. Arrays with the right layout stay where they are.
      shardings: a prefix of the tree.

    Returns:
      Global arrays.
    """

    def one(leaf: Any, sharding: NamedSharding) -> jax.Array:
        if isinstance(leaf, jax.Array) and leaf.sharding == sharding:
            return leaf
        if sharding.is_fully_addressable:
            return jax.device_put(leaf, sharding)
        values = np.asarray(leaf)
        return jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])

    whole = jax.tree.broadcast(shardings, tree, is_leaf=lambda x: isinstance(x, NamedSharding))
    return jax.tree.map(one, tree, whole)


def put_key(key: jax.Array, mesh: Mesh) -> jax.Array:
    """Puts a random key on every device."""
    data = put(jax.random.key_data(key), replicated(mesh))
    return jax.random.wrap_key_data(data, impl=jax.random.key_impl(key))


def local_rows(batch_size: int) -> slice:
    """The rows of a global batch that this process loads."""
    rows = batch_size // jax.process_count()
    return slice(jax.process_index() * rows, (jax.process_index() + 1) * rows)


def put_local_rows(rows: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """A global array, from the rows that each process has loaded."""
    return jax.make_array_from_process_local_data(sharding, rows)


def on_local_device(tree: Any) -> Any:
    """Copies of replicated arrays on the first device of this process, without communication."""
    return jax.tree.map(lambda leaf: leaf.addressable_data(0), tree)


def to_host(tree: Any) -> Any:
    """Whole arrays as NumPy, on every process. All processes must call it."""

    def one(leaf: Any) -> np.ndarray:
        if leaf.is_fully_addressable or leaf.is_fully_replicated:
            return np.asarray(leaf)
        return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))

    return jax.tree.map(one, tree)


# --- Agreement ------------------------------------------------------------------------------------


def on_main(action: Callable[[], None]) -> None:
    """Runs an action on process 0 only. The others wait, and fail if it fails.

    Args:
      action: for example, writes files.

    Raises:
      MainProcessError: on the other processes; process 0 raises the error itself.
    """
    error: Exception | None = None
    if is_main():
        try:
            action()
        except Exception as caught:  # noqa: BLE001 - raised below, when the others know
            error = caught
    if jax.process_count() > 1:
        failed = multihost_utils.broadcast_one_to_all(np.asarray(error is not None))
        if failed and error is None:
            raise MainProcessError("process 0 failed; its own output says why")
    if error is not None:
        raise error


def as_main_says(is_true: bool) -> bool:
    """What process 0 holds true, on every process; all must call it."""
    if jax.process_count() == 1:
        return is_true
    return bool(multihost_utils.broadcast_one_to_all(np.asarray(is_true)))


class StopRequest:
    """Turns a signal into a flag that long work polls.

    With one process, the signals are SIGTERM, SIGINT, and SIGHUP unless it is ignored (nohup); a
    second signal acts at once. With several processes it is SIGTERM to any of them. JAX's
    preemption service tells the others, so that all stop at the same poll. Therefore all must poll
    equally often.

    Python allows only the main thread to handle signals. In another thread this class handles none,
    and signals act as usual.

    Attributes:
      signal_name: the reason to stop, or None.
      is_heeding: whether signals are handled; set on entering.
    """

    def __init__(self) -> None:
        self.signal_name: str | None = None
        self.is_heeding = False
        self._previous: dict[int, Any] = {}
        self._num_polls = 0
        self._is_interrupting = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        del frame
        self.signal_name = signal.Signals(number).name
        self._restore()
        self._raise_if_interrupting()

    def _raise_if_interrupting(self) -> None:
        if self._is_interrupting and self.signal_name is not None:
            self._is_interrupting = False
            raise StoppedError(f"{self.signal_name}: stopped before anything was written")

    def _restore(self) -> None:
        while self._previous:
            signal.signal(*self._previous.popitem())

    def request(self, reason: str) -> bool:
        """Asks to stop for a reason other than a signal. The first reason counts.

        Args:
          reason: becomes `signal_name`.

        Returns:
          False with several processes, which must stop together and cannot be asked this way.
        """
        if jax.process_count() > 1:
            return False
        if self.signal_name is None:
            self.signal_name = reason
        return True

    def is_requested(self) -> bool:
        """Polls. Once it is True, it stays True."""
        if self.signal_name is None and jax.process_count() > 1:
            self._num_polls += 1
            if multihost_utils.reached_preemption_sync_point(self._num_polls):
                self.signal_name = "SIGTERM to a process of the run"
        return self.signal_name is not None

    @contextlib.contextmanager
    def interrupting(self) -> Iterator[None]:
        """Inside this context a signal acts at once: for waits, and for work that writes nothing.

        With several processes, or in a thread other than the main one, it has no effect.

        Raises:
          StoppedError: from the body, when a signal comes or has come.
        """
        self._is_interrupting = self.is_heeding and jax.process_count() == 1
        try:
            self._raise_if_interrupting()
            yield
        finally:
            self._is_interrupting = False

    def __enter__(self) -> "StopRequest":
        if jax.process_count() > 1:  # the SIGTERM handler of JAX must stay
            self.is_heeding = True
        elif threading.current_thread() is threading.main_thread():
            self.is_heeding = True
            for number in _stopping_signals():
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()


def _stopping_signals() -> list[int]:
    """Signals to handle. A signal whose handler was not set by Python stays as it is."""
    numbers = [signal.SIGTERM, signal.SIGINT]
    if signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:
        numbers.append(signal.SIGHUP)
    return [number for number in numbers if signal.getsignal(number) is not None]
