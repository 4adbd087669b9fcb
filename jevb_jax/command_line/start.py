"""Common parts of the scripts: flags of several processes, and short messages for users' errors.

Only scripts may import this, because the import defines flags. A script defines its own flags and
calls `start`; a mistake in the command line gives one message and exit status 2.
"""

import inspect
import os
import re
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

import jax
from absl import app, flags, logging
from ml_collections.config_flags import config_flags

from jevb_jax import messages, parallel
from jevb_jax.command_line import config_files

_COORDINATOR = flags.DEFINE_string(
    "coordinator_address", None, "host:port of process 0, needed without a launcher."
)
_NUM_PROCESSES = flags.DEFINE_integer(
    "num_processes", None, "Number of processes of the run, needed without a launcher."
)
_PROCESS_ID = flags.DEFINE_integer(
    "process_id", None, "Number of this process, from 0, needed without a launcher."
)
_HEARTBEAT = flags.DEFINE_integer(
    "heartbeat_timeout_seconds", 100, "Seconds that a process may be silent before the others end."
)
_TRACEBACK = flags.DEFINE_bool("traceback", False, "Show the whole traceback of an error.")

USAGE_STATUS = 2


def start(script: Callable[[], None], work: Callable[[], object]) -> NoReturn:
    """Reads the command line and does the work, then ends the process.

    Args:
      script: the function that defined the flags; --help shows its docstring and these flags.
      work: see `run`.
    """
    main: Any = sys.modules["__main__"]
    main.__doc__ = f"{inspect.getdoc(script)}\n"
    for module in (script.__module__, __name__):
        for flag in flags.FLAGS.get_flags_for_module(module):
            flags.FLAGS.register_key_flag_for_module(sys.argv[0], flag)
    jax.config.config_with_absl()
    app.run(lambda argv: run(argv, work), flags_parser=parse_flags)


def run(argv: list[str], work: Callable[[], object]) -> None:
    """Joins the processes of the run and does the work. A user's error becomes one message.

    Args:
      argv: the rest of the command line after the flags; it must hold only the script's name.
      work: the work, which reads the script's own flags.

    Raises:
      SystemExit: the work failed for a reason that the user can mend; the message is on standard
        error, and the status is 1. With --traceback the error itself is raised. A fault of the
        program keeps its traceback.
      UsageError: there are arguments that are no flags.
    """
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}", exitcode=USAGE_STATUS)
    # Ctrl-C in a script needs no traceback. A second Ctrl-C, while a run saves, must end the
    # process even during compilation by XLA.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    logging.set_verbosity(logging.WARNING)  # Orbax logs every file at INFO
    warnings.formatwarning = _one_line
    try:
        parallel.start_processes(
            os.environ,
            coordinator_address=_COORDINATOR.value,
            num_processes=_NUM_PROCESSES.value,
            process_id=_PROCESS_ID.value,
            heartbeat_timeout_seconds=_HEARTBEAT.value,
        )
        work()
    except Exception as error:
        message = messages.for_person(error)
        if message is None or _TRACEBACK.value:
            raise
        print(message, file=sys.stderr)
        if messages.is_out_of_memory(error):
            print("--traceback shows where.", file=sys.stderr)
        sys.exit(1)


def _one_line(message: Warning | str, category: type[Warning], *_: object, **__: object) -> str:
    """A warning without the line of source code, which the user did not write."""
    return f"{category.__name__}: {message}\n"


def parse_flags(argv: Sequence[str]) -> list[str]:
    """Parses the command line; for `app.run(flags_parser=...)`.

    A config flag takes a Python file, the `config.json` that a run saved, or the name of a config of
    the package. Each is loaded once in advance, so that an error in it, or in an override, becomes
    one message.

    Args:
      argv: the command line, beginning with the script's name.

    Returns:
      The arguments that are no flags, beginning with the script's name.

    Raises:
      SystemExit: the command line is wrong; status 2. A fault in a config file keeps its traceback.
    """
    argv = list(argv)
    try:
        for name in [n for n in flags.FLAGS if config_flags.is_config_flag(flags.FLAGS[n])]:
            argv = _with_files(argv, name)
            given = _value(argv, name)
            if given is not None:
                _check_overrides(argv, name, config_files.load(name, given))
        try:
            return flags.FLAGS(argv)
        # ml_collections raises these for a wrong value of an override.
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise flags.Error(str(error)) from error
    except (flags.Error, config_files.ConfigFileError) as error:
        missing = re.match(r"flag --(\w+)=None: .* must have a value", str(error))
        said = f"--{missing[1]} is missing." if missing else str(error)
        print(f"{said}\n--help shows the flags.", file=sys.stderr)
    sys.exit(USAGE_STATUS)


def _flags_of(argv: Sequence[str], name: str) -> Iterator[tuple[int, str | None]]:
    """Positions of `--name` in the command line, with its value if that is in the same argument."""
    for index, argument in enumerate(argv[1:], start=1):
        if argument == "--":
            return
        if match := re.fullmatch(rf"--?{re.escape(name)}(=(.*))?", argument, re.DOTALL):
            yield index, match[2]


def _value(argv: Sequence[str], name: str) -> str | None:
    """The last value of a flag on the command line, or None."""
    found = None
    for index, value in _flags_of(argv, name):
        following = argv[index + 1] if index + 1 < len(argv) else None
        found = following if value is None else value
    return found


def _with_files(argv: Sequence[str], name: str) -> list[str]:
    """The command line with each value of `--name` changed to a file that ml_collections reads."""
    argv = list(argv)
    for index, value in _flags_of(argv, name):
        if value is not None:
            argv[index] = f"--{name}={config_files.file_of(value)}"
        elif index + 1 < len(argv):
            argv[index + 1] = config_files.file_of(argv[index + 1])
    return argv


def _check_overrides(argv: Sequence[str], name: str, config: Any) -> None:
    """Raises an absl flags error for settings that the config lacks, and suggests similar names."""
    known = config_files.settings_of(config)
    for argument in argv[1:]:
        if argument == "--":
            return
        match = re.match(rf"--?(no)?{re.escape(name)}\.([^=\[]+)(\[|=|$)", argument)
        if match is None or match[2] in known:
            continue
        near = ", ".join(f"--{name}.{one}" for one in config_files.near(match[2], known))
        raise flags.Error(
            f"--{name}.{match[2]}: the config has no such setting"
            + (f"; did you mean {near}?" if near else "")
        )
