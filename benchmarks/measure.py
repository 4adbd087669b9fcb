"""What every benchmark needs: interleaved medians, the facts of the machine, a table.

The machine is shared and noisy, so nothing is timed by itself: all candidates take turns in one process,
`A B C A B C ...`, and a ratio is the median of the rounds' ratios.
"""

import argparse
import importlib.metadata
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jevb_jax.report import tables as report_tables
from jevb_jax.runs import files

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")


class Timing(NamedTuple):
    """One candidate's times.

    Attributes:
      name: of the candidate.
      seconds: of every round, in order.
    """

    name: str
    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Seconds."""
        return statistics.median(self.seconds)

    def ratio_to(self, other: "Timing") -> float:
        """Median over the rounds of this one's time over the other's in the same round."""
        pairs = zip(self.seconds, other.seconds, strict=True)
        return statistics.median(mine / theirs for mine, theirs in pairs)


def seconds_of(call: Callable[[], Any]) -> float:
    """Wall time of one call, in seconds, until its arrays are there."""
    start = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - start


def interleave(
    timers: Mapping[str, Callable[[], float]], *, num_rounds: int, num_warmup: int = 1
) -> dict[str, Timing]:
    """Lets candidates take turns.

    Args:
      timers: by name; each does its work once and returns the seconds it took, so that a candidate in
        another process can time itself. `functools.partial(seconds_of, call)` makes one of a call.
      num_rounds: rounds that count.
      num_warmup: rounds before them that do not (compilation, caches).

    Returns:
      The timings, by name, in the same order.

    Raises:
      ValueError: no round.
    """
    if num_rounds < 1 or num_warmup < 0:
        raise ValueError(
            f"num_rounds must be at least 1 and num_warmup at least 0, got {num_rounds} and "
            f"{num_warmup}"
        )
    for _ in range(num_warmup):
        for timer in timers.values():
            timer()
    rounds = [{name: timer() for name, timer in timers.items()} for _ in range(num_rounds)]
    return {name: Timing(name, tuple(one[name] for one in rounds)) for name in timers}


def counted_flops(function: Callable[..., Any], *arguments: Any) -> float:
    """Operations of a function, by XLA's count of its program before it is optimized.

    The program is that for a CPU, whatever the device. On a GPU XLA counts nothing: not before
    compiling, and after it convolutions are calls of a library.

    Args:
      function: of arrays, compiled by `jax.jit` or not.
      *arguments: trees of arrays or of their shapes; they are not computed on.

    Returns:
      The operations; a loop's body is counted once.

    Raises:
      RuntimeError: JAX sees no CPU (`JAX_PLATFORMS` without it).
    """
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arguments)
    with jax.default_device(jax.devices("cpu")[0]):
        # Not `jit` of `jit`: options of the compiler are refused inside another one.
        jitted: Any = function if hasattr(function, "lower") else jax.jit(function)
        cost: Any = jitted.lower(*shapes).cost_analysis()
    return cost["flops"]


def check_platform(platform: str, of: str) -> None:
    """Refuses a comparison of two platforms.

    Args:
      platform: "cpu" or "gpu".
      of: who computes there.

    Raises:
      ValueError: JAX here computes elsewhere.
    """
    if platform != jax.default_backend():
        raise ValueError(
            f"{of} computes on {platform} and jevb_jax on {jax.default_backend()}: install the build "
            "for the same platform in its environment, or leave it out"
        )


def counted_bytes(compiled: Any) -> float:
    """Bytes that every kernel of a compiled program reads and writes, by XLA's count.

    Args:
      compiled: of `jax.jit(f).lower(...).compile()`.

    Returns:
      The bytes, NaN where XLA does not say. A loop's body is counted once.
    """
    cost: Any = compiled.cost_analysis()
    if isinstance(cost, Sequence):  # one for each partition, in older versions of JAX
        cost = cost[0]
    return cost.get("bytes accessed", float("nan"))


def exponents(
    rows: Sequence[Mapping[str, Any]], names: Sequence[str], value: str
) -> dict[str, float]:
    """The powers `p` of `value ~ product of setting^p`, by least squares in logarithms.

    Args:
      rows: with positive settings and values, by column.
      names: columns of the settings.
      value: column of the value.

    Returns:
      A power for each name.

    Raises:
      ValueError: the settings do not vary, or not independently of each other.
    """
    logarithms = [[1.0, *(np.log(row[name]) for name in names)] for row in rows]
    values = np.log([row[value] for row in rows])
    solution, _, rank, _ = np.linalg.lstsq(np.array(logarithms), values)
    if rank <= len(names):
        raise ValueError(
            f"{', '.join(names)} must vary independently to tell their powers apart: over these "
            f"{len(rows)} rows they do not"
        )
    return {name: float(power) for name, power in zip(names, solution[1:], strict=True)}


def make_parser(description: str | None, *, num_rounds: int) -> argparse.ArgumentParser:
    """The command line that every benchmark has.

    Args:
      description: the benchmark's own docstring.
      num_rounds: rounds that count, by default.

    Returns:
      A parser of `--out` and `--num_rounds`.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="directory of the results")
    parser.add_argument("--num_rounds", type=int, default=num_rounds)
    return parser


def add_peer_arguments(parser: argparse.ArgumentParser, *, num_cores: int, needs: str) -> None:
    """Adds `--num_cores` and `--peer_python`, of benchmarks against other libraries.

    Also has JAX take an accelerator's memory as it is needed, unless the environment says otherwise.

    Args:
      parser: of `make_parser`.
      num_cores: default.
      needs: what the other Python must have.
    """
    parser.add_argument(
        "--num_cores", type=int, default=num_cores, help="bind all sides to them; 0: all"
    )
    parser.add_argument("--peer_python", default="", help=f"of an environment with {needs}")
    # Two processes share an accelerator: neither may take most of its memory when it starts.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


def environment(command: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The facts that a number needs beside it.

    Args:
      command: that made it.
      settings: all of them, by name.

    Returns:
      Command, commit, machine, devices, versions and settings, as JSON values.
    """
    return {
        "command": command,
        "commit": _commit(),
        "date": time.strftime("%Y-%m-%d"),
        "machine": platform.platform(),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "load_average_at_start": round(os.getloadavg()[0], 1),
        "devices": [device.device_kind for device in jax.devices()],
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in PACKAGES},
        "settings": {name: str(value) for name, value in settings.items()},
    }


def _commit() -> str:
    root = Path(__file__).resolve().parent.parent
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            cwd=root,
            capture_output=True,
            text=True,
            check=False,
        )
    except FileNotFoundError:
        return "no git on this machine"
    return done.stdout.strip() or "not a git checkout"


def _cpu() -> str:
    path = Path("/proc/cpuinfo")
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def format_number(value: Any) -> str:
    """A cell: thousands separated, three or so figures of small numbers, an empty cell for None."""
    if value is None:
        return ""
    if not isinstance(value, float):
        return f"{value:,}" if isinstance(value, int) else str(value)
    if value != 0 and abs(value) < 0.001:
        return f"{value:.1e}"
    decimals = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 3
    return f"{value:,.{decimals}f}"


def markdown_table(rows: Iterable[Mapping[str, Any]]) -> str:
    """A Markdown table.

    Args:
      rows: cells by column; the columns are the first row's keys.

    Returns:
      The lines, without one at the end.

    Raises:
      ValueError: no row, or a row of other columns.
    """
    rows = list(rows)
    if not rows:
        raise ValueError("a table needs at least one row")
    columns = list(rows[0])
    for row in rows:
        if list(row) != columns:
            raise ValueError(f"every row needs the columns {columns}, got {list(row)}")
    cells = [[format_number(cell) for cell in row.values()] for row in rows]
    return "\n".join(report_tables.markdown_table(columns, cells))


def write_results(
    out: Path,
    name: str,
    facts: Mapping[str, Any],
    tables: Mapping[str, Sequence[Mapping[str, Any]]],
) -> str:
    """Writes `NAME.json` and `NAME.md`.

    Args:
      out: directory, made if it is missing.
      name: of the benchmark.
      facts: of `environment`, and any others.
      tables: rows by title; a title may be "".

    Returns:
      The Markdown, to be printed.
    """
    parts = ["\n".join(f"* {key}: {value}" for key, value in facts.items())]
    for title, rows in tables.items():
        parts += ([f"### {title}"] if title else []) + [markdown_table(rows)]
    text = "\n\n".join(parts) + "\n"
    out.mkdir(parents=True, exist_ok=True)
    files.write_json_atomically(out / f"{name}.json", {**facts, "tables": dict(tables)})
    files.write_text_atomically(out / f"{name}.md", text)
    return text
