"""Supervised fine-tuning of a trained encoder: cross-entropy of a linear classifier, full or frozen.

The steps are taken by the loop of `training`, in the subdirectory `training` of `workdir`. Validation
accuracy chooses the epoch, before any update included. The test images are read once, at the end.
"""

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from rich.console import Console
from safetensors import numpy as safetensors

from jevb_jax import loading, messages, model_names, parallel
from jevb_jax.detector import write_model
from jevb_jax.images import batch_order, data_record, workers
from jevb_jax.images import source as source_module
from jevb_jax.images.augmentations import ViewAugmentation
from jevb_jax.images.batches import evaluation_batches, load_resident
from jevb_jax.images.dataset import Dataset, load_dataset
from jevb_jax.images.levels import dtype_of
from jevb_jax.images.source import ArraySource, ImageSource
from jevb_jax.model import Images, Model
from jevb_jax.parallel import StoppedError
from jevb_jax.runs import archive, files, metrics_writers
from jevb_jax.runs.archive import ArchiveError
from jevb_jax.runs.checkpoints import (
    CheckpointAccessError,
    Checkpointer,
    CheckpointError,
    fingerprint,
    saved_steps,
)
from jevb_jax.runs.metrics_log import standard_output, unbroken
from jevb_jax.runs.provenance import environment
from jevb_jax.runs.waiting import Waiting
from jevb_jax.settings import read
from jevb_jax.settings.sections import FinetuneSettings, InputSection
from jevb_jax.training import classification
from jevb_jax.training.classification import BestEpoch
from jevb_jax.training.experiment import make_optimizer, make_schedule
from jevb_jax.training.loop import RunLoop
from jevb_jax.training.plan import Plan, is_resident
from jevb_jax.training.resume import check_finetune_config
from jevb_jax.training.step import TrainState
from jevb_jax.xla_options import in_single_precision, keep_compiled_programs

CLASSIFIER = "classifier.safetensors"
RESULTS = "results.json"
TRAINING = "training"  # where the loop works
_ENCODER = "encoder.json"


class Classifier:
    """A fine-tuned encoder and its classifier, of `load_classifier`.

    Images are prepared as those of the fine-tuning, by the size to which its `data.image_size` had them
    read: see `Model`. Classifiers can be pickled.

    Attributes:
      model: the encoder. Where it was tuned whole, only `represent` has a meaning: projector and head
        belong to the encoder as it was before.
      arrays: `feature_mean` and `feature_std` `[F]`, `kernel` `[F, C]`, `bias` `[C]`.
    """

    def __init__(self, encoder: Model, arrays: Mapping[str, np.ndarray]):
        """Takes the arrays `feature_mean`, `feature_std`, `kernel` and `bias`.

        Raises:
          ValueError: other arrays, or shapes that do not fit each other.
        """
        shapes = {name: np.shape(array) for name, array in arrays.items()}
        if set(shapes) != {"feature_mean", "feature_std", "kernel", "bias"}:
            raise ValueError(
                "a classifier holds feature_mean, feature_std, kernel and bias, got "
                f"{sorted(shapes)}"
            )
        features, classes = shapes["feature_mean"], shapes["bias"]
        if shapes["feature_std"] != features or shapes["kernel"] != features + classes:
            raise ValueError(f"the arrays of a classifier do not fit each other: {shapes}")
        self.model = encoder
        self.arrays = arrays

    @in_single_precision
    def logits(self, images: Images) -> np.ndarray:
        """Class logits.

        Returns:
          `[N, C]`, or `[C]` of one image.
        """
        standardized = self.model.represent(images) - self.arrays["feature_mean"]
        standardized = standardized / self.arrays["feature_std"]
        return standardized @ self.arrays["kernel"] + self.arrays["bias"]

    def predict(self, images: Images) -> np.ndarray:
        """Most likely classes, `[N]`, or `[]` of one image."""
        return self.logits(images).argmax(axis=-1)


@in_single_precision
def load_classifier(directory: str | os.PathLike[str]) -> Classifier:
    """Loads what `finetune` wrote.

    Args:
      directory: its `workdir`, or a repository of the Hub as for `load`.

    Returns:
      The classifier.

    Raises:
      ArchiveError: a file is missing or not what was written.
      FileNotFoundError: nothing was written there.
    """
    path = model_names.directory_of(directory)
    if not archive.is_archive(path):
        raise FileNotFoundError(f"{path} holds no {archive.MANIFEST}: finetune.py writes it")
    encoder = loading.load_archive(path)
    content = archive.read_file(path, archive.read_manifest(path), CLASSIFIER)
    try:
        return Classifier(encoder, safetensors.load(content))
    except ValueError as error:
        raise ArchiveError(f"{path / CLASSIFIER}: {error}") from error


@in_single_precision
def finetune(
    config: dict[str, Any], workdir: str | os.PathLike[str], *, console: Console | None = None
) -> dict[str, Any]:
    """Fine-tunes the encoder of `config["init"]`; writes results, the classifier and the encoder.

    These files are written together at the end. Until then `workdir/training` holds the log and the
    checkpoints. After a kill, the same call continues from them, bit for bit.

    Args:
      config: plain values, see `configs/finetune_default.py`.
      workdir: made if it does not exist; must not hold results yet.
      console: where people read; standard output by default.

    Returns:
      The results, as written: accuracies and the sentence that says how they were made.

    Raises:
      ValueError: unlabeled data, settings that do not fit each other, results that exist.
      ChangedConfigError: a fine-tune with other settings was begun there.
      ChangedDataError: the data are not those that it began with.
      CheckpointError: the fine-tune cannot be continued, because a checkpoint or the log is damaged.
      FileNotFoundError: no encoder there.
      NonFiniteError: the loss or its gradient is NaN or infinite; the evidence is set aside.
      OSError: the directory cannot be written.
      DirectoryInUseError: another process works on it.
      StoppedError: a signal ended it after a save.
    """
    workers.check_not_starting()
    keep_compiled_programs()
    console = console or standard_output()
    path = files.to_path(workdir)
    if os.path.isfile(path):
        raise NotADirectoryError(f"--workdir must be a directory, and {path} is a file")
    config = read.plain(config)
    settings = read.finetune_settings(config)
    _check_new(path)
    if jax.process_count() > 1:
        raise ValueError(f"fine-tuning runs in one process, got {jax.process_count()}")
    if settings.input.accept_changed_data:
        raise ValueError(
            "input.accept_changed_data is for train.py: a fine-tune chooses its epoch among accuracies "
            "on the same images. Leave it out, and give another --workdir for other data"
        )
    metrics_writers.check(settings.train.writers, path)
    mesh = parallel.make_mesh()
    parallel.check_divisible(settings.train.batch_size, 1, mesh)
    with Waiting(console, "Reading the encoder and the data"):
        encoder = _load_encoder(settings, path / TRAINING)
        dataset = load_dataset(**vars(settings.data))
    for part in dataset[:3]:
        if part is not None:
            _labels(part)
    path.mkdir(parents=True, exist_ok=True)  # what cannot be written is known before the training
    # Who reads the lines may leave before the end: the work goes on.
    with files.lock_directory(path) as check_held, unbroken(console):
        _check_new(path)  # again: another process may have just ended there
        directory = path / TRAINING
        directory.mkdir(exist_ok=True)
        check_finetune_config(
            directory,
            config,
            lambda: _check_data_and_encoder(directory, settings, dataset, encoder),
        )
        files.write_json_atomically(directory / "environment.json", environment())
        with parallel.StopRequest() as stop:
            if not stop.is_heeding:
                console.print(
                    "This is not the main thread: SIGTERM and Ctrl-C will not save the state of the "
                    "fine-tune. After them, the same command continues from the last checkpoint."
                )
            trained = _train(settings, encoder, dataset, directory, console, mesh, stop, check_held)
            try:
                with stop.interrupting(), Waiting(console, "Testing"):
                    results = _results(settings, dataset, trained)
            except StoppedError as error:
                raise StoppedError(
                    f"{stop.signal_name}: {path} is trained to the end, not yet tested; the same "
                    "command goes on from there"
                ) from error
            check_held()
            write_model(  # a signal waits for its end
                trained.classifier.model,
                path,
                manifest={"finetuned": config},
                extra_files={
                    CLASSIFIER: safetensors.save(dict(trained.classifier.arrays)),
                    RESULTS: files.indented_json(results).encode(),
                },
            )
        _discard_checkpoints(directory)
        for part in ("validation", "test"):
            if f"{part}_accuracy" in results:
                console.print(f"{part} accuracy {results[f'{part}_accuracy']:.4f}")
        messages.say(console, f"Files: {path}")
    return results


def _load_encoder(settings: FinetuneSettings, directory: Path) -> Model:
    """The encoder to tune; by default, a begun fine-tune takes the step that it began with."""
    init = settings.init
    step = None if init.step < 0 else init.step
    is_begun = bool(saved_steps(directory / "checkpoints"))
    if step is None and is_begun and not archive.is_archive(model_names.directory_of(init.workdir)):
        step = files.read_json(directory / _ENCODER)["step"]
    encoder = loading.load(init.workdir, step, batch_size=settings.evaluation.batch_size)
    if encoder.num_features:
        raise ValueError(
            f"init.workdir = {init.workdir} holds a network of features of a frozen encoder, so there "
            "is no encoder to tune here; the evaluation of the run has linear probes on the features"
        )
    for name in ("exif", "dtype", "value_range"):
        asked, trained = getattr(settings.data, name), getattr(encoder.settings.data, name)
        if asked != trained:
            raise ValueError(
                f"data.{name} = {asked!r}, but the encoder was trained with {trained!r}, and a "
                "classifier reads images as its encoder does: set it to the same"
            )
    return encoder.with_square_size(settings.data.image_size)


def _check_new(path: Path) -> None:
    names = [RESULTS, archive.MANIFEST, "config.json", archive.WEIGHTS, CLASSIFIER]
    if (path / TRAINING / "config.json").exists() and not archive.is_archive(path):
        names = ["config.json"]  # the others were left by a kill: the manifest comes last
    for name in names:
        if (path / name).exists():
            raise ValueError(f"{path} holds {name} already: give another --workdir")


def _discard_checkpoints(directory: Path) -> None:
    """Deletes the checkpoints of a fine-tune that has ended: it cannot be continued."""
    checkpointer = Checkpointer(directory / "checkpoints")
    checkpointer.discard_after(-1)
    checkpointer.close()


def _labels(source: ImageSource) -> np.ndarray:
    if source.labels is None:
        raise ValueError(f"fine-tuning needs labels, and {source.name} has none")
    return source.labels


def _check_data_and_encoder(
    directory: Path, settings: FinetuneSettings, dataset: Dataset, encoder: Model
) -> None:
    """Refuses to continue with other data, or another encoder, than the fine-tune began with."""
    data_record.check_training(directory, dataset, accept_change=None)
    seen = encoder.settings.augmentation
    found = {
        "step": encoder.step,
        "sha256": files.json_sha256(
            [encoder.image_size, list(seen.mean), list(seen.std), fingerprint(encoder.variables)]
        ),
    }
    path = directory / _ENCODER
    if saved_steps(directory / "checkpoints"):
        recorded = files.read_json(path)
        if recorded != found:
            raise ValueError(
                f"{settings.init.workdir} now holds another encoder, of step {found['step']}, than "
                f"the fine-tune in {directory} began with, of step {recorded['step']}: give another "
                "--workdir to start anew"
            )
    files.write_json_atomically(path, found)


def _held(source: ImageSource, section: InputSection) -> ImageSource:
    """The source with its images in memory, unless they are to be streamed."""
    if not is_resident(source, section):
        return source
    images = load_resident(source)
    return ArraySource(images, source.labels, source.class_names, source.name, dtype_of(images))


def _of_images(
    function: Callable[[np.ndarray], np.ndarray], source: ImageSource, batch_size: int
) -> np.ndarray:
    """A function of every image, a batch at a time."""
    found = evaluation_batches(source, min(batch_size, len(source)))
    return np.concatenate([function(images)[mask] for images, mask in found])


def _classifier(encoder: Model, state: TrainState) -> Classifier:
    """The classifier of a state, with the encoder of that state."""
    state = parallel.on_local_device(state._replace(opt_state=None))
    tuned, statistics = state.params, state.batch_stats
    variables = dict(encoder.variables)
    if tuned.backbone is not None:
        variables["params"] = {**variables["params"], "backbone": tuned.backbone}
        variables["batch_stats"] = {**variables["batch_stats"], "backbone": statistics["backbone"]}
    arrays = {
        "feature_mean": statistics["feature_mean"],
        "feature_std": statistics["feature_std"],
        "kernel": tuned.kernel,
        "bias": tuned.bias,
    }
    return Classifier(encoder.with_variables(variables), jax.device_get(arrays))


def _accuracy(classifier: Classifier, source: ImageSource, batch_size: int) -> float:
    predicted = _of_images(classifier.predict, source, batch_size)
    return float(np.mean(predicted == _labels(source)))


class _Trained(NamedTuple):
    """What training gave.

    Attributes:
      classifier: as it was at the epoch with the best validation accuracy.
      accuracies: validation accuracies by epoch; the first is from before any update.
    """

    classifier: Classifier
    accuracies: list[float]


def _train(
    settings: FinetuneSettings,
    encoder: Model,
    dataset: Dataset,
    directory: Path,
    console: Console,
    mesh: Mesh,
    stop: parallel.StopRequest,
    check_held: Callable[[], None],
) -> _Trained:
    """Trains to the end, from the latest checkpoint in the directory where there is one."""
    train, validation_images = (_held(part, settings.input) for part in dataset[:2])
    size = settings.evaluation.batch_size
    steps_per_epoch = batch_order.steps_per_epoch(len(train), settings.train.batch_size)
    num_steps = settings.train.num_epochs * steps_per_epoch
    schedule = make_schedule(
        settings.optimizer, steps_per_epoch=steps_per_epoch, num_steps=num_steps
    )
    optimizer = make_optimizer(settings.optimizer, schedule)
    # ViT has no BatchNorm, and so no statistics.
    backbone = {kind: part.get("backbone", {}) for kind, part in encoder.variables.items()}
    view = ViewAugmentation(
        size=encoder.image_size,
        mean=encoder.settings.augmentation.mean,
        std=encoder.settings.augmentation.std,
        jitter_probability=0.0,
        grayscale_probability=0.0,
        **vars(settings.augmentation),
    )

    def features() -> np.ndarray:
        """Of all training images; of one, where a checkpoint replaces all that is made of them."""
        if saved_steps(directory / "checkpoints"):
            return encoder.represent(train[0][None])
        return _of_images(encoder.represent, train, size)

    validation = BestEpoch(
        lambda state: _accuracy(_classifier(encoder, state), validation_images, size),
        steps_per_epoch=steps_per_epoch,
        num_epochs=settings.train.num_epochs,
    )
    plan = Plan(
        config=read.plain(dataclasses.asdict(settings)),
        seed=settings.seed,
        source=train,
        labels=_labels(train),
        input=settings.input,
        batch_size=settings.train.batch_size,
        num_steps=num_steps,
        schedule=schedule,
        initial_state=lambda: classification.initial_state(
            features(),
            num_classes=source_module.num_classes(train),
            tuned_backbone=None if settings.init.frozen else backbone,
            optimizer=optimizer,
        ),
        train_step=functools.partial(
            classification.train_step,
            network=encoder.network.backbone,
            frozen_backbone=backbone if settings.init.frozen else None,
            view=view,
            optimizer=optimizer,
        ),
        log_every_steps=settings.train.log_every_steps,
        save_every_steps=settings.checkpoint.every_epochs * steps_per_epoch,
        keep_latest=settings.checkpoint.keep_latest,
        keep_best=2,  # where the newest checkpoint is damaged, the best one before it is still there
        steps_per_dispatch=settings.train.steps_per_dispatch,
        saves_start=True,
        measurements=[validation],
        score=validation.score,
        score_name="validation/best_accuracy",
        writers=settings.train.writers,
    )
    loop = RunLoop(plan, directory, console, mesh, stop, check_held)
    try:
        with Waiting(console, "Preparing the first state"):
            state = loop.restore()
        _check_resumed(validation, int(state.step), loop.checkpointer.steps(), directory)
        if int(state.step) < num_steps:
            state = loop.train(state)
        if int(state.step) < num_steps:
            raise StoppedError(
                f"{stop.signal_name}: saved step {int(state.step)} of {num_steps} in {directory}; "
                "the same command goes on from there"
            )
        loop.checkpointer.wait()
        try:
            best = loop.checkpointer.restore(validation.best_step, state)
        except CheckpointAccessError:
            raise
        except CheckpointError as error:
            raise CheckpointError(
                f"the best epoch of the fine-tune is lost: {error}. Remove {directory} to start anew"
            ) from error
    finally:
        loop.close()
    accuracies = [validation.accuracies[step] for step in sorted(validation.accuracies)]
    return _Trained(_classifier(encoder, best), accuracies)


def _check_resumed(validation: BestEpoch, step: int, saved: Sequence[int], directory: Path) -> None:
    """Refuses to go on where an accuracy or the best epoch's checkpoint was lost.

    Raises:
      CheckpointError: one of them was.
    """
    epochs = range(0, step + 1, validation.every_steps)
    lost = [number for number in epochs if number not in validation.accuracies]
    if lost or validation.best_step not in saved:
        what = (
            f"metrics.jsonl lacks the accuracy after step {lost[0]}"
            if lost
            else f"the checkpoint of the best epoch, step {validation.best_step}, is lost"
        )
        raise CheckpointError(
            f"the fine-tune in {directory} cannot be continued: {what}. Remove {directory} to "
            "start anew"
        )


def _results(settings: FinetuneSettings, dataset: Dataset, trained: _Trained) -> dict[str, Any]:
    accuracies = trained.accuracies
    best = int(np.argmax(accuracies))
    results: dict[str, Any] = {
        "validation_accuracy": accuracies[best],
        "epoch": best,
        "validation_accuracies": accuracies,
    }
    sentence = (
        f"{'linear classifier on the frozen' if settings.init.frozen else 'fine-tuned'} encoder "
        f"of {settings.init.workdir}, {len(dataset.train):,} labeled images of "
        f"{dataset.train.name}, epoch {best} of {settings.train.num_epochs} chosen on "
        f"{len(dataset.validation):,} validation images"
    )
    if dataset.test is not None:
        results["test_accuracy"] = _accuracy(
            trained.classifier, dataset.test, settings.evaluation.batch_size
        )
        sentence += f"; test images read once ({len(dataset.test):,})"
    return {**results, "protocol": sentence}
