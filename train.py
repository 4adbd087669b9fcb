"""Trains or resumes a run: `python train.py --config=configs/digits.py --workdir=runs/digits`."""

import jax
from absl import app, flags
from ml_collections import config_flags

from jevb_jax import command_line, commands

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config of the run.", lock_config=True)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Directory of the run; a run in it is resumed.", required=True
)
flags.adopt_module_key_flags(command_line)  # so that --help shows them


def main(argv: list[str]) -> None:
    """Trains or resumes the run that the flags describe."""
    command_line.run(argv, lambda: commands.train(_CONFIG.value, _WORKDIR.value))


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    jax.config.config_with_absl()
    app.run(main, flags_parser=command_line.parse_flags)
