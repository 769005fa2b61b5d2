"""Turn raw interactions into a dataset: read, clean, filter, split.

accelerate launch recipes/prepare.py --config recipes/configs/demo/prepare.yaml
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from reasonrec.data_gen.filters import Duplicates
from reasonrec.data_gen.interaction_log import LogOptions, Split, build_tables
from reasonrec.data_gen.readers.complete_journey import read_complete_journey
from reasonrec.data_gen.readers.minionerec import read_industrial
from reasonrec.data_gen.readers.movielens import read_movielens_100k
from reasonrec.data_gen.readers.synthetic import WorldConfig, make_synthetic
from reasonrec.data_gen.readers.tables import read_tables
from reasonrec.data_gen.schema import Tables, describe, write_dataset
from reasonrec.recipes.args import parse, run
from reasonrec.recipes.keys import MAX_SEED, recorded
from reasonrec.tokenizers.artefact import file_hash, staged
from reasonrec.tokenizers.errors import UserError
from reasonrec.tokenizers.output import claim_output, releasing_outputs
from reasonrec.tokenizers.terminal import say

Source = Literal["tables", "movielens_100k", "complete_journey", "industrial", "synthetic"]

# Which keys each source reads; another one that is set is a mistake, not a default.
_LOG_KEYS = "seed user_k item_k duplicates split split_ratios valid_from test_from mask_history max_history"
_TABLE_KEYS = (
    "name interactions items interaction_columns item_columns separator quote_char min_rating "
    "drop_items_without_text max_description_chars"
)
_READS: dict[str, set[str]] = {
    "tables": {*_LOG_KEYS.split(), *_TABLE_KEYS.split()},
    "movielens_100k": {"path", *_LOG_KEYS.split()},
    "complete_journey": {"seed", "path", "earlier_types"},
    "industrial": {"path", "max_description_chars"},
    "synthetic": {"seed", "train_users", "held_out_users", "exposure_bias"},
}


def _help(text: str, **rules: Any) -> dict[str, Any]:
    return {"help": text, **rules}


@dataclass
class PrepareConfig:
    """Configuration of the prepare stage.

    Raises:
        UserError: If values contradict each other, or a key is set that the source does not read.
    """

    source: Source = field(metadata=_help("which reader: your own tables, a public data set, or the synthetic world"))
    output_dir: str = field(metadata=_help("folder of the dataset", path="name"))
    name: str = field(default="my data", metadata=_help("name in tables and reports"))
    path: str | None = field(
        default=None, metadata=_help("folder of a public data set; the installed package if unset", path="name")
    )
    interactions: str | None = field(
        default=None, metadata=_help("CSV or Parquet: user_id, item_id, timestamp (+ rating, review)", path="name")
    )
    items: str | None = field(
        default=None, metadata=_help("CSV or Parquet: item_id, title (+ description, category, brand)", path="name")
    )
    interaction_columns: dict[str, str] = field(
        default_factory=dict, metadata=_help("YAML only; our name: the file's name")
    )
    item_columns: dict[str, str] = field(default_factory=dict, metadata=_help("YAML only; our name: the file's name"))
    separator: str | None = field(
        default=None,
        metadata=_help("separator of CSV files, one or more characters; .tsv: tab, else comma, if unset"),
    )
    quote_char: str | None = field(
        default=None, metadata=_help("quote of CSV files, '' if they do not quote; a double quote if unset")
    )
    min_rating: float | None = field(default=None, metadata=_help("keep interactions rated at least this"))
    drop_items_without_text: bool = field(default=False, metadata=_help("leave out interactions with untitled items"))
    max_description_chars: int = field(default=2000, metadata=_help("cut longer descriptions", at_least=0))
    user_k: int = field(default=1, metadata=_help("fewest interactions of a user", at_least=1))
    item_k: int = field(default=1, metadata=_help("fewest interactions of an item", at_least=1))
    duplicates: Duplicates = field(
        default="keep_first", metadata=_help("repeated interactions of one user with one item")
    )
    split: Split = field(default="leave_one_out", metadata=_help("how to hold out"))
    split_ratios: list[float] | None = field(
        default=None, metadata=_help("train, validation, test of a time split", at_least=0, at_most=1)
    )
    valid_from: str | None = field(default=None, metadata=_help("ISO date (UTC) at which validation starts"))
    test_from: str | None = field(default=None, metadata=_help("ISO date (UTC) at which the test starts"))
    mask_history: bool = field(default=False, metadata=_help("never recommend what the user had already"))
    max_history: int | None = field(
        default=None, metadata=_help("most recent items of a held-out history", at_least=1)
    )
    earlier_types: int = field(
        default=0, metadata=_help("baskets: types bought earlier, put before the context", at_least=0)
    )
    train_users: int = field(default=4000, metadata=_help("synthetic: users to train on", at_least=1))
    held_out_users: int = field(
        default=2000, metadata=_help("synthetic: users of validation, and of the test", at_least=1)
    )
    exposure_bias: float = field(
        default=0.0, metadata=_help("synthetic: share of targets that are promoted items", at_least=0, below=1)
    )
    seed: int = field(
        default=0,
        metadata=_help("orders what the data leave open; draws the synthetic world", at_least=0, at_most=MAX_SEED),
    )
    overwrite: bool = field(default=False, metadata=_help("move an existing output_dir to <output_dir>.old"))

    def __post_init__(self) -> None:
        """Refuse contradictions before anything is read."""
        for f in fields(self):
            default = f.default_factory() if f.default_factory is not MISSING else f.default
            common = f.name in ("source", "output_dir", "overwrite")
            if not common and f.name not in _READS[self.source] and getattr(self, f.name) != default:
                raise UserError(
                    f"{f.name}={getattr(self, f.name)!r} is not read with source: {self.source}; remove it "
                    f"(read are {', '.join(sorted(_READS[self.source]))})"
                )
        if self.source == "tables" and not (self.interactions and self.items):
            raise UserError("source: tables needs both `interactions` and `items` (paths of CSV or Parquet files)")
        if self.source == "industrial" and not self.path:
            raise UserError("source: industrial needs `path`, the folder of the published split")
        self.log_options()  # checks the split

    def log_options(self) -> LogOptions:
        """The part that says how a log becomes a dataset."""
        return LogOptions(**{f.name: getattr(self, f.name) for f in fields(LogOptions)})


def build(config: PrepareConfig) -> tuple[Tables, Mapping[str, Path]]:
    """Read the source and make the tables.

    Returns:
        The dataset, and the raw files it came from by role.
    """
    if config.source == "synthetic":
        world = WorldConfig(seed=config.seed)
        return make_synthetic(world, config.train_users, config.held_out_users, config.exposure_bias), {}
    if config.source == "complete_journey":
        return read_complete_journey(config.path, seed=config.seed, earlier_types=config.earlier_types)
    if config.source == "industrial":
        assert config.path is not None  # checked above; this tells the type checker
        return read_industrial(config.path, config.max_description_chars)
    if config.source == "movielens_100k":
        log = read_movielens_100k(config.path)
    else:
        assert config.interactions is not None
        assert config.items is not None
        log = read_tables(
            config.name,
            Path(config.interactions),
            Path(config.items),
            interaction_columns=config.interaction_columns,
            item_columns=config.item_columns,
            separator=config.separator,
            quote_char=config.quote_char,
            min_rating=config.min_rating,
            max_description_chars=config.max_description_chars,
        )
    return build_tables(log, config.log_options()), log.files


@releasing_outputs()
def main() -> None:
    """Run the stage."""
    (config,) = parse([PrepareConfig])
    if os.environ.get("RANK", "0") != "0":  # nothing here is training: one process does it
        return
    out = claim_output(config.output_dir, overwrite=config.overwrite)
    start = time.perf_counter()
    tables, files = build(config)
    inputs = {role: file_hash(file) for role, file in files.items()}
    about = {"config": recorded(config, out), "seed": config.seed, "inputs": inputs}
    with staged(out, kind="dataset", overwrite=config.overwrite, **about) as (folder, facts):
        facts.update(write_dataset(folder, tables))
    say(f"{describe(facts)}\n{out} written in {time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    run(main)()
