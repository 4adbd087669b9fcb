"""Images of other types and numbers of channels: their values, their views, and one whole run."""

import logging
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import jevb_jax
from configs import smoke
from jevb_jax import commands, export
from jevb_jax.images import augmentations, batches, corruptions, dataset, given, pixels
from jevb_jax.images.arrays import arrays
from jevb_jax.images.augmentations import ViewAugmentation
from jevb_jax.images.crop_boxes import HostCrops
from jevb_jax.images.image_files import FolderSource
from jevb_jax.images.levels import Levels, for_people
from jevb_jax.settings import read
from jevb_jax.training import experiment

RNG = np.random.default_rng(0)
DEEP = RNG.integers(0, 4096, (20, 6, 7, 4)).astype(np.uint16)
FLOATS = RNG.normal(scale=100, size=(20, 6, 7, 2)).clip(-400, 400).astype(np.float32)


# --- Values ---


@pytest.mark.parametrize("channels", [1, 2, 4, 12])
@pytest.mark.parametrize(
    ("dtype", "value_range", "low", "high"),
    [
        ("uint8", (), 0, 255),
        ("uint16", (), 0, 65_535),
        ("uint16", (0, 4095), 0, 4095),
        ("float32", (), 0, 1),
        ("float32", (-400.0, 400.0), -400, 400),
    ],
)
def test_arrays_keep_type_and_channels_and_map_their_range(
    tmp_path, channels, dtype, value_range, low, high
):
    values = RNG.uniform(low, high, (600, 4, 5, channels)).astype(dtype)
    values[0, 0, 0, 0], values[599, -1, -1, -1] = low, high
    for name, part in (("train", values[:590]), ("test", values[590:])):
        np.save(tmp_path / f"{name}.npy", part)
    made = dataset.load_dataset(
        source="arrays",
        train_paths=(str(tmp_path / "train.npy"),),
        test_paths=(str(tmp_path / "test.npy"),),
        dtype=dtype,
        value_range=value_range,
        num_channels=channels,
    )
    assert made.test is not None
    found = batches.load_resident(made.test)
    assert found.dtype == dtype
    assert found.shape == (10, 4, 5, channels)
    expected = (values[590:].astype(np.float64) - low) / (high - low)
    seen = np.asarray(jax.vmap(pixels.to_float)(jnp.asarray(found)))
    assert seen.dtype == np.float32
    np.testing.assert_allclose(seen, expected, atol=0.5 / 65_535 + 1e-7)
    assert seen.max() == 1.0
    if not value_range:
        np.testing.assert_array_equal(found, values[590:])  # kept as they are
    with pytest.raises(ValueError, match=f"num_channels = 3, but .* has {channels} channels"):
        dataset.load_dataset(
            source="arrays",
            train_paths=(str(tmp_path / "train.npy"),),
            dtype=dtype,
            value_range=value_range,
            num_channels=3,
        )


@pytest.mark.parametrize(
    ("values", "levels", "error", "message"),
    [
        (DEEP, Levels(), TypeError, r'expected uint8 .* got uint16; .*data.dtype = "uint16"'),
        (FLOATS, Levels("uint16"), TypeError, r"expected uint16 .*change data.dtype"),
        (FLOATS.astype(np.float64), Levels("float32"), TypeError, r"expected float32 images, got"),
        (DEEP + 1, Levels("uint16", (0, 4095)), ValueError, r"4096 of image \d+ is outside .* 4095"),
        (FLOATS, Levels("float32"), ValueError, r"of image 0 is outside of the range 0 to 1"),
        (np.where(DEEP[:, :, :, :1] > 4090, np.nan, 0.5).astype(np.float32), Levels("float32"),
         ValueError, r"the value nan of image"),
    ],
)  # fmt: skip
def test_values_that_are_not_what_was_said_are_refused(tmp_path, values, levels, error, message):
    np.savez(tmp_path / "x.npz", images=values)
    with pytest.raises(error, match=message) as caught:
        arrays(tmp_path / "x.npz", levels)
    assert "x.npz" in str(caught.value)


def test_the_row_that_is_wrong_is_named(tmp_path):
    values = np.full((700, 2, 2, 1), 0.5, np.float32)
    values[613, 1, 0, 0] = -0.01
    with pytest.raises(ValueError, match=r"value -0\.01 of image 613 is outside"):
        Levels("float32").as_stored(values, where="it")
    for value_range in ((1.0,), (2.0, 1.0), (0.0, np.inf), (1.0, 1.0)):
        with pytest.raises(ValueError, match="two rising numbers"):
            Levels("float32", value_range)
    with pytest.raises(ValueError, match="0 to 255"):
        Levels("uint8", (0, 1))


def test_people_see_one_or_three_channels():
    np.testing.assert_array_equal(for_people(DEEP[..., :2] * 16)[..., 0], np.rint(
        DEEP[..., 0] * (16 * 255 / 65_535)
    ))  # fmt: skip
    assert for_people(np.zeros((3, 4, 4, 12), np.float32)).shape == (3, 4, 4, 3)
    same = RNG.integers(0, 256, (3, 4, 4, 3)).astype(np.uint8)
    assert for_people(same).base is same


# --- Views ---


@pytest.mark.slow
@pytest.mark.parametrize("channels", [2, 4, 12])
def test_color_operations_that_need_colors_are_skipped(channels):
    every: Any = {
        "size": 5,
        "mean": (0.5,) * channels,
        "std": (0.25,) * channels,
        "jitter_probability": 1.0,
        "blur_probability": 1.0,
        "solarize_probability": 0.5,
    }
    asked = ViewAugmentation(**every, saturation=0.8, hue=0.3, grayscale_probability=0.9)
    plain = ViewAugmentation(**every, saturation=0.0, hue=0.0, grayscale_probability=0.0)
    assert asked.skipped == ("saturation", "hue", "grayscale_probability")
    assert plain.skipped == ()
    images = RNG.integers(0, 65_536, (6, 7, 8, channels)).astype(np.uint16)
    keys = jax.random.split(jax.random.key(0), 6)
    found, expected = (augmentations.augment(keys, images, one) for one in (asked, plain))
    np.testing.assert_array_equal(found, expected)
    off: Any = every | {"jitter_probability": 0.0, "grayscale_probability": 0.0}
    still = ViewAugmentation(**off)
    assert not np.allclose(found, augmentations.augment(keys, images, still))  # but contrast acts
    # The order of channels means nothing: none is read as red.
    turned = augmentations.augment(keys, images[..., ::-1], asked)
    np.testing.assert_allclose(turned, np.asarray(found)[..., ::-1], atol=1e-5)


def test_center_crops_keep_the_type():
    eight = RNG.integers(0, 256, (5, 9, 8, 2)).astype(np.uint8)
    low = corruptions.center_crops(eight, seed=1)
    high = corruptions.center_crops(eight.astype(np.uint16) * 257, seed=1)
    floats = corruptions.center_crops((eight / 255).astype(np.float32), seed=1)
    assert (low.dtype, high.dtype, floats.dtype) == (np.uint8, np.uint16, np.float32)
    np.testing.assert_allclose(high / 257, floats * 255, atol=0.01)
    np.testing.assert_allclose(low, floats * 255, atol=0.51)


# --- Pictures ---


def write_deep(root: Path) -> None:
    root.mkdir()
    Image.fromarray(DEEP[0, ..., 0]).save(root / "a.png")
    Image.fromarray(DEEP[1, ..., 0]).save(root / "b.tiff")


def test_gray_pictures_of_16_bits_and_floats_are_kept(tmp_path):
    write_deep(tmp_path / "deep")
    source = FolderSource(tmp_path / "deep", levels=Levels("uint16"))
    for index in range(2):
        assert source[index].dtype == np.uint16
        np.testing.assert_array_equal(source[index], DEEP[index, ..., :1])
    np.testing.assert_array_equal(batches.load_resident(source), DEEP[:2, ..., :1])
    ranged = FolderSource(tmp_path / "deep", levels=Levels("uint16", (0, 4095)))
    exact = DEEP[0, ..., :1].astype(np.float64) * (65_535 / 4095)
    assert np.abs(ranged[0] - exact).max() <= 0.5
    with pytest.raises(ValueError, match=r'8 bits per channel, got mode I;16.*dtype = "uint16"'):
        FolderSource(tmp_path / "deep")[0]
    with pytest.raises(ValueError, match=r"image 0, .*a\.png: the value \d+ is outside"):
        FolderSource(tmp_path / "deep", levels=Levels("uint16", (0, 5)))[0]
    (tmp_path / "float").mkdir()
    Image.fromarray(FLOATS[0, ..., 0]).save(tmp_path / "float" / "a.tif")
    source = FolderSource(tmp_path / "float", levels=Levels("float32", (-400, 400)))
    np.testing.assert_allclose(source[0], (FLOATS[0, ..., :1] + 400) / 800, atol=1e-6)
    Image.fromarray(np.zeros((6, 7, 3), np.uint8)).save(tmp_path / "float" / "b.png")
    with pytest.raises(ValueError, match=r"one channel of float32 .*got mode RGB"):
        FolderSource(tmp_path / "float", levels=Levels("float32"))[1]
    with pytest.raises(ValueError, match="pictures of uint16 have 1 channels, got"):
        FolderSource(tmp_path / "deep", num_channels=3, levels=Levels("uint16"))


def test_pictures_have_the_channels_that_are_asked_for(tmp_path):
    colors = RNG.integers(0, 256, (6, 7, 4)).astype(np.uint8)
    Image.fromarray(colors).save(tmp_path / "a.png")
    np.testing.assert_array_equal(FolderSource(tmp_path, num_channels=4)[0], colors)
    for channels, mode in ((1, "L"), (3, "RGB")):
        found = FolderSource(tmp_path, num_channels=channels)[0]
        assert found.shape == (6, 7, channels)
        white = Image.new("RGBA", (7, 6), "white")
        white.alpha_composite(Image.fromarray(colors))
        np.testing.assert_array_equal(found.squeeze(), np.asarray(white.convert(mode)))
    with pytest.raises(
        ValueError, match=r"pictures of uint8 have 1 or 3 or 4 channels, got .* = 2"
    ):
        FolderSource(tmp_path, num_channels=2)


def test_deep_pictures_are_resized_and_cropped_as_their_8_bits_are(tmp_path):
    eight = RNG.integers(0, 256, (40, 60)).astype(np.uint8)
    for name, image in (("8", eight), ("16", eight.astype(np.uint16) * 257)):
        (tmp_path / name).mkdir()
        Image.fromarray(image).save(tmp_path / name / "a.png")
    crops = HostCrops((0, 7), (16, 8), ((0.2, 1.0),) * 2, (3 / 4, 4 / 3), "bicubic")
    one = crops.of_examples(0, np.arange(1))[0]
    low = FolderSource(tmp_path / "8", image_size=20, num_channels=1)
    high = FolderSource(tmp_path / "16", image_size=20, levels=Levels("uint16"))
    for found, expected in zip(
        (high[0], *high.crops(0, one)), (low[0], *low.crops(0, one)), strict=True
    ):
        assert found.dtype == np.uint16
        assert found.shape == expected.shape
        # Pillow rounds 8-bit levels after each of two directions.
        assert np.abs(found / 257 - expected).max() <= 1.6


# --- Users' images ---


def test_users_give_images_in_the_units_of_the_run():
    deep = Levels("uint16", (0, 4095))

    def seen(images: Any, levels: Levels, channels: int) -> np.ndarray:
        checked = given.check_images(images, num_channels=channels, square_size=0, levels=levels)
        return given.prepared(checked.stacks[0], 0)

    exact = DEEP.astype(np.float64) / 4095
    np.testing.assert_allclose(seen(DEEP, deep, 4), exact, atol=1e-5)
    np.testing.assert_allclose(seen(list(DEEP), deep, 4), exact, atol=1e-5)
    picture = Image.fromarray(DEEP[0, ..., 0])
    np.testing.assert_allclose(seen(picture, deep, 1)[0], exact[0, ..., :1], atol=1e-5)
    np.testing.assert_array_equal(seen(np.float32(exact), deep, 4), np.float32(exact))
    ranged = Levels("float32", (-400, 400))
    exact = (FLOATS.astype(np.float64) + 400) / 800
    np.testing.assert_allclose(seen(FLOATS.astype(np.float64), ranged, 2), exact, atol=1e-6)
    with pytest.raises(ValueError, match="outside of the range -400 to 400"):
        seen(FLOATS * 2 - 500, ranged, 2)
    with pytest.raises(TypeError, match="scale is not clear"):
        seen(DEEP, Levels(), 4)
    with pytest.raises(ValueError, match=r"a picture has 1, 3 or 4 channels.* trained on 12"):
        seen(picture, Levels(), 12)


# --- A run ---


def config_on(root: Path, images: np.ndarray, **data: Any) -> Any:
    """The smoke test on arrays of two classes that differ in one channel."""
    labels = np.arange(len(images)) % 2
    np.savez(root / "train.npz", images=images[20:], labels=labels[20:])
    np.savez(root / "test.npz", images=images[:20], labels=labels[:20])
    config: Any = smoke.get_config()
    config.data.update(
        {
            "source": "arrays",
            "train_paths": (str(root / "train.npz"),),
            "test_paths": (str(root / "test.npz"),),
            "image_size": 0,
            "num_train_examples": 0,
            "num_test_examples": 0,
            **data,
        }
    )
    config.augmentation.image_size = 8
    config.augmentation.mean = (0.5,) * images.shape[-1]
    config.augmentation.std = (0.25,) * images.shape[-1]
    config.ood.corruptions = ()
    return config


def test_what_a_run_skips_is_said_once_at_its_start(tmp_path, caplog):
    images = RNG.integers(0, 4096, (120, 8, 8, 4)).astype(np.uint16)
    config = config_on(tmp_path, images, dtype="uint16", value_range=(0, 4095))
    config.train.batch_size = 32
    with caplog.at_level(logging.WARNING):
        experiment.build_experiment(config)
    assert (
        caplog.text.count("The images have 4 channels, so these color operations are skipped") == 1
    )
    assert "augmentation.saturation, augmentation.hue, augmentation.grayscale_prob" in caplog.text
    values = experiment.to_json_values(config)
    for section, key, value, message in (
        ("data", "value_range", [4095, 0], r"data.value_range: .* two rising numbers"),
        ("data", "source", "shapes", r'data.dtype = "uint16" is for arrays and picture files'),
        ("ood", "corruptions", ["contrast"], r'ood.corruptions need data.dtype = "uint8"'),
    ):
        wrong = values | {section: values[section] | {key: value}}
        with pytest.raises(ValueError, match=message):
            read.run_settings(wrong)


@pytest.mark.slow
@pytest.mark.nightly
def test_a_run_on_four_channels_of_16_bits(tmp_path):
    images = RNG.integers(0, 2000, (220, 8, 8, 4)).astype(np.uint16)
    images[1::2, ..., 3] += 2000
    config = config_on(tmp_path, images, dtype="uint16", value_range=(0, 4095))
    far = RNG.integers(0, 4096, (30, 8, 8, 4)).astype(np.uint16)
    np.savez(tmp_path / "far.npz", images=far)
    outside = {"name": "far", "group": "far", "source": "arrays", "protocol": ""}
    config.method = "simsiam"  # compiles in less than half the time of JEVB
    config.train.num_epochs = 1
    config.optimizer.warmup_epochs = 0.5
    config.train.health_every_steps = 0
    config.evaluation.labels_per_class = 0
    config.ood.outside = ({**outside, "paths": (str(tmp_path / "far.npz"),)},)
    results = commands.train(config, tmp_path / "run")
    assert results is not None
    assert (tmp_path / "run" / "views.png").exists()
    model = jevb_jax.load(tmp_path / "run")
    assert model.num_channels == 4
    embedded = model.embed(images[:20])
    np.testing.assert_allclose(
        embedded, model.embed((images[:20] / 4095).astype(np.float32)), atol=1e-3
    )
    assert model.ood_score(far).shape == (30,)
    export.export_model(model, tmp_path / "export")
    served = export.read_serving(tmp_path / "export").call((images[:20] / 4095).astype(np.float32))
    np.testing.assert_allclose(served["embedding"], embedded, atol=1e-3)
