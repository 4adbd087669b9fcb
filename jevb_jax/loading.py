"""Loads a model of a run or an export, or a detector, from a directory.

An export needs no libraries for training. Every bit of the weights is checked against what was
saved.
"""

import functools
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, SupportsIndex

import jax
import numpy as np
from safetensors import numpy as safetensors

from jevb_jax import arguments, model_names
from jevb_jax.detector import DETECTOR, Detector
from jevb_jax.evaluation import fitted_scores, score_json
from jevb_jax.images import data_record
from jevb_jax.model import Model
from jevb_jax.runs import archive, files
from jevb_jax.runs.archive import ArchiveError
from jevb_jax.runs.array_names import differences, flatten_names, unflatten_names
from jevb_jax.settings import read
from jevb_jax.settings.config_versions import completed_config, saved_config
from jevb_jax.settings.sections import RunSettings
from jevb_jax.training import from_settings
from jevb_jax.xla_options import in_single_precision, keep_compiled_programs

_logger = logging.getLogger(__name__)


@in_single_precision
def load(
    path: str | os.PathLike[str],
    step: SupportsIndex | Literal["best"] | None = None,
    *,
    batch_size: int | None = None,
) -> Model:
    """Loads a model from a run directory, a directory of `jevb_jax.export`, by name or from the Hub.

    Loading is strict: of the parameters and statistics, no array may be missing or left over, shapes
    and types must fit the config, and the bits must be those that were saved. The other parts of a
    checkpoint, such as the state of the optimizer, are not read. If a run has averaged parameters
    (`train.ema_decay`), these are loaded, as in evaluation. The data of the run are not read. Fitted
    scores that were saved with these weights are read when the first of them is needed. From
    this call on, the process keeps its compiled programs for later processes
    (`xla_options.keep_compiled_programs`).

    Args:
      path: a local directory or one in an object store; the name of a published encoder
        (`model_names.names()`); or a repository of the Hugging Face Hub, `hf://org/name` or
        `hf://org/name@revision`, which is downloaded into the cache of huggingface_hub.
      step: only for a run: the step of a checkpoint; "best", by validation k-NN, for a run with
        `checkpoint.keep_best`; or None for the latest undamaged checkpoint.
      batch_size: number of images at once, by default `evaluation.batch_size` of the config.

    Raises:
      FileNotFoundError: the directory holds neither a run nor an export.
      CheckpointError: the checkpoint does not exist, is damaged, or does not fit (all arrays that
        differ are named).
      ArchiveError: the export is damaged or does not fit.
      HubError: the Hub did not give the repository.
      ValueError: `step` is given for an export, or the config is of another version.
      TypeError: `step` is no whole number; a float such as 6.0 is none.
    """
    keep_compiled_programs()
    directory = model_names.directory_of(path)
    if archive.is_archive(directory):
        if step is not None:
            raise ValueError(f"{directory} is an export, which holds one step; leave out step")
        finetuned = archive.read_manifest(directory).get("finetuned")
        if finetuned is not None and not finetuned["init"]["frozen"]:
            _logger.warning(
                "%s holds an encoder whose weights were all fine-tuned. `represent` uses the tuned "
                "encoder. `embed`, `posterior` and their scores use a projector and a head that "
                "belong to the encoder as it was before.",
                directory,
            )
        return load_archive(directory, batch_size)
    if not (directory / "config.json").exists():
        raise FileNotFoundError(
            f"{directory} holds neither config.json (a run of train.py) nor {archive.MANIFEST} (an "
            f"export of jevb_jax.export), and is none of the encoders {model_names.names()}"
        )
    return _load_run(directory, step, batch_size)


def _saved_settings(config: Mapping[str, Any], where: Path) -> RunSettings:
    """Typed settings of a config. An error says if this version cannot build the networks."""
    try:
        settings = read.saved_settings(config)
        from_settings.make_network(settings)
        from_settings.shape_of_view(settings)
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"the config of {where} is of another version of jevb_jax: {error}"
        ) from error
    return settings


@in_single_precision
def variable_shapes(settings: RunSettings) -> Any:
    """Shapes and types of the parameters and running statistics of a run's networks."""
    network = from_settings.make_network(settings)
    image = jax.ShapeDtypeStruct((2, *from_settings.shape_of_view(settings)), np.float32)
    return jax.eval_shape(
        lambda key, images: network.init(key, images, train=True), jax.random.key(0), image
    )


def load_archive(directory: Path, batch_size: int | None = None) -> Model:
    """Loads the model of an archive: of an export, a detector, or a fine-tuned encoder.

    If all weights of the encoder were fine-tuned, only `represent` is meaningful.

    Args:
      directory: a path from `files.to_path`.
      batch_size: as for `load`.

    Raises:
      ArchiveError: the archive is damaged, holds no encoder, or does not fit its config.
    """
    manifest = archive.read_manifest(directory)
    if archive.WRAPPED in manifest:
        raise ArchiveError(
            f"{directory} holds a detector for an encoder that is not ours: read it with "
            "jevb_jax.wrap(features_fn).load_detector(directory)"
        )
    config = completed_config(manifest["config"])
    wanted = variable_shapes(_saved_settings(config, directory))
    arrays = archive.read_arrays(directory, manifest)
    problems = differences(arrays, flatten_names(wanted), where="export")
    if problems:
        raise ArchiveError(f"{directory} does not fit its config:\n" + "\n".join(problems))
    return Model(
        config,
        unflatten_names(arrays, wanted),
        step=manifest["step"],
        batch_size=batch_size,
        square_size=_saved_square_size(manifest),
        recorded_data=manifest.get("recorded_data"),  # older exports have none
        read_fitted=functools.partial(fitted_scores.of_export, directory),
    )


def _saved_square_size(manifest: Mapping[str, Any]) -> int:
    """`square_size` of the images that the weights were last trained on."""
    if "square_size" in manifest:
        return manifest["square_size"]
    # Older archives lack it. A fine-tuned encoder was last trained on the images of its own data.
    return manifest.get("finetuned", manifest["config"])["data"]["image_size"]


@in_single_precision
def load_detector(directory: str | os.PathLike[str], *, batch_size: int | None = None) -> Detector:
    """Loads a detector that `Detector.save` wrote, as strictly as `load`.

    Scores and verdicts are the same, except for rounding.

    Args:
      directory: a local directory, one in an object store, or a repository as for `load`.
      batch_size: number of images at once, by default `evaluation.batch_size` of the config.

    Raises:
      FileNotFoundError: nothing was saved there.
      ArchiveError: there is no detector, or it is damaged or of another version.
    """
    keep_compiled_programs()
    path = model_names.directory_of(directory)
    if not archive.is_archive(path):
        raise FileNotFoundError(f"{path} holds no {archive.MANIFEST}; Detector.save writes it")
    manifest = archive.read_manifest(path)
    if "detector" not in manifest:
        raise ArchiveError(f"{path} holds a model without a detector; Detector.save writes one")
    saved = manifest["detector"]
    arrays = safetensors.load(archive.read_file(path, manifest, DETECTOR))
    model = load_archive(path, batch_size)
    if saved["score"] not in model.score_names():
        raise ArchiveError(
            f"the detector in {path} is not one of this version: no score {saved['score']!r}"
        )
    try:
        threshold = float(arrays.pop("threshold"))
        scorer = score_json.rebuild(saved["scorer"], arrays)
        return Detector(model, scorer, saved["score"], saved["false_alarm_rate"], threshold)
    except (KeyError, score_json.SavedScoreError) as error:
        raise ArchiveError(f"the detector in {path} is not one of this version: {error}") from error


def _load_run(directory: Path, step: Any, batch_size: int | None) -> Model:
    from jevb_jax.runs.checkpoints import Checkpointer, CheckpointError  # an export needs no Orbax

    if step is not None and not isinstance(step, str):
        step = arguments.whole_number("step", step)
    config_path = directory / "config.json"
    config = saved_config(files.read_json(config_path), config_path)
    settings = _saved_settings(config, directory)
    if not (directory / "checkpoints").exists():
        raise CheckpointError(f"{directory} holds no checkpoint; train first")
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    shapes = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        variable_shapes(settings),
    )
    # Only what evaluates: the state of the optimizer is neither read nor needs to be known. So an
    # Optax that names its parts in another way does not make old runs unloadable.
    evaluated = "ema_params" if settings.train.ema_decay > 0 else "params"
    template = {evaluated: shapes["params"], "batch_stats": shapes["batch_stats"]}
    checkpointer = Checkpointer(directory / "checkpoints", keep_best=settings.checkpoint.keep_best)
    try:
        steps = checkpointer.steps()
        if step == "best":
            best = checkpointer.best_step()
            if best is None:
                raise CheckpointError(
                    f"{directory} has no best checkpoint; train with checkpoint.keep_best above 0, or "
                    f"give one of the steps {steps}"
                )
            step = best
        if step is None:
            restored = checkpointer.restore_latest(template, is_whole=False)
            if restored is None:
                raise CheckpointError(f"{directory} holds no checkpoint; train first")
            found, state = restored
        elif step in steps:
            found, state = step, checkpointer.restore(step, template, is_whole=False)
        else:
            raise CheckpointError(
                f'step must be one of {steps}, the checkpoints in {directory}, or "best"; got {step!r}'
            )
    finally:
        checkpointer.close()
    return Model(
        config,
        {"params": state[evaluated], "batch_stats": state["batch_stats"]},
        step=found,
        batch_size=batch_size,
        recorded_data=data_record.read(directory),
        read_fitted=functools.partial(fitted_scores.of_run, directory, found),
    )
