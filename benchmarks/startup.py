"""Import times, and the time of `train.py` to its first step, without and with a compile cache.

python -m benchmarks.startup --out=runs/startup

Every measurement is a process of its own; the candidates take turns. The floor of an import is that of
JAX. The first step is the whole of a run of one step, killed once `metrics.jsonl` has its line. Writes
`startup.json` and `startup.md`.
"""

import functools
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import measure

ROOT = Path(__file__).resolve().parent.parent
IMPORTS = (
    "import jax",
    "import jevb_jax",
    "from jevb_jax import symmetric_elbo",
    "from jevb_jax import commands",
    "from jevb_jax.command_line import scripts",
)


def import_seconds(statement: str) -> float:
    """Wall time of a Python process that runs one statement."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", statement], cwd=ROOT, check=True)
    return time.perf_counter() - start


def slowest_imports(statement: str, count: int) -> list[dict[str, Any]]:
    """The modules whose own code takes longest, by `-X importtime`."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", statement],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    rows: list[dict[str, Any]] = []
    for line in done.stderr.splitlines():
        parts = line.removeprefix("import time:").split("|")
        if len(parts) == 3 and parts[0].strip().isdigit():
            own, total = (int(part) / 1e6 for part in parts[:2])
            rows.append({"module": parts[2].strip(), "own s": own, "with its imports s": total})
    return sorted(rows, key=lambda row: -row["own s"])[:count]


def first_step_seconds(train: Sequence[str], cache: Path | None) -> float:
    """Wall time from the start of `train.py` to the first line of its metrics."""
    environment = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    environment["JEVB_JAX_COMPILE_CACHE"] = "off" if cache is None else str(cache)
    with tempfile.TemporaryDirectory() as workdir:
        metrics = Path(workdir) / "run" / "metrics.jsonl"
        start = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, "train.py", f"--workdir={metrics.parent}", *train],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            while not (metrics.exists() and metrics.stat().st_size):
                if process.poll() is not None:
                    _, errors = process.communicate()
                    raise RuntimeError(f"train.py ended before its first step:\n{errors}")
                time.sleep(0.02)
            return time.perf_counter() - start
        finally:
            process.kill()
            process.communicate()


def main() -> None:
    """Measures and writes."""
    parser = measure.make_parser(__doc__, num_rounds=5)
    parser.add_argument("--config", default="configs/digits.py")
    parser.add_argument("--train_flags", default="", help="more flags for train.py")
    arguments = parser.parse_args()

    imports = measure.interleave(
        {statement: functools.partial(import_seconds, statement) for statement in IMPORTS},
        num_rounds=arguments.num_rounds,
    )
    train = (
        f"--config={arguments.config}",
        "--config.train.log_every_steps=1",
        *shlex.split(arguments.train_flags),
    )
    cache = Path(tempfile.mkdtemp())
    try:
        # The warm-up round fills the cache.
        steps = measure.interleave(
            {
                "no cache": functools.partial(first_step_seconds, train, None),
                "compile cache": functools.partial(first_step_seconds, train, cache),
            },
            num_rounds=arguments.num_rounds,
        )
        cache_bytes = sum(path.stat().st_size for path in cache.iterdir())
    finally:
        shutil.rmtree(cache)
    floor = imports[IMPORTS[0]]
    tables = {
        "Import": [
            {"statement": name, "s": timing.median, "of JAX alone": timing.ratio_to(floor)}
            for name, timing in imports.items()
        ],
        "Slowest modules of train.py": slowest_imports("from jevb_jax import commands", 10),
        f"First step of {arguments.config}": [
            {"": name, "s": timing.median, "of no cache": timing.ratio_to(steps["no cache"])}
            for name, timing in steps.items()
        ],
    }
    command = "python -m benchmarks.startup " + shlex.join(sys.argv[1:])
    facts = {**measure.environment(command, vars(arguments)), "cache_bytes": cache_bytes}
    print(measure.write_results(arguments.out, "startup", facts, tables))


if __name__ == "__main__":
    main()
