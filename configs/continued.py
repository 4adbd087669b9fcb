r"""Goes on with pre-training from published weights, on pictures of one's own; for one GPU.

    python train.py --config=configs/continued.py:timm_vit_small --workdir=runs/mine \
      --config.data.train_paths="('my_pictures',)" --config.init.workdir=model.safetensors

`docs/use.md` says which files fit. The argument is the network: `resnet18`, `resnet34`, `resnet50`,
`timm_vit_tiny`, `timm_vit_small`, `deit_tiny`, `deit_small`, `dinov2_small` or
`dinov2_small_registers`. A DeiT is the same network as a `timm_vit`, but it was trained on pictures with
the mean and standard deviation of ImageNet.

The values are for about 10,000 pictures and have not been chosen by runs: a low learning rate that falls
towards the first layers, and for transformers two full views and four small crops of each picture.
"""

from typing import Any

from ml_collections import ConfigDict

from jevb_jax.configs import default

_IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_HALF = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
# Backbone; patch in pixels, 0 for a ResNet; mean and standard deviation of its training.
_NETWORKS = {
    **{name: (name, 0, _IMAGENET) for name in ("resnet18", "resnet34", "resnet50")},
    "timm_vit_tiny": ("timm_vit_tiny", 16, _HALF),
    "timm_vit_small": ("timm_vit_small", 16, _HALF),
    "deit_tiny": ("timm_vit_tiny", 16, _IMAGENET),
    "deit_small": ("timm_vit_small", 16, _IMAGENET),
    "dinov2_small": ("dinov2_small", 14, _IMAGENET),
    "dinov2_small_registers": ("dinov2_small_registers", 14, _IMAGENET),
}


def get_config(network: str = "timm_vit_small") -> ConfigDict:
    """Returns the settings for one of the networks above; they need two paths, see there."""
    if network not in _NETWORKS:
        raise ValueError(
            f"the config's argument must be one of {', '.join(_NETWORKS)}, got {network!r}"
        )
    config: Any = default.get_config()
    config.data.source = "folder"
    config.data.labels = "none"  # "given" for a folder with one directory for each class
    config.data.image_size = 256
    config.augmentation.image_size = 224
    config.augmentation.blur_probability = (0.5, 0.5)
    config.model.backbone, patch, normalization = _NETWORKS[network]
    config.augmentation.mean, config.augmentation.std = normalization
    config.model.stem = "imagenet"
    config.model.dtype = "bfloat16"
    config.optimizer.name = "adamw"
    config.optimizer.learning_rate = 1e-4
    config.optimizer.weight_decay = 0.05
    config.optimizer.warmup_epochs = 3.0
    config.optimizer.layer_decay = 0.5  # of four stages
    config.optimizer.max_gradient_norm = 1.0
    if patch:
        config.model.patch_size = patch
        config.optimizer.layer_decay = 0.75  # of twelve blocks
        config.augmentation.num_small_crops = 4
        config.augmentation.small_crop_size = 7 * patch
        config.augmentation.small_crop_scale = (0.05, 0.3)
        config.augmentation.crop_scale = (0.3, 1.0)
    config.train.target_decay = 0.99
    config.train.batch_size = 128
    config.train.num_epochs = 30
    config.ood.corruptions = ()
    return config
