"""Views a second of the whole training step, beside PyTorch's, stable-pretraining's and the floor.

python -m benchmarks.train_throughput --out=runs/train_throughput --width=16 --head_dim=512 \
    --batch_size=64 --num_cores=1 --peer_python=PEERS/bin/python --spt_python=SPT/bin/python

One GPU, with the peers' environments on it:

python -m benchmarks.train_throughput --out=runs/train_throughput_gpu --methods=jevb,simsiam \
    --dtype=bfloat16 --batch_size=1024 --steps_per_turn=10 --num_rounds=3 --matmul_size=8192 \
    --num_data_workers=14 --peer_python=PEERS/bin/python --peer_modes=channels_last,compiled \
    --spt_python=SPT/bin/python

A step is: draw a batch, two augmented views an image, forward, backward, update. All methods have one
encoder, ResNet-18 with the CIFAR stem, and the heads of their recipes, `--head_dim / 2048` as wide;
SimSiam's are lightly's three layers. Images are random unless `--images` names an `.npz`: time does not
depend on them. Rows `encoder`, `views` and `matmul` are parts alone: the encoder's forward and backward
on ready views (the floor), the augmentations, and a product of square matrices (the ceiling, of which
the last column is the share). Operations are XLA's count of the program before it is optimized.

The peers: `python -m venv PEERS`, `PEERS/bin/pip install torch torchvision lightly kornia`; and
`python -m venv SPT`, `SPT/bin/pip install 'stable-pretraining[jax]'`. Writes `train_throughput.json`
and `train_throughput.md`.
"""

import argparse
import contextlib
import functools
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import measure
from benchmarks.peer_process import PeerProcess
from configs import cifar10, recipes
from jevb_jax.images import batch_order, batches
from jevb_jax.images import views as view_module
from jevb_jax.training import experiment, step
from jevb_jax.training.experiment import Experiment
from jevb_jax.xla_options import network_options

PUBLISHED_HEAD_DIM = 2048


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The settings.

    Args:
      arguments: None takes those of the command line.

    Returns:
      The settings, by name.
    """
    parser = measure.make_parser(__doc__, num_rounds=5)
    measure.add_peer_arguments(parser, num_cores=0, needs="lightly")
    parser.add_argument("--images", type=Path, help=".npz with `images` uint8 [N, h, w, 3]")
    parser.add_argument("--num_images", type=int, default=10_000)
    parser.add_argument("--image_size", type=int, default=32)
    parser.add_argument("--methods", default=",".join(recipes.METHODS))
    parser.add_argument("--backbone", default="resnet18", help="another has no peers")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--head_dim", type=int, default=PUBLISHED_HEAD_DIM)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--batch_size", type=int, default=512)
    parser.add_argument(
        "--steps_per_dispatch", type=int, default=0, help="0: 1 on the CPU, 10 else"
    )
    parser.add_argument("--steps_per_turn", type=int, default=2)
    parser.add_argument("--matmul_size", type=int, default=1024)
    parser.add_argument(
        "--peer_modes", default="channels_last", help="eager,channels_last,compiled"
    )
    parser.add_argument("--num_data_workers", type=int, default=2, help="processes of DataLoader")
    parser.add_argument("--spt_python", default="", help="of one with stable-pretraining[jax]")
    return parser.parse_args(arguments)


def make_experiment(method: str, images: Path, arguments: argparse.Namespace) -> Any:
    """A method with the common encoder.

    Args:
      method: of `recipes.METHODS`.
      images: `.npz` of the training images.
      arguments: of `parse`.

    Returns:
      The experiment.
    """
    config: Any = cifar10.get_config(method)
    config.data.source = "arrays"
    config.data.train_paths = (str(images),)
    config.evaluation.knn_k = (1,)
    config.augmentation.image_size = arguments.image_size
    config.model.backbone = arguments.backbone
    config.model.width = arguments.width
    config.model.dtype = arguments.dtype
    if method == "simsiam":  # as lightly's
        config.model.projector_hidden_dims = (PUBLISHED_HEAD_DIM, PUBLISHED_HEAD_DIM)
        config.optimizer.constant_head_rate = False

    def scaled(size: int) -> int:
        return max(1, size * arguments.head_dim // PUBLISHED_HEAD_DIM)

    config.model.projector_hidden_dims = tuple(map(scaled, config.model.projector_hidden_dims))
    config.model.embedding_dim = scaled(config.model.embedding_dim)
    config.model.head_hidden_dim = scaled(config.model.head_hidden_dim)
    config.optimizer.warmup_epochs = 0.0
    config.train.batch_size = arguments.batch_size
    return experiment.build_experiment(config)


class StepTimer:
    """Runs steps of a method as the training loop does; calling it gives the seconds of a turn.

    Attributes:
      flops: of a step, counted.
    """

    def __init__(self, made: Experiment, *, num_steps: int, steps_per_dispatch: int):
        """Compiles and places the images.

        Args:
          made: the experiment.
          num_steps: of a turn.
          steps_per_dispatch: of one compiled call; it divides the turn.

        Raises:
          ValueError: it does not.
        """
        if num_steps % steps_per_dispatch:
            raise ValueError(
                f"steps_per_turn = {num_steps} must be a multiple of steps_per_dispatch = "
                f"{steps_per_dispatch}"
            )
        self._num_steps, self._chunk_steps = num_steps, steps_per_dispatch
        self._key, self._state = made.key, made.initial_state()
        self._images = jnp.asarray(batches.load_resident(made.dataset.train))
        self._indices = functools.partial(
            batch_order.batch_indices,
            num_examples=len(made.dataset.train),
            batch_size=made.config["train"]["batch_size"],
            seed=0,
        )
        self._step = 0
        self._chunk = step.make_train_chunk(made.train_step)
        shape = (made.config["train"]["batch_size"], *self._images.shape[1:])
        self.flops = measure.counted_flops(
            made.train_step, self._state, jax.ShapeDtypeStruct(shape, jnp.uint8), self._key
        )

    def __call__(self) -> float:
        """One turn."""
        start = time.perf_counter()
        for _ in range(self._num_steps // self._chunk_steps):
            rows = [self._indices(self._step + row) for row in range(self._chunk_steps)]
            result = self._chunk(
                self._state,
                self._images,
                jnp.asarray(np.stack(rows), jnp.int32),
                jnp.asarray(self._chunk_steps),
                self._key,
            )
            self._state = result.state
            self._step += self._chunk_steps
        jax.block_until_ready(self._state)
        return time.perf_counter() - start


def part_timers(
    made: Experiment, arguments: argparse.Namespace
) -> tuple[dict[str, Callable[[], float]], dict[str, float]]:
    """The parts alone.

    Args:
      made: whose encoder and views they are.
      arguments: of `parse`.

    Returns:
      timers: by name, of as many steps as a turn of the step's.
      flops: of one step's part, by name.
    """
    variables: Any = made.initial_state().evaluation_variables
    rest = variables["batch_stats"]
    views = jax.random.normal(made.key, (2 * arguments.batch_size, *made.view_shape))

    def loss(params: Any, views: jax.Array) -> jax.Array:
        out: Any = made.model.apply(
            {"params": params, "batch_stats": rest},
            views,
            method=lambda model, x: model.backbone(x, train=True),
            mutable=["batch_stats"],
        )
        return jnp.mean(jnp.square(out[0].astype(jnp.float32)))

    # Random: a GPU multiplies constants at a higher clock.
    side = jax.random.normal(made.key, (arguments.matmul_size,) * 2, arguments.dtype)
    images = jnp.asarray(made.dataset.train[0])[None].repeat(arguments.batch_size, 0)
    keys = jax.random.split(made.key, arguments.batch_size)
    parts: dict[str, tuple[Any, tuple[Any, ...]]] = {
        "encoder": (
            jax.jit(jax.grad(loss), compiler_options=network_options()),
            (variables["params"], views),
        ),
        "encoder, forward": (jax.jit(loss), (variables["params"], views)),
        "views": (
            jax.jit(lambda k, i: view_module.multi_view(k, i, made.view_augmentations)),
            (keys, images),
        ),
        "matmul": (jax.jit(jnp.matmul), (side, side)),
    }

    def timer(call: Any, inputs: Any) -> float:
        return measure.seconds_of(lambda: [call(*inputs) for _ in range(arguments.steps_per_turn)])

    flops = {name: measure.counted_flops(call, *inputs) for name, (call, inputs) in parts.items()}
    return {name: functools.partial(timer, *part) for name, part in parts.items()}, flops


def table(
    timings: dict[str, measure.Timing],
    flops: dict[str, float],
    *,
    num_views: int,
    num_steps: int,
    reference: str,
) -> list[dict[str, Any]]:
    """The rows.

    Args:
      timings: by name, of `num_steps` steps each.
      flops: of one step, by name, where they are counted.
      num_views: of one step.
      num_steps: of a turn.
      reference: name of the row to which the others are compared.

    Returns:
      Rows of `measure.markdown_table`.
    """
    ceiling = flops["matmul"] * num_steps / timings["matmul"].median
    rows = []
    for name, timing in timings.items():
        rate = flops[name] * num_steps / timing.median if name in flops else None
        rows.append(
            {
                "": name,
                "views/s": None if "matmul" in name else num_views * num_steps / timing.median,
                f"time / {reference}": timing.ratio_to(timings[reference]),
                "Gflop a view": flops[name] / num_views / 1e9
                if name in flops and "matmul" not in name
                else None,
                "Gflop/s": None if rate is None else rate / 1e9,
                "share of matmul": None if rate is None else rate / ceiling,
            }
        )
    return rows


def main(arguments: argparse.Namespace) -> str:
    """Measures and writes.

    Args:
      arguments: of `parse`.

    Returns:
      The Markdown.

    Raises:
      ValueError: peers with another backbone than theirs, or on another platform.
    """
    if arguments.backbone != "resnet18" and (arguments.peer_python or arguments.spt_python):
        raise ValueError(
            f"the peers have resnet18 alone, got --backbone={arguments.backbone}: leave out "
            "--peer_python and --spt_python"
        )
    if arguments.num_cores:  # before JAX and torch count the cores
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: arguments.num_cores])
    num_threads = len(os.sched_getaffinity(0))
    per_dispatch = arguments.steps_per_dispatch or (
        1 if jax.default_backend() == "cpu" else min(10, arguments.steps_per_turn)
    )
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        images = arguments.images
        if images is None:
            images = folder / "images.npz"
            shape = (arguments.num_images, arguments.image_size, arguments.image_size, 3)
            np.savez(images, images=np.random.default_rng(0).integers(0, 256, shape, np.uint8))
        count = arguments.steps_per_turn
        timers: dict[str, Callable[[], float]] = {}
        flops: dict[str, float] = {}
        made: Any = None
        for method in arguments.methods.split(","):
            made = make_experiment(method, images, arguments)
            timer = StepTimer(made, num_steps=count, steps_per_dispatch=per_dispatch)
            timers[method], flops[method] = timer, timer.flops
        parts, part_flops = part_timers(made, arguments)
        timers |= parts
        flops |= part_flops
        facts = measure.environment(
            " ".join(["python -m benchmarks.train_throughput", *sys.argv[1:]]), vars(arguments)
        )
        facts |= {"threads": num_threads, "steps_per_dispatch": per_dispatch}
        settings = {
            "images": str(images),
            "image_size": arguments.image_size,
            "width": arguments.width,
            "head_dim": arguments.head_dim,
            "batch_size": arguments.batch_size,
            "num_threads": num_threads,
            "num_workers": arguments.num_data_workers,
            "dtype": arguments.dtype,
            "matmul_size": arguments.matmul_size,
            "mean": made.view_augmentations[0].mean,
            "std": made.view_augmentations[0].std,
        }
        if arguments.peer_python:
            peer = stack.enter_context(
                PeerProcess(arguments.peer_python, "torch_simsiam.py", settings)
            )
            facts["torch_simsiam"] = peer.facts
            measure.check_platform(peer.facts["platform"], "PyTorch")
            names = [
                f"{part}/{mode}"
                for mode in arguments.peer_modes.split(",")
                for part in ("workers", "device", "encoder")
            ]
            for name in (*names, "views", "matmul"):
                timers[f"torch {name}"] = functools.partial(peer.seconds, name, count)
            flops["torch matmul"] = flops["matmul"]
        if arguments.spt_python:
            spt = stack.enter_context(
                PeerProcess(arguments.spt_python, "stable_pretraining_simsiam.py", settings)
            )
            facts["stable_pretraining"] = spt.facts
            measure.check_platform(spt.facts["platform"], "stable-pretraining")
            timers["stable-pretraining, JAX"] = functools.partial(spt.seconds, "train", count)
        timings = measure.interleave(timers, num_rounds=arguments.num_rounds)
    reference = "simsiam" if "simsiam" in timings else next(iter(timings))
    rows = table(
        timings,
        flops,
        num_views=2 * arguments.batch_size,
        num_steps=arguments.steps_per_turn,
        reference=reference,
    )
    return measure.write_results(arguments.out, "train_throughput", facts, {"": rows})


if __name__ == "__main__":
    print(main(parse()))
