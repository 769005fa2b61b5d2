"""Amazon Reviews of 2014, 2018 and 2023: one category's reviews and products.

Sources: https://cseweb.ucsd.edu/~jmcauley/datasets/amazon/links.html (2014, McAuley et al. 2015),
https://nijianmo.github.io/amazon/ (2018, Ni et al. 2019), https://amazon-reviews-2023.github.io (Hou et al. 2024).
The products of 2014 are written as Python literals, which are parsed and never run.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl

from reasonrec.data_gen.clean import join_listed
from reasonrec.data_gen.interaction_log import InteractionLog
from reasonrec.data_gen.readers.base import MIN_RATING, READERS
from reasonrec.data_gen.readers.line_files import LineFile, Row, number, words
from reasonrec.data_gen.readers.line_reader import RecordReader
from reasonrec.tokenizers.errors import UserError
from reasonrec.tokenizers.registry import nearest

TERMS = (
    "Amazon Reviews, collected by McAuley's group for research; its pages grant no licence of the texts; cite the "
    "paper of the version"
)
# Where the Hub's copy of 2023 keeps its files.
_PLACES = (".", "raw/meta_categories", "raw/review_categories")
_META = re.compile(r"meta_(?P<category>.+)\.(?P<form>jsonl?)(?:\.gz)?")
_OLD = ("reviewerID", "asin", "overall", "unixReviewTime", "reviewText")
_NEW = ("user_id", "parent_asin", "rating", "timestamp", "text")
_NUMBER = r"\$?\s?(\d[\d,]*(?:\.\d+)?)"
_PRICE = re.compile(rf"{_NUMBER}(?:\s*-\s*{_NUMBER})?")
_MAX_CATEGORY = 60  # characters; what is longer is a sentence or a piece of a page that was scraped into the list
_SCRIPT = "getTime("  # of a page's script, which stands in the place of some titles of 2018


def find_files(path: str, category: str | None) -> tuple[str, Path, Path]:
    """Find the category, its reviews and its products.

    Args:
        path: The folder, or that of a download from the Hub.
        category: Its name as in the files' names; may be None if there is only one.

    Raises:
        UserError: If there is no such category, or several to choose from.
    """
    files = {file.name: file for place in _PLACES for file in sorted((Path(path) / place).glob("*.json*"))}
    metas = {
        found["category"]: (found["form"], file) for name, file in files.items() if (found := _META.fullmatch(name))
    }
    if not metas:
        raise UserError(
            f"path={path} has no products: put meta_<category>.json.gz (or .jsonl.gz) there, and its reviews"
        )
    if category is None and len(metas) > 1:
        raise UserError(
            f"path={path} holds {len(metas)} categories: set category to one of {', '.join(sorted(metas))}"
        )
    chosen = category or next(iter(metas))
    if chosen not in metas:
        raise UserError(f"category={chosen!r} has no file meta_{chosen}.* in path={path}{nearest(chosen, metas)}")
    form, meta = metas[chosen]
    names = [f"{chosen}.jsonl"]
    if form == "json":
        names = [f"{start}{chosen}{core}.json" for start in ("reviews_", "") for core in ("_5", "")]
    reviews = [files[full] for name in names for full in (name, f"{name}.gz") if full in files]
    if len(reviews) != 1:
        held = " and ".join(file.name for file in reviews) or "none"
        raise UserError(f"path={path} has to hold one file of reviews, {' or '.join(names)} (or .gz); it holds {held}")
    return chosen, reviews[0], meta


def _review(names: tuple[str, ...]) -> Row:
    user, item, rating, time, text = names

    def row(record: Mapping[str, Any]) -> tuple[Any, ...]:
        who, what = words(record[user]), words(record[item])
        return who, what, number(record[rating]), number(record[time]), words(record.get(text))

    return row


def _product(name: str, chosen: Collection[str], with_price: bool) -> Row:
    """Texts of a product that somebody reviewed."""

    def row(record: Mapping[str, Any]) -> tuple[Any, ...] | None:
        item = words(record[name])
        if item not in chosen:
            return None
        title = words(record.get("title")) or ""
        description = join_listed(record.get("description"), " ") or join_listed(
            record.get("features") or record.get("feature"), " "
        )
        if with_price and (price := price_of(record.get("price"))):
            description = f"Price: {price}. {description}"
        brand = join_listed(record.get("brand") or record.get("store"), ", ")
        texts = ("" if _SCRIPT in title else title, description, category_of(record), re.sub(r"^by\s+", "", brand))
        return item, *map(words, texts)

    return row


def category_of(record: Mapping[str, Any]) -> str:
    """The path of categories, the first if there are several, without what a page left among them.

    Example:
        >>> category_of({"categories": [["Toys", "Puzzles"], ["Gifts"]]}), category_of({"category": ["Toys", "Toys"]})
        ('Toys, Puzzles', 'Toys')
    """
    found = record.get("categories") or record.get("category") or record.get("main_category")
    if not isinstance(found, list):
        return join_listed(found, ", ")
    path = found[0] if isinstance(found[0], list) else found
    kept = [word.strip() for word in path if isinstance(word, str) and len(word) <= _MAX_CATEGORY and "<" not in word]
    return ", ".join(dict.fromkeys(word for word in kept if word))


def price_of(value: object) -> str:
    """A price, or a range of prices, in dollars; empty for anything else.

    Example:
        >>> price_of(7.5), price_of("$1,007.50"), price_of("$5 - $9"), price_of(".a-box-inner{background-color:#fff}")
        ('$7.50', '$1007.50', '$5.00 to $9.00', '')
    """
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return ""
    found = _PRICE.fullmatch(str(value).strip())
    ends = [f"${float(end.replace(',', '')):.2f}" for end in found.groups() if end] if found else []
    return " to ".join(ends)


@dataclass(frozen=True)
class AmazonReader(RecordReader):
    """One category of Amazon Reviews."""

    category: str | None = field(
        default=None, metadata={"help": "category, as in the files' names; may be unset if there is only one"}
    )
    min_rating: float | None = field(default=None, metadata=MIN_RATING)
    with_prices: bool = field(default=False, metadata={"help": "begin descriptions with the price"})

    def read_log(self) -> InteractionLog:
        """Read reviews, and the products among them; several of one day (2014, 2018) have no order."""
        category, reviews, meta = find_files(self.path or "", self.category)
        new = ".jsonl" in meta.suffixes
        names = _NEW if new else _OLD
        schema = {"user_id": pl.String, "item_id": pl.String, "rating": pl.Float64, "timestamp": pl.Float64}
        return self.read_records(
            f"Amazon, {category}",
            LineFile(reviews, "interactions", self.max_bad_lines),
            _review(names),
            schema,
            LineFile(meta, "items", self.max_bad_lines),
            lambda chosen: _product(names[1], chosen, self.with_prices),
            terms=TERMS,
            min_rating=self.min_rating,
            literal=not new,
        )


READERS.add("amazon", AmazonReader, __name__)
