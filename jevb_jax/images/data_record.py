"""The record of a run's data, which notices if the files behind a name have changed.

`data.json` in a run directory is the fingerprint of the data that the run started on. The order of
batches, the schedule, and the split into training and validation images all depend on the number,
order and labels of the images. With other data, a resumed run would be a different run, and images
that the encoder was trained on might become validation images.

What is read: arrays are hashed whole (about a second for a gigabyte). For folders, the names and
sizes of all files are read (one `stat` each), and the contents of evenly spaced files, up to 256 MB
and 16,384 files, so small sets are read whole. For TFDS sets: version, number of records, labels,
and the contents of 1,000 records. For tar files: names and sizes of all pictures, and the contents
of 1,000. For tables: the contents of 1,000 pictures.
"""

import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from jevb_jax.images.dataset import Dataset
from jevb_jax.images.image_files import FileSource, FolderSource
from jevb_jax.images.shapes import ShapesSource
from jevb_jax.images.shards import ShardSource
from jevb_jax.images.source import ImageSource, InMemory, Subset
from jevb_jax.images.tables import TableSource
from jevb_jax.images.tfds import TfdsSource
from jevb_jax.runs import files

FILE = "data.json"
_FORMAT = 1
_MAX_BYTES = 256 * 2**20
_MAX_FILES = 16_384
_MAX_RECORDS = 1_000
_LABEL_KEYS = {"labels", "class names"}  # of a source; absent if the config ignores labels

_logger = logging.getLogger(__name__)

# The endings that runs read from folders before their data were recorded.
_FIRST_SUFFIXES = (".png", ".jpg", ".jpeg")

Fingerprint = dict[str, Any]
_T = TypeVar("_T")


class ChangedDataError(ValueError):
    """The data are not those that the run started on."""


# --- Fingerprints ---


def fingerprint(dataset: Dataset) -> Fingerprint:
    """Describes which images a data set holds, their order, labels and splits.

    The place and times of the files do not matter, and neither does what is done to the pixels
    after reading.

    Returns:
      JSON values: `sources`, the sets that the parts are taken from, and `parts`, the rows of each.
    """
    sources: dict[str, Any] = {}
    parts: dict[str, Any] = {}
    bases: dict[str, ImageSource] = {}
    for name, part in dataset._asdict().items():
        # Older versions did not have `outside_validation`. It follows from the other parts.
        if part is None or name == "outside_validation":
            continue
        base, rows = _base(part)
        of = next((known for known, other in bases.items() if other is base), None)
        if of is None:
            of = "training set" if not bases else f"{name} set"
            bases[of] = base
            sources[of] = _of_source(base)
            if base.labels is None and _drops_labels(part):
                # Ignored ones are not read. Older versions read them: they are in older records.
                for key in _LABEL_KEYS:
                    del sources[of][key]
        parts[name] = {"of": of, "images": len(part), "rows": _digest(_int64(rows))}
    return {"sources": sources, "parts": parts}


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Lines that say how two fingerprints differ, with both values; empty if they agree.

    Args:
      before: the fingerprint at the start of the run.
      now: the fingerprint of the present data.
    """
    lines = []
    for kind in ("sources", "parts"):
        for name in sorted(before[kind].keys() | now[kind].keys()):
            old, new = before[kind].get(name, {}), now[kind].get(name, {})
            what = name if kind == "sources" else f"{name} split"
            both_have_labels = old.keys() & new.keys() >= _LABEL_KEYS
            free = {"name"} if both_have_labels else {"name", *_LABEL_KEYS}
            keys = [key for key in dict.fromkeys([*old, *new]) if old.get(key) != new.get(key)]
            keys = [key for key in keys if key not in free]
            # If a number has changed, the hashes have too and say nothing more.
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


def _drops_labels(source: ImageSource) -> bool:
    while isinstance(source, Subset):
        if not source.has_labels:
            return True
        source = source.source
    return False


def _of_source(source: ImageSource) -> Fingerprint:
    # Exports carry this record, so it must not tell where the home of their author is.
    # A name may list several files; only the start of one is the working directory.
    name = re.sub(rf"(?<!\S){re.escape(f'{Path.cwd()}{os.sep}')}", "", source.name)
    found: Fingerprint = {"name": name, "images": len(source)}
    if isinstance(source, ShapesSource):
        pass  # drawn from the config; the last bits of the pixels depend on the machine
    elif isinstance(source, InMemory):
        found["bytes"] = source.values.nbytes
        found["contents"] = _digest(np.ascontiguousarray(part) for part in _blocks(source.values))
    elif isinstance(source, FileSource):
        found |= _of_files(source.names, source.paths)
    elif isinstance(source, TfdsSource):
        found["version"] = source.name
        found["contents"] = _digest(source.encoded(i) for i in _spaced(len(source), _MAX_RECORDS))
    elif isinstance(source, TableSource):
        rows = _spaced(len(source), _MAX_RECORDS)
        found["contents"] = _digest(source.file(i).getvalue() for i in rows)
    elif isinstance(source, ShardSource):
        found["bytes"] = int(source.sizes.sum())
        found["record names"] = _digest(os.fsencode(name) for name in source.names)
        found["record sizes"] = _digest(_int64(source.sizes))
        rows = _spaced(len(source), _MAX_RECORDS)
        found["contents"] = _digest(source.file(i).getvalue() for i in rows)
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
    """Values in the order of the paths, computed by threads, because network files are slow."""
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
    """The record in a run directory; None if an earlier version started the run without one.

    Returns:
      `fingerprint` of the run's data, and `changes`, lines about other data that the run was also
      trained on.

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
            f"{path} is damaged ({error!r}). Check that the data are those that the run started on, "
            "and remove it; the data are then recorded anew"
        ) from error
    return record


def check_training(workdir: Path, dataset: Dataset, *, accept_change: bool | None) -> list[str]:
    """Records the data of a new run, and checks that the data of a resumed run have not changed.

    A run without a checkpoint starts from the beginning, so its data are recorded anew. The data of
    a run that an earlier version started without a record are recorded now.

    Args:
      workdir: directory of the run, locked by this process.
      dataset: the present data of the run's config.
      accept_change: continue with changed data; the record keeps the changes. None: changed data are
        refused, and there is no setting that accepts them.

    Returns:
      Lines about the changes that were accepted, now and before.

    Raises:
      ChangedDataError: the data have changed, and `accept_change` is not True.
      ValueError: the record is damaged or of a later version.
    """
    # Here, because an export, which is only read, needs no Orbax.
    from jevb_jax.runs.checkpoints import saved_steps

    found = fingerprint(dataset)
    has_begun = bool(saved_steps(workdir / "checkpoints"))
    record = read(workdir) if has_begun else None
    accepted: list[str] = []
    if record is not None:
        accepted, lines = record["changes"], changes(record["fingerprint"], found)
    else:
        lines = _unread_before(dataset) if has_begun else []
        if has_begun and not lines:
            _logger.warning(
                "%s holds no %s: an earlier version started it, which did not record its data. The "
                "present data are recorded now: %s.",
                workdir,
                FILE,
                ", ".join(f"{part['images']:,} {name}" for name, part in found["parts"].items()),
            )
    if lines:
        _refuse(
            lines,
            f"the data of {workdir}",
            None
            if accept_change is None
            else "--config.input.accept_changed_data=True: order, schedule and splits then follow from "
            "the present data",
            accept_change=bool(accept_change),
        )
    if record is None or lines:
        accepted = [*accepted, *lines]
        value = {"format": _FORMAT, "fingerprint": found, "changes": accepted}
        files.write_json_atomically(workdir / FILE, value)
    return accepted


def check_evaluation(workdir: Path, dataset: Dataset, *, accept_change: bool) -> list[str]:
    """Checks that the data of an evaluation are those of the run. Writes nothing.

    Args:
      workdir: directory of the run.
      dataset: the present data of the run's config.
      accept_change: evaluate on changed data.

    Returns:
      Lines for the results, about changes now and during training.

    Raises:
      ChangedDataError: the data have changed, and `accept_change` is False.
      ValueError: the record is damaged or of a later version.
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
    """Checks that a loaded model is fitted or calibrated on the data of its run.

    Args:
      record: the record that `read` returned.
      dataset: the present data of the run's config.
      instead: words for the message: how to use other images.

    Raises:
      ChangedDataError: the data have changed.
    """
    lines = changes(record["fingerprint"], fingerprint(dataset))
    if lines:
        _refuse(lines, "the data of the run", instead, accept_change=False)


def _refuse(lines: list[str], what: str, instead: str | None, *, accept_change: bool) -> None:
    text = f"{what} have changed since the run started:\n" + "\n".join(
        f"  {line}" for line in lines
    )
    if any(line.startswith("training set") for line in lines):
        text += (
            "\nThe split into training and validation images depends on all images. Images that were "
            "trained on may now be validation images; whatever is chosen or calibrated on them then "
            "looks better than it is. (The split is unchanged if only contents of files changed.)"
        )
    if accept_change:
        _logger.warning("%s", text)
        return
    remedies = ["restore the former data", "start anew in another directory"]
    remedies += [] if instead is None else [f"continue with {instead}"]
    raise ChangedDataError(f"{text}\nThere are these ways on: {', or '.join(remedies)}.")


def _unread_before(dataset: Dataset) -> list[str]:
    """Lines about pictures in folders that versions without a record did not read."""
    lines = []
    sources = {name: _base(part)[0] for name, part in dataset._asdict().items() if part is not None}
    for name in ("train", "test"):
        source = sources.get(name)
        if isinstance(source, FolderSource):
            known = sum(path.lower().endswith(_FIRST_SUFFIXES) for path in source.names)
            if known < len(source):
                lines.append(
                    f"{name} split: the run read only PNG and JPEG files ({known:,} of them now), found "
                    f"{len(source):,} pictures"
                )
    return lines
