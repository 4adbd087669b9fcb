"""JEVB on scikit-learn's bundled 8x8 digits: real images, no download, minutes on a CPU.

python train.py --config=configs/digits.py --workdir=runs/digits
"""

from typing import Any

from ml_collections import ConfigDict

from jevb_jax.configs import default


def get_config() -> ConfigDict:
    """Returns the settings."""
    config: Any = default.get_config()
    config.data.source = "digits"

    # Gray 8x8 digits: no mirror images (a mirrored 2 is not a 2) and no color.
    config.augmentation.image_size = 8
    config.augmentation.crop_scale = (0.4, 1.0)
    config.augmentation.flip_probability = 0.0
    config.augmentation.saturation = 0.0
    config.augmentation.hue = 0.0
    config.augmentation.grayscale_probability = 0.0
    config.augmentation.mean = (0.3053,)
    config.augmentation.std = (0.3761,)

    config.model.backbone = "convnet"
    config.model.width = 16
    config.model.projector_hidden_dims = (256, 256)
    config.model.embedding_dim = 64
    config.model.head_hidden_dim = 128

    config.optimizer.name = "adamw"
    config.optimizer.learning_rate = 2e-3
    config.optimizer.weight_decay = 1e-2
    config.optimizer.warmup_epochs = 5.0

    config.train.batch_size = 128
    config.train.num_epochs = 150
    config.train.health_every_steps = 250
    config.checkpoint.every_steps = 500
    config.evaluation.knn_k = (20, 200)
    config.ood.corruptions = ("contrast", "gaussian_noise", "patch_shuffle", "rotation")
    return config
