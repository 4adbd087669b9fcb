"""Reads `.npz`, `.npy` and parquet files that may be damaged. Nothing is unpickled."""

import contextlib
import math
import os
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from jevb_jax import extras

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
    magic = np.lib.format.MAGIC_PREFIX
    with _damage_named(path), path.open("rb") as stream:
        if stream.read(len(magic)) == magic:  # `np.load` would return it, without entries
            raise ValueError("it is an .npy file, with one array and no entries")
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


def read_parquet(
    path: Path,
    names: Sequence[str],
    *,
    says: str,
    check: Callable[[tuple[int, ...], np.dtype], None],
) -> dict[str, np.ndarray] | None:
    """Those columns of a parquet file that it has; None for a file of another kind.

    Args:
      path: the file.
      names: the columns to read; the first must be there. A column of lists becomes an array of more
        axes, if the lists of all rows have one length.
      says: what the first column is, for the message.
      check: raises for a wrong shape or type of the first column.

    Raises:
      ValueError: the file is damaged, the first column is missing, rows lack a value, or their lists
        differ in length.
      ModuleNotFoundError: pyarrow is not installed.
    """
    with path.open("rb") as stream:
        if stream.read(4) != b"PAR1":
            return None
    with extras.explained():
        import pyarrow as pa
        import pyarrow.parquet as pq
    first = names[0]
    with _damage_named(path, "parquet"), path.open("rb") as stream:
        try:
            columns = pq.read_schema(stream).names
            stream.seek(0)
            table = pq.read_table(stream, columns=[name for name in names if name in columns])
        except pa.ArrowException as error:
            raise ValueError(error) from error
    if first not in columns:
        raise ValueError(f"{path} has no column `{first}` ({says}); its columns are {columns}")
    found = {name: _unnested(table[name], f"{path}, column {name}") for name in table.column_names}
    check(found[first].shape, found[first].dtype)
    return found


def _unnested(column: Any, where: str) -> np.ndarray:
    """A column of numbers, or of lists of numbers of one length, as an array."""
    import pyarrow as pa
    from pyarrow import compute

    pc: Any = compute  # its functions are made when it is imported, unseen by type checkers
    shape, values = [len(column)], column
    while pa.types.is_nested(values.type):
        if not hasattr(values.type, "value_type"):
            raise ValueError(f"{where}: expected numbers or lists of numbers, got {values.type}")
        if values.null_count:
            raise ValueError(f"{where}: {values.null_count} rows have no value")
        lengths = pc.unique(pc.list_value_length(values)).to_pylist()
        if len(lengths) > 1:
            raise ValueError(f"{where}: lists of all rows must have one length, got {lengths[:5]}")
        shape.append(lengths[0] if lengths else 0)
        values = pc.list_flatten(values)
    if values.null_count:
        raise ValueError(f"{where}: {values.null_count} numbers are missing")
    return values.to_numpy().reshape(shape)


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
