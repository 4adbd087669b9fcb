"""Trains or resumes a run: `python train.py --config=configs/digits.py --workdir=runs/digits`."""

import os
import sys

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from jevb_jax import parallel, runner

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config of the run.", lock_config=True)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Directory of the run; resumed if it holds one.", required=True
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator_address", None, "host:port of process 0, where no launcher is found."
)
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "Processes of the run, likewise.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Number of this process, from 0, likewise.")
_HEARTBEAT = flags.DEFINE_integer(
    "heartbeat_timeout_seconds", 100, "How long a process may be silent before the others end."
)
_TRACEBACK = flags.DEFINE_bool("traceback", False, "Show the whole traceback of an error.")


def main(argv: list[str]) -> None:
    """Runs the flags."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    logging.set_verbosity(logging.WARNING)  # Orbax tells of every file at INFO
    try:
        parallel.start_processes(
            os.environ,
            coordinator_address=_COORDINATOR.value,
            num_processes=_NUM_PROCESSES.value,
            process_id=_PROCESS_ID.value,
            heartbeat_timeout_seconds=_HEARTBEAT.value,
        )
        runner.train(_CONFIG.value, _WORKDIR.value)
    except runner.USER_ERRORS as error:
        if _TRACEBACK.value:
            raise
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    jax.config.config_with_absl()
    app.run(main)
