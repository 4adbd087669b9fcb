"""The figures of a study: one figure for each claim, one panel for each measure."""

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Drawing

from jevb_study.evidence import Evidence, RunData
from jevb_study.spec import Comparison, Curves, Figure, Sweep

_COLORS = ("black", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#999999")  # Okabe and Ito
_DASHES = ("-", "--", ":", "-.")


def draw(figure: Figure, evidence: Evidence) -> Drawing:
    """Draws a figure of a study."""
    if isinstance(figure, Comparison):
        return _comparison(figure, evidence)
    return _sweep(figure, evidence) if isinstance(figure, Sweep) else _curves(figure, evidence)


def _panels(
    count: int, title: str, *, width: float, height: float
) -> tuple[Drawing, Iterable[Axes]]:
    figure = Drawing(figsize=(max(width * count, 6), height), layout="constrained")
    figure.suptitle(title, fontsize=11)
    axes = figure.subplots(1, count, squeeze=False)[0]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(color="0.92")
        axis.set_axisbelow(True)
    return figure, axes


def _add_legend(axis: Axes) -> None:
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=8)


def _with_failures(run: str, evidence: Evidence) -> str:
    """The name of a run, with the number of its seeds that failed."""
    failed = evidence.failed(run)
    return f"{run} ({failed})" if failed else run


def _comparison(figure: Comparison, evidence: Evidence) -> Drawing:
    height = 1.3 + 0.33 * len(figure.runs)
    drawn, axes = _panels(len(figure.measures), figure.title, width=4, height=height)
    names = [_with_failures(run, evidence) for run in figure.runs]
    for column, (axis, label) in enumerate(zip(axes, figure.measures, strict=True)):
        for row, run in enumerate(figure.runs):
            values = list(evidence.values(run, label).values())
            if values:
                axis.plot(values, [row] * len(values), "o", color="0.55", mfc="none", ms=5)
                axis.plot(np.mean(values), row, "|", color="black", ms=15, mew=2)
        axis.set_yticks(range(len(names)), names if column == 0 else [""] * len(names))
        axis.set_ylim(len(names) - 0.5, -0.5)
        axis.set_xlabel(label)
    return drawn


def sweep_positions(values: Iterable[float], *, log_x: bool) -> dict[float, float]:
    """Position of every value of a setting; infinity is slightly beyond the others."""
    values = list(values)
    finite = sorted(x for x in values if math.isfinite(x))
    positions = {x: x for x in finite}
    if math.inf in values:
        first, last = (finite[0], finite[-1]) if finite else (1.0, 1.0)
        further = last * max((last / first) ** 0.15, 1.5) if log_x else 0.0
        positions[math.inf] = further or last + 0.15 * ((last - first) or 1.0)
    return positions


def _sweep(figure: Sweep, evidence: Evidence) -> Drawing:
    drawn, axes = _panels(len(figure.measures), figure.title, width=4.2, height=3.6)
    positions = sweep_positions(figure.runs, log_x=figure.log_x)
    for axis, label in zip(axes, figure.measures, strict=True):
        means: dict[float, tuple[float, float]] = {}
        for x, position in positions.items():
            run = figure.runs[x]
            values = list(evidence.values(run, label).values())
            axis.plot([position] * len(values), values, "o", color="0.55", mfc="none", ms=5)
            if values:
                means[x] = (position, float(np.mean(values)))
            if failed := evidence.failed(run):
                where = {"transform": axis.get_xaxis_transform(), "ha": "center"}
                axis.text(position, 0.03, failed, rotation=90, fontsize=7, **where)
        finite = [mean for x, mean in means.items() if math.isfinite(x)]
        axis.plot(*np.reshape(finite, (-1, 2)).T, "k_-", ms=11, mew=2, lw=1.2)
        if math.inf in means:  # a dotted line, because the axis is not to scale there
            axis.plot(*np.array([*means.values()])[-2:].T, "k_:", ms=11, mew=2, lw=1.2)
        for color, run in zip(_COLORS[1:], figure.references, strict=False):
            values = list(evidence.values(run, label).values())
            if values:
                axis.axhline(float(np.mean(values)), color=color, ls="--", lw=1.2, label=run)
                axis.axhspan(min(values), max(values), color=color, alpha=0.12, lw=0)
        _add_legend(axis)
        if figure.log_x:
            axis.set_xscale("log")
        ticks = ["∞" if x == math.inf else f"{x:g}" for x in positions]
        axis.set_xticks(list(positions.values()), ticks)
        axis.set_xticks([], minor=True)
        axis.set_xlabel(figure.x_label)
        axis.set_ylabel(label)
    return drawn


def _curves(figure: Curves, evidence: Evidence) -> Drawing:
    """Mean and range over seeds; thin lines and a cross where seeds fail."""
    drawn, axes = _panels(len(figure.keys), figure.title, width=4.4, height=3.8)
    for axis, key in zip(axes, figure.keys, strict=True):
        for number, run in enumerate(figure.runs):
            seeds = evidence.runs[run].values()
            _draw_curve(
                axis,
                [(_series(data, key, figure), data.failure is not None) for data in seeds],
                color=_COLORS[number % len(_COLORS)],
                dashes=_DASHES[number // len(_COLORS)],
                label=_with_failures(run, evidence),
            )
        if not axis.lines:
            axis.text(0.5, 0.5, "logged by none", transform=axis.transAxes, ha="center")
        if figure.log_y:
            axis.set_yscale("log")
        axis.set_xlabel("millions of views seen" if figure.over_views else "step")
        axis.set_ylabel(key)
        _add_legend(axis)
    return drawn


def _series(data: RunData, key: str, figure: Curves) -> dict[float, float]:
    """Logged values by position on the x axis."""
    scale = data.views_per_step / 1e6 if figure.over_views else 1
    return {step * scale: value for step, value in data.series(key).items()}


def _draw_curve(
    axis: Axes,
    seeds: Sequence[tuple[Mapping[float, float], bool]],
    *,
    color: str,
    dashes: str,
    label: str,
) -> None:
    """Draws `(values by position, whether it failed)` of the seeds of a run."""
    seeds = [(series, is_failed) for series, is_failed in seeds if series]
    if not seeds:
        return
    # Only positions that every seed reached, so that mean and range do not jump where a seed ends.
    common = sorted(set.intersection(*(set(series) for series, _ in seeds)))
    values = np.array([[series[step] for step in common] for series, _ in seeds])
    if common:
        low, high = values.min(axis=0), values.max(axis=0)
        axis.fill_between(common, low, high, color=color, alpha=0.15, lw=0)
    mean = values.mean(axis=0) if common else []
    axis.plot(common, mean, dashes, color=color, lw=1.3, label=label)
    for series, is_failed in seeds:
        rest = sorted(step for step in series if not common or step >= common[-1])
        axis.plot(rest, [series[step] for step in rest], dashes, color=color, lw=0.7)
        finite = [step for step in sorted(series) if math.isfinite(series[step])]
        if is_failed and finite:
            axis.plot(finite[-1], series[finite[-1]], "x", color=color, ms=7, mew=1.8)
