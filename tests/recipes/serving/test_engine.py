"""Batches of users who ask at the same time: the lists of one, slots that come back, chains that delay nobody."""

from __future__ import annotations

import queue
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from reasonrec.data_gen.histories import UserHistory
from reasonrec.recipes.recommender import Recommender
from reasonrec.recipes.serving.engine import Ask, Closed, Engine, Full, Reply

FOREVER = 3600.0  # a batch that waits so long begins when it is full
Start = Callable[..., Engine]


class Asked:
    """A question whose answers can be waited for."""

    def __init__(self, *items: int, **options: Any) -> None:
        self.arrived: queue.Queue[Any] = queue.Queue()
        self.ask = Ask(UserHistory.of(items), self.arrived.put, **options)

    @property
    def reply(self) -> Any:
        return self.arrived.get(timeout=120)


def test_who_asks_together_is_answered_together_as_if_alone(engine_of: Start, served: Recommender) -> None:
    engine, batches = engine_of(max_batch=3, wait=FOREVER), []
    engine._measured = lambda users, seconds: batches.append(users)
    asked = [Asked(1, 2, 3, k=3), Asked(4, k=7), Asked(k=5, exclude=[0, 1])]
    for each in asked[:2]:
        engine.submit([each.ask])
    assert engine.open == 2, "they wait for a third"
    engine.submit([asked[2].ask])
    replies = [each.reply for each in asked]
    assert batches == [3]
    for reply, history, k, exclude in zip(replies, ([1, 2, 3], [4], []), (3, 7, 5), ([], [], [0, 1]), strict=True):
        items, scores = served.rank([history], k=k, exclude=[exclude])
        assert [served.items.number(item.id) for item in reply.items] == items[0].tolist()
        np.testing.assert_allclose([item.score for item in reply.items], scores[0], atol=1e-5)
        assert reply.seconds > 0


def test_who_asks_for_something_else_is_in_another_batch(engine_of: Start) -> None:
    engine, batches = engine_of(max_batch=2, wait=FOREVER), []
    engine._measured = lambda users, seconds: batches.append(users)
    asked = [Asked(1, repeats=True), Asked(1, repeats=False)]
    engine.submit([each.ask for each in asked])
    engine.close()  # the second batch is never full
    first, second = (each.reply for each in asked)
    assert batches == [1, 1]
    assert "1" not in {item.id for item in second.items}
    assert len(first.items) == len(second.items) == 10


def test_no_slot_no_queue(engine_of: Start) -> None:
    engine = engine_of(max_batch=9, wait=FOREVER, capacity=2)
    asked = [Asked(1), Asked(2), Asked(3)]
    with pytest.raises(Full):
        engine.submit([each.ask for each in asked])
    assert engine.open == 0, "all of them or none"
    engine.submit([asked[0].ask, asked[1].ask])
    with pytest.raises(Full):
        engine.submit([asked[2].ask])
    engine.leave([asked[0].ask])
    assert engine.open == 1
    engine.submit([asked[2].ask])
    engine.close()
    assert isinstance(asked[1].reply, Reply), "who waits is answered before it ends"
    assert isinstance(asked[2].reply, Reply)
    assert asked[0].arrived.empty(), "nobody waits for this one"
    with pytest.raises(Closed):
        engine.submit([asked[0].ask])


def test_who_comes_back_needs_neither_model_nor_slot(engine_of: Start) -> None:
    engine, batches = engine_of(max_batch=2, wait=0.0, capacity=1), []
    engine._measured = lambda users, seconds: batches.append(users)
    first, shorter = Asked(1, 2, exclude=[5, 4], k=6), Asked(1, 2, exclude=[4, 5], k=4)
    engine.submit([first.ask])
    known = first.reply.items
    stranger = Asked(3)
    engine.submit([shorter.ask, stranger.ask])  # one slot serves both
    assert shorter.reply.items == known[:4]
    assert isinstance(stranger.reply, Reply)
    engine.close()
    assert sum(batches) == 2, "the first, and the stranger"
    assert engine.remembered.found == 1


@pytest.mark.parametrize(
    "other",
    [{"k": 7}, {"exclude": [3]}, {"repeats": True}, {"mode": "reasoning"}],
    ids=lambda other: next(iter(other)),
)
def test_another_question_is_not_taken_for_the_same(engine_of: Start, other: dict[str, Any]) -> None:
    engine, batches = engine_of(wait=0.0), []
    engine._measured = lambda users, seconds: batches.append(users)
    for asked in (Asked(1, 2, k=6), Asked(1, 2, **{"k": 6, **other}), Asked(2, 1, k=6)):
        engine.submit([asked.ask])
        assert isinstance(asked.reply, Reply)
    assert batches == [1, 1, 1]


def test_another_recommender_starts_with_nothing_remembered(engine_of: Start, served: Recommender) -> None:
    engine, asked = engine_of(wait=0.0), Asked(1, 2)
    engine.submit([asked.ask])
    assert isinstance(asked.reply, Reply)
    assert engine.remembered.bytes > 0
    engine.take(served)
    assert engine.remembered.bytes == 0


def test_a_batch_that_everybody_left_is_none(engine_of: Start) -> None:
    engine = engine_of(max_batch=2, wait=FOREVER)
    left = Asked(1)
    engine.submit([left.ask])
    engine.leave([left.ask])
    asked = [Asked(2), Asked(3)]
    engine.submit([each.ask for each in asked])
    assert all(isinstance(each.reply, Reply) for each in asked)


def test_what_goes_wrong_is_told_and_the_next_are_answered(engine_of: Start) -> None:
    engine = engine_of(max_batch=2, wait=FOREVER)
    bad = [Asked(1, exclude=[10**6]), Asked(2)]
    engine.submit([each.ask for each in bad])
    assert all(isinstance(each.reply, Exception) for each in bad)
    assert engine.open == 0
    good = [Asked(1), Asked(2)]
    engine.submit([each.ask for each in good])
    assert all(isinstance(each.reply, Reply) for each in good)


def test_a_model_that_was_not_judged_says_why_it_does_not_think(engine_of: Start) -> None:
    engine, asked = engine_of(wait=0.0), Asked(1, 2, mode="reasoning")
    engine.submit([asked.ask])
    assert "not measured" in asked.reply.note
    assert asked.ask.thought is None


def test_chains_grow_before_everybodys_eyes(engine_of: Start, served: Recommender) -> None:
    engine, seen = engine_of(wait=0.0, unproven=True, max_chain=6), []
    asked = Asked(1, 2, 3, mode="reasoning", thought=seen.append)
    engine.submit([asked.ask])
    reply = asked.reply
    alone = served.explain([1, 2, 3], unproven=True, max_chain=6)
    assert reply.thoughts == alone.thoughts
    assert [item.id for item in reply.items] == [item.id for item in alone.recommendations]
    assert 1 <= len(seen) <= 6
    assert seen[-1] == alone.thoughts[0], "the whole chain, before there are items"


def test_who_does_not_think_waits_for_one_step(engine_of: Start) -> None:
    engine, order = engine_of(wait=0.0, unproven=True, max_chain=5), []
    quick = Asked(4)

    def first_step(_: str) -> None:
        if not order:
            order.append("step")
            engine.submit([quick.ask])
        elif quick.ask.gone is False and not quick.arrived.empty() and "quick" not in order:
            order.append("quick")

    slow = Asked(1, 2, mode="reasoning", thought=first_step)
    engine.submit([slow.ask])
    assert isinstance(slow.reply, Reply)
    assert order == ["step", "quick"], "answered while the chain is written"


def test_the_chain_of_who_hangs_up_ends_at_the_next_step(engine_of: Start) -> None:
    engine = engine_of(max_batch=2, wait=FOREVER, unproven=True, max_chain=8)
    steps, slots = [], []

    def leaves(_: str) -> None:
        steps.append(engine.open)
        if len(steps) == 2:
            engine.leave([gone.ask])
            engine.leave([gone.ask])
            steps.append(engine.open)

    gone = Asked(1, 2, mode="reasoning", thought=leaves)
    stays = Asked(3, mode="reasoning", thought=lambda _: slots.append(engine.open))
    engine.submit([gone.ask, stays.ask])
    assert isinstance(stays.reply, Reply)
    assert steps == [2, 2, 1], "the slot is free at once, and nothing is told to who is gone"
    assert slots[0] == 2
    assert set(slots[2:]) == {1}, "the other chain goes on"
    assert engine.open == 0
    assert gone.arrived.empty()
