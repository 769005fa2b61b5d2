"""A logarithmic opinion pool at the nodes of the answers' tree: what others say of items, while the model searches.

    log π(c | n) = w₀(l) · log p(c | n) + Σ_e w_e(l) · log q_e(c)  − log-sum-exp over the children of n

for the children c of a prefix n of l tokens with an item left below. p is the model, and q_e(c) what expert e gives to
all items below c that are not excluded, so the probabilities of these items sum to one. Answers of one token, such as
the dual head's, are a tree of one level. Source: logarithmic opinion pools (Genest & Zidek 1986,
https://doi.org/10.1214/ss/1177013825), applied token by token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_RANGE = 600.0  # log-probabilities further below the best are taken for this: exp() of them still is a number


@dataclass(frozen=True)
class Tree:
    """The answers of all items as paths.

    Attributes:
        nodes: (items, levels) the node behind each token of an item's answer, -1 behind its end; the root is none.
        n_nodes: Nodes are numbered below this.
    """

    nodes: Tensor
    n_nodes: int

    @property
    def levels(self) -> int:
        """Tokens of the longest answer."""
        return self.nodes.shape[1]

    @cached_property
    def level(self) -> Tensor:
        """Tokens in front of each node's own (n_nodes,)."""
        found = self.nodes.new_zeros(self.n_nodes)
        for level, node in enumerate(self.nodes.T):
            found[node[node >= 0]] = level
        return found

    def log_mass(self, log_probs: Tensor) -> Tensor:
        """What the items below each node have together.

        Args:
            log_probs: (users, items); -inf for an item that is excluded.

        Returns:
            (users, n_nodes) float32, -inf where nothing is left.
        """
        best = log_probs.amax(1, keepdim=True).clamp(min=-torch.finfo(log_probs.dtype).max)
        mass = torch.where(log_probs > -torch.inf, (log_probs - best).double().clamp(min=-_RANGE).exp(), 0)
        total = mass.new_zeros(len(mass), self.n_nodes)
        for node in self.nodes.T:
            total.index_add_(1, node[node >= 0], mass[:, node >= 0])
        return (total.log() + best).float()

    def item_log_probs(self, scores: Tensor) -> Tensor:
        """Log-probabilities of items of which every node is a softmax over its children.

        Args:
            scores: (users, n_nodes) score of each node among its siblings; -inf where nothing is left.

        Returns:
            (users, items) float32.
        """
        items, users = len(self.nodes), len(scores)
        total = scores.new_zeros(users, items, dtype=torch.float64)
        parent = torch.full((items,), self.n_nodes, device=scores.device)  # the root, behind all nodes
        for node in self.nodes.T:
            real = node >= 0
            child, inverse = node[real].unique(return_inverse=True)
            of = parent.new_empty(len(child)).scatter_(0, inverse, parent[real])
            mine = scores[:, child].double()
            best = mine.new_full((users, self.n_nodes + 1), -torch.inf)
            best.scatter_reduce_(1, of.expand(users, -1), mine, "amax")
            shifted = torch.where(mine > -torch.inf, mine - best[:, of], -torch.inf)
            mass = mine.new_zeros(users, self.n_nodes + 1).index_add_(1, of, shifted.exp())
            total[:, real] += (shifted - mass[:, of].log()).masked_fill(mine == -torch.inf, -torch.inf)[:, inverse]
            parent = torch.where(real, node, parent)
        return total.float()


@dataclass(frozen=True)
class Prior:
    """What others say to some users.

    Attributes:
        scores: (users, n_nodes) Σ_e w_e(l) · log q_e of each node; -inf where no item is left.
        weights: (levels,) w₀, the weight of the model.
    """

    scores: Tensor
    weights: Tensor

    def pooled(self, log_probs: Tensor, child: Tensor, level: Tensor) -> Tensor:
        """The model's log-probabilities of children, pooled.

        Args:
            log_probs: (users, places, width) of the children of each place.
            child: (users, places, width) their nodes, -1 where there is none.
            level: (users, places) tokens in front of them.

        Returns:
            (users, places, width), -inf where there is no child, or nothing is left of it.
        """
        said = self.scores.gather(1, child.clamp(min=0).flatten(1)).view_as(log_probs)
        weight = self.weights[level.clamp(max=len(self.weights) - 1)][..., None]
        barred = (child < 0) | (said == -torch.inf)
        mixed = (weight * log_probs.float() + said).masked_fill(barred, -torch.inf)
        return mixed.log_softmax(-1).masked_fill(barred, -torch.inf)


Priors = Callable[[NDArray[np.int64]], Prior]  # of the users with these numbers


def without(log_probs: NDArray[np.float32], exclude: Sequence[NDArray[np.integer]] | None) -> NDArray[np.float32]:
    """Log-probabilities (users, items) with -inf for each user's excluded items."""
    if exclude is None:
        return log_probs
    log_probs = log_probs.copy()
    for user, items in enumerate(exclude):
        log_probs[user, np.asarray(items, dtype=np.int64)] = -np.inf
    return log_probs
