"""Text files of numbers as sequential recommenders publish them, with a table of what the items are called.

SASRec's have one `user item` a line, in the order of time (https://github.com/kang205/SASRec); S3-Rec's have one
user a line, `user item item ...` (https://github.com/RUCAIBox/CIKM2020-S3Rec).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import polars as pl

from reasonrec.data_gen.interaction_log import InteractionLog
from reasonrec.data_gen.readers.base import (
    COLUMNS,
    DESCRIPTION_LENGTH,
    ITEM_TABLE,
    MAX_BAD_LINES,
    READERS,
    LogReader,
)
from reasonrec.data_gen.readers.csv_reader import LINE
from reasonrec.data_gen.readers.lcrec import order_only
from reasonrec.data_gen.readers.line_files import LineFile
from reasonrec.data_gen.readers.tables import read_items
from reasonrec.tokenizers.errors import UserError


def read_sequences(file: LineFile) -> pl.DataFrame:
    """Interactions in their order: `user_id`, `item_id`, and `timestamp`, which counts them.

    Where most lines have two words, each is one interaction; where every line has its own user, each is a sequence.

    Raises:
        UserError: If the file is neither.
    """
    blocks = [pl.DataFrame(schema={LINE: pl.Int64, "words": pl.List(pl.String)})]
    for block in file.lines():
        split = block["text"].str.strip_chars().str.replace_all(r"\s+", " ").str.split(" ").alias("words")
        blocks.append(block.select(LINE).with_columns(split))
    lines = pl.concat(blocks)
    count = lines["words"].list.len()
    if 2 * (count == 2).sum() > lines.height and lines["words"].list.first().n_unique() < lines.height:
        lines = file.refuse(lines, count != 2, "not two words, a user and an item")
    else:
        lines = file.refuse(lines, count < 2, "no item behind the user")
        users = lines["words"].list.first()
        again = users.is_duplicated()
        if again.any():
            at = again.arg_max() or 0
            raise UserError(
                f"{file.path}: line {lines[LINE][at]} is longer than `user item` and not the only one of user "
                f"{users[at]!r}: the file has to hold `user item` in every line, or one line a user"
            )
    pairs = lines.select(user_id=pl.col("words").list.first(), item_id=pl.col("words").list.slice(1))
    return pairs.explode("item_id").with_row_index("timestamp").cast({"timestamp": pl.Int64})


@dataclass(frozen=True)
class SequenceTextReader(LogReader):
    """A text file of sequences, and a table of items.

    Raises:
        UserError: If a file is not named, or a split by time is asked for.
    """

    sequences: str | None = field(
        default=None, metadata={"help": "text file: `user item` a line, or `user item item ...`", "path": "name"}
    )
    items: str | None = field(default=None, metadata=ITEM_TABLE)
    item_columns: dict[str, str] = field(default_factory=dict, metadata=COLUMNS)
    max_description_chars: int = field(default=2000, metadata=DESCRIPTION_LENGTH)
    max_bad_lines: float = field(default=0.001, metadata=MAX_BAD_LINES)

    def __post_init__(self) -> None:
        """Refuse what cannot be read."""
        if not (self.sequences and self.items):
            raise UserError(
                "source: sequence_text needs `sequences` (the text file) and `items`, a table with item_id and title: "
                "a language model reads what items are called, and the text file has numbers only"
            )
        order_only(self.split, "sequence_text")
        super().__post_init__()

    def read_log(self) -> InteractionLog:
        """Read both files."""
        place, table = Path(self.sequences or ""), Path(self.items or "")
        file = LineFile(place, "interactions", self.max_bad_lines)
        log = read_sequences(file)
        items, items_read = read_items(
            table, columns=self.item_columns, max_description_chars=self.max_description_chars
        )
        return InteractionLog(
            place.stem,
            log.select("user_id", "item_id", "timestamp"),
            items,
            str(table),
            files={"interactions": place, "items": table},
            read=[file.finish(file.rows - file.bad), items_read],
        )


READERS.add("sequence_text", SequenceTextReader, __name__)
