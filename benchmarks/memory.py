"""Memory of a training step against batch, D, views and samples, and the exponents of its growth.

python -m benchmarks.memory --out=runs/memory

One setting is varied at a time; views past the second are small crops. A step is compiled, not run:
XLA says what it will hold at once (arguments and temporary arrays). The exponent `p` of
`memory ~ setting^p` is fitted by least squares in logarithms, over the temporary memory; `slope` is the
part of it that grows, per unit of the setting. On an accelerator the step is also run and the allocator's
peak given, which only ever rises in one process.
Writes `memory.json` and `memory.md`.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks import measure
from configs import default
from jevb_jax import experiment
from jevb_jax.compilation import gradient_options

MIB = 2.0**20


def _experiment(arguments: argparse.Namespace, settings: dict[str, int]) -> experiment.Experiment:
    config: Any = default.get_config()
    config.data.source = "shapes"
    config.data.num_train_examples = 2 * settings["batch"] + 256  # above every k of k-NN
    config.data.num_test_examples = 16
    config.augmentation.image_size = arguments.image_size
    config.model.backbone = arguments.backbone
    config.model.width = arguments.width
    config.model.projector_hidden_dims = (256,)
    config.model.embedding_dim = settings["D"]
    config.model.head_hidden_dim = 128
    config.train.batch_size = settings["batch"]
    config.jevb.num_samples = settings["samples"]
    config.augmentation.num_small_crops = settings["views"] - 2
    return experiment.build_experiment(config)


def measure_step(arguments: argparse.Namespace, settings: dict[str, int]) -> dict[str, Any]:
    """One row: what a step of these settings holds."""
    built = _experiment(arguments, settings)
    size = arguments.image_size
    images = jax.ShapeDtypeStruct((settings["batch"], size, size, 3), np.uint8)
    state = jax.eval_shape(built.initial_state)
    step = jax.jit(built.train_step, donate_argnums=0, compiler_options=gradient_options())
    compiled = step.lower(state, images, built.key).compile()
    memory: Any = compiled.memory_analysis()
    row: dict[str, Any] = {
        **settings,
        "arguments, MiB": memory.argument_size_in_bytes / MIB,
        "temporary, MiB": memory.temp_size_in_bytes / MIB,
        "allocator's peak, MiB": None,
    }
    device = jax.devices()[0]
    if device.platform != "cpu":
        zeros = np.zeros(images.shape, np.uint8)
        jax.block_until_ready(compiled(built.initial_state(), zeros, built.key))
        row["allocator's peak, MiB"] = (device.memory_stats() or {})["peak_bytes_in_use"] / MIB
    return row


def growth(name: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Exponent and slope of the temporary memory in one setting."""
    x = np.array([row[name] for row in rows], float)
    y = np.array([row["temporary, MiB"] for row in rows])
    return {
        "setting": name,
        "from": int(x[0]),
        "to": int(x[-1]),
        "exponent": float(np.polyfit(np.log(x), np.log(y), 1)[0]),
        "slope, KiB a unit": 1024 * float(np.polyfit(x, y, 1)[0]),
        "memory, last / first": float(y[-1] / y[0]),
    }


def main() -> None:
    """Measures and writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--backbone", default="resnet18")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--image_size", type=int, default=32)
    parser.add_argument("--batch", type=int, nargs="+", default=[128, 512, 1024])
    parser.add_argument("--D", type=int, nargs="+", default=[128, 512, 2048, 8192])
    parser.add_argument("--samples", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--small_crops", type=int, nargs="+", default=[0, 2, 4])
    arguments = parser.parse_args()

    base = {"batch": 512, "D": 512, "samples": 1, "views": 2}
    varied = {
        "batch": arguments.batch,
        "D": arguments.D,
        "samples": arguments.samples,
        "views": [2 + crops for crops in arguments.small_crops],
    }
    tables: dict[str, list[dict[str, Any]]] = {"Growth": []}
    for name, values in varied.items():
        rows = [measure_step(arguments, {**base, name: value}) for value in values]
        for row in rows:
            print(row, flush=True)
        tables[f"By {name}"] = rows
        if len(rows) > 1:
            tables["Growth"].append(growth(name, rows))
    command = "python -m benchmarks.memory " + " ".join(sys.argv[1:])
    facts = measure.environment(command, vars(arguments))
    print(measure.write_results(arguments.out, "memory", facts, tables))


if __name__ == "__main__":
    main()
