"""The logits processor against a dictionary of prefixes, and inside `generate`."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList

from reasonrec.tokenizers.constrain import ItemLogitsProcessor, legal_log_probs
from reasonrec.tokenizers.errors import UserError
from reasonrec.tokenizers.trie import Trie
from reasonrec.tokenizers.vocabulary import Vocabulary

TEXT = 6
EOS = 3
LENGTH = 9


def random_trie(rng: np.random.Generator) -> tuple[Trie, Vocabulary, list[list[int]]]:
    """A random catalogue of items of different lengths."""
    sizes = tuple(rng.integers(1, 6, size=int(rng.integers(1, 5))).tolist())

    def grow(prefix: list[int]) -> list[list[int]]:
        if len(prefix) == len(sizes) or (prefix and rng.random() < 0.3):
            return [[*prefix, *[-1] * (len(sizes) - len(prefix))]]
        size = sizes[len(prefix)]
        chosen = rng.choice(size, size=int(rng.integers(1, size + 1)), replace=False)
        return [leaf for code in chosen.tolist() for leaf in grow([*prefix, code])]

    codes = rng.permutation(np.array(grow([])))[:30]
    vocabulary = Vocabulary(sizes, TEXT)
    return Trie.from_codes(codes, sizes), vocabulary, vocabulary.item_token_ids(codes)


def random_rows(
    rng: np.random.Generator, vocabulary: Vocabulary, items: list[list[int]], rows: int
) -> list[list[int]]:
    """Rows in all states that `generate` can bring them to, and some it cannot."""
    result = []
    for kind in rng.integers(0, 7, size=rows).tolist():
        item = items[int(rng.integers(len(items)))]
        text = rng.integers(0, TEXT, size=int(rng.integers(0, LENGTH))).tolist()
        part = item[: int(rng.integers(0, len(item) + 1))]
        junk = rng.integers(0, vocabulary.size, size=int(rng.integers(1, 4))).tolist()
        result.append(
            [
                text,  # no answer yet
                [*text, vocabulary.begin_id, *part],
                [*text, vocabulary.begin_id, *item, EOS],
                [*text, vocabulary.begin_id, *item, *text],  # another turn
                [*text, vocabulary.begin_id, *part, *junk],
                [vocabulary.begin_id, *item, *text, vocabulary.begin_id, *part],  # the last marker counts
                [*text, *item, *junk],  # codes of a history
            ][kind]
        )
    return result


def expected_tokens(
    row: list[int], vocabulary: Vocabulary, legal: dict[tuple[int, ...], set[int]], leaves: set[tuple[int, ...]]
) -> set[int] | None:
    """What may follow, None where everything may: the documented rule, told another way."""
    if vocabulary.begin_id not in row:
        return None
    path = tuple(row[len(row) - row[::-1].index(vocabulary.begin_id) :])
    if len(path) > max(map(len, leaves)) or any(path[:n] in leaves for n in range(len(path))):
        return None
    return legal.get(path) or {EOS}


@pytest.mark.slow
def test_what_is_legal_in_a_hundred_thousand_random_prefixes():
    rng = np.random.default_rng(0)
    rows = 200
    for trial in range(500):
        trie, vocabulary, items = random_trie(rng)
        exclude = None
        gone: list[set[int]] = [set(), set()]
        if trial % 2:
            gone = [set(rng.integers(0, len(items), size=int(rng.integers(0, len(items) + 2))).tolist()) for _ in gone]
            exclude = [sorted(g) for g in gone]
        processor = ItemLogitsProcessor(trie, vocabulary, EOS, exclude=exclude)
        texts = random_rows(rng, vocabulary, items, rows)
        width = max(map(len, texts))
        ids = torch.tensor([[0] * (width - len(t)) + t for t in texts])
        scores = torch.randn(rows, vocabulary.size)
        before = scores.clone()
        after = processor(ids, scores)
        assert after.data_ptr() == scores.data_ptr()
        leaves = {tuple(item) for item in items}
        everywhere = torch.zeros(rows, dtype=torch.bool)
        mask = torch.zeros(rows, vocabulary.size, dtype=torch.bool)
        for part, without in enumerate(gone):
            legal: dict[tuple[int, ...], set[int]] = {}
            for number, item in enumerate(items):
                if number not in without:
                    for n in range(len(item)):
                        legal.setdefault(tuple(item[:n]), set()).add(item[n])
            for i in range(part * rows // 2, (part + 1) * rows // 2):
                tokens = expected_tokens(texts[i], vocabulary, legal, leaves)
                if tokens is None:
                    everywhere[i] = True
                else:
                    mask[i, list(tokens)] = True
        assert torch.equal(after[everywhere], before[everywhere]), "rows outside an answer are not touched"
        assert torch.equal(after[~everywhere] > -torch.inf, mask[~everywhere])


def test_legal_codes_get_the_policys_log_probabilities():
    trie, vocabulary, items = random_trie(np.random.default_rng(3))
    ids = torch.tensor([[vocabulary.begin_id]])
    scores = torch.randn(1, vocabulary.size)
    legal = sorted({item[0] for item in items})
    expected = scores[0, legal].log_softmax(0)
    gone = [i for i, item in enumerate(items) if item[0] == legal[0]]
    kept = ItemLogitsProcessor(trie, vocabulary, EOS, in_place=False)(ids, scores)
    torch.testing.assert_close(kept[0, legal], expected)
    assert torch.isfinite(scores).all(), "only in place does it write to what it is given"
    masked = ItemLogitsProcessor(trie, vocabulary, EOS, exclude=[gone])(ids, scores)
    assert masked[0, legal[0]] == -torch.inf
    torch.testing.assert_close(masked[0, legal[1:]], expected[1:])


def test_nan_is_not_swallowed():
    trie, vocabulary, items = random_trie(np.random.default_rng(3))
    scores = torch.zeros(1, vocabulary.size)
    scores[0, items[0][0]] = torch.nan
    assert ItemLogitsProcessor(trie, vocabulary, EOS)(torch.tensor([[vocabulary.begin_id]]), scores).isnan().any()


def test_legal_log_probs_are_minus_infinity_where_there_is_no_child():
    logits = torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 0.0]])
    child, column = torch.tensor([[4, 5, -1], [-1, -1, -1]]), torch.tensor([[0, 2, 0], [0, 0, 0]])
    result = legal_log_probs(logits, child, column)
    np.testing.assert_allclose(result[0, :2].exp(), [1 / (1 + np.e**2), np.e**2 / (1 + np.e**2)], rtol=1e-6)
    assert result[0, 2] == -torch.inf
    assert (result[1] == -torch.inf).all()


class Chain(LogitsProcessor):
    """Lets each row write text for a while and then makes it open its answer."""

    def __init__(self, begin_id: int, lengths: list[int], prompt: int) -> None:
        self.begin_id, self.lengths, self.prompt = begin_id, lengths, prompt

    def __call__(self, input_ids, scores):
        new = input_ids.shape[1] - self.prompt
        for row, length in enumerate(self.lengths):
            if new < length:
                scores[row, TEXT:] = -torch.inf
                scores[row, EOS] = -torch.inf
            elif new == length:
                scores[row] = -torch.inf
                scores[row, self.begin_id] = 0
        return scores


def answers(world, sequences: torch.Tensor) -> list[int]:
    """The item of each sequence; raises where there is none."""
    items = {tuple(ids): i for i, ids in enumerate(world.ids)}
    found = []
    for row in sequences.tolist():
        tail = row[len(row) - row[::-1].index(world.vocabulary.begin_id) :]
        assert EOS in tail
        found.append(items[tuple(tail[: tail.index(EOS)])])
        assert set(tail[tail.index(EOS) :]) == {EOS}, "nothing follows but padding"
    return found


def generate(world, ids, mask, *, extra=(), exclude=None, **options):
    processor = ItemLogitsProcessor(world.trie, world.vocabulary, EOS, exclude=exclude)
    return world.model.generate(
        input_ids=ids,
        attention_mask=mask,
        logits_processor=LogitsProcessorList([*extra, processor]),
        pad_token_id=EOS,
        return_dict_in_generate=True,
        **{"max_new_tokens": world.trie.depth + 1} | options,
    )


@pytest.mark.parametrize("pad", [0, 5])
def test_beams_in_generate_rank_like_the_item_search(world, pad):
    n = world.n_items
    ids, mask = world.batch(world.prompts, pad)
    out = generate(
        world,
        ids,
        mask,
        do_sample=False,
        num_beams=n + 5,
        num_return_sequences=n,
        length_penalty=0.0,
        early_stopping=False,
        output_scores=True,
    )
    found = world.beam()
    assert answers(world, out.sequences) == found.items.flatten().tolist()
    torch.testing.assert_close(out.sequences_scores.view(-1, n), found.scores, atol=1e-4, rtol=1e-4)


def test_samples_in_generate_follow_the_item_searchs_distribution(world):
    ids, mask = world.batch(world.prompts[:2])
    exclude = [[], list(range(0, world.n_items, 2))]
    n = 3000
    out = generate(world, ids, mask, exclude=exclude, do_sample=True, top_k=0, top_p=1.0, num_return_sequences=n)
    found = world.beam(world.prompts[:2], exclude=exclude)
    for user, items in enumerate(np.array(answers(world, out.sequences)).reshape(2, n)):
        assert not set(items.tolist()) & set(exclude[user])
        share = np.bincount(items, minlength=world.n_items) / n
        expected = np.zeros(world.n_items)
        real = found.items[user] >= 0
        expected[found.items[user][real]] = found.scores[user][real].exp()
        if not exclude[user]:  # with exclusions, codes are drawn among what is left, one by one
            assert np.abs(share - expected).max() < 5 * np.sqrt(0.25 / n)


@pytest.mark.parametrize("options", [{"do_sample": True, "top_k": 0}, {"do_sample": False}], ids=["sample", "greedy"])
def test_behind_chains_of_different_length(world, options):
    prompts = [prompt[:-1] or [1] for prompt in world.prompts]
    ids, mask = world.batch(prompts)
    chain = Chain(world.vocabulary.begin_id, [4, 0, 9, 6], ids.shape[1])
    exclude = [[i] for i in range(4)]
    out = generate(world, ids, mask, extra=[chain], exclude=exclude, max_new_tokens=14, **options)
    items = answers(world, out.sequences)
    assert all(item not in gone for item, gone in zip(items, exclude, strict=True))
    begins = (out.sequences[:, ids.shape[1] :] == world.vocabulary.begin_id).int().argmax(1)
    assert begins.tolist() == chain.lengths


def test_a_trie_of_another_index_is_refused(world):
    other = Vocabulary((5, 7, 3), TEXT)
    with pytest.raises(UserError, match=r"different item indexes"):
        ItemLogitsProcessor(world.trie, other, EOS)


def test_rows_that_fit_no_prompt_are_refused():
    trie, vocabulary, _ = random_trie(np.random.default_rng(3))
    processor = ItemLogitsProcessor(trie, vocabulary, EOS, exclude=[[0], [0]])
    with pytest.raises(UserError, match="2 prompts, but generate has 3 rows"):
        processor(torch.full((3, 1), vocabulary.begin_id), torch.zeros(3, vocabulary.size))
