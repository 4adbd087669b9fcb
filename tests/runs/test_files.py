import hashlib
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from jevb_jax.runs import files
from jevb_jax.runs.files import DirectoryInUseError

ROOT = Path(__file__).resolve().parents[2]


def test_files_are_whole_or_as_they_were(tmp_path):
    path = tmp_path / "a.json"
    files.write_json_atomically(path, {"x": 1.5, "y": float("inf")})
    assert files.read_json(path) == {"x": 1.5, "y": float("inf")}
    with pytest.raises(TypeError):
        files.write_json_atomically(path, {"x": object()})
    assert json.loads(path.read_text())["x"] == 1.5
    files.write_text_atomically(path, "ä\n")
    assert path.read_text(encoding="utf-8") == "ä\n"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.json"]


def refuse_constant(word: str) -> None:
    raise AssertionError(f"{word} is no JSON")


def same(a: Any, b: Any) -> bool:
    """Equal, NaN to NaN, and of one type."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and (a == b or (a != a and b != b))


WORDS = st.sampled_from(["NaN", "Infinity", "-Infinity", "=NaN", "==Infinity", "=", "nan", "inf"])
NOT_FINITE = st.sampled_from([float("nan"), float("inf"), float("-inf")])
OTHERS = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
LEAVES = OTHERS | WORDS | NOT_FINITE
VALUES = st.recursive(
    LEAVES, lambda x: st.lists(x) | st.dictionaries(st.text() | WORDS, x), max_leaves=8
)


@given(VALUES, st.sampled_from([None, 2]))
@example(
    [float("nan"), float("inf"), float("-inf"), "NaN", "=NaN", "-Infinity", {"Infinity": 1}], 2
)
def test_json_is_strict_and_reads_back_to_the_same_value(value, indent):
    text = files.to_json(value, indent=indent)
    json.loads(text, parse_constant=refuse_constant)
    assert same(files.from_json(text), value)
    # A file of before has the bare words, and every text as it is.
    before = {"x": value, "bare": float("inf")}
    assert same(files.from_json(json.dumps(before)), before)


def test_hashes_of_configs_do_not_change():
    # Of the canonical JSON with bare words, as saved runs hold it.
    before = hashlib.sha256(b'{"df":Infinity,"x":[1,NaN,"NaN"]}').hexdigest()
    assert files.json_sha256({"x": [1, float("nan"), "NaN"], "df": float("inf")}) == before


def test_damaged_json_is_named(tmp_path):
    for content in (b"{", b"\xff\xfe", b""):
        (tmp_path / "config.json").write_bytes(content)
        with pytest.raises(ValueError, match=r"config\.json is not JSON, or damaged"):
            files.read_json(tmp_path / "config.json")


def test_paths_are_what_people_mean(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for path, meant in {
        "~/runs/x": tmp_path / "home" / "runs" / "x",
        "~": tmp_path / "home",
        "a/~": tmp_path / "a" / "~",
        "./~x": tmp_path / "~x",
        ".": tmp_path,
        "a b[1]": tmp_path / "a b[1]",
        "file:///data/a%20b": Path("/data/a b"),
        "file://localhost/data": Path("/data"),
        "file:/data": Path("/data"),
    }.items():
        assert files.to_path(path) == meant, path
    for path, message in {
        "": "must name a file or a directory, got ''",
        "  ": "must name",
        "~nobody_of_this_name/x": "no home directory of that name",
        "file://server/x": "on another machine",
        "http://host/x": "gs:// or",
        "foo://x": "not with foo://",
        "file://": "must name",
    }.items():
        with pytest.raises(ValueError, match=message):
            files.to_path(path)


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


def test_writers_at_once_do_not_take_each_others_parts(tmp_path, monkeypatch):
    sync = files.os.fsync

    def meanwhile(number: int) -> None:
        monkeypatch.setattr(files.os, "fsync", sync)
        files.write_text_atomically(tmp_path / "a.txt", "another process")
        sync(number)

    monkeypatch.setattr(files.os, "fsync", meanwhile)
    files.write_text_atomically(tmp_path / "a.txt", "this one")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a.txt": "this one"}


def test_a_failed_move_leaves_no_part(tmp_path):
    (tmp_path / "a").mkdir()
    with pytest.raises(IsADirectoryError):
        files.write_text_atomically(tmp_path / "a", "new")
    with pytest.raises(IsADirectoryError):
        files.write_together(tmp_path, {"a": b"1", "last": b"1"}, last="last")
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"]


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
        "import sys, time; from pathlib import Path; from jevb_jax.runs import files\n"
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
            with pytest.raises(DirectoryInUseError, match=message):
                files.lock_directory(tmp_path).__enter__()
        process.kill()
    with files.lock_directory(tmp_path):  # nothing stale is left
        holder = f"process {os.getpid()} on {platform.node()}\n"
        assert (tmp_path / ".lock").read_text() == holder  # and nobody of before
        with pytest.raises(DirectoryInUseError), files.lock_directory(tmp_path):
            pass
    with files.lock_directory(tmp_path):
        pass
