"""Fine-tunes a trained encoder on labeled images; see `configs/finetune_digits.py`."""

import jax
from absl import app, flags
from ml_collections import config_flags

from jevb_jax import command_line, finetuning
from jevb_jax.training import experiment

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Config of the fine-tune.", lock_config=True
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory to write to.", required=True)
flags.adopt_module_key_flags(command_line)  # so that --help shows them


def main(argv: list[str]) -> None:
    """Fine-tunes as the flags describe."""
    command_line.run(
        argv,
        lambda: finetuning.finetune(experiment.to_json_values(_CONFIG.value), _WORKDIR.value),
    )


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    jax.config.config_with_absl()
    app.run(main, flags_parser=command_line.parse_flags)
