"""What every source of encoded pictures must do, whatever its files are: one test for all of them."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jevb_jax.images import data_record, dataset
from jevb_jax.images.batches import evaluation_batches, load_resident, stream_batches
from jevb_jax.images.crop_boxes import HostCrops
from jevb_jax.images.image_files import FolderSource
from jevb_jax.images.source import Subset
from tests.images.shard_files import write_shard
from tests.images.test_data import encoded, photos, resident_batches, write_folder

__all__ = ["photos"]  # a fixture

LABELS = np.arange(60) % 3
CROPS = HostCrops((0, 7), (16, 8), ((0.2, 1.0),) * 2, (3 / 4, 4 / 3), "bilinear")


def folder(root: Path, images: list[bytes], labels: np.ndarray | None) -> tuple[str, ...]:
    """Sorted by class, so the labels must be, too."""
    for i, image in enumerate(images):
        path = root / ("." if labels is None else f"c{labels[i]}") / f"{i:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image)
    return (str(root),)


def listed(root: Path, images: list[bytes], labels: np.ndarray | None) -> tuple[str, ...]:
    """Files whose names say nothing about their order."""
    root.mkdir()
    lines = []
    for i, image in enumerate(images):
        name = f"{i * 37 % 101:03d}.png"
        (root / name).write_bytes(image)
        lines.append(name if labels is None else f"{name} {labels[i]}")
    (root / "list.txt").write_text("\n".join(lines))
    return (str(root / "list.txt"),)


def webdataset(root: Path, images: list[bytes], labels: np.ndarray | None) -> tuple[str, ...]:
    """Three tar files of different lengths."""
    root.mkdir()
    for shard, rows in enumerate(np.split(np.arange(len(images)), [7, 31])):
        samples = [
            {"__key__": f"sample{i:03d}", "png": images[i]}
            | ({} if labels is None else {"cls": str(labels[i]).encode()})
            for i in rows
        ]
        write_shard(root / f"part-{shard:03d}.tar", samples)
    return (str(root / "part-{000..002}.tar"),)


def table(images: list[bytes], labels: np.ndarray | None, rows: np.ndarray) -> pa.Table:
    """As `datasets` has it: a struct of bytes and path."""
    columns: dict[str, Any] = {"image": [{"bytes": images[i], "path": f"{i}.png"} for i in rows]}
    columns["label"] = [None if labels is None else int(labels[i]) for i in rows]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema = pa.schema([("image", kind), ("label", pa.int64())])
    return pa.table(columns, schema=schema)


def hf(root: Path, images: list[bytes], labels: np.ndarray | None) -> tuple[str, ...]:
    """A directory like that of `save_to_disk`, with several batches of rows in each of its files."""
    root.mkdir()
    names = []
    for number, rows in enumerate(np.split(np.arange(len(images)), [7, 31])):
        names.append({"filename": f"data-{number:05d}-of-00003.arrow"})
        made = table(images, labels, rows)
        with pa.ipc.new_stream(str(root / names[-1]["filename"]), made.schema) as writer:
            writer.write_table(made, max_chunksize=5)
    (root / "state.json").write_text(json.dumps({"_data_files": names}))
    return (str(root),)


def parquet(root: Path, images: list[bytes], labels: np.ndarray | None) -> tuple[str, ...]:
    """Files whose rows stand in groups of nine."""
    root.mkdir()
    for number, rows in enumerate(np.split(np.arange(len(images)), [7, 31])):
        made = table(images, labels, rows)
        pq.write_table(made, root / f"train-{number:05d}-of-00003.parquet", row_group_size=9)
    return (str(root / "train-*.parquet"),)


WRITERS: dict[str, Callable[[Path, list[bytes], np.ndarray | None], tuple[str, ...]]] = {
    "folder": folder,
    "paths": listed,
    "webdataset": webdataset,
    "hf": hf,
    "parquet": parquet,
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("JEVB_JAX_CACHE", str(tmp_path / "cache"))


@pytest.fixture(params=WRITERS)
def kind(request) -> str:
    return request.param


def named(kind: str) -> str:
    """The name of the source in the settings."""
    return "hf" if kind == "parquet" else kind


def written(kind: str, root: Path, images: np.ndarray, labels: np.ndarray | None) -> Any:
    paths = WRITERS[kind](root, [encoded(image) for image in images], labels)
    return dataset.load_images(source=named(kind), paths=paths)


def test_every_picture_is_read_bit_for_bit_and_labels_may_be_missing(kind, tmp_path, photos):
    order = np.argsort(LABELS, kind="stable")
    source = written(kind, tmp_path / "with", photos[order], LABELS[order])
    np.testing.assert_array_equal(load_resident(source), photos[order])
    np.testing.assert_array_equal(source.labels, LABELS[order])
    bare = written(kind, tmp_path / "without", photos, None)
    assert bare.labels is None
    copy = pickle.loads(pickle.dumps(bare))  # as a worker gets it
    np.testing.assert_array_equal(copy[41], photos[41])


def test_a_run_may_begin_at_any_step_and_each_process_reads_its_rows(kind, tmp_path, photos):
    source = written(kind, tmp_path / "x", photos, None)
    expected = resident_batches(photos, 0, 20)
    for start, count in ((0, 20), (13, 7)):
        keywords: Any = {"start_step": start, "num_steps": count, "batch_size": 8, "seed": 11}
        whole = np.stack(list(stream_batches(source, **keywords)))
        np.testing.assert_array_equal(whole, expected[start : start + count])
        shares = [
            np.stack(list(stream_batches(source, **keywords, rows=rows)))
            for rows in (slice(0, 4), slice(4, 8))
        ]
        np.testing.assert_array_equal(np.concatenate(shares, axis=1), whole)


def test_evaluation_visits_every_picture_once_also_by_two_processes(kind, tmp_path, photos):
    source = written(kind, tmp_path / "x", photos, None)
    for batch_size in (7, 64):
        half = batch_size // 2
        parts = []
        for rows in (slice(0, half), slice(half, batch_size)):
            for images, mask in evaluation_batches(source, batch_size, rows=rows):
                parts.append(images[mask[rows]])
        seen = np.concatenate(parts)
        assert len(seen) == 60
        assert len(np.unique(seen.reshape(60, -1), axis=0)) == 60


def test_crops_are_cut_out_of_the_whole_picture_as_from_files(kind, tmp_path, photos):
    source = written(kind, tmp_path / "x", photos, None)
    write_folder(tmp_path / "files", photos, None)
    files = FolderSource(tmp_path / "files")
    for index, one in zip((0, 17, 59), CROPS.of_examples(0, np.arange(3)), strict=True):
        for ours, theirs in zip(source.crops(index, one), files.crops(index, one), strict=True):
            np.testing.assert_array_equal(ours, theirs)
    keywords: Any = {"num_steps": 3, "batch_size": 8, "seed": 11, "crops": CROPS}
    whole = list(stream_batches(source, start_step=4, **keywords))
    for views, again in zip(
        whole[1:], stream_batches(source, start_step=5, **keywords), strict=False
    ):
        for view, other in zip(views, again, strict=True):
            np.testing.assert_array_equal(view, other)


def test_splits_records_and_broken_pictures_are_those_of_a_folder(kind, tmp_path, photos, caplog):
    images = [encoded(image) for image in photos]
    train = WRITERS[kind](tmp_path / "train", images, None)
    broken = WRITERS[kind](
        tmp_path / "broken", [images[0], b"", *images[1:30], images[30][:90]], None
    )
    files = folder(tmp_path / "files", images, None)
    made = dataset.load_dataset(source=named(kind), train_paths=train)
    alike = dataset.load_dataset(source="folder", train_paths=files)
    np.testing.assert_array_equal(load_resident(made.train), load_resident(alike.train))
    np.testing.assert_array_equal(load_resident(made.validation), load_resident(alike.validation))
    before = data_record.fingerprint(made)
    again = dataset.load_dataset(source=named(kind), train_paths=train)
    assert data_record.changes(before, data_record.fingerprint(again)) == []
    left = dataset.load_dataset(source=named(kind), train_paths=broken, skip_broken="skip")
    assert "2 of 32 pictures of" in caplog.text
    assert "cannot read image 1, " in caplog.text
    assert "cannot read image 31, " in caplog.text
    assert isinstance(left.train, Subset)
    whole = np.concatenate([load_resident(left.train), load_resident(left.validation)])
    assert {one.tobytes() for one in whole} == {one.tobytes() for one in photos[:30]}
    assert len(whole) == 30
    assert data_record.changes(before, data_record.fingerprint(left))
    with pytest.raises(ValueError, match="cannot read image 1, "):
        dataset.load_images(source=named(kind), paths=broken, image_size=32)[1]


def test_the_same_files_cannot_be_trained_and_tested_on(kind, tmp_path, photos):
    paths = WRITERS[kind](tmp_path / "x", [encoded(image) for image in photos], LABELS)
    again = (str(tmp_path / "x" / ".." / "x" / Path(paths[0]).name),)
    if kind == "folder":
        again = (str(tmp_path / "x" / "c0"),)
    if kind == "hf":
        again = (str(tmp_path / "x" / "data-00001-of-00003.arrow"),)
    with pytest.raises(ValueError, match="both"):
        dataset.load_dataset(source=named(kind), train_paths=paths, test_paths=again)


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind",
    [
        "folder",
        "webdataset",
        *(pytest.param(kind, marks=pytest.mark.nightly) for kind in ("paths", "hf", "parquet")),
    ],
    indirect=True,
)
def test_worker_processes_read_the_same(kind, tmp_path, photos):
    source = written(kind, tmp_path / "x", photos, None)
    stream = stream_batches(source, start_step=5, num_steps=4, batch_size=8, seed=11, num_workers=2)
    np.testing.assert_array_equal(np.stack(list(stream)), resident_batches(photos, 5, 4))
