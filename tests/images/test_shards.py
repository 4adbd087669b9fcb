"""Tar files of the WebDataset format: what is in them, what is wrong with them, and their index."""

import gzip
import io
import logging
import os
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from jevb_jax.images import dataset, index_cache, shards
from jevb_jax.images.shards import ShardSource
from tests.images.shard_files import write_shard

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (12, 6, 6, 3)).astype(np.uint8)


def png(index: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(PIXELS[index]).save(buffer, "PNG")
    return buffer.getvalue()


def samples(count: int = 4, **more: Any) -> list[dict[str, Any]]:
    return [{"__key__": f"k{i}", "png": png(i), **more} for i in range(count)]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv(index_cache.VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


def age(path: Path, seconds: float = 100.0) -> None:
    """Makes a file older, so that its index is kept."""
    changed = path.stat().st_mtime_ns - int(seconds * 1e9)
    os.utime(path, ns=(changed, changed))


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_of_every_kind_of_tar_file(tmp_path, form):
    long = (
        "deep/" * 15 + "n" * 60 if form == tarfile.USTAR_FORMAT else "deep/" * 30 + "n\u00e9" * 90
    )
    made: list[dict[str, Any]] = [
        {"__key__": long, "txt": b"a caption", "png": png(0), "cls": b" 3\n"},
        {"__key__": "b/x", "cls": b"0", "PNG": png(1), "seg.png": png(5)},
        {"__key__": ".hidden", "png": png(2)},
        {"__key__": "a/x", "png": png(3), "json": b'{"label": 9}', "cls": b"2"},
    ]
    write_shard(tmp_path / "a.tar", made, form)
    source = ShardSource([tmp_path / "a.tar"])
    for index, image in enumerate((0, 1, 3)):
        np.testing.assert_array_equal(source[index], PIXELS[image])
    np.testing.assert_array_equal(source.labels, [3, 0, 2])
    assert source.names == (long, "b/x", "a/x")
    assert f"image 1, b/x in {tmp_path}" in source.where(1)
    with pytest.raises(IndexError, match="record 3"):
        source[3]


def test_labels_are_numbers_or_names(tmp_path):
    def source(name: str, entries: list[dict[str, bytes]], like: Any = None) -> ShardSource:
        made = [{"__key__": f"k{i}", "png": png(i), **one} for i, one in enumerate(entries)]
        write_shard(tmp_path / name, made)
        return ShardSource([tmp_path / name], like=like)

    numbered = source("a.tar", [{"json": b'{"label": 2, "id": "x"}'}, {"json": b'{"label": 0}'}])
    np.testing.assert_array_equal(numbered.labels, [2, 0])
    named = source("b.tar", [{"cls": b"dog"}, {"json": b'{"label": "big cat"}'}])
    assert named.class_names == ("big cat", "dog")
    np.testing.assert_array_equal(source("c.tar", [{"cls": b"dog"}], named).labels, [1])
    assert source("d.tar", [{"json": b'{"caption": "x"}'}, {"json": b"[1, 2]"}]).labels is None
    for entries, like, message in (
        ([{"cls": b"cow"}], named, r"image 0, k0 in .*: class 'cow' is not among"),
        ([{"cls": b"1"}, {}], None, r"1 of 2 pictures have no label, the first is image 1, k1 in"),
        ([{"cls": b"dog"}], numbered, r"image 0, k0 in .*number of a class, from 0, got 'dog'"),
        ([{"cls": b""}], None, r"k0\.cls is empty"),
        ([{"cls": b"\xff\xfe"}], None, r"k0\.cls cannot be read"),
        ([{"json": b"{"}], None, r"k0\.json cannot be read"),
        ([{"json": b'{"label": [1, 0]}'}], None, r"k0\.json holds no number and no name"),
    ):
        with pytest.raises(ValueError, match=message):
            source("e.tar", entries, like)


def test_a_damaged_tar_file_is_refused_wherever_it_is_damaged(tmp_path):
    write_shard(tmp_path / "good.tar", samples(cls=b"1"))
    whole = (tmp_path / "good.tar").read_bytes()
    end = len(whole.rstrip(b"\0")) // 512 * 512 + 512
    path = tmp_path / "x.tar"
    with tarfile.open(tmp_path / "good.tar") as archive:
        starts = [member.offset for member in archive]
    for cut in [0, 100, *range(511, end, 300), end, end + 511]:  # a zero block is the end
        path.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match=r"x\.tar"):
            ShardSource([path])
    path.write_bytes(whole[: starts[-2] + 600])
    with pytest.raises(ValueError, match=r"x\.tar is truncated: k3\.png ends at byte"):
        ShardSource([path])
    path.write_bytes(whole[: end + 512])
    assert len(ShardSource([path])) == 4
    for start in starts:
        wrong = bytearray(whole)
        wrong[start + 100 : start + 160] = bytes(60)
        path.write_bytes(wrong)
        with pytest.raises(ValueError, match=r"x\.tar (cannot be read as a tar|is damaged after)"):
            ShardSource([path])
    for content, message in (
        (gzip.compress(whole), r"x\.tar cannot be read as a tar file.*must be unpacked first"),
        (whole + whole, r"x\.tar is damaged after byte .*joined by `cat`"),
        (b"no tar file" * 100, r"x\.tar cannot be read"),
        (bytes(10_240), r"x\.tar holds no samples"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            ShardSource([path])


@pytest.mark.parametrize(
    ("made", "message"),
    [
        ([{"__key__": "a", "cls": b"1"}], r"sample a has no picture.*end in \['cls'\]"),
        ([{"__key__": "a", "png": b"", "jpg": b""}], "sample a has 2 pictures"),
        ([*samples(2), *samples(1)], "sample k0 do not stand together"),
        ([*samples(2), *samples(2)[1:]], r"holds k1\.png twice"),
    ],
)
def test_samples_that_are_not_whole_are_named(tmp_path, made, message):
    write_shard(tmp_path / "x.tar", made)
    with pytest.raises(ValueError, match=message) as caught:
        ShardSource([tmp_path / "x.tar"])
    assert "x.tar" in str(caught.value)


def test_files_are_named_one_by_one_by_pattern_or_by_range(tmp_path):
    for number in (8, 9, 10):
        write_shard(tmp_path / f"s-{number:02d}.tar", [{"__key__": "k", "png": png(number)}])

    def shown(*paths: str) -> list[int]:
        source = ShardSource([str(tmp_path / path) for path in paths])
        images = [source[i] for i in range(len(source))]
        return [next(n for n in range(12) if (PIXELS[n] == one).all()) for one in images]

    assert shown("s-*.tar") == [8, 9, 10]
    assert shown("s-{08..10}.tar") == [8, 9, 10]
    assert shown("s-10.tar", "s-08.tar") == [10, 8]
    for paths, error, message in (
        (("s-{08..11}.tar",), FileNotFoundError, r"no file at .*s-11\.tar"),
        (("t-*.tar",), FileNotFoundError, "no file at"),
        (("s-{9..8}.tar",), ValueError, "empty range"),
        (("s-*.tar", "s-09.tar"), ValueError, r"repeated: .*s-09\.tar"),
        ((), ValueError, "got none"),
    ):
        with pytest.raises(error, match=message):
            shown(*paths)
    with pytest.raises(ValueError, match="1 files are both in"):
        dataset.load_dataset(
            source="webdataset",
            train_paths=(str(tmp_path / "s-{08..09}.tar"),),
            test_paths=(str(tmp_path / "s-09.*"),),
        )


# --- The index ---


def test_an_index_is_made_once_and_again_after_a_change(tmp_path, cache, monkeypatch, caplog):
    path = tmp_path / "x.tar"
    made: list[str] = []
    read = shards._read_index
    monkeypatch.setattr(
        shards,
        "_read_index",
        lambda file, size, **keywords: made.append(file) or read(file, size, **keywords),
    )
    write_shard(path, samples(cls="ü".encode()))
    assert len(ShardSource([path])) == 4
    assert not cache.exists()  # it may change again before the clock ticks
    age(path)
    first = ShardSource([path])
    again = ShardSource([path])
    assert len(made) == 2
    assert (again.names, again.class_names) == (first.names, ("ü",))
    np.testing.assert_array_equal(again[3], PIXELS[3])
    write_shard(path, samples(5, cls=b"a"))
    age(path, 50)
    assert len(ShardSource([path])) == 5
    assert len(made) == 3
    age(path, 7)  # of the same size
    ShardSource([path])
    assert len(made) == 4
    assert not caplog.text
    entry = next(cache.iterdir())
    for content in (b"", entry.read_bytes()[:300], b"no archive"):
        entry.write_bytes(content)
        assert len(ShardSource([path])) == 5
        assert "is damaged and is made anew" in caplog.text
        caplog.clear()
    assert len(made) == 7
    ShardSource([path])
    assert len(made) == 7


def test_without_a_place_for_the_index_everything_works(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.WARNING)
    write_shard(tmp_path / "x.tar", samples())
    age(tmp_path / "x.tar")
    (tmp_path / "file").touch()
    monkeypatch.setenv(index_cache.VARIABLE, str(tmp_path / "file" / "below"))
    assert len(ShardSource([tmp_path / "x.tar"])) == 4
    assert "cannot be kept" in caplog.text
    monkeypatch.delenv(index_cache.VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert len(ShardSource([tmp_path / "x.tar"])) == 4
    assert [path.parent for path in tmp_path.rglob("tar_*.npz")] == [tmp_path / "xdg" / "jevb_jax"]


def test_a_file_that_shrinks_after_its_index_was_made_is_named(tmp_path):
    path = tmp_path / "x.tar"
    write_shard(path, samples())
    source = ShardSource([path])
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(ValueError, match=r"cannot read image 2, k2 in .*changed since its index"):
        source[2]
    path.unlink()
    with pytest.raises(ValueError, match="cannot read image 0, k0 in"):
        source[0]
