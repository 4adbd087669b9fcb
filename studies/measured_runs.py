"""The command line of studies that measure trained runs: `--runs RUN [RUN ...] --out=DIRECTORY`."""

import argparse
import csv
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

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
    others = [name for name in rows[0] if name not in fields]
    text = io.StringIO()
    writer = csv.DictWriter(text, [*fields, *others], lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({k: f"{v:.4f}" if isinstance(v, float) else v for k, v in row.items()})
    files.write_text_atomically(options.out / file, text.getvalue())
    print(text.getvalue(), end="")
