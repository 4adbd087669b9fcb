"""Devices and processes: one mesh axis over all of them, arrays laid over it, start-up, agreement.

Parallelizm is over examples alone. The state is the same on every device; a batch is cut into as many
equal, consecutive parts as there are devices, in the order of processes. What couples examples
(BatchNorm, VICReg, Barlow Twins) is written for the global batch, and XLA adds the collectives.
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
    """Process 0 failed and says why."""


class StoppedError(RuntimeError):
    """A signal ended work of which nothing was written."""


# --- Start-up -------------------------------------------------------------------------------------


def detect_cluster(environ: Mapping[str, str], *, has_tpu: bool) -> str | None:
    """Which launcher started several processes that do not know of each other yet.

    Args:
      environ: environment variables.
      has_tpu: whether this machine has TPU chips.

    Returns:
      "tpu", "slurm" or "kubernetes", or None: one process, as on a laptop.
    """
    hosts = environ.get("TPU_WORKER_HOSTNAMES", "")
    # Without the list of hosts this is a TPU VM, which asks its metadata server.
    if has_tpu and (not hosts or "," in hosts):
        return "tpu"
    if int(environ.get("SLURM_NTASKS", "1")) > 1 and "SLURM_PROCID" in environ:
        return "slurm"
    if "KUBERNETES_SERVICE_HOST" in environ and "JOB_COMPLETION_INDEX" in environ:
        return "kubernetes"
    return None


def has_tpu() -> bool:
    """Whether TPU chips and their driver are here; touches no device."""
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
    """Joins the processes of a run, before any device is touched.

    By the three numbers where they are given, by the launcher where there is one (see
    `detect_cluster`), and not at all elsewhere.

    Args:
      environ: environment variables.
      coordinator_address: "host:port" of process 0.
      num_processes: how many train together.
      process_id: number of this process, from 0.
      heartbeat_timeout_seconds: how long a process may be silent before the others end.

    Raises:
      ValueError: some of the three are missing or out of range.
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
                "an indexed job of Kubernetes was found, but not the package `kubernetes` that asks "
                "it for its size: install it, or give --coordinator_address, --num_processes and "
                "--process_id"
            )
    elif missing:
        raise ValueError(
            "give all of --coordinator_address, --num_processes and --process_id or none; missing: "
            + ", ".join(f"--{name}" for name in missing)
        )
    else:
        if num_processes is None or process_id is None or not 0 <= process_id < num_processes:
            raise ValueError(
                f"--process_id must be in [0, {num_processes}), got {process_id}: each process has "
                "its own"
            )
        keywords |= given
    # CPUs speak to each other by Gloo; other platforms do not read this.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(**keywords)


def is_main() -> bool:
    """Whether this process writes the files that people read."""
    return jax.process_index() == 0


# --- Layout ---------------------------------------------------------------------------------------


def make_mesh(devices: Sequence[Any] | None = None) -> Mesh:
    """One axis, `data`, over devices; a process's devices stand next to each other.

    Args:
      devices: all of every process by default.

    Returns:
      The mesh.
    """
    devices = jax.devices() if devices is None else devices
    ordered = sorted(devices, key=lambda device: (device.process_index, device.id))
    return Mesh(np.asarray(ordered), (DATA_AXIS,), axis_types=(AxisType.Auto,))


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def over_data(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """An axis of the array cut over the devices."""
    return NamedSharding(mesh, PartitionSpec(*(None,) * axis, DATA_AXIS))


def over_data_where_divisible(mesh: Mesh, tree: Any) -> Any:
    """A layout that cuts each array along its first axis that the devices divide (ZeRO-1).

    Args:
      mesh: the devices, from `make_mesh`.
      tree: arrays or their shapes.

    Returns:
      The same tree of shardings; arrays without such an axis are replicated.
    """

    def layout(leaf: Any) -> NamedSharding:
        axes = [axis for axis, size in enumerate(leaf.shape) if size and size % mesh.size == 0]
        return over_data(mesh, axes[0]) if axes else replicated(mesh)

    return jax.tree.map(layout, tree)


def check_divisible(batch_size: int, num_micro_batches: int, mesh: Mesh) -> None:
    """Refuses a global batch that the devices cannot share equally.

    Raises:
      ValueError: with both numbers.
    """
    parts = mesh.size * num_micro_batches
    if batch_size % parts:
        micro = f" x train.num_micro_batches = {num_micro_batches}" * (num_micro_batches > 1)
        raise ValueError(
            f"train.batch_size = {batch_size}, which is global, does not divide over {mesh.size} "
            f"devices{micro}: take a multiple of {parts}"
        )


def put(tree: Any, shardings: Any) -> Any:
    """Lays arrays that are equal on every process over devices.

    Args:
      tree: arrays of the host or of a local device; what already lies so stays where it is.
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
    """`put` of a key on every device."""
    data = put(jax.random.key_data(key), replicated(mesh))
    return jax.random.wrap_key_data(data, impl=jax.random.key_impl(key))


def local_rows(batch_size: int) -> slice:
    """The rows of a global batch that this process loads."""
    rows = batch_size // jax.process_count()
    return slice(jax.process_index() * rows, (jax.process_index() + 1) * rows)


def put_local_rows(rows: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """A global array from the rows that each process loaded."""
    return jax.make_array_from_process_local_data(sharding, rows)


def on_local_device(tree: Any) -> Any:
    """This process's own copy of replicated arrays, on its first device; nothing moves."""
    return jax.tree.map(lambda leaf: leaf.addressable_data(0), tree)


def to_host(tree: Any) -> Any:
    """Whole arrays as NumPy, on every process; all must call it."""

    def one(leaf: Any) -> np.ndarray:
        if leaf.is_fully_addressable or leaf.is_fully_replicated:
            return np.asarray(leaf)
        return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))

    return jax.tree.map(one, tree)


# --- Agreement ------------------------------------------------------------------------------------


def on_main(action: Callable[[], None]) -> None:
    """Runs an action on process 0 alone; the others wait, and fail if it does.

    Args:
      action: writes files.

    Raises:
      MainProcessError: on the others; process 0 raises the error itself.
    """
    error: Exception | None = None
    if is_main():
        try:
            action()
        except Exception as caught:  # noqa: BLE001 - raised below, once the others know
            error = caught
    if jax.process_count() > 1:
        failed = multihost_utils.broadcast_one_to_all(np.asarray(error is not None))
        if failed and error is None:
            raise MainProcessError("process 0 failed; its own output says why")
    if error is not None:
        raise error


class StopRequest:
    """Turns a signal into a flag that long work polls.

    Of one process, SIGTERM, SIGINT and, where nobody chose to outlive a terminal (nohup), SIGHUP; a
    second signal acts at once. Of several, SIGTERM to any one of them, which JAX's preemption service
    tells the others, so that all stop at the same poll: each must poll as often as the others do.

    Python lets none but the main thread handle signals. In another one nothing is handled, and
    signals do what they did before.

    Attributes:
      signal_name: why to stop, or None.
      is_heeding: whether signals are noticed, from entering on.
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
        """Asks to stop for another reason than a signal; the first reason counts.

        Args:
          reason: becomes `signal_name`.

        Returns:
          False where it cannot be asked: of several processes, which must stop together.
        """
        if jax.process_count() > 1:
            return False
        if self.signal_name is None:
            self.signal_name = reason
        return True

    def is_requested(self) -> bool:
        """Polls; once True, always True."""
        if self.signal_name is None and jax.process_count() > 1:
            self._num_polls += 1
            if multihost_utils.reached_preemption_sync_point(self._num_polls):
                self.signal_name = "SIGTERM to a process of the run"
        return self.signal_name is not None

    @contextlib.contextmanager
    def interrupting(self) -> Iterator[None]:
        """Within, a signal does not wait for a poll: for waits, and for work that writes nothing.

        Raises:
          StoppedError: out of the body, a signal came or had come. Of several processes and in other
            threads than the main one, never.
        """
        self._is_interrupting = self.is_heeding and jax.process_count() == 1
        try:
            self._raise_if_interrupting()
            yield
        finally:
            self._is_interrupting = False

    def __enter__(self) -> "StopRequest":
        if jax.process_count() > 1:  # JAX's own handler of SIGTERM must stay
            self.is_heeding = True
        elif threading.current_thread() is threading.main_thread():
            self.is_heeding = True
            for number in _stopping_signals():
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()


def _stopping_signals() -> list[int]:
    """Signals to handle; those that another language handles stay as they are."""
    numbers = [signal.SIGTERM, signal.SIGINT]
    if signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:
        numbers.append(signal.SIGHUP)
    return [number for number in numbers if signal.getsignal(number) is not None]
