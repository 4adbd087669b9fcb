"""The rules of the house, read from the source."""

import ast
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "jevb_jax"
USERS_OF_REPORT = ("runner",)
CONFIG_DOORS = ("command_line", "experiment", "runner")


def modules() -> dict[str, Path]:
    return {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
        for path in PACKAGE.rglob("*.py")
    }


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def test_mathematics_knows_no_framework_and_config_stops_at_the_door():
    for name, path in modules().items():
        roots = {imported.split(".")[0] for imported in imports(path)}
        if name.startswith("paper."):
            assert not roots & {"flax", "optax", "ml_collections"}, name
            assert "distrax" not in roots or name == "paper.distrax_faces", name
        if name not in CONFIG_DOORS:
            assert "ml_collections" not in roots, name
        assert not roots & {"configs", "studies", "torch", "tensorflow"}, name
        assert not any(imported.startswith("jax._src") for imported in imports(path)), name
        # Outside of JAX's promises; `tracing` is the one place that needs it.
        assert name == "tracing" or not re.search(
            r"jax\.(core|interpreters)\b", path.read_text()
        ), name
        assert path.stem not in ("utils", "helpers", "common"), name


def test_no_import_cycles():
    known = {name: imports(path) for name, path in modules().items()}
    graph = {
        name: {
            other
            for other in known
            if f"jevb_jax.{other}" in imported and other != name and other != "__init__"
        }
        for name, imported in known.items()
    }
    done: set[str] = set()
    while len(done) < len(graph):
        free = {name for name in graph if name not in done and graph[name] <= done}
        assert free, f"a cycle among {sorted(set(graph) - done)}"
        done |= free


def test_report_is_the_top_floor_and_draws_only():
    """It computes no number: no networks, no search, no area under a curve."""
    for name, path in modules().items():
        if name.startswith("report."):
            roots = {imported.split(".")[0] for imported in imports(path)}
            assert not roots & {"jax", "flax", "optax", "sklearn", "scipy"}, name
            computing = ("classification", "features", "ood", "mixture", "networks", "model")
            for module in computing:
                assert not {f"jevb_jax.{module}", f"jevb_jax.evaluation.{module}"} & imports(path)
        elif name not in USERS_OF_REPORT:
            assert not any(one.startswith("jevb_jax.report") for one in imports(path)), name


def test_files_of_report_are_short():
    for path in (PACKAGE / "report").iterdir():
        if path.is_file():
            assert len(path.read_text(encoding="utf-8").splitlines()) <= 500, path.name


def test_training_starts_without_what_only_its_end_needs():
    # scikit-learn, with SciPy's statistics, takes as long to import as everything else together.
    code = (
        "import sys; from jevb_jax import commands; print({'sklearn', 'scipy.stats', 'distrax', "
        "'tensorflow_probability', 'tensorflow_datasets', 'tensorflow', 'torch', 'pandas', "
        "'matplotlib.pyplot'} & set(sys.modules) or '')"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert not out.stdout.strip(), out.stdout


def test_import_is_light_and_lists_its_names():
    code = (
        "import sys, jevb_jax; heavy = {'tensorflow', 'torch', 'tensorflow_probability', 'distrax', "
        "'tensorflow_datasets', 'flax', 'optax', 'orbax', 'sklearn', 'scipy.stats', 'matplotlib', "
        "'tensorstore', 'PIL', 'ml_collections'} & set(sys.modules); "
        "missing = [n for n in jevb_jax.__all__ if not hasattr(jevb_jax, n)]; print(heavy or '', missing)"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert out.stdout.split() == ["[]"], out.stdout
