"""Write reasoning traces: what leads from a history to a choice, in five stages, verified and counted.

accelerate launch recipes/synthesize.py --config recipes/configs/demo/synthesize.yaml

Replies of an LLM are kept beside the output folder as they arrive; the same command goes on where it was stopped.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reasonrec.data_gen.reasoning.cases import Selection, select_train, select_valid
from reasonrec.data_gen.reasoning.checks import Checker
from reasonrec.data_gen.reasoning.label_statistics import ItemLabels, LabelStatistics
from reasonrec.data_gen.reasoning.synthesis import OnMiss, Synthesis, easy_rows, synthesize
from reasonrec.data_gen.reasoning.traces import Reply, Trace, to_frame
from reasonrec.data_gen.schema import Dataset
from reasonrec.data_gen.tasks.reasoning import TraceChains
from reasonrec.recipes.args import parse, run
from reasonrec.recipes.keys import recorded
from reasonrec.recipes.teachers import SynthesizeConfig, adopted, build_teacher, is_idle
from reasonrec.tokenizers.artefact import check_input, read_manifest, staged, write_json
from reasonrec.tokenizers.environment import is_first_process
from reasonrec.tokenizers.index import ItemIndex
from reasonrec.tokenizers.output import claim_output, releasing_outputs
from reasonrec.tokenizers.places import own_name
from reasonrec.tokenizers.terminal import say

if TYPE_CHECKING:
    from reasonrec.recipes.policies.base import Policy


def build(config: SynthesizeConfig, dataset: Dataset, policy: Policy | None, folder: Path | None) -> dict[str, Any]:
    """Write the traces and the report; the report comes back.

    Args:
        config: Configuration of the stage.
        dataset: Where the cases come from.
        policy: Measures chains, if there is one.
        folder: Where to; None for a process that only helps the teacher write.
    """
    from tqdm import tqdm

    from reasonrec.recipes.evaluation.leak import leak_test

    labels = ItemLabels.of(dataset.items, config.label_field)
    statistics = LabelStatistics(dataset, labels)
    train = select_train(
        dataset, config.rows, min_history=config.min_history, max_history=config.max_history, seed=config.seed
    )
    valid = select_valid(dataset, config.valid_rows, max_history=config.max_history, seed=config.seed)
    teacher = build_teacher(config, dataset, statistics, (train, valid))
    if folder is None:
        for selection in (train, valid):
            deque(teacher.write(selection.cases), maxlen=0)
        return {}
    checker = Checker(dataset.items, labels)
    length = None
    if policy is not None:
        chains = TraceChains(policy.prompts, policy.catalogue.titles, [], config.mention)

        def length(trace: Trace) -> int:
            return len(chains.ids(trace))

    def work(selection: Selection, name: str, on_miss: OnMiss) -> Synthesis:
        def bar(replies: Iterable[Reply]) -> Iterable[Reply]:
            return tqdm(replies, desc=name, total=len(selection.cases), unit="case", disable=None)

        options = {"guesses": config.guesses, "max_tokens": config.max_tokens, "length": length, "progress": bar}
        return synthesize(teacher, selection, checker, statistics, on_miss=on_miss, **options)  # type: ignore[arg-type]

    # Validation chains are not chosen by their targets, or they would leak in a way that no chain of the model can.
    parts = {"train": work(train, "train", config.on_miss), "valid": work(valid, "valid", "keep")}
    if config.filter_model is not None:
        from reasonrec.recipes.evaluation.likelihood_gain import ChainGain
        from reasonrec.recipes.recommender import Recommender

        model = Recommender.from_pretrained(
            config.filter_model, dtype=config.precision, trust_remote_code=config.trust_remote_code
        )
        gain = ChainGain(model, config.mention)
        kept = parts["train"].traces
        for trace, value in zip(kept, gain(kept), strict=True):
            trace.gain, trace.filtered = value, value > 0
    for name, part in parts.items():
        to_frame(part.traces).write_parquet(folder / f"{name}.parquet", compression="zstd")
    popularity = dataset.items["train_count"].to_numpy()
    filtered = [trace.filtered for trace in parts["train"].traces if trace.filtered is not None]
    filtered_by = own_name(config.filter_model or "")
    report = {
        "teacher": {"name": own_name(teacher.name), "kind": config.teacher, "hindsight": teacher.hindsight},
        "labels": {"field": labels.field, "number": len(labels.names), "times": statistics.has_times},
        **{name: part.counts() for name, part in parts.items()},
        "on_miss": config.on_miss,
        "easy_rows": easy_rows(parts["train"].verified, popularity),
        "filter": {"model": filtered_by, "passed": sum(filtered), "of": len(filtered)} if filtered else None,
        "leak": leak_test(dataset, parts["valid"].traces),
    }
    write_json(folder / "report.json", report)
    return report


def describe(report: dict[str, Any]) -> str:
    """What a person looks at first."""
    from reasonrec.recipes.evaluation.leak import describe_leak

    lines = []
    for name in ("train", "valid"):
        part = report[name]
        lost = {**part["no_reply"], **part["rejected"]}
        lines.append(f"  {name:<8} {part['kept']:,} of {part['cases']:,} traces kept; lost: {lost or 'none'}")
        lines.append(f"  {'':<8} formulation: {part['formulation']}; tokens: {part['chain_tokens']}")
    lines += [f"  rows whose formulation is {k:<6} {v}" for k, v in report["easy_rows"].items()]
    return "\n".join([*lines, describe_leak(report["leak"])])


@releasing_outputs()
def main() -> None:
    """Run the stage."""
    (config,) = parse([SynthesizeConfig])
    if is_idle(config.teacher):
        return
    out = claim_output(config.output_dir, overwrite=config.overwrite)
    start = time.perf_counter()
    dataset = Dataset.load(config.dataset)
    inputs = {"dataset": dataset.manifest.hash}
    policy = None
    if config.index is not None and config.model is not None:
        from reasonrec.recipes.models.checkpoint import Setting
        from reasonrec.recipes.policies.base import build_policy

        index = ItemIndex.load(config.index)
        setting = Setting(config.model, "lora", "{history}", chat=False, system=None, max_history=config.max_history)
        policy = build_policy(dataset.catalogue(index), setting, trust_remote_code=config.trust_remote_code)
    if config.filter_model is not None:
        from reasonrec.recipes.models.checkpoint import OTHER

        filter_model = read_manifest(config.filter_model)
        check_input(filter_model, "dataset", dataset.manifest, OTHER)
        inputs["filter_model"] = filter_model.hash
    about = {"kind": "traces", "config": recorded(config, out), "seed": config.seed, "inputs": inputs}
    if adopted(config.teacher, out, overwrite=config.overwrite, **about):
        return
    if not is_first_process():
        build(config, dataset, policy, None)
        return
    with staged(out, overwrite=config.overwrite, **about) as (folder, facts):
        report = build(config, dataset, policy, folder)
        facts.update(teacher=report["teacher"], max_history=config.max_history)
        facts.update(filter_model=None if config.filter_model is None else own_name(config.filter_model))
        facts.update(n_train=report["train"]["kept"], n_valid=report["valid"]["kept"])
    say(f"{describe(report)}\n{out} written in {time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    run(main)()
