"""The comparison of runs: fabricated run directories, hand-computed cells."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from configs import smoke
from jevb_jax.training.experiment import to_json_values
from studies import detection_table

# auroc by (score, set): the sets of a group are averaged, and the severities of a corruption.
SETS = {"cifar100": "near", "tiny": "near", "mnist": "far", "noise_1": "corrupted"}
SETS |= {"noise_5": "corrupted", "patch_shuffle_5": "corrupted"}


def fabricate(directory: Path, *, seed: int, shift: float, **changes: Any) -> Path:
    base = {name: 0.5 + 0.05 * i + shift for i, name in enumerate(SETS)}
    rows = [
        {
            "score": score,
            "outside": name,
            "group": group,
            "auroc": value,
            "low": {"auroc": value - 0.01},
            "high": {"auroc": value + 0.01 + 0.02 * (score == "a/x")},
        }
        for score, sign in (("a/x", 1), ("a/y", -1))
        for name, group in SETS.items()
        for value in [base[name] if sign > 0 else 1 - base[name]]
    ]
    found = {
        "protocol": "P",
        "default_score": "a/x",
        "chosen_score": None,
        "with_labels": [],
        "left_out": {},
        "sets": {name: f"{name}, all of it" for name in SETS},
        "rows": rows,
    }
    trained = [
        {"name": "error_auroc_linear", "features": "a/x", "value": 0.7 + shift, "protocol": ""},
        {"name": "linear_accuracy", "features": "representation", "value": 0.9, "protocol": ""},
    ]
    results = {"split": "test", "trained": trained, "ood": found} | changes
    directory.mkdir(parents=True)
    environment = {"commit": "abc", "devices": ["cpu"], "versions": {"jax": "1"}}
    for name, value in (
        ("results", results),
        ("environment", environment),
        ("config", to_json_values(smoke.get_config()) | {"seed": seed}),
    ):
        (directory / f"{name}.json").write_text(json.dumps(value))
    return directory


@pytest.fixture
def directories(tmp_path) -> list[Path]:
    return [fabricate(tmp_path / "jevb" / f"seed_{s}", seed=s, shift=0.02 * s) for s in (0, 1)] + [
        fabricate(tmp_path / "other", seed=0, shift=-0.1)
    ]


def rows(text: str) -> dict[tuple[str, str], dict[str, str]]:
    """The cells of the first table."""
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    header = lines[0]
    table: dict[tuple[str, str], dict[str, str]] = {}
    for line in lines[1:]:
        if line[:2] == ["run", "score"]:
            break
        table[line[0], line[1]] = dict(zip(header[2:], line[2:], strict=True))
    return table


def test_cells_are_means_over_seeds_severities_and_groups(directories, tmp_path, capsys):
    out = tmp_path / "out"
    detection_table.main([*map(str, directories), f"--out={out}"])
    text = (out / "table.md").read_text()
    cells = rows(text)
    assert list(cells) == [("jevb", "a/x"), ("jevb", "a/y"), ("other", "a/x"), ("other", "a/y")]
    jevb = cells["jevb", "a/x"]
    spread = f"{np.std([0, 0.02], ddof=1):.3f}"
    assert jevb["cifar100"] == f"0.510 ± {spread}"
    assert jevb["near mean"] == f"0.535 ± {spread}"  # (0.50 + 0.55) / 2 + 0.01
    assert jevb["noise"] == f"0.685 ± {spread}"  # (0.65 + 0.70) / 2 + 0.01
    assert jevb["patch shuffle"] == f"0.760 ± {spread}"
    assert cells["other", "a/y"]["far mean"] == "0.500"  # 1 - (0.6 - 0.1)
    assert "near mean" in jevb
    assert "corrupted mean" not in jevb
    assert "| jevb | a/x | 0.710 ± 0.014 |" in text  # of what it means apart from detection
    assert "cifar100, all of it; largest half-width of an interval of AUROC: 0.020" in text
    with (out / "table.csv").open() as file:
        values = {
            (row["run"], row["seed"], row["score"], row["column"]): float(row["value"])
            for row in csv.DictReader(file)
        }
    assert values["jevb", "1", "a/x", "mnist"] == pytest.approx(0.62)
    assert values["other", "0", "a/x", "error_auroc_linear"] == pytest.approx(0.6)
    assert (out / "detection.png").read_bytes()[:4] == b"\x89PNG"
    assert capsys.readouterr().err == ""


def test_what_does_not_fit_is_refused_and_nothing_written(directories, tmp_path, capsys):
    out = tmp_path / "out"
    unlike = fabricate(tmp_path / "unlike", seed=0, shift=0, split="validation")
    plain = fabricate(tmp_path / "plain", seed=0, shift=0)
    results = json.loads((plain / "results.json").read_text())
    del results["ood"]
    (plain / "results.json").write_text(json.dumps(results))
    for directory, message in (
        (unlike, "expected runs of one split and protocol"),
        (plain, "was evaluated without outside sets"),
        (tmp_path / "nothing", "give directories of finished runs"),
    ):
        with pytest.raises(SystemExit, match=message):
            detection_table.main([str(directories[0]), str(directory), f"--out={out}"])
    assert not out.exists()
