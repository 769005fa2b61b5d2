"""Judge whether a model's thinking is worth its tokens, on validation cases, and keep the verdict in the checkpoint.

accelerate launch recipes/judge_reasoning.py --config recipes/configs/demo/judge_reasoning.yaml

A chain has to raise the likelihood of what users chose next over a checkpoint that was trained on as many tokens
without chains, and must not cost NDCG. `recommend` thinks only with such a verdict, and else says why not.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from reasonrec.recipes.args import parse, run
from reasonrec.recipes.keys import MAX_SEED
from reasonrec.recipes.loaded_model import LoadedModel
from reasonrec.tokenizers.artefact import read_manifest
from reasonrec.tokenizers.environment import is_first_process
from reasonrec.tokenizers.errors import UserError
from reasonrec.tokenizers.output import claim_output, releasing_outputs
from reasonrec.tokenizers.terminal import say

ONE_SIDED = 0.90  # the lower end of a two-sided interval of this level is a one-sided bound of 95%
LONGEST = 10  # NDCG@10


@dataclass
class JudgeConfig(LoadedModel):
    """Configuration of the judgement."""

    model: str = field(metadata={"help": "folder of the model that thinks (sft.py, grpo.py)", "path": True})
    direct: str = field(
        metadata={"help": "folder of a model trained on as many tokens of the same dataset, no chains", "path": True}
    )
    output_dir: str = field(metadata={"help": "folder of the model with its verdict", "path": "name"})
    chains: int = field(default=1, metadata={"help": "chains: one greedy, or several sampled", "at_least": 1})
    max_chain: int = field(default=128, metadata={"help": "longest chain in tokens", "at_least": 1})
    max_rows: int = field(default=1000, metadata={"help": "validation cases, at most", "at_least": 2})
    num_beams: int = field(default=50, metadata={"help": "width of the item search", "at_least": LONGEST})
    dataset: str | None = field(
        default=None, metadata={"help": "its dataset; where its training found it if unset", "path": True}
    )
    batch_size: int = field(
        default=32, metadata={"help": "cases read at a time; changes time, not results", "at_least": 1}
    )
    seed: int = field(
        default=0, metadata={"help": "seed of chains, sample and halves", "at_least": 0, "at_most": MAX_SEED}
    )
    overwrite: bool = field(default=False, metadata={"help": "move an existing output_dir aside"})


@releasing_outputs()
def main() -> None:
    """Parse, rank and score both models, judge, save."""
    (config,) = parse([JudgeConfig])

    # PyTorch and what is built on it take seconds to import; by now it is known that they are needed.
    from reasonrec.data_gen.tasks.choice import validation_sample
    from reasonrec.recipes.evaluation.intervals import bootstrap_means, percentile_interval
    from reasonrec.recipes.models.amended import about_amended, amended
    from reasonrec.recipes.models.checkpoint import OTHER, trained_tokens, training_data
    from reasonrec.recipes.models.verdict import Verdict
    from reasonrec.recipes.policies.sharing import sharing, this_launch
    from reasonrec.recipes.rankers.likelihood import nats, thought_nats
    from reasonrec.recipes.rankers.model import ModelRanker
    from reasonrec.recipes.rankers.pooled import sampled
    from reasonrec.recipes.rankers.reasoning import Reasoner, Thinking
    from reasonrec.recipes.trainers.resume import adopted
    from reasonrec.rewards.metrics import per_row
    from reasonrec.tokenizers.artefact import check_input

    this_launch()
    out = claim_output(config.output_dir, overwrite=config.overwrite)
    start, direct = read_manifest(config.model), read_manifest(config.direct)
    for path, manifest in ((config.model, start), (config.direct, direct)):
        if "pool" in manifest.facts:
            raise UserError(f"{path} has experts, which would hide what thinking does: give the model without them")
    dataset = training_data(start, config.model, config.dataset)
    check_input(direct, "dataset", dataset.manifest, OTHER)
    about = about_amended(config, start, dataset, out, direct=direct.hash)
    if adopted(out, overwrite=config.overwrite, **about):
        return
    valid = dataset.rows("valid")
    for manifest in (start, direct):
        if looked_at := manifest.config.get("valid_rows"):
            valid = valid.join(validation_sample(dataset, looked_at, "row"), on="row", how="anti")
    if valid["user"].n_unique() < 2:
        raise UserError(
            f"{dataset.path} has {valid.height} validation cases that no training looked at, too few to judge by: "
            "prepare it with a larger validation split, or train with a smaller valid_rows"
        )
    valid = sampled(valid, config.seed, config.max_rows)
    target, users = valid["target"].to_numpy(), valid["user"].to_numpy()
    width = {"num_beams": config.num_beams, "batch_size": config.batch_size, "progress": True}
    with sharing():  # what models read
        plain = config.load(config.direct)
        without = nats(plain, valid, batch_size=config.batch_size, progress=True, seed=config.seed)
        lists = ModelRanker(plain, "direct", **width).rank(valid, LONGEST)
        del plain
        reasoner = Reasoner(config.load(config.model), LONGEST, **width)
        thinking = Thinking(config.chains, config.max_chain, seed=config.seed)
        within, thought = thought_nats(reasoner, valid, thinking, seed=config.seed)
    if not is_first_process():
        return
    ndcg = [per_row(found, target, ks=(LONGEST,))[f"ndcg@{LONGEST}"] for found in (thought, lists)]
    gains = np.stack([without - within, ndcg[0] - ndcg[1]], axis=1)
    draws = bootstrap_means(users, gains, seed=config.seed)
    lows = [percentile_interval(draws[:, column], ONE_SIDED)[0] for column in range(2)]
    mean = gains.mean(axis=0)
    verdict = Verdict(
        round(float(mean[0]), 4), round(lows[0], 4), round(float(mean[1]), 5), round(lows[1], 5),
        valid.height, config.chains, config.max_chain,
        [trained_tokens(path) for path in (config.model, config.direct)], direct.hash,
    )  # fmt: skip
    say(f"nats: {within.mean():.3f} behind chains, {without.mean():.3f} without")
    say(verdict)
    with amended(out, config.model, start, overwrite=config.overwrite, **about) as (_, facts):
        facts.update(verdict.facts())
    say(f"{out} holds the model with this verdict")


if __name__ == "__main__":
    run(main)()
