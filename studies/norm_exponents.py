"""Which power of a feature's length detects best, and what in-distribution features say about it.

python -m studies.norm_exponents --model=jevb-cifar10-resnet18 --out=runs/norm_exponents

It reads a model trained on CIFAR-10 and answers two questions of docs/full_size.md:

* `beta` of `x / |x|^beta`: the AUROC of the Mahalanobis distance on validation sets and on test sets,
  beside the local dimension of the training features (docs eq. 45). Features are written to
  `features.npz` and read from there by the next call.
* With `--choose`, the AUROC of the model's own scores on the validation sets, which choose its default.

The validation sets are held-out training images of CIFAR-10 against training images of CIFAR-100 and
scikit-learn's digits. No test image is read for a choice.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.datasets import load_digits

from jevb_jax import load
from jevb_jax.evaluation import scaled_mahalanobis
from jevb_jax.evaluation.detection_metrics import ood_metrics
from jevb_jax.images.batches import load_resident
from jevb_jax.images.dataset import load_dataset
from jevb_jax.model import Model
from jevb_jax.report import tables
from jevb_jax.runs import files

NUM_FITTED, NUM_VALIDATION, NUM_OUTSIDE = 4000, 2500, 2000
EXPONENTS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 3.0)
CHOICES = ("CIFAR-100, training images", "digits")
NEAR = {"CIFAR-100": "cifar100_test", "Tiny ImageNet": "tinyimagenet_val_32"}
FAR = {"MNIST": "mnist_test", "Fashion-MNIST": "fashion_mnist_test", "textures": "dtd10_32"}
SCORES = ("jevb/mixture_and_residual", "jevb/negative_log_likelihood", "representation/ssd_1")


def enlarged_digits(count: int) -> np.ndarray:
    """The first digits of scikit-learn as uint8 `[count, 32, 32, 3]`."""
    digits: Any = load_digits()
    images = (digits.images[:count] / 16 * 255).astype(np.uint8)
    return np.repeat(np.repeat(images, 4, axis=1), 4, axis=2)[..., None].repeat(3, axis=-1)


def _of_file(name: str) -> np.ndarray:
    images = np.load(Path("data") / f"{name}.npz")["images"]
    images = images[..., None] if images.ndim == 3 else images
    return np.repeat(images, 3, axis=-1) if images.shape[-1] == 1 else images


def _held_out(model: Model) -> tuple[np.ndarray, np.ndarray]:
    """Training and validation images of the model's own split."""
    split = load_dataset(**model.config["data"])
    return load_resident(split.train), load_resident(split.validation)


def image_sets(model: Model) -> dict[str, np.ndarray]:
    """Images by the name of their set, drawn with seed 0."""
    random = np.random.default_rng(0)

    def drawn(images: np.ndarray, count: int) -> np.ndarray:
        return images[random.permutation(len(images))[:count]]

    train, validation = _held_out(model)
    sets = {"train": drawn(train, NUM_FITTED), "validation": validation[:NUM_VALIDATION]}
    sets[CHOICES[0]] = drawn(_of_file("cifar100_train"), NUM_OUTSIDE)
    sets[CHOICES[1]] = enlarged_digits(1000)
    for label, name in {"test": "cifar10_test", **NEAR, **FAR}.items():
        sets[label] = drawn(_of_file(name), NUM_OUTSIDE)
    return sets


def exponent_rows(features: Mapping[str, np.ndarray]) -> list[list[str]]:
    """A row for each exponent: local dimension, AUROC on each validation set, near and far means."""
    rows = []
    for beta in EXPONENTS:
        score = scaled_mahalanobis.fit_scaled_mahalanobis(features["train"], exponent=beta)
        dimension = scaled_mahalanobis.local_dimension(
            scaled_mahalanobis.scaled_features(features["train"], exponent=beta)
        )
        found = {name: np.asarray(score(values)) for name, values in features.items()}

        def auroc(inside: str, outside: str, found: Mapping[str, np.ndarray] = found) -> float:
            return ood_metrics(found[inside], found[outside]).auroc

        numbers = [
            *(auroc("validation", name) for name in CHOICES),
            *(np.mean([auroc("test", name) for name in group]) for group in (NEAR, FAR)),
        ]
        rows.append([f"{beta:g}", f"{dimension:.2f}", *(f"{number:.3f}" for number in numbers)])
    return rows


def choice_rows(model: Model) -> list[list[str]]:
    """A row for each of the model's own scores: AUROC on each validation set."""
    _, validation = _held_out(model)
    outside = _of_file("cifar100_train")
    outside = outside[np.random.default_rng(0).permutation(len(outside))[:1000]]
    rows = []
    for name in SCORES:
        inside = model.ood_score(validation[:1000], name)
        sets = (outside, enlarged_digits(500))
        aurocs = [ood_metrics(inside, model.ood_score(images, name)).auroc for images in sets]
        rows.append([f"`{name}`", *(f"{auroc:.3f}" for auroc in aurocs)])
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--model", required=True, help="run, export or name of the package's weights"
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--choose", action="store_true", help="also the model's own scores")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    model = load(options.model)
    kept = options.out / "features.npz"
    if not kept.exists():
        made = {name: model.represent(images) for name, images in image_sets(model).items()}
        files.write_arrays_atomically(kept, made)
    features = dict(np.load(kept))
    head = ["beta", "local dimension", *(f"validation: {name}" for name in CHOICES), "near", "far"]
    lines = tables.markdown_table(head, exponent_rows(features))
    if options.choose:
        head = ["score", *(f"validation: {name}" for name in CHOICES)]
        lines += ["", *tables.markdown_table(head, choice_rows(model))]
    text = "\n".join(lines)
    files.write_text_atomically(options.out / "table.md", f"{text}\n")
    print(text)


if __name__ == "__main__":
    main()
