"""The command line of studies that measure trained runs: `--runs RUN [RUN ...] --out=DIRECTORY`."""

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jevb_jax.report import tables
from jevb_jax.runs import files


def write_table(
    measure: Callable[[str], Sequence[Mapping[str, Any]]],
    fields: Sequence[str],
    file: str,
    *,
    about: str | None,
    arguments: Sequence[str] | None,
) -> None:
    """Measures every run, writes one CSV file, and prints it.

    Args:
      measure: from the directory of a run to its rows.
      fields: first columns. The other columns of the first row, in its order, come after them.
      file: name of the file in `--out`.
      about: what `--help` says.
      arguments: of the command line; None takes those of the process.
    """
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--runs", nargs="+", required=True, help="directories of trained runs")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    rows = [row for directory in options.runs for row in measure(directory)]
    header = list(dict.fromkeys([*fields, *rows[0]]))
    whole = [{**dict.fromkeys(header), **row} for row in rows]
    cells = [[f"{v:.4f}" if isinstance(v, float) else v for v in row.values()] for row in whole]
    text = tables.csv_table(header, cells)
    files.write_text_atomically(options.out / file, text)
    print(text, end="")
