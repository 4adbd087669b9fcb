"""Images in arrays: `.npz` and `.npy` files, and the digits that scikit-learn brings."""

import contextlib
import math
import os
import tokenize
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

import numpy as np

from jevb_jax.images.source import ArraySource, check_images
from jevb_jax.runs.files import to_path

# Labels have one axis. With two, they are labels of a wrong shape: images have more.
_LABEL_AXES = 2
# Errors that NumPy and zipfile raise for damaged files.
_DAMAGED_ZIP = (ValueError, OSError, EOFError, NotImplementedError, zipfile.BadZipFile, zlib.error)


def digits() -> ArraySource:
    """Returns scikit-learn's 1,797 bundled 8x8 handwritten digits as uint8 `[1797, 8, 8, 1]`.

    Gray levels 0..16 are scaled to 0..255. Source: UCI ML hand-written digits (Alpaydin and Kaynak,
    1998), test part.
    """
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    images = np.rint(pixels.reshape(-1, 8, 8, 1) * (255 / 16)).astype(np.uint8)
    return ArraySource(images, labels, tuple("0123456789"), name="digits")


def arrays(paths: Sequence[str | os.PathLike[str]] | str | os.PathLike[str]) -> ArraySource:
    """Reads one or several `.npz` or `.npy` files as one source, in the given order.

    An `.npz` file holds `images`, uint8 `[N, H, W, C]`, and may hold `labels` (integers `[N]`) and
    `class_names` (strings). Other entries are ignored. An `.npy` file holds images, or the labels of
    the `.npy` images before it. Nothing is unpickled.

    Raises:
      FileNotFoundError: a file does not exist.
      TypeError: images are not uint8, or labels are not integers. The message names the file.
      ValueError: a file is damaged or of neither kind, has no `images` or images of a wrong shape,
        or has labels out of range or of another length; labels do not follow `.npy` images; or the
        files disagree in image size, class names, or whether they have labels. The message names
        the file.
    """
    if isinstance(paths, str | os.PathLike):
        paths = [paths]
    if not paths:
        raise ValueError("expected at least one .npz or .npy file, got none")
    parts = _read_all([to_path(path) for path in paths])
    first = parts[0]
    for part in parts[1:]:
        if part.images.shape[1:] != first.images.shape[1:]:
            raise ValueError(
                f"all images must have one size, got {first.images.shape[1:]} in {first.name} and "
                f"{part.images.shape[1:]} in {part.name}"
            )
        if (part.labels is None) != (first.labels is None):
            with_labels, without = (first, part) if part.labels is None else (part, first)
            raise ValueError(
                f"{with_labels.name} has labels and {without.name} has none; "
                "give labels to both or neither"
            )
        if part.class_names != first.class_names:
            raise ValueError(f"class_names differ between {first.name} and {part.name}")
    if len(parts) == 1:
        return first
    labels = [part.labels for part in parts if part.labels is not None]
    return ArraySource(
        np.concatenate([part.images for part in parts]),
        np.concatenate(labels) if labels else None,
        first.class_names,
        name=", ".join(part.name for part in parts),
    )


def _read_all(paths: Sequence[Path]) -> list[ArraySource]:
    parts: list[ArraySource] = []
    read: set[Path] = set()  # one file of labels may serve several files of images
    waiting = False  # whether the last part is `.npy` images, which labels may follow
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"no file at {path}")
        array = _read_npy(path)
        is_labels = array is not None and array.ndim <= _LABEL_AXES
        if not is_labels and path.resolve() in read:
            raise ValueError(f"each file may be given once, but these are repeated: {path}")
        read.add(path.resolve())
        if array is None:
            parts.append(_read_npz(path))
        elif not is_labels:
            parts.append(ArraySource(array, name=str(path)))
        elif waiting:
            images = parts[-1]
            parts[-1] = ArraySource(images.images, array, name=f"{images.name} with {path}")
        else:
            raise ValueError(
                f"{path} holds labels, but no .npy file of images stands right before it. Give "
                "IMAGES.npy, LABELS.npy"
            )
        waiting = array is not None and not is_labels
    return parts


def _read_npy(path: Path) -> np.ndarray | None:
    """The array of an `.npy` file; None for a file of another kind."""
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
    if len(shape) > _LABEL_AXES and not dtype.hasobject:
        check_images(shape, dtype, where=str(path))  # before memory is taken
    with _damage_named(path, "npy"), path.open("rb") as stream:
        return np.load(stream, allow_pickle=False)


def _read_npz(path: Path) -> ArraySource:
    with (
        _damage_named(path),
        path.open("rb") as stream,
        np.load(stream, allow_pickle=False) as file,
    ):
        keys = file.files
        wanted = [key for key in ("images", "labels", "class_names") if key in keys]
        headers = {key: _entry_header(file.zip, key) for key in wanted}
    # Check the header before memory is taken. Pickled arrays are refused later, by NumPy.
    if "images" in headers and not headers["images"][1].hasobject:
        check_images(*headers["images"], where=str(path))
    with (
        _damage_named(path),
        path.open("rb") as stream,
        np.load(stream, allow_pickle=False) as file,
    ):
        entries = {key: file[key] for key in wanted}
    if "images" not in entries:
        raise ValueError(
            f"{path} has no entry `images` (uint8 [N, H, W, C]); its entries are {keys}"
        )
    names = entries.get("class_names")
    if names is not None:
        names = tuple(
            item.decode() if isinstance(item, bytes) else str(item) for item in names.tolist()
        )
    return ArraySource(entries["images"], entries.get("labels"), names, name=str(path))


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
