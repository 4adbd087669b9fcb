r"""The section `data` of a config, to evaluate a trained encoder on other labeled data.

    python evaluate.py --workdir=runs/cifar10 --data=configs/transfer.py:digits
    python evaluate.py --workdir=runs/cifar10 --data=configs/transfer.py \
      --data.train_paths="('a.npz',)" --data.test_paths="('b.npz',)"

Encoded pictures are cropped like the encoder's own images, unless `--data.image_size` says
otherwise. They are then resized to the size of its view. Gray images are repeated to its channels.
"""

from typing import Any

from ml_collections import ConfigDict

from jevb_jax.configs import default


def get_config(source: str = "arrays") -> ConfigDict:
    """Returns the section `data` of a source, one of `dataset.SOURCES`."""
    section: Any = default.get_config().data
    section.source = source
    return section
