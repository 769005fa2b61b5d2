"""How far `reasonrec doctor` is from the truth: its three steps and its count of memory beside real trainings.

python tests/benchmarks/forecast.py --config recipes/configs/demo/sft.yaml

Every variant of a configuration is tried (`--trial`, three steps on its longest examples) and then really trained for
`--steps` steps, which are a sample of the whole: seconds and the most memory of the process stand beside what was
foretold. Memory is compared as what a variant takes more than the first one, because a process holds Python and its
libraries as well. Writes `runs/bench/forecast.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from reasonrec.recipes.args import parse
from reasonrec.recipes.doctor import BARE
from reasonrec.recipes.sft import SftStage
from reasonrec.recipes.sizing.memory import memory
from reasonrec.recipes.sizing.training import load_of, shape_of
from reasonrec.recipes.trainers.item_sft import SftArguments
from reasonrec.recipes.trainers.keys import inherited
from reasonrec.recipes.trainers.trial import Trial
from reasonrec.tokenizers.artefact import write_json

STAGE = str(Path(__file__).parents[2] / "recipes" / "sft.py")
VARIANTS = [
    "--layers 2 --method lora",
    "--layers 2 --method full --learning_rate 3e-4 --row_learning_rate null",
    "--layers 10 --method qlora",
    "--layers 10 --method lora --per_device_train_batch_size 32",
    "--layers 10 --method full --learning_rate 3e-4 --row_learning_rate null",
    "--layers 10 --method lora --per_device_train_batch_size 32 --activation_checkpointing true",
    "--layers 30 --method qlora --max_history 5",
]


def child(*flags: str) -> int:
    """Run the stage, and return its most memory in bytes."""
    process = subprocess.Popen([sys.executable, STAGE, *flags], stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"recipes/sft.py {' '.join(flags)} ended with status {status}")
    return used.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def compare(config: str, variant: str, steps: int) -> dict[str, Any]:
    """What is foretold of a variant, and what comes true."""
    words = ["--config", config, *variant.split()]
    stage, given = parse([SftStage, inherited("sft")], words)
    with TemporaryDirectory() as scratch:
        found, out = Path(scratch) / "trial.json", Path(scratch) / "out"
        child(*words, *BARE, "--trial", str(found), "--output_dir", str(Path(scratch) / "tried"))
        tried = Trial(**json.loads(found.read_text(encoding="utf-8")))
        passes = given["num_train_epochs"] * steps / tried.steps
        peak = child(*words, *BARE, "--num_train_epochs", f"{passes:.6f}", "--output_dir", str(out))
        log = json.loads((out / "train_metrics.json").read_text(encoding="utf-8"))
    args = SftArguments(**given | {"output_dir": "none", "report_to": "none"})
    terms = memory(shape_of(stage, args), load_of(stage, args, tried.longest), args.chosen)
    return {
        "variant": variant,
        "seconds_foretold": round(tried.seconds * tried.share * steps, 1),
        "seconds": round(log["train"]["train_runtime"], 1),
        "counted_gib": round(sum(terms.values()) / 2**30, 3),
        "peak_tried_gib": round(tried.peak / 2**30, 3),
        "peak_gib": round(peak / 2**30, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="recipes/configs/demo/sft.yaml")
    parser.add_argument("--variants", nargs="+", default=VARIANTS, help="further flags, each in quotes")
    parser.add_argument("--steps", type=int, default=60, help="that are really trained")
    parser.add_argument("--out", default="runs/bench/forecast.json")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for variant in options.variants:
        row = compare(options.config, variant, options.steps)
        first = rows[0] if rows else row
        row["seconds_foretold_to_real"] = round(row["seconds_foretold"] / row["seconds"], 3)
        row["counted_more_gib"] = round(row["counted_gib"] - first["counted_gib"], 3)
        row["measured_more_gib"] = round(row["peak_gib"] - first["peak_gib"], 3)
        rows.append(row)
        print(json.dumps(row), flush=True)
    Path(options.out).parent.mkdir(parents=True, exist_ok=True)
    machine = f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}"
    write_json(Path(options.out), {"machine": machine, "config": options.config, "rows": rows})


if __name__ == "__main__":
    main()
