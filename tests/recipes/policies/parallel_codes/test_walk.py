"""The three laws by enumeration of every item and order, on a tiny model read the slow and plain way."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from reasonrec.recipes.decoding.prefix import read
from reasonrec.recipes.policies.parallel_codes.laws import Law
from reasonrec.recipes.policies.parallel_codes.sets import SetIndex
from reasonrec.recipes.policies.parallel_codes.walk import merged, score_items, search
from reasonrec.tokenizers.vocabulary import Vocabulary

BEGIN = 9
SIZES = (3, 4, 3)
FIRST = np.cumsum([0, *SIZES[:-1]])
LAWS: list[tuple[Law, tuple[int, ...] | None]] = [
    *(("ordered", order) for order in itertools.permutations(range(3))),
    ("crss", None),
    ("free", None),
]


class World:
    def __init__(self) -> None:
        torch.manual_seed(3)
        config = LlamaConfig(
            vocab_size=BEGIN + 1 + sum(SIZES),
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            initializer_range=0.4,
            tie_word_embeddings=True,
            max_position_embeddings=64,
        )
        self.model = LlamaForCausalLM(config).eval()
        every = np.array(list(itertools.product(*map(range, SIZES))))
        self.codes = np.random.default_rng(1).permutation(every)[:17]
        self.sets = SetIndex.from_codes(self.codes, SIZES)
        self.vocabulary = Vocabulary(SIZES, BEGIN)
        self.prompts = [[1, 2, 3, BEGIN], [4, BEGIN]]

    def prefix(self, room: int = 400) -> Any:
        ids = torch.tensor([[0] * (4 - len(row)) + row for row in self.prompts])
        return read(self.model, ids, (ids > 0).long(), room=room, ahead=3)

    @torch.no_grad()
    def logits(self, prompt: list[int], codes: list[tuple[int, int]]) -> np.ndarray:
        """Logits of all columns behind (codebook, code) pairs."""
        ids = [*prompt, *(BEGIN + 1 + FIRST[book] + code for book, code in codes)]
        out = self.model(input_ids=torch.tensor([ids])).logits[0, -1].double()
        return out[BEGIN + 1 :].numpy()

    def slow(self, prompt: list[int], law: Law, order: tuple[int, ...] | None) -> np.ndarray:
        """Probability of each item: the sum over all paths, chosen code by code, nothing cut short."""
        total = np.zeros(len(self.codes))

        def go(chosen: list[tuple[int, int]], fits: np.ndarray, p: float) -> None:
            left = [book for book in range(3) if book not in dict(chosen)]
            if not left:
                total[fits] += p
                return
            logits = self.logits(prompt, chosen)
            if law == "ordered":
                books = [order[len(chosen)]]  # type: ignore[index]
            elif law == "crss":
                best = []
                for book in left:
                    mine = logits[FIRST[book] : FIRST[book] + SIZES[book]]
                    best.append((np.exp(mine.max()) / np.exp(mine).sum(), -book))
                books = [-max(best)[1]]
            else:
                books = left
            legal = [(book, code) for book in books for code in sorted(set(self.codes[fits, book].tolist()))]
            weight = np.exp([logits[FIRST[book] + code] for book, code in legal])
            for (book, code), share in zip(legal, weight / weight.sum(), strict=True):
                go([*chosen, (book, code)], fits & (self.codes[:, book] == code), p * share)

        go([], np.ones(len(self.codes), dtype=bool), 1.0)
        return total


@pytest.fixture(scope="module")
def world() -> World:
    return World()


@pytest.mark.parametrize(("law", "order"), LAWS)
def test_scores_are_those_of_enumeration_and_sum_to_one(world: World, law: Law, order: Any) -> None:
    items = torch.arange(17).expand(2, -1)
    found = score_items(
        world.model, world.sets, world.vocabulary, world.prefix(), law, items,
        order=None if order is None else torch.tensor(order),
    )  # fmt: skip
    for row, prompt in enumerate(world.prompts):
        slow = world.slow(prompt, law, order)
        assert slow.sum() == pytest.approx(1)
        np.testing.assert_allclose(found[row].exp().numpy(), slow, rtol=1e-4)


@pytest.mark.parametrize(("law", "order"), LAWS)
def test_a_search_as_wide_as_the_catalogue_ranks_all_of_it(world: World, law: Law, order: Any) -> None:
    barred = torch.zeros(2, 17, dtype=torch.bool)
    barred[0, 3] = barred[1, :12] = True
    excluded = [row.nonzero()[:, 0].tolist() for row in barred]
    found = search(
        world.model, world.sets, world.vocabulary, world.prefix(), law, k=17, num_beams=17 * 6,
        order=None if order is None else torch.tensor(order), barred=world.sets.barred(excluded),
    )  # fmt: skip
    assert bool(found.proven.all())
    for row, prompt in enumerate(world.prompts):
        slow = np.where(barred[row], 0, world.slow(prompt, law, order))
        rank = np.argsort(-slow, kind="stable")[: int((~barred[row]).sum())]
        assert found.items[row, : len(rank)].tolist() == rank.tolist()
        assert (found.items[row, len(rank) :] == -1).all()
        np.testing.assert_allclose(found.scores[row, : len(rank)].exp().numpy(), slow[rank], rtol=1e-4)


@pytest.mark.parametrize(("law", "order"), LAWS[-3:-1])
def test_an_exact_search_proves_what_a_narrow_one_finds(world: World, law: Law, order: Any) -> None:
    kind = {"order": None if order is None else torch.tensor(order)}
    found = search(
        world.model, world.sets, world.vocabulary, world.prefix(2), law, k=3, num_beams=3, exact=True, **kind
    )
    for row, prompt in enumerate(world.prompts):
        if found.proven[row]:
            best = np.argsort(-world.slow(prompt, law, order), kind="stable")[:3]
            assert found.items[row].tolist() == best.tolist()
    assert bool(found.proven.any())


def test_no_item_scores_nothing_and_subsets_score_alike(world: World) -> None:
    items = torch.tensor([[5, -1, 2], [0, 3, -1]])
    found = score_items(world.model, world.sets, world.vocabulary, world.prefix(), "crss", items)
    everything = score_items(
        world.model, world.sets, world.vocabulary, world.prefix(), "crss", torch.arange(17).expand(2, -1)
    )
    assert (found[items < 0] == -torch.inf).all()
    expected = everything.gather(1, items.clamp(min=0))
    torch.testing.assert_close(found[items >= 0], expected[items >= 0])


def test_parts_of_an_item_add_up() -> None:
    item, score = merged(torch.tensor([[4, -1, 4, 2]]), torch.tensor([[-1.0, -torch.inf, -2.0, -3.0]]))
    found = {int(i): float(s) for i, s in zip(item[0], score[0], strict=True) if i >= 0}
    assert found == pytest.approx({4: float(np.logaddexp(-1, -2)), 2: -3.0})
