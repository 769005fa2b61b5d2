"""Items behind chains, scores of given items, and caches that are taken over."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import DynamicCache

from reasonrec.recipes.decoding.merge_chains import chains_room, log_mean_exp, search_chains
from reasonrec.recipes.decoding.prefix import adopt, read
from reasonrec.recipes.decoding.score import score_all_items, score_items
from reasonrec.recipes.decoding.search import search, search_room
from reasonrec.tokenizers.errors import UserError

CHAINS = 3


@pytest.fixture(scope="module")
def chains(world) -> list[list[int]]:
    """Three chains of different length for each of two users, the begin marker included."""
    rng = np.random.default_rng(5)
    begin = world.vocabulary.begin_id
    return [
        [*prompt[:-1], *rng.integers(0, begin, size=int(rng.integers(1, 9))).tolist(), begin]
        for prompt in world.prompts[:2]
        for _ in range(CHAINS)
    ]


def reading(world, prompts, room=200):
    return read(world.model, *world.batch(prompts), room=room)


def exact(world, prompts) -> torch.Tensor:
    return score_all_items(world.model, world.trie, world.vocabulary, *world.batch(prompts), item_token_ids=world.ids)


def test_given_items_get_the_reference_scores(world):
    everything = exact(world, world.prompts)
    generator = torch.Generator().manual_seed(0)
    for n in (1, 7, world.n_items):
        items = torch.stack([torch.randperm(world.n_items, generator=generator)[:n] for _ in world.prompts])
        items[1, 0] = -1
        scores = score_items(world.model, world.trie, world.vocabulary, reading(world, world.prompts), items)
        expected = everything.gather(1, items.clamp(min=0)).masked_fill(items < 0, -torch.inf)
        torch.testing.assert_close(scores, expected, atol=1e-4, rtol=1e-4)
    nothing = torch.full((4, 2), -1)
    scores = score_items(world.model, world.trie, world.vocabulary, reading(world, world.prompts), nothing)
    assert (scores == -torch.inf).all()


def test_scores_over_the_full_vocabulary_agree_with_plain_logits(world):
    prefix = reading(world, world.prompts)
    found = search(
        world.model, world.trie, world.vocabulary, prefix, k=10, num_beams=world.n_items, full_vocabulary=True
    )
    scored = score_items(world.model, world.trie, world.vocabulary, prefix, found.items, full_vocabulary=True)
    torch.testing.assert_close(scored, found.scores, atol=1e-4, rtol=1e-4)
    for user, prompt in enumerate(world.prompts):
        plain = []
        for ids in world.ids:
            with torch.no_grad():
                log_probs = world.model(torch.tensor([prompt + ids])).logits[0].log_softmax(-1)
            plain.append(sum(float(log_probs[len(prompt) - 1 + n, token]) for n, token in enumerate(ids)))
        order = np.argsort(-np.array(plain))[:10]
        assert found.items[user].tolist() == order.tolist()
        np.testing.assert_allclose(found.scores[user], np.array(plain)[order], atol=1e-4)


def test_a_prefix_can_be_searched_again_and_again(world):
    prefix = reading(world, world.prompts)
    arguments = (world.model, world.trie, world.vocabulary, prefix)
    first = search(*arguments, k=5, num_beams=9)
    score_items(*arguments, first.items)
    again = search(*arguments, k=5, num_beams=9)
    assert torch.equal(first.items, again.items)
    assert torch.equal(first.scores, again.scores)


@pytest.mark.parametrize("num_beams", [40, 6, 2])
def test_merged_rankings_equal_brute_force(world, chains, num_beams):
    prefix = reading(world, chains, chains_room(world.trie, num_beams, CHAINS))
    exclude = [[3, 4], [*range(10, 25)]]
    found = search_chains(
        world.model, world.trie, world.vocabulary, prefix, chains=CHAINS, k=8, num_beams=num_beams, exclude=exclude
    )
    every = exact(world, chains).view(2, CHAINS, -1)
    merged = every.exp().double().mean(1).log()
    prefix = reading(world, chains)
    proposed = search(
        world.model,
        world.trie,
        world.vocabulary,
        prefix,
        k=num_beams,
        num_beams=num_beams,
        excluded=world.trie.excluded_ranks([e for e in exclude for _ in range(CHAINS)]),
    ).items.view(2, -1)
    for user in range(2):
        union = sorted(set(proposed[user].tolist()) - {-1})
        assert not set(union) & set(exclude[user])
        ranked = sorted(union, key=lambda item: -float(merged[user, item]))[:8]
        assert found.items[user].tolist() == ranked + [-1] * (8 - len(ranked))
        np.testing.assert_allclose(found.scores[user][: len(ranked)], merged[user][ranked], atol=1e-4)
    if num_beams >= world.n_items:
        for user in range(2):
            merged[user, exclude[user]] = -torch.inf
            assert found.items[user].tolist() == merged[user].argsort(descending=True)[:8].tolist()


def test_the_cache_that_generate_left_is_taken_over(world, chains):
    """Left-padded prompts and right-padded chains in the cache; the rest of each chain is read."""
    padded, mask = world.batch([chain[:-1] for chain in chains], pad=2)
    keep = padded.shape[1] - 1
    past = DynamicCache()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        world.model(
            input_ids=padded[:, :keep],
            attention_mask=mask[:, :keep],
            position_ids=positions[:, :keep],
            past_key_values=past,
        )
    last = torch.stack([padded[:, -1], torch.full((len(chains),), world.vocabulary.begin_id)], 1)
    prefix = adopt(world.model, past, mask[:, :keep], last, room=search_room(world.trie, 40))
    fresh = reading(world, chains)
    for k in (4, world.n_items):
        a, b = (search(world.model, world.trie, world.vocabulary, p, k=k, num_beams=40) for p in (prefix, fresh))
        assert torch.equal(a.items, b.items)
        torch.testing.assert_close(a.scores, b.scores, atol=1e-5, rtol=1e-5)


def test_rows_have_to_be_a_multiple_of_the_chains(world, chains):
    with pytest.raises(UserError, match="6 rows cannot be 4 chains"):
        search_chains(world.model, world.trie, world.vocabulary, reading(world, chains), chains=4, k=2, num_beams=2)


def test_log_mean_exp_by_hand():
    log_probs = torch.tensor([[0.5, 0.0], [0.1, 0.0]]).log()[None]
    merged = log_mean_exp(log_probs)
    assert merged[0, 0] == pytest.approx(np.log(0.3))
    assert merged[0, 1] == -torch.inf
