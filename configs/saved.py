"""The settings that a run saved, to be given again: `--config=runs/digits/config.json`.

python train.py --config=runs/digits/config.json --workdir=runs/again --config.seed=1

The scripts read a `--config` that ends in .json by this file.
"""

from ml_collections import ConfigDict

from jevb_jax.settings import run_config


def get_config(path: str) -> ConfigDict:
    """Returns the settings of a `config.json`; those it does not have are as they were then."""
    return run_config.read_config(path)
