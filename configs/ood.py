"""Protocols of out-of-distribution detection: the section `ood` of a config.

python evaluate.py --workdir=runs/cifar10 --ood=configs/ood.py:cifar10_arrays

* `corruptions`: the evaluated images, corrupted at five severities. It needs no other data.
* `cifar10_arrays`: CIFAR-10 against `.npz` files in `data/` (`images` uint8 [N,H,W,C], `labels`).
* `cifar10_c`: the published files of CIFAR-10-C (Hendrycks and Dietterich 2019) in `data/CIFAR-10-C`:
  15 corruptions at five severities, detection and accuracy.
* `cifar10_1`: the published files of CIFAR-10.1 v6 (Recht et al. 2018) in `data/`, detection and
  accuracy.
* `openood_cifar10`, `openood_cifar100`: OpenOOD v1.5, near and far sets. Its own lists (in
  `data/benchmark_imglist`) select the images (in `data/images_classic`).
* `openood_cifar10_tfds`, `openood_cifar100_tfds`: those sets of OpenOOD v1.5 that TFDS has. They use
  whole test sets instead of the lists, and the protocol of each number says so.
"""

from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict

from jevb_jax.configs import default

CORRUPTIONS = ("contrast", "crop", "gaussian_blur", "gaussian_noise", "patch_shuffle")
CORRUPTIONS += ("pixelate", "rotation")

# The 15 corruptions that papers report; the four others of the files are for choosing settings.
CIFAR_10_C = ("gaussian_noise", "shot_noise", "impulse_noise", "defocus_blur", "glass_blur")
CIFAR_10_C += ("motion_blur", "zoom_blur", "snow", "frost", "fog", "brightness", "contrast")
CIFAR_10_C += ("elastic_transform", "pixelate", "jpeg_compression")

# Classes of Tiny ImageNet (numbered by sorted WordNet id) that overlap with classes of CIFAR-10.
TINY_IMAGENET_OVERLAPS = (0, 5, 11, 35, 39, 41, 64, 66, 67, 73, 78, 90)
TINY_IMAGENET_OVERLAPS += (114, 115, 117, 131, 135, 147, 157, 182, 183, 193, 194, 196)


def outside_set(name: str, group: str, source: str, **keywords: Any) -> dict[str, Any]:
    """Describes an outside set for `ood.outside` or `ood.choice`.

    Args:
      name: name of the set in the results.
      group: "near", "far", ...; AUROC is averaged over the sets of a group. "shifted" is for images
        of the training classes, on which accuracy is measured, too.
      source: arrays | features | folder | image_list | paths | tfds | webdataset | hf.
      **keywords: arguments of `dataset.load_images` (`paths`, `tfds_name`, `split`, `data_dir`,
        `image_size`, `image_column`, `label_column`, `rows`, `exclude_labels`, `num_examples`,
        `split_seed`), and `protocol`, a description in words.

    Returns:
      A dict for a config.
    """
    return {"protocol": "", **keywords, "name": name, "group": group, "source": source}


def _corruptions(section: Any) -> None:
    section.name = "corruptions"
    section.corruptions = CORRUPTIONS


def _cifar10_arrays(section: Any) -> None:
    """Plain test sets in files; images are resized to the network's view."""
    section.name = "CIFAR-10 against plain test sets"
    tiny = "Tiny ImageNet validation at 32 pixels, without 24 classes that overlap with CIFAR-10's"
    sets = (
        ("cifar100", "near", "CIFAR-100 test", "cifar100_test", ()),
        ("tiny_imagenet", "near", tiny, "tinyimagenet_val_32", TINY_IMAGENET_OVERLAPS),
        ("mnist", "far", "MNIST test", "mnist_test", ()),
        ("fashion_mnist", "far", "Fashion-MNIST test", "fashion_mnist_test", ()),
        ("textures", "far", "the first 10 classes of DTD at 32 pixels", "dtd10_32", ()),
    )
    section.outside = tuple(
        outside_set(
            name,
            group,
            "arrays",
            paths=(f"data/{file}.npz",),
            exclude_labels=exclude,
            protocol=protocol,
        )
        for name, group, protocol, file, exclude in sets
    )
    section.corruptions = CORRUPTIONS


def _cifar10_c(section: Any) -> None:
    """The files of https://zenodo.org/records/2535967. Severity `s` is its s-th 10,000 rows."""
    section.name = "CIFAR-10-C"
    folder = "data/CIFAR-10-C"
    section.outside = tuple(
        outside_set(
            f"c_{name}_{severity}",
            "shifted",
            "arrays",
            paths=(f"{folder}/{name}.npy", f"{folder}/labels.npy"),
            rows=(10_000 * (severity - 1), 10_000 * severity),
            protocol=f"CIFAR-10-C, {name}, severity {severity} of 5",
        )
        for name in CIFAR_10_C
        for severity in range(1, 6)
    )


def _cifar10_1(section: Any) -> None:
    """The files of https://github.com/modestyachts/CIFAR-10.1, version 6."""
    section.name = "CIFAR-10.1"
    section.outside = (
        outside_set(
            "cifar10_1",
            "shifted",
            "arrays",
            paths=("data/cifar10.1_v6_data.npy", "data/cifar10.1_v6_labels.npy"),
            protocol="CIFAR-10.1 v6, 2,000 new test images",
        ),
    )


def _openood(section: Any, inside: str) -> None:
    """OpenOOD v1.5 (Zhang et al. 2023) with its lists; one score is chosen on its validation set."""
    near = {"cifar10": "cifar100", "cifar100": "cifar10"}[inside]
    section.name = f"OpenOOD v1.5, {inside}"

    def by_list(name: str, group: str, part: str) -> dict[str, Any]:
        return outside_set(
            name,
            group,
            "image_list",
            paths=(f"data/benchmark_imglist/{inside}/{part}_{name}.txt", "data/images_classic"),
            image_size=32,
            protocol=f"{name}, OpenOOD v1.5's list {inside}/{part}_{name}.txt",
        )

    section.outside = tuple(by_list(name, "near", "test") for name in (near, "tin")) + tuple(
        by_list(name, "far", "test") for name in ("mnist", "svhn", "texture", "places365")
    )
    section.choice = (by_list("tin", "near", "val"),)
    section.knn_k = ({"cifar10": 50, "cifar100": 200}[inside],)


def _openood_tfds(section: Any, inside: str) -> None:
    """Whole test sets of OpenOOD v1.5 that TFDS has."""
    section.name = f"the sets of OpenOOD v1.5 in TFDS, plain test sets, {inside}"
    near = {"cifar10": "cifar100", "cifar100": "cifar10"}[inside]
    sets = ((near, "near"), ("mnist", "far"), ("svhn_cropped", "far"), ("dtd", "far"))
    section.outside = tuple(
        outside_set(
            name,
            group,
            "tfds",
            tfds_name=name,
            image_size=32,
            protocol=f"{name}, the whole test split of TFDS, not OpenOOD's list",
        )
        for name, group in sets
    )
    section.knn_k = ({"cifar10": 50, "cifar100": 200}[inside],)


PROTOCOLS: dict[str, Callable[[Any], None]] = {
    "corruptions": _corruptions,
    "cifar10_arrays": _cifar10_arrays,
    "cifar10_c": _cifar10_c,
    "cifar10_1": _cifar10_1,
    "openood_cifar10": lambda section: _openood(section, "cifar10"),
    "openood_cifar100": lambda section: _openood(section, "cifar100"),
    "openood_cifar10_tfds": lambda section: _openood_tfds(section, "cifar10"),
    "openood_cifar100_tfds": lambda section: _openood_tfds(section, "cifar100"),
}


def get_config(protocol: str = "corruptions") -> ConfigDict:
    """Returns the section `ood` of a protocol, one of `PROTOCOLS`."""
    if protocol not in PROTOCOLS:
        raise ValueError(f"protocol must be one of {sorted(PROTOCOLS)}, got {protocol!r}")
    section: Any = default.get_config().ood
    PROTOCOLS[protocol](section)
    return section
