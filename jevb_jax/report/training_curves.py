"""Curves of the logged values: `curves.png`, and the drawings of the report."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jevb_jax.report.figures import Drawing, add_legend, line_style, make_drawing, write_png

# Keys of `metrics.jsonl` that are no terms of a loss. Every method logs them, except the two
# scales, which are JEVB's. What a method logs beside them is mostly terms of its loss.
_NOT_TERMS = frozenset(
    f"train/{name}"
    for name in (
        "loss",
        "posterior_scale",
        "radial_scale",
        "embedding_std",
        "gradient_norm",
        "relative_step",
        "learning_rate",
    )
)


def loss_terms(records: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """Keys of what the method logs of its loss: its terms, and what is read from them.

    Args:
      records: lines of `metrics.jsonl`.

    Returns:
      Every key under `train/` except loss, scales, spread, norms and learning rate, in the order
      of the log.
    """
    names = dict.fromkeys(name for record in records for name in record)
    return tuple(name for name in names if name.startswith("train/") and name not in _NOT_TERMS)


def draw_curves(axis: Axes, records: Sequence[Mapping[str, Any]], names: Sequence[str]) -> None:
    """Draws logged values by step; each name has its own line style.

    Args:
      axis: the axes to draw in.
      records: lines of `metrics.jsonl`.
      names: keys; a key that no record contains is not drawn.
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
    """Draws loss, terms of the loss, scales and signs of collapse by step.

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
    write_png(path, figure)


def curve_drawings(
    records: Sequence[Mapping[str, Any]],
) -> tuple[list[Drawing], list[Drawing]]:
    """Drawings of the logged values by step. Every logged name is in at least one drawing.

    Args:
      records: lines of `metrics.jsonl`.

    Returns:
      Drawings of training, and drawings of health.
    """
    names = dict.fromkeys(name for record in records for name in record if name != "step")
    terms = loss_terms(records)
    gradients = [name for name in names if name.startswith("health/gradient_")]
    alarms = [name for name in names if name.startswith("health/alarm_")]
    training = [("loss", ["train/loss"])]
    if len(terms) > 1:
        training.append(("every term of the loss", list(terms)))
    training += [(name.split("/", 1)[-1], [name]) for name in terms]
    training += [
        ("mean scales", ["train/posterior_scale", "train/radial_scale"]),
        ("gradient norm", ["train/gradient_norm"]),
        ("learning rate", ["train/learning_rate"]),
        ("norm of a step / norm of the parameters", ["train/relative_step"]),
    ]
    health = [
        ("effective rank", ["health/effective_rank"]),
        (
            "embedding_std: 1 = spread, 0 = collapse",
            ["train/embedding_std", "health/embedding_std"],
        ),
        ("gradient of each term", gradients),
        ("alarms: 1 = raised", alarms),
    ]
    drawn = {name for _, group in training + health for name in group}
    for name in names:
        if name not in drawn:
            is_health = name.startswith("health/")
            (health if is_health else training).append((name.removeprefix("health/"), [name]))

    def draw(panels: Sequence[tuple[str, list[str]]]) -> list[Drawing]:
        drawings = (_curves(records, title, group) for title, group in panels)
        return [drawing for drawing in drawings if drawing is not None]

    return draw(training), draw(health)


def _curves(
    records: Sequence[Mapping[str, Any]], title: str, names: Sequence[str]
) -> Drawing | None:
    """A drawing of logged values by step; None if no name was logged."""
    ends = []
    for name in names:
        points = [(record["step"], record[name]) for record in records if name in record]
        if points:
            ends.append((name.split("/", 1)[-1], *points[0], *points[-1]))
    if not ends:
        return None
    figure = Figure(figsize=(3.6, 2.3), layout="constrained")
    axis = figure.subplots()
    draw_curves(axis, records, names)
    if len(ends) > 1:
        add_legend(figure, axis)
        note = ""
    else:
        note = f"{ends[0][4]:.4g} at step {ends[0][3]:,}."
    changes = "; ".join(
        f"{name} from {first:.4g} at step {start:,} to {last:.4g} at step {stop:,}"
        for name, start, first, stop, last in ends
    )
    return make_drawing(figure, f"{title} by step: {changes}.", f"{title}.", note)
