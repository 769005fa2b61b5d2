"""Choosing groups and counting what was rolled out, with numbers worked by hand."""

from __future__ import annotations

import numpy as np
import pytest

from reasonrec.recipes.decoding.sample import Rollouts
from reasonrec.recipes.trainers.algorithms import Grpo, Srpo
from reasonrec.recipes.trainers.groups import Pool, alive, choose, hinted, telemetry
from reasonrec.recipes.trainers.item_grpo import RolloutSettings
from reasonrec.recipes.trainers.scoring import Scores, Texts
from reasonrec.tokenizers.errors import UserError


def pool(totals, hits, items, masks, levels=None, permuted=None) -> Pool:
    rows = len(totals)
    rollouts = Rollouts(
        [[1]] * rows, [[2, 3]] * rows, masks, [[0.0, 0.0]] * rows, np.array(items), np.zeros(rows, np.int64),
        np.zeros(rows, bool), np.zeros(rows, np.int64), np.full(rows, np.nan),
    )  # fmt: skip
    scores = Scores(
        np.array(totals, float)[:, None],
        np.array(totals, float),
        np.array(hits),
        np.array(levels or [0] * rows),
        np.array(permuted or [np.nan] * rows, float),
        np.zeros(rows, bool),
    )
    return Pool(np.arange(rows // 2), rollouts, scores)


EXAMPLE = pool(
    totals=[0, 0, 1, 0, 0.5, 0.5, 0, 0.5],
    hits=[False, False, True, False, False, False, False, False],
    items=[1, 1, 2, 3, 4, 4, 5, 6],
    masks=[[1, 1], [1, 0], [1, 1], [1, 1], [1, 0], [1, 0], [1, 1], [1, 1]],
    levels=[0, 0, 2, 0, 1, 1, 0, 1],
    permuted=[0, 0, 0, 0, 0, 0, 1, 0],
)


def test_living_groups_first_then_dead_ones_in_the_order_of_the_data():
    living = np.array([False, True, False, True])
    assert choose(living, 1).tolist() == [1]
    assert choose(living, 2).tolist() == [1, 3]
    assert choose(living, 3).tolist() == [1, 3, 0]
    assert choose(np.ones(4, bool), 2).tolist() == [0, 1]
    assert choose(np.zeros(4, bool), 2).tolist() == [0, 1]


def test_what_the_log_says():
    advantage = Grpo(2)(EXAMPLE.scores.total, EXAMPLE.scores.hits)
    permuted = Grpo(2)(EXAMPLE.scores.permuted_total, EXAMPLE.scores.permuted_hits)
    assert alive(advantage, 2).tolist() == [False, True, False, True]
    log = telemetry(EXAMPLE, advantage, permuted, np.array([1]), depth=2)
    assert log["rollouts/groups"] == 4
    assert log["rollouts/zero_variance"] == 0.5
    assert log["rollouts/zero_variance_permuted"] == 0.75
    assert log["rollouts/nonzero_advantage"] == 0.5
    assert log["rollouts/nonzero_advantage_permuted"] == 0.25
    assert log["rollouts/trained_nonzero_advantage"] == 1
    assert log["rollouts/exact_hit"] == 1 / 8
    assert log["rollouts/prefix_1"] == 4 / 8
    assert log["rollouts/prefix_2"] == 1 / 8
    assert log["rollouts/reward"] == 2.5 / 8
    assert log["rollouts/tokens"] == 13
    assert log["rollouts/tokens_with_gradient"] == pytest.approx(4 / 13), "the other living group was discarded"
    assert log["rollouts/distinct_items"] == pytest.approx((1 + 2 + 1 + 2) / 8)
    assert "rollouts/chain_length" not in log


def test_nothing_is_said_about_permuted_targets_that_were_not_scored():
    unknown = pool([0, 1], [False, True], [1, 2], [[1, 1]] * 2)
    advantage = Srpo(2, bonus_k=1)(unknown.scores.total, unknown.scores.hits)
    log = telemetry(unknown, advantage, advantage * 0, np.array([0]), depth=1)
    assert not any("permuted" in name for name in log)


def test_pools_are_taken_apart_and_joined():
    parts = [EXAMPLE.take([0]), EXAMPLE.take([2, 1])]
    joined = Pool.join(parts)
    assert joined.numbers.tolist() == [0, 2, 1]
    assert joined.scores.total.tolist() == [0, 0, 0.5, 0.5, 1, 0]
    assert joined.rollouts.items.tolist() == [1, 1, 4, 4, 2, 3]
    assert EXAMPLE.rows([1, 3]).tolist() == [2, 3, 6, 7]


def test_dead_groups_get_the_fewest_codes_that_bring_them_to_life():
    """Prompt 0 lives behind one code, prompt 2 behind two, prompt 3 never does, and prompt 4 has a single code."""
    start = pool([0, 0, 1, 0, 0, 0, 0, 0, 0, 0], [False] * 10, list(range(10)), [[1, 1]] * 10)
    answers = {0: [7, 8, 9], 2: [5, 6, 4], 3: [5, 6], 4: [3]}
    calls = []

    def again(numbers, given):
        calls.append((numbers.tolist(), given))
        living = [(number, len(codes)) in {(0, 1), (2, 2)} for number, codes in zip(numbers, given, strict=True)]
        found = pool([total for lives in living for total in (lives, 0)], [False] * 2 * len(numbers),
                     [100 + number for number in numbers for _ in range(2)], [[1, 1]] * 2 * len(numbers))  # fmt: skip
        found.numbers = numbers
        return found

    def lives(found):
        return alive(Grpo(2)(found.scores.total, found.scores.hits), 2)

    dead = (~lives(start)).nonzero()[0]
    assert dead.tolist() == [0, 2, 3, 4]
    found = hinted(start, dead, answers.__getitem__, again, lives)
    assert calls == [([0, 2, 3], [[7], [5], [5]]), ([2], [[5, 6]])]
    assert found.numbers.tolist() == [0, 1, 2, 3, 4]
    assert found.rollouts.items.tolist() == [100, 100, 2, 3, 102, 102, 6, 7, 8, 9]
    assert lives(found).tolist() == [True, True, True, False, False]
    assert hinted(start, dead[:0], answers.__getitem__, again, lives).rollouts.items.tolist() == list(range(10))


def test_texts_are_decoded_when_they_are_looked_at():
    calls = []

    def decode(ids):
        calls.append(len(ids))
        return [str(i) for i in ids]

    texts = Texts([[1], [2, 3]], decode)
    assert len(texts) == 2
    assert calls == []
    assert texts[1] == "[2, 3]"
    assert list(texts) == ["[1]", "[2, 3]"]
    assert texts[:1] == ["[1]"]
    assert calls == [2]


def test_hints_need_codes_that_are_first(tiny_base, make_grpo, make_kit, monkeypatch):
    kit = make_kit(tiny_base)
    monkeypatch.setattr(type(kit.policy), "with_tree", False)
    with pytest.raises(UserError, match=r"hint_weight=0\.1 gives the first codes .* policy semantic_id has none"):
        make_grpo(tiny_base, kit=kit, settings=RolloutSettings(hint_weight=0.1))
