"""Growing histories against fresh prompts."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from reasonrec.recipes.decoding.search import beam_search
from reasonrec.recipes.decoding.session import UserState
from reasonrec.recipes.policies.semantic_id import CodeAnswers

MAX_HISTORY = 4


def fresh(world, head, items, tail, **options):
    ids = torch.tensor([[*head, *(token for item in items for token in world.ids[item]), *tail]])
    return beam_search(world.model, world.trie, world.vocabulary, ids, torch.ones_like(ids), **options)


def make(world, head, tail, num_beams=12):
    return UserState(
        world.model,
        CodeAnswers(world.trie, world.vocabulary),
        head=head,
        tail=tail,
        max_history=MAX_HISTORY,
        longest_item=world.trie.depth,
        num_beams=num_beams,
    )


@pytest.mark.parametrize("head", [[1, 2, 4], []], ids=["head", "no head"])
@pytest.mark.parametrize("before", [[], [5, 6]], ids=["marker", "tail and marker"])
def test_an_appended_item_counts_as_in_a_fresh_prompt(world, head, before):
    tail = [*before, world.vocabulary.begin_id]
    state = make(world, head, tail)
    history: list[int] = []
    for step, item in enumerate([None, 7, 3, 3, 11, 30, 2, 9]):
        if item is not None:
            state.append(world.ids[item])
            history.append(item)
        if step == 2:
            continue  # two items between two searches
        exclude = [history] if step % 2 else None
        window = history[-MAX_HISTORY:]
        for k, num_beams in ((5, 12), (3, 3)):
            found = state.search(k=k, num_beams=num_beams, exclude=exclude, exact=True)
            expected = fresh(world, head, window, tail, k=k, num_beams=num_beams, exclude=exclude, exact=True)
            assert torch.equal(found.items, expected.items)
            torch.testing.assert_close(found.scores, expected.scores, atol=1e-5, rtol=1e-5)
        assert state.n_items == len(window)


def test_the_history_is_read_once_while_the_window_is_not_full(world):
    tail = [world.vocabulary.begin_id]
    state = make(world, [1, 2], tail)
    read = []
    for item in (7, 3, 20, 11, 30):
        state.append(world.ids[item])
        state.search(k=2)
        read.append(state.tokens_read)
    length = [len(world.ids[item]) for item in (7, 3, 20, 11, 30)]
    assert read[0] == 2 + length[0] + 1
    assert [b - a for a, b in pairwise(read[:4])] == [n + 1 for n in length[1:4]]
    assert read[4] - read[3] == 2 + sum(length[1:]) + 1, "the oldest item left: everything moved"


def test_two_states_do_not_disturb_each_other(world):
    tail = [world.vocabulary.begin_id]
    one, other = make(world, [1], tail), make(world, [1], tail)
    one.append(world.ids[4])
    first = one.search(k=3)
    other.append(world.ids[9])
    other.search(k=3)
    assert torch.equal(one.search(k=3).items, first.items)
