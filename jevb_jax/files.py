"""Paths here and in object stores, files that are whole or absent, directories of one run at a time."""

import contextlib
import fcntl
import hashlib
import io
import json
import os
import platform
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np


class DirectoryInUseError(RuntimeError):
    """Another process works on the directory."""


def to_path(path: str | os.PathLike[str]) -> Path:
    """A path with the methods of `pathlib.Path`.

    Args:
      path: of this machine, or a URL as `gs://bucket/runs/x`, which etils.epath opens.

    Returns:
      An absolute path, or the URL's.
    """
    text = os.fspath(path)
    if "://" not in text:
        return Path(text).absolute()
    from etils import epath  # needed by few, and it takes a while

    remote: Any = epath.Path(text)
    return remote


def is_remote(path: Path) -> bool:
    """Whether a path of `to_path` lies in an object store: no appending, no locks, whole objects."""
    return "://" in os.fspath(path)


def write_bytes_atomically(path: Path, content: bytes) -> None:
    """Writes beside the target, flushes to disk, and moves into place; object stores do so themselves.

    Args:
      path: the file; its directory exists. An error, a full disk say, leaves it as it was.
      content: of the file.
    """
    if is_remote(path):
        path.write_bytes(content)
        return
    _write_part(path, content).replace(path)


def _write_part(path: Path, content: bytes) -> Path:
    """Writes what will be `path` beside it, on disk when this returns; nothing stays of a failure."""
    part = path.with_name(f".{path.name}.part")
    try:
        with part.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    return part


def write_together(directory: Path, contents: Mapping[str, bytes], *, last: str) -> None:
    """Writes files that belong together: whoever finds the last of them finds its companions.

    On this machine all are on disk before the first is moved into place, so a full disk leaves what
    was there. In an object store each is replaced by itself, and until the last is, there is no last.

    Args:
      directory: exists.
      contents: by name; files of these names are replaced.
      last: the name of the file that says that the others are there.
    """
    names = [name for name in contents if name != last] + [last]
    if is_remote(directory):
        (directory / last).unlink(missing_ok=True)
        for name in names:
            (directory / name).write_bytes(contents[name])
        return
    parts: dict[str, Path] = {}
    try:
        for name in names:
            parts[name] = _write_part(directory / name, contents[name])
    except BaseException:
        for part in parts.values():
            part.unlink()
        raise
    (directory / last).unlink(missing_ok=True)
    for name in names:
        parts[name].replace(directory / name)


def write_text_atomically(path: Path, text: str) -> None:
    """Writes UTF-8, as `write_bytes_atomically`.

    Args:
      path: the file.
      text: its content.
    """
    write_bytes_atomically(path, text.encode())


def write_arrays_atomically(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Writes an .npz file, as `write_bytes_atomically`.

    Args:
      path: the file.
      arrays: by name.
    """
    content = io.BytesIO()
    np.savez(content, **arrays)  # pyright: ignore[reportArgumentType]
    write_bytes_atomically(path, content.getvalue())


def indented_json(value: Any) -> str:
    """A value as people read it, ending with a line's end."""
    return json.dumps(value, indent=2) + "\n"


def write_json_atomically(path: Path, value: Any) -> None:
    """Writes indented JSON, as `write_text_atomically`.

    Args:
      path: the file.
      value: JSON values; infinities are written as `Infinity`, which Python reads back.
    """
    write_text_atomically(path, indented_json(value))


def json_sha256(value: Any) -> str:
    """SHA-256 of the canonical JSON of a value, in hexadecimal digits."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


@contextlib.contextmanager
def lock_directory(path: Path) -> Iterator[Callable[[], None]]:
    """Holds a directory for this process.

    On this machine the system lets go of it however the process ends. An object store has no locks:
    there the last to come holds the directory, and the one before is told by the check.

    Args:
      path: an existing directory; `.lock` in it says who holds it or held it last.

    Yields:
      A check that this process holds the directory still; to be called before a file is written.

    Raises:
      DirectoryInUseError: another process, or this one, holds it.
    """
    holder = f"process {os.getpid()} on {platform.node()}"
    if is_remote(path):
        holder += f", {uuid.uuid4()}"
        (path / ".lock").write_text(holder)

        def check() -> None:
            found = (path / ".lock").read_text()
            if found != holder:
                raise DirectoryInUseError(
                    f"{path} was taken over by {found}: this process writes no more there"
                )

        yield check
        return
    with (path / ".lock").open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            found = file.read().strip() or "another process"
            raise DirectoryInUseError(
                f"{path} is in use by {found}: wait until it ends, or give another directory"
            ) from error
        file.truncate(0)
        file.write(f"{holder}\n")
        file.flush()
        yield lambda: None
