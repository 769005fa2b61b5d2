"""Whole numbers and lists of items as callers give them."""

from __future__ import annotations

from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from reasonrec.tokenizers.errors import UserError
from reasonrec.tokenizers.terminal import shown
from reasonrec.tokenizers.whole import item_numbers, whole


@pytest.mark.parametrize("value", [3, np.int64(3), np.uint8(3)])
def test_a_whole_number(value: Any) -> None:
    found = whole("k", value, at_least=1)
    assert found == 3
    assert type(found) is int


@pytest.mark.parametrize(
    "value",
    [
        0, -1, 101, 10**30, 10**5000, -(10**5000), True, np.True_, 2.0, 2.5, float("nan"), float("inf"), np.float64(2),
        "3", b"3", None, [3], np.array([3]), torch.tensor(3), Decimal(3), Fraction(3), 3 + 0j,
    ],
    ids=shown,
)  # fmt: skip
def test_what_is_none_or_out_of_range(value: Any) -> None:
    with pytest.raises(UserError, match=r"^k=.* has to be a whole number, from 1 to 100$"):
        whole("k", value, at_least=1, at_most=100)


def test_the_rule_is_said() -> None:
    with pytest.raises(UserError, match=r"^batch_size=-2 has to be a whole number, at least 1$"):
        whole("batch_size", -2, at_least=1)
    with pytest.raises(UserError, match=r"^batch_size=1000"):
        whole("batch_size", 10**30, at_least=1)


@pytest.mark.parametrize("values", [[1, 2], (1, 2), range(1, 3), np.array([1, 2], np.uint8), pl.Series([1, 2])])
def test_a_list_of_items(values: Any) -> None:
    found = item_numbers("exclude", values)
    assert (found.tolist(), found.dtype) == ([1, 2], np.int64)


def test_a_list_may_be_empty() -> None:
    assert item_numbers("exclude", []).shape == (0,)


@pytest.mark.parametrize(
    "values",
    [
        [1.5], [float("nan")], [None], ["1"], [b"1"], [True], [[1]], [[1], [2, 3]], [10**30], [10**5000], 7, None,
        "12", {1: 2}, [1, None], [1, "a"],
    ],
    ids=shown,
)  # fmt: skip
def test_what_is_no_list_of_items(values: Any) -> None:
    with pytest.raises(UserError, match=r"^exclude=.* has to be a list of item numbers, which are whole numbers"):
        item_numbers("exclude", values)
