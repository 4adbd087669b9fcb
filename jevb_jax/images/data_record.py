"""What a run remembers of its data, so that other data behind the same names are not taken for them.

`data.json` in a run directory is the fingerprint of the data that the run started on. Order, schedule
and the split of training and validation images all follow from the number, order and labels of the
images: with other data a run that is resumed is no longer the run that was begun, and images that the
encoder was trained on may become validation images.

The cost of a fingerprint: arrays are hashed whole (about a second for a gigabyte). Of files in folders,
names and sizes are taken of all, one `stat` each, and contents of as many, evenly spaced, as make
256 MB and 16,384 files: small sets whole. Of TFDS sets, version, number, labels, and 1,000 records.
"""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from jevb_jax.images.dataset import Dataset
from jevb_jax.images.image_files import FolderSource, ImageListSource
from jevb_jax.images.shapes import ShapesSource
from jevb_jax.images.source import ArraySource, ImageSource, Subset
from jevb_jax.images.tfds import TfdsSource
from jevb_jax.runs import files

FILE = "data.json"
_FORMAT = 1
_MAX_BYTES = 256 * 2**20
_MAX_FILES = 16_384
_MAX_RECORDS = 1_000

_logger = logging.getLogger(__name__)

# What runs read of folders before their data were recorded.
_FIRST_SUFFIXES = (".png", ".jpg", ".jpeg")

Fingerprint = dict[str, Any]
_T = TypeVar("_T")


class ChangedDataError(ValueError):
    """The data are not those that the run started on."""


# --- Fingerprints ---


def fingerprint(dataset: Dataset) -> Fingerprint:
    """Says which images a data set holds, in which order, with which labels and splits.

    The place of the files does not count, nor their times, nor what reading makes of them.

    Args:
        dataset: what `dataset.load_dataset` gave.

    Returns:
        JSON values: `sources`, the sets that the parts are taken from, and `parts`, the rows of each.
    """
    sources: dict[str, Any] = {}
    parts: dict[str, Any] = {}
    bases: dict[str, ImageSource] = {}
    for name, part in dataset._asdict().items():
        if part is None:
            continue
        base, rows = _base(part)
        of = next((known for known, other in bases.items() if other is base), None)
        if of is None:
            of = "training set" if not bases else f"{name} set"
            bases[of] = base
            sources[of] = _of_source(base)
        parts[name] = {"of": of, "images": len(part), "rows": _digest(_int64(rows))}
    return {"sources": sources, "parts": parts}


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two fingerprints, a line each, with both values; empty if they agree.

    Args:
        before: the fingerprint when the run started.
        now: the fingerprint of today.

    Returns:
        The lines.
    """
    lines = []
    for kind in ("sources", "parts"):
        for name in sorted(before[kind].keys() | now[kind].keys()):
            old, new = before[kind].get(name, {}), now[kind].get(name, {})
            what = name if kind == "sources" else f"{name} split"
            keys = [key for key in dict.fromkeys([*old, *new]) if old.get(key) != new.get(key)]
            keys = [key for key in keys if key != "name"]
            # Where a number changed, hashes say nothing more.
            numbers = [key for key in keys if isinstance(new.get(key, old.get(key)), int)]
            lines += [
                f"{what}, {key}: the run has {_shown(old.get(key))}, found {_shown(new.get(key))}"
                for key in numbers or keys
            ]
    return lines


def _shown(value: Any) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    return "none" if value is None else str(value)


def _base(source: ImageSource) -> tuple[ImageSource, np.ndarray]:
    rows = np.arange(len(source))
    while isinstance(source, Subset):
        source, rows = source.source, source.indices[rows]
    return source, rows


def _of_source(source: ImageSource) -> Fingerprint:
    found: Fingerprint = {"name": source.name, "images": len(source)}
    if isinstance(source, ShapesSource):
        pass  # drawn from the config; their last bits are the machine's
    elif isinstance(source, ArraySource):
        found["bytes"] = source.images.nbytes
        found["contents"] = _digest(np.ascontiguousarray(part) for part in _blocks(source.images))
    elif isinstance(source, FolderSource | ImageListSource):
        found |= _of_files(source.names, source.paths)
    elif isinstance(source, TfdsSource):
        found["version"] = source.name
        found["contents"] = _digest(source.encoded(i) for i in _spaced(len(source), _MAX_RECORDS))
    else:
        found["contents"] = _digest(
            np.ascontiguousarray(source[i]) for i in _spaced(len(source), _MAX_RECORDS)
        )
    labels, names = source.labels, source.class_names
    found["labels"] = None if labels is None else _digest(_int64(labels))
    found["class names"] = None if names is None else _digest(os.fsencode(name) for name in names)
    return found


def _of_files(names: Sequence[str], paths: Sequence[str]) -> Fingerprint:
    sizes = _map_files(os.path.getsize, paths)
    share = max(1, -(-sum(sizes) // _MAX_BYTES))
    chosen = _spaced(len(paths), min(_MAX_FILES, -(-len(paths) // share)))
    return {
        "bytes": sum(sizes),
        "file names": _digest(os.fsencode(name) for name in names),
        "file sizes": _digest(_int64(sizes)),
        "contents": _digest(_map_files(_hash_of_file, [paths[i] for i in chosen])),
    }


def _hash_of_file(path: str) -> bytes:
    return hashlib.sha256(Path(path).read_bytes()).digest()


def _map_files(function: Callable[[str], _T], paths: Sequence[str]) -> list[_T]:
    """Values by path, from threads: on a network each file is waited for."""
    chunks = [paths[start : start + 64] for start in range(0, len(paths), 64)]
    with ThreadPoolExecutor(16) as pool:
        parts = pool.map(lambda chunk: [function(path) for path in chunk], chunks)
        return [value for part in parts for value in part]


def _spaced(count: int, limit: int) -> range:
    """At most `limit` numbers below `count`, evenly spaced from 0."""
    return range(0, count, -(-count // min(count, limit)))


def _blocks(images: np.ndarray) -> Iterable[np.ndarray]:
    rows = max(1, 2**24 * len(images) // images.nbytes)
    return (images[start : start + rows] for start in range(0, len(images), rows))


def _int64(values: Any) -> list[bytes]:
    return [np.asarray(values).astype("<i8").tobytes()]


def _digest(pieces: Iterable[Any]) -> str:
    """The first 16 digits of the SHA-256 of all pieces and their lengths."""
    whole = hashlib.sha256()
    total = b""
    for piece in pieces:
        view = memoryview(piece).cast("B")
        whole.update(view)
        total += len(view).to_bytes(8, "little")
        if len(total) >= 2**16:
            whole.update(total)
            total = b""
    whole.update(total)
    return whole.hexdigest()[:16]


# --- Runs ---


def read(workdir: Path) -> dict[str, Any] | None:
    """The record of a run directory, or None of a run that an earlier version started.

    Args:
        workdir: directory of the run.

    Returns:
        `fingerprint` of the data of the run, and `changes`, lines on other data that it was trained
        on before.

    Raises:
        ValueError: the record is damaged or of a later version.
    """
    path = workdir / FILE
    if not path.exists():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["format"] != _FORMAT:
            raise ValueError(f"its format is {record['format']!r}, this version reads {_FORMAT}")
        if not {"sources", "parts"} <= record["fingerprint"].keys() or "changes" not in record:
            raise ValueError("entries are missing")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is damaged ({error!r}): remove it to have the data recorded anew, if they are "
            "those that the run started on"
        ) from error
    return record


def check_training(workdir: Path, dataset: Dataset, *, accept_change: bool) -> list[str]:
    """Records the data of a new run; refuses a run whose data changed since it was begun.

    A run without a checkpoint starts from the beginning whatever is there, and so do its data. Runs of
    versions that recorded nothing are recorded now.

    Args:
        workdir: the run's directory, held by this process.
        dataset: what the run's config names, as it is now.
        accept_change: go on all the same, with the data as they are now; the record keeps what changed.

    Returns:
        Lines on the changes that were accepted, now and before.

    Raises:
        ChangedDataError: the data changed and no change is accepted.
        ValueError: as `read`.
    """
    found = fingerprint(dataset)
    has_begun = _has_checkpoint(workdir)
    record = read(workdir) if has_begun else None
    accepted: list[str] = []
    if record is not None:
        accepted, lines = record["changes"], changes(record["fingerprint"], found)
    else:
        lines = _unread_before(dataset) if has_begun else []
        if has_begun and not lines:
            _logger.warning(
                "%s holds no %s: it was started by a version that did not record its data. They are "
                "recorded now, as they are: %s.",
                workdir,
                FILE,
                ", ".join(f"{part['images']:,} {name}" for name, part in found["parts"].items()),
            )
    if lines:
        _refuse(
            lines,
            f"the data of {workdir}",
            "--config.input.accept_changed_data=True: order, schedule and splits are then those of the "
            "data as they are now",
            accept_change=accept_change,
        )
    if record is None or lines:
        accepted = [*accepted, *lines]
        value = {"format": _FORMAT, "fingerprint": found, "changes": accepted}
        files.write_json_atomically(workdir / FILE, value)
    return accepted


def check_evaluation(workdir: Path, dataset: Dataset, *, accept_change: bool) -> list[str]:
    """Refuses to evaluate a run on other data than those it was trained and validated on.

    Args:
        workdir: the run's directory; nothing is written.
        dataset: what the run's config names, as it is now.
        accept_change: evaluate all the same.

    Returns:
        Lines on what changed, now and while the run was trained, for the results.

    Raises:
        ChangedDataError: the data changed and no change is accepted.
        ValueError: as `read`.
    """
    record = read(workdir)
    if record is None:
        return []
    lines = changes(record["fingerprint"], fingerprint(dataset))
    if lines:
        _refuse(
            lines,
            f"the data of {workdir}",
            "--accept_changed_data (input.accept_changed_data of the config)",
            accept_change=accept_change,
        )
    return [*record["changes"], *lines]


def check_loaded(record: Mapping[str, Any], dataset: Dataset, *, instead: str) -> None:
    """Refuses to fit or calibrate a loaded model on other data than those of its run.

    Args:
        record: what `read` gave.
        dataset: what the run's config names, as it is now.
        instead: what to do to go on with other images.

    Raises:
        ChangedDataError: the data changed.
    """
    lines = changes(record["fingerprint"], fingerprint(dataset))
    if lines:
        _refuse(lines, "the data of the run", instead, accept_change=False)


def _refuse(lines: list[str], what: str, instead: str, *, accept_change: bool) -> None:
    text = f"{what} changed since it was begun:\n" + "\n".join(f"  {line}" for line in lines)
    if any(line.startswith("training set") for line in lines):
        text += (
            "\nThe split of training and validation images follows from all of them: images that were "
            "trained on may now be validation images, and what is chosen or calibrated on these then "
            "looks better than it is. (It stays as it was where only contents of files changed.)"
        )
    if accept_change:
        _logger.warning("%s", text)
        return
    raise ChangedDataError(
        f"{text}\nBring the former data back, or start anew in another directory, or go on with "
        f"{instead}."
    )


def _unread_before(dataset: Dataset) -> list[str]:
    """Lines on pictures in folders that versions before this record did not read."""
    lines = []
    sources = {name: _base(part)[0] for name, part in dataset._asdict().items() if part is not None}
    for name in ("train", "test"):
        source = sources.get(name)
        if isinstance(source, FolderSource):
            known = sum(path.lower().endswith(_FIRST_SUFFIXES) for path in source.names)
            if known < len(source):
                lines.append(
                    f"{name} split: the run read PNG and JPEG files alone, {known:,} of them now, found "
                    f"{len(source):,} pictures"
                )
    return lines


def _has_checkpoint(workdir: Path) -> bool:
    directory = workdir / "checkpoints"
    return directory.exists() and any(path.name.isdecimal() for path in directory.iterdir())
