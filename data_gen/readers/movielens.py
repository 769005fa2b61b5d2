"""MovieLens-100K, from the installed package `recbole` or from GroupLens' own folder.

The data are GroupLens' (research and non-commercial use, cite Harper & Konstan 2015); they are read where
they lie and never copied.
"""

from __future__ import annotations

import importlib.util
import io
import re
from dataclasses import dataclass, field
from pathlib import Path

import polars as pl

from reasonrec.data_gen.clean import clean_items
from reasonrec.data_gen.interaction_log import InteractionLog
from reasonrec.data_gen.readers.base import FOLDER, READERS, LogReader
from reasonrec.tokenizers.errors import UserError

GENRES = (
    "unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama",
    "Fantasy", "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western",
)  # fmt: skip
TERMS = (
    "GroupLens, MovieLens-100K: research and non-commercial use, no redistribution without permission; cite "
    "Harper and Konstan (2015), doi 10.1145/2827872"
)
_YEAR = re.compile(r"\s*\((\d{4})\)")
_ARTICLE = re.compile(r"^(.*), (The|A|An)$")


def package_folder(package: str) -> Path | None:
    """Folder of an installed package, which is not imported."""
    spec = importlib.util.find_spec(package)
    places = list(spec.submodule_search_locations or []) if spec else []
    return Path(places[0]) if places else None


def movie_title(title: str, year: str | None = None) -> str:
    """Write a title the way people do.

    Example:
        >>> movie_title("Cable Guy, The", "1996")
        'The Cable Guy (1996)'
    """
    found = _YEAR.search(title)
    if found and not (year and year.isdigit()):
        year = found.group(1)
    title = _ARTICLE.sub(r"\2 \1", _YEAR.sub("", title).strip())
    return f"{title} ({year})" if year and year.isdigit() else title


def read_movielens_100k(path: str | None) -> InteractionLog:
    """Read MovieLens-100K; all ratings count as positive, and stand beside the interactions.

    Its README says of u.data: "The data is randomly ordered"; so what happens in one second has no order.

    Args:
        path: GroupLens' folder with `u.data` and `u.item`, or any folder with `ml-100k.inter` and
            `ml-100k.item`; the installed package `recbole` by default.

    Raises:
        UserError: If the files are not there.
    """
    if path is not None:
        folder = Path(path)
    else:
        package = package_folder("recbole")
        if package is None:
            raise UserError(
                "MovieLens-100K is read from the package recbole, which is not installed: `pip install "
                "--no-deps recbole==1.2.1`, or set path to GroupLens' folder ml-100k (with u.data and "
                "u.item)"
            )
        folder = package / "dataset_example" / "ml-100k"
    if (folder / "u.data").is_file() and (folder / "u.item").is_file():
        files = {"interactions": folder / "u.data", "items": folder / "u.item"}
        log, items = _read_grouplens(**files)
    elif (folder / "ml-100k.inter").is_file() and (folder / "ml-100k.item").is_file():
        files = {"interactions": folder / "ml-100k.inter", "items": folder / "ml-100k.item"}
        log, items = _read_atomic(**files)
    else:
        raise UserError(f"path={folder} holds neither u.data and u.item nor ml-100k.inter and ml-100k.item")
    log = log.with_columns(timestamp=pl.col("timestamp").cast(pl.Float64).cast(pl.Int64) * 1000)
    items = clean_items(items, max_description_chars=0)
    return InteractionLog(
        "MovieLens-100K",
        log,
        items,
        files["items"].name,
        files=files,
        ordered=False,
        terms=TERMS,
        redistributable=False,
    )


def _read_grouplens(interactions: Path, items: Path) -> tuple[pl.DataFrame, pl.DataFrame]:
    names = ["user_id", "item_id", "rating", "timestamp"]
    lazy = pl.scan_csv(
        interactions, separator="\t", has_header=False, new_columns=names, infer_schema=False, quote_char=None
    )
    # GroupLens wrote the item file in Latin-1, which polars does not read.
    text = items.read_bytes().decode("latin-1").encode()
    raw = pl.read_csv(io.BytesIO(text), separator="|", has_header=False, infer_schema=False, quote_char=None)
    genres = [
        ", ".join(genre for genre, flag in zip(GENRES, flags, strict=False) if flag == "1")
        for flags in raw.select(raw.columns[5 : 5 + len(GENRES)]).iter_rows()
    ]
    # By position: what polars calls the columns of a file without header has changed before.
    ids, titles = raw.get_column(raw.columns[0]), raw.get_column(raw.columns[1])
    table = pl.DataFrame({"item_id": ids, "title": [movie_title(title or "") for title in titles], "category": genres})
    log = lazy.select("user_id", "item_id", "timestamp", pl.col("rating").cast(pl.Float64))
    return log.collect(), table


def _read_atomic(interactions: Path, items: Path) -> tuple[pl.DataFrame, pl.DataFrame]:
    lazy = pl.scan_csv(interactions, separator="\t", infer_schema=False, quote_char=None)
    log = lazy.select(
        user_id="user_id:token",
        item_id="item_id:token",
        timestamp=pl.col("timestamp:float"),
        rating=pl.col("rating:float").cast(pl.Float64),
    ).collect()
    raw = pl.read_csv(items, separator="\t", infer_schema=False, quote_char=None).fill_null("")
    titles = [movie_title(t, y) for t, y in raw.select("movie_title:token_seq", "release_year:token").iter_rows()]
    genres = raw["class:token_seq"].str.replace_all(" ", ", ", literal=True)
    return log, pl.DataFrame({"item_id": raw["item_id:token"], "title": titles, "category": genres})


@dataclass(frozen=True)
class MovieLensReader(LogReader):
    """MovieLens-100K."""

    path: str | None = field(default=None, metadata=FOLDER)

    def read_log(self) -> InteractionLog:
        """Read ratings and movies."""
        return read_movielens_100k(self.path)


READERS.add("movielens_100k", MovieLensReader, __name__)
