"""Text is a raw id, an integer is a number, and nothing else is an item."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
import torch

from reasonrec.data_gen.schema import Dataset
from reasonrec.recipes.models.checkpoint import Setting
from reasonrec.recipes.policies.base import build_policy
from reasonrec.recipes.policies.loading import load_fresh
from reasonrec.recipes.recommender import Recommender
from reasonrec.recipes.recommending.items import ItemIds
from reasonrec.tokenizers.errors import UserError
from reasonrec.tokenizers.index import ItemIndex

ITEMS = ItemIds(["1", "2", "3", "10", "007", "lamp"])


@pytest.mark.parametrize(
    "history",
    [
        ["10", "2", "lamp"],
        ("10", "2", "lamp"),
        np.array(["10", "2", "lamp"]),
        [np.str_("10"), "2", "lamp"],
        pl.Series(["10", "2", "lamp"]),
        [3, 1, 5],
        np.array([3, 1, 5], dtype=np.uint8),
        [np.int32(3), 1, 5],
        torch.tensor([3, 1, 5]),
        pl.Series([3, 1, 5]),
        iter([3, 1, 5]),
    ],
)
def test_text_is_a_raw_id_and_an_integer_a_number(history):
    found = ITEMS.history(history)
    assert found.shown.tolist() == [3, 1, 5]
    assert found.masked.tolist() == [1, 3, 5]


@pytest.mark.parametrize(
    ("history", "message"),
    [
        ([9.9, 1], r"9\.9 \(float\) is no item"),
        ([7.0], r"7\.0 \(float\) is no item"),
        (np.array([1.0, 2.0]), r"1\.0 \(float\) is no item"),
        ([float("nan")], r"nan \(float\) is no item"),
        ([True, 2], r"True \(bool\) is no item"),
        (np.array([True]), r"True \(bool\) is no item"),
        ([None, 2], r"None \(NoneType\) is no item"),
        ([b"10"], r"b'10' \(bytes\) is no item"),
        ([[1, 2]], r"\[1, 2\] \(list\) is no item"),
        (["10", 2], "mixes text and numbers"),
        (["10", 2.0], "mixes text and numbers"),
        ("10,2", "'10,2' is no list"),
        (5, "5 is no list"),
        (None, "None is no list"),
    ],
)
def test_what_is_no_item_is_refused(history, message):
    with pytest.raises(UserError, match=message):
        ITEMS.history(history)


def test_from_raw_ids_to_numbers_and_back():
    assert ITEMS.number("10") == 3
    assert ITEMS.numbers(["007", "1"]).tolist() == [4, 0]
    assert ITEMS.ids(np.array([[3, 4], [0, -1]])) == [["10", "007"], ["1", None]]
    assert ITEMS.ids([]) == []
    for wrong in ("7", "nobody"):
        with pytest.raises(UserError, match=f"item '{wrong}' is not in the catalogue; some ids are 1, 2"):
            ITEMS.number(wrong)
    with pytest.raises(UserError, match="3 is no raw item id"):
        ITEMS.numbers([3])
    with pytest.raises(UserError, match=r"item 6 is not in the catalogue, which has 0\.\.5"):
        ITEMS.ids([1, 6])
    with pytest.raises(UserError, match=r"is no item number"):
        ITEMS.ids([1.5])


def test_a_recommender_takes_both(tiny_base, tiny_dataset, tiny_index):
    setting = Setting(str(tiny_base), "full", "History:{history}", False, None, 5)
    policy = build_policy(Dataset.load(tiny_dataset).catalogue(ItemIndex.load(tiny_index)), setting)
    recommender = Recommender(policy, load_fresh(setting, policy)[0], setting)
    numbers = [30, 4, 17]
    ids = recommender.items.ids(numbers)
    assert ids == [policy.catalogue.item_ids[i] for i in numbers]
    found, scores = recommender.rank([ids, numbers], k=5, exclude=[ids[:1], numbers[:1]])
    assert (found[0] == found[1]).all()
    np.testing.assert_allclose(scores[0], scores[1], atol=1e-5)
    assert set(recommender.items.numbers(recommender.items.ids(found[0]))) == set(found[0])
    with pytest.warns(UserWarning, match="1 items in 1 histories are not in the catalogue"):
        known = recommender.rank([["nobody", *ids]], k=5)[0]
    assert (known == recommender.rank([numbers], k=5)[0]).all()
    with pytest.raises(UserError, match="1 items in 1 histories"):
        recommender.rank([["nobody", *ids]], strict=True)
    with pytest.raises(UserError, match="excluded item nobody is not in the catalogue"):
        recommender.rank([ids], exclude=[["nobody"]])
    with pytest.raises(UserError, match="is no list"):
        recommender.rank(ids)
    session = recommender.session(ids[:2])
    session.append(ids[2])
    assert session.history.shown.tolist() == numbers
    with pytest.raises(UserError, match="item nobody is not in the catalogue"):
        session.append("nobody")
