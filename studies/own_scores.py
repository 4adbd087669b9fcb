"""Variants of JEVB's own scores: two-sided terms, and other kernels of the training mixture.

python -m studies.own_scores --runs runs/u/direction/seed_0 --out=runs/own_scores

It reads trained runs of `studies/cifar10_uncertainty.py` and answers two questions of docs/ood.md:

* Does a two-sided score detect better, `|score - median of training images|`? The center comes from
  training images only, so no outside image is read before the score is fixed.
* Which part of the mixture matters: its bandwidth, the degrees of freedom of its kernels, or that scales
  differ between features? For each kernel, the leave-one-out likelihood chooses the bandwidth.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jevb_jax import load
from jevb_jax.evaluation import detection, mixture_fit, outside_sets
from jevb_jax.evaluation.detection_metrics import ood_metrics
from jevb_jax.images import batches
from jevb_jax.images.dataset import load_dataset
from jevb_jax.model import Model
from jevb_jax.paper import mass
from studies import cifar10_uncertainty, measured_runs

# Number of training images to fit to, and number of test images.
NUM_FITTED, NUM_TEST = 6000, 2500
TERMS = (
    "negative_log_likelihood",
    "directional",
    "radial",
    "kl",
    "posterior_entropy",
    "cross_view",
)
KERNEL_DFS = (1.0, 5.0, math.inf)
FIELDS: tuple[str, ...] = ("run", "score", "bandwidth", "leave_one_out", "near", "far")


def group_means(scores: Mapping[str, np.ndarray], groups: Mapping[str, str]) -> dict[str, float]:
    """Mean AUROC over the outside sets of each group.

    Args:
      scores: `[N]` for the set "test" and for every outside set.
      groups: group of each outside set, by name.
    """
    found: dict[str, list[float]] = {}
    for name, group in groups.items():
        found.setdefault(group, []).append(ood_metrics(scores["test"], scores[name]).auroc)
    return {group: float(np.mean(values)) for group, values in found.items()}


def two_sided(scores: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Distances from the median of the set "train"."""
    center = np.median(scores["train"])
    return {name: np.abs(values - center) for name, values in scores.items()}


def _term_rows(
    loaded: Model, images: Mapping[str, Any], groups: Mapping[str, str]
) -> list[dict[str, Any]]:
    rows = []
    for term in TERMS:
        name = f"jevb/{term}"
        if name not in loaded.score_names():
            continue
        scores = {part: loaded.ood_score(x, name) for part, x in images.items()}
        rows.append({"score": name, **group_means(scores, groups)})
        rows.append({"score": f"{name}, two-sided", **group_means(two_sided(scores), groups)})
    return rows


def _mixture_rows(
    loaded: Model, images: Mapping[str, Any], groups: Mapping[str, str]
) -> list[dict[str, Any]]:
    embeddings = {part: loaded.embed(x) for part, x in images.items()}
    posterior = loaded.posterior(images["train"])
    dim = posterior.mean.shape[1]
    # `likelihood_scale` in units of the sphere.
    own_scale = posterior.scale / math.sqrt(dim)
    one_scale = np.full_like(own_scale, np.sqrt(np.mean(np.square(own_scale))))
    uniform = mass.uniform_log_prob(dim)
    apply = jax.jit(lambda fitted, x: fitted(x))
    rows = []
    for df in KERNEL_DFS:
        for label, scale in (("own scales", own_scale), ("one scale for all", one_scale)):
            choice = mixture_fit.choose_bandwidth(
                posterior.mean, scale, embeddings["train"], df=df, num_queries=1000
            )
            fitted = mixture_fit.fit_training_mixture(
                posterior.mean, scale, df=df, bandwidth=choice.bandwidth
            )
            scores = {part: np.asarray(apply(fitted, x)) for part, x in embeddings.items()}
            rows.append(
                {
                    "score": f"mixture, df {df:g}, {label}",
                    "bandwidth": choice.bandwidth,
                    "leave_one_out": choice.log_likelihood - uniform,
                    **group_means(scores, groups),
                }
            )
    return rows


def read_images(loaded: Model, directory: str) -> tuple[dict[str, Any], dict[str, str]]:
    """Images of the sets "train", "test" and every outside set, and the group of each outside set.

    Raises:
      ValueError: the run has no test images.
    """
    dataset = load_dataset(**loaded.config["data"])
    if dataset.test is None:
        raise ValueError(f"{directory} was trained without test images, which are the inside set")
    rows = detection.fit_rows(len(dataset.train), NUM_FITTED)
    images: dict[str, Any] = {
        "train": batches.gather(dataset.train, rows),
        "test": batches.gather(dataset.test, np.arange(min(NUM_TEST, len(dataset.test)))),
    }
    groups = {}
    for described in cifar10_uncertainty.run_config("jevb").ood.outside:
        outside = outside_sets.load_outside_set(**described)
        images[outside.name] = batches.load_resident(outside.source)
        groups[outside.name] = outside.group
    return images, groups


def measure(directory: str) -> list[dict[str, Any]]:
    """Rows of one run; `leave_one_out` is in nats above the uniform density."""
    loaded = load(directory)
    images, groups = read_images(loaded, directory)
    plain: list[dict[str, Any]] = []
    for name in ("jevb/mixture_and_residual", "embedding/mahalanobis"):
        scores = {
            part: loaded.ood_score(x, name, fit_images=images["train"])
            for part, x in images.items()
        }
        plain.append({"score": name, **group_means(scores, groups)})
    found = plain + _term_rows(loaded, images, groups) + _mixture_rows(loaded, images, groups)
    return [{"run": "/".join(Path(directory).parts[-2:]), **row} for row in found]


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    measured_runs.write_table(measure, FIELDS, "own_scores.csv", about=__doc__, arguments=arguments)


if __name__ == "__main__":
    main()
