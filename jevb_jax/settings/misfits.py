"""Settings that are allowed alone, but not together: one text for each pair that does not fit."""

from typing import Any

from jevb_jax.images.dataset import PICTURE_SOURCES
from jevb_jax.methods import METHODS
from jevb_jax.networks import joint
from jevb_jax.networks.batch_norm import check_group_size
from jevb_jax.settings.domains import shown
from jevb_jax.settings.sections import DataSection, OptimizerSection, RunSettings, TrainSection


def misfits(settings: RunSettings) -> list[str]:
    """Settings that are allowed alone, but not together."""
    return [
        *_method_misfits(settings),
        *_batch_misfits(settings.train),
        *_view_misfits(settings),
        *_crop_misfits(settings),
        *_posterior_misfits(settings),
        *_detection_misfits(settings),
        *misfits_of_source(settings.data),
        *_feature_misfits(settings),
    ]


def _method_misfits(settings: RunSettings) -> list[str]:
    """Settings that the method, the start or the schedule needs or would ignore."""
    problems = []
    name, method, train = settings.method, METHODS[settings.method], settings.train
    views = settings.augmentation
    if not method.takes_many_views and (views.num_views > 2 or views.num_small_crops):
        problems.append(
            f"{name} would ignore all but two views: set augmentation.num_views = "
            f"{views.num_views} to 2 and augmentation.num_small_crops = {views.num_small_crops} to 0"
        )
    if method.head != "posterior" and train.health_pairs:
        problems.append(f"train.health_pairs needs method jevb, got {name}: set it to False")
    if method.target == "needed" and not train.target_decay:
        problems.append(f"method {name} needs train.target_decay above 0, for instance 0.99")
    if method.target == "none" and train.target_decay:
        problems.append(f"{name} has no target network: set train.target_decay to 0")
    if settings.init.frozen_stages and not settings.init.workdir:
        problems.append(
            "init.frozen_stages keeps weights of init.workdir, which is empty: name a run or a file "
            "there, or set init.frozen_stages to 0"
        )
    return problems + warmup_misfits(settings.optimizer, num_epochs=train.num_epochs)


def warmup_misfits(optimizer: OptimizerSection, *, num_epochs: float) -> list[str]:
    """A warm-up that is not shorter than the run."""
    if optimizer.warmup_epochs < num_epochs:
        return []
    return [
        f"optimizer.warmup_epochs = {optimizer.warmup_epochs:g} must be shorter than the run, "
        f"train.num_epochs = {num_epochs:g}"
    ]


def _batch_misfits(train: TrainSection) -> list[str]:
    """Wrong numbers of parts of a batch, and of groups of BatchNorm."""
    if train.batch_size % train.num_micro_batches:
        return [
            "train.num_micro_batches must divide train.batch_size, got "
            f"{train.num_micro_batches} and {train.batch_size}"
        ]
    seen, group = train.batch_size // train.num_micro_batches, train.bn_group_size
    if seen < 2:
        return [
            f"train.num_micro_batches = {train.num_micro_batches} leaves {seen} example of "
            f"train.batch_size = {train.batch_size} to a part: BatchNorm needs at least 2"
        ]
    try:
        if group:
            check_group_size(group, seen)
    except ValueError as error:
        return [str(error)]
    return []


def _view_misfits(settings: RunSettings) -> list[str]:
    """Wrong sizes and channels of views, and patches that do not divide them."""
    problems = []
    views, model = settings.augmentation, settings.model
    if len(views.mean) != len(views.std):
        problems.append(
            "augmentation.mean and augmentation.std need one value for each channel, got "
            f"{len(views.mean)} and {len(views.std)} values"
        )
    sizes = {"image_size": (views.image_size, max(views.blur_probability))}
    if views.num_small_crops:  # they are blurred as the first view
        sizes["small_crop_size"] = views.small_crop_size, views.blur_probability[0]
    for name, (size, blur_probability) in sizes.items():
        has_patches = model.backbone in (*joint.VITS, *joint.CLASS_TOKEN_VITS)
        if has_patches and size % model.patch_size:
            problems.append(
                f"model.patch_size = {model.patch_size} must divide augmentation.{name} = {size}"
            )
        taps = views.blur_kernel_size
        if blur_probability > 0 and taps // 2 >= size:
            problems.append(
                f"augmentation.blur_kernel_size = {taps} is too wide for views of {size} pixels "
                f"(augmentation.{name}): at most {2 * size - 1}, or 0"
            )
    return problems


def _crop_misfits(settings: RunSettings) -> list[str]:
    """Crops of whole pictures, where there are no pictures or where they are not read anew."""
    views = settings.augmentation
    simd = 'augmentation.crop_resizer = "simd"'
    if views.crop_from == "square":
        needs = f'{simd} needs augmentation.crop_from = "image"; the device resizes squares'
        return [needs] if views.crop_resizer == "simd" else []
    asked = 'augmentation.crop_from = "image"'
    problems = []
    if settings.data.source not in PICTURE_SOURCES:
        problems.append(
            f"{asked} needs picture files, data.source {' or '.join(PICTURE_SOURCES)}, got "
            f'"{settings.data.source}": set it to "square"'
        )
    if settings.input.placement == "resident":
        problems.append(
            f'{asked} reads every picture again at each step: set input.placement = "resident" to '
            '"stream" or "auto", or augmentation.crop_from to "square"'
        )
    data, kind = settings.data, views.interpolation
    if views.crop_resizer == "simd" and (
        kind != "bilinear" or data.num_channels == 4 or data.dtype != "uint8"
    ):
        problems.append(
            f"{simd} needs bilinear crops of color or gray with 8 bits, got "
            f'augmentation.interpolation = "{kind}", data.num_channels = {data.num_channels}, '
            f'data.dtype = "{data.dtype}": set it to "pillow"'
        )
    return problems


def _posterior_misfits(settings: RunSettings) -> list[str]:
    """Settings that a likelihood on the sphere does not allow."""
    problems = []
    model, jevb, head = settings.model, settings.jevb, METHODS[settings.method].head
    # Of every method: the likelihood is made for each, also where the loss does not read it.
    if jevb.tails == "feature" and jevb.coordinates != "chordal":
        problems.append('jevb.tails = "feature" needs jevb.coordinates = "chordal"')
    if head == "posterior":
        if model.min_scale >= model.initial_scale:
            problems.append(
                f"model.min_scale = {model.min_scale} must be below model.initial_scale = "
                f"{model.initial_scale}"
            )
        if jevb.likelihood == "factorised" and model.embedding_dim < 3:
            problems.append(
                f"model.embedding_dim = {model.embedding_dim} must be at least 3 for method jevb: "
                "its directions lie on a sphere"
            )
    if head == "direction" and model.embedding_dim < 2:
        problems.append(
            f"model.embedding_dim = {model.embedding_dim} must be at least 2 for method "
            f"{settings.method}"
        )
    return problems


def _detection_misfits(settings: RunSettings) -> list[str]:
    problems = []
    ood = settings.ood
    if ood.corruptions and not ood.severities:
        problems.append("ood.severities is empty and ood.corruptions is not: give some of 1 to 5")
    if ood.corruptions and settings.data.dtype != "uint8":
        problems.append(
            f'ood.corruptions need data.dtype = "uint8", got "{settings.data.dtype}": set them to ()'
        )
    if len(set(ood.corruptions)) < len(ood.corruptions):
        problems.append(f"ood.corruptions names one twice: {shown(ood.corruptions)}")
    return problems


def misfits_of_source(section: DataSection) -> list[str]:
    """Settings that the source of the data lacks."""
    source = section.source
    try:
        levels = section.levels
    except ValueError as error:
        return [f"data.value_range: {error}"]
    has_only_bytes = source not in ("arrays", *PICTURE_SOURCES) or source == "tfds"
    if has_only_bytes and levels.dtype != "uint8":
        return [
            f'data.dtype = "{levels.dtype}" is for arrays and picture files, got data.source = {source!r}'
        ]
    if source == "tfds" and not section.tfds_name:
        return ["data.tfds_name must name the data set where data.source is tfds"]
    if source == "tfds" and section.train_split == section.test_split:
        return [f"data.train_split and data.test_split are both {section.train_split!r}"]
    named = {
        "arrays": ".npz or .npy files",
        "features": ".npz or .npy files",
        "folder": "one directory",
        "paths": "one text or CSV file",
        "webdataset": "tar files",
        "hf": "a directory of save_to_disk, or parquet or Arrow files",
    }
    if source in named and not section.train_paths:
        return [f"data.train_paths must name {named[source]} where data.source is {source}, got ()"]
    if section.skip_broken == "skip" and source not in PICTURE_SOURCES:
        return [
            f'data.skip_broken = "skip" needs pictures that are decoded one by one, got data.source = '
            f'{source!r}: set it to "refuse"'
        ]
    return []


def _feature_misfits(settings: RunSettings) -> list[str]:
    """What features of a frozen encoder do not allow, and images do not have."""
    is_of_features, ood = settings.data.source == "features", settings.ood
    if is_of_features != (settings.model.backbone == "identity"):
        return [
            'data.source = "features" and model.backbone = "identity" need each other, got '
            f"{settings.data.source!r} and {settings.model.backbone!r}"
        ]
    problems = [
        f"ood.{part}[{number}].source = {one['source']!r}, but the data are "
        f"{'features' if is_of_features else 'images'}: give outside sets of the same kind"
        for part, sets in (("outside", ood.outside), ("choice", ood.choice))
        for number, one in enumerate(sets)
        if (one["source"] == "features") != is_of_features
    ]
    if not is_of_features:
        return problems
    if settings.init.workdir.endswith(".safetensors"):
        problems.append(
            "init.workdir names a file of a backbone, and features have none: give a run"
        )
    if settings.optimizer.layer_decay != 1:
        problems.append(
            "optimizer.layer_decay is for layers, and features have none: set it to 1.0"
        )
    of_images: dict[str, Any] = {
        "init.frozen_stages": settings.init.frozen_stages,
        "augmentation.num_small_crops": settings.augmentation.num_small_crops,
        "data.image_size": settings.data.image_size,
        "ood.corruptions": ood.corruptions,
        "ood.csi_crops": ood.csi_crops,
    }
    return problems + [
        f"{name} = {shown(value)} is for images, and data.source is features: set it to "
        f"{'()' if isinstance(value, tuple) else 0}"
        for name, value in of_images.items()
        if value
    ]
