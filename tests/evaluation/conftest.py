"""How far published protocols are from their references, as a check and as a table."""

import csv
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest


@pytest.fixture(scope="session")
def same(request: pytest.FixtureRequest) -> Iterator[Callable[..., None]]:
    """Compares a protocol with a reference that shares no code, and keeps the largest difference.

    A difference is relative to the largest value of the reference in the same comparison. At the end,
    `--differences=FILE` writes a row for each protocol.
    """
    num_values: dict[str, int] = {}
    largest: dict[str, float] = {}

    def compare(
        protocol: str, found: Any, expected: Any, *, rtol: float = 0.0, atol: float = 0.0
    ) -> None:
        found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
        np.testing.assert_allclose(found, expected, rtol=rtol, atol=atol, err_msg=protocol)
        scale = np.max(np.abs(expected)) or 1.0
        difference = float(np.max(np.abs(found - expected)) / scale)
        num_values[protocol] = num_values.get(protocol, 0) + expected.size
        largest[protocol] = max(largest.get(protocol, 0.0), difference)

    yield compare
    path = request.config.getoption("--differences")
    if path:
        with Path(path).open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["protocol", "values", "largest difference"])
            for protocol, difference in sorted(largest.items()):
                writer.writerow([protocol, num_values[protocol], f"{difference:.1e}"])
