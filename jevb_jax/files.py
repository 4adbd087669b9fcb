"""Files that are either whole or absent, and directories that one process uses at a time."""

import contextlib
import fcntl
import json
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class DirectoryInUseError(RuntimeError):
    """Another process works on the directory."""


def write_text_atomically(path: Path, text: str) -> None:
    """Writes beside the target, flushes to disk, and moves into place.

    Args:
      path: the file; its directory exists.
      text: its content.
    """
    part = path.with_name(f".{path.name}.part")
    with part.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def write_json_atomically(path: Path, value: Any) -> None:
    """Writes indented JSON, as `write_text_atomically`.

    Args:
      path: the file.
      value: JSON values; infinities are written as `Infinity`, which Python reads back.
    """
    write_text_atomically(path, json.dumps(value, indent=2) + "\n")


@contextlib.contextmanager
def lock_directory(path: Path) -> Iterator[None]:
    """Holds a directory for this process; the system lets go of it however the process ends.

    Args:
      path: an existing directory; `.lock` in it says who holds it or held it last.

    Yields:
      Nothing.

    Raises:
      DirectoryInUseError: another process, or this one, holds it.
    """
    with (path / ".lock").open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise DirectoryInUseError(
                f"{path} is in use by {holder}: wait until it ends, or give another directory"
            ) from error
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}\n")
        file.flush()
        yield
