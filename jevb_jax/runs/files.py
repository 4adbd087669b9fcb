"""Paths here and in object stores, files that are whole or absent, directories of one run at a time."""

import contextlib
import hashlib
import io
import json
import math
import os
import platform
import re
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import filelock
import numpy as np

# Object stores that etils.epath opens.
STORES = ("gs", "s3", "az", "hf")


class DirectoryInUseError(RuntimeError):
    """Another process works on the directory."""


def to_path(path: str | os.PathLike[str]) -> Path:
    """A path with the methods of `pathlib.Path`.

    Args:
      path: of this machine, where `~` is the home directory and `file:///x` is `/x`; or a URL as
        `gs://bucket/runs/x`, which etils.epath opens.

    Returns:
      An absolute path, or the URL's.

    Raises:
      ValueError: no path at all, the home of a user who is not known, a URL of another kind.
    """
    text = os.fspath(path)
    if not text.strip():
        raise ValueError(
            f"a path must name a file or a directory, got {text!r}: a variable of the shell that is "
            "not set leaves nothing; for the current directory give ."
        )
    if text.startswith("file:/"):
        parts = urlsplit(text)
        if parts.netloc not in ("", "localhost"):
            raise ValueError(f"{text} is on another machine: write file:///path, or the path alone")
        text = unquote(parts.path)
        if not text:
            raise ValueError(f"a path must name a file or a directory, got {os.fspath(path)!r}")
    if "://" not in text:
        expanded = os.path.expanduser(text)
        if expanded.startswith("~"):
            raise ValueError(
                f"{text}: there is no home directory of that name; a directory that is called so "
                f"is ./{text}"
            )
        return Path(expanded).absolute()
    scheme = text.partition("://")[0]
    if scheme not in STORES:
        raise ValueError(
            f"{text}: paths are of this machine or begin with "
            f"{' or '.join(f'{store}://' for store in STORES)}, not with {scheme}://"
        )
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
      content: what to write.
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


# JSON has no numbers for these; they are written as these strings, as Protocol Buffers write them.
_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
# A text that could be taken for one of them is written with one more of these before it.
_TEXT_MARK = "="
_MARKED = re.compile(f"{_TEXT_MARK}*({'|'.join(_NOT_FINITE)})")


def _to_strict(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _to_strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_to_strict(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, str) and _MARKED.fullmatch(value):
        return _TEXT_MARK + value
    return value


def _from_strict(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _from_strict(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_from_strict(item) for item in value]
    if isinstance(value, str) and _MARKED.fullmatch(value):
        is_text = value.startswith(_TEXT_MARK)
        return value.removeprefix(_TEXT_MARK) if is_text else _NOT_FINITE[value]
    return value


def to_json(value: Any, *, indent: int | None = None) -> str:
    """A value as JSON that every reader takes: RFC 8259, without bare words for infinities and NaN.

    Args:
      value: JSON values, and floats that are not finite: they become the strings `"Infinity"`,
        `"-Infinity"` and `"NaN"`. A text that is one of these words gets a `=` before it.
      indent: spaces a level; None for one line.

    Returns:
      Text that `from_json` reads back to the same value; tuples become lists.

    Raises:
      TypeError: a value that JSON does not know.
    """
    return json.dumps(_to_strict(value), indent=indent, allow_nan=False)


def from_json(text: str) -> Any:
    """The value that `to_json` wrote; bare `Infinity` and `NaN`, as files had them before, too.

    Args:
      text: JSON.

    Returns:
      Its value.

    Raises:
      ValueError: no JSON.
    """
    bare: list[str] = []

    def constant(word: str) -> float:
        bare.append(word)
        return _NOT_FINITE[word]

    value = json.loads(text, parse_constant=constant)
    return value if bare else _from_strict(value)  # with bare words, every text is itself


def read_json(path: Path) -> Any:
    """The value of a file that `write_json_atomically` wrote.

    Args:
      path: the file.

    Returns:
      Its value.

    Raises:
      ValueError: the file is not JSON; the message names it.
      FileNotFoundError: there is no such file.
    """
    try:
        return from_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON, or damaged: {error}") from error


def indented_json(value: Any) -> str:
    """A value as people read it, ending with a line's end; see `to_json`."""
    return to_json(value, indent=2) + "\n"


def write_json_atomically(path: Path, value: Any) -> None:
    """Writes indented JSON, as `write_text_atomically`.

    Args:
      path: the file.
      value: see `to_json`.
    """
    write_text_atomically(path, indented_json(value))


def json_sha256(value: Any) -> str:
    """SHA-256 of the canonical JSON of a value, in hexadecimal digits.

    Floats that are not finite stand in it as the bare words `Infinity` and `NaN`: hashes of before
    stay as they are.
    """
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
    file = path / ".lock"
    try:
        held = filelock.FileLock(file).acquire(blocking=False)
    except filelock.Timeout as error:
        found = file.read_text(encoding="utf-8").strip() or "another process"
        raise DirectoryInUseError(
            f"{path} is in use by {found}: wait until it ends, or give another directory"
        ) from error
    with held:
        file.write_text(f"{holder}\n", encoding="utf-8")
        yield lambda: None
