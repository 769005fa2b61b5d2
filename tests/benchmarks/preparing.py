"""How long `prepare` takes, and how much memory, for logs of a few sizes.

python tests/benchmarks/preparing.py --rows 2000000 20000000

Draws a log of invented interactions (items by Zipf's law, seeded) and its item table as CSV files, and runs the stage
in a process of its own, whose peak memory is read. RecBole's loader reads the smallest log beside it, with the same
filter, where it can be imported. Both run one after the other on this machine; what else runs there slows both.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import polars as pl

BLOCK = 1_000_000  # rows that are drawn at once


def draw(folder: Path, rows: int, n_items: int, seed: int) -> tuple[Path, Path]:
    """Write `rows` interactions of `rows / 20` users with `n_items` items, in the order of no user; and the items."""
    log, table = folder / f"log_{rows}.csv", folder / f"items_{n_items}.csv"
    if not table.is_file():
        words = np.random.default_rng(seed).integers(0, 5000, (n_items, 6))
        titles = [" ".join(f"word{word}" for word in row) for row in words]
        pl.DataFrame({"item_id": [f"i{n}" for n in range(n_items)], "title": titles}).write_csv(table)
    if not log.is_file():
        draws = np.random.default_rng([seed, rows])
        popular = np.cumsum(1 / np.arange(1, n_items + 1))
        part = log.with_suffix(".part")
        with part.open("wb") as file:
            for start in range(0, rows, BLOCK):
                n = min(BLOCK, rows - start)
                users = draws.integers(0, rows // 20, n)
                items = np.searchsorted(popular, draws.random(n) * popular[-1])
                times = draws.integers(1_600_000_000, 1_700_000_000, n)
                frame = pl.DataFrame({"user_id": users, "item_id": items, "timestamp": times})
                frame = frame.with_columns(pl.format("u{}", "user_id"), pl.format("i{}", "item_id"))
                frame.select("user_id", "item_id", "timestamp").write_csv(file, include_header=start == 0)
        part.rename(log)
    return log, table


def measured(command: list[str]) -> dict[str, float]:
    """Run a command: seconds, and GB of peak memory of it alone."""
    # A process of its own that runs nothing else, for the system keeps the largest of all children.
    code = (
        "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, stdout=sys.stderr); "
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code, *command], check=True, stdout=subprocess.PIPE, text=True)
    return {"seconds": time.perf_counter() - start, "peak_gb": int(done.stdout) * 1024 / 1e9}
