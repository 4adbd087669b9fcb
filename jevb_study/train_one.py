"""The process that trains one run of a study: `python -m jevb_study.train_one RUN_DIRECTORY`.

It trains with the config that the study wrote into the directory. It watches its standard input, which
the study keeps open. When that input ends, the study has stopped or died. The run then finishes its
step, saves its state and stops.

An error that the user can mend is one message in the run's log; a bug keeps its traceback there.
Except for a step that is not finite, neither is a result of the method.
"""

import os
import signal
import sys
import threading
from pathlib import Path

from jevb_jax import commands
from jevb_jax.runs import files
from jevb_jax.runs.checkpoints import config_hash
from jevb_jax.settings import run_config
from jevb_jax.training.loop import NonFiniteError
from jevb_study import mistakes

ASKED_CONFIG = "asked_config.json"


def _stop_with_study() -> None:
    os.read(0, 1)  # returns when standard input ends, however the study has ended
    os.kill(os.getpid(), signal.SIGTERM)


def train_one(directory: Path) -> None:
    """Trains or resumes a run. A step that is not finite is recorded as a result of the study.

    Other errors are not recorded, because they do not describe the method.
    """
    path = directory / ASKED_CONFIG
    try:
        commands.train(run_config.read_config(path), directory)
    except NonFiniteError as error:
        steps = [int(found.name.rpartition("_")[2]) for found in directory.glob("nonfinite_step_*")]
        failure = {
            "error": type(error).__name__,
            "message": str(error),
            "step": max(steps),
            "config_hash": config_hash(files.read_json(path)),
        }
        files.write_json_atomically(directory / "failure.json", failure)
        raise


if __name__ == "__main__":
    threading.Thread(target=_stop_with_study, daemon=True).start()
    with mistakes.as_messages():
        train_one(files.to_path(sys.argv[1]))
