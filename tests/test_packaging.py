"""What an installation holds and needs: modules, files beside them, configs, commands, extras."""

import ast
import importlib
import importlib.metadata
import importlib.resources
import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import jevb_jax
from jevb_jax import extras
from jevb_jax.runs import metrics_writers

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "jevb_jax"
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_every_file_of_the_package_is_installed():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    # Every folder with an __init__.py, and no other.
    found = {"include": ["jevb_jax*", "jevb_study"], "namespaces": False}
    assert settings["packages"]["find"] == found
    patterns = settings["package-data"]
    files = [
        path for path in PACKAGE.rglob("*") if path.is_file() and "__pycache__" not in path.parts
    ]
    assert len(files) > 40
    for path in files:
        if path.is_relative_to(PACKAGE / "weights"):  # published encoders are data
            assert any(path.relative_to(PACKAGE).match(one) for one in patterns["jevb_jax"]), path
            continue
        folders = path.relative_to(ROOT).parts[:-1]
        for depth in range(1, len(folders) + 1):
            assert ROOT.joinpath(*folders[:depth], "__init__.py").is_file(), path
        if path.suffix != ".py":
            assert any(path.match(one) for one in patterns[".".join(folders)]), path


@pytest.mark.parametrize("name", ["page.html.j2", "sections.html.j2", "style.css"])
def test_the_page_finds_its_files(name):
    assert importlib.resources.files("jevb_jax.report").joinpath(name).is_file()


def test_the_configs_of_the_package_are_those_that_users_read():
    """One source. `jevb_jax/configs` is followed when a wheel is built."""
    link = PACKAGE / "configs"
    assert link.is_symlink()
    assert link.readlink() == Path("../configs")
    for path in (ROOT / "configs").glob("*.py"):  # an installation has no package `configs`
        assert "from configs" not in path.read_text(encoding="utf-8"), path
    modules = [
        importlib.import_module(f"{name}.digits") for name in ("configs", "jevb_jax.configs")
    ]
    one, other = (module.get_config() for module in modules)
    assert one == other


# --- What it needs --------------------------------------------------------------------------------


def required(*groups: str) -> Iterator[Requirement]:
    """What extras ask for, or the core for "", in full."""
    for group in groups:
        lines = PROJECT["optional-dependencies"][group] if group else PROJECT["dependencies"]
        for one in map(Requirement, lines):
            if one.name == PROJECT["name"]:
                yield from required(*one.extras)
            else:
                yield one


def brought(*groups: str) -> set[str]:
    """Names of the distributions that come with extras, their own requirements included."""
    found: set[str] = set()
    open_ = [canonicalize_name(one.name) for one in required(*groups)]
    while open_:
        if (name := open_.pop()) not in found:
            found.add(name)
            lines = importlib.metadata.requires(name) or ()
            needs = [Requirement(line) for line in lines]
            open_ += [
                canonicalize_name(one.name)
                for one in needs
                if one.marker is None or one.marker.evaluate({"extra": ""})
            ]
    return found


def test_requirements_are_the_core_every_extra_and_pytest():
    lines = (ROOT / "requirements.txt").read_text().split("\n")
    listed = sorted(str(Requirement(line)) for line in lines if line)
    pytest_ = next(line for line in required("test") if line.name == "pytest")
    assert sorted({str(one) for one in [*required("", "all"), pytest_]}) == listed


def test_every_import_comes_with_the_core_or_the_extra_that_its_error_names():
    imported: set[str] = set()
    files = [
        one for name in ("jevb_jax", "jevb_study", "configs") for one in (ROOT / name).rglob("*.py")
    ]
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(str(node.module).partition(".")[0])
    imported -= {*sys.stdlib_module_names, "jevb_jax", "jevb_study"}
    of_module = importlib.metadata.packages_distributions()
    core, train = brought(""), brought("train")
    for name in imported:
        distributions = {canonicalize_name(one) for one in of_module[name]}
        assert distributions & core or name in extras.EXTRAS, name
    # What is reached by name: tfds, what serving needs inside of JAX, and writers of metrics.
    writers = set(metrics_writers._PACKAGES.values())
    assert set(extras.EXTRAS) - imported == {"flatbuffers", "tensorflow_datasets", *writers}
    for name, extra in extras.EXTRAS.items():
        if name == "trackio" and name not in of_module:  # it needs much, and tests have a fake
            assert [one.name for one in required(extra)] == [name]
            continue
        distributions = {canonicalize_name(one) for one in of_module[name]}
        assert distributions & brought(extra), name
        assert extra != "report" or distributions & train, name  # training draws its report


@pytest.mark.slow
def test_the_core_computes_and_what_is_missing_names_its_extra():
    code = f"""
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {sorted(extras.EXTRAS)}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Missing())
import jax, jevb_jax
h = jax.random.normal(jax.random.key(0), (2, 3, 4))
views = [jevb_jax.View(e, e, 1 + 0 * e) for e in h]
likelihood = jevb_jax.Likelihood(df=5.0, radial_df=5.0, radial_scale=0.5)
print(jevb_jax.symmetric_elbo(jax.random.key(1), *views, likelihood).elbo.shape)
for name in ("load", "Detector", "SphericalStudentT"):
    try:
        getattr(jevb_jax, name)
    except ModuleNotFoundError as error:
        print(name, error)
from jevb_jax.command_line import entry_points
for name in ("train", "evaluate", "finetune", "export", "study"):
    try:
        getattr(entry_points, name)()
    except SystemExit as error:
        print(name, error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    shape, *lines = done.stdout.splitlines()
    assert shape == "(3,)"
    begun = [line for line in lines if line.startswith("Importing ")]
    assert len(begun) == 5
    lines = [line for line in lines if line not in begun]
    told = dict(line.split(" ", 1) for line in lines)
    assert list(told) == [
        *("load", "Detector", "SphericalStudentT"),
        *("train", "evaluate", "finetune", "export", "study"),
    ]
    for name, message in told.items():
        extra = "distrax" if name == "SphericalStudentT" else "train"
        assert f"is not installed: pip install 'jevb-jax[{extra}]'" in message, message


def test_a_fault_of_an_import_that_no_extra_mends_is_not_changed():
    for name in ("jevb_jax.no_such", "no_such", None):
        error = ModuleNotFoundError("gone", name=name)
        with pytest.raises(ModuleNotFoundError) as found, extras.explained():
            raise error
        assert found.value is error


def test_commands_are_functions():
    for target in PROJECT["scripts"].values():
        module, _, function = target.partition(":")
        assert callable(getattr(importlib.import_module(module), function))


@pytest.mark.slow
@pytest.mark.nightly
def test_the_installed_wheel_trains_without_a_checkout(tmp_path):
    """The wheel, built from the sdist, in a fresh environment. Needs a package index for setuptools.

    The packages it depends on are those of this environment, so this proves that the wheel holds
    all of its own, not that a package index has the rest.
    """
    source = tmp_path / "source"
    source.mkdir()
    for name in ("jevb_jax", "jevb_study", "configs"):
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=ignore)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    folder = tmp_path / "environment"
    programs = folder / "bin"
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    # A project around it, as `.venv` in a repository: its commit is not ours.
    user = ["git", "-c", "user.name=x", "-c", "user.email=x", "-c", "commit.gpgsign=false"]

    def call(*command: str | Path, cwd: Path = tmp_path) -> str:
        done = subprocess.run(
            command, cwd=cwd, env=env, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    call(sys.executable, "-m", "venv", folder)
    pip = [programs / "python", "-m", "pip", "--quiet", "--disable-pip-version-check"]
    call(*pip, "install", "setuptools>=77")
    build = "import setuptools.build_meta as backend; backend.build_sdist('../dist')"
    call(programs / "python", "-c", build, cwd=source)
    (sdist,) = (tmp_path / "dist").iterdir()
    call(*pip, "install", "--no-build-isolation", "--no-deps", sdist)
    shutil.rmtree(source)
    (packages,) = folder.glob("lib/python*/site-packages")
    # Last on the path, and the `.pth` files of an editable installation there are not read.
    own = {path for path in map(Path, sys.path) if path.name == "site-packages"}
    (packages / "others.pth").write_text("".join(f"{path}\n" for path in own))
    call("git", "init", "--quiet")
    call("git", "add", "--force", packages / "jevb_jax" / "runs" / "provenance.py")
    call(*user, "commit", "--quiet", "-m", "x")

    where = call(programs / "python", "-c", "import jevb_jax; print(jevb_jax.__file__)")
    assert Path(where.strip()).is_relative_to(folder)
    # A method and settings of which little is compiled.
    small = ("method=simsiam", "train.num_epochs=1", "optimizer.warmup_epochs=0.0",
             "data.num_train_examples=256", "evaluation.labels_per_class=0",
             "augmentation.jitter_probability=0.0", "augmentation.grayscale_probability=0.0",
             "ood.corruptions=()")  # fmt: skip
    call(
        programs / "jevb-train", "--config=smoke", "--workdir=run", *(f"--config.{x}" for x in small)
    )  # fmt: skip
    assert (tmp_path / "run" / "report.html").is_file()
    study = (programs / "jevb-study", "--config=smoke", "--vary=jevb.df=1,inf")
    call(*study, "--report_only", "--out=run")
    assert "jevb.df=inf | 0 of 1" in (tmp_path / "run" / "table.md").read_text()
    environment = (tmp_path / "run" / "environment.json").read_text()
    assert f'"jevb-jax": "{PROJECT["version"]}"' in environment
    assert '"commit": null' in environment


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


def test_every_name_of_the_package_has_a_home():
    tree = ast.parse(Path(jevb_jax.__file__).read_text(encoding="utf-8"))
    imported = {
        alias.name: str(node.module).removeprefix("jevb_jax.")
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module != "jevb_jax"
        for alias in node.names
        if alias.name != "TYPE_CHECKING"
    }
    assert imported == jevb_jax._HOMES
    assert sorted(imported) == sorted(jevb_jax.__all__)
    assert set(jevb_jax.__all__) <= set(dir(jevb_jax))
    with pytest.raises(AttributeError, match="has no attribute 'no_such'"):
        jevb_jax.no_such  # noqa: B018
    assert not hasattr(jevb_jax, "_no_such")


@pytest.mark.slow
def test_every_name_of_the_package_is_that_of_its_module():
    for name, home in jevb_jax._HOMES.items():
        module = importlib.import_module(f"jevb_jax.{home}")
        assert getattr(jevb_jax, name) is getattr(module, name)
        assert name in vars(jevb_jax)  # found without asking the next time
    package: Any = jevb_jax
    assert package.export.export_model


def test_the_package_and_its_commands_start_before_jax_is_imported():
    code = (
        "import sys, jevb_jax, jevb_jax.command_line.entry_points\n"
        "assert not {'jax', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
