import base64
import dataclasses
import html.parser
import io
import itertools
import re
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
from sklearn.decomposition import PCA

from jevb_jax.report import page as hr

# Markup, and mathematics that matplotlib cannot read.
HOSTILE = """ $x^$<script src="http://a.b/c">&'"</script><img src=x>"""
VOID = {"meta", "img", "wbr"}


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
            "".join(text)
            for tag, attributes, text in self.elements
            if tag in tags and class_ in (None, attributes.get("class"))
        ]

    def attributes(self, tag: str) -> list[dict[str, Any]]:
        return [attributes for name, attributes, _ in self.elements if name == tag]


def write(directory: Path, report: hr.RunReport) -> Page:
    path = directory / "report.html"
    hr.write_html_report(path, report)
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
SEVERITY = hr.SeverityCurve(
    "blur" + HOSTILE,
    severity=np.arange(4),
    mean=np.array([1.0, 2.0, 3.0, 5.0]),
    lower_quartile=np.array([0.5, 1.0, 2.0, 4.0]),
    upper_quartile=np.array([1.5, 3.0, 4.0, 6.0]),
)
# Ties within and between; the last set has far tails.
INSIDE = np.round(RNG.normal(size=200), 1)
OUTSIDE = {
    "near" + HOSTILE: np.round(RNG.normal(0.5, size=150), 1),
    "_far": np.concatenate([np.round(RNG.normal(2, size=80), 1), [1e9] * 20]),
}
ROWS = [
    hr.OodRow("a" + HOSTILE, "set 1", "near" + HOSTILE, 0.9, (0.85, 0.95), 0.81, 0.82, 0.31, 0.32),
    hr.OodRow("a" + HOSTILE, "set 2", "far", 0.4),
    hr.OodRow("b", "set 1", "near" + HOSTILE, 0.90004),
    hr.OodRow("b", "set 3", "far", 0.7),
    hr.OodRow("b", "set 2", "far", 0.6),
]
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
FULL = hr.RunReport(
    title="A run" + HOSTILE,
    subtitle="digits" + HOSTILE,
    headline=[hr.Number("label" + HOSTILE, "0.97" + HOSTILE, "protocol" + HOSTILE)],
    alarms=[
        hr.Alarm(2000, "collapse", "last message"),
        hr.Alarm(300, "floor", "floor message"),
        hr.Alarm(100, "collapse", "first message" + HOSTILE),
    ],
    results=[
        hr.ResultRow("knn_20" + HOSTILE, "embedding" + HOSTILE, 0.5, "bank" + HOSTILE, 0.25),
        hr.ResultRow("linear", "representation", 0.75, "fitted"),
    ],
    ood=hr.OodPart(ROWS, [hr.ScoreSample("a" + HOSTILE, INSIDE, OUTSIDE)], "in, out" + HOSTILE),
    uncertainty=hr.UncertaintyPart(
        "entropy" + HOSTILE,
        [hr.Number("R-AUROC" + HOSTILE, "0.8", "how" + HOSTILE)],
        [hr.RiskCoverage("k-NN" + HOSTILE, np.array([0.5, 1.0]), np.array([0.125, 0.25]))],
        [SEVERITY, dataclasses.replace(SEVERITY, corruption="noise", mean=np.full(4, 9.0))],
    ),
    gallery=hr.GalleryPart(
        "entropy" + HOSTILE,
        hr.CaptionedImages(IMAGES[:2], ["first" + HOSTILE, "second"]),
        hr.CaptionedImages(np.repeat(IMAGES[2:3], 3, axis=3), ["third"]),
        [
            hr.Neighbours(
                IMAGES[3], "3" + HOSTILE, IMAGES[4:6], ["3" + HOSTILE, "5"], np.array([0.9, 0.8])
            ),
            hr.Neighbours(IMAGES[6], None, IMAGES[7:8], None, np.array([0.75])),
        ],
    ),
    embedding_map=hr.MapPart(
        hr.embedding_map(DIGITS.data[:300]),
        LABELS,
        [f"class {i}" + HOSTILE for i in range(10)],
        UNCERTAINTY,
        "entropy" + HOSTILE,
        "method" + HOSTILE,
    ),
    posterior_scale=hr.ScalePart(SCALE, prior_scale=2.0),
    records=RECORDS,
    command=["python", "train.py", "--config=a b.py", "--x=1" + HOSTILE],
    config={
        "seed": 0,
        "jevb": {"df": 5.0, "name": HOSTILE},
        "data": {"paths": ["a", "b"], "none": None},
    },
    environment={"commit" + HOSTILE: "abc" + HOSTILE, "versions": {"jax": "1", "flax": None}},
)


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
        return Drawn(write(tmp_path_factory.mktemp("full"), FULL), figures)


def drawing(drawn: Drawn, start: str) -> tuple[Any, str]:
    """The figure whose alternative text starts so, and that text."""
    (image,) = (a for a in drawn.page.attributes("img") if a["alt"].startswith(start))
    png = base64.b64decode(image["src"].removeprefix("data:image/png;base64,"))
    return drawn.figures[png], image["alt"]


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
    assert page.texts("h1") == page.texts("title") == [FULL.title]


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
    words = page.texts("body")[0] + "".join(a["alt"] for a in page.attributes("img"))

    def strings(value: Any) -> list[str]:
        if isinstance(value, str):
            return [value]
        if isinstance(value, dict):
            return [s for pair in value.items() for item in pair for s in strings(item)]
        if isinstance(value, list | tuple):
            return [s for item in value for s in strings(item)]
        if dataclasses.is_dataclass(value):
            return [
                s
                for field in dataclasses.fields(value)
                for s in strings(getattr(value, field.name))
            ]
        return []

    hostile = [text for text in strings(FULL) if HOSTILE in text and not text.startswith("--x")]
    assert len(hostile) > 30
    for text in hostile:
        assert text in words, text
    assert re.search(r"'--x=1 \$x\^\$<script.*</script><img src=x>'", words)


def test_sections_are_left_out_without_a_trace(tmp_path):
    empty = hr.RunReport(
        "t",
        ood=hr.OodPart(),
        uncertainty=hr.UncertaintyPart("s"),
        gallery=hr.GalleryPart(),
        config={},
    )
    for page in (write(tmp_path, hr.RunReport("t")), write(tmp_path, empty)):
        body = [tag for tag, _, _ in page.elements][
            [t for t, _, _ in page.elements].index("body") :
        ]
        assert body == ["body", "header", "h1", "main"]
        assert page.texts("body") == ["t"]
    calm = write(tmp_path, hr.RunReport("t", alarms=()))
    assert calm.texts("body") == ["tNo health alarm was raised."]
    assert not calm.texts("h2")
    parts: dict[str, dict[str, Any]] = {
        "Health alarms": {"alarms": FULL.alarms},
        "Results": {"results": FULL.results},
        "Out-of-distribution detection": {"ood": hr.OodPart(rows=ROWS)},
        "Uncertainty": {"uncertainty": hr.UncertaintyPart("s", [hr.Number("a", "1")])},
        "Images": {"gallery": FULL.gallery},
        "Reproduction": {"command": FULL.command},
    }
    headings = {}
    for heading, part in parts.items():
        page = write(tmp_path, hr.RunReport("t", **part))
        assert page.texts("h2") == [heading]
        headings[heading] = page.texts("h3")
        assert "No health alarm" not in page.source
    assert headings["Reproduction"] == ["Command"]
    assert len(headings["Images"]) == 3


def test_alarms_are_gathered_by_name_in_the_order_of_steps(full):
    page, _ = full
    items = page.texts("li")[len(page.texts("a")) :]
    assert items[0] == (
        "collapse 2 times, first at step 100, last at step 2,000" + "first message" + HOSTILE
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
            rows[-1].append(("".join(text), attributes.get("class", ""), ""))
        elif inside and tag == "strong":
            cell = rows[-1].pop()
            rows[-1].append((cell[0], cell[1], "".join(text)))
    return rows


def test_results_table(full):
    rows = table_of(full.page, "Results")
    assert [[cell[0] for cell in row] for row in rows] == [
        ["measure", "features", "untrained", "trained"],
        ["knn_20" + HOSTILE, "embedding" + HOSTILE, "0.2500", "0.5000"],
        ["linear", "representation", "\u2013", "0.7500"],
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
    assert [cell[0] for cell in details[2]][3:] == [
        "0.4000",
        "\u2013",
        "\u2013",
        "\u2013",
        "\u2013",
        "\u2013",
    ]
    plain = [row._replace(group="") for row in ROWS[:2]]
    page = write(tmp_path, hr.RunReport("t", ood=hr.OodPart(plain)))
    header = table_of(page, "AUROC of scores by outside sets")[0]
    assert [cell[0] for cell in header] == ["score", "set 1", "set 2"]


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
        for patch, sample in zip(axis.patches, (INSIDE, values), strict=True):
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
        ranks = stats.rankdata(np.concatenate([INSIDE, values]))[len(INSIDE) :]
        n, m = len(INSIDE), len(values)
        auroc = (ranks.sum() - m * (m + 1) / 2) / (n * m)
        flagged, found = np.asarray(line.get_xydata()).T
        assert np.trapezoid(found, flagged) == pytest.approx(auroc, abs=1e-12)
        assert f"{name} {auroc:.3f}" in alt
        assert f"{auroc:.3f}" in str(line.get_label())
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
    assert FULL.embedding_map is not None
    points = FULL.embedding_map.coordinates
    classes, _ = drawing(full, "Map of 300 images")
    looks = set()
    for label, dots in enumerate(classes.axes[0].collections):
        np.testing.assert_array_equal(dots.get_offsets(), points[label == LABELS])
        assert len(dots.get_paths()) == 1
        looks.add(dots.get_paths()[0].vertices.tobytes())
    assert len(looks) == 10  # marker shapes, without colour
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
    part = hr.MapPart(points, labels, [f"name {i}" for i in range(30)])
    write(tmp_path, hr.RunReport("t", embedding_map=part))
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
        f"neighbour 1 of 3{HOSTILE}: 3{HOSTILE}, cosine 0.900",
        f"neighbour 2 of 3{HOSTILE}: 5, cosine 0.800",
    ]
    assert full.page.texts("figure", class_="photo differs") == ["50.800"]
    assert photos[7]["alt"] == "neighbour 1 of image: image, cosine 0.750"


def test_large_images_become_small(tmp_path):
    image = np.zeros((1, 320, 640, 3), np.uint8)
    gallery = hr.GalleryPart(most_uncertain=hr.CaptionedImages(image, ["a"]))
    page = write(tmp_path, hr.RunReport("t", gallery=gallery))
    (photo,) = page.attributes("img")
    assert pixels(photo["src"]).shape == (80, 160, 3)
    assert "class" not in photo


def test_reproduction(full):
    (command,) = full.page.texts("code")
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


def test_the_same_report_gives_the_same_bytes(tmp_path):
    sample = hr.ScoreSample("a", INSIDE, OUTSIDE)
    report = hr.RunReport("t", records=RECORDS[3:], ood=hr.OodPart(samples=[sample]))
    first = write(tmp_path, report).source
    with matplotlib.rc_context({"font.size": 20, "axes.facecolor": "red"}):
        second = write(tmp_path, report).source
        assert matplotlib.rcParams["font.size"] == 20
    assert first == second


def test_failure_leaves_the_page_as_it_was(tmp_path, monkeypatch):
    page = write(tmp_path, hr.RunReport("before")).source

    def fail(*arguments, **keywords):
        raise RuntimeError("no figure")

    monkeypatch.setattr(figure.Figure, "savefig", fail)
    with pytest.raises(RuntimeError, match="no figure"):
        hr.write_html_report(tmp_path / "report.html", hr.RunReport("after", records=RECORDS))
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == page


def test_embedding_map_is_pca_of_the_directions():
    rng = np.random.default_rng(1)
    embedding = rng.normal(size=(50, 7)) * np.array([9.0, 5, 2, 1, 1, 1, 1]) + 1
    directions = embedding / np.linalg.norm(embedding, axis=1, keepdims=True)
    pca = PCA(2, svd_solver="full").fit(directions)
    expected = pca.transform(directions)
    loadings = np.asarray(pca.components_)
    for axis in range(2):  # the oracle's signs are its own
        expected[:, axis] *= np.sign(loadings[axis, np.abs(loadings[axis]).argmax()])
    got = hr.embedding_map(embedding)
    assert got.shape == (50, 2)
    np.testing.assert_allclose(got, expected, atol=1e-12)
    # Neither radius nor order of the images matters, up to float64 rounding.
    radius = np.exp(rng.uniform(-600, 600, size=(50, 1)))
    np.testing.assert_allclose(hr.embedding_map(embedding * radius), got, atol=1e-12)
    np.testing.assert_allclose(hr.embedding_map(embedding[::-1]), got[::-1], atol=1e-12)
    # Mirrored features mirror the map: the rule of signs looks at the loadings alone.
    np.testing.assert_allclose(hr.embedding_map(-embedding), -got, atol=1e-12)
    np.testing.assert_array_equal(hr.embedding_map(np.zeros((3, 4))), np.zeros((3, 2)))


@pytest.mark.parametrize("shape", [(4,), (1, 4), (4, 1), (0, 3)])
def test_embedding_map_refuses_other_shapes(shape):
    with pytest.raises(ValueError, match=r"must be \[N, D\]"):
        hr.embedding_map(np.ones(shape))


def test_what_does_not_belong_together_is_refused():
    four, three = np.arange(4.0), np.arange(3.0)
    bad = [
        (lambda: hr.embedding_map(np.full((3, 3), np.nan)), "9 values not finite"),
        (lambda: hr.RiskCoverage("a", four, three), "coverage has 4, risk has 3"),
        (lambda: hr.SeverityCurve("a", four, four, three, four), "lower_quartile has 3"),
        (lambda: hr.ScoreSample("a", four, {}), "no outside set"),
        (lambda: hr.ScoreSample("a", np.array([1, np.nan]), {"b": four}), "with 1 values"),
        (lambda: hr.ScoreSample("a", four, {"b": four[None]}), "'b' must be"),
        (lambda: hr.ScoreSample("a", four, {"b": four[:0]}), "'b' must be"),
        (lambda: hr.OodPart([ROWS[0], ROWS[1], ROWS[0]]), "two rows"),
        (lambda: hr.CaptionedImages(IMAGES[:2], ["a"]), "images has 2, captions has 1"),
        (lambda: hr.CaptionedImages(IMAGES[0], ["a"]), r"uint8 \[K"),
        (lambda: hr.CaptionedImages(IMAGES[:1] / 255, ["a"]), "got float64"),
        (lambda: hr.Neighbours(IMAGES[0], "a", IMAGES[:2], ["b"], four[:2]), "labels has 1"),
        (lambda: hr.Neighbours(IMAGES[0], "a", IMAGES[:2], None, three), "cosine has 3"),
        (lambda: hr.Neighbours(IMAGES[:1], "a", IMAGES[:2], None, four[:2]), "image"),
        (lambda: hr.MapPart(np.zeros((3, 3))), r"\[N, 2\]"),
        (lambda: hr.MapPart(np.zeros((3, 2)), uncertainty=four), "uncertainty has 4"),
        (lambda: hr.MapPart(np.zeros((3, 2)), np.array([0, 1, 2]), ["a", "b"]), "got 0 to 2"),
        (lambda: hr.MapPart(np.zeros((1, 2)), np.array([-1]), ["a", "b"]), "got -1 to -1"),
        (lambda: hr.MapPart(np.zeros((1, 2)), uncertainty=np.array([np.inf])), "finite"),
        (lambda: hr.ScalePart(four), "posterior_scale"),
        (lambda: hr.ScalePart(np.zeros((2, 2))), "least value 0"),
        (lambda: hr.ScalePart(np.full((2, 2), np.inf)), "finite"),
        (lambda: hr.RunReport("t", records=[{"step": 1}, {"loss": 1}]), "record 1 has no step"),
    ]
    for make, message in bad:
        with pytest.raises(ValueError, match=message):
            make()
