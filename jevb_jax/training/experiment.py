"""From a config to the objects of a run. Below this, nothing knows a config."""

import dataclasses
import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array
from ml_collections import ConfigDict

from jevb_jax import methods
from jevb_jax.images import batch_order
from jevb_jax.images.crop_boxes import HostCrops
from jevb_jax.images.dataset import Dataset, load_dataset
from jevb_jax.images.feature_views import ColumnStatistics, column_statistics
from jevb_jax.images.source import check_has_pictures, is_of_features
from jevb_jax.images.views import View, view_shape
from jevb_jax.networks.joint import JointEmbeddingModel
from jevb_jax.settings import read
from jevb_jax.settings.sections import OptimizerSection, RunSettings
from jevb_jax.training import feature_run, from_settings, optimizers, stages, step
from jevb_jax.training.optimizers import EarlierLength
from jevb_jax.training.step import TrainState

_logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Experiment:
    """Everything that a config describes, ready to be used.

    Attributes:
      config: plain JSON values, to be written to files.
      settings: the same values, typed.
      dataset: train, validation and test sources.
      model: networks.
      optimizer: with the learning rate of `schedule`.
      schedule: learning rate by step.
      view_augmentations: for the full views, then the small crops.
      method: the loss, a function of the views' outputs.
      jevb_settings: of JEVB's objective; other methods do not read them.
      steps_per_epoch: whole batches in the training split.
      num_train_steps: steps of the run.
      earlier: the planned lengths before the run was extended.
      statistics: of the columns of features in the training split; None for images.
    """

    config: dict[str, Any]
    settings: RunSettings
    dataset: Dataset
    model: JointEmbeddingModel
    optimizer: optax.GradientTransformation
    schedule: optax.Schedule
    view_augmentations: tuple[View, ...]
    method: methods.Loss
    jevb_settings: methods.JevbSettings
    steps_per_epoch: int
    num_train_steps: int
    earlier: tuple[EarlierLength, ...] = ()
    statistics: ColumnStatistics | None = None

    @property
    def key(self) -> Array:
        """The run's key."""
        return jax.random.key(self.settings.seed)

    @property
    def view_shape(self) -> tuple[int, ...]:
        """`(height, width, channels)` of a full view, or `(F,)` of features."""
        return view_shape(self.view_augmentations[0])

    @property
    def host_crops(self) -> HostCrops | None:
        """What the host cuts out of whole pictures; None where the device crops."""
        return from_settings.host_crops(self.settings.augmentation, self.key)

    @functools.cached_property
    def _init(self) -> Callable[[Array], TrainState]:
        return step.compiled_init(
            self.model,
            self.optimizer,
            self.view_shape,
            ema_decay=self.settings.train.ema_decay,
            target_decay=self.settings.train.target_decay,
        )

    def initial_state(self) -> TrainState:
        """The state before the first step."""
        state = self._init(jax.random.fold_in(self.key, 2**31 - 1))  # no step is ever this one
        if self.statistics is None:
            return state
        columns = jax.tree.map(jnp.asarray, self.statistics._asdict())
        return state._replace(batch_stats={**state.batch_stats, "backbone": columns})

    def train_step(
        self, state: TrainState, images: Array | tuple[Array, ...], key: Array
    ) -> tuple[TrainState, dict[str, Array]]:
        """`step.train_step` with this experiment's networks and settings."""
        new_state, metrics = step.train_step(
            state,
            images,
            key,
            model=self.model,
            optimizer=self.optimizer,
            view_augmentations=self.view_augmentations,
            method=self.method,
            num_full_views=self.settings.augmentation.num_views,
            num_micro_batches=self.settings.train.num_micro_batches,
            bn_over_views=self.settings.train.bn_over_views,
            bn_group_size=self.settings.train.bn_group_size,
            ema_decay=self.settings.train.ema_decay,
            target_decay=functools.partial(
                optimizers.target_decay_at,
                target_decay=self.settings.train.target_decay,
                num_steps=self.num_train_steps,
                earlier=self.earlier,
            ),
        )
        statistics = stages.keep_frozen(
            state.batch_stats,
            new_state.batch_stats,
            frozen_stages=self.settings.init.frozen_stages,
        )
        return new_state._replace(batch_stats=statistics), metrics

    def extended(self, earlier: Sequence[EarlierLength]) -> "Experiment":
        """This experiment, as the last part of a run that was planned shorter at first.

        Args:
          earlier: the planned lengths before this one, in their order.

        Returns:
          The experiment; its schedules follow each length for its own steps.
        """
        if not earlier:
            return self
        schedule = make_schedule(
            self.settings.optimizer,
            steps_per_epoch=self.steps_per_epoch,
            num_steps=self.num_train_steps,
            earlier=earlier,
        )
        optimizer = make_optimizer(
            self.settings.optimizer, schedule, frozen_stages=self.settings.init.frozen_stages
        )
        return dataclasses.replace(
            self, schedule=schedule, optimizer=optimizer, earlier=tuple(earlier)
        )


def to_json_values(config: ConfigDict) -> dict[str, Any]:
    """The resolved config as JSON knows it: tuples become lists, NumPy's scalars Python's."""
    return read.plain(config.to_dict())


def _loss(settings: RunSettings, jevb_settings: methods.JevbSettings) -> methods.Loss:
    """The loss of the method, given the settings of its own section."""
    method = methods.METHODS[settings.method]
    if method.head == "posterior":
        return functools.partial(method.loss, settings=jevb_settings)
    keywords = vars(getattr(settings, method.section)) if method.section else {}
    return functools.partial(method.loss, **keywords)


def make_schedule(
    section: OptimizerSection,
    *,
    steps_per_epoch: int,
    num_steps: int,
    earlier: Sequence[EarlierLength] = (),
) -> optax.Schedule:
    """The learning rate of the section `optimizer`.

    Args:
      section: kind of schedule, rate, warm-up in epochs.
      steps_per_epoch: for the warm-up.
      num_steps: where the rate ends, the length of the whole run.
      earlier: the planned lengths before the run was extended.

    Returns:
      step -> learning rate.

    Raises:
      ValueError: the warm-up is not shorter than the run.
    """
    return optimizers.make_schedule(
        learning_rate=section.learning_rate,
        warmup_steps=round(section.warmup_epochs * steps_per_epoch),
        num_steps=num_steps,
        final_learning_rate=section.final_learning_rate,
        earlier=earlier,
    )


def make_optimizer(
    section: OptimizerSection, schedule: optax.Schedule, *, frozen_stages: int = 0
) -> optax.GradientTransformation:
    """The optimizer of the section `optimizer` with a schedule; see `optimizers.make_optimizer`."""
    return optimizers.make_optimizer(
        name=section.name,
        schedule=schedule,
        momentum=section.momentum,
        weight_decay=section.weight_decay,
        trust_coefficient=section.trust_coefficient,
        bias_rate_factor=section.bias_rate_factor,
        max_gradient_norm=section.max_gradient_norm,
        head_learning_rate=section.learning_rate if section.constant_head_rate else None,
        layer_decay=section.layer_decay,
        frozen_stages=frozen_stages,
    )


def build_experiment(config: ConfigDict) -> Experiment:
    """Loads the data and makes everything else that the config describes.

    Args:
      config: as `configs/default.py` documents it.

    Returns:
      The experiment.

    Raises:
      ValueError: wrong settings, or settings that do not fit each other; all are named.
    """
    values = to_json_values(config)
    settings = read.run_settings(values)
    train = settings.train
    from_settings.view_augmentations(settings.augmentation)  # refuses wrong ones before a long load
    dataset = load_dataset(**vars(settings.data))
    if from_settings.host_crops(settings.augmentation, jax.random.key(settings.seed)):
        check_has_pictures(dataset.train)
    statistics = None
    if is_of_features(dataset.train):
        section = feature_run.section_of_data(settings, dataset)
        settings = dataclasses.replace(settings, feature_views=section)
        values = {**values, "feature_views": vars(section)}
        statistics = column_statistics(dataset.train)
    else:
        channels, num_means = dataset.train[0].shape[-1], len(settings.augmentation.mean)
        if channels != num_means:
            raise ValueError(
                f"the images have {channels} channels, but augmentation.mean has {num_means} values: "
                "give mean and std one for each channel"
            )
        skipped = from_settings.view_augmentations(settings.augmentation)[0].skipped
        if skipped:
            _logger.warning(
                "The images have %d channels, so these color operations are skipped: %s.",
                channels,
                ", ".join(f"augmentation.{name}" for name in skipped),
            )
    steps_per_epoch = batch_order.steps_per_epoch(len(dataset.train), train.batch_size)
    num_train_steps = round(train.num_epochs * steps_per_epoch)
    if num_train_steps < 1:
        raise ValueError(f"train.num_epochs = {train.num_epochs} makes a run of no steps")
    schedule = make_schedule(
        settings.optimizer, steps_per_epoch=steps_per_epoch, num_steps=num_train_steps
    )
    jevb_settings = from_settings.jevb_settings(settings, steps_per_epoch=steps_per_epoch)
    return Experiment(
        config=values,
        settings=settings,
        dataset=dataset,
        model=from_settings.make_network(settings, frozen_stages=settings.init.frozen_stages),
        optimizer=make_optimizer(
            settings.optimizer, schedule, frozen_stages=settings.init.frozen_stages
        ),
        schedule=schedule,
        view_augmentations=from_settings.views(settings, statistics),
        method=_loss(settings, jevb_settings),
        jevb_settings=jevb_settings,
        steps_per_epoch=steps_per_epoch,
        num_train_steps=num_train_steps,
        statistics=statistics,
    )
