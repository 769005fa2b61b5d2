"""A key-value cache that is written once and not copied.

transformers' `DynamicCache` concatenates, which copies everything at every step; its `StaticCache` always attends over
the whole buffer. This one is allocated once, each step writes behind what is filled, attention sees a view of the
filled part, and taking steps back is free: only the length changes.
"""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from reasonrec.recipes.decoding.pack import Packing


class _Layer(CacheLayerMixin):
    """Keys and values of one layer, (rows, heads, capacity, width) each."""

    is_sliding = False
    is_compileable = False

    def __init__(self, cache: SearchCache) -> None:
        super().__init__()
        # A cycle would keep the buffers of every batch until Python happens to look for cycles, which it does by the
        # number of objects and not by their size.
        self.cache = weakref.proxy(cache)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate. What is not written yet is never attended to."""

        def buffer(states: Tensor) -> Tensor:
            return states.new_empty(self.cache.rows, states.shape[1], self.cache.capacity, states.shape[3])

        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = buffer(key_states), buffer(value_states)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write the new states; returns what attention reads."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        cache, before = self.cache, self.cache.length - self.cache.new
        if cache.packing is not None:
            write = cache.packing.write
            return (
                write(self.keys, key_states, before, cache.new),
                write(self.values, value_states, before, cache.new),
            )
        self.keys[:, :, before : cache.length] = key_states
        self.values[:, :, before : cache.length] = value_states
        return self.keys[:, :, : cache.length], self.values[:, :, : cache.length]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of what attention reads."""
        return self.cache.length, 0

    def get_seq_length(self) -> int:
        """Slots in front of the tokens that are read now."""
        return self.cache.length - self.cache.new

    def get_max_length(self) -> int:
        """Slots there are."""
        return self.cache.capacity


class SearchCache(Cache):
    """A preallocated cache for one batch of users.

    Attributes:
        rows: Users.
        capacity: Slots per user.
        length: Slots filled, those of the tokens that are being read included.
        new: How many of them belong to the tokens that are being read.
        packing: Set while several users' tokens share a row of the input.
    """

    def __init__(self, rows: int, capacity: int) -> None:
        super().__init__(layers=[])
        self.rows = rows
        self.capacity = capacity
        self.length = 0
        self.new = 0
        self.packing: Packing | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write one layer's states behind what is filled."""
        while len(self.layers) <= layer_idx:
            self.layers.append(_Layer(self))
        return self.layers[layer_idx].update(key_states, value_states)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Slots in front of the tokens that are read now."""
        return self.length - self.new

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Length and offset of what attention reads."""
        return self.length, 0

    def grow(self, new: int) -> None:
        """Make room for the tokens of the next forward pass.

        Raises:
            ValueError: If they do not fit.
        """
        if self.length + new > self.capacity:
            raise ValueError(f"{self.length} + {new} slots do not fit into a cache of {self.capacity}")
        self.new = new
        self.length += new

    def reserve(self, capacity: int) -> None:
        """Make the buffers larger, which copies them: for the few searches that need more room than was foreseen."""
        for layer in self.layers:
            for name in ("keys", "values"):
                old: Tensor = getattr(layer, name)
                new = old.new_empty(*old.shape[:2], capacity, old.shape[3])
                new[:, :, : self.length] = old[:, :, : self.length]
                setattr(layer, name, new)
        self.capacity = capacity

    def rewind(self, length: int) -> None:
        """Forget what was written behind the first `length` slots."""
        self.length, self.new = length, 0

    def copy_from(self, cache: Cache, slots: int) -> None:
        """Take over the states of another cache, the only copy there is.

        Args:
            cache: Its layers hold (rows, heads, slots, width).
            slots: How many are filled there.
        """
        self.rewind(0)
        self.grow(slots)
        for number, layer in enumerate(cache.layers):
            self.update(layer.keys[:, :, :slots], layer.values[:, :, :slots], number)
        self.rewind(slots)

    def pick(self, rows: Tensor, slots: Tensor, room: int) -> SearchCache:
        """A cache with a copy of chosen slots.

        Args:
            rows: (new rows,) row that each new one is made of.
            slots: (new rows, length) its slots, in their new order.
            room: Slots to keep behind them.
        """
        count, length = slots.shape
        picked = SearchCache(count, length + room)
        picked.grow(length)
        for number, layer in enumerate(self.layers):
            picked.update(
                layer.keys[rows[:, None], :, slots].transpose(1, 2),
                layer.values[rows[:, None], :, slots].transpose(1, 2),
                number,
            )
        picked.rewind(length)
        return picked
