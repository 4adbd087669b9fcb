r"""Fine-tunes an encoder on CIFAR-10 (`data/cifar10_{train,test}.npz`), or only a classifier.

python finetune.py --config=configs/finetune_cifar10.py:full --config.init.workdir=runs/cifar10 \
      --workdir=runs/cifar10_full
"""

from typing import Any

from ml_collections import ConfigDict

from jevb_jax.configs import finetune_default


def get_config(mode: str = "full") -> ConfigDict:
    """Returns the settings; `mode` is "full" or "frozen"."""
    config: Any = finetune_default.get_config(mode)
    config.data.source = "arrays"
    config.data.train_paths = ("data/cifar10_train.npz",)
    config.data.test_paths = ("data/cifar10_test.npz",)
    return config
