"""Rank the full catalogue for every held-out case: trained models, their controls and all baselines in one table.

accelerate launch recipes/eval_ranking.py --config recipes/configs/demo/eval.yaml

Writes `metrics.json` and a self-contained `report.html`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from reasonrec.data_gen.schema import Dataset
from reasonrec.recipes.args import parse, run
from reasonrec.recipes.decoding.consistency import Consistency
from reasonrec.recipes.keys import MAX_SEED, PRECISION_HELP, TRUST_HELP, PrecisionName, recorded
from reasonrec.recipes.rankers.top_k import KS
from reasonrec.tokenizers.artefact import check_input, read_manifest, staged
from reasonrec.tokenizers.errors import UserError
from reasonrec.tokenizers.index import external_sids
from reasonrec.tokenizers.output import claim_output, releasing_outputs
from reasonrec.tokenizers.places import place
from reasonrec.tokenizers.terminal import say


@dataclass
class EvalConfig:
    """Configuration of the evaluation."""

    dataset: str = field(metadata={"help": "dataset folder (prepare.py)", "path": True})
    output_dir: str = field(metadata={"help": "folder of the report", "path": "name"})
    models: list[str] = field(
        default_factory=list,
        metadata={"help": "folders of trained models (sft.py, grpo.py), ranked directly", "path": True},
    )
    reasoning_models: list[str] = field(
        default_factory=list,
        metadata={"help": "folders of models that think first (trained on traces)", "path": True},
    )
    base_model: str | None = field(
        default=None,
        metadata={"help": "the adapters' base model (Hub id or folder), if it moved since the training", "path": True},
    )
    chains: int = field(
        default=1, metadata={"help": "chains per user: one greedy, or several sampled and merged", "at_least": 1}
    )
    max_chain: int = field(default=128, metadata={"help": "longest chain in tokens", "at_least": 1})
    chain_temperature: float = field(default=1.0, metadata={"help": "temperature of sampled chains", "above": 0})
    split: Literal["valid", "test"] = field(default="test", metadata={"help": "which held-out cases"})
    candidates: Literal["all", "cold"] = field(
        default="all",
        metadata={"help": "what is ranked: all items, or, for the cases they answer, those that no training saw"},
    )
    num_beams: int = field(default=50, metadata={"help": "width of the item search", "at_least": 1})
    exact: bool = field(
        default=True, metadata={"help": "of direct rows: search on until each list is proven; off, a beam search"}
    )
    exhaustive: bool = field(
        default=False, metadata={"help": "score the whole catalogue instead of searching it; for small ones"}
    )
    batch_size: int = field(
        default=16, metadata={"help": "cases searched at a time; changes time, not results", "at_least": 1}
    )
    control: bool = field(
        default=True,
        metadata={
            "help": "also rank with another user's history (unless the model's start is in the table, too), and "
            "behind chains that cannot help"
        },
    )
    baselines: bool = field(default=True, metadata={"help": "the counting baselines"})
    window: int = field(default=10, metadata={"help": "co-visitation: pairs at most so far apart", "at_least": 1})
    embedding_model: str | None = field(
        default=None,
        metadata={
            "help": "sentence-transformers model of the row 'text neighbours'; unset leaves it out",
            "path": True,
        },
    )
    sasrec_trials: int = field(
        default=0, metadata={"help": "SASRec configurations tried on validation; 0 leaves it out", "at_least": 0}
    )
    fuse: bool = field(
        default=False,
        metadata={"help": "also fuse co-visitation, text neighbours and SASRec, without and with each model"},
    )
    sid_file: str | None = field(
        default=None, metadata={"help": "published semantic IDs (JSON) for a column that counts IDs", "path": "name"}
    )
    max_rows: int | None = field(
        default=None, metadata={"help": "evaluate a seeded sample of so many cases", "at_least": 1}
    )
    precision: PrecisionName = field(default="auto", metadata={"help": PRECISION_HELP})
    trust_remote_code: bool = field(default=False, metadata={"help": TRUST_HELP})
    device: str | None = field(
        default=None, metadata={"help": "device of the models; the accelerator if there is one"}
    )
    seed: int = field(
        default=0, metadata={"help": "seed of bootstrap, sample and controls", "at_least": 0, "at_most": MAX_SEED}
    )
    overwrite: bool = field(default=False, metadata={"help": "move an existing output_dir aside"})

    def __post_init__(self) -> None:
        if self.num_beams < max(KS):
            raise UserError(f"num_beams={self.num_beams} has to be at least {max(KS)}, the longest list reported")
        if not (self.models or self.reasoning_models or self.baselines or self.sasrec_trials or self.embedding_model):
            raise UserError("nothing to evaluate: give models, or leave baselines on")
        if self.fuse and not (self.baselines or self.sasrec_trials or self.embedding_model):
            raise UserError(
                "fuse=true has nothing to fuse: leave baselines on, or set embedding_model or sasrec_trials"
            )


@releasing_outputs()
def main() -> None:
    """Parse, rank, compare, report."""
    config, rules = parse([EvalConfig, Consistency])
    exact = config.exact or config.exhaustive
    rules.check_asked(models=bool(config.models), reasoning_models=bool(config.reasoning_models), exact=exact)

    # PyTorch and what is built on it take seconds to import; by now it is known that they are needed.
    from reasonrec.recipes.evaluation.compare import DIRECT, REASONING, evaluate_rows
    from reasonrec.recipes.evaluation.leaderboard import Table
    from reasonrec.recipes.evaluation.report import examples, print_table, write_report
    from reasonrec.recipes.evaluation.slices import among_cold, in_train
    from reasonrec.recipes.models.checkpoint import OTHER
    from reasonrec.recipes.policies.sharing import sharing, this_launch
    from reasonrec.recipes.rankers.reasoning import Thinking
    from reasonrec.recipes.trainers.resume import adopted

    launch = this_launch()
    out = claim_output(config.output_dir, overwrite=config.overwrite)
    dataset = Dataset.load(config.dataset)
    manifests = {path: read_manifest(path) for path in (*config.models, *config.reasoning_models)}
    for manifest in manifests.values():
        check_input(manifest, "dataset", dataset.manifest, OTHER)
    inputs = {"dataset": dataset.manifest.hash} | {place(path, out): made.hash for path, made in manifests.items()}
    about = {
        "kind": "report",
        "config": recorded(config, out) | recorded(rules, out),
        "seed": config.seed,
        "inputs": inputs,
    }
    if adopted(out, overwrite=config.overwrite, **about):
        return
    cases = dataset.rows(config.split)
    candidates = None
    if config.candidates == "cold":
        cases, candidates = among_cold(cases, dataset), int((~in_train(dataset)).sum())
    if config.max_rows and config.max_rows < cases.height:
        cases = cases.sample(config.max_rows, seed=config.seed).sort("row")
    table = Table(config, dataset, cases, rules)
    with sharing():  # what models read; the rest is done by each process, and written by the first
        table.add_baselines()
        for path in config.models:
            table.add_model(path, manifests[path])
        thinking = Thinking(config.chains, config.max_chain, config.chain_temperature, config.seed)
        for path in config.reasoning_models:
            table.add_model(path, manifests[path], thinking)
    if not launch.is_main_process:
        return
    rows = table.rows
    sids = external_sids(config.sid_file, dataset.n_items) if config.sid_file else None
    metrics = evaluate_rows(
        dataset,
        config.split,
        rows,
        KS,
        table.claims,
        sid_of_item=sids,
        cases=cases,
        candidates=candidates,
        seed=config.seed,
    )
    shown = [row for row in rows if row.mode in (DIRECT, REASONING)] or rows[:1]
    with staged(out, overwrite=config.overwrite, **about) as (folder, _):
        write_report(
            folder, metrics, examples=examples(dataset, config.split, shown, cases=cases, thoughts=table.thoughts)
        )
    print_table(metrics)
    say(f"\n{config.output_dir}/report.html shows the same with plots")


if __name__ == "__main__":
    run(main)()
