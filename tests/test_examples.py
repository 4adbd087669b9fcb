"""Every example runs and learns."""

import runpy
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def main_of(name: str) -> Any:
    return runpy.run_path(str(EXAMPLES / name))["main"]


@pytest.mark.slow
@pytest.mark.parametrize("framework", ["linen", "nnx", "equinox"])
def test_own_encoders_learn(framework):
    before, after = main_of(f"own_encoder_{framework}.py")(num_steps=60)
    assert after < before - 0.2


@pytest.mark.slow
def test_vectors_that_are_no_images_are_learned():
    accuracies = main_of("tabular.py")()
    assert accuracies["embedding"] > accuracies["embedding, untrained"] + 0.05
    # Three classes; the measurements themselves are hard to beat.
    assert accuracies["posterior mean"] > 0.8
