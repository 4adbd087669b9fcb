"""Published heads, optimizers, schedules and augmentations of each method (`configs/cifar10.py:byol`).

Sources for CIFAR:

* SimSiam: Chen and He 2021, appendix D.
* BYOL, VICReg and Barlow Twins: solo-learn's `scripts/pretrain/cifar`, because their papers do not
  use CIFAR.
* EMP-SSL: Tong et al. 2023 (arXiv 2304.03977) and its official code, with 20 crops (the paper uses 20
  to 200).

Source for ImageNet: each paper and its official code. EMP-SSL's settings are those of its code for
CIFAR, which it uses for ImageNet-100 too.

FastSiam (Pototzky et al. 2022) is SimSiam with four views, batches of 32 and few epochs. We take 25
epochs, and SimSiam's learning rate in proportion to the batch. The latter is an assumption.

VI-SimSiam uses SimSiam's settings. This is an assumption, because there is no official code.

Three things differ from the sources. Weight decay is not applied to biases and BatchNorm (SimSiam's
code applies it). EMP-SSL's momentum is not Nesterov's. BYOL's predictor ends with a bias.
"""

from typing import Any

from ml_collections import ConfigDict

METHODS = (
    "jevb",
    "simsiam",
    "vi_simsiam",
    "byol",
    "vicreg",
    "barlow_twins",
    "fastsiam",
    "emp_ssl",
)


def _check(method: str) -> None:
    if method not in METHODS:
        raise ValueError(f"the config's argument must be one of {METHODS}, got {method!r}")


def _set_heads(
    config: Any, *, projector: tuple[int, ...], embedding: int, head: int, norm: bool
) -> None:
    config.model.projector_hidden_dims = projector
    config.model.embedding_dim = embedding
    config.model.head_hidden_dim = head
    config.model.projector_normalizes_output = norm
    config.model.head_input = "embedding"  # the published heads see the whole embedding


def _set_optimizer(
    config: Any, *, name: str, rate: float, decay: float, warmup: float, batch: int, epochs: int
) -> None:
    config.optimizer.name = name
    config.optimizer.learning_rate = rate
    config.optimizer.weight_decay = decay
    config.optimizer.warmup_epochs = warmup
    config.train.batch_size = batch
    config.train.num_epochs = epochs


def _set_fastsiam(config: Any, *, rate: float, decay: float) -> None:
    """SimSiam's rate for batches of 256, in proportion to the batch, and four views."""
    batch = 32
    _set_optimizer(
        config, name="sgd", rate=rate * batch / 256, decay=decay, warmup=0.0, batch=batch, epochs=25
    )
    config.augmentation.num_views = 4


def _set_emp_ssl(config: Any) -> None:
    """Many crops of a quarter of the image, and BatchNorm over all of them, as in the code."""
    _set_heads(config, projector=(4096, 4096), embedding=1024, head=1, norm=False)
    _set_optimizer(config, name="larc", rate=0.3, decay=1e-4, warmup=0.0, batch=100, epochs=30)
    config.optimizer.trust_coefficient = 0.005
    config.train.bn_over_views = True
    config.augmentation.num_views = 20
    config.augmentation.crop_scale = (0.25, 0.25)
    config.augmentation.crop_ratio = (1.0, 1.0)
    config.augmentation.hue = 0.2
    config.augmentation.blur_probability = (0.1, 0.1)
    config.augmentation.solarize_probability = (0.1, 0.1)


def set_cifar_method(config: Any, method: str) -> ConfigDict:
    """Sets a method and its published recipe for 32x32 images.

    Args:
      config: has data and backbone set; changed in place.
      method: one of `METHODS`; for "jevb" only the name is set.

    Returns:
      The config.

    Raises:
      ValueError: unknown method.
    """
    _check(method)
    config.method = method
    if method in ("simsiam", "vi_simsiam"):
        _set_heads(config, projector=(2048,), embedding=2048, head=512, norm=True)
        _set_optimizer(config, name="sgd", rate=0.06, decay=5e-4, warmup=0.0, batch=512, epochs=800)
    elif method == "fastsiam":
        _set_heads(config, projector=(2048,), embedding=2048, head=512, norm=True)
        _set_fastsiam(config, rate=0.03, decay=5e-4)
    elif method == "emp_ssl":
        _set_emp_ssl(config)
    elif method == "byol":
        _set_heads(config, projector=(4096,), embedding=256, head=4096, norm=False)
        _set_optimizer(
            config, name="larc", rate=1.0, decay=1e-5, warmup=10.0, batch=256, epochs=1000
        )
        config.train.target_decay = 0.99
    elif method in ("vicreg", "barlow_twins"):
        _set_heads(config, projector=(2048, 2048), embedding=2048, head=1, norm=False)
        _set_optimizer(
            config, name="larc", rate=0.3, decay=1e-4, warmup=10.0, batch=256, epochs=1000
        )
    if method in ("byol", "vicreg", "barlow_twins"):
        config.optimizer.trust_coefficient = 0.02
        config.augmentation.saturation = 0.2
    if method in ("byol", "barlow_twins"):
        config.augmentation.crop_scale = (0.08, 1.0)
        config.augmentation.solarize_probability = (0.0, 0.2)
    if method == "vicreg":
        config.augmentation.solarize_probability = (0.1, 0.1)
    if method == "barlow_twins":
        config.barlow_twins.loss_weight = 0.1
    return config


def set_imagenet_method(config: Any, method: str) -> ConfigDict:
    """Sets a method and its published recipe for ImageNet and ResNet-50.

    Args:
      config: has data and backbone set; changed in place.
      method: one of `METHODS`; "jevb" uses optimizer and start of `configs/cifar10.py`, and
        SimSiam's batch, length and augmentations.

    Returns:
      The config.

    Raises:
      ValueError: unknown method.
    """
    _check(method)
    config.method = method
    if method == "jevb":
        # As in cifar10.py: with SGD, the embeddings of a ResNet-18 fall into a few dimensions.
        _set_optimizer(
            config, name="muon", rate=2e-3, decay=1e-4, warmup=10.0, batch=512, epochs=100
        )
        config.augmentation.blur_probability = (0.5, 0.5)
        config.model.zero_init_residual = False
        config.train.target_decay = 0.99
        config.ood.default_score = "representation/ssd_1"
        return config
    if method in ("simsiam", "vi_simsiam"):
        _set_heads(config, projector=(2048, 2048), embedding=2048, head=512, norm=True)
        _set_optimizer(config, name="sgd", rate=0.1, decay=1e-4, warmup=0.0, batch=512, epochs=100)
        config.augmentation.blur_probability = (0.5, 0.5)
        config.optimizer.constant_head_rate = True
        return config
    if method == "fastsiam":
        _set_heads(config, projector=(2048, 2048), embedding=2048, head=512, norm=True)
        _set_fastsiam(config, rate=0.05, decay=1e-4)
        config.augmentation.blur_probability = (0.5, 0.5)
        config.optimizer.constant_head_rate = True
        return config
    if method == "emp_ssl":
        _set_emp_ssl(config)
        return config
    if method == "byol":
        _set_heads(config, projector=(4096,), embedding=256, head=4096, norm=False)
        _set_optimizer(
            config, name="lars", rate=3.2, decay=1.5e-6, warmup=10.0, batch=4096, epochs=1000
        )
        config.train.target_decay = 0.996
    else:
        _set_heads(config, projector=(8192, 8192), embedding=8192, head=1, norm=False)
        _set_optimizer(
            config, name="lars", rate=1.6, decay=1e-6, warmup=10.0, batch=2048, epochs=1000
        )
        config.optimizer.final_learning_rate = 1.6e-3
    if method == "barlow_twins":
        config.optimizer.bias_rate_factor = 0.0048 / 0.2
    config.augmentation.crop_scale = (0.08, 1.0)
    config.augmentation.interpolation = "bicubic"
    config.augmentation.saturation = 0.2
    config.augmentation.blur_probability = (1.0, 0.1)
    config.augmentation.solarize_probability = (0.0, 0.2)
    return config
