"""Says what is waited for, and how long so far, because a long silence looks like a hang."""

import functools
import sys
import threading
import time
from types import TracebackType
from typing import Any

import jax.monitoring
from rich.console import Console
from rich.status import Status

from jevb_jax import messages

FIRST_SECONDS = 5.0  # of silence before a line in a log
_LONGEST_SECONDS = 40.0  # between such lines; each wait is twice the one before
_LOOK_SECONDS = 0.5
_WORTH_NAMING_SECONDS = 2.0  # a program that compiles faster is not named

# The events of JAX right before and right after XLA compiles a program.
_LOWERED = "/jax/core/compile/jaxpr_to_mlir_module_duration"
_COMPILED = "/jax/core/compile/backend_compile_duration"

# Held by the outermost work. What it does inside says nothing more: two live lines hide each other.
_watched = threading.Lock()


class _Compilation:
    """The program that XLA compiles now, as the events of JAX tell; "" if there is none."""

    def __init__(self) -> None:
        self.program = ""
        self.since = 0.0

    def hear(self, event: str, duration_secs: float, **about: Any) -> None:
        """Is called by JAX after everything that takes time."""
        if event == _LOWERED:
            self.since = time.monotonic()
            name = str(about.get("fun_name") or "a program")
            self.program = name.removeprefix("jit(").removesuffix(")").lstrip("_")
        elif event == _COMPILED:
            self.program = ""


@functools.cache
def _compilation() -> _Compilation:
    found = _Compilation()
    jax.monitoring.register_event_duration_secs_listener(found.hear)
    return found


class _HeardFile:
    """A text file that remembers when it was last written to."""

    def __init__(self, file: Any):
        self._file = file
        self.last_write = time.monotonic()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def write(self, text: str) -> int:
        self.last_write = time.monotonic()
        return self._file.write(text)


class Waiting:
    """Around work that may take long: `with Waiting(console, "Evaluating"):`.

    On a terminal, a line shows the time so far, and disappears at the end. In a log, a line follows when
    nothing was printed for five seconds, and then at growing distances of up to 40 seconds. Both name a
    program that has been compiling for more than two seconds. Work of less than half a second shows
    nothing, and neither does work within other such work.
    """

    def __init__(
        self,
        console: Console,
        what: str,
        *,
        patience: float = FIRST_SECONDS,
        in_logs: bool = True,
    ):
        """Prepares the line.

        Args:
          console: what the work prints to.
          what: is done, such as "Evaluating".
          patience: seconds of silence before the first line in a log.
          in_logs: whether lines are printed where there is no terminal.
        """
        self.patience = patience
        self._console: Any = console  # None as its file means the present standard output
        self._what = what
        self._is_silent = console.quiet or not (console.is_terminal or in_logs)
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="waiting", daemon=True)
        self._status: Status | None = None

    def __enter__(self) -> "Waiting":
        """Begins to watch."""
        self._is_silent = self._is_silent or not _watched.acquire(blocking=False)
        if self._is_silent:
            return self
        self._start = time.monotonic()
        self._compilation = _compilation()
        if not self._console.is_terminal:
            given = self._console.file
            is_standard = given is (sys.stderr if self._console.stderr else sys.stdout)
            self._given_file = None if is_standard else given
            self._console.file = self._file = _HeardFile(given)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Ends the line."""
        if self._is_silent:
            return
        self._is_over.set()
        self._thread.join()
        if self._status is not None:
            self._status.stop()
        if not self._console.is_terminal:
            self._console.file = self._given_file
        _watched.release()

    def _text(self, now: float) -> str:
        text = f"{self._what}: {now - self._start:.0f} s so far"
        program, seconds = self._compilation.program, now - self._compilation.since
        if program and seconds >= _WORTH_NAMING_SECONDS:
            text += f", compiling {program} for {seconds:.0f} s"
        return text

    def _watch(self) -> None:
        if self._console.is_terminal:
            while not self._is_over.wait(_LOOK_SECONDS):
                self._show(self._text(time.monotonic()))
            return
        own_line, distance = 0.0, self.patience
        while not self._is_over.wait(_LOOK_SECONDS):
            now, last = time.monotonic(), self._file.last_write
            if last != own_line:  # something else was said
                distance = self.patience
            if now - last < distance:
                continue
            try:
                messages.say(self._console, self._text(now))
            except (OSError, ValueError):  # nobody reads; the work itself will notice
                return
            own_line = self._file.last_write
            distance = min(2 * distance, max(_LONGEST_SECONDS, self.patience))

    def _show(self, text: str) -> None:
        if self._status is None:
            self._status = Status(text, console=self._console, spinner="line", refresh_per_second=2)
            self._status.start()
            # Rich hides the cursor, and a Ctrl-C that ends the process at once would leave it so.
            self._console.show_cursor()
        self._status.update(text)
