"""The table of how far protocols are from their references, of the command in docs/comparison.md:

`JEVB_JAX_TESTS=optimized pytest -n 0 tests/evaluation --differences=FILE`
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-q", "tests/evaluation/test_reliability.py"]
    # This test may itself run in a worker of pytest-xdist.
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    return subprocess.run(
        [*command, *arguments], cwd=ROOT, env=env, capture_output=True, text=True, check=False
    )


@pytest.mark.slow
@pytest.mark.nightly
def test_the_table_is_written_by_one_process(tmp_path):
    table = tmp_path / "table.csv"
    made = run("-n", "0", "-k", "many_images or crop", f"--differences={table}")
    assert made.returncode == 0, made.stdout
    assert table.read_text().splitlines() == [
        "protocol,values,largest difference",
        "R-AUROC,1,0.0e+00",
        "crops are less certain,2,0.0e+00",
    ]
    table.unlink()
    refused = run(f"--differences={table}")
    assert refused.returncode == 4
    assert "--differences needs one process: add -n 0" in refused.stdout + refused.stderr
    assert not table.exists()
