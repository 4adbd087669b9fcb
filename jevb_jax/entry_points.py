"""The commands `jevb-train`, `jevb-evaluate`, `jevb-finetune` and `jevb-export`.

Each imports its program when it is called, so that a missing extra becomes one message.
"""

import sys
from types import ModuleType
from typing import NoReturn

from jevb_jax import extras


def _scripts() -> ModuleType:
    try:
        from jevb_jax import scripts
    except ModuleNotFoundError as error:
        _exit(error)
    return scripts


def _exit(error: ModuleNotFoundError) -> NoReturn:
    message = extras.advice(error)
    if message is None:
        raise error
    sys.exit(message)  # to standard error, with status 1


def train() -> None:
    """Runs `jevb-train`."""
    _scripts().train()


def evaluate() -> None:
    """Runs `jevb-evaluate`."""
    _scripts().evaluate()


def finetune() -> None:
    """Runs `jevb-finetune`."""
    _scripts().finetune()


def export() -> int:
    """Runs `jevb-export` and returns the exit status."""
    try:
        from jevb_jax import export as program
    except ModuleNotFoundError as error:
        _exit(error)
    return program.main()
