"""Ways to think before an answer, judged by likelihood against a model that answers at once, in one table.

python tests/benchmarks/thinking.py --start runs/demo/sft

Every arm goes on from the same checkpoint for as many processed tokens, at the better of two learning rates by its
own validation likelihood. *Gain*: nats that the arm saves for a validation user's next item (among what is not masked,
one temperature at each level of an answer, fitted on the other half of the users) against *direct*, which goes on
without a chain. Chains never see the target; evidence never counts the user it is for. The arms:

- pause: so many more tokens in front of the answer, copies of the begin marker, whose row is learned; their loss is
  nothing. Controls: ordinary words there, and the pause in front of the history.
- evidence: the ten strongest companions of the history, as codes. Controls, of the same model: another user's
  companions, and the own in another order.
- label: one word of 16 that stand for clusters of items, summed over all of them: Σ p(label | history) p(item |
  history, label). One round of hard EM gives every example the label that explains it best. Control: *direct* behind
  16 variants of its prompt, averaged.
- rehearsal (rejection sampling): two items that the model imagines, drawn from itself. Users are in two folds: the
  model learned from one; of eight chains for each history of the other fold, those are learned that make the target
  likelier than no chain does, and than another user's chain. Control: as many random ones of the eight.
- merged: *direct* and behind its evidence, averaged, against *direct* behind as many variants of its prompt.

Writes `runs/bench/thinking.json` after every arm.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file
from sklearn.cluster import KMeans
from thinking_bench import (
    Bench,
    Window,
    best,
    direct,
    evidence,
    example,
    examples_of,
    losses,
    pause,
    prompts_of,
    trained,
    untrained,
    variants,
    within,
)

from reasonrec.data_gen.tasks.prompts import Example
from reasonrec.recipes.decoding.sample import Sampler, noise, roll_out
from reasonrec.recipes.evaluation.controls import donors
from reasonrec.recipes.evaluation.intervals import mean_interval
from reasonrec.recipes.models.checkpoint import training_data
from reasonrec.recipes.models.load import trainable_values
from reasonrec.recipes.policies.inference import score
from reasonrec.recipes.policies.loading import load_trained
from reasonrec.recipes.rankers.pooled import sampled
from reasonrec.recipes.recommender import Recommender
from reasonrec.tokenizers.artefact import read_manifest
from reasonrec.tokenizers.places import located
from reasonrec.tokenizers.rows import text_logits

LABELS, REHEARSED, DRAWN, FRESH = 16, 2, 8, 4
FOLD_RATE = 1e-3  # from an untrained adapter, as in the demo
Found = Iterator[tuple[str, NDArray[np.float64], str]]  # an arm, its nats, and what it is compared with


def pause_arms(bench: Bench, plain: Recommender, rate: float, few: int) -> Found:
    """Learned tokens in front of the answer."""
    _, values, own = best(bench, pause(2))
    yield "pause of 2", values, "direct"
    others = (
        ("pause of 4", pause(4)),
        ("2 ordinary words", pause(2, words=True)),
        ("pause of 2 in front of the history", pause(2, in_front=True)),
    )
    for name, layout in others:
        model = trained(bench, examples_of(bench, layout), own)
        yield name, losses(bench, model, prompts_of(bench, layout)), "direct"


def evidence_arms(bench: Bench, plain: Recommender, rate: float, few: int) -> Found:
    """Companions of the history in front of the answer, and direct and evidence averaged."""
    model, values, _ = best(bench, evidence())
    yield "evidence", values, "direct"
    donor = donors([history.tolist() for history in bench.sequences], bench.seed)
    exchanged, shuffled = evidence(of=[int(place) for place in donor]), evidence(shuffle=bench.seed)
    yield "evidence of another user", losses(bench, model, prompts_of(bench, exchanged)), "evidence"
    yield "evidence in another order", losses(bench, model, prompts_of(bench, shuffled)), "evidence"
    at_once = losses(bench, model, prompts_of(bench, direct))
    yield "the same model without evidence", at_once, "evidence"
    yield "direct, 2 prompts", losses(bench, plain, variants(bench, 2)), "direct"
    both = [one + two for one, two in zip(prompts_of(bench, direct), prompts_of(bench, evidence()), strict=True)]
    yield "merged: at once and behind evidence", losses(bench, model, both), "direct, 2 prompts"


def label_words(bench: Bench) -> list[int]:
    """One ordinary token for each label."""
    words = [bench.policy.prompts.prompter.syntax(f" {chr(ord('A') + place)}") for place in range(LABELS)]
    assert all(len(ids) == 1 for ids in words)
    return [ids[0] for ids in words]


def label_example(bench: Bench, window: Window, word: int) -> Example:
    """The label and the item are learned."""
    prompts = bench.policy.prompts
    prompt = prompts.reasoning(window.history)
    rest = [word, *prompts.close_ids, prompts.begin_id, *prompts.answer(window.target)]
    return prompt + rest, [-100] * len(prompt) + rest


def label_mixture(
    model: Recommender, words: Sequence[int], histories: Sequence[NDArray[np.int64]]
) -> tuple[list[list[list[int]]], NDArray[np.float64]]:
    """A prompt behind each label, and the log-probability of each (histories, labels)."""
    prompts = model.policy.prompts
    opened = [prompts.reasoning(history) for history in histories]
    chances = []
    for place in range(0, len(opened), 64):
        prefix = model.policy.answers.read(model.model, opened[place : place + 64], model.policy.pad_id, 1)
        with torch.no_grad():
            chances.append(text_logits(model.model, prefix.hidden)[:, words].float().log_softmax(-1).cpu().numpy())
    behind = [[prompts.behind(history, [word, *prompts.close_ids]) for word in words] for history in histories]
    return behind, np.concatenate(chances).astype(np.float64)


def label_arms(bench: Bench, plain: Recommender, rate: float, few: int) -> Found:
    """Clusters of items as labels, then one round of hard EM."""
    index = Path(located(str(read_manifest(bench.start).config["index"]), bench.start))
    vectors = load_file(index / "embeddings.safetensors")
    (table,) = (value for value in vectors.values() if value.ndim == 2 and len(value) == bench.dataset.n_items)
    cluster = KMeans(LABELS, n_init=4, random_state=bench.seed).fit_predict(table)
    words, windows, shown = label_words(bench), bench.windows(), bench.shown()[:few]

    def mixed(labels: dict[int, int]) -> list[Example]:
        """Every other example is behind a label."""
        made = (
            label_example(bench, window, words[labels.get(place, int(cluster[window.target]))])
            if place % 2
            else example(bench, window, direct)
            for place, window in enumerate(windows)
        )
        return within(bench.tokens, made)

    yield f"direct, {LABELS} prompts", losses(bench, plain, variants(bench, LABELS, few)), "direct"
    model = trained(bench, first := mixed({}), rate)
    yield "label", losses(bench, model, *label_mixture(model, words, shown)), "direct"
    asked = dict(list(enumerate(windows))[1 : len(first) : 2])
    behind, chances = label_mixture(model, words, [window.history for window in asked.values()])
    target = np.repeat([[window.target] for window in asked.values()], LABELS, axis=0)
    flat = [prompt for own in behind for prompt in own]
    given = score(model.policy, model.model, flat, target, batch_size=64).reshape(-1, LABELS)
    chosen = dict(zip(asked, (given + chances).argmax(1).tolist(), strict=True))
    moved = np.mean([chosen[place] != cluster[window.target] for place, window in asked.items()])
    print(f"  hard EM gives {moved:.0%} of the examples another label", flush=True)
    model = trained(bench, mixed(chosen), rate)
    yield "label, after EM", losses(bench, model, *label_mixture(model, words, shown)), "direct"


def imagine(model: Recommender, histories: Sequence[Any], n: int, seed: int) -> list[list[list[int]]]:
    """For each history n chains of items, drawn one after the other from the model."""
    policy = model.policy
    chains = [[policy.prompts.direct(history)[:-1]] * n for history in histories]
    before = [len(own[0]) for own in chains]
    for step in range(REHEARSED):
        lanes = 1 if step else n
        opened = [[*c, policy.prompts.begin_id] for own in chains for c in (own if step else own[:1])]
        drawn = roll_out(
            model.model, policy.answers, opened, Sampler(lanes), eos_ids=[policy.eos_id], pad_id=policy.pad_id,
            noise=noise(seed, step, np.arange(len(opened)), lanes, policy.answers.longest),
        ).items.reshape(len(histories), n)  # fmt: skip
        begin, codes = policy.prompts.begin_id, policy.prompts.item_token_ids
        chains = [
            [[*c, begin, *codes[item]] for c, item in zip(own, items, strict=True)]
            for own, items in zip(chains, drawn, strict=True)
        ]
    return [[c[size:] for c in own] for own, size in zip(chains, before, strict=True)]


def rehearsed(bench: Bench, window: Window, chain: list[int]) -> Example:
    """The imagined items and the answer are learned."""
    prompts = bench.policy.prompts
    prompt = prompts.direct(window.history)[:-1]
    rest = [*chain, prompts.begin_id, *prompts.answer(window.target)]
    labels = [-100 if token == prompts.begin_id else token for token in rest]
    return prompt + rest, [-100] * len(prompt) + labels


def rehearsal_arms(bench: Bench, plain: Recommender, rate: float, few: int) -> Found:
    """Kept chains, random ones, and no chains, all from a model that learned from the other fold of users."""
    fold = np.random.default_rng(bench.seed).random(len(bench.sequences)) < 0.5
    rng, begin = np.random.default_rng([bench.seed, 1]), bench.policy.prompts.begin_id
    seen = trained(bench, examples_of(bench, direct, fold), FOLD_RATE, untrained(bench))
    values = trainable_values(seen.model)
    windows = bench.windows(~fold)[: bench.tokens // 60]
    histories = [window.history for window in windows]
    chains = imagine(seen, histories, DRAWN, bench.seed)
    donor = donors(histories, bench.seed)

    def behind(shown: Sequence[NDArray[np.int64]], chains: Sequence[Sequence[list[int]]]) -> list[list[list[int]]]:
        before = [bench.policy.prompts.direct(history)[:-1] for history in shown]
        return [[[*opened, *chain, begin] for chain in own] for opened, own in zip(before, chains, strict=True)]

    def judged(chains: Sequence[Sequence[list[int]]]) -> NDArray[np.float32]:
        flat = [prompt for own in behind(histories, chains) for prompt in own]
        target = np.repeat([[window.target] for window in windows], len(chains[0]), axis=0)
        return score(seen.policy, seen.model, flat, target, batch_size=64).reshape(len(windows), -1)

    none, own = judged([[[]]] * len(windows)), judged(chains)
    good = (own > none) & (own > judged([chains[place] for place in donor]))
    keeps = np.flatnonzero(good.any(1))
    print(f"  {good.mean():.1%} of the chains pass, for {len(keeps)} of {len(windows)} histories", flush=True)
    best_of = {place: int(np.where(good[place], own[place], -np.inf).argmax()) for place in keeps}
    plain_name, used, arms = "direct, the same folds", 0, {}
    for name, which in (("kept", best_of), ("random", {place: int(rng.integers(DRAWN)) for place in keeps})):
        pairs = [
            made
            for place, number in which.items()
            for made in (
                rehearsed(bench, windows[place], chains[place][number]),
                example(bench, windows[place], direct),
            )
        ]
        examples = within(bench.tokens, pairs)
        used = sum(len(ids) for ids, _ in examples)
        model = trained(bench, examples, rate, values)
        fresh = behind(bench.shown(), imagine(model, bench.shown(), FRESH, bench.seed + 1))
        arms[f"rehearsal, {name} chains"] = losses(bench, model, fresh)
    windows = bench.windows(~fold)
    model = trained(bench, within(used, (example(bench, window, direct) for window in windows)), rate, values)
    yield plain_name, losses(bench, model, variants(bench, 1)), "direct"
    yield f"{plain_name}, {FRESH} prompts", losses(bench, model, variants(bench, FRESH)), plain_name
    for name, nats_of_arm in arms.items():
        yield name, nats_of_arm, plain_name


ARMS: dict[str, Callable[[Bench, Recommender, float, int], Found]] = {
    "pause": pause_arms, "evidence": evidence_arms, "label": label_arms, "rehearsal": rehearsal_arms,
}  # fmt: skip


def main() -> None:
    """Train, judge, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--start", default="runs/demo/sft")
    parser.add_argument("--tokens", type=int, default=60_000, help="processed tokens of each arm")
    parser.add_argument("--rates", type=float, nargs="+", default=[3.5e-4, 7e-4])
    parser.add_argument("--max_rows", type=int, default=1000, help="validation cases")
    parser.add_argument("--mixture_rows", type=int, default=300, help="cases behind many prompts each")
    parser.add_argument("--arms", nargs="+", default=list(ARMS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="runs/bench/thinking.json")
    options = parser.parse_args()
    if not options.start.startswith("/") and not Path(options.start).exists():
        print(f"nothing to go on from: {options.start} is not there (make demo)")
        return
    manifest, start = read_manifest(options.start), Path(options.start)
    dataset = training_data(manifest, start)
    valid = sampled(dataset.rows("valid"), options.seed, options.max_rows)
    valid = valid.sample(fraction=1.0, shuffle=True, seed=options.seed)  # the first so many are a sample as well
    policy = load_trained(start).policy
    bench = Bench(start, dataset, policy, valid, options.tokens, options.rates, options.seed)
    found: dict[str, NDArray[np.float64]] = {}
    table: list[dict[str, Any]] = []

    def keep(name: str, values: NDArray[np.float64], against: str = "direct", note: str = "") -> None:
        found[name] = values
        rows = min(len(values), len(found[against]))
        gain = found[against][:rows] - values[:rows]
        low, high = mean_interval(valid["user"].to_numpy()[:rows], gain, seed=options.seed)
        row = {"arm": name, "nats": float(values.mean()), "cases": rows, "against": against, "note": note}
        table.append(row | {"gain": float(gain.mean()), "ci95": [low, high]})
        gained = f"gain {gain.mean():+.3f} [{low:+.3f}, {high:+.3f}] over {against}"
        print(f"{values.mean():.3f} nats, {gained}: {name} {note}", flush=True)
        report = {"machine": f"{platform.machine()}, torch {torch.__version__}", "options": vars(options)}
        Path(options.out).parent.mkdir(parents=True, exist_ok=True)
        Path(options.out).write_text(json.dumps(report | {"table": table}, indent=2) + "\n")

    plain, values, rate = best(bench, direct)
    keep("direct", values, note=f"at {rate}")
    for arm in options.arms:
        for name, values, against in ARMS[arm](bench, plain, rate, options.mixture_rows):
            keep(name, values, against)


if __name__ == "__main__":
    main()
