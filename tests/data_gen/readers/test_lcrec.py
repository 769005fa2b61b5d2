import json
from pathlib import Path
from typing import Any

import pytest

from reasonrec.data_gen.readers.lcrec import LcRecReader
from reasonrec.tokenizers.errors import UserError

SEQUENCES: dict[str, Any] = {"0": [2, 0, 1], "1": ["1", "2", "0"], "2": [0]}
TEXTS: dict[str, Any] = {
    "0": {"title": "Lamp &amp; shade", "description": ["Warm", "light"], "brand": "Oak", "categories": "Home, Light"},
    "1": {"title": "Pan", "description": "", "brand": None, "category": ["Home", "Kitchen"]},
    "2": {"title": "Cup", "extra": {"a": 1}},
}


def folder_of(folder: Path, sequences: object = SEQUENCES, texts: object = TEXTS) -> str:
    (folder / "Shop.inter.json").write_text(json.dumps(sequences))
    (folder / "Shop.item.json").write_text(json.dumps(texts))
    return str(folder)


def test_the_order_is_that_of_the_lists(tmp_path: Path) -> None:
    tables, files = LcRecReader(path=folder_of(tmp_path)).read()
    assert tables.facts["name"] == "Shop"
    assert sorted(files) == ["interactions", "items"]
    assert tables.test.select("user", "history", "target").rows() == [(0, [2, 0], 1), (1, [1, 2], 0)]
    assert not tables.test["same_time"].any()
    assert tables.items.select("item_id", "title", "description", "category", "brand").rows() == [
        ("0", "Lamp & shade", "Warm light", "Home, Light", "Oak"),
        ("1", "Pan", "", "Home, Kitchen", ""),
        ("2", "Cup", "", "", ""),
    ]


@pytest.mark.parametrize(
    ("sequences", "texts", "message"),
    [
        ([1], TEXTS, r"Shop\.inter\.json has to hold one JSON object .*not \[1\]"),
        ({}, TEXTS, "with something in it"),
        ({"7": "1 2"}, TEXTS, "user '7' has '1 2' where a list of items"),
        ({"7": [1, None]}, TEXTS, "user '7' has None where the id of an item"),
        ({"7": [1.5]}, TEXTS, "user '7' has 1.5 where the id of an item"),
        (SEQUENCES, {"0": "Lamp"}, "item '0' is 'Lamp' where its texts"),
        (SEQUENCES, {"0": {"title": "Lamp"}}, "with 2 items that have no title"),
    ],
)
def test_mistakes(tmp_path: Path, sequences: object, texts: object, message: str) -> None:
    reader = LcRecReader(path=folder_of(tmp_path, sequences, texts))
    with pytest.raises(UserError, match=message):
        reader.read()


def test_a_half_file_a_missing_one_and_a_split_by_time(tmp_path: Path) -> None:
    reader = LcRecReader(path=folder_of(tmp_path))
    (tmp_path / "Shop.inter.json").write_text('{"0": [1, 2')
    with pytest.raises(UserError, match=r"Shop\.inter\.json cannot be read as JSON"):
        reader.read_log()
    (tmp_path / "Shop.item.json").unlink()
    with pytest.raises(UserError, match=r"one file NAME\.item\.json; it holds none"):
        reader.read_log()
    with pytest.raises(UserError, match="has an order only; use split: leave_one_out"):
        LcRecReader(path=str(tmp_path), split="time")
    with pytest.raises(UserError, match="needs `path`"):
        LcRecReader()
