"""Rewards that no label says: ratings. What reaches lists that are rated higher, on a world with a known optimum.

python tests/benchmarks/rated.py

The log and the start are those of `srpo.py`: three of ten supervised targets are promoted items. Each choice comes
with the rating that its user gave it, drawn apart from how often things are chosen. A list of ten is worth the rating
that is to be expected of the next choice, 0 if it does not hold it (`SyntheticWorld.expected_value`, exact). From one
start, with equal prompts and updates, and learning rates chosen on validation by that worth:

- supervised training continued on the choices, which does not look at ratings, and weighted by exp(rating / 0.3);
- the exact gradient of rating · π(choice | history), for which nothing has to be drawn;
- GRPO and SRPO on rating · share of right codes, `scale_rewards: none`, eight rollouts a prompt; and SRPO with the
  ratings exchanged among each user's prompts: it may learn what is chosen, and nothing about what is liked;
- SRPO with hints: prompts whose rollouts teach nothing are rolled out again behind the first codes of the choice,
  which are learned with a small weight; and that weight alone, without what SRPO makes of the rollouts (control);
- SRPO with `examples/custom_reward.py:fresh_items` beside the codes: whether a reward of one's own moves what it pays
  for, the novelty of the list (mean of −log2 of an item's share of the train targets), and what that costs.

`--bias 0 --disliked 0.7 --generations 16 --groups 64 --updates 150 --epochs 6 --out runs/bench/rated_lists.json` asks
again where labels have nothing left to say: the start has learned what is chosen from a log without promoted items,
and people rate seven of ten items poorly. The reward is the rating of a hit, and nothing for first codes. PKPO learns
what a list of eight gains by a rollout, GRPO what each is worth alone; PKPO with the ratings exchanged among each
user's prompts is the control.
"""

from __future__ import annotations

import copy
import platform
import tempfile
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from srpo import MAX_HISTORY, Size, keep_means, run, start_from_the_log
from torch.nn.utils.rnn import pad_sequence

from reasonrec.data_gen.readers.synthetic import SyntheticWorld
from reasonrec.data_gen.schema import Dataset
from reasonrec.data_gen.tasks.rl_prompts import PromptWindow, RlPrompts, prompt_block
from reasonrec.recipes.evaluation.intervals import seed_interval
from reasonrec.recipes.models.checkpoint import Setting
from reasonrec.recipes.policies.base import Policy
from reasonrec.recipes.recommender import Recommender
from reasonrec.recipes.trainers.algorithms import Srpo, Values, build_algorithm
from reasonrec.recipes.trainers.grpo_arguments import GrpoArguments
from reasonrec.recipes.trainers.item_grpo import ItemGRPOTrainer, RolloutSettings
from reasonrec.recipes.trainers.scoring import build_scorer
from reasonrec.rewards.registry import load_rewards

REWARD = '''
"""The user's rating of what was chosen, in so far as it was found."""
from reasonrec.rewards.prefix import common_prefix


def liked(*, predicted_codes, target_codes, target_rating, **_):
    rows = zip(predicted_codes, target_codes, target_rating, strict=True)
    return [0.0 if p is None else r * common_prefix(p, t) / len(t) for p, t, r in rows]


def liked_hit(*, predicted_codes, target_codes, target_rating, **_):
    rows = zip(predicted_codes, target_codes, target_rating, strict=True)
    return [r * float(p == t) for p, t, r in rows]
'''
FRESH = "examples/custom_reward.py:fresh_items"
SHARPNESS = 0.3
SUPERVISED = ("SFT continued", "SFT weighted by ratings", "exact gradient")
HINTS = ("SRPO, hints", "loss of the hints alone")
HINT_WEIGHT = 0.01
REINFORCED = ("GRPO", "SRPO", "SRPO, ratings exchanged", *HINTS, "SRPO, fresh items")
LISTS = ("GRPO", "PKPO", "PKPO, ratings exchanged")  # where labels have nothing left to say
Rates = dict[str, tuple[float, ...]]
Measured = dict[str, float]


def learning_rates(size: Size) -> Rates:
    """What is compared, and the learning rates that are tried."""
    if size.bias:
        return dict.fromkeys(SUPERVISED, (3e-4, 1e-3, 3e-3)) | dict.fromkeys(REINFORCED, (1e-4, 3e-4, 1e-3))
    return dict.fromkeys(SUPERVISED, (1e-4, 3e-4)) | dict.fromkeys(LISTS, (3e-4, 1e-3))


class NoAdvantage(Srpo):
    """Finds out which groups teach something, and lets none of them teach."""

    def split(self, advantage: Values) -> tuple[Values, Values]:
        """Nothing for any token."""
        return advantage * 0, advantage * 0


def exchanged(prompts: RlPrompts, owner: NDArray[np.int64], seed: int) -> RlPrompts:
    """The same prompts with each user's ratings in another order."""
    assert prompts.rating is not None
    rng = np.random.default_rng([seed, 11])
    mixed = rng.permutation(len(owner))
    order, drawn = np.argsort(owner, kind="stable"), mixed[np.argsort(owner[mixed], kind="stable")]
    rating = prompts.rating.copy()
    rating[order] = prompts.rating[drawn]
    return replace(prompts, rating=rating)


def supervised(
    policy: Policy, start: Any, prompts: RlPrompts, size: Size, arm: str, rate: float, seed: int
) -> tuple[Any, list[float]]:
    """Train on choices; returns the model, and the mean of rating · π(choice) at each update."""
    assert prompts.rating is not None
    model, block, worth = copy.deepcopy(start), size.groups * size.rounds, []
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    for step in range(size.updates):
        numbers = prompt_block(len(prompts), block, step, seed)
        answers = [policy.prompts.answer(int(prompts.target[n])) for n in numbers]
        rows = [prompts.token_ids(int(n)) + answer for n, answer in zip(numbers, answers, strict=True)]
        # Padding stands behind, where nothing looks.
        ids = pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=policy.pad_id)
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        place = np.concatenate([np.arange(len(r) - len(a), len(r)) for r, a in zip(rows, answers, strict=True)])
        row = np.repeat(np.arange(len(rows)), [len(a) for a in answers])
        at, where = torch.from_numpy(row), torch.from_numpy(place)
        gain, _, _ = policy.answers.log_probs(model, ids, at, where, hidden[at, where - 1], 1.0)
        log_prob = torch.zeros(len(rows)).index_add(0, at, gain)
        rating = torch.from_numpy(prompts.rating[numbers]).float()
        if arm == "exact gradient":
            loss = -(rating * log_prob.exp()).mean()
        else:
            weight = torch.ones_like(rating) if arm == "SFT continued" else (rating / SHARPNESS).exp()
            loss = -(weight * log_prob).sum() / weight.sum()
        worth.append(float((rating * log_prob.detach().exp()).mean()))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model, worth


def reinforced(
    policy: Policy, dataset: Dataset, start: Any, prompts: RlPrompts, size: Size, arm: str, rate: float, seed: int
) -> tuple[Any, list[float]]:
    """Train on rollouts; returns the model, and the mean reward of each update's rollouts."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (Path(folder) / "liked.py").write_text(REWARD)
        paid = "liked" if size.bias else "liked_hit"
        rewards = {"rsvr": 1.0, FRESH: 0.5} if arm == "SRPO, fresh items" else {f"{folder}/liked.py:{paid}": 1.0}
        args = GrpoArguments(
            output_dir=folder, learning_rate=rate, per_device_train_batch_size=size.groups * size.generations,
            num_generations=size.generations, max_steps=size.updates, beta=0.0, weight_decay=0.0,
            lr_scheduler_type="constant", precision="fp32", activation_checkpointing=False, save_strategy="no",
            report_to="none", disable_tqdm=True, seed=seed, scale_rewards="none",
        )  # fmt: skip
        algorithm = NoAdvantage(size.generations, False)
        if arm != "loss of the hints alone":
            algorithm = build_algorithm(arm.split(",")[0].lower(), {}, size.generations, scale=False)
        trainer = ItemGRPOTrainer(
            prompts=prompts,
            scorer=build_scorer(load_rewards(rewards), policy, dataset, reasoning=False),
            algorithm=algorithm,
            settings=RolloutSettings(rounds=size.rounds, hint_weight=HINT_WEIGHT if arm in HINTS else 0.0),
            model=copy.deepcopy(start),
            args=args,
            processing_class=policy.tokenizer,
        )
        trainer.log = lambda logs, start_time=None: keep_means(trainer, logs)
        trainer.train()
    return trainer.model, [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]


def measured(
    policy: Policy, dataset: Dataset, setting: Setting, model: Any, world: SyntheticWorld, split: str, rows: int
) -> Measured:
    """What the lists of held-out users are worth, what they find, and how novel they are."""
    histories = dataset.rows(split)["history"].to_list()[:rows]  # type: ignore[arg-type]
    lists, _ = Recommender(policy, model, setting).rank(histories, k=10, num_beams=20, batch_size=250)
    share = dataset.items["train_count"].to_numpy() + 1.0
    novelty = -np.log2(share / share.sum())
    hit, ndcg = world.expected_metrics(lists, histories)
    return {
        "value": world.expected_value(lists, histories),
        "value of the first": world.expected_value(lists, histories, k=1),
        "hr@10": hit,
        "ndcg@10": ndcg,
        "novelty": float(novelty[lists].mean()),
    }


def compare(policy: Policy, dataset: Dataset, setting: Setting, world: SyntheticWorld, size: Size) -> dict[str, Any]:
    """All arms on all seeds."""
    histories = dataset.test["history"].to_list()
    prompts = RlPrompts.from_train(dataset.train, PromptWindow(max_history=MAX_HISTORY), policy.prompts.direct)
    owner = dataset.train["user"].to_numpy()[prompts.source].astype(np.int64)
    arms = learning_rates(size)
    trials: dict[str, dict[float, float]] = {arm: {} for arm in arms}
    test: dict[str, list[Measured]] = {name: [] for name in ("start", *arms)}
    rewards: dict[str, list[tuple[float, float]]] = {arm: [] for arm in arms}
    for seed in range(size.seeds):
        start, _ = start_from_the_log(policy, dataset, setting, size, seed)
        test["start"].append(measured(policy, dataset, setting, start, world, "test", size.held_out))
        print(f"seed {seed}: start {test['start'][-1]}", flush=True)
        for arm, rates in arms.items():
            goal = "novelty" if arm == "SRPO, fresh items" else "value"
            given = exchanged(prompts, owner, seed) if arm.endswith("ratings exchanged") else prompts
            found: dict[float, tuple[Any, list[float]]] = {}
            for rate in rates if seed == 0 else (max(trials[arm], key=lambda rate: trials[arm][rate]),):
                if arm in SUPERVISED:
                    found[rate] = supervised(policy, start, given, size, arm, rate, seed)
                else:
                    found[rate] = reinforced(policy, dataset, start, given, size, arm, rate, seed)
                if seed == 0:
                    valid = measured(policy, dataset, setting, found[rate][0], world, "valid", size.valid_rows)
                    # Novelty alone would choose whatever forgets most: what is found has to stay, too.
                    bound = test["start"][0]["ndcg@10"] * 0.95
                    trials[arm][rate] = valid[goal] if goal == "value" or valid["ndcg@10"] >= bound else -np.inf
            model, curve = found[max(found, key=lambda rate: trials[arm][rate])]
            test[arm].append(measured(policy, dataset, setting, model, world, "test", size.held_out))
            rewards[arm].append((float(np.mean(curve[:10])), float(np.mean(curve[-10:]))))
            print(f"  {arm}: {test[arm][-1]}, its training reward {rewards[arm][-1]}", flush=True)
    return summary(test, trials, rewards, world, histories, size)


def summary(
    test: dict[str, list[Measured]],
    trials: dict[str, dict[float, float]],
    rewards: dict[str, list[tuple[float, float]]],
    world: SyntheticWorld,
    histories: list[list[int]],
    size: Size,
) -> dict[str, Any]:
    """Differences with t-intervals over the seeds, and what must hold."""
    pairs = [(arm, "start") for arm in trials]
    claimed = [(arm, f"{of}, ratings exchanged") for arm, of in (("GRPO", "SRPO"), ("SRPO", "SRPO"), ("PKPO", "PKPO"))]
    claimed = [pair for pair in claimed if set(pair) <= trials.keys()]
    claimed += [(arm, "SFT continued") for arm, _ in claimed]
    pairs += claimed + [(arm, b) for arm in dict(claimed) for b in (*SUPERVISED[1:], "GRPO") if arm != b]
    if "SRPO, hints" in trials:
        pairs += [("SRPO, hints", b) for b in ("SRPO", "loss of the hints alone", "SFT continued")]
    paired = []
    for a, b in pairs:
        for metric in test["start"][0]:
            differences = [x[metric] - y[metric] for x, y in zip(test[a], test[b], strict=True)]
            interval = seed_interval(differences)
            ends = [round(interval.low, 5), round(interval.high, 5)]
            paired.append({"a": a, "b": b, "metric": metric, "mean": round(interval.mean, 5), "ci95": ends})
    low = {(entry["a"], entry["b"], entry["metric"]): entry["ci95"][0] for entry in paired}
    holds = {f"{a} above {b}": bool(low[a, b, "value"] > 0) for a, b in claimed}
    found_most = np.stack([np.argsort(-world.probabilities(history), kind="stable")[:10] for history in histories])
    return {
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
        "size": vars(size),
        "best": {
            "value": world.best_value(histories),
            "hr@10": world.optimum(histories)[0],
            "value of the lists that find most": world.expected_value(found_most, histories),
        },
        "learning_rates": trials,
        "test": test,
        "training_reward": rewards,
        "paired": paired,
        "holds": holds,
    }


if __name__ == "__main__":
    run("rated", __doc__, compare, ("best", "paired", "holds"))
