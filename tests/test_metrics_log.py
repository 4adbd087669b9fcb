import io
import sys
import types

import pytest
from rich.console import Console

from jevb_jax import metrics_log
from jevb_jax.metrics_log import MetricsLog, ProgressLine


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


def test_tensorboard_when_installed(tmp_path, monkeypatch):
    written = []

    class SummaryWriter:
        def __init__(self, directory: str, purge_step: int | None) -> None:
            written.append((directory, purge_step))

        def add_scalar(self, name: str, value: float, step: int) -> None:
            written.append((name, value, step))

        def close(self) -> None:
            written.append("closed")

    module = types.ModuleType("tensorboardX")
    module.__dict__["SummaryWriter"] = SummaryWriter
    monkeypatch.setitem(sys.modules, "tensorboardX", module)
    monkeypatch.setattr(metrics_log.importlib.util, "find_spec", lambda name: module)
    log = MetricsLog(tmp_path)
    log.write(3, {"train/loss": 0.5})
    log.truncate_after(2)  # a resumed run hides what it writes again
    log.close()
    directory = str(tmp_path / "tensorboard")
    assert written == [
        (directory, None),
        ("train/loss", 0.5, 3),
        "closed",
        (directory, 3),
        "closed",
    ]


def test_real_tensorboard_events(tmp_path):
    log = MetricsLog(tmp_path)
    log.write(1, {"train/loss": 0.5})
    log.close()
    assert any((tmp_path / "tensorboard").iterdir())


def test_plain_lines_when_there_is_no_terminal(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(metrics_log.time, "monotonic", lambda: clock[0])
    out = io.StringIO()
    with ProgressLine(Console(file=out, width=200), total_steps=100, initial_step=20) as line:
        for step, seconds in ((30, 1.0), (40, 16.0), (50, 17.0), (100, 20.0)):
            clock[0] = seconds
            line.update(step, f"loss {step}")
    # One line after 15 seconds and the last: not a line a step. (Some versions of rich add an empty one.)
    assert [text for text in out.getvalue().splitlines() if text] == [
        "step 40/100  ETA 48 s  loss 40",  # 20 steps in 16 s, 60 to go
        "step 100/100  ETA 0 s  loss 100",
    ]


def test_bar_on_a_terminal():
    out = io.StringIO()
    console = Console(file=out, width=120, force_terminal=True)
    with ProgressLine(console, total_steps=10, initial_step=0) as line:
        line.update(10, "loss 0.25")
    assert "10/10" in out.getvalue()
    assert "loss 0.25" in out.getvalue()
