"""Worker processes that read batches ahead.

If one cannot start, the error says why. None outlives its parent, and Ctrl-C reaches only the
parent.

Python starts workers by "spawn": each imports the main module of the program first. A script
without `if __name__ == "__main__":` therefore runs again in each worker, and fails there.
"""

import logging
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any, Generic, TypeVar

_T = TypeVar("_T")

_logger = logging.getLogger(__name__)
_GRACE_SECONDS = 5.0  # time to finish a read that has begun
_GUARD = 'put what the script does under `if __name__ == "__main__":`'


class WorkerError(RuntimeError):
    """A worker process ended before its work was done."""


def check_not_starting() -> None:
    """Raises WorkerError in a worker that runs the script again, for lack of a guard."""
    # Python sets this mark itself, and checks it before it lets such a process start others.
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise WorkerError(
            "this is a worker process that runs the script again, because it has no guard: "
            + _GUARD
        )


def start_worker(index: int, count: int) -> None:
    """Makes a worker process end with its parent, however that ends. Grain's `worker_init_fn`.

    Args:
      index: number of the worker, from 0.
      count: number of workers.
    """
    del index, count
    parent = multiprocessing.parent_process()

    def end_with_parent() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


class Carried(Generic[_T]):
    """A function that workers get by a file, and not by the pipe that starts them.

    Python fills that pipe before it checks that the process lives. A function of more than 64 KiB,
    for example one that holds images, would wait forever for a process that could not start.
    """

    def __init__(self, function: Callable[[int], _T]):
        """Writes the function to a temporary file, which `remove` deletes."""
        import cloudpickle  # a dependency of Grain; also pickles functions of a notebook

        self._function: Callable[[int], _T] | None = function
        with tempfile.NamedTemporaryFile(prefix="jevb_jax_worker_", delete=False) as file:
            self._path = Path(file.name)
            try:
                cloudpickle.dump(function, file)
            except BaseException:
                self._path.unlink()
                raise

    def __call__(self, item: int) -> _T:
        """Calls the function. The first call in a worker reads it from the file."""
        function = self._function
        if function is None:
            function = self._function = pickle.loads(self._path.read_bytes())
        return function(item)

    def __getstate__(self) -> dict[str, Any]:
        """The place of the file."""
        return {"_function": None, "_path": self._path}

    def remove(self) -> None:
        """Deletes the file."""
        self._path.unlink(missing_ok=True)


def _start_without_ctrl_c(call: Callable[[], _T]) -> "Future[_T]":
    """Calls a function in a thread in which SIGINT is blocked.

    Ctrl-C sends SIGINT to every process of a terminal, but only the parent should decide what it
    means. Threads and processes inherit blocked signals, so workers that the call starts never get
    SIGINT, not even while they import.
    """
    done: Future[_T] = Future()

    def run() -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            done.set_result(call())
        except BaseException as error:  # noqa: BLE001 - raised again in the thread that waits
            done.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return done


_with_workers: "weakref.WeakSet[ReadAhead[Any]]" = weakref.WeakSet()  # streams that are open


class ReadAhead(Iterator[_T]):
    """A Grain iterator that says why a worker ended.

    If an exception interrupts it, for example from a signal handler, the caller must call `close`.
    """

    _is_closed = True  # nothing to close yet

    def __init__(self, iterator: Any, num_workers: int, carried: Carried[_T] | None = None):
        """Takes a Grain iterator, the number of its processes, and the function they were given."""
        self._iterator = iterator
        self._num_workers = num_workers
        self._carried = carried
        self._pending: Future[_T] | None = None
        self._is_closed = False
        if carried is not None:
            # Otherwise Python starts it with the first worker, and unblocks SIGINT then.
            resource_tracker.ensure_running()
            _with_workers.add(self)

    def __next__(self) -> _T:
        """The next item.

        Raises:
          WorkerError: a worker process has ended.
        """
        if self._is_closed:
            raise StopIteration
        try:
            if self._carried is None:
                return next(self._iterator)
            if self._pending is None:
                self._pending = _start_without_ctrl_c(lambda: next(self._iterator))
            # If a signal handler raises while we wait, the next call gets this item.
            pending = self._pending
            wait([pending])
            self._pending = None
            return pending.result()
        except StopIteration:
            self.close()
            raise
        except RuntimeError as error:
            # Grain has no exception class for this.
            if not str(error).startswith("Worker process was terminated unexpectedly"):
                raise
            self.close()
            raise WorkerError(
                f"one of the {self._num_workers} worker processes of input.num_workers ended: "
                f"{str(error).split('. ')[0]}. See its output above. If it could not start, "
                f"{_GUARD}, or set input.num_workers to 0, which reads in threads. An exit code of "
                "-9 means that it was killed, mostly for memory: lower input.num_workers or "
                "input.prefetch_batches."
            ) from error

    def close(self) -> None:
        """Ends threads and workers. There are no items after this."""
        if self._is_closed:
            return
        self._is_closed = True
        try:
            if self._carried is None or sys.is_finalizing():
                self._iterator.close()
            else:
                self._end_workers()
        finally:
            _with_workers.discard(self)
            if self._carried is not None:
                self._carried.remove()

    def _end_workers(self) -> None:
        """Closes the iterator, and kills workers that do not answer (Grain would wait forever)."""
        if self._pending is not None:  # it may just be starting a worker
            wait([self._pending], timeout=_GRACE_SECONDS)
        closing = threading.Thread(target=self._iterator.close, daemon=True)
        closing.start()
        closing.join(_GRACE_SECONDS)
        # With several open streams nobody knows whose workers these are; they end with the parent.
        is_only = all(stream is self for stream in list(_with_workers))
        if closing.is_alive() and is_only:
            for child in multiprocessing.active_children():
                if child.name.startswith("grain-process-prefetch"):
                    child.kill()
            closing.join(_GRACE_SECONDS)
        if closing.is_alive():
            _logger.warning("Worker processes do not end; they will end with this process.")

    def __del__(self) -> None:
        """Closes the iterator if nobody did."""
        self.close()
