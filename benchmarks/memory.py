"""Memory and time of a training step against batch, D, views and samples, and how they grow.

python -m benchmarks.memory --out=runs/memory

One setting is varied at a time; views past the second are small crops. XLA says what a step will hold
at once (arguments and temporary arrays); on an accelerator the allocator's peak is given too, of rows
that raise it: it never falls in one process. Steps of one setting's values take turns, medians. The
exponents `p` of `memory ~ setting^p` (of the temporary memory) and `time ~ setting^p` are fitted by least
squares in logarithms; `slope` is the part of the memory that grows, per unit of the setting.
Writes `memory.json` and `memory.md`.
"""

import argparse
import functools
import sys
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from benchmarks import measure
from configs import default
from jevb_jax.training import experiment
from jevb_jax.training.experiment import Experiment
from jevb_jax.xla_options import network_options

MIB = 2.0**20


def _experiment(arguments: argparse.Namespace, settings: dict[str, int]) -> Experiment:
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


def compiled_step(
    arguments: argparse.Namespace, settings: dict[str, int]
) -> tuple[dict[str, Any], Callable[[], Any]]:
    """A row of what a step of these settings holds, and a call that takes the next step."""
    built = _experiment(arguments, settings)
    size = arguments.image_size
    shape = (settings["batch"], size, size, 3)
    images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    state = built.initial_state()
    step = jax.jit(built.train_step, donate_argnums=0, compiler_options=network_options())
    compiled = step.lower(state, images, built.key).compile()

    def call() -> Any:
        nonlocal state
        state, metrics = compiled(state, images, built.key)
        return state, metrics

    memory: Any = compiled.memory_analysis()
    row: dict[str, Any] = {
        **settings,
        "arguments, MiB": memory.argument_size_in_bytes / MIB,
        "temporary, MiB": memory.temp_size_in_bytes / MIB,
        "allocator's peak, MiB": None,
    }
    before = _peak_bytes()
    if before is not None:
        jax.block_until_ready(call())
        after = _peak_bytes()
        if after is not None and after > before:
            row["allocator's peak, MiB"] = after / MIB
    return row, call


def _peak_bytes() -> int | None:
    """The allocator's peak so far, where the device says it."""
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def measure_steps(
    arguments: argparse.Namespace, settings: list[dict[str, int]]
) -> list[dict[str, Any]]:
    """A row for each of the settings, with seconds of a step."""
    pairs = [compiled_step(arguments, each) for each in settings]
    timers = {
        str(number): functools.partial(measure.seconds_of, call)
        for number, (_, call) in enumerate(pairs)
    }
    timings = measure.interleave(timers, num_rounds=arguments.num_rounds)
    return [
        {**row, "step, s": timing.median}
        for (row, _), timing in zip(pairs, timings.values(), strict=True)
    ]


def growth(name: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """How memory and time grow with one setting."""
    settings = [row[name] for row in rows]
    memory, seconds = ([row[of] for row in rows] for of in ("temporary, MiB", "step, s"))
    return {
        "setting": name,
        "from": settings[0],
        "to": settings[-1],
        "memory's exponent": measure.exponents(rows, (name,), "temporary, MiB")[name],
        "slope, KiB a unit": 1024 * float(np.polyfit(settings, memory, 1)[0]),
        "memory, last / first": memory[-1] / memory[0],
        "time's exponent": measure.exponents(rows, (name,), "step, s")[name],
        "time, last / first": seconds[-1] / seconds[0],
    }


def main() -> None:
    """Measures and writes."""
    parser = measure.make_parser(__doc__, num_rounds=3)
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
    tables: dict[str, list[dict[str, Any]]] = {}
    grown: list[dict[str, Any]] = []
    for name, values in varied.items():
        rows = measure_steps(arguments, [{**base, name: value} for value in values])
        for row in rows:
            print(row, flush=True)
        tables[f"By {name}"] = rows
        if len(rows) > 1:
            grown.append(growth(name, rows))
    if grown:  # one value of a setting has no growth
        tables = {"Growth": grown, **tables}
    command = "python -m benchmarks.memory " + " ".join(sys.argv[1:])
    facts = measure.environment(command, vars(arguments))
    print(measure.write_results(arguments.out, "memory", facts, tables))


if __name__ == "__main__":
    main()
