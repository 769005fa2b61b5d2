import json
from pathlib import Path
from typing import Any

import pytest

from reasonrec.data_gen.readers.yelp import YelpReader
from reasonrec.tokenizers.errors import UserError

REVIEWS: list[dict[str, Any]] = [
    {"review_id": "r", "user_id": "u", "business_id": "b1", "stars": 5.0, "text": "<b>Good</b>\n\nsoup",
     "date": "2018-07-07 22:09:11"},
    {"review_id": "s", "user_id": "u", "business_id": "b2", "stars": 1.0, "text": "", "date": "2018-07-08 00:00:01"},
]  # fmt: skip
BUSINESSES: list[dict[str, Any]] = [
    {"business_id": "b1", "name": "Soup &amp; Co", "city": "Tucson", "state": "AZ", "categories": "Food, Soup",
     "hours": None},
    {"business_id": "b2", "name": "Nails", "city": "", "state": "PA", "categories": None},
    {"business_id": "b3", "name": "Nobody", "categories": None},
]  # fmt: skip


def folder_of(folder: Path, start: str = "yelp_academic_dataset_", broken: str = "") -> str:
    for name, rows in (("review", REVIEWS), ("business", BUSINESSES)):
        text = "".join(f"{json.dumps(row)}\n" for row in rows)
        (folder / f"{start}{name}.json").write_text(text + (broken if name == "review" else ""))
    return str(folder)


@pytest.mark.parametrize("start", ["yelp_academic_dataset_", ""])
def test_reviews_and_businesses(tmp_path: Path, start: str) -> None:
    log = YelpReader(path=folder_of(tmp_path, start), with_reviews=True).read_log()
    assert log.interactions.frame().rows() == [
        ("u", "b1", 5.0, 1_531_001_351_000, "Good soup"),
        ("u", "b2", 1.0, 1_531_008_001_000, ""),
    ]
    assert log.items.rows() == [("b1", "Soup & Co", "Tucson, AZ", "Food, Soup", ""), ("b2", "Nails", "PA", "", "")]
    assert not log.redistributable
    liked = YelpReader(path=str(tmp_path), min_rating=4).read_log()
    assert liked.interactions.frame().columns == ["user_id", "item_id", "rating", "timestamp"]
    assert liked.items["item_id"].to_list() == ["b1"]


def test_a_time_that_is_none_and_files_that_are_not_there(tmp_path: Path) -> None:
    wrong = json.dumps(REVIEWS[0] | {"date": "yesterday"})
    with pytest.raises(UserError, match=r"1 of 3 lines .*line 3 \(timestamp: no time"):
        YelpReader(path=folder_of(tmp_path, broken=wrong)).read_log()
    (tmp_path / "yelp_academic_dataset_business.json").unlink()
    with pytest.raises(UserError, match=r"has no yelp_academic_dataset_business\.json and no business\.json"):
        YelpReader(path=str(tmp_path)).read_log()
