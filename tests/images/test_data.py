"""Sources, splits and order: against scikit-learn, Pillow, NumPy, and TFDS's own writer."""

import importlib
import io
import json
import pickle
import re
import subprocess
import sys
import textwrap
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_digits, load_sample_image

from jevb_jax.images import arrays, batch_order, dataset
from jevb_jax.images import shapes as shapes_module
from jevb_jax.images.batches import (
    evaluation_batches,
    fits_resident,
    gather,
    load_resident,
    stream_batches,
)
from jevb_jax.images.crop_boxes import HostCrops
from jevb_jax.images.image_files import FolderSource, ImageListSource
from jevb_jax.images.shapes import ShapesSource, _draw_shapes, _shape_masks
from jevb_jax.images.source import ArraySource, ImageSource, Subset, image_shape, num_classes
from jevb_jax.images.tfds import TfdsSource, os

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def photos() -> np.ndarray:
    """60 different 32x32 pieces of two real photographs, uint8 `[60, 32, 32, 3]`."""
    pieces = []
    for name in ("china.jpg", "flower.jpg"):
        photo = load_sample_image(name)
        rows = photo[: 32 * 13, : 32 * 20].reshape(13, 32, 20, 32, 3).swapaxes(1, 2)
        pieces.append(rows.reshape(-1, 32, 32, 3)[::8][:30])
    images = np.concatenate(pieces)
    assert len(np.unique(images.reshape(60, -1), axis=0)) == 60
    return images


def encoded(image: np.ndarray, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image.squeeze()).save(buffer, kind)
    return buffer.getvalue()


def write_folder(root: Path, images: np.ndarray, labels: np.ndarray | None) -> None:
    """Image i as PNG `root/c<label>/<i>.png`, or `root/<i>.png` without labels."""
    for i, image in enumerate(images):
        folder = root if labels is None else root / f"c{labels[i]}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{i:03d}.png").write_bytes(encoded(image))


def as_array_source(source: ImageSource) -> np.ndarray:
    return np.stack([source[i] for i in range(len(source))])


# --- Sources in memory ---


def test_digits_are_scikit_learns():
    bunch = load_digits(return_X_y=True)
    source = arrays.digits()
    assert len(source) == 1797
    assert image_shape(source) == (8, 8, 1)
    assert num_classes(source) == 10
    np.testing.assert_array_equal(source.labels, bunch[1])
    # Half a level of rounding of 255/16 levels each.
    assert np.abs(source.images.reshape(1797, 64) - bunch[0] * 255 / 16).max() <= 0.5
    assert (source.images.min(), source.images.max()) == (0, 255)


def test_array_source_reads_by_index():
    images = np.arange(2 * 3 * 4 * 1, dtype=np.uint8).reshape(2, 3, 4, 1)
    source = ArraySource(images, np.array([1, 0], np.uint8), ("a", "b", "c"))
    assert source.labels is not None
    assert source.labels.dtype == np.int64
    assert num_classes(source) == 3
    np.testing.assert_array_equal(source[1], images[1])


@pytest.mark.parametrize(
    ("images", "labels", "names", "error", "message"),
    [
        (np.zeros((2, 4, 4, 3), np.float32), None, None, TypeError, "uint8 images, got float32"),
        (np.zeros((2, 4, 4), np.uint8), None, None, ValueError, "add a channel axis"),
        (np.zeros((2, 4), np.uint8), None, None, ValueError, r"\[N, H, W, C\], got \(2, 4\)"),
        (np.zeros((0, 4, 4, 3), np.uint8), None, None, ValueError, "no images"),
        (np.zeros((32, 40, 3), np.uint8), None, None, ValueError, r"one image.*images\[None\]"),
        (np.zeros((2, 3, 16, 16), np.uint8), None, None, ValueError, "moveaxis.images, 1, -1"),
        (np.zeros((2, 1, 28, 20), np.uint8), None, None, ValueError, "channels first"),
        (np.zeros((2, 4, 5, 5), np.uint8), None, None, ValueError, "channels first"),
        (np.zeros((2, 4, 4, 3), np.uint8), np.eye(3)[:2], None, TypeError, "argmax"),
        (np.zeros((2, 4, 4, 3), np.uint8), [[0], [1]], None, ValueError, "labels.ravel()"),
        (np.zeros((2, 4, 4, 3), np.uint8), [0.0, 1.0], None, TypeError, "integer labels"),
        (np.zeros((2, 4, 4, 3), np.uint8), [0], None, ValueError, "each of the 2 examples"),
        (np.zeros((2, 4, 4, 3), np.uint8), [[0, 1]], None, ValueError, "each of the 2 examples"),
        (np.zeros((2, 4, 4, 3), np.uint8), [0, -1], None, ValueError, "-1 at index 1 is out of"),
        (
            np.zeros((2, 4, 4, 3), np.uint8),
            [2, 0],
            ("a", "b"),
            ValueError,
            r"2 at index 0 .*\[0, 2",
        ),
    ],
)
def test_array_source_refuses(images, labels, names, error, message):
    labels = None if labels is None else np.asarray(labels)
    with pytest.raises(error, match=message):
        ArraySource(images, labels, names, name="mine")


def test_subset_and_its_errors():
    images = np.arange(5, dtype=np.uint8)[:, None, None, None]
    source = ArraySource(images, np.array([0, 1, 2, 3, 4]))
    subset = Subset(Subset(source, np.array([4, 2, 0])), np.array([2, 0]))
    assert [int(subset[i].squeeze()) for i in range(2)] == [0, 4]
    np.testing.assert_array_equal(subset.labels, [0, 4])
    np.testing.assert_array_equal(gather(subset, np.array([1, 0])).squeeze(), [4, 0])
    # The subset lacks classes, but they are still classes.
    assert num_classes(Subset(source, np.array([0]))) == 5
    for indices, error in [
        ([5], ValueError),
        ([-1], ValueError),
        ([], TypeError),
        ([0.0], TypeError),
    ]:
        with pytest.raises(error, match="expected"):
            Subset(source, np.asarray(indices))
        with pytest.raises(error, match="expected"):
            gather(source, np.asarray(indices))
    with pytest.raises(ValueError, match=r"\[M\], M >= 1"):
        Subset(source, np.zeros((0,), np.int64))
    with pytest.raises(ValueError, match="no labels"):
        num_classes(ArraySource(images))


# --- npz files ---


def save(path: Path, **entries: object) -> Path:
    np.savez(path, **entries)  # pyright: ignore[reportArgumentType]
    return path


def test_arrays_reads_and_concatenates(tmp_path, photos):
    labels = np.arange(60) % 3
    names = np.array(["x", "y", "z"])
    first = save(tmp_path / "a.npz", images=photos[:40], labels=labels[:40], class_names=names)
    second = tmp_path / "b.npz"
    np.savez_compressed(
        second, images=photos[40:], labels=labels[40:].astype(np.uint8), class_names=names, other=1
    )
    source = arrays.arrays([first, str(second)])
    np.testing.assert_array_equal(source.images, photos)
    np.testing.assert_array_equal(source.labels, labels)
    assert source.class_names == ("x", "y", "z")
    assert "a.npz" in source.name
    assert "b.npz" in source.name
    np.testing.assert_array_equal(arrays.arrays(first).images, photos[:40])
    assert arrays.arrays(save(tmp_path / "c.npz", images=photos)).labels is None


def test_npy_images_take_the_labels_that_follow_them(tmp_path, photos):
    labels = np.arange(60) % 3
    for name, array in (("a", photos[:40]), ("a_labels", labels[:40]), ("b", photos[40:])):
        np.save(tmp_path / f"{name}.npy", array)
    np.save(tmp_path / "b_labels.npy", labels[40:].astype(np.uint8))
    paths = [tmp_path / f"{name}.npy" for name in ("a", "a_labels", "b", "b_labels")]
    source = arrays.arrays(paths)
    np.testing.assert_array_equal(source.images, photos)
    np.testing.assert_array_equal(source.labels, labels)
    assert all(path.name in source.name for path in paths)
    assert arrays.arrays(paths[0]).labels is None
    mixed = arrays.arrays([save(tmp_path / "c.npz", images=photos, labels=labels), *paths[2:]])
    np.testing.assert_array_equal(mixed.labels, np.concatenate([labels, labels[40:]]))
    with pytest.raises(ValueError, match=r"a\.npy has none; give labels to both"):
        arrays.arrays([*paths[2:], paths[0]])


@pytest.mark.parametrize("order", [["labels"], ["npz", "labels"], ["images", "labels", "other"]])
def test_npy_labels_without_their_images_are_refused(tmp_path, photos, order):
    for name in ("labels", "other"):
        np.save(tmp_path / f"{name}.npy", np.zeros(60, np.int64))
    np.save(tmp_path / "images.npy", photos)
    save(tmp_path / "npz.npz", images=photos)
    paths = [tmp_path / f"{name}.{'npz' if name == 'npz' else 'npy'}" for name in order]
    with pytest.raises(ValueError, match=rf"{order[-1]}\.npy holds labels, but no \.npy file"):
        arrays.arrays(paths)


def test_one_file_of_labels_serves_several_files_of_images(tmp_path, photos):
    for name, array in (("fog", photos[:30]), ("snow", photos[30:]), ("y", np.arange(30))):
        np.save(tmp_path / f"{name}.npy", array)
    fog, snow, y = (tmp_path / f"{name}.npy" for name in ("fog", "snow", "y"))
    found = arrays.arrays([fog, y, snow, y])
    np.testing.assert_array_equal(found.labels, [*range(30), *range(30)])
    with pytest.raises(ValueError, match=r"are repeated: .*fog\.npy"):
        arrays.arrays([fog, y, fog, y])


@pytest.mark.parametrize("shape", [(60, 1), (60, 10)])
def test_npy_labels_of_two_axes_are_wrong_labels_and_no_images(tmp_path, photos, shape):
    np.save(tmp_path / "x.npy", photos)
    np.save(tmp_path / "y.npy", np.zeros(shape, np.int64))
    with pytest.raises(ValueError, match="label"):
        arrays.arrays([tmp_path / "x.npy", tmp_path / "y.npy"])


def test_a_damaged_header_is_named_whatever_is_wrong_with_it(tmp_path):
    """Two random bytes of the header of an array, alone and in an archive."""
    good = io.BytesIO()
    np.save(good, np.zeros((3, 8, 8, 3), np.uint8))
    whole, generator = good.getvalue(), np.random.default_rng(0)
    path = tmp_path / "x.npy"
    messages = []
    for _ in range(600):
        content = bytearray(whole)
        for place in generator.integers(10, 128, 2):
            content[place] = generator.integers(0, 256)
        path.write_bytes(content)
        try:
            arrays.arrays(path)
        except (ValueError, TypeError) as error:
            messages.append(str(error))
    assert len(messages) > 300
    assert all("x.npy" in message for message in messages)
    for shape in ("(True, 8, 8, 3)", "(3., 8, 8, 3)", "(3, 8, 8, 3"):
        header = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}".encode()
        header += b" " * (117 - len(header)) + b"\n"
        path.write_bytes(b"\x93NUMPY\x01\x00\x76\x00" + header + bytes(600))
        with pytest.raises(ValueError, match=r"x\.npy cannot be read as an \.npy file"):
            arrays.arrays(path)


def test_npy_files_that_are_wrong_are_named(tmp_path, photos):
    whole = tmp_path / "whole.npy"
    np.save(whole, photos)
    content = whole.read_bytes()
    objects = tmp_path / "objects.npy"
    np.save(objects, np.array([{}, {}], object), allow_pickle=True)
    floats = tmp_path / "floats.npy"
    np.save(floats, photos / 255)
    (tmp_path / "cut.npy").write_bytes(content[:-7])
    (tmp_path / "header.npy").write_bytes(content[:20])
    for name, error, message in (
        (
            "cut",
            ValueError,
            r"cut\.npy cannot be read as an \.npy file: it claims .* bytes, but holds",
        ),
        ("header", ValueError, r"header\.npy cannot be read as an \.npy file"),
        ("objects", ValueError, r"objects\.npy cannot be read as an \.npy file"),
        ("floats", TypeError, r"floats\.npy.*got float64"),
    ):
        with pytest.raises(error, match=message):
            arrays.arrays(tmp_path / f"{name}.npy")


def test_rows_are_those_from_the_first_to_before_the_last(tmp_path, photos):
    np.save(tmp_path / "x.npy", photos)
    np.save(tmp_path / "y.npy", np.arange(60))
    paths = (str(tmp_path / "x.npy"), str(tmp_path / "y.npy"))
    found = dataset.load_images(source="arrays", paths=paths, rows=(20, 40))
    np.testing.assert_array_equal(found.labels, np.arange(20, 40))
    np.testing.assert_array_equal(np.stack([found[i] for i in range(len(found))]), photos[20:40])
    for rows in ((0, 61), (5, 5), (9, 3), (3,), (1, 2, 3)):
        with pytest.raises(ValueError, match="rows must be a first row"):
            dataset.load_images(source="arrays", paths=paths, rows=rows)


def test_arrays_names_the_file_that_is_wrong(tmp_path):
    images = np.random.default_rng(0).integers(1, 256, (4, 8, 8, 3), np.uint8)
    labels = np.zeros(4, np.int64)
    good = save(tmp_path / "good.npz", images=images, labels=labels)
    whole = good.read_bytes()
    cases = {
        "missing": ({"pixels": images}, ValueError, r"no entry `images`.*\['pixels'\]"),
        "dtype": ({"images": images.astype(np.int32)}, TypeError, "got int32"),
        "rank": ({"images": images[..., 0]}, ValueError, "channel axis"),
        "empty": ({"images": images[:0], "labels": labels[:0]}, ValueError, "no images"),
        "negative": ({"images": images, "labels": labels - 1}, ValueError, "out of range"),
        "length": ({"images": images, "labels": labels[:3]}, ValueError, "each of the 4"),
        "range": (
            {"images": images, "labels": labels + 1, "class_names": ["a"]},
            ValueError,
            "out of",
        ),
        "float": ({"images": images, "labels": labels / 2}, TypeError, "integer labels"),
        "object": ({"images": np.array([{}], object)}, ValueError, "cannot be read"),
        "size": ({"images": images[:, :4], "labels": labels}, ValueError, "must have one size"),
        "unlabeled": ({"images": images}, ValueError, "has none"),
        "names": (
            {"images": images, "labels": labels, "class_names": ["a"]},
            ValueError,
            "class_names",
        ),
    }
    for name, (entries, error, message) in cases.items():
        path = save(tmp_path / f"{name}.npz", **entries)
        with pytest.raises(error, match=message) as caught:
            arrays.arrays([good, path])
        assert str(path) in str(caught.value)
    broken = {
        "text": b"these are not arrays",
        "truncated": whole[: len(whole) // 2],
        "damaged": whole[:200] + bytes(50) + whole[250:],
        "nothing": b"",
    }
    for name, content in broken.items():
        path = tmp_path / f"{name}.npz"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"cannot be read as an \.npz") as caught:
            arrays.arrays([path])
        assert str(path) in str(caught.value)
    with pytest.raises(ValueError, match=r"are repeated: .*good\.npz"):
        arrays.arrays([good, tmp_path / "." / "good.npz"])
    with pytest.raises(FileNotFoundError, match=r"nowhere\.npz"):
        arrays.arrays(tmp_path / "nowhere.npz")
    with pytest.raises(ValueError, match="at least one"):
        arrays.arrays([])


@pytest.mark.parametrize("shapes", [(1, 2, 4), (4, 1, 2, 7, 1)])
def test_images_of_rare_shapes_are_no_mistakes(shapes):
    """Rows of few channels, few pixels, many channels beside few: none has its channels first."""
    for channels in (1, 2, 3, 4, 9, 13, 224):
        for height in shapes:
            images = np.zeros((2, height + 5 * (channels > 15), 40, channels), np.uint8)
            assert len(ArraySource(images)) == 2


def npz_that_claims(
    path: Path, shape: tuple[int, ...], *, packed: bool, dtype: str = "|u1"
) -> None:
    """A file of a few bytes, of which a header says what it likes."""
    header = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}".encode()
    header += b" " * (117 - len(header)) + b"\n"
    kind = zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED
    with zipfile.ZipFile(path, "w", kind) as file:
        file.writestr("images.npy", b"\x93NUMPY\x01\x00\x76\x00" + header + bytes(300))


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("count", [200, 10**5, 10**8, 10**15])
def test_an_array_that_claims_more_than_it_holds_takes_no_memory(tmp_path, packed, count):
    npz_that_claims(tmp_path / "x.npz", (count, 16, 16, 3), packed=packed)
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"x\.npz.*`images` claims .* bytes.*holds"):
        arrays.arrays(tmp_path / "x.npz")
    assert tracemalloc.get_traced_memory()[1] < 5e6
    tracemalloc.stop()
    # And a directory of the file that lies as well: the entry cannot be so large.
    content = bytearray((tmp_path / "x.npz").read_bytes())
    place = content.rfind(b"PK\x01\x02")
    content[place + 24 : place + 28] = (2**32 - 2).to_bytes(4, "little")
    (tmp_path / "x.npz").write_bytes(bytes(content))
    with pytest.raises(ValueError, match=r"x\.npz"):
        arrays.arrays(tmp_path / "x.npz")


def test_images_that_do_not_fit_are_told_before_they_are_read(tmp_path, monkeypatch):
    images = np.zeros((4, 8, 8, 3), np.uint8)
    save(tmp_path / "x.npz", images=images)
    monkeypatch.setattr(os, "sysconf", lambda name: 10)
    with pytest.raises(ValueError, match=r"no memory for the arrays of .*x\.npz.*768 bytes of 100"):
        arrays.arrays(tmp_path / "x.npz")
    monkeypatch.undo()
    # Another type needs up to eight times the memory: it is refused by the header.
    save(tmp_path / "y.npz", images=np.zeros((4, 600, 600, 3)))
    tracemalloc.start()
    with pytest.raises(TypeError, match=r"y\.npz: expected uint8 images, got float64"):
        arrays.arrays(tmp_path / "y.npz")
    assert tracemalloc.get_traced_memory()[1] < 5e6
    tracemalloc.stop()


# --- Folders ---


def triangle_resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Antialiased bilinear resampling in float64, straight from its definition."""

    def weights(size_in: int, size_out: int) -> np.ndarray:
        scale = size_in / size_out
        center = (np.arange(size_out)[:, None] + 0.5) * scale
        distance = np.abs(np.arange(size_in)[None, :] + 0.5 - center) / max(scale, 1.0)
        tent = np.maximum(0.0, 1.0 - distance)
        return tent / tent.sum(1, keepdims=True)

    vertical, horizontal = weights(image.shape[0], height), weights(image.shape[1], width)
    return np.einsum("ph,hwc,qw->pqc", vertical, image.astype(np.float64), horizontal)


@pytest.mark.slow
def test_folder_resizes_like_the_definition(tmp_path):
    photo = load_sample_image("china.jpg")
    sizes = [(90, 150), (150, 90), (91, 140), (37, 20), (48, 48), (48, 97), (64, 48)]
    for i, (height, width) in enumerate(sizes):
        Image.fromarray(photo[:height, :width]).save(tmp_path / f"{i}.png")
    source = FolderSource(tmp_path, image_size=48)
    assert source.labels is None
    assert source.class_names is None
    for i, (height, width) in enumerate(sizes):
        new_height = 48 if height <= width else int(48 * height / width)
        new_width = 48 if width <= height else int(48 * width / height)
        resized = triangle_resize(photo[:height, :width], new_height, new_width)
        top, left = round((new_height - 48) / 2), round((new_width - 48) / 2)
        oracle = resized[top : top + 48, left : left + 48]
        assert source[i].shape == (48, 48, 3)
        # Pillow rounds to 8 bits after each of its two passes: half a level each, and fixed point.
        assert np.abs(source[i] - oracle).max() <= 1.05


def test_folder_layouts_and_formats(tmp_path, photos):
    labels = np.arange(10) % 3
    write_folder(tmp_path / "labeled", photos[:10], labels)
    (tmp_path / "labeled" / "notes.txt").write_text("no image")
    (tmp_path / "labeled" / ".cache").mkdir()
    write_folder(tmp_path / "labeled" / "c1" / ".thumbnails", photos[:1], None)
    (tmp_path / "labeled" / "c2" / "more").mkdir()
    (tmp_path / "labeled" / "c2" / "008.png").rename(
        tmp_path / "labeled" / "c2" / "more" / "008.png"
    )
    source = FolderSource(tmp_path / "labeled")
    order = np.argsort(labels, kind="stable")
    np.testing.assert_array_equal(as_array_source(source), photos[:10][order])
    np.testing.assert_array_equal(source.labels, labels[order])
    assert source.class_names == ("c0", "c1", "c2")

    flat = tmp_path / "flat"
    flat.mkdir()
    grey, rgb = photos[0, :, :, 0], photos[1]
    Image.fromarray(grey).save(flat / "a_grey.PNG")
    rgba = np.concatenate([rgb, np.full((32, 32, 1), 9, np.uint8)], -1)
    Image.fromarray(rgba).save(flat / "b_alpha.png")
    Image.fromarray(rgb).save(flat / "c.jpeg", quality=90)
    palette = Image.fromarray(rgb).quantize(16)
    palette.save(flat / "d_palette.png")
    source = FolderSource(flat)
    np.testing.assert_array_equal(source[0], np.repeat(grey[..., None], 3, -1))
    over_white = 255 + (rgb.astype(np.float64) - 255) * 9 / 255
    assert np.abs(source[1] - over_white).max() <= 1
    with Image.open(flat / "c.jpeg") as reference:
        np.testing.assert_array_equal(source[2], np.asarray(reference))
    assert 0 < np.abs(source[2].astype(int) - rgb).mean() < 10  # it is that picture, lossy
    np.testing.assert_array_equal(source[3], np.asarray(palette.convert("RGB")))


def test_folder_test_set_takes_the_training_classes(tmp_path, photos):
    write_folder(tmp_path / "train", photos[:3], np.array([0, 1, 2]))
    write_folder(tmp_path / "test", photos[3:5], np.array([2, 1]))
    names = FolderSource(tmp_path / "train").class_names
    source = FolderSource(tmp_path / "test", class_names=names)
    np.testing.assert_array_equal(source.labels, [1, 2])  # not [0, 1], as alone
    write_folder(tmp_path / "test", photos[5:6], np.array([7]))
    with pytest.raises(ValueError, match=r"\['c7'\] that are not among"):
        FolderSource(tmp_path / "test", class_names=names)


def test_folder_names_the_unreadable_file_and_its_index(tmp_path, photos):
    write_folder(tmp_path, photos[:3], None)
    whole = encoded(load_sample_image("china.jpg")[200:300, :100], "JPEG")
    (tmp_path / "003.jpg").write_bytes(whole[: len(whole) * 3 // 4])
    (tmp_path / "004.png").write_bytes(b"not a picture")
    broken = bytearray(encoded(photos[0]))
    broken[60:90] = bytes(30)
    (tmp_path / "005.png").write_bytes(bytes(broken))
    Image.fromarray(photos[0, :, :, 0].astype(np.uint16) * 200).save(tmp_path / "006.png")
    source = FolderSource(tmp_path, image_size=32)
    for index, file in [(3, "003.jpg"), (4, "004.png"), (5, "005.png"), (6, "006.png")]:
        with pytest.raises(ValueError, match=rf"cannot read image {index}, .*{file}") as caught:
            source[index]
        if index == 6:
            assert "8 bits per channel" in str(caught.value)
    with pytest.raises(ValueError, match=r"cannot read image 3, .*003\.jpg"):
        load_resident(source)
    (tmp_path / "003.jpg").unlink()
    with pytest.raises(ValueError, match=r"cannot read image 3, .*004\.png"):
        FolderSource(tmp_path)  # reads headers, to see that sizes agree


def test_folder_errors(tmp_path, photos):
    with pytest.raises(FileNotFoundError, match="no image directory"):
        FolderSource(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no pictures in"):
        FolderSource(tmp_path)
    write_folder(tmp_path / "both", photos[:2], np.array([0, 1]))
    write_folder(tmp_path / "both", photos[2:3], None)
    with pytest.raises(ValueError, match="image_size >= 0"):
        FolderSource(tmp_path / "both" / "c0", image_size=-1)
    with pytest.raises(ValueError, match="both directly"):
        FolderSource(tmp_path / "both")
    write_folder(tmp_path / "empty", photos[:2], np.array([0, 1]))
    (tmp_path / "empty" / "c2").mkdir()
    with pytest.raises(ValueError, match=r"without pictures.*\['c2'\]"):
        FolderSource(tmp_path / "empty")
    write_folder(tmp_path / "sizes", photos[:2], None)
    Image.fromarray(photos[0, :20]).save(tmp_path / "sizes" / "small.png")
    with pytest.raises(ValueError, match=r"image 2, .*small\.png is 32x20; set image_size"):
        FolderSource(tmp_path / "sizes")


# --- Sets by list, and any one set ---


def write_images(root: Path, count: int = 4) -> list[np.ndarray]:
    images = [np.full((6, 6, 3), 40 * i, np.uint8) for i in range(count)]
    (root / "a b").mkdir(parents=True)
    for i, image in enumerate(images):
        Image.fromarray(image).save(root / "a b" / f"{i}.png")
    return images


def test_image_list_is_read_in_its_order(tmp_path, caplog):
    images = write_images(tmp_path)
    lists = tmp_path / "list.txt"
    lists.write_text("a b/2.png 7\n\na b/0.png 1\n")  # a space in the name, an empty line
    source = dataset.load_images(source="image_list", paths=(str(lists), str(tmp_path)))
    np.testing.assert_array_equal(source.labels, [7, 1])
    np.testing.assert_array_equal(load_resident(source), [images[2], images[0]])
    lists.write_text("\ufeffa b/2.png 7\na b/2.png 1\n", encoding="utf-8")  # begins with a mark
    assert len(ImageListSource(lists, tmp_path)) == 2
    assert "1 lines name a picture that another line names" in caplog.text
    lists.write_text("a b/2.png -1\na b/3.png -1\n")
    assert ImageListSource(lists, tmp_path).labels is None
    assert ImageListSource(lists, tmp_path, image_size=3)[0].shape == (3, 3, 3)


def test_image_list_refuses(tmp_path):
    write_images(tmp_path)
    lists = tmp_path / "list.txt"
    for text, message in (
        ("a.png\n", "line 1 of .* must be a path and an integer"),
        ("a b/0.png 1\nb.png x\n", "line 2 of"),
        ("\n", "names no images"),
        ("a b/0.png --1\n", "line 1 of"),
        ("a b/0.png \u00b2\n", "line 1 of"),
    ):
        lists.write_text(text)
        with pytest.raises(ValueError, match=message):
            ImageListSource(lists, tmp_path)
    lists.write_text("a b/0.png 1\na b/9.png 1\n")
    with pytest.raises(FileNotFoundError, match=r"1 of the 2 files in .* for example .*9\.png"):
        ImageListSource(lists, tmp_path)
    with pytest.raises(FileNotFoundError, match="no image list"):
        ImageListSource(tmp_path / "nothing", tmp_path)


def test_load_images_excludes_classes_and_limits(tmp_path, photos):
    labels = np.arange(len(photos)) % 3
    save(tmp_path / "x.npz", images=photos, labels=labels)
    paths = (str(tmp_path / "x.npz"),)
    kept = dataset.load_images(source="arrays", paths=paths, exclude_labels=(0, 2))
    np.testing.assert_array_equal(load_resident(kept), photos[labels == 1])
    assert len(dataset.load_images(source="arrays", paths=paths, num_examples=2)) == 2
    save(tmp_path / "y.npz", images=photos)
    cases: tuple[tuple[dict[str, Any], str], ...] = (
        (
            {"source": "arrays", "paths": (str(tmp_path / "y.npz"),), "exclude_labels": (1,)},
            "no class",
        ),
        (
            {"source": "arrays", "paths": paths, "exclude_labels": (2, 0, 1)},
            r"exclude_labels=\(2, 0, 1\) leaves none of the 60 images of .*x\.npz",
        ),
        ({"source": "folder", "paths": ()}, "takes one directory"),
        ({"source": "image_list", "paths": ("x",)}, "takes a list and a directory"),
        ({"source": "web"}, "unknown source 'web'"),
    )
    for keywords, message in cases:
        with pytest.raises(ValueError, match=message):
            dataset.load_images(**keywords)


def test_one_class_is_split_off_without_its_label():
    whole, one = (
        dataset.load_dataset(source="digits"),
        dataset.load_dataset(source="digits", inlier_class=4),
    )
    assert whole.outside is None
    parts = ((whole.train, one.train), (whole.validation, one.validation), (whole.test, one.test))
    for before, after in parts:
        assert before is not None
        assert after is not None
        assert before.labels is not None
        assert after.labels is None
        expected = load_resident(before)[before.labels == 4]
        np.testing.assert_array_equal(load_resident(after), expected)
    assert one.outside is not None
    assert one.outside.labels is not None
    assert whole.test is not None
    assert len(one.outside) == int(np.sum(whole.test.labels != 4))
    assert set(one.outside.labels) == set(range(10)) - {4}
    with pytest.raises(ValueError, match=r"inlier_class=10: .* has no images with that label"):
        dataset.load_dataset(source="digits", inlier_class=10)


def test_some_classes_are_split_off_with_their_labels():
    whole, some = (
        dataset.load_dataset(source="digits"),
        dataset.load_dataset(source="digits", inlier_classes=(7, 0, 2)),
    )
    for before, after in zip(whole[:3], some[:3], strict=True):
        assert before is not None
        assert after is not None
        assert before.labels is not None
        rows = [i for i, label in enumerate(before.labels) if label in (0, 2, 7)]
        np.testing.assert_array_equal(after.labels, before.labels[rows])
        np.testing.assert_array_equal(load_resident(after), load_resident(before)[rows])
    assert whole.test is not None
    assert some.test is not None
    assert some.outside is not None
    assert len(some.outside) == len(whole.test) - len(some.test)
    assert some.outside.labels is not None
    assert set(some.outside.labels.tolist()) == {1, 3, 4, 5, 6, 8, 9}
    cases: tuple[tuple[dict[str, Any], str], ...] = (
        ({"inlier_classes": (0, 10, 11)}, r"has no images with the labels \[10, 11\]"),
        ({"inlier_classes": tuple(range(10))}, "has no images of other classes"),
        ({"inlier_classes": (0, 1), "inlier_class": 0}, "exclude each other"),
    )
    for keywords, message in cases:
        with pytest.raises(ValueError, match=message):
            dataset.load_dataset(source="digits", **keywords)


# --- Shapes ---


def test_shapes_are_a_function_of_seed_and_index():
    many = shapes_module.shapes(600, seed=3)
    assert many.images.shape == (600, 32, 32, 3)
    for count in (1, 7, 300):
        few = shapes_module.shapes(count, seed=3)
        for attribute in ("images", "labels", "label_probabilities", "ambiguity"):
            np.testing.assert_array_equal(getattr(few, attribute), getattr(many, attribute)[:count])
    other = shapes_module.shapes(600, seed=4)
    assert len(np.unique(np.concatenate([many.images, other.images]), axis=0)) == 1200
    assert image_shape(shapes_module.shapes(1, seed=0, image_size=8)) == (8, 8, 3)
    for arguments in ({"num_examples": 0}, {"num_examples": 1, "image_size": 7}):
        with pytest.raises(ValueError, match="num_examples >= 1 and image_size >= 8"):
            shapes_module.shapes(**arguments, seed=0)


def test_shapes_labels_follow_their_probabilities():
    source = shapes_module.shapes(20_000, seed=0, image_size=8)
    assert source.labels is not None
    probabilities = source.label_probabilities.astype(np.float64)
    assert num_classes(source) == 10
    np.testing.assert_allclose(probabilities.sum(1), 1, atol=1e-6)
    top_2 = np.sort(probabilities, 1)[:, :-3:-1]
    np.testing.assert_allclose(top_2[:, 1], source.ambiguity / 2, atol=1e-7)
    assert ((source.ambiguity >= 0) & (source.ambiguity <= 1)).all()
    # Every statistic within 4.5 standard errors of the stated distribution (seed fixed).
    certain = (source.ambiguity == 0).mean()
    assert abs(certain - 0.5) < 4.5 * np.sqrt(0.25 / 20_000)
    agreement = (probabilities.argmax(1) == source.labels).astype(float)
    variance = (top_2[:, 0] * top_2[:, 1]).mean()
    assert abs(agreement.mean() - top_2[:, 0].mean()) < 4.5 * np.sqrt(variance / 20_000)
    assert (probabilities[np.arange(20_000), source.labels] > 0).all()
    hard = source.ambiguity > 0.9
    assert abs(agreement[hard].mean() - 0.525) < 4.5 * np.sqrt(0.25 / hard.sum())
    counts = np.bincount(source.labels, minlength=10)
    assert np.abs(counts - 2000).max() < 4.5 * np.sqrt(20_000 * 0.09)


def test_shapes_blend_two_classes_under_the_same_nuisances():
    uniform = np.random.default_rng(0).random((50, 21))
    first = (uniform[:, 0] * 10).astype(int)
    second = (first + 1 + (uniform[:, 1] * 9).astype(int)) % 10

    def render(classes: np.ndarray | None, ambiguity: float) -> np.ndarray:
        draws = uniform.copy()
        draws[:, 2] = (1 + ambiguity) / 2
        if classes is not None:
            draws[:, 0] = (classes + 0.5) / 10
        images, _, probabilities, recorded = _draw_shapes(draws, 32)
        np.testing.assert_allclose(recorded, ambiguity, atol=1e-6)
        if classes is not None:
            np.testing.assert_array_equal(probabilities.argmax(1), classes)
        return images.astype(np.float64)

    certain_1, certain_2 = render(first, 0.0), render(second, 0.0)
    for ambiguity in (0.3, 1.0):
        expected = (1 - ambiguity / 2) * certain_1 + ambiguity / 2 * certain_2
        # Half a level of rounding in each of the three images.
        assert np.abs(render(None, ambiguity) - expected).max() <= 1.001
    assert (np.abs(certain_1 - certain_2).max((1, 2, 3)) > 50).all()


def test_shapes_cover_their_exact_areas():
    radius = 40.0
    pixel = (np.arange(101) - 50).astype(np.float32)
    angle = 0.4
    x = (np.cos(angle) * pixel[None, :] + np.sin(angle) * pixel[:, None]).astype(np.float32)
    y = (np.cos(angle) * pixel[:, None] - np.sin(angle) * pixel[None, :]).astype(np.float32)
    masks = _shape_masks(x[None], y[None], np.full((1, 1, 1), radius, np.float32))
    exact = radius**2 * np.array(
        [
            np.pi * 0.8**2,
            1.4**2,
            3 * np.sqrt(3) * 0.5**2,
            np.pi * (0.92**2 - 0.52**2),
            2 * 1.9 * 0.56 - 0.56**2,
        ]
    )
    # Coverage is first order in the distance: corners and curvature leave a fraction of a percent.
    np.testing.assert_allclose(masks.sum((1, 2, 3)), exact, rtol=5e-3)
    # All of it within the circle, up to half a pixel of antialiasing.
    assert masks[:, 0][:, np.hypot(x, y) > radius + 0.75].max() == 0


# --- Splits ---


def numbered(num_examples: int, labels: np.ndarray | None, path: Path) -> str:
    """An npz whose image i shows the number i."""
    index = np.arange(num_examples)
    images = np.stack([index // 256, index % 256], -1).astype(np.uint8)[:, None, None, :]
    entries = {"images": images} if labels is None else {"images": images, "labels": labels}
    return str(save(path, **entries))


def numbers(source: ImageSource) -> np.ndarray:
    images = load_resident(source).astype(int)
    return images[:, 0, 0, 0] * 256 + images[:, 0, 0, 1]


@pytest.mark.parametrize("labeled", [True, False])
def test_validation_is_carved_from_train(tmp_path, labeled):
    rng = np.random.default_rng(0)
    labels = rng.choice(4, 1000, p=[0.6, 0.3, 0.09, 0.01]) if labeled else None
    train = numbered(1000, labels, tmp_path / "train.npz")
    test = numbered(300, None if labels is None else labels[:300], tmp_path / "test.npz")

    def load(**changed):
        arguments = {
            "source": "arrays",
            "train_paths": (train,),
            "test_paths": (test,),
            "validation_fraction": 0.25,
        }
        return dataset.load_dataset(**(arguments | changed))

    full = load()
    assert (len(full.train), len(full.validation)) == (750, 250)
    both = np.concatenate([numbers(full.train), numbers(full.validation)])
    np.testing.assert_array_equal(np.sort(both), np.arange(1000))
    assert full.test is not None
    np.testing.assert_array_equal(numbers(full.test), np.arange(300))
    if labels is not None:
        counts = np.bincount(labels, minlength=4)
        assert full.validation.labels is not None
        held_out = np.bincount(full.validation.labels, minlength=4)
        assert np.abs(held_out - counts / 4).max() < 1
        np.testing.assert_array_equal(full.validation.labels, labels[numbers(full.validation)])

    np.testing.assert_array_equal(numbers(load().validation), numbers(full.validation))
    other = numbers(load(split_seed=1).validation)
    expected_shared = 250 * 0.25
    assert abs(np.isin(other, numbers(full.validation)).sum() - expected_shared) < 40

    # A smaller training set has the same validation images, and as many of its own as asked for.
    small = load(num_train_examples=100, num_test_examples=30)
    np.testing.assert_array_equal(numbers(small.validation), numbers(full.validation))
    assert len(small.train) == 100
    assert np.isin(numbers(small.train), numbers(full.train)).all()
    assert small.test is not None
    assert len(small.test) == len(np.unique(numbers(small.test))) == 30
    if labels is not None:
        assert small.train.labels is not None
        assert full.train.labels is not None
        share = np.bincount(full.train.labels, minlength=4) / 7.5
        assert np.abs(np.bincount(small.train.labels, minlength=4) - share).max() < 1
    for name, count in [("num_train_examples", 751), ("num_test_examples", 301)]:
        with pytest.raises(ValueError, match=f"{count} examples were asked for"):
            load(**{name: count})
        assert load(**{name: count - 1})


def test_digits_and_shapes_datasets():
    everything = arrays.digits()
    assert everything.labels is not None
    parts = dataset.load_dataset(source="digits")
    assert parts.test is not None
    assert [len(part) for part in parts if part is not None] == [1294, 144, 359]
    images = np.concatenate([load_resident(part) for part in parts if part is not None])
    order = np.lexsort(images.reshape(1797, -1).T)
    expected = everything.images[np.lexsort(everything.images.reshape(1797, -1).T)]
    np.testing.assert_array_equal(images[order], expected)  # each once, in one part
    assert parts.test.labels is not None
    assert np.abs(np.bincount(parts.test.labels) - np.bincount(everything.labels) / 5).max() < 1
    other = dataset.load_dataset(source="digits", split_seed=1).test
    assert not np.array_equal(load_resident(parts.test), load_resident(other))  # pyright: ignore[reportArgumentType]

    parts = dataset.load_dataset(
        source="shapes", num_train_examples=101, num_test_examples=50, image_size=16
    )
    assert isinstance(parts.test, ShapesSource)
    assert (len(parts.train), len(parts.test)) == (101, 50)
    assert image_shape(parts.train) == (16, 16, 3)
    images = np.concatenate([load_resident(part) for part in parts if part is not None])
    assert len(np.unique(images, axis=0)) == len(images)


def test_load_dataset_refuses(tmp_path, photos):
    labels = np.arange(20) % 2
    images = photos[:20]
    train = str(save(tmp_path / "train.npz", images=images, labels=labels))
    bare = str(save(tmp_path / "bare.npz", images=images))
    small = str(save(tmp_path / "small.npz", images=images[:, :16, :16], labels=labels))
    grey = str(save(tmp_path / "grey.npz", images=images[..., :1], labels=labels))
    third = str(save(tmp_path / "third.npz", images=images, labels=labels + 1))
    named = [
        str(save(tmp_path / f"{n}.npz", images=images, labels=labels, class_names=list(n)))
        for n in ("ab", "ba")
    ]
    write_folder(tmp_path / "folder", images, labels)
    folder = str(tmp_path / "folder")
    pair = {"source": "arrays", "train_paths": (train,), "test_paths": (small,)}
    cases = [
        (
            {"source": "cifar"},
            "unknown data source 'cifar'; .*digits, shapes, arrays, features, folder, paths, tfds, web",
        ),
        ({"source": "digits", "validation_fraction": 0.0}, r"in \(0, 1\), got 0"),
        ({"source": "digits", "validation_fraction": 1.0}, r"in \(0, 1\), got 1"),
        ({"source": "digits", "validation_fraction": 1e-5}, "leaves both parts non-empty"),
        ({"source": "digits", "image_size": 32}, "8x8 images, but image_size is 32"),
        ({"source": "digits", "image_size": -1}, "image_size >= 0"),
        ({"source": "digits", "num_train_examples": -1}, "0 for all"),
        ({"source": "digits", "num_train_examples": 1295}, "1295 examples were asked for"),
        ({"source": "arrays"}, "at least one"),
        ({"source": "arrays", "train_paths": train}, "not one string"),
        ({"source": "arrays", "train_paths": (train,)}, "has labels but no test images"),
        (
            {"source": "arrays", "train_paths": (train,), "test_paths": (train,)},
            "in both train_paths",
        ),
        (pair, r"\(32, 32, 3\) in .*train.npz, test images are \(16, 16, 3\)"),
        (pair | {"test_paths": (grey,)}, r"\(32, 32, 1\) in .*grey.npz"),
        (pair | {"test_paths": (bare,)}, "train.npz has labels and .*bare.npz has none"),
        (
            pair | {"train_paths": (bare,), "test_paths": (train,)},
            "train.npz has labels and .*bare",
        ),
        (pair | {"test_paths": (third,)}, "label 2 of .*third.npz is out of range: .* 2 classes"),
        (pair | {"train_paths": named[:1], "test_paths": named[1:]}, "class_names differ"),
        ({"source": "folder"}, "one directory in train_paths"),
        ({"source": "folder", "train_paths": (folder, folder)}, "one directory in train_paths"),
        ({"source": "folder", "train_paths": (folder,)}, "has labels but no test images"),
        (
            {"source": "folder", "train_paths": (folder,), "test_paths": (folder,)},
            "in both train_paths",
        ),
        (
            {"source": "folder", "train_paths": (folder,), "test_paths": (f"{folder}/c0",)},
            "c0 lies in .*folder, so both would contain the same images",
        ),
        ({"source": "tfds"}, "needs tfds_name"),
        ({"source": "tfds", "tfds_name": "x", "test_split": "train"}, "are both 'train'"),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            dataset.load_dataset(**arguments)
    unlabeled = dataset.load_dataset(source="arrays", train_paths=(bare,))
    assert unlabeled.test is None
    write_folder(tmp_path / "test_folder", images[:3], np.array([1, 1, 0]))
    parts = dataset.load_dataset(
        source="folder", train_paths=(folder,), test_paths=(str(tmp_path / "test_folder"),)
    )
    assert [len(part) for part in parts if part is not None] == [18, 2, 3]


# --- Order ---


@settings(max_examples=60, deadline=None)
@given(
    num_examples=st.integers(1, 300),
    batch_share=st.floats(0, 1),
    seed=st.integers(0, 2**70),
    epoch=st.integers(0, 2**40),
)
def test_an_epoch_has_each_example_at_most_once(num_examples, batch_share, seed, epoch):
    batch_size = max(1, int(num_examples * batch_share))
    steps = batch_order.steps_per_epoch(num_examples, batch_size)
    assert steps == int(np.floor(num_examples / batch_size))
    arguments = {"num_examples": num_examples, "batch_size": batch_size, "seed": seed}
    # Backwards, so that no batch can depend on the one before it.
    batches = [
        batch_order.batch_indices(epoch * steps + i, **arguments) for i in reversed(range(steps))
    ]
    seen = np.concatenate(batches)
    assert seen.dtype == np.int32
    assert len(np.unique(seen)) == len(seen) == steps * batch_size
    assert seen.min() >= 0
    assert seen.max() < num_examples
    again = np.concatenate(
        [batch_order.batch_indices(epoch * steps + i, **arguments) for i in range(steps)]
    )
    np.testing.assert_array_equal(again.reshape(steps, -1)[::-1].ravel(), seen)


def test_order_differs_by_seed_and_epoch_and_drops_different_examples():
    arguments = {"num_examples": 1000, "batch_size": 300}
    epochs = [
        np.concatenate(
            [batch_order.batch_indices(3 * e + i, **arguments, seed=0) for i in range(3)]
        )
        for e in range(20)
    ]
    dropped = {tuple(np.setdiff1d(np.arange(1000), epoch)) for epoch in epochs}
    assert len(dropped) == 20
    assert len({tuple(epoch) for epoch in epochs}) == 20
    # Every example comes up: missing all of 20 epochs has probability 1e-20.
    assert len(np.unique(np.concatenate(epochs))) == 1000
    other = batch_order.batch_indices(0, **arguments, seed=1)
    assert not np.array_equal(other, epochs[0][:300])


def test_order_is_uniform():
    """Where each of 8 examples lands over 4,000 epochs, by chi-squared; and pairs of places."""
    orders = np.stack(
        [
            batch_order.batch_indices(epoch, num_examples=8, batch_size=8, seed=5)
            for epoch in range(4000)
        ]
    )
    for codes, cells in [(orders, 8), (orders[:, ::2] * 8 + orders[:, 1::2], 64)]:
        for column in codes.T:
            counts = np.bincount(column, minlength=cells).astype(float)
            possible = 8 if cells == 8 else 56
            expected = 4000 / possible
            counts = counts if cells == 8 else counts.reshape(8, 8)[~np.eye(8, dtype=bool)]
            statistic = ((counts - expected) ** 2 / expected).sum()
            freedom = possible - 1
            assert statistic < freedom + 5 * np.sqrt(2 * freedom)


def test_order_is_the_same_on_every_machine():
    """Golden numbers: a checkpoint's data order depends on them. Never regenerate lightly.

    `np.argsort(np.random.Philox(np.random.SeedSequence(7, spawn_key=(0, 2))).random_raw(10))`
    """
    order = batch_order.batch_indices(2, num_examples=10, batch_size=10, seed=7)
    np.testing.assert_array_equal(order, [9, 2, 7, 3, 8, 4, 6, 1, 5, 0])


def test_order_refuses():
    with pytest.raises(ValueError, match="batch_size 11 is larger than the 10 training examples"):
        batch_order.steps_per_epoch(10, 11)
    with pytest.raises(ValueError, match="batch_size >= 1, got 0"):
        batch_order.steps_per_epoch(10, 0)
    with pytest.raises(ValueError, match="step >= 0, got -1"):
        batch_order.batch_indices(-1, num_examples=10, batch_size=5, seed=0)
    with pytest.raises(ValueError, match="batch_size 11 is larger"):
        stream_batches(
            Subset(arrays.digits(), np.arange(10)),
            start_step=0,
            num_steps=1,
            batch_size=11,
            seed=0,
        )
    for changed in (
        {"start_step": -1},
        {"num_steps": 0},
        {"num_workers": -1},
        {"prefetch_batches": 0},
    ):
        arguments: Any = {"start_step": 0, "num_steps": 1, "batch_size": 5, "seed": 0} | changed
        with pytest.raises(ValueError, match=f"{next(iter(changed))} >="):
            stream_batches(arrays.digits(), **arguments)
    with pytest.raises(ValueError, match="batch_size >= 1"):
        evaluation_batches(arrays.digits(), 0)


# --- Batches ---


@pytest.fixture(scope="module")
def folder_source(tmp_path_factory, photos) -> FolderSource:
    root = tmp_path_factory.mktemp("photos")
    write_folder(root, photos, None)
    return FolderSource(root)


def test_gather_resident_and_size(folder_source, photos):
    indices = np.array([5, 0, 59, 5], np.int32)
    memory = ArraySource(photos)
    for source in (folder_source, memory):
        np.testing.assert_array_equal(gather(source, indices), photos[indices])
        subset = Subset(source, np.arange(60)[::-1])
        np.testing.assert_array_equal(gather(subset, indices), photos[::-1][indices])
        np.testing.assert_array_equal(load_resident(subset), photos[::-1])
        np.testing.assert_array_equal(load_resident(source), photos)
        assert fits_resident(source, limit_bytes=60 * 32 * 32 * 3)
        assert not fits_resident(source, limit_bytes=60 * 32 * 32 * 3 - 1)
        # 61 images of a file-backed subset: more than a batch of the loader, and not a multiple.
        more = Subset(source, np.arange(129) % 60)
        np.testing.assert_array_equal(load_resident(more), photos[np.arange(129) % 60])
    assert load_resident(memory) is photos


def resident_batches(images: np.ndarray, start: int, count: int) -> np.ndarray:
    """The order, from its definition alone: 7 batches of 8 in an epoch of 60."""
    result = []
    for step in range(start, start + count):
        sequence = np.random.SeedSequence(11, spawn_key=(0, step // 7))
        order = np.argsort(np.random.Philox(sequence).random_raw(60))
        result.append(images[order[step % 7 * 8 : step % 7 * 8 + 8]])
    return np.stack(result)


@pytest.mark.parametrize("prefetch_batches", [1, 5])
def test_stream_equals_resident_order_from_any_step(folder_source, photos, prefetch_batches):
    expected = resident_batches(photos, 0, 20)
    for source in (folder_source, ArraySource(photos)):
        for start, count in [(0, 20), (6, 3), (13, 7), (19, 1)]:
            stream = stream_batches(
                source,
                start_step=start,
                num_steps=count,
                batch_size=8,
                seed=11,
                prefetch_batches=prefetch_batches,
            )
            np.testing.assert_array_equal(np.stack(list(stream)), expected[start : start + count])


def test_stream_can_be_closed_early_and_reports_errors(folder_source, tmp_path, photos):
    stream = stream_batches(folder_source, start_step=0, num_steps=10**9, batch_size=8, seed=11)
    np.testing.assert_array_equal(next(stream), resident_batches(photos, 0, 1)[0])
    stream.close()
    assert list(stream) == []
    write_folder(tmp_path, photos[:8], None)
    source = FolderSource(tmp_path)
    (tmp_path / "005.png").write_bytes(b"gone")
    with pytest.raises(ValueError, match=r"cannot read image 5, .*005\.png"):
        list(stream_batches(source, start_step=0, num_steps=1, batch_size=8, seed=0))


def test_crops_of_tfds_are_those_of_the_same_files(folder_source, tfds_root):
    source = TfdsSource("tiny_photos:1.0.0", "train", data_dir=tfds_root)
    crops = HostCrops((0, 7), (16, 8), ((0.2, 1.0),) * 2, (3 / 4, 4 / 3), "bilinear")
    for index, one in zip((0, 17, 59), crops.of_examples(0, np.arange(3)), strict=True):
        for ours, theirs in zip(
            source.crops(index, one), folder_source.crops(index, one), strict=True
        ):
            np.testing.assert_array_equal(ours, theirs)


@pytest.mark.slow
@pytest.mark.nightly
def test_stream_from_worker_processes_equals_resident_order(folder_source, photos, tfds_root):
    tfds_source = TfdsSource("tiny_photos:1.0.0", "train", data_dir=tfds_root)
    sources = (folder_source, Subset(tfds_source, np.arange(60)))
    for source in sources:
        for start, count in [(0, 20), (5, 4)]:
            stream = stream_batches(
                source, start_step=start, num_steps=count, batch_size=8, seed=11, num_workers=2
            )
            np.testing.assert_array_equal(
                np.stack(list(stream)), resident_batches(photos, start, count)
            )
    stream = stream_batches(
        folder_source, start_step=0, num_steps=10**9, batch_size=8, seed=11, num_workers=2
    )
    next(stream)
    stream.close()


def test_evaluation_visits_every_example_exactly_once(folder_source, photos):
    memory = ArraySource(photos)
    for source in (folder_source, memory, Subset(folder_source, np.arange(60))):
        for batch_size in (1, 7, 20, 60, 64):
            batches = list(evaluation_batches(source, batch_size, prefetch_batches=3))
            images, masks = (np.stack(parts) for parts in zip(*batches, strict=True))
            assert images.shape == (-(-60 // batch_size), batch_size, 32, 32, 3)
            assert masks.dtype == bool
            np.testing.assert_array_equal(images[masks], photos)
            assert not images[~masks].any()
            assert masks.sum() == 60


# --- TFDS ---


def write_tfds(root: Path, name: str, version: str, splits: dict, *, shape, names=None) -> None:
    """Writes a prepared data set with TFDS's own writer, from images that are already encoded."""
    tfds: Any = importlib.import_module("tensorflow_datasets")
    directory = root / name / version
    directory.mkdir(parents=True)
    features: dict[str, Any] = {"image": tfds.features.Image(shape=shape)}
    if names is not None:
        features["label"] = tfds.features.ClassLabel(names=names)
    identity = tfds.core.dataset_info.DatasetIdentity(
        name=name,
        version=tfds.core.Version(version),
        data_dir=str(directory),
        module_name="",
    )
    info = tfds.core.DatasetInfo(
        builder=identity,
        features=tfds.features.FeaturesDict(features),
        description="images of a test",
    )
    writer = tfds.core.SequentialWriter(
        info,
        max_examples_per_shard=25,
        file_format="array_record",
    )
    writer.initialize_splits(list(splits))
    for split, examples in splits.items():
        writer.add_examples({split: examples})
    writer.close_all()


@pytest.fixture(scope="module")
def tfds_root(tmp_path_factory, photos) -> Path:
    root = tmp_path_factory.mktemp("tfds")
    names = ["zero", "one", "two"]

    def examples(images, kind="PNG"):
        return [{"image": encoded(x, kind), "label": i % 3} for i, x in enumerate(images)]

    splits = {"train": examples(photos), "test": examples(photos[:7])}
    write_tfds(root, "tiny_photos", "1.0.0", splits, shape=(32, 32, 3), names=names)
    newer = {"train": examples(photos[::-1]), "test": examples(photos[:7])}
    write_tfds(root, "tiny_photos", "1.0.10", newer, shape=(32, 32, 3), names=names)
    write_tfds(
        root,
        "tiny_photos",
        "1.0.9",
        {"train": examples(photos[:1])},
        shape=(32, 32, 3),
        names=names,
    )
    sized = [{"image": encoded(photos[i, :, : 20 + 6 * i], "JPEG"), "label": -1} for i in range(3)]
    write_tfds(root, "sized", "2.0.0", {"train": sized}, shape=(None, None, 3), names=names)
    grey = [{"image": encoded(x[..., :1])} for x in photos[:5]]
    write_tfds(root, "grey", "1.0.0", {"train": grey}, shape=(32, 32, 1))
    return root


def test_tfds_reads_bit_for_bit(tfds_root, photos):
    source = TfdsSource("tiny_photos:1.0.0", "train", data_dir=tfds_root)
    np.testing.assert_array_equal(as_array_source(source), photos)
    np.testing.assert_array_equal(source.labels, np.arange(60) % 3)
    assert source.class_names == ("zero", "one", "two")
    assert source.name == "tiny_photos:1.0.0/train"
    with pytest.raises(IndexError, match="record 60"):
        source[60]
    copy = pickle.loads(pickle.dumps(source))
    np.testing.assert_array_equal(copy[41], photos[41])
    newest = TfdsSource("tiny_photos", "train", data_dir=str(tfds_root))
    np.testing.assert_array_equal(newest[0], photos[-1])  # 1.0.10, not 1.0.9
    tail = TfdsSource("tiny_photos:1.0.0", "train[50%:]", data_dir=tfds_root)
    np.testing.assert_array_equal(as_array_source(tail), photos[30:])

    grey = TfdsSource("grey", "train", data_dir=tfds_root)
    np.testing.assert_array_equal(as_array_source(grey), photos[:5, ..., :1])
    assert grey.labels is None
    assert grey.class_names is None
    # Labels that are ignored are not even looked at.
    bare = TfdsSource(
        "tiny_photos", "train", data_dir=tfds_root, label_key="image", has_labels=False
    )
    for one in (bare, pickle.loads(pickle.dumps(bare))):
        assert (one.labels, one.class_names) == (None, None)
    sized = TfdsSource("sized", "train", data_dir=tfds_root, image_size=32)
    assert sized.labels is None  # all of them -1
    assert as_array_source(sized).shape == (3, 32, 32, 3)
    parts = dataset.load_dataset(
        source="tfds", tfds_name="tiny_photos:1.0.0", data_dir=str(tfds_root)
    )
    assert [len(part) for part in parts if part is not None] == [54, 6, 7]
    parts = dataset.load_dataset(
        source="tfds", tfds_name="tiny_photos", data_dir=str(tfds_root), labels="none"
    )
    assert (parts.train.labels, parts.train.class_names) == (None, None)


def test_tfds_errors(tfds_root, tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError) as caught:
        TfdsSource("cifar10", "train", data_dir=tmp_path)
    command = f"\n  tfds build cifar10 --file_format=array_record --data_dir={tmp_path}\n"
    assert command in str(caught.value)
    assert "pip install 'jevb-jax[prepare]'" in str(caught.value)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tfds_root))
    assert len(TfdsSource("grey", "train")) == 5
    with pytest.raises(FileNotFoundError, match=r"tfds build tiny_photos:9\.9\.9 --file_format"):
        TfdsSource("tiny_photos:9.9.9", "train")
    with pytest.raises(ValueError, match="nowhere"):
        TfdsSource("grey", "nowhere")
    with pytest.raises(ValueError, match="set image_size"):
        TfdsSource("sized", "train")
    with pytest.raises(ValueError, match="no uint8 image feature 'picture'"):
        TfdsSource("grey", "train", image_key="picture")
    with pytest.raises(ValueError, match="not a class label"):
        TfdsSource("grey", "train", label_key="image")

    old = tmp_path / "grey" / "1.0.0"
    old.mkdir(parents=True)
    for path in (tfds_root / "grey" / "1.0.0").iterdir():
        (old / path.name).write_bytes(path.read_bytes())
    info = json.loads((old / "dataset_info.json").read_text())
    (old / "dataset_info.json").write_text(json.dumps(info | {"fileFormat": "tfrecord"}))
    with pytest.raises(
        ValueError, match=r"(?s)cannot be read by index.*tfds build grey --file_format"
    ):
        TfdsSource("grey", "train", data_dir=tmp_path)
    # A record that is damaged on disk is named with its index.
    (old / "dataset_info.json").write_text(json.dumps(info))
    record = next(old.glob("*array_record*"))
    content = bytearray(record.read_bytes())
    middle = content.find(b"IDAT")
    content[middle + 20 : middle + 60] = bytes(40)
    record.write_bytes(bytes(content))
    with pytest.raises(ValueError, match=r"cannot read record 0 of grey:1\.0\.0/train"):
        TfdsSource("grey", "train", data_dir=tmp_path)[0]


def run_python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_reading_tfds_imports_no_tensorflow(tfds_root, photos):
    """A TensorFlow that can be found, and explodes when imported, as on a machine that has it."""
    output = run_python(f"""
        import importlib.machinery, sys
        class Explosive:
            def find_spec(self, name, path=None, target=None):
                if name.partition(".")[0] in ("tensorflow", "torch"):
                    return importlib.machinery.ModuleSpec(name, self)
            def create_module(self, spec):
                raise AssertionError("imported " + spec.name)
        sys.meta_path.insert(0, Explosive())
        from jevb_jax.images.batches import load_resident
        from jevb_jax.images.tfds import TfdsSource
        heavy = ["sklearn", "PIL", "grain", "tensorflow_datasets", "flax", "optax"]
        print([name for name in heavy if name in sys.modules])
        source = TfdsSource("tiny_photos:1.0.0", "train", data_dir={str(tfds_root)!r})
        images = load_resident(source)
        print(int(images.astype(int).sum()), int(source.labels.sum()))
        print([name for name in sys.modules if name.partition(".")[0] in ("tensorflow", "torch")])
    """)
    assert output.split("\n")[:3] == ["[]", f"{photos.astype(int).sum()} 60", "[]"]


def test_names_of_the_sources_are_documented():
    documented = re.search(r"(?s)source: (.*?)\. For", dataset.load_dataset.__doc__ or "")
    assert documented is not None
    assert re.findall(r"`(\w+)`", documented[1]) == list(dataset.SOURCES)
