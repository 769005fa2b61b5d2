"""Recommend items for one history.

accelerate launch recipes/recommend.py --model runs/demo/sft --history "50,181,172"
accelerate launch recipes/recommend.py --model runs/demo/judged --history "50,181,172" --mode reasoning
accelerate launch recipes/recommend.py --model runs/demo/sft --user 196

`--history` takes raw item ids, oldest first. `--user` takes a user of the model's dataset (their raw id) with all that
is known of them; only that opens the dataset.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Literal

import polars as pl

from reasonrec.data_gen.histories import UserHistory
from reasonrec.data_gen.schema import Dataset
from reasonrec.recipes.args import parse, run
from reasonrec.recipes.loaded_model import AskedModel
from reasonrec.tokenizers.artefact import read_manifest
from reasonrec.tokenizers.catalogue import Catalogue
from reasonrec.tokenizers.environment import is_first_process
from reasonrec.tokenizers.errors import UserError
from reasonrec.tokenizers.terminal import say, visible


@dataclass
class RecommendConfig(AskedModel):
    """Configuration of one recommendation."""

    user: str | None = field(default=None, metadata={"help": "raw id of a user of the data set"})
    history: str | None = field(default=None, metadata={"help": "raw item ids, oldest first, joined by commas"})
    k: int = field(default=10, metadata={"help": "items to recommend", "at_least": 1})
    num_beams: int = field(default=50, metadata={"help": "width of the item search", "at_least": 1})
    exhaustive: bool = field(
        default=False, metadata={"help": "score the whole catalogue instead of searching it; for small ones"}
    )
    mode: Literal["direct", "reasoning"] = field(
        default="direct", metadata={"help": "items at once, or behind chains of thought"}
    )
    chains: int = field(
        default=1, metadata={"help": "chains in reasoning mode: one greedy, or several sampled", "at_least": 1}
    )
    max_chain: int = field(default=128, metadata={"help": "longest chain in tokens", "at_least": 1})
    unproven: bool = field(
        default=False,
        metadata={"help": "in reasoning mode: think even where it was not shown to help (judge_reasoning.py)"},
    )
    strict: bool = field(
        default=False, metadata={"help": "refuse unknown items and an empty history instead of warning about them"}
    )
    repeats: bool | None = field(
        default=None,
        metadata={"help": "may items of the history be recommended? As the data set says if unset"},
    )
    dataset: str | None = field(
        default=None, metadata={"help": "where user is looked up: the model's dataset, if it moved", "path": True}
    )

    def __post_init__(self) -> None:
        if (self.user is None) == (self.history is None):
            raise UserError("give either --user or --history")
        if self.mode == "reasoning" and self.exhaustive:  # before anything is loaded
            raise UserError("exhaustive is for mode=direct; with chains, raise num_beams instead")


def known_history(dataset: Dataset, user_id: str) -> UserHistory:
    """All that is known of a user.

    Raises:
        UserError: If there is no such user.
    """
    match = dataset.users.filter(pl.col("user_id") == user_id)
    if match.height == 0:
        some = ", ".join(dataset.users["user_id"].head(5).to_list())
        raise UserError(f"--user {user_id}: no such user in {dataset.path}; some are {some}")
    return UserHistory.of_user(dataset, match["user"][0])


def given_history(catalogue: Catalogue, text: str, *, strict: bool) -> list[int]:
    """Item numbers of raw item ids; those that are not in the catalogue are skipped with a warning.

    Args:
        catalogue: The items.
        text: Raw ids, joined by commas.
        strict: Refuse unknown ids instead.

    Raises:
        UserError: If an item is not in the catalogue, in strict mode.
    """
    numbers = {item_id: number for number, item_id in enumerate(catalogue.item_ids)}
    words = [word.strip() for word in text.split(",") if word.strip()]
    unknown = [word for word in words if word not in numbers]
    if unknown:
        some = ", ".join(catalogue.item_ids[:5])
        message = (
            f"--history: item {unknown[0]} is not in the catalogue of {catalogue.name} ({len(unknown)} of "
            f"{len(words)} items are unknown); some ids are {some}"
        )
        if strict:
            raise UserError(message)
        warnings.warn(f"{message}; they are skipped", stacklevel=2)
    return [numbers[word] for word in words if word in numbers]


def main() -> None:
    """Parse, load, recommend, print."""
    (config,) = parse([RecommendConfig])

    # PyTorch and what is built on it take seconds to import; by now it is known that they are needed.
    from reasonrec.recipes.models.checkpoint import training_data
    from reasonrec.recipes.recommending.answered import answer

    if not is_first_process():
        return
    recommender = config.recommender()
    folder = recommender.path
    assert folder is not None  # it was loaded
    catalogue = recommender.policy.catalogue
    if config.user is not None:
        history = known_history(training_data(read_manifest(folder), folder, config.dataset), config.user)
    else:
        history = UserHistory.of(given_history(catalogue, config.history or "", strict=config.strict))
    found = answer(
        recommender,
        [history],
        k=config.k,
        mode=config.mode,
        num_beams=config.num_beams,
        exhaustive=config.exhaustive,
        repeats=config.repeats,
        strict=config.strict,
        chains=config.chains,
        max_chain=config.max_chain,
        unproven=config.unproven,
    )
    if found.note:
        say(f"{found.note}; --unproven true thinks all the same")
    if recommender.pool is not None and not found.thoughts:
        say(f"pooled with {', '.join(recommender.pool.experts)}")
    say(f"\nhistory ({len(history.shown)} items, the last {min(len(history.shown), 5)}):")
    for item in history.shown[-5:]:
        say(f"    {visible(catalogue.titles[item])}")
    for thought in found.thoughts[0] if found.thoughts else ():
        say(f"thought: {visible(' '.join(thought.split()))}")
    say(f"recommended ({'nothing seen before' if recommender.masks(config.repeats) else 'repeats allowed'}):")
    for rank, item in enumerate(found.lists(catalogue)[0], start=1):
        title, item_id = visible(item.title), visible(item.id, 60)
        say(f"{rank:>4}  {title:<60.60}  id {item_id:<12} log-prob {item.score:.2f}")


if __name__ == "__main__":
    run(main)()
