"""Circulant matrices and grids of circulant blocks."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from surm_seg.structures.base import Generators, Structure, chunks
from surm_seg.structures.diagonals import constant_along_diagonals, diagonal_sums
from surm_seg.structures.grid import Grid


class Circulant(Structure):
    """C[i, j] = c[(i - j) mod b] in every b x b block; c is the first column (SURM, arXiv 2406.17740, section 3).

    A rectangle is a grid of ceil(out / b) x ceil(in / b) blocks whose last row and column are cropped. Parameters:
    one per block and diagonal. Products cost O(b log b) per block and token by FFT.

    Args:
        block: side b of the blocks, 1 <= b <= max(out, in); default min(out, in).
        factored: the paper's form c = c * r with a second trained vector r: twice the parameters for the same matrices.
    """

    name = "circulant"
    by_fft = True
    above = 1
    """Factor of the entries above the diagonal of a block."""

    def __init__(self, out_features: int, in_features: int, block: int | None = None, factored: bool = False) -> None:
        super().__init__(out_features, in_features)
        self.grid = Grid(out_features, in_features, block, self.name)
        self.block = self.grid.block
        self.factored = factored

    @classmethod
    def ladder(cls, out_features: int, in_features: int) -> Iterator[dict[str, Any]]:
        largest = min(out_features, in_features)
        return ({"block": b} for b in range(largest, 0, -1) if largest % b == 0)

    @property
    def generators(self) -> dict[str, tuple[int, ...]]:
        shape = (self.grid.rows, self.grid.columns, self.block)
        return {"c": shape, "r": shape} if self.factored else {"c": shape}

    def init(self) -> Generators:
        return {
            name: torch.zeros(shape) if name == "c" else torch.randn(shape) for name, shape in self.generators.items()
        }

    def dense(self, generators: Generators) -> Float[Tensor, "out in"]:
        c = self._column(generators)
        return self.grid.joined(
            constant_along_diagonals(torch.cat([self.above * c[..., 1:], c], -1), self.block, self.block)
        )

    def matvec(self, generators: Generators, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        if not x.numel():  # which transforms refuse
            return super().matvec(generators, x)
        c = self._column(generators)
        dtype = _computed_in(x.dtype, c.dtype)
        spectrum = self.transform(self.grid.split(x.to(dtype)))
        product = torch.einsum("pqf,...qf->...pf", self.transform(c.to(dtype)), spectrum)
        return self.inverse(product).flatten(-2)[..., : self.out_features].to(x.dtype)

    def project(self, matrix: Float[Tensor, "out in"]) -> Generators:
        counts = self._diagonal_sums(torch.ones_like(matrix), 1).clamp(min=1)
        c = self._diagonal_sums(matrix, self.above) / counts
        return {"c": c, "r": torch.ones_like(c)} if self.factored else {"c": c}

    def pullback(self, generators: Generators, weight_grad: Float[Tensor, "out in"]) -> Generators:
        return self._chained(generators, self._diagonal_sums(weight_grad, self.above))

    def generator_grads(
        self,
        generators: Sequence[Generators],
        x: Float[Tensor, "tokens in"],
        grads_y: Sequence[Float[Tensor, "tokens out"]],
    ) -> list[Generators]:
        totals: list[Tensor | None] = [None] * len(generators)
        dtype = _computed_in(generators[0]["c"].dtype)
        for x_chunk, grad_chunks in chunks(x, grads_y):
            inputs = self.transform(self.grid.split(x_chunk.to(dtype))).conj_physical_()
            for i, grad in enumerate(grad_chunks):
                total = _correlated(self.transform(self.grid.split(grad.to(dtype))), inputs)
                so_far = totals[i]
                totals[i] = total if so_far is None else so_far.add_(total)
        return [
            self._chained(g, torch.zeros_like(g["c"]) if total is None else self.inverse(total).to(g["c"].dtype))
            for g, total in zip(generators, totals, strict=True)
        ]

    def transform(self, x: Float[Tensor, "*batch block"]) -> Tensor:
        """The basis in which every block is diagonal."""
        return torch.fft.rfft(x)

    def inverse(self, spectrum: Tensor) -> Float[Tensor, "*batch block"]:
        return torch.fft.irfft(spectrum, n=self.block)

    def _column(self, generators: Generators) -> Float[Tensor, "rows columns block"]:
        return generators["c"] * generators["r"] if self.factored else generators["c"]

    def _chained(self, generators: Generators, grad: Float[Tensor, "rows columns block"]) -> Generators:
        """Gradient of the first columns -> gradient of the generators."""
        return {"c": grad * generators["r"], "r": grad * generators["c"]} if self.factored else {"c": grad}

    def _diagonal_sums(self, matrix: Float[Tensor, "out in"], above: int) -> Float[Tensor, "rows columns block"]:
        """Sum of each block over its wrapped diagonals, in the order of c; cropped entries count as 0."""
        sums = diagonal_sums(self.grid.cut(matrix))
        total = sums[..., self.block - 1 :].clone()
        total[..., 1:] += above * sums[..., : self.block - 1]
        return total


def _computed_in(*dtypes: torch.dtype) -> torch.dtype:
    """The precision of transforms: float32 at least, since torch.fft has no bfloat16."""
    return functools.reduce(torch.promote_types, dtypes, torch.float32)


def _correlated(outputs: Tensor, inputs: Tensor) -> Tensor:
    """(tokens, p, f), (tokens, q, f) -> (p, q, f), summed over tokens; overwrites `outputs` where p = q = 1."""
    if outputs.shape[1] == inputs.shape[1] == 1:  # elementwise is several times faster than einsum's batched products
        return outputs.mul_(inputs).sum(0, keepdim=True)
    return torch.einsum("tpf,tqf->pqf", outputs, inputs)
