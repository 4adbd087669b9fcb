"""Evaluates a run's checkpoint: `python evaluate.py --workdir=runs/digits`.

With `--data=configs/transfer.py:digits`, its encoder on other labelled data.
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
    "Protocol of out-of-distribution detection, in place of the run's own.",
    lock_config=True,
)
_DATA = config_flags.DEFINE_config_file(
    "data",
    None,
    "Other labelled data: k-NN and linear probes on them, and nothing else (configs/transfer.py).",
    lock_config=True,
)
_ACCEPT = flags.DEFINE_bool(
    "accept_changed_data",
    False,
    "Evaluates although the data are not those that the run started on; the results say so.",
)
flags.adopt_module_key_flags(command_line)  # --help shows them too


def evaluate() -> None:
    """Evaluates the run on its own data, or on others."""
    config: Any = run_config.load_config(_WORKDIR.value)
    if _DATA.value is not None:
        if _OOD.value is not None:
            raise ValueError("give --data or --ood: on other data nothing is detected")
        commands.evaluate_on(config, _DATA.value, _WORKDIR.value, step=_STEP.value)
        return
    if _OOD.value is not None:
        config.ood = _OOD.value
    config.input.accept_changed_data = _ACCEPT.value
    commands.evaluate(config, _WORKDIR.value, step=_STEP.value)


def main(argv: list[str]) -> None:
    """Runs the flags."""
    command_line.run(argv, evaluate)


if __name__ == "__main__":
    jax.config.config_with_absl()
    app.run(main, flags_parser=command_line.parse_flags)
