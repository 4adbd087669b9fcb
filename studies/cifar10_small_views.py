"""Two views against many at equal compute: the recipe of `cifar10_small`.

jevb-study studies/cifar10_small_views.py --out=runs/cifar10_small_views

With twice the views of an image, a step has half the images, and the run half the epochs. So all runs
see as many views in as many steps. Runs with `small_crops` have two full views and eight small crops
of a quarter of the pixels, which cost as much as two more full views. In `enlarged` runs, the same
crops are as large as a full view, and the run costs two and a half times as much. Features are those
of the whole image; EMP-SSL's paper averages them over crops.
"""

from typing import Any

from jevb_study.spec import Comparison, Curves, Logged, Result, Study
from studies import cifar10_small

METHODS = ("jevb", "simsiam", "fastsiam", "emp_ssl")
NUM_VIEWS = (2, 4, 8)
NUM_SMALL_CROPS = 8
# Of two views: images of a step, and epochs.
BATCH_SIZE = 128
NUM_EPOCHS = 8

_KNN = "validation/knn_20_accuracy"


def run_config(method: str, *, share: int, **changes: Any) -> Any:
    """A run of a `share`-th of the images a step and of the epochs."""
    config = cifar10_small.method_config(method)
    config.augmentation.num_views = 2
    # What `cifar10_small` does not set, because its methods are others.
    config.model.projector_hidden_dims = (256,)
    config.model.embedding_dim = 128
    config.model.head_hidden_dim = 32 if method in ("simsiam", "fastsiam") else 128
    config.model.zero_init_residual = False
    config.model.head_input = "direction"
    config.train.batch_size = BATCH_SIZE // share
    config.train.num_epochs = NUM_EPOCHS // share
    config.train.knn_every_epochs = 1
    config.train.health_pairs = False
    config.optimizer.warmup_epochs = 1 / share
    for key, value in changes.items():
        config.augmentation[key] = value
    return config


def get_runs() -> dict[str, Any]:
    """Every run, by name."""
    runs: dict[str, Any] = {
        f"{method}_{views}": run_config(method, share=views // 2, num_views=views)
        for views in NUM_VIEWS
        for method in METHODS
    }
    for method in ("jevb", "simsiam"):
        crops: dict[str, Any] = {"num_small_crops": NUM_SMALL_CROPS}
        # Eight crops of a quarter of the pixels are two views more.
        runs[f"{method}_small_crops"] = run_config(method, share=2, **crops, small_crop_size=8)
        runs[f"{method}_enlarged"] = run_config(method, share=2, **crops, small_crop_size=16)
    return runs


def get_study() -> Study:
    """The runs above, three seeds of each."""
    runs = get_runs()
    return Study(
        title="Many views: CIFAR-10, 10,000 images at 16 pixels, ResNet-8, equal compute",
        runs=runs,
        seeds=(0, 1, 2),
        measures=(
            Result("linear accuracy", "linear_accuracy"),
            Result("20-NN accuracy", "knn_20_accuracy"),
            Logged("effective rank", "health/effective_rank"),
            Logged("posterior scale", "health/posterior_scale_mean"),
        ),
        figures=(
            Comparison(
                "views",
                "Accuracy by the number of views of an image",
                tuple(runs),
                ("linear accuracy", "20-NN accuracy", "effective rank"),
            ),
            Curves(
                "curves",
                "k-NN accuracy on validation, two views and eight",
                tuple(f"{method}_{views}" for views in (2, 8) for method in METHODS),
                (_KNN,),
                over_views=True,
            ),
        ),
    )
