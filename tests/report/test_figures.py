import numpy as np
import pytest
from matplotlib import figure
from PIL import Image

from jevb_jax.report import figures


@pytest.mark.slow
@pytest.mark.parametrize("channels", [1, 3])
def test_views_figure(tmp_path, monkeypatch, channels):
    drawn = []
    save = figure.Figure.savefig

    def keep(self, *arguments, **keywords):
        drawn.append(self)
        return save(self, *arguments, **keywords)

    monkeypatch.setattr(figure.Figure, "savefig", keep)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (3, 8, 8, channels), dtype=np.uint8)
    views = [rng.uniform(size=(3, size, size, channels)) for size in (8, 6)]
    figures.save_views_figure(tmp_path / "views.png", images, views)
    with Image.open(tmp_path / "views.png") as image:
        assert min(image.size) > 100
    axes = drawn[0].axes
    assert [axis.get_ylabel() for axis in axes[::3]] == ["image", "view 1", "view 2"]
    expected = [image for row in (images / 255.0, *views) for image in row]
    for axis, image in zip(axes, expected, strict=True):
        np.testing.assert_allclose(axis.images[0].get_array(), np.squeeze(image))
        assert axis.images[0].get_clim() == (0, 1)


def test_lines_stay_apart_in_black_and_white():
    looks = [figures.line_style(index) for index in range(32)]
    assert len({tuple(look.values()) for look in looks}) == 32
    assert {look["color"] for look in looks} == {"black", "0.55"}
