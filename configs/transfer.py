r"""Other labeled data for a trained encoder: the section `data` of a config.

    python evaluate.py --workdir=runs/cifar10 --data=configs/transfer.py:digits
    python evaluate.py --workdir=runs/cifar10 --data=configs/transfer.py \
      --data.train_paths="('a.npz',)" --data.test_paths="('b.npz',)"

Images of folders and TFDS are cut as the encoder's own were, unless `--data.image_size` says otherwise,
and brought to its view; gray ones are repeated to its channels.
"""

from typing import Any

from ml_collections import ConfigDict

from configs import default


def get_config(source: str = "arrays") -> ConfigDict:
    """Returns the section `data` of a source, one of `dataset.SOURCES`."""
    section: Any = default.get_config().data
    section.source = source
    return section
