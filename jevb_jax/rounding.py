"""Rounds the kernels of a run to 8 bits, as a new run that can be evaluated and exported.

    python -m jevb_jax.rounding --workdir=runs/cifar10 --out=runs/cifar10_8_bits
    python evaluate.py --workdir=runs/cifar10_8_bits
    python -m jevb_jax.export --workdir=runs/cifar10_8_bits --out=exports/cifar10

An export stores such kernels in a quarter of the bytes, without loss. So the numbers of the evaluation,
its fitted scores and its thresholds are those of the exported weights, to the last bit. Biases and the
parameters and statistics of BatchNorm stay as they are. The new run holds no state of the optimizer;
train the old one further.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jevb_jax import small_programs
from jevb_jax.loading import load
from jevb_jax.model import Model
from jevb_jax.runs import archive, eight_bits, files
from jevb_jax.runs.checkpoints import Checkpointer
from jevb_jax.settings.config_versions import versioned

_COPIED = ("environment.json", "data.json", "extensions.json", "metrics.jsonl")


def rounded_variables(variables: Any) -> Any:
    """Parameters and statistics of a model, with kernels of 8 bits.

    Args:
      variables: `{"params": ..., "batch_stats": ...}`, as of `Model.variables`.

    Raises:
      ValueError: a kernel holds NaN or infinity.
    """

    def leaf(array: Any) -> np.ndarray:
        array = np.asarray(array)
        return eight_bits.rounded(array) if array.ndim > 1 else array

    host = jax.device_get(variables)
    return {**host, "params": jax.tree.map(leaf, host["params"])}


def write_rounded_run(model: Model, source: Path, directory: Path) -> None:
    """Writes a run with rounded kernels.

    Args:
      model: from `load` of the old run.
      source: directory of the old run.
      directory: of the new run; it must be empty or not exist.

    Raises:
      ValueError: the directory is not free, or a kernel cannot be rounded.
    """
    # Also what a killed call left: a checkpoint of the same step there would stay.
    if directory.exists() and any(directory.iterdir()):
        raise ValueError(
            f"{directory} is not empty: remove what is in it, or give another directory"
        )
    variables = rounded_variables(model.variables)
    evaluated = "ema_params" if model.settings.train.ema_decay > 0 else "params"
    state = {
        "step": np.int32(model.step),
        evaluated: variables["params"],
        "batch_stats": variables["batch_stats"],
    }
    directory.mkdir(parents=True, exist_ok=True)
    keep_best = model.settings.checkpoint.keep_best
    checkpointer = Checkpointer(directory / "checkpoints", keep_best=keep_best)
    on_device = jax.tree.map(jnp.asarray, state)
    try:
        # The only checkpoint is the best one, whatever its score.
        checkpointer.save(model.step, on_device, config=model.config, score=0.0)
        checkpointer.wait()
    finally:
        checkpointer.close()
    for name in _COPIED:
        if (source / name).exists():
            files.write_bytes_atomically(directory / name, (source / name).read_bytes())
    # Last: now it is a run.
    files.write_json_atomically(directory / "config.json", versioned(model.config))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m jevb_jax.rounding", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--workdir", required=True, help="directory of a run")
    parser.add_argument("--out", required=True, help="directory of the new run")
    arguments = parser.parse_args(argv)

    def work() -> str:
        source, target = files.to_path(arguments.workdir), files.to_path(arguments.out)
        if archive.is_archive(source):
            raise ValueError(f"{source} is an export: give the run that it was made from")
        model = load(source)
        write_rounded_run(model, source, target)
        return f"Kernels of step {model.step} rounded to 8 bits in {target}"

    return small_programs.run(work, "Rounding")


if __name__ == "__main__":
    sys.exit(main())
