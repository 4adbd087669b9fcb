import base64
import html.parser
import io
import itertools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import pytest
from matplotlib import figure
from matplotlib.text import Text
from PIL import Image
from scipy import stats
from sklearn.datasets import load_digits

from jevb_jax.evaluation.evidence import (
    EmbeddingMap,
    Evidence,
    Neighbors,
    ScoredImages,
    SeverityCurve,
    embedding_map,
    separation,
)
from jevb_jax.evaluation.reliability import RiskCoverage
from jevb_jax.report import page as page_module
from jevb_jax.training.alarms import AlarmPeriod

# Markup, and mathematics that matplotlib cannot read.
HOSTILE = """ $x^$<script src="http://a.b/c">&'"</script><img src=x>"""
VOID = {"meta", "img", "wbr"}


def squeeze(text: str) -> str:
    """As a browser shows it: runs of spaces are one."""
    return " ".join(text.split())


class Page(html.parser.HTMLParser):
    """The elements of a page in their order; refuses tags that do not close one another."""

    def __init__(self, text: str):
        super().__init__()
        self.elements: list[tuple[str, dict[str, Any], list[str]]] = []
        self.open: list[tuple[str, dict[str, Any], list[str]]] = []
        self.source = text
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = (tag, dict(attrs), [])
        assert len(element[1]) == len(attrs)
        self.elements.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        for element in self.open:
            element[2].append(data)

    def texts(self, *tags: str, class_: str | None = None) -> list[str]:
        return [
            squeeze("".join(text))
            for tag, attributes, text in self.elements
            if tag in tags and class_ in (None, attributes.get("class"))
        ]

    def attributes(self, tag: str) -> list[dict[str, Any]]:
        return [attributes for name, attributes, _ in self.elements if name == tag]


NOTHING: dict[str, Any] = {
    "title": "t",
    "results": {"step": 7, "split": "test", "trained": []},
    "num_images": 200,
    "evidence": Evidence(),
    "records": (),
    "alarms": None,
    "config": {},
    "environment": {"command": []},
}
SUBTITLE = "step 7, test split"


def write(directory: Path, **given: Any) -> Page:
    path = directory / "report.html"
    page_module.write_page(path, **NOTHING | given)
    assert [file.name for file in directory.iterdir()] == ["report.html"]
    return Page(path.read_text(encoding="utf-8"))


def pixels(source: str) -> np.ndarray:
    png = base64.b64decode(source.removeprefix("data:image/png;base64,"), validate=True)
    with Image.open(io.BytesIO(png)) as image:
        assert image.format == "PNG"
        return np.asarray(image)


RNG = np.random.default_rng(0)
DIGITS: Any = load_digits()
IMAGES = (DIGITS.images * (255 / 16)).astype(np.uint8)[..., None]
LABELS = DIGITS.target[:300]
SCALE = np.exp(RNG.normal(size=(40, 6)))
UNCERTAINTY = RNG.gamma(2, size=300)
SEVERITY = SeverityCurve(
    "blur" + HOSTILE,
    severity=np.arange(4),
    mean=np.array([1.0, 2.0, 3.0, 5.0]),
    lower_quartile=np.array([0.5, 1.0, 2.0, 4.0]),
    upper_quartile=np.array([1.5, 3.0, 4.0, 6.0]),
)
# Ties within and between; the last set has far tails, and is compared with the first images only.
INSIDE = np.round(RNG.normal(size=200), 1)
OUTSIDE = {
    "near" + HOSTILE: np.round(RNG.normal(0.5, size=150), 1),
    "_far": np.concatenate([np.round(RNG.normal(2, size=80), 1), [1e9] * 20]),
}
INSIDE_OF = {"near" + HOSTILE: INSIDE, "_far": INSIDE[:120]}


def auroc(inside: np.ndarray, outside: np.ndarray) -> float:
    ranks = stats.rankdata(np.concatenate([inside, outside]))[len(inside) :]
    m = len(outside)
    return (ranks.sum() - m * (m + 1) / 2) / (len(inside) * m)


SEPARATIONS = [
    separation(name, INSIDE_OF[name], outside, auroc=auroc(INSIDE_OF[name], outside))
    for name, outside in OUTSIDE.items()
]


def set_row(score: str, outside: str, group: str, value: float, **ends: Any) -> dict[str, Any]:
    metrics = {
        "aupr_out": 0.81,
        "aupr_in": 0.82,
        "fpr95_outside_positive": 0.31,
        "fpr95_inside_positive": 0.32,
    }
    return {"score": score, "outside": outside, "group": group, "auroc": value, **metrics, **ends}


ROWS = [
    set_row(
        *("a" + HOSTILE, "set 1", "near" + HOSTILE, 0.9), low={"auroc": 0.85}, high={"auroc": 0.95}
    ),
    set_row("a" + HOSTILE, "set 2", "far", 0.4),
    set_row("b", "set 1", "near" + HOSTILE, 0.90004),
    set_row("b", "set 3", "far", 0.7),
    set_row("b", "set 2", "far", 0.6),
]


def measured(name: str, features: str, value: float, protocol: str = "") -> dict[str, Any]:
    return {"name": name, "features": features, "value": value, "protocol": protocol}


RESULTS = {
    "step": 1500,
    "split": "test" + HOSTILE,
    "earlier_lengths": [{"num_steps": 900, "until_step": 1000}],
    "trained": [
        measured("knn_20_accuracy", "representation", 0.5, "bank" + HOSTILE),
        measured("linear" + HOSTILE, "embedding", 0.75, "fitted" + HOSTILE),
        measured("auroc_near" + HOSTILE, "a" + HOSTILE, 0.91234, "mean" + HOSTILE),
        measured("auroc_near", "entropy" + HOSTILE, 0.3),
        measured("error_auroc" + HOSTILE, "entropy" + HOSTILE, 0.8, "how" + HOSTILE),
    ],
    "untrained": [measured("knn_20_accuracy", "representation", 0.25)],
    "ood": {
        "protocol": "in, out" + HOSTILE,
        "default_score": "a" + HOSTILE,
        "chosen_score": "b",
        "choice": "best of two" + HOSTILE,
        "left_out": {"c" + HOSTILE: "no labels" + HOSTILE},
        "rows": ROWS,
    },
}
RECORDS = [
    {
        "step": step,
        "train/loss": -step,
        "train/elbo": step,
        "train/directional_log_likelihood": 3 * step,
        "train/radial_log_likelihood": -step / 2,
        "train/kl": float("nan") if step == 2 else step + 0.5,
        "train/entropy": 7.0,
        "train/embedding_std": 1 / step,
        "train/gradient_norm": step**2,
        "train/learning_rate": 0.1,
        "train/relative_step": 0.01 / step,
    }
    for step in (1, 2, 3)
]
RECORDS += [
    {
        "step": 2,
        "health/effective_rank": 7.5,
        "health/embedding_std": 0.75,
        "health/pair_cosine": 0.5,
    },
    {
        "step": 3,
        "validation/knn_accuracy": 0.25,
        "health/gradient_kl": 3.0,
        "health/gradient_ll": 4.0,
    },
]
EVIDENCE = Evidence(
    uncertainty_score="entropy" + HOSTILE,
    separations={"a" + HOSTILE: SEPARATIONS},
    risk_coverage={
        "k-NN" + HOSTILE: RiskCoverage(np.array([0.5, 1.0]), np.array([0.125, 0.25]), 0.1)
    },
    severity=[SEVERITY, SEVERITY._replace(corruption="noise", mean=np.full(4, 9.0))],
    most_uncertain=ScoredImages(IMAGES[:2], ["a" + HOSTILE, "b"], np.array([2.5, 1.5])),
    least_uncertain=ScoredImages(np.repeat(IMAGES[2:3], 3, axis=3), None, np.array([0.12345])),
    neighbors=[
        Neighbors(
            IMAGES[3], "3" + HOSTILE, IMAGES[4:6], ["3" + HOSTILE, "5"], np.array([0.9, 0.8])
        ),
        Neighbors(IMAGES[6], None, IMAGES[7:8], None, np.array([0.75])),
    ],
    embedding_map=EmbeddingMap(
        embedding_map(DIGITS.data[:300]),
        LABELS,
        tuple(f"class {i}" + HOSTILE for i in range(10)),
        UNCERTAINTY,
    ),
    posterior_scale=SCALE,
    prior_scale=2.0,
)
FULL: dict[str, Any] = {
    "title": "A run" + HOSTILE,
    "results": RESULTS,
    "evidence": EVIDENCE,
    "records": RECORDS,
    "alarms": [
        AlarmPeriod(2000, "collapse", "last message"),
        AlarmPeriod(300, "floor", "floor message"),
        AlarmPeriod(100, "collapse", "first message" + HOSTILE),
    ],
    "config": {
        "seed": 0,
        "jevb": {"df": 5.0, "name": HOSTILE},
        "data": {"paths": ["a", "b"], "none": None},
    },
    "environment": {
        "command": ["python", "train.py", "--config=a b.py", "--x=1" + HOSTILE],
        "commit" + HOSTILE: "abc" + HOSTILE,
        "versions": {"jax": "1", "flax": None},
    },
}


class Drawn(NamedTuple):
    page: Page
    figures: dict[bytes, Any]  # matplotlib's, by their PNG


@pytest.fixture
def saved(monkeypatch):
    """Figures by the PNG that was written of them."""
    return keep_figures(monkeypatch)


def keep_figures(patch: pytest.MonkeyPatch) -> dict[bytes, Any]:
    kept: dict[bytes, Any] = {}
    save = figure.Figure.savefig

    def keep(self, buffer, **keywords):
        save(self, buffer, **keywords)
        kept[buffer.getvalue()] = self

    patch.setattr(figure.Figure, "savefig", keep)
    return kept


@pytest.fixture(scope="module")
def full(tmp_path_factory) -> Drawn:
    """The page with every part."""
    with pytest.MonkeyPatch.context() as patch:
        figures = keep_figures(patch)
        return Drawn(write(tmp_path_factory.mktemp("full"), **FULL), figures)


def drawing(drawn: Drawn, start: str) -> tuple[Any, str]:
    """The figure whose alternative text starts so, and that text."""
    (image,) = (a for a in drawn.page.attributes("img") if a["alt"].startswith(start))
    png = base64.b64decode(image["src"].removeprefix("data:image/png;base64,"))
    return drawn.figures[png], image["alt"]


@pytest.mark.slow
def test_page_refers_to_nothing_outside_itself(full):
    page, _ = full
    identifiers = [a["id"] for _, a, _ in page.elements if "id" in a]
    assert len(set(identifiers)) == len(identifiers)
    for tag, attributes, _ in page.elements:
        assert tag not in ("script", "link", "iframe", "object", "base", "form")
        assert not {"srcset", "style", "action", "poster", "background"} & set(attributes)
        assert not any(name.startswith("on") for name in attributes)
        assert attributes.get("src", "data:image/png;").startswith("data:image/png;")
        if "href" in attributes:
            assert attributes["href"].removeprefix("#") in identifiers
            assert attributes["href"].startswith("#")
    (style,) = page.texts("style")
    assert not re.search(r"url\(|@import|@font-face", style)
    assert page.attributes("html")[0]["lang"] == "en"
    assert {
        "name": "viewport",
        "content": "width=device-width, initial-scale=1",
    } in page.attributes("meta")
    assert page.source.startswith("<!DOCTYPE html>\n")


@pytest.mark.slow
def test_headings_and_contents(full):
    page, _ = full
    expected = [
        "Health alarms",
        "Results",
        "Out-of-distribution detection",
        "Uncertainty",
        "Images",
        "Map of the embedding",
        "Posterior scales",
        "Training",
        "Health",
        "Reproduction",
    ]
    assert page.texts("h2") == expected
    assert page.texts("a") == expected
    assert page.texts("h1") == page.texts("title") == [FULL["title"]]
    assert page.texts("p", class_="subtitle") == [
        f"step 1,500, test{HOSTILE} split, extended at step 1,000"
    ]


@pytest.mark.slow
def test_every_image_has_words_and_pixels(full):
    page, figures = full
    images = page.attributes("img")
    assert all(len(image["alt"]) > 5 for image in images)
    drawings = [image for image in images if "width" in image]
    assert len(drawings) == len(figures)
    for image in drawings:
        height, width = pixels(image["src"]).shape[:2]
        assert (width, height) == pytest.approx(
            (2 * int(image["width"]), 2 * int(image["height"])), abs=2
        )


def test_hostile_words_stay_words(full):
    page, _ = full
    tags = {tag for tag, _, _ in page.elements}
    assert tags <= {
        *("html", "head", "meta", "title", "style", "body", "header", "nav", "main", "section"),
        *("h1", "h2", "h3", "p", "a", "b", "small", "strong", "span", "pre", "code", "wbr", "img"),
        *("ol", "ul", "li", "dl", "dt", "dd", "div", "details", "summary", "figure", "figcaption"),
        *("table", "caption", "thead", "tbody", "tr", "th", "td"),
    }
    assert len(page.texts("title")) == 1
    assert all(attributes["src"] != "x" for attributes in page.attributes("img"))
    words = page.texts("body")[0] + squeeze("".join(a["alt"] for a in page.attributes("img")))

    def strings(value: Any) -> list[str]:
        if isinstance(value, str):
            return [value]
        if isinstance(value, Mapping):
            return [s for pair in value.items() for item in pair for s in strings(item)]
        if isinstance(value, list | tuple):
            return [s for item in value for s in strings(item)]
        return []

    hostile = {text for text in strings(FULL) if HOSTILE in text and not text.startswith("--x")}
    assert len(hostile) > 30
    words = words.replace("_", " ")  # names of numbers are shown as words
    for text in hostile:
        assert squeeze(text).replace("_", " ") in words, text
    assert re.search(r"'--x=1 \$x\^\$<script.*</script><img src=x>'", words)


def test_headline_is_of_the_representation_and_of_the_score_fixed_before(full):
    values = zip(
        full.page.texts("dt")[:2],
        full.page.texts("dd", class_="value"),
        full.page.texts("dd", class_="protocol"),
        strict=True,
    )
    assert list(values) == [
        ("knn 20 accuracy, representation", "0.500", f"bank{HOSTILE}"),
        (f"auroc near{HOSTILE}, a{HOSTILE}", "0.912", f"mean{HOSTILE}"),
    ]


def test_a_run_on_features_says_what_an_image_is(tmp_path):
    page = write(tmp_path, config={"data": {"source": "features"}})
    (said,) = page.texts("p", class_="subtitle")
    assert said == f"{SUBTITLE}. The run reads features: an image is one row of them"


def test_what_is_not_drawn_is_said_where_the_drawing_would_be(tmp_path):
    said = f"a{HOSTILE} against far is not drawn: 2 of 9 scores are infinite."
    page = write(tmp_path, results=RESULTS, evidence=Evidence(not_drawn=[said]))
    assert page.texts("p", class_="note")[0].endswith(said)


def test_sections_are_left_out_without_a_trace(tmp_path):
    page = write(tmp_path)
    tags = [tag for tag, _, _ in page.elements]
    assert tags[tags.index("body") :] == ["body", "header", "h1", "p", "main"]
    assert page.texts("body") == [f"t {SUBTITLE}"]
    calm = write(tmp_path, alarms=())
    assert calm.texts("body") == [f"t {SUBTITLE} No health alarm was raised."]
    assert not calm.texts("h2")
    of_features = [row for row in RESULTS["trained"] if row["features"] == "embedding"]
    gallery = {"uncertainty_score": "s", "most_uncertain": EVIDENCE.most_uncertain}
    gallery |= {"least_uncertain": EVIDENCE.least_uncertain, "neighbors": EVIDENCE.neighbors}
    parts: dict[str, dict[str, Any]] = {
        "Health alarms": {"alarms": FULL["alarms"]},
        "Results": {"results": NOTHING["results"] | {"trained": of_features}},
        "Out-of-distribution detection": {"results": NOTHING["results"] | {"ood": RESULTS["ood"]}},
        "Uncertainty": {"evidence": Evidence("s", severity=[SEVERITY])},
        "Images": {"evidence": Evidence(neighbors=EVIDENCE.neighbors)},
        "Map of the embedding": {"evidence": Evidence(embedding_map=EVIDENCE.embedding_map)},
        "Posterior scales": {"evidence": Evidence(posterior_scale=SCALE)},
        "Health": {"records": [{"step": 1, "health/effective_rank": 2.0}]},
        "Reproduction": {"environment": {"command": ["python"]}},
    }
    headings = {}
    for heading, part in parts.items():
        page = write(tmp_path, **part)
        assert page.texts("h2") == [heading]
        headings[heading] = page.texts("h3")
        assert "No health alarm" not in page.source
    assert headings["Reproduction"] == ["Command"]
    assert headings["Images"] == ["Nearest neighbors"]
    page = write(tmp_path, evidence=Evidence(**gallery))
    assert page.texts("h3") == [
        "Most uncertain, by s",
        "Least uncertain, by s",
        "Nearest neighbors",
    ]


def test_alarms_are_gathered_by_name_in_the_order_of_steps(full):
    page, _ = full
    items = page.texts("li")[len(page.texts("a")) :]
    assert items[0] == (
        f"collapse 2 times, first at step 100, last at step 2,000first message{HOSTILE}"
    )
    assert items[1] == "floor step 300floor message"
    assert [item.split()[1] for item in items[2:]] == ["100", "300", "2,000"]
    assert "No health alarm" not in page.source


def table_of(page: Page, label: str) -> list[list[tuple[str, str, str]]]:
    """Rows of cells: text, class, and the text in bold."""
    rows: list[list[tuple[str, str, str]]] = []
    inside = False
    for tag, attributes, text in page.elements:
        if attributes.get("role") == "region":
            inside = attributes["aria-label"] == label
        elif inside and tag == "tr":
            rows.append([])
        elif inside and tag in ("td", "th"):
            rows[-1].append((squeeze("".join(text)), attributes.get("class", ""), ""))
        elif inside and tag == "strong":
            cell = rows[-1].pop()
            rows[-1].append((cell[0], cell[1], "".join(text)))
    return rows


def test_results_table(full):
    rows = table_of(full.page, "Results")
    assert [[cell[0] for cell in row] for row in rows] == [
        ["measure", "features", "untrained", "trained"],
        ["knn_20_accuracy", "representation", "0.2500", "0.5000"],
        ["linear" + HOSTILE, "embedding", "\u2013", "0.7500"],
    ]
    assert [cell[1] for cell in rows[1]] == ["", "", "number", "number"]
    assert "bank" + HOSTILE in full.page.texts("dd")


def test_auroc_table(full, tmp_path):
    rows = table_of(full.page, "AUROC of scores by outside sets")
    assert [cell[0] for cell in rows[0]] == ["score", "near" + HOSTILE, "far"]
    assert [cell[0] for cell in rows[1]] == ["set 1", "set 2", "set 3"]
    assert rows[2] == [
        ("a" + HOSTILE, "", ""),
        ("0.9000.850\u20130.950", "number", "0.900"),  # a tie, as printed
        ("0.400", "number low", ""),
        ("\u2013", "number", ""),
    ]
    assert rows[3][1:] == [
        ("0.900", "number", "0.900"),
        ("0.600", "number", "0.600"),
        ("0.700", "number", "0.700"),
    ]
    groups = [a["colspan"] for a in full.page.attributes("th") if a.get("scope") == "colgroup"]
    assert groups == ["1", "2"]
    details = table_of(full.page, "Every metric of every score")
    assert [cell[0] for cell in details[1]] == [
        *("a" + HOSTILE, "set 1", "near" + HOSTILE, "0.9000", "0.8500\u20130.9500"),
        *("0.8100", "0.8200", "0.3100", "0.3200"),
    ]
    assert [cell[0] for cell in details[2]][3:5] == ["0.4000", "\u2013"]
    plain = [row | {"group": ""} for row in ROWS[:2]]
    found = RESULTS["ood"] | {"rows": plain}
    page = write(tmp_path, results=NOTHING["results"] | {"ood": found})
    header = table_of(page, "AUROC of scores by outside sets")[0]
    assert [cell[0] for cell in header] == ["score", "set 1", "set 2"]


def test_protocol_of_detection(full):
    assert full.page.texts("p", class_="note")[0] == (
        f"Protocol: in, out{HOSTILE}. Default score of the method: a{HOSTILE}. "
        f"Chosen score: b, best of two{HOSTILE}. Left out: c{HOSTILE}, no labels{HOSTILE}."
    )


@pytest.mark.slow
def test_text_of_figures_is_large_enough_and_within_them(full):
    for one in full.figures.values():
        one.draw_without_rendering()
        sizes = [t.get_fontsize() for t in one.findobj(Text) if t.get_text()]
        assert min(sizes) >= 9
        box = one.get_tightbbox()
        width, height = one.get_size_inches()
        assert min(box.x0, box.y0) > -0.03
        assert box.x1 < width + 0.03
        assert box.y1 < height + 0.03


def test_curves_show_every_logged_number(full):
    expected: dict[str, list[tuple[int, float]]] = {}
    for record in RECORDS:
        for name, value in record.items():
            if name != "step":
                expected.setdefault(name, []).append((record["step"], value))
    seen = [
        (line.get_label(), np.asarray(line.get_xydata()))
        for one in full.figures.values()
        for line in one.axes[0].lines
        if one.axes[0].get_xlabel() == "step"
    ]
    for name, points in expected.items():
        assert any(
            label in (name, name.split("/")[1]) and np.array_equal(xy, points, equal_nan=True)
            for label, xy in seen
        ), name
    terms, alt = drawing(full, "every term of the loss")
    labels = [line.get_label() for line in terms.axes[0].lines]
    assert set(labels) == {
        *("elbo", "directional_log_likelihood", "radial_log_likelihood", "kl", "entropy")
    }
    styles = {(line.get_linestyle(), line.get_color()) for line in terms.axes[0].lines}
    assert len(styles) == 5
    assert [text.get_text() for text in terms.legends[0].get_texts()] == labels
    assert "kl from 1.5 at step 1 to 3.5 at step 3" in alt
    for label in labels:  # and each by itself, on its own scale
        alone, _ = drawing(full, f"{label} by step")
        assert [line.get_label() for line in alone.axes[0].lines] == [label]
    both, _ = drawing(full, "embedding_std")
    assert {line.get_label() for line in both.axes[0].lines} == {
        "train/embedding_std",
        "health/embedding_std",
    }
    assert drawing(full, "gradient of each term")[0].axes[0].lines[0].get_marker() == "o"


def test_histograms_hold_every_score(full):
    one, alt = drawing(full, "Histograms")
    assert len(one.axes) == 2
    low, high = np.quantile(INSIDE, [0.01, 0.99])
    edges = np.linspace(
        min(INSIDE.min(), *map(np.min, OUTSIDE.values())), high + 1.5 * (high - low), 49
    )
    for axis, (name, values) in zip(one.axes, OUTSIDE.items(), strict=True):
        for patch, sample in zip(axis.patches, (INSIDE_OF[name], values), strict=True):
            heights, found, _ = patch.get_data()
            np.testing.assert_allclose(found, edges)
            counts = np.histogram(sample, edges)[0].astype(float)
            counts[-1] += np.sum(sample > edges[-1])
            np.testing.assert_allclose(heights, counts / len(sample))
        assert axis.patches[0].get_facecolor() != axis.patches[1].get_facecolor()
        assert axis.patches[1].get_hatch()
        assert f"{name}, {len(values)} images" in alt
    assert one.axes[0].texts[0].get_text().startswith("near $x^$<script")
    assert one.axes[1].texts[0].get_text() == " _far, 20% beyond the axis"


def test_roc_curves(full):
    one, alt = drawing(full, "ROC")
    curves = one.axes[0].lines[1:]
    for line, (name, values) in zip(curves, OUTSIDE.items(), strict=True):
        area = auroc(INSIDE_OF[name], values)
        flagged, found = np.asarray(line.get_xydata()).T
        assert np.trapezoid(found, flagged) == pytest.approx(area, abs=1e-12)
        assert f"{name} {area:.3f}" in alt
        assert f"{area:.3f}" in str(line.get_label())
    assert len(one.legends[0].get_texts()) == 2  # a name that starts with an underscore too


def test_risk_and_severity(full):
    risk, _ = drawing(full, "Risk by coverage")
    np.testing.assert_array_equal(risk.axes[0].lines[0].get_xydata(), [[0.5, 0.125], [1, 0.25]])
    one, alt = drawing(full, f"Mean entropy{HOSTILE} by severity of blur")
    np.testing.assert_array_equal(
        one.axes[0].lines[0].get_xydata(), np.stack([SEVERITY.severity, SEVERITY.mean], axis=1)
    )
    band = one.axes[0].collections[0].get_paths()[0].vertices
    corners = {(s, q) for s, q in zip(SEVERITY.severity, SEVERITY.upper_quartile, strict=True)}
    corners |= {(s, q) for s, q in zip(SEVERITY.severity, SEVERITY.lower_quartile, strict=True)}
    assert {tuple(point) for point in band.tolist()} == corners
    other, _ = drawing(full, f"Mean entropy{HOSTILE} by severity of noise")
    assert one.axes[0].get_ylim() == other.axes[0].get_ylim()
    assert one.axes[0].get_ylim()[1] > 9
    assert "1, 2, 3, 5" in alt


@pytest.mark.parametrize(("name", "axis"), [("features", 0), ("images", 1)])
def test_spectrum_of_scales(full, name, axis):
    one, _ = drawing(full, f"Posterior scale of {SCALE.shape[1 - axis]} {name}")
    mean, median, prior = one.axes[0].lines
    columns = sorted(np.moveaxis(SCALE, axis, 0).T, key=np.mean, reverse=True)
    np.testing.assert_allclose(mean.get_ydata(), [c.mean() for c in columns])
    np.testing.assert_allclose(median.get_ydata(), [np.median(c) for c in columns])
    np.testing.assert_array_equal(prior.get_ydata(), [2.0, 2.0])
    band = one.axes[0].collections[0].get_paths()[0].vertices
    for rank, column in enumerate(columns, start=1):
        heights = band[band[:, 0] == rank, 1]
        np.testing.assert_allclose(
            [heights.min(), heights.max()], np.percentile(column, [5, 95]), rtol=1e-12
        )
    assert one.axes[0].get_yscale() == "log"


def test_map(full):
    assert EVIDENCE.embedding_map is not None
    points = EVIDENCE.embedding_map.coordinates
    classes, _ = drawing(full, "Map of 300 images")
    looks = set()
    for label, dots in enumerate(classes.axes[0].collections):
        np.testing.assert_array_equal(dots.get_offsets(), points[label == LABELS])
        assert len(dots.get_paths()) == 1
        looks.add(dots.get_paths()[0].vertices.tobytes())
    assert len(looks) == 10  # marker shapes, without color
    shades = [np.mean(dots.get_facecolor()[0, :3]) for dots in classes.axes[0].collections]
    assert min(abs(a - b) for a, b in itertools.pairwise(shades)) > 0.05
    uncertain, _ = drawing(full, "The same map")
    dots = uncertain.axes[0].collections[0]
    values = dict(zip(map(tuple, dots.get_offsets().tolist()), dots.get_array(), strict=True))
    for point, value in zip(points.tolist(), UNCERTAINTY, strict=True):
        assert values[tuple(point)] == value
    assert np.all(np.diff(dots.get_array()) >= 0)


def test_map_of_many_classes_names_the_most_frequent(tmp_path, saved):
    labels = np.concatenate([np.arange(30), np.repeat(np.arange(10, 30), 2)])
    points = np.random.default_rng(1).normal(size=(70, 2))
    part = EmbeddingMap(points, labels, tuple(f"name {i}" for i in range(30)), None)
    write(tmp_path, evidence=Evidence(embedding_map=part))
    (one,) = saved.values()
    names = [str(dots.get_label()) for dots in one.axes[0].collections]
    assert names == ["other (10 classes)", *(f"name {i}" for i in range(10, 30))]


def test_gallery_shows_the_pixels(full):
    photos = [a for a in full.page.attributes("img") if "width" not in a]
    shown = [pixels(photo["src"]) for photo in photos]
    expected = [*IMAGES[:2], np.repeat(IMAGES[2], 3, axis=2), *IMAGES[3:8]]
    for got, image in zip(shown, expected, strict=True):
        np.testing.assert_array_equal(got, image.squeeze(-1) if image.shape[-1] == 1 else image)
    assert [photo["alt"] for photo in photos[3:6]] == [
        f"query: 3{HOSTILE}",
        f"neighbor 1 of 3{HOSTILE}: 3{HOSTILE}, cosine 0.900",
        f"neighbor 2 of 3{HOSTILE}: 5, cosine 0.800",
    ]
    assert full.page.texts("figure", class_="photo differs") == ["50.800"]
    assert photos[7]["alt"] == "neighbor 1 of image: image, cosine 0.750"
    captions = full.page.texts("figure", class_="photo")[:3]
    assert captions == [f"a{HOSTILE}, 2.5", "b, 1.5", "0.123"]


def test_large_images_become_small(tmp_path):
    image = np.zeros((1, 320, 640, 3), np.uint8)
    one = ScoredImages(image, None, np.array([1.0]))
    evidence = Evidence("s", most_uncertain=one, least_uncertain=one)
    page = write(tmp_path, evidence=evidence)
    photo, _ = page.attributes("img")
    assert pixels(photo["src"]).shape == (80, 160, 3)
    assert "class" not in photo


def test_reproduction(full):
    (command,) = ("".join(text) for tag, _, text in full.page.elements if tag == "code")
    assert command.startswith("python train.py \\\n  '--config=a b.py' \\\n  '--x=1 $x^$<script")
    rows = table_of(full.page, "Settings of data")
    assert [[cell[0] for cell in row] for row in rows] == [
        ["paths", '["a", "b"]'],
        ["none", "none"],
    ]
    assert [[c[0] for c in row] for row in table_of(full.page, "Settings of the run")] == [
        ["seed", "0"]
    ]
    environment = [[cell[0] for cell in row] for row in table_of(full.page, "Environment")]
    assert ["versions.jax", "1"] in environment
    assert ["versions.flax", "none"] in environment
    assert "5 settings" in full.page.texts("summary")


@pytest.mark.slow
def test_the_same_report_gives_the_same_bytes(tmp_path):
    evidence = Evidence(separations={"a": SEPARATIONS})
    found: dict[str, Any] = {"records": RECORDS[3:], "results": RESULTS, "evidence": evidence}
    first = write(tmp_path, **found).source
    with matplotlib.rc_context({"font.size": 20, "axes.facecolor": "red"}):
        second = write(tmp_path, **found).source
        assert matplotlib.rcParams["font.size"] == 20
    assert first == second


def test_failure_leaves_the_page_as_it_was(tmp_path, monkeypatch):
    page = write(tmp_path).source

    def fail(*arguments, **keywords):
        raise RuntimeError("no figure")

    monkeypatch.setattr(figure.Figure, "savefig", fail)
    with pytest.raises(RuntimeError, match="no figure"):
        write(tmp_path, records=RECORDS)
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == page
