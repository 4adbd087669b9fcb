"""Picture files: what their pixels mean, which of a folder are read, and what is refused in time."""

import io
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from jevb_jax.images import dataset, decoding
from jevb_jax.images.folder_listing import list_folder
from jevb_jax.images.image_files import FolderSource, ImageListSource

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (6, 9, 3)).astype(np.uint8)


def content(image: Image.Image, kind: str = "PNG", **options: Any) -> io.BytesIO:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    buffer.seek(0)
    return buffer


def read(file: io.BytesIO, **keywords: Any) -> np.ndarray:
    return decoding.read(file, **{"mode": "RGB", "where": "it", **keywords})


def over_white(colors: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    share = alpha[..., None] / 255
    return colors * share + 255 * (1 - share)


# --- Pixels ---


def test_colors_are_those_that_the_picture_means():
    grey, index = PIXELS[..., 0], (PIXELS[..., 0] % 4).astype(np.uint8)
    alpha = PIXELS[..., 1]
    table = RNG.integers(0, 256, (4, 3))
    palette = Image.fromarray(index, "P")
    palette.putpalette(table.ravel().tolist())
    bits = grey > 127
    # Images of the first column mean the colors of the second; the third tells rounding's levels.
    cases: list[tuple[io.BytesIO, np.ndarray, int]] = [
        (content(Image.fromarray(grey)), np.repeat(grey[..., None], 3, -1), 0),
        (content(palette), table[index], 0),
        (content(palette, "GIF"), table[index], 0),
        (
            content(palette, transparency=bytes([255, 0, 128, 255])),
            over_white(table[index], np.array([255, 0, 128, 255])[index]),
            1,
        ),
        (content(palette, transparency=2), over_white(table[index], (index != 2) * 255.0), 0),
        (
            content(Image.fromarray(np.stack([grey, alpha], -1), "LA")),
            over_white(np.repeat(grey[..., None], 3, -1), alpha),
            1,
        ),
        (content(Image.fromarray(np.dstack([PIXELS, alpha]))), over_white(PIXELS, alpha), 1),
        (content(Image.fromarray(np.dstack([PIXELS, alpha * 0 + 255]))), PIXELS, 0),
        (content(Image.fromarray(bits)), np.repeat(bits[..., None] * 255, 3, -1), 0),
        (content(Image.fromarray(255 - PIXELS)), 255 - PIXELS, 0),
        (
            content(Image.fromarray(np.dstack([255 - PIXELS, grey * 0]), "CMYK"), "TIFF"),
            PIXELS,
            0,
        ),
        (
            content(Image.fromarray(PIXELS), transparency=tuple(PIXELS[2, 3].tolist())),
            np.where((PIXELS[2, 3] == PIXELS).all(-1)[..., None], 255, PIXELS),
            0,
        ),
    ]
    for number, (file, expected, tolerance) in enumerate(cases):
        found = read(file)
        assert found.shape == (6, 9, 3), number
        assert np.abs(found - expected.astype(np.float64)).max() <= tolerance, number
    # Grey of a transparent picture: composed first.
    layer = np.stack([grey, alpha], -1)
    one = read(content(Image.fromarray(layer, "LA")), mode="L")[..., 0]
    assert np.abs(one - over_white(grey[..., None], alpha)[..., 0]).max() <= 1


TURNS = {
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: x.swapaxes(0, 1)[:, ::-1],
    7: lambda x: x[::-1, ::-1].swapaxes(0, 1),
    8: lambda x: x.swapaxes(0, 1)[::-1],
}


@pytest.mark.parametrize(
    ("ending", "options"), [("png", {}), ("webp", {"lossless": True}), ("tif", {})]
)
def test_orientation_is_followed_and_known_from_the_header(tmp_path, ending, options):
    for number, turn in TURNS.items():
        exif = Image.Exif()
        exif[0x0112] = number  # the first stored row is shown at the ... of the EXIF standard
        path = str(tmp_path / f"{number}.{ending}")
        Image.fromarray(PIXELS).save(path, exif=exif, **options)
        found = decoding.read(path, mode="RGB", where="it")
        np.testing.assert_array_equal(found, turn(PIXELS), err_msg=str(number))
        assert decoding.size(path, where="it") == found.shape[1::-1]


def test_every_reader_sees_the_same(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    picture = Image.fromarray(np.dstack([PIXELS, PIXELS[..., 0]]))
    picture.save(tmp_path / "a.png", exif=exif)
    (tmp_path / "list.csv").write_text("a.png 3\n", encoding="utf-8")
    encoded = io.BytesIO((tmp_path / "a.png").read_bytes())  # as TFDS keeps it
    for size in (0, 5):
        folder = FolderSource(tmp_path, image_size=size)[0]
        listed = ImageListSource(tmp_path / "list.csv", tmp_path, image_size=size)[0]
        np.testing.assert_array_equal(folder, listed)
        np.testing.assert_array_equal(folder, read(encoded, image_size=size))


# --- Limits ---


def png_header(width: int, height: int) -> bytes:
    """A PNG of a few bytes that says it is large."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(99))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.parametrize(
    "size", [(9_500, 9_500), (15_000, 15_000), (1, 2**31 - 1), (60_000, 60_000)]
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_too_many_pixels_are_refused_from_the_header(tmp_path, size):
    (tmp_path / "large.png").write_bytes(png_header(*size))
    with pytest.raises(ValueError, match=r"large\.png.*max_image_pixels allows 89,478,485"):
        FolderSource(tmp_path)
    with pytest.raises(ValueError, match=r"large\.png.*max_image_pixels allows 89,478,485"):
        FolderSource(tmp_path, image_size=8)[0]


def test_the_limit_is_a_setting_even_above_pillows(tmp_path, monkeypatch):
    Image.fromarray(PIXELS).save(tmp_path / "a.png")
    np.testing.assert_array_equal(FolderSource(tmp_path, max_image_pixels=54)[0], PIXELS)
    with pytest.raises(ValueError, match="9 x 6 = 54 pixels, but max_image_pixels allows 53"):
        FolderSource(tmp_path, max_image_pixels=53)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    monkeypatch.setattr(decoding, "MAX_PIXELS", 10)
    with pytest.raises(ValueError, match="max_image_pixels allows 10"):
        FolderSource(tmp_path, max_image_pixels=10)
    np.testing.assert_array_equal(FolderSource(tmp_path, max_image_pixels=54)[0], PIXELS)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"max_image_pixels": 0}, "max_image_pixels >= 1"),
        ({"image_size": 10_000}, r"image_size = 10000 makes pictures of 100,000,000 pixels"),
    ]
    for keywords, message in cases:
        with pytest.raises(ValueError, match=message):
            dataset.load_images(source="folder", paths=(str(tmp_path),), **keywords)


@pytest.mark.parametrize("shape", [(1, 60_000), (60_000, 1), (2, 30_001)])
def test_a_thin_picture_is_cut_out_before_it_is_enlarged(monkeypatch, shape):
    """What the whole picture would be at 200 pixels, interpolated in float64 in its middle."""
    made, resize = [], Image.Image.resize

    def watched(self: Image.Image, size: Any, *arguments: Any, **keywords: Any) -> Image.Image:
        made.append(size[0] * size[1])
        return resize(self, size, *arguments, **keywords)

    monkeypatch.setattr(Image.Image, "resize", watched)
    ramp = np.arange(max(shape)) * 37 % 251
    pixels = np.broadcast_to(ramp if shape[1] > shape[0] else ramp[:, None], shape)
    picture = Image.fromarray(np.repeat(pixels[..., None], 3, -1).astype(np.uint8))
    found = read(content(picture), image_size=200)
    assert found.shape == (200, 200, 3)
    assert sum(made) <= 40_000
    shorter = min(shape)
    scale = shorter / 200
    first = round((max(shape) * 200 // shorter - 200) / 2)
    place = (first + np.arange(200) + 0.5) * scale - 0.5
    expected = np.interp(place, np.arange(max(shape)), ramp)
    line = found[0, :, 0] if shape[1] > shape[0] else found[:, 0, 0]
    # Places are kept in single precision: a hundredth of a pixel, in steps of up to 214 levels.
    assert np.abs(line - expected).max() <= 3
    assert np.all(found == (line[None, :, None] if shape[1] > shape[0] else line[:, None, None]))


# --- Folders ---


def place(path: Path, level: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((4, 4, 3), level, np.uint8)).save(path)


def test_all_endings_are_read_and_the_others_counted(tmp_path, caplog):
    for number, ending in enumerate(decoding.SUFFIXES):
        (tmp_path / f"{number}{ending}").touch()
        (tmp_path / f"{number}big{ending.upper()}").touch()
    for name in ("a.heic", "b.HEIC", "c.svg", "noending", ".hidden.png", ".DS_Store"):
        (tmp_path / name).touch()
    listing = list_folder(tmp_path)
    assert len(listing.files) == 2 * len(decoding.SUFFIXES)
    assert {".webp", ".tiff", ".tif", ".bmp", ".jfif", ".jpe", ".gif", ".ppm"} < set(
        decoding.SUFFIXES
    )
    assert listing.endings == {".heic": 2, ".svg": 1, "without an ending": 1}
    assert listing.num_hidden == 1
    FolderSource(tmp_path, image_size=4)
    assert "4 files are left out, because their ending is not read: 2 .heic, 1 .svg" in caplog.text
    assert "1 hidden" in caplog.text


def test_what_no_picture_can_be_made_of_is_refused_by_name(tmp_path):
    (tmp_path / "only").mkdir()
    (tmp_path / "only" / "a.heic").touch()
    with pytest.raises(ValueError, match=r"no pictures in .*1 files are left out.*1 \.heic"):
        FolderSource(tmp_path / "only", image_size=4)
    (tmp_path / "only" / "a.png").symlink_to("gone.png")
    with pytest.raises(ValueError, match=r"a\.png is a link to nothing"):
        FolderSource(tmp_path / "only", image_size=4)
    (tmp_path / "only" / "a.png").unlink()
    os.mkfifo(tmp_path / "only" / "a.png")  # who opens it waits for ever
    with pytest.raises(ValueError, match=r"a\.png is no file"):
        FolderSource(tmp_path / "only", image_size=4)


def test_links_multiply_nothing(tmp_path, caplog):
    root, outside = tmp_path / "set", tmp_path / "outside"
    for name, level in (("cat/1", 1), ("cat/2", 2), ("dog/3", 3), ("dog/deep/4", 4)):
        place(root / f"{name}.png", level)
    place(outside / "5.png", 5)
    place(outside / "more" / "6.png", 6)
    place(root / ".store" / "7.png", 7)
    links = {
        "cat/back": "..",
        "cat/self": ".",
        "cat/above": "../..",
        "cat/sibling": "../dog",
        "cat/all": "/",
        "dog/deep/loop": "../deep",
        "again": "cat",
        "cat/one": "two",
        "cat/two": "one",  # links to each other
        "dog/outside": outside,  # followed, once
        "dog/outside_again": outside,
        "dog/part_of_outside": outside / "more",
        "dog/stored": "../.store",  # hidden itself, so this is the way to it
    }
    for name, target in links.items():
        (root / name).symlink_to(target)
    (outside / "to_set").symlink_to(root)
    source = FolderSource(root, image_size=4)
    levels = sorted(int(source[i][0, 0, 0]) for i in range(len(source)))
    assert levels == [1, 2, 3, 4, 5, 6, 7]
    assert source.class_names == ("cat", "dog")
    np.testing.assert_array_equal(np.bincount(source.labels), [2, 5])  # pyright: ignore[reportArgumentType]
    assert "10 links are not followed" in caplog.text
    (root / "cat" / "9.png").symlink_to("1.png")  # said, and meant: it is a file of its own
    assert len(FolderSource(root, image_size=4)) == 8
    assert "1 links lead to pictures that are in the set too" in caplog.text


@settings(max_examples=20, deadline=None)
@given(
    parents=st.lists(st.integers(0, 5), min_size=1, max_size=6),
    links=st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=5),
)
def test_every_picture_of_a_tree_is_found_once(tmp_path_factory, parents, links):
    root = tmp_path_factory.mktemp("tree")
    folders = [root / "class"]
    for number, parent in enumerate(parents):
        folders.append(folders[min(parent, number)] / f"f{number}")
    for folder in folders:
        folder.mkdir()
        (folder / "x.png").touch()
    for number, (start, end) in enumerate(links):
        origin, target = folders[start % len(folders)], folders[end % len(folders)]
        (origin / f"link{number}").symlink_to(target)
    listing = list_folder(root)
    expected = [str(path) for path in root.rglob("x.png") if not path.is_symlink()]
    assert sorted(listing.classes["class"]) == sorted(str(f / "x.png") for f in folders)
    assert set(listing.classes["class"]) <= set(expected)
    assert len(listing.closed_links) == len(links)


def test_names_that_look_the_same_are_told(tmp_path, caplog):
    for name in ("Cat", "cat", "caf\u00e9", "cafe\u0301", "dog"):
        place(tmp_path / name / "1.png")
    source = FolderSource(tmp_path, image_size=4)
    assert source.class_names is not None
    assert len(source.class_names) == 5
    assert "[['Cat', 'cat'], ['cafe\u0301', 'caf\u00e9']]" in caplog.text


def test_a_class_whose_name_cannot_be_written_is_refused(tmp_path):
    for name in (b"fine", b"caf\xe9"):  # Latin-1
        folder = os.path.join(os.fsencode(tmp_path), name)
        os.mkdir(folder)
        with open(os.path.join(folder, b"a.png"), "wb") as file:
            file.write(content(Image.fromarray(PIXELS)).getvalue())
    with pytest.raises(ValueError, match=r"'caf\\udce9' .* is not valid UTF-8; rename it"):
        FolderSource(tmp_path)
