"""Exports a run: `python -m jevb_jax.export --workdir=runs/digits --out=exports/digits`.

Two forms in one directory. The archive form, `model.safetensors` and `model.json`, is what
`jevb_jax.load` reads, without the libraries of training, and what outlives this library: names, shapes,
the config and hashes are plain. The serving form, `model.stablehlo`, is one function for CPU, CUDA and
TPU with any size of batch, which needs JAX alone:

    exported = jax.export.deserialize(pathlib.Path("exports/digits/model.stablehlo").read_bytes())
    outputs = exported.call(images)     # uint8 [b, h, w, c] -> {"embedding": [b, D], ...}

`read_serving` does the same and checks the file's hash first. Height and width are those of the export
(`--height`, `--width`): by default those of the images that the network was trained on, as its files were
read. Images of another size are prepared inside the function as everywhere (`images.preparation`): the
shorter side is brought to the trained size and the center is cut out, nothing is squashed. For photos of
many sizes, read each to the default size first, or export once for each size.

ONNX is not written here: the one converter of JAX that is kept, jax2onnx, would bring ONNX's libraries
and a second translation of every operation to keep tested. It takes `serving_function` as it is, with
`inputs=[jax.ShapeDtypeStruct(("B", 8, 8, 1), numpy.uint8)]`: version 0.17.1 with onnxruntime 1.32 agreed
with JAX within 2e-6 on the digits' network, though the runtime warned of shapes in its file.
"""

import argparse
import importlib.metadata
import operator
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
from jax import Array

from jevb_jax import messages
from jevb_jax.detector import write_model
from jevb_jax.images import pixels
from jevb_jax.loading import load
from jevb_jax.model import Model
from jevb_jax.networks.heads import Posterior
from jevb_jax.runs import archive, files
from jevb_jax.runs.metrics_log import standard_output, unbroken
from jevb_jax.training import from_settings
from jevb_jax.xla_options import in_single_precision

PLATFORMS = ("cpu", "cuda", "tpu")
SERVED = "model.stablehlo"


def serving_function(model: Model) -> Callable[[Array], dict[str, Array]]:
    """What is served, as a function of images alone.

    Args:
      model: what `load` gave; its weights are constants of the function.

    Returns:
      `images [b, h, w, c] uint8 -> {"embedding": [b, D], "representation": [b, F]}`, and of JEVB
      "posterior_mean" and "posterior_scale", `[b, D]`; float32. Images of any size are prepared as in
      `Model`; of those that have to be resized, a level may differ by one of 255 (`cut_levels`).
    """
    view = from_settings.view_augmentations(model.settings.augmentation)[0]

    def center_view(image: Array) -> Array:
        if model.square_size:
            image = pixels.cut_levels(image, size=model.square_size)
        return pixels.center_view(image, size=view.size, mean=view.mean, std=view.std)

    def serve(images: Array) -> dict[str, Array]:
        views = jax.vmap(center_view)(images)
        outputs: Any = model.network.apply(model.variables, views, train=False)
        served = {"embedding": outputs.embedding, "representation": outputs.representation}
        if isinstance(outputs.prediction, Posterior):
            served["posterior_mean"] = outputs.prediction.posterior_mean
            served["posterior_scale"] = outputs.prediction.posterior_scale
        return served

    return serve


@in_single_precision
def export_serving(model: Model, *, height: int, width: int) -> bytes:
    """The serving form: StableHLO for every platform, any size of batch.

    Args:
      model: what `load` gave.
      height: pixels of the images that will be served.
      width: pixels of the images that will be served.

    Returns:
      What `jax.export.deserialize` reads.
    """
    (batch,) = jax.export.symbolic_shape("b")
    height, width = operator.index(height), operator.index(width)
    images = jax.ShapeDtypeStruct((batch, height, width, model.num_channels), jnp.uint8)
    exported = jax.export.export(jax.jit(serving_function(model)), platforms=PLATFORMS)(images)
    return bytes(exported.serialize())


def export_model(
    model: Model, directory: str | Path, *, height: int | None = None, width: int | None = None
) -> None:
    """Writes both forms of a model.

    Args:
      model: what `load` gave.
      directory: made if it does not exist; an older export in it is replaced.
      height: of the images that will be served, pixels; by default the model's `square_size`, or its
        `image_size` where there is none.
      width: pixels of the images that will be served.

    Raises:
      ValueError: a size below one pixel, or a directory that holds a run, a classifier or a detector.
      ArchiveError: a damaged export is in the way.
    """
    trained = model.square_size or model.image_size
    height = trained if height is None else operator.index(height)
    width = trained if width is None else operator.index(width)
    if min(height, width) < 1:
        raise ValueError(f"images of {height} x {width} pixels cannot be served")
    target = files.to_path(directory)
    archive.check_free(target, kind="export")
    manifest = {
        "serving": {
            "file": SERVED,
            "images": ["b", height, width, model.num_channels],
            "platforms": list(PLATFORMS),
        },
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax")},
    }
    served = export_serving(model, height=height, width=width)
    write_model(model, target, manifest=manifest, extra_files={SERVED: served})


def read_serving(directory: str | Path) -> jax.export.Exported:
    """The serving form, checked against its hash.

    Args:
      directory: where `export` wrote.

    Returns:
      Call it with `.call(images)`.

    Raises:
      ArchiveError: a file is missing or not what was written.
    """
    source = files.to_path(directory)
    content = archive.read_file(source, archive.read_manifest(source), SERVED)
    return jax.export.deserialize(bytearray(content))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m jevb_jax.export", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--workdir", required=True, help="directory of a run of train.py")
    parser.add_argument("--out", required=True, help="directory of the export")
    parser.add_argument("--step", help='a checkpoint\'s step or "best"; the latest by default')
    parser.add_argument("--height", type=int, help="of served images, pixels; as trained")
    parser.add_argument("--width", type=int, help="likewise")
    arguments = parser.parse_args(argv)
    step: Any = arguments.step
    if step is not None and step != "best":
        if not step.isdecimal():
            parser.error(f'--step is a number or "best", got {step!r}')
        step = int(step)
    try:
        model = load(arguments.workdir, step)
        export_model(model, arguments.out, height=arguments.height, width=arguments.width)
    except Exception as error:
        message = messages.for_person(error)
        if message is None:
            raise
        print(message, file=sys.stderr)
        return 1
    console = standard_output()
    with unbroken(console):
        console.print(f"{model} written to {arguments.out}", markup=False, soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
