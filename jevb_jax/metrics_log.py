"""Where metrics go: JSON lines always, TensorBoard when installed, and a progress line for people."""

import importlib
import importlib.util
import json
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from jevb_jax import files

_PLAIN_LINE_SECONDS = 15.0


class MetricsLog:
    """`metrics.jsonl` of a run: one JSON object a line, each with its `step`.

    Also writes TensorBoard events under `tensorboard/` if tensorboardX is installed.
    """

    def __init__(self, workdir: Path, *, is_writer: bool = True):
        """Opens the log.

        Args:
          workdir: directory of the run.
          is_writer: False makes a log that writes nothing, for all processes of a run but one.
        """
        self._path = workdir / "metrics.jsonl"
        self._tensorboard_path = workdir / "tensorboard"
        self._writer = self._open_writer() if is_writer else None
        self._file = self._path.open("a", encoding="utf-8") if is_writer else None

    def _open_writer(self, *, purge_step: int | None = None) -> Any:
        if importlib.util.find_spec("tensorboardX") is None:
            return None
        module = importlib.import_module("tensorboardX")
        return module.SummaryWriter(str(self._tensorboard_path), purge_step=purge_step)

    @staticmethod
    def read(path: Path) -> list[dict[str, Any]]:
        """Reads the lines of a log; a last line cut short by a kill is left out.

        Args:
          path: a `metrics.jsonl`.

        Returns:
          One mapping a line.

        Raises:
          ValueError: a line before the last is not JSON.
        """
        if not path.exists():
            return []
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        records = []
        for number, line in enumerate(lines, start=1):
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError as error:
                if number == len(lines) and not line.endswith("\n"):
                    break
                raise ValueError(f"{path}, line {number} is not JSON: {error}") from error
        return records

    def truncate_after(self, step: int) -> None:
        """Drops lines of steps after `step`: a resumed run writes them again."""
        if self._file is None:
            return
        kept = [record for record in self.read(self._path) if record["step"] <= step]
        self._file.close()
        text = "".join(json.dumps(record) + "\n" for record in kept)
        files.write_text_atomically(self._path, text)
        self._file = self._path.open("a", encoding="utf-8")
        if self._writer is not None:
            self._writer.close()
            self._writer = self._open_writer(purge_step=step + 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Appends one line, at once.

        Args:
          step: number of steps done.
          values: scalars by name.
        """
        if self._file is None:
            return
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Closes the files."""
        if self._file is not None:
            self._file.close()
        if self._writer is not None:
            self._writer.close()


class ProgressLine:
    """A live bar on a terminal; a plain line every 15 seconds elsewhere."""

    def __init__(self, console: Console, *, total_steps: int, initial_step: int):
        """Prepares the line.

        Args:
          console: where to write.
          total_steps: steps of the run.
          initial_step: steps done before.
        """
        self._console = console
        self._total = total_steps
        self._step = initial_step
        self._start = (time.monotonic(), initial_step)
        self._last_line = time.monotonic()
        self._progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=20),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[status]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task(
            "", total=total_steps, completed=initial_step, status=""
        )

    def __enter__(self) -> "ProgressLine":
        """Starts the bar."""
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Stops the bar, leaving the last line."""
        self._progress.stop()

    def update(self, step: int, status: str) -> None:
        """Shows the state of the run.

        Args:
          step: steps done.
          status: what to say beside it.
        """
        self._step = step
        self._progress.update(self._task, completed=step, status=status)
        now = time.monotonic()
        is_due = now - self._last_line >= _PLAIN_LINE_SECONDS or step == self._total
        if not self._console.is_terminal and is_due:
            self._last_line = now
            started, first = self._start
            remaining = (now - started) / max(step - first, 1) * (self._total - step)
            self._console.print(
                f"step {step}/{self._total}  ETA {remaining:.0f} s  {status}", soft_wrap=True
            )
