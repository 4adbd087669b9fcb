"""How long until k-NN reaches 90 per cent on CIFAR-10, everything counted?

python -m benchmarks.race --study=studies/full_size.py --run=jevb --num_epochs=400 --out=runs/race

The rules are those of an open challenge (github.com/dkobak/simclr-cifar10): labels are used by the final
k-NN alone, which takes 10 neighbors by cosine similarity, one vote each, un-augmented features of the
last step, all training images as the bank and all test images as queries. The clock starts with the
process and stops when the accuracy is known, so imports, reading and compilation count, without a
compile cache. The standing mark there is 99 minutes on one A100.

Each seed has a process of its own. Training and the bank leave out one training image in a thousand,
because a run needs a validation split. Writes `race.json` and `race.md`.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import measure
from jevb_jax import parallel
from jevb_jax.evaluation import accuracy, evaluate
from jevb_jax.evaluation.accuracy import left_out
from jevb_jax.runs import files
from jevb_jax.runs.metrics_log import standard_output
from jevb_jax.settings import run_config
from jevb_jax.settings.config_versions import versioned
from jevb_jax.training import pretraining
from jevb_jax.training.experiment import build_experiment, to_json_values
from jevb_jax.training.loop import RunLoop
from jevb_jax.xla_options import CACHE_VARIABLE
from jevb_study.spec import load_study

K = 10
MEASURE = f"knn_{K}_uniform_accuracy"


def run(directory: Path) -> dict[str, Any]:
    """Trains the config in a directory; returns the accuracy on the test split, and the steps."""
    experiment = build_experiment(run_config.read_config(directory / "config.json"))
    settings, mesh = experiment.settings.evaluation, parallel.make_mesh()
    split, images = accuracy.evaluated_split(settings, experiment.dataset)
    if split != "test":
        raise ValueError("the race is decided on test images: give data with labeled test images")
    plan = pretraining.make_plan(experiment, validate=lambda _: {}, best_measure=MEASURE)
    with parallel.StopRequest() as stop:
        loop = RunLoop(plan, directory, standard_output(), mesh, stop, lambda: None)
        try:
            state = loop.train(loop.restore())
        finally:
            loop.close()
    if int(state.step) < plan.num_steps:
        raise SystemExit(f"stopped at step {int(state.step)} of {plan.num_steps}")
    extract = evaluate.make_extractors(experiment, mesh=mesh).plain
    train, test = (
        extract(state.evaluation_variables, source) for source in (experiment.dataset.train, images)
    )
    found = accuracy.knn_accuracies_by_name(
        "representation", settings, train, test, left_out(settings, experiment.dataset)
    )
    return {"accuracy": found[MEASURE], "steps": int(state.step)}


def race_config(study: str, name: str, *, num_epochs: int | None, seed: int) -> Any:
    """The config of a study's run, with nothing but training and the final k-NN.

    Raises:
      ValueError: the study has no such run.
    """
    runs = load_study(study).runs
    if name not in runs:
        raise ValueError(f"--run must be one of {[*runs]}, got {name!r}")
    config: Any = runs[name].copy_and_resolve_references()
    config.seed = seed
    if num_epochs is not None:
        config.train.num_epochs = num_epochs
    config.data.validation_fraction = 0.001  # a run needs a validation split
    config.train.knn_every_epochs = 0
    config.train.health_every_steps = 0
    config.checkpoint.every_steps = 0
    config.evaluation.split = "test"
    config.evaluation.knn_k = (K,)
    config.evaluation.knn_uniform_k = (K,)
    config.ood.corruptions = ()
    config.ood.outside = ()
    return config


def timed(directory: Path, config: Any) -> dict[str, Any]:
    """Runs a config in a process of its own; returns its result and the seconds of the process.

    Raises:
      RuntimeError: the process failed; its output is in `log.txt`.
    """
    directory.mkdir(parents=True)
    # Under this name, `jevb_jax.load` finds the encoder of the race.
    files.write_json_atomically(directory / "config.json", versioned(to_json_values(config)))
    environment = {**os.environ, CACHE_VARIABLE: "off"}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    command = [sys.executable, "-m", "benchmarks.race", f"--child={directory}"]
    with (directory / "log.txt").open("wb") as log:
        start = time.perf_counter()
        status = subprocess.run(
            command, stdout=log, stderr=subprocess.STDOUT, env=environment, check=False
        ).returncode
        seconds = time.perf_counter() - start
    if status != 0:
        raise RuntimeError(f"exit status {status}; see {directory / 'log.txt'}")
    return {**json.loads((directory / "race.json").read_text()), "seconds": seconds}


def main(arguments: Sequence[str]) -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser("python -m benchmarks.race", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--study", required=True, help="Python file with get_study()")
    parser.add_argument("--run", required=True, help="name of a run of the study")
    parser.add_argument("--num_epochs", type=int, help="instead of the run's own")
    parser.add_argument("--seeds", default="0", help="separated by commas")
    parser.add_argument("--target", type=float, default=0.9, help="accuracy to reach")
    parser.add_argument("--out", type=Path, required=True, help="a new directory")
    flags = parser.parse_args(arguments)
    rows = []
    for seed in map(int, flags.seeds.split(",")):
        config = race_config(flags.study, flags.run, num_epochs=flags.num_epochs, seed=seed)
        found = timed(flags.out / f"seed_{seed}", config)
        rows.append({"seed": seed, **found, "reached": found["accuracy"] >= flags.target})
        print(rows[-1], flush=True)
    # After the races: it starts JAX, which takes memory of an accelerator.
    facts = measure.environment("python -m benchmarks.race " + shlex.join(arguments), vars(flags))
    print(measure.write_results(flags.out, "race", facts, {"": rows}))
    return 0


if __name__ == "__main__":
    if sys.argv[1:] and sys.argv[1].startswith("--child="):
        where = Path(sys.argv[1].removeprefix("--child="))
        files.write_json_atomically(where / "race.json", run(where))
    else:
        sys.exit(main(sys.argv[1:]))
