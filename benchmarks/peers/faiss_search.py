# pyright: reportMissingImports=false
"""faiss's exact search: `search`, neighbours by inner product of unit vectors, written to a file."""

import time
from typing import Any

import faiss
import numpy as np
from serve import serve


def make(settings: dict[str, Any]) -> Any:
    """Facts and timers, see `serve`."""
    with np.load(settings["features"]) as arrays:
        bank, queries = arrays["bank"], arrays["queries"]
    faiss.omp_set_num_threads(settings["num_threads"])

    def search(count: int) -> float:
        found = None
        start = time.perf_counter()
        for _ in range(count):
            unit_bank, unit_queries = bank.copy(), queries.copy()
            faiss.normalize_L2(unit_bank)
            faiss.normalize_L2(unit_queries)
            index = faiss.IndexFlatIP(bank.shape[1])
            index.add(unit_bank)
            _, found = index.search(unit_queries, settings["k"])
        seconds = time.perf_counter() - start
        if found is not None:
            np.save(settings["result"], found)
        return seconds

    facts = {"faiss": faiss.__version__, "threads": settings["num_threads"]}
    return facts, {"search": search}


if __name__ == "__main__":
    serve(make)
