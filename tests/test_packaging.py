"""What an installation holds: every module, and the files beside them."""

import importlib.resources
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "jevb_jax"


def test_every_file_of_the_package_is_installed():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    # Every folder with an __init__.py, and no other.
    assert settings["packages"]["find"] == {"include": ["jevb_jax*"], "namespaces": False}
    patterns = settings["package-data"]
    files = [
        path for path in PACKAGE.rglob("*") if path.is_file() and "__pycache__" not in path.parts
    ]
    assert len(files) > 40
    for path in files:
        folders = path.relative_to(ROOT).parts[:-1]
        for depth in range(1, len(folders) + 1):
            assert ROOT.joinpath(*folders[:depth], "__init__.py").is_file(), path
        if path.suffix != ".py":
            assert any(path.match(one) for one in patterns[".".join(folders)]), path


@pytest.mark.parametrize("name", ["page.html.j2", "sections.html.j2", "style.css"])
def test_the_page_finds_its_files(name):
    assert importlib.resources.files("jevb_jax.report").joinpath(name).is_file()


@pytest.mark.parametrize(
    ("schema", "pattern"),
    [
        ("github-workflows", ".github/workflows/*.yml"),
        ("github-issue-forms", ".github/ISSUE_TEMPLATE/*.yml"),
        ("citation-file-format", "CITATION.cff"),
    ],
)
def test_what_a_host_reads_fits_its_schema(schema, pattern):
    paths = sorted(ROOT.glob(pattern))
    assert paths
    command = [Path(sys.executable).with_name("check-jsonschema"), "--builtin-schema"]
    done = subprocess.run(
        [*command, f"vendor.{schema}", *paths], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout
