"""Supervised fine-tuning of a trained encoder: cross-entropy of a linear classifier, full or frozen.

Small on purpose: images on the device, one process, no resuming. Validation accuracy chooses the epoch,
before any update included; the test images are read once, at the end.
"""

import functools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from rich.console import Console
from safetensors import numpy as safetensors

from jevb_jax import loading, messages
from jevb_jax.detector import write_model
from jevb_jax.images import augmentations, batch_order, batches, workers
from jevb_jax.images import source as source_module
from jevb_jax.images.augmentations import ViewAugmentation
from jevb_jax.images.dataset import Dataset, load_dataset
from jevb_jax.images.source import ImageSource
from jevb_jax.model import Images, Model
from jevb_jax.runs import archive, files
from jevb_jax.runs.archive import ArchiveError
from jevb_jax.runs.metrics_log import standard_output, unbroken
from jevb_jax.settings import read
from jevb_jax.settings.sections import FinetuneSettings
from jevb_jax.training import optimizers
from jevb_jax.training.experiment import make_optimizer
from jevb_jax.xla_options import in_single_precision, keep_compiled_programs, network_options

CLASSIFIER = "classifier.safetensors"
RESULTS = "results.json"


class Tuned(NamedTuple):
    """What is learned.

    Attributes:
      kernel: `[F, C]`, of the classifier on standardized representations.
      bias: `[C]`.
      backbone: parameters of the encoder, or None where it is frozen.
    """

    kernel: Array
    bias: Array
    backbone: Any


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

        Args:
          images: see `Model`.

        Returns:
          `[N, C]`, or `[C]` of one image.
        """
        standardised = self.model.represent(images) - self.arrays["feature_mean"]
        standardised = standardised / self.arrays["feature_std"]
        return standardised @ self.arrays["kernel"] + self.arrays["bias"]

    def predict(self, images: Images) -> np.ndarray:
        """Most likely classes, `[N]`, or `[]` of one image."""
        return self.logits(images).argmax(axis=-1)


@in_single_precision
def load_classifier(directory: str | os.PathLike[str]) -> Classifier:
    """Loads what `finetune` wrote.

    Args:
      directory: its `workdir`.

    Returns:
      The classifier.

    Raises:
      ArchiveError: a file is missing or not what was written.
      FileNotFoundError: nothing was written there.
    """
    path = files.to_path(directory)
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

    All files are written together at the end.

    Args:
      config: plain values, see `configs/finetune_default.py`.
      workdir: made if it does not exist; must not hold results yet.
      console: where people read; standard output by default.

    Returns:
      The results, as written: accuracies and the sentence that says how they were made.

    Raises:
      ValueError: unlabeled data, settings that do not fit each other, results that exist.
      FileNotFoundError: no encoder there.
      OSError: the directory cannot be written.
      DirectoryInUseError: another process works on it.
    """
    workers.check_not_starting()
    keep_compiled_programs()
    console = console or standard_output()
    path = files.to_path(workdir)
    config = read.plain(config)
    settings = read.finetune_settings(config)
    _check_new(path)
    if jax.process_count() > 1:
        raise ValueError(f"fine-tuning runs in one process, got {jax.process_count()}")
    init = settings.init
    encoder = loading.load(
        init.workdir,
        None if init.step < 0 else init.step,
        batch_size=settings.evaluation.batch_size,
    ).with_square_size(settings.data.image_size)
    dataset = load_dataset(**vars(settings.data))
    for part in dataset[:3]:  # read once more at the end: refused before the training
        if part is not None and part.labels is None:
            raise ValueError(f"fine-tuning needs labels, and {part.name} has none")
    path.mkdir(parents=True, exist_ok=True)  # what cannot be written is known before the training
    # Who reads the lines may leave before the end; nothing is saved before it, so it goes on.
    with files.lock_directory(path) as check_held, unbroken(console):
        _check_new(path)  # again: another process may have just ended there
        classifier, accuracies = _train(settings, encoder, dataset, console)
        results = _results(settings, dataset, classifier, accuracies)
        check_held()
        write_model(
            classifier.model,
            path,
            manifest={"finetuned": config},
            extra_files={
                CLASSIFIER: safetensors.save(dict(classifier.arrays)),
                RESULTS: files.indented_json(results).encode(),
            },
        )
        for part in ("validation", "test"):
            if f"{part}_accuracy" in results:
                console.print(f"{part} accuracy {results[f'{part}_accuracy']:.4f}")
        messages.say(console, f"Files: {path}")
    return results


def _check_new(path: Path) -> None:
    for name in (RESULTS, archive.MANIFEST, "config.json", archive.WEIGHTS, CLASSIFIER):
        if (path / name).exists():
            raise ValueError(f"{path} holds {name} already: give another --workdir")


def _labelled(source: ImageSource) -> tuple[np.ndarray, np.ndarray]:
    if source.labels is None:
        raise ValueError(f"fine-tuning needs labels, and {source.name} has none")
    return batches.load_resident(source), source.labels


def _results(
    settings: FinetuneSettings,
    dataset: Dataset,
    classifier: Classifier,
    accuracies: list[float],
) -> dict[str, Any]:
    best = int(np.argmax(accuracies))
    results: dict[str, Any] = {
        "validation_accuracy": accuracies[best],
        "epoch": best,
        "validation_accuracies": accuracies,
    }
    sentence = (
        f"{'linear classifier on the frozen' if settings.init.frozen else 'fine-tuned'} encoder "
        f"of {settings.init.workdir}, {len(dataset.train):,} labelled images of "
        f"{dataset.train.name}, epoch {best} of {settings.train.num_epochs} chosen on "
        f"{len(dataset.validation):,} validation images"
    )
    if dataset.test is not None:
        images, labels = _labelled(dataset.test)
        results["test_accuracy"] = float(np.mean(classifier.predict(images) == labels))
        sentence += f"; test images read once ({len(labels):,})"
    return {**results, "protocol": sentence}


def _train(
    settings: FinetuneSettings, encoder: Model, dataset: Dataset, console: Console
) -> tuple[Classifier, list[float]]:
    """The best epoch's encoder and classifier, and validation accuracies by epoch."""
    images, labels = _labelled(dataset.train)
    validation_images, validation_labels = _labelled(dataset.validation)
    train, is_frozen = settings.train, settings.init.frozen
    steps_per_epoch = batch_order.steps_per_epoch(len(images), train.batch_size)
    num_steps = train.num_epochs * steps_per_epoch
    backbone: Any = encoder.network.backbone
    view = ViewAugmentation(
        size=encoder.image_size,
        mean=encoder.settings.augmentation.mean,
        std=encoder.settings.augmentation.std,
        jitter_probability=0.0,
        grayscale_probability=0.0,
        **vars(settings.augmentation),
    )
    # One learning rate then suits every encoder; fixed, so that the classifier stays linear.
    features = encoder.represent(images)
    std = features.std(axis=0)
    constants = {
        "feature_mean": features.mean(axis=0),
        "feature_std": np.where(std > 1e-6 * np.abs(features).max(), std, 1).astype(np.float32),
    }
    schedule = optimizers.make_schedule(
        learning_rate=settings.optimizer.learning_rate,
        warmup_steps=round(settings.optimizer.warmup_epochs * steps_per_epoch),
        num_steps=num_steps,
        final_learning_rate=settings.optimizer.final_learning_rate,
    )
    optimizer = make_optimizer(settings.optimizer, schedule)
    frozen = encoder.variables["params"]["backbone"]
    # ViT has no BatchNorm, and so no statistics.
    batch_stats = encoder.variables["batch_stats"].get("backbone", {})
    num_classes = source_module.num_classes(dataset.train)
    tuned = Tuned(
        jnp.zeros((features.shape[1], num_classes)),
        jnp.zeros(num_classes),
        None if is_frozen else frozen,
    )

    def logits_of(tuned: Tuned, batch_stats: Any, views: Array, *, train: bool) -> Any:
        params = frozen if tuned.backbone is None else tuned.backbone
        variables = {"params": params, "batch_stats": batch_stats}
        if train and not is_frozen:
            found, updates = backbone.apply(variables, views, train=True, mutable=["batch_stats"])
            batch_stats = updates.get("batch_stats", {})
        else:
            found = backbone.apply(variables, views, train=False)
        found = (found - constants["feature_mean"][None]) / constants["feature_std"][None]
        return found @ tuned.kernel + tuned.bias[None], batch_stats

    @functools.partial(jax.jit, compiler_options=network_options())
    def step(tuned: Tuned, batch_stats: Any, state: Any, images: Array, labels: Array, key: Array):
        def loss(tuned: Tuned) -> Any:
            images_in = jnp.broadcast_to(images, (*images.shape[:-1], encoder.num_channels))
            views = augmentations.augment(jax.random.split(key, len(images)), images_in, view)
            logits, updated = logits_of(tuned, batch_stats, views, train=True)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return jnp.mean(losses), updated

        (value, updated), gradients = jax.value_and_grad(loss, has_aux=True)(tuned)
        updates, state = optimizer.update(gradients, state, tuned)
        return optax.apply_updates(tuned, updates), updated, state, value

    def classifier_of(tuned: Tuned, batch_stats: Any) -> Classifier:
        variables = dict(encoder.variables)
        if tuned.backbone is not None:
            variables["params"] = {**variables["params"], "backbone": tuned.backbone}
            variables["batch_stats"] = {**variables["batch_stats"], "backbone": batch_stats}
        learned = {"kernel": np.asarray(tuned.kernel), "bias": np.asarray(tuned.bias)}
        return Classifier(encoder.with_variables(variables), {**constants, **learned})

    def accuracy(tuned: Tuned, batch_stats: Any) -> float:
        predicted = classifier_of(tuned, batch_stats).predict(validation_images)
        return float(np.mean(predicted == validation_labels))

    key = jax.random.key(settings.seed)
    state = optimizer.init(tuned)
    accuracies = [accuracy(tuned, batch_stats)]
    best = tuned, batch_stats
    order = functools.partial(
        batch_order.batch_indices,
        num_examples=len(images),
        batch_size=train.batch_size,
        seed=settings.seed,
    )
    for number in range(num_steps):
        rows = order(number)
        tuned, batch_stats, state, value = step(
            tuned, batch_stats, state, images[rows], labels[rows], jax.random.fold_in(key, number)
        )
        if (number + 1) % steps_per_epoch == 0:
            loss_value = float(value)
            if not np.isfinite(loss_value):
                raise ValueError(
                    f"the loss is {loss_value} at step {number + 1}: lower optimizer.learning_rate"
                )
            accuracies.append(accuracy(tuned, batch_stats))
            if accuracies[-1] > max(accuracies[:-1]):
                best = tuned, batch_stats
            console.print(
                f"epoch {(number + 1) // steps_per_epoch}/{train.num_epochs}  "
                f"loss {loss_value:.4f}  validation accuracy {accuracies[-1]:.4f}"
            )
    return classifier_of(*best), accuracies
