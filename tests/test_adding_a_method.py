"""docs/adding_a_method.md, step by step, in a copy of the repository."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def blocks() -> list[str]:
    """The code of the page, each block at its own indentation."""
    text = (ROOT / "docs" / "adding_a_method.md").read_text(encoding="utf-8")
    found = re.findall(r"(?:^ {8}.*\n|^\n(?= {8}))+", text, flags=re.MULTILINE)
    return [re.sub(r"(?m)^ {8}", "", block).strip("\n") + "\n" for block in found]


@pytest.mark.slow
@pytest.mark.nightly
def test_the_page_is_what_it_takes(tmp_path):
    loss, row, settings = blocks()
    for name in ("jevb_jax", "configs", "train.py"):
        source = ROOT / name
        if source.is_dir():  # jevb_jax/configs stays a link
            shutil.copytree(source, tmp_path / name, symlinks=True)
        else:
            shutil.copy(source, tmp_path / name)
    section, field, values = re.split(r"\n\n(?=distance:|config\.)", settings)

    methods = tmp_path / "jevb_jax" / "methods.py"
    above = "from jevb_jax.paper.sphere import polar_decomposition\n\n\n"
    methods.write_text(f"{methods.read_text()}\n\n{above}{loss}\n\n{row}")
    sections = tmp_path / "jevb_jax" / "settings" / "sections.py"
    text = sections.read_text().replace(
        "@dataclass(frozen=True)\nclass RunSettings:",
        f"{section}\n\n\n@dataclass(frozen=True)\nclass RunSettings:",
    )
    sections.write_text(
        text.replace("    ood: OodSection\n", f"    ood: OodSection\n    {field}\n", 1)
    )
    default = tmp_path / "configs" / "default.py"
    default.write_text(
        default.read_text().replace("    return config\n", f"    {values}    return config\n")
    )

    command = [sys.executable, "train.py", "--config=configs/smoke.py", "--config.method=distance"]
    command += ["--config.distance.weight=2.0", "--config.ood.corruptions=()", "--workdir=run"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert '"train/distance"' in (tmp_path / "run" / "metrics.jsonl").read_text()
    assert (tmp_path / "run" / "results.json").exists()
