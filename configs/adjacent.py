"""Adjacent detection: JEVB trains on some classes; the others, of the same data set, are outside.

python train.py --config=configs/adjacent.py:digits,0 --workdir=runs/adjacent_digits_0
python train.py --config=configs/adjacent.py:cifar10,0 --workdir=runs/adjacent_cifar10_0

After Yang, Yu and Desell (2025, arXiv 2504.14704): inside and outside images look alike and differ
by their class alone, so a label-free score can fail if the objective does not learn what separates
the classes. A quarter of the classes (rounded to even), drawn with the seed, is outside. This share
is our choice; the paper's own lists are of other data sets, so its numbers do not compare. Take the
mean over several seeds. For other data set `data.inlier_classes` yourself.
"""

from typing import Any

import numpy as np
from ml_collections import ConfigDict

from jevb_jax.configs import cifar10, digits

NUM_CLASSES = {"digits": 10, "cifar10": 10}


def inside_classes(num_classes: int, seed: int) -> tuple[int, ...]:
    """The classes to train on, three quarters of all, rising."""
    num_outside = max(1, round(num_classes / 4))
    order = np.random.default_rng(seed).permutation(num_classes)
    return tuple(sorted(order[num_outside:].tolist()))


def get_config(data_set_and_seed: str = "digits,0") -> ConfigDict:
    """Returns the settings of a data set and the seed of its classes, separated by a comma."""
    data_set, _, seed = data_set_and_seed.partition(",")
    if data_set not in NUM_CLASSES or not seed.isdigit():
        raise ValueError(
            f"expected {' or '.join(NUM_CLASSES)}, a comma and a seed, got {data_set_and_seed!r}"
        )
    config: Any = digits.get_config() if data_set == "digits" else cifar10.get_config()
    config.data.inlier_classes = inside_classes(NUM_CLASSES[data_set], int(seed))
    config.ood.name = f"adjacent {data_set}, classes {config.data.inlier_classes} inside"
    config.ood.corruptions = ()
    return config
