"""Exports a run: `python -m jevb_jax.export --workdir=runs/digits --out=exports/digits`.

One directory holds two forms, and a third if asked. The archive form, `model.safetensors` and
`model.json`, is read by `jevb_jax.load` without the libraries for training. It can outlive this
library: names, shapes, config and hashes are plain text. The serving form, `model.stablehlo`, is
one function for CPU, CUDA and TPU, with any batch size, which needs only JAX:

    exported = jax.export.deserialize(pathlib.Path("exports/digits/model.stablehlo").read_bytes())
    outputs = exported.call(images)     # uint8 [b, h, w, c] -> {"embedding": [b, D], ...}

`read_serving` does the same, and first checks the hash of the file. With `--false_alarm_rate=0.05`
there is one more function of this form, `detector.stablehlo`. Beside the outputs above it gives
"score" and "is_outside", the verdict at that rate of false alarms. If the evaluation of the run
saved its fitted scores, the archive form holds the default score and its calibration: a loaded
export needs no training images for `ood_score` and `detector`. The command says if it is missing.

Height and width are fixed by the export (`--height`, `--width`). By default they are those of the
images that the network was trained on, as they were read from files. The function itself prepares
images of another size, as everywhere (`images.preparation`): the shorter side is resized to the
trained size, and the center is cut out, without a change of the aspect ratio. For photos of many
sizes, resize each to the default size first, or export once for each size.

A run on features of a frozen encoder serves them: float32 `[b, F]`, with the other parts alike.

With `--onnx` the same functions are also written as `model.onnx` and `detector.onnx`, for every
runtime that reads ONNX (opset 18), with any batch size. They have the same inputs and outputs. If
onnxruntime is installed, each is run beside JAX before anything is written.

`--push=org/name` uploads the export with a model card to the Hugging Face Hub, in one commit
(`hub_push`). `jevb_jax.load("hf://org/name")` then loads it.
"""

import argparse
import functools
import importlib.metadata
import json
import operator
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from jax import Array

import jevb_jax
from jevb_jax import hub_push, small_programs
from jevb_jax.detector import Detector, write_model
from jevb_jax.evaluation import fitted_scores, score_table
from jevb_jax.evaluation.features import Features
from jevb_jax.images import pixels
from jevb_jax.images.views import View, plain_views
from jevb_jax.loading import load
from jevb_jax.model import Model
from jevb_jax.networks.heads import Posterior
from jevb_jax.runs import archive, files
from jevb_jax.training import from_settings
from jevb_jax.xla_options import in_single_precision

PLATFORMS = ("cpu", "cuda", "tpu")
SERVED = "model.stablehlo"
SERVED_DETECTOR = "detector.stablehlo"
ONNX = "model.onnx"
ONNX_DETECTOR = "detector.onnx"
# Rounding moves some scores of an unlucky network by half a percent, also in JAX from one size of
# batch to another. A wrong translation moves more.
_MOST_APART = 0.01


def serving_function(
    model: Model, detector: Detector | None = None
) -> Callable[[Array], dict[str, Array]]:
    """The function that is served; it takes only images, or features.

    Args:
      model: from `load`. Its weights become constants of the function.
      detector: from `model.detector`. Its fitted score becomes constants, too.

    Returns:
      `images [b, h, w, c] uint8 -> {"embedding": [b, D], "representation": [b, F]}`, and for JEVB
      also "posterior_mean" and "posterior_scale", `[b, D]`; all float32. Images of any size are
      prepared as by `Model`. If they must be resized, a level may differ by one of 255
      (`cut_levels`). With a detector also "score" `[b]` float32 and "is_outside" `[b]` bool. A model
      of features takes float32 `[b, F]`; one of images of another type takes float32 in [0, 1].

    Raises:
      ValueError: the detector's score needs augmented views, which are not served.
    """
    if detector is not None:
        name = detector.score_name
        if score_table.scores_of_run(model.settings, has_labels=False)[name].needs_views:
            raise ValueError(
                f"{name} needs augmented views and random samples of an image, and only scores of the "
                "plain image are served. Set ood.default_score to another score, or leave out the "
                "false-alarm rate"
            )
    view = _view(model)

    def serve(images: Array) -> dict[str, Array]:
        if model.square_size:
            cut = pixels.cut_levels if images.dtype == jnp.uint8 else pixels.cut_floats
            images = jax.vmap(functools.partial(cut, size=model.square_size))(images)
        views = plain_views(images, view)
        outputs: Any = model.network.apply(model.variables, views, train=False)
        served = {"embedding": outputs.embedding, "representation": outputs.representation}
        if isinstance(outputs.prediction, Posterior):
            served["posterior_mean"] = outputs.prediction.posterior_mean
            served["posterior_scale"] = outputs.prediction.posterior_scale
        if detector is not None:
            served["score"] = scores = score(Features(*outputs, terms=None, labels=None))
            served["is_outside"] = ~(jnp.isfinite(scores) & (scores <= threshold))
        return served

    def score(features: Features) -> Array:
        # One image at a time, because scores divide a batch into parts of a known size.
        scorer: Any = None if detector is None else detector.scorer
        return jax.vmap(lambda one: scorer(jax.tree.map(lambda x: x[None], one))[0])(features)

    # The threshold is one of the float32 scores of the calibration, so nothing is lost.
    threshold = np.float32(np.nan if detector is None else detector.threshold)

    return serve


def _view(model: Model) -> View:
    """What the network sees of an example."""
    statistics = from_settings.saved_statistics(model.settings, model.variables)
    return from_settings.views(model.settings, statistics)[0]


@in_single_precision
def export_serving(
    model: Model, *, height: int = 0, width: int = 0, detector: Detector | None = None
) -> bytes:
    """The serving form: StableHLO for all platforms and any batch size.

    Args:
      model: from `load`.
      height: height of the images to serve, in pixels; not read for features.
      width: width of the images to serve, in pixels; not read for features.
      detector: as for `serving_function`.

    Returns:
      Bytes for `jax.export.deserialize`.
    """
    (batch,) = jax.export.symbolic_shape("b")
    _, shape, dtype = _input_of(model, height, width)
    images = jax.ShapeDtypeStruct((batch, *shape), dtype)
    exported = jax.export.export(jax.jit(serving_function(model, detector)), platforms=PLATFORMS)(
        images
    )
    return bytes(exported.serialize())


def _input_of(model: Model, height: int, width: int) -> tuple[str, tuple[int, ...], Any]:
    """Name of what is served, and shape and type of one example."""
    if model.num_features:
        return "features", (model.num_features,), np.float32
    shape = operator.index(height), operator.index(width), model.num_channels
    # Images of other types are served as floats in [0, 1].
    return "images", shape, np.uint8 if model.settings.data.dtype == "uint8" else np.float32


@in_single_precision
def export_onnx(
    model: Model, *, height: int = 0, width: int = 0, detector: Detector | None = None
) -> tuple[bytes, float | None]:
    """The ONNX form: the function that is served, for any batch size. It is checked.

    Args:
      model: from `load`.
      height: as for `export_serving`.
      width: as for `export_serving`.
      detector: as for `serving_function`.

    Returns:
      The bytes of the file. How far onnxruntime's outputs are from JAX's on a few random examples,
      as a share of the largest value of each output; None if onnxruntime is not installed.

    Raises:
      ValueError: the network or the score cannot be written as ONNX, or onnxruntime gives other
        numbers than JAX.
      ModuleNotFoundError: the package onnx is not installed.
    """
    from jevb_jax.to_onnx import check, convert, graph  # an extra

    function = serving_function(model, detector)
    name, shape, dtype = _input_of(model, height, width)
    random = np.random.default_rng(0)
    if model.num_features:
        examples = random.normal(size=(3, *shape)).astype(np.float32)
    elif dtype == np.float32:
        examples = random.random((3, *shape), np.float32)
    else:
        examples = random.integers(0, 256, (3, *shape), np.uint8)
    try:
        content = convert.to_onnx(
            function,
            input_name=name,
            shape=shape,
            dtype=dtype,
            metadata=_onnx_metadata(model, detector),
            producer=("jevb_jax", jevb_jax.__version__),
        )
        if not check.can_run():
            return content, None
        return content, check.largest_difference(content, function, examples, at_most=_MOST_APART)
    except graph.ConversionError as error:
        what = "this network" if detector is None else f"a detector with {detector.score_name}"
        raise ValueError(
            f"{what} cannot be written as ONNX: {error}. Without ONNX, it can be exported as archive "
            "and as StableHLO"
        ) from error


def _onnx_metadata(model: Model, detector: Detector | None) -> dict[str, str]:
    """What the reader of an ONNX file must know, as texts."""
    values = {"method": model.settings.method, "step": str(model.step)}
    if model.num_features:
        values["input"] = "features of the frozen encoder, float32 [b, F], as they were trained on"
    else:
        view: Any = _view(model)
        kind, applied = "uint8 levels from 0 to 255", "(level / 255 - mean) / std"
        if model.settings.data.dtype != "uint8":
            kind, applied = "float32 values from 0 to 1", "(value - mean) / std"
        values["input"] = (
            f"images, {kind}, [b, height, width, channels], not normalized: the file itself cuts them "
            f"to the trained size and applies {applied}"
        )
        values["mean"], values["std"] = json.dumps(view.mean), json.dumps(view.std)
    if detector is not None:
        values["score"] = f"{detector.score_name}, larger is stranger"
        values["threshold"] = repr(float(np.float32(detector.threshold)))
        values["false_alarm_rate"] = repr(detector.false_alarm_rate)
    return values


def export_model(
    model: Model,
    directory: str | Path,
    *,
    height: int | None = None,
    width: int | None = None,
    false_alarm_rate: float | None = None,
    onnx: bool = False,
) -> None:
    """Writes the archive form and the serving form of a model, and the ONNX form if asked.

    Args:
      model: from `load`.
      directory: created if it does not exist. An older export in it is replaced.
      height: height of the images to serve, in pixels; by default the model's `square_size`, or its
        `image_size` if that is 0.
      width: width of the images to serve, in pixels; by default as for `height`.
      false_alarm_rate: in (0, 1). If given, a function that detects strange images is served, too.
      onnx: whether what is served is also written as ONNX (`export_onnx`). The manifest says how far
        it is from JAX, "largest_difference"; null if onnxruntime is not installed.

    Raises:
      ValueError: a size is below one pixel, or is given for features; the directory holds a run, a
        classifier or a detector; there can be no detector, for the reasons of `Model.detector`; or
        there can be no ONNX, for the reasons of `export_onnx`. Then nothing is written.
      ArchiveError: the directory holds a damaged export, or the fitted scores of the model are
        damaged or of another encoder.
    """
    if model.num_features and (height is not None or width is not None):
        raise ValueError(
            "this model serves features, which have no height and width: leave them out"
        )
    trained = model.square_size or model.image_size
    height = trained if height is None else operator.index(height)
    width = trained if width is None else operator.index(width)
    if min(height, width) < 1 and not model.num_features:
        raise ValueError(f"images of {height} x {width} pixels cannot be served")
    takes: dict[str, Any] = {"images": ["b", height, width, model.num_channels]}
    if model.settings.data.dtype != "uint8":
        takes["dtype"] = "float32"  # in [0, 1]
    if model.num_features:
        takes = {"features": ["b", model.num_features]}
    target = files.to_path(directory)
    archive.check_free(target, kind="export")
    detector = None if false_alarm_rate is None else model.detector(false_alarm_rate)
    manifest: dict[str, Any] = {
        "serving": {
            "file": SERVED,
            **takes,
            "platforms": list(PLATFORMS),
        },
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax")},
    }
    written = {SERVED: export_serving(model, height=height, width=width)}
    if detector is not None:
        manifest["serving_detector"] = {
            **manifest["serving"],
            "file": SERVED_DETECTOR,
            "score": detector.score_name,
            "false_alarm_rate": detector.false_alarm_rate,
            "threshold": detector.threshold,
        }
        written[SERVED_DETECTOR] = export_serving(
            model, height=height, width=width, detector=detector
        )
    for file, entry, of in ((ONNX, "", None), (ONNX_DETECTOR, "_detector", detector)):
        if onnx and (of is not None or not entry):
            content, apart = export_onnx(model, height=height, width=width, detector=of)
            described = {**manifest[f"serving{entry}"], "file": file, "largest_difference": apart}
            del described["platforms"]
            manifest[f"onnx{entry}"], written[file] = described, content
    saved = model.fitted_scores
    if saved is not None:
        default = score_table.default_score(model.settings)
        manifest[fitted_scores.ENTRY], content = fitted_scores.to_files(saved.only(default))
        written[fitted_scores.IN_EXPORT] = content
    write_model(model, target, manifest=manifest, extra_files=written)
    optional = {SERVED_DETECTOR, ONNX, ONNX_DETECTOR, fitted_scores.IN_EXPORT}
    for name in optional - written.keys():
        (target / name).unlink(missing_ok=True)  # of an older export with other weights


def read_serving(directory: str | Path, name: str = SERVED) -> jax.export.Exported:
    """Reads the serving form and checks its hash. Use it by `.call(images)`.

    Args:
      directory: directory of an export.
      name: `SERVED`, or `SERVED_DETECTOR` for the function that also detects.

    Raises:
      ArchiveError: a file is missing or not what was written.
    """
    source = files.to_path(directory)
    content = archive.read_file(source, archive.read_manifest(source), name)
    return jax.export.deserialize(bytearray(content))


def read_onnx(directory: str | Path, name: str = ONNX) -> bytes:
    """Reads the ONNX form and checks its hash, for `onnxruntime.InferenceSession`.

    Args:
      directory: directory of an export.
      name: `ONNX`, or `ONNX_DETECTOR` for the function that also detects.

    Raises:
      ArchiveError: a file is missing or not what was written.
    """
    source = files.to_path(directory)
    return archive.read_file(source, archive.read_manifest(source), name)


def _scores_said(model: Model, directory: str) -> str:
    """That and why the default score is not in an export, in words."""
    saved = archive.read_manifest(files.to_path(directory)).get(fitted_scores.ENTRY)
    reason = fitted_scores.why_no_default(model.settings, saved)
    if not reason:
        return ""
    return (
        f"\nwithout the default score, {score_table.default_score(model.settings)}: {reason}. "
        "`ood_score` and `detector` must fit it to images"
    )


def _onnx_said(directory: str) -> str:
    """How the ONNX files of an export were checked, in words."""
    manifest = archive.read_manifest(files.to_path(directory))
    entries = [manifest[name] for name in ("onnx", "onnx_detector") if name in manifest]
    lines = [
        f"\n{entry['file']} was not checked: onnxruntime is not installed"
        if entry["largest_difference"] is None
        else f"\n{entry['file']} in onnxruntime differs from JAX by at most "
        f"{entry['largest_difference']:.1e} of an output's largest value"
        for entry in entries
    ]
    return "".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit status."""
    parser = argparse.ArgumentParser(prog="jevb-export", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--workdir", required=True, help="directory of a run of train.py")
    parser.add_argument("--out", help="directory of the export; with --push it may be left out")
    parser.add_argument("--step", help='step of a checkpoint, or "best"; the latest by default')
    parser.add_argument("--height", type=int, help="of served images, in pixels; as trained")
    parser.add_argument("--width", type=int, help="of served images, in pixels; as trained")
    parser.add_argument(
        "--false_alarm_rate",
        type=float,
        help="in (0, 1): also serve score and verdict of each image, at this rate",
    )
    hub_push.add_flags(parser)
    parser.add_argument("--onnx", action="store_true", help="also write what is served as ONNX")
    arguments = parser.parse_args(argv)
    if arguments.out is None and arguments.push is None:
        parser.error("give --out, a directory for the export, or --push, a repository of the Hub")
    step: Any = arguments.step
    if step is not None and step != "best":
        if not step.isdecimal():
            parser.error(f'--step must be a number or "best", got {step!r}')
        step = int(step)

    def work() -> str:
        pushed = hub_push.target(arguments)
        model = load(arguments.workdir, step)
        if pushed is None:
            write(model, arguments.out)
            said = _scores_said(model, arguments.out) + _onnx_said(arguments.out)
            return f"{model} written to {arguments.out}{said}"
        with tempfile.TemporaryDirectory() as temporary:
            directory = arguments.out or temporary
            write(model, directory)
            told = hub_push.push(directory, pushed, model, arguments)
            return told + _scores_said(model, directory)

    def write(model: Model, directory: str) -> None:
        export_model(
            model,
            directory,
            height=arguments.height,
            width=arguments.width,
            false_alarm_rate=arguments.false_alarm_rate,
            onnx=arguments.onnx,
        )

    return small_programs.run(work, "Exporting")


if __name__ == "__main__":
    sys.exit(main())
