"""What the figures of a study draw, read from their lines."""

import dataclasses
import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jevb_study import figures
from jevb_study.evidence import read_evidence
from jevb_study.spec import Study, Sweep
from tests.jevb_study.fabricated import directory


def panels(number: int, made: Study, out: Path) -> list[Any]:
    return figures.draw(made.figures[number], read_evidence(made, out)).axes


def points(axis: Any) -> list[list[list[float]]]:
    return [np.asarray(line.get_xydata()).tolist() for line in axis.lines]


def test_comparison_shows_seeds_and_means(fabricated):
    made, out = fabricated
    linear, rank = panels(0, made, out)
    names = [label.get_text() for label in linear.get_yticklabels()]
    assert names == ["simsiam", "t", "gaussian (2 of 3 failed)"]
    assert linear.get_ylim() == (2.5, -0.5)  # the first on top
    seeds, mean = points(linear)[2:4]
    assert seeds == [[0.5, 1], [0.52, 1], [0.57, 1]]
    np.testing.assert_allclose(mean, [[0.53, 1]])
    assert points(rank)[0] == [[6, 1], [5, 1], [4, 1]]  # simsiam has none


def test_sweep_draws_infinity_at_the_edge_and_references(fabricated):
    made, out = fabricated
    linear, _ = panels(1, made, out)
    assert [label.get_text() for label in linear.get_xticklabels()] == ["1", "5", "∞"]
    edge = linear.get_xticks()[2]
    assert edge > 5
    assert linear.get_xscale() == "log"
    np.testing.assert_allclose(points(linear)[3], [[1, 0.4], [5, 0.53]])
    np.testing.assert_allclose(points(linear)[4], [[5, 0.53], [edge, 0.3]])
    assert linear.get_legend().get_texts()[0].get_text() == "simsiam"
    np.testing.assert_allclose([y for _, y in points(linear)[5]], [0.52, 0.52])
    assert [text.get_text() for text in linear.texts] == ["2 of 3 failed"]


@pytest.mark.parametrize(
    ("values", "log_x", "edge"),
    [([1.0, 5.0], True, 7.5), ([1.0, 1e4], True, 1e4 * 1e4**0.15), ([0.0, 10.0], False, 11.5)],
)
def test_edge_of_a_sweep(values, log_x, edge):
    positions = figures.sweep_positions((math.inf, *values), log_x=log_x)
    assert list(positions) == [*values, math.inf]
    np.testing.assert_allclose(positions[math.inf], edge)


def test_sweep_of_the_limit_alone_or_without_results(fabricated, tmp_path):
    made, out = fabricated
    for runs, where in (({math.inf: "t"}, out), ({math.inf: "t", 1.0: "cauchy"}, tmp_path / "x")):
        figure = Sweep("s", "", "df", runs, ("linear",))
        figures.draw(figure, read_evidence(made, where)).savefig(io.BytesIO())


def test_curves_show_the_range_and_where_seeds_end(fabricated):
    made, out = fabricated
    rank, nothing = panels(2, made, out)
    lines = points(rank)
    np.testing.assert_allclose(lines[0], [[10, 3], [20, 10], [30, 5]])  # the mean of t
    band = rank.collections[0].get_paths()[0].vertices
    for corner in ([20, 9], [20, 11], [30, 4], [30, 6]):
        assert corner in band.tolist()
    texts = [text.get_text() for text in rank.get_legend().get_texts()]
    assert texts == ["t", "gaussian (2 of 3 failed)"]
    crosses = [line.get_xydata()[-1].tolist() for line in rank.lines if line.get_marker() == "x"]
    assert crosses == [[10, 2], [20, 1.5]]  # the last finite values
    assert [[20, 3], [30, 4]] in [line[-2:] for line in lines]  # the seed that went on
    assert [text.get_text() for text in nothing.texts] == ["logged by none"]


def test_curves_over_views_count_every_view_of_every_image(fabricated):
    made, out = fabricated
    for seed in range(3):
        where = directory(out, "t", seed) / "config.json"
        config = json.loads(where.read_text())
        config["train"]["batch_size"] = 32
        config["augmentation"].update(num_views=3, num_small_crops=2)
        where.write_text(json.dumps(config))
    figure = dataclasses.replace(made.figures[-1], runs=("t",), over_views=True)
    rank, _ = figures.draw(figure, read_evidence(made, out)).axes
    views = 32 * (3 + 2) / 1e6
    np.testing.assert_allclose(
        points(rank)[0], [[10 * views, 3], [20 * views, 10], [30 * views, 5]]
    )
    assert rank.get_xlabel() == "millions of views seen"


def test_curves_without_a_common_step_draw_every_seed(fabricated):
    made, out = fabricated
    where = directory(out, "t", 2) / "metrics.jsonl"
    where.write_text('{"step": 11, "health/effective_rank": 1.0}\n')
    lines = points(panels(2, made, out)[0])
    assert [[11, 1]] in lines
    assert [[10, 3], [20, 9], [30, 6]] in lines
