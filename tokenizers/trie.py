"""The trie of all items, as tensors.

Nodes are numbered breadth first and children by code, so the children of a node are consecutive: edge `e` leads to
node `e + 1`, and the children of node `n` are the edges `offsets[n] … offsets[n + 1] - 1`. Items are numbered a second
time in the order of their leaves ("leaf rank"), in which the items below any node are consecutive too: that makes "how
many of the items below this prefix are excluded?" two binary searches.

Codes are *columns*: level 0 owns the columns `0 … size_0 - 1`, level 1 the next `size_1`, and so on; a column plus the
first code token's id is a token of the LLM (`vocabulary.py`).

The trie is not stored: building it from the index takes well under a second for a million items.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from reasonrec.tokenizers.errors import UserError
from reasonrec.tokenizers.whole import item_numbers

_INT32 = 2**31 - 1


@dataclass(frozen=True)
class Trie:
    """All items as paths of code columns.

    Tensors are int32 where the catalogue allows it; what the methods return is int64.

    Attributes:
        offsets: (nodes + 1,) first edge of each node.
        edge_keys: (edges,) int64, ascending; parent * n_columns + column of each edge.
        leaf_begin: (nodes,) leaf rank of the first item below each node.
        leaf_end: (nodes,) leaf rank after the last item below each node.
        leaf_rank: (items,) leaf rank of each item.
        rank_item: (items,) the item of each leaf rank.
        level_sizes: Number of codes of each level.
        widths: For each level that exists, the most children a node above it has.
        branching: For each of these, how many of its nodes have more than one item below: the most beams that can
            be undecided there.
    """

    offsets: Tensor
    edge_keys: Tensor
    leaf_begin: Tensor
    leaf_end: Tensor
    leaf_rank: Tensor
    rank_item: Tensor
    level_sizes: tuple[int, ...]
    widths: tuple[int, ...]
    branching: tuple[int, ...]

    @classmethod
    def from_codes(cls, codes: np.ndarray, level_sizes: Sequence[int]) -> Trie:
        """Build the trie.

        Args:
            codes: (items, levels) integer codes; -1 pads the end of shorter items.
            level_sizes: Number of codes of each level.

        Raises:
            ValueError: If two items share a tuple, one is a prefix of another, or a code is out of range.
        """
        codes, sizes = np.asarray(codes), [int(size) for size in level_sizes]
        n_items = len(codes)
        _check(codes, sizes)
        order, digits = _sorted_digits(codes, sizes)
        integer = np.int32 if n_items * (len(sizes) + 1) < _INT32 else np.int64
        parent = np.zeros(n_items, integer)  # node of each item's prefix, in leaf order
        begins, ends = [np.zeros(1, integer)], [np.full(1, n_items, integer)]
        keys, counts, widths, branching = [], [], [], []
        alive: np.ndarray | slice = slice(None)  # leaf ranks of the items that reach this level
        ranks = np.arange(n_items, dtype=integer)
        first_node, first_column, n_columns = 1, 0, sum(sizes)
        first_parent = 0
        for level, size in enumerate(sizes):
            here = digits(level)[alive]
            reach = here >= 0
            if not reach.all():
                here, ranks = here[reach], ranks[reach]
                alive = ranks
            if len(here) == 0:
                break
            up = parent[alive]
            new = np.empty(len(here), dtype=bool)
            new[0] = True
            np.not_equal(here[1:], here[:-1], out=new[1:])
            new[1:] |= up[1:] != up[:-1]
            start = np.flatnonzero(new)
            below = np.diff(start, append=len(here))  # items below each node of this level
            last = level + 1 == len(sizes)
            ended = np.full(len(start), last)
            if not last:
                np.less(digits(level + 1)[alive][start], 0, out=ended)  # the padding -1 sorts first
            if (below[ended] > 1).any():
                raise ValueError("item codes have to be unique and prefix-free")
            up = up[start]
            begins.append(ranks[start])
            ends.append(ranks[start] + below.astype(integer))
            keys.append(up.astype(np.int64) * n_columns + (here[start] + first_column))
            count = np.bincount(up - first_parent, minlength=first_node - first_parent)
            counts.append(count.astype(integer))
            widths.append(int(count.max()))
            branching.append(int((below > 1).sum()))
            parent[alive] = np.repeat(np.arange(first_node, first_node + len(start), dtype=integer), below)
            first_parent, first_node, first_column = first_node, first_node + len(start), first_column + size
        counts.append(np.zeros(first_node - first_parent, integer))  # the deepest nodes
        del parent, ranks, alive, digits
        offsets = np.zeros(first_node + 1, integer)
        np.cumsum(np.concatenate(counts), out=offsets[1:])
        rank = np.empty(n_items, dtype=integer)
        rank[order] = np.arange(n_items, dtype=integer)
        return cls(
            offsets=torch.from_numpy(offsets),
            edge_keys=torch.from_numpy(np.concatenate(keys)),
            leaf_begin=torch.from_numpy(np.concatenate(begins)),
            leaf_end=torch.from_numpy(np.concatenate(ends)),
            leaf_rank=torch.from_numpy(rank),
            rank_item=torch.from_numpy(order.astype(integer)),
            level_sizes=tuple(sizes),
            widths=tuple(widths),
            branching=tuple(branching),
        )

    def to(self, device: torch.device | str) -> Trie:
        """The same trie with its tensors on a device."""
        moved: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        for name, value in moved.items():
            moved[name] = value.to(device) if isinstance(value, Tensor) else value
        return Trie(**moved)

    @property
    def n_items(self) -> int:
        """Number of items."""
        return len(self.leaf_rank)

    @property
    def n_nodes(self) -> int:
        """Number of nodes, the root included."""
        return len(self.leaf_begin)

    @property
    def n_columns(self) -> int:
        """Number of code columns of all levels together."""
        return sum(self.level_sizes)

    @property
    def depth(self) -> int:
        """Length of the longest item."""
        return len(self.widths)

    @property
    def n_bytes(self) -> int:
        """Memory of the tensors."""
        tensors = [getattr(self, f.name) for f in fields(self)]
        return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))

    def child(self, node: Tensor, column: Tensor) -> Tensor:
        """Follow one edge.

        Args:
            node: Node numbers; -1 (no node) stays -1.
            column: Code columns of the same shape.

        Returns:
            The child's number, or -1 where there is none.
        """
        key = node.long() * self.n_columns + column
        edge = torch.searchsorted(self.edge_keys, key).clamp(max=len(self.edge_keys) - 1)
        legal = (node >= 0) & (column >= 0) & (column < self.n_columns) & (self.edge_keys[edge] == key)
        return torch.where(legal, edge + 1, -1)

    def children(self, node: Tensor, width: int | None = None) -> tuple[Tensor, Tensor]:
        """The children of each node, padded to the widest.

        Args:
            node: (...,) node numbers; -1 has no children.
            width: Places for children, if known to suffice (`widths`): saves asking the device how many there are.

        Returns:
            Child nodes (..., width) with -1 as padding, and their columns (..., width) with 0 as padding.
        """
        edge, real, column = self.edges(node, width)
        return torch.where(real, edge + 1, -1), torch.where(real, column, 0)

    def edges(self, node: Tensor, width: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """The edges below each node: `children` for whoever wants to spend less on the padding.

        Args:
            node: (...,) node numbers; -1 has no children.
            width: As for `children`.

        Returns:
            Edges (..., width), which of them are real, the real ones first, and their columns (anything elsewhere).
        """
        first = node.clamp(min=0)
        begin = self.offsets[first].long()
        count = torch.where(node >= 0, self.offsets[first + 1].long() - begin, 0)
        if width is None:
            width = max(int(count.max()), 1) if count.numel() else 1
        place = torch.arange(width, device=node.device)
        real = place < count[..., None]
        edge = torch.where(real, begin[..., None] + place, 0)
        key = self.edge_keys.index_select(0, edge.reshape(-1)).view(edge.shape)
        return edge, real, key - first[..., None] * self.n_columns

    def is_leaf(self, node: Tensor) -> Tensor:
        """Whether an item ends at a node (of -1, none does)."""
        first = node.clamp(min=0)
        return (node >= 0) & (self.offsets[first] == self.offsets[first + 1])

    def only_item(self, node: Tensor) -> Tensor:
        """The item below a node if there is exactly one, else -1."""
        first = node.clamp(min=0)
        begin, end = self.leaf_begin[first].long(), self.leaf_end[first]
        return torch.where((node >= 0) & (end - begin == 1), self.rank_item[begin].long(), -1)

    def leaf_item(self, node: Tensor) -> Tensor:
        """The item that ends at a node, or -1."""
        return torch.where(self.is_leaf(node), self.only_item(node), -1)

    def paths(self, items: Tensor) -> Tensor:
        """The nodes on the way to each item.

        Args:
            items: (...,) item numbers; -1 is no item.

        Returns:
            (..., depth) node after each code; behind a shorter item's leaf, and for no item, -1.
        """
        rank = self.leaf_rank[items.clamp(min=0)].long()
        node = torch.where(items >= 0, 0, -1)
        steps = []
        for width in self.widths:
            # Children are in the order of their items, so the right one is found by halving.
            low = self.offsets[node.clamp(min=0)].long()
            high = self.offsets[node.clamp(min=0) + 1].long()
            exists = (node >= 0) & (low < high)
            for _ in range(max(width - 1, 0).bit_length()):
                middle = (low + high) // 2
                right = self.leaf_begin[(middle + 1).clamp(max=self.n_nodes - 1)] <= rank
                low, high = torch.where(right, middle, low), torch.where(right, high, middle)
            node = torch.where(exists, low + 1, -1)
            steps.append(node)
        return torch.stack(steps, -1)

    def excluded_ranks(self, exclude: Sequence[Sequence[int] | np.ndarray]) -> Tensor | None:
        """Excluded items of each user as sorted leaf ranks.

        Args:
            exclude: For each user the items that must not be recommended.

        Returns:
            (users, most) int64, padded with the item count, or None if nothing is excluded.

        Raises:
            UserError: If an item is not in the catalogue.
        """
        lengths = [len(items) for items in exclude]
        if not any(lengths):
            return None
        items = np.concatenate([item_numbers("exclude", row) for row in exclude])
        unknown = items[(items < 0) | (items >= self.n_items)]
        if len(unknown):
            raise UserError(f"excluded item {unknown[0]} is not in the catalogue, which has 0..{self.n_items - 1}")
        user = np.repeat(np.arange(len(exclude)), lengths)
        key = np.unique(user * self.n_items + self.leaf_rank.cpu().numpy()[items])  # by user, then rank, without twins
        user, rank = np.divmod(key, self.n_items)
        place = np.arange(len(key)) - np.searchsorted(user, user)
        ranks = np.full((len(exclude), int(place.max()) + 1), self.n_items, dtype=np.int64)
        ranks[user, place] = rank
        return torch.from_numpy(ranks).to(self.leaf_rank.device)

    def allowed(self, node: Tensor, excluded: Tensor | None) -> Tensor:
        """Whether any item below a node is left.

        Args:
            node: (users, ...) node numbers; -1 is never allowed.
            excluded: What `excluded_ranks` returned for these users.

        Returns:
            Boolean tensor of the shape of `node`.
        """
        return node >= 0 if excluded is None else self.count(node, excluded) > 0

    def count(self, node: Tensor, excluded: Tensor | None = None) -> Tensor:
        """How many items below a node are left.

        Args:
            node: (users, ...) node numbers; below -1 there are none.
            excluded: What `excluded_ranks` returned for these users.

        Returns:
            int64 tensor of the shape of `node`.
        """
        flat = node.clamp(min=0).reshape(len(node), -1)
        begin, end = self.leaf_begin[flat].long(), self.leaf_end[flat].long()
        items = end - begin
        if excluded is not None:
            items = items - (torch.searchsorted(excluded, end) - torch.searchsorted(excluded, begin))
        return torch.where(node >= 0, items.reshape(node.shape), 0)


def _check(codes: np.ndarray, sizes: list[int]) -> None:
    """Refuse codes that are no paths."""
    if len(codes) == 0:
        raise ValueError("a trie of no item")
    for level, size in enumerate(sizes):
        here = codes[:, level]
        if here.max() >= size:
            raise ValueError("a code is not smaller than the size of its level")
        if (
            here.min() < -1
            or (level == 0 and here.min() < 0)
            or (level and (here[codes[:, level - 1] < 0] >= 0).any())
        ):
            raise ValueError("an item needs a code on the first level, and -1 may only follow its last code")


def _sorted_digits(codes: np.ndarray, sizes: list[int]) -> tuple[np.ndarray, Any]:
    """The order of the leaves, and a function from a level to its codes in that order."""
    if math.prod(size + 1 for size in sizes) < 2**63:
        # One number per item: sorting it is several times faster than sorting columns.
        key = np.zeros(len(codes), dtype=np.int64)
        for level, size in enumerate(sizes):
            key *= size + 1
            key += codes[:, level]
            key += 1
        order = np.argsort(key)
    else:
        order = np.lexsort(codes.T[::-1])
    order = order.astype(np.int32 if len(codes) < _INT32 else np.int64)

    def digits(level: int) -> np.ndarray:
        return codes[order, level]

    return order, digits
