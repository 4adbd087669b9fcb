"""Hooks of MkDocs: the API reference, links to files outside `docs/`, and equations without scripts.

The Markdown of `docs/` is written for a code host: links lead to files of the repository, and equations
are in LaTeX. The hooks change three things for the site:

* A link to a module of the package leads to the API reference. If the text of the link names a function,
  it leads to this function.
* A link to any other file leads to a page that shows the file; notebooks with their pictures.
* An equation becomes MathML, which browsers draw without a script.
"""

import ast
import json
import re
from pathlib import Path, PurePosixPath
from typing import Any

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "jevb_jax"
ROOT_PAGES = {"changelog.md": "CHANGELOG.md", "contributing.md": "CONTRIBUTING.md"}
PAGES_WITH_EQUATIONS = ("mathematics.md",)

_LINK_OUT = re.compile(r"\[(?P<text>[^\]]*)\]\((?P<path>(?:\.\./)+[^)#\s]+)(?P<anchor>#[^)\s]+)?\)")
_BLOCK_EQUATION = re.compile(r"^```math\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_INLINE_EQUATION = re.compile(r"\$([^$\n]+)\$")
_FUNCTION_WITHOUT_BRACKETS = re.compile(
    r"<mi>(?:log|cos|tan|max|min)</mi>(?!(?:<mrow>)?<mo[^>]*>&#x00028;)"
)
_equations: dict[str, str] = {}


def _modules() -> list[str]:
    """Dotted names of the package's modules, the package first."""
    paths = sorted((ROOT / PACKAGE).rglob("*.py"))
    parts = [path.relative_to(ROOT).with_suffix("").parts for path in paths]
    return sorted(".".join(part[:-1] if part[-1] == "__init__" else part) for part in parts)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Adds the API reference and the pages of the root to the navigation."""
    reference = [{name.removeprefix(f"{PACKAGE}."): f"api/{name}.md"} for name in _modules()]
    nav: list[Any] = [*(config.nav or []), {"API": reference}]
    config.nav = [*nav, {"Changelog": "changelog.md"}, {"Contributing": "contributing.md"}]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds a page for each module, for the files of the root, and for files that pages link to."""
    pages = {
        f"api/{name}.md": f"# `{name}`\n\n::: {name}\n"
        + ("    options:\n      members: false\n" if name == PACKAGE else "")
        + (_public_names() if name == PACKAGE else "")
        for name in _modules()
    }
    for page, path in ROOT_PAGES.items():
        pages[page] = (ROOT / path).read_text(encoding="utf-8")
    for file in list(files.documentation_pages()):
        for match in _LINK_OUT.finditer(file.content_string):
            path = _linked_path(file.src_uri, match["path"])
            if path and not _is_module(path):
                pages.setdefault(f"source/{path}.md", _source_page(path))
    for uri, content in pages.items():
        files.append(File.generated(config, uri, content=content))
    return files


def _public_names() -> str:
    """The names that `jevb_jax` exports, linked to where they are documented."""
    tree = ast.parse((ROOT / PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    imports = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(f"{PACKAGE}.")
    ]
    exported = next(
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    )
    origins = {
        alias.name: node.module
        for node in imports
        for alias in node.names
        if alias.name in exported
    }
    rows = [
        f"* [`{name}`][{module}.{name}] of `{module}`" for name, module in sorted(origins.items())
    ]
    return "\n" + "\n".join(rows) + "\n"


def _linked_path(page_uri: str, link: str) -> str | None:
    """Path in the repository of a link that leads out of `docs/`, or None if it stays inside."""
    parts: list[str] = list(PurePosixPath("docs", page_uri).parent.parts)
    for part in PurePosixPath(link).parts:
        parts = parts[:-1] if part == ".." else [*parts, part]
    if parts[0] == "docs":
        return None
    path = "/".join(parts)
    if not (ROOT / path).is_file():
        raise PluginError(f"docs/{page_uri} links to {path}, which does not exist")
    return path


def _is_module(path: str) -> bool:
    """Whether a file of the repository has a page in the API reference."""
    return path.startswith(f"{PACKAGE}/") and path.endswith(".py")


def _source_page(path: str) -> str:
    language = {".py": "python", ".yaml": "yaml"}.get(Path(path).suffix, "bash")
    text = (ROOT / path).read_text(encoding="utf-8")
    if path.endswith(".md"):  # its links into docs/ lead to the site's own pages
        up = "../" * len(PurePosixPath(path).parts)
        return re.sub(r"\]\((?:\.\./)*docs/", f"]({up}", text)
    if path.endswith(".ipynb"):
        return _notebook_page(path, text)
    return f"# `{path}`\n\n````{language}\n{text}````\n"


def _notebook_page(path: str, text: str) -> str:
    """A notebook with its text, code, printed lines and pictures; the pictures are in the page."""
    up = "../" * len(PurePosixPath(path).parts)
    parts: list[str] = []
    for cell in json.loads(text)["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(re.sub(r"\]\((?:\.\./)*docs/", f"]({up}", source))
            continue
        parts.append(f"````python\n{source}\n````")
        for output in cell["outputs"]:
            data = output.get("data", {})
            if "image/png" in data:
                parts.append(
                    f"![picture](data:image/png;base64,{''.join(data['image/png']).strip()})"
                )
            else:
                printed = "".join(output.get("text", data.get("text/plain", "")))
                parts.append(f"````text\n{printed.rstrip()}\n````")
    return "\n\n".join(parts) + "\n"


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Redirects links to files outside `docs/` to pages of the site; replaces equations by tokens."""
    uri = page.file.src_uri
    up = "../" * (len(PurePosixPath(uri).parts) - 1)

    def leads_to(match: re.Match[str]) -> str:
        path = _linked_path(uri, match["path"])
        if path is None:
            return match[0]
        if not _is_module(path):
            return f"[{match['text']}]({up}source/{path}.md{match['anchor'] or ''})"
        module = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        name = match["text"].strip("`").rpartition(".")[2] if "`" in match["text"] else ""
        if not name or name == "py":
            return f"[{match['text']}]({up}api/{module}.md)"
        return f"[{match['text']}][{module}.{name}]"

    def token(latex: str, display: str) -> str:
        name = f"equationtoken{len(_equations)}x"
        _equations[name] = _mathml(latex, display)
        return name

    markdown = _LINK_OUT.sub(leads_to, markdown)
    if uri in PAGES_WITH_EQUATIONS:
        markdown = _BLOCK_EQUATION.sub(
            lambda match: f'<div class="equation">{token(match[1], "block")}</div>', markdown
        )
        markdown = _INLINE_EQUATION.sub(lambda match: token(match[1], "inline"), markdown)
    if uri in ROOT_PAGES:
        markdown = markdown.replace("](docs/", "](")
        for root_page, path in ROOT_PAGES.items():
            markdown = markdown.replace(f"]({path})", f"]({root_page})")
    return markdown


def _mathml(latex: str, display: str) -> str:
    """An equation as MathML. Code hosts need `aligned`; the converter needs `align*`."""
    text = convert(latex.replace("{aligned}", "{align*}"), display=display)
    if "<mi>&</mi>" in text or "\\" in text:
        raise PluginError(f"an equation was not understood: {latex}")
    # Bars are brackets here, not relations, so they get no space around them.
    text = re.sub(
        r"<mo[^>]*>(&#x0007C;|\|)</mo>", r'<mo stretchy="false" lspace="0" rspace="0">|</mo>', text
    )
    # A thin space after the name of a function whose argument has no brackets.
    return _FUNCTION_WITHOUT_BRACKETS.sub(r'\g<0><mspace width="0.17em"/>', text)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Replaces the tokens by the equations."""
    return re.sub(r"equationtoken\d+x", lambda match: _equations[match[0]], html)
