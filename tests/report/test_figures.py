import numpy as np
import pytest
from matplotlib import figure
from PIL import Image

from jevb_jax import augmentations, data
from jevb_jax.report import figures as report


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were saved, to look into."""
    kept = []
    save = figure.Figure.savefig

    def keep(self, *arguments, **keywords):
        kept.append(self)
        return save(self, *arguments, **keywords)

    monkeypatch.setattr(figure.Figure, "savefig", keep)
    return kept


@pytest.mark.parametrize(
    ("channels", "num_images"), [(1, 3), pytest.param(3, 8, marks=pytest.mark.slow)]
)
def test_views_figure(tmp_path, drawn, channels, num_images):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (num_images, 8, 8, channels), dtype=np.uint8)
    view = augmentations.ViewAugmentation(
        size=8, mean=(0.5,) * channels, std=(0.25,) * channels, jitter_probability=0.0
    )
    report.save_views_figure(tmp_path / "views.png", data.ArraySource(images), (view, view, view))
    with Image.open(tmp_path / "views.png") as image:
        assert min(image.size) > 100
    axes = drawn[0].axes
    assert len(axes) == 4 * num_images
    labels = [axis.get_ylabel() for axis in axes[::num_images]]
    assert labels == ["image", "view 1", "view 2", "view 3"]
    np.testing.assert_allclose(
        np.squeeze(axes[1].images[0].get_array()), np.squeeze(images[1] / 255.0)
    )
    for axis in axes[num_images:]:  # de-normalised
        pixels = axis.images[0].get_array()
        assert pixels.min() >= 0
        assert pixels.max() <= 1
        assert pixels.max() > 0.5


def test_curves_figure_draws_what_there_is(tmp_path, drawn):
    records = [
        {"step": s, "train/loss": -0.1 * s, "train/kl": s, "train/elbo": s} for s in (10, 20, 30)
    ]
    records.append({"step": 20, "health/effective_rank": 7.0})
    report.save_curves_figure(tmp_path / "curves.png", records)
    loss, terms, _, _, rank, _ = drawn[0].axes
    np.testing.assert_allclose(loss.lines[0].get_xydata(), [[10, -1], [20, -2], [30, -3]])
    assert {line.get_label() for line in terms.lines} == {"elbo", "kl"}
    assert {text.get_text() for text in terms.get_legend().get_texts()} == {"elbo", "kl"}
    np.testing.assert_allclose(rank.lines[0].get_xydata(), [[20, 7]])
    with Image.open(tmp_path / "curves.png") as image:
        assert image.size == (1200, 650)


def test_curves_of_a_run_without_records(tmp_path):
    report.save_curves_figure(tmp_path / "curves.png", [])
    assert (tmp_path / "curves.png").stat().st_size > 1000
