"""A run of 40 steps on drawn images, to test that everything works; compiling takes the longest.

python train.py --config=configs/smoke.py --workdir=/tmp/smoke
"""

from typing import Any

from ml_collections import ConfigDict

from jevb_jax.configs import default


def get_config() -> ConfigDict:
    """Returns the settings."""
    config: Any = default.get_config()
    config.data.source = "shapes"
    config.data.image_size = 16
    config.data.num_train_examples = 640
    config.data.num_test_examples = 200
    config.data.validation_fraction = 0.2
    config.augmentation.image_size = 16
    config.model.backbone = "convnet"
    config.model.width = 4
    config.model.projector_hidden_dims = (32,)
    config.model.embedding_dim = 16
    config.model.head_hidden_dim = 16
    config.optimizer.name = "adamw"
    config.optimizer.learning_rate = 2e-3
    config.optimizer.warmup_epochs = 1.0
    config.train.batch_size = 64
    config.train.num_epochs = 4
    config.train.log_every_steps = 1
    config.train.health_every_steps = 20
    config.checkpoint.every_steps = 10
    config.evaluation.knn_k = (20,)
    config.evaluation.l2_grid = (1e-3, 1e-2)
    config.evaluation.few_label_seeds = 2
    config.evaluation.compare_untrained = False
    config.ood.corruptions = ("contrast", "patch_shuffle")
    config.ood.severities = (3, 5)
    config.ood.num_views = 2
    config.ood.num_samples = 2
    config.ood.ssd_clusters = (1,)
    config.ood.num_bootstrap = 20
    return config
