"""The rules of the house, read from the source."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "jevb_jax"
CONFIG_DOORS = (
    "command_line.scripts",
    "command_line.start",
    "commands",
    "settings.run_config",
    "training.experiment",
)
# From the ground up: a module imports from its own floor and from those below.
FLOORS = (
    ("arguments", "extras", "messages", "parallel", "paper"),
    ("to_onnx", "xla_options"),
    ("runs",),
    ("images", "networks"),
    ("methods",),
    ("settings",),
    ("training",),
    ("evaluation",),
    ("forward", "detector"),
    ("hub", "model", "model_names", "report"),
    ("hub_push", "loading", "small_programs", "start_weights"),
    (
        "__init__",
        "any_encoder",
        "any_encoder_training",
        "commands",
        "convert",
        "export",
        "finetuning",
        "rounding",
        "sklearn_detector",
        "sklearn_transformer",
    ),
    ("command_line",),
)


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
        assert "jevb_study" not in roots or name == "command_line.entry_points", name
        assert not any(imported.startswith("jax._src") for imported in imports(path)), name
        # Outside of JAX's promises; `tracing` is the one place that needs it.
        assert name == "paper.tracing" or not re.search(
            r"jax\.(core|interpreters)\b", path.read_text()
        ), name
        assert path.stem not in ("utils", "helpers", "common"), name


def graph() -> dict[str, set[str]]:
    known = {name: imports(path) for name, path in modules().items()}
    return {
        name: {
            other
            for other in known
            if f"jevb_jax.{other}" in imported and other != name and not other.endswith("__init__")
        }
        for name, imported in known.items()
    }


def test_no_import_cycles():
    found = graph()
    done: set[str] = set()
    while len(done) < len(found):
        free = {name for name in found if name not in done and found[name] <= done}
        assert free, f"a cycle among {sorted(set(found) - done)}"
        done |= free


def test_nothing_imports_from_a_higher_floor():
    level = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}

    def floor(name: str) -> int:
        return level[name.split(".")[0]]

    back = [(a, b) for a, found in graph().items() for b in found if floor(b) > floor(a)]
    assert not back, back


def test_no_file_is_too_long_to_read():
    for name, path in modules().items():
        count = len(path.read_text(encoding="utf-8").splitlines())
        assert count <= 500, f"{name} has {count} lines"


def test_settings_are_read_by_attribute():
    """No `config["train"]["batch_size"]`: below the door settings are typed (`settings.sections`)."""
    names = {"config", "settings", "section", "ood_settings"}
    for name, path in modules().items():
        if name == "settings.config_versions":  # the door: it completes what a file holds
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Subscript) or not isinstance(node.slice, ast.Constant):
                continue
            owner = node.value
            while isinstance(owner, ast.Subscript):
                owner = owner.value
            called = owner.id if isinstance(owner, ast.Name) else getattr(owner, "attr", "")
            is_text = isinstance(node.slice.value, str)
            assert not (is_text and called in names), f"{name}:{node.lineno}: {ast.unparse(node)}"


def test_report_draws_only():
    """It computes no number: no networks, no search, no area under a curve."""
    computing = ("knn", "neighbors", "linear_probe", "features", "mixture", "score_table")
    for name, path in modules().items():
        if name.startswith("report."):
            roots = {imported.split(".")[0] for imported in imports(path)}
            assert not roots & {"jax", "flax", "optax", "sklearn", "scipy"}, name
            for module in (*(f"evaluation.{one}" for one in computing), "networks", "model"):
                assert not any(one.startswith(f"jevb_jax.{module}") for one in imports(path)), name


@pytest.mark.slow
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


@pytest.mark.slow
def test_import_is_light_and_lists_its_names():
    code = (
        "import sys, jevb_jax; from jevb_jax.command_line import scripts; "
        "from jevb_jax import conditional_elbo, directional_log_mass, embedding_log_prob; "
        "from jevb_jax import polar_decomposition, power_spherical_entropy; "
        "heavy = {'tensorflow', 'torch', 'tensorflow_probability', 'distrax', "
        "'tensorflow_datasets', 'flax', 'optax', 'orbax', 'sklearn', 'scipy.stats', 'matplotlib', "
        "'tensorstore', 'PIL'} & set(sys.modules); "
        "missing = [n for n in jevb_jax.__all__ if not hasattr(jevb_jax, n)]; print(heavy or '', missing)"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert out.stdout.split() == ["[]"], out.stdout


def test_the_check_runs_every_test_that_depends_on_rounding():
    # It names folders, because to look through all tests takes long.
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    (command,) = (line for line in lines if line.startswith("JEVB_JAX_TESTS=optimized pytest"))
    folders = tuple(ROOT / word for word in command.split() if word.startswith("tests/"))
    marked = [
        path
        for path in (ROOT / "tests").rglob("test_*.py")
        if re.search(r"^(@|pytestmark).*mark\.numerics", path.read_text(), re.MULTILINE)
    ]
    assert len(marked) > 5
    assert all(any(path.is_relative_to(folder) for folder in folders) for path in marked)
