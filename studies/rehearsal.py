"""The runs of `full_size_screening` on a CPU: narrower networks at 16 pixels, all training images.

jevb-study studies/rehearsal.py --out=runs/rehearsal

The optimizer, batch size, schedule and likelihood are those of full size. The network is ResNet-18 with
a quarter of its width and heads a quarter as wide. A run takes 75 minutes on one core of a busy
machine. At 32 pixels it would take about four times as long.
"""

from typing import Any

from jevb_study.spec import Study
from studies import full_size_screening


def run_config(method: str, **changes: Any) -> Any:
    """A run of the screening, small, with k-NN accuracy after every epoch."""
    config = full_size_screening.run_config(method, **changes)
    config.augmentation.image_size = 16
    config.augmentation.small_crop_size = 8
    config.model.width = 16
    config.model.dtype = "float32"
    config.model.projector_hidden_dims = tuple(
        dim // 4 for dim in config.model.projector_hidden_dims
    )
    config.model.embedding_dim //= 4
    config.model.head_hidden_dim //= 4
    config.train.num_epochs = 10
    config.train.knn_every_epochs = 1
    config.train.health_every_steps = 250
    config.checkpoint.every_steps = 200
    return config


def get_study() -> Study:
    """The same runs as at full size, small."""
    title = "Rehearsal: CIFAR-10 at 16 pixels, ResNet-18 of width 16, 10 epochs, validation"
    return full_size_screening.make_study(title, full_size_screening.get_runs(run_config))
