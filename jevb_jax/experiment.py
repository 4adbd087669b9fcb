"""From a config to the objects of a run. Below this, nothing knows a config."""

import dataclasses
import functools
import json
from collections.abc import Callable
from typing import Any

import jax
import optax
from jax import Array
from ml_collections import ConfigDict

from jevb_jax import augmentations, blueprint, data, methods, training
from jevb_jax.blueprint import HEADS
from jevb_jax.evaluation import corruptions
from jevb_jax.networks import JointEmbeddingModel


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What a config means.

    Attributes:
      config: as plain JSON values.
      dataset: train, validation and test sources.
      model: networks.
      optimizer: of `schedule`.
      schedule: learning rate by step.
      view_augmentations: of view 1, view 2 and small crops.
      method: loss of the views' outputs.
      jevb_settings: of the objective, used or not.
      steps_per_epoch: whole batches in the training split.
      num_train_steps: steps of the run.
    """

    config: dict[str, Any]
    dataset: data.Dataset
    model: JointEmbeddingModel
    optimizer: optax.GradientTransformation
    schedule: optax.Schedule
    view_augmentations: tuple[augmentations.ViewAugmentation, ...]
    method: methods.Method
    jevb_settings: methods.JevbSettings
    steps_per_epoch: int
    num_train_steps: int

    @property
    def key(self) -> Array:
        """The run's key."""
        return jax.random.key(self.config["seed"])

    @property
    def view_shape(self) -> tuple[int, int, int]:
        """`(height, width, channels)` of a full view."""
        size = self.view_augmentations[0].size
        return size, size, len(self.view_augmentations[0].mean)

    def initial_state(self) -> training.TrainState:
        """The state before the first step."""
        return training.init_state(
            jax.random.fold_in(self.key, 2**31 - 1),  # no step is ever this one
            self.model,
            self.optimizer,
            self.view_shape,
            ema_decay=self.config["train"]["ema_decay"],
            target_decay=self.config["train"]["target_decay"],
        )

    def train_step(
        self, state: training.TrainState, images: Array, key: Array
    ) -> tuple[training.TrainState, dict[str, Array]]:
        """`training.train_step` with this experiment's networks and settings."""
        return training.train_step(
            state,
            images,
            key,
            model=self.model,
            optimizer=self.optimizer,
            view_augmentations=self.view_augmentations,
            method=self.method,
            num_micro_batches=self.config["train"]["num_micro_batches"],
            bn_group_size=self.config["train"]["bn_group_size"],
            ema_decay=self.config["train"]["ema_decay"],
            target_decay=functools.partial(
                training.target_decay_at,
                target_decay=self.config["train"]["target_decay"],
                num_steps=self.num_train_steps,
            ),
        )


def to_json_values(config: ConfigDict) -> dict[str, Any]:
    """The resolved config as JSON knows it: tuples become lists."""
    return json.loads(json.dumps(config.to_dict()))


def _method(config: dict[str, Any], jevb_settings: methods.JevbSettings) -> methods.Method:
    """The method of a config: a function, given the settings of its own section."""
    functions: dict[str, Callable[..., methods.MethodOutput]] = {
        "jevb": functools.partial(methods.jevb, settings=jevb_settings),
        "simsiam": methods.simsiam,
        "vi_simsiam": methods.vi_simsiam,
        "byol": methods.byol,
        "vicreg": functools.partial(methods.vicreg, **config["vicreg"]),
        "barlow_twins": functools.partial(methods.barlow_twins, **config["barlow_twins"]),
    }
    return functions[config["method"]]


def _check_method(config: dict[str, Any]) -> None:
    name = config["method"]
    if name not in HEADS:
        raise ValueError(f"method must be one of {sorted(HEADS)}, got {name!r}")
    if name != "jevb" and config["augmentation"]["num_small_crops"]:
        raise ValueError(
            f"augmentation.num_small_crops = {config['augmentation']['num_small_crops']} needs "
            f"method jevb: {name} would ignore the small crops; set it to 0"
        )
    target_decay = config["train"]["target_decay"]
    if not 0 <= target_decay < 1:
        raise ValueError(f"train.target_decay must be in [0, 1), got {target_decay}")
    if name == "byol" and not target_decay:
        raise ValueError("method byol needs train.target_decay above 0, for instance 0.99")
    if name in ("vicreg", "barlow_twins") and target_decay:
        raise ValueError(f"{name} has no target network: set train.target_decay to 0")


def _check_batches(batch_size: int, num_micro_batches: int, bn_group_size: int) -> None:
    if batch_size < 2:
        raise ValueError(f"train.batch_size must be at least 2 (BatchNorm), got {batch_size}")
    if num_micro_batches < 1 or batch_size % num_micro_batches:
        raise ValueError(
            f"train.num_micro_batches must divide train.batch_size, got {num_micro_batches} "
            f"and {batch_size}"
        )
    if bn_group_size:
        training.check_bn_group_size(bn_group_size, batch_size // num_micro_batches)


def _check_evaluation(settings: dict[str, Any], *, num_train_images: int) -> None:
    """Refuses before training what the evaluation would refuse after it."""
    if max(settings["knn_k"]) > num_train_images:
        raise ValueError(
            f"evaluation.knn_k = {settings['knn_k']} asks for more neighbours than the "
            f"{num_train_images:,} training images"
        )
    if settings["split"] not in ("test", "validation"):
        raise ValueError(f"evaluation.split must be test or validation, got {settings['split']!r}")


def _check_ood(settings: dict[str, Any]) -> None:
    """Likewise for the section `ood`."""
    unknown = set(settings["corruptions"]) - corruptions.CORRUPTIONS.keys()
    if unknown:
        raise ValueError(
            f"ood.corruptions may hold {sorted(corruptions.CORRUPTIONS)}, got {sorted(unknown)}"
        )
    severities = range(1, corruptions.NUM_SEVERITIES + 1)
    if settings["corruptions"] and not set(settings["severities"]) <= set(severities):
        raise ValueError(f"ood.severities are 1 to 5, got {settings['severities']}")
    for name in ("num_views", "num_samples", "num_bootstrap", "num_corrupted_images"):
        if settings[name] < 1:
            raise ValueError(f"ood.{name} must be at least 1, got {settings[name]}")
    if not 0 < settings["residual_share"] < 1:
        raise ValueError(f"ood.residual_share must be in (0, 1), got {settings['residual_share']}")


def make_optimizer(
    settings: dict[str, Any], schedule: optax.Schedule
) -> optax.GradientTransformation:
    """The optimizer of the section `optimizer` with a schedule; see `training.make_optimizer`."""
    return training.make_optimizer(
        name=settings["name"],
        schedule=schedule,
        momentum=settings["momentum"],
        weight_decay=settings["weight_decay"],
        trust_coefficient=settings["trust_coefficient"],
        bias_rate_factor=settings["bias_rate_factor"],
        max_gradient_norm=settings["max_gradient_norm"],
        head_learning_rate=settings["learning_rate"] if settings["constant_head_rate"] else None,
    )


def state_shapes(config: dict[str, Any], view_shape: tuple[int, int, int]) -> training.TrainState:
    """The state of a run as shapes and types, without its data.

    Args:
      config: plain values.
      view_shape: `(height, width, channels)` of a full view.

    Returns:
      A state of `jax.ShapeDtypeStruct`s.
    """
    # The schedule's length follows from the data; the shape of the optimizer's state does not.
    optimizer = make_optimizer(config["optimizer"], optax.constant_schedule(1.0))
    return jax.eval_shape(
        lambda key: training.init_state(
            key,
            blueprint.make_network(config),
            optimizer,
            view_shape,
            ema_decay=config["train"]["ema_decay"],
            target_decay=config["train"]["target_decay"],
        ),
        jax.random.key(0),
    )


def build_experiment(config: ConfigDict) -> Experiment:
    """Loads the data and makes everything else that the config describes.

    Args:
      config: as `configs/default.py` documents it.

    Returns:
      The experiment.

    Raises:
      ValueError: settings that do not fit each other, naming them.
    """
    settings: Any = config  # a ConfigDict's attributes are not known to type checkers
    train, optimizer = settings.train, settings.optimizer
    _check_method(config.to_dict())
    _check_batches(train.batch_size, train.num_micro_batches, train.bn_group_size)
    views = blueprint.view_augmentations(settings.augmentation.to_dict())
    dataset = data.load_dataset(**settings.data.to_dict())
    channels = dataset.train[0].shape[-1]
    if channels != len(views[0].mean):
        raise ValueError(
            f"the images have {channels} channels, but augmentation.mean has "
            f"{len(views[0].mean)} values: give mean and std one for each channel"
        )
    _check_evaluation(config.to_dict()["evaluation"], num_train_images=len(dataset.train))
    _check_ood(config.to_dict()["ood"])
    steps_per_epoch = data.steps_per_epoch(len(dataset.train), train.batch_size)
    num_train_steps = round(train.num_epochs * steps_per_epoch)
    if num_train_steps < 1:
        raise ValueError(f"train.num_epochs = {train.num_epochs} makes a run of no steps")
    schedule = training.make_schedule(
        learning_rate=optimizer.learning_rate,
        warmup_steps=round(optimizer.warmup_epochs * steps_per_epoch),
        num_steps=num_train_steps,
        final_learning_rate=optimizer.final_learning_rate,
    )
    jevb_settings = blueprint.jevb_settings(config.to_dict(), steps_per_epoch=steps_per_epoch)
    return Experiment(
        config=to_json_values(config),
        dataset=dataset,
        model=blueprint.make_network(config.to_dict()),
        optimizer=make_optimizer(config.to_dict()["optimizer"], schedule),
        schedule=schedule,
        view_augmentations=views,
        method=_method(config.to_dict(), jevb_settings),
        jevb_settings=jevb_settings,
        steps_per_epoch=steps_per_epoch,
        num_train_steps=num_train_steps,
    )
