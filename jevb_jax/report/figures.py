"""Figures of a run: separate PNG files, and drawings for the report. They need no display."""

import contextlib
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jevb_jax.evaluation.evidence import EmbeddingMap, Separation, SeverityCurve
from jevb_jax.evaluation.reliability import RiskCoverage
from jevb_jax.images.levels import shown_channels, unit_of_stored
from jevb_jax.runs import files

_DOTS_PER_INCH = 192  # twice the 96 of a CSS inch: sharp on dense screens
_NUM_BINS = 48
_MAP_CLASSES = 20  # more markers and shades than this cannot be told apart
_MARKERS = "osD^vP*X<>"
_STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.labelsize": 9,
    "axes.titlesize": 9,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "legend.fontsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "hatch.linewidth": 0.6,
    "lines.linewidth": 1.3,
    "legend.frameon": False,
    "text.parse_math": False,  # names are shown as they are, dollars too
}


def line_style(index: int) -> dict[str, Any]:
    """Keywords of a line style that differs from the others even in black and white.

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


# --- Separate files ---


def save_views_figure(path: Path, images: np.ndarray, views: Sequence[np.ndarray]) -> None:
    """Draws images, and below them the augmented views that the networks see.

    Args:
      path: PNG to write.
      images: `[N, H, W, C]`; the channels of `levels.shown_channels` are drawn.
      views: each `[N, h, w, C]` in [0, 1], from `augmentations.visible_views`.
    """
    count = len(images)
    rows = [("image", unit_of_stored(images))]
    rows += [(f"view {number}", view) for number, view in enumerate(views, start=1)]
    rows = [(name, shown_channels(batch)) for name, batch in rows]
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
    write_png(path, figure)


def write_png(path: Path, figure: Figure) -> None:
    """Writes a figure as a PNG, atomically.

    Args:
      path: PNG to write.
      figure: what to draw.
    """
    content = io.BytesIO()
    figure.savefig(content, format="png")
    files.write_bytes_atomically(path, content.getvalue())


# --- For the page ---


class Drawing(NamedTuple):
    """A figure with its caption.

    Attributes:
      png: the image, with two pixels for each pixel of the page.
      width: in pixels of the page.
      height: in pixels of the page.
      alt: description with numbers, for screen readers.
      title: first sentence of the caption, in bold.
      note: rest of the caption.
    """

    png: bytes
    width: int
    height: int
    alt: str
    title: str
    note: str


@contextlib.contextmanager
def page_style() -> Iterator[None]:
    """Sets the page's style, independent of the user's matplotlibrc."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        yield


def _label(name: str, length: int = 30) -> str:
    """A name for a legend. Matplotlib omits names that start with an underscore."""
    name = f" {name}" if name.startswith("_") else name
    return name if len(name) <= length else name[: length - 1] + "\u2026"


def add_legend(figure: Figure, axis: Axes, *, handlelength: float = 2.6) -> None:
    """Adds a legend below the axes, in as many columns as fit. The figure grows by its height.

    Args:
      figure: contains only these axes.
      axis: has labeled lines or points.
      handlelength: length of the line samples, in units of the font size.
    """
    handles, labels = axis.get_legend_handles_labels()
    width, height = figure.get_size_inches()
    label_points = 9 * (handlelength + 2) + 5.2 * max(map(len, labels))
    columns = int(np.clip(72 * width // label_points, 1, 5))
    figure.set_size_inches(width, height + 0.18 * -(-len(labels) // columns))
    figure.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=columns,
        handlelength=handlelength,
        columnspacing=1,
    )


def make_drawing(figure: Figure, alt: str, title: str, note: str = "") -> Drawing:
    """Draws a figure for the page.

    Args:
      figure: what to draw.

    Returns:
      The drawing; the same figure gives the same bytes with the same matplotlib.
    """
    buffer = io.BytesIO()
    figure.savefig(
        buffer, format="png", dpi=_DOTS_PER_INCH, facecolor="white", metadata={"Software": None}
    )
    width, height = (round(96 * inches) for inches in figure.get_size_inches())
    return Drawing(buffer.getvalue(), width, height, alt, title, note)


def _bin_edges(inside: np.ndarray, pooled: np.ndarray) -> np.ndarray:
    """Bins over the inside scores and their surroundings; far tails would make the rest too small."""
    low, high = np.quantile(inside, (0.01, 0.99))
    spread = high - low
    low = max(pooled.min(), low - 1.5 * spread)
    high = min(pooled.max(), high + 1.5 * spread)
    if not low < high:
        low, high = low - 0.5 * max(1, abs(low)), low + 0.5 * max(1, abs(low))
    return np.linspace(low, high, _NUM_BINS + 1)


def separation_drawings(score: str, separations: Sequence[Separation]) -> list[Drawing]:
    """Histograms and ROC curves of a score.

    Args:
      score: name.
      separations: at least one.

    Returns:
      Two drawings.
    """
    return [_histograms(score, separations), _roc_curves(score, separations)]


def _histograms(score: str, separations: Sequence[Separation]) -> Drawing:
    inside = max((one.inside for one in separations), key=len)
    edges = _bin_edges(inside, np.concatenate([inside, *(one.outside for one in separations)]))

    def shares(values: np.ndarray) -> np.ndarray:
        counts, _ = np.histogram(np.clip(values, edges[0], edges[-1]), edges)
        return counts / len(values)

    figure = Figure(figsize=(4, 0.6 + 0.8 * len(separations)), layout="constrained")
    axes = figure.subplots(len(separations), 1, sharex=True, squeeze=False)[:, 0]
    for axis, one in zip(axes, separations, strict=True):
        axis.stairs(shares(one.inside), edges, fill=True, color="0.78")
        axis.stairs(shares(one.outside), edges, color="black", hatch="////", lw=1)
        beyond = np.mean((one.outside < edges[0]) | (one.outside > edges[-1]))
        text = _label(one.outside_set)
        if beyond >= 0.01:
            text += f", {beyond:.0%} beyond the axis"
        label = axis.text(0.01, 1.0, text, transform=axis.transAxes, va="top")
        label.set_path_effects([patheffects.withStroke(linewidth=3, foreground="white")])
        axis.set_ylim(bottom=0, top=1.3 * axis.get_ylim()[1])
        axis.set_yticks([])
        axis.spines["left"].set_visible(False)
    axes[-1].set_xlabel("score; larger = more out of distribution")
    sets = "; ".join(
        f"{one.outside_set}, {len(one.outside):,} images, median {np.median(one.outside):.4g}, "
        f"AUROC {one.auroc:.3f}"
        for one in separations
    )
    return make_drawing(
        figure,
        f"Histograms of {score}: {len(inside):,} inside images, median {np.median(inside):.4g}, "
        f"against {sets}.",
        "Inside against outside.",
        "Inside images are gray, outside images are hatched. The height is the share of images. The "
        "first and last bins include all scores beyond the axis.",
    )


def _roc_curves(score: str, separations: Sequence[Separation]) -> Drawing:
    figure = Figure(figsize=(4, 3.6), layout="constrained")
    axis = figure.subplots()
    axis.plot([0, 1], [0, 1], color="0.8", lw=0.8, zorder=0)
    for index, one in enumerate(separations):
        label = f"{_label(one.outside_set)} {one.auroc:.3f}"
        axis.plot(one.flagged, one.found, label=label, **line_style(index))
    axis.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01), aspect="equal")
    axis.set(xlabel="share of inside images flagged", ylabel="share of outside images found")
    add_legend(figure, axis)
    sets = ", ".join(f"{one.outside_set} {one.auroc:.3f}" for one in separations)
    alt = f"ROC curves of {score}. Areas: {sets}."
    return make_drawing(figure, alt, "ROC curves.", "The legend gives the area under each curve.")


def risk_coverage_drawing(curves: Mapping[str, RiskCoverage], score: str) -> Drawing:
    """Share of errors among the kept images, as a function of the share that is kept.

    Args:
      curves: by classifier, at least one.
      score: the uncertainty by which images are rejected.

    Returns:
      The drawing.
    """
    figure = Figure(figsize=(4, 2.6), layout="constrained")
    axis = figure.subplots()
    ends = []
    for index, (classifier, curve) in enumerate(curves.items()):
        axis.plot(curve.coverage, curve.risk, label=_label(classifier), **line_style(index))
        ends.append(f"{classifier}, risk {curve.risk[-1]:.3f} at the largest coverage")
    axis.set(
        xlim=(0, 1.01), xlabel="coverage: share of images kept", ylabel="risk: share of errors"
    )
    axis.set_ylim(bottom=0)
    add_legend(figure, axis)
    return make_drawing(
        figure,
        f"Risk by coverage when images with the largest {score} are rejected first: {'; '.join(ends)}.",
        "Risk and coverage.",
        f"Images with the largest {score} are rejected first. The score is useful if the curve falls "
        "towards the left.",
    )


def severity_drawings(curves: Sequence[SeverityCurve], score: str) -> list[Drawing]:
    """Uncertainty by severity; all drawings share one vertical scale.

    Args:
      curves: one for each corruption, at least one.
      score: uncertainty.

    Returns:
      One drawing for each curve.
    """
    drawings = []
    low = min(np.min(curve.lower_quartile) for curve in curves)
    high = max(np.max(curve.upper_quartile) for curve in curves)
    low = min(low, *(np.min(curve.mean) for curve in curves))
    high = max(high, *(np.max(curve.mean) for curve in curves))
    margin = 0.05 * (high - low) or 0.5
    for curve in curves:
        figure = Figure(figsize=(3.6, 2.3), layout="constrained")
        axis = figure.subplots()
        axis.fill_between(
            curve.severity, curve.lower_quartile, curve.upper_quartile, color="0.85", lw=0
        )
        axis.plot(curve.severity, curve.mean, "o-", color="black", markersize=4)
        axis.set(xlabel="severity", ylabel=_label(score, 24), ylim=(low - margin, high + margin))
        axis.set_xticks(curve.severity)
        values = ", ".join(f"{mean:.4g}" for mean in curve.mean)
        alt = (
            f"Mean {score} by severity of {curve.corruption}: {values}; "
            "the gray band reaches from the lower to the upper quartile."
        )
        drawings.append(make_drawing(figure, alt, curve.corruption))
    return drawings


def _scatter(axis: Axes) -> None:
    axis.set(xticks=[], yticks=[], aspect="equal", xlabel="component 1", ylabel="component 2")


def map_drawings(points: EmbeddingMap, score: str | None) -> list[Drawing]:
    """Maps of the embedding, shaded by class and by uncertainty where these are known.

    Args:
      points: coordinates, with classes and uncertainties where known.
      score: name of the uncertainty.

    Returns:
      One or two drawings.
    """
    drawings = []
    if points.labels is not None:
        drawings.append(_class_map(points.coordinates, points.labels, points.class_names))
    if points.uncertainty is not None:
        drawings.append(_uncertainty_map(points.coordinates, points.uncertainty, str(score)))
    return drawings or [_plain_map(points.coordinates)]


def _class_map(points: np.ndarray, labels: np.ndarray, names: Sequence[str]) -> Drawing:
    classes, counts = np.unique(labels, return_counts=True)
    shown = np.sort(classes[np.argsort(-counts, kind="stable")[:_MAP_CLASSES]])
    figure = Figure(figsize=(4, 3.9), layout="constrained")
    axis = figure.subplots()
    rest = points[~np.isin(labels, shown)]
    if len(rest):
        text = f"other ({len(classes) - len(shown)} classes)"
        axis.scatter(*rest.T, s=4, color="0.88", lw=0, label=text)
    lightness = np.linspace(0, 1, len(shown)) if len(shown) > 1 else np.zeros(1)
    # Neighboring classes get shades far apart.
    lightness = np.concatenate([lightness[0::2], lightness[1::2]])
    for index, label in enumerate(shown):
        axis.scatter(
            *points[labels == label].T,
            s=14,
            marker=_MARKERS[index % len(_MARKERS)],
            color=matplotlib.colormaps["cividis"](lightness[index]),
            edgecolors="0.25",
            linewidths=0.3,
            label=_label(names[int(label)]),
        )
    for label in shown:
        x, y = np.median(points[labels == label], axis=0)
        text = axis.text(x, y, _label(names[int(label)], 12), ha="center", va="center")
        text.set_path_effects([patheffects.withStroke(linewidth=3, foreground="white")])
    _scatter(axis)
    add_legend(figure, axis, handlelength=1.0)
    sizes = ", ".join(f"{names[int(k)]} ({np.sum(labels == k):,})" for k in shown)
    alt = (
        f"Map of {len(points):,} images. Each class has its own marker and shade, and its name at the "
        f"median of its points: {sizes}."
    )
    return make_drawing(figure, alt, "By class.", "Each name is at the median of its class.")


def _uncertainty_map(points: np.ndarray, uncertainty: np.ndarray, score: str) -> Drawing:
    low, high = np.quantile(uncertainty, (0.02, 0.98))
    figure = Figure(figsize=(4, 4.6), layout="constrained")
    axis = figure.subplots()
    order = np.argsort(uncertainty, kind="stable")  # the most uncertain are drawn last
    dots = axis.scatter(
        *points[order].T,
        c=uncertainty[order],
        s=14,
        cmap="cividis",
        vmin=low,
        vmax=high,
        edgecolors="0.25",
        linewidths=0.3,
    )
    _scatter(axis)
    figure.colorbar(
        dots, ax=axis, location="bottom", extend="both", shrink=0.8, label=_label(score, 40)
    )
    alt = (
        f"The same map, shaded by {score}: dark below {low:.4g}, light above {high:.4g}, median "
        f"{np.median(uncertainty):.4g}."
    )
    return make_drawing(
        figure,
        alt,
        "By uncertainty.",
        "Light points are uncertain. The color scale ends at the 2nd and 98th percentiles.",
    )


def _plain_map(points: np.ndarray) -> Drawing:
    figure = Figure(figsize=(4, 4), layout="constrained")
    axis = figure.subplots()
    axis.scatter(*points.T, s=8, color="0.3", lw=0)
    _scatter(axis)
    return make_drawing(figure, f"Map of {len(points):,} images.", "Images.")


def scale_drawings(posterior_scale: np.ndarray, prior_scale: float | None) -> list[Drawing]:
    """Posterior scales over features and over images.

    Args:
      posterior_scale: `[N, D]`, positive.
      prior_scale: drawn as a line, if there is one.

    Returns:
      Two drawings.
    """
    scale = np.asarray(posterior_scale, np.float64)
    return [
        _spectrum(scale, prior_scale, "features", over="images", across=0),
        _spectrum(scale, prior_scale, "images", over="features", across=1),
    ]


def _spectrum(
    scale: np.ndarray, prior_scale: float | None, axis_name: str, *, over: str, across: int
) -> Drawing:
    """Means over axis `across`, sorted, with a band from the 5th to the 95th percentile."""
    mean = scale.mean(axis=across)
    order = np.argsort(-mean, kind="stable")
    low, middle, high = np.quantile(scale, (0.05, 0.5, 0.95), axis=across)[:, order]
    rank = np.arange(1, len(mean) + 1)
    figure = Figure(figsize=(4, 2.6), layout="constrained")
    axis = figure.subplots()
    axis.fill_between(rank, low, high, color="0.85", lw=0, label="5 to 95 %")
    axis.plot(rank, mean[order], color="black", label="mean")
    axis.plot(rank, middle, color="0.45", ls="--", lw=1, label="median")
    if prior_scale is not None:
        axis.axhline(prior_scale, color="black", ls=":", lw=1, label="prior")
    if high.max() > 20 * low.min():
        axis.set_yscale("log")
    axis.set(xlabel=f"{axis_name}, by mean scale", ylabel="posterior scale")
    add_legend(figure, axis)
    alt = (
        f"Posterior scale of {len(mean):,} {axis_name} sorted by their mean, from {mean.max():.4g} to "
        f"{mean.min():.4g}; band from 5 to 95 % over {over}."
    )
    return make_drawing(
        figure, alt, f"Over {axis_name}.", f"Mean from {mean.max():.3g} to {mean.min():.3g}."
    )
