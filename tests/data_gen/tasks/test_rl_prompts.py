"""Which positions become prompts, and in which order they come."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest

from reasonrec.data_gen.tasks.rl_prompts import PromptWindow, RlPrompts, blocks_per_pass, prompt_block
from reasonrec.tokenizers.errors import UserError

TRAIN = pl.DataFrame({"user": [0, 1, 2], "items": [[5, 6, 7, 8], [1, 2], [9]], "first_target": [0, 0, 0]})


def pairs(prompts: RlPrompts) -> list[tuple[list[int], int]]:
    return [(prompts.history(i).tolist(), int(prompts.target[i])) for i in range(len(prompts))]


def collect(train: pl.DataFrame = TRAIN, *, set_order: bool = False, **window: int) -> RlPrompts:
    return RlPrompts.from_train(train, PromptWindow(**window), lambda h: [0, *h.tolist()], set_order=set_order)


def test_every_position_with_a_history():
    prompts = collect()
    assert pairs(prompts) == [([5], 6), ([5, 6], 7), ([5, 6, 7], 8), ([1], 2)]
    assert prompts.token_ids(1) == [0, 5, 6]


def test_the_window_is_configurable():
    assert pairs(collect(min_history=2)) == [([5, 6], 7), ([5, 6, 7], 8)]
    assert pairs(collect(last_targets=1)) == [([5, 6, 7], 8), ([1], 2)]
    assert pairs(collect(max_history=1)) == [([5], 6), ([6], 7), ([7], 8), ([1], 2)]
    later = TRAIN.with_columns(first_target=pl.Series([3, 1, 0]))
    assert pairs(collect(later)) == [([5, 6, 7], 8), ([1], 2)]


def test_the_target_is_what_was_really_chosen():
    biased = TRAIN.with_columns(clean_target=pl.Series([80, 2, 9]), first_target=pl.Series([3, 1, 0]))
    assert pairs(collect(biased)) == [([5, 6, 7], 80), ([1], 2)]


def test_targets_come_with_their_ratings():
    rated = TRAIN.with_columns(ratings=pl.Series([[1.0, 2.0, None, 4.0], [5.0, 3.0], [2.0]]))
    np.testing.assert_array_equal(collect(rated).rating, [2, np.nan, 4, 3])
    assert collect().rating is None
    many = pl.DataFrame({"user": [0], "items": [list(range(20))], "first_target": [0]})
    shuffled = collect(many.with_columns(ratings=pl.col("items").cast(pl.List(pl.Float32))), set_order=True)
    np.testing.assert_array_equal(shuffled.rating, shuffled.target)


def test_the_targets_behind_a_target():
    prompts = collect(TRAIN.with_columns(clean_target=pl.Series([80, 2, 9]), first_target=pl.Series([0, 1, 0])))
    assert prompts.target.tolist() == [6, 7, 80, 2]
    everything = np.arange(4)
    assert prompts.later(everything, 0).tolist() == [0, 1, 2, 3]
    assert prompts.later(everything, 1).tolist() == [1, 2, -1, -1]
    assert prompts.later(everything, 2).tolist() == [2, -1, -1, -1]
    assert prompts.later(np.array([3, 0]), 9).tolist() == [-1, -1]
    assert prompts.later(np.array([], dtype=np.int64), 1).tolist() == []


def test_sets_are_put_into_one_order():
    many = pl.DataFrame({"user": [0], "items": [list(range(20))], "first_target": [0]})
    prompts = collect(many, set_order=True)
    assert sorted([*prompts.history(18).tolist(), int(prompts.target[18])]) == list(range(20))
    assert prompts.sequences[0].tolist() != list(range(20))
    assert pairs(prompts) == pairs(collect(many, set_order=True))


def test_mistakes_are_named():
    with pytest.raises(UserError, match="lower min_history"):
        collect(min_history=9)
    with pytest.raises(UserError, match="last_targets=0"):
        PromptWindow(last_targets=0)
    with pytest.raises(UserError, match="there are 3 prompts, but a generation step may need 4"):
        prompt_block(3, 4, 0, 0)


def test_a_pass_shows_every_prompt_once_in_whole_blocks():
    assert blocks_per_pass(10, 3) == 3
    blocks = [prompt_block(10, 3, number, seed=1) for number in range(6)]
    for begin in (0, 3):
        seen = np.concatenate(blocks[begin : begin + 3])
        assert len(set(seen.tolist())) == 9
        assert set(seen.tolist()) <= set(range(10))
    assert [b.tolist() for b in blocks[:3]] != [b.tolist() for b in blocks[3:]], "each pass has its own order"
    assert prompt_block(10, 3, 4, seed=1).tolist() == blocks[4].tolist()
    assert prompt_block(10, 3, 4, seed=2).tolist() != blocks[4].tolist()
