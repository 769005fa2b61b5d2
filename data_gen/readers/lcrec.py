"""Pairs of JSON files as LC-Rec and others publish them: what each user had, in order, and what items are called.

`NAME.inter.json` holds `{"user": [item, ...]}`, `NAME.item.json` holds `{"item": {"title": ..., "description": ...}}`.
Source: https://github.com/RUCAIBox/LC-Rec (Zheng et al. 2024, arXiv 2311.09049).
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl

from reasonrec.data_gen.clean import clean_items, join_listed
from reasonrec.data_gen.interaction_log import InteractionLog
from reasonrec.data_gen.readers.base import DESCRIPTION_LENGTH, FOLDER, READERS, LogReader
from reasonrec.data_gen.readers.line_files import words
from reasonrec.data_gen.readers.line_reader import only_file
from reasonrec.tokenizers.errors import UserError
from reasonrec.tokenizers.terminal import shown

# Our names, and what the files of several authors call them.
TEXTS = {
    "title": ("title", "name"),
    "description": ("description",),
    "category": ("categories", "category"),
    "brand": ("brand", "store"),
}


def order_only(split: str, source: str) -> None:
    """Refuse a split by time where only the order in which things happened is known.

    Raises:
        UserError: If that is asked for.
    """
    if split == "time":
        raise UserError(f"split: time needs times, and source: {source} has an order only; use split: leave_one_out")


def read_object(file: Path) -> dict[str, Any]:
    """A file that is one JSON object.

    Raises:
        UserError: If it is anything else.
    """
    try:
        found = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file} cannot be read as JSON: {error}; is the file complete?") from error
    if not isinstance(found, dict) or not found:
        raise UserError(f"{file} has to hold one JSON object with something in it, not {shown(found)}")
    return found


def read_sequences(file: Path) -> pl.DataFrame:
    """Interactions in the order of the lists: `user_id`, `item_id` and `timestamp`, the place in the list.

    Raises:
        UserError: If something is no list of ids.
    """
    rows: list[tuple[str, str, int]] = []
    for user, sequence in read_object(file).items():
        if not isinstance(sequence, list):
            raise UserError(f"{file}: user {shown(user)} has {shown(sequence)} where a list of items should stand")
        for place, item in enumerate(sequence):
            try:
                name = (words(item) or "").strip()
            except ValueError:
                name = ""
            if not name:
                raise UserError(f"{file}: user {shown(user)} has {shown(item)} where the id of an item should stand")
            rows.append((user.strip(), name, place))
    return pl.DataFrame(rows, schema={"user_id": pl.String, "item_id": pl.String, "timestamp": pl.Int64}, orient="row")


def read_texts(file: Path) -> pl.DataFrame:
    """Texts of the items, not cleaned.

    Raises:
        UserError: If an item is no object of texts.
    """
    rows = []
    for item, about in read_object(file).items():
        if not isinstance(about, dict):
            raise UserError(f"{file}: item {shown(item)} is {shown(about)} where its texts should stand in braces")
        found = {ours: next((about[name] for name in names if about.get(name)), None) for ours, names in TEXTS.items()}
        listed = {ours: join_listed(value, " " if ours == "description" else ", ") for ours, value in found.items()}
        rows.append({"item_id": item.strip(), **{ours: words(text) for ours, text in listed.items()}})
    return pl.DataFrame(rows, schema=dict.fromkeys(("item_id", *TEXTS), pl.String))


@dataclass(frozen=True)
class LcRecReader(LogReader):
    """Lists of items by user, and texts by item.

    Raises:
        UserError: If its folder is not named, or a split by time is asked for.
    """

    path: str | None = field(default=None, metadata=FOLDER)
    max_description_chars: int = field(default=2000, metadata=DESCRIPTION_LENGTH)

    def __post_init__(self) -> None:
        """Refuse what cannot be read."""
        if not self.path:
            raise UserError("source: lcrec needs `path`, the folder with NAME.inter.json and NAME.item.json")
        order_only(self.split, "lcrec")
        super().__post_init__()

    def read_log(self) -> InteractionLog:
        """Read both files."""
        sequences, texts = (only_file(self.path or "", end) for end in (".inter.json", ".item.json"))
        return InteractionLog(
            sequences.name.removesuffix(".inter.json"),
            read_sequences(sequences),
            clean_items(read_texts(texts), self.max_description_chars),
            texts.name,
            files={"interactions": sequences, "items": texts},
        )


READERS.add("lcrec", LcRecReader, __name__)
