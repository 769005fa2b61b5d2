"""REG4Rec's parts one at a time, and its parallel codes beside semantic IDs: trained and ranked alike, in one table.

python tests/benchmarks/reg4rec.py

MovieLens-100K, the stages and configurations of `recipes/configs/reg4rec`, of which each arm changes what its name
says. *Nats*: negative log-likelihood of a test user's movie in the whole catalogue, no temperature, all test users.
HR@10 and NDCG@10: a beam search without what was watched, `--users` seeded test users. Differences are paired over
users with 95% bootstrap intervals; of several seeds, of the users' means over seeds, with a t-interval over seeds
beside it. Nothing is selected by the test.

Supervised, with seed 0 unless it says more:

- *parallel codes*, three seeds: 4 × 64 codes of MPQ, trained in orders drawn for each item, ranked by CRSS;
- the same checkpoint ranked in the order of the codebooks; and the same codes trained in that order too, which is
  `policy: semantic_id` on them;
- RQ-VAE and balanced residual k-means in place of MPQ: as many bits, as many tokens an item;
- *semantic IDs*, three seeds: balanced 64 × 64 and a third code where two movies share both, of the same vectors;
  once with as many interactions, and once with as many tokens (shorter items are shown more often then).

Reinforced, from the first of them, `grpo.yaml`: PARS with the next three targets (MSRA), with the next one alone, and
with exact hits alone in place of PARS; the weights of the last step. The first ranked with and without CORP as well.

Arms whose files stand in `--work` are neither trained nor ranked again: an interrupted benchmark goes on, and
`--arms` of several processes share it. `--tiny` tries everything on a model without pre-training. Writes
`runs/bench/reg4rec.json`.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl
import torch
import yaml
from numpy.typing import NDArray
from scratch_base import make_scratch_base
from stages import CONFIGS, run_stage

from reasonrec.data_gen.histories import UserHistory
from reasonrec.data_gen.schema import Dataset
from reasonrec.recipes.decoding.consistency import Consistency
from reasonrec.recipes.evaluation.intervals import mean_interval, seed_interval
from reasonrec.recipes.models.checkpoint import trained_tokens
from reasonrec.recipes.policies.parallel_codes.answers import SetAnswers
from reasonrec.recipes.rankers.base import Ranker
from reasonrec.recipes.rankers.consistent import ConsistentRanker
from reasonrec.recipes.rankers.model import ModelRanker
from reasonrec.recipes.recommender import Recommender
from reasonrec.rewards.metrics import per_row
from reasonrec.tokenizers.artefact import write_json

K, SEEDS, THETA = 10, 3, 0.06
INDEXES: dict[str, dict[str, Any]] = {
    "mpq": {},
    "rq_vae": {"quantizer": "rq_vae"},
    "balanced": {"quantizer": "balanced"},
    "ids": {"quantizer": "balanced", "codebook_sizes": "[64, 64]", "unique": "disambiguate"},
}
AHEAD = {"horizon": 3, "decay": 0.8}
SEMANTIC = {"policy": "semantic_id", "policy_options": "{}"}
SUPERVISED: dict[str, tuple[str, dict[str, Any]]] = {  # the index and the flags of each kind of arm
    "parallel": ("mpq", {}),
    "in_order": ("mpq", SEMANTIC),
    "rq_vae": ("rq_vae", {}),
    "balanced": ("balanced", {}),
    "ids": ("ids", SEMANTIC),
    "ids_tokens": ("ids", SEMANTIC),
}
FIRST = "parallel0"


@dataclass(frozen=True)
class Row:
    """A row of the table.

    Attributes:
        name: Its name.
        models: Checkpoints, one for each seed.
        against: Row that it is paired with.
        way: How it is ranked: "" as its policy says, "in_order" of the codebooks, "checked" by CORP.
    """

    name: str
    models: tuple[str, ...]
    against: str | None = None
    way: Literal["", "in_order", "checked"] = ""


def rewards_of(arm: str) -> dict[str, Any]:
    """Those of `grpo.yaml`, or what an arm has in their place."""
    if arm == "grpo_exact":
        return {"exact": {"weight": 1.0, **AHEAD}}
    shipped: dict[str, Any] = yaml.safe_load((CONFIGS / "reg4rec" / "grpo.yaml").read_text(encoding="utf-8"))[
        "rewards"
    ]
    if arm == "grpo":
        return shipped
    return {
        name: {key: value for key, value in given.items() if key not in AHEAD} if isinstance(given, dict) else given
        for name, given in shipped.items()
    }


def seeds_of(arm: str) -> tuple[str, ...]:
    return tuple(f"{arm}{seed}" for seed in range(SEEDS))


ONE = "parallel codes (MPQ, CRSS)"
FULL = "GRPO with PARS and MSRA"
ROWS = [
    Row(ONE, (FIRST,)),
    Row("ranked in the order of the codebooks", (FIRST,), ONE, "in_order"),
    Row("trained and ranked in that order", ("in_order0",), ONE),
    Row("RQ-VAE in place of MPQ", ("rq_vae0",), ONE),
    Row("balanced k-means in place of MPQ", ("balanced0",), ONE),
    Row(FULL, ("grpo",), ONE),
    Row("one target ahead, without MSRA", ("grpo_one_ahead",), FULL),
    Row("exact hits in place of PARS", ("grpo_exact",), FULL),
    Row("PARS and MSRA, with CORP", ("grpo",), FULL, "checked"),
    Row("parallel codes, 3 seeds", seeds_of("parallel")),
    Row("semantic IDs, as many interactions", seeds_of("ids"), "parallel codes, 3 seeds"),
    Row("semantic IDs, as many tokens", seeds_of("ids_tokens"), "parallel codes, 3 seeds"),
]
ARMS = tuple(dict.fromkeys(model for row in ROWS for model in row.models))


@dataclass(frozen=True)
class Bench:
    """Where the stages write, and what all supervised arms are told.

    Attributes:
        work: Folder of all artefacts.
        passes: Over the interactions, of every arm but those with as many tokens.
        steps: Of GRPO.
        flags: Flags of every supervised arm.
    """

    work: Path
    passes: float
    steps: int
    flags: dict[str, Any]

    def prepare(self) -> None:
        """The dataset and all indexes."""
        self.stage("prepare", "prepare", "dataset")
        for name, options in INDEXES.items():
            self.stage("index_items", "index", f"index_{name}", dataset=self.work / "dataset", **options)

    def stage(self, script: str, config: str, out: str, **options: Any) -> None:
        """Run a stage, unless what it writes is there."""
        run_stage(script, f"reg4rec/{config}", self.work / out, **options)

    def train(self, arm: str) -> None:
        """Train an arm, and first what it goes on from."""
        if arm.startswith("grpo"):
            self.train(FIRST)
            self.stage(
                "grpo", "grpo", arm, model=self.work / FIRST, rewards=json.dumps(rewards_of(arm)),
                max_steps=self.steps, keep="last", valid_rows=0,
            )  # fmt: skip
            return
        kind, seed, passes = arm[:-1], int(arm[-1]), self.passes
        index, options = SUPERVISED[kind]
        if kind == "ids_tokens":
            self.train(FIRST)
            self.train("ids0")
            passes *= trained_tokens(self.work / FIRST) / trained_tokens(self.work / "ids0")
        self.stage(
            "sft", "sft", arm, dataset=self.work / "dataset", index=self.work / f"index_{index}", seed=seed,
            num_train_epochs=round(passes, 4), **options, **self.flags,
        )  # fmt: skip

    def cases(self, users: int) -> tuple[pl.DataFrame, pl.DataFrame]:
        """All test cases, and those whose lists are searched."""
        test = Dataset.load(self.work / "dataset").rows("test")
        return test, test.sample(min(users, test.height), seed=0).sort("row")

    def kept(self, arm: str, row: Row) -> Path:
        """Where what was measured of a checkpoint is kept."""
        return self.work / f"measured_{'_'.join(filter(None, (arm, row.way)))}.json"

    def measure(self, arm: str, row: Row, users: int) -> dict[str, Any]:
        """What a checkpoint finds, and how likely it finds it; kept in a file."""
        kept = self.kept(arm, row)
        if kept.exists():
            found: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8"))
            return found
        test, some = self.cases(users)
        recommender = Recommender.from_pretrained(self.work / arm)
        if row.way == "in_order":
            assert isinstance(recommender.policy.answers, SetAnswers)
            recommender.policy.answers.law = "ordered"
        plain = ModelRanker(recommender, row.name, num_beams=20, exact=False, batch_size=64)
        ranker: Ranker = ConsistentRanker(plain, Consistency(theta=THETA)) if row.way == "checked" else plain
        began = time.perf_counter()
        hits = per_row(ranker.rank(some, K), some["target"].to_numpy(), (K,))
        seconds = (time.perf_counter() - began) / some.height
        targets = test["target"].to_numpy()[:, None]
        scores = recommender.score(UserHistory.of_rows(test), targets, batch_size=64, pooled=False)
        found = {
            "nats": (-scores[:, 0].astype(float)).tolist(),
            **{name: np.asarray(values, dtype=float).tolist() for name, values in hits.items()},
            "seconds a user": round(seconds, 3),
            "tokens": trained_tokens(self.work / arm),
            "note": ranker.note if isinstance(ranker, ConsistentRanker) else "",
        }
        write_json(kept, found)
        return found


def table(bench: Bench, users: int, seed: int) -> list[dict[str, Any]]:
    """All rows that were measured, and their differences."""
    test, some = bench.cases(users)
    owner = {"nats": test["user"].to_numpy()} | dict.fromkeys((f"hr@{K}", f"ndcg@{K}"), some["user"].to_numpy())
    values: dict[str, dict[str, NDArray[np.float64]]] = {}
    rows = []
    for row in ROWS:
        if not all(bench.kept(arm, row).exists() for arm in row.models):
            continue
        each = [bench.measure(arm, row, users) for arm in row.models]
        values[row.name] = {metric: np.array([found[metric] for found in each]) for metric in owner}
        told: dict[str, Any] = {"name": row.name, "seeds": len(each)}
        told |= {key: [found[key] for found in each] for key in ("tokens", "seconds a user", "note")}
        for metric, own in values[row.name].items():
            told[metric] = interval(owner[metric], own, seed)
            if row.against in values:
                told[f"{metric} − {row.against}"] = interval(owner[metric], own - values[row.against][metric], seed)
        rows.append(told)
    return rows


def interval(users: NDArray[np.int64], values: NDArray[np.float64], seed: int) -> dict[str, Any]:
    """Mean of values (seeds, cases), over users of their means over seeds, and over seeds."""
    low, high = mean_interval(users, values.mean(0), seed=seed)
    found: dict[str, Any] = {"mean": round(float(values.mean()), 4), "ci95": [round(low, 4), round(high, 4)]}
    if len(values) > 1:
        over = seed_interval(values.mean(1))
        found["over seeds"] = [round(over.low, 4), round(over.high, 4)]
    return found


def show(rows: Sequence[dict[str, Any]]) -> None:
    """Print the table."""
    for row in rows:
        print(f"{row['name']}  ({row['seeds']} seed, {row['tokens']} tokens, {row['seconds a user']} s a user)")
        for name, value in row.items():
            if isinstance(value, dict):
                sign = "+" if " − " in name else ""
                low, high = value["ci95"]
                over = f", over seeds {value['over seeds']}" if "over seeds" in value else ""
                print(f"    {name}: {value['mean']:{sign}.4f} [{low:{sign}.4f}, {high:{sign}.4f}]{over}")
        for note in filter(None, row["note"]):
            print(f"    {note}")


def main() -> None:
    """Train, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--passes", type=float, default=0.66, help="over the interactions; sft.yaml has 0.66")
    parser.add_argument("--steps", type=int, default=40, help="of GRPO; grpo.yaml has 20")
    parser.add_argument("--users", type=int, default=300, help="test users whose lists are searched")
    parser.add_argument("--arms", nargs="*", choices=ARMS, default=list(ARMS), help="what to train and rank")
    parser.add_argument("--tiny", action="store_true", help="a small model without pre-training, a few steps")
    parser.add_argument("--work", type=Path, help="folder of the artefacts; runs/bench/reg4rec, or …_tiny")
    parser.add_argument("--out", type=Path, default=Path("runs/bench/reg4rec.json"))
    options = parser.parse_args()
    work = (options.work or Path(f"runs/bench/reg4rec{'_tiny' if options.tiny else ''}")).absolute()
    work.mkdir(parents=True, exist_ok=True)
    bench = Bench(work, options.passes, options.steps, {})
    bench.prepare()
    if options.tiny:
        titles = Dataset.load(work / "dataset").items["title"].to_list()
        base = make_scratch_base(work / "base", titles, hidden=32, layers=2, heads=2, seed=0)
        bench = Bench(work, min(options.passes, 0.02), min(options.steps, 2), {"model": base, "layers": 2})
    for arm in options.arms:
        bench.train(arm)
        for row in ROWS:
            if arm in row.models:
                bench.measure(arm, row, options.users)
    rows = table(bench, options.users, seed=0)
    show(rows)
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    write_json(options.out, {"machine": machine, "passes": options.passes, "steps": options.steps, "rows": rows})


if __name__ == "__main__":
    main()
