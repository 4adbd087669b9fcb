"""Five pictures of JEVB: it learns digits and estimates its uncertainty. Takes minutes on a CPU.

python -m examples.story --out=runs/story

Trains on scikit-learn's bundled digits (no download) and writes into `--out`:

* `1_views.png`: images, and below them the two augmented views that training compares;
* `2_training.png`: the loss, its terms, and the signs of collapse;
* `3_map.png`: the embedding before and after training; each point is drawn as its digit;
* `4_uncertainty.png`: three scores as functions of the severity of corruptions;
* `5_detection.png`: scores of digits and of other images.

The run is in `--out`/run. The same command resumes it, or draws again if it is finished.
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from configs import digits
from configs.ood import outside_set
from jevb_jax import commands
from jevb_jax.evaluation.detection import OODEvaluation
from jevb_jax.evaluation.evaluate import Evaluation, evaluate_variables, make_extractors
from jevb_jax.evaluation.evidence import embedding_map
from jevb_jax.images import batches, corruptions
from jevb_jax.images import shapes as shapes_module
from jevb_jax.report import figures
from jevb_jax.runs.checkpoints import Checkpointer
from jevb_jax.training.experiment import Experiment, build_experiment

SEVERITIES = (1, 3, 5)
CORRUPTIONS = ("crop", "rotation", "gaussian_noise", "contrast")
SCORES = ("jevb/posterior_entropy", "jevb/cross_view", "jevb/scale_mahalanobis")
DETECTORS = ("jevb/negative_elbo", "jevb/scale_mahalanobis", "embedding/mahalanobis")
NUM_SHAPES = 300


def story_config(num_epochs: int) -> Any:
    """The digits config with a shorter schedule and a smaller evaluation."""
    config: Any = digits.get_config()
    config.train.num_epochs = num_epochs
    config.optimizer.warmup_epochs = min(5.0, num_epochs / 4)
    config.train.health_every_steps = 50
    config.evaluation.labels_per_class = 0
    config.evaluation.compare_untrained = False
    config.evaluation.knn_k = (20,)
    config.evaluation.l2_grid = (1e-2,)
    config.ood.corruptions = ()
    return config


def save_grey_shapes(path: Path) -> None:
    """Saves outside images: procedural gray shapes with the size of the digits."""
    images = batches.gather(
        shapes_module.shapes(NUM_SHAPES, seed=0, image_size=8), np.arange(NUM_SHAPES)
    )
    np.savez(path, images=images.mean(axis=-1, keepdims=True).round().astype(np.uint8))


def evaluate(config: Any, out: Path) -> tuple[Experiment, Evaluation, np.ndarray]:
    """Evaluates the trained encoder; also returns the untrained embedding of the test images."""
    shapes_path = out / "grey_shapes.npz"
    save_grey_shapes(shapes_path)
    shapes = outside_set("shapes", "far", "arrays", paths=(str(shapes_path),))
    config.ood.outside = (shapes,)
    config.ood.corruptions = CORRUPTIONS
    config.ood.severities = SEVERITIES
    config.ood.num_views = 2
    config.ood.ssd_clusters = (1,)
    config.ood.num_bootstrap = 2  # no intervals are drawn
    experiment = build_experiment(config)
    initial = experiment.initial_state()
    checkpointer = Checkpointer(out / "run" / "checkpoints")
    try:
        restored = checkpointer.restore_latest(initial)
    finally:
        checkpointer.close()
    if restored is None:
        raise FileNotFoundError(f"{out}/run holds no checkpoint: was the run stopped at its start?")
    extractors = make_extractors(experiment)
    found = evaluate_variables(experiment, restored[1].evaluation_variables, extractors)
    source = experiment.dataset.test
    if source is None:
        raise ValueError("the digits have a test split")
    return experiment, found, extractors.plain(initial.evaluation_variables, source).embedding


def accuracy(evaluation: Evaluation) -> float:
    """20-NN accuracy of the representation."""
    wanted = ("knn_20_accuracy", "representation")
    return next(r["value"] for r in evaluation.results if (r["name"], r["features"]) == wanted)


def draw_map(path: Path, before: np.ndarray, after: Evaluation) -> None:
    """Draws maps of both embeddings; each image is drawn as its digit."""
    figure = Figure(figsize=(11, 5.4), layout="constrained")
    labels = after.test.labels
    if labels is None:
        raise ValueError("digits have labels")
    panels = zip(figure.subplots(1, 2), ("before training", "after training"), strict=True)
    for (axis, name), embedding in zip(panels, (before, after.test.embedding), strict=True):
        points = embedding_map(embedding)
        axis.set_xlim(points[:, 0].min() - 0.05, points[:, 0].max() + 0.05)
        axis.set_ylim(points[:, 1].min() - 0.05, points[:, 1].max() + 0.05)
        for (x, y), label in zip(points, labels, strict=True):
            axis.text(x, y, str(label), fontsize=7, ha="center", va="center", clip_on=True)
        axis.set_title(f"embedding {name}")
        axis.set_xlabel("first principal component of the directions")
        axis.set_ylabel("second")
    figure.suptitle(f"No label was used. Test images; 20-NN accuracy after: {accuracy(after):.3f}")
    figure.savefig(path, dpi=110)


def draw_uncertainty(path: Path, experiment: Experiment, found: OODEvaluation) -> None:
    """Draws one digit at every severity, and below it the mean scores.

    The unit of a score is its standard deviation over clean images.
    """
    source = experiment.dataset.test
    if source is None:
        raise ValueError("the digits have a test split")
    severities = (0, *SEVERITIES)
    figure = Figure(figsize=(13, 5.6), layout="constrained")
    grid = figure.add_gridspec(2, len(CORRUPTIONS), height_ratios=(1, 4))
    shared = None
    for column, name in enumerate(CORRUPTIONS):
        images = [source[0]] + [
            corruptions.corrupt(source[0][None], name, severity=level, seed=0)[0]
            for level in severities[1:]
        ]
        strip = figure.add_subplot(grid[0, column])
        strip.imshow(
            np.concatenate([i[..., 0] for i in images], axis=1), cmap="gray", vmin=0, vmax=255
        )
        strip.set_xticks([8 * i + 3.5 for i in range(len(images))], [str(s) for s in severities])
        strip.set_yticks([])
        strip.set_title(name.replace("_", " "))
        axis = figure.add_subplot(grid[1, column], sharey=shared)
        shared = shared or axis
        for index, score in enumerate(SCORES):
            clean = found.inside[score]
            means = [clean.mean()] + [
                found.outside[f"{name}_{level}"][score].mean() for level in severities[1:]
            ]
            style = {**figures.line_style(index), "marker": "os^"[index], "markevery": 1}
            axis.plot(
                severities, (np.array(means) - clean.mean()) / clean.std(), label=score, **style
            )
        axis.axhline(0, color="0.8", lw=1, zorder=0)
        axis.set_xlabel("severity")
    if shared is not None:
        shared.set_ylabel("mean score, standard deviations\nof clean images; up = less certain")
        shared.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def draw_detection(path: Path, found: OODEvaluation) -> None:
    """Draws histograms of three scores: test digits against shapes and rotated digits."""
    sets = ("shapes", "rotation_5")
    aurocs = {(r.score, r.outside): r.metrics.auroc for r in found.results}
    figure = Figure(figsize=(13, 4.6), layout="constrained")
    for axis, score in zip(figure.subplots(1, len(DETECTORS)), DETECTORS, strict=True):
        values = [found.inside[score], *(found.outside[name][score] for name in sets)]
        # Outside scores have long tails, so the last bin includes all larger scores.
        low = min(v.min() for v in values)
        high = max(np.quantile(v, 0.95) for v in values)
        edges = np.linspace(low, high, 41)
        shares = [np.full(len(v), 1 / len(v)) for v in values]
        axis.hist(
            np.clip(values[0], low, high),
            edges,
            weights=shares[0],
            color="0.75",
            label="test digits",
        )
        for index, name in enumerate(sets):
            axis.hist(
                np.clip(values[index + 1], low, high),
                edges,
                weights=shares[index + 1],
                histtype="step",
                color="black",
                linestyle=("-", ":")[index],
                lw=1.4,
                label=f"{name.replace('_', ', severity ')}: AUROC {aurocs[score, name]:.3f}",
            )
        axis.set_title(score)
        axis.set_xlabel("score; larger = more out of distribution")
        axis.set_ylabel("share of images")
        axis.legend(
            fontsize=8, ncols=2, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.14)
        )
    figure.savefig(path, dpi=110)


def tell(out: Path, *, num_epochs: int) -> None:
    """Trains, evaluates and draws.

    Args:
      out: directory of the pictures and the run; made if it does not exist.
      num_epochs: epochs over the training split of 1,294 images.
    """
    started = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    config = story_config(num_epochs)
    if not commands.train(config, out / "run"):
        return  # a signal stopped the run; the same command continues it
    (out / "1_views.png").write_bytes((out / "run" / "views.png").read_bytes())
    (out / "2_training.png").write_bytes((out / "run" / "curves.png").read_bytes())
    experiment, evaluation, before = evaluate(config, out)
    if evaluation.ood is None:
        raise ValueError("the config has sets to detect")
    draw_map(out / "3_map.png", before, evaluation)
    draw_uncertainty(out / "4_uncertainty.png", experiment, evaluation.ood)
    draw_detection(out / "5_detection.png", evaluation.ood)
    print(f"{out}: five pictures in {time.monotonic() - started:.0f} s")


def main(argv: Sequence[str] | None = None) -> None:
    """Reads the flags and makes the pictures."""
    parser = argparse.ArgumentParser(description="JEVB on digits, in five pictures.")
    parser.add_argument("--out", type=Path, default=Path("runs/story"))
    parser.add_argument("--num_epochs", type=int, default=60)
    arguments = parser.parse_args(argv)
    tell(arguments.out, num_epochs=arguments.num_epochs)


if __name__ == "__main__":
    main()
