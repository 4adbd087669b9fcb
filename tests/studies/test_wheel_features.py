"""The network of the study of features from a wheel, against loops of NumPy and known values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from studies import wheel_features
from tests.marks import nightly


def same_convolution(images: np.ndarray, kernel: np.ndarray, stride: int) -> np.ndarray:
    """Padding "SAME" by its definition: output `o` reads the pixels from `o * stride - before`.

    Args:
      images: `[N, H, W, C]`.
      kernel: `[rows, columns, C, C out]`.
      stride: step of the output.
    """
    num, height, width, _ = images.shape
    rows, columns = kernel.shape[:2]
    out_height, out_width = -(-height // stride), -(-width // stride)
    top = max((out_height - 1) * stride + rows - height, 0) // 2
    left = max((out_width - 1) * stride + columns - width, 0) // 2
    result = np.zeros((num, out_height, out_width, kernel.shape[3]))
    for y, x, i, j in np.ndindex(out_height, out_width, rows, columns):
        row, column = y * stride + i - top, x * stride + j - left
        if 0 <= row < height and 0 <= column < width:
            result[:, y, x] += images[:, row, column] @ kernel[i, j]
    return result


def random_layer(
    random: np.random.Generator, name: str, norm: str, shape: tuple[int, ...]
) -> dict[str, np.ndarray]:
    """A convolution and a BatchNorm as PyTorch names them."""
    arrays = {
        f"{name}.weight": random.normal(size=shape),
        f"{norm}.weight": random.uniform(0.5, 2, shape[0]),
        f"{norm}.bias": random.normal(size=shape[0]),
        f"{norm}.running_mean": random.normal(size=shape[0]),
        f"{norm}.running_var": random.uniform(1e-4, 2, shape[0]),  # so that epsilon matters
    }
    return {name: array.astype(np.float32) for name, array in arrays.items()}


def normalized(values: np.ndarray, weights: dict[str, np.ndarray], norm: str) -> np.ndarray:
    """BatchNorm by its definition, with the epsilon of EfficientNet."""
    centered = values - weights[f"{norm}.running_mean"]
    scaled = centered / np.sqrt(weights[f"{norm}.running_var"] + 1e-3)
    return scaled * weights[f"{norm}.weight"] + weights[f"{norm}.bias"]


@pytest.mark.parametrize("size", [7, 8])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("side", [3, 5])
def test_a_layer_is_the_convolution_and_the_norm_of_their_definitions(size, stride, side):
    random = np.random.default_rng(size + 10 * stride + 100 * side)
    images = random.normal(size=(2, size, size, 3)).astype(np.float32)
    weights = random_layer(random, "dense", "bn", (4, 3, side, side))
    layer = wheel_features.folded(weights, "dense", "bn")
    kernel = weights["dense.weight"].transpose(2, 3, 1, 0)
    expected = normalized(same_convolution(images, kernel, stride), weights, "bn")
    found = wheel_features.convolve(layer, jnp.asarray(images), stride=stride)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("size", [nightly(7), 8])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("side", [3, 5])
def test_a_depthwise_layer_reads_each_channel_alone(size, stride, side):
    random = np.random.default_rng(size + 10 * stride + 100 * side)
    images = random.normal(size=(2, size, size, 3)).astype(np.float32)
    weights = random_layer(random, "depthwise", "bn", (3, 1, side, side))
    layer = wheel_features.folded(weights, "depthwise", "bn")
    # A dense kernel with zeros between different channels.
    kernel = np.zeros((side, side, 3, 3))
    for channel in range(3):
        kernel[:, :, channel, channel] = weights["depthwise.weight"][channel, 0]
    expected = normalized(same_convolution(images, kernel, stride), weights, "bn")
    found = wheel_features.convolve_depthwise(layer, jnp.asarray(images), stride=stride)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-3)


def test_the_network_is_sixteen_blocks_that_add_only_within_a_stage():
    random = np.random.default_rng(0)
    repeats, strides, widths = (1, 2, 2, 3, 3, 4, 1), (1, 2, 2, 2, 1, 2, 1), (2, 3, 3, 4, 5, 4, 6)
    weights: dict[str, np.ndarray] = {}

    def layer(x: np.ndarray, name: str, norm: str, shape: tuple[int, ...], stride: int = 1):
        weights.update(random_layer(random, name, norm, shape))
        kernel = weights[f"{name}.weight"].transpose(2, 3, 1, 0)
        if shape[1] == 1 and x.shape[-1] > 1:  # depthwise
            kernel = kernel * np.eye(shape[0])
        return normalized(same_convolution(x, kernel, stride), weights, norm)

    images = random.normal(size=(2, 20, 20, 3)).astype(np.float32)
    x = np.clip(layer(images, "_conv_stem", "_bn0", (4, 3, 3, 3), 2), 0, 6)
    index = 0
    for repeat, stride, width in zip(repeats, strides, widths, strict=True):
        for position in range(repeat):
            name, y = f"_blocks.{index}", x
            if index > 0:
                shape = (2 * x.shape[-1], x.shape[-1], 1, 1)
                y = np.clip(layer(y, f"{name}._expand_conv", f"{name}._bn0", shape), 0, 6)
            step, shape = (1 if position else stride), (y.shape[-1], 1, 3, 3)
            y = np.clip(layer(y, f"{name}._depthwise_conv", f"{name}._bn1", shape, step), 0, 6)
            shape = (width, y.shape[-1], 1, 1)
            y = layer(y, f"{name}._project_conv", f"{name}._bn2", shape)
            x = x + y if position else y
            index += 1
    expected = np.clip(layer(x, "_conv_head", "_bn1", (7, 6, 1, 1)), 0, 6).mean(axis=(1, 2))
    found = jax.jit(wheel_features.make_network(weights))(jnp.asarray(images))
    assert np.std(expected) > 0.1
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)


def test_preprocessing_of_gray_and_colored_images():
    gray = np.array([[0, 255], [0, 255]], np.uint8)[None, :, :, None]
    found = np.asarray(wheel_features.preprocess(jnp.asarray(gray), 4))
    assert found.shape == (1, 4, 4, 3)
    # Pixel centers of the enlarged row lie at -1/4, 1/4, 3/4 and 5/4 of the original's.
    row = (np.array([0, 63.75, 191.25, 255]) - 127) / 128
    np.testing.assert_allclose(found[0, 2], np.repeat(row[:, None], 3, axis=1), atol=1e-6)
    colored = np.array([0, 127, 255], np.uint8).reshape(1, 1, 1, 3)
    found = np.asarray(wheel_features.preprocess(jnp.asarray(colored), 2))
    np.testing.assert_allclose(found[0, 1, 1], [-127 / 128, 0, 1], atol=1e-6)


def test_crops_are_parts_of_the_mirror_image():
    images = np.random.default_rng(0).integers(0, 256, (20, 32, 32, 3), np.uint8)
    found = wheel_features.crops(images, np.random.default_rng(1))
    assert found.shape == (20, wheel_features.CROP, wheel_features.CROP, 3)
    places = set()
    for image, crop in zip(images, found, strict=True):
        mirrored = np.flip(image, axis=1)
        windows = np.lib.stride_tricks.sliding_window_view(mirrored, crop.shape)[..., 0, :, :, :]
        match = np.argwhere(np.all(windows == crop, axis=(2, 3, 4)))
        assert len(match) == 1
        places.add(tuple(match[0].tolist()))
    assert len(places) > 10


def test_drawn_images_leave_out_classes_of_cifar10_and_keep_their_labels(tmp_path):
    labels = np.arange(60) % 3
    images = np.tile(labels[:, None, None].astype(np.uint8), (1, 2, 2))
    np.savez(
        tmp_path / "tiny.npz",
        images=images,
        labels=labels,
        class_overlaps_cifar10=np.array([False, True, False]),
    )
    found = wheel_features.drawn("tiny", 30, tmp_path)
    assert found.images.shape == (30, 2, 2, 1)
    assert set(found.labels.tolist()) == {0, 2}
    np.testing.assert_array_equal(found.images[:, 0, 0, 0], found.labels)


def test_weights_of_another_network_are_refused():
    with pytest.raises(KeyError, match="_bn0"):
        wheel_features.make_network({"conv1.weight": np.zeros((8, 3, 3, 3), np.float32)})
