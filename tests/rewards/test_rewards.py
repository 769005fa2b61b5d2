"""The reward families, against numbers worked by hand."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reasonrec.rewards.collaborative import CoVisits, collaborative
from reasonrec.rewards.exact import exact
from reasonrec.rewards.format import strict_format
from reasonrec.rewards.length import length
from reasonrec.rewards.likelihood import likelihood, probability
from reasonrec.rewards.parse import Flags
from reasonrec.rewards.prefix import common_prefix, prefix, rsvr, rsvr_table
from reasonrec.rewards.rank import rank
from reasonrec.rewards.repetition import repetition
from reasonrec.tokenizers.errors import UserError

# Four levels, as in GREAM: a target with a disambiguation code, and what comes ever nearer to it.
TARGET = (3, 1, 4, 1, 0)
PREDICTED = [None, (9, 1, 4, 1), (3, 9, 4, 1), (3, 1, 9, 1), (3, 1, 4, 9), (3, 1, 4, 1, 7), (3, 1, 4, 1), TARGET]
TARGETS = [TARGET] * len(PREDICTED)


def numbers(codes: Sequence[tuple[int, ...] | None]) -> list[int]:
    """A number for each item, -1 for none: items are told apart by all of their codes."""
    return [-1 if item is None else sum(code * 10**place for place, code in enumerate((*item, 10))) for item in codes]


def test_exact() -> None:
    assert exact(predicted_items=numbers(PREDICTED), target_items=numbers(TARGETS)) == [0, 0, 0, 0, 0, 0, 0, 1]
    more, less = [(3, 1, 4, 1, 0)], [(3, 1, 4, 1)]
    assert exact(predicted_items=numbers(more), target_items=numbers(less)) == [0], "one code too many"
    assert exact(predicted_items=[], target_items=[]) == []


def test_prefix() -> None:
    assert prefix(predicted_codes=PREDICTED, target_codes=TARGETS) == [0, 0, 0.2, 0.4, 0.6, 0.8, 0.8, 1]
    assert prefix(predicted_codes=[(3, 1, 4, 1, 0)], target_codes=[(3, 1, 4, 1)]) == [0.8]
    assert common_prefix((1, 2, 3), (1, 3, 3)) == 1


def test_rsvr_is_the_published_table() -> None:
    values = rsvr(predicted_codes=PREDICTED, target_codes=TARGETS, depth=4)
    assert values == pytest.approx([0, 0, 0.5, 0.7071, 0.8660, 0.95, 0.95, 1], abs=1e-4)
    # A disambiguation code where there is none to be.
    assert rsvr(predicted_codes=[(3, 1, 4, 1, 0)], target_codes=[(3, 1, 4, 1)], depth=4) == [0.95]
    # One of two codes: the .7 of the paper's figure.
    assert rsvr(predicted_codes=[(1, 0)], target_codes=[(1, 1)], depth=2) == pytest.approx([math.sqrt(1 / 2)])


def test_rsvr_with_one_level() -> None:
    assert rsvr_table(1) == (0, 0.95)
    with pytest.raises(UserError, match="at least one"):
        rsvr_table(0)


@given(st.integers(1, 64))
def test_rsvr_rises_strictly_and_stays_below_a_hit(depth: int) -> None:
    table = rsvr_table(depth)
    assert len(table) == depth + 1
    assert all(low < high for low, high in zip(table, (*table[1:], 1.0), strict=True))
    assert table[0] == 0
    if depth <= 10:
        assert table[-1] == 0.95


def test_rank() -> None:
    beams = [[7, 3, 9], [3], [], [1, 2, 3], [-1, -1]]
    values = rank(beam_items=beams, target_items=[3, 3, 3, 3, 3])
    assert values == pytest.approx([1 / math.log2(3), 1, 0, 0.5, 0])
    assert rank(beam_items=beams, target_items=[3, 3, 3, 3, 3], k=2) == pytest.approx([1 / math.log2(3), 1, 0, 0, 0])
    assert rank(beam_items=[np.array([4, 3])], target_items=[3]) == pytest.approx([1 / math.log2(3)])
    with pytest.raises(UserError, match="k=0"):
        rank(beam_items=beams, target_items=[3] * 5, k=0)


def test_format_wants_every_part_once_and_in_order() -> None:
    good = Flags(True, False, False, False, False, False)
    bad = [good._replace(**{name: True}) for name in good._fields[1:5]]
    flags = [good, *bad, good, good._replace(has_chain=False)]
    items = [1] * 5 + [-1, 0]
    assert strict_format(predicted_items=items, flags=flags, reasoning=True) == [1, 0, 0, 0, 0, 0, 0]
    assert strict_format(predicted_items=items, flags=flags, reasoning=False) == [0, 0, 0, 0, 0, 0, 1]


def test_length() -> None:
    chains = [[0] * n for n in (0, 5, 10, 30, 35, 40, 1000, 20)]
    items = [0] * 7 + [-1]
    values = length(chains=chains, predicted_items=items, shortest=10, longest=30, limit=40)
    assert values == [0, 0.5, 1, 1, 0.5, 0, 0, 0]
    assert length(chains=[[]], predicted_items=[1], shortest=0) == [1]
    assert length(chains=[[]], predicted_items=[1], reasoning=False) == [None]
    with pytest.raises(UserError, match="limit=30"):
        length(chains=chains, predicted_items=items, longest=30, limit=30)


def test_repetition() -> None:
    # Of the trigrams 123 231 312 123 231 two occurred before; 1111 has two, one of them again.
    chains = [[1, 2, 3, 1, 2, 3, 1], [1, 1, 1, 1], [1, 2, 3, 4], [1, 2], [], [5] * 1002]
    assert repetition(chains=chains) == pytest.approx([-2 / 5, -1 / 2, 0, 0, 0, -999 / 1000])
    assert repetition(chains=[[1, 2, 1]], n=1) == pytest.approx([-1 / 3])
    assert repetition(chains=[]) == []
    assert repetition(chains=chains, reasoning=False) == [None] * 6
    with pytest.raises(UserError, match="n=0"):
        repetition(chains=chains, n=0)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.lists(st.sampled_from([0, 1, 2, 150_000, 2**40]), max_size=12), max_size=5),
    st.integers(1, 5),
)
def test_repetition_counts_as_a_loop_does(chains: list[list[int]], n: int) -> None:
    wanted = []
    for chain in chains:
        grams = Counter(tuple(chain[i : i + n]) for i in range(len(chain) - n + 1))
        wanted.append(-sum(count - 1 for count in grams.values()) / max(sum(grams.values()), 1))
    assert repetition(chains=chains, n=n) == pytest.approx(wanted)


SEQUENCES = [[0, 1, 2], [0, 1], [3, 3]]


def co_visits(window: int | None) -> CoVisits:
    sequence = np.repeat(np.arange(3), list(map(len, SEQUENCES)))
    return CoVisits(np.concatenate(SEQUENCES), sequence, 5, window)


def test_similarity_in_order() -> None:
    # C[0,1] = 2, C[1,2] = 1, C[0,2] = 1/2; degrees 2.5, 3, 1.5; an item with itself does not count.
    found = co_visits(10)([0, 1, 1, 0, 3, 3, 0], [1, 0, 2, 2, 3, 0, 4])
    wanted = [2 / math.sqrt(7.5), 2 / math.sqrt(7.5), 1 / math.sqrt(4.5), 0.5 / math.sqrt(3.75), 0, 0, 0]
    assert found == pytest.approx(wanted)
    assert co_visits(1)([0], [2]) == pytest.approx([0])


def test_similarity_in_sets() -> None:
    # The set of three shares out 1/2 per pair, that of two 1: C[0,1] = 1.5, C[0,2] = C[1,2] = .5; degrees 2, 2, 1.
    found = co_visits(None)([0, 0, 1, 3], [1, 2, 2, 3])
    assert found == pytest.approx([0.75, 0.5 / math.sqrt(2), 0.5 / math.sqrt(2), 0])


def test_collaborative() -> None:
    similarity = co_visits(10)
    values = collaborative(
        predicted_items=[0, 1, 2, 3, -1, 0, 4], target_items=[0, 0, 0, 0, 0, 4, 4], similarity=similarity
    )
    # Item 1 is the nearest neighbour of item 0; item 4 was never seen and has none.
    nearest, other = 2 / math.sqrt(7.5), 0.5 / math.sqrt(3.75)
    assert values == pytest.approx([1, 0.5, 0.5 * other / nearest, 0, 0, 0, 1])
    with pytest.raises(UserError, match="ceiling=1"):
        collaborative(predicted_items=[0], target_items=[0], similarity=similarity, ceiling=1.0)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 6), min_size=1, max_size=6), min_size=1, max_size=6),
    st.sampled_from([None, 1, 3]),
    st.floats(0, 0.99),
)
def test_an_exact_hit_always_wins(sequences: list[list[int]], window: int | None, ceiling: float) -> None:
    sequence = np.repeat(np.arange(len(sequences)), list(map(len, sequences)))
    similarity = CoVisits(np.concatenate(sequences), sequence, 7, window)
    left, right = (side.reshape(-1) for side in np.meshgrid(np.arange(-1, 7), np.arange(7)))
    values = np.array(
        collaborative(predicted_items=left, target_items=right, similarity=similarity, ceiling=ceiling)  # type: ignore[arg-type]
    )
    assert (values[left == right] == 1).all()
    assert values[left != right].max() <= ceiling + 1e-12
    assert (values[left == -1] == 0).all()
    assert similarity.matrix.max() <= 1 + 1e-12
    assert abs(similarity.matrix - similarity.matrix.T).max() < 1e-12


def test_similarity_refuses_what_does_not_fit() -> None:
    with pytest.raises(UserError, match=r"allowed is 0\.\.4"):
        CoVisits([0, 5], [0, 0], 5)
    with pytest.raises(UserError, match="must not fall"):
        CoVisits([0, 1], [1, 0], 5)
    with pytest.raises(UserError, match="window=0"):
        CoVisits([0], [0], 5, 0)
    assert CoVisits([], [], 5)([], []).tolist() == []
    assert CoVisits([], [], 5)([0], [1]).tolist() == [0]
    assert CoVisits([], [], 5, None)([0], [1]).tolist() == [0]


def test_probability() -> None:
    values = probability(target_log_prob=[0.0, None, -math.log(4), 1e-9, -1000.0])
    assert values == pytest.approx([1, None, 0.25, 1, 0])
    for wrong in (math.nan, 0.1):
        with pytest.raises(UserError, match="a log-probability is a number of at most 0"):
            probability(target_log_prob=[wrong])


def test_likelihood() -> None:
    values = likelihood(target_log_prob=[-2.0, None, -100.0, 1e-9], target_codes=[TARGET] * 4)
    assert values == [-2, None, -30, 0]
    values = likelihood(target_log_prob=[-2.5], target_codes=[TARGET], perplexity=True)
    assert values == pytest.approx([-math.exp(0.5)])  # five codes
    for wrong in (float("nan"), 0.5):
        with pytest.raises(UserError, match="at most 0"):
            likelihood(target_log_prob=[wrong], target_codes=[TARGET])
    assert likelihood(target_log_prob=[-math.inf], target_codes=[TARGET]) == [-30]
    assert likelihood(target_log_prob=[-2.0, None, -100.0]) == [-2, None, -30], "only a perplexity counts codes"
    with pytest.raises(UserError, match="perplexity=True divides by the number of target_codes"):
        likelihood(target_log_prob=[-2.0], perplexity=True)
