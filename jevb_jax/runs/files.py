"""Local and remote paths, files that are written whole or not at all, and locks of directories."""

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
    """Another process uses the directory."""


def to_path(path: str | os.PathLike[str]) -> Path:
    """Converts a path or URL to an object with the methods of `pathlib.Path`.

    Args:
      path: a local path, in which `~` is the home directory and `file:///x` means `/x`; or a URL
        like `gs://bucket/runs/x`, which etils.epath opens.

    Returns:
      An absolute local path, or the path of the URL.

    Raises:
      ValueError: the path is empty, names an unknown user's home, or is a URL of another kind.
    """
    text = os.fspath(path)
    if not text.strip():
        raise ValueError(
            f"a path must name a file or a directory, got {text!r}. Is a shell variable unset? "
            "For the current directory, give '.'"
        )
    if text.startswith("file:/"):
        parts = urlsplit(text)
        if parts.netloc not in ("", "localhost"):
            raise ValueError(f"{text} is on another machine; give file:///path, or only the path")
        text = unquote(parts.path)
        if not text:
            raise ValueError(f"a path must name a file or a directory, got {os.fspath(path)!r}")
    if "://" not in text:
        expanded = os.path.expanduser(text)
        if expanded.startswith("~"):
            raise ValueError(
                f"{text}: there is no home directory of that name. If the directory itself has this "
                f"name, give ./{text}"
            )
        return Path(expanded).absolute()
    scheme = text.partition("://")[0]
    if scheme not in STORES:
        raise ValueError(
            f"{text}: a path must be local or begin with "
            f"{' or '.join(f'{store}://' for store in STORES)}, not with {scheme}://"
        )
    from etils import epath  # slow to import, and rarely needed

    remote: Any = epath.Path(text)
    return remote


def is_remote(path: Path) -> bool:
    """Whether a path from `to_path` lies in an object store, which cannot append or lock."""
    return "://" in os.fspath(path)


def write_bytes_atomically(path: Path, content: bytes) -> None:
    """Writes a file whole or not at all: an error, such as a full disk, leaves the old file.

    The content is written beside the target, flushed to disk, and moved into place. Object stores
    do the same themselves.

    Args:
      path: the file; its directory exists.
      content: the new content.
    """
    if is_remote(path):
        path.write_bytes(content)
        return
    part = _write_part(path, content)
    try:
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def _write_part(path: Path, content: bytes) -> Path:
    """Writes the content of `path` to a file beside it and to disk; removes the file on failure."""
    # A name of its own: where no lock is held, others may write the same file at the same time.
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
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
    """Writes files that belong together. If the last of them exists, all of them do.

    On a local disk, all are written before the first is moved into place, so a full disk leaves the
    old files. In an object store each file is replaced alone, and the last is absent until the end.

    Args:
      directory: an existing directory.
      contents: contents by file name. Files with these names are replaced.
      last: name of the file that shows that the others are there.
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
        (directory / last).unlink(missing_ok=True)
        for name in names:
            parts[name].replace(directory / name)
    except BaseException:
        for part in parts.values():
            part.unlink(missing_ok=True)
        raise


def write_text_atomically(path: Path, text: str) -> None:
    """Writes a text in UTF-8, whole or not at all."""
    write_bytes_atomically(path, text.encode())


def write_arrays_atomically(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Writes arrays to an .npz file by name, whole or not at all."""
    content = io.BytesIO()
    np.savez(content, **arrays)  # pyright: ignore[reportArgumentType]
    write_bytes_atomically(path, content.getvalue())


# JSON has no such numbers. They are written as these strings, as Protocol Buffers do.
_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
# A text that could be confused with such a string is written with one more of these before it.
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
    """A value as standard JSON (RFC 8259), which every program can read.

    Args:
      value: JSON values, and floats that are not finite. These become the strings `"Infinity"`,
        `"-Infinity"` and `"NaN"`; a text that equals such a string gets a `=` before it.
      indent: number of spaces for each level; None for one line.

    Returns:
      Text that `from_json` reads back to the same value, except that tuples become lists.

    Raises:
      TypeError: JSON has no form for a value.
    """
    return json.dumps(_to_strict(value), indent=indent, allow_nan=False)


def from_json(text: str) -> Any:
    """The value that `to_json` wrote. Also reads bare `Infinity` and `NaN`, which older files hold.

    Raises:
      ValueError: the text is not JSON.
    """
    bare: list[str] = []

    def constant(word: str) -> float:
        bare.append(word)
        return _NOT_FINITE[word]

    value = json.loads(text, parse_constant=constant)
    return value if bare else _from_strict(value)  # files with bare words have no marked strings


def read_json(path: Path) -> Any:
    """The value in a file that `write_json_atomically` wrote.

    Raises:
      ValueError: the file is not JSON; the message names it.
      FileNotFoundError: there is no such file.
    """
    try:
        return from_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON, or damaged: {error}") from error


def indented_json(value: Any) -> str:
    """A value as indented JSON for people, with a final newline."""
    return to_json(value, indent=2) + "\n"


def write_json_atomically(path: Path, value: Any) -> None:
    """Writes a value as indented JSON, whole or not at all."""
    write_text_atomically(path, indented_json(value))


def json_sha256(value: Any) -> str:
    """SHA-256 of the canonical JSON of a value, in hexadecimal digits.

    For the hash, floats that are not finite are the bare words `Infinity` and `NaN`, so that older
    hashes stay valid.
    """
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


@contextlib.contextmanager
def lock_directory(path: Path) -> Iterator[Callable[[], None]]:
    """Locks a directory for this process.

    On a local disk the system removes the lock when the process ends, for whatever reason. Object
    stores have no locks: there the latest process holds the directory, and the check tells the one
    before it.

    Args:
      path: an existing directory. The file `.lock` in it names the process that holds it or held it
        last.

    Yields:
      A function that raises unless this process still holds the directory. Call it before every
      write.

    Raises:
      DirectoryInUseError: this or another process holds the directory.
    """
    holder = f"process {os.getpid()} on {platform.node()}"
    if is_remote(path):
        holder += f", {uuid.uuid4()}"
        (path / ".lock").write_text(holder)

        def check() -> None:
            found = (path / ".lock").read_text()
            if found != holder:
                raise DirectoryInUseError(
                    f"{path} was taken over by {found}; this process stops writing there"
                )

        yield check
        return
    file = path / ".lock"
    try:
        held = filelock.FileLock(file).acquire(blocking=False)
    except filelock.Timeout as error:
        found = file.read_text(encoding="utf-8").strip() or "another process"
        raise DirectoryInUseError(
            f"{path} is in use by {found}; wait until it ends, or give another directory"
        ) from error
    with held:
        file.write_text(f"{holder}\n", encoding="utf-8")
        yield lambda: None
