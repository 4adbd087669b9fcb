"""What the scripts share: flags of several processes, and errors that a person can mend.

For scripts alone: importing it defines its flags.
"""

import os
import sys
from collections.abc import Callable

from absl import app, flags, logging

from jevb_jax import archive, parallel, runner

_COORDINATOR = flags.DEFINE_string(
    "coordinator_address", None, "host:port of process 0, where no launcher is found."
)
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "Processes of the run, likewise.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Number of this process, from 0, likewise.")
_HEARTBEAT = flags.DEFINE_integer(
    "heartbeat_timeout_seconds", 100, "How long a process may be silent before the others end."
)
_TRACEBACK = flags.DEFINE_bool("traceback", False, "Show the whole traceback of an error.")


def run(argv: list[str], work: Callable[[], object]) -> None:
    """Joins the processes of the run and does the work; what a person can mend is one message.

    Args:
      argv: what is left of the command line after the flags; nothing but the script's name.
      work: reads the script's own flags.

    Raises:
      SystemExit: the work failed; with --traceback, the error itself.
      UsageError: arguments that are no flags.
    """
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
        work()
    except (*runner.USER_ERRORS, archive.ArchiveError) as error:
        if _TRACEBACK.value:
            raise
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(1)
