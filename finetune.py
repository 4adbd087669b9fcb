"""Fine-tunes a trained encoder on labelled images; see `configs/finetune_digits.py`."""

import sys

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from jevb_jax import experiment, finetuning, runner

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Config of the fine-tune.", lock_config=True
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory to write to.", required=True)
_TRACEBACK = flags.DEFINE_bool("traceback", False, "Show the whole traceback of an error.")


def main(argv: list[str]) -> None:
    """Runs the flags."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    logging.set_verbosity(logging.WARNING)  # Orbax tells of every file at INFO
    try:
        finetuning.finetune(experiment.to_json_values(_CONFIG.value), _WORKDIR.value)
    except runner.USER_ERRORS as error:
        if _TRACEBACK.value:
            raise
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    jax.config.config_with_absl()
    app.run(main)
