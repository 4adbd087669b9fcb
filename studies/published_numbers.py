"""A published number, and a number of ours in a table of `docs/results`."""

import csv
import dataclasses
import statistics
from pathlib import Path

RESULTS = Path(__file__).resolve().parent.parent / "docs" / "results"
# Of tables that are part of a longer page.
_PAGES = {"full_size": "full_size.md", "speed": "../benchmarks/README.md"}


@dataclasses.dataclass(frozen=True)
class Published:
    """A number of somebody else.

    Attributes:
      what: the method.
      value: as published.
      protocol: how it was made.
      source: where it was read.
    """

    what: str
    value: str
    protocol: str
    source: str


@dataclasses.dataclass(frozen=True)
class Ours:
    """A number of ours, in a table of `docs/results`.

    Attributes:
      what: the method.
      table: folder and file below `docs/results`.
      run: row of the table.
      measure: its column, without ": mean"; or its value in the column "measure"; or, in a table with
        a row for each seed, "SCORE, COLUMN".
      protocol: how it was made.
      command: that made it.
      is_of_others: whether we measured the software of somebody else.
    """

    what: str
    table: str
    run: str
    measure: str
    protocol: str
    command: str
    is_of_others: bool = False

    @property
    def page(self) -> str:
        """The page with the whole table, relative to `docs`."""
        folder = self.table.split("/")[0]
        return _PAGES.get(folder, f"results/{folder}/table.md")

    @property
    def value(self) -> str:
        """Mean ± standard deviation over seeds, and their number; or a value of one run.

        Raises:
          ValueError: the table has no such number.
        """
        with (RESULTS / self.table).open(encoding="utf-8", newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["run"] == self.run]
        seeds = [
            float(row["value"])
            for row in rows
            if "seed" in row and self.measure == f"{row['score']}, {row['column']}"
        ]
        if len(seeds) > 1:
            spread = statistics.stdev(seeds)
            return f"{statistics.mean(seeds):.3f} ± {spread:.3f}, n = {len(seeds)}"
        column = f"{self.measure}: mean"
        if rows and column in rows[0] and rows[0][column]:
            mean, count = float(rows[0][column]), rows[0][f"{self.measure}: n"]
            spread = rows[0][f"{self.measure}: std"]
            return f"{mean:.3f}" + (f" ± {float(spread):.3f}, n = {count}" if spread else "")
        found = [row["value"] for row in rows if row.get("measure") == self.measure]
        if len(found) != 1:
            raise ValueError(f"{self.table} has no {self.measure!r} of the run {self.run!r}")
        return f"{float(found[0]):,.0f}" if float(found[0]) > 100 else f"{float(found[0]):.3f}"
