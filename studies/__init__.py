"""Studies of many runs, and what runs them: `python -m studies.run STUDY.py --out=DIRECTORY`."""

import contextlib
import sys
from collections.abc import Iterator

from jevb_jax import messages


@contextlib.contextmanager
def mistakes_as_messages() -> Iterator[None]:
    """Says what a person can mend in one message, and exits; a fault of the program keeps its frames."""
    try:
        yield
    except Exception as error:
        packages = ("jevb_jax", "configs", "studies", "__main__")
        message = messages.for_person(error, packages=packages)
        if message is None:
            raise
        sys.exit(message)  # to standard error, with status 1
