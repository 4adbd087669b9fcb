"""What the programs `jevb_jax.export`, `jevb_jax.convert` and `jevb_jax.rounding` share."""

import sys
from collections.abc import Callable

from jevb_jax import messages
from jevb_jax.runs.metrics_log import standard_output, unbroken


def run(work: Callable[[], str]) -> int:
    """Runs the work of a program; an error that the user can mend is one message.

    Args:
      work: returns what to print at the end.

    Returns:
      The exit status: 0, or 1 after such an error.
    """
    try:
        said = work()
    except Exception as error:
        message = messages.for_person(error)
        if message is None:
            raise
        print(message, file=sys.stderr)
        return 1
    console = standard_output()
    with unbroken(console):
        console.print(said, markup=False, soft_wrap=True)
    return 0
