"""Fuse title, description and train reviews of every item into one description: an extract, or an LLM's words.

accelerate launch recipes/describe.py --dataset runs/my/dataset --output_dir runs/my/described

Replies of an LLM are kept beside the output folder as they arrive; the same command goes on where it was stopped.
"""

from __future__ import annotations

import time
import warnings
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import polars as pl

from reasonrec.data_gen.descriptions import Describer, Extractor, describe_items, item_texts
from reasonrec.data_gen.reasoning.traces import Reply
from reasonrec.data_gen.schema import Dataset, Tables, write_dataset
from reasonrec.recipes.args import parse, run
from reasonrec.recipes.keys import MAX_SEED, recorded
from reasonrec.recipes.teachers import AskingConfig, adopted, build_llm, is_idle
from reasonrec.tokenizers.artefact import staged
from reasonrec.tokenizers.environment import is_first_process
from reasonrec.tokenizers.errors import UserError
from reasonrec.tokenizers.output import claim_output, releasing_outputs
from reasonrec.tokenizers.places import own_name
from reasonrec.tokenizers.terminal import say


@dataclass
class DescribeConfig(AskingConfig):
    """Configuration of the describe stage.

    Raises:
        UserError: If values contradict each other.
    """

    teacher: Literal["extract", "endpoint", "local"] = field(
        default="extract",
        metadata={"help": "chosen sentences, or words of an LLM: an OpenAI-compatible endpoint, or a model run here"},
    )
    max_description_chars: int = field(default=500, metadata={"help": "longest new description", "at_least": 1})
    max_reviews: int = field(
        default=8,
        metadata={"help": "reviews read of an item; drawn where there are more", "at_least": 1, "at_most": 50},
    )
    seed: int = field(default=0, metadata={"help": "draws the reviews", "at_least": 0, "at_most": MAX_SEED})

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.teacher == "extract") == bool(self.teacher_model):
            raise UserError(
                f"teacher={self.teacher} with teacher_model={self.teacher_model}: set both (teacher: endpoint or "
                "local, and the model's name), or neither"
            )


def build(config: DescribeConfig, dataset: Dataset, folder: Path | None) -> dict[str, Any]:
    """Write the dataset with its new descriptions; its facts come back.

    Args:
        config: Configuration of the stage.
        dataset: Whose items they are.
        folder: Where to; None for a process that only helps the LLM write.
    """
    from tqdm import tqdm

    texts = item_texts(dataset, config.max_reviews, config.seed)
    asked = [text for text in texts if text.reviews]
    if not asked:
        warnings.warn(
            f"{config.dataset} holds no train reviews (prepare keeps them with interaction_columns: {{review: …}} or "
            "--with_reviews): descriptions only get shorter",
            stacklevel=2,
        )
    name = "extract"
    replies: Iterable[Reply] = ()
    if config.teacher != "extract" and asked:
        teacher = build_llm(config, config.teacher, Describer(config.max_description_chars))
        name = own_name(teacher.name)
        replies = tqdm(
            teacher.write(asked), desc="describe", total=len(asked), unit="item", disable=None if folder else True
        )
    if folder is None:
        deque(replies, maxlen=0)
        return {}
    extract = Extractor(texts, config.max_description_chars)
    descriptions, counts = describe_items(texts, extract, replies)
    facts = {**dataset.facts, "descriptions": {"teacher": name, **counts}}
    note = f"descriptions: {name}, from title, description and the train reviews of {len(asked):,} items"
    facts["notes"] = [*facts["notes"], note]
    if counts["quoted"]:  # what users wrote is not the owner's of the catalogue to give away
        terms = [dataset.facts.get("terms"), "descriptions quote what users wrote in reviews"]
        facts |= {"redistributable": False, "terms": "; ".join(filter(None, terms))}
    items = dataset.items.with_columns(pl.Series("description", descriptions, dtype=pl.String)).drop("train_count")
    return write_dataset(folder, Tables(items, dataset.users, dataset.train, dataset.valid, dataset.test, facts))


def summary(counts: dict[str, Any]) -> str:
    """What a person looks at first."""
    lines = [
        f"  {counts['with_reviews']:,} of {counts['items']:,} items have train reviews; the others keep their "
        f"descriptions, {counts['empty']:,} of all are empty",
        f"  {counts['written']:,} written by {counts['teacher']}, {counts['quoted']:,} extracted",
    ]
    return "\n".join([*lines, f"  replies of no use: {counts['problems']}"] if counts["problems"] else lines)


@releasing_outputs()
def main() -> None:
    """Run the stage."""
    (config,) = parse([DescribeConfig])
    if is_idle(config.teacher):
        return
    out = claim_output(config.output_dir, overwrite=config.overwrite)
    start = time.perf_counter()
    dataset = Dataset.load(config.dataset)
    inputs = {"dataset": dataset.manifest.hash}
    about = {"kind": "dataset", "config": recorded(config, out), "seed": config.seed, "inputs": inputs}
    if adopted(config.teacher, out, overwrite=config.overwrite, **about):
        return
    if not is_first_process():
        build(config, dataset, None)
        return
    with staged(out, overwrite=config.overwrite, **about) as (folder, facts):
        facts.update(build(config, dataset, folder))
    say(f"{summary(facts['descriptions'])}\n{out} written in {time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    run(main)()
