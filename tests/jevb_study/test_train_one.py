"""The process of one run of a study."""

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ml_collections import ConfigDict

from configs import smoke
from jevb_jax import commands
from jevb_jax.runs import files
from jevb_jax.runs.checkpoints import config_hash
from jevb_jax.runs.files import DirectoryInUseError
from jevb_jax.training.experiment import to_json_values
from jevb_jax.training.loop import NonFiniteError
from jevb_study import mistakes
from jevb_study.train_one import ASKED_CONFIG, train_one

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def asked(tmp_path) -> dict[str, Any]:
    made: Any = smoke.get_config()
    made.jevb.df = math.inf
    values = to_json_values(made)
    files.write_json_atomically(tmp_path / ASKED_CONFIG, values)
    return values


def test_it_trains_what_the_study_asked_for(tmp_path, asked, monkeypatch):
    given = []

    def train(config: ConfigDict, where: Path) -> bool:
        given.append((to_json_values(config), where))
        return True

    monkeypatch.setattr(commands, "train", train)
    train_one(tmp_path)
    assert given == [(asked, tmp_path)]


@pytest.mark.parametrize(
    ("error", "is_result"),
    [
        (NonFiniteError("loss nan"), True),
        (TypeError("no such argument"), False),
        (ImportError("no such module"), False),
        (ValueError("bad setting"), False),
        (MemoryError(), False),
        (DirectoryInUseError("in use"), False),
    ],
)
def test_only_numbers_that_are_not_finite_are_a_result(
    tmp_path, asked, monkeypatch, error, is_result
):
    def train(*_: object) -> bool:
        for step in (9, 12, 3):
            (tmp_path / f"nonfinite_step_{step}").mkdir()
        raise error

    monkeypatch.setattr(commands, "train", train)
    with pytest.raises(type(error)):
        train_one(tmp_path)
    path = tmp_path / "failure.json"
    assert path.exists() == is_result
    if is_result:
        assert json.loads(path.read_text()) == {
            "error": "NonFiniteError",
            "message": "loss nan",
            "step": 12,
            "config_hash": config_hash(asked),
        }


@pytest.mark.slow
def test_its_log_has_one_line_of_a_mistake(tmp_path):
    (tmp_path / ASKED_CONFIG).write_text("[1]")  # as a hand may leave it
    stdin, held_open = os.pipe()  # by the study
    with os.fdopen(stdin), os.fdopen(held_open, "w"):
        ended = subprocess.run(
            [sys.executable, "-m", "jevb_study.train_one", tmp_path],
            cwd=ROOT, capture_output=True, text=True, check=False, stdin=stdin,
        )  # fmt: skip
    assert ended.returncode == 1
    assert not (tmp_path / "failure.json").exists()
    (line,) = ended.stderr.splitlines()
    assert "holds no config of a run" in line


@pytest.mark.parametrize(
    ("error", "is_shown"), [(KeyError("bug"), True), (OSError("no disk"), False)]
)
def test_a_bug_is_raised_and_a_mistake_is_told(error, is_shown):
    with pytest.raises(KeyError if is_shown else SystemExit), mistakes.as_messages():
        raise error


@pytest.mark.slow
def test_it_stops_when_its_standard_input_ends(tmp_path, asked):
    code = (
        "import runpy, sys, time; from jevb_jax import commands\n"
        "commands.train = lambda *_: (print('training', flush=True), time.sleep(300))\n"
        "runpy.run_module('jevb_study.train_one', run_name='__main__')"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(
        command, cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "training\n"
        assert process.poll() is None
        process.stdin.close()
        assert process.wait(timeout=60) == -signal.SIGTERM
