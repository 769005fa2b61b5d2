"""Which windows of the histories are examples."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from reasonrec.data_gen.tasks.mixture import PlanConfig
from reasonrec.data_gen.tasks.render import Material, tasks

LENGTHS = np.array([2, 3] * 4 + [2])  # tokens of each item


def windows_one_by_one(lengths: list[int], max_history: int, rng: np.random.Generator) -> list[tuple[int, int, int]]:
    """The same windows, cut as one would by hand."""
    size, found = max_history + 1, []
    for source, n in enumerate(lengths):
        if n < 2:
            continue
        first = 0 if n <= size else int(rng.integers(-size + 2, 1))
        cuts = [0, *range(first + size, n, size), n]
        if n - cuts[-2] == 1 and size > 2:
            cuts[-2] -= 1
        found += [(source, min(begin, end - 2), end) for begin, end in pairwise(cuts)]
    return found


@settings(max_examples=300, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 40), max_size=12).filter(lambda ns: max(ns, default=0) > 1),
    max_history=st.integers(1, 9),
    seed=st.integers(0, 5),
)
def test_all_windows_at_once_are_those_cut_one_by_one(lengths: list[int], max_history: int, seed: int) -> None:
    """A seed that was trained with before means the same examples now."""
    rng = np.random.default_rng(0)
    material = Material([rng.integers(0, 9, n) for n in lengths], LENGTHS)
    config = PlanConfig({"seqrec": 1.0}, max_history, False, 1.0, 4, seed)
    source, start, stop, tokens = tasks()["seqrec"].draw(material, config, None, np.random.default_rng(seed))
    expected = windows_one_by_one(lengths, max_history, np.random.default_rng(seed))
    assert list(zip(source, start, stop, strict=True)) == expected
    assert tokens.tolist() == [LENGTHS[material.sequences[s][a:b]].sum() for s, a, b in expected]
