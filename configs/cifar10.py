"""JEVB and related methods on CIFAR-10: ResNet-18 with the CIFAR stem, bfloat16, one accelerator.

python train.py --config=configs/cifar10.py --workdir=runs/cifar10
python train.py --config=configs/cifar10.py:byol --workdir=runs/cifar10_byol

The data come from TFDS (`tfds build cifar10 --file_format=array_record`). To read files instead, set
`--config.data.source=arrays --config.data.train_paths="('train.npz',)"` and `test_paths`.
docs/full_size.md has the results of the full-size runs.
"""

from typing import Any

from ml_collections import ConfigDict

from jevb_jax.configs import default, ood, recipes


def get_config(method: str = "jevb") -> ConfigDict:
    """Returns the settings of a method, one of `recipes.METHODS`."""
    config: Any = default.get_config()
    config.data.source = "tfds"
    config.data.tfds_name = "cifar10"

    config.model.backbone = "resnet18"
    config.model.embedding_dim = 512
    config.model.dtype = "bfloat16"

    # JEVB's optimizer. The other methods set their own, and their own batch size. With AdamW, the
    # embeddings keep a sixth of the dimensions (docs/full_size.md).
    config.optimizer.name = "muon"
    config.optimizer.learning_rate = 2e-3
    config.optimizer.weight_decay = 1e-4
    config.optimizer.warmup_epochs = 10.0

    config.train.batch_size = 256
    config.train.num_epochs = 100
    if method == "jevb":
        # With another optimizer and without it, the embeddings fall into a few dimensions.
        config.train.target_decay = 0.99
        # The method's own is chosen on small networks, and worse than chance on near sets here.
        config.ood.default_score = "representation/ssd_1"
    config.ood.corruptions = ood.CORRUPTIONS
    return recipes.set_cifar_method(config, method)
