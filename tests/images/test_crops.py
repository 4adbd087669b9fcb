"""Crops cut on the host: against the device's boxes and pixels, Pillow and torchvision."""

import io
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageOps
from PIL.JpegImagePlugin import JpegImageFile
from sklearn.datasets import load_sample_image

from jevb_jax.images import (
    arrays,
    augmentations,
    batch_order,
    batches,
    crop_boxes,
    crop_pixels,
    decoding,
)
from jevb_jax.images.augmentations import ViewAugmentation
from jevb_jax.images.crop_boxes import Box, HostCrops, key_words
from jevb_jax.images.dataset import PICTURE_SOURCES
from jevb_jax.images.image_files import FolderSource
from jevb_jax.images.source import Subset, check_has_pictures

KEY = jax.random.key(5)
SCALES = ((0.2, 1.0), (0.08, 1.0), (0.05, 0.2))
RATIO = (3 / 4, 4 / 3)
PLAIN: Any = {"mean": (0.0,) * 3, "std": (1.0,) * 3, "jitter_probability": 0.0}


def host_crops(
    *sizes: int, key: Any = KEY, interpolation: Any = "bilinear", resizer: Any = "pillow"
) -> HostCrops:
    scales = SCALES[:2] + SCALES[2:] * (len(sizes) - 2)
    return HostCrops(key_words(key), sizes, scales[: len(sizes)], RATIO, interpolation, resizer)


@pytest.fixture(params=["pillow", "simd"])
def resizer(request) -> Any:
    """Both resizers; "simd" where its package is installed."""
    if request.param == "simd":
        pytest.importorskip("cykooz_resizer")
    return request.param


def keys_of_views(key: Any, step: int, batch_size: int) -> Any:
    """The keys that a step gives its views, as `training.step` makes them."""
    examples = jax.random.split(jax.random.fold_in(key, jnp.int32(step)), batch_size)
    return jax.vmap(jax.random.split)(examples)[:, 0]


def jpeg(picture: Image.Image, **keywords: Any) -> io.BytesIO:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=95, **keywords)
    return io.BytesIO(buffer.getvalue())


@pytest.fixture(scope="module")
def photos() -> list[Image.Image]:
    """The two photographs of scikit-learn, 640 x 427."""
    return [Image.fromarray(load_sample_image(name)) for name in ("china.jpg", "flower.jpg")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, photos) -> FolderSource:
    """Twelve JPEGs of different sizes and ratios."""
    root = tmp_path_factory.mktemp("jpegs")
    for number in range(12):
        size = (60 + 23 * number, 150 - 7 * number)
        picture = photos[number % 2].resize(size)
        (root / f"{number:02d}.jpg").write_bytes(jpeg(picture).getvalue())
    return FolderSource(root, image_size=32)


# --- Boxes ---


@pytest.mark.slow
@pytest.mark.parametrize(("height", "width"), [(256, 256), (375, 500), (1, 5000), (300, 40)])
@pytest.mark.parametrize("seed", [0, 2**31 + 7])
def test_boxes_are_those_of_the_device(height, width, seed):
    """Several steps, full views and small crops; two processes draw their own rows alone."""
    key, batch_size = jax.random.key(seed), 200
    crops = host_crops(224, 224, 96, 96, key=key)

    @jax.jit
    def on_device(keys: Any) -> Any:
        def box(key: Any, view: int) -> Any:
            of_crop = jax.random.split(jax.random.split(jax.random.fold_in(key, view), 5)[0])[0]
            return jnp.stack(
                crop_boxes.sample_crop(
                    of_crop, height=height, width=width, scale=crops.scales[view], ratio=RATIO
                )
            )

        return jnp.stack([jax.vmap(lambda k, v=v: box(k, v))(keys) for v in range(4)], axis=1)

    for step in (0, 1, 70_000):
        expected = np.asarray(on_device(keys_of_views(key, step, batch_size)))
        shares = [np.arange(batch_size)[rows] for rows in (slice(100), slice(100, 200))]
        found = [
            one.boxes(height=height, width=width)
            for rows in shares
            for one in crops.of_examples(step, rows)
        ]
        np.testing.assert_array_equal(found, expected)
        top, left, tall, wide = np.moveaxis(expected, -1, 0)
        assert ((top >= 0) & (left >= 0) & (tall >= 1) & (wide >= 1)).all()
        assert ((top + tall <= height) & (left + wide <= width)).all()


def test_other_random_bits_are_refused():
    with pytest.raises(ValueError, match="leave jax_default_prng_impl at threefry2x32"):
        key_words(jax.random.key(0, impl="rbg"))
    with jax.threefry_partitionable(False), pytest.raises(ValueError, match="other bits"):
        key_words(jax.random.key(0))


def test_every_view_needs_a_scale():
    with pytest.raises(ValueError, match="a size and a scale for each view"):
        HostCrops((0, 0), (8, 8), ((0.1, 1.0),), RATIO, "bilinear")


# --- Pixels ---


@pytest.mark.slow
@pytest.mark.parametrize("num_small", [0, 3])
def test_squares_give_the_views_that_the_device_makes(tmp_path, photos, num_small):
    """Up to one level: Pillow rounds to whole levels after each of the two directions."""
    views = (ViewAugmentation(32, **PLAIN, grayscale_probability=0.0),) * 2
    views += (
        ViewAugmentation(16, **PLAIN, grayscale_probability=0.0, crop_scale=SCALES[2]),
    ) * num_small
    for number in range(8):
        square = photos[number % 2].resize((64 + number, 64 + number)).crop((0, 0, 64, 64))
        square.save(tmp_path / f"{number}.png")
    source = FolderSource(tmp_path, image_size=64)
    indices = np.array([3, 0, 7, 1, 2, 5])
    crops = HostCrops(
        key_words(KEY),
        tuple(v.size for v in views),
        tuple(v.crop_scale for v in views),
        RATIO,
        "bilinear",
    )
    made = batches.gather_crops(source, indices, crops.of_examples(9, np.arange(6)))
    keys = keys_of_views(KEY, 9, 6)
    multi_view = jax.jit(augmentations.multi_view, static_argnums=2)
    host = multi_view(keys, made, views)
    device = multi_view(keys, batches.gather(source, indices), views)
    assert len(host) == len(device) == 2 + num_small
    for ours, theirs in zip(host, device, strict=True):
        assert ours.shape == theirs.shape
        assert np.abs(np.asarray(ours) - np.asarray(theirs)).max() < 1.01 / 255


@pytest.mark.slow
def test_colors_and_blur_are_those_of_the_device(tmp_path, photos):
    """A wrong key would change whole views; rounding changes a few levels."""
    view = ViewAugmentation(
        32, (0.5,) * 3, (1.0,) * 3, blur_probability=0.5, solarize_probability=0.3
    )
    for number in range(8):
        photos[number % 2].resize((64, 64)).save(tmp_path / f"{number}.png")
    source, rows = FolderSource(tmp_path, image_size=64), np.arange(8)
    crops = HostCrops(key_words(KEY), (32,), (view.crop_scale,), RATIO, "bilinear")
    made = batches.gather_crops(source, rows, crops.of_examples(0, rows))
    keys = keys_of_views(KEY, 0, 8)
    multi_view = jax.jit(augmentations.multi_view, static_argnums=2)
    host = multi_view(keys, made, (view,))
    device = multi_view(keys, batches.gather(source, rows), (view,))
    for ours, theirs in zip(host, device, strict=True):
        off = np.abs(np.asarray(ours) - np.asarray(theirs)).mean(axis=(1, 2, 3))
        assert off.max() < 3 / 255


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_crops_are_those_of_pillow(photos, interpolation):
    """Views too large for a reduced picture: bit for bit what a crop and a resize give."""
    kernel = Image.Resampling[interpolation.upper()]
    crops = host_crops(400, 330, 100, interpolation=interpolation)
    for row, photo in enumerate(photos * 3):
        file = jpeg(photo)
        example = crops.of_examples(2, np.array([row]))[0]
        boxes = example.boxes(height=427, width=640)
        whole = Image.open(file).convert("RGB")
        found = decoding.read_crops(file, example, mode="RGB", where="x")
        for box, size, crop in zip(boxes, crops.sizes, found, strict=True):
            top, left, tall, wide = box
            cut = whole.crop((left, top, left + wide, top + tall))
            np.testing.assert_array_equal(crop, np.asarray(cut.resize((size, size), kernel)))


def test_crops_are_those_of_torchvision(photos, resizer):
    """Of pictures as large as ImageNet's: bit for bit, and up to two levels with "simd"."""
    functional = pytest.importorskip("torchvision.transforms.functional")
    crops = host_crops(224, 224, 96, resizer=resizer)
    num_reduced = 0
    for row, example in enumerate(crops.of_examples(2, np.arange(12))):
        file = jpeg(photos[row % 2].crop((row, row, row + 500, row + 375)))
        found = decoding.read_crops(file, example, mode="RGB", where="x")
        whole = Image.open(file).convert("RGB")
        boxes = example.boxes(height=375, width=500)
        is_reduced = all(min(box[2:]) >= 2 * s for box, s in zip(boxes, crops.sizes, strict=True))
        num_reduced += is_reduced
        for box, size, crop in zip(boxes, crops.sizes, found, strict=True):
            cut = functional.resized_crop(whole, *box, [size, size], antialias=True)
            off = np.abs(crop - np.asarray(cut, np.int32))
            assert off.max() <= (2 if resizer == "simd" else 0)
            assert (off > 0).mean() < 0.3
    assert num_reduced == 0  # whose pixels the decoder makes


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("scale", [1, 2, 8])
def test_simd_is_pillow_up_to_two_levels(photos, mode, scale):
    """Photographs, and noise of black and white; boxes that end in parts of a pixel; enlarged too."""
    pytest.importorskip("cykooz_resizer")
    generator = np.random.default_rng(0)
    noise = Image.fromarray(255 * generator.integers(0, 2, (97, 131, 3), dtype=np.uint8))
    for picture in (photos[0].convert(mode), noise.convert(mode)):
        width, height = picture.size
        boxes = [
            Box(0, 0, height * scale, width * scale),
            Box(3, 5, 61 * scale + 3, 80 * scale + 1),
            Box(11, 2, 1, 7),
            Box(1, 1, 90 * scale, 9),
        ]
        for size in (1, 17, 64, 224):
            sizes = [size] * len(boxes)
            found, expected = (
                crop_pixels.squares(picture, boxes, sizes, scale=scale, resizer=resizer)
                for resizer in ("simd", "pillow")
            )
            for ours, theirs in zip(found, expected, strict=True):
                assert ours.shape == theirs.shape
                assert ours.dtype == theirs.dtype
                off = ours.astype(np.int32) - theirs
                assert np.abs(off).max() <= 2
                assert (np.abs(off) > 1).mean() < 1e-3
                assert size < 64 or abs(off.mean()) < 0.1


def test_simd_gives_the_same_bits_without_vector_instructions(photos, monkeypatch):
    package = pytest.importorskip("cykooz_resizer")
    boxes = [Box(10, 20, 300, 400), Box(100, 200, 90, 70)]
    found = crop_pixels.squares(photos[1], boxes, (96, 224), resizer="simd")
    made = package.Resizer

    def plain() -> Any:
        resizer = made()
        resizer.cpu_extensions = package.CpuExtensions.none
        return resizer

    monkeypatch.setattr(package, "Resizer", plain)
    again = crop_pixels.squares(photos[1], boxes, (96, 224), resizer="simd")
    for ours, theirs in zip(found, again, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("keywords", [{}, {"progressive": True}, {"restart_marker_rows": 2}])
def test_the_faster_decoder_gives_the_pixels_of_pillow(photos, subsampling, keywords):
    pytest.importorskip("simplejpeg")
    for photo in (photos[0].crop((3, 5, 480, 370)), photos[1].crop((0, 0, 31, 17))):
        for picture in (photo, photo.convert("L")):
            file = jpeg(picture, subsampling=subsampling, **keywords)
            expected = np.asarray(Image.open(file).convert("RGB"))
            np.testing.assert_array_equal(crop_pixels.decoded_jpeg(file.getvalue()), expected)


def test_of_a_damaged_jpeg_simd_reads_what_pillow_reads(photos, monkeypatch):
    """A picture is refused with "simd" where it is refused with "pillow", and nowhere else."""
    pytest.importorskip("simplejpeg")
    data = jpeg(photos[0]).getvalue()
    example = host_crops(400, 400, resizer="simd").of_examples(0, np.arange(1))[0]
    middle = len(data) // 2
    damaged = data[:middle] + bytes(range(1, 40)) + data[middle + 39 :]
    assert crop_pixels.decoded_jpeg(damaged) is None
    files = (data, damaged, data + bytes(100))
    whole = [decoding.read_crops(io.BytesIO(f), example, mode="RGB", where="x") for f in files]
    with pytest.raises(ValueError, match=r"cannot read x: .*truncated"):
        decoding.read_crops(io.BytesIO(data[:middle]), example, mode="RGB", where="x")
    # It is the faster decoder that reads whole files, and no other kind of picture.
    seen = []
    monkeypatch.setattr(crop_pixels, "decoded_jpeg", lambda content: seen.append(content))
    for file, expected in zip(files, whole, strict=True):
        found = decoding.read_crops(io.BytesIO(file), example, mode="RGB", where="x")
        np.testing.assert_array_equal(found[0], expected[0])
    decoding.read_crops(jpeg(photos[0].convert("CMYK")), example, mode="RGB", where="x")
    decoding.read_crops(io.BytesIO(data), example, mode="L", where="x")
    assert seen == list(files)


def test_simd_refuses_what_it_cannot_do(photos, folder, monkeypatch):
    with pytest.raises(ValueError, match='"simd" is bilinear, got "bicubic": take "pillow"'):
        host_crops(8, 8, interpolation="bicubic", resizer="simd")
    monkeypatch.setitem(sys.modules, "cykooz_resizer", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'jevb-jax\[photos\]'"):
        batches.stream_batches(  # before anything is read
            folder,
            start_step=0,
            num_steps=1,
            batch_size=4,
            seed=0,
            crops=host_crops(8, 8, resizer="simd"),
        )
    monkeypatch.undo()
    pytest.importorskip("cykooz_resizer")
    with pytest.raises(ValueError, match=r"8 bits, got bilinear, uint8 and channels \(4,\)"):
        crop_pixels.squares(photos[0].convert("RGBA"), [Box(0, 0, 9, 9)], [8], resizer="simd")


def test_a_reduced_jpeg_enlarges_no_crop(photos, monkeypatch):
    """Its scale is the smallest of 1/2, 1/4 and 1/8 that leaves every crop its pixels."""
    scales = []
    draft = JpegImageFile.draft

    def spied(image: Any, mode: Any, size: Any) -> Any:
        before = image.size
        found = draft(image, mode, size)
        scales.append(round(before[0] / image.size[0]))
        return found

    monkeypatch.setattr(JpegImageFile, "draft", spied)
    seen = set()
    for size in (7, 16, 25, 40, 64, 150):
        crops = host_crops(2 * size, size, size)
        for row, example in enumerate(crops.of_examples(0, np.arange(12))):
            file, scales[:] = jpeg(photos[row % 2].crop((0, 0, 637, 421))), []
            found = decoding.read_crops(file, example, mode="RGB", where="x")
            boxes = example.boxes(height=421, width=637)
            room = min(min(b[2:]) / s for b, s in zip(boxes, crops.sizes, strict=True))
            scale = scales[0] if scales else 1
            assert scale <= max(room, 1)
            assert scale == 8 or 2 * scale > room
            seen.add(scale)
            whole = Image.open(file)
            for (top, left, tall, wide), crop in zip(boxes, found, strict=True):
                cut = whole.crop((left, top, left + wide, top + tall))
                exact = np.asarray(cut.resize(crop.shape[:2], Image.Resampling.BILINEAR), float)
                # The decoder's own filter is sharper, but shifts nothing.
                assert np.abs(crop - exact).mean() < 4
    assert seen == {1, 2, 4, 8}


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("size", [150, 20])
def test_a_turned_picture_is_cropped_upright(photos, orientation, size, resizer):
    """Also where it is reduced, and its sides are no multiple of the scale."""
    stored = photos[0].crop((0, 0, 635, 421))
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = jpeg(stored, exif=exif)
    upright = ImageOps.exif_transpose(Image.open(file)).convert("RGB")
    for example in host_crops(size, size, resizer=resizer).of_examples(1, np.arange(4)):
        found = decoding.read_crops(file, example, mode="RGB", where="x")
        boxes = example.boxes(height=upright.height, width=upright.width)
        for (top, left, tall, wide), crop in zip(boxes, found, strict=True):
            cut = upright.crop((left, top, left + wide, top + tall))
            exact = np.asarray(cut.resize((size, size), Image.Resampling.BILINEAR), float)
            if size == 150 and min(tall, wide) < 300:
                # Another order of the two directions.
                assert np.abs(crop - exact).max() <= (3 if resizer == "simd" else 2)
            assert np.abs(crop - exact).mean() < 4


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1), (3, 2000)])
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_thin_pictures_are_cropped(size, kind, resizer):
    buffer = io.BytesIO()
    Image.new("RGB", size, (200, 100, 50)).save(buffer, kind)
    for example in host_crops(32, 32, 16, resizer=resizer).of_examples(0, np.arange(8)):
        found = decoding.read_crops(io.BytesIO(buffer.getvalue()), example, mode="RGB", where="x")
        assert [crop.shape for crop in found] == [(32, 32, 3), (32, 32, 3), (16, 16, 3)]
        for crop in found:
            assert np.abs(crop - np.array([200.0, 100, 50])).max() <= 3


def test_gray_pictures_and_transparent_ones(photos, resizer):
    gray = photos[0].convert("L")
    example = host_crops(200, 200, resizer=resizer).of_examples(0, np.arange(1))[0]
    one = decoding.read_crops(jpeg(gray), example, mode="L", where="x")
    three = decoding.read_crops(jpeg(gray), example, mode="RGB", where="x")
    assert one[0].shape == (200, 200, 1)
    np.testing.assert_array_equal(np.repeat(one[0], 3, axis=-1), three[0])
    buffer = io.BytesIO()
    Image.new("RGBA", (40, 30), (0, 0, 0, 0)).save(buffer, "PNG")
    white = decoding.read_crops(io.BytesIO(buffer.getvalue()), example, mode="RGB", where="x")
    assert (white[0] == 255).all()
    buffer = io.BytesIO()
    Image.new("I;16", (40, 30)).save(buffer, "PNG")
    with pytest.raises(ValueError, match="cannot read deep: expected 8 bits"):
        decoding.read_crops(io.BytesIO(buffer.getvalue()), example, mode="L", where="deep")


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_channels_are_resized_apart_also_where_one_is_transparency(interpolation):
    """As those of an array are, here and on the device: Pillow alone would mix them."""
    levels = np.random.default_rng(0).integers(0, 256, (40, 50, 4), np.uint8)
    boxes = [Box(0, 0, 40, 50), Box(3, 5, 21, 17)]
    found = crop_pixels.squares(
        Image.fromarray(levels), boxes, [16, 40], interpolation=interpolation
    )
    for channel in range(4):
        alone = Image.fromarray(levels[..., channel])
        expected = crop_pixels.squares(alone, boxes, [16, 40], interpolation=interpolation)
        for ours, theirs in zip(found, expected, strict=True):
            np.testing.assert_array_equal(ours[..., channel], theirs)


def test_a_truncated_file_is_named(tmp_path, photos):
    data = jpeg(photos[0]).getvalue()
    (tmp_path / "whole.jpg").write_bytes(data)
    (tmp_path / "half.jpg").write_bytes(data[: len(data) // 2])
    source = FolderSource(tmp_path, image_size=32)
    example = host_crops(16, 16).of_examples(0, np.arange(2))
    with pytest.raises(ValueError, match=r"cannot read image 0, .*half\.jpg: .*truncated"):
        batches.gather_crops(source, np.array([1, 0]), example)


# --- Batches ---


def streamed(source: Any, **keywords: Any) -> list[Any]:
    arguments: Any = {"start_step": 0, "num_steps": 5, "batch_size": 4, "seed": 3}
    arguments |= {"crops": host_crops(32, 32, 16)} | keywords
    return list(batches.stream_batches(source, **arguments))


def assert_same(found: list[Any], expected: list[Any]) -> None:
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert [view.shape[1] for view in ours] == [32, 32, 16]
        for one, other in zip(ours, theirs, strict=True):
            np.testing.assert_array_equal(one, other)


def test_threads_read_the_same_with_simd(folder):
    pytest.importorskip("cykooz_resizer")
    crops = host_crops(32, 32, 16, resizer="simd")
    found = streamed(folder, crops=crops, prefetch_batches=4)
    rows = batch_order.batch_indices(0, num_examples=12, batch_size=4, seed=3)
    alone = batches.gather_crops(folder, rows, crops.of_examples(0, np.arange(4)))
    assert_same(found[:1], [alone])
    assert_same(found, streamed(folder, crops=crops, prefetch_batches=1))
    for ours, pillow in zip(found[0], streamed(folder)[0], strict=True):
        assert np.abs(ours.astype(np.int32) - pillow).max() <= 2


def test_stream_resumes_and_is_shared_bit_for_bit(folder):
    source = Subset(folder, np.arange(12)[::-1])
    whole = streamed(source)
    examples = host_crops(32, 32, 16).of_examples(0, np.arange(4))
    order = batch_order.batch_indices(0, num_examples=12, batch_size=4, seed=3)
    alone = [folder.crops(11 - i, one) for i, one in zip(order, examples, strict=True)]
    assert_same(whole[:1], [tuple(map(np.stack, zip(*alone, strict=True)))])
    assert_same(streamed(source, start_step=3, num_steps=2, prefetch_batches=1), whole[3:])
    shares = [streamed(source, rows=rows) for rows in (slice(2), slice(2, 4))]
    joined = [
        tuple(np.concatenate(views) for views in zip(*parts, strict=True))
        for parts in zip(*shares, strict=True)
    ]
    assert_same(joined, whole)
    assert not np.array_equal(whole[0][0], whole[0][1])


@pytest.mark.slow
def test_stream_is_the_same_from_worker_processes(folder):
    assert_same(streamed(folder, num_workers=2, num_steps=5), streamed(folder))


def test_images_without_files_are_refused():
    example = host_crops(8, 8).of_examples(0, np.arange(1))
    with pytest.raises(TypeError, match=r"need picture files.*crop_from to \"square\""):
        batches.gather_crops(Subset(arrays.digits(), np.arange(3)), np.array([0]), example)


def test_images_without_files_are_told_which_sources_have_them():
    with pytest.raises(TypeError, match="need picture files") as caught:
        check_has_pictures(arrays.digits())
    assert all(name in str(caught.value) for name in PICTURE_SOURCES)


def test_whether_a_source_has_pictures_is_known_without_its_labels():
    class Slow:
        """Each worker would read the labels of the whole set."""

        name, class_names = "slow", None

        @property
        def labels(self) -> Any:
            raise AssertionError("the labels were read")

        def __len__(self) -> int:
            return 3

        def __getitem__(self, index: int) -> Any: ...

        def crops(self, index: int, crops: Any) -> Any: ...

    source: Any = Slow()
    assert check_has_pictures(Subset(source, np.arange(2))) is source
    assert Subset(source, np.arange(2), has_labels=False).labels is None
