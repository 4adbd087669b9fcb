"""Loads what a directory holds: a model of a run or of an export, a detector.

An export needs none of the libraries of training. Weights are checked against what was saved, bit by
bit.
"""

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, SupportsIndex

import jax
import numpy as np
from safetensors import numpy as safetensors

from jevb_jax.detector import DETECTOR, Detector
from jevb_jax.evaluation import saved_scores
from jevb_jax.images import data_record
from jevb_jax.model import Model, whole_number
from jevb_jax.runs import archive, files
from jevb_jax.runs.archive import ArchiveError
from jevb_jax.runs.array_names import differences, flatten_names, unflatten_names
from jevb_jax.settings import read
from jevb_jax.settings.saved_config import completed_config, saved_config
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
    """Loads a model from a run directory or from a directory of `jevb_jax.export`.

    Strict: every array must be there, none may be left over, shapes and types must fit the config, and
    the bits must be those that were saved. Of a run with averaged parameters (`train.ema_decay`), the
    average is loaded, as in evaluation. The data of the run are not read. From here on, the process
    keeps what it compiles (`xla_options.keep_compiled_programs`).

    Args:
      path: directory, here or in an object store.
      step: of a run: a checkpoint's step, "best" (by validation k-NN, of a run with
        `checkpoint.keep_best`), or None for the latest that is whole.
      batch_size: images at a time; the config's `evaluation.batch_size` by default.

    Returns:
      The model.

    Raises:
      FileNotFoundError: neither a run nor an export.
      CheckpointError: no such checkpoint, or one that does not fit (all arrays are named) or is damaged.
      ArchiveError: an export that is damaged or does not fit.
      ValueError: `step` of an export; a config of another version.
    """
    keep_compiled_programs()
    directory = files.to_path(path)
    if archive.is_archive(directory):
        if step is not None:
            raise ValueError(f"{directory} is an export, which holds one step: leave out step")
        finetuned = archive.read_manifest(directory).get("finetuned")
        if finetuned is not None and not finetuned["init"]["frozen"]:
            _logger.warning(
                "%s holds an encoder that was fine-tuned whole. `represent` is of the tuned encoder; "
                "`embed`, `posterior` and scores of them use a projector and a head that belong to the "
                "encoder as it was before.",
                directory,
            )
        return load_archive(directory, batch_size)
    if not (directory / "config.json").exists():
        raise FileNotFoundError(
            f"{directory} holds neither config.json (a run of train.py) nor {archive.MANIFEST} (an "
            "export of jevb_jax.export)"
        )
    return _load_run(directory, step, batch_size)


def _saved_settings(config: Mapping[str, Any], where: Path) -> RunSettings:
    """Settings of a config, refused if this version cannot build networks and views from them."""
    try:
        settings = read.saved_settings(config)
        from_settings.make_network(settings)
        from_settings.view_augmentations(settings.augmentation)
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"the config of {where} is of another version of jevb_jax: {error}"
        ) from error
    return settings


@in_single_precision
def variable_shapes(settings: RunSettings) -> Any:
    """Parameters and running statistics of a run's networks, as shapes and types."""
    network = from_settings.make_network(settings)
    view = from_settings.view_augmentations(settings.augmentation)[0]
    image = jax.ShapeDtypeStruct((2, view.size, view.size, len(view.mean)), np.float32)
    return jax.eval_shape(
        lambda key, images: network.init(key, images, train=True), jax.random.key(0), image
    )


def load_archive(directory: Path, batch_size: int | None = None) -> Model:
    """Loads the model of an archive: an export, a detector's or a fine-tuned encoder.

    Args:
      directory: a path that `files.to_path` made.
      batch_size: see `load`.

    Returns:
      The model. Of an encoder that was tuned whole, only `represent` has a meaning.

    Raises:
      ArchiveError: it is damaged or does not fit its config.
    """
    manifest = archive.read_manifest(directory)
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
        recorded_data=manifest.get("recorded_data"),  # of exports from before it, there is none
    )


def _saved_square_size(manifest: Mapping[str, Any]) -> int:
    """That of the images which the weights were last trained on."""
    if "square_size" in manifest:
        return manifest["square_size"]
    # Before it was written: a fine-tuned encoder has seen the images of its own data.
    return manifest.get("finetuned", manifest["config"])["data"]["image_size"]


@in_single_precision
def load_detector(directory: str | os.PathLike[str], *, batch_size: int | None = None) -> Detector:
    """Loads what `Detector.save` wrote, as strictly as `load`.

    Args:
      directory: here or in an object store.
      batch_size: images at a time; the config's `evaluation.batch_size` by default.

    Returns:
      The detector: the same scores and verdicts, but for rounding.

    Raises:
      FileNotFoundError: nothing was saved there.
      ArchiveError: no detector, one that is damaged, or one of another version.
    """
    keep_compiled_programs()
    path = files.to_path(directory)
    if not archive.is_archive(path):
        raise FileNotFoundError(f"{path} holds no {archive.MANIFEST}: Detector.save writes it")
    manifest = archive.read_manifest(path)
    if "detector" not in manifest:
        raise ArchiveError(f"{path} holds a model without a detector: Detector.save writes one")
    saved = manifest["detector"]
    arrays = safetensors.load(archive.read_file(path, manifest, DETECTOR))
    model = load_archive(path, batch_size)
    if saved["score"] not in model.score_names():
        raise ArchiveError(
            f"the detector in {path} is not one of this version: no score {saved['score']!r}"
        )
    try:
        threshold = float(arrays.pop("threshold"))
        scorer = saved_scores.rebuild(saved["scorer"], arrays)
        return Detector(model, scorer, saved["score"], saved["false_alarm_rate"], threshold)
    except (KeyError, saved_scores.SavedScoreError) as error:
        raise ArchiveError(f"the detector in {path} is not one of this version: {error}") from error


def _load_run(directory: Path, step: Any, batch_size: int | None) -> Model:
    # Orbax and Optax, which an export does without.
    from jevb_jax.runs.checkpoints import Checkpointer, CheckpointError
    from jevb_jax.training.experiment import state_shapes

    if step is not None and not isinstance(step, str):
        step = whole_number("step", step)
    config_path = directory / "config.json"
    config = saved_config(files.read_json(config_path), config_path)
    settings = _saved_settings(config, directory)
    if not (directory / "checkpoints").exists():
        raise CheckpointError(f"{directory} holds no checkpoint: train first")
    view = from_settings.view_augmentations(settings.augmentation)[0]
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    template = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        state_shapes(settings, (view.size, view.size, len(view.mean))),
    )
    checkpointer = Checkpointer(directory / "checkpoints", keep_best=settings.checkpoint.keep_best)
    try:
        steps = checkpointer.steps()
        if step == "best":
            best = checkpointer.best_step()
            if best is None:
                raise CheckpointError(
                    f"{directory} kept no best checkpoint: train with checkpoint.keep_best above 0, or "
                    f"give one of the steps {steps}"
                )
            step = best
        if step is None:
            restored = checkpointer.restore_latest(template)
            if restored is None:
                raise CheckpointError(f"{directory} holds no checkpoint: train first")
            found, state = restored
        elif step in steps:
            found, state = step, checkpointer.restore(step, template)
        else:
            raise CheckpointError(f'{directory} has checkpoints {steps}, not {step!r}; or "best"')
    finally:
        checkpointer.close()
    return Model(
        config,
        state.evaluation_variables,
        step=found,
        batch_size=batch_size,
        recorded_data=data_record.read(directory),
    )
