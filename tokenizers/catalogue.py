"""The catalogue: everything that inference has to know about items, and no interaction.

It travels with every trained model, so that one recommends without the dataset it was trained on: raw ids, texts,
train counts, the codes where there are some, and whether a user may be recommended what they had.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from reasonrec.tokenizers.errors import UserError
from reasonrec.tokenizers.grow import check_grown
from reasonrec.tokenizers.health import first_category
from reasonrec.tokenizers.index import INDEX_FILE, ItemIndex

CATALOGUE_FILE = "catalogue.parquet"
RETIRED = "retired"  # a column, where there are some
TEXTS = ("title", "description", "category", "brand")
SCHEMA: dict[str, Any] = {"item_id": pl.String, **dict.fromkeys(TEXTS, pl.String), "train_count": pl.Int32}


@dataclass(frozen=True)
class Catalogue:
    """Items by their number, which is their row.

    Attributes:
        items: Columns of `SCHEMA`, one row per item.
        name: Name of the data set.
        mask_history: Whether a user is not recommended what they had.
        dataset: Content hash of the dataset.
        facts: What a model's card says of the dataset (users, split).
        index: The codes, for a policy that writes them.
        retired: Numbers of items that are recommended no more.
        trained: How many items a model was trained with, where others came later; None for all of them.
    """

    items: pl.DataFrame
    name: str
    mask_history: bool
    dataset: str
    facts: Mapping[str, Any] = field(default_factory=dict)
    index: ItemIndex | None = None
    retired: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    trained: int | None = None

    @property
    def n_items(self) -> int:
        """How many items there are."""
        return self.items.height

    @cached_property
    def titles(self) -> list[str]:
        """Title of each item."""
        return self.items["title"].to_list()

    @cached_property
    def item_ids(self) -> list[str]:
        """Raw id of each item."""
        return self.items["item_id"].to_list()

    @cached_property
    def categories(self) -> NDArray[np.int64]:
        """(items,) number of the first category that each item lists, from 0 on in the order of their texts.

        -1 where there is none, or where an item that came after a training has one that no item had before.
        """
        first = [first_category(text) for text in self.items["category"].to_list()]
        names = sorted({name for name in first[: self.trained or self.n_items] if name})
        number = {name: place for place, name in enumerate(names)}
        return np.array([number.get(name, -1) for name in first], dtype=np.int64)

    @property
    def codes(self) -> ItemIndex:
        """The codes.

        Raises:
            UserError: If there are none.
        """
        if self.index is None:
            raise UserError("this catalogue has no codes: index the items with recipes/index_items.py")
        return self.index

    def texts(self, *columns: str, joined: str = ". ") -> list[str]:
        """Some columns of each item as one text; what is empty is left out."""
        return [joined.join(filter(None, parts)) for parts in self.items.select(columns).iter_rows()]

    def save(self, folder: Path) -> dict[str, Any]:
        """Write the files into an artefact's (partial) folder.

        Returns:
            The rest, for the manifest's facts.
        """
        items = self.items
        if len(self.retired):
            items = items.with_columns(pl.Series(RETIRED, np.isin(np.arange(self.n_items), self.retired)))
        items.write_parquet(folder / CATALOGUE_FILE, compression="zstd")
        if self.index is not None:
            self.index.save(folder)
        facts = {"name": self.name, "mask_history": self.mask_history, "dataset": self.dataset, **self.facts}
        return {"catalogue": facts}

    @classmethod
    def load(cls, folder: Path, facts: Mapping[str, Any]) -> Catalogue:
        """Read the catalogue of a verified artefact.

        Args:
            folder: Folder of the artefact.
            facts: The facts of its manifest.

        Raises:
            UserError: If it is none that this kit writes.
        """
        about = facts.get("catalogue")
        kinds = {"name": str, "mask_history": bool, "dataset": str}
        if not isinstance(about, dict) or not all(isinstance(about.get(name), kind) for name, kind in kinds.items()):
            raise UserError(f"{folder} does not say what its catalogue is: train it again with recipes/sft.py")
        try:
            items = pl.read_parquet(folder / CATALOGUE_FILE)
        except (OSError, pl.exceptions.PolarsError) as error:
            raise UserError(f"{folder / CATALOGUE_FILE} cannot be read ({error}): train the model again") from error
        retired = np.empty(0, dtype=np.int64)
        if items.schema.get(RETIRED) == pl.Boolean:
            retired = np.flatnonzero(items[RETIRED].fill_null(value=False).to_numpy())
            items = items.drop(RETIRED)
        if items.schema != pl.Schema(SCHEMA) or items.null_count().row(0) != (0,) * len(SCHEMA):
            raise UserError(f"{folder / CATALOGUE_FILE} has other columns than this kit writes: train the model again")
        rest = {name: value for name, value in about.items() if name not in kinds}
        found = cls(items, about["name"], about["mask_history"], about["dataset"], rest, retired=retired)
        return found.with_codes(ItemIndex.read(folder)) if (folder / INDEX_FILE).is_file() else found

    def with_codes(self, index: ItemIndex) -> Catalogue:
        """The same with codes.

        Raises:
            UserError: If they are those of another number of items.
        """
        if index.n_items != self.n_items:
            raise UserError(
                f"codes of {index.n_items} items do not fit a catalogue of {self.n_items}: index them again"
            )
        return replace(self, index=index)

    def grown_to(self, later: Catalogue, what: str) -> Catalogue:
        """A later version of the same catalogue, for a model that was trained with this one.

        Args:
            later: The later version.
            what: How to call it in a message.

        Raises:
            UserError: If it is of another dataset, or an item of this one has another id or other codes there.
        """
        if later.dataset != self.dataset:
            raise UserError(
                f"{what} belongs to the dataset {later.dataset[:12]}…, the model was trained on {self.dataset[:12]}…"
            )
        check_grown(self.codes, later.codes, what)
        if later.item_ids[: self.n_items] != self.item_ids:
            raise UserError(f"{what} numbers the items in another order than the model's catalogue")
        return replace(later, facts=self.facts, trained=self.trained or self.n_items)
