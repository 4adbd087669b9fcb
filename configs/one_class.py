"""One-class detection: JEVB trains on one class; the test images of other classes are outside.

python train.py --config=configs/one_class.py:digits,3 --workdir=runs/one_class_digits_3
python train.py --config=configs/one_class.py:cifar10,0 --workdir=runs/one_class_cifar10_0

`studies/one_class_digits.py` runs all ten classes and averages them.
"""

from typing import Any

from ml_collections import ConfigDict

from jevb_jax.configs import cifar10, digits

DATA_SETS = ("digits", "cifar10")


def get_config(data_set_and_class: str = "digits,0") -> ConfigDict:
    """Returns the settings of a data set and the number of its class, separated by a comma."""
    data_set, _, label = data_set_and_class.partition(",")
    if data_set not in DATA_SETS or not label.isdigit():
        raise ValueError(
            f"expected {' or '.join(DATA_SETS)}, a comma and a class, got {data_set_and_class!r}"
        )
    config: Any = digits.get_config() if data_set == "digits" else cifar10.get_config()
    config.data.inlier_class = int(label)
    config.evaluation.labels_per_class = 0  # with one class there is nothing to classify
    config.ood.name = f"one-class {data_set}, class {label}"
    config.ood.corruptions = ()
    if data_set == "digits":  # about 130 training images per class
        config.train.batch_size = 64
        config.train.health_every_steps = 0
        config.evaluation.knn_k = (5,)
        config.ood.knn_k = (5,)
        config.ood.ssd_clusters = (1,)
    return config
