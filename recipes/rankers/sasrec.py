"""SASRec with full-softmax cross-entropy: the neural baseline of the table.

Self-attentive sequential recommendation (Kang and McAuley, ICDM 2018) with the loss over the whole
catalogue instead of one sampled negative, at every position of every train sequence. It is tuned on
validation with a stated number of trials, stops early on validation, and never sees a test row before the
table is made.
"""

from __future__ import annotations

import copy
import itertools
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional
from tqdm.auto import tqdm

from reasonrec.data_gen.schema import Dataset
from reasonrec.recipes.rankers.top_k import rank_rows
from reasonrec.recipes.trainers.divergence import bad_number, bad_tensor, diverged, overflow_diverges, trained_tensors
from reasonrec.rewards.metrics import flatten, per_row
from reasonrec.tokenizers.errors import UserError
from reasonrec.tokenizers.terminal import shown
from reasonrec.tokenizers.whole import whole

# What the trials vary. The first trial is the configuration that was given, the second one suits few long
# sequences (MovieLens-100K: validation HR@10 .236 against .205), the others are drawn at random.
SEARCH_SPACE: dict[str, tuple[Any, ...]] = {
    "learning_rate": (1e-3, 2e-3, 3e-3, 5e-3),
    "dropout": (0.2, 0.35, 0.5),
    "hidden": (64, 128),
    "layers": (1, 2),
    "batch_size": (32, 128),
    "max_length": (20, 50),
}
SECOND_TRIAL: dict[str, Any] = {"dropout": 0.2, "batch_size": 32}
_POOL_BATCHES = 32


@dataclass(frozen=True)
class SasrecConfig:
    """Configuration of one training.

    Attributes:
        hidden: Width of the embeddings and the blocks.
        layers: Number of blocks.
        heads: Number of attention heads.
        dropout: Dropout on embeddings, attention and feed-forward.
        learning_rate: Peak learning rate of AdamW, after a linear warm-up over the first epoch.
        weight_decay: Weight decay of the matrices inside the blocks.
        batch_size: Sequences in a step.
        epochs: Most epochs to train.
        patience: Epochs without a better validation NDCG@10 before training stops.
        max_length: Most history items that the model sees.
        seed: Seed of initialisation, order and dropout.
    """

    hidden: int = 64
    layers: int = 2
    heads: int = 2
    dropout: float = 0.5
    learning_rate: float = 3e-3
    weight_decay: float = 0.01
    batch_size: int = 128
    epochs: int = 60
    patience: int = 5
    max_length: int = 50
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what cannot run."""
        for name in ("hidden", "layers", "heads", "batch_size", "epochs", "patience", "max_length"):
            whole(name, getattr(self, name), at_least=1)
        if self.hidden % self.heads:
            raise UserError(f"hidden={self.hidden} must be a multiple of heads={self.heads}")
        for name, high in (("dropout", 1.0), ("learning_rate", math.inf)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < high:
                raise UserError(f"{name}={shown(value)} has to be a number from 0 on and below {high:g}")


class _Block(nn.Module):
    """One pre-norm block: causal self-attention, then a feed-forward layer."""

    def __init__(self, config: SasrecConfig) -> None:
        super().__init__()
        self.heads, self.dropout = config.heads, config.dropout
        self.attention_norm = nn.LayerNorm(config.hidden)
        self.qkv = nn.Linear(config.hidden, 3 * config.hidden)
        self.out = nn.Linear(config.hidden, config.hidden)
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(config.hidden),
            nn.Linear(config.hidden, 2 * config.hidden),
            nn.GELU(),
            nn.Dropout(config.dropout),
            nn.Linear(2 * config.hidden, config.hidden),
            nn.Dropout(config.dropout),
        )

    def forward(self, x: Tensor) -> Tensor:  # (batch, length, hidden)
        batch, length, hidden = x.shape
        qkv = self.qkv(self.attention_norm(x)).view(batch, length, 3, self.heads, hidden // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        dropout = self.dropout if self.training else 0.0
        mixed = functional.scaled_dot_product_attention(query, key, value, dropout_p=dropout, is_causal=True)
        mixed = self.out(mixed.transpose(1, 2).reshape(batch, length, hidden))
        x = x + functional.dropout(mixed, self.dropout, self.training)
        return x + self.feed_forward(x)


class _Network(nn.Module):
    """Item and position embeddings, blocks, a final norm; items are scored by their own embeddings."""

    def __init__(self, n_items: int, config: SasrecConfig) -> None:
        super().__init__()
        self.items = nn.Embedding(n_items, config.hidden)
        self.positions = nn.Embedding(config.max_length, config.hidden)
        nn.init.normal_(self.items.weight, std=config.hidden**-0.5)
        nn.init.normal_(self.positions.weight, std=0.02)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(_Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.hidden)

    def forward(self, items: Tensor) -> Tensor:
        """States (batch, length, hidden). Padding stands on the right, where no real place attends to it."""
        x = self.items(items) + self.positions.weight[: items.shape[1]]
        x = self.dropout(x)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


@dataclass
class Sasrec:
    """A trained SASRec.

    Attributes:
        network: The network, in evaluation mode.
        config: How it was trained.
        popularity: Train popularity of each item, for ties (n_items,).
        curve: Per epoch: train loss, validation HR@10 and NDCG@10.
        seconds: Training time.
        name: Name in the table.
    """

    network: nn.Module
    config: SasrecConfig
    popularity: NDArray[np.int64]
    curve: list[dict[str, float]] = field(default_factory=list)
    seconds: float = 0.0
    name: str = "SASRec"

    @property
    def best(self) -> dict[str, float]:
        """The epoch whose weights were kept."""
        return max(self.curve, key=lambda epoch: epoch["ndcg@10"])

    @torch.no_grad()
    def scores(self, rows: pl.DataFrame) -> NDArray[np.float32]:
        """Scores of all items (rows, n_items); a row without history scores every item 0."""
        items, _, lengths = flatten(rows["history"])
        starts = np.cumsum(lengths) - lengths
        result = np.zeros((rows.height, len(self.popularity)), dtype=np.float32)
        table = self.network.get_parameter("items.weight")
        order = np.argsort(lengths, kind="stable")
        order = order[lengths[order] > 0]
        for chunk in (order[i : i + 512] for i in range(0, len(order), 512)):
            length = np.minimum(lengths[chunk], self.config.max_length)
            padded = _pad(items, starts[chunk] + lengths[chunk] - length, length).to(table.device)
            last = torch.as_tensor(length - 1, device=table.device)
            states = self.network(padded)[torch.arange(len(chunk), device=table.device), last]
            result[chunk] = (states @ table.T).float().cpu().numpy()
        return result

    def rank(self, rows: pl.DataFrame, k: int) -> NDArray[np.int32]:
        """Rank the catalogue for rows with `history` and `masked`: (rows, k), -1 where a list is shorter."""
        return rank_rows(self.scores, rows, k, self.popularity)

    def score(self, rows: pl.DataFrame, items: NDArray[np.integer]) -> NDArray[np.float32]:
        """See `Ranker`."""
        return np.take_along_axis(self.scores(rows), items.astype(np.int64), axis=1)


def fit(dataset: Dataset, config: SasrecConfig | None = None, *, device: str = "cpu", progress: bool = True) -> Sasrec:
    """Train one SASRec with early stopping on validation.

    Args:
        dataset: Train sequences to learn from and validation rows to stop on.
        config: Configuration; the default one otherwise.
        device: Where to train.
        progress: Show a progress bar.

    Returns:
        The network with the weights of the best validation epoch.

    Raises:
        UserError: If no train sequence has two items, there is no validation row, or the training diverges.
    """
    config = config or SasrecConfig()
    valid = dataset.rows("valid")
    if valid.height == 0:
        raise UserError("SASRec stops early on validation rows, and this dataset has none: choose another split")
    popularity = dataset.items["train_count"].to_numpy().astype(np.int64)
    began = time.perf_counter()
    devices = [torch.device(device)] if device.startswith("cuda") else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(config.seed)
        rng = np.random.default_rng(config.seed)
        network = _Network(len(popularity), config).to(device)
        model = Sasrec(network, config, popularity)
        optimizer, step, best = _optimizer(network, config), 0, copy.deepcopy(network.state_dict())
        warm_up = max(1, dataset.train.height // config.batch_size)
        bar = tqdm(range(config.epochs), desc="SASRec", unit="epoch", disable=None if progress else True)
        for epoch in bar:
            network.train()
            losses = []
            for inputs, targets in _batches(dataset, config, rng):
                step += 1
                for group in optimizer.param_groups:
                    group["lr"] = config.learning_rate * min(1.0, step / warm_up)
                losses.append(_step(network, optimizer, inputs.to(device), targets.to(device), step))
            network.eval()
            if (bad := bad_tensor(trained_tensors(network))) is not None:
                raise diverged(step, f"SASRec: {bad}", {"learning_rate": config.learning_rate})
            if not losses:
                raise UserError("no train sequence has two items: there is no next item to learn")
            model.curve.append({"epoch": epoch + 1, "loss": float(np.mean(losses)), **_validate(model, valid)})
            bar.set_postfix({name: f"{value:.4f}" for name, value in model.curve[-1].items() if name != "epoch"})
            if model.best is model.curve[-1]:
                best = copy.deepcopy(network.state_dict())
            elif epoch + 1 - model.best["epoch"] >= config.patience:
                break
        bar.close()
        network.load_state_dict(best)
    network.requires_grad_(False)
    model.seconds = time.perf_counter() - began
    return model


def restore(state: Mapping[str, Tensor], config: SasrecConfig, popularity: NDArray[np.int64]) -> Sasrec:
    """A model that was trained before.

    Args:
        state: `Sasrec.network.state_dict()`.
        config: What it was trained with.
        popularity: Train popularity of each item (n_items,).

    Raises:
        ValueError: If a tensor is missing, of another shape, or not finite.
    """
    if config.layers > len(state):
        raise ValueError(f"{config.layers} layers of {len(state)} tensors")
    try:
        with torch.device("meta"):  # nothing is allocated that the tensors do not fill
            network = _Network(len(popularity), config)
        network.load_state_dict(state, assign=True)
    except RuntimeError as error:
        raise ValueError(str(error)) from error
    if (bad := bad_tensor(trained_tensors(network))) is not None:
        raise ValueError(bad)
    network.eval().requires_grad_(False)
    return Sasrec(network, config, popularity)


def tune(
    dataset: Dataset,
    trials: int = 1,
    config: SasrecConfig | None = None,
    *,
    device: str = "cpu",
    progress: bool = True,
) -> tuple[Sasrec, list[dict[str, Any]]]:
    """Train several configurations and keep the one with the best validation NDCG@10.

    Args:
        dataset: The dataset.
        trials: Number of configurations: the given one, then distinct ones drawn from `SEARCH_SPACE` by its
            seed.
        config: The first configuration.
        device: Where to train.
        progress: Show a progress bar for each.

    Returns:
        The best model, and for each trial its configuration, validation metrics, epochs and seconds.

    Raises:
        UserError: If `trials` is below one, or what `fit` raises.
    """
    if trials < 1:
        raise UserError(f"trials={trials} must be at least 1")
    best, records = None, []
    for candidate in _configurations(config or SasrecConfig(), trials):
        model = fit(dataset, candidate, device=device, progress=progress)
        records.append({"config": asdict(candidate), **model.best, "seconds": model.seconds})
        if best is None or model.best["ndcg@10"] > best.best["ndcg@10"]:
            best = model
    assert best is not None
    return best, records


def _configurations(first: SasrecConfig, trials: int) -> list[SasrecConfig]:
    """The given configuration, the second trial, then random ones, all distinct."""
    chosen = [first]
    space = list(itertools.product(*SEARCH_SPACE.values()))
    drawn = (space[i] for i in np.random.default_rng(first.seed).permutation(len(space)))
    for named in [SECOND_TRIAL, *(dict(zip(SEARCH_SPACE, values, strict=True)) for values in drawn)]:
        candidate = replace(first, **named)
        if candidate not in chosen:
            chosen.append(candidate)
    return chosen[:trials]


def _optimizer(network: nn.Module, config: SasrecConfig) -> torch.optim.AdamW:
    """AdamW; embeddings, biases and norms are not decayed."""
    decayed = [p for name, p in network.named_parameters() if p.ndim == 2 and name.startswith("blocks")]
    rest = [p for name, p in network.named_parameters() if p.ndim != 2 or not name.startswith("blocks")]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.98))


def _step(network: nn.Module, optimizer: torch.optim.Optimizer, inputs: Tensor, targets: Tensor, number: int) -> float:
    """One update on the mean cross-entropy of the places that have a target (-1: none)."""
    counted = targets >= 0
    states = network(inputs)[counted]  # (targets, hidden): the softmax is computed where it counts
    loss = functional.cross_entropy(states @ network.get_parameter("items.weight").T, targets[counted])
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)

    def error(what: str) -> UserError:
        return diverged(number, f"SASRec: {what}", {"learning_rate": optimizer.defaults["lr"]})

    if (bad := bad_number({"loss": loss.item(), "gradient norm": norm.item()})) is not None:
        raise error(bad)
    with overflow_diverges(error):
        optimizer.step()
    return loss.item()


def _validate(model: Sasrec, rows: pl.DataFrame) -> dict[str, float]:
    metrics = per_row(model.rank(rows, 10), rows["target"].to_numpy(), (10,))
    return {name: float(metrics[name].mean()) for name in ("hr@10", "ndcg@10")}


def _pad(items: NDArray[np.int64], starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> Tensor:
    """Slices of a flat array, padded on the right with item 0 (batch, longest)."""
    offsets = np.arange(int(lengths.max()))
    places = starts[:, None] + np.minimum(offsets, lengths[:, None] - 1)
    return torch.from_numpy(np.where(offsets < lengths[:, None], items[places], 0))


def _batches(dataset: Dataset, config: SasrecConfig, rng: np.random.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of one epoch: inputs and next items (batch, length), -1 where no next item counts.

    Sequences longer than the window are cut into windows such that every item is a target once. Baskets
    have no order: they are shuffled anew each epoch.
    """
    items, sequence, lengths = flatten(dataset.train["items"])
    if dataset.facts.get("order") == "set":
        items = items[np.lexsort((rng.random(len(items)), sequence))]
    starts = np.cumsum(lengths) - lengths
    place = np.arange(len(items)) - starts[sequence]
    first = dataset.train["first_target"].to_numpy().astype(np.int64)
    counts = place >= np.maximum(first, 1)[sequence]  # an item is a target only with something before it
    # Windows count back from the end, so that the newest items have the longest context.
    n_windows = np.maximum(-(-(lengths - 1) // config.max_length), 0)
    row = np.repeat(np.arange(len(lengths)), n_windows)
    from_end = np.arange(len(row)) - np.repeat(np.cumsum(n_windows) - n_windows, n_windows)
    stop = starts[row] + lengths[row] - 1 - from_end * config.max_length  # last target of the window
    start = np.maximum(stop - config.max_length, starts[row])
    size = stop - start
    shuffled = rng.permutation(len(row))
    pool = config.batch_size * _POOL_BATCHES
    chunks = []
    for begin in range(0, len(row), pool):  # of similar length within a pool: little padding, random batches
        part = shuffled[begin : begin + pool]
        part = part[np.argsort(size[part], kind="stable")]
        chunks += [part[i : i + config.batch_size] for i in range(0, len(part), config.batch_size)]
    for i in rng.permutation(len(chunks)):
        chunk = chunks[i]
        inputs = _pad(items, start[chunk], size[chunk])
        targets = _pad(np.where(counts, items, -1), start[chunk] + 1, size[chunk])
        targets[torch.arange(targets.shape[1]) >= torch.from_numpy(size[chunk])[:, None]] = -1
        if bool((targets >= 0).any()):
            yield inputs, targets
