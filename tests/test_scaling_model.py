"""The model of a step's time against numbers worked out by hand."""

import json
import math
import sys
from pathlib import Path

import pytest

from benchmarks import scaling_model
from benchmarks.scaling_model import Chip, Workload

# Round numbers: 100 operations a second; groups of four; 10 bytes/s inside and 1 byte/s between.
SWITCH = Chip("switch", 100.0, 10.0, 4, 0, 1.0, 2)
# One convolution's worth: 8 images of 50 operations, 5 parameters, 1 BatchNorm layer of 3 channels.
WORK = Workload(8, 50.0, 5, 1, 3, 7)


@pytest.fixture(autouse=True)
def no_latency(request, monkeypatch):
    if "latency" not in request.node.name:
        monkeypatch.setattr(scaling_model, "INNER_HOP_SECONDS", 0.0)
        monkeypatch.setattr(scaling_model, "OUTER_HOP_SECONDS", 0.0)


def test_ring_sends_every_byte_almost_twice():
    assert scaling_model.ring_seconds(80.0, 1, 10.0) == 0
    assert scaling_model.ring_seconds(80.0, 2, 10.0) == 8.0  # half there, half back
    assert scaling_model.ring_seconds(80.0, 4, 10.0) == 12.0  # 2 * 3/4 * 80 / 10


@pytest.mark.parametrize(
    ("num_chips", "torus_dims", "hops"),
    [(1, 0, 0), (2, 0, 2), (8, 0, 6), (64, 0, 12), (8, 1, 14), (16, 2, 12), (8, 3, 6), (1, 3, 0)],
)
def test_latency_hops(num_chips, torus_dims, hops):
    assert scaling_model.latency_hops(num_chips, torus_dims) == pytest.approx(hops)


def test_all_reduce_within_and_between_groups():
    assert scaling_model.all_reduce_seconds(80.0, 1, SWITCH) == 0
    assert scaling_model.all_reduce_seconds(80.0, 4, SWITCH) == 12.0
    # 12 s within; between two groups each chip carries 20 bytes: 2 * 1/2 * 20 / 1.
    assert scaling_model.all_reduce_seconds(80.0, 8, SWITCH) == 32.0


def test_all_reduce_latency():
    # Nothing to send: 4 hops within four chips, 2 between two groups.
    expected = 4 * scaling_model.INNER_HOP_SECONDS + 2 * scaling_model.OUTER_HOP_SECONDS
    assert scaling_model.all_reduce_seconds(0.0, 8, SWITCH) == pytest.approx(expected)


def test_step_by_hand():
    step = scaling_model.step_time(WORK, 4, SWITCH, utilisation=0.5)
    assert step.compute == 2.0  # 8 * 50 / (4 * 100 / 2)
    assert step.gradients == 3.0  # 2 * 3/4 * 20 bytes / 10
    # Two views, there and back, 3 channels, 2 numbers of 4 bytes: 96 bytes at 3/20 s each.
    assert step.norm == pytest.approx(14.4)
    assert step.total == pytest.approx(19.4)
    assert step.input_bytes_per_host == 28.0  # 8 images of 7 bytes, two hosts


def test_one_chip_only_computes():
    step = scaling_model.step_time(WORK, 1, SWITCH, utilisation=1.0)
    assert step.total == step.compute == 4.0
    assert step.input_bytes_per_host == 56.0


def test_what_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="batch of 8 does not divide among 3 chips"):
        scaling_model.step_time(WORK, 3, SWITCH, utilisation=1.0)
    with pytest.raises(ValueError, match="6 chips are not whole groups of switch"):
        scaling_model.all_reduce_seconds(1.0, 6, SWITCH)


@pytest.mark.slow
def test_counts_of_imagenet_are_the_published_ones():
    work = scaling_model.imagenet_workload(4096)
    # torchvision's ResNet-50: 25,557,032 parameters less the classifier's 2,049,000. Two hidden layers
    # of 2048 and 512 features out, with BatchNorm's scale and bias; the rest is the head's.
    projector = 2048 * 2048 * 2 + 2048 * 512 + 2 * (2048 + 2048 + 512)
    head = work.num_parameters - (25_557_032 - 2_049_000) - projector
    assert 3 * 512 * 512 < head < 3 * 512 * 512 + 10 * 512
    assert work.num_norm_layers == 53 + 3 + 1
    assert work.num_norm_features == 26_560 + 2048 + 2048 + 512 + 512
    # 4.09e9 multiply-adds forward (torchvision's figure); backward twice that; two views. XLA leaves out
    # products with padding and the gradient of the image, and counts BatchNorm.
    multiply_adds = 4.09e9 + 2048 * 2048 * 2 + 2048 * 512 + 3 * 512 * 512
    assert work.flops_per_image == pytest.approx(2 * 3 * 2 * multiply_adds, rel=0.05)
    assert work.input_bytes_per_image == 256 * 256 * 3


def test_command_writes_the_table(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(scaling_model, "imagenet_workload", lambda batch_size: WORK)
    monkeypatch.setattr(scaling_model, "CHIPS", (SWITCH,))
    arguments = ["scaling_model", f"--out={tmp_path}", "--num_chips", "4", "8", "--utilisation=0.5"]
    monkeypatch.setattr(sys, "argv", arguments)
    scaling_model.main()
    written = json.loads((tmp_path / "scaling.json").read_text())
    first, second = written["rows"]
    assert first["efficiency"] == 1
    assert first["step_ms"] == pytest.approx(19_400)
    assert first["images_per_second"] == pytest.approx(8 / 19.4)
    # Eight chips: 1 s of compute; gradients 3 + 5 s; statistics 14.4 + 24 s.
    assert second["step_ms"] == pytest.approx(47_400)
    assert second["efficiency"] == pytest.approx(19.4 / (2 * 47.4))
    assert second["input_megabytes_per_second_and_host"] == pytest.approx(14 / 47.4 / 1e6)
    table = (tmp_path / "scaling.md").read_text()
    assert table in capsys.readouterr().out
    assert math.isclose(float(table.splitlines()[2].split("|")[6]), 19_400)


@pytest.mark.slow
def test_latency_table_of_the_docs_is_what_the_command_prints():
    work = scaling_model.imagenet_workload(4096)
    rows = scaling_model.scaling_rows(work, (8, 32, 128, 512), utilisation=0.3)
    made = scaling_model.to_markdown(rows).splitlines()
    text = (Path(__file__).resolve().parent.parent / "docs" / "pods.md").read_text().splitlines()
    start = text.index(made[0])
    for expected, found in zip(made[2:], text[start + 2 :], strict=False):
        old, new = (
            [cell.strip().replace(",", "") for cell in line.split("|")[1:-1]]
            for line in (found, expected)
        )
        assert old[:2] == new[:2]
        for before, after in zip(old[2:], new[2:], strict=True):
            # XLA's count of operations moves a little between versions of JAX; a rounding on top.
            digit = 10.0 ** -len(after.partition(".")[2])
            assert float(before) == pytest.approx(float(after), rel=0.02, abs=1.01 * digit)
