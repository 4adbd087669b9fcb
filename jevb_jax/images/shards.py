"""Pictures in tar files, as the WebDataset format has them, read by index.

A sample is a run of members whose names agree up to the first dot: `key.jpg`, `key.cls`. An index of
every tar file is made once and cached (`index_cache`).
"""

import io
import json
import os
import tarfile
from collections.abc import Mapping, Sequence
from typing import IO, NamedTuple, Unpack

import numpy as np

from jevb_jax.images import decoding, index_cache
from jevb_jax.images.encoded import EncodedPictures, Reading
from jevb_jax.images.file_patterns import files_of_all
from jevb_jax.images.label_texts import labels_of_texts
from jevb_jax.images.source import ImageSource

_VERSION = 1  # of the index; raise it if the index changes
_BLOCK = 512  # bytes of a tar file


class ShardSource(EncodedPictures):
    """Pictures in tar files of the WebDataset format.

    A sample has one picture, by its ending. Its label is `key.cls`, a number or the name of a class;
    or the entry `label` of `key.json`. Other members are ignored. Tar files may not be compressed.

    Args:
      paths: tar files, in this order. A pattern (`train-*.tar`) gives its files in sorted order, and
        `train-{000..146}.tar` gives all files of the range.
      like: the training set, so that labels mean the same; None for a set of its own.
      has_labels: whether labels are read; without, nothing about them is checked.
      **reading: see `Reading`.

    Attributes:
      shards: the tar files.
      names: the keys of the samples.
      sizes: bytes of each picture, int64 `[N]`.

    Raises:
      FileNotFoundError: a file does not exist, or a pattern fits none.
      ValueError: a file is compressed, truncated, damaged, no tar file or given twice; a sample has
        no picture or several; a key returns; labels are missing or wrong. Messages name the file
        and the key. Also for the reasons of `FolderSource`.
    """

    def __init__(
        self,
        paths: Sequence[str | os.PathLike[str]],
        *,
        like: ImageSource | None = None,
        has_labels: bool = True,
        **reading: Unpack[Reading],
    ):
        shards = files_of_all(paths, "webdataset", "tar files")
        self.shards = tuple(shards)
        more = f" and {len(shards) - 1:,} more" if len(shards) > 1 else ""
        super().__init__(f"{shards[0]}{more}", **reading)
        found = [_index(file, has_labels=has_labels) for file in self.shards]
        self.names = tuple(name for index in found for name in index.names)
        if not self.names:
            raise ValueError(f"{self.name} holds no samples")
        counts = [len(index.names) for index in found]
        self._shard = np.repeat(np.arange(len(found), dtype=np.int32), counts)
        self._offset = np.concatenate([index.offsets for index in found])
        self.sizes = np.concatenate([index.sizes for index in found])
        self._labels, self.class_names = labels_of_texts(
            [text for index in found for text in index.labels],
            place=self.where,
            where=self.name,
            like=like,
        )
        self._check_opened()

    @property
    def files(self) -> Sequence[str]:
        """The tar files."""
        return self.shards

    def __len__(self) -> int:
        return len(self.names)

    def file(self, index: int) -> io.BytesIO:
        """Bytes of picture `index`."""
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {self.name}, which has {len(self)}")
        size = int(self.sizes[index])
        try:
            with open(self.shards[self._shard[index]], "rb") as stream:
                stream.seek(int(self._offset[index]))
                content = stream.read(size)
        except OSError as error:
            raise ValueError(f"cannot read {self.where(index)}: {error}") from error
        if len(content) != size:
            raise ValueError(
                f"cannot read {self.where(index)}: the file ends after {len(content):,} of {size:,} "
                "bytes. It has changed since its index was made"
            )
        return io.BytesIO(content)

    def where(self, index: int) -> str:
        """The name of picture `index` in messages."""
        return f"image {index}, {self.names[index]} in {self.shards[self._shard[index]]}"


class _Index(NamedTuple):
    """Where the pictures of a tar file are.

    Attributes:
      names: the key of each sample.
      labels: the text of each label, empty where there is none.
      offsets: byte at which each picture begins, int64.
      sizes: bytes of each picture, int64.
    """

    names: list[str]
    labels: list[str]
    offsets: np.ndarray
    sizes: np.ndarray


def _index(file: str, *, has_labels: bool) -> _Index:
    """The index of a tar file, from the cache if there is one."""
    state = os.stat(file)
    stamp = {"version": _VERSION, "bytes": state.st_size, "changed": state.st_mtime_ns}

    def build() -> Mapping[str, np.ndarray]:
        made = _read_index(file, state.st_size, has_labels=has_labels)
        return {
            "names": index_cache.packed_texts(made.names),
            "labels": index_cache.packed_texts(made.labels),
            "offsets": made.offsets,
            "sizes": made.sizes,
        }

    kind = "tar" if has_labels else "tar_without_labels"
    found = index_cache.cached(kind, file, stamp, build, changed_at=state.st_mtime)
    count = len(found["sizes"])
    names, labels = (index_cache.unpacked_texts(found[key], count) for key in ("names", "labels"))
    return _Index(names, labels, found["offsets"], found["sizes"])


def _read_index(file: str, num_bytes: int, *, has_labels: bool) -> _Index:
    """Reads all headers of a tar file, and all labels if they are wanted."""
    samples: dict[str, dict[str, tarfile.TarInfo]] = {}
    labels: list[str] = []
    last = ""
    end = 0
    try:
        with open(file, "rb") as stream, tarfile.open(fileobj=stream, mode="r:") as archive:
            for member in archive:
                end = member.offset_data + -(-member.size // _BLOCK) * _BLOCK
                if end > num_bytes:
                    raise ValueError(
                        f"{file} is truncated: {member.name} ends at byte "
                        f"{member.offset_data + member.size:,}, and the file has {num_bytes:,}"
                    )
                if not member.isreg() or os.path.basename(member.name).startswith("."):
                    continue
                folder, _, base = member.name.rpartition("/")
                stem, _, ending = base.partition(".")
                key = f"{folder}/{stem}" if folder else stem
                if key != last and key in samples:
                    raise ValueError(
                        f"{file}: the members of sample {key} do not stand together, or it is there twice"
                    )
                last = key
                if ending in samples.setdefault(key, {}):
                    raise ValueError(f"{file} holds {member.name} twice")
                samples[key][ending] = member
            _check_end(stream, end, file)
            labels = [
                _label(archive, members, file) if has_labels else "" for members in samples.values()
            ]
    except (tarfile.TarError, OSError, EOFError) as error:
        raise ValueError(
            f"{file} cannot be read as a tar file: {error}. (A compressed one must be unpacked first: "
            "single pictures cannot be read out of it.)"
        ) from error
    chosen = [_picture(key, members, file) for key, members in samples.items()]
    return _Index(
        list(samples),
        labels,
        np.asarray([member.offset_data for member in chosen], np.int64),
        np.asarray([member.size for member in chosen], np.int64),
    )


def _check_end(stream: IO[bytes], end: int, file: str) -> None:
    """Raises ValueError unless a tar file ends with zeros alone, as writers close it."""
    stream.seek(end)
    rest = stream.read(_BLOCK)
    if len(rest) < _BLOCK:
        raise ValueError(
            f"{file} is truncated after byte {end:,}: it has no end mark. Was its writer not closed?"
        )
    while rest:
        if any(rest):
            raise ValueError(
                f"{file} is damaged after byte {end:,}: there stands no header, and not the end either. "
                "(Tar files that were joined by `cat` must be given one by one.)"
            )
        rest = stream.read(2**20)


def _picture(key: str, members: Mapping[str, tarfile.TarInfo], file: str) -> tarfile.TarInfo:
    found = [one for ending, one in members.items() if f".{ending.lower()}" in decoding.SUFFIXES]
    if len(found) != 1:
        what = "no picture" if not found else f"{len(found)} pictures"
        raise ValueError(
            f"{file}: sample {key} has {what}, expected one; its members end in {sorted(members)}"
        )
    return found[0]


def _label(archive: tarfile.TarFile, members: Mapping[str, tarfile.TarInfo], file: str) -> str:
    """The text of a label; empty if there is none."""
    member = members.get("cls") or members.get("json")
    if member is None:
        return ""
    stream = archive.extractfile(member)
    content = b"" if stream is None else stream.read()
    try:
        text = content.decode()
        if "cls" not in members:
            found = json.loads(text)
            label = found.get("label", "") if isinstance(found, dict) else ""
            text = label if isinstance(label, str) else json.dumps(label)
    except ValueError as error:
        raise ValueError(f"{file}: {member.name} cannot be read: {error}") from error
    text = text.strip()
    if "cls" in members and not text:
        raise ValueError(f"{file}: {member.name} is empty")
    if "\0" in text or (text.startswith(("{", "[")) and "cls" not in members):
        raise ValueError(f"{file}: {member.name} holds no number and no name of a class: {text!r}")
    return text
