"""The documentation says what the code says: equations, their functions, names, links."""

import ast
import fnmatch
import re
import tomllib
from pathlib import Path

import pytest

from jevb_jax.command_line import config_files, start

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "jevb_jax"
MATHEMATICS = ROOT / "docs" / "mathematics.md"
NUM_EQUATIONS = 45

FUNCTION_LINK = re.compile(r"\[`(?P<name>\w+)`\]\(\.\./(?P<path>(?:jevb_jax|tests)/[\w/]+\.py)\)")


def definitions(path: Path) -> dict[str, str]:
    """Docstrings of the public functions and classes of a module by name."""
    return {
        node.name: ast.get_docstring(node) or ""
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
    }


def numbers_in(docstring: str) -> set[int]:
    """Equations that a docstring names: "docs eq. 4", "docs eq. 2 and 3", not those of papers."""
    return {
        int(number)
        for group in re.findall(r"docs eq\. (\d+(?: and \d+)*)", docstring)
        for number in re.findall(r"\d+", group)
    }


def equations() -> dict[int, list[tuple[str, str]]]:
    """Functions and files that the text of an equation links to, by the equation's number."""
    text = MATHEMATICS.read_text(encoding="utf-8").split("\n## Numerics")[0]
    parts = re.split(r'<a id="eq-(\d+)"></a>\*\*\((\d+)\)\*\*', text)
    found = {}
    for anchor, number, body in zip(parts[1::3], parts[2::3], parts[3::3], strict=True):
        assert anchor == number
        assert int(number) not in found, f"({number}) twice"
        found[int(number)] = [(m["name"], m["path"]) for m in FUNCTION_LINK.finditer(body)]
    return found


def test_equations_are_numbered_without_a_gap():
    assert list(equations()) == list(range(1, NUM_EQUATIONS + 1))


def test_each_equation_has_functions_that_exist_and_name_it():
    paths = {path for functions in equations().values() for _, path in functions}
    modules = {path: definitions(ROOT / path) for path in paths}
    for number, functions in equations().items():
        assert functions, f"({number}) has no function"
        for name, path in functions:
            assert name in modules[path], f"({number}) links to {path}: {name}, which is not there"
            assert number in numbers_in(modules[path][name]), (
                f"{name} does not name docs eq. {number}"
            )


def test_docstrings_name_equations_that_exist_and_that_lead_back():
    for path in PACKAGE.rglob("*.py"):
        for number in numbers_in(path.read_text(encoding="utf-8")):
            assert 1 <= number <= NUM_EQUATIONS, f"{path.name}: docs eq. {number}"


def test_the_table_of_equations_names_functions_of_the_package():
    text = MATHEMATICS.read_text(encoding="utf-8")
    table = text.split("## Equation -> function")[1].split("\n## ")[0]
    names = {
        name
        for line in table.splitlines()
        if line.startswith("|")
        for name in re.findall(r"`([a-z]\w+_\w+)`", line.rsplit("|", 2)[1])
    }
    assert len(names) > 10
    known = {name for path in PACKAGE.rglob("*.py") for name in definitions(path)} | {"jevb_jax"}
    assert names <= known, names - known


PAGES = sorted(
    path for path in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")] if path.is_file()
)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files(page: Path):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if not target.startswith(("http", "#")):
            assert (page.parent / target.split("#")[0]).exists(), target


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 120


def test_the_commands_of_the_readme_are_those_that_are_tested():
    train = (
        "pip install -r requirements.txt && "
        "python train.py --config=configs/digits.py --workdir=runs/digits"
    )
    tests = "pip install -q -r requirements.txt -e '.[test]' && pytest"
    site = "pip install -q -e '.[docs]' && mkdocs build --strict --site-dir build/site"
    readme, index, checks = (
        (ROOT / name).read_text(encoding="utf-8").splitlines()
        for name in ("README.md", "docs/index.md", ".ci/run")
    )
    assert {f"    {command}" for command in (train, tests, site)} <= set(readme)
    assert {f"    {command}" for command in (train, tests)} <= set(index)
    assert {tests, site} <= set(checks)


def test_programs_configs_and_settings_of_the_pages_exist(monkeypatch):
    monkeypatch.chdir(ROOT)
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    programs, configs = set(), set()
    for page in PAGES:
        if page.is_relative_to(ROOT / "docs" / "results") or page.name == "CHANGELOG.md":
            continue  # generated; history
        text = re.sub(r"\\\n\s*", " ", page.read_text(encoding="utf-8"))
        programs |= set(re.findall(r"python (\w+\.py|-m \w+\.[\w.]+\w)", text))
        assert set(re.findall(r"\bjevb-\w+(?= --|`)", text)) <= {*scripts, "jevb-jax"}, page
        for line in text.splitlines():
            files = re.findall(r"--(config|data|ood)=([a-z][\w/.]*\w(?::[a-z]\w*)?)", line)
            configs |= set(files)
            for flag, given in files:
                if given.startswith("runs/"):
                    continue
                config = config_files.load(flag, config_files.file_of(given))
                argv = ["x", *re.findall(rf"--(?:no)?{flag}\.[\w.]+", line)]
                start._check_overrides(argv, flag, config)
    assert len(configs) > 8
    assert len(programs) > 6
    for program in programs - {"-m jevb_jax.study"}:  # a page says that it is a former command
        path = program.removeprefix("-m ").removesuffix(".py").replace(".", "/") + ".py"
        assert (ROOT / path).is_file(), program


def test_every_page_is_in_the_navigation():
    """The build is strict about it too, but it comes last and is not part of this suite."""
    config = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    listed = set(
        re.findall(r"^ +- [^:\n]+: ([\w/]+\.md)$", config.split("\nnav:\n")[1], re.MULTILINE)
    )
    pages = {str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")}
    assert pages == listed


def test_changelog_and_citation_have_the_package_version():
    version = re.search(r'__version__ = "([^"]+)"', (PACKAGE / "__init__.py").read_text())
    assert version is not None
    for name in ("CHANGELOG.md", "CITATION.cff", "pyproject.toml"):
        assert version[1] in (ROOT / name).read_text(encoding="utf-8"), name


def test_every_subpackage_is_packaged():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = settings["tool"]["setuptools"]["packages"]["find"]["include"]
    for folder in {path.parent for path in PACKAGE.rglob("*.py")}:
        name = ".".join(folder.relative_to(ROOT).parts)
        assert (folder / "__init__.py").exists(), name
        assert any(fnmatch.fnmatch(name, pattern) for pattern in patterns), name
