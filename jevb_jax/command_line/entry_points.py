"""The commands `jevb-train`, `jevb-evaluate`, `jevb-finetune`, `jevb-export` and `jevb-study`.

Each imports its program when it is called. So a missing extra becomes one message, and the first line
comes before JAX is imported, which takes seconds.
"""

import signal
import sys
from types import ModuleType
from typing import NoReturn

from jevb_jax import extras


def _begin() -> None:
    """Says that the program has started. Ctrl-C needs no stack of frames, also in imports."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if not any(argument.startswith(("--help", "-h", "-?")) for argument in sys.argv[1:]):
        print("Importing JAX and other libraries.", flush=True)


def _scripts() -> ModuleType:
    _begin()
    try:
        from jevb_jax.command_line import scripts
    except ModuleNotFoundError as error:
        _exit(error)
    return scripts


def _exit(error: ModuleNotFoundError) -> NoReturn:
    message = extras.advice(error)
    if message is None:
        raise error
    sys.exit(message)  # to standard error, with status 1


def train() -> None:
    """Trains or resumes a run, as `python train.py` does; ends the process."""
    _scripts().train()


def evaluate() -> None:
    """Evaluates a run, as `python evaluate.py` does; ends the process."""
    _scripts().evaluate()


def finetune() -> None:
    """Fine-tunes an encoder, as `python finetune.py` does; ends the process."""
    _scripts().finetune()


def export() -> int:
    """Exports a run, as `python -m jevb_jax.export` does; returns the exit status."""
    _begin()
    try:
        from jevb_jax import export as program
    except ModuleNotFoundError as error:
        _exit(error)
    return program.main()


def study() -> int:
    """Runs a study, as `python -m jevb_study` does; returns the exit status."""
    _begin()
    sys.path.insert(0, "")  # as `python -m` does: a study file may import what lies beside it
    try:
        from jevb_study import run as program
    except ModuleNotFoundError as error:
        _exit(error)
    return program.start()
