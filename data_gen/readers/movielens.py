"""MovieLens: 100K from the installed package `recbole`, and all of GroupLens' own folders.

The data are GroupLens' (research and non-commercial use, cite Harper & Konstan 2015); they are read where
they lie and never copied. Their files: https://grouplens.org/datasets/movielens/
"""

from __future__ import annotations

import importlib.util
import io
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import polars as pl

from reasonrec.data_gen.clean import clean_items
from reasonrec.data_gen.interaction_log import InteractionLog
from reasonrec.data_gen.readers.base import FOLDER, MIN_RATING, READERS, LogReader
from reasonrec.data_gen.readers.csv_reader import CsvFile
from reasonrec.data_gen.readers.line_files import LineFile
from reasonrec.data_gen.readers.line_reader import LineReader, interactions, one_row_each
from reasonrec.tokenizers.errors import UserError

GENRES = (
    "unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama",
    "Fantasy", "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western",
)  # fmt: skip
TERMS = (
    "GroupLens, MovieLens-100K: research and non-commercial use, no redistribution without permission; cite "
    "Harper and Konstan (2015), doi 10.1145/2827872"
)
TERMS_OF_ALL = TERMS.replace("MovieLens-100K", "MovieLens")
NO_GENRE = "(no genres listed)"
# Fields of the files without a header, by their places.
_RATING = {"user_id": 0, "item_id": 1, "rating": 2, "timestamp": 3}
_MOVIE = {"item_id": 0, "title": 1, "category": 2}
_CSV = {
    "ratings": {"user_id": "userId", "item_id": "movieId", "rating": "rating", "timestamp": "timestamp"},
    "movies": {"item_id": "movieId", "title": "title", "category": "genres"},
}
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


def read_movielens(reader: MovieLensFolder) -> InteractionLog:
    """Read any of GroupLens' folders, told by its files; several ratings may be from one second, in no order.

    Raises:
        UserError: If there are no such files, or too many lines cannot be read.
    """
    folder = Path(reader.path or "")
    kinds = {"100K": ("u.data", "u.item"), "csv": ("ratings.csv", "movies.csv"), "dat": ("ratings.dat", "movies.dat")}
    kind = next((kind for kind, names in kinds.items() if all((folder / name).is_file() for name in names)), None)
    if kind is None:
        choices = ", ".join(" and ".join(names) for names in kinds.values())
        raise UserError(f"path={folder} holds none of these pairs of files: {choices}; unpack GroupLens' ZIP there")
    rows, movies = (LineFile(folder / name, table, reader.max_bad_lines)
                    for name, table in zip(kinds[kind], ("interactions", "items"), strict=True))  # fmt: skip
    texts: Iterable[pl.DataFrame]
    if kind == "100K":
        found = rows.fields(_RATING, 4, "\t")
        flags = {genre: 5 + place for place, genre in enumerate(GENRES)}
        texts = movies.fields({"item_id": 0, "title": 1} | flags, 5 + len(flags), "|", encoding="latin-1")
        names = [pl.when(pl.col(genre) == "1").then(pl.lit(genre)) for genre in GENRES]
        category = pl.concat_str(names, separator="|", ignore_nulls=True)
        texts = (block.with_columns(category=category) for block in texts)
    elif kind == "csv":
        found, texts = _read_csv(rows, _CSV["ratings"]), _read_csv(movies, _CSV["movies"])
    else:
        found = rows.fields(_RATING, 4, "::")
        texts = movies.fields(_MOVIE, 3, "::", encoding=_encoding(movies.path))
    log, facts, read = interactions(rows, found, reader.min_rating)
    items, items_read = one_row_each(movies, texts)
    genres = items["category"].replace(NO_GENRE, "").str.replace_all("|", ", ", literal=True)
    items = items.with_columns(category=genres, title=pl.Series([movie_title(title) for title in items["title"]]))
    return InteractionLog(
        f"MovieLens, {folder.resolve().name}",
        log,
        clean_items(items, max_description_chars=0),
        movies.path.name,
        files={"interactions": rows.path, "items": movies.path},
        filters=facts,
        ordered=False,
        read=[read, items_read],
        terms=TERMS_OF_ALL,
        redistributable=False,
    )


def _read_csv(file: LineFile, columns: dict[str, str]) -> Iterator[pl.DataFrame]:
    """Columns of a CSV file, all of whose records are whole, block by block."""
    table = CsvFile(file.path, ",", '"', trusted=True)
    lacking = [name for name in columns.values() if name not in table.columns]
    if lacking:
        raise UserError(f"{file.path} lacks the columns {', '.join(lacking)}: it is not GroupLens' file")
    for frame in table.blocks(list(columns.values())):
        yield frame.rename({theirs: ours for ours, theirs in columns.items()})
    file.rows, file.blank = table.rows, table.blank


def _encoding(path: Path) -> str:
    """GroupLens wrote 1M in Latin-1, and 10M in UTF-8."""
    try:
        path.read_bytes().decode()
    except UnicodeDecodeError:
        return "latin-1"
    return "utf-8"


@dataclass(frozen=True)
class MovieLensFolder(LineReader):
    """A folder of GroupLens': 100K, 1M, 10M, 20M, 25M, 32M, latest or latest-small."""

    min_rating: float | None = field(default=None, metadata=MIN_RATING)

    def read_log(self) -> InteractionLog:
        """Read ratings and movies."""
        return read_movielens(self)


READERS.add("movielens_100k", MovieLensReader, __name__)
READERS.add("movielens", MovieLensFolder, __name__)
