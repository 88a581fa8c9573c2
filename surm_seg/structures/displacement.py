"""Matrices of low displacement rank: sums of circulant times skew-circulant products."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from surm_seg.structures.base import Generators, Structure
from surm_seg.structures.circulant import Circulant
from surm_seg.structures.grid import Grid
from surm_seg.structures.refine import alternating_least_squares
from surm_seg.structures.skew_circulant import SkewCirculant


class Displacement(Structure):
    """W(G, H) = sum_i Z_1(g_i) Z_-1(h_i) in every b x b block: r products of a circulant and a skew-circulant.

    Z_1 W - W Z_-1 has rank at most r, the displacement rank (SURM, arXiv 2406.17740, section 3; Sindhwani, Sainath and
    Kumar, arXiv 1510.01722). r = 1 holds circulants and skew-circulants, r = 2 Toeplitz matrices and their inverses,
    r = b everything. A rectangle is a cropped grid of blocks, as for circulants. `dense` costs r b^2 per block.

    Args:
        rank: displacement rank r of each block, 1 <= r <= b.
        block: side b of the blocks, 1 <= b <= max(out, in); default min(out, in).
    """

    name = "displacement"

    def __init__(self, out_features: int, in_features: int, rank: int = 2, block: int | None = None) -> None:
        super().__init__(out_features, in_features)
        self.grid = Grid(out_features, in_features, block, self.name)
        self.block = self.grid.block
        self.rank = self._checked_rank(rank, self.block, "the side of its blocks")
        self.left, self.right = Circulant(self.block, self.block), SkewCirculant(self.block, self.block)

    @classmethod
    def ladder(cls, out_features: int, in_features: int) -> Iterator[dict[str, Any]]:
        return ({"rank": rank} for rank in range(1, min(out_features, in_features) + 1))

    @property
    def generators(self) -> dict[str, tuple[int, ...]]:
        shape = (self.grid.rows, self.grid.columns, self.block, self.rank)
        return {"G": shape, "H": shape}

    def init(self) -> Generators:
        shape = self.generators["G"]
        return {"G": torch.zeros(shape), "H": torch.randn(shape) / self.block**0.5}

    def dense(self, generators: Generators) -> Float[Tensor, "out in"]:
        # Z_1 W - W Z_-1 = 2 G reverse(H)^T says by how much W changes from an entry to the next down its diagonal.
        # Once round, the diagonal comes back with its sign turned, and that settles where it began.
        changes = _diagonals(2 * generators["G"] @ generators["H"].flip(-2).mT, offset=1)
        sums = changes.cumsum(-1)
        return self.grid.joined(_from_diagonals(changes - sums + sums[..., -1:] / 2, offset=0))

    def matvec(self, generators: Generators, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        if not x.numel():  # which transforms refuse
            return super().matvec(generators, x)
        G, H = generators["G"].mT, generators["H"].mT
        dtype = torch.promote_types(torch.promote_types(x.dtype, G.dtype), torch.float32)
        inputs = self.right.transform(self.grid.split(x.to(dtype)))[..., None, :, None, :]
        middle = self.right.inverse(self.right.transform(H.to(dtype)) * inputs)
        outputs = (self.left.transform(G.to(dtype)) * self.left.transform(middle)).sum((-3, -2))
        return self.left.inverse(outputs).flatten(-2)[..., : self.out_features].to(x.dtype)

    def pullback(self, generators: Generators, weight_grad: Float[Tensor, "out in"]) -> Generators:
        # The transpose of every step of `dense`, last step first.
        grads = _diagonals(self.grid.cut(weight_grad), offset=0)
        sums = grads.cumsum(-1)
        changes = 2 * _from_diagonals(sums - sums[..., -1:] / 2, offset=1)
        return {"G": changes @ generators["H"].flip(-2), "H": (changes.mT @ generators["G"]).flip(-2)}

    def project(self, matrix: Float[Tensor, "out in"]) -> Generators:
        """Exact where the displacement rank of the blocks is at most r; otherwise a local optimum, no further from
        the matrix than its best approximation of rank r / 2, which is a member too."""
        cropped = self.in_features % self.block or self.out_features % self.block
        starts = [self._truncated(matrix)]
        if not cropped and self.rank > 1:
            U, S, V = torch.linalg.svd(self.grid.cut(matrix), full_matrices=False)
            half = self.rank // 2
            low_rank = self.grid.joined(U[..., :half] * S[..., None, :half] @ V[..., :half, :])
            starts.append(self._truncated(low_rank))
        start = min(starts, key=lambda g: float((matrix - self.dense(g)).norm()))
        found = alternating_least_squares(self, start, matrix, "HG" if self.in_features % self.block else "GH")
        g, h = found["G"].norm(dim=-2, keepdim=True), found["H"].norm(dim=-2, keepdim=True)
        share = torch.where((g > 0) & (h > 0), (h / g).sqrt(), 1)
        return {"G": found["G"] * share, "H": found["H"] / share}

    def _truncated(self, matrix: Float[Tensor, "out in"]) -> Generators:
        """From the r largest singular values of the displacement of every block."""
        U, S, V = torch.linalg.svd(self._displacement(matrix), full_matrices=False)
        G, H = U[..., : self.rank], V.mT[..., : self.rank].flip(-2)
        half = S[..., None, : self.rank] / 2
        # Of a block with cropped columns G's space can be read off, with cropped rows H's: the other is solved for.
        return {"G": G, "H": H * half} if self.in_features % self.block else {"G": G * half, "H": H}

    def _displacement(self, matrix: Float[Tensor, "out in"]) -> Float[Tensor, "rows columns block block"]:
        """Z_1 M - M Z_-1 of every block, with 0 wherever a cropped entry enters."""
        blocks = self.grid.cut(matrix)
        known = self.grid.cut(torch.ones_like(matrix)) > 0
        following = torch.cat([blocks[..., 1:], -blocks[..., :1]], -1)
        both = known.roll(1, -2) & known.roll(-1, -1)
        return torch.where(both, blocks.roll(1, -2) - following, 0)


def _diagonals(blocks: Float[Tensor, "*grid b b"], offset: int) -> Float[Tensor, "*grid b b"]:
    """S[i, k] = M[(i + k + offset) mod b, k]: every wrapped diagonal becomes a row; a view of the doubled matrix."""
    b = blocks.shape[-1]
    doubled = torch.cat([blocks, blocks], -2)
    return doubled.as_strided(blocks.shape, (*doubled.stride()[:-2], b, b + 1), offset * b)


def _from_diagonals(rows: Float[Tensor, "*grid b b"], offset: int) -> Float[Tensor, "*grid b b"]:
    """The inverse of `_diagonals`, which is the same walk from right to left."""
    return _diagonals(rows.flip(-1), 1 - offset).flip(-1)
