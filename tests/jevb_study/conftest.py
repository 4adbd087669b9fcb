"""A study of four runs: finished, unfinished, failed."""

import math
from pathlib import Path

import pytest

from jevb_study.spec import Comparison, Curves, Study, Sweep
from tests.jevb_study.fabricated import MEASURES, config, fabricate


@pytest.fixture
def fabricated(tmp_path) -> tuple[Study, Path]:
    made = Study(
        title="Tails",
        runs={
            "simsiam": config(method="simsiam"),
            "cauchy": config(df=1.0),
            "t": config(),
            "gaussian": config(df=math.inf),
        },
        seeds=(0, 1, 2),
        measures=MEASURES,
        figures=(
            Comparison("all", "All of them", ("simsiam", "t", "gaussian"), ("linear", "rank")),
            Sweep(
                "df",
                "Accuracy against the tail",
                "df",
                {math.inf: "gaussian", 5.0: "t", 1.0: "cauchy"},
                ("linear", "rank"),
                log_x=True,
                references=("simsiam",),
            ),
            Curves("limit", "The limit", ("t", "gaussian"), ("health/effective_rank", "train/no")),
        ),
    )
    for seed, accuracy in enumerate((0.5, 0.52, 0.57)):
        ranks = (3.0, 9.0 + seed, 6.0 - seed)
        fabricate(tmp_path, made, "t", seed, accuracy=accuracy, ranks=ranks)
        fabricate(tmp_path, made, "simsiam", seed, accuracy=accuracy - 0.01)
    fabricate(tmp_path, made, "cauchy", 0, accuracy=0.4, ranks=(2.0, 3.0, 20.5))
    fabricate(tmp_path, made, "cauchy", 1, ranks=(2.0,))
    fabricate(tmp_path, made, "gaussian", 0, accuracy=0.3, ranks=(2.0, 3.0, 4.0))
    fabricate(tmp_path, made, "gaussian", 1, ranks=(2.0, math.nan), failed_at=20)
    fabricate(tmp_path, made, "gaussian", 2, ranks=(1.0, 1.5), failed_at=21)
    return made, tmp_path
