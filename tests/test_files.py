import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from jevb_jax import files

ROOT = Path(__file__).resolve().parent.parent


def test_files_are_whole_or_as_they_were(tmp_path):
    path = tmp_path / "a.json"
    files.write_json_atomically(path, {"x": 1.5, "y": float("inf")})
    assert json.loads(path.read_text()) == {"x": 1.5, "y": float("inf")}
    with pytest.raises(TypeError):
        files.write_json_atomically(path, {"x": object()})
    assert json.loads(path.read_text())["x"] == 1.5
    files.write_text_atomically(path, "ä\n")
    assert path.read_text(encoding="utf-8") == "ä\n"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.json"]


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    files.write_text_atomically(path, "old")

    def fail(_: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(files.os, "fsync", fail)
    with pytest.raises(OSError, match="no space"):
        files.write_text_atomically(path, "new")
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.txt"]


def test_files_that_belong_together_are_all_new_or_all_old(tmp_path, monkeypatch):
    files.write_together(tmp_path, {"a": b"1", "last": b"1", "b": b"1"}, last="last")
    moves = []
    replace = Path.replace

    def record(self: Path, target: Path) -> Path:
        # When the first is moved, all are there; from then until its own move there is no last.
        moves.append(
            (target.name, (tmp_path / "last").exists(), len(list(tmp_path.glob(".*.part"))))
        )
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", record)
    files.write_together(tmp_path, {"last": b"2", "a": b"2", "b": b"2"}, last="last")
    assert moves == [("a", False, 3), ("b", False, 2), ("last", False, 1)]
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {
        "a": b"2", "b": b"2", "last": b"2",
    }  # fmt: skip


@pytest.mark.parametrize("failing", [1, 2, 3])
def test_no_room_for_one_of_several_leaves_all_as_they_were(tmp_path, monkeypatch, failing):
    files.write_together(tmp_path, {"a": b"1", "b": b"1", "last": b"1"}, last="last")
    calls = []

    def fail(_: int) -> None:
        calls.append(1)
        if len(calls) == failing:
            raise OSError("no space left on device")

    monkeypatch.setattr(files.os, "fsync", fail)
    with pytest.raises(OSError, match="no space"):
        files.write_together(tmp_path, {"a": b"2", "b": b"2", "last": b"2"}, last="last")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {
        "a": b"1", "b": b"1", "last": b"1",
    }  # fmt: skip


def test_a_directory_is_held_until_the_process_ends(tmp_path):
    hold = (
        "import sys, time; from pathlib import Path; from jevb_jax import files\n"
        "with files.lock_directory(Path(sys.argv[1])):\n"
        "    print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", hold, str(tmp_path)], stdout=subprocess.PIPE, text=True, cwd=ROOT
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        message = rf"in use by process {process.pid} on "
        for _ in range(2):  # a refused attempt does not spoil the note of who holds it
            with pytest.raises(files.DirectoryInUseError, match=message):
                files.lock_directory(tmp_path).__enter__()
        process.kill()
    with files.lock_directory(tmp_path):  # nothing stale is left
        holder = f"process {os.getpid()} on {platform.node()}\n"
        assert (tmp_path / ".lock").read_text() == holder  # and nobody of before
        with pytest.raises(files.DirectoryInUseError), files.lock_directory(tmp_path):
            pass
    with files.lock_directory(tmp_path):
        pass
