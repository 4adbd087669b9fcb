"""Tables of pictures: columns, labels, damage, and the copies of parquet files."""

import io
import json
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from jevb_jax.images import dataset, index_cache
from jevb_jax.images.tables import TableSource

PIXELS = np.random.default_rng(0).integers(0, 256, (12, 6, 6, 3)).astype(np.uint8)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv(index_cache.VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


def png(index: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(PIXELS[index]).save(buffer, "PNG")
    return buffer.getvalue()


def write(path: Path, columns: dict[str, Any], names: list[str] | None = None) -> Path:
    """A parquet or an Arrow file, with the metadata of `datasets` if classes have names."""
    made = pa.table(columns)
    if names is not None:
        features = {"y": {"names": names, "_type": "ClassLabel"}}
        info = json.dumps({"info": {"features": features}}).encode()
        made = made.replace_schema_metadata({b"huggingface": info})
    if path.suffix == ".parquet":
        pq.write_table(made, path)
    else:
        with pa.ipc.new_file(str(path), made.schema) as writer:
            writer.write_table(made)
    return path


PICTURES = [png(i) for i in range(4)]


@pytest.mark.parametrize("ending", ["parquet", "arrow"])
def test_columns_are_named_and_classes_keep_their_names(tmp_path, ending):
    columns = {"id": list("abcd"), "picture": PICTURES, "y": [2, 0, 0, 1]}
    path = write(tmp_path / f"a.{ending}", columns, ["cow", "dog", "elk"])
    source = TableSource([path], image_column="picture", label_column="y")
    np.testing.assert_array_equal(source.labels, [2, 0, 0, 1])
    assert source.class_names == ("cow", "dog", "elk")
    for index in range(4):
        np.testing.assert_array_equal(source[index], PIXELS[index])
    with pytest.raises(IndexError, match="row 4 of"):
        source[4]
    assert TableSource([path], image_column="picture", label_column="").labels is None
    with pytest.raises(
        ValueError, match=r"no column 'image'; its columns are \['id', 'picture', 'y'"
    ):
        TableSource([path])
    with pytest.raises(ValueError, match="no column 'label'; its columns are"):
        TableSource([path], image_column="picture")
    with pytest.raises(ValueError, match="column 'id' must hold encoded pictures, got type string"):
        TableSource([path], image_column="id", label_column="")
    other = write(tmp_path / f"b.{ending}", columns, ["cow", "elk", "dog"])
    with pytest.raises(ValueError, match=r"class_names of .* expected"):
        TableSource([other], image_column="picture", label_column="y", like=source)
    parts = dataset.load_dataset(
        source="hf",
        train_paths=(str(path),),
        image_column="picture",
        validation_fraction=0.5,
        labels="none",  # so the column of labels need not be there
    )
    assert parts.train.labels is None


@pytest.mark.parametrize(
    ("labels", "found", "names"),
    [
        ([5, 0, 3, 3], [5, 0, 3, 3], None),
        ([-1, -1, -1, -1], None, None),
        (["b", "a", "b", "c"], [1, 0, 1, 2], ("a", "b", "c")),
        ([5, None, 3, 3], "1 of 4 pictures have no label, the first is image 1", None),
        ([5, -1, 3, 3], "image 1, .*number of a class, from 0, got '-1'", None),
    ],
)
def test_labels_are_numbers_names_or_none(tmp_path, labels, found, names):
    path = write(tmp_path / "a.parquet", {"image": PICTURES, "label": labels})
    if isinstance(found, str):
        with pytest.raises(ValueError, match=found):
            TableSource([path])
        return
    source = TableSource([path])
    assert (None if source.labels is None else source.labels.tolist()) == found
    assert source.class_names == names


def test_a_directory_is_one_that_was_saved(tmp_path):
    with pytest.raises(ValueError, match=r"holds no state\.json"):
        TableSource([tmp_path])
    part = tmp_path / "train"
    part.mkdir()
    write(part / "data.arrow", {"image": PICTURES, "y": [1, 0, 1, 0]})
    (part / "state.json").write_text('{"_data_files": [{"filename": "data.arrow"}]}')
    features = {"y": {"names": ["no", "yes"], "_type": "ClassLabel"}}
    (part / "dataset_info.json").write_text(json.dumps({"features": features}))
    assert TableSource([part], label_column="y").class_names == ("no", "yes")
    with pytest.raises(ValueError, match=r"give one of its parts: \['train'\]"):
        TableSource([tmp_path])
    (part / "state.json").write_text("{}")
    with pytest.raises(ValueError, match="train is damaged"):
        TableSource([part])


def test_what_is_damaged_or_not_there_is_named(tmp_path, monkeypatch):
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    only_path = pa.array([{"bytes": None, "path": "/a/b.png"}], kind)
    path = write(tmp_path / "a.parquet", {"image": only_path})
    with pytest.raises(
        ValueError, match=r"image 0, .* is not in the file, only its path /a/b\.png"
    ):
        TableSource([path], label_column="")
    empty = write(tmp_path / "empty.parquet", {"image": pa.array([], pa.binary())})
    with pytest.raises(ValueError, match="has no rows"):
        TableSource([empty], label_column="")
    good = write(tmp_path / "good.parquet", {"image": PICTURES}).read_bytes()
    for cut in (0, 3, 4, 50, len(good) // 2, len(good) - 9):
        (tmp_path / "cut.parquet").write_bytes(good[:cut])
        with pytest.raises(ValueError, match=r"cut\.parquet cannot be read as"):
            TableSource([tmp_path / "cut.parquet"], label_column="")
    (tmp_path / "cut.parquet").write_bytes(good[:4] + b"\xff" * 60 + good[64:])
    with pytest.raises(ValueError, match=r"cut\.parquet cannot be read as a parquet file"):
        TableSource([tmp_path / "cut.parquet"], label_column="")
    assert not list(tmp_path.glob("cache/*.part"))
    with pytest.raises(FileNotFoundError, match="no file at"):
        TableSource([tmp_path / "nowhere.parquet"])
    (tmp_path / "file").touch()
    monkeypatch.setenv(index_cache.VARIABLE, str(tmp_path / "file" / "below"))
    with pytest.raises(OSError, match="file"):
        TableSource([tmp_path / "good.parquet"], label_column="")


def test_a_parquet_file_is_copied_once_and_again_after_a_change(tmp_path, cache):
    path = write(tmp_path / "a.parquet", {"image": PICTURES, "big": [bytes(10**6)] * 4})
    source = TableSource([path], label_column="")
    (copy,) = cache.iterdir()
    assert copy.stat().st_size < 10**5  # of the columns that are read
    os.utime(copy, (1, 1))
    again = TableSource([path], label_column="")
    assert copy.stat().st_mtime == 1
    np.testing.assert_array_equal(source[3], again[3])
    assert PICTURES[0] not in pickle.dumps(source)  # a worker maps the file
    os.utime(path, (5, 5))
    TableSource([path], label_column="")
    assert len(list(cache.iterdir())) == 2
    write(path, {"image": PICTURES[::-1], "big": [bytes(10**6)] * 4})
    np.testing.assert_array_equal(TableSource([path], label_column="")[0], PIXELS[3])
