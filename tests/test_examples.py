"""Every example runs and learns."""

import runpy
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
NOTEBOOK = EXAMPLES / "tour.ipynb"


def main_of(name: str) -> Any:
    return runpy.run_path(str(EXAMPLES / name))["main"]


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.parametrize(
    "framework",
    ["linen", "nnx", "equinox"],
)
def test_own_encoders_learn(framework):
    before, after = main_of(f"own_encoder_{framework}.py")(num_steps=60)
    assert after < before - 0.2


@pytest.mark.slow
@pytest.mark.nightly
def test_vectors_that_are_no_images_are_learned():
    accuracies = main_of("tabular.py")()
    assert accuracies["embedding"] > accuracies["embedding, untrained"] + 0.05
    # Three classes; the measurements themselves are hard to beat.
    assert accuracies["posterior mean"] > 0.8


@pytest.mark.slow
@pytest.mark.nightly
def test_the_notebook_runs_in_a_fresh_process(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(EXAMPLES.parent))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    where = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources=where).execute()
    pictures = [
        output
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if "image/png" in output.get("data", {})
    ]
    assert len(pictures) == 5
    assert [path.name for path in tmp_path.iterdir()] == ["ipython"]  # it leaves no file


def test_the_notebook_is_small_and_its_outputs_are_of_one_run():
    text = NOTEBOOK.read_text(encoding="utf-8")
    assert len(text) < 300_000
    notebook = nbformat.reads(text, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert not [one for one in outputs if one.output_type == "error" or one.get("name") == "stderr"]
