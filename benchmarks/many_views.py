"""CPU time to compile and to run a training step of 2, 8 and 20 views.

python -m benchmarks.many_views

JEVB with ResNet-18 of width 16 on a CPU: two full views of 32 pixels, the others small crops of 16. One
process measures each number of views, so nothing is compiled twice or shared.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from configs import cifar10
from jevb_jax.training.experiment import build_experiment
from jevb_jax.xla_options import network_options


def _cpu_seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    start = time.process_time()
    made = work()
    return time.process_time() - start, made


def measure(num_views: int, *, batch: int, num_steps: int) -> dict[str, float]:
    """CPU seconds to trace and compile a step, and to run it.

    Args:
      num_views: two full views and small crops, in all.
      batch: images.
      num_steps: the time of a step is the median of so many.

    Returns:
      "trace", "compile" and "step", in CPU seconds.
    """
    config: Any = cifar10.get_config("jevb")
    config.data.update({"source": "shapes", "tfds_name": "", "num_train_examples": 5000})
    config.model.update({"width": 16, "dtype": "float32", "embedding_dim": 128})
    config.model.update({"projector_hidden_dims": (512,), "head_hidden_dim": 128})
    config.augmentation.num_small_crops = num_views - 2
    config.train.target_decay = 0.0
    experiment = build_experiment(config)
    state = experiment.initial_state()
    images = np.random.default_rng(0).integers(0, 256, (batch, 32, 32, 3), np.uint8)
    key = jax.random.key(0)
    step = jax.jit(experiment.train_step, compiler_options=network_options())
    trace, lowered = _cpu_seconds(lambda: step.lower(state, images, key))
    compile_, compiled = _cpu_seconds(lowered.compile)
    jax.block_until_ready(compiled(state, images, key))
    steps = [
        _cpu_seconds(lambda: jax.block_until_ready(compiled(state, images, key)))[0]
        for _ in range(num_steps)
    ]
    return {"trace": trace, "compile": compile_, "step": statistics.median(steps)}


def main(argv: Sequence[str] | None = None) -> None:
    """Prints a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--num_steps", type=int, default=5)
    parser.add_argument("--views", type=int, nargs="+", default=[2, 8, 20])
    arguments = parser.parse_args(argv)
    if len(arguments.views) == 1:
        found = measure(arguments.views[0], batch=arguments.batch, num_steps=arguments.num_steps)
        print(json.dumps(found))
        return
    print("| views | trace | compile | step |\n|---|---|---|---|")
    for views in arguments.views:
        command = [sys.executable, "-m", "benchmarks.many_views", f"--views={views}"]
        command += [f"--batch={arguments.batch}", f"--num_steps={arguments.num_steps}"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
        print(f"| {views} | " + " | ".join(f"{found[k]:.2f}" for k in found) + " |", flush=True)


if __name__ == "__main__":
    main()
