"""Common parts of the scripts: flags of several processes, and short messages for users' errors.

Only scripts may import this, because the import defines flags. A script defines its own flags and
calls `start`; a mistake in the command line gives one message and exit status 2.
"""

import difflib
import importlib.util
import inspect
import os
import re
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jax
from absl import app, flags, logging
from ml_collections.config_flags import config_flags

from jevb_jax import messages, parallel

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
# In a checkout this is a link to the folder `configs` beside the package.
_CONFIGS = (Path(__file__).parent / "configs").resolve()
_SAVED = _CONFIGS / "saved.py"  # reads a saved `config.json` as a config file
_MODULE = "_config_of_the_command_line"


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
                _check_overrides(argv, name, _load_config(name, given))
        try:
            return flags.FLAGS(argv)
        # ml_collections raises these for a wrong value of an override.
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise flags.Error(str(error)) from error
    except flags.Error as error:
        print(f"{error}\n--help shows the flags.", file=sys.stderr)
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
            argv[index] = f"--{name}={_file(value)}"
        elif index + 1 < len(argv):
            argv[index + 1] = _file(argv[index + 1])
    return argv


def _file(given: str) -> str:
    """FILE.py:ARGUMENT for a config that a user names.

    `runs/x/config.json` becomes an argument of `configs/saved.py`. `digits` becomes
    `configs/digits.py` of the package, unless there is a file `digits`. All else stays as it is.
    """
    if given.endswith(".json"):
        return f"{_SAVED}:{given}"
    name, colon, argument = given.partition(":")
    if name in _own_configs() and not Path(name).is_file():
        return f"{_CONFIGS / name}.py{colon}{argument}"
    return given


def _own_configs() -> list[str]:
    """Names of the files in the package's `configs` that a user may name."""
    names = {path.stem for path in _CONFIGS.glob("*.py")}
    return sorted(names - {"__init__", "recipes", "saved"})


def _load_config(name: str, given: str) -> Any:
    """The config of `--name=FILE.py:ARGUMENT`.

    Raises:
      Error: an absl flags error: there is no such config. Errors inside the file stay as they are.
    """
    file, *argument = given.split(":", 1)
    path = Path(file)
    if not path.is_file():
        hint = ""
        if (path / "config.json").is_file():
            hint = f"; the config of that run is {path / 'config.json'}"
        elif path.stem in _own_configs():
            hint = f"; the package has one: --{name}={path.stem}"
        elif not path.suffix:
            hint = f"; those of the package are {', '.join(_own_configs())}"
        raise flags.Error(f"--{name} must name a config file, but there is none at {file!r}{hint}")
    spec = importlib.util.spec_from_file_location(_MODULE, path)
    if spec is None or spec.loader is None:
        raise flags.Error(f"--{name} must name a Python file or a config.json, got {file!r}")
    module: Any = importlib.util.module_from_spec(spec)
    sys.modules[_MODULE] = module
    try:
        spec.loader.exec_module(module)
        if not hasattr(module, "get_config"):
            raise flags.Error(f"{file} is no config: it defines no get_config()")
        try:
            inspect.signature(module.get_config).bind(*argument)
        except TypeError as error:
            what = f"no argument {argument[0]!r}" if argument else "one: FILE.py:ARGUMENT"
            raise flags.Error(f"the config {file} takes {what}") from error
        config = module.get_config(*argument)
    except Exception as error:
        message = messages.for_person(error, packages=("jevb_jax", "configs", _MODULE))
        if message is None or isinstance(error, flags.Error):
            raise
        raise flags.Error(f"--{name}={given}: {message}") from error
    finally:
        del sys.modules[_MODULE]
    if config is None:
        raise flags.Error(f"get_config() of {file} returns nothing")
    return config


def _dotted(config: Any, prefix: str = "") -> list[str]:
    """Dotted names of all sections and settings."""
    names = []
    for key, value in config.items():
        names.append(f"{prefix}{key}")
        if isinstance(value, Mapping) or hasattr(value, "items"):
            names += _dotted(value, f"{prefix}{key}.")
    return names


def _check_overrides(argv: Sequence[str], name: str, config: Any) -> None:
    """Raises an absl flags error for settings that the config lacks, and suggests similar names."""
    known = _dotted(config)
    for argument in argv[1:]:
        if argument == "--":
            return
        match = re.match(rf"--?(no)?{re.escape(name)}\.([^=\[]+)(\[|=|$)", argument)
        if match is None or match[2] in known:
            continue
        leaf = match[2].rpartition(".")[2]
        leaves = {one.rpartition(".")[2]: one for one in known}
        near = [
            *difflib.get_close_matches(match[2], known, n=3),
            *(leaves[one] for one in difflib.get_close_matches(leaf, leaves, n=3)),
        ]
        where = ", ".join(f"--{name}.{one}" for one in dict.fromkeys(near))
        raise flags.Error(
            f"--{name}.{match[2]}: the config has no such setting"
            + (f"; did you mean {where}?" if where else "")
        )
