"""Finds what a reader types: the commands and the Python of README.md, the pages and the benchmarks.

Code is what Markdown shows as code: fenced lines, and lines that are indented by four (in an item of a
list: eight) below an empty line. A passage of code is one command, or lines of Python between commands.
"""

import ast
import itertools
import re
import shlex
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
# The first of these trains the run that the commands of all others use: with copies of its metrics.
_FIRST = ("docs/settings.md", "README.md", "docs/use.md")
PAGES = (
    *(ROOT / name for name in _FIRST),
    *sorted(path for path in (ROOT / "docs").glob("*.md") if f"docs/{path.name}" not in _FIRST),
    ROOT / "benchmarks" / "README.md",
)
# What a page may say of a command that the tests cannot run, as a comment at the command's end.
MARKS = (
    "needs a GPU",
    "needs a TPU",
    "needs a cluster",
    "needs a cloud account",
    "needs a download",
    "takes hours on a CPU",
)

_OTHER_LANGUAGES = ("math", "bibtex", "json")
_PROGRAMS = r"(?:python|pip|pytest|mkdocs|jevb-\w+|export|cd)(?: |$)"
_SHELL = re.compile(rf"(?:\w+=\S* )*{_PROGRAMS}")


class Passage(NamedTuple):
    """Code of a page.

    Attributes:
      page: path of the page below the root.
      line: number of its first line.
      text: one shell command without its comment, its lines joined; or Python.
      mark: which of `MARKS` the page gives it, separated by "; ".
    """

    page: str
    line: int
    text: str
    is_shell: bool
    mark: str

    def __str__(self) -> str:
        return f"{self.page}, line {self.line}: {self.text}"


def passages(page: Path) -> list[Passage]:
    """All code of a page in its order."""
    name = page.relative_to(ROOT).as_posix()
    return list(passages_of(name, page.read_text(encoding="utf-8")))


def passages_of(name: str, text: str) -> Iterator[Passage]:
    """As `passages`, for a page that is given as its name and its text."""
    for block in _blocks(text):
        for is_shell, group in itertools.groupby(_paragraphs(block), key=_is_shell):
            if is_shell:
                for paragraph in group:
                    yield from _commands(name, paragraph)
            else:
                yield _python(name, list(group))


class _Lines(NamedTuple):
    start: int
    lines: list[str]


def _blocks(text: str) -> Iterator[_Lines]:
    """Runs of code lines, without their indentation."""
    found: list[str] = []
    start, indent, fence, is_after_empty = 1, 4, None, True
    for number, line in enumerate([*text.splitlines(), ""], start=1):
        bare = line.strip()
        is_fence = bare.startswith("```")
        if fence is None and bare and not line.startswith(" ") and not is_fence:
            indent = 8 if re.match(r"(?:[*+-]|\d+\.) ", line) else 4
        is_indented = line.startswith(" " * indent) and (is_after_empty or bool(found))
        if is_fence:
            if found and fence not in _OTHER_LANGUAGES:
                yield _Lines(start, textwrap.dedent("\n".join(found)).splitlines())
            found, fence = [], bare[3:].strip() if fence is None else None
        elif fence is not None or is_indented or (found and not bare):
            if not found:
                start = number
            found.append(line)
        elif found:
            yield _Lines(start, textwrap.dedent("\n".join(found)).splitlines())
            found = []
        is_after_empty = not bare
    if found:
        yield _Lines(start, textwrap.dedent("\n".join(found)).splitlines())


def _paragraphs(block: _Lines) -> Iterator[_Lines]:
    """The parts between empty lines. Those of a citation are no code."""
    numbered = enumerate(block.lines, start=block.start)
    for is_text, group in itertools.groupby(numbered, key=lambda one: bool(one[1].strip())):
        lines = list(group)
        if is_text and not lines[0][1].startswith("@article{"):
            yield _Lines(lines[0][0], [line for _, line in lines])


def _is_shell(paragraph: _Lines) -> bool:
    """Whether it starts with a program that is known, or is no Python."""
    if _SHELL.match(paragraph.lines[0]):
        return True
    try:
        ast.parse(textwrap.dedent("\n".join(paragraph.lines)))
    except SyntaxError:
        return True
    return False


def _commands(name: str, paragraph: _Lines) -> Iterator[Passage]:
    """The commands of a paragraph, each with all of its lines; `a && b` are two with one mark."""
    waiting, start = "", paragraph.start
    for number, line in enumerate(paragraph.lines, start=paragraph.start):
        start = start if waiting else number
        if line.endswith("\\"):
            waiting += line[:-1].rstrip() + " "
            continue
        waiting += line.strip() if waiting.endswith(" ") else line
        try:
            parts = _split(waiting)
        except ValueError:  # a quotation that goes on in the next line
            waiting += "\n"
            continue
        comment = re.search(r"(?:^|\s)#([^'\"]*)$", waiting)
        mark = _marks(comment[1] if comment else "")
        for part in parts:
            yield Passage(name, start, part, is_shell=True, mark=mark)
        waiting = ""
    if waiting:
        raise ValueError(f"{name}, line {start}: a command without an end: {waiting!r}")


def _split(line: str) -> list[str]:
    """The commands of a line, as one writes them. Raises ValueError if a quotation has no end."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars="&;|")
    lexer.whitespace_split = True
    lexer.commenters = "#"
    found: list[list[str]] = [[]]
    for token in lexer:
        if token and set(token) <= set("&;|"):
            found.append([])
        else:
            found[-1].append(token)
    return [shlex.join(words) for words in found if words]


def _marks(comment: str) -> str:
    return "; ".join(part.strip() for part in comment.split(";") if part.strip() in MARKS)


def _python(name: str, paragraphs: list[_Lines]) -> Passage:
    text = "\n\n".join("\n".join(paragraph.lines) for paragraph in paragraphs)
    comments = re.findall(r"(?:^|\s)#([^'\"\n]*)$", text, flags=re.MULTILINE)
    mark = "; ".join(filter(None, map(_marks, comments)))
    return Passage(name, paragraphs[0].start, text, is_shell=False, mark=mark)
