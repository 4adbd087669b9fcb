"""Config files that users name on a command line: found, loaded, with hints for wrong names."""

import difflib
import importlib.util
import inspect
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jevb_jax import messages

# In a checkout this is a link to the folder `configs` beside the package.
_CONFIGS = (Path(__file__).parents[1] / "configs").resolve()
_SAVED = _CONFIGS / "saved.py"  # reads a saved `config.json` as a config file
_MODULE = "_config_of_the_command_line"


class ConfigFileError(ValueError):
    """The command line names no config, or a setting that the config lacks."""


def file_of(given: str) -> str:
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


def load(name: str, given: str) -> Any:
    """The config of `--name=FILE.py:ARGUMENT`.

    Raises:
      ConfigFileError: there is no such config. Errors inside the file stay as they are.
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
        raise ConfigFileError(
            f"--{name} must name a config file, but there is none at {file!r}{hint}"
        )
    spec = importlib.util.spec_from_file_location(_MODULE, path)
    if spec is None or spec.loader is None:
        raise ConfigFileError(f"--{name} must name a Python file or a config.json, got {file!r}")
    module: Any = importlib.util.module_from_spec(spec)
    sys.modules[_MODULE] = module
    try:
        spec.loader.exec_module(module)
        if not hasattr(module, "get_config"):
            raise ConfigFileError(f"{file} is no config: it defines no get_config()")
        try:
            inspect.signature(module.get_config).bind(*argument)
        except TypeError as error:
            what = f"no argument {argument[0]!r}" if argument else "one: FILE.py:ARGUMENT"
            raise ConfigFileError(f"the config {file} takes {what}") from error
        config = module.get_config(*argument)
    except Exception as error:
        message = messages.for_person(error, packages=("jevb_jax", "configs", _MODULE))
        if message is None or isinstance(error, ConfigFileError):
            raise
        raise ConfigFileError(f"--{name}={given}: {message}") from error
    finally:
        del sys.modules[_MODULE]
    if config is None:
        raise ConfigFileError(f"get_config() of {file} returns nothing")
    return config


def settings_of(config: Any, prefix: str = "") -> list[str]:
    """Dotted names of all sections and settings."""
    names = []
    for key, value in config.items():
        names.append(f"{prefix}{key}")
        if isinstance(value, Mapping) or hasattr(value, "items"):
            names += settings_of(value, f"{prefix}{key}.")
    return names


def near(name: str, known: Sequence[str]) -> list[str]:
    """Known settings that a misspelled name may have meant: similar in full, or by its last part."""
    leaf = name.rpartition(".")[2]
    leaves = {one.rpartition(".")[2]: one for one in known}
    found = [
        *difflib.get_close_matches(name, known, n=3),
        *(leaves[one] for one in difflib.get_close_matches(leaf, leaves, n=3)),
    ]
    return [*dict.fromkeys(found)]
