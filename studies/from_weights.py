"""A run that starts from converted weights beside one from scratch, on a folder of JPEGs.

python -m studies.from_weights --out=runs/from_weights_files
jevb-study studies/from_weights.py --out=runs/from_weights

The first command reads `data/cifar100_train.npz` and `data/cifar100_test.npz` (`images`, `labels`,
`class_names`) and writes class folders of JPEGs: 100 training images of each class, and all test
images. It also writes the backbone of the encoder `jevb-cifar10-resnet8` of the package with
torchvision's names, as `jevb_jax.convert` does, and says how good that encoder is without any
training here. That encoder has seen CIFAR-10 alone, which shares no class with CIFAR-100.

Both runs cut their crops out of the files (`augmentation.crop_from = "image"`) and differ in
`init.workdir` alone, so they see the same views. The recipe is that of `studies/cifar10_small.py`;
nothing was chosen here.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from jevb_jax import convert
from jevb_jax.evaluation.knn import Vote, knn_accuracies
from jevb_jax.images.image_files import FolderSource
from jevb_jax.loading import load
from jevb_jax.model import Model
from jevb_study.spec import Curves, Result, Study
from studies import cifar10_small

DIRECTORY = "runs/from_weights_files"
ENCODER = "jevb-cifar10-resnet8"
NUM_PER_CLASS = 100  # training images
QUALITY = 95


def write_folder(file: Path, root: Path, *, num_per_class: int | None) -> None:
    """Writes the first images of each class as JPEGs into a folder of that class.

    Args:
      file: `.npz` with `images`, uint8 `[N, H, W, 3]`, `labels` and `class_names`.
      root: directory for the folders of the classes.
      num_per_class: images of each class; None for all.
    """
    with np.load(file) as arrays:
        images, labels, names = (arrays[key] for key in ("images", "labels", "class_names"))
    for label, name in enumerate(names.tolist()):
        folder = root / name
        folder.mkdir(parents=True, exist_ok=True)
        for index in np.flatnonzero(labels == label)[:num_per_class]:
            picture = Image.fromarray(images[index])
            picture.save(folder / f"{index:05d}.jpg", quality=QUALITY)


def run_config(weights: str) -> Any:
    """The recipe on the JPEGs, from a file of weights, or from random ones if it is empty."""
    config: Any = cifar10_small.method_config("jevb")
    config.data.source = "folder"
    config.data.train_paths = (f"{DIRECTORY}/train",)
    config.data.test_paths = (f"{DIRECTORY}/test",)
    config.data.num_train_examples = 0
    config.data.image_size = 32
    config.augmentation.crop_from = "image"
    # The encoder was trained with these two, the small study without.
    config.model.zero_init_residual = False
    config.model.head_input = "direction"
    config.init.workdir = weights
    config.train.knn_every_epochs = 1
    config.evaluation.split = "test"
    config.evaluation.compare_untrained = True
    return config


def accuracy_as_it_is(model: Model, root: Path) -> float:
    """20-NN accuracy of an encoder on the test images; all training images are the bank."""
    train, test = (FolderSource(root / name, image_size=32) for name in ("train", "test"))
    features = [model.represent(np.stack([*data])) for data in (train, test)]
    (accuracy,) = knn_accuracies(
        features[0],
        np.asarray(train.labels),
        features[1],
        np.asarray(test.labels),
        num_classes=100,
        votes=[Vote(20, 0.1)],
    )
    return accuracy


def get_study() -> Study:
    """Two runs, three seeds."""
    runs = {
        "scratch": run_config(""),
        "converted": run_config(f"{DIRECTORY}/{ENCODER}.safetensors"),
    }
    return Study(
        title="From converted weights and from scratch: CIFAR-100 as JPEGs, 10,000 images",
        runs=runs,
        seeds=(0, 1, 2),
        measures=(
            Result("20-NN, trained", "knn_20_accuracy"),
            Result("20-NN, random weights", "knn_20_accuracy", encoder="untrained"),
            Result("linear, trained", "linear_accuracy"),
            Result("linear, random weights", "linear_accuracy", encoder="untrained"),
        ),
        figures=(
            Curves(
                "curves",
                "20-NN, validation split: converted weights and scratch",
                tuple(runs),
                ("validation/knn_20_accuracy",),
                over_views=True,
            ),
        ),
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Writes the JPEGs and the weights."""
    parser = argparse.ArgumentParser(prog="python -m studies.from_weights", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--data", default="data", help="directory of the two .npz files")
    parser.add_argument("--out", default=DIRECTORY, help="directory to write to")
    arguments = parser.parse_args(argv)
    data, out = Path(arguments.data), Path(arguments.out)
    write_folder(data / "cifar100_train.npz", out / "train", num_per_class=NUM_PER_CLASS)
    write_folder(data / "cifar100_test.npz", out / "test", num_per_class=None)
    model = load(ENCODER)
    (out / f"{ENCODER}.safetensors").write_bytes(convert.torch_weights(model))
    print(f"20-NN accuracy of {ENCODER} as it is: {accuracy_as_it_is(model, out):.4f}")


if __name__ == "__main__":
    main()
