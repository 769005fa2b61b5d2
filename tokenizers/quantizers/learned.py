"""What quantizers that are trained by gradient share: options, codebooks, the loop, and what is saved.

Codebooks are running averages of the vectors that were given each code (van den Oord et al. 2017, arXiv 1711.00937,
appendix A.1). They start as the k-means of a batch of encoder outputs, and a code that hardly anything is given starts
again at a vector of the batch (SoundStream, arXiv 2107.03312). Embeddings are centred and divided by one number, so
that a reconstruction error is the share of their variance that is left.

Everything is seeded and runs on one thread of the CPU: the thread count changes no code. With [256, 128] hidden units,
384 dimensions and batches of 1024, a step takes about 0.05 s there.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import torch
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]
from torch import Tensor, nn
from tqdm import tqdm

from reasonrec.tokenizers.errors import UserError
from reasonrec.tokenizers.quantizers.kmeans import checked_rows, k_means
from reasonrec.tokenizers.whole import whole

POINTS = 100  # of a curve, at most
_CHUNK = 4096  # rows that are encoded or decoded at once
_START_ROWS = 4096


@dataclass
class Step:
    """What a network says of a batch.

    Attributes:
        losses: By name; their sum is descended.
        given: For each codebook the vectors (n, latent) and the codes (n,) they were given.
    """

    losses: dict[str, Tensor]
    given: list[tuple[Tensor, Tensor]]


class Codebook(nn.Module):
    """Vectors that follow the averages of what is given their codes.

    Attributes:
        vectors: (size, dim).
        shares: (size,) running share of a batch that each code is given.
        sums: (size, dim) running sum of the vectors that each code is given, over the batch's size.
    """

    vectors: Tensor
    shares: Tensor
    sums: Tensor

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        self.size = size
        self.register_buffer("vectors", torch.zeros(size, dim))
        self.register_buffer("shares", torch.full((size,), 1 / size))
        self.register_buffer("sums", torch.zeros(size, dim))

    def start(self, points: Tensor, seed: int) -> None:
        """Start at the k-means of points (n, dim)."""
        found = k_means(points.numpy(), self.size, seed, n_init=3, max_iter=50)
        self.vectors.copy_(torch.from_numpy(found.cluster_centers_))
        self.sums.copy_(self.vectors * self.shares[:, None])

    def nearest(self, points: Tensor) -> Tensor:
        """Codes (n,) of the vectors nearest to points (n, dim)."""
        return (self.vectors.square().sum(1) - 2 * points @ self.vectors.T).argmin(1)

    def update(self, points: Tensor, codes: Tensor, decay: float, dead: float) -> None:
        """Move towards what was given the codes.

        Args:
            points: (n, dim).
            codes: (n,) their codes.
            decay: Weight of the past.
            dead: A code whose running share is below so much of an equal one starts again at one of the points.
        """
        given = nn.functional.one_hot(codes, self.size).to(points.dtype)
        self.shares.lerp_(given.mean(0), 1 - decay)
        self.sums.lerp_(given.T @ points / len(points), 1 - decay)
        lost = self.shares < dead / self.size
        drawn = torch.randint(len(points), (int(lost.sum()),))
        self.shares[lost] = 1 / self.size
        self.sums[lost] = points[drawn] / self.size
        self.vectors.copy_(self.sums / self.shares[:, None])

    def average(self) -> Tensor:
        """(dim,) the mean of the vectors, each as often as its code is given: the best guess without a code."""
        return self.sums.sum(0) / self.shares.sum()


class Network(nn.Module, ABC):
    """Encoder, codebooks, decoder.

    Attributes:
        books: The codebooks, one a level.
    """

    books: nn.ModuleList

    @abstractmethod
    def start(self, points: Tensor, seed: int) -> None:
        """Start the codebooks at what the encoder makes of points (n, dim)."""

    @abstractmethod
    def forward(self, points: Tensor) -> Step:
        """Losses of a batch (n, dim), and what its vectors were given."""

    @abstractmethod
    def encode(self, points: Tensor) -> Tensor:
        """Codes (n, depth) of points (n, dim)."""

    @abstractmethod
    def summands(self, points: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Points (n, width) where vectors of codes add up, and these vectors, (codes, width) a level."""

    @abstractmethod
    def decode(self, codes: Tensor) -> Tensor:
        """Points (n, dim), as far as the codes of the first levels (n, up to depth) tell them."""


@dataclass
class LearnedQuantizer(ABC):
    """A quantizer with an encoder and a decoder that are trained.

    Attributes:
        codebook_sizes: Number of codes of each level.
        seed: Its seed.
        hidden: Units of the hidden layers of the encoder; the decoder has them the other way round.
        latent: Dimensions of the vectors that are quantized.
        steps: Batches to learn from.
        batch_size: Rows of a batch, at most all there are.
        learning_rate: Of Adam at the first step; falls to zero along a line.
        commitment: Weight of the distance between what the encoder gives and the vector it is given.
        decay: Weight of the past in the codebooks, a step.
        dead: A code that is given less than this share of an equal part starts again.
        progress: Show a bar over steps.
        curves: `step`, and each loss as an average since the point before, after `fit_encode`.

    Raises:
        UserError: If a number is out of range.
    """

    codebook_sizes: Sequence[int]
    seed: int = 0
    hidden: Sequence[int] = (256, 128)
    latent: int = 32
    steps: int = 2000
    batch_size: int = 1024
    learning_rate: float = 1e-3
    commitment: float = 0.25
    decay: float = 0.99
    dead: float = 0.1
    progress: bool = False
    curves: dict[str, list[float]] = field(default_factory=dict, init=False)
    _network: Network | None = field(default=None, init=False, repr=False)
    _mean: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32), init=False, repr=False)
    _scale: float = field(default=1.0, init=False, repr=False)

    def __post_init__(self) -> None:
        for name in ("latent", "steps", "batch_size"):
            whole(name, getattr(self, name), at_least=1)
        if not isinstance(self.hidden, list | tuple):
            raise UserError(f"hidden={self.hidden!r} has to be a list of whole numbers, such as [256, 128]")
        for place, units in enumerate(self.hidden):
            whole(f"hidden[{place}]", units, at_least=1)
        fraction("learning_rate", self.learning_rate, below=1.0, zero=False)
        fraction("commitment", self.commitment)
        fraction("decay", self.decay, below=1.0)
        fraction("dead", self.dead, below=1.0)

    @abstractmethod
    def build(self, dim: int) -> Network:
        """An untrained network for embeddings of `dim` dimensions."""

    def fit_encode(self, embeddings: np.ndarray) -> np.ndarray:
        """Train, and encode the rows that were learned from.

        Args:
            embeddings: (n, dim).

        Returns:
            int32 (n, depth).

        Raises:
            UserError: If a codebook is larger than the number of rows, or as `check_embeddings`.
        """
        rows = checked_rows(embeddings, self.codebook_sizes)
        self._mean = rows.mean(0)
        self._scale = float((rows - self._mean).std(dtype=np.float64)) or 1.0
        points = torch.from_numpy((rows - self._mean) / np.float32(self._scale))
        with _one_thread(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            self._network = self.build(points.shape[1])
            self._train(self._network, points)
        return self.encode(embeddings)

    def _train(self, network: Network, points: Tensor) -> None:
        n, size = len(points), min(self.batch_size, len(points))
        with torch.no_grad():
            network.start(points[torch.randperm(n)[: max(_START_ROWS, 4 * max(self.codebook_sizes))]], self.seed)
        optimizer = torch.optim.Adam(network.parameters(), lr=self.learning_rate)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / self.steps)
        every, since = -(-self.steps // POINTS), dict[str, float]()
        self.curves = {"step": []}
        order = torch.zeros(0, dtype=torch.int64)
        for step in tqdm(
            range(1, self.steps + 1), desc="quantizing", unit="step", disable=None if self.progress else True
        ):
            if len(order) < size:
                order = torch.randperm(n)
            batch, order = points[order[:size]], order[size:]
            said: Step = network(batch)
            optimizer.zero_grad()
            torch.stack(list(said.losses.values())).sum().backward()
            optimizer.step()
            schedule.step()
            with torch.no_grad():
                for book, (vectors, codes) in zip(network.books, said.given, strict=True):
                    book.update(vectors, codes, self.decay, self.dead)  # type: ignore[operator]
            for name, loss in said.losses.items():
                since[name] = since.get(name, 0.0) + loss.item() / every
            if step % every == 0:
                self.curves["step"].append(step)
                for name, value in since.items():
                    self.curves.setdefault(name, []).append(value)
                since = {}

    def encode(self, embeddings: np.ndarray) -> np.ndarray:
        """Codes of rows, new or learned from.

        Args:
            embeddings: (n, dim).

        Returns:
            int32 (n, depth).

        Raises:
            UserError: As `check_embeddings`.
        """
        network, points = self._trained(), self._points(embeddings)
        codes = np.empty((len(points), len(self.codebook_sizes)), dtype=np.int32)
        with _one_thread(), torch.no_grad():
            for begin in range(0, len(points), _CHUNK):
                codes[begin : begin + _CHUNK] = network.encode(points[begin : begin + _CHUNK]).numpy()
        return codes

    def summands(self, embeddings: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
        """What the encoder makes of rows, and the vectors of codes there."""
        network, points = self._trained(), self._points(embeddings)
        with _one_thread(), torch.no_grad():
            parts = [network.summands(part) for part in points.split(_CHUNK)]
        return np.concatenate([part.numpy() for part, _ in parts]), [book.numpy() for book in parts[0][1]]

    def _points(self, embeddings: np.ndarray) -> Tensor:
        return torch.from_numpy((checked_rows(embeddings) - self._mean) / np.float32(self._scale))

    def reconstruct(self, codes: np.ndarray) -> np.ndarray:
        """Embeddings, float32 (n, dim), as far as the codes of the first levels (n, up to depth) tell them."""
        network, rows = self._trained(), torch.from_numpy(np.asarray(codes, dtype=np.int64))
        points = np.empty((len(rows), len(self._mean)), dtype=np.float32)
        with _one_thread(), torch.no_grad():
            for begin in range(0, len(rows), _CHUNK):
                points[begin : begin + _CHUNK] = network.decode(rows[begin : begin + _CHUNK]).numpy()
        return points * np.float32(self._scale) + self._mean

    def state(self) -> dict[str, np.ndarray]:
        """Encoder, codebooks, decoder, and how embeddings are scaled."""
        arrays = {name: tensor.numpy().copy() for name, tensor in self._trained().state_dict().items()}
        return arrays | {"mean": self._mean, "scale": np.array([self._scale], dtype=np.float64)}

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Take over a `state`.

        Raises:
            KeyError: If an array is missing.
            ValueError: If one is unknown, or has another shape.
        """
        self._mean, self._scale = state["mean"], float(state["scale"].item())
        with torch.random.fork_rng(devices=[]):
            network = self.build(len(self._mean))
        arrays = {name: torch.from_numpy(a) for name, a in state.items() if name not in ("mean", "scale")}
        try:
            network.load_state_dict(arrays)
        except RuntimeError as error:
            raise ValueError(str(error)) from error
        self._network = network

    def _trained(self) -> Network:
        if self._network is None:
            raise ValueError("a quantizer has to be fitted, or restored, before it encodes")
        return self._network


def mlp(sizes: Sequence[int]) -> nn.Sequential:
    """Linear layers with ReLU between them, from `sizes[0]` dimensions to `sizes[-1]`."""
    layers: list[nn.Module] = []
    for before, after in pairwise(sizes):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def straight_through(points: Tensor, vectors: Tensor) -> Tensor:
    """The vectors, with the gradient handed on to the points unchanged (arXiv 1308.3432)."""
    return points + (vectors - points).detach()


def fraction(name: str, value: object, *, below: float = float("inf"), zero: bool = True) -> None:
    """Refuse what is no number from 0 on.

    Raises:
        UserError: If it is none, negative, not `below`, or zero where that is not allowed.
    """
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 <= value < below or (value == 0 and not zero):  # type: ignore[operator]
        low = "from 0 on" if zero else "above 0"
        high = f" and below {below:g}" if below < float("inf") else ""
        raise UserError(f"{name}={value!r} has to be a number {low}{high}")


@contextmanager
def _one_thread() -> Iterator[None]:
    """One thread for PyTorch and for scikit-learn: sums are then added up in one order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpool_limits(limits=1):
            yield
    finally:
        torch.set_num_threads(before)
