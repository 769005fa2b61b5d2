"""Packed forward passes against padded ones."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from reasonrec.recipes.decoding.cache import SearchCache
from reasonrec.recipes.decoding.pack import Packing, group, spread
from reasonrec.recipes.decoding.prefix import forward, read

CPU = torch.device("cpu")


@given(st.lists(st.integers(0, 40), min_size=1, max_size=30), st.integers(1, 30))
def test_every_user_with_tokens_gets_one_row(sizes, rows):
    groups = spread(sizes, rows)
    assert sorted(user for members in groups for user in members) == [u for u, size in enumerate(sizes) if size]
    loads = [sum(sizes[user] for user in members) for members in groups]
    if loads:  # the emptiest row took the last user, so no row is above the mean by more than the largest
        assert max(loads) <= sum(sizes) / rows + max(sizes)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=20), st.data())
def test_tokens_get_places_of_their_own(counts, data):
    shared = data.draw(st.integers(0, min(counts) - 1))
    packing = Packing.of(counts, CPU, shared=shared)
    if packing is None:
        return
    places = list(zip(packing.row.tolist(), packing.column.tolist(), strict=True))
    own = [at for at, place in zip(places, packing.place.tolist(), strict=True) if place >= shared]
    assert len(set(own)) == len(own)
    assert len(set(places) - set(own)) == shared * len(packing.users), "shared tokens stand once in each row"
    tokens = list(zip(packing.user.tolist(), packing.place.tolist(), strict=True))
    assert sorted(tokens) == [(user, place) for user, count in enumerate(counts) for place in range(count)]
    assert len(packing.users) * packing.width < len(counts) * max(counts), "or it would not have been worth it"


def test_equal_rows_are_left_alone():
    assert group([20] * 16, before=30) is None
    assert group([7]) is None


def test_what_all_prompts_begin_with_is_worth_packing():
    groups = group([50] * 16, shared=45)
    assert groups is not None
    assert len(groups) < 6


def test_many_slots_to_copy_are_not():
    counts = [20, 4, 4, 4]
    assert group(counts, before=20) is not None
    assert group(counts, before=100_000) is None


@pytest.mark.parametrize("before", [False, True])
def test_a_packed_pass_is_a_padded_one(world, before):
    """Hidden states of real tokens, and everything that later passes read from the cache."""
    generator = torch.Generator().manual_seed(0)
    counts = [3, 9, 1, 0, 6, 2]
    users, new = len(counts), max(counts)
    lengths = torch.tensor(counts)
    ids = torch.randint(0, 20, (users, new), generator=generator)
    results = []
    for packed in (False, True):
        cache = SearchCache(users, 40)
        at = 0
        if before:
            prompts = torch.randint(0, 20, (users, 5), generator=torch.Generator().manual_seed(1))
            cache = read(world.model, prompts, torch.ones_like(prompts), room=20).cache
            at = cache.length
        among = torch.rand(users, new, new, generator=torch.Generator().manual_seed(2)) < 0.5
        among = (among.tril() | torch.eye(new, dtype=torch.bool)) & (torch.arange(new) < lengths[:, None])[:, None]
        among |= torch.eye(new, dtype=torch.bool)
        past = torch.rand(users, new, at, generator=torch.Generator().manual_seed(3)) < 0.7
        seen = torch.cat([past, among], 2)
        positions = at + torch.arange(new).expand(users, -1)
        shapes = []
        handle = world.model.base_model.embed_tokens.register_forward_hook(
            lambda _, __, out, shapes=shapes: shapes.append(out.shape)
        )
        with torch.no_grad():
            hidden = forward(world.model, cache, ids, positions, seen, counts=counts if packed else None)
        handle.remove()
        assert (shapes[0][0] * shapes[0][1] < users * new) is packed
        results.append((hidden, [(layer.keys, layer.values) for layer in cache.layers], cache.length))
        assert cache.packing is None
    (padded, caches, length), (packed_hidden, packed_caches, packed_length) = results
    assert length == packed_length
    for user, count in enumerate(counts):
        torch.testing.assert_close(packed_hidden[user, :count], padded[user, :count], atol=1e-5, rtol=1e-5)
        for layer, packed_layer in zip(caches, packed_caches, strict=True):
            for states, packed_states in zip(layer, packed_layer, strict=True):
                used = length - new + count
                torch.testing.assert_close(packed_states[user, :, :used], states[user, :, :used], atol=1e-5, rtol=1e-5)
                assert (packed_states[user, :, used:length] == 0).all(), "padding is finite"


def test_prompts_that_begin_alike_are_read_as_if_alone(world):
    head = [4, 8, 15, 16]
    prompts = [[*head, *p] for p in world.prompts] + [[*head, 20], [*head, 5, 20]]
    ids, mask = world.batch(prompts)
    together = read(world.model, ids, mask, room=0)
    for user, prompt in enumerate(prompts):
        alone = read(world.model, *world.batch([prompt]), room=0)
        torch.testing.assert_close(together.hidden[user], alone.hidden[0], atol=1e-5, rtol=1e-5)
        for layer, single in zip(together.cache.layers, alone.cache.layers, strict=True):
            torch.testing.assert_close(
                layer.keys[user, :, : len(prompt)], single.keys[0, :, : len(prompt)], atol=1e-5, rtol=1e-5
            )


def test_equal_prompts_are_read_almost_once(world):
    shapes = []
    handle = world.model.base_model.embed_tokens.register_forward_hook(lambda _, __, out: shapes.append(out.shape))
    ids, mask = world.batch([[3, 1, 4, 1, 5, 9, 2, 6, 20]] * 10)
    found = read(world.model, ids, mask, room=0)
    handle.remove()
    assert shapes[0][0] * shapes[0][1] <= 2 * (8 + 10)
    torch.testing.assert_close(found.hidden, found.hidden[:1].expand(10, -1), atol=1e-5, rtol=1e-5)
