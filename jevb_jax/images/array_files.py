"""Reads `.npz` and `.npy` files that may be damaged. Nothing is unpickled."""

import contextlib
import math
import os
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO

import numpy as np

# Errors that NumPy and zipfile raise for damaged files.
_DAMAGED_ZIP = (ValueError, OSError, EOFError, NotImplementedError, zipfile.BadZipFile, zlib.error)


def read_npy(
    path: Path, *, check: Callable[[tuple[int, ...], np.dtype], None]
) -> np.ndarray | None:
    """The array of an `.npy` file; None for a file of another kind.

    Args:
      path: the file.
      check: raises for a wrong shape or type, before memory is taken.

    Raises:
      ValueError: the file is damaged, or memory does not suffice.
    """
    magic = np.lib.format.MAGIC_PREFIX
    with _damage_named(path, "npy"), path.open("rb") as stream:
        if stream.read(len(magic)) != magic:
            return None
        stream.seek(0)
        shape, dtype = _array_header(stream)
        start = stream.tell()
        # Not `stat`: paths of object stores have another one.
        claimed, held = math.prod(shape) * dtype.itemsize, stream.seek(0, os.SEEK_END) - start
        if not dtype.hasobject and claimed > held:
            raise ValueError(
                f"it claims an array of shape {shape}, {claimed:,} bytes, but holds {held:,}. The file "
                "is damaged"
            )
        _check_memory("it", claimed)
    if not dtype.hasobject:
        check(shape, dtype)
    with _damage_named(path, "npy"), path.open("rb") as stream:
        return np.load(stream, allow_pickle=False)


def read_npz(
    path: Path,
    names: Sequence[str],
    *,
    says: str,
    check: Callable[[tuple[int, ...], np.dtype], None],
) -> dict[str, np.ndarray]:
    """Those entries of an `.npz` file that it has.

    Args:
      path: the file.
      names: the entries to read; the first must be there.
      says: what the first entry is, for the message.
      check: raises for a wrong shape or type of the first entry, before memory is taken.

    Raises:
      ValueError: the file is damaged, the first entry is missing, or memory does not suffice.
    """
    first = names[0]
    with (
        _damage_named(path),
        path.open("rb") as stream,
        np.load(stream, allow_pickle=False) as file,
    ):
        keys = file.files
        wanted = [key for key in names if key in keys]
        headers = {key: _entry_header(file.zip, key) for key in wanted}
    # Check the header before memory is taken. Pickled arrays are refused later, by NumPy.
    if first in headers and not headers[first][1].hasobject:
        check(*headers[first])
    with (
        _damage_named(path),
        path.open("rb") as stream,
        np.load(stream, allow_pickle=False) as file,
    ):
        entries = {key: file[key] for key in wanted}
    if first not in entries:
        raise ValueError(f"{path} has no entry `{first}` ({says}); its entries are {keys}")
    return entries


def texts(names: np.ndarray | None) -> tuple[str, ...] | None:
    """An array of texts or bytes as a tuple of texts."""
    if names is None:
        return None
    return tuple(item.decode() if isinstance(item, bytes) else str(item) for item in names.tolist())


@contextlib.contextmanager
def _damage_named(path: Path, kind: str = "npz") -> Iterator[None]:
    try:
        yield
    except _DAMAGED_ZIP as error:
        raise ValueError(f"{path} cannot be read as an .{kind} file: {error}") from error
    except MemoryError as error:
        raise ValueError(
            f"there is no memory for the arrays of {path} ({error}). Give fewer images, or a "
            "folder of pictures or a TFDS set, which are read image by image"
        ) from error


def _entry_header(archive: zipfile.ZipFile, key: str) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and type of an entry. Raises if it claims more data than the file holds."""
    name = key if key in archive.namelist() else f"{key}.npy"
    entry = archive.getinfo(name)
    with archive.open(entry) as stream:
        shape, dtype = _array_header(stream)
        held = entry.file_size - stream.tell()
    claimed = math.prod(shape) * dtype.itemsize
    # Deflate turns one byte into at most 1032. Entries without compression have their own size.
    possible = entry.compress_size * (1032 if entry.compress_type == zipfile.ZIP_DEFLATED else 1)
    if not dtype.hasobject and (claimed > held or entry.file_size > possible > 0):
        raise ValueError(
            f"its entry `{key}` claims an array of shape {shape}, {claimed:,} bytes, but holds at most "
            f"{min(held, possible):,}. The file is damaged"
        )
    _check_memory(key, claimed)
    return shape, dtype


def _array_header(stream: IO[bytes]) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and type of an array that starts here; the stream is then at its data."""
    read = np.lib.format
    version = read.read_magic(stream)
    of_version = read.read_array_header_1_0 if version == (1, 0) else read.read_array_header_2_0
    try:
        shape, _, dtype = of_version(stream)
    except (TypeError, SyntaxError, RecursionError, tokenize.TokenError) as error:
        raise ValueError(f"the header of its array is damaged: {error}") from error
    if any(type(size) is not int for size in shape):
        raise ValueError(f"the header of its array is damaged: shape {shape}")
    return shape, dtype


def _check_memory(name: str, claimed: int) -> None:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if claimed > memory:
        raise MemoryError(f"{name} needs {claimed:,} bytes of {memory:,}")
