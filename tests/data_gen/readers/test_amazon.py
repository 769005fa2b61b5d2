import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from reasonrec.data_gen.readers.amazon import AmazonReader, find_files
from reasonrec.tokenizers.errors import UserError

OLD = ("reviewerID", "asin", "overall", "unixReviewTime", "reviewText")
NEW = ("user_id", "parent_asin", "rating", "timestamp", "text")
REVIEWS = [("U1", "B1", 5.0, 1_400_000_000, "It&#39;s <b>good</b>"), ("U1", "B2", 2.0, 1_400_086_400, "no"),
           ("U2", "B1", 4.0, 1_400_000_000, "")]  # fmt: skip
OLD_PRODUCTS: list[dict[str, Any]] = [
    {"asin": "B1", "title": "Lamp &amp; Shade", "price": 7.5, "brand": "Oak",
     "categories": [["Home", "Light"], ["Gift"]], "description": "Warm \\d light", "related": {"also_viewed": ["B9"]}},
    {"asin": "B2", "title": "It's a pan", "price": 3, "categories": [["Home"]]},
    {"asin": "B9", "title": "Never bought"},
]  # fmt: skip
PRODUCTS: list[dict[str, Any]] = [
    {"asin": "B1", "title": "", "description": [""]},
    {"asin": "B1", "title": "Lamp", "description": ["Warm", "light"], "brand": "by\n  Oak", "price": "$1 - $2",
     "category": ["Home", "Home", "</span></span>", "Light"]},
    {"asin": "B2", "title": "var t = new Date().getTime();", "feature": ["flat"], "price": ".a-box{color:#fff}"},
]  # fmt: skip


def write(path: Path, lines: list[str]) -> None:
    text = "".join(f"{line}\n" for line in lines).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)


def reviews(names: tuple[str, ...], scale: int = 1) -> list[str]:
    rows = [(user, item, rating, time * scale, text) for user, item, rating, time, text in REVIEWS]
    return [json.dumps(dict(zip(names, row, strict=True))) for row in rows]


def test_2014_with_literals_in_gzip(tmp_path: Path) -> None:
    write(tmp_path / "reviews_Toys_5.json.gz", reviews(OLD))
    write(tmp_path / "meta_Toys.json.gz", [repr(product) for product in OLD_PRODUCTS])
    log = AmazonReader(path=str(tmp_path), with_reviews=True, with_prices=True).read_log()
    assert log.name == "Amazon, Toys"
    assert log.interactions.frame().rows() == [
        ("U1", "B1", 5.0, 1_400_000_000_000, "It's good"),
        ("U1", "B2", 2.0, 1_400_086_400_000, "no"),
        ("U2", "B1", 4.0, 1_400_000_000_000, ""),
    ]
    assert log.items.rows() == [
        ("B1", "Lamp & Shade", "Price: $7.50. Warm \\d light", "Home, Light", "Oak"),
        ("B2", "It's a pan", "Price: $3.00.", "Home", ""),
    ]
    assert log.read[1]["dropped"]["of items that nobody chose"] == 1


def test_2018_with_products_twice_and_pieces_of_pages(tmp_path: Path) -> None:
    write(tmp_path / "Toys_5.json", reviews(OLD))
    write(tmp_path / "meta_Toys.json", [json.dumps(product) for product in PRODUCTS])
    log = AmazonReader(path=str(tmp_path), min_rating=4).read_log()
    assert log.interactions.frame()["rating"].to_list() == [5, 4]
    assert log.items.rows() == [("B1", "Lamp", "Warm light", "Home, Light", "Oak")]
    everything = AmazonReader(path=str(tmp_path)).read_log()
    assert everything.items.rows()[1] == ("B2", "", "flat", "", "")
    assert everything.read[1]["dropped"]["of items that stand there before"] == 1


def test_2023_as_the_hub_lays_it_out(tmp_path: Path) -> None:
    write(tmp_path / "raw/review_categories/Toys.jsonl", reviews(NEW, 1000))
    products = [{"parent_asin": "B1", "title": "Lamp", "store": "Oak", "categories": [], "main_category": "Home",
                 "features": ["dims"], "description": [], "price": "—"},
                {"parent_asin": "B2", "title": "Pan", "store": None, "price": None}]  # fmt: skip
    write(tmp_path / "raw/meta_categories/meta_Toys.jsonl", [json.dumps(product) for product in products])
    log = AmazonReader(path=str(tmp_path), with_prices=True).read_log()
    assert log.interactions.frame()["timestamp"].to_list()[0] == 1_400_000_000_000
    assert log.interactions.frame().columns == ["user_id", "item_id", "rating", "timestamp"]
    assert log.items.rows() == [("B1", "Lamp", "dims", "Home", "Oak"), ("B2", "Pan", "", "", "")]


BROKEN = {
    "cut": ('{"reviewerID": "U', "nterminated string"),
    "no item": ('{"reviewerID": "U1", "overall": 1, "unixReviewTime": 1400000000}', "no 'asin'"),
    "empty id": ('{"reviewerID": " ", "asin": "B1", "overall": 1, "unixReviewTime": 1400000000}', "no user_id"),
    "a list": ("[1]", "no record in braces"),
    "negative time": (
        '{"reviewerID": "U1", "asin": "B1", "overall": 1, "unixReviewTime": -5}',
        "no time between 1973",
    ),
    "huge": ('{"reviewerID": "U1", "asin": "B1", "overall": 1e999, "unixReviewTime": 1}', "number should stand"),
    "too large": (f'{{"reviewerID": "U1", "asin": "B1", "overall": 1{"0" * 400}, "unixReviewTime": 1}}', "too large"),
    "nested": ("[" * 100_000, "recursion"),
}


@pytest.mark.parametrize(("line", "why"), BROKEN.values(), ids=BROKEN)
def test_a_broken_line_is_refused_or_counted(tmp_path: Path, line: str, why: str) -> None:
    write(tmp_path / "Toys.json", ["", reviews(OLD)[0], line, *reviews(OLD)[1:]])
    write(tmp_path / "meta_Toys.json", [json.dumps(product) for product in OLD_PRODUCTS])
    with pytest.raises(UserError, match=rf"1 of 4 lines cannot be read.*the first is line 3 \(.*{why}"):
        AmazonReader(path=str(tmp_path)).read_log()
    log = AmazonReader(path=str(tmp_path), max_bad_lines=0.3).read_log()
    assert log.interactions.frame().height == 3
    assert log.read[0]["blank_lines"] == 1


@pytest.mark.parametrize("line", ["{'asin': __import__('os').getcwd()}", "(" * 100_000, "-" * 100_000 + "1"])
def test_literals_are_parsed_and_never_run(tmp_path: Path, line: str) -> None:
    write(tmp_path / "Toys.json", reviews(OLD))
    write(tmp_path / "meta_Toys.json", [repr(OLD_PRODUCTS[0]), line])
    with pytest.raises(UserError, match="1 of 2 lines cannot be read"):
        AmazonReader(path=str(tmp_path)).read_log()


def test_a_file_without_a_good_line(tmp_path: Path) -> None:
    write(tmp_path / "Toys.json", ["?"] * 3)
    write(tmp_path / "meta_Toys.json", [json.dumps(product) for product in OLD_PRODUCTS])
    with pytest.raises(UserError, match="3 of 3 lines cannot be read"):
        AmazonReader(path=str(tmp_path)).read_log()
    log = AmazonReader(path=str(tmp_path), max_bad_lines=1).read_log()
    assert log.interactions.frame().height == 0
    write(tmp_path / "Toys.json", ["?"] * 2000)
    with pytest.raises(UserError, match="none so far was good"):
        AmazonReader(path=str(tmp_path)).read_log()


def test_half_characters_latin_1_and_a_cut_archive(tmp_path: Path) -> None:
    lines = [line.replace('"U1"', r'" U\ud800"').replace('"B1"', '"B1 "') for line in reviews(OLD)]
    write(tmp_path / "Toys.json", lines)
    write(tmp_path / "meta_Toys.json", [json.dumps(product) for product in OLD_PRODUCTS])
    log = AmazonReader(path=str(tmp_path)).read_log()
    assert log.interactions.frame()["user_id"][0] == "U?"
    assert log.items["item_id"].to_list() == ["B1", "B2"]
    (tmp_path / "Toys.json").write_bytes("\n".join(lines).encode() + '\n{"reviewerID": "é"}'.encode("latin-1"))
    with pytest.raises(UserError, match=r"line 4 \('utf-8' codec"):
        AmazonReader(path=str(tmp_path)).read_log()
    (tmp_path / "Toys.json").unlink()
    (tmp_path / "Toys.json.gz").write_bytes(gzip.compress("\n".join(lines).encode())[:-20])
    with pytest.raises(UserError, match=r"Toys\.json\.gz cannot be read .*is the file complete"):
        AmazonReader(path=str(tmp_path)).read_log()


def test_the_future_is_kept_and_said(tmp_path: Path) -> None:
    write(tmp_path / "Toys.json", [line.replace("1400000000", "4100000000") for line in reviews(OLD)])
    write(tmp_path / "meta_Toys.json", [json.dumps(product) for product in OLD_PRODUCTS])
    with pytest.warns(UserWarning, match="2 interactions lie in the future, the last at 2099-12-03"):
        assert AmazonReader(path=str(tmp_path)).read_log().interactions.frame().height == 3


def test_which_files_are_meant(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no products"):
        find_files(str(tmp_path), None)
    for name in ("meta_Toys.json", "meta_Books.json.gz", "Toys.json", "Books_5.json.gz"):
        (tmp_path / name).touch()
    with pytest.raises(UserError, match="2 categories: set category to one of Books, Toys"):
        find_files(str(tmp_path), None)
    with pytest.raises(UserError, match=r"did you mean 'Toys'\?"):
        find_files(str(tmp_path), "Toy")
    assert find_files(str(tmp_path), "Books")[1].name == "Books_5.json.gz"
    (tmp_path / "Toys_5.json").touch()
    with pytest.raises(UserError, match=r"one file of reviews.*it holds Toys_5\.json and Toys\.json"):
        find_files(str(tmp_path), "Toys")
