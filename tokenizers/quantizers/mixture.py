"""Vectors to codes by parallel codebooks behind experts: MPQ of REG4Rec, and Mixture-of-Codes.

After arXiv 2508.15308 and 2410.09560. Each level has a codebook and an expert of its own, a linear map of the
embedding; no level's codes depend on another's.
The vectors of an item's codes are mixed by a gate and decoded together. The loss is the reconstruction error and
α ‖W̄ᵀW̄ - I‖² over the experts' columns of length one, which keeps them from looking at the same directions (REG4Rec,
equations 1 to 4).

The papers leave the rest open. Decided here:

- **Codebooks**: running averages, with k-means as start and a new start for dead codes; equation 4 alone would pull no
  vector towards what it codes. The gradient passes straight through to the experts, and a commitment loss keeps them
  near their vectors.
- **Gate**: a softmax over all experts of a linear map of the embedding (`gate: softmax`, MMoE's, as REG4Rec draws it),
  or equal shares (`gate: mean`, Mixture-of-Codes).
- **Load balance**: the squared coefficient of variation of a batch's average shares (Shazeer et al. 2017,
  arXiv 1701.06538), so that the gate closes no codebook.
- **Rebuilding from codes alone**: with the average shares, for the gate reads the embedding, which is more than codes
  tell; where codes of later levels are missing, with their codebooks' average vectors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from reasonrec.tokenizers.errors import UserError
from reasonrec.tokenizers.quantizers.base import QUANTIZERS
from reasonrec.tokenizers.quantizers.learned import (
    Codebook,
    LearnedQuantizer,
    Network,
    Step,
    fraction,
    mlp,
    straight_through,
)

GATES = ("softmax", "mean")


@dataclass
class MixtureQuantizer(LearnedQuantizer):
    """Parallel codebooks behind linear experts.

    Attributes:
        hidden: Units of the hidden layers of the decoder, from the embedding's end; the experts have none.
        gate: What mixes the vectors: `softmax` of the embedding, or equal shares (`mean`).
        orthogonality: Weight α of the experts' overlap.
        balance: Weight of the load balance of the gate.

    Raises:
        UserError: If a number is out of range, or there is no such gate.
    """

    gate: str = "softmax"
    orthogonality: float = 0.001
    balance: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gate not in GATES:
            raise UserError(f"gate={self.gate!r} has to be one of {', '.join(GATES)}")
        fraction("orthogonality", self.orthogonality)
        fraction("balance", self.balance)

    def build(self, dim: int) -> Network:
        """An untrained network for embeddings of `dim` dimensions."""
        return _Mixture([dim, *self.hidden, self.latent], self)


class _Mixture(Network):
    shares: Tensor

    def __init__(self, sizes: Sequence[int], options: MixtureQuantizer) -> None:
        super().__init__()
        dim, latent, depth = sizes[0], sizes[-1], len(options.codebook_sizes)
        self.experts = nn.ModuleList([nn.Linear(dim, latent) for _ in range(depth)])
        self.books = nn.ModuleList([Codebook(int(size), latent) for size in options.codebook_sizes])
        self.decoder = mlp(sizes[::-1])
        self.gate = nn.Linear(dim, depth) if options.gate == "softmax" else None
        self.register_buffer("shares", torch.full((depth,), 1 / depth))  # the gate's average
        self.options = options

    def start(self, points: Tensor, seed: int) -> None:
        for level, (expert, book) in enumerate(zip(self.experts, self.books, strict=True)):
            assert isinstance(book, Codebook)
            book.start(expert(points), seed + level)

    def _given(self, points: Tensor) -> list[tuple[Tensor, Tensor]]:
        """For each level the expert's output and its codes."""
        given = []
        for expert, book in zip(self.experts, self.books, strict=True):
            assert isinstance(book, Codebook)
            latent = expert(points)
            given.append((latent, book.nearest(latent.detach())))
        return given

    def forward(self, points: Tensor) -> Step:
        given = self._given(points)
        vectors = [book.vectors[codes] for book, (_, codes) in zip(self.books, given, strict=True)]  # type: ignore
        pairs = [(latent, vector) for (latent, _), vector in zip(given, vectors, strict=True)]
        gate = self.shares.expand(len(points), -1) if self.gate is None else self.gate(points).softmax(1)
        mixed = (gate[:, :, None] * torch.stack([straight_through(*pair) for pair in pairs], dim=1)).sum(1)
        distances = torch.stack([(latent - vector).square().mean() for latent, vector in pairs])
        losses = {
            "reconstruction": (self.decoder(mixed) - points).square().mean(),
            "commitment": self.options.commitment * distances.sum(),
            "orthogonality": self.options.orthogonality * self._overlap(),
        }
        if self.gate is not None:
            average = gate.mean(0)
            losses["balance"] = self.options.balance * (len(average) * average.square().sum() - 1)
            self.shares.lerp_(average.detach(), 1 - self.options.decay)
        return Step(losses, [(latent.detach(), codes) for latent, codes in given])

    def _overlap(self) -> Tensor:
        """‖W̄ᵀW̄ - I‖² of the experts' columns, each of length one."""
        columns = nn.functional.normalize(torch.cat([expert.weight for expert in self.experts]), dim=1)  # type: ignore
        return (columns @ columns.T - torch.eye(len(columns))).square().sum()

    def encode(self, points: Tensor) -> Tensor:
        return torch.stack([codes for _, codes in self._given(points)], dim=1)

    def summands(self, points: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The experts' outputs side by side; a code's vector is zero where other experts' are."""
        outputs = torch.cat([expert(points) for expert in self.experts], dim=1)
        latent = self.options.latent
        before = [(level * latent, (len(self.books) - 1 - level) * latent) for level in range(len(self.books))]
        return outputs, [nn.functional.pad(book.vectors, at) for book, at in zip(self.books, before, strict=True)]  # type: ignore

    def decode(self, codes: Tensor) -> Tensor:
        mixed = torch.zeros(len(codes), self.options.latent)
        for level, book in enumerate(self.books):
            assert isinstance(book, Codebook)
            known = level < codes.shape[1]
            mixed = mixed + self.shares[level] * (book.vectors[codes[:, level]] if known else book.average())
        out: Tensor = self.decoder(mixed)
        return out


QUANTIZERS.add("mixture", MixtureQuantizer, __name__)
