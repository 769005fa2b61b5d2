"""Add new items to the catalogue of trained models, and retire old ones, without training again.

accelerate launch recipes/grow_catalogue.py --index runs/demo/index --add_items new.csv --output_dir runs/demo/grown

`recommend` and `serve` take the result as `--catalogue`, with any checkpoint that was trained on the index.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from reasonrec.data_gen.filters import check_unique_items
from reasonrec.data_gen.readers.base import COLUMNS, DESCRIPTION_LENGTH, ITEM_TABLE
from reasonrec.data_gen.schema import Dataset
from reasonrec.recipes.args import parse, run
from reasonrec.recipes.index_items import IndexConfig
from reasonrec.recipes.indexing.item_vectors import TEXT_KEYS, text_embeddings
from reasonrec.recipes.keys import PRECISION_HELP, TRUST_HELP, PrecisionName, recorded
from reasonrec.tokenizers.artefact import read_manifest, staged
from reasonrec.tokenizers.catalogue import SCHEMA, Catalogue
from reasonrec.tokenizers.environment import is_first_process
from reasonrec.tokenizers.errors import UserError
from reasonrec.tokenizers.grow import Placed, add_embeddings, grown_index, place_items
from reasonrec.tokenizers.index import (
    EMBEDDINGS_FILE,
    MADE_BY,
    QUANTIZER_FILE,
    ItemIndex,
    embedding_size,
    load_quantizer,
    load_says,
)
from reasonrec.tokenizers.manifest import Manifest
from reasonrec.tokenizers.output import claim_output, releasing_outputs
from reasonrec.tokenizers.places import located, place
from reasonrec.tokenizers.said import Said
from reasonrec.tokenizers.terminal import say, shown


@dataclass
class GrowConfig:
    """Configuration of the stage.

    Raises:
        UserError: If nothing is to change.
    """

    index: str = field(
        metadata={"help": "folder of the index (index_items.py), or of a catalogue that grew already", "path": True}
    )
    output_dir: str = field(metadata={"help": "folder of the grown catalogue", "path": "name"})
    add_items: str | None = field(default=None, metadata=ITEM_TABLE)
    retire: str | None = field(
        default=None,
        metadata={"help": "text file with raw ids, one a line: items that are recommended no more", "path": "name"},
    )
    dataset: str | None = field(
        default=None, metadata={"help": "dataset of the index; where the index found it if unset", "path": True}
    )
    item_columns: dict[str, str] = field(default_factory=dict, metadata=COLUMNS)
    separator: str | None = field(
        default=None, metadata={"help": "separator of a CSV file; .tsv: tab, else comma, if unset"}
    )
    max_description_chars: int = field(default=2000, metadata=DESCRIPTION_LENGTH)
    batch_size: int = field(default=64, metadata={"help": "texts per forward pass", "at_least": 1})
    device: str | None = field(default=None, metadata={"help": "cpu, cuda, …; found out by default"})
    precision: PrecisionName = field(default="auto", metadata={"help": PRECISION_HELP})
    trust_remote_code: bool = field(default=False, metadata={"help": TRUST_HELP})
    overwrite: bool = field(default=False, metadata={"help": "move an existing output_dir aside"})

    def __post_init__(self) -> None:
        if self.add_items is None and self.retire is None:
            raise UserError("nothing is to change: set add_items, retire, or both")


def read_parent(config: GrowConfig, parent: Manifest) -> Catalogue:
    """The catalogue that grows."""
    if parent.kind == "catalogue":
        return Catalogue.load(Path(config.index), parent.facts)
    if (where := config.dataset or parent.config.get("dataset")) is None:
        raise UserError(f"index={config.index} does not say where its dataset is: pass --dataset")
    dataset = Dataset.load(config.dataset or located(where, config.index))
    return dataset.catalogue(ItemIndex.read(Path(config.index), parent))


def new_items(config: GrowConfig, catalogue: Catalogue) -> pl.DataFrame:
    """The items of the table that are not in the catalogue yet, with the columns of `SCHEMA`."""
    from reasonrec.data_gen.readers.tables import read_items

    if config.add_items is None:
        return catalogue.items.head(0)
    table, _ = read_items(
        Path(config.add_items),
        columns=config.item_columns,
        separator=config.separator,
        max_description_chars=config.max_description_chars,
    )
    new = table.filter(~pl.col("item_id").is_in(catalogue.item_ids)).with_columns(train_count=pl.lit(0, pl.Int32))
    check_unique_items(new, config.add_items)
    if known := table.height - new.height:
        say(f"{known:,} of {table.height:,} items are in the catalogue already and stay as they are")
    return new.select(list(SCHEMA))


def retired_items(config: GrowConfig, catalogue: Catalogue) -> np.ndarray:
    """Numbers of all items that are recommended no more, those of before included."""
    if config.retire is None:
        return catalogue.retired
    path = Path(config.retire)
    try:
        words = [word for line in path.read_text(encoding="utf-8").splitlines() if (word := line.strip())]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"retire={path} cannot be read ({error}): give a text file with one raw id a line") from error
    numbers = {item_id: number for number, item_id in enumerate(catalogue.item_ids)}
    if unknown := [word for word in words if word not in numbers]:
        raise UserError(
            f"retire={path}: {len(unknown):,} of {len(words):,} ids are not in the catalogue, the first is "
            f"{shown(unknown[0])}"
        )
    return np.union1d(catalogue.retired, np.array([numbers[word] for word in words], dtype=np.int64))


def embed(config: GrowConfig, items: pl.DataFrame, made_by: dict[str, Any], says: Said | None, dim: int) -> np.ndarray:
    """float32 (items, dim), made as those of the index were."""
    how = {name: getattr(config, name) for name in ("batch_size", "device", "precision", "trust_remote_code")}
    texts = IndexConfig(dataset="", output_dir="", **{key: made_by[key] for key in TEXT_KEYS}, **how)
    vectors = text_embeddings(texts, items)
    vectors = vectors if says is None else says(vectors)
    if vectors.shape[1] != dim:
        raise UserError(
            f"index={config.index} was made by a version that did not keep what text says of company: index the items "
            "again, and train on that"
        )
    return vectors


@releasing_outputs()
def main() -> None:
    """Run the stage."""
    (config,) = parse([GrowConfig])
    if not is_first_process():  # nothing here is training: one process does it
        return
    out = claim_output(config.output_dir, overwrite=config.overwrite)
    parent = read_manifest(config.index)
    quantizer, dim = load_quantizer(config.index, parent), embedding_size(config.index)
    catalogue = read_parent(config, parent)
    items = new_items(config, catalogue)
    made_by = parent.facts.get(MADE_BY, parent.config)
    made_by = made_by | {"embedding_model": located(made_by["embedding_model"], config.index)}
    placed, vectors = Placed.nothing(catalogue.codes.depth), np.empty((0, dim), dtype=np.float32)
    if items.height:
        vectors = embed(config, items, made_by, load_says(config.index), dim)
        points, codebooks = quantizer.summands(vectors)
        placed = place_items(catalogue.codes, codebooks, points)
    grown = replace(
        catalogue,
        items=pl.concat([catalogue.items, items]),
        index=grown_index(catalogue.codes, placed.codes),
        retired=retired_items(config, catalogue),
    )
    about: dict[str, Any] = {"config": recorded(config, out), "overwrite": config.overwrite}
    about["inputs"] = {"dataset": catalogue.dataset, "parent": parent.hash}
    about["shared"] = {Path(config.index) / name: parent.files[name] for name in (QUANTIZER_FILE, EMBEDDINGS_FILE)}
    with staged(out, kind="catalogue", **about) as (folder, facts):
        facts.update(grown.save(folder), n_items=grown.n_items)
        facts[MADE_BY] = made_by | {"embedding_model": place(made_by["embedding_model"], out)}
        add_embeddings(Path(config.index), folder, vectors)
    if items.height:
        say(f"{items.height:,} items added; {placed}")
    say(f"{out} holds {grown.n_items:,} items, {len(grown.retired):,} of them retired")


if __name__ == "__main__":
    run(main)()
