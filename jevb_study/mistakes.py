"""Errors of the commands, as messages."""

import contextlib
import sys
from collections.abc import Iterator

from jevb_jax import messages


@contextlib.contextmanager
def as_messages() -> Iterator[None]:
    """Turns an error that the user can fix into one message; a bug keeps its traceback."""
    try:
        yield
    except Exception as error:
        packages = ("jevb_jax", "jevb_study", "configs", "studies", "__main__")
        message = messages.for_person(error, packages=packages)
        if message is None:
            raise
        sys.exit(message)  # to standard error, with status 1
