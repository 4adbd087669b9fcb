"""Views a second of the augmentations, whole and operation by operation, beside torchvision and kornia.

python -m benchmarks.augmentation --out=runs/augmentation --peer_python=PEERS/bin/python
python -m benchmarks.augmentation --out=runs/augmentation --batch_size=4096 --peer_python=PEERS/bin/python

The first is for a CPU: everything is bound to `--num_cores=1`, so that views/s are those of a core. The
second is for a GPU, where Pillow alone runs on a core. A view is SimSiam's for ImageNet (crop and resize,
flip, jitter, grey, blur, normalise) with its probabilities; an operation alone acts on every image.
Each cell is one batch in, one batch out; images are random. `v2 batch` draws once for a whole batch and
`v2` loops over its images: only pillow, v2 and kornia compute what we do. Writes `augmentation.json` and
`augmentation.md`. PEERS: `python -m venv PEERS`, `PEERS/bin/pip install torch torchvision kornia`.
"""

import argparse
import contextlib
import functools
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import measure
from benchmarks.peer_process import PeerProcess
from configs import default
from jevb_jax.images import augmentations
from jevb_jax.images.augmentations import ViewAugmentation

PEERS = ("pillow", "v2", "v2 batch", "kornia")
KERNEL_SIZE = 3  # of 32 pixels, a tenth


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The settings.

    Args:
      arguments: None takes those of the command line.

    Returns:
      The settings, by name.
    """
    parser = measure.make_parser(__doc__, num_rounds=7)
    measure.add_peer_arguments(parser, num_cores=1, needs="kornia")
    parser.add_argument("--batch_size", type=int, default=512)
    parser.add_argument("--image_size", type=int, default=32)
    return parser.parse_args(arguments)


def operations(view: ViewAugmentation) -> dict[str, Callable[[Any, Any], Any]]:
    """Functions of a key and an image.

    Args:
      view: the whole view.

    Returns:
      The view and its operations alone, by name; each acts on every image.
    """
    return {
        "view": view,
        "crop and resize": lambda k, x: augmentations.random_resized_crop(k, x, size=view.size),
        "flip": lambda k, x: augmentations.random_horizontal_flip(k, x, probability=1.0),
        "jitter": lambda k, x: augmentations.color_jitter(k, x, probability=1.0),
        "grey": lambda k, x: augmentations.random_grayscale(k, x, probability=1.0),
        "blur": lambda k, x: augmentations.random_gaussian_blur(
            k, x, kernel_size=KERNEL_SIZE, probability=1.0
        ),
        "solarise": lambda k, x: augmentations.random_solarize(k, x, probability=1.0),
    }


def table(timings: dict[str, measure.Timing], *, batch_size: int) -> list[dict[str, Any]]:
    """The rows.

    Args:
      timings: `jevb_jax/OPERATION`, and `PEER/OPERATION` where there are peers.
      batch_size: images of a timing.

    Returns:
      One row an operation: images a second of every library, and how many times as fast we are.
    """
    names = [name.partition("/")[2] for name in timings if name.startswith("jevb_jax/")]
    libraries = list(dict.fromkeys(name.partition("/")[0] for name in timings))
    rows = []
    for name in names:
        row: dict[str, Any] = {"images/s": name}
        for library in libraries:
            row[library] = batch_size / timings[f"{library}/{name}"].median
        for library in libraries[1:]:
            ratio = timings[f"{library}/{name}"].ratio_to(timings[f"jevb_jax/{name}"])
            row[f"ours / {library}"] = ratio
        rows.append(row)
    return rows


def main(arguments: argparse.Namespace) -> str:
    """Measures and writes.

    Args:
      arguments: of `parse`.

    Returns:
      The Markdown.
    """
    if arguments.num_cores:  # before JAX and torch count the cores
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: arguments.num_cores])
    num_threads = len(os.sched_getaffinity(0))
    settings: Any = default.get_config().augmentation
    view = ViewAugmentation(
        size=arguments.image_size,
        mean=settings.mean,
        std=settings.std,
        blur_probability=0.5,
        blur_kernel_size=KERNEL_SIZE,
    )
    shape = (arguments.batch_size, arguments.image_size, arguments.image_size, 3)
    images = jnp.asarray(np.random.default_rng(0).integers(0, 256, shape, np.uint8))
    keys = jax.random.split(jax.random.key(0), arguments.batch_size)
    compiled = {name: jax.jit(jax.vmap(one)) for name, one in operations(view).items()}
    timers: dict[str, Callable[[], float]] = {
        f"jevb_jax/{name}": functools.partial(
            measure.seconds_of, functools.partial(call, keys, images)
        )
        for name, call in compiled.items()
    }
    facts = measure.environment(
        " ".join(["python -m benchmarks.augmentation", *sys.argv[1:]]), vars(arguments)
    )
    facts |= {"threads": num_threads}
    with contextlib.ExitStack() as stack:
        if arguments.peer_python:
            peer = stack.enter_context(
                PeerProcess(
                    arguments.peer_python,
                    "image_operations.py",
                    {
                        "image_size": arguments.image_size,
                        "kernel_size": KERNEL_SIZE,
                        "batch_size": arguments.batch_size,
                        "num_threads": num_threads,
                        "mean": view.mean,
                        "std": view.std,
                    },
                )
            )
            facts["peers"] = peer.facts
            for name in compiled:
                for library in PEERS:
                    timers[f"{library}/{name}"] = functools.partial(
                        peer.seconds, f"{library}/{name}"
                    )
        timings = measure.interleave(timers, num_rounds=arguments.num_rounds)
    rows = table(timings, batch_size=arguments.batch_size)
    return measure.write_results(arguments.out, "augmentation", facts, {"": rows})


if __name__ == "__main__":
    print(main(parse()))
