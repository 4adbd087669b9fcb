"""Figures of a run, drawn with matplotlib without a display."""

import functools
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jevb_jax import augmentations, data, files
from jevb_jax.compilation import jit_once


def save_views_figure(
    path: Path,
    source: data.ImageSource,
    view_augmentations: Sequence[augmentations.ViewAugmentation],
    *,
    num_images: int = 8,
    seed: int = 0,
) -> None:
    """Draws images above their augmented views, de-normalised: what the networks are shown.

    Args:
      path: PNG to write.
      source: images, of which the first `num_images` are drawn.
      view_augmentations: one for each view.
      num_images: columns.
      seed: chooses the views that are drawn.
    """
    count = min(num_images, len(source))
    images = data.gather(source, np.arange(count))
    keys = jax.random.split(jax.random.key(seed), count)
    # Compiled: operation by operation, the same takes twice to four times as long.
    views = jit_once(functools.partial(augmentations.multi_view, augmentations=view_augmentations))(
        keys, images
    )
    rows: list[tuple[str, np.ndarray]] = [("image", images / 255.0)]
    for number, (view, augmentation) in enumerate(
        zip(views, view_augmentations, strict=True), start=1
    ):
        pixels = np.asarray(view) * np.asarray(augmentation.std) + np.asarray(augmentation.mean)
        rows.append((f"view {number}", np.clip(pixels, 0, 1)))
    figure = Figure(figsize=(1.3 * count + 0.6, 1.35 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), count, squeeze=False)
    for row, (name, batch) in enumerate(rows):
        for column in range(count):
            axis = axes[row, column]
            image = batch[column]
            axis.imshow(
                image.squeeze(-1) if image.shape[-1] == 1 else image,
                cmap="gray",
                vmin=0,
                vmax=1,
                interpolation="nearest",
            )
            axis.set_xticks([])
            axis.set_yticks([])
        axes[row, 0].set_ylabel(name)
    _write_png(path, figure)


# Of the keys of `metrics.jsonl` under `train/`, those that every method logs: the others are its terms.
_NOT_TERMS = frozenset(
    f"train/{name}"
    for name in (
        "loss",
        "posterior_scale",
        "radial_scale",
        "embedding_std",
        "gradient_norm",
        "learning_rate",
    )
)


def line_style(index: int) -> dict[str, Any]:
    """Keywords of a line that stays apart from its neighbours in black and white.

    Args:
      index: number of the line in its axes; the first 32 differ.

    Returns:
      Keywords of `Axes.plot`.
    """
    return {
        "linestyle": ("-", "--", ":", "-.")[index % 4],
        "color": ("black", "0.55")[index // 4 % 2],
        "marker": ("", "o", "s", "^")[index // 8 % 4],
        "markevery": 0.1,
        "markersize": 4,
    }


def loss_terms(records: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """Keys of the terms of the method's loss.

    Args:
      records: lines of `metrics.jsonl`.

    Returns:
      Every key under `train/` that is not among those of all methods, in the order of the log.
    """
    names = dict.fromkeys(name for record in records for name in record)
    return tuple(name for name in names if name.startswith("train/") and name not in _NOT_TERMS)


def draw_curves(axis: Axes, records: Sequence[Mapping[str, Any]], names: Sequence[str]) -> None:
    """Draws logged values by step, each name in a line style of its own.

    Args:
      axis: to draw in.
      records: lines of `metrics.jsonl`.
      names: keys; one that no record has leaves no line.
    """
    short = [name.split("/", 1)[-1] for name in names]
    labels = short if len(set(short)) == len(short) else names
    for index, (name, label) in enumerate(zip(names, labels, strict=True)):
        points = [(record["step"], record[name]) for record in records if name in record]
        if points:
            steps, values = zip(*points, strict=True)
            style = line_style(index)
            if len(points) == 1:  # a line of one point shows nothing
                style["marker"] = "o"
            axis.plot(steps, values, lw=1.2, label=label, **style)
    axis.set_xlabel("step")


def save_curves_figure(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Draws the loss, the terms of the bound, the scales and the signals of collapse by step.

    Args:
      path: PNG to write.
      records: lines of `metrics.jsonl`.
    """
    panels = (
        ("loss", ("train/loss",)),
        ("terms of the loss", loss_terms(records)),
        ("scales", ("train/posterior_scale", "train/radial_scale")),
        ("embedding_std (1 = spread, 0 = collapse)", ("train/embedding_std",)),
        ("effective rank", ("health/effective_rank",)),
        ("gradient norm", ("train/gradient_norm",)),
    )
    figure = Figure(figsize=(12, 6.5), layout="constrained")
    for axis, (title, names) in zip(figure.subplots(2, 3).flat, panels, strict=True):
        draw_curves(axis, records, names)
        axis.set_title(title, fontsize=10)
        if len(axis.lines) > 1:
            # Below the axes, where it hides no line.
            axis.legend(
                fontsize=8, ncols=2, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.16)
            )
    _write_png(path, figure)


def _write_png(path: Path, figure: Figure) -> None:
    content = io.BytesIO()
    figure.savefig(content, format="png")
    files.write_bytes_atomically(path, content.getvalue())
