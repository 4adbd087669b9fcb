"""The three benchmarks with peers, without the peers and with a stand-in for them, at a tiny size."""

import json
import sys

import numpy as np
import pytest

from benchmarks import augmentation, evaluation, measure, peer_process, train_throughput

ECHO = """
from serve import serve

print("a library talks as it is imported")

def fail(count):
    raise RuntimeError("out of order")

def make(settings):
    if settings.get("broken"):
        raise RuntimeError("not installed")
    print("a library talks")
    return {"threads": settings["num_threads"]}, {
        "double": lambda count: 2.0 * count,
        "fail": fail,
        "dict": lambda count: {"seconds": 1, "n": count},
    }

serve(make)
"""


@pytest.fixture
def echo(tmp_path, monkeypatch):
    (tmp_path / "serve.py").write_text((peer_process.PEERS / "serve.py").read_text())
    (tmp_path / "echo.py").write_text(ECHO)
    monkeypatch.setattr(peer_process, "PEERS", tmp_path)


def test_a_peer_answers_in_turn_and_tells_its_errors(echo):
    with peer_process.PeerProcess(sys.executable, "echo.py", {"num_threads": 3}) as peer:
        assert peer.facts == {"threads": 3}
        assert peer.timers == ["double", "fail", "dict"]
        assert peer.seconds("double", 4) == 8.0
        with pytest.raises(peer_process.PeerError, match="out of order"):
            peer.run("fail")
        assert peer.run("dict", 2) == {"seconds": 1, "n": 2}
    with pytest.raises(peer_process.PeerError, match="not installed"):
        peer_process.PeerProcess(sys.executable, "echo.py", {"broken": True})
    with pytest.raises(peer_process.PeerError, match="ended with status"):
        peer_process.PeerProcess(sys.executable, "missing.py", {})


def timings(**seconds):
    return {name: measure.Timing(name, tuple(values)) for name, values in seconds.items()}


def test_throughput_table_by_hand():
    rows = train_throughput.table(
        timings(simsiam=[2.0], torch=[6.0], matmul=[1.0]),
        {"simsiam": 4e9, "matmul": 8e9},
        num_views=4,
        num_steps=10,
        reference="simsiam",
    )
    ours, torch, matmul = rows
    assert ours["views/s"] == 20  # 4 views x 10 steps in 2 seconds
    assert ours["Gflop a view"] == 1
    assert ours["Gflop/s"] == 20
    assert ours["share of matmul"] == 0.25  # 20 of 80
    assert torch["time / simsiam"] == 3
    assert torch["Gflop a view"] is None
    assert torch["share of matmul"] is None
    assert matmul["views/s"] is None
    assert matmul["share of matmul"] == 1


def test_augmentation_table_by_hand():
    rows = augmentation.table(
        timings(**{"jevb_jax/flip": [0.5], "kornia/flip": [1.5]}), batch_size=30
    )
    assert rows == [{"images/s": "flip", "jevb_jax": 60, "kornia": 20, "ours / kornia": 3}]


def test_evaluation_measures_by_hand():
    same = evaluation.overlap(np.array([[1, 2], [3, 4]]), np.array([[2, 1], [4, 5]]))
    assert same == 0.75
    objectives = {1e-1: 3.0, 1e-2: 2.1, 1e-3: 2.0001, 1e-4: 2.0, 1e-5: 2.0, 1e-6: 2.0}
    found = evaluation.loosest(lambda t: objectives[round(t, 7)], best=2.0, gap=1e-4)
    assert found == pytest.approx(1e-3)
    with pytest.raises(ValueError, match="no tolerance"):
        evaluation.loosest(lambda t: 3.0, best=2.0, gap=1e-4)
    uniform = evaluation.probe_objective(
        np.zeros((3, 4)), np.zeros(4), np.ones((2, 3)), np.array([0, 3]), 1.0
    )
    assert uniform == pytest.approx(np.log(4))
    certain = evaluation.probe_objective(
        np.array([[1e3, -1e3]]), np.zeros(2), np.ones((1, 1)), np.array([0]), 1e-3
    )
    assert certain == pytest.approx(1e-3 / 2 * 2e6)  # the penalty alone


def test_steps_of_a_turn_are_whole_dispatches():
    with pytest.raises(ValueError, match="multiple"):
        train_throughput.StepTimer(None, num_steps=5, steps_per_dispatch=2)  # pyright: ignore[reportArgumentType]


def test_peers_have_one_backbone():
    for benchmark in (train_throughput, evaluation):
        arguments = benchmark.parse(["--out=x", "--backbone=convnet", "--peer_python=python"])
        with pytest.raises(ValueError, match="resnet18 alone"):
            benchmark.main(arguments)


@pytest.mark.slow
@pytest.mark.nightly
def test_augmentation_runs(tmp_path):
    arguments = augmentation.parse(
        [f"--out={tmp_path}", "--batch_size=2", "--num_rounds=1", "--num_cores=0", "--image_size=8"]
    )
    text = augmentation.main(arguments)
    rows = json.loads((tmp_path / "augmentation.json").read_text())["tables"][""]
    assert [row["images/s"] for row in rows] == [
        "view", "crop and resize", "flip", "jitter", "grey", "blur", "solarise"
    ]  # fmt: skip
    assert "| view |" in text


@pytest.mark.slow
@pytest.mark.nightly
def test_training_and_evaluation_run(tmp_path):
    arguments = train_throughput.parse(
        [
            f"--out={tmp_path}",
            *("--methods=simsiam", "--backbone=convnet"),
            *("--width=2", "--head_dim=16", "--batch_size=4", "--num_images=40", "--image_size=8"),
            *("--steps_per_turn=1", "--num_rounds=1", "--matmul_size=8"),
        ]
    )
    assert "| simsiam |" in train_throughput.main(arguments)
    arguments = evaluation.parse(
        [
            f"--out={tmp_path}",
            *("--num_bank=300", "--num_queries=20", "--dim=4", "--k=3", "--num_probe=300"),
            *("--num_images=5", "--batch_size=4", "--width=2", "--num_rounds=1"),
            *("--backbone=convnet", "--labels_per_class=3", "--num_scores", "30", "40"),
        ]
    )
    evaluation.main(arguments)
    tables = json.loads((tmp_path / "evaluation.json").read_text())["tables"]
    assert all(row["same neighbours"] == 1 for row in tables["k-NN"])
    assert all(row["objective / best - 1"] < 1e-4 for row in tables["Linear probe"])
    assert [row["images inside and outside"] for row in tables["Detection"]] == [30, 30, 40, 40]
    few = tables["Few labels"]
    assert few[0]["validation accuracy"] == pytest.approx(few[1]["validation accuracy"], abs=0.02)
