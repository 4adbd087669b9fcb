"""Lines that say what is waited for, on a terminal and in a log, on a clock that the tests move."""

import io
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from rich.console import Console

from jevb_jax.runs import waiting
from jevb_jax.runs.waiting import Waiting

ROOT = Path(__file__).resolve().parents[2]


class Clock:
    """Moves only when told, and then lets the watching thread look once."""

    def __init__(self) -> None:
        self.now, self.looks = 100.0, threading.Semaphore(0)
        self.looked = threading.Semaphore(0)

    def move(self, seconds: float) -> None:
        self.now += seconds
        self.looks.release()
        assert self.looked.acquire(timeout=60)

    def wait(self, _: float) -> bool:
        self.looked.release()
        self.looks.acquire()
        return self.is_over

    is_over = False

    def set(self) -> None:
        self.is_over = True
        self.looks.release()


@pytest.fixture
def clock(monkeypatch):
    found = Clock()
    monkeypatch.setattr(waiting.time, "monotonic", lambda: found.now)
    return found


def started(clock: Clock, console: Console, **settings) -> Waiting:
    made = Waiting(console, "Evaluating", **settings)
    made._is_over = clock  # pyright: ignore[reportAttributeAccessIssue]
    made.__enter__()
    assert clock.looked.acquire(timeout=60)
    return made


def test_a_log_gets_a_line_after_silence_and_then_fewer(clock):
    out = io.StringIO()
    console = Console(file=out, width=80)
    made = started(clock, console)
    for _ in range(100):
        clock.move(1)
    console.print("said")
    for _ in range(7):
        clock.move(1)
    made.__exit__(None, None, None)
    lines = [text for text in out.getvalue().splitlines() if text]
    assert lines == [
        *(f"Evaluating: {seconds} s so far" for seconds in (5, 15, 35, 75)),
        "said",
        "Evaluating: 105 s so far",
    ]
    assert console.file is out


def test_what_is_said_in_time_needs_no_other_line(clock):
    out = io.StringIO()
    console = Console(file=out, width=80)
    made = started(clock, console, patience=20.0)
    for step in range(10):
        clock.move(15)
        console.print(f"step {step}")
    made.__exit__(None, None, None)
    assert "so far" not in out.getvalue()


def test_a_program_that_compiles_long_is_named(clock):
    out = io.StringIO()
    made = started(clock, Console(file=out, width=80))
    event = "/jax/core/compile/jaxpr_to_mlir_module_duration"
    waiting._compilation().hear(event, 0.1, fun_name="jit(_score_group)")
    clock.move(6)
    assert out.getvalue().splitlines()[-1] == (
        "Evaluating: 6 s so far, compiling score_group for 6 s"
    )
    waiting._compilation().hear("/jax/core/compile/backend_compile_duration", 6.0)
    clock.move(20)
    made.__exit__(None, None, None)
    assert out.getvalue().splitlines()[-1] == "Evaluating: 26 s so far"


def test_jax_tells_what_it_compiles_and_when_it_has():
    compilation, heard = waiting._compilation(), []

    def hear(event: str, duration_secs: float, **__: object) -> None:
        heard.append((event.rpartition("/")[2], compilation.program))

    jax.monitoring.register_event_duration_secs_listener(hear)

    def a_name_of_its_own(x):
        return jnp.sin(x) + 1

    jax.jit(a_name_of_its_own)(jnp.ones(3)).block_until_ready()
    jax.monitoring.unregister_event_duration_listener(hear)
    assert ("jaxpr_to_mlir_module_duration", "a_name_of_its_own") in heard
    assert heard[-1] == ("backend_compile_duration", "")


def test_a_terminal_shows_one_line_that_disappears(clock):
    out = io.StringIO()
    made = started(clock, Console(file=out, width=80, force_terminal=True))
    clock.move(3)
    clock.move(1)
    shown = out.getvalue()
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l")  # the cursor
    made.__exit__(None, None, None)
    assert "Evaluating: 4 s so far" in out.getvalue()
    assert out.getvalue().endswith("\x1b[2K")  # the line is erased


@pytest.mark.parametrize(
    ("console", "in_logs"),
    [
        (Console(file=io.StringIO(), quiet=True), True),
        (Console(file=io.StringIO(), quiet=True, force_terminal=True), True),
        (Console(file=io.StringIO()), False),
    ],
)
def test_nothing_is_said_where_nobody_reads(console, in_logs):
    before = threading.active_count()
    with Waiting(console, "Evaluating", in_logs=in_logs):
        assert threading.active_count() == before
    assert console.file.getvalue() == ""  # pyright: ignore[reportAttributeAccessIssue]


def test_work_within_work_says_nothing_and_the_next_says_again(clock):
    out, other = io.StringIO(), io.StringIO()
    made = started(clock, Console(file=out, width=80))
    before = threading.active_count()
    with Waiting(Console(file=other, width=80), "Fitting"):
        assert threading.active_count() == before
        clock.move(6)
    made.__exit__(None, None, None)
    assert out.getvalue() == "Evaluating: 6 s so far\n"
    assert other.getvalue() == ""
    with Waiting(Console(file=other, width=80), "Fitting"):
        assert threading.active_count() == before


class Closed(io.StringIO):
    def write(self, text: str) -> int:
        raise BrokenPipeError


def test_a_reader_that_leaves_ends_the_lines_and_not_the_work(clock, recwarn):
    made = started(clock, Console(file=Closed(), width=80))
    clock.now += 6
    clock.looks.release()
    made._thread.join(timeout=60)
    assert not made._thread.is_alive()
    made.__exit__(None, None, None)
    assert not recwarn.list  # pytest warns of errors in threads


def test_an_error_ends_the_watch_and_restores_the_file():
    console = Console(width=80)
    with pytest.raises(ZeroDivisionError), Waiting(console, "Evaluating"):
        raise ZeroDivisionError
    assert console._file is None


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "script",
    ["train.py", pytest.param("evaluate.py", marks=SLOW), pytest.param("finetune.py", marks=SLOW)],
)
def test_a_script_says_at_once_that_it_started_and_ends_by_ctrl_c_without_frames(script):
    process = subprocess.Popen(
        [sys.executable, script, "--workdir=none"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "Importing JAX and other libraries.\n"
    time.sleep(0.3)  # in the middle of the imports
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=120)
    assert process.returncode == -signal.SIGINT
    assert said == ""
