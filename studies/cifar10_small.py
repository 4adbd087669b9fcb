"""The CPU version of the study: 10,000 CIFAR-10 images at 16 pixels, ResNet-8, 8 epochs, AdamW.

jevb-study studies/cifar10_small.py --out=runs/cifar10_small --num_processes=2

Reads `data/cifar10_train.npz` and `data/cifar10_test.npz` (`images`, `labels`). Encoder, optimizer,
schedule, augmentation and epochs are the same for every method. Each method has its own heads, scaled
down. Choices are made on the validation split, so this study reports validation numbers.
"""

import math
from typing import Any

from configs import cifar10
from jevb_study.spec import Comparison, Curves, Logged, Result, Study, Sweep
from studies.changed_settings import changed

DFS = (1.0, 3.0, 5.0, 10.0, 30.0, 100.0, 1e3, 1e4, math.inf)
METHODS = ("jevb", "simsiam", "vi_simsiam", "byol", "vicreg", "barlow_twins")
ACCURACIES = ("linear accuracy", "20-NN accuracy")
MEASURES = (
    Result("linear accuracy", "linear_accuracy"),
    Result("20-NN accuracy", "knn_20_accuracy"),
    Logged("effective rank", "health/effective_rank"),
    Logged("embedding std", "health/embedding_std"),
    Logged("KL per dimension, nats", "health/posterior_kl_per_dimension"),
    Logged("posterior scale", "health/posterior_scale_mean"),
    Logged("signal to noise", "health/posterior_signal_to_noise"),
    Logged("Q/df", "health/pair_residual_over_df"),
    Logged("effective pairs", "health/pair_effective_pairs"),
)


def method_config(method: str, **changes: Any) -> Any:
    """The recipe of the study for a method, with changes such as `jevb__df=5.0`."""
    config: Any = cifar10.get_config(method)
    jevb: Any = cifar10.get_config("jevb")
    config.data.source = "arrays"
    config.data.train_paths = ("data/cifar10_train.npz",)
    config.data.test_paths = ("data/cifar10_test.npz",)
    config.data.num_train_examples = 10_000
    config.augmentation = jevb.augmentation
    config.augmentation.image_size = 16
    config.model.backbone = "resnet8"
    config.model.width = 16
    # The published tables were made with these two settings.
    config.model.zero_init_residual = True
    config.model.head_input = "embedding"
    config.model.dtype = "float32"
    config.model.projector_hidden_dims = (256,)
    config.model.embedding_dim = 128
    config.model.head_hidden_dim = 128
    config.jevb.kl_weight = 1.0  # the bound itself, unless a run changes it
    config.jevb.prior_scale = 2.0 if method == "jevb" else 1.0  # chosen in `cifar10_small_scale`
    if method in ("simsiam", "vi_simsiam"):
        config.model.head_hidden_dim = 32  # a quarter of the width, as published
    if method in ("vicreg", "barlow_twins"):
        config.model.projector_hidden_dims = (256, 256)
        config.model.embedding_dim = 256
        config.barlow_twins.loss_weight = 1.0  # has no effect with AdamW
    config.train.target_decay = 0.0
    if method == "byol":
        config.model.head_hidden_dim = 256
        config.train.target_decay = 0.95  # published: 0.99 or more for 100 times as many steps
    config.optimizer = jevb.optimizer
    config.optimizer.name = "adamw"
    config.optimizer.learning_rate = 2e-3
    config.optimizer.weight_decay = 1e-4
    config.optimizer.warmup_epochs = 1.0
    config.train.batch_size = 128
    config.train.num_epochs = 8
    config.train.health_every_steps = 78
    config.train.health_pairs = method == "jevb"
    config.checkpoint.every_steps = 0
    config.evaluation.split = "validation"
    config.evaluation.knn_k = (20,)
    config.evaluation.l2_grid = (1e-4, 1e-3, 1e-2)
    config.evaluation.labels_per_class = 0
    config.ood.corruptions = ()
    config.evaluation.compare_untrained = False
    return changed(config, changes)


def df_name(df: float) -> str:
    """Name of the run with `df` degrees of freedom."""
    return "jevb" if df == 5.0 else f"df_{df:g}"


def get_study() -> Study:
    """The methods and the degrees of freedom."""
    runs: dict[str, Any] = {method: method_config(method) for method in METHODS}
    runs["prior_1"] = method_config("jevb", jevb__prior_scale=1.0)
    # The best cell of `cifar10_small_scale` (one seed there), and one that changes only its df.
    low_kl = {"jevb__prior_scale": 1.0, "jevb__kl_weight": 0.1}
    runs["kl_0.1_prior_1"] = method_config("jevb", **low_kl)
    runs["kl_0.1_prior_1_df_inf"] = method_config("jevb", **low_kl, jevb__df=math.inf)
    runs |= {df_name(df): method_config("jevb", jevb__df=df) for df in DFS if df != 5.0}
    limit = ("jevb", "df_30", "df_1000", "df_inf", "simsiam")
    return Study(
        title="CIFAR-10, 10,000 images at 16 pixels, ResNet-8, 8 epochs",
        runs=runs,
        seeds=(0, 1, 2),
        measures=MEASURES,
        figures=(
            Comparison(
                "methods",
                "JEVB and related methods",
                (*METHODS, "prior_1"),
                (*ACCURACIES, "effective rank"),
            ),
            Comparison(
                "kl_weight",
                "A lower weight of the KL, heavy tail and Gaussian",
                ("jevb", "df_inf", "prior_1", "kl_0.1_prior_1", "kl_0.1_prior_1_df_inf"),
                (*ACCURACIES, "effective rank"),
            ),
            Sweep(
                "df",
                "Degrees of freedom: a heavy tail against the Gaussian limit",
                "df",
                {df: df_name(df) for df in DFS},
                (*ACCURACIES, "effective rank"),
                log_x=True,
                references=("simsiam",),
            ),
            Curves(
                "gaussian_limit",
                "Towards the Gaussian limit",
                limit,
                ("health/effective_rank", "health/embedding_std", "train/gradient_norm"),
            ),
            Curves(
                "mechanism",
                "What the directional term sees",
                ("jevb", "prior_1", "df_1", "df_30", "df_inf"),
                (
                    "health/posterior_signal_to_noise",
                    "health/pair_residual_over_df",
                    "health/pair_effective_pairs",
                ),
                log_y=True,
            ),
            Curves(
                "gradients",
                "How hard each term pulls at the encoder",
                ("jevb", "prior_1", "df_1", "df_inf"),
                (
                    "health/gradient_directional_log_likelihood",
                    "health/gradient_radial_log_likelihood",
                    "health/gradient_kl",
                ),
                log_y=True,
            ),
        ),
    )
