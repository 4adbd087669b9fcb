"""A run as one HTML page: figures and tables of plain arrays, in a file that opens without a network.

No scripts and no references to other files: figures and images are PNGs inside the page. The same
`RunReport` gives the same bytes with the same matplotlib. A part that is None or empty leaves no
trace on the page.
"""

import base64
import html
import io
import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from jevb_jax import files
from jevb_jax.report.figures import draw_curves, line_style, loss_terms

_DOTS_PER_INCH = 192  # twice the 96 of a CSS inch: sharp on dense screens
_THUMBNAIL_PIXELS = 160  # longest side of an image on the page
_PIXELATED_BELOW = 64  # smaller images are enlarged without smoothing
_NUM_BINS = 48
_DASH = "\u2013"
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


class Number(NamedTuple):
    """A number as it is to be read.

    Attributes:
      label: what it is.
      value: as text, with its unit.
      protocol: one sentence: how it was measured.
    """

    label: str
    value: str
    protocol: str = ""


class Alarm(NamedTuple):
    """A health alarm that was raised.

    Attributes:
      step: of training.
      name: of the alarm.
      message: what was seen, and what to do.
    """

    step: int
    name: str
    message: str


class ResultRow(NamedTuple):
    """A line of `results.json`.

    Attributes:
      name: what is measured, such as "linear_accuracy".
      features: that it was measured on.
      value: measured on the trained encoder.
      protocol: one sentence.
      untrained: the value of the encoder before training, or None.
    """

    name: str
    features: str
    value: float
    protocol: str
    untrained: float | None = None


class OodRow(NamedTuple):
    """A score against one outside set; None where it was not measured.

    Attributes:
      score: its name.
      outside_set: its name.
      group: of the set, such as "near" or "far"; "" for none.
      auroc: in [0, 1].
      auroc_interval: lower and upper bound.
      aupr_out: area under precision and recall, outside images being the positive ones.
      aupr_in: the same, inside images being the positive ones.
      fpr95_out: share of inside images flagged where 95 % of the outside ones are found.
      fpr95_in: share of outside images let in where 95 % of the inside ones are.
    """

    score: str
    outside_set: str
    group: str
    auroc: float
    auroc_interval: tuple[float, float] | None = None
    aupr_out: float | None = None
    aupr_in: float | None = None
    fpr95_out: float | None = None
    fpr95_in: float | None = None


def _check_lengths(where: str, **sequences: Any) -> None:
    lengths = {name: len(values) for name, values in sequences.items() if values is not None}
    if len(set(lengths.values())) > 1:
        found = ", ".join(f"{name} has {length}" for name, length in lengths.items())
        raise ValueError(f"{where} needs entries that belong together one to one, but {found}")


def _check_finite_vector(name: str, values: np.ndarray) -> None:
    values = np.asarray(values)
    if values.ndim != 1 or values.size == 0 or not np.isfinite(values).all():
        raise ValueError(
            f"{name} must be [N], N >= 1, finite, got shape {values.shape} with "
            f"{np.size(values) - np.isfinite(values).sum()} values that are not"
        )


def _check_images(name: str, images: np.ndarray) -> None:
    shape, dtype = np.shape(images), np.asarray(images).dtype
    if len(shape) != 4 or shape[-1] not in (1, 3) or dtype != np.uint8:
        raise ValueError(f"{name} must be uint8 [K, h, w, 1 or 3], got {dtype} of shape {shape}")


@dataclass(frozen=True, eq=False)
class ScoreSample:
    """One score of every image, to be drawn as histograms and ROC curves.

    Attributes:
      score: its name.
      inside: `[N]`, larger = more out of distribution.
      outside: `[M]` by the name of the outside set.

    Raises:
      ValueError: no outside set; values that are not finite or not `[N]`.
    """

    score: str
    inside: np.ndarray
    outside: Mapping[str, np.ndarray]

    def __post_init__(self):
        if not self.outside:
            raise ValueError(f"score {self.score!r} has no outside set to be compared with")
        _check_finite_vector(f"inside scores {self.score!r}", self.inside)
        for name, values in self.outside.items():
            _check_finite_vector(f"scores {self.score!r} of {name!r}", values)


@dataclass(frozen=True, eq=False)
class OodPart:
    """Out-of-distribution detection.

    Attributes:
      rows: of every score and outside set.
      samples: scores to draw.
      protocol: what inside and outside are, and what was chosen on which data.

    Raises:
      ValueError: a score has two rows for one outside set.
    """

    rows: Sequence[OodRow] = ()
    samples: Sequence[ScoreSample] = ()
    protocol: str = ""

    def __post_init__(self):
        keys = [(row.score, row.group, row.outside_set) for row in self.rows]
        if len(set(keys)) < len(keys):
            twice = next(key for key in keys if keys.count(key) > 1)
            raise ValueError(f"there are two rows of score, group and outside set {twice}")


@dataclass(frozen=True, eq=False)
class RiskCoverage:
    """Error among the images that are kept, by the share that is kept.

    Attributes:
      label: of the classifier.
      coverage: `[N]`, in (0, 1], of the surest images.
      risk: `[N]`, share of errors among them.

    Raises:
      ValueError: lengths that differ.
    """

    label: str
    coverage: np.ndarray
    risk: np.ndarray

    def __post_init__(self):
        _check_lengths(
            f"the risk-coverage curve {self.label!r}", coverage=self.coverage, risk=self.risk
        )


@dataclass(frozen=True, eq=False)
class SeverityCurve:
    """Uncertainty of images that are degraded more and more.

    Attributes:
      corruption: its name.
      severity: `[S]`; 0 is the clean image.
      mean: `[S]`, over images.
      lower_quartile: `[S]`.
      upper_quartile: `[S]`.

    Raises:
      ValueError: lengths that differ.
    """

    corruption: str
    severity: np.ndarray
    mean: np.ndarray
    lower_quartile: np.ndarray
    upper_quartile: np.ndarray

    def __post_init__(self):
        _check_lengths(
            f"the severity curve {self.corruption!r}",
            severity=self.severity,
            mean=self.mean,
            lower_quartile=self.lower_quartile,
            upper_quartile=self.upper_quartile,
        )


@dataclass(frozen=True, eq=False)
class UncertaintyPart:
    """Whether the uncertainty means anything.

    Attributes:
      score: name of the uncertainty, larger = more uncertain.
      numbers: such as the AUROC of errors and rank correlations.
      risk_coverage: curves, drawn in one figure.
      severity: curves, drawn on one scale.
    """

    score: str
    numbers: Sequence[Number] = ()
    risk_coverage: Sequence[RiskCoverage] = ()
    severity: Sequence[SeverityCurve] = ()


@dataclass(frozen=True, eq=False)
class CaptionedImages:
    """Images in their order.

    Attributes:
      images: uint8 `[K, h, w, c]`, c = 1 or 3; sides above 160 pixels are made smaller.
      captions: of every image.

    Raises:
      ValueError: another shape or dtype; lengths that differ.
    """

    images: np.ndarray
    captions: Sequence[str]

    def __post_init__(self):
        _check_images("images", self.images)
        _check_lengths("CaptionedImages", images=self.images, captions=self.captions)


@dataclass(frozen=True, eq=False)
class Neighbours:
    """An image and the training images nearest to it, nearest first.

    Attributes:
      image: uint8 `[h, w, c]`.
      label: class name of the image, or None.
      images: uint8 `[K, h, w, c]`.
      labels: class names of the neighbours, or None.
      cosine: `[K]`, of the directions of image and neighbour.

    Raises:
      ValueError: another shape or dtype; lengths that differ.
    """

    image: np.ndarray
    label: str | None
    images: np.ndarray
    labels: Sequence[str] | None
    cosine: np.ndarray

    def __post_init__(self):
        _check_images("image[None]", np.asarray(self.image)[None])
        _check_images("images", self.images)
        _check_lengths("Neighbours", images=self.images, labels=self.labels, cosine=self.cosine)


@dataclass(frozen=True, eq=False)
class GalleryPart:
    """Images to look at.

    Attributes:
      score: name of the uncertainty that orders the images.
      most_uncertain: most uncertain first.
      least_uncertain: least uncertain first.
      neighbours: of a few images.
    """

    score: str = "uncertainty"
    most_uncertain: CaptionedImages | None = None
    least_uncertain: CaptionedImages | None = None
    neighbours: Sequence[Neighbours] = ()


@dataclass(frozen=True, eq=False)
class MapPart:
    """The embedding in the plane; a few thousand images read best.

    Attributes:
      coordinates: `[N, 2]`, of `embedding_map` or another method.
      labels: `[N]`, integers that index `class_names`, or None.
      class_names: of the labels.
      uncertainty: `[N]`, or None.
      score: name of the uncertainty.
      method: one sentence: how the coordinates were made.

    Raises:
      ValueError: another shape, lengths that differ, or labels without a name.
    """

    coordinates: np.ndarray
    labels: np.ndarray | None = None
    class_names: Sequence[str] = ()
    uncertainty: np.ndarray | None = None
    score: str = "uncertainty"
    method: str = "First two principal components of the directions h / |h|."

    def __post_init__(self):
        shape = np.shape(self.coordinates)
        if len(shape) != 2 or shape[1] != 2 or shape[0] == 0:
            raise ValueError(f"coordinates must be [N, 2] with N >= 1, got shape {shape}")
        _check_lengths(
            "the map",
            coordinates=self.coordinates,
            labels=self.labels,
            uncertainty=self.uncertainty,
        )
        if self.labels is not None:
            low, high = np.min(self.labels), np.max(self.labels)
            if low < 0 or high >= len(self.class_names):
                raise ValueError(
                    f"labels must index the {len(self.class_names)} class_names, got {low} to {high}"
                )
        if self.uncertainty is not None:
            _check_finite_vector("uncertainty of the map", self.uncertainty)


@dataclass(frozen=True, eq=False)
class ScalePart:
    """Scales of the posteriors.

    Attributes:
      posterior_scale: `[N, D]`, standard deviations, positive.
      prior_scale: drawn as a line, or None.

    Raises:
      ValueError: another shape, or scales that are not positive and finite.
    """

    posterior_scale: np.ndarray
    prior_scale: float | None = None

    def __post_init__(self):
        scale = np.asarray(self.posterior_scale)
        if scale.ndim != 2 or scale.size == 0 or not ((scale > 0) & np.isfinite(scale)).all():
            raise ValueError(
                f"posterior_scale must be [N, D], positive and finite, got shape {scale.shape}"
                + (f" and least value {scale.min()}" if scale.size else "")
            )


@dataclass(frozen=True, eq=False)
class RunReport:
    """What is known of a run; a part that is None or empty is left out of the page.

    Attributes:
      title: heading of the page.
      subtitle: one line, such as data set and step.
      headline: the few numbers to see first.
      alarms: health alarms; an empty sequence says that none was raised, None that nothing watched.
      results: lines of `results.json`.
      ood: out-of-distribution detection.
      uncertainty: whether the uncertainty means anything.
      gallery: images to look at.
      embedding_map: the embedding in the plane.
      posterior_scale: scales of the posteriors.
      records: lines of `metrics.jsonl`: every number in them is drawn.
      command: words of the command.
      config: settings of the run, as JSON has them.
      environment: commit, versions, devices.

    Raises:
      ValueError: a record without a step.
    """

    title: str
    subtitle: str = ""
    headline: Sequence[Number] = ()
    alarms: Sequence[Alarm] | None = None
    results: Sequence[ResultRow] = ()
    ood: OodPart | None = None
    uncertainty: UncertaintyPart | None = None
    gallery: GalleryPart | None = None
    embedding_map: MapPart | None = None
    posterior_scale: ScalePart | None = None
    records: Sequence[Mapping[str, Any]] = ()
    command: Sequence[str] = ()
    config: Mapping[str, Any] | None = None
    environment: Mapping[str, Any] | None = None

    def __post_init__(self):
        for number, record in enumerate(self.records):
            if "step" not in record:
                raise ValueError(f"record {number} has no step, only {sorted(record)}")


def embedding_map(embedding: np.ndarray) -> np.ndarray:
    """The embedding in the plane: the first two principal components of the directions `h / |h|`.

    Linear and without randomness: distances shrink but are never invented. The singular vectors'
    signs, which the decomposition leaves open, are chosen so that each component's largest loading
    is positive: the same embedding gives the same map.

    Args:
      embedding: `[N, D]`, finite, `N >= 2`, `D >= 2`. A zero vector counts as the direction zero.

    Returns:
      `[N, 2]`, float64.

    Raises:
      ValueError: another shape, or values that are not finite.
    """
    values = np.asarray(embedding, dtype=np.float64)
    if values.ndim != 2 or min(values.shape) < 2 or not np.isfinite(values).all():
        raise ValueError(
            "embedding must be [N, D], N >= 2, D >= 2, finite, got "
            f"shape {values.shape} with {np.size(values) - np.isfinite(values).sum()} values not finite"
        )
    # Largest entry one before the norm: squares neither overflow nor underflow.
    largest = np.abs(values).max(axis=1, keepdims=True)
    values = values / np.where(largest == 0, 1, largest)
    radius = np.linalg.norm(values, axis=1, keepdims=True)
    directions = values / np.where(radius == 0, 1, radius)
    centered = directions - directions.mean(axis=0)
    components = np.linalg.svd(centered, full_matrices=False)[2][:2]
    largest_loading = components[np.arange(2), np.abs(components).argmax(axis=1)]
    return centered @ (components * np.where(largest_loading < 0, -1, 1)[:, None]).T


# --- Markup ---------------------------------------------------------------------------------------


class _Html(str):
    """Markup: whatever else is put into an element is escaped."""


def _join(parts: Iterable[str]) -> _Html:
    return _Html("".join(p if isinstance(p, _Html) else html.escape(p) for p in parts))


def _attributes(attributes: Mapping[str, str]) -> str:
    """Attributes of a tag; a trailing `_` of a name, needed for `class`, is dropped."""
    return "".join(f' {name.rstrip("_")}="{html.escape(v)}"' for name, v in attributes.items())


def _element(tag: str, *children: str, **attributes: str) -> _Html:
    return _Html(f"<{tag}{_attributes(attributes)}>{_join(children)}</{tag}>")


def _breakable(name: str) -> _Html:
    """A name that may go on in a new line after an underscore."""
    return _Html(html.escape(name).replace("_", "_<wbr>"))


def _png_image(png: bytes, alt: str, **attributes: str) -> _Html:
    source = "data:image/png;base64," + base64.b64encode(png).decode("ascii")
    return _Html(f"<img{_attributes({'src': source, 'alt': alt, **attributes})}>")


def _label(name: str, length: int = 30) -> str:
    """A name in a figure; matplotlib leaves one that starts with an underscore out of legends."""
    name = f" {name}" if name.startswith("_") else name
    return name if len(name) <= length else name[: length - 1] + "\u2026"


def _add_legend(figure: Figure, axis: Axes, *, handlelength: float = 2.6) -> None:
    """A legend below the axes, in as many columns as fit; the figure grows by its height."""
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


def _drawing(figure: Figure, alt: str, title: str, note: str = "") -> _Html:
    """A matplotlib figure with its caption."""
    buffer = io.BytesIO()
    figure.savefig(
        buffer,
        format="png",
        dpi=_DOTS_PER_INCH,
        facecolor="white",
        metadata={"Software": None},
    )
    width, height = (round(96 * inches) for inches in figure.get_size_inches())
    image = _png_image(buffer.getvalue(), alt, width=str(width), height=str(height))
    caption = _element("figcaption", _element("b", title), f" {note}" if note else "")
    return _element("figure", image, caption, class_="drawing")


def _photo(image: np.ndarray, alt: str, caption: Sequence[str], **attributes: str) -> _Html:
    """An image as it is, with lines of caption."""
    image = np.asarray(image)
    picture = Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image)
    picture.thumbnail((_THUMBNAIL_PIXELS, _THUMBNAIL_PIXELS), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    lines = [_element("span", line) for line in caption]
    kind = {"class_": "pixels"} if max(image.shape) < _PIXELATED_BELOW else {}
    return _element(
        "figure",
        _png_image(buffer.getvalue(), alt, **kind),
        _element("figcaption", *lines),
        **{"class_": "photo", **attributes},
    )


def _grid(children: Sequence[_Html], kind: str) -> _Html:
    return _element("div", *children, class_=f"grid {kind}") if children else _Html()


def _subsection(title: str, *children: str) -> _Html:
    body = _join(children)
    return _join((_element("h3", title), body)) if body else body


def _scrolling(table: _Html, label: str) -> _Html:
    """A table that scrolls within itself where the page is narrow; reachable by keyboard."""
    return _element(
        "div", table, class_="scroll", role="region", tabindex="0", **{"aria-label": label}
    )


def _table(label: str, head: Sequence[str], rows: Iterable[Sequence[str]], texts: int = 1) -> _Html:
    """A table whose first `texts` columns are text, and the others numbers."""

    def cell(column: int, value: str) -> _Html:
        if column == 0:
            return _element("th", _breakable(value), scope="row")
        return _element("td", value, **({} if column < texts else {"class_": "number"}))

    heads = (
        _element("th", name, scope="col", **({} if column < texts else {"class_": "number"}))
        for column, name in enumerate(head)
    )
    lines = (_element("tr", *(cell(i, v) for i, v in enumerate(row))) for row in rows)
    body = _element("tbody", *lines)
    return _scrolling(_element("table", _element("thead", _element("tr", *heads)), body), label)


def _protocols(pairs: Iterable[tuple[str, str]]) -> _Html:
    items = [
        _join((_element("dt", name), _element("dd", protocol)))
        for name, protocol in pairs
        if protocol
    ]
    if not items:
        return _Html()
    return _element("details", _element("summary", "Protocols"), _element("dl", *items))


def _decimals(value: float | None, digits: int = 4) -> str:
    return _DASH if value is None else f"{value:.{digits}f}"


def _interval(bounds: tuple[float, float] | None, digits: int) -> str:
    return "" if bounds is None else f"{bounds[0]:.{digits}f}{_DASH}{bounds[1]:.{digits}f}"


# --- Sections: each is empty where there is nothing to show ---------------------------------------


def _headline(report: RunReport) -> _Html:
    cards = [
        _element(
            "div",
            _element("dt", number.label),
            _element("dd", number.value, class_="value"),
            _element("dd", number.protocol, class_="protocol"),
        )
        for number in report.headline
    ]
    return _element("dl", *cards, class_="headline") if cards else _Html()


def _alarms_section(alarms: Sequence[Alarm] | None) -> _Html:
    by_step = sorted(alarms or (), key=lambda alarm: alarm.step)
    by_name: dict[str, list[Alarm]] = {}
    for alarm in by_step:
        by_name.setdefault(alarm.name, []).append(alarm)
    items = []
    for name, raised in by_name.items():
        first, last = raised[0], raised[-1]
        when = f"step {first.step:,}"
        if len(raised) > 1:
            when = f"{len(raised):,} times, first at {when}, last at step {last.step:,}"
        items.append(
            _element(
                "li",
                _element("b", name),
                " ",
                _element("small", when),
                _element("p", first.message),
            )
        )
    if not items:
        return _Html()
    details = _Html()
    if len(by_step) > len(items):
        lines = (
            _element(
                "li", _element("small", f"step {alarm.step:,}"), f" {alarm.name}: {alarm.message}"
            )
            for alarm in by_step
        )
        details = _element("details", _element("summary", "Every alarm"), _element("ul", *lines))
    return _element("div", _element("ul", *items), details, class_="alarms", role="note")


def _results_section(rows: Sequence[ResultRow]) -> _Html:
    if not rows:
        return _Html()
    has_untrained = any(row.untrained is not None for row in rows)
    head = ["measure", "features", *(["untrained"] if has_untrained else []), "trained"]
    lines = []
    for row in rows:
        untrained = [_decimals(row.untrained)] if has_untrained else []
        lines.append((row.name, row.features, *untrained, _decimals(row.value)))
    protocols = ((f"{row.name}, {row.features}", row.protocol) for row in rows)
    return _join((_table("Results", head, lines, texts=2), _protocols(protocols)))


def _auroc_table(rows: Sequence[OodRow]) -> _Html:
    """Scores by outside sets; the best of a column in bold."""
    scores = dict.fromkeys(row.score for row in rows)
    groups: dict[str, dict[str, None]] = {}
    for row in rows:
        groups.setdefault(row.group, {})[row.outside_set] = None
    columns = [(group, name) for group, names in groups.items() for name in names]
    cells = {(row.score, row.group, row.outside_set): row for row in rows}
    # Compared as printed: what reads as a tie is one.
    best = {
        column: max(_decimals(row.auroc, 3) for key, row in cells.items() if key[1:] == column)
        for column in columns
    }
    has_groups = any(groups)

    def cell(score: str, column: tuple[str, str]) -> _Html:
        row = cells.get((score, *column))
        if row is None:
            return _element("td", _DASH, class_="number")
        text = _decimals(row.auroc, 3)
        value: str = _element("strong", text) if text == best[column] else text
        interval = _element("small", _interval(row.auroc_interval, 3)) if row.auroc_interval else ""
        return _element(
            "td", value, interval, class_="number" + (" low" if row.auroc < 0.5 else "")
        )

    top = [_element("th", "score", scope="col", rowspan="2" if has_groups else "1")]
    for group, names in groups.items() if has_groups else ():
        top.append(_element("th", group, scope="colgroup", colspan=str(len(names)), class_="group"))
    sets = [_element("th", name, scope="col", class_="number") for _, name in columns]
    heads = [_element("tr", *top), _element("tr", *sets)]
    if not has_groups:
        heads = [_element("tr", *top, *sets)]
    lines = (
        _element("tr", _element("th", score, scope="row"), *(cell(score, c) for c in columns))
        for score in scores
    )
    table = _element("table", _element("thead", *heads), _element("tbody", *lines), class_="wide")
    note = "AUROC; the best of each column is bold."
    if any(row.auroc_interval for row in rows):
        note += " Below each: its interval."
    if any(row.auroc < 0.5 for row in rows):
        note += (
            " Italic: below one half, the outside images look more ordinary than the inside ones."
        )
    return _join(
        (_scrolling(table, "AUROC of scores by outside sets"), _element("p", note, class_="note"))
    )


def _ood_details(rows: Sequence[OodRow]) -> _Html:
    head = (
        *("score", "outside set", "group", "AUROC", "interval"),
        *("AUPR-out", "AUPR-in", "FPR95-out", "FPR95-in"),
    )
    lines = (
        (
            row.score,
            row.outside_set,
            row.group,
            _decimals(row.auroc),
            _interval(row.auroc_interval, 4) or _DASH,
            *map(_decimals, (row.aupr_out, row.aupr_in, row.fpr95_out, row.fpr95_in)),
        )
        for row in rows
    )
    note = (
        "AUPR-out and FPR95-out take outside images as the positive ones: FPR95-out is the share of "
        "inside images flagged where 95 % of the outside ones are found. AUPR-in and FPR95-in take "
        "inside images as positive: FPR95-in is the share of outside images let in where 95 % of the "
        "inside ones are. Low is good for FPR95, high for the others."
    )
    return _element(
        "details",
        _element("summary", "Every metric of every score"),
        _table("Every metric of every score", head, lines, texts=3),
        _element("p", note, class_="note"),
    )


def _bin_edges(inside: np.ndarray, pooled: np.ndarray) -> np.ndarray:
    """Bins over the inside scores and what lies near them: far tails would squash the rest."""
    low, high = np.quantile(inside, (0.01, 0.99))
    spread = high - low
    low = max(pooled.min(), low - 1.5 * spread)
    high = min(pooled.max(), high + 1.5 * spread)
    if not low < high:
        low, high = low - 0.5 * max(1, abs(low)), low + 0.5 * max(1, abs(low))
    return np.linspace(low, high, _NUM_BINS + 1)


def _histogram_figure(sample: ScoreSample, aurocs: Mapping[str, float]) -> _Html:
    inside = np.asarray(sample.inside, np.float64)
    outside = {name: np.asarray(v, np.float64) for name, v in sample.outside.items()}
    edges = _bin_edges(inside, np.concatenate([inside, *outside.values()]))

    def shares(values: np.ndarray) -> np.ndarray:
        counts, _ = np.histogram(np.clip(values, edges[0], edges[-1]), edges)
        return counts / len(values)

    figure = Figure(figsize=(4, 0.6 + 0.8 * len(outside)), layout="constrained")
    axes = figure.subplots(len(outside), 1, sharex=True, squeeze=False)[:, 0]
    for axis, (name, values) in zip(axes, outside.items(), strict=True):
        axis.stairs(shares(inside), edges, fill=True, color="0.78")
        axis.stairs(shares(values), edges, color="black", hatch="////", lw=1)
        beyond = np.mean((values < edges[0]) | (values > edges[-1]))
        text = _label(name)
        if beyond >= 0.01:
            text += f", {beyond:.0%} beyond the axis"
        label = axis.text(0.01, 1.0, text, transform=axis.transAxes, va="top")
        label.set_path_effects([patheffects.withStroke(linewidth=3, foreground="white")])
        axis.set_ylim(bottom=0, top=1.3 * axis.get_ylim()[1])
        axis.set_yticks([])
        axis.spines["left"].set_visible(False)
    axes[-1].set_xlabel("score; larger = more out of distribution")
    sets = "; ".join(
        f"{name}, {len(values):,} images, median {np.median(values):.4g}, AUROC {aurocs[name]:.3f}"
        for name, values in outside.items()
    )
    alt = (
        f"Histograms of {sample.score}: {len(inside):,} inside images, median "
        f"{np.median(inside):.4g}, against {sets}."
    )
    note = (
        "Grey: inside. Hatched: outside. Heights are shares of images; "
        "both ends gather what lies beyond."
    )
    return _drawing(figure, alt, "Inside against outside.", note)


def _roc_figure(sample: ScoreSample, aurocs: Mapping[str, float]) -> _Html:
    from sklearn.metrics import roc_curve  # slow to import

    figure = Figure(figsize=(4, 3.6), layout="constrained")
    axis = figure.subplots()
    axis.plot([0, 1], [0, 1], color="0.8", lw=0.8, zorder=0)
    for index, (name, values) in enumerate(sample.outside.items()):
        is_outside = np.repeat([0, 1], [len(sample.inside), len(values)])
        flagged, found, _ = roc_curve(is_outside, np.concatenate([sample.inside, values]))
        label = f"{_label(name)} {aurocs[name]:.3f}"
        axis.plot(flagged, found, label=label, **line_style(index))
    axis.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01), aspect="equal")
    axis.set(xlabel="share of inside images flagged", ylabel="share of outside images found")
    _add_legend(figure, axis)
    sets = ", ".join(f"{name} {auroc:.3f}" for name, auroc in aurocs.items())
    alt = f"ROC curves of {sample.score}. Areas: {sets}."
    return _drawing(figure, alt, "ROC curves.", "The legend gives the areas.")


def _sample_drawings(sample: ScoreSample) -> _Html:
    from sklearn.metrics import roc_auc_score  # slow to import

    aurocs = {}
    for name, values in sample.outside.items():
        is_outside = np.repeat([0, 1], [len(sample.inside), len(values)])
        pooled = np.concatenate([sample.inside, values])
        aurocs[name] = float(roc_auc_score(is_outside, pooled))
    drawings = (_histogram_figure(sample, aurocs), _roc_figure(sample, aurocs))
    return _grid(drawings, "halves")


def _ood_section(part: OodPart | None) -> _Html:
    if part is None or not (part.rows or part.samples):
        return _Html()
    blocks = []
    if part.protocol:
        blocks.append(_element("p", part.protocol, class_="note"))
    if part.rows:
        blocks += [_auroc_table(part.rows), _ood_details(part.rows)]
    for index, sample in enumerate(part.samples):
        summary = _element("summary", _element("h3", sample.score))
        open_ = {"open": ""} if index == 0 else {}
        blocks.append(
            _element("details", summary, _sample_drawings(sample), class_="score", **open_)
        )
    return _join(blocks)


def _risk_coverage_figure(curves: Sequence[RiskCoverage], score: str) -> _Html:
    figure = Figure(figsize=(4, 2.6), layout="constrained")
    axis = figure.subplots()
    ends = []
    for index, curve in enumerate(curves):
        axis.plot(curve.coverage, curve.risk, label=_label(curve.label), **line_style(index))
        whole = int(np.argmax(curve.coverage))
        ends.append(f"{curve.label}, risk {curve.risk[whole]:.3f} at the largest coverage")
    axis.set(
        xlim=(0, 1.01), xlabel="coverage: share of images kept", ylabel="risk: share of errors"
    )
    axis.set_ylim(bottom=0)
    _add_legend(figure, axis)
    return _drawing(
        figure,
        f"Risk by coverage when the images of largest {score} are given up first: {'; '.join(ends)}.",
        "Risk and coverage.",
        f"Images of largest {score} are given up first; a curve that falls to the left is a useful one.",
    )


def _severity_figures(curves: Sequence[SeverityCurve], score: str) -> list[_Html]:
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
            "grey band from quartile to quartile."
        )
        drawings.append(_drawing(figure, alt, curve.corruption))
    return drawings


def _uncertainty_section(part: UncertaintyPart | None) -> _Html:
    if part is None:
        return _Html()
    blocks, summary = [], []
    if part.numbers:
        rows = [(number.label, number.value) for number in part.numbers]
        protocols = ((number.label, number.protocol) for number in part.numbers)
        table = _table("Checks of the uncertainty", ("check", "value"), rows)
        summary.append(_element("div", table, _protocols(protocols)))
    if part.risk_coverage:
        summary.append(_risk_coverage_figure(part.risk_coverage, part.score))
    if summary:
        blocks.append(_grid(summary, "halves"))
    if part.severity:
        note = _element("p", "Mean, and the band from quartile to quartile.", class_="note")
        drawings = _severity_figures(part.severity, part.score)
        blocks.append(_subsection("Does it grow with severity?", note, _grid(drawings, "thirds")))
    if not blocks:
        return _Html()
    return _join((_element("p", f"Uncertainty: {part.score}.", class_="note"), *blocks))


def _photo_row(images: CaptionedImages | None, kind: str) -> _Html:
    if images is None:
        return _Html()
    photos = [
        _photo(image, f"{kind} image: {caption}", [caption])
        for image, caption in zip(images.images, images.captions, strict=True)
    ]
    return _grid(photos, "photos")


def _neighbour_row(row: Neighbours) -> _Html:
    query = "image" if row.label is None else row.label
    photos = [_photo(row.image, f"query: {query}", [query, "query"], class_="photo query")]
    for rank, (image, cosine) in enumerate(zip(row.images, row.cosine, strict=True)):
        label = None if row.labels is None else row.labels[rank]
        caption = [f"{cosine:.3f}"] if label is None else [label, f"{cosine:.3f}"]
        differs = None not in (label, row.label) and label != row.label
        alt = f"neighbour {rank + 1} of {query}: {label or 'image'}, cosine {cosine:.3f}"
        photos.append(_photo(image, alt, caption, class_="photo differs" if differs else "photo"))
    return _grid(photos, "photos")


def _gallery_section(part: GalleryPart | None) -> _Html:
    if part is None:
        return _Html()
    rows = [_neighbour_row(row) for row in part.neighbours]
    if rows:
        text = "Nearest training images by cosine, nearest first. A dashed frame: another class."
        rows.insert(0, _element("p", text, class_="note"))
    return _join(
        (
            _subsection(
                f"Most uncertain, by {part.score}", _photo_row(part.most_uncertain, "uncertain")
            ),
            _subsection(
                f"Least uncertain, by {part.score}", _photo_row(part.least_uncertain, "sure")
            ),
            _subsection("Nearest neighbours", *rows),
        )
    )


def _scatter(axis: Axes) -> None:
    axis.set(xticks=[], yticks=[], aspect="equal", xlabel="component 1", ylabel="component 2")


def _class_map_figure(part: MapPart, labels: np.ndarray) -> _Html:
    points = np.asarray(part.coordinates)
    classes, counts = np.unique(labels, return_counts=True)
    shown = np.sort(classes[np.argsort(-counts, kind="stable")[:_MAP_CLASSES]])
    figure = Figure(figsize=(4, 3.9), layout="constrained")
    axis = figure.subplots()
    rest = points[~np.isin(labels, shown)]
    if len(rest):
        text = f"other ({len(classes) - len(shown)} classes)"
        axis.scatter(*rest.T, s=4, color="0.88", lw=0, label=text)
    lightness = np.linspace(0, 1, len(shown)) if len(shown) > 1 else np.zeros(1)
    # Neighbouring classes get shades far apart.
    lightness = np.concatenate([lightness[0::2], lightness[1::2]])
    for index, label in enumerate(shown):
        axis.scatter(
            *points[labels == label].T,
            s=14,
            marker=_MARKERS[index % len(_MARKERS)],
            color=matplotlib.colormaps["cividis"](lightness[index]),
            edgecolors="0.25",
            linewidths=0.3,
            label=_label(part.class_names[int(label)]),
        )
    for label in shown:
        x, y = np.median(points[labels == label], axis=0)
        name = _label(part.class_names[int(label)], 12)
        text = axis.text(x, y, name, ha="center", va="center")
        text.set_path_effects([patheffects.withStroke(linewidth=3, foreground="white")])
    _scatter(axis)
    _add_legend(figure, axis, handlelength=1.0)
    sizes = ", ".join(f"{part.class_names[int(k)]} ({np.sum(labels == k):,})" for k in shown)
    alt = (
        f"Map of {len(points):,} images, a marker and shade for each class, named at the median of its "
        f"points: {sizes}."
    )
    return _drawing(figure, alt, "By class.", "Names stand at the medians.")


def _uncertainty_map_figure(part: MapPart, uncertainty: np.ndarray) -> _Html:
    low, high = np.quantile(uncertainty, (0.02, 0.98))
    figure = Figure(figsize=(4, 4.6), layout="constrained")
    axis = figure.subplots()
    order = np.argsort(uncertainty, kind="stable")  # the most uncertain are drawn last
    dots = axis.scatter(
        *np.asarray(part.coordinates)[order].T,
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
        dots, ax=axis, location="bottom", extend="both", shrink=0.8, label=_label(part.score, 40)
    )
    alt = (
        f"The same map, shaded by {part.score}: dark below {low:.4g}, light above {high:.4g}, median "
        f"{np.median(uncertainty):.4g}."
    )
    return _drawing(
        figure, alt, "By uncertainty.", "Light: uncertain. The shades end at 2 and 98 %."
    )


def _plain_map_figure(part: MapPart) -> _Html:
    figure = Figure(figsize=(4, 4), layout="constrained")
    axis = figure.subplots()
    axis.scatter(*np.asarray(part.coordinates).T, s=8, color="0.3", lw=0)
    _scatter(axis)
    return _drawing(figure, f"Map of {len(part.coordinates):,} images.", "Images.")


def _map_section(part: MapPart | None) -> _Html:
    if part is None:
        return _Html()
    drawings = []
    if part.labels is not None:
        drawings.append(_class_map_figure(part, np.asarray(part.labels)))
    if part.uncertainty is not None:
        drawings.append(_uncertainty_map_figure(part, np.asarray(part.uncertainty)))
    drawings = drawings or [_plain_map_figure(part)]
    method = f"{part.method} {len(part.coordinates):,} images."
    return _join((_element("p", method, class_="note"), _grid(drawings, "halves")))


def _spectrum_figure(part: ScalePart, axis_name: str, over: str, across: int) -> _Html:
    """Means over axis `across`, sorted, in a band of their 5 to 95 %."""
    scale = np.asarray(part.posterior_scale, np.float64)
    mean = scale.mean(axis=across)
    order = np.argsort(-mean, kind="stable")
    low, middle, high = np.quantile(scale, (0.05, 0.5, 0.95), axis=across)[:, order]
    rank = np.arange(1, len(mean) + 1)
    figure = Figure(figsize=(4, 2.6), layout="constrained")
    axis = figure.subplots()
    axis.fill_between(rank, low, high, color="0.85", lw=0, label="5 to 95 %")
    axis.plot(rank, mean[order], color="black", label="mean")
    axis.plot(rank, middle, color="0.45", ls="--", lw=1, label="median")
    if part.prior_scale is not None:
        axis.axhline(part.prior_scale, color="black", ls=":", lw=1, label="prior")
    if high.max() > 20 * low.min():
        axis.set_yscale("log")
    axis.set(xlabel=f"{axis_name}, by mean scale", ylabel="posterior scale")
    _add_legend(figure, axis)
    alt = (
        f"Posterior scale of {len(mean):,} {axis_name} sorted by their mean, from {mean.max():.4g} to "
        f"{mean.min():.4g}; band from 5 to 95 % over {over}."
    )
    return _drawing(
        figure, alt, f"Over {axis_name}.", f"Mean from {mean.max():.3g} to {mean.min():.3g}."
    )


def _scale_section(part: ScalePart | None) -> _Html:
    if part is None:
        return _Html()
    drawings = (
        _spectrum_figure(part, "features", "images", across=0),
        _spectrum_figure(part, "images", "features", across=1),
    )
    note = (
        "A flat line over features is an isotropic posterior; a flat line over images an uncertainty "
        "that ranks nothing."
    )
    return _join((_element("p", note, class_="note"), _grid(drawings, "halves")))


def _curves_figure(records: Sequence[Mapping[str, Any]], title: str, names: Sequence[str]) -> _Html:
    """Logged values by step, or nothing where none of the names was logged."""
    ends = []
    for name in names:
        points = [(record["step"], record[name]) for record in records if name in record]
        if points:
            ends.append((name.split("/", 1)[-1], *points[0], *points[-1]))
    if not ends:
        return _Html()
    figure = Figure(figsize=(3.6, 2.3), layout="constrained")
    axis = figure.subplots()
    draw_curves(axis, records, names)
    if len(ends) > 1:
        _add_legend(figure, axis)
        note = ""
    else:
        note = f"{ends[0][4]:.4g} at step {ends[0][3]:,}."
    changes = "; ".join(
        f"{name} from {first:.4g} at step {start:,} to {last:.4g} at step {stop:,}"
        for name, start, first, stop, last in ends
    )
    return _drawing(figure, f"{title} by step: {changes}.", f"{title}.", note)


def _curve_panels(records: Sequence[Mapping[str, Any]]) -> tuple[list[_Html], list[_Html]]:
    """Training and health: every logged name is in at least one panel."""
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

    def draw(panels: Sequence[tuple[str, list[str]]]) -> list[_Html]:
        drawings = (_curves_figure(records, title, group) for title, group in panels)
        return [drawing for drawing in drawings if drawing]

    return draw(training), draw(health)


def _text(value: Any) -> str:
    if isinstance(value, str) and value:
        return value
    return "none" if value is None else json.dumps(value, ensure_ascii=False, default=str)


def _flatten(value: Any, prefix: str = "") -> list[tuple[str, str]]:
    """Dotted names and texts of the leaves."""
    if not isinstance(value, Mapping) or not value:
        return [(prefix, _text(value))]
    return [
        pair
        for key, item in value.items()
        for pair in _flatten(item, f"{prefix}.{key}" if prefix else str(key))
    ]


def _settings_table(label: str, pairs: Sequence[tuple[str, str]], caption: str = "") -> _Html:
    rows = (
        _element("tr", _element("th", name, scope="row"), _element("td", text))
        for name, text in pairs
    )
    head = _element("caption", caption) if caption else ""
    return _scrolling(_element("table", head, _element("tbody", *rows), class_="settings"), label)


def _reproduction_section(report: RunReport) -> _Html:
    blocks = []
    if report.command:
        lines = [[]]
        for word in report.command:
            if word.startswith("-"):  # a flag begins a line
                lines.append([])
            lines[-1].append(word)
        text = " \\\n  ".join(shlex.join(line) for line in lines if line)
        command = _element("pre", _element("code", text))
        blocks.append(_subsection("Command", command))
    if report.environment:
        blocks.append(
            _subsection("Environment", _settings_table("Environment", _flatten(report.environment)))
        )
    if report.config:
        groups = {k: v for k, v in report.config.items() if isinstance(v, Mapping) and v}
        plain = {k: v for k, v in report.config.items() if k not in groups}
        tables = [_settings_table("Settings of the run", _flatten(plain), "run")] if plain else []
        tables += [
            _settings_table(f"Settings of {name}", _flatten(group), name)
            for name, group in groups.items()
        ]
        summary = _element("summary", f"{len(_flatten(report.config))} settings")
        body = _element("div", *tables, class_="columns")
        blocks.append(_subsection("Config", _element("details", summary, body)))
    return _join(blocks)


_CSS = """
:root {
  color-scheme: light dark;
  --paper: #fdfcfa; --ink: #1e1d1b; --muted: #605d57; --rule: #dad6cd; --faint: #f4f1eb;
  --shade: #1e1d1b30; --accent: #1d4e79; --alarm: #96271b; --alarm-paper: #fbeeea;
  --serif: Charter, "Iowan Old Style", "Palatino Linotype", Palatino, Georgia,
    "Liberation Serif", serif;
  --sans: system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", Arial, sans-serif;
  --mono: ui-monospace, "Cascadia Mono", Menlo, Consolas, "Liberation Mono", monospace;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #17181a; --ink: #e7e4de; --muted: #a5a29b; --rule: #3a3b3f; --faint: #212225;
    --shade: #00000090; --accent: #9dc4ea; --alarm: #ffa394; --alarm-paper: #2e1d1a;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body {
  margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 84rem; background: var(--paper);
  color: var(--ink); font: 1.0625rem/1.55 var(--serif); overflow-wrap: break-word;
}
h1, h2, h3 { line-height: 1.25; font-weight: 600; text-wrap: balance; }
h1 { font-size: 1.9rem; margin: 0; }
h2 { font-size: 1.35rem; margin: 0 0 1rem; }
h3 { font-size: 1.0625rem; margin: 2rem 0 .5rem; }
h2 + h3 { margin-top: 0; }
p { margin: 0 0 .75rem; max-width: 42rem; }
a { color: var(--accent); text-underline-offset: .15em; }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
.subtitle, .note { color: var(--muted); }
.subtitle { margin: .35rem 0 0; }
.note { font-size: .9375rem; }

nav { font: .9rem/1.4 var(--sans); margin: 1.5rem 0 0; }
nav ol {
  list-style: none; margin: 0; padding: 0; display: flex; flex-wrap: wrap; gap: .2rem 1.1rem;
}
nav a { display: block; padding: .3rem 0; text-decoration: none; }
nav a:hover { text-decoration: underline; }
section {
  border-top: 1px solid var(--rule); padding-top: 1.5rem; margin-top: 2.75rem;
  scroll-margin-top: 1rem;
}

.headline {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 13rem), 1fr));
  gap: 1.75rem 2rem; margin: 2rem 0 0;
}
.headline div { border-top: 2px solid var(--ink); padding-top: .6rem; }
.headline dt { font: .9rem/1.35 var(--sans); }
.headline dd { margin: 0; }
.headline .value {
  font-size: 2.1rem; line-height: 1.3; font-variant-numeric: tabular-nums lining-nums;
}
.headline .protocol { color: var(--muted); font-size: .875rem; line-height: 1.45; }

.calm { margin: 1.75rem 0 0; color: var(--muted); }
.alarms {
  border-left: 4px solid var(--alarm); background: var(--alarm-paper); padding: 1rem 1.25rem;
}
.alarms ul { list-style: none; margin: 0; padding: 0; }
.alarms li + li { margin-top: .75rem; }
.alarms b { color: var(--alarm); }
.alarms p { margin: .1rem 0 0; }
.alarms small { font: .85rem var(--sans); color: var(--muted); }
.alarms details { margin: .5rem 0 0; }
.alarms details li { font-size: .9rem; margin-top: .35rem; }

/* Shades at the edges say that a table goes on; they scroll away with its ends. */
.scroll {
  overflow-x: auto; margin: 0 0 1rem; max-width: 100%;
  background:
    linear-gradient(var(--paper), var(--paper)) 0 0 / 1.5rem 100% no-repeat local,
    linear-gradient(var(--paper), var(--paper)) 100% 0 / 1.5rem 100% no-repeat local,
    linear-gradient(to right, var(--shade), transparent) 0 0 / .8rem 100% no-repeat scroll,
    linear-gradient(to left, var(--shade), transparent) 100% 0 / .8rem 100% no-repeat scroll;
}
table {
  border-collapse: collapse; font: .875rem/1.4 var(--sans);
  font-variant-numeric: tabular-nums lining-nums;
}
th, td {
  padding: .38rem .7rem .38rem 0; text-align: left; vertical-align: baseline; font-weight: 400;
}
tr > :last-child { padding-right: .25rem; }
thead th { color: var(--muted); vertical-align: bottom; border-bottom: 1px solid var(--ink); }
tbody tr { border-bottom: 1px solid var(--rule); }
th.number, td.number { text-align: right; white-space: nowrap; }
tbody th { min-width: 6.5rem; }
th.group { text-align: center; border-bottom-color: var(--rule); padding-left: .9rem; }
td.low { font-style: italic; color: var(--muted); }
td small { display: block; color: var(--muted); font-size: .75rem; font-style: normal; }
.wide tr > th:first-child:not(.number) {
  position: sticky; left: 0; z-index: 1; background: var(--paper); min-width: 7.5rem;
  max-width: 16rem;
}
.settings caption { text-align: left; font-weight: 600; padding: .25rem 0; }
.settings th { color: var(--muted); }
.settings td { overflow-wrap: anywhere; min-width: 8rem; }

details { margin: 0 0 1rem; }
summary { cursor: pointer; font: .9rem/1.5 var(--sans); color: var(--accent); padding: .35rem 0; }
summary h3 {
  display: inline; margin: 0; font: 600 1.0625rem/1.5 var(--serif); color: var(--ink);
}
details.score { border-top: 1px solid var(--rule); margin: 0; padding: .35rem 0; }
details.score > .grid { margin: .5rem 0 1.5rem; }
details dl { font-size: .9rem; line-height: 1.5; margin: .25rem 0 0; max-width: 48rem; }
details dt { font: 600 .85rem var(--sans); margin-top: .75rem; }
details dd { margin: .1rem 0 0; color: var(--muted); }

.grid { display: grid; gap: 1.5rem; align-items: start; }
.thirds { grid-template-columns: repeat(auto-fill, minmax(min(100%, 17rem), 1fr)); }
.halves { grid-template-columns: repeat(auto-fill, minmax(min(100%, 24rem), 1fr)); }
.photos {
  grid-template-columns: repeat(auto-fill, minmax(3.75rem, 1fr)); gap: 1rem .75rem;
  margin-bottom: 1.75rem;
}
figure { margin: 0; min-width: 0; }
figcaption {
  font: .85rem/1.4 var(--sans); margin-top: .4rem; color: var(--muted);
  font-variant-numeric: tabular-nums;
}
figcaption b { color: var(--ink); font-weight: 600; }
.drawing { max-width: 34rem; }
.drawing img {
  display: block; width: 100%; height: auto; background: #fff; border: 1px solid var(--rule);
  border-radius: 3px; padding: .35rem;
}
.photo img { display: block; width: 100%; height: auto; outline: 1px solid var(--rule); }
.photo.query img { outline: 2px solid var(--ink); outline-offset: 2px; }
.photo.differs img { outline: 2px dashed var(--muted); outline-offset: 2px; }
.photo .pixels { image-rendering: pixelated; }
.photo figcaption { font-size: .75rem; line-height: 1.35; }
.photo figcaption span { display: block; overflow-wrap: anywhere; }
.photo.query figcaption { color: var(--ink); font-weight: 600; }
pre {
  font: .85rem/1.5 var(--mono); white-space: pre-wrap; overflow-wrap: anywhere; margin: 0;
  background: var(--faint); padding: .8rem 1rem; border-radius: 3px;
}
.columns { columns: 24rem; column-gap: 3rem; }
.columns .scroll { break-inside: avoid; margin-bottom: 1.25rem; }

@media (min-width: 40rem) {
  th, td { padding-right: 1rem; }
  th.number, td.number { padding-left: 1rem; min-width: 4.5rem; }
  .photos { grid-template-columns: repeat(auto-fill, minmax(4.5rem, 1fr)); }
}
@media (min-width: 70rem) {
  body {
    display: grid; grid-template-columns: 11rem minmax(0, 1fr); column-gap: 3.5rem;
    grid-template-rows: auto 1fr; padding: 3rem 2.5rem 6rem;
  }
  header, main { grid-column: 2; }
  nav {
    grid-column: 1; grid-row: 1 / span 2; position: sticky; top: 3rem; align-self: start;
    margin: .6rem 0 0;
  }
  nav ol { display: block; }
}
@media print {
  nav { display: none; }
  body { display: block; font-size: 10pt; }
  figure, tr { break-inside: avoid; }
}
"""


def _page(report: RunReport) -> str:
    training, health = _curve_panels(report.records)
    sections = (
        ("alarms", "Health alarms", _alarms_section(report.alarms)),
        ("results", "Results", _results_section(report.results)),
        ("ood", "Out-of-distribution detection", _ood_section(report.ood)),
        ("uncertainty", "Uncertainty", _uncertainty_section(report.uncertainty)),
        ("images", "Images", _gallery_section(report.gallery)),
        ("map", "Map of the embedding", _map_section(report.embedding_map)),
        ("scales", "Posterior scales", _scale_section(report.posterior_scale)),
        ("training", "Training", _grid(training, "thirds")),
        ("health", "Health", _grid(health, "thirds")),
        ("reproduction", "Reproduction", _reproduction_section(report)),
    )
    present = [section for section in sections if section[2]]
    calm = _Html()
    if report.alarms is not None and not report.alarms:
        calm = _element("p", "No health alarm was raised.", class_="calm")
    subtitle = report.subtitle
    header = _element(
        "header",
        _element("h1", report.title),
        _element("p", subtitle, class_="subtitle") if subtitle else "",
        _headline(report),
        calm,
    )
    links = (_element("li", _element("a", title, href=f"#{name}")) for name, title, _ in present)
    nav = _element("nav", _element("ol", *links), **{"aria-label": "Contents"}) if present else ""
    main = _element(
        "main",
        *(
            _element("section", _element("h2", title), body, id=name)
            for name, title, body in present
        ),
    )
    head = _element(
        "head",
        _Html('<meta charset="utf-8">'),
        _Html('<meta name="viewport" content="width=device-width, initial-scale=1">'),
        _element("title", report.title),
        _element("style", _Html(_CSS)),
    )
    body = _element("body", header, nav, main)
    return "<!DOCTYPE html>\n" + _element("html", head, body, lang="en") + "\n"


def write_html_report(path: Path, report: RunReport) -> None:
    """Writes the page of a run: one file, without scripts, that refers to nothing outside itself.

    Args:
      path: the file; its directory exists. It is whole or not there.
      report: what to show.
    """
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # the page does not depend on the user's matplotlibrc
        matplotlib.rcParams.update(_STYLE)
        page = _page(report)
    files.write_text_atomically(path, page)
