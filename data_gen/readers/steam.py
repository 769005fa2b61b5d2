"""Steam's games and what players wrote of them, as McAuley's group collected them.

Source: https://cseweb.ucsd.edu/~jmcauley/datasets.html#steam_data (Kang and McAuley 2018, arXiv 1808.09781). Every
line is a Python literal, which is parsed and never run.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import polars as pl

from reasonrec.data_gen.clean import join_listed
from reasonrec.data_gen.interaction_log import InteractionLog
from reasonrec.data_gen.readers.base import READERS
from reasonrec.data_gen.readers.line_files import Row, words
from reasonrec.data_gen.readers.line_reader import RecordReader

TERMS = (
    "Steam reviews, collected by McAuley's group for research; the page grants no licence of the texts; cite Kang and "
    "McAuley (2018)"
)


def _review(record: Mapping[str, Any]) -> tuple[Any, ...]:
    # Few lines have a user_id, all have a name.
    return words(record["username"]), words(record["product_id"]), words(record["date"]), words(record.get("text"))


def _game(chosen: Collection[str]) -> Row:
    """Texts of a game that somebody reviewed; its tags are its description."""

    def row(record: Mapping[str, Any]) -> tuple[Any, ...] | None:
        game = words(record["id"])
        if game not in chosen:
            return None
        title = record.get("title") or record.get("app_name")
        tags, genres = (join_listed(record.get(name), ", ") for name in ("tags", "genres"))
        texts = title, tags, genres, record.get("developer") or record.get("publisher")
        return game, *map(words, texts)

    return row


@dataclass(frozen=True)
class SteamReader(RecordReader):
    """Reviews and games."""

    def read_log(self) -> InteractionLog:
        """Read reviews, and the games among them; several of one day have no order."""
        schema = dict.fromkeys(("user_id", "item_id", "timestamp"), pl.String)
        return self.read_records(
            "Steam",
            self.file("interactions", "steam_reviews.json"),
            _review,
            schema,
            self.file("items", "steam_games.json"),
            _game,
            terms=TERMS,
            literal=True,
        )


READERS.add("steam", SteamReader, __name__)
