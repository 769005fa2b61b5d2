"""Whole histories against one example per prefix: what a training token buys.

python tests/benchmarks/whole_history.py

Both ways of training see the same interactions of the Industrial split with the same small decoder. Each gets its own
learning rate, chosen on validation among the same ones at equal processed tokens; then both are measured on test at
equal processed tokens (padding counts) and at equal wall time. Writes `runs/bench/whole_history.json`.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset as HfDataset
from scratch_base import make_scratch_base

from reasonrec.data_gen.schema import Dataset
from reasonrec.data_gen.tasks.mixture import PlanConfig, make_plan
from reasonrec.data_gen.tasks.prompts import HISTORY
from reasonrec.data_gen.tasks.render import Examples, Material
from reasonrec.recipes.evaluation.compare import Row, evaluate_rows
from reasonrec.recipes.models.checkpoint import Setting
from reasonrec.recipes.policies.base import Policy, build_policy
from reasonrec.recipes.policies.loading import load_fresh
from reasonrec.recipes.recommender import Recommender
from reasonrec.recipes.trainers.item_sft import ItemSFTTrainer, SftArguments
from reasonrec.tokenizers.artefact import write_json
from reasonrec.tokenizers.index import ItemIndex

RATES = (3e-4, 1e-3, 3e-3)
BATCH = 64
MAX_HISTORY = 10  # what the published split shows a model


@dataclass(frozen=True)
class Run:
    """One training run."""

    one_per_prefix: bool
    learning_rate: float
    passes: float
    seed: int = 0


def policy_for(
    dataset: Dataset, index: ItemIndex, base: Path, *, one_per_prefix: bool
) -> tuple[Policy, Examples, Setting]:
    """Items, tokenizer and examples for one way of training."""
    setting = Setting(str(base), "full", HISTORY, False, None, MAX_HISTORY, one_per_prefix)
    policy = build_policy(dataset.catalogue(index), setting)
    return policy, policy.examples(dataset.train, one_per_prefix=one_per_prefix), setting


def plan_for(examples: Examples, run: Run) -> Any:
    """The run's training examples."""
    config = PlanConfig({"seqrec": 1.0}, MAX_HISTORY, run.one_per_prefix, run.passes, BATCH, run.seed)
    lengths = np.array([len(ids) for ids in examples.prompts.item_token_ids])
    return make_plan(config, Material(examples.sequences, lengths))


def processed_tokens(examples: Examples, run: Run) -> tuple[int, int, int]:
    """Tokens a run reads without and with padding, and the items it is supervised on."""
    plan = plan_for(examples, run)
    rendered = examples(plan.to_dict(as_series=False))
    lengths = np.array([len(ids) for ids in rendered["input_ids"]])
    padded = sum(len(b) * int(b.max()) for b in np.split(lengths, range(BATCH, len(lengths), BATCH)))
    supervised = plan.height if run.one_per_prefix else int((plan["stop"] - plan["start"]).sum())
    return int(lengths.sum()), padded, supervised


def train(policy: Policy, examples: Examples, setting: Setting, run: Run) -> tuple[Recommender, float]:
    """Train and time one run."""
    torch.manual_seed(run.seed)
    model, _ = load_fresh(setting, policy)
    with tempfile.TemporaryDirectory() as folder:
        args = SftArguments(
            output_dir=folder,
            learning_rate=run.learning_rate,
            per_device_train_batch_size=BATCH,
            num_train_epochs=1,
            weight_decay=0.01,
            precision="fp32",
            activation_checkpointing=False,
            save_strategy="no",
            report_to="none",
            logging_steps=1000,
            disable_tqdm=True,
            seed=run.seed,
        )
        trainer = ItemSFTTrainer(
            policy=policy,
            model=model,
            args=args,
            train_dataset=HfDataset(plan_for(examples, run).to_arrow()).with_transform(examples),
            processing_class=policy.tokenizer,
        )
        began = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - began
    return Recommender(policy, trainer.model, setting), seconds


def rank(recommender: Recommender, dataset: Dataset, split: str, num_beams: int = 20) -> np.ndarray:
    """Rankings of a held-out split."""
    rows = dataset.rows(split)  # type: ignore[arg-type]
    return recommender.rank(rows["history"].to_list(), k=20, num_beams=num_beams, batch_size=128)[0]


def hit_rate(ranking: np.ndarray, dataset: Dataset, split: str) -> float:
    """HR@10."""
    target = dataset.rows(split)["target"].to_numpy()  # type: ignore[arg-type]
    return float((ranking[:, :10] == target[:, None]).any(1).mean())


def main() -> None:
    """Tune, train, compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dataset", default="runs/industrial/dataset")
    parser.add_argument("--index", default="runs/industrial/index")
    parser.add_argument("--passes", type=float, default=1.5, help="passes of whole-history training")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", default="runs/bench/whole_history.json")
    options = parser.parse_args()
    if not Path(options.dataset).is_dir() or not Path(options.index).is_dir():
        print(f"skipped: {options.dataset}, {options.index} are missing (recipes/prepare.py, recipes/index_items.py)")
        return
    dataset, index = Dataset.load(options.dataset), ItemIndex.load(options.index)
    out = Path(options.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    base = make_scratch_base(out.parent / "scratch_base", dataset.items["title"].to_list())
    policys = {flag: policy_for(dataset, index, base, one_per_prefix=flag) for flag in (False, True)}

    tokens = {flag: processed_tokens(policys[flag][1], Run(flag, 0.0, 1.0)) for flag in policys}
    per_item = {flag: padded / supervised for flag, (_, padded, supervised) in tokens.items()}
    # Prefix training gets as many passes as the same number of processed tokens allows.
    passes = {False: options.passes, True: options.passes * tokens[False][1] / tokens[True][1]}
    names = {False: "whole histories", True: "one example per prefix"}
    machine = platform.processor() or platform.machine()
    result: dict[str, Any] = {
        "machine": f"{machine}, {torch.get_num_threads()} threads, torch {torch.__version__}",
        "model": "Llama, 4 layers of 192, from scratch",
        "tokens_per_supervised_item": {names[f]: round(per_item[f], 2) for f in names},
        "ratio": round(per_item[True] / per_item[False], 2),
        "learning_rates": {},
        "seconds": {},
        "rows": [],
    }
    print(json.dumps({k: result[k] for k in ("machine", "tokens_per_supervised_item", "ratio")}, indent=1), flush=True)

    chosen: dict[bool, Run] = {}
    for flag, made in policys.items():
        trials = {}
        for rate in RATES:
            recommender, seconds = train(*made, Run(flag, rate, passes[flag]))
            trials[rate] = hit_rate(rank(recommender, dataset, "valid"), dataset, "valid")
            result["seconds"][names[flag]] = round(seconds, 1)
            about = f"{names[flag]}, learning rate {rate}"
            print(f"{about}: validation HR@10 {trials[rate]:.4f}, {seconds:.0f} s", flush=True)
        best = max(trials, key=lambda rate: trials[rate])
        result["learning_rates"][names[flag]] = {"validation_hr@10": trials, "chosen": best}
        chosen[flag] = Run(flag, best, passes[flag])

    seconds_whole, seconds_prefix = (result["seconds"][names[f]] for f in (False, True))
    equal_time = replace(chosen[True], passes=passes[True] * seconds_whole / seconds_prefix)
    runs = {
        names[False]: chosen[False],
        f"{names[True]}, equal tokens": chosen[True],
        f"{names[True]}, equal wall time": equal_time,
    }
    rankings: dict[str, list[np.ndarray]] = {name: [] for name in runs}
    for name, run in runs.items():
        for seed in range(options.seeds):
            recommender, seconds = train(*policys[run.one_per_prefix], replace(run, seed=seed))
            rankings[name].append(rank(recommender, dataset, "test"))
            hr = hit_rate(rankings[name][-1], dataset, "test")
            result["rows"].append({"name": name, "seed": seed, "hr@10": hr, "seconds": round(seconds, 1)})
            print(f"{name}, seed {seed}: test HR@10 {hr:.4f}, {seconds:.0f} s", flush=True)
    table = [Row(f"{name}, seed {s}", "direct", r) for name, runs_ in rankings.items() for s, r in enumerate(runs_)]
    whole = names[False]
    claims = [
        (f"{whole}, seed {s}", f"{name}, seed {s}") for name in rankings if name != whole for s in range(options.seeds)
    ]
    metrics = evaluate_rows(dataset, "test", table, claims=claims)
    result["paired"] = [pair for pair in metrics["paired"] if pair["metric"] == "hr@10"]
    write_json(out, result)
    for pair in result["paired"]:
        low, high = pair["ci95"]
        print(f"{pair['a']} − {pair['b']}: HR@10 {pair['difference']:+.4f} [{low:+.4f}, {high:+.4f}]")
    print(f"processed tokens per supervised item: {result['tokens_per_supervised_item']}, {result['ratio']} times")


if __name__ == "__main__":
    main()
