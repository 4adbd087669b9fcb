import json

import pytest

from jevb_jax import files


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
