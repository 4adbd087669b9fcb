"""What the programs `jevb_jax.export`, `jevb_jax.convert` and `jevb_jax.rounding` share."""

import sys
from collections.abc import Callable

from jevb_jax import messages
from jevb_jax.runs.metrics_log import standard_output, unbroken
from jevb_jax.runs.waiting import Waiting


def run(work: Callable[[], str], doing: str) -> int:
    """Runs the work of a program; an error that the user can mend is one message.

    Args:
      work: returns what to print at the end.
      doing: what the work does, for people who wait, such as "Exporting".

    Returns:
      The exit status: 0, or 1 after such an error.
    """
    console = standard_output()
    try:
        with Waiting(console, doing):
            said = work()
    except Exception as error:
        message = messages.for_person(error)
        if message is None:
            raise
        print(message, file=sys.stderr)
        return 1
    with unbroken(console):
        console.print(said, markup=False, soft_wrap=True)
    return 0
