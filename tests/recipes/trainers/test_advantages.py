"""Advantages against tables worked by hand, and what has to hold for any rewards."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reasonrec.recipes.trainers.advantages import (
    bonus_table,
    by_token,
    grpo_advantage,
    max_at_k_advantage,
    pass_at_k_bonus,
    permuted_rows,
    srpo_advantage,
    with_given,
    zero_variance,
)
from reasonrec.tokenizers.errors import UserError

# n = 10, k = 4: c, A_pos, A_neg.
PUBLISHED = [
    (1, 1.2247, -0.1361),
    (2, 0.7071, -0.1768),
    (3, 0.4472, -0.1917),
    (4, 0.2773, -0.1849),
    (5, 0.1562, -0.1562),
    (6, 0.0692, -0.1038),
    (7, 0.0, 0.0),
    (8, 0.0, 0.0),
    (9, 0.0, 0.0),
    (10, 0.0, 0.0),
]


def tensor(values: list[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize(("hits", "positive", "negative"), PUBLISHED)
def test_the_bonus_is_the_published_table(hits: int, positive: float, negative: float) -> None:
    table = bonus_table(10, 4)
    assert float(table[0][hits]) == pytest.approx(positive, abs=6e-5)
    assert float(table[1][hits]) == pytest.approx(negative, abs=6e-5)


def test_the_bonus_worked_by_hand() -> None:
    # n = 3, k = 2, one hit: C(2,2)/C(3,2) = 1/3 of the pairs miss, σ = √(2/9); a miss: 1/3 − C(1,1)/C(2,1) = −1/6.
    positive, negative = bonus_table(3, 2, epsilon=0.0)
    assert positive.tolist() == pytest.approx([0, (1 / 3) / math.sqrt(2 / 9), 0, 0])
    assert negative.tolist() == pytest.approx([0, (-1 / 6) / math.sqrt(2 / 9), 0, 0])
    # k = 1 is the standardised hit itself: ρ = c/n.
    positive, negative = bonus_table(4, 1, epsilon=0.0)
    assert positive.tolist() == pytest.approx([0, math.sqrt(3), 1, math.sqrt(1 / 3), 0])
    assert negative.tolist() == pytest.approx([0, -math.sqrt(1 / 3), -1, -math.sqrt(3), 0])


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 40).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n))))
def test_the_bonus_by_factorials(size: tuple[int, int]) -> None:
    n, k = size
    positive, negative = bonus_table(n, k)
    for c in range(n + 1):
        if c == 0 or n - c < k:
            assert positive[c] == negative[c] == 0
            continue
        none = math.comb(n - c, k) / math.comb(n, k)
        sigma = math.sqrt(none * (1 - none))
        beside = math.comb(n - c - 1, k - 1) / math.comb(n - 1, k - 1)
        assert float(positive[c]) == pytest.approx(none / (sigma + 1e-6), rel=1e-9)
        assert float(negative[c]) == pytest.approx((none - beside) / (sigma + 1e-6), rel=1e-9)
        assert positive[c] > 0 > negative[c]


def test_groups_without_hit_or_with_too_many_get_no_bonus() -> None:
    none = torch.zeros(10, dtype=torch.bool)
    assert pass_at_k_bonus(none, 10).tolist() == [0.0] * 10
    many = torch.tensor([True] * 7 + [False] * 3)
    assert pass_at_k_bonus(many, 10).tolist() == [0.0] * 10
    assert pass_at_k_bonus(many, 10, k=3).abs().min() > 0


def test_the_published_groups() -> None:
    one = tensor([1.0] + [0.0] * 9)
    hit = one.bool()
    assert grpo_advantage(one, 10).tolist() == pytest.approx([2.846] + [-0.3162] * 9, abs=1e-3)
    assert srpo_advantage(one, hit, 10).tolist() == pytest.approx([4.071] + [-0.4523] * 9, abs=1e-3)
    # A lone partial match looks the same to GRPO, and gets no bonus.
    half = one / 2
    assert grpo_advantage(half, 10).tolist() == pytest.approx([2.846] + [-0.3162] * 9, abs=1e-3)
    assert torch.equal(srpo_advantage(half, torch.zeros(10, dtype=torch.bool), 10), grpo_advantage(half, 10))


def test_a_hit_is_a_flag_and_not_a_reward_of_one() -> None:
    # Weighted sums: the hit has 1.17, and a partial match happens to have exactly 1.
    rewards, hits = tensor([1.17, 1.0, 0.2, 0.2, 0.2]), torch.tensor([True, False, False, False, False])
    bonus = srpo_advantage(rewards, hits, 5, k=2) - grpo_advantage(rewards, 5)
    positive, negative = bonus_table(5, 2)
    assert bonus.tolist() == pytest.approx([float(positive[1])] + [float(negative[1])] * 4)
    with pytest.raises(UserError, match="pass booleans"):
        pass_at_k_bonus(rewards, 5)


def test_two_groups_worked_by_hand() -> None:
    # (1, 2, 3): mean 2, deviation 1. (0, 0, 4): mean 4/3, deviation √(16/3).
    rewards = tensor([1, 2, 3, 0, 0, 4])
    deviation = math.sqrt(16 / 3)
    wanted = [-1, 0, 1, -4 / 3 / deviation, -4 / 3 / deviation, 8 / 3 / deviation]
    assert grpo_advantage(rewards, 3).tolist() == pytest.approx(wanted, abs=1e-5)
    assert grpo_advantage(rewards, 3, scale=False).tolist() == pytest.approx([-1, 0, 1, -4 / 3, -4 / 3, 8 / 3])


@pytest.mark.parametrize("value", [0.707, 0.1, 1 / 3, 0.95, 1e6])
def test_equal_rewards_are_worth_exactly_nothing(value: float) -> None:
    rewards = torch.full((10,), value, dtype=torch.float32)
    assert grpo_advantage(rewards, 10).tolist() == [0.0] * 10
    assert zero_variance(rewards, 10).all()
    rounded = tensor([0.1 + 0.2, 0.3] * 5)
    assert grpo_advantage(rounded, 10).tolist() == [0.0] * 10


def test_what_could_not_be_scored_takes_no_part() -> None:
    nan = float("nan")
    found = grpo_advantage(tensor([1, 3, nan, nan, nan, nan, nan, nan, 5]), 3)
    assert found.tolist() == pytest.approx([-math.sqrt(0.5), math.sqrt(0.5), 0, 0, 0, 0, 0, 0, 0], abs=1e-5)
    assert zero_variance(tensor([1, 3, nan, nan, nan, nan, nan, nan, 5]), 3).tolist() == [False, True, True]


def test_dtype_and_shape() -> None:
    rewards = torch.rand(8, dtype=torch.float32)
    hits = rewards > 0.5
    assert srpo_advantage(rewards, hits, 4, k=2).dtype == torch.float32
    assert pass_at_k_bonus(hits, 4, k=2).dtype == torch.float64
    with pytest.raises(UserError, match="whole groups"):
        grpo_advantage(rewards, 3)
    with pytest.raises(UserError, match="at least two"):
        grpo_advantage(rewards, 1)
    with pytest.raises(UserError, match="num_generations"):
        pass_at_k_bonus(hits, 4, k=5)
    with pytest.raises(UserError, match="1 ≤ k"):
        bonus_table(4, 0)
    with pytest.raises(UserError, match="same rows"):
        srpo_advantage(rewards, hits[:4], 4)


group = st.integers(2, 8).flatmap(
    lambda n: st.lists(
        st.tuples(st.integers(-100, 100), st.booleans()), min_size=n, max_size=3 * n
    ).map(lambda rows: (n, rows[: len(rows) // n * n]))
)  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(group, st.data())
def test_what_holds_for_any_rewards(case: tuple[int, list[tuple[int, bool]]], data: st.DataObject) -> None:
    n, rows = case
    rewards = tensor([value / 10 for value, _ in rows])
    hits = torch.tensor([hit for _, hit in rows])
    k = data.draw(st.integers(1, n))
    advantage = srpo_advantage(rewards, hits, n, k=k)
    assert advantage.reshape(-1, n).sum(1).tolist() == pytest.approx([0.0] * (len(rows) // n), abs=1e-6)

    order = torch.tensor(data.draw(st.permutations(range(n))))
    within = (torch.arange(0, len(rows), n)[:, None] + order).reshape(-1)
    assert torch.allclose(srpo_advantage(rewards[within], hits[within], n, k=k), advantage[within])
    groups = torch.arange(len(rows)).reshape(-1, n).flip(0).reshape(-1)
    assert torch.allclose(srpo_advantage(rewards[groups], hits[groups], n, k=k), advantage[groups])

    # A shift changes nothing; a factor changes nothing but the sign, up to ε, and scales what is not normalised.
    base = grpo_advantage(rewards, n)
    assert torch.allclose(grpo_advantage(rewards + 3, n), base, atol=1e-9)
    assert torch.allclose(grpo_advantage(-5 * rewards, n), -base, atol=1e-4)
    assert torch.allclose(
        grpo_advantage(5 * rewards, n, scale=False), 5 * grpo_advantage(rewards, n, scale=False), atol=1e-9
    )
    assert torch.equal(zero_variance(rewards, n), (base.reshape(-1, n) == 0).all(1))
    raised = pass_at_k_bonus(hits, n, k=k).reshape(-1, n)
    for row, hit in zip(raised, hits.reshape(-1, n), strict=True):
        assert row[hit].numel() == 0 or row[~hit].numel() == 0 or row[hit].min() >= row[~hit].max()


def test_what_a_list_gains_worked_by_hand() -> None:
    """Four rollouts, lists of two: the best gains .9 beside 0, .9 − .5 beside .5, and nothing beside its double."""
    found = max_at_k_advantage(torch.tensor([0.9, 0.9, 0.5, float("nan")]).double(), 4, k=2, scale=False)
    assert found.tolist() == pytest.approx([(0 + 0.4 + 0.9) / 3, (0 + 0.4 + 0.9) / 3, 0.5 / 3, 0.0])
    whole = max_at_k_advantage(torch.tensor([1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0]).double(), 4, k=4, scale=False)
    assert whole.tolist() == [1, 0, 0, 0, 0, 0, 0, 0]  # two that hit are each other's double


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(-2, 2), min_size=3, max_size=7), st.data())
def test_what_a_list_gains_by_counting_lists(rewards: list[float], data: st.DataObject) -> None:
    size = len(rewards)
    k = data.draw(st.integers(2, size))
    gains = [
        np.mean([
            max(rewards[i] - max(rewards[j] for j in others), 0)
            for others in itertools.combinations([j for j in range(size) if j != i], k - 1)
        ])
        for i in range(size)
    ]  # fmt: skip
    found = max_at_k_advantage(torch.tensor(rewards).double(), size, k=k, scale=False)
    assert found.tolist() == pytest.approx(gains, abs=1e-6)
    if max(rewards) - min(rewards) > 0.01:
        scaled = max_at_k_advantage(torch.tensor(rewards).double(), size, k=k)
        assert scaled.tolist() == pytest.approx(
            (np.array(gains) / (np.std(rewards, ddof=1) + 1e-6)).tolist(), abs=1e-4
        )


def test_a_list_is_drawn_from_a_group() -> None:
    for k in (1, 5):
        with pytest.raises(UserError, match=rf"k={k} has to be from 2 to num_generations=4"):
            max_at_k_advantage(torch.zeros(4), 4, k=k)


def test_share_of_dead_groups_and_under_permuted_targets() -> None:
    # Each prompt's rollouts know their own target in one of two tries; nobody knows the others'.
    targets = np.repeat(np.arange(6), 2)
    predicted = np.where(np.arange(12) % 2 == 0, targets, 99)
    own = torch.tensor((predicted == targets).astype(float))
    other = torch.tensor((predicted == targets[permuted_rows(12, 2, seed=0)]).astype(float))
    assert not zero_variance(own, 2).any()
    assert zero_variance(other, 2).all()


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 20), st.integers(1, 5), st.integers(0, 9))
def test_permuted_targets_are_those_of_other_groups(groups: int, size: int, seed: int) -> None:
    rows = permuted_rows(groups * size, size, seed).reshape(groups, size)
    source = rows // size
    assert (source == source[:, :1]).all(), "one target for all rollouts of a prompt"
    assert (source[:, 0] != np.arange(groups)).all()
    assert sorted(source[:, 0]) == list(range(groups))
    assert (rows % size == np.arange(size)).all()
    assert permuted_rows(groups * size, size, seed).tolist() == rows.reshape(-1).tolist()


def test_permuting_takes_two_groups() -> None:
    with pytest.raises(UserError, match="at least two whole groups"):
        permuted_rows(4, 4, 0)


def test_a_chain_and_its_answer_may_be_worth_different_amounts():
    chain, answer = torch.tensor([1.0, -1.0]), torch.tensor([5.0, 0.0])
    found = by_token(chain, answer, np.array([2, 0]), 4)
    assert found.tolist() == [[1, 1, 5, 5], [0, 0, 0, 0]]
    assert by_token(chain, chain.clone(), np.array([2, 0]), 4) is chain


def test_codes_that_were_given_have_the_weight_of_their_loss():
    advantage = torch.tensor([[1.0, 1, 1, 1], [-2.0, -2, -2, -2], [3.0, 3, 3, 3]])
    rows = with_given(advantage[:, 0], np.array([2, 0, 1]), np.array([0, 0, 2]), 0.25, 4)
    found = with_given(advantage, np.array([2, 0, 1]), np.array([0, 0, 2]), 0.25, 4)
    assert rows.equal(found)
    assert found.tolist() == [[0.25, 0.25, 1, 1], [-2, -2, -2, -2], [3, 3, 0.25, 3]]
