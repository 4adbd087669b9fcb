"""Images in arrays: `.npz` and `.npy` files, and the digits that scikit-learn brings."""

import contextlib
import math
import os
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from jevb_jax.images.source import ArraySource, check_images
from jevb_jax.runs.files import to_path

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
    """Reads one or several `.npz` files as one source, in the given order.

    Each file holds `images`, uint8 `[N, H, W, C]`, and may hold `labels` (integers `[N]`) and
    `class_names` (strings). Other entries are ignored. Nothing is unpickled.

    Raises:
      FileNotFoundError: a file does not exist.
      TypeError: images are not uint8, or labels are not integers. The message names the file.
      ValueError: a file is damaged or no `.npz` file, has no `images` or images of a wrong shape,
        or has labels out of range or of another length; or the files disagree in image size, class
        names, or whether they have labels. The message names the file.
    """
    if isinstance(paths, str | os.PathLike):
        paths = [paths]
    if not paths:
        raise ValueError("expected at least one .npz file, got none")
    real = [to_path(path).resolve() for path in paths]
    repeated = sorted({str(path) for path in real if real.count(path) > 1})
    if repeated:
        raise ValueError(f"each file may be given once, but these are repeated: {repeated}")
    parts = [_read_npz(to_path(path)) for path in paths]
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


def _read_npz(path: Path) -> ArraySource:
    if not path.is_file():
        raise FileNotFoundError(f"no file at {path}")
    with _damage_named(path), path.open("rb") as stream:
        magic = np.lib.format.MAGIC_PREFIX
        if stream.read(len(magic)) == magic:
            raise ValueError("it holds a single array; save it by `np.savez(path, images=array)`")
        stream.seek(0)
        with np.load(stream, allow_pickle=False) as file:
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
def _damage_named(path: Path) -> Iterator[None]:
    try:
        yield
    except _DAMAGED_ZIP as error:
        raise ValueError(f"{path} cannot be read as an .npz file: {error}") from error
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
        version = np.lib.format.read_magic(stream)
        read = np.lib.format
        shape, _, dtype = (
            read.read_array_header_1_0(stream)
            if version == (1, 0)
            else read.read_array_header_2_0(stream)
        )
        held = entry.file_size - stream.tell()
    claimed = math.prod(shape) * dtype.itemsize
    # Deflate turns one byte into at most 1032. Entries without compression have their own size.
    possible = entry.compress_size * (1032 if entry.compress_type == zipfile.ZIP_DEFLATED else 1)
    if not dtype.hasobject and (claimed > held or entry.file_size > possible > 0):
        raise ValueError(
            f"its entry `{key}` claims an array of shape {shape}, {claimed:,} bytes, but holds at most "
            f"{min(held, possible):,}. The file is damaged"
        )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if claimed > memory:
        raise MemoryError(f"{key} needs {claimed:,} bytes of {memory:,}")
    return shape, dtype
