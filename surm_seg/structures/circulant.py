"""Circulant matrices and grids of circulant blocks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from surm_seg.errors import BadConfig
from surm_seg.structures.base import Generators, Structure
from surm_seg.structures.diagonals import constant_along_diagonals, diagonal_sums

TOKENS_PER_CHUNK = 256
"""Tokens whose spectra are alive at once in `generator_grad`; keeps them in the processor's cache (measured)."""


class Circulant(Structure):
    """C[i, j] = c[(i - j) mod b] in every b x b block; c is the first column (SURM, arXiv 2406.17740, section 3).

    A rectangle is a grid of ceil(out / b) x ceil(in / b) blocks whose last row and column are cropped. Parameters:
    one per block and diagonal. Products cost O(b log b) per block and token by FFT.

    Args:
        block: side b of the blocks, 1 <= b <= max(out, in); default min(out, in).
    """

    name = "circulant"
    above = 1
    """Factor of the entries above the diagonal of a block."""

    def __init__(self, out_features: int, in_features: int, block: int | None = None) -> None:
        super().__init__(out_features, in_features)
        self.block = min(out_features, in_features) if block is None else block
        if not 1 <= self.block <= max(out_features, in_features):
            raise BadConfig(
                "structure-option", f"{self.name} block {block} does not fit a {out_features} x {in_features} matrix."
            )
        self.rows = -(-out_features // self.block)
        self.columns = -(-in_features // self.block)

    @classmethod
    def ladder(cls, out_features: int, in_features: int) -> Iterator[dict[str, Any]]:
        largest = min(out_features, in_features)
        return ({"block": b} for b in range(largest, 0, -1) if largest % b == 0)

    @property
    def generators(self) -> dict[str, tuple[int, ...]]:
        return {"c": (self.rows, self.columns, self.block)}

    def init(self) -> Generators:
        return {"c": torch.zeros(self.generators["c"])}

    def dense(self, generators: Generators) -> Float[Tensor, "out in"]:
        c = generators["c"]
        blocks = constant_along_diagonals(torch.cat([self.above * c[..., 1:], c], -1), self.block, self.block)
        grid = blocks.transpose(1, 2).reshape(self.rows * self.block, self.columns * self.block)
        return grid[: self.out_features, : self.in_features]

    def matvec(self, generators: Generators, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        c = generators["c"]
        dtype = torch.promote_types(torch.promote_types(x.dtype, c.dtype), torch.float32)  # torch.fft has no bfloat16
        product = torch.einsum(
            "pqf,...qf->...pf", self._transform(c.to(dtype)), self._spectrum(x.to(dtype), self.columns)
        )
        return self._inverse(product).flatten(-2)[..., : self.out_features].to(x.dtype)

    def project(self, matrix: Float[Tensor, "out in"]) -> Generators:
        counts = self._block_sums(torch.ones_like(matrix), 1).clamp(min=1)
        return {"c": self._block_sums(matrix, self.above) / counts}

    def pullback(self, generators: Generators, weight_grad: Float[Tensor, "out in"]) -> Generators:
        return {"c": self._block_sums(weight_grad, self.above)}

    def generator_grad(
        self, generators: Generators, x: Float[Tensor, "tokens in"], grad_y: Float[Tensor, "tokens out"]
    ) -> Generators:
        if not x.shape[0]:
            return {"c": torch.zeros_like(generators["c"])}
        dtype = generators["c"].dtype
        total = torch.zeros((), dtype=dtype, device=x.device)
        for chunk, grad in zip(x.split(TOKENS_PER_CHUNK), grad_y.split(TOKENS_PER_CHUNK), strict=True):
            inputs = self._spectrum(chunk.to(dtype), self.columns).conj()
            outputs = self._spectrum(grad.to(dtype), self.rows)
            total = total + torch.einsum("tpf,tqf->pqf", outputs, inputs)
        return {"c": self._inverse(total)}

    def _transform(self, x: Float[Tensor, "*batch block"]) -> Tensor:
        """The basis in which every block is diagonal."""
        return torch.fft.rfft(x)

    def _inverse(self, spectrum: Tensor) -> Float[Tensor, "*batch block"]:
        return torch.fft.irfft(spectrum, n=self.block)

    def _spectrum(self, x: Float[Tensor, "*batch features"], blocks: int) -> Tensor:
        """(..., features) -> (..., blocks, frequencies), zero-padded to whole blocks."""
        missing = blocks * self.block - x.shape[-1]
        padded = torch.nn.functional.pad(x, (0, missing)) if missing else x
        return self._transform(padded.unflatten(-1, (blocks, self.block)))

    def _block_sums(self, matrix: Float[Tensor, "out in"], above: int) -> Float[Tensor, "rows columns block"]:
        """Sum of each block over its wrapped diagonals, in the order of c; cropped entries count as 0."""
        p, q, b = self.rows, self.columns, self.block
        padded = torch.nn.functional.pad(matrix, (0, q * b - self.in_features, 0, p * b - self.out_features))
        sums = diagonal_sums(padded.reshape(p, b, q, b).transpose(1, 2))
        total = sums[..., b - 1 :].clone()
        total[..., 1:] += above * sums[..., : b - 1]
        return total
