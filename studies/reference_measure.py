"""The measure that a density of embeddings is taken over, and what it does to detection.

python -m studies.reference_measure --runs runs/cifar10_muon/runs/*/seed_* --out=runs/measure

The same density can be taken over the embedding `h`, or over its direction and radius `(u, r)`. As
`dh = r^(D - 1) dr du`, the two negative log-densities differ by `(D - 1) log r`. That is no constant, so
the two rank images differently. JEVB's likelihood is over direction and radius, a Mahalanobis distance
over the embedding. This study takes each of three densities over both, and the training mixture over
the direction alone too.
"""

import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jevb_jax import load
from jevb_jax.evaluation import gaussian_detectors, mixture_fit
from jevb_jax.evaluation.detection_metrics import ood_metrics
from jevb_jax.model import Model
from studies import measured_runs, own_scores

POLAR, EUCLIDEAN, DIRECTION = "direction and radius", "embedding", "direction"
FIELDS = ("run", "density", "measure", "near", "far", "std", "std of (D - 1) log r")


def over_embedding(score: np.ndarray, radius: np.ndarray, dim: int) -> np.ndarray:
    """A negative log-density over direction and radius, `[N]`, as one over the embedding."""
    return score + (dim - 1) * np.log(radius)


def over_direction_and_radius(score: np.ndarray, radius: np.ndarray, dim: int) -> np.ndarray:
    """A negative log-density over the embedding, `[N]`, as one over direction and radius."""
    return score - (dim - 1) * np.log(radius)


def _negative_log_densities(
    model: Model, images: dict[str, Any], embeddings: dict[str, np.ndarray]
) -> dict[str, tuple[str, dict[str, np.ndarray]]]:
    """By the name of the density: its own measure, and nats up to a constant, `[N]`, of each set."""
    dim = embeddings["train"].shape[1]
    half = jax.jit(lambda fitted, x: fitted(x) / 2)
    of_embedding = gaussian_detectors.fit_mahalanobis(embeddings["train"])
    of_direction = gaussian_detectors.fit_ssd(embeddings["train"])
    log_radius = {name: np.log(np.linalg.norm(h, axis=1)) for name, h in embeddings.items()}
    mean, std = log_radius["train"].mean(), log_radius["train"].std()

    def direction_and_radius(name: str) -> np.ndarray:
        # A Gaussian of log r is a density over r after division by r.
        radial = np.square((log_radius[name] - mean) / std) / 2 + log_radius[name]
        return np.asarray(half(of_direction, embeddings[name])) + radial

    posterior = model.posterior(images["train"])
    jevb = model.settings.jevb
    fit_mixture = functools.partial(
        mixture_fit.fit_training_mixture,
        posterior.mean,
        posterior.scale / math.sqrt(dim),  # in units of the sphere
        df=jevb.df,
        embedding=embeddings["train"],
    )
    radial_scale: Any = model.network.apply(model.variables, method=model.network.radial_scale)
    with_radius = fit_mixture(radial_scale=float(radial_scale), radial_df=jevb.radial_df)
    of_directions = fit_mixture()
    apply = jax.jit(lambda fitted, x: fitted(x))
    return {
        "Gaussian of the embedding": (
            EUCLIDEAN,
            {name: np.asarray(half(of_embedding, h)) for name, h in embeddings.items()},
        ),
        "Gaussians of direction and log radius": (
            POLAR,
            {name: direction_and_radius(name) for name in embeddings},
        ),
        "training mixture": (
            POLAR,
            {name: np.asarray(apply(with_radius, h)) for name, h in embeddings.items()},
        ),
        "training mixture without its radial part": (
            DIRECTION,
            {name: np.asarray(apply(of_directions, h)) for name, h in embeddings.items()},
        ),
    }


def measure(directory: str) -> list[dict[str, Any]]:
    """Rows of one run; AUROC of each set stands under its name, the spreads over test are in nats."""
    model = load(directory)
    images, groups = own_scores.read_images(model, directory)
    embeddings = {name: model.embed(x) for name, x in images.items()}
    radius = {name: np.linalg.norm(h, axis=1) for name, h in embeddings.items()}
    dim = embeddings["train"].shape[1]
    rows = []
    for density, (own, scores) in _negative_log_densities(model, images, embeddings).items():
        for taken_over in (DIRECTION,) if own == DIRECTION else (POLAR, EUCLIDEAN):
            convert = over_embedding if taken_over == EUCLIDEAN else over_direction_and_radius
            taken = scores
            if taken_over != own:
                taken = {name: convert(scores[name], radius[name], dim) for name in scores}
            rows.append(
                {
                    "run": "/".join(Path(directory).parts[-2:]),
                    "density": density,
                    "measure": taken_over,
                    **own_scores.group_means(taken, groups),
                    "std": float(taken["test"].std()),
                    "std of (D - 1) log r": float((dim - 1) * np.log(radius["test"]).std()),
                    **{name: ood_metrics(taken["test"], taken[name]).auroc for name in groups},
                }
            )
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    measured_runs.write_table(measure, FIELDS, "measure.csv", about=__doc__, arguments=arguments)


if __name__ == "__main__":
    main()
