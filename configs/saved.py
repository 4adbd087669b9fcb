"""Uses the settings that a run saved: `--config=runs/digits/config.json`.

python train.py --config=runs/digits/config.json --workdir=runs/again --config.seed=1

The scripts use this file for a `--config` that ends in .json.
"""

from ml_collections import ConfigDict

from jevb_jax.settings import run_config


def get_config(path: str) -> ConfigDict:
    """Returns the settings of a `config.json`; newer settings have the value that the run had."""
    return run_config.read_config(path)
