"""JEVB and its neighbors on CIFAR-10: ResNet-18 with the CIFAR stem, bfloat16. For one accelerator.

python train.py --config=configs/cifar10.py --workdir=runs/cifar10
python train.py --config=configs/cifar10.py:byol --workdir=runs/cifar10_byol

The data come from TFDS's array_record (`tfds build cifar10 --file_format=array_record`) or, with
`--config.data.source=arrays --config.data.train_paths="('train.npz',)"` and `test_paths`, from files.
What its first run at full size gave, and what has changed since: docs/full_size.md.
"""

from typing import Any

from ml_collections import ConfigDict

from configs import default, ood, recipes


def get_config(method: str = "jevb") -> ConfigDict:
    """Returns the settings of a method, one of `recipes.METHODS`."""
    config: Any = default.get_config()
    config.data.source = "tfds"
    config.data.tfds_name = "cifar10"

    config.model.backbone = "resnet18"
    config.model.embedding_dim = 512
    config.model.dtype = "bfloat16"

    # JEVB's, with which its settings were chosen; the other methods bring their own.
    config.optimizer.name = "adamw"
    config.optimizer.learning_rate = 2e-3
    config.optimizer.weight_decay = 1e-4
    config.optimizer.warmup_epochs = 10.0

    config.train.batch_size = 512
    config.train.num_epochs = 100
    config.ood.corruptions = ood.CORRUPTIONS
    return recipes.set_cifar_method(config, method)
