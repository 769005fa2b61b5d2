"""What reinforcement learning adds to a model that learned from an exposure-biased log, on a world with known optimum.

python tests/benchmarks/srpo.py

Three of ten supervised targets of the log are promoted items instead of what the user chose, so a model that learned
it perfectly recommends promoted items; the rewards know what was chosen. From the same start (stopped on a held-out
part of the log itself): supervised training continued on the chosen targets, GRPO, SRPO, and SRPO with permuted
targets, each with the same prompts, updates and trials of the learning rate, selected on validation and scored on test
by the world's own probabilities instead of drawn targets. Writes `runs/bench/srpo.json`.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from datasets import Dataset as HfDataset
from scratch_base import make_scratch_base

from reasonrec.data_gen.readers.synthetic import SyntheticWorld, WorldConfig, make_synthetic
from reasonrec.data_gen.schema import Dataset, write_dataset
from reasonrec.data_gen.tasks.prompts import HISTORY
from reasonrec.data_gen.tasks.render import Examples
from reasonrec.data_gen.tasks.rl_prompts import PromptWindow, RlPrompts, prompt_block
from reasonrec.recipes.evaluation.intervals import seed_interval
from reasonrec.recipes.models.checkpoint import Setting
from reasonrec.recipes.policies.base import Policy, build_policy
from reasonrec.recipes.policies.loading import load_fresh
from reasonrec.recipes.policies.semantic_id import item_log_probs
from reasonrec.recipes.recommender import Recommender
from reasonrec.recipes.trainers.algorithms import build_algorithm
from reasonrec.recipes.trainers.grpo_arguments import GrpoArguments
from reasonrec.recipes.trainers.item_grpo import ItemGRPOTrainer, RolloutSettings
from reasonrec.recipes.trainers.item_sft import ItemSFTTrainer, SftArguments
from reasonrec.recipes.trainers.scoring import build_scorer
from reasonrec.rewards.registry import load_rewards
from reasonrec.tokenizers.artefact import staged, write_json
from reasonrec.tokenizers.index import ItemIndex, build_index

MAX_HISTORY = 12
ARMS = ("SFT continued", "GRPO", "SRPO", "SRPO, permuted targets")
RATES = {"SFT continued": (3e-4, 1e-3, 3e-3), "GRPO": (1e-4, 3e-4, 1e-3)}
AFTER = 20  # steps after which the share of rollouts with an advantage is counted


@dataclass(frozen=True)
class Size:
    """How much is done; the defaults are the benchmark, smaller ones try it out."""

    train_users: int = 24000  # with the 4,000 of the standard task this decoder over-fits before it knows the log
    held_out: int = 2000
    valid_rows: int = 1000
    epochs: int = 10
    updates: int = 60
    groups: int = 16
    generations: int = 8
    rounds: int = 2
    seeds: int = 5
    bias: float = 0.3  # share of the log's targets that are promoted items
    disliked: float = 0.0  # share of a persona's items that it rates badly


def make_data(folder: Path, size: Size) -> tuple[Dataset, ItemIndex, SyntheticWorld]:
    """The biased log, and the planted codes as its index."""
    config = WorldConfig(seed=0, disliked=size.disliked)
    with staged(folder / "dataset", kind="dataset", config={}) as (path, facts):
        facts.update(write_dataset(path, make_synthetic(config, size.train_users, size.held_out, size.bias)))
    dataset = Dataset.load(folder / "dataset")
    item = np.arange(dataset.n_items)
    codes = np.stack([item // 32, item % 32 // 4, item % 4], 1)
    with staged(folder / "index", kind="index", config={}, inputs={"dataset": dataset.manifest.hash}) as (path, _):
        build_index(codes, [16, 8, 4]).save(path)
    return dataset, ItemIndex.load(folder / "index"), SyntheticWorld.from_facts(dataset.facts)


def supervise(
    policy: Policy, model: Any, rows: list[tuple[Any, int]], *, rate: float, batch: int, seed: int, schedule: str
) -> Any:
    """Train on answers behind histories, in the order given."""
    layout = Examples(policy.prompts, [], [], [])
    examples = [layout.history(history, target, every_item=False) for history, target in rows]
    with tempfile.TemporaryDirectory() as folder:
        args = SftArguments(
            output_dir=folder, learning_rate=rate, per_device_train_batch_size=batch, num_train_epochs=1,
            weight_decay=0.0, lr_scheduler_type=schedule, warmup_steps=0, precision="fp32", seed=seed,
            activation_checkpointing=False, save_strategy="no", report_to="none", logging_steps=10**6,
            disable_tqdm=True,
        )  # fmt: skip
        trainer = ItemSFTTrainer(
            policy=policy,
            model=model,
            args=args,
            train_dataset=HfDataset.from_dict(
                {"input_ids": [i for i, _ in examples], "labels": [x for _, x in examples]}
            ),
            processing_class=policy.tokenizer,
        )
        trainer.train()
    return trainer.model


@dataclass(frozen=True)
class Branches:
    """Users of the biased log, each read once: the history, and every supervised target as a branch behind its prefix.

    The log cuts a user into prefixes with one target each. Read one by one, they repeat the history a dozen times; as
    branches of one sequence under an attention mask they cost a quarter and give the same loss.
    """

    ids: torch.Tensor  # (users, length)
    positions: torch.Tensor
    mask: torch.Tensor  # (users, length, length): what a token sees
    labels: torch.Tensor  # (users, length), -100 outside branches
    nodes: torch.Tensor  # (users, length): where a label's codes so far stand in the trie


def make_branches(policy: Policy, users: list[list[list[int]]]) -> Branches:
    """Lay out users, each a list of prefixes that end with their (perhaps promoted) target.

    All items have the same number of codes here.
    """
    prompts, trie, vocabulary = policy.prompts, policy.trie, policy.vocabulary
    head = prompts.direct([])[:-1]
    depth = trie.depth
    lengths = [len(head) + depth * (len(rows[-1]) - 1) for rows in users]
    length = max(n + depth * len(rows) for n, rows in zip(lengths, users, strict=True))
    ids = torch.full((len(users), length), vocabulary.begin_id)
    positions, branch, sees = torch.zeros_like(ids), torch.full_like(ids, -2), torch.zeros_like(ids)
    labels, nodes = torch.full_like(ids, -100), torch.zeros_like(ids)
    for u, (rows, n) in enumerate(zip(users, lengths, strict=True)):
        ids[u, :n] = torch.tensor(head + prompts.item_ids(rows[-1][:-1]))
        positions[u, :n], branch[u, :n], sees[u, :n] = torch.arange(n), -1, torch.arange(1, n + 1)
        for number, row in enumerate(rows):
            answer, seen = prompts.item_token_ids[row[-1]], len(head) + depth * (len(row) - 1)
            here = slice(n + depth * number, n + depth * (number + 1))
            ids[u, here] = torch.tensor([vocabulary.begin_id, *answer[:-1]])
            positions[u, here], branch[u, here], sees[u, here] = torch.arange(seen, seen + depth), number, seen
            labels[u, here] = torch.tensor(answer)
    for level in range(1, depth):  # a branch's tokens behind its begin marker lead from node to node
        inner = torch.zeros_like(labels, dtype=torch.bool)
        inner[:, level:] = (branch[:, level:] >= 0) & (branch[:, level:] == branch[:, :-level])
        follows = torch.where(inner, torch.roll(nodes, 1, 1), 0)
        nodes = torch.where(inner, trie.child(follows, ids - vocabulary.first_id), nodes)
    place = torch.arange(length)
    causal = place[:, None] >= place
    mask = (branch[:, None] == -1) & (place < sees[:, :, None])
    mask = (
        mask | ((branch[:, :, None] == branch[:, None]) & (branch[:, None] >= 0) & causal) | torch.eye(length).bool()
    )
    return Branches(ids, positions, mask, labels, nodes)


def branch_losses(policy: Policy, model: Any, part: Branches) -> tuple[torch.Tensor, int]:
    """Summed negative log-probability of the targets, by the policy that recommends, and their number."""
    hidden = model.base_model(
        input_ids=part.ids, attention_mask=part.mask[:, None], position_ids=part.positions, use_cache=False
    ).last_hidden_state
    where = part.labels != -100
    gain, _, _ = item_log_probs(
        model, policy.trie, policy.vocabulary, hidden[where], part.nodes[where], part.labels[where]
    )
    return -gain.sum(), int(where.sum()) // policy.trie.depth


def start_from_the_log(
    policy: Policy, dataset: Dataset, setting: Setting, size: Size, seed: int
) -> tuple[Any, dict[str, Any]]:
    """Learn the biased log; the epoch is kept that explains a held-out part of the log itself best."""
    torch.manual_seed(seed)
    model, _ = load_fresh(setting, policy)
    frame = dataset.train.with_columns(n=pl.col("items").list.len()).sort("user", "n")
    grouped = frame.group_by("user", maintain_order=True).agg("items", "first_target").select("items", "first_target")
    # A biased log holds each prefix of a user with its own target, the other one whole users.
    prefixes = [
        [items[: end + 1] for items, first in zip(*row, strict=True) for end in range(max(first, 1), len(items))]
        for row in grouped.iter_rows()
    ]
    users = [prefixes[i] for i in np.random.default_rng([seed, 7]).permutation(len(prefixes))]
    cut = len(users) // 20
    held = make_branches(policy, users[:cut])
    users = sorted(users[cut:], key=len)
    batches = [make_branches(policy, users[i : i + 64]) for i in range(0, len(users), 64)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    steps = size.epochs * len(batches)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 50) * 0.5 * (1 + np.cos(np.pi * step / steps))
    )
    losses, best = [], model
    for epoch in range(size.epochs):
        model.train()
        for number in np.random.default_rng([seed, 9, epoch]).permutation(len(batches)):
            loss, count = branch_losses(policy, model, batches[number])
            (loss / count).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        model.eval()
        with torch.no_grad():
            loss, count = branch_losses(policy, model, held)
        losses.append(float(loss) / count)
        if losses[-1] == min(losses):
            best = copy.deepcopy(model)
    return best, {"held_out_log_loss": [round(loss, 4) for loss in losses], "kept_epoch": int(np.argmin(losses)) + 1}


def score(
    policy: Policy, dataset: Dataset, setting: Setting, model: Any, world: SyntheticWorld, split: str, rows: int
) -> tuple[float, float]:
    """HR@10 and NDCG@10 under the world's own probabilities."""
    histories = dataset.rows(split)["history"].to_list()[:rows]  # type: ignore[arg-type]
    ranking, _ = Recommender(policy, model, setting).rank(histories, k=10, num_beams=20, batch_size=250)
    return world.expected_metrics(ranking, histories)


def reinforce(
    policy: Policy, dataset: Dataset, start: Any, prompts: RlPrompts, size: Size, arm: str, rate: float, seed: int
) -> tuple[Any, list[dict[str, float]]]:
    """One run of GRPO or SRPO from a copy of the start; returns the model and the log."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        args = GrpoArguments(
            output_dir=folder, learning_rate=rate, per_device_train_batch_size=size.groups * size.generations,
            num_generations=size.generations, max_steps=size.updates, beta=0.0, weight_decay=0.0,
            lr_scheduler_type="constant", precision="fp32", activation_checkpointing=False, save_strategy="no",
            report_to="none", disable_tqdm=True, seed=seed,
        )  # fmt: skip
        trainer = ItemGRPOTrainer(
            prompts=prompts,
            scorer=build_scorer(load_rewards({"rsvr": 1.0}), policy, dataset, reasoning=False),
            algorithm=build_algorithm("grpo" if arm == "GRPO" else "srpo", {}, size.generations),
            settings=RolloutSettings(rounds=size.rounds),
            model=copy.deepcopy(start),
            args=args,
            processing_class=policy.tokenizer,
        )
        trainer.log = lambda logs, start_time=None: keep_means(
            trainer, logs
        )  # one line per step would fill the screen
        trainer.train()
    return trainer.model, [entry for entry in trainer.state.log_history if "rollouts/groups" in entry]


def keep_means(trainer: Any, logs: dict[str, float]) -> None:
    means = {name: float(np.mean(values)) for name, values in trainer._metrics["train"].items()}
    trainer._metrics["train"].clear()
    trainer.state.log_history.append({**logs, **means, "step": trainer.state.global_step})


def run_arm(
    policy: Policy, dataset: Dataset, start: Any, prompts: RlPrompts, size: Size, arm: str, rate: float, seed: int
) -> tuple[Any, list[dict[str, float]]]:
    """Train one arm."""
    if arm == "SFT continued":
        block = size.groups * size.rounds
        numbers = np.concatenate([prompt_block(len(prompts), block, i, seed) for i in range(size.updates)])
        rows = [(prompts.history(i), int(prompts.target[i])) for i in numbers]
        model = copy.deepcopy(start)
        return supervise(policy, model, rows, rate=rate, batch=block, seed=seed, schedule="constant"), []
    if arm == "SRPO, permuted targets":
        shuffled = np.random.default_rng([seed, 8]).permutation(prompts.target)
        prompts = replace(prompts, target=shuffled)
    return reinforce(policy, dataset, start, prompts, size, arm, rate, seed)


def shares(log: list[dict[str, float]]) -> dict[str, float]:
    """Shares of rollouts with an advantage after the first steps, and what they cost."""
    late = [entry for entry in log if entry["step"] > AFTER] or log
    names = (
        "nonzero_advantage", "nonzero_advantage_permuted", "trained_nonzero_advantage", "zero_variance",
        "zero_variance_permuted", "tokens_with_gradient", "exact_hit",
    )  # fmt: skip
    return {name: float(np.mean([entry[f"rollouts/{name}"] for entry in late])) for name in names}


def run(name: str, about: str | None, compare: Callable[..., dict[str, Any]], printed: tuple[str, ...]) -> None:
    """Parse the size, make world and policy, compare, and write `runs/bench/<name>.json`."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default=f"runs/bench/{name}.json")
    for key, value in vars(Size()).items():
        parser.add_argument(f"--{key}", type=type(value), default=value)
    options = vars(parser.parse_args())
    out = Path(options.pop("out"))
    size, began = Size(**options), time.perf_counter()
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        dataset, index, world = make_data(Path(scratch), size)
        base = make_scratch_base(
            Path(scratch) / "base", dataset.items["title"].to_list(), hidden=64, layers=2, heads=4, seed=0
        )
        setting = Setting(str(base), "full", HISTORY, False, None, MAX_HISTORY, True)
        policy = build_policy(dataset.catalogue(index), setting)
        result = compare(policy, dataset, setting, world, size)
    result["seconds"] = round(time.perf_counter() - began)
    write_json(out, result)
    print(json.dumps({key: result[key] for key in (*printed, "seconds")}, indent=1))


def compare(policy: Policy, dataset: Dataset, setting: Setting, world: SyntheticWorld, size: Size) -> dict[str, Any]:
    """All arms on all seeds."""
    histories = dataset.test["history"].to_list()
    prompts = RlPrompts.from_train(dataset.train, PromptWindow(max_history=MAX_HISTORY), policy.prompts.direct)
    rates = {arm: RATES.get(arm, RATES["GRPO"]) for arm in ARMS}
    trials: dict[str, dict[float, float]] = {arm: {} for arm in ARMS}
    test: dict[str, list[tuple[float, float]]] = {name: [] for name in ("start", *ARMS)}
    late: dict[str, list[dict[str, float]]] = {arm: [] for arm in ARMS[1:]}
    starts = []
    for seed in range(size.seeds):
        start, about = start_from_the_log(policy, dataset, setting, size, seed)
        starts.append(about)
        test["start"].append(score(policy, dataset, setting, start, world, "test", size.held_out))
        print(f"seed {seed}: start {test['start'][-1]}, log loss {about['held_out_log_loss']}", flush=True)
        for arm in ARMS:
            candidates = rates[arm] if seed == 0 else (max(trials[arm], key=lambda rate: trials[arm][rate]),)
            found: dict[float, tuple[Any, list[dict[str, float]]]] = {}
            for rate in candidates:
                clock = time.perf_counter()
                found[rate] = run_arm(policy, dataset, start, prompts, size, arm, rate, seed)
                if seed == 0:
                    trials[arm][rate] = score(
                        policy, dataset, setting, found[rate][0], world, "valid", size.valid_rows
                    )[0]
                    seconds = time.perf_counter() - clock
                    print(
                        f"  {arm}, rate {rate}: validation HR@10 {trials[arm][rate]:.4f}, {seconds:.0f} s", flush=True
                    )
            model, log = found[max(found, key=lambda rate: trials[arm][rate])]
            test[arm].append(score(policy, dataset, setting, model, world, "test", size.held_out))
            if log:
                late[arm].append(shares(log))
            print(f"  {arm}: test HR@10, NDCG@10 {test[arm][-1]}", flush=True)
    return summary(test, trials, late, starts, world, histories, size)


def summary(
    test: dict[str, list[tuple[float, float]]],
    trials: dict[str, dict[float, float]],
    late: dict[str, list[dict[str, float]]],
    starts: list[dict[str, Any]],
    world: SyntheticWorld,
    histories: list[list[int]],
    size: Size,
) -> dict[str, Any]:
    """Differences with t-intervals over the seeds, and what must hold."""
    pairs = [(arm, "start") for arm in ARMS] + [("SRPO", "GRPO"), ("SRPO", "SFT continued")]
    paired = []
    for a, b in pairs:
        for metric, place in (("hr@10", 0), ("ndcg@10", 1)):
            differences = [x[place] - y[place] for x, y in zip(test[a], test[b], strict=True)]
            entry: dict[str, Any] = {"a": a, "b": b, "metric": metric, "by_seed": [round(d, 5) for d in differences]}
            if len(differences) > 1:
                interval = seed_interval(differences)
                entry |= {
                    "mean": round(interval.mean, 5),
                    "ci95": [round(v, 5) for v in (interval.low, interval.high)],
                }
            paired.append(entry)
    of = {(entry["a"], entry["b"], entry["metric"]): entry for entry in paired}
    gain, chance = of["SRPO", "start", "hr@10"], of["SRPO, permuted targets", "start", "hr@10"]
    share = {arm: {n: float(np.mean([s[n] for s in found])) for n in found[0]} for arm, found in late.items() if found}
    srpo = share["SRPO"]
    holds = {
        "srpo_above_start_in_every_seed": min(gain["by_seed"]) > 0,
        "srpo_above_start_by_the_interval": gain.get("ci95", [np.nan])[0] > 0,
        "permuted_not_above_start": not chance.get("ci95", [np.nan])[0] > 0,
        "share_with_advantage_at_least_60%": srpo["nonzero_advantage"] >= 0.6,
        "share_at_least_3_times_that_of_permuted": srpo["nonzero_advantage"] >= 3 * srpo["nonzero_advantage_permuted"],
    }
    return {
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
        "model": "Llama, 2 layers of 64, from scratch",
        "size": vars(size),
        "optimum": {
            "of the log": world.optimum(histories, exposure_bias=size.bias),
            "of the world": world.optimum(histories),
        },
        "learning_rates": trials,
        "starts": starts,
        "test": {name: {"hr@10": [s[0] for s in v], "ndcg@10": [s[1] for s in v]} for name, v in test.items()},
        "paired": paired,
        "shares": share,
        "holds": {name: bool(value) for name, value in holds.items()},
    }


if __name__ == "__main__":
    run("srpo", __doc__, compare, ("test", "paired", "shares", "holds"))
