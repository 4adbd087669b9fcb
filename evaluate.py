"""Evaluates a run's checkpoint: `python evaluate.py --workdir=runs/digits`.

With `--data=configs/transfer.py:digits`, its encoder on other labelled data.
"""

import os
import sys

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from jevb_jax import parallel, runner

_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of a run of train.py.", required=True)
_STEP = flags.DEFINE_integer("step", None, "Step of the checkpoint; the latest by default.")
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
        config = runner.load_config(_WORKDIR.value)
        if _DATA.value is not None:
            if _OOD.value is not None:
                raise ValueError("give --data or --ood: on other data nothing is detected")
            runner.evaluate_on(config, _DATA.value, _WORKDIR.value, step=_STEP.value)
            return
        if _OOD.value is not None:
            config.ood = _OOD.value
        runner.evaluate(config, _WORKDIR.value, step=_STEP.value)
    except runner.USER_ERRORS as error:
        if _TRACEBACK.value:
            raise
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    jax.config.config_with_absl()
    app.run(main)
