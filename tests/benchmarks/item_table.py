"""How long exact lists from a table of item vectors take, as multiples of reading the table from memory once.

    python tests/benchmarks/item_table.py --items 1000000 --width 576

Each list is measured before, between and after the plain readings; medians. Prints a table, and writes
runs/bench/item_table.json.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from reasonrec.recipes.policies.dual_head.table import best_rows
from reasonrec.tokenizers.artefact import write_json
from reasonrec.tokenizers.terminal import say

LIMITS = {1: 1.3, 64: 2.0}  # users at a time: readings of the table


def timed(work: Callable[[], object]) -> float:
    """Seconds of one call."""
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=576)
    parser.add_argument("--k", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path("runs/bench/item_table.json"))
    options = parser.parse_args()
    torch.manual_seed(0)
    table = torch.nn.functional.normalize(torch.randn(options.items, options.width))
    users = {n: torch.nn.functional.normalize(torch.randn(n, options.width)) for n in LIMITS}
    seconds: dict[str, list[float]] = {"reading": []} | {str(n): [] for n in LIMITS}
    for round_ in range(options.repeats + 1):
        found = {"reading": timed(table.sum)}
        for n, queries in users.items():
            found[str(n)] = timed(lambda queries=queries: best_rows(table, queries, options.k, temperature=0.02))
        if round_:  # the first one warms up
            for name, value in found.items():
                seconds[name].append(value)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    size = table.numel() * table.element_size() / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    say(f"{options.items:,} items × {options.width}, float32: {size:,.0f} MiB; the process at most {peak:,.0f} MiB")
    say(f"reading it once: {medians['reading'] * 1000:.0f} ms ({torch.get_num_threads()} threads)")
    for n, limit in LIMITS.items():
        times = medians[str(n)] / medians["reading"]
        say(f"best {options.k} for {n:>2} users: {times:.2f} readings (at most {limit})")
    ratios = {str(n): medians[str(n)] / medians["reading"] for n in LIMITS}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(options.out, {"seconds": medians, "readings": ratios, "table_mib": size, "peak_mib": peak})


if __name__ == "__main__":
    main()
