"""JEVB on features of a frozen encoder, for example of DINOv2 or CLIP; minutes on a CPU.

python train.py --config=configs/features.py --workdir=runs/features \
    --config.data.train_paths="('train.npz',)" --config.data.test_paths="('test.npz',)"

The files hold `features`, float32 `[N, F]` or `[N, V, F]`, and may hold `labels` (docs/features.md).
"""

from typing import Any

from ml_collections import ConfigDict

from jevb_jax.configs import default


def get_config() -> ConfigDict:
    """Returns the settings."""
    config: Any = default.get_config()
    config.data.source = "features"
    config.model.backbone = "identity"
    config.model.projector_hidden_dims = (512,)
    config.model.embedding_dim = 64
    config.model.head_hidden_dim = 128

    config.optimizer.name = "adamw"
    config.optimizer.learning_rate = 2e-3
    config.optimizer.weight_decay = 1e-2
    config.optimizer.warmup_epochs = 1.0

    config.train.batch_size = 256
    config.train.num_epochs = 15
    config.train.steps_per_dispatch = 10  # no convolutions, so a loop is fast on a CPU too
    config.ood.num_bootstrap = 20
    return config
