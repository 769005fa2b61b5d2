from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reasonrec.tokenizers.errors import UserError
from reasonrec.tokenizers.index import build_index
from reasonrec.tokenizers.quantizers.base import build_quantizer
from reasonrec.tokenizers.quantizers.reassigned import Reassigned, reassign


def lookup(books):
    return lambda codes: np.sum([books[level][column] for level, column in enumerate(codes.T)], axis=0)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 25), st.integers(1, 3))
def test_all_items_are_told_apart_by_the_codes_they_have(seed, n, depth):
    random = np.random.default_rng(seed)
    last = 25  # room for all, whatever the group
    books = [random.normal(size=(3, 4)) for _ in range(depth - 1)] + [random.normal(size=(last, 4))]
    codes = np.stack([random.integers(0, 3, n) for _ in range(depth)], axis=1)
    points = random.normal(size=(n, 4)).astype(np.float32)
    dealt, report = reassign(codes, last, points, lookup(books))
    index = build_index(dealt, [3] * (depth - 1) + [last])
    assert index.level_sizes[-1] == 0  # no disambiguation code: tuples of one length, unique, hence prefix-free
    assert len(set(index.tuples())) == n
    np.testing.assert_array_equal(dealt[:, :-1], codes[:, :-1])
    moved = dealt[:, -1] != codes[:, -1]
    assert report["items"] == moved.sum()
    for prefix in {tuple(row[:-1]) for row in codes.tolist()}:
        group = [i for i, row in enumerate(codes.tolist()) if tuple(row[:-1]) == prefix]
        if len({codes[i, -1] for i in group}) == len(group):
            assert not moved[group].any(), "nothing collides here"


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 4))
def test_no_other_way_to_deal_them_out_has_less_error(seed, n):
    random = np.random.default_rng(seed)
    book, points = random.normal(size=(4, 3)), random.normal(size=(n, 3)).astype(np.float32)
    dealt, _ = reassign(np.zeros((n, 1), dtype=np.int32), 4, points, lookup([book]))
    errors = [np.square(points - book[list(way)]).sum() for way in permutations(range(4), n)]
    assert np.square(points - book[dealt[:, 0]]).sum() == pytest.approx(min(errors), rel=1e-4)


def test_by_hand():
    book = np.array([[0.0], [1.0], [5.0]])
    points = np.array([[0.1], [-0.5], [5.0]], dtype=np.float32)
    dealt, report = reassign(np.array([[0], [0], [2]]), 3, points, lookup([book]))
    assert dealt.tolist() == [[1], [0], [2]]
    assert (report["groups"], report["items"]) == (1, 1)
    assert report["growth"] == pytest.approx((0.81 + 0.25) / (0.01 + 0.25) - 1)


def test_a_group_that_is_too_large_is_refused_with_what_would_fit():
    codes = np.array([[0, 0], [0, 0], [0, 1], [1, 0], [1, 0]])
    books = [np.zeros((2, 1)), np.zeros((2, 1))]
    with pytest.raises(UserError, match=r"3 items share all codes before the last, which has 2: .* with 3 or more"):
        reassign(codes, 2, np.zeros((5, 1)), lookup(books))
    # Where nothing collides nothing is dealt out, and the sizes do not matter.
    apart, report = reassign(np.array([[0, 0], [0, 1], [0, 2]]), 2, np.zeros((3, 1)), lambda codes: np.zeros((3, 1)))
    assert apart[:, 1].tolist() == [0, 1, 2]
    assert report == {"groups": 0, "items": 0, "growth": 0.0}


@pytest.mark.parametrize(
    ("name", "options"), [("balanced", {}), ("product", {}), ("rq_vae", {"steps": 5}), ("mixture", {"steps": 5})]
)
def test_any_quantizer_can_be_dealt_out_anew(name, options):
    points = np.random.default_rng(0).normal(size=(30, 5)).astype(np.float32)
    quantizer = Reassigned(build_quantizer(name, [3, 30], 0, options), [3, 30])
    codes = quantizer.fit_encode(points)
    assert len(np.unique(codes, axis=0)) == 30
    plain = build_quantizer(name, [3, 30], 0, options)
    plain.restore(quantizer.state())
    np.testing.assert_array_equal(quantizer.encode(points), plain.encode(points))
    np.testing.assert_array_equal(quantizer.reconstruct(codes), plain.reconstruct(codes))
