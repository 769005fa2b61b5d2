"""RecBole's atomic files: `NAME.inter` and `NAME.item`, fields between tabs behind a header that names their types.

The format: https://recbole.io/docs/user_guide/data/atomic_files.html
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import polars as pl

from reasonrec.data_gen.clean import clean_items
from reasonrec.data_gen.interaction_log import InteractionLog
from reasonrec.data_gen.listed import list_words
from reasonrec.data_gen.readers.base import COLUMNS, DESCRIPTION_LENGTH, MIN_RATING, READERS
from reasonrec.data_gen.readers.line_files import LineFile
from reasonrec.data_gen.readers.line_reader import LineReader, interactions, one_row_each, only_file
from reasonrec.data_gen.readers.table_files import map_columns
from reasonrec.data_gen.readers.tables import INTERACTION_COLUMNS, ITEM_COLUMNS
from reasonrec.tokenizers.errors import UserError

TYPES = ("token", "token_seq", "float", "float_seq")
# What RecBole's own files call a text, besides our name.
_ALSO = {
    "title": ("movie_title", "item_name", "product_name", "app_name", "name"),
    "category": ("categories", "class", "genre", "genres"),
    "brand": ("store", "artist", "publisher"),
}


def read_types(file: LineFile) -> dict[str, str]:
    """Columns of a file, and their types.

    Raises:
        UserError: If its first line does not name both.
    """
    named = [column.strip().rpartition(":") for column in file.header().split("\t")]
    if any(kind not in TYPES or not name for name, _, kind in named):
        raise UserError(
            f"{file.path}: its first line has to name columns with their types between tabs, such as user_id:token "
            "and timestamp:float; is it an atomic file?"
        )
    return {name: kind for name, _, kind in named}


def _read(file: LineFile, types: dict[str, str], mapped: dict[str, str]) -> Iterator[pl.DataFrame]:
    places = {name: place for place, name in enumerate(types)}
    return file.fields({ours: places[theirs] for ours, theirs in mapped.items()}, len(types), "\t", skip=1)


def spell_sequence(value: str | None) -> str:
    """Words of a sequence, which stand between spaces or, where they have several words, between commas.

    Example:
        >>> spell_sequence("Animation Comedy"), spell_sequence("'Toys & Games', 'Puzzles'")
        ('Animation, Comedy', 'Toys & Games, Puzzles')
    """
    text = (value or "").strip()
    if "," not in text and "'" not in text[:1]:
        return ", ".join(text.split())
    return ", ".join(list_words(f"[{text.strip('[]')}]", bare=True) or [text])


@dataclass(frozen=True)
class AtomicReader(LineReader):
    """One data set in RecBole's format."""

    max_description_chars: int = field(default=2000, metadata=DESCRIPTION_LENGTH)
    interaction_columns: dict[str, str] = field(default_factory=dict, metadata=COLUMNS)
    item_columns: dict[str, str] = field(default_factory=dict, metadata=COLUMNS)
    min_rating: float | None = field(default=None, metadata=MIN_RATING)

    def read_log(self) -> InteractionLog:
        """Read both files; nothing says that their order is one in time."""
        place = only_file(self.path or "", ".inter")
        rows = LineFile(place, "interactions", self.max_bad_lines)
        items = self.file("items", f"{place.stem}.item")
        types = read_types(rows)
        known = INTERACTION_COLUMNS | {"rating": self.min_rating is not None}
        mapped = map_columns(place, list(types), self.interaction_columns, known, "interaction_columns")
        if "review" not in self.interaction_columns:
            mapped.pop("review", None)
        log, facts, read = interactions(rows, _read(rows, types, mapped), self.min_rating)
        types = read_types(items)
        guessed = {ours: next((name for name in (ours, *also) if name in types), ours) for ours, also in _ALSO.items()}
        wanted = {ours: name for ours, name in guessed.items() if name in types} | self.item_columns
        mapped = map_columns(items.path, list(types), wanted, ITEM_COLUMNS, "item_columns")
        texts, items_read = one_row_each(items, _read(items, types, mapped))
        if types.get(mapped.get("category", "")) == "token_seq":
            texts = texts.with_columns(category=pl.Series([spell_sequence(value) for value in texts["category"]]))
        return InteractionLog(
            place.stem,
            log,
            clean_items(texts, self.max_description_chars),
            items.path.name,
            files={"interactions": place, "items": items.path},
            filters=facts,
            ordered=False,
            read=[read, items_read],
        )


READERS.add("atomic", AtomicReader, __name__)
