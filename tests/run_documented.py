"""Runs commands and Python of the pages one after another, in one process: `STEPS.json` in, a log out.

`python -m tests.run_documented STEPS.json`. One process starts and compiles once, and sees one device, as
the process of most readers does. Its first failure ends it, with status 1 and the step's name.
"""

import importlib
import inspect
import json
import os
import runpy
import shlex
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

import jax
from absl import app, flags

from jevb_jax.command_line import scripts  # noqa: F401 (flags of several processes are defined once)

ROOT = Path(__file__).resolve().parent.parent


def run_command(text: str) -> None:
    """Runs `python FILE ...`, `python -m MODULE ...` or an installed command, as its process would.

    Raises:
      RuntimeError: the program ended with another status than 0, or is another program.
    """
    words, environment = shlex.split(text), dict(os.environ)
    while "=" in words[0]:
        name, _, value = words.pop(0).partition("=")
        os.environ[name] = value
    installed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    before, status = set(flags.FLAGS), None
    try:
        if words[0] in installed:
            sys.argv = words
            module, _, function = installed[words[0]].partition(":")
            status = getattr(importlib.import_module(module), function)()
        elif words[:2] == ["python", "-m"]:
            sys.argv = words[2:]
            status = _module_main(words[2])
        elif words[0] == "python":
            sys.argv = words[1:]
            runpy.run_path(words[1], run_name="__main__")
        else:
            raise RuntimeError(
                f"{words[0]} is not run here: let the row name the test that runs it"
            )
    except SystemExit as error:
        status = error.code
    finally:
        os.environ.clear()
        os.environ.update(environment)
        # What a program of ours defines; the flags of JAX, of absl and of several processes stay.
        for name in set(flags.FLAGS) - before:
            module = str(flags.FLAGS.find_module_defining_flag(name))
            if "." in name or not module.startswith(("absl", "jax")):  # config.train.num_epochs
                delattr(flags.FLAGS, name)
    if status:
        raise RuntimeError(f"ended with {status!r}")


def _module_main(name: str) -> Any:
    """Calls the main function of a module that was imported, so that steps before can change it."""
    module = importlib.import_module(name)
    if "__main__" not in inspect.getsource(module):
        raise RuntimeError(f"{name} does nothing when it is run")
    takes_arguments = any(
        one.default is one.empty for one in inspect.signature(module.main).parameters.values()
    )
    return module.main(sys.argv[1:]) if takes_arguments else module.main()


def main() -> int:
    """Runs the steps; returns the exit status."""
    app.define_help_flags()
    jax.config.config_with_absl()
    jax.config.config_with_absl = lambda: None  # it can be done once
    names: dict[str, dict[str, Any]] = {}
    for step in json.loads(Path(sys.argv[1]).read_text()):
        began = time.process_time()
        try:
            if step["is_shell"]:
                run_command(step["text"])
            else:
                exec(step["text"], names.setdefault(step["page"], {}))
        except BaseException:
            print(f"FAILED: {step['name']}", flush=True)
            raise
        print(f"{time.process_time() - began:.1f} CPU seconds: {step['name']}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
