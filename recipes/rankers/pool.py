"""A checkpoint's pool: experts beside the model, and how much each has to say at each level of an answer.

The pool is one distribution over items (`decoding/prior.py`), so it has an exact search and a likelihood. Weights are
those of a conditional logit at each level, fitted on validation targets by maximum likelihood: a convex problem.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from scipy.optimize import minimize
from torch import Tensor

from reasonrec.recipes.decoding.answers import Choices
from reasonrec.recipes.decoding.prior import Prior, Tree, without
from reasonrec.recipes.keys import fit
from reasonrec.recipes.rankers.experts import EXPERTS, Before, Expert
from reasonrec.recipes.rankers.top_k import rank_rows
from reasonrec.tokenizers.errors import UserError

MODEL = "model"  # its name among the weights
RIDGE = 1.0  # nats for a weight that is 1 away from the level before: a level that few rows reach follows it
BLOCK = 512  # rows whose probabilities exist at a time
Weights = dict[str, NDArray[np.float64]]


class Level(NamedTuple):
    """What the targets' tokens at one level were chosen from.

    Attributes:
        said: (n, voices, width) log-probabilities of the nodes that could follow, -inf where there is none.
        node: (n, width) these nodes, -1 where there is none.
        target: (n,) which of them is the target's.
        row: (n,) whose they are.
    """

    said: NDArray[np.float64]
    node: NDArray[np.int64]
    target: NDArray[np.int64]
    row: NDArray[np.int64]


def fit_level(
    level: Level, start: NDArray[np.float64], fitted: NDArray[np.bool_] | None = None
) -> NDArray[np.float64]:
    """Weights (voices,), none below zero, that make the targets most likely.

    Args:
        level: What they were chosen from.
        start: Weights that a level without rows has.
        fitted: Rows that count (n,).
    """
    said, target = (level.said, level.target) if fitted is None else (level.said[fitted], level.target[fitted])
    if not len(target):
        return start

    def objective(weights: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        losses, gradient = _losses(weights, said, target)
        away = weights - start
        return float(losses.sum() + RIDGE / 2 * away @ away), gradient.sum(0) + RIDGE * away

    found = minimize(objective, start, jac=True, method="L-BFGS-B", bounds=[(0, None)] * len(start))
    return np.asarray(found.x)


def _losses(
    weights: NDArray[np.float64], said: NDArray[np.float64], target: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Negative log-likelihood (n,) and its gradient (n, voices)."""
    legal = said[:, :1] > -np.inf
    finite = np.where(legal, said, 0)
    mixed = np.where(legal[:, 0], np.einsum("v,nvw->nw", weights, finite), -np.inf)
    mixed -= mixed.max(axis=1, keepdims=True)
    chances = np.exp(mixed)
    total = chances.sum(1, keepdims=True)
    n = np.arange(len(target))
    losses = np.log(total[:, 0]) - mixed[n, target]
    gradient = np.einsum("nw,nvw->nv", chances / total, finite) - finite[n, :, target]
    return losses, gradient


@dataclass
class Pool:
    """Experts and weights.

    Attributes:
        experts: The experts by name.
        weights: (levels,) of each by name, and of the model (`MODEL`), if it has a voice.
    """

    experts: dict[str, Expert]
    weights: Weights

    def prior(
        self, tree: Tree, rows: pl.DataFrame, exclude: Sequence[NDArray[np.integer]] | None, device: Any = "cpu"
    ) -> Prior:
        """What the experts say to some users.

        Args:
            tree: The answers' tree.
            rows: The users' histories (`history`).
            exclude: Items that no user of these is recommended.
            device: Where the search is.
        """
        total = torch.zeros(rows.height, tree.n_nodes, device=tree.nodes.device)
        barred = torch.zeros_like(total, dtype=torch.bool)
        for name, expert in self.experts.items():
            mass = said(expert, tree, rows, exclude)
            barred |= mass == -torch.inf
            weight = torch.as_tensor(self.weights[name], dtype=torch.float32, device=total.device)[tree.level]
            total += weight * mass.masked_fill(barred, 0)
        own = self.weights.get(MODEL, np.zeros(tree.levels))
        scores = total.masked_fill(barred, -torch.inf)
        return Prior(scores.to(device), torch.as_tensor(own, dtype=torch.float32, device=device))

    def save(self, folder: Path) -> dict[str, Any]:
        """Write the experts into a checkpoint's (partial) folder.

        Returns:
            The rest, for the manifest's facts.
        """
        for name, expert in self.experts.items():
            save_file(
                {key: np.ascontiguousarray(value) for key, value in expert.tensors().items()}, _file(folder, name)
            )
        return {
            "pool": {
                "weights": {name: values.tolist() for name, values in self.weights.items()},
                "experts": {
                    name: {"temper": e.temper, "power": e.power, **e.facts()} for name, e in self.experts.items()
                },
            }
        }

    @classmethod
    def load(
        cls,
        folder: Path,
        facts: Mapping[str, Any],
        popularity: NDArray[np.int64],
        levels: int,
        leave_out: Sequence[str] = (),
        trained: int | None = None,
    ) -> Pool | None:
        """The pool of a verified checkpoint.

        Args:
            folder: Folder of the checkpoint.
            facts: The facts of its manifest.
            popularity: How often each item is a train target (n_items,).
            levels: Tokens of the longest answer.
            leave_out: Names of experts that are not to be heard; the weights of the others stay.
            trained: How many items the experts know, where others came later; None for all.

        Returns:
            The pool; None if it has none, or all its experts are left out.

        Raises:
            UserError: If it has none of these experts, or what it has is not what this kit writes.
        """
        about = facts.get("pool")
        if about is None:
            if leave_out:
                raise UserError(f"{folder} has no experts to leave out: it was not made by recipes/fuse.py")
            return None
        try:
            weights = {name: np.array(fit(list[float], values)) for name, values in about["weights"].items()}
            experts = dict(about["experts"])
            if weights.keys() != {MODEL, *experts} or any(
                len(values) != levels or not (np.isfinite(values) & (values >= 0)).all() for values in weights.values()
            ):
                raise ValueError("weights of other experts, of other levels, or below zero")
            for name in leave_out:
                if name not in experts:
                    raise UserError(f"{folder} has no expert {name!r} to leave out; it has {', '.join(experts)}")
                del experts[name], weights[name]
            made = {name: _restore(folder, name, said, popularity[:trained]) for name, said in experts.items()}
        except (KeyError, TypeError, ValueError, AttributeError, OSError, SafetensorError) as error:
            raise UserError(f"{folder}: its experts are not what this kit writes ({error}): fuse it again") from error
        if trained is not None:
            made = {name: Before(expert, popularity) for name, expert in made.items()}
        return cls(made, weights) if made else None

    def __str__(self) -> str:
        """The weights, for people."""
        return "; ".join(f"{name} {' '.join(f'{w:.2f}' for w in values)}" for name, values in self.weights.items())


def _file(folder: Path, name: str) -> Path:
    return folder / f"expert_{name}.safetensors"


def _restore(folder: Path, name: str, about: Mapping[str, Any], popularity: NDArray[np.int64]) -> Expert:
    expert = EXPERTS.find(name).expert.restore(load_file(_file(folder, name)), about, popularity)
    expert.temper, expert.power = fit(float, about["temper"]), fit(float, about["power"])
    if expert.temper not in expert.tempers or expert.power not in expert.powers:
        raise ValueError(f"a temper of {expert.temper} and a power of {expert.power}")
    return expert


def said(expert: Expert, tree: Tree, rows: pl.DataFrame, exclude: Sequence[NDArray[np.integer]] | None) -> Tensor:
    """What an expert gives to the items below each node that are not excluded, in logs: (rows, n_nodes)."""
    log_probs = torch.from_numpy(without(expert.log_probs(rows), exclude))
    return tree.log_mass(log_probs.to(tree.nodes.device))


def model_voice(tree: Tree, rows: pl.DataFrame, chosen: Iterable[tuple[NDArray[np.int64], Choices]]) -> list[Level]:
    """What the model says of the nodes that targets were chosen from, among what is not masked.

    Args:
        tree: The answers' tree.
        rows: Cases with `target` and `masked`.
        chosen: Numbers of rows, and what the model says of each level.

    Returns:
        One for each level, with one voice. Tokens without an alternative are nobody's choice.
    """
    parts: list[list[Level]] = [[] for _ in range(tree.levels)]
    for numbers, choice in chosen:
        block = rows[numbers]
        nothing = np.zeros((len(numbers), len(tree.nodes)), dtype=np.float32)
        left = tree.log_mass(torch.from_numpy(without(nothing, _masked(block))).to(tree.nodes.device)) > -torch.inf
        path = tree.nodes[torch.tensor(block["target"].to_list(), device=tree.nodes.device)]
        for level in range(choice.node.shape[1]):
            node = choice.node[:, level]  # (rows, width)
            legal = (node >= 0) & left.gather(1, node.clamp(min=0))
            is_target = legal & (node == path[:, level, None])
            counts = is_target.any(1) & (legal.sum(1) > 1)
            own = choice.log_probs[:, level].double().masked_fill(~legal, -torch.inf)[counts]
            target = is_target[counts].to(torch.int8).argmax(1)
            nodes = node.masked_fill(~legal, -1)[counts]
            arrays = (tensor.cpu().numpy() for tensor in (own[:, None], nodes, target, counts))
            heard, following, right, where = arrays
            parts[level].append(Level(heard, following, right, numbers[where]))
    return [_joined(level) for level in parts]


def with_voice(levels: Sequence[Level], tree: Tree, expert: Expert, rows: pl.DataFrame) -> list[Level]:
    """The same with one voice more, the last.

    Args:
        levels: What others say.
        tree: The answers' tree.
        expert: Who speaks.
        rows: The cases.
    """
    blocks = [rows[start : start + BLOCK] for start in range(0, rows.height, BLOCK)]
    mass = np.concatenate([said(expert, tree, block, _masked(block)).cpu().numpy() for block in blocks])
    result = []
    for level in levels:
        heard = np.where(level.node >= 0, mass[level.row[:, None], level.node], -np.inf)
        result.append(level._replace(said=np.concatenate([level.said, heard[:, None].astype(np.float64)], axis=1)))
    return result


def _masked(rows: pl.DataFrame) -> list[NDArray[np.integer]]:
    return [items.to_numpy() for items in rows["masked"]]


def _joined(parts: Sequence[Level]) -> Level:
    width = max((part.node.shape[1] for part in parts), default=1)
    no_row = np.empty(0, dtype=np.int64)
    nobody = Level(np.empty((0, 1, width)), np.empty((0, width), dtype=np.int64), no_row, no_row)
    said = [np.pad(p.said, ((0, 0), (0, 0), (0, width - p.said.shape[2])), constant_values=-np.inf) for p in parts]
    node = [np.pad(p.node, ((0, 0), (0, width - p.node.shape[1])), constant_values=-1) for p in parts]
    return Level(
        np.concatenate([nobody.said, *said]),
        np.concatenate([nobody.node, *node]),
        np.concatenate([nobody.target, *(part.target for part in parts)]),
        np.concatenate([nobody.row, *(part.row for part in parts)]),
    )


def fit_weights(
    levels: Sequence[Level], voices: Sequence[str], names: Sequence[str], fitted: NDArray[np.bool_] | None = None
) -> Weights:
    """Weights of some voices, level by level.

    Args:
        levels: What all say.
        voices: Names of the voices.
        names: Those that are heard.
        fitted: Rows that are fitted on, all by default.
    """
    weights, heard = np.full(len(names), 1 / len(names)), [voices.index(name) for name in names]
    found = []
    for level in levels:
        here = level._replace(said=level.said[:, heard])
        weights = fit_level(here, weights, None if fitted is None else fitted[level.row])
        found.append(weights)
    return {name: np.array([level[place] for level in found]) for place, name in enumerate(names)}


def losses(levels: Sequence[Level], voices: Sequence[str], weights: Weights, n_rows: int) -> NDArray[np.float64]:
    """Negative log-likelihood of each row's target in nats (n_rows,).

    Args:
        levels: What all say.
        voices: Names of the voices.
        weights: Weights of those that are heard.
        n_rows: How many rows there are.
    """
    total, heard = np.zeros(n_rows), [voices.index(name) for name in weights]
    for number, level in enumerate(levels):
        own = np.array([values[number] for values in weights.values()])
        total[level.row] += _losses(own, level.said[:, heard], level.target)[0]
    return total


@dataclass
class ExpertsOnly:
    """The pool without the model, on the same tree.

    Attributes:
        pool: Experts and their weights, none of the model.
        tree: The answers' tree.
        popularity: How often each item is a train target (n_items,): equal scores rank by it.
        name: Name in the table.
    """

    pool: Pool
    tree: Tree
    popularity: NDArray[np.int64]
    name: str = "pooled experts, no LLM"

    def scores(self, rows: pl.DataFrame) -> NDArray[np.float32]:
        """Log-probabilities of all items that are not masked (rows, n_items)."""
        parts = [np.empty((0, len(self.popularity)), dtype=np.float32)]
        for start in range(0, rows.height, BLOCK):
            block = rows[start : start + BLOCK]
            prior = self.pool.prior(self.tree, block, _masked(block))
            parts.append(self.tree.item_log_probs(prior.scores.to(self.tree.nodes.device)).cpu().numpy())
        return np.concatenate(parts)

    def rank(self, rows: pl.DataFrame, k: int) -> NDArray[np.int32]:
        """See `Ranker`."""
        return rank_rows(self.scores, rows, k, self.popularity)

    def score(self, rows: pl.DataFrame, items: NDArray[np.integer]) -> NDArray[np.float32]:
        """See `Ranker`: -inf for what is masked."""
        return np.take_along_axis(self.scores(rows), items.astype(np.int64), axis=1)
