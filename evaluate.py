"""Evaluates a run's checkpoint: `python evaluate.py --workdir=runs/digits`.

`--data=configs/transfer.py:digits` evaluates the run's encoder on other labeled data.
"""

from typing import Any

import jax
from absl import app, flags
from ml_collections import config_flags

from jevb_jax import command_line, commands
from jevb_jax.settings import run_config

_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of a run of train.py.", required=True)
_STEP = flags.DEFINE_integer(
    "step", None, "Step of the checkpoint; the latest by default.", lower_bound=0
)
_OOD = config_flags.DEFINE_config_file(
    "ood",
    None,
    "Protocol of out-of-distribution detection; replaces that of the run.",
    lock_config=True,
)
_DATA = config_flags.DEFINE_config_file(
    "data",
    None,
    "Other labeled data, for k-NN and linear probes only (configs/transfer.py).",
    lock_config=True,
)
_ACCEPT = flags.DEFINE_bool(
    "accept_changed_data",
    False,
    "Evaluate even if the data have changed since the run started; the results say so.",
)
flags.adopt_module_key_flags(command_line)  # so that --help shows them


def evaluate() -> None:
    """Evaluates the run on its own data or on other data."""
    config: Any = run_config.load_config(_WORKDIR.value)
    if _DATA.value is not None:
        if _OOD.value is not None:
            raise ValueError("give --data or --ood, not both: --data evaluates no detection")
        commands.evaluate_on(config, _DATA.value, _WORKDIR.value, step=_STEP.value)
        return
    if _OOD.value is not None:
        config.ood = _OOD.value
    config.input.accept_changed_data = _ACCEPT.value
    commands.evaluate(config, _WORKDIR.value, step=_STEP.value)


def main(argv: list[str]) -> None:
    """Evaluates the run that the flags describe."""
    command_line.run(argv, evaluate)


if __name__ == "__main__":
    jax.config.config_with_absl()
    app.run(main, flags_parser=command_line.parse_flags)
