import errno
import importlib
import importlib.util
import io
import os
import re
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.table import Table

from jevb_jax.runs import metrics_log
from jevb_jax.runs.metrics_log import MetricsLog, ProgressLine, standard_output, unbroken

event_pb2: Any = importlib.import_module("tensorboardX.proto.event_pb2")
ROOT = Path(__file__).resolve().parents[2]


def test_log_survives_a_line_cut_short_and_forgets_steps_to_come(tmp_path):
    log = MetricsLog(tmp_path)
    for step in (1, 2, 3):
        log.write(step, {"train/loss": step / 2})
    path = tmp_path / "metrics.jsonl"
    with path.open("a") as file:
        file.write('{"step": 4, "tr')
    assert [record["step"] for record in MetricsLog.read(path)] == [1, 2, 3]
    log.truncate_after(2)
    log.write(3, {"train/loss": 9.0})
    log.close()
    assert MetricsLog.read(path)[-1] == {"step": 3, "train/loss": 9.0}
    path.write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    with pytest.raises(ValueError, match="line 2 is not JSON"):
        MetricsLog.read(path)
    assert MetricsLog.read(tmp_path / "absent.jsonl") == []


def test_a_line_is_on_disk_at_once_and_numbers_are_exact(tmp_path):
    log = MetricsLog(tmp_path)
    log.write(7, {"x": 0.1, "y": 1e-45, "z": float("nan")})
    (record,) = MetricsLog.read(tmp_path / "metrics.jsonl")
    assert (record["step"], record["x"], record["y"]) == (7, 0.1, 1e-45)
    assert record["z"] != record["z"]
    log.close()


def tensorboard_events(directory: Path) -> list[Any]:
    """Events of all files, by the format: length, its checksum, the message, its checksum."""
    events = []
    for path in sorted(directory.iterdir(), key=lambda path: int(path.suffix[1:])):
        content, start = path.read_bytes(), 0
        while start < len(content):
            (size,) = struct.unpack_from("Q", content, start)
            event = event_pb2.Event()
            event.ParseFromString(content[start + 12 : start + 12 + size])
            events.append(event)
            start += 16 + size
    return events


def test_tensorboard_has_every_number_and_hides_those_of_before_on_resume(tmp_path):
    log = MetricsLog(tmp_path)
    log.write(3, {"train/loss": 0.5, "x": 2.0})
    log.truncate_after(2)
    log.write(3, {"train/loss": 0.25})
    log.close()
    events = tensorboard_events(tmp_path / "tensorboard")
    found = [
        (event.step, value.tag, value.simple_value)
        for event in events
        for value in event.summary.value
    ]
    assert found == [(3, "train/loss", 0.5), (3, "x", 2.0), (3, "train/loss", 0.25)]
    starts = [
        (place, event.step)
        for place, event in enumerate(events)
        if event.session_log.status == event_pb2.SessionLog.START
    ]
    places = [place for place, event in enumerate(events) if event.summary.value]
    ((start, step),) = starts
    assert step == 3
    assert places[1] < start < places[2]


def test_tensorboard_hides_what_an_earlier_process_wrote_after_the_checkpoint(tmp_path):
    for value in (0.5, 0.25):
        log = MetricsLog(tmp_path)
        log.truncate_after(2)
        log.write(3, {"train/loss": value})
        log.close()
    events = tensorboard_events(tmp_path / "tensorboard")
    starts = [e.step for e in events if e.session_log.status == event_pb2.SessionLog.START]
    assert starts == [3, 3]


def test_no_tensorboard_where_it_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    log = MetricsLog(tmp_path)
    log.write(1, {"x": 1.0})
    log.truncate_after(0)
    log.close()
    assert not (tmp_path / "tensorboard").exists()


@pytest.mark.slow
def test_a_full_disk_is_an_error_and_not_a_wait(tmp_path):
    # Files may grow to 4 KiB. The events' file, the longer one, is full long before the lines' is:
    # that is a warning. Then the lines' file is full, and there is no run without it.
    code = """
import pathlib, resource, sys
from jevb_jax.runs.metrics_log import MetricsLog
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
log = MetricsLog(pathlib.Path(sys.argv[1]))
for step in range(300):
    log.write(step, {"x": 1.0})
"""
    ended = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert ended.returncode == 1
    assert "OSError: [Errno 27] File too large" in ended.stderr
    assert ended.stderr.count("tensorboard takes no more metrics") == 1
    assert 150 < len(MetricsLog.read(tmp_path / "metrics.jsonl")) < 300


def test_plain_lines_when_there_is_no_terminal(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(metrics_log.time, "monotonic", lambda: clock[0])
    out = io.StringIO()
    with ProgressLine(Console(file=out, width=200), total_steps=100, initial_step=20) as line:
        for step, seconds in ((30, 1.0), (40, 16.0), (50, 17.0), (100, 20.0)):
            clock[0] = seconds
            line.update(step, f"loss {step}")
    # A line at the start, one after 15 seconds, and the last: not a line a step. (Some versions of rich
    # add an empty one.)
    assert [text for text in out.getvalue().splitlines() if text] == [
        "step 20/100  compiling the first steps",
        # The time until the first update is mostly compilation. Then 10 steps in 15 s, 60 to go.
        "step 40/100  ETA 90 s  loss 40",
        "step 100/100  ETA 0 s  loss 100",
    ]


def test_bar_on_a_terminal():
    out = io.StringIO()
    console = Console(file=out, width=120, force_terminal=True)
    with ProgressLine(console, total_steps=10, initial_step=0) as line:
        line.update(10, "loss 0.25")
    assert "10/10" in out.getvalue()
    assert "loss 0.25" in out.getvalue()


class Broken(io.StringIO):
    """Takes one text; after that, its reader is gone."""

    def __init__(self, error: Exception):
        super().__init__()
        self.error = error

    def write(self, text: str) -> int:
        if self.getvalue():
            raise self.error
        return super().write(text)


@pytest.mark.parametrize(
    "error",
    [
        BrokenPipeError(errno.EPIPE, "Broken pipe"),
        OSError(errno.EIO, "the terminal is gone"),
        OSError(errno.ENOSPC, "No space left on device"),
        ValueError("I/O operation on closed file"),
    ],
)
@pytest.mark.parametrize("is_terminal", [False, True])
def test_a_reader_that_leaves_ends_nothing_and_is_told_once(monkeypatch, error, is_terminal):
    monkeypatch.setattr(metrics_log, "_PLAIN_LINE_SECONDS", 0.0)
    file, told = Broken(error), []
    console = Console(file=file, width=80, force_terminal=is_terminal)
    with (
        unbroken(console, told.append),
        ProgressLine(console, total_steps=9, initial_step=0) as line,
    ):
        for step in range(1, 10):
            line.update(step, "loss")
        console.print("more")
    assert told == [error]
    assert len(file.getvalue().splitlines()) <= 2
    assert console.file is file


def test_a_text_that_cannot_be_encoded_is_an_error_still():
    console = Console(file=io.TextIOWrapper(io.BytesIO(), encoding="ascii"), width=80)
    with unbroken(console), pytest.raises(UnicodeEncodeError):
        console.print("\N{INFINITY}")


def test_a_console_of_standard_output_stays_one(monkeypatch):
    console = standard_output()
    with unbroken(console):
        pass
    other = io.StringIO()
    monkeypatch.setattr(sys, "stdout", other)
    console.print("where it is now")
    assert other.getvalue() == "where it is now\n"
    monkeypatch.setattr(sys, "stdout", None)
    standard_output().print("nowhere")


def test_a_log_file_gets_whole_rows_and_a_terminal_its_width(monkeypatch):
    for name in ("COLUMNS", "FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    table = Table(*(f"a column with a long name, {number}" for number in range(12)))
    row = [f"value {number}" for number in range(12)]
    table.add_row(*row)

    def said() -> list[str]:
        other = io.StringIO()
        monkeypatch.setattr(sys, "stdout", other)
        standard_output().print(table)
        return other.getvalue().splitlines()

    head, values = (re.split(r" *[┃│] *", line)[1:-1] for line in (said()[1], said()[3]))
    assert head == [f"a column with a long name, {number}" for number in range(12)]
    assert values == row
    monkeypatch.setenv("COLUMNS", "60")
    assert max(map(len, said())) <= 60
    monkeypatch.delenv("COLUMNS")
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes it for a terminal, of 80 columns by default
    assert standard_output().width < 1000


@pytest.mark.slow
def test_standard_output_whose_reader_is_gone_ends_with_the_status_of_the_work():
    code = """
import sys
from jevb_jax.runs.metrics_log import standard_output, unbroken
console = standard_output()
with unbroken(console):
    for number in range(1000):
        console.print("line", number)
print("to standard error, the same pipe", file=sys.stderr)
sys.exit(7)
"""
    reader, writer = os.pipe()
    os.close(reader)
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=writer, stderr=writer
    ) as process:
        os.close(writer)
        assert process.wait(120) == 7
