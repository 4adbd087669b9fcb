"""The report of a run: one HTML page that shows what `results.json` holds.

The page opens without a network. It contains no scripts and no references to other files; figures
and images are PNGs inside the page. The same arguments give the same bytes with the same version of
matplotlib. A section without content is left out. The templates hold the markup, `style.css` holds
the styles, and this module prepares the values.
"""

import base64
import functools
import io
import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np
from markupsafe import Markup, escape
from PIL import Image

from jevb_jax.evaluation.evidence import Evidence, Neighbors, ScoredImages
from jevb_jax.report import figures, tables, training_curves
from jevb_jax.report.findings import findings
from jevb_jax.runs import files
from jevb_jax.runs.dotted_keys import flatten
from jevb_jax.training.alarms import AlarmPeriod

_THUMBNAIL_PIXELS = 160  # longest side of an image on the page
_PIXELATED_BELOW = 64  # smaller images are enlarged without smoothing
_DASH = "\u2013"


class _Table(NamedTuple):
    """A table whose first `texts` columns are text, and the others numbers."""

    label: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    texts: int = 1


class _Photo(NamedTuple):
    """An image with the lines of its caption."""

    png: bytes
    alt: str
    caption: Sequence[str]
    is_pixelated: bool
    kind: str  # "", "query" or "differs"


class _Section(NamedTuple):
    """A section of the page; the macro `name` of the templates draws `content`."""

    name: str
    title: str
    content: Any


# --- Words ---


def _decimals(value: float | None, digits: int = 4) -> str:
    return _DASH if value is None else f"{value:.{digits}f}"


def _words(name: str) -> str:
    return name.replace("_", " ")


def _text(value: Any) -> str:
    if isinstance(value, str) and value:
        return value
    return "none" if value is None else json.dumps(value, ensure_ascii=False, default=str)


def _leaves(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Pairs of dotted name and text, one for each leaf."""
    return [(name, _text(value)) for name, value in flatten(values).items()]


# --- Sections: each is None where there is nothing to show ---


def _headline(results: Mapping[str, Any]) -> list[dict[str, str]]:
    """The numbers at the top: accuracies of the representation, AUROCs of the default score."""
    wanted = [
        row
        for row in results["trained"]
        if row["features"] == "representation" and row["name"].endswith("_accuracy")
    ][:3]
    if "ood" in results:
        wanted += [
            row
            for row in results["trained"]
            if row["features"] == results["ood"]["default_score"]
            and row["name"].startswith("auroc_")
        ]
    return [
        {
            "label": f"{_words(row['name'])}, {row['features']}",
            "value": f"{row['value']:.3f}",
            "protocol": row["protocol"],
        }
        for row in wanted
    ]


def _alarms(alarms: Sequence[AlarmPeriod] | None) -> dict[str, Any] | None:
    """Alarms grouped by name; also the full list if an alarm was raised more than once."""
    by_step = sorted(alarms or (), key=lambda alarm: alarm.step)
    if not by_step:
        return None
    by_name: dict[str, list[AlarmPeriod]] = {}
    for alarm in by_step:
        by_name.setdefault(alarm.name, []).append(alarm)

    def when(raised: list[AlarmPeriod]) -> str:
        first = f"step {raised[0].step:,}"
        if len(raised) == 1:
            return first
        return f"{len(raised):,} times, first at {first}, last at step {raised[-1].step:,}"

    kinds = [
        {"name": name, "when": when(raised), "message": raised[0].message}
        for name, raised in by_name.items()
    ]
    return {"kinds": kinds, "every": by_step if len(by_step) > len(kinds) else ()}


def _results(results: Mapping[str, Any]) -> dict[str, Any] | None:
    rows = tables.measure_rows(results)
    if not rows:
        return None
    columns, values_of_rows = tables.encoder_columns(rows)
    head = ["measure", "features", *columns]
    cells = [
        (row.name, row.features, *(_decimals(value) for value in values))
        for row, values in zip(rows, values_of_rows, strict=True)
    ]
    return {
        "table": _Table("Results", head, cells, texts=2),
        "protocols": [(f"{row.name}, {row.features}", row.protocol) for row in rows],
    }


def _aurocs(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """AUROC of each score on each outside set; the best value of a column is marked."""
    groups: dict[str, dict[str, None]] = {}
    for row in rows:
        groups.setdefault(row["group"], {})[row["outside"]] = None
    columns = [(group, name) for group, names in groups.items() for name in names]
    by_cell = {(row["score"], row["group"], row["outside"]): row for row in rows}
    # Compared as printed, so that values that look equal are all marked.
    best = {
        column: max(f"{row['auroc']:.3f}" for key, row in by_cell.items() if key[1:] == column)
        for column in columns
    }

    def cell(score: str, column: tuple[str, str]) -> dict[str, Any] | None:
        row = by_cell.get((score, *column))
        if row is None:
            return None
        text = f"{row['auroc']:.3f}"
        return {
            "text": text,
            "is_best": text == best[column],
            "is_low": row["auroc"] < 0.5,
            "interval": _interval(row, 3),
        }

    return {
        "groups": {group: list(names) for group, names in groups.items()},
        "rows": {
            score: [cell(score, column) for column in columns]
            for score in dict.fromkeys(row["score"] for row in rows)
        },
        "has_intervals": any("low" in row for row in rows),
        "has_low": any(row["auroc"] < 0.5 for row in rows),
    }


def _interval(row: Mapping[str, Any], digits: int) -> str:
    if "low" not in row:
        return ""
    return f"{row['low']['auroc']:.{digits}f}{_DASH}{row['high']['auroc']:.{digits}f}"


def _every_metric(rows: Sequence[Mapping[str, Any]]) -> _Table:
    head = (
        *("score", "outside set", "group", "AUROC", "interval"),
        *("AUPR-out", "AUPR-in", "FPR95-out", "FPR95-in"),
    )
    metrics = ("aupr_out", "aupr_in", "fpr95_outside_positive", "fpr95_inside_positive")
    cells = [
        (
            row["score"],
            row["outside"],
            row["group"],
            _decimals(row["auroc"]),
            _interval(row, 4) or _DASH,
            *(_decimals(row[metric]) for metric in metrics),
        )
        for row in rows
    ]
    return _Table("Every metric of every score", head, cells, texts=3)


def _detection(results: Mapping[str, Any], evidence: Evidence) -> dict[str, Any] | None:
    if "ood" not in results:
        return None
    found = results["ood"]
    sentences = [
        f"Protocol: {found['protocol']}.",
        f"Default score of the method: {found['default_score']}.",
    ]
    if found["chosen_score"]:
        sentences.append(f"Chosen score: {found['chosen_score']}, {found['choice']}.")
    sentences += [f"Left out: {name}, {reason}." for name, reason in found["left_out"].items()]
    sentences += evidence.not_drawn
    return {
        "protocol": " ".join(sentences),
        "aurocs": _aurocs(found["rows"]) if found["rows"] else None,
        "every_metric": _every_metric(found["rows"]),
        "drawings": {
            score: figures.separation_drawings(score, separations)
            for score, separations in evidence.separations.items()
        },
    }


def _uncertainty(results: Mapping[str, Any], evidence: Evidence) -> dict[str, Any] | None:
    score = evidence.uncertainty_score
    if score is None:
        return None
    rows = [
        row
        for row in results["trained"]
        if row["features"] == score and not row["name"].startswith("auroc_")
    ]
    cells = [(_words(row["name"]), f"{row['value']:.3f}") for row in rows]
    curves, severity = evidence.risk_coverage, evidence.severity
    return {
        "score": score,
        "table": _Table("Checks of the uncertainty", ("check", "value"), cells) if cells else None,
        "protocols": [(_words(row["name"]), row["protocol"]) for row in rows],
        "risk_coverage": figures.risk_coverage_drawing(curves, score) if curves else None,
        "severity": figures.severity_drawings(severity, score) if severity else (),
    }


def _photo(image: np.ndarray, alt: str, caption: Sequence[str], kind: str = "") -> _Photo:
    picture = Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image)
    picture.thumbnail((_THUMBNAIL_PIXELS, _THUMBNAIL_PIXELS), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return _Photo(buffer.getvalue(), alt, caption, max(image.shape) < _PIXELATED_BELOW, kind)


def _scored_photos(scored: ScoredImages | None, kind: str) -> list[_Photo]:
    if scored is None:
        return []
    captions = [f"{value:.3g}" for value in scored.uncertainty]
    if scored.labels is not None:
        captions = [f"{label}, {text}" for label, text in zip(scored.labels, captions, strict=True)]
    return [
        _photo(image, f"{kind} image: {caption}", [caption])
        for image, caption in zip(scored.images, captions, strict=True)
    ]


def _neighbor_photos(row: Neighbors) -> list[_Photo]:
    query = "image" if row.label is None else row.label
    photos = [_photo(row.image, f"query: {query}", [query, "query"], "query")]
    labels = row.labels or [None] * len(row.images)
    for rank, (image, label, cosine) in enumerate(
        zip(row.images, labels, row.cosine, strict=True), start=1
    ):
        caption = [f"{cosine:.3f}"] if label is None else [label, f"{cosine:.3f}"]
        differs = None not in (label, row.label) and label != row.label
        alt = f"neighbor {rank} of {query}: {label or 'image'}, cosine {cosine:.3f}"
        photos.append(_photo(image, alt, caption, "differs" if differs else ""))
    return photos


def _images(evidence: Evidence) -> dict[str, Any] | None:
    if evidence.most_uncertain is None and not evidence.neighbors:
        return None
    return {
        "score": evidence.uncertainty_score,
        "most_uncertain": _scored_photos(evidence.most_uncertain, "uncertain"),
        "least_uncertain": _scored_photos(evidence.least_uncertain, "sure"),
        "neighbors": [_neighbor_photos(row) for row in evidence.neighbors],
    }


def _map(evidence: Evidence) -> dict[str, Any] | None:
    points = evidence.embedding_map
    if points is None:
        return None
    return {
        "num_images": len(points.coordinates),
        "drawings": figures.map_drawings(points, evidence.uncertainty_score),
    }


def _scales(evidence: Evidence) -> list[figures.Drawing]:
    if evidence.posterior_scale is None:
        return []
    return figures.scale_drawings(evidence.posterior_scale, evidence.prior_scale)


def _reproduction(
    config: Mapping[str, Any], environment: Mapping[str, Any]
) -> dict[str, Any] | None:
    lines: list[list[str]] = [[]]
    for word in environment["command"]:
        if word.startswith("-"):  # a flag begins a line
            lines.append([])
        lines[-1].append(word)
    groups = {name: value for name, value in config.items() if isinstance(value, Mapping) and value}
    plain = {name: value for name, value in config.items() if name not in groups}
    settings = [("Settings of the run", "run", _leaves(plain))] if plain else []
    settings += [(f"Settings of {name}", name, _leaves(group)) for name, group in groups.items()]
    facts = {name: value for name, value in environment.items() if name != "command"}
    content = {
        "command": " \\\n  ".join(shlex.join(line) for line in lines if line),
        "environment": _leaves(facts) if facts else (),
        "settings": settings,
        "num_settings": sum(len(pairs) for _, _, pairs in settings),
    }
    return content if any(content.values()) else None


# --- The page ---


def _data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def _breakable(name: str) -> Markup:
    """A name that may break into a new line after an underscore."""
    return Markup("_<wbr>").join(escape(part) for part in name.split("_"))


@functools.cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("jevb_jax.report", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"data_uri": _data_uri, "breakable": _breakable}
    return environment.get_template("page.html.j2")


def _subtitle(results: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    text = f"step {results['step']:,}, {results['split']} split"
    if "earlier_lengths" in results:
        steps = ", ".join(f"{length['until_step']:,}" for length in results["earlier_lengths"])
        text += f", extended at step {steps}"
    if config.get("data", {}).get("source") == "features":
        text += ". The run reads features: an image is one row of them"
    return text


def _present(sections: Iterable[_Section]) -> list[_Section]:
    return [section for section in sections if section.content]


def write_page(
    path: Path,
    *,
    title: str,
    results: Mapping[str, Any],
    num_images: int,
    evidence: Evidence,
    records: Sequence[Mapping[str, Any]],
    alarms: Sequence[AlarmPeriod] | None,
    config: Mapping[str, Any],
    environment: Mapping[str, Any],
) -> None:
    """Writes the report of a run, atomically.

    Args:
      path: HTML file; its directory exists.
      title: heading, such as method and data set.
      results: the content of `results.json`.
      num_images: number of images of the reported split.
      evidence: arrays of the evaluation that the figures need.
      records: lines of `metrics.jsonl`; every number in them is drawn.
      alarms: alarms that were raised in training; None if there were no health checks.
      config: the content of `config.json`.
      environment: the content of `environment.json`.
    """
    with figures.page_style():
        training, health = training_curves.curve_drawings(records)
        sections = [
            _Section("alarms", "Health alarms", _alarms(alarms)),
            _Section("results", "Results", _results(results)),
            _Section("ood", "Out-of-distribution detection", _detection(results, evidence)),
            _Section("uncertainty", "Uncertainty", _uncertainty(results, evidence)),
            _Section("images", "Images", _images(evidence)),
            _Section("map", "Map of the embedding", _map(evidence)),
            _Section("scales", "Posterior scales", _scales(evidence)),
            _Section("training", "Training", training),
            _Section("health", "Health", health),
            _Section("reproduction", "Reproduction", _reproduction(config, environment)),
        ]
    page = _template().render(
        title=title,
        subtitle=_subtitle(results, config),
        headline=_headline(results),
        findings=findings(results, num_images=num_images, alarms=alarms),
        sections=_present(sections),
    )
    files.write_text_atomically(path, page)
