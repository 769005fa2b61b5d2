"""How much memory `sft` needs for its training data, for logs of a few sizes.

python tests/benchmarks/preparing.py --rows 2000000 20000000
python tests/benchmarks/training_data.py --rows 2000000 20000000

Takes the datasets that the first command leaves, gives their items drawn codes of 3 x 256, and does in a process of
its own what the stage does before its first step, with a tokenizer made of titles: the sequences, one pass's plan of
whole histories, and the first 1,000 examples. No model is loaded. Prints the peak of resident memory (pages of mapped
files included, which the system may take back), that of the same process when it has the libraries, the items and the
policy but no interaction, and what is resident in the end and no page of a file.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from reasonrec.tokenizers.artefact import write_json
from reasonrec.tokenizers.terminal import say

SHOWN = 1000  # examples that are made
BATCH = 64


def peak_gb() -> float:
    """The most that this process had resident so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def own_gb() -> float:
    """What is resident now and no page of a file."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:")) * 1024 / 1e9


def build(dataset_folder: Path, base: Path) -> dict[str, Any]:
    """Build training data in this process and say what it took."""
    from scratch_base import make_scratch_base

    from reasonrec.data_gen.schema import Dataset
    from reasonrec.data_gen.tasks.choice import TaskChoice
    from reasonrec.data_gen.tasks.prompts import HISTORY
    from reasonrec.recipes.models.checkpoint import Setting
    from reasonrec.recipes.policies.base import build_policy
    from reasonrec.recipes.trainers.item_sft import planned
    from reasonrec.tokenizers.index import build_index

    dataset = Dataset.load(dataset_folder)
    n_items = dataset.n_items
    numbers = np.random.default_rng(0).choice(256**3, n_items, replace=False)
    index = build_index(np.stack(np.unravel_index(numbers, (256, 256, 256)), 1), [256, 256, 256])
    titles = dataset.items["title"].to_list()
    setting = Setting(str(make_scratch_base(base, titles[:10_000])), "full", HISTORY, False, None, 20)
    policy = build_policy(dataset.catalogue().with_codes(index), setting)
    found: dict[str, Any] = {"without_gb": peak_gb()}
    start = time.perf_counter()
    examples = policy.examples(dataset.sequences, one_per_prefix=False)
    plan = TaskChoice(max_history=20).plan(examples, passes=1, batch_size=BATCH, seed=0)
    fed = planned(plan, examples)
    found["built_s"] = time.perf_counter() - start
    found["built_gb"] = peak_gb()
    start = time.perf_counter()
    shown = [fed[number] for number in range(SHOWN)]
    found |= {
        "shown_s": time.perf_counter() - start,
        "examples": plan.height,
        "peak_gb": peak_gb(),
        "own_gb": own_gb(),
    }
    found["sha256"] = hashlib.sha256(json.dumps([plan.hash_rows().sum(), shown]).encode()).hexdigest()[:16]
    return found


def main() -> None:
    """Measure each size in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[2_000_000])
    parser.add_argument("--datasets", type=Path, default=Path("runs/bench/preparing"))
    parser.add_argument("--dataset", type=Path, help="measure this one in this process, and print JSON")
    parser.add_argument("--out", type=Path, default=Path("runs/bench/training_data.json"))
    options = parser.parse_args()
    base = options.out.parent / "training_data_base"
    if options.dataset:
        print(json.dumps(build(options.dataset, base)))
        return
    results: dict[str, Any] = {"machine": f"{os.cpu_count()} cores, {platform.machine()}, polars {pl.__version__}"}
    for rows in options.rows:
        folder = options.datasets / f"dataset_{rows}"
        if not folder.is_dir():
            say(f"skipped: {folder} is missing (python tests/benchmarks/preparing.py --rows {rows})")
            continue
        command = [sys.executable, __file__, "--dataset", str(folder), "--out", str(options.out)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found = results[f"{rows}"] = json.loads(done.stdout.splitlines()[-1])
        say(
            f"{rows:,} rows, {found['examples']:,} examples: {found['peak_gb']:.2f} GB at most, "
            f"{found['without_gb']:.2f} GB without the log, {found['own_gb']:.2f} GB in the end beside mapped files; "
            f"built in {found['built_s']:.1f} s, {SHOWN:,} examples in {found['shown_s']:.1f} s; {found['sha256']}"
        )
    write_json(options.out, results)


if __name__ == "__main__":
    main()
