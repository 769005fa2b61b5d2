"""Exact lists from a table, in blocks, with ties and exclusions, against sorting everything."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reasonrec.recipes.policies.dual_head.table import best_rows


def sorted_out(table: torch.Tensor, query: torch.Tensor, excluded: set[int]) -> list[int]:
    scores = (table.double() @ query.double()).tolist()
    return sorted((row for row in range(len(table)) if row not in excluded), key=lambda row: (-scores[row], row))


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_it_is_what_sorting_gives(data):
    n, k = data.draw(st.integers(1, 30)), data.draw(st.integers(1, 12))
    small = st.lists(st.integers(-2, 2), min_size=2, max_size=2)  # many equal scores
    table = torch.tensor(data.draw(st.lists(small, min_size=n, max_size=n))).float()
    queries = torch.tensor(data.draw(st.lists(small, min_size=1, max_size=4))).float()
    exclude = [np.array(sorted(data.draw(st.sets(st.integers(0, n - 1)))), dtype=np.int64) for _ in queries]
    block = data.draw(st.integers(1, 40))
    found = best_rows(table, queries, k, temperature=0.5, exclude=exclude, block=block)
    everything = (queries @ table.T / 0.5).log_softmax(1)
    for query in range(len(queries)):
        expected = sorted_out(table, queries[query], set(exclude[query].tolist()))[:k]
        rows = found.rows[query].tolist()
        assert rows[: len(expected)] == expected
        assert rows[len(expected) :] == [-1] * (k - len(expected))
        values = found.log_probs[query]
        torch.testing.assert_close(values[: len(expected)], everything[query, expected], atol=1e-5, rtol=1e-5)
        assert (values[len(expected) :] == -torch.inf).all()


def test_scores_are_float32_under_autocast():
    table = torch.nn.functional.normalize(torch.ones(200, 16) + 0.05 * torch.randn(200, 16), dim=1)
    queries = torch.nn.functional.normalize(torch.ones(3, 16) + 0.05 * torch.randn(3, 16), dim=1)
    plain = best_rows(table, queries, 50, temperature=0.05)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = best_rows(table, queries, 50, temperature=0.05)
        assert ((queries @ table.T) / 0.05)[0].unique().numel() < 20, "what autocast would make of it"
    assert torch.equal(plain.rows, cast.rows)
    assert torch.equal(plain.log_probs, cast.log_probs)


@pytest.mark.parametrize("block", [7, 1000])
def test_probabilities_sum_to_one_whatever_the_blocks(block):
    table, queries = torch.randn(50, 8), torch.randn(3, 8)
    found = best_rows(table, queries, 50, temperature=0.7, block=block)
    torch.testing.assert_close(found.log_probs.exp().sum(1), torch.ones(3))
    assert (found.log_probs.diff(dim=1) <= 0).all()
