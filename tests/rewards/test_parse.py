"""Parsing completions: what is a valid answer, and what is wrong with the others."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reasonrec.rewards.parse import Catalogue, Flags, Parsed, Parser
from reasonrec.tokenizers.errors import UserError
from reasonrec.tokenizers.index import ItemIndex, build_index
from reasonrec.tokenizers.vocabulary import Vocabulary

# Items 0 and 1 share their codes: (0, 1, 0) and (0, 1, 1); items 2 and 3 are (1, 2) and (2, 0).
INDEX = build_index(np.array([[0, 1], [0, 1], [1, 2], [2, 0]]), [3, 3])
VOCABULARY = Vocabulary(INDEX.level_sizes, begin_id=10)  # a: 11-13, b: 14-16, c: 17-18
BEGIN, END = 10, 2
CLOSE = (7, 8)
FIRST = [BEGIN, 11, 15, 17]  # item 0
SHORT = [BEGIN, 12, 16]  # item 2
CLEAN = Flags(False, False, False, False, False, False)


def parse(ids: list[int], *, reasoning: bool = True, close: tuple[int, ...] = (), **more: object) -> Parsed:
    parser = Parser(VOCABULARY, INDEX, reasoning=reasoning, close_ids=close, end_ids=(END, 3))
    return parser([ids], **more)  # type: ignore[arg-type]


def test_chain_then_item() -> None:
    parsed = parse([4, 5, *FIRST, END])
    assert parsed.predicted_codes == [(0, 1, 0)]
    assert parsed.predicted_items == [0]
    assert parsed.chains == [[4, 5]]
    assert parsed.flags == [CLEAN._replace(has_chain=True)]


def test_direct_mode_with_and_without_the_begin_marker_in_the_prompt() -> None:
    assert parse([*SHORT, END], reasoning=False).flags == [CLEAN]
    opened = Parser(VOCABULARY, INDEX, reasoning=False, opened=True, end_ids=(END,))([SHORT[1:], [12, 16, END], []])
    assert opened.predicted_codes == [(1, 2), (1, 2), None]
    assert opened.flags[:2] == [CLEAN, CLEAN]
    assert opened.flags[2].out_of_catalogue
    assert opened.chains == [[], [], []]


@pytest.mark.parametrize(
    "answer",
    [
        [BEGIN, 11, 15],  # the disambiguation code is missing
        [*SHORT, 17],  # there is one too many
        [BEGIN, 11, 14],  # no such item
        [BEGIN, 15, 11],  # levels in the wrong order
        [BEGIN, 12],  # half an item
        [*SHORT, 13, 14],  # two items in a row
        [BEGIN],
        [BEGIN, 4],
    ],
)
def test_what_is_no_item_is_no_answer(answer: list[int]) -> None:
    parsed = parse([4, *answer, END])
    assert parsed.predicted_codes == [None]
    assert parsed.predicted_items == [-1]
    assert parsed.flags[0].out_of_catalogue
    assert parsed.chains == [[4]]


def test_an_answer_before_the_chain_is_none() -> None:
    parsed = parse([*SHORT, 4, 5, END])
    assert parsed.predicted_codes == [None]
    assert parsed.flags[0].answer_before_think
    assert not parsed.flags[0].out_of_catalogue
    with_marker = parse([4, *SHORT, 5, *CLOSE], close=CLOSE)
    assert with_marker.predicted_codes == [None]
    assert with_marker.flags[0].answer_before_think
    # Direct mode knows no chain: text behind the answer is just that.
    direct = parse([*SHORT, 4, 5, END], reasoning=False)
    assert direct.predicted_codes == [(1, 2)]
    assert direct.flags[0] == CLEAN._replace(extra_after_answer=True)


def test_without_a_chain_the_answer_counts_but_there_is_no_chain() -> None:
    parsed = parse(SHORT)
    assert parsed.predicted_codes == [(1, 2)]
    assert parsed.flags == [CLEAN]


def test_the_first_answer_counts_and_the_second_is_noted() -> None:
    parsed = parse([4, *SHORT, *FIRST, END])
    assert parsed.predicted_codes == [(1, 2)]
    assert parsed.flags == [CLEAN._replace(has_chain=True, extra_after_answer=True)]


def test_end_tokens_are_only_ignored_at_the_end() -> None:
    assert not parse([4, *SHORT, END, END, 3]).flags[0].extra_after_answer
    assert parse([4, *SHORT, END, 4]).flags[0].extra_after_answer


@pytest.mark.parametrize(("ids", "chain"), [([], []), ([4, 5, END], [4, 5]), ([END], [])])
def test_no_answer(ids: list[int], chain: list[int]) -> None:
    parsed = parse(ids)
    assert parsed.predicted_codes == [None]
    assert parsed.flags == [CLEAN._replace(has_chain=bool(chain), unfinished=True)]
    assert parsed.chains == [chain]


def test_codes_in_the_chain_are_no_answer() -> None:
    parsed = parse([4, 12, 16, 5])
    assert parsed.predicted_codes == [None]
    assert parsed.chains == [[4, 12, 16, 5]]


def test_the_marker_that_closes_a_chain() -> None:
    closed = parse([4, 5, *CLOSE, 6, *SHORT], close=CLOSE)
    assert closed.chains == [[4, 5]]
    assert closed.flags == [CLEAN._replace(has_chain=True)]
    half = parse([4, 5, 7, 6, *SHORT], close=CLOSE)
    assert half.predicted_codes == [(1, 2)]
    assert half.flags == [CLEAN._replace(has_chain=True, unfinished=True)]
    twice = parse([4, *CLOSE, 5, *CLOSE, *SHORT], close=CLOSE)
    assert twice.flags == [CLEAN._replace(has_chain=True, several_chains=True)]
    empty = parse([*CLOSE, *SHORT], close=CLOSE)
    assert empty.flags == [CLEAN]


def test_nothing_but_vocabulary_and_index_is_needed() -> None:
    parsed = Parser(VOCABULARY, INDEX, reasoning=True)([[4, *SHORT], []])
    assert parsed.predicted_codes == [(1, 2), None]


def test_a_marker_does_not_reach_into_the_next_row() -> None:
    parsed = Parser(VOCABULARY, INDEX, reasoning=True, close_ids=CLOSE)([[4, 7], [8, *SHORT]])
    assert parsed.flags[0].unfinished
    assert parsed.flags[1].unfinished


def test_a_cut_chain_is_unfinished_though_its_answer_counts() -> None:
    parsed = parse([4, *SHORT], cut=[True])
    assert parsed.predicted_codes == [(1, 2)]
    assert parsed.flags == [CLEAN._replace(has_chain=True, unfinished=True)]


def test_text_says_the_same_as_token_ids() -> None:
    parser = Parser(VOCABULARY, INDEX, reasoning=True)
    words: dict[str, int] = {}
    texts = [
        "wants a drill <|item|><|a_0|><|b_1|><|c_0|>",
        "wants <|a_0|><|b_1|><|c_0|> 🔩",
        "<|item|><|a_0|><|b_9|>",  # not a token of this index
    ]
    parsed = parser([parser.ids_of_text(text, words) for text in texts])
    assert parsed.predicted_codes == [(0, 1, 0), None, None]
    assert [len(chain) for chain in parsed.chains] == [3, 5, 0]
    assert parsed.chains[0][0] == parsed.chains[1][0] == words["wants"], "a word has one number in all texts"
    assert parsed.flags[0] == CLEAN._replace(has_chain=True)
    assert parsed.flags[1].unfinished
    assert parsed.flags[2].out_of_catalogue


def test_the_catalogue_finds_every_item_and_nothing_else() -> None:
    catalogue = Catalogue(INDEX)
    assert catalogue.find(INDEX.codes).tolist() == [0, 1, 2, 3]
    wrong = [[0, 1, -1], [1, 2, 0], [-1, -1, -1], [5, 2, -1], [1, 5, -1], [0, 1, 2], [-2, 0, 0]]
    assert catalogue.find(wrong).tolist() == [-1] * 7
    assert Catalogue(ItemIndex(np.empty((0, 3), np.int32), (2, 2, 0))).find([[0, 0, -1]]).tolist() == [-1]


def test_many_levels_of_many_codes_do_not_overflow() -> None:
    codes = np.random.default_rng(0).integers(0, 60_000, size=(500, 8))
    index = build_index(codes, [60_000] * 8)
    shuffled = np.random.default_rng(1).permutation(500)
    assert Catalogue(index).find(index.codes[shuffled]).tolist() == shuffled.tolist()


def test_what_does_not_belong_together_is_refused() -> None:
    with pytest.raises(UserError, match="same model"):
        Parser(Vocabulary((2, 2), 10), INDEX, reasoning=False)
    with pytest.raises(UserError, match="behind the begin marker"):
        Parser(VOCABULARY, INDEX, reasoning=True, opened=True)


def by_hand(ids: list[int], *, reasoning: bool) -> tuple[tuple[int, ...] | None, list[int]]:
    """The same rules, one token after another (no marker that closes chains)."""
    while ids and ids[-1] == END:
        ids = ids[:-1]
    if BEGIN not in ids:
        return None, ids
    at = ids.index(BEGIN)
    run = []
    for token in ids[at + 1 :]:
        if not 11 <= token <= 18:
            break
        run.append(token)
    known = {tuple(row): item for item, row in enumerate(VOCABULARY.item_token_ids(INDEX.codes))}
    item = known.get(tuple(run))
    if item is None or (reasoning and at == 0 and len(ids) > 1 + len(run)):
        return None, ids[:at]
    return INDEX.tuples()[item], ids[:at]


tokens = st.sampled_from([2, 4, 5, BEGIN, 11, 12, 13, 14, 15, 16, 17, 18])
pieces = st.lists(st.one_of(st.lists(tokens, max_size=4), st.sampled_from([FIRST, SHORT, [END]])), max_size=5)
completions = pieces.map(lambda parts: [token for part in parts for token in part])


@settings(max_examples=150, deadline=None)
@given(st.lists(completions, max_size=6), st.booleans())
def test_it_agrees_with_reading_one_token_after_another(batch: list[list[int]], reasoning: bool) -> None:
    parser = Parser(VOCABULARY, INDEX, reasoning=reasoning, end_ids=(END,))
    parsed = parser(batch)
    for row, ids in enumerate(batch):
        codes, chain = by_hand(ids, reasoning=reasoning)
        assert parsed.predicted_codes[row] == codes
        assert parsed.chains[row] == chain
        alone = parser([ids])  # a row does not depend on its neighbours
        assert alone.flags[0] == parsed.flags[row]
