"""Pictures in tables on disk: what Hugging Face's `datasets` saves, and parquet files.

pyarrow reads them; `datasets` is not needed. Arrow files are mapped into memory, so a picture is
read when it is asked for. Parquet cannot be read row by row, so its two columns are written to an
Arrow file in the user's cache directory once.
"""

import bisect
import functools
import io
import json
import os
import uuid
from collections.abc import Mapping, Sequence
from typing import Any, Unpack

import numpy as np

from jevb_jax import extras
from jevb_jax.images import index_cache
from jevb_jax.images.encoded import EncodedPictures, Reading
from jevb_jax.images.file_patterns import files_of_all
from jevb_jax.images.label_texts import labels_of_texts
from jevb_jax.images.source import ImageSource, checked_labels, local_path
from jevb_jax.runs.files import to_path

_VERSION = 1  # of the Arrow files in the cache


class TableSource(EncodedPictures):
    """Pictures in a column of a table.

    Args:
      paths: one directory that `Dataset.save_to_disk` wrote; or parquet or Arrow files, in this
        order, as names, patterns or ranges.
      image_column: name of the column of pictures: their bytes, or bytes and path as in the feature
        `Image` of `datasets`.
      label_column: name of the column of labels, integers or texts; empty for none.
      like: the training set, so that labels mean the same; None for a set of its own.
      **reading: see `Reading`.

    Raises:
      FileNotFoundError: a file does not exist.
      ModuleNotFoundError: pyarrow is not installed.
      OSError: the cache cannot be written.
      ValueError: a file is damaged or of another kind; a column is missing (the message has those
        that are there) or of a wrong type; a picture is not in the file; labels are wrong. Also for
        the reasons of `FolderSource`.
    """

    def __init__(
        self,
        paths: Sequence[str | os.PathLike[str]],
        *,
        image_column: str = "image",
        label_column: str = "label",
        like: ImageSource | None = None,
        **reading: Unpack[Reading],
    ):
        with extras.explained():
            import pyarrow as pa
        given, features = _files(paths)
        more = f" and {len(given) - 1:,} more" if len(given) > 1 else ""
        super().__init__(f"{given[0]}{more}", **reading)
        self._given = tuple(given)
        columns = [image_column] + ([label_column] if label_column else [])
        # Parquet files are read from their copies.
        self._arrow = tuple(_as_arrow(file, columns) for file in given)
        self._image_column = image_column
        labels: list[Any] = []
        for file, table in zip(given, self._tables, strict=True):
            kind = table.column(image_column).type
            parts = {kind.field(i).name for i in range(kind.num_fields)}
            is_bytes = pa.types.is_binary(kind) or pa.types.is_large_binary(kind)
            if not is_bytes and "bytes" not in parts:
                raise ValueError(
                    f"{file}: column {image_column!r} must hold encoded pictures, got type {kind}"
                )
            labels += table.column(label_column).to_pylist() if label_column else []
            features = features or _features(table.schema.metadata)
        if not len(self):
            raise ValueError(f"{self.name} has no rows")
        names = features.get(label_column, {}).get("names")
        self._labels, self.class_names = self._checked(labels, names, like)
        self._check_opened()

    @property
    def files(self) -> Sequence[str]:
        """The files, not their copies."""
        return self._given

    def __getstate__(self) -> dict[str, Any]:
        """A worker maps the files itself."""
        kept = ("_tables", "_chunks")
        return {name: value for name, value in vars(self).items() if name not in kept}

    @functools.cached_property
    def _tables(self) -> list[Any]:
        return [_opened(file) for file in self._arrow]

    @functools.cached_property
    def _chunks(self) -> tuple[list[Any], list[int]]:
        """The parts of the column of pictures, and the row after the end of each."""
        chunks = [
            chunk for table in self._tables for chunk in table.column(self._image_column).chunks
        ]
        return chunks, np.cumsum([len(chunk) for chunk in chunks]).tolist()

    def __len__(self) -> int:
        ends = self._chunks[1]
        return ends[-1] if ends else 0

    def file(self, index: int) -> io.BytesIO:
        """Bytes of picture `index`."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {self.name}, which has {len(self)}")
        chunks, ends = self._chunks
        number = bisect.bisect_right(ends, index)
        found = chunks[number][index - ends[number] + len(chunks[number])].as_py()
        content = found["bytes"] if isinstance(found, Mapping) else found
        if content is None:
            path = f", only its path {found['path']}" if isinstance(found, Mapping) else ""
            raise ValueError(
                f"cannot read {self.where(index)}: the picture is not in the file{path}"
            )
        return io.BytesIO(content)

    def where(self, index: int) -> str:
        """The name of picture `index` in messages."""
        return f"image {index}, a row of {self.name}"

    def _checked(
        self, labels: list[Any], names: Sequence[str] | None, like: ImageSource | None
    ) -> tuple[np.ndarray | None, tuple[str, ...] | None]:
        """Labels and class names; labels that are all missing, or all -1, are none."""
        if not labels or all(label is None or label == -1 for label in labels):
            return None, None
        known = None if like is None else like.class_names
        if names is None or any(isinstance(label, str) for label in labels):
            texts = ["" if label is None else str(label) for label in labels]
            return labels_of_texts(texts, place=self.where, where=self.name, like=like)
        if known not in (None, tuple(names)):
            raise ValueError(
                f"class_names of {self.name} are {list(names)}, expected {list(known)}"
            )
        missing = next((i for i, label in enumerate(labels) if label is None), None)
        if missing is not None:
            raise ValueError(f"{self.where(missing)}: it has no label, and others have one")
        array = checked_labels(np.asarray(labels), len(labels), tuple(names), where=self.name)
        return array, tuple(names)


def _files(paths: Sequence[str | os.PathLike[str]]) -> tuple[list[str], dict[str, Any]]:
    """The files of a set, and what a directory of `save_to_disk` says about its columns."""
    if len(paths) == 1 and to_path(paths[0]).is_dir():
        root = local_path(paths[0], "tables")
        if not (root / "state.json").is_file():
            parts = sorted(path.parent.name for path in root.glob("*/state.json"))
            advice = f"; give one of its parts: {parts}" if parts else ""
            raise ValueError(
                f"{root} holds no state.json, which Dataset.save_to_disk writes{advice}"
            )
        try:
            state = json.loads((root / "state.json").read_text(encoding="utf-8"))
            files = [str(root / one["filename"]) for one in state["_data_files"]]
            info = root / "dataset_info.json"
            found = json.loads(info.read_text(encoding="utf-8")) if info.is_file() else {}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{root} is damaged: {error!r}") from error
        if state.get("_indices_data_files") or not files:
            raise ValueError(f"{root} has a mapping of rows, or no files; save it anew")
        return files, found.get("features") or {}
    return files_of_all(paths, "hf", "parquet or Arrow files"), {}


def _features(metadata: Mapping[bytes, bytes] | None) -> dict[str, Any]:
    """What `datasets` says about the columns in the metadata of a file."""
    found = (metadata or {}).get(b"huggingface")
    return json.loads(found).get("info", {}).get("features", {}) if found else {}


def _opened(file: str) -> Any:
    """The table of an Arrow file, mapped into memory."""
    import pyarrow as pa

    try:
        source = pa.memory_map(file)
        try:
            return pa.ipc.open_stream(source).read_all()
        except pa.ArrowInvalid:
            return pa.ipc.open_file(source).read_all()
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{file} cannot be read as an Arrow file: {error}") from error


def _check_columns(file: str, columns: Sequence[str], there: Sequence[str]) -> None:
    missing = [name for name in columns if name not in there]
    if missing:
        raise ValueError(
            f"{file} has no column {missing[0]!r}; its columns are {list(there)}. "
            'data.image_column and data.label_column name them ("" = no labels)'
        )


def _as_arrow(file: str, columns: Sequence[str]) -> str:
    """The Arrow file of a file: itself, or the copy of a parquet file in the cache."""
    if not os.path.isfile(file):
        raise FileNotFoundError(f"no file at {file}")
    with open(file, "rb") as stream:
        is_parquet = stream.read(4) == b"PAR1"
    if not is_parquet:
        _check_columns(file, columns, _opened(file).column_names)
        return file
    import pyarrow as pa
    import pyarrow.parquet as pq

    state = os.stat(file)
    try:
        with pq.ParquetFile(file) as table:
            _check_columns(file, columns, table.schema_arrow.names)
            stamp = json.dumps([_VERSION, state.st_size, state.st_mtime_ns, list(columns)])
            name = index_cache.entry_name("table", f"{os.path.abspath(file)}\0{stamp}")
            copy = index_cache.directory() / f"{name}.arrow"
            if copy.is_file():
                return str(copy)
            copy.parent.mkdir(parents=True, exist_ok=True)
            part = copy.with_name(f"{copy.name}.{uuid.uuid4().hex}.part")
            wanted = [table.schema_arrow.field(one) for one in columns]
            schema = pa.schema(wanted, metadata=table.schema_arrow.metadata)
            try:
                with pa.OSFile(str(part), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
                    for batch in table.iter_batches(batch_size=64, columns=list(columns)):
                        writer.write_batch(batch.select(list(columns)))
                os.replace(part, copy)
            finally:
                part.unlink(missing_ok=True)
            return str(copy)
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # the disk, and not the file
            raise
        raise ValueError(f"{file} cannot be read as a parquet file: {error}") from error
