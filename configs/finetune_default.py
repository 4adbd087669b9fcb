"""The default of every setting of supervised fine-tuning. Other `finetune_*.py` change some values.

Fine-tuning trains a linear classifier on the representation of a trained encoder, with cross-entropy.
`full` also trains the encoder; `frozen` leaves it unchanged.
"""

from typing import Any

from ml_collections import ConfigDict

from jevb_jax.configs import default


def get_config(mode: str = "full") -> ConfigDict:
    """Returns the default settings; `mode` is "full" or "frozen"."""
    if mode not in ("full", "frozen"):
        raise ValueError(f"the config's argument must be full or frozen, got {mode!r}")
    is_frozen = mode == "frozen"
    whole: Any = default.get_config()
    config = ConfigDict()
    config.seed = 0
    config.init = ConfigDict(
        {
            "workdir": "",  # a run of train.py, or an export
            "step": -1,  # step of the run's checkpoint; -1 = the latest
            "frozen": is_frozen,  # True leaves the encoder and its BatchNorm unchanged
        }
    )
    config.data = whole.data  # set `num_train_examples` to fine-tune on few labels
    config.input = whole.input
    # Size, mean and standard deviation are those of the encoder's training.
    config.augmentation = ConfigDict(
        {
            # A frozen encoder sees whole images in training, as in evaluation. With crops, its
            # classifier lost 0.05 of validation accuracy on digits.
            "crop_scale": (1.0, 1.0) if is_frozen else (0.5, 1.0),
            "crop_ratio": (1.0, 1.0) if is_frozen else (3 / 4, 4 / 3),
            "flip_probability": 0.5,
        }
    )
    config.optimizer = whole.optimizer
    config.optimizer.name = "adamw"
    config.optimizer.learning_rate = 1e-2 if is_frozen else 1e-3
    config.optimizer.weight_decay = 1e-2
    config.optimizer.warmup_epochs = 1.0
    config.train = ConfigDict(
        {
            "batch_size": 128,  # images a step, over all devices
            "num_epochs": 100 if is_frozen else 20,
            "steps_per_dispatch": 0,  # steps in one compiled call (0 = 1 on the CPU, else 10)
            "log_every_steps": 10,  # 0 = the last step alone
            "writers": ("auto",),  # as in default.py
        }
    )
    config.checkpoint = ConfigDict(
        {
            # A save beside those of the epochs that are the best so far. After a kill, the same command
            # goes on from the latest of them all.
            "every_epochs": 10 if is_frozen else 1,
            "keep_latest": 2,  # at least 2, so that a damaged one has a predecessor
        }
    )
    config.evaluation = ConfigDict({"batch_size": 512})
    return config
