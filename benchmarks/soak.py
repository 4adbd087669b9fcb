"""A run killed at random until it ends, against the same run left alone: are they the same?

python -m benchmarks.soak --out=runs/soak --num_epochs=2500

Both run at the same time, so that the machine is as busy for one as for the other. Writes `soak.json`.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from jevb_jax.runs.checkpoints import Checkpointer
from jevb_jax.runs.metrics_log import MetricsLog

ROOT = Path(__file__).resolve().parent.parent


def start(workdir: Path, settings: list[str]) -> subprocess.Popen[bytes]:
    """The run of a directory, its output beside it."""
    command = [sys.executable, str(ROOT / "train.py"), f"--workdir={workdir}", *settings]
    with workdir.with_suffix(".log").open("ab") as log:
        return subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, "JAX_COMPILATION_CACHE_DIR": str(workdir.parent / "cache")},
            stdout=log,
            stderr=subprocess.STDOUT,
        )


def last_step(workdir: Path) -> int:
    """The last step in the log of a run."""
    return max((r["step"] for r in MetricsLog.read(workdir / "metrics.jsonl")), default=0)


def kill_until_done(
    workdir: Path, settings: list[str], seconds: tuple[float, float], choice: random.Random
) -> list[dict[str, Any]]:
    """Starts a run again and again; returns its kills."""
    kills = []
    while True:
        process = start(workdir, settings)
        try:
            code = process.wait(timeout=choice.uniform(*seconds))
        except subprocess.TimeoutExpired:
            number = choice.choice((signal.SIGKILL, signal.SIGTERM))
            process.send_signal(number)
            code = process.wait()
            kills.append({"signal": number.name, "exit_code": code, "step": last_step(workdir)})
            print(kills[-1], flush=True)
            # SIGTERM while Python still imports finds nobody who listens, and nothing to save.
            expected = (-signal.SIGKILL,) if number == signal.SIGKILL else (0, -signal.SIGTERM)
            if code not in expected:
                raise SystemExit(f"{number.name} ended the run with {code}") from None
        else:
            if code:
                raise SystemExit(f"the run failed by itself: see {workdir.with_suffix('.log')}")
            return kills


def final_state(workdir: Path) -> dict[str, Any]:
    """Everything that should not depend on how often a run was killed."""
    checkpointer = Checkpointer(workdir / "checkpoints")
    step = checkpointer.steps()[-1]
    fingerprint = checkpointer.read_meta(step)["fingerprint"]
    checkpointer.close()
    return {
        "step": step,
        "state": fingerprint,
        "metrics": MetricsLog.read(workdir / "metrics.jsonl"),
        "results": json.loads((workdir / "results.json").read_text(encoding="utf-8")),
    }


def main() -> None:
    """Runs both and compares."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="a directory that does not exist")
    parser.add_argument("--config", default="configs/smoke.py")
    parser.add_argument("--num_epochs", type=int, default=2500, help="sets the length")
    parser.add_argument("--kill_seconds", type=float, nargs=2, default=(60.0, 180.0))
    parser.add_argument("--seed", type=int, default=0, help="of the kills")
    args = parser.parse_args()
    args.out.mkdir(parents=True)
    settings = [
        f"--config={args.config}",
        f"--config.train.num_epochs={args.num_epochs}",
        "--config.checkpoint.every_steps=200",
        "--config.train.log_every_steps=10",
    ]
    began = time.monotonic()
    reference = start(args.out / "reference", settings)
    try:
        kills = kill_until_done(
            args.out / "killed", settings, tuple(args.kill_seconds), random.Random(args.seed)
        )
        seconds = time.monotonic() - began
        if reference.wait():
            raise SystemExit(f"the reference failed: see {args.out / 'reference.log'}")
    finally:
        reference.kill()
    expected, found = (final_state(args.out / name) for name in ("reference", "killed"))
    summary = {
        "minutes": seconds / 60,
        "num_kills": len(kills),
        "num_sigkill": sum(kill["signal"] == "SIGKILL" for kill in kills),
        "num_sigterm": sum(kill["signal"] == "SIGTERM" for kill in kills),
        "final_step": found["step"],
        "equal": {name: found[name] == expected[name] for name in expected},
        "kills": kills,
    }
    (args.out / "soak.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    print(json.dumps({name: value for name, value in summary.items() if name != "kills"}))
    if not all(summary["equal"].values()):
        raise SystemExit("the killed run differs from the one left alone")


if __name__ == "__main__":
    main()
