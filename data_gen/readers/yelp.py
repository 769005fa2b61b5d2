"""Yelp Open Dataset: reviews of local businesses (https://business.yelp.com/data/resources/open-dataset/)."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import polars as pl

from reasonrec.data_gen.interaction_log import InteractionLog
from reasonrec.data_gen.readers.base import MIN_RATING, READERS
from reasonrec.data_gen.readers.line_files import Row, number, words
from reasonrec.data_gen.readers.line_reader import RecordReader

TERMS = "Yelp Open Dataset: academic use under Yelp's Dataset Terms of Use, no redistribution"


def _review(record: Mapping[str, Any]) -> tuple[Any, ...]:
    who, what = words(record["user_id"]), words(record["business_id"])
    return who, what, number(record["stars"]), words(record["date"]), words(record.get("text"))


def _business(chosen: Collection[str]) -> Row:
    """Texts of a business that somebody reviewed; where it is stands in the place of a description."""

    def row(record: Mapping[str, Any]) -> tuple[Any, ...] | None:
        business = words(record["business_id"])
        if business not in chosen:
            return None
        where = [words(record.get(name)) for name in ("city", "state")]
        categories = record.get("categories")  # older versions have a list
        kinds = categories if isinstance(categories, list) else [categories]
        category = ", ".join(kind for kind in map(words, kinds) if kind)
        return business, words(record.get("name")), ", ".join(part for part in where if part), category, ""

    return row


@dataclass(frozen=True)
class YelpReader(RecordReader):
    """Reviews and businesses."""

    min_rating: float | None = field(default=None, metadata=MIN_RATING)

    def read_log(self) -> InteractionLog:
        """Read reviews, and the businesses among them."""
        schema = {"user_id": pl.String, "item_id": pl.String, "rating": pl.Float64, "timestamp": pl.String}
        return self.read_records(
            "Yelp",
            self.file("interactions", "yelp_academic_dataset_review.json", "review.json"),
            _review,
            schema,
            self.file("items", "yelp_academic_dataset_business.json", "business.json"),
            _business,
            terms=TERMS,
            min_rating=self.min_rating,
        )


READERS.add("yelp", YelpReader, __name__)
