"""Runs a study: many configs with a few seeds each, one table, one figure for each claim.

`jevb-study FILE.py --out=DIR [--num_processes=1] [--report_only]` takes a study file;
`jevb-study --config=NAME --vary=SETTING=VALUE,VALUE --seeds=0,1,2 --out=DIR` needs none.
`jevb-study FILE.py --runs=NAME,NAME --seeds=0 --out=DIR` runs and reports a part of a file's study.

Each run of each seed has its own process and its own directory, `DIR/runs/NAME/seed_0`. After a kill,
the same command continues the study. It never repeats a finished run. The report is made from the run
directories alone.
"""

import argparse
import itertools
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed, wait
from pathlib import Path

import numpy as np
from rich.console import Console

from jevb_jax import messages
from jevb_jax.runs import files, result_files
from jevb_jax.runs.checkpoints import config_hash
from jevb_jax.runs.files import DirectoryInUseError
from jevb_jax.runs.metrics_log import standard_output, unbroken
from jevb_jax.training import resume
from jevb_jax.training.loop import NonFiniteError
from jevb_jax.training.resume import ChangedConfigError
from jevb_jax.xla_options import CACHE_VARIABLE
from jevb_study import figures, mistakes, sweeps, tables
from jevb_study.evidence import RunData, read_evidence, read_run
from jevb_study.spec import PlannedRun, Study, load_study
from jevb_study.train_one import ASKED_CONFIG

_STOPPED_STATUS = 128 + signal.SIGINT
_SHOWN_LINES = 30  # last lines of the log of a run that broke, enough for its traceback


def _is_done(run: PlannedRun, found: RunData) -> bool:
    """Whether the directory has results of this config, or the record of a step that was not finite."""
    if found.results is not None:  # they may belong to another evaluation or a shorter run
        sections = (f"{name}." for name in result_files.SECTIONS)
        others = (*sections, "train.num_epochs")
        return not any(key.startswith(others) for key in found.changes(run.config))
    failure = found.failure
    return (
        failure is not None
        and failure["error"] == NonFiniteError.__name__
        and failure["config_hash"] == config_hash(run.config)
    )


def _to_do(plan: Sequence[PlannedRun]) -> list[PlannedRun]:
    """The runs that are not done.

    Raises:
      ChangedConfigError: directories hold runs with other configs.
    """
    found = [read_run(run.directory) for run in plan]
    refused = [
        f"  {run.directory}, {key}: the run has {old!r}, got {new!r}"
        for run, data in zip(plan, found, strict=True)
        if data.config is not None
        for key, (old, new) in resume.refused_changes(data.config, run.config).items()
    ]
    if refused:
        raise ChangedConfigError(
            "the study has changed since these runs were started:\n" + "\n".join(refused) + "\n"
            "Nothing was run. Give another --out, other names to the changed runs, or the old settings."
        )
    return [run for run, data in zip(plan, found, strict=True) if not _is_done(run, data)]


def _prepare(run: PlannedRun) -> None:
    """Writes the config for the run, and removes or renames the results of an earlier one.

    Raises:
      DirectoryInUseError: another process uses the directory.
    """
    run.directory.mkdir(parents=True, exist_ok=True)
    with files.lock_directory(run.directory):
        (run.directory / "failure.json").unlink(missing_ok=True)
        found = read_run(run.directory)
        # Results of other settings stay under another name.
        if found.results is not None and "train.num_epochs" in found.changes(run.config):
            result_files.rename_results(run.directory, "", f"_step_{found.results['step']}")
        elif found.results is not None:
            result_files.keep_other_results(
                run.directory, "", result_files.settings_sha256(run.config)
            )
            (run.directory / "results.json").unlink()
        files.write_json_atomically(run.directory / ASKED_CONFIG, run.config)


def _command(directory: Path) -> list[str]:
    return [sys.executable, "-u", "-m", "jevb_study.train_one", str(directory)]


def _environment(out: Path, num_processes: int) -> dict[str, str]:
    # All seeds share compiled programs. This saves at least half of the time of a short run (measured).
    added = {CACHE_VARIABLE: str(out / "compile_cache")}
    if num_processes > 1:
        added["XLA_PYTHON_CLIENT_MEM_FRACTION"] = f"{0.9 / num_processes:.3f}"
    return {**added, **os.environ}


def _pin_to_share(num_processes: int) -> Callable[[], None]:
    """A function that binds the calling thread and its children to their own share of the cores.

    Raises:
      ValueError: more processes than cores.
    """
    if sys.platform != "linux":
        return lambda: None
    cores = sorted(os.sched_getaffinity(0))
    if num_processes > len(cores):
        raise ValueError(f"--num_processes={num_processes} is more than the {len(cores)} cores")
    shares = np.array_split(cores, num_processes)
    return lambda: os.sched_setaffinity(0, shares.pop().tolist())


def _outcome(run: PlannedRun, status: int, said: str, *, is_stopping: bool) -> str:
    """The state of a run whose process has ended, as text."""
    found = read_run(run.directory)
    log = run.directory / "log.txt"
    if found.results is not None:
        return "finished"
    if found.failure is not None:
        return f"FAILED, {found.failure['error']} at step {found.failure['step']}; see {log}"
    where = f"unfinished at step {found.last_step}"
    if is_stopping or status == 0:
        return f"{where}, stopped; the same command goes on from there"
    cause = signal.Signals(-status).name if status < 0 else f"exit status {status}"
    tail = "\n".join(said.splitlines()[-_SHOWN_LINES:])
    return f"{where}, BROKEN, {cause}; the same command tries it again. End of {log}:\n{tail}"


def _execute(
    todo: Sequence[PlannedRun], out: Path, *, num_processes: int, console: Console
) -> bool:
    """Executes the runs. False if Ctrl-C stopped them; each then finishes its current step first."""
    environment = _environment(out, num_processes)
    pin_to_share = _pin_to_share(num_processes)
    processes: list[subprocess.Popen] = []
    is_stopping = threading.Event()
    numbers = itertools.count(1)
    # Each run watches its standard input and stops when it ends, also when this process has died.
    stdin, held_open = os.pipe()

    def attempt(run: PlannedRun) -> None:
        start = time.monotonic()
        try:
            _prepare(run)
        except DirectoryInUseError as error:
            outcome = f"skipped: {error}"
        else:
            path = run.directory / "log.txt"
            messages.say(console, f"{run.name}, seed {run.seed} runs; what it says: {path}")
            with path.open("a+", encoding="utf-8", errors="replace") as log:
                begin = log.tell()
                process = subprocess.Popen(
                    _command(run.directory),
                    stdin=stdin,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=environment,
                    start_new_session=True,  # so that Ctrl-C reaches only the study
                )
                processes.append(process)
                status = process.wait()
                log.seek(begin)
                outcome = _outcome(run, status, log.read(), is_stopping=is_stopping.is_set())
        number, minutes = next(numbers), (time.monotonic() - start) / 60
        messages.say(
            console,
            f"[{number}/{len(todo)}] {run.name}, seed {run.seed}, {minutes:.1f} min, "
            f"{len(todo) - number} remain: {outcome}",
        )

    with (
        os.fdopen(stdin, "rb"),
        ThreadPoolExecutor(num_processes, initializer=pin_to_share) as pool,
    ):
        futures = [pool.submit(attempt, run) for run in todo]
        try:
            for future in as_completed(futures):
                future.result()
        except KeyboardInterrupt:
            is_stopping.set()
        finally:
            os.close(held_open)
            try:
                wait([future for future in futures if not future.cancel()])
            except KeyboardInterrupt:  # the second one
                for process in processes:
                    process.kill()
                raise
    return not is_stopping.is_set()


def _local_directory(out: str | Path) -> Path:
    path = files.to_path(out)
    if files.is_remote(path):
        raise ValueError(f"a study is run in a directory of this machine, got {path}")
    return path


def write_report(
    study: Study, out: str | Path, *, command: str, console: Console | None = None
) -> None:
    """Writes `table.md`, `table.csv` and a PNG for each figure, from the run directories alone.

    Says where the report is, and which measures no run has.

    Args:
      study: the study.
      out: directory of the study.
      command: the command that the report names.
      console: for messages; standard output by default.

    Raises:
      FileNotFoundError: there is no such directory.
    """
    out = _local_directory(out)
    if not out.is_dir():
        raise FileNotFoundError(f"--out must be the directory of a study, {out} does not exist")
    evidence = read_evidence(study, out)
    for figure in study.figures:
        drawn = figures.draw(figure, evidence)
        drawn.savefig(out / f"{figure.name}.png", format="png", dpi=150)
    files.write_text_atomically(out / "table.md", tables.markdown_table(evidence, command))
    files.write_text_atomically(out / "table.csv", tables.csv_table(evidence))
    console = console or standard_output()
    messages.say(console, f"Report: {out / 'table.md'}")
    if absent := tables.absent_measures(evidence):
        messages.say(console, absent)


def run_study(
    study: Study,
    out: str | Path,
    *,
    command: str,
    num_processes: int = 1,
    console: Console | None = None,
) -> int:
    """Runs what is not yet finished, and writes the report.

    Args:
      study: what to run.
      out: directory of the study; made if it does not exist, continued if it holds one.
      command: the command that the report names.
      num_processes: number of runs at the same time, each on its share of the cores.
      console: for messages; standard output by default.

    Returns:
      Exit status: 0 if every run is finished or was not finite, 1 if one is missing, 130 if Ctrl-C
      stopped the study.

    Raises:
      ChangedConfigError: `out` holds runs with other configs; nothing was run.
      DirectoryInUseError: another process uses `out`.
      ValueError: more processes than cores.
    """
    console = console or standard_output()
    out = _local_directory(out)
    out.mkdir(parents=True, exist_ok=True)
    plan = study.plan(out)
    # The reader of the output may leave before the study ends. The report contains everything.
    with files.lock_directory(out), unbroken(console):
        todo = _to_do(plan)
        runs = "1 run" if len(plan) == 1 else f"{len(plan)} runs"
        console.print(f"{runs}, {len(plan) - len(todo)} done before, {len(todo)} to do.")
        is_through = _execute(todo, out, num_processes=num_processes, console=console)
        write_report(study, out, command=command, console=console)
        is_done = all(_is_done(run, read_run(run.directory)) for run in plan)
        if not is_through and not is_done:
            messages.say(console, f"Stopped. The same command goes on from there:\n{command}")
            return _STOPPED_STATUS
    return int(not is_done)


def _listed(text: str | None) -> list[str] | None:
    return None if text is None else [part.strip() for part in text.split(",")]


def _study(options: argparse.Namespace) -> Study:
    """The study of a file, or a part of it, or that of the options alone."""
    seeds = _listed(options.seeds)
    if seeds is not None:
        if not all(re.fullmatch(r"\d+", seed) for seed in seeds):
            raise ValueError(f"--seeds takes whole numbers, such as 0,1,2, got {options.seeds!r}")
        seeds = [int(seed) for seed in seeds]
    if sweeps.is_asked(options):
        return sweeps.from_options(options, [0] if seeds is None else seeds)
    return load_study(options.study).part(runs=_listed(options.runs), seeds=seeds)


def main(arguments: Sequence[str]) -> int:
    """Runs the command line; returns its exit status."""
    parser = argparse.ArgumentParser(
        "jevb-study", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("study", nargs="?", help="Python file with get_study()")
    parser.add_argument("--out", required=True, help="directory of the study")
    parser.add_argument("--num_processes", type=int, default=1, help="runs at once")
    parser.add_argument("--report_only", action="store_true", help="run nothing")
    parser.add_argument(
        "--runs", metavar="NAME,NAME", help="run and report only these runs of the study file"
    )
    parser.add_argument(
        "--seeds",
        metavar="NUMBER,NUMBER",
        help="of --config: such as 0,1,2; 0 by default. Of a study file: only these of its seeds",
    )
    sweeps.add_options(parser)
    options = parser.parse_args(arguments)
    if options.num_processes < 1:
        parser.error(f"--num_processes must be at least 1, got {options.num_processes}")
    if sweeps.is_asked(options) == (options.study is not None):
        parser.error("give a study file or --config, and not both")
    if not sweeps.is_asked(options) and (options.vary or options.set):
        parser.error("--vary and --set belong to --config; a study file has its own settings")
    if sweeps.is_asked(options) and options.runs is not None:
        parser.error("--runs belongs to a study file; --vary lists the runs of --config")
    command = f"jevb-study {shlex.join(arguments)}"
    with mistakes.as_messages():
        study = _study(options)
        if options.report_only:
            write_report(study, options.out, command=command)
            return 0
        study.check_settings()
        return run_study(study, options.out, command=command, num_processes=options.num_processes)


def start() -> int:
    """The command itself; returns its exit status."""
    # The entry point lets Ctrl-C end the process at once. From here on, it stops the runs in order.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    try:
        return main(sys.argv[1:])
    except KeyboardInterrupt:  # while nothing ran, or the second one, which has killed the runs
        said = "Stopped at once. The same command goes on; each run from its last saved step."
        print(said, file=sys.stderr)
        return _STOPPED_STATUS
