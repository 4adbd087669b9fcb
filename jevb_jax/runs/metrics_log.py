"""Logs of metrics: JSON lines always, copies for other programs, and lines for people.

The reader of standard output may go away during a run: `| head` has enough, or Ctrl-C ends `| tee`.
`unbroken` lets the run continue.
"""

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from jevb_jax.runs import files, metrics_writers
from jevb_jax.runs.metrics_writers import Ending, WrittenRun
from jevb_jax.runs.waiting import FIRST_SECONDS, Waiting

_PLAIN_LINE_SECONDS = 15.0
_LOG_WIDTH = 1000  # columns, more than our widest table has


class MetricsLog:
    """The file `metrics.jsonl` of a run: on each line a JSON object that includes `step`.

    Writers get a copy of every line (`metrics_writers`). An object store cannot append: there lines
    wait for `flush`, and there are no TensorBoard events.
    """

    def __init__(
        self,
        workdir: Path,
        *,
        is_writer: bool = True,
        writers: Sequence[str] = (metrics_writers.AUTO,),
        config: Mapping[str, Any] | None = None,
    ):
        """Opens the log.

        Args:
          workdir: directory of the run, from `files.to_path`.
          is_writer: with False nothing is written. Only one process of a run writes.
          writers: who else gets the metrics, each of `metrics_writers.NAMES`.
          config: plain values, which writers show beside the metrics.
        """
        self._path = workdir / "metrics.jsonl"
        self._is_writer = is_writer
        self._is_remote = files.is_remote(workdir)
        self._file: TextIO | None = None
        self._lines: list[str] = []
        run = WrittenRun(workdir, config or {})
        self._writers = metrics_writers.open_writers(writers, run) if is_writer else []
        if is_writer and self._is_remote:
            self._lines = _lines_of(self.read(self._path))
        elif is_writer:
            self._file = self._path.open("a", encoding="utf-8")

    @staticmethod
    def read(path: Path) -> list[dict[str, Any]]:
        """Reads the lines of a `metrics.jsonl`, without a last line that a kill cut short.

        Raises:
          ValueError: a line before the last is not JSON.
        """
        if not path.exists():
            return []
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        records = []
        for number, line in enumerate(lines, start=1):
            try:
                records.append(files.from_json(line))
            except ValueError as error:
                if number == len(lines) and not line.endswith("\n"):
                    break
                raise ValueError(f"{path}, line {number} is not JSON: {error}") from error
        return records

    def truncate_after(self, step: int) -> None:
        """Removes the lines after `step`, because a resumed run writes them again."""
        if not self._is_writer:
            return
        kept = _lines_of(record for record in self.read(self._path) if record["step"] <= step)
        files.write_text_atomically(self._path, "".join(kept))
        self._lines = kept if self._is_remote else []
        if self._file is not None:
            self._file.close()
            self._file = self._path.open("a", encoding="utf-8")
        for writer in self._writers:
            writer.forget_after(step)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Appends one line at once; in an object store it is written at the next `flush`.

        Args:
          step: number of steps done.
          values: scalars by name.
        """
        if not self._is_writer:
            return
        line = files.to_json({"step": step, **values}) + "\n"
        if self._file is None:
            self._lines.append(line)
        else:
            self._file.write(line)
            self._file.flush()
        for writer in self._writers:
            writer.log(step, values)

    def flush(self) -> None:
        """Writes all lines that wait."""
        if self._is_writer and self._is_remote:
            files.write_text_atomically(self._path, "".join(self._lines))

    def close(self, ending: Ending = "finished") -> None:
        """Flushes and closes the files, and tells the writers how the work ended."""
        self.flush()
        if self._file is not None:
            self._file.close()
        for writer in self._writers:
            writer.finish(ending)


def _lines_of(records: Iterable[Mapping[str, Any]]) -> list[str]:
    return [files.to_json(record) + "\n" for record in records]


def standard_output(*, quiet: bool = False) -> Console:
    """Standard output for people. Silent if the process has none (`>&-`, a service).

    A file or a pipe has no width, so it gets whole rows; the variable `COLUMNS` gives it one.
    """
    console = Console(quiet=quiet or sys.stdout is None)
    if not (console.is_terminal or console.is_jupyter or os.environ.get("COLUMNS")):
        console.width = _LOG_WIDTH
    return console


class _UnbrokenFile:
    """A text file for writing. After the first failure it drops what is written."""

    def __init__(self, file: Any, on_closed: Callable[[Exception], None]):
        self._file = file
        self._on_closed = on_closed
        self._is_closed = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def write(self, text: str) -> int:
        self._attempt(lambda: self._file.write(text))
        return len(text)

    def flush(self) -> None:
        self._attempt(self._file.flush)

    def _attempt(self, action: Callable[[], object]) -> None:
        if self._is_closed:
            return
        try:
            action()
        except UnicodeError:  # also a ValueError, but caused by the text
            raise
        except (OSError, ValueError) as error:  # a broken pipe or full disk; a closed file
            self._is_closed = True
            _drop_what_waits(self._file)
            self._on_closed(error)


def _drop_what_waits(file: Any) -> None:
    """Redirects standard output to nowhere, and also standard error if it is the same file.

    Python flushes both when it ends. That would fail, with exit status 120.
    """
    standard = (sys.stdout, sys.__stdout__, sys.stderr, sys.__stderr__)
    if not any(file is one for one in standard) or file.closed:
        return
    with contextlib.suppress(OSError):  # not a file of the system, for example in a notebook
        broken = os.fstat(file.fileno())
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for number in (1, 2):
            with contextlib.suppress(OSError):  # the file is closed
                if os.path.samestat(os.fstat(number), broken):
                    os.dup2(nowhere, number)
        os.close(nowhere)


@contextlib.contextmanager
def unbroken(
    console: Console, on_closed: Callable[[Exception], None] = lambda _: None
) -> Iterator[None]:
    """Lets the work continue if the reader of a console goes away; the console becomes silent.

    Args:
      console: what the work prints to. Its file is restored afterwards.
      on_closed: called once with the error when something could not be written: an OSError, or the
        ValueError of a closed file.
    """
    changed: Any = console  # None as its file means the present standard output
    file = changed.file
    is_standard = file is (sys.stderr if console.stderr else sys.stdout)
    changed.file = _UnbrokenFile(file, on_closed)
    try:
        yield
    finally:
        changed.file = None if is_standard else file


_COMPILING = "compiling the first steps"


class ProgressLine:
    """A live bar on a terminal; elsewhere, a plain line every 15 seconds."""

    def __init__(self, console: Console, *, total_steps: int, initial_step: int):
        """Prepares the line.

        Args:
          console: where to write.
          total_steps: number of steps of the run.
          initial_step: number of steps done before.
        """
        self._console = console
        self._total = total_steps
        self._step = initial_step
        # The first update tells when the programs were compiled, which no later step has to do.
        self._start: tuple[float, int] | None = None
        self._last_line = time.monotonic()
        self._progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=20),
            TimeElapsedColumn(),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[status]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task(
            "", total=total_steps, completed=initial_step, status=_COMPILING
        )
        self._waiting: Waiting | None = None

    def __enter__(self) -> "ProgressLine":
        """Starts the bar, or says that the first steps are compiled."""
        self._progress.start()
        if not self._console.is_terminal:
            self._console.print(f"step {self._step}/{self._total}  {_COMPILING}", soft_wrap=True)
            self._waiting = Waiting(self._console, "training").__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Stops the bar and leaves its last line."""
        if self._waiting is not None:
            self._waiting.__exit__(kind, error, traceback)
        self._progress.stop()

    def update(self, step: int, status: str) -> None:
        """Shows the number of steps done, and a status text beside it."""
        self._step = step
        self._progress.update(self._task, completed=step, status=status)
        now = time.monotonic()
        is_due = now - self._last_line >= _PLAIN_LINE_SECONDS or step == self._total
        if not self._console.is_terminal and is_due:
            self._last_line = now
            remaining = ""
            if self._start is not None:
                started, first = self._start
                seconds = (now - started) / max(step - first, 1) * (self._total - step)
                remaining = f"ETA {seconds:.0f} s  "
            self._console.print(f"step {step}/{self._total}  {remaining}{status}", soft_wrap=True)
        if self._start is None:
            self._start = (now, step)
            if self._waiting is not None:  # from now on, the plain lines say that the run goes on
                self._waiting.patience = _PLAIN_LINE_SECONDS + FIRST_SECONDS
