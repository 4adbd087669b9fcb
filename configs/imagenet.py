"""JEVB and related methods on ImageNet: ResNet-50, bfloat16, 224 pixels, the published recipes.

python train.py --config=configs/imagenet.py --workdir=runs/imagenet
python train.py --config=configs/imagenet.py:byol --workdir=runs/imagenet_byol

The data come from TFDS (`tfds build imagenet2012 --file_format=array_record`). Training crops the whole
pictures; evaluation sees squares, resized to 256 pixels on load. Batches of 4096 need many devices or
`--config.train.num_micro_batches`. With the latter, BatchNorm and losses that couple examples see one
micro-batch at a time. No config of this file has been run yet.
"""

from typing import Any

from ml_collections import ConfigDict

from jevb_jax.configs import default, ood, recipes


def get_config(method: str = "jevb") -> ConfigDict:
    """Returns the settings of a method, one of `recipes.METHODS`."""
    config: Any = default.get_config()
    config.data.source = "tfds"
    config.data.tfds_name = "imagenet2012"
    config.data.test_split = "validation"
    config.data.image_size = 256
    config.data.validation_fraction = 0.01
    config.input.num_workers = 16
    config.augmentation.image_size = 224
    config.augmentation.crop_from = "image"
    config.augmentation.mean = (0.485, 0.456, 0.406)
    config.augmentation.std = (0.229, 0.224, 0.225)
    config.model.backbone = "resnet50"
    config.model.stem = "imagenet"
    config.model.zero_init_residual = True  # as in all published recipes; not JEVB's
    config.model.dtype = "bfloat16"
    config.ood.corruptions = ood.CORRUPTIONS
    return recipes.set_imagenet_method(config, method)
