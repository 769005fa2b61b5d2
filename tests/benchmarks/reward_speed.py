"""How long rewards take: 10⁴ completions of six tokens in direct mode, and of 200 tokens in reasoning mode.

python tests/benchmarks/reward_speed.py

Rewards that compare items have to stay below 100 ms on the first, the others below 2 s on the second; parsing, which
happens once for all rewards, is a row of its own. Prints a table and writes `runs/bench/rewards.json`.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from reasonrec.rewards.collaborative import CoVisits
from reasonrec.rewards.parse import Parser
from reasonrec.rewards.registry import load_reward, names
from reasonrec.tokenizers.artefact import write_json
from reasonrec.tokenizers.index import ItemIndex, build_index
from reasonrec.tokenizers.vocabulary import Vocabulary

ITEMS, LEVELS, SIZE = 20_000, 4, 32
BEGIN, END, CHAIN_VOCABULARY = 50_000, 2, 49_000
BY_ITEM = {"exact", "prefix", "rsvr", "rank", "collaborative", "likelihood", "probability"}
LIMITS = {"six ids": 0.1, "200 ids": 2.0}


def completions(index: ItemIndex, vocabulary: Vocabulary, length: int, count: int, rng: Any) -> list[list[int]]:
    """Chains of random tokens, a random item and the end token: `length` tokens, or more where the item needs them."""
    items = vocabulary.item_token_ids(index.codes[rng.integers(0, index.n_items, count)])
    chains = rng.integers(10, CHAIN_VOCABULARY, size=(count, length)).tolist()
    return [
        [*chain[: max(length - 2 - len(ids), 0)], BEGIN, *ids, END] for chain, ids in zip(chains, items, strict=True)
    ]


def seconds(call: Callable[[], Any], repeats: int) -> float:
    """The median of some runs."""
    taken = []
    for _ in range(repeats):
        began = time.perf_counter()
        call()
        taken.append(time.perf_counter() - began)
    return float(np.median(taken))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", default="runs/bench/rewards.json")
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    index = build_index(rng.integers(0, SIZE, size=(ITEMS, LEVELS)), [SIZE] * LEVELS)
    vocabulary = Vocabulary(index.level_sizes, BEGIN)
    tuples = index.tuples()
    similarity = CoVisits(rng.integers(0, ITEMS, 200_000), np.repeat(np.arange(20_000), 10), ITEMS)
    targets = rng.integers(0, ITEMS, options.rows)

    rows = []
    for name, length, reasoning in (("six ids", 6, False), ("200 ids", 200, True)):
        ids = completions(index, vocabulary, length, options.rows, rng)
        reader = Parser(vocabulary, index, reasoning=reasoning, end_ids=(END,))
        taken = seconds(lambda reader=reader, ids=ids: reader(ids), options.repeats)  # type: ignore[misc]
        rows.append({"what": "parsing", "completions": name, "seconds": taken, "limit": LIMITS[name]})
        parsed = reader(ids)
        assert None not in parsed.predicted_codes
        batch = {
            "prompts": [""] * options.rows,
            "completions": [""] * options.rows,
            "completion_ids": ids,
            **parsed.columns(),
            "target_codes": [tuples[item] for item in targets],
            "target_items": targets.tolist(),
            "history_items": [[]] * options.rows,
            "depth": LEVELS,
            "reasoning": reasoning,
            "beam_items": rng.integers(0, ITEMS, size=(options.rows, 20)).tolist(),
            "target_log_prob": (-rng.exponential(5, options.rows)).tolist(),
            "similarity": similarity,
            "train_counts": np.ones(ITEMS),
        }
        for reward in map(load_reward, names()):
            if reasoning or reward.name in BY_ITEM:
                taken = seconds(lambda reward=reward, batch=batch: reward(**batch), options.repeats)  # type: ignore[misc]
                rows.append({"what": reward.name, "completions": name, "seconds": taken, "limit": LIMITS[name]})
    print(f"{options.rows} completions, {ITEMS} items, {LEVELS} levels")
    for row in rows:
        print(f"{row['completions']:<8} {row['what']:<14} {row['seconds'] * 1000:8.1f} ms (limit {row['limit']:g} s)")
    Path(options.out).parent.mkdir(parents=True, exist_ok=True)
    facts = {"rows": options.rows, "items": ITEMS, "levels": LEVELS, "repeats": options.repeats}
    write_json(Path(options.out), {"facts": {**facts, "machine": platform.machine()}, "rows": rows})


if __name__ == "__main__":
    main()
