"""The cache of a search: written in place, and gone with its last user."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from reasonrec.recipes.decoding.cache import SearchCache


def filled(rows: int = 2, slots: int = 3, room: int = 2) -> SearchCache:
    """A cache of two layers; (rows, 1 head, slots, 2) states that count upwards."""
    cache = SearchCache(rows, slots + room)
    cache.grow(slots)
    states = torch.arange(rows * slots * 2.0).reshape(rows, 1, slots, 2)
    for layer in range(2):
        keys, values = cache.update(states, -states, layer)
        assert torch.equal(keys, states)
        assert torch.equal(values, -states)
    return cache


def test_steps_are_written_behind_what_is_filled_and_taken_back() -> None:
    cache = filled()
    for new in (7.0, 8.0):
        cache.grow(1)
        keys, _ = cache.update(torch.full((2, 1, 1, 2), new), torch.zeros(2, 1, 1, 2), 0)
        assert keys.shape == (2, 1, 4, 2)
        assert keys[:, :, 3].unique() == new
        assert torch.equal(keys[:, :, :3], torch.arange(12.0).reshape(2, 1, 3, 2))
        cache.rewind(3)
    with pytest.raises(ValueError, match="3 \\+ 3 slots do not fit into a cache of 5"):
        cache.grow(3)


def test_picked_slots_are_a_copy() -> None:
    cache = filled()
    picked = cache.pick(torch.tensor([1, 0]), torch.tensor([[2, 0], [1, 1]]), room=1)
    assert (picked.rows, picked.capacity, picked.length) == (2, 3, 2)
    assert picked.layers[1].keys[:, 0, :2, 0].tolist() == [[10.0, 6.0], [2.0, 2.0]]
    cache.layers[1].keys.zero_()
    assert picked.layers[1].keys[0, 0, 0, 0] == 10.0


def test_buffers_are_freed_with_the_cache() -> None:
    cache = filled()
    buffers = [weakref.ref(layer.keys) for layer in cache.layers]
    gc.disable()  # what only a collection would find is memory that a server holds for many batches
    try:
        del cache
        assert [buffer() for buffer in buffers] == [None, None]
    finally:
        gc.enable()
