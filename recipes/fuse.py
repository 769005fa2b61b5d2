"""Pool a trained model with experts that count, such as co-visitation and SASRec, and keep them in one checkpoint.

accelerate launch recipes/fuse.py --config recipes/configs/demo/fuse.yaml

The experts learn from the training sequences, and who has how much to say is fitted on validation cases. The folder
holds the model as before, and beside it what the experts know of items: no interaction, no user.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from reasonrec.recipes.args import parse, run
from reasonrec.recipes.keys import MAX_SEED
from reasonrec.recipes.loaded_model import LoadedModel
from reasonrec.tokenizers.artefact import read_manifest
from reasonrec.tokenizers.environment import is_first_process
from reasonrec.tokenizers.errors import UserError
from reasonrec.tokenizers.output import claim_output, releasing_outputs
from reasonrec.tokenizers.terminal import say


@dataclass
class FuseConfig(LoadedModel):
    """Configuration of the fusion."""

    model: str = field(metadata={"help": "folder of the trained model (sft.py, grpo.py)", "path": True})
    output_dir: str = field(metadata={"help": "folder of the model with its experts", "path": "name"})
    experts: dict[str, Any] = field(
        default_factory=lambda: {"co_visitation": {}, "sasrec": {}},
        metadata={"help": "experts by name, each with its options: co_visitation, sasrec, text"},
    )
    dataset: str | None = field(
        default=None, metadata={"help": "its dataset; where its training found it if unset", "path": True}
    )
    batch_size: int = field(
        default=64, metadata={"help": "cases read at a time; changes time, not results", "at_least": 1}
    )
    seed: int = field(
        default=0, metadata={"help": "seed of training, sample and halves", "at_least": 0, "at_most": MAX_SEED}
    )
    overwrite: bool = field(default=False, metadata={"help": "move an existing output_dir aside"})


@releasing_outputs()
def main() -> None:
    """Parse, train the experts, fit the weights, save."""
    (config,) = parse([FuseConfig])

    # PyTorch and what is built on it take seconds to import; by now it is known that they are needed.
    from reasonrec.recipes.evaluation.intervals import mean_interval
    from reasonrec.recipes.models.amended import about_amended, amended
    from reasonrec.recipes.models.card import add_experts
    from reasonrec.recipes.models.checkpoint import training_data
    from reasonrec.recipes.policies.sharing import sharing, this_launch
    from reasonrec.recipes.rankers.experts import build_experts
    from reasonrec.recipes.rankers.pool import MODEL, Pool
    from reasonrec.recipes.rankers.pooled import Heard, sampled
    from reasonrec.recipes.trainers.resume import adopted

    this_launch()
    out = claim_output(config.output_dir, overwrite=config.overwrite)
    start = read_manifest(config.model)
    if "pool" in start.facts:
        raise UserError(f"model={config.model} has experts already: give the one that they were added to")
    dataset = training_data(start, config.model, config.dataset)
    about = about_amended(config, start, dataset, out)
    if adopted(out, overwrite=config.overwrite, **about):
        return
    # Each process trains the experts for itself, so that none waits for another's.
    experts = build_experts(config.experts, dataset, seed=config.seed)
    recommender = config.load(config.model)
    valid = sampled(dataset.rows("valid"), config.seed)
    with sharing():  # what the model reads
        heard = Heard.of(recommender, experts, valid, batch_size=config.batch_size, progress=True)
    if not is_first_process():
        return
    pool = Pool(experts, heard.weights([MODEL, *experts]))
    found = {
        " + ".join(names): heard.losses(names, config.seed)
        for names in ([MODEL], *([name] for name in experts), list(experts), [MODEL, *experts])
    }
    say(f"\nnats for the next item, {valid.height} validation cases, weights fitted on the other half of the users:")
    for names, losses in found.items():
        say(f"    {losses.mean():.3f}  {names}")
    added = found[" + ".join([MODEL, *experts])] - found[" + ".join(experts)]
    low, high = mean_interval(valid["user"].to_numpy(), added, seed=config.seed)
    say(f"the model adds {added.mean():+.3f} [{low:+.3f}, {high:+.3f}]")
    say(f"weights at each level of an answer: {pool}")
    with amended(out, config.model, start, overwrite=config.overwrite, **about) as (folder, facts):
        facts.update(pool.save(folder))
        facts["pool"]["valid_nats"] = {names: round(float(losses.mean()), 4) for names, losses in found.items()}
        add_experts(folder, pool)
    say(f"{out} holds the model and {len(experts)} experts")


if __name__ == "__main__":
    run(main)()
