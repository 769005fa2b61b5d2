"""The trie of all items, as tensors.

Nodes are numbered breadth first and children by code, so the children of a node are consecutive: edge `e` leads to
node `e + 1`, and the children of node `n` are the edges `offsets[n] … offsets[n + 1] - 1`. Items are numbered a second
time in the order of their leaves ("leaf rank"), in which the items below any node are consecutive too: that makes "how
many of the items below this prefix are excluded?" two binary searches.

Codes are *columns*: level 0 owns the columns `0 … size_0 - 1`, level 1 the next `size_1`, and so on; a column plus the
first code token's id is a token of the LLM (`vocabulary.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Trie:
    """All items as paths of code columns.

    Attributes:
        offsets: (nodes + 1,) int64; first edge of each node.
        columns: (edges,) int64; code column of each edge.
        leaf_item: (nodes,) int64; the item that ends at a node, or -1.
        leaf_begin: (nodes,) int64; leaf rank of the first item below each node.
        leaf_end: (nodes,) int64; leaf rank after the last item below each node.
        leaf_rank: (items,) int64; leaf rank of each item.
        n_columns: Number of code columns of all levels together.
        depth: Length of the longest item.
    """

    offsets: Tensor
    columns: Tensor
    leaf_item: Tensor
    leaf_begin: Tensor
    leaf_end: Tensor
    leaf_rank: Tensor
    n_columns: int
    depth: int

    @classmethod
    def from_codes(cls, codes: np.ndarray, level_sizes: Sequence[int]) -> Trie:
        """Build the trie.

        Args:
            codes: (items, levels) integer codes; -1 pads the end of shorter items.
            level_sizes: Number of codes of each level.

        Raises:
            ValueError: If two items share a tuple, one is a prefix of another, or a code is out of range.
        """
        codes = np.asarray(codes, dtype=np.int64)
        n_items, n_levels = codes.shape
        first_column = np.concatenate([[0], np.cumsum(level_sizes)])
        if n_items == 0:
            raise ValueError("a trie of no item")
        if (codes >= np.asarray(level_sizes)).any():
            raise ValueError("a code is not smaller than the size of its level")
        if (codes < -1).any() or (codes[:, 0] < 0).any() or ((codes[:, :-1] < 0) & (codes[:, 1:] >= 0)).any():
            raise ValueError("an item needs a code on the first level, and -1 may only follow its last code")
        paths = np.where(codes >= 0, codes + first_column[:-1], -1)  # (items, levels)
        order = np.lexsort(paths.T[::-1])
        paths = paths[order]
        parent = np.zeros(n_items, dtype=np.int64)  # node of each item's prefix, in leaf order
        begins, columns, parents = [np.zeros(1, np.int64)], [], []
        leaf_items = [np.full(1, -1, np.int64)]
        n_nodes = 1
        alive = np.arange(n_items)  # leaf ranks of the items that reach this level
        ends = [np.full(1, n_items, np.int64)]
        for level in range(n_levels):
            here = paths[alive, level]
            if (here < 0).any():
                alive = alive[here >= 0]
                here = here[here >= 0]
            if len(alive) == 0:
                break
            up = parent[alive]
            new = np.ones(len(alive), dtype=bool)
            new[1:] = (up[1:] != up[:-1]) | (here[1:] != here[:-1])
            node = n_nodes + np.cumsum(new) - 1  # (alive,)
            counts = np.bincount(node - n_nodes)
            start = alive[new]
            last = level == n_levels - 1
            ended = np.ones(len(alive), dtype=bool) if last else paths[alive, level + 1] < 0
            if (counts[node[ended] - n_nodes] > 1).any():
                raise ValueError("item codes have to be unique and prefix-free")
            leaf = np.full(len(start), -1, np.int64)
            leaf[node[ended] - n_nodes] = order[alive[ended]]
            begins.append(start)
            ends.append(start + counts)
            columns.append(here[new])
            parents.append(up[new])
            leaf_items.append(leaf)
            parent[alive] = node
            n_nodes += len(start)
            alive = alive[~ended]
        edge_parent = np.concatenate(parents) if parents else np.zeros(0, np.int64)
        offsets = np.searchsorted(edge_parent, np.arange(n_nodes + 1))
        rank = np.empty(n_items, dtype=np.int64)
        rank[order] = np.arange(n_items)
        return cls(
            offsets=torch.from_numpy(offsets),
            columns=torch.from_numpy(np.concatenate(columns)),
            leaf_item=torch.from_numpy(np.concatenate(leaf_items)),
            leaf_begin=torch.from_numpy(np.concatenate(begins)),
            leaf_end=torch.from_numpy(np.concatenate(ends)),
            leaf_rank=torch.from_numpy(rank),
            n_columns=int(first_column[-1]),
            depth=int((codes >= 0).sum(1).max()),
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
        return len(self.leaf_item)

    @cached_property
    def max_branching(self) -> int:
        """Largest number of children of one node."""
        return int((self.offsets[1:] - self.offsets[:-1]).max())

    @cached_property
    def _edge_keys(self) -> Tensor:
        """(edges,) ascending: parent * n_columns + column."""
        parent = torch.repeat_interleave(
            torch.arange(self.n_nodes, device=self.offsets.device), self.offsets[1:] - self.offsets[:-1]
        )
        return parent * self.n_columns + self.columns

    def child(self, node: Tensor, column: Tensor) -> Tensor:
        """Follow one edge.

        Args:
            node: Node numbers; -1 (no node) stays -1.
            column: Code columns of the same shape.

        Returns:
            The child's number, or -1 where there is none.
        """
        key = node * self.n_columns + column
        edge = torch.searchsorted(self._edge_keys, key).clamp(max=len(self.columns) - 1)
        legal = (node >= 0) & (column >= 0) & (column < self.n_columns) & (self._edge_keys[edge] == key)
        return torch.where(legal, edge + 1, -1)

    def children(self, node: Tensor) -> tuple[Tensor, Tensor]:
        """The children of each node, padded to the widest.

        Args:
            node: (...,) node numbers; -1 has no children.

        Returns:
            Child nodes (..., width) with -1 as padding, and their columns (..., width) with 0 as padding.
        """
        begin = self.offsets[node.clamp(min=0)]
        count = torch.where(node >= 0, self.offsets[node.clamp(min=0) + 1] - begin, 0)
        width = max(int(count.max()), 1) if count.numel() else 1
        edge = begin[..., None] + torch.arange(width, device=node.device)
        real = torch.arange(width, device=node.device) < count[..., None]
        edge = torch.where(real, edge, 0)
        return torch.where(real, edge + 1, -1), torch.where(real, self.columns[edge], 0)

    def excluded_ranks(self, exclude: Sequence[Sequence[int] | np.ndarray]) -> Tensor | None:
        """Excluded items of each user as sorted leaf ranks.

        Args:
            exclude: For each user the items that must not be recommended.

        Returns:
            (users, most) int64, padded with the item count, or None if nothing is excluded.
        """
        most = max((len(items) for items in exclude), default=0)
        if most == 0:
            return None
        ranks = torch.full((len(exclude), most), self.n_items, dtype=torch.int64)
        table = self.leaf_rank.cpu()
        for row, items in enumerate(exclude):
            unique = torch.unique(torch.as_tensor(np.asarray(items, dtype=np.int64)))
            ranks[row, : len(unique)] = table[unique].sort().values
        return ranks.to(self.leaf_rank.device)

    def allowed(self, node: Tensor, excluded: Tensor | None) -> Tensor:
        """Whether any item below a node is left.

        Args:
            node: (users, ...) node numbers; -1 is never allowed.
            excluded: What `excluded_ranks` returned for these users.

        Returns:
            Boolean tensor of the shape of `node`.
        """
        exists = node >= 0
        if excluded is None:
            return exists
        flat = node.clamp(min=0).reshape(len(node), -1)
        begin, end = self.leaf_begin[flat], self.leaf_end[flat]
        gone = torch.searchsorted(excluded, end.contiguous()) - torch.searchsorted(excluded, begin.contiguous())
        return exists & (gone < end - begin).reshape(node.shape)
