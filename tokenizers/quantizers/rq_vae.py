"""Vectors to codes by a residual-quantized autoencoder, the quantizer of TIGER (arXiv 2305.05065).

An encoder's output is coded level by level, each level coding what those before it left over (Zeghidour et al. 2021,
arXiv 2107.03312); a decoder rebuilds the embedding from the sum of the vectors. The loss is the reconstruction error
and, on every level, the distance that commits the encoder to the vector it was given. Unlike k-means it may bend the
space before it cuts it, and nothing keeps its codes equally used: look at collisions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from reasonrec.tokenizers.errors import UserError
from reasonrec.tokenizers.quantizers.base import QUANTIZERS
from reasonrec.tokenizers.quantizers.learned import Codebook, LearnedQuantizer, Network, Step, mlp, straight_through

GRADIENTS = ("straight_through", "rotation")


@dataclass
class RQVAE(LearnedQuantizer):
    """Residual-quantized autoencoder.

    Attributes:
        gradient: How the gradient passes the codebooks: `straight_through`, or turned and scaled as the encoder's
            output is turned and scaled into its code's vector (`rotation`, arXiv 2410.06424).

    Raises:
        UserError: If a number is out of range, or there is no such gradient.
    """

    gradient: str = "straight_through"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gradient not in GRADIENTS:
            raise UserError(f"gradient={self.gradient!r} has to be one of {', '.join(GRADIENTS)}")

    def build(self, dim: int) -> Network:
        """An untrained network for embeddings of `dim` dimensions."""
        return _Residual(
            [dim, *self.hidden, self.latent], self.codebook_sizes, self.commitment, self.gradient == "rotation"
        )


class _Residual(Network):
    def __init__(self, sizes: Sequence[int], codebook_sizes: Sequence[int], commitment: float, rotation: bool) -> None:
        super().__init__()
        self.encoder, self.decoder = mlp(sizes), mlp(sizes[::-1])
        self.books = nn.ModuleList([Codebook(int(size), sizes[-1]) for size in codebook_sizes])
        self.commitment = commitment
        self.through = rotate if rotation else straight_through

    def start(self, points: Tensor, seed: int) -> None:
        residual = self.encoder(points)
        for level, book in enumerate(self.books):
            assert isinstance(book, Codebook)
            book.start(residual, seed + level)
            residual = residual - book.vectors[book.nearest(residual)]

    def _quantize(self, latent: Tensor) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
        """For each level what was left before it and its codes; and what is left in the end."""
        given, residual = [], latent
        for book in self.books:
            assert isinstance(book, Codebook)
            codes = book.nearest(residual.detach())
            given.append((residual, codes))
            residual = residual - book.vectors[codes]
        return given, residual

    def forward(self, points: Tensor) -> Step:
        latent = self.encoder(points)
        given, left = self._quantize(latent)
        # What a level leaves over is its distance to the vector: what stands before the next level, or at the end.
        after = [residual for residual, _ in given[1:]] + [left]
        losses = {
            "reconstruction": (self.decoder(self.through(latent, (latent - left).detach())) - points).square().mean(),
            "commitment": self.commitment * torch.stack([rest.square().mean() for rest in after]).sum(),
        }
        return Step(losses, [(residual.detach(), codes) for residual, codes in given])

    def encode(self, points: Tensor) -> Tensor:
        given, _ = self._quantize(self.encoder(points))
        return torch.stack([codes for _, codes in given], dim=1)

    def summands(self, points: Tensor) -> tuple[Tensor, list[Tensor]]:
        return self.encoder(points), [book.vectors for book in self.books]  # type: ignore[misc]

    def decode(self, codes: Tensor) -> Tensor:
        books = list(self.books)[: codes.shape[1]]
        vectors: Tensor = sum(book.vectors[codes[:, level]] for level, book in enumerate(books))  # type: ignore
        out: Tensor = self.decoder(vectors)
        return out


def rotate(points: Tensor, vectors: Tensor) -> Tensor:
    """The vectors, with the gradient turned and scaled as the points are into them (arXiv 2410.06424, section 4).

    The rotation within the plane of both, and the ratio of their lengths, count as constants.

    Args:
        points: (n, dim).
        vectors: (n, dim), without gradient.

    Returns:
        (n, dim), equal to the vectors but for rounding.
    """
    with torch.no_grad():
        before, after = (nn.functional.normalize(x, dim=1) for x in (points, vectors))
        between = nn.functional.normalize(before + after, dim=1)
        scale = vectors.norm(dim=1, keepdim=True) / points.norm(dim=1, keepdim=True).clamp_min(1e-12)
    reflected = points - 2 * (points * between).sum(1, keepdim=True) * between
    return scale * (reflected + 2 * (points * before).sum(1, keepdim=True) * after)


QUANTIZERS.add("rq_vae", RQVAE, __name__)
