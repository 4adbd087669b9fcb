"""Processes that read batches ahead: they start or say why, outlive nothing, and leave Ctrl-C alone.

Python starts them anew ("spawn"). Each imports the program's main module first, so a script without
`if __name__ == "__main__":` runs a second time in each of them, and ends there.
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
_GRACE_SECONDS = 5.0  # to end a read that has begun
_GUARD = 'put what the script does under `if __name__ == "__main__":`'


class WorkerError(RuntimeError):
    """A worker process ended before its work."""


def check_not_starting() -> None:
    """Refuses work that a worker process repeats because the script lacks its guard.

    Raises:
      WorkerError: this is a worker that still imports the program's main module.
    """
    # Python's own mark, by which it refuses to start processes of such a process.
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise WorkerError(
            "this is a worker process that read the script again, for it has no guard: " + _GUARD
        )


def start_worker(index: int, count: int) -> None:
    """Ends a worker process with its parent, however that ends; for Grain's `worker_init_fn`.

    Args:
      index: which worker, from 0.
      count: how many there are.
    """
    del index, count
    parent = multiprocessing.parent_process()

    def end_with_parent() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


class Carried(Generic[_T]):
    """A function that reaches worker processes in a file, and not in the pipe that starts them.

    Python fills that pipe before it looks whether the process lives: a function of more than 64 KiB,
    as one with images is, would wait for ever for a process that could not start.
    """

    def __init__(self, function: Callable[[int], _T]):
        """Writes the function to a temporary file, which `remove` deletes."""
        import cloudpickle  # Grain's own, for functions of a notebook too

        self._function: Callable[[int], _T] | None = function
        with tempfile.NamedTemporaryFile(prefix="jevb_jax_worker_", delete=False) as file:
            self._path = Path(file.name)
            try:
                cloudpickle.dump(function, file)
            except BaseException:
                self._path.unlink()
                raise

    def __call__(self, item: int) -> _T:
        """Calls the function; in a worker, the first call reads it."""
        function = self._function
        if function is None:
            function = self._function = pickle.loads(self._path.read_bytes())
        return function(item)

    def __getstate__(self) -> dict[str, Any]:
        """Where the function is."""
        return {"_function": None, "_path": self._path}

    def remove(self) -> None:
        """Deletes the file."""
        self._path.unlink(missing_ok=True)


def _start_without_ctrl_c(call: Callable[[], _T]) -> "Future[_T]":
    """Calls a function in a thread in which SIGINT is blocked.

    Ctrl-C reaches every process of a terminal, and the parent alone decides what it means. Threads
    and processes inherit what is blocked, so the workers that the call starts never see it, not even
    while they import.
    """
    done: Future[_T] = Future()

    def run() -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            done.set_result(call())
        except BaseException as error:  # noqa: BLE001 - raised in the thread that waits
            done.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return done


_with_workers: "weakref.WeakSet[ReadAhead[Any]]" = weakref.WeakSet()  # streams that are open


class ReadAhead(Iterator[_T]):
    """An iterator of Grain that says what became of its workers.

    An exception raised in the midst of it, by a signal, leaves it open: `close` is the caller's.
    """

    _is_closed = True  # until there is something to close

    def __init__(self, iterator: Any, num_workers: int, carried: Carried[_T] | None = None):
        """Takes a Grain iterator, the number of its processes and what was carried to them."""
        self._iterator = iterator
        self._num_workers = num_workers
        self._carried = carried
        self._pending: Future[_T] | None = None
        self._is_closed = False
        if carried is not None:
            # Else Python starts it with the first worker, and unblocks Ctrl-C there.
            resource_tracker.ensure_running()
            _with_workers.add(self)

    def __next__(self) -> _T:
        """The next item.

        Raises:
          WorkerError: a worker process ended.
        """
        if self._is_closed:
            raise StopIteration
        try:
            if self._carried is None:
                return next(self._iterator)
            if self._pending is None:
                self._pending = _start_without_ctrl_c(lambda: next(self._iterator))
            # A signal's exception leaves it pending: the item is the next call's.
            pending = self._pending
            wait([pending])
            self._pending = None
            return pending.result()
        except StopIteration:
            self.close()
            raise
        except RuntimeError as error:
            # Grain has no class of its own for this.
            if not str(error).startswith("Worker process was terminated unexpectedly"):
                raise
            self.close()
            raise WorkerError(
                f"one of the {self._num_workers} worker processes of input.num_workers ended: "
                f"{str(error).split('. ')[0]}. What it printed stands above. If it could not start: "
                f"{_GUARD}, or set input.num_workers to 0, which reads in threads. An exit code of "
                "-9 is a kill, mostly for memory: lower input.num_workers or "
                "input.prefetch_batches."
            ) from error

    def close(self) -> None:
        """Ends threads and workers; no items come any more."""
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
        """Closes the iterator; kills workers that do not answer, for which Grain waits for ever."""
        if self._pending is not None:  # which may just be starting a worker
            wait([self._pending], timeout=_GRACE_SECONDS)
        closing = threading.Thread(target=self._iterator.close, daemon=True)
        closing.start()
        closing.join(_GRACE_SECONDS)
        # Whose they are cannot be told where several streams have workers: those end with the parent.
        is_only = all(stream is self for stream in list(_with_workers))
        if closing.is_alive() and is_only:
            for child in multiprocessing.active_children():
                if child.name.startswith("grain-process-prefetch"):
                    child.kill()
            closing.join(_GRACE_SECONDS)
        if closing.is_alive():
            _logger.warning("Worker processes do not end; they will when this process does.")

    def __del__(self) -> None:
        """Closes what was left open."""
        self.close()
