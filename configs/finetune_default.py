"""Every setting of a supervised fine-tune, once. Other `finetune_*.py` differ from this one.

A linear classifier on a trained encoder's representation, learned by cross-entropy, with the encoder
(`full`) or without it (`frozen`).
"""

from typing import Any

from ml_collections import ConfigDict

from configs import default


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
            "step": -1,  # of the run's checkpoint; -1 = the latest
            "frozen": is_frozen,  # the encoder and its BatchNorm stay as they are
        }
    )
    config.data = whole.data  # `num_train_examples` makes it a fine-tune on few labels
    config.input = whole.input
    # Size, mean and standard deviation are those that the encoder was trained with.
    config.augmentation = ConfigDict(
        {
            # A frozen encoder sees whole images, as it does when it is asked: on digits crops cost its
            # classifier 0.05 of validation accuracy.
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
