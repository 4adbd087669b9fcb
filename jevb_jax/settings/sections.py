"""The typed settings of a run: one frozen class for each section, each setting with its domain.

`configs/default.py` and `configs/finetune_default.py` give the settings their values, units and
meaning. `read` makes these objects; only they are used below it, never a config.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from jevb_jax import methods
from jevb_jax.images import dataset, pixels
from jevb_jax.images.corruptions import CORRUPTIONS, NUM_SEVERITIES
from jevb_jax.images.crop_boxes import RESIZERS, Resizer
from jevb_jax.images.levels import DTYPES, Dtype, Levels
from jevb_jax.images.pixels import Interpolation
from jevb_jax.networks import class_token_vit, heads, joint
from jevb_jax.networks.heads import HeadInput
from jevb_jax.paper import densities, domain, likelihood, mass, objective, sphere
from jevb_jax.runs import metrics_writers
from jevb_jax.settings.domains import (
    BOOLEAN,
    choice,
    integer,
    interval,
    many,
    number,
    odd_or_zero,
    outside_sets,
    rising,
    text,
)

_PROBABILITY = number(0, 1)
_WEIGHT = number(0)
_DF = number(domain.LEAST_DF, infinite=True, note="inf is the Gaussian")
_SEED = integer(0, 2**32 - 1, note="JAX keys have 32 bits; for a longer hash give hash % 2**32")
_PAIR = many(_PROBABILITY, length=(2,), note="for views 1, 3, ... and for views 2, 4, ...")
_CORRUPTIONS = many(choice(*CORRUPTIONS))
_SEVERITIES = rising(integer(1, NUM_SEVERITIES))
_LIKELIHOODS = choice(*likelihood.LIKELIHOODS)
_PATHS = many(text(is_empty_allowed=False))

Paths = Annotated[tuple[str, ...], _PATHS]
Probability = Annotated[float, _PROBABILITY]
Weight = Annotated[float, _WEIGHT]
Df = Annotated[float, _DF]
Pair = Annotated[tuple[float, float], _PAIR]
Flag = Annotated[bool, BOOLEAN]
Text = Annotated[str, text()]
Writers = Annotated[tuple[str, ...], many(choice(*metrics_writers.NAMES))]
OutsideSets = Annotated[tuple[Mapping[str, Any], ...], outside_sets()]


@dataclass(frozen=True)
class InitSection:
    """The weights to start from."""

    workdir: Annotated[str, text(note='"" = weights drawn by the seed')]
    step: Annotated[int, integer(-1, note="-1 = the latest")]
    frozen_stages: Annotated[int, integer(0, note="0 = none")]


@dataclass(frozen=True)
class DataSection:
    """The images."""

    source: Annotated[str, choice(*dataset.SOURCES)]
    train_paths: Paths
    test_paths: Paths
    tfds_name: Text
    data_dir: Annotated[str, text(note='"" = the default of TFDS')]
    train_split: Text
    test_split: Text
    image_column: Annotated[str, text(is_empty_allowed=False)]
    label_column: Annotated[str, text(note='"" = no labels')]
    image_size: Annotated[int, integer(0, note="0 = as stored")]
    max_image_pixels: Annotated[int, integer(1)]
    exif: Annotated[Literal["apply", "ignore"], choice("apply", "ignore")]
    skip_broken: Annotated[Literal["refuse", "skip"], choice("refuse", "skip")]
    labels: Annotated[Literal["given", "none"], choice("given", "none")]
    num_channels: Annotated[int, integer(0, note="0 = as stored; pictures: color")]
    dtype: Annotated[Dtype, choice(*DTYPES)]
    value_range: Annotated[
        tuple[float, ...], many(number(-math.inf), note="() or (black, white), rising")
    ]
    num_train_examples: Annotated[int, integer(0, note="0 = all")]
    num_test_examples: Annotated[int, integer(0, note="0 = all")]
    validation_fraction: Annotated[float, number(0, 1, low_open=True, high_open=True)]
    split_seed: Annotated[int, integer(0)]
    inlier_class: Annotated[int, integer(-1, note="-1 = all classes")]
    inlier_classes: Annotated[tuple[int, ...], many(integer(0))]

    @property
    def levels(self) -> Levels:
        """What the numbers of the images mean."""
        return Levels(self.dtype, self.value_range)

    @property
    def alike(self) -> dict[str, Any]:
        """How sets that are compared with these data are read, arguments of `load_images`."""
        return {"exif": self.exif, "num_channels": self.num_channels, "levels": self.levels}


@dataclass(frozen=True)
class InputSection:
    """How images reach the devices."""

    placement: Annotated[
        Literal["auto", "resident", "stream"], choice("auto", "resident", "stream")
    ]
    resident_limit_bytes: Annotated[int, integer(0)]
    num_workers: Annotated[int, integer(0, note="0 = threads of this process")]
    prefetch_batches: Annotated[int, integer(1)]
    accept_changed_data: Flag


@dataclass(frozen=True)
class AugmentationSection:
    """How views are made of an image."""

    image_size: Annotated[int, integer(1)]
    crop_from: Annotated[Literal["square", "image"], choice("square", "image")]
    crop_resizer: Annotated[Resizer, choice(*RESIZERS)]
    crop_scale: Annotated[tuple[float, float], interval(0, 1)]
    crop_ratio: Annotated[tuple[float, float], interval(0)]
    interpolation: Annotated[Interpolation, choice(*pixels.INTERPOLATIONS)]
    flip_probability: Probability
    jitter_probability: Probability
    brightness: Weight
    contrast: Weight
    saturation: Weight
    hue: Annotated[float, number(0, 0.5)]
    grayscale_probability: Probability
    blur_probability: Pair
    blur_sigma: Annotated[tuple[float, float], interval(0)]
    blur_kernel_size: Annotated[int, odd_or_zero(note="0 = about a tenth of the image")]
    solarize_probability: Pair
    solarize_threshold: Annotated[float, number(0, 1)]
    num_views: Annotated[int, integer(2)]
    num_small_crops: Annotated[int, integer(0)]
    small_crop_size: Annotated[int, integer(1)]
    small_crop_scale: Annotated[tuple[float, float], interval(0, 1)]
    mean: Annotated[
        tuple[float, ...],
        many(number(-math.inf), minimum=1, note="one value for each channel"),
    ]
    std: Annotated[
        tuple[float, ...],
        many(number(0, low_open=True), minimum=1, note="one value for each channel"),
    ]


@dataclass(frozen=True)
class FeatureViewsSection:
    """The features of a frozen encoder, and how views are made of them."""

    num_features: Annotated[int, integer(0, note="0 = as in the data")]
    num_stored_views: Annotated[int, integer(0, note="0 = as in the data")]
    standardize: Flag
    noise_scale: Weight
    mask_probability: Annotated[float, number(0, 1, high_open=True)]


@dataclass(frozen=True)
class ModelSection:
    """The networks."""

    backbone: Annotated[str, choice(*joint.BACKBONES)]
    width: Annotated[int, integer(0, note="0 = the network's own")]
    stem: Annotated[str, choice("cifar", "imagenet")]
    zero_init_residual: Flag
    batch_norm: Annotated[Literal["fused", "plain"], choice("fused", "plain")]
    patch_size: Annotated[int, integer(1)]
    pool: Annotated[class_token_vit.Pool, choice(*class_token_vit.POOLS)]
    projector_hidden_dims: Annotated[tuple[int, ...], many(integer(1), minimum=1)]
    projector_normalizes_output: Flag
    embedding_dim: Annotated[int, integer(1)]
    head_input: Annotated[HeadInput, choice(*heads.HEAD_INPUTS)]
    head_hidden_dim: Annotated[int, integer(1)]
    initial_scale: Annotated[float, number(0, low_open=True)]
    min_scale: Annotated[float, number(0)]
    isotropic: Flag
    initial_radial_scale: Annotated[float, number(1e-3, low_open=True)]
    dtype: Annotated[str, choice(*joint.DTYPES)]


@dataclass(frozen=True)
class JevbSection:
    """The objective of JEVB."""

    df: Df
    radial_df: Df
    scale_units: Annotated[likelihood.ScaleUnits, choice(*likelihood.SCALE_UNITS)]
    prior_scale: Annotated[float, number(0, low_open=True)]
    coordinates: Annotated[sphere.Coordinates, choice(*sphere.COORDINATES)]
    space: Annotated[densities.Space, choice(*densities.SPACES)]
    tails: Annotated[mass.Tails, choice(*mass.TAILS)]
    normalized: Flag
    num_samples: Annotated[int, integer(1)]
    kl_weight: Weight
    kl_warmup_epochs: Annotated[float, number(0, note="0 = none")]
    radial_weight: Weight
    likelihood_scale: Annotated[
        Literal["tied", "untied", "fixed"], choice("tied", "untied", "fixed")
    ]
    location: Annotated[objective.Location, choice(*objective.LOCATIONS)]
    likelihood: Annotated[likelihood.Factorization, _LIKELIHOODS]


@dataclass(frozen=True)
class VicregSection:
    """The objective of VICReg."""

    invariance_weight: Weight
    variance_weight: Weight
    covariance_weight: Weight


@dataclass(frozen=True)
class BarlowTwinsSection:
    """The objective of Barlow Twins."""

    redundancy_weight: Weight
    loss_weight: Weight


@dataclass(frozen=True)
class EmpSslSection:
    """The objective of EMP-SSL."""

    invariance_weight: Weight
    squared_epsilon: Annotated[float, number(0, low_open=True)]


@dataclass(frozen=True)
class OptimizerSection:
    """The optimizer and the learning rate."""

    name: Annotated[str, choice("sgd", "lars", "larc", "adamw", "muon")]
    learning_rate: Annotated[float, number(0)]
    momentum: Annotated[float, number(0, 1, high_open=True)]
    weight_decay: Annotated[float, number(0, note="0 = none")]
    trust_coefficient: Annotated[float, number(0, low_open=True)]
    bias_rate_factor: Annotated[float, number(0)]
    constant_head_rate: Flag
    warmup_epochs: Annotated[float, number(0, note="0 = none")]
    final_learning_rate: Annotated[float, number(0)]
    max_gradient_norm: Annotated[float, number(0, note="0 = no clipping")]
    layer_decay: Annotated[float, number(0, 1, low_open=True, note="1 = off")]


@dataclass(frozen=True)
class TrainSection:
    """Length of the run, batches, and logs."""

    batch_size: Annotated[int, integer(2, note="BatchNorm needs at least 2")]
    num_epochs: Annotated[float, number(0, low_open=True)]
    extend: Flag
    num_micro_batches: Annotated[int, integer(1)]
    bn_over_views: Flag
    bn_group_size: Annotated[int, integer(0, note="0 = all examples of a micro-batch")]
    ema_decay: Annotated[float, number(0, 1, high_open=True, note="0 = off")]
    target_decay: Annotated[float, number(0, 1, high_open=True, note="0 = none")]
    shard_optimizer_state: Flag
    steps_per_dispatch: Annotated[int, integer(0, note="0 = 1 on the CPU, else 10")]
    log_every_steps: Annotated[int, integer(0, note="0 = only the last step")]
    health_every_steps: Annotated[int, integer(0, note="0 = off")]
    health_pairs: Flag
    health_num_images: Annotated[int, integer(1)]
    knn_every_epochs: Annotated[int, integer(0, note="0 = off")]
    writers: Writers


@dataclass(frozen=True)
class CheckpointSection:
    """When the run is saved, and which checkpoints are kept."""

    every_steps: Annotated[int, integer(0, note="0 = only at the end")]
    keep_latest: Annotated[int, integer(1)]
    keep_best: Annotated[int, integer(0, note="0 = off")]
    fitted_megabytes: Annotated[int, integer(0, note="0 = not saved")]


@dataclass(frozen=True)
class EvaluationSection:
    """How the features are measured."""

    batch_size: Annotated[int, integer(1)]
    split: Annotated[Literal["test", "validation"], choice("test", "validation")]
    knn_k: Annotated[tuple[int, ...], many(integer(1), minimum=1)]
    knn_temperature: Annotated[float, number(0, low_open=True)]
    knn_uniform_k: Annotated[tuple[int, ...], many(integer(1))]
    l2_grid: Annotated[tuple[float, ...], many(number(0), minimum=1)]
    labels_per_class: Annotated[int, integer(0, note="0 = off")]
    few_label_seeds: Annotated[int, integer(1)]
    compare_untrained: Flag


@dataclass(frozen=True)
class OodSection:
    """Detection, and checks of the uncertainty."""

    name: Text
    outside: OutsideSets
    choice: OutsideSets
    corruptions: Annotated[tuple[str, ...], _CORRUPTIONS]
    severities: Annotated[tuple[int, ...], _SEVERITIES]
    num_corrupted_images: Annotated[int, integer(1)]
    default_score: Annotated[str, text(note='"" = the method\'s own')]
    num_views: Annotated[int, integer(1)]
    num_samples: Annotated[int, integer(1)]
    max_fit_images: Annotated[int, integer(0, note="0 = all")]
    knn_k: Annotated[tuple[int, ...], many(integer(1), minimum=1)]
    ssd_clusters: Annotated[tuple[int, ...], many(integer(1))]
    norm_exponents: Annotated[tuple[float, ...], many(number(0, 4))]
    norm_exponent_choices: Annotated[tuple[float, ...], many(number(0, 4))]
    mixture_df: Df
    residual_share: Annotated[float, number(0, 1, low_open=True, high_open=True)]
    csi_crops: Annotated[int, integer(0, note="0 = off")]
    loss_prediction: Flag
    num_bootstrap: Annotated[int, integer(1)]
    human_counts_path: Annotated[str, text(note='"" = none')]


@dataclass(frozen=True)
class RunSettings:
    """All settings of `configs/default.py`."""

    method: Annotated[str, choice(*methods.METHODS)]
    seed: Annotated[int, _SEED]
    init: InitSection
    data: DataSection
    input: InputSection
    augmentation: AugmentationSection
    feature_views: FeatureViewsSection
    model: ModelSection
    jevb: JevbSection
    vicreg: VicregSection
    barlow_twins: BarlowTwinsSection
    emp_ssl: EmpSslSection
    optimizer: OptimizerSection
    train: TrainSection
    checkpoint: CheckpointSection
    evaluation: EvaluationSection
    ood: OodSection


@dataclass(frozen=True)
class FinetuneInitSection:
    """The encoder to fine-tune."""

    workdir: Annotated[str, text(is_empty_allowed=False, note="a run of train.py, or an export")]
    step: Annotated[int, integer(-1, note="-1 = the latest")]
    frozen: Flag


@dataclass(frozen=True)
class FinetuneAugmentationSection:
    """How images are varied. Size and normalization are those of the encoder."""

    crop_scale: Annotated[tuple[float, float], interval(0, 1)]
    crop_ratio: Annotated[tuple[float, float], interval(0)]
    flip_probability: Probability


@dataclass(frozen=True)
class FinetuneTrainSection:
    """Length of the fine-tune, and batches."""

    batch_size: Annotated[int, integer(1)]
    num_epochs: Annotated[int, integer(1)]
    steps_per_dispatch: Annotated[int, integer(0, note="0 = 1 on the CPU, else 10")]
    log_every_steps: Annotated[int, integer(0, note="0 = the last step alone")]
    writers: Writers


@dataclass(frozen=True)
class FinetuneCheckpointSection:
    """When a fine-tune is saved, and what is kept beside the best epoch."""

    every_epochs: Annotated[int, integer(1)]
    keep_latest: Annotated[int, integer(1)]


@dataclass(frozen=True)
class FinetuneEvaluationSection:
    """How accuracies are measured."""

    batch_size: Annotated[int, integer(1)]


@dataclass(frozen=True)
class FinetuneSettings:
    """All settings of `configs/finetune_default.py`."""

    seed: Annotated[int, _SEED]
    init: FinetuneInitSection
    data: DataSection
    input: InputSection
    augmentation: FinetuneAugmentationSection
    optimizer: OptimizerSection
    train: FinetuneTrainSection
    checkpoint: FinetuneCheckpointSection
    evaluation: FinetuneEvaluationSection


@dataclass(frozen=True)
class OutsideSetSection:
    """A set of `ood.outside` or `ood.choice`. All settings but the first four are optional."""

    name: Annotated[str, text(is_empty_allowed=False)]
    group: Annotated[str, text(is_empty_allowed=False)]
    source: Annotated[str, choice(*dataset.OUTSIDE_SOURCES)]
    protocol: Text
    paths: Paths
    tfds_name: Text
    data_dir: Text
    split: Text
    image_column: Annotated[str, text(is_empty_allowed=False)]
    label_column: Text
    image_size: Annotated[int, integer(0, note="0 = as stored")]
    rows: Annotated[tuple[int, ...], many(integer(0))]
    exclude_labels: Annotated[tuple[int, ...], many(integer(0))]
    num_examples: Annotated[int, integer(0, note="0 = all")]
    split_seed: Annotated[int, integer(0)]
