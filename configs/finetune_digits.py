r"""Fine-tunes an encoder on scikit-learn's bundled digits, or trains only a classifier.

    python finetune.py --config=configs/finetune_digits.py:full --config.init.workdir=runs/digits \
      --workdir=runs/digits_full

Use `:frozen` instead of `:full` to train only the classifier.
"""

from typing import Any

from ml_collections import ConfigDict

from jevb_jax.configs import finetune_default


def get_config(mode: str = "full") -> ConfigDict:
    """Returns the settings; `mode` is "full" or "frozen"."""
    config: Any = finetune_default.get_config(mode)
    config.data.source = "digits"
    config.augmentation.flip_probability = 0.0  # a mirrored 2 is not a 2
    return config
