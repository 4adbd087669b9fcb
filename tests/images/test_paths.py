"""Lists of picture files, nested folders, orientation, and pictures that cannot be read."""

import io
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from jevb_jax.images import batches, data_record, dataset, given
from jevb_jax.images.encoded import without_broken
from jevb_jax.images.image_files import FolderSource, PathListSource
from tests.images.shard_files import write_shard

RNG = np.random.default_rng(0)


def place(path: Path, level: int, size: tuple[int, int] = (4, 4)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((*size, 3), level, np.uint8)).save(path)


def levels(source: Any) -> list[int]:
    return [int(image[0, 0, 0]) for image in batches.load_resident(source)]


# --- Lists ---


@pytest.mark.parametrize(
    ("name", "text", "shown", "labels", "names"),
    [
        ("a.txt", "p/1.png\n\np/a b 2.png\n", [1, 2], None, None),
        ("a.txt", "\ufeffp/1.png 3\r\np/a b 2.png\t0\r\n", [1, 2], [3, 0], None),
        ("a.lst", "p/1.png dog\np/a b 2.png big cat.\np/3.png dog", [1, 2, 3], "error", None),
        ("a.lst", "p/1.png dog\np/a b 2.png\tbig cat\np/3.png dog", [1, 2, 3], [1, 0, 1],
         ("big cat", "dog")),
        ("a.CSV", "p/3.png,7\n\"p/a b 2.png\",7\n", [3, 2], [7, 7], None),
        ("a.csv", "p/3.png\np/1.png\n", [3, 1], None, None),
        ("a.csv", "id,Label,path\n9,ü,p/3.png\n8,a,p/1.png\n", [3, 1], [1, 0], ("a", "ü")),
        ("a.csv", "id,path\n9,p/3.png\n8,p/1.png\n", [3, 1], None, None),
    ],
)  # fmt: skip
def test_a_list_names_pictures_and_labels(tmp_path, name, text, shown, labels, names):
    for file, level in (("1", 1), ("a b 2", 2), ("3", 3)):
        place(tmp_path / "p" / f"{file}.png", level)
    (tmp_path / name).write_text(text, encoding="utf-8", newline="")
    if labels == "error":  # "p/a b 2.png big" is no picture of which "cat." would be the label
        with pytest.raises(FileNotFoundError, match=r"1 of the 3 files .* \(line 2\)"):
            PathListSource(tmp_path / name)
        return
    source = PathListSource(tmp_path / name)
    assert levels(source) == shown
    assert (None if source.labels is None else source.labels.tolist()) == labels
    assert source.class_names == names


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", "\n \n", "names no images"),
        ("a.txt", "1.png 0\n1.png\n1.png\n", "2 of 3 pictures have no label, the first is line 2"),
        ("a.txt", "\n1.png 0\n1.png -1\n", "line 3 of .* number of a class, from 0, got '-1'"),
        ("a.txt", "1.png 0\n1.png 12345678901\n", "line 2 of"),
        ("a.csv", "path,x\n1.png,0\n", None),
        ("a.csv", "1.png,0,5\n1.png,1,4\n", "line 1 of .* has 3 columns, expected 1 or 2"),
        ("a.csv", "path,label\n1.png,a\n1.png,\n", "1 of 2 pictures have no label.* line 3"),
    ],
)
def test_a_wrong_list_is_refused_with_its_line(tmp_path, name, text, message):
    place(tmp_path / "1.png", 1)
    (tmp_path / name).write_text(text)
    if message is None:
        assert PathListSource(tmp_path / name).labels is None
        return
    with pytest.raises(ValueError, match=message):
        PathListSource(tmp_path / name)


def test_labels_that_are_ignored_may_be_missing_or_wrong(tmp_path):
    for number in range(6):
        place(tmp_path / f"{number}.png", number)
    picture = (tmp_path / "0.png").read_bytes()
    images = np.zeros((6, 4, 4, 3), np.uint8)
    (tmp_path / "list.txt").write_text("0.png a\n" + "".join(f"{i}.png\n" for i in range(1, 6)))
    tar = [{"__key__": f"k{i}", "png": picture} for i in range(6)]
    write_shard(tmp_path / "cls.tar", [{**tar[0], "cls": b"3"}, *tar[1:]])
    write_shard(tmp_path / "json.tar", [{**tar[0], "json": b"{"}, *tar[1:]])
    np.savez(tmp_path / "a.npz", images=images, labels=np.full(6, 0.5))
    np.savez(tmp_path / "b.npz", images=images)
    np.save(tmp_path / "c.npy", images)
    np.save(tmp_path / "labels.npy", np.zeros(5, np.int64))
    np.savez(tmp_path / "f.npz", features=np.zeros((6, 3)), labels=np.full(6, -1))
    for source, names in (
        ("paths", ["list.txt"]),
        ("webdataset", ["cls.tar"]),
        ("webdataset", ["json.tar"]),
        ("arrays", ["a.npz", "b.npz"]),
        ("arrays", ["c.npy", "labels.npy"]),
        ("features", ["f.npz"]),
    ):
        paths = [str(tmp_path / name) for name in names]
        arguments: Any = {"source": source, "train_paths": paths, "validation_fraction": 0.4}
        found = dataset.load_dataset(labels="none", **arguments)
        assert (found.train.labels, found.train.class_names) == (None, None)
        with pytest.raises((TypeError, ValueError), match=r"label|k0\.json"):
            dataset.load_dataset(**arguments)


def test_lists_of_training_and_test_mean_the_same_classes(tmp_path):
    for number in range(12):
        place(tmp_path / f"{number}.png", number)

    def load(train: str, test: str, **keywords: Any) -> dataset.Dataset:
        (tmp_path / "train.txt").write_text(train)
        (tmp_path / "test.txt").write_text(test)
        paths = {f"{part}_paths": (str(tmp_path / f"{part}.txt"),) for part in ("train", "test")}
        return dataset.load_dataset(source="paths", validation_fraction=0.4, **paths, **keywords)

    named = "".join(f"{i}.png {'abc'[i % 3]}\n" for i in range(10))
    made = load(named, "10.png c\n11.png b\n")
    assert made.test is not None
    np.testing.assert_array_equal(made.test.labels, [2, 1])  # not [1, 0], as alone
    assert made.train.class_names == ("a", "b", "c")
    assert sorted(levels(made.train) + levels(made.validation)) == list(range(10))
    for test, message in (
        ("10.png d\n", r"line 1 of .*test\.txt: class 'd' is not among the known classes"),
        ("10.png\n", "has labels and .*test.txt has none"),
        ("10.png a\n./3.png b\n", r"1 files are both in .*, for example .*3\.png"),
    ):
        with pytest.raises(ValueError, match=message):
            load(named, test)
    numbered = "".join(f"{i}.png {i % 3}\n" for i in range(10))
    with pytest.raises(ValueError, match=r"line 1 of .*number of a class, from 0, got 'a'"):
        load(numbered, "10.png a\n")
    bare = load(numbered, "10.png 1\n", labels="none")
    assert bare.train.labels is None
    assert bare.test is not None
    assert bare.test.labels is None
    with pytest.raises(ValueError, match="takes one text or CSV file in train_paths"):
        dataset.load_dataset(source="paths")
    outside = dataset.load_images(source="paths", paths=(str(tmp_path / "test.txt"),))
    assert levels(outside) == [10]


@pytest.mark.parametrize("prefix", ["~", "file://{home}"])
def test_paths_are_understood_as_everywhere_else(tmp_path, monkeypatch, prefix):
    monkeypatch.setenv("HOME", str(tmp_path))
    place(tmp_path / "set" / "cat" / "1.png", 7)
    place(tmp_path / "set" / "dog" / "2.png", 8)
    (tmp_path / "set" / "a.txt").write_text("cat/1.png 0\ndog/2.png 1\n")
    root = prefix.format(home=tmp_path)
    for source, paths in {
        "folder": [f"{root}/set"],
        "paths": [f"{root}/set/a.txt"],
        "image_list": [f"{root}/set/a.txt", f"{root}/set"],
    }.items():
        found = dataset.load_images(source=source, paths=paths)
        assert levels(found) == [7, 8]
        assert found.name == str(tmp_path / "set" / ("" if source == "folder" else "a.txt"))


def test_a_changed_list_or_file_is_seen(tmp_path):
    for number in range(12):
        place(tmp_path / f"{number}.bmp", number)
    (tmp_path / "a.txt").write_text("".join(f"{i}.bmp\n" for i in range(12)))

    def fingerprint() -> Any:
        made = dataset.load_dataset(source="paths", train_paths=(str(tmp_path / "a.txt"),))
        return data_record.fingerprint(made)

    before = fingerprint()
    assert data_record.changes(before, fingerprint()) == []
    place(tmp_path / "3.bmp", 99)
    assert any("contents" in line for line in data_record.changes(before, fingerprint()))
    (tmp_path / "a.txt").write_text("".join(f"{i}.bmp\n" for i in range(11)))
    assert any("found 11" in line for line in data_record.changes(before, fingerprint()))


# --- Nested folders ---


def test_a_folder_without_classes_may_be_nested_in_any_way(tmp_path):
    for number, name in enumerate(("0", "a/1", "a/2", "a/deep/er/3", "b/4", "c/only/below/5")):
        place(tmp_path / f"{name}.webp", 10 * number)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r'both directly.*data.labels = "none"'):
        FolderSource(tmp_path)
    source = FolderSource(tmp_path, has_classes=False)
    assert source.labels is None
    assert source.class_names is None
    assert sorted(levels(source)) == [0, 10, 20, 30, 40, 50]
    whole = dataset.load_dataset(source="folder", train_paths=(str(tmp_path),), labels="none")
    assert len(whole.train) + len(whole.validation) == 6
    assert whole.test is None


# --- Orientation ---


def test_orientation_is_applied_or_ignored_by_every_reader(tmp_path):
    pixels = RNG.integers(0, 256, (6, 9, 3)).astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn it by 90 degrees to the right
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    (tmp_path / "a.txt").write_text("a.png\n")
    turned = pixels.swapaxes(0, 1)[:, ::-1]
    with Image.open(tmp_path / "a.png") as picture:
        for how, expected in (("apply", turned), ("ignore", pixels)):
            keywords: Any = {"exif": how}
            for source in (
                FolderSource(tmp_path, **keywords),
                PathListSource(tmp_path / "a.txt", **keywords),
                dataset.load_images(source="folder", paths=(str(tmp_path),), **keywords),
            ):
                np.testing.assert_array_equal(source[0], expected)
            users = given.check_images(picture, num_channels=3, square_size=0, **keywords)
            np.testing.assert_array_equal(users.stacks[0][0], expected)
    np.testing.assert_array_equal(FolderSource(tmp_path)[0], turned)  # what runs always did
    for name in ("train", "test"):
        for number in range(3):
            (tmp_path / name / str(number)).mkdir(parents=True)
            Image.fromarray(pixels).save(tmp_path / name / str(number) / "a.png", exif=exif)
    made = dataset.load_dataset(
        source="folder",
        train_paths=(str(tmp_path / "train"),),
        test_paths=(str(tmp_path / "test"),),
        validation_fraction=0.3,
        exif="ignore",
    )
    for part in made[:3]:
        assert part is not None
        np.testing.assert_array_equal(part[0], pixels)
    # Sizes are those of the pictures as they are read.
    Image.fromarray(pixels).save(tmp_path / "test" / "0" / "b.png")
    assert len(FolderSource(tmp_path / "test", exif="ignore")) == 4
    with pytest.raises(ValueError, match=r"6x9 .* is 9x6; set image_size"):
        FolderSource(tmp_path / "test")


# --- Pictures that fail ---


def jpeg(pixels: np.ndarray, mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def test_hard_pictures_are_read_and_broken_ones_are_named(tmp_path):
    noise = RNG.integers(0, 256, (40, 60, 3)).astype(np.uint8)
    whole = jpeg(noise)
    Image.fromarray(noise).quantize(8).save(tmp_path / "1_palette.gif")
    (tmp_path / "2_cmyk.jpg").write_bytes(jpeg(noise, "CMYK"))
    Image.fromarray(noise[:, :1]).save(tmp_path / "3_narrow.tiff")
    Image.fromarray(np.tile(noise, (1, 334, 1))[:2, :20_000]).save(tmp_path / "4_wide.bmp")
    (tmp_path / "5_truncated.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "6_empty.png").write_bytes(b"")
    (tmp_path / "7_text.webp").write_bytes(b"<html>not found</html>")
    source = FolderSource(tmp_path, image_size=8)
    for index in range(4):
        assert source[index].shape == (8, 8, 3)
    # CMYK means its colors, up to the compression: not their negative.
    correlation = np.corrcoef(
        FolderSource(tmp_path, image_size=40)[1].ravel().astype(float),
        noise[:, 10:50].ravel().astype(float),
    )[0, 1]
    assert correlation > 0.5
    for index, name in enumerate(("5_truncated.jpg", "6_empty.png", "7_text.webp"), start=4):
        with pytest.raises(ValueError, match=f"cannot read image {index}, .*{name}"):
            source[index]


def test_broken_pictures_are_left_out_and_told(tmp_path, caplog):
    for number in range(30):
        place(tmp_path / "all" / f"{number:02d}.png", number)
        if number % 5 != 2:
            place(tmp_path / "good" / f"{number:02d}.png", number)
    for number in range(2, 30, 5):
        (tmp_path / "all" / f"{number:02d}.png").write_bytes(b"")
    good = dataset.load_dataset(source="folder", train_paths=(str(tmp_path / "good"),))
    for size in (0, 4):
        caplog.clear()
        found = dataset.load_dataset(
            source="folder",
            train_paths=(str(tmp_path / "all"),),
            image_size=size,
            skip_broken="skip",
        )
        assert "6 of 30 pictures of" in caplog.text
        assert [f"{n:02d}.png" in caplog.text for n in (2, 7, 12, 17, 22, 27)] == [True] * 5 + [
            False
        ]
        # The same parts, and the same batches, as of a folder that never had them.
        assert levels(found.train) == levels(good.train)
        assert levels(found.validation) == levels(good.validation)
        streams = [
            list(
                batches.stream_batches(made.train, start_step=3, num_steps=6, batch_size=4, seed=5)
            )
            for made in (found, good)
        ]
        np.testing.assert_array_equal(streams[0], streams[1])
    # A picture that breaks later is another set: a resumed run is refused.
    before = data_record.fingerprint(found)
    (tmp_path / "all" / "03.png").write_bytes(b"")
    again = dataset.load_dataset(
        source="folder", train_paths=(str(tmp_path / "all"),), skip_broken="skip"
    )
    assert data_record.changes(before, data_record.fingerprint(again))


def test_what_is_left_must_be_a_set(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    place(tmp_path / "1.png", 1)
    source = FolderSource(tmp_path, skip_broken=True)
    assert without_broken(source) is source
    assert not caplog.text
    place(tmp_path / "2.png", 2, size=(4, 5))
    (tmp_path / "0.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"1\.png is 4x4 and image 2, .*2\.png is 5x4"):
        without_broken(FolderSource(tmp_path, skip_broken=True))
    for name in ("1.png", "2.png"):
        (tmp_path / name).write_bytes(b"no")
    with pytest.raises(ValueError, match=r"(?s)3 of 3 pictures .*cannot read image 0, .*0\.png"):
        without_broken(FolderSource(tmp_path, image_size=4, skip_broken=True))
