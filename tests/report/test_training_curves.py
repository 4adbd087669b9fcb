import numpy as np
from matplotlib import figure
from PIL import Image

from jevb_jax.report import training_curves


def test_curves_figure_draws_what_there_is(tmp_path, monkeypatch):
    drawn = []
    save = figure.Figure.savefig

    def keep(self, *arguments, **keywords):
        drawn.append(self)
        return save(self, *arguments, **keywords)

    monkeypatch.setattr(figure.Figure, "savefig", keep)
    records = [
        {"step": s, "train/loss": -0.1 * s, "train/kl": s, "train/elbo": s} for s in (10, 20, 30)
    ]
    records.append({"step": 20, "health/effective_rank": 7.0})
    training_curves.save_curves_figure(tmp_path / "curves.png", records)
    loss, terms, _, _, rank, _ = drawn[0].axes
    np.testing.assert_allclose(loss.lines[0].get_xydata(), [[10, -1], [20, -2], [30, -3]])
    assert {line.get_label() for line in terms.lines} == {"elbo", "kl"}
    assert {text.get_text() for text in terms.get_legend().get_texts()} == {"elbo", "kl"}
    np.testing.assert_allclose(rank.lines[0].get_xydata(), [[20, 7]])
    with Image.open(tmp_path / "curves.png") as image:
        assert image.size == (1200, 650)


def test_curves_of_a_run_without_records(tmp_path):
    training_curves.save_curves_figure(tmp_path / "curves.png", [])
    assert (tmp_path / "curves.png").stat().st_size > 1000
