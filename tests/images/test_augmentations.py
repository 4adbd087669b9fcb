"""Every operation against Pillow, SciPy or colorsys in float64, on real photographs and digits."""

import colorsys
import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_digits, load_sample_image

from jevb_jax.images import augmentations, crop_boxes
from jevb_jax.images import augmentations as aug
from jevb_jax.images.augmentations import ViewAugmentation
from jevb_jax.images.pixels import (
    center_view,
    from_planes,
    gaussian_blur,
    normalize,
    resized_crop,
    solarize,
    to_float,
    to_grayscale,
    to_planes,
)

# float32 sums of a few dozen products of numbers in [0, 1]; a grey level of a byte is 4e-3.
TOLERANCE = 3e-6
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
PLAIN = ViewAugmentation(
    size=24,
    mean=MEAN,
    std=STD,
    crop_scale=(1.0, 1.0),
    crop_ratio=(1.0, 1.0),
    flip_probability=0.0,
    jitter_probability=0.0,
    grayscale_probability=0.0,
)


@functools.cache
def photographs() -> np.ndarray:
    """Four 40 x 56 cut-outs of real photographs, a black and a white image, uint8."""
    cuts = [
        load_sample_image(name)[top : top + 160 : 4, left : left + 224 : 4]
        for name in ("china.jpg", "flower.jpg")
        for top, left in ((60, 100), (200, 380))
    ]
    return np.stack([*cuts, np.zeros_like(cuts[0]), np.full_like(cuts[0], 255)])


def reals(images: np.ndarray) -> np.ndarray:
    return images.astype(np.float64) / 255


def keys(count: int, seed: int = 0) -> jax.Array:
    return jax.random.split(jax.random.key(seed), count)


def over_images(function: Any, *arguments: Any, **keywords: Any) -> np.ndarray:
    """The compiled function of every photograph and every value of `arguments`, `[images, values]`."""
    one = functools.partial(function, **keywords)
    both = jax.vmap(jax.vmap(one, (None, *[0] * len(arguments))), (0, *[None] * len(arguments)))
    return np.asarray(jax.jit(both)(photographs(), *map(jnp.asarray, arguments)))


def pillow_resize(image: np.ndarray, box: tuple[int, ...], size: int, method: Any) -> np.ndarray:
    top, left, height, width = box
    cut = image[top : top + height, left : left + width].astype(np.float32)
    planes = [
        np.asarray(Image.fromarray(cut[..., c]).resize((size, size), method))
        for c in range(cut.shape[-1])
    ]
    return np.stack(planes, axis=-1)


# ---------------------------------------------------------------------------------- crop and resize

BOXES = np.array(
    [
        (0, 0, 40, 56),  # the whole image
        (0, 0, 1, 1),
        (39, 55, 1, 1),
        (3, 5, 2, 47),
        (10, 20, 12, 12),  # no change of size
        (7, 1, 30, 9),
        (20, 30, 20, 26),
    ]
)


@pytest.mark.parametrize("size", [5, 12, 64])
@pytest.mark.parametrize(
    ("interpolation", "method"),
    [("bilinear", Image.Resampling.BILINEAR), ("bicubic", Image.Resampling.BICUBIC)],
)
def test_resized_crop_is_pillows(size, interpolation, method):
    found = over_images(resized_crop, *BOXES.T, size=size, interpolation=interpolation)
    for images, image in zip(found, reals(photographs()), strict=True):
        for view, box in zip(images, BOXES, strict=True):
            expected = np.clip(pillow_resize(image, tuple(box), size, method), 0, 1)
            np.testing.assert_allclose(view, expected, atol=TOLERANCE)


def test_flip_and_identity():
    image = photographs()[0]
    plain = resized_crop(image, 2, 3, 24, 24, size=24)
    np.testing.assert_allclose(plain, reals(image)[2:26, 3:27], atol=1e-7)
    flipped = resized_crop(image, 2, 3, 24, 24, size=24, flip=True)
    np.testing.assert_array_equal(flipped, plain[:, ::-1])
    np.testing.assert_array_equal(
        augmentations.random_horizontal_flip(jax.random.key(0), image, probability=1.0),
        to_float(image)[:, ::-1],
    )


def test_digits_have_one_channel():
    bundled: Any = load_digits()
    digits = (bundled.images * 255 / 16).astype(np.uint8)[:20, :, :, None]
    found = jax.jit(jax.vmap(lambda x: resized_crop(x, 1, 0, 6, 7, size=8)))(digits)
    for view, image in zip(found, reals(digits), strict=True):
        expected = pillow_resize(image, (1, 0, 6, 7), 8, Image.Resampling.BILINEAR)
        np.testing.assert_allclose(view, expected, atol=TOLERANCE)
    image = digits[0]
    key, colors = jax.random.key(0), {"saturation": 0.9, "hue": 0.3, "probability": 1.0}
    colorless = augmentations.color_jitter(key, image, brightness=0.0, contrast=0.0, **colors)
    np.testing.assert_array_equal(colorless, to_float(image))
    np.testing.assert_array_equal(to_grayscale(to_float(image)), to_float(image))


def torchvision_boxes(rng, count, height, width, scale, ratio):
    """RandomResizedCrop.get_params, from its documentation, one box at a time."""
    boxes = []
    for _ in range(count):
        for _ in range(10):
            area = height * width * rng.uniform(*scale)
            aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
            w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if 0 < w <= width and 0 < h <= height:
                top, left = rng.integers(0, height - h + 1), rng.integers(0, width - w + 1)
                boxes.append((top, left, h, w))
                break
        else:
            boxes.append((-1, -1, -1, -1))
    return np.array(boxes)


def sampled_boxes(count: int, **keywords: Any) -> np.ndarray:
    sample = jax.jit(jax.vmap(functools.partial(crop_boxes.sample_crop, **keywords)))
    return np.stack([np.asarray(v) for v in sample(keys(count))], axis=-1)


@pytest.mark.parametrize(
    ("height", "width", "scale", "ratio"),
    [
        (32, 32, (0.2, 1.0), (3 / 4, 4 / 3)),
        (500, 300, (0.08, 1.0), (3 / 4, 4 / 3)),
        (8, 8, (0.05, 0.2), (0.5, 2.0)),
    ],
)
def test_crop_boxes_have_torchvisions_distribution(height, width, scale, ratio):
    count = 4000
    found = sampled_boxes(count, height=height, width=width, scale=scale, ratio=ratio)
    expected = torchvision_boxes(np.random.default_rng(1), count, height, width, scale, ratio)
    top, left, h, w = found.T
    assert np.all((top >= 0) & (left >= 0) & (h >= 1) & (w >= 1))
    assert np.all((top + h <= height) & (left + w <= width))
    # Fixed keys: this either holds for ever or not. 5 statistics x 3 cases, hence the small level.
    statistics = (
        lambda b: b[:, 0],
        lambda b: b[:, 1],
        lambda b: b[:, 2] * b[:, 3],
        lambda b: b[:, 3] / b[:, 2],
        lambda b: b[:, 2],
    )
    for statistic in statistics:
        test: Any = scipy.stats.ks_2samp(statistic(found), statistic(expected))
        assert test.pvalue > 1e-3


def test_areas_are_uniform_and_ratios_log_uniform():
    boxes = sampled_boxes(4000, height=4000, width=4000, scale=(0.1, 0.4), ratio=(0.5, 2.0)).astype(
        np.float64
    )  # every draw fits
    area = boxes[:, 2] * boxes[:, 3] / 4000**2
    assert scipy.stats.kstest((area - 0.1) / 0.3, "uniform").pvalue > 1e-3
    log_ratio = np.log2(boxes[:, 3] / boxes[:, 2])
    assert scipy.stats.kstest((log_ratio + 1) / 2, "uniform").pvalue > 1e-3
    rank_correlation: Any = scipy.stats.spearmanr(area, log_ratio)
    assert abs(rank_correlation.statistic) < 0.06


@pytest.mark.slow
def test_fallback_is_the_largest_central_box():
    common: Any = {"scale": (0.9, 1.0), "ratio": (3 / 4, 4 / 3)}
    assert np.all(sampled_boxes(50, height=10, width=100, **common) == (0, 43, 10, 13))
    assert np.all(sampled_boxes(50, height=100, width=10, **common) == (43, 0, 13, 10))
    whole: Any = {"scale": (1.0, 1.0), "ratio": (0.1, 0.2)}
    assert np.all(sampled_boxes(50, height=4, width=4, **whole) == (0, 1, 4, 1))


# ------------------------------------------------------------------------------------------- color

FACTORS = np.array([0.0, 0.3, 1.0, 1.4, 7.0], np.float32)


def adjusted(image: Any, factor: Any, *, name: Any) -> jax.Array:
    """One adjustment of the color jitter, by a factor that is known."""
    factors, order = jnp.asarray(factor, jnp.float32)[None], jnp.zeros(1, jnp.int32)
    planes = to_planes(to_float(image))
    return from_planes(augmentations._adjust_in_order(planes, [name], factors, order))


def luma(image: np.ndarray) -> np.ndarray:
    return image @ np.array([0.2989, 0.587, 0.114])


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("brightness", lambda x: np.zeros_like(x)),
        ("contrast", lambda x: np.full_like(x, luma(x).mean())),
        ("saturation", lambda x: np.repeat(luma(x)[..., None], 3, axis=-1)),
    ],
)
def test_blends(name, other):
    found = over_images(adjusted, FACTORS, name=name)
    for images, image in zip(found, reals(photographs()), strict=True):
        for view, factor in zip(images, FACTORS.astype(np.float64), strict=True):
            expected = np.clip(factor * image + (1 - factor) * other(image), 0, 1)
            # The factor 7 enlarges the rounding of the image and its mean.
            np.testing.assert_allclose(view, expected, atol=TOLERANCE)


def test_contrast_of_one_channel_uses_its_mean():
    image = photographs()[0][..., :1]
    x = reals(image)
    expected = np.clip(0.4 * x + 0.6 * x.mean(), 0, 1)
    np.testing.assert_allclose(adjusted(image, 0.4, name="contrast"), expected, atol=TOLERANCE)


def test_hue_is_colorsys():
    shifts = np.array([-0.5, -0.21, 0.0, 0.1, 0.5], np.float32)
    found = over_images(adjusted, shifts, name="hue")[:, :, ::3, ::3]
    for images, image in zip(found, reals(photographs())[:, ::3, ::3], strict=True):
        for view, shift in zip(images, shifts.astype(np.float64), strict=True):
            expected = np.empty_like(image)
            for index in np.ndindex(image.shape[:2]):
                h, s, v = colorsys.rgb_to_hsv(*image[index])
                expected[index] = colorsys.hsv_to_rgb((h + shift) % 1, s, v)
            np.testing.assert_allclose(view, expected, atol=TOLERANCE)


def test_hue_of_pure_colors():
    colors = np.array(
        [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (0, 1, 1), (1, 0, 1), (0.4, 0.4, 0.4)]
    )
    turned = adjusted(colors[None].astype(np.float32), 1 / 3, name="hue")
    expected = np.array(
        [(0, 1, 0), (0, 0, 1), (1, 0, 0), (0, 1, 1), (1, 0, 1), (1, 1, 0), (0.4, 0.4, 0.4)]
    )
    np.testing.assert_allclose(turned[0], expected, atol=TOLERANCE)


def test_grayscale_and_solarize():
    image = photographs()[1]
    gray = to_grayscale(to_float(image))
    np.testing.assert_allclose(
        gray, np.repeat(luma(reals(image))[..., None], 3, -1), atol=TOLERANCE
    )
    for threshold in (0.0, 0.5, 1.0, 1.1):
        expected = np.where(reals(image) >= threshold, 1 - reals(image), reals(image))
        found = solarize(image, threshold=threshold)
        np.testing.assert_allclose(found, expected, atol=1e-7)
    white = np.full((2, 2, 1), 255, np.uint8)
    assert np.all(np.asarray(solarize(white, threshold=1.0)) == 0)  # at the threshold: inverted


def test_blur_is_scipys_with_torchs_kernel():
    sigmas = np.array([0.05, 0.1, 0.7, 2.0, 50.0], np.float32)
    for size in (1, 3, 9, 23):
        found = over_images(gaussian_blur, sigmas, kernel_size=size)
        offsets = np.arange(size) - size // 2
        for images, image in zip(found[::2], reals(photographs())[::2], strict=True):
            for view, sigma in zip(images, sigmas.astype(np.float64), strict=True):
                kernel = np.exp(-0.5 * (offsets / sigma) ** 2)
                kernel /= kernel.sum()
                expected = scipy.ndimage.correlate1d(image, kernel, axis=0, mode="mirror")
                expected = scipy.ndimage.correlate1d(expected, kernel, axis=1, mode="mirror")
                np.testing.assert_allclose(view, expected, atol=TOLERANCE)
    # The widest kernel that reflection allows: side 3, five taps.
    small = photographs()[0][:3, :3]
    found = gaussian_blur(small, 1.0, kernel_size=5)
    kernel = np.exp(-0.5 * np.arange(-2, 3.0) ** 2)
    kernel /= kernel.sum()
    expected = reals(small)
    for axis in (0, 1):
        expected = scipy.ndimage.correlate1d(expected, kernel, axis=axis, mode="mirror")
    np.testing.assert_allclose(found, expected, atol=TOLERANCE)


def test_normalize():
    image = photographs()[2]
    expected = (reals(image) - np.array(MEAN)) / np.array(STD)
    np.testing.assert_allclose(normalize(image, mean=MEAN, std=STD), expected, atol=TOLERANCE)


# ------------------------------------------------------------------------------------ random choices

RANDOM_OPERATIONS = {
    "flip": augmentations.random_horizontal_flip,
    "gray": augmentations.random_grayscale,
    "blur": functools.partial(augmentations.random_gaussian_blur, kernel_size=3, sigma=(1.0, 2.0)),
    "solarize": functools.partial(augmentations.random_solarize, threshold=0.0),
    "jitter": augmentations.color_jitter,
}


@pytest.mark.parametrize("name", sorted(RANDOM_OPERATIONS))
def test_probabilities(name):
    image = photographs()[0][:6, :6]
    count = 2000

    def shares(probability: float) -> np.ndarray:
        operation = functools.partial(RANDOM_OPERATIONS[name], probability=probability)
        views = jax.jit(jax.vmap(operation, (0, None)))(keys(count), image)
        return np.any(np.asarray(views) != np.asarray(to_float(image)), axis=(1, 2, 3))

    assert not shares(0.0).any()
    assert shares(1.0).all()
    changed = shares(0.3)
    assert scipy.stats.binomtest(int(changed.sum()), count, 0.3).pvalue > 1e-3


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        ("brightness", 0.6, 1.4),
        ("contrast", 0.6, 1.4),
        ("saturation", 0.0, 2.5),
        ("hue", -0.3, 0.3),
    ],
)
def test_jitter_factors_are_uniform(name, low, high):
    # Colours whose blends stay within (0, 1), so that the factor can be read off a pixel.
    image = jnp.asarray([[[0.30, 0.25, 0.25], [0.20, 0.20, 0.20]]])
    strengths = {"brightness": 0.4, "contrast": 0.4, "saturation": 1.5, "hue": 0.3}
    keywords = {key: strengths[key] if key == name else 0.0 for key in strengths}
    jitter = functools.partial(augmentations.color_jitter, probability=1.0, **keywords)
    views = np.asarray(jax.jit(jax.vmap(jitter, (0, None)))(keys(3000), image), np.float64)
    pixel = views[:, 0, 0]
    x = np.asarray(image, np.float64)
    if name == "brightness":
        factors = pixel[:, 0] / 0.3
    elif name == "contrast":
        mean = luma(x).mean()
        factors = (pixel[:, 0] - mean) / (0.3 - mean)
    elif name == "saturation":
        factors = (pixel[:, 0] - luma(x)[0, 0]) / (0.3 - luma(x)[0, 0])
    else:
        factors = np.array([colorsys.rgb_to_hsv(*p)[0] for p in pixel])
        factors = np.where(factors > 0.5, factors - 1, factors)
    assert factors.min() >= low - 1e-5
    assert factors.max() <= high + 1e-5
    uniform = (factors - low) / (high - low)
    assert scipy.stats.kstest(uniform, "uniform").pvalue > 1e-3


def test_blur_widths_are_uniform():
    dot = np.zeros((5, 5, 1), np.float32)
    dot[2, 2] = 1
    blur = functools.partial(
        augmentations.random_gaussian_blur, kernel_size=3, sigma=(0.5, 2.0), probability=1.0
    )
    views = np.asarray(jax.jit(jax.vmap(blur, (0, None)))(keys(3000), dot), np.float64)[..., 0]
    # Beside the center of the kernel: exp(-1 / (2 sigma^2)) of it.
    sigma = np.sqrt(-0.5 / np.log(views[:, 2, 1] / views[:, 2, 2]))
    assert scipy.stats.kstest((sigma - 0.5) / 1.5, "uniform").pvalue > 1e-3


ADJUSTMENTS = ("brightness", "contrast", "saturation", "hue")


@pytest.mark.slow
@pytest.mark.parametrize(
    "strengths", [(0.4, 0.4, 0.4, 0.1), (0.0, 0.4, 0.4, 0.1), (0.4, 0.4, 0.4, 0.0)]
)
def test_jitter_is_its_adjustments_one_after_the_other_in_every_order(strengths):
    image = to_float(photographs()[0][:6, :5])
    settings = {n: strength for n, strength in zip(ADJUSTMENTS, strengths, strict=True) if strength}
    half_widths = np.array(list(settings.values()))
    centers = np.array([float(name != "hue") for name in settings])

    def draws(key: jax.Array) -> tuple[jax.Array, Any]:
        _, key_order, key_factors = jax.random.split(key, 3)
        uniform = jax.random.uniform(key_factors, (len(settings),))
        return (
            jax.random.permutation(key_order, len(settings)),
            jnp.asarray(centers + (2 * uniform - 1) * half_widths),
        )

    def plain(order: jax.Array, factors: jax.Array) -> jax.Array:
        """Every adjustment at every position, of which one is kept."""

        def position(index: jax.Array, x: jax.Array) -> jax.Array:
            arms = [adjusted(x, factors[i], name=name) for i, name in enumerate(settings)]
            return jax.lax.select_n(order[index], *arms)

        return jax.lax.fori_loop(0, len(settings), position, image)

    off = dict.fromkeys(ADJUSTMENTS, 0.0)
    jitter = functools.partial(augmentations.color_jitter, probability=1.0, **{**off, **settings})
    views = np.asarray(jax.jit(jax.vmap(jitter, (0, None)))(keys(1200), image))
    orders, factors = map(np.asarray, jax.vmap(draws)(keys(1200)))
    of_order = jax.jit(jax.vmap(plain))
    np.testing.assert_allclose(views, of_order(orders, factors), atol=TOLERANCE)
    # The order matters to every third view or so, so another one would have been seen.
    others = np.asarray(of_order(orders[:, ::-1], factors))
    assert (np.abs(views - others).max(axis=(1, 2, 3)) > 100 * TOLERANCE).mean() > 0.3
    counts = np.unique(orders, axis=0, return_counts=True)[1]
    assert len(counts) == math.factorial(len(settings))
    assert scipy.stats.chisquare(counts).pvalue > 1e-3


def test_jitter_factor_never_goes_below_zero():
    image = photographs()[0][:4, :4]
    jitter = functools.partial(
        augmentations.color_jitter, brightness=3.0, contrast=0, saturation=0, hue=0, probability=1.0
    )
    views = jax.jit(jax.vmap(jitter, (0, None)))(keys(500), image)
    brightest = np.asarray(views).max(axis=(1, 2, 3))
    # A factor uniform in [0, 4], not in [-2, 4], of which a third would be black.
    assert (brightest == 0).mean() < 0.01


# --------------------------------------------------------------------------------------------- views


@pytest.mark.slow
def test_plain_view_is_the_view_of_evaluation_and_the_oracle():
    image = photographs()[0][:40, :40]
    view = PLAIN(jax.random.key(0), image)
    resized = pillow_resize(reals(image), (0, 0, 40, 40), 24, Image.Resampling.BILINEAR)
    expected = (resized - np.array(MEAN)) / np.array(STD)
    np.testing.assert_allclose(view, expected, atol=4 * TOLERANCE)  # divided by std, about 1/4
    center = center_view(image, size=24, mean=MEAN, std=STD)
    np.testing.assert_allclose(center, expected, atol=4 * TOLERANCE)
    same = center_view(image[:24, :24], size=24, mean=MEAN, std=STD)
    np.testing.assert_allclose(
        same, (reals(image[:24, :24]) - np.array(MEAN)) / np.array(STD), atol=4 * TOLERANCE
    )


@pytest.mark.slow
def test_half_of_the_views_are_mirrored():
    image = photographs()[0][:40, :40]
    plain = np.asarray(PLAIN(jax.random.key(0), image))
    mirroring = dataclasses.replace(PLAIN, flip_probability=0.5)
    views = np.asarray(jax.jit(jax.vmap(mirroring, (0, None)))(keys(400), image))
    is_plain = np.abs(views - plain).max(axis=(1, 2, 3)) < 1e-5
    is_mirrored = np.abs(views - plain[:, ::-1]).max(axis=(1, 2, 3)) < 1e-5
    assert np.all(is_plain != is_mirrored)
    assert scipy.stats.binomtest(int(is_mirrored.sum()), 400, 0.5).pvalue > 1e-3


@pytest.mark.slow
def test_operations_follow_each_other_in_the_published_order():
    # Deterministic settings of grey, blur and solarise, of which blur and solarise do not commute.
    view = dataclasses.replace(
        PLAIN,
        grayscale_probability=1.0,
        blur_probability=1.0,
        blur_sigma=(1.5, 1.5),
        blur_kernel_size=5,
        solarize_probability=1.0,
    )
    image = photographs()[0][:40, :40]
    x = luma(pillow_resize(reals(image), (0, 0, 40, 40), 24, Image.Resampling.BILINEAR))
    kernel = np.exp(-0.5 * (np.arange(-2, 3) / 1.5) ** 2)
    for axis in (0, 1):
        x = scipy.ndimage.correlate1d(x, kernel / kernel.sum(), axis=axis, mode="mirror")
    x = np.where(x >= 0.5, 1 - x, x)
    expected = (x[..., None] - np.array(MEAN)) / np.array(STD)
    np.testing.assert_allclose(view(jax.random.key(0), image), expected, atol=4 * TOLERANCE)
    # By default the kernel is the odd number nearest a tenth of the view.
    automatic = dataclasses.replace(view, blur_kernel_size=0)
    three = dataclasses.replace(view, blur_kernel_size=3)
    np.testing.assert_array_equal(
        automatic(jax.random.key(0), image), three(jax.random.key(0), image)
    )


def test_every_setting_reaches_its_operation_and_every_operation_has_its_key(monkeypatch):
    calls: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {}

    def record(name: str) -> Any:
        def operation(key: jax.Array, image: jax.Array, **keywords: Any) -> jax.Array:
            calls[name] = tuple(np.asarray(jax.random.key_data(key)).tolist()), keywords
            return image

        return operation

    names = ("random_resized_crop", "color_jitter", "random_grayscale")
    names += ("random_gaussian_blur", "random_solarize")
    for name in names:
        monkeypatch.setattr(aug, name, record(name))
    view = ViewAugmentation(
        size=24,
        mean=MEAN,
        std=STD,
        crop_scale=(0.11, 0.12),
        crop_ratio=(0.13, 0.14),
        interpolation="bicubic",
        flip_probability=0.15,
        jitter_probability=0.16,
        brightness=0.17,
        contrast=0.18,
        saturation=0.19,
        hue=0.2,
        grayscale_probability=0.21,
        blur_probability=0.22,
        blur_sigma=(0.23, 0.24),
        blur_kernel_size=5,
        solarize_probability=0.25,
        solarize_threshold=0.26,
    )
    view(jax.random.key(0), jnp.zeros((24, 24, 3)))
    assert list(calls) == list(names)  # in this order
    assert len({key for key, _ in calls.values()}) == 5
    assert [keywords for _, keywords in calls.values()] == [
        {
            "size": 24,
            "scale": (0.11, 0.12),
            "ratio": (0.13, 0.14),
            "interpolation": "bicubic",
            "flip_probability": 0.15,
        },
        {"brightness": 0.17, "contrast": 0.18, "saturation": 0.19, "hue": 0.2, "probability": 0.16},
        {"probability": 0.21},
        {"kernel_size": 5, "sigma": (0.23, 0.24), "probability": 0.22},
        {"threshold": 0.26, "probability": 0.25},
    ]


FULL = ViewAugmentation(size=16, mean=MEAN, std=STD, blur_probability=0.5, solarize_probability=0.3)


@pytest.mark.slow
def test_views_depend_on_their_key_and_image_alone():
    images = photographs()[:4]
    small = dataclasses.replace(FULL, size=8, crop_scale=(0.05, 0.2))
    batch = jax.jit(lambda k, x: augmentations.multi_view(k, x, (FULL, FULL, small)))
    view_1, view_2, crop = batch(keys(4), images)
    assert view_1.shape == view_2.shape == (4, 16, 16, 3)
    assert crop.shape == (4, 8, 8, 3)
    assert view_1.dtype == jnp.float32
    for i in range(4):
        assert not np.allclose(view_1[i], view_2[i])
    # The rest of the batch may change, be in another order, or be floats.
    order = np.array([2, 0, 3, 1])
    others = batch(keys(4)[order], images[order])
    floats = batch(keys(4), images.astype(np.float32) / 255)
    for view, other, from_floats in zip((view_1, view_2, crop), others, floats, strict=True):
        np.testing.assert_allclose(view[order], other, atol=1e-5)
        np.testing.assert_allclose(view, from_floats, atol=1e-5)
    again = batch(keys(4), images)
    np.testing.assert_array_equal(again[0], view_1)
    other_keys = batch(keys(4, seed=1), images)
    assert not np.allclose(other_keys[0], view_1)


@pytest.mark.slow
@pytest.mark.nightly
def test_jit_and_vmap_change_nothing():
    image, key = photographs()[3], jax.random.key(7)
    alone = FULL(key, image)
    np.testing.assert_allclose(jax.jit(FULL)(key, image), alone, atol=2e-5)
    batched = augmentations.augment(key[None], image[None], FULL)
    np.testing.assert_allclose(batched[0], alone, atol=2e-5)


@pytest.mark.slow
@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31 - 1), size=st.sampled_from([(1, 1), (3, 2), (5, 9)]))
def test_any_image_of_any_size_gives_a_finite_view(seed, size):
    image = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    plain = compiled_tiny_view()(jax.random.key(seed), image)
    pixels = np.asarray(plain) * np.array(STD) + np.array(MEAN)
    assert plain.shape == (4, 4, 3)
    assert pixels.min() >= -1e-5
    assert pixels.max() <= 1 + 1e-5


@functools.cache
def compiled_tiny_view() -> Any:
    return jax.jit(dataclasses.replace(FULL, size=4, interpolation="bicubic"))


# -------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": 0}, "size must be a whole number, at least 1"),
        ({"size": 16.5}, "size must be a whole number"),
        ({"blur_kernel_size": -1}, "blur_kernel_size must be a whole number"),
        ({"mean": (0.5, math.nan, 0.5)}, "mean must be finite"),
        ({"std": (0.2, math.nan, 0.2)}, "std must be positive and finite"),
        ({"std": (0.2, math.inf, 0.2)}, "std must be positive and finite"),
        ({"brightness": math.inf}, "brightness must be at least 0 and finite"),
        ({"hue": math.nan}, "hue must be at least 0 and finite"),
        ({"blur_sigma": (0.1, math.inf)}, "blur_sigma must be a positive, finite range"),
        ({"solarize_threshold": math.nan}, "solarize_threshold must be a number"),
        ({"mean": (0.5,)}, "one value for each"),
        ({"mean": (), "std": ()}, "one value for each channel"),
        ({"std": (0.2, 0.0, 0.2)}, "std must be positive"),
        ({"crop_scale": (0.0, 1.0)}, "crop_scale"),
        ({"crop_scale": (0.5, 0.2)}, "crop_scale"),
        ({"crop_scale": (0.5, 1.1)}, "crop_scale"),
        ({"crop_ratio": (0.0, 1.0)}, "crop_ratio"),
        ({"blur_sigma": (2.0, 1.0)}, "blur_sigma"),
        ({"flip_probability": 1.5}, r"flip_probability must be in \[0, 1\], got 1.5"),
        ({"blur_probability": -0.1}, "blur_probability"),
        ({"contrast": -1.0}, "contrast must be at least 0"),
        ({"hue": 0.6}, "hue must be in"),
        ({"blur_kernel_size": 4}, "blur_kernel_size must be 0 or odd"),
        ({"interpolation": "nearest"}, "interpolation must be one of"),
    ],
)
def test_settings_out_of_range(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(PLAIN, **changes)


def test_float32_stays_float32_where_x64_is_enabled():
    with jax.enable_x64(True):
        image = jnp.zeros((9, 8, 3), jnp.uint8)
        blurred = jax.eval_shape(lambda x: gaussian_blur(x, 1.0, kernel_size=3), image)
        assert blurred.dtype == jnp.float32
        wide = [crop_boxes.sample_crop(jax.random.key(i), height=90, width=80) for i in range(3)]
    narrow = [crop_boxes.sample_crop(jax.random.key(i), height=90, width=80) for i in range(3)]
    np.testing.assert_array_equal(wide, narrow)


def test_bad_images_and_arguments():
    with pytest.raises(ValueError, match="use vmap for a batch"):
        to_float(photographs())
    with pytest.raises(TypeError, match="uint8, uint16, or float"):
        to_float(np.zeros((4, 4, 3), np.int32))
    with pytest.raises(ValueError, match="mean and std need one value for each of 3"):
        normalize(photographs()[0], mean=(0.5,), std=(0.2,))
    for kernel_size in (4, 9):
        with pytest.raises(ValueError, match="kernel_size must be odd"):
            gaussian_blur(np.zeros((4, 4, 3), np.uint8), 1.0, kernel_size=kernel_size)
    bad: Any = "area"
    with pytest.raises(ValueError, match="interpolation"):
        resized_crop(photographs()[0], 0, 0, 4, 4, size=4, interpolation=bad)


@pytest.mark.slow
@pytest.mark.nightly
def test_visible_views_are_the_views_before_they_are_normalized():
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
    plain = ViewAugmentation(
        size=8, mean=(0.0,) * 3, std=(1.0,) * 3, jitter_probability=0.0, grayscale_probability=0.0
    )
    shifted = dataclasses.replace(plain, mean=(0.5, 0.25, 0.1), std=(0.25, 0.5, 2.0))
    first, second = augmentations.visible_views(images, (plain, plain), seed=3)
    keys = jax.random.split(jax.random.key(3), 3)
    expected = augmentations.multi_view(keys, images, (plain, plain))
    np.testing.assert_allclose(first, expected[0], atol=1e-6)
    np.testing.assert_allclose(second, expected[1], atol=1e-6)
    np.testing.assert_allclose(
        augmentations.visible_views(images, (shifted,), seed=3)[0], first, atol=1e-6
    )
    assert np.abs(first - second).max() > 0.1
    assert 0 <= first.min() < first.max() <= 1


@pytest.mark.slow
@pytest.mark.nightly
def test_many_views_of_one_kind_are_the_views_one_by_one():
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
    first = ViewAugmentation(
        size=8, mean=(0.0,) * 3, std=(1.0,) * 3, jitter_probability=0.0, grayscale_probability=0.5
    )
    second = dataclasses.replace(first, solarize_probability=0.5)
    kinds = (first, second, first, second, first, dataclasses.replace(first, size=4))
    keys = jax.random.split(jax.random.key(3), 3)
    found = jax.jit(lambda k, i: augmentations.multi_view(k, i, kinds))(keys, images)
    for index, kind in enumerate(kinds):
        own = jax.vmap(jax.random.fold_in, (0, None))(keys, index)
        np.testing.assert_allclose(
            found[index], augmentations.augment(own, images, kind), atol=1e-5, err_msg=str(index)
        )
