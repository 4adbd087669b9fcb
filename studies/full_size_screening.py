"""Short runs at full size that choose a recipe: CIFAR-10, ResNet-18, bfloat16, 12 epochs each.

jevb-study studies/full_size_screening.py --out=runs/full_size_screening --num_processes=6

For one GPU with 80 GB; the runs share it. Reads `data/cifar10_train.npz` and `data/cifar10_test.npz`
(`images`, `labels`). Every choice is made by k-NN on the validation split.
"""

import math
from collections.abc import Callable
from typing import Any

from configs import cifar10
from jevb_study.spec import Comparison, Curves, Logged, Result, Study
from studies.changed_settings import accuracy_alone, changed

_ACCURACY = "10-NN accuracy"
_KNN = "validation/knn_10_uniform_accuracy"


def full_size_config(method: str) -> Any:
    """`configs/cifar10.py` for a method, from files; it saves no state on its way."""
    config: Any = cifar10.get_config(method)
    config.data.source = "arrays"
    config.data.train_paths = ("data/cifar10_train.npz",)
    config.data.test_paths = ("data/cifar10_test.npz",)
    config.checkpoint.every_steps = 0
    config.evaluation.compare_untrained = False
    return config


def run_config(method: str, **changes: Any) -> Any:
    """The config of a method in 12 epochs, with changes such as `train__batch_size=256`."""
    config = full_size_config(method)
    config.optimizer.warmup_epochs = 1.0
    config.train.num_epochs = 12
    config.train.knn_every_epochs = 4
    config.train.health_every_steps = 500
    config.evaluation.split = "validation"
    config.evaluation.knn_k = (20,)
    return changed(accuracy_alone(config), changes)


def get_runs(run_config: Callable[..., Any]) -> dict[str, Any]:
    """JEVB's optimizer, target and likelihood, one or two changes at a time; SimSiam beside it.

    Args:
      run_config: from a method and its changes to a config; `rehearsal` has a smaller one.

    Returns:
      Configs by name.
    """
    target: dict[str, Any] = {"optimizer__name": "adamw"}
    online: dict[str, Any] = {**target, "train__target_decay": 0.0}
    muon: dict[str, Any] = {"optimizer__name": "muon", "train__target_decay": 0.0}
    crops = {"augmentation__num_small_crops": 4}
    narrow = {"jevb__kl_weight": 0.1, "jevb__prior_scale": 1.0, "jevb__df": math.inf}
    return {
        "jevb": run_config("jevb", **online),
        "jevb_target": run_config("jevb", **target),
        "jevb_muon": run_config("jevb", **muon),
        "jevb_muon_target": run_config("jevb"),
        "jevb_sgd_0.5": run_config(
            "jevb",
            train__target_decay=0.0,
            optimizer__name="sgd",
            optimizer__learning_rate=0.5,
            optimizer__weight_decay=5e-4,
        ),
        "jevb_narrow": run_config("jevb", **online, **narrow),
        "jevb_crops": run_config("jevb", **online, **crops),
        "jevb_muon_0.005": run_config("jevb", **muon, optimizer__learning_rate=5e-3),
        "jevb_muon_0.0005": run_config("jevb", **muon, optimizer__learning_rate=5e-4),
        "jevb_muon_narrow": run_config("jevb", **muon, **narrow),
        "jevb_muon_crops": run_config("jevb", **muon, **crops),
        "simsiam_512": run_config("simsiam"),
        "simsiam_muon": run_config(
            "simsiam",
            optimizer__name="muon",
            train__batch_size=256,
            optimizer__learning_rate=2e-3,
            optimizer__weight_decay=1e-4,
        ),
    }


def make_study(title: str, runs: dict[str, Any]) -> Study:
    """The table and figures of the screening, for one seed of each run."""
    return Study(
        title=title,
        runs=runs,
        seeds=(0,),
        measures=(
            Result("linear accuracy", "linear_accuracy"),
            Result("20-NN accuracy", "knn_20_accuracy"),
            Logged(_ACCURACY, _KNN),
            Logged("effective rank", "health/effective_rank"),
            Logged("posterior scale", "health/posterior_scale_mean"),
            Logged("signal to noise", "health/posterior_signal_to_noise"),
        ),
        figures=(
            Comparison(
                "accuracy", "Accuracy at the end", tuple(runs), ("linear accuracy", _ACCURACY)
            ),
            Curves("curves", "k-NN accuracy on validation", tuple(runs), (_KNN,), over_views=True),
        ),
    )


def get_study() -> Study:
    """The runs at full size."""
    title = "Screening at full size: CIFAR-10, ResNet-18, 12 epochs, validation"
    return make_study(title, get_runs(run_config))
