"""Toeplitz matrices: constant along every diagonal, rectangles included."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from surm_seg.structures.base import Generators, Structure
from surm_seg.structures.diagonals import constant_along_diagonals, diagonal_sums

TOKENS_PER_CHUNK = 256
"""Tokens whose spectra are alive at once in `generator_grad`."""


class Toeplitz(Structure):
    """T[i, j] = t[i - j] with out + in - 1 values (SURM, arXiv 2406.17740, section 3); full rank in general.

    `column` is the first column from the top, `row` the first row without its corner, as in scipy.linalg.toeplitz.
    Products cost O(n log n) per token by FFT.

    Args:
        symmetric: T[i, j] = t[|i - j|], with max(out, in) values in `t` instead.
    """

    name = "toeplitz"

    def __init__(self, out_features: int, in_features: int, symmetric: bool = False) -> None:
        super().__init__(out_features, in_features)
        self.symmetric = symmetric

    @classmethod
    def ladder(cls, out_features: int, in_features: int) -> Iterator[dict[str, Any]]:
        yield {"symmetric": True}
        yield {}

    @property
    def generators(self) -> dict[str, tuple[int, ...]]:
        if self.symmetric:
            return {"t": (max(self.out_features, self.in_features),)}
        return {"column": (self.out_features,), "row": (self.in_features - 1,)}

    def init(self) -> Generators:
        return {name: torch.zeros(shape) for name, shape in self.generators.items()}

    def dense(self, generators: Generators) -> Float[Tensor, "out in"]:
        return constant_along_diagonals(self._values(generators), self.out_features, self.in_features)

    def matvec(self, generators: Generators, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        values = self._values(generators)
        dtype = torch.promote_types(torch.promote_types(x.dtype, values.dtype), torch.float32)
        spectrum = torch.fft.rfft(values.to(dtype), n=self._length) * torch.fft.rfft(x.to(dtype), n=self._length)
        y = torch.fft.irfft(spectrum, n=self._length)
        return y[..., self.in_features - 1 : self.in_features - 1 + self.out_features].to(x.dtype)

    def project(self, matrix: Float[Tensor, "out in"]) -> Generators:
        sums = self._adjoint(diagonal_sums(matrix))
        counts = self._adjoint(diagonal_sums(torch.ones_like(matrix)))
        return {name: value / counts[name] for name, value in sums.items()}

    def pullback(self, generators: Generators, weight_grad: Float[Tensor, "out in"]) -> Generators:
        return self._adjoint(diagonal_sums(weight_grad))

    def generator_grad(
        self, generators: Generators, x: Float[Tensor, "tokens in"], grad_y: Float[Tensor, "tokens out"]
    ) -> Generators:
        dtype = next(iter(generators.values())).dtype
        total = torch.zeros(self._length // 2 + 1, dtype=torch.promote_types(dtype, torch.complex64), device=x.device)
        for chunk, grad in zip(x.split(TOKENS_PER_CHUNK), grad_y.split(TOKENS_PER_CHUNK), strict=True):
            if chunk.shape[0]:
                # Diagonal i - j collects grad_y[i] x[j]: a correlation, that is a convolution with x reversed.
                inputs = torch.fft.rfft(chunk.to(dtype).flip(-1), n=self._length)
                total = total + (torch.fft.rfft(grad.to(dtype), n=self._length) * inputs).sum(0)
        return self._adjoint(torch.fft.irfft(total, n=self._length))

    @property
    def _length(self) -> int:
        """Of the transforms: one per diagonal; what wraps around lands outside the values that are read."""
        return self.out_features + self.in_features - 1

    def _values(self, generators: Generators) -> Float[Tensor, " diagonals"]:
        """One value per diagonal, from the upper right corner to the lower left one."""
        if self.symmetric:
            t = generators["t"]
            return torch.cat([t[1 : self.in_features].flip(0), t[: self.out_features]])
        return torch.cat([generators["row"].flip(0), generators["column"]])

    def _adjoint(self, sums: Float[Tensor, " diagonals"]) -> Generators:
        """The transpose of `_values`."""
        upper, lower = sums[: self.in_features - 1].flip(0), sums[self.in_features - 1 :]
        if not self.symmetric:
            return {"column": lower, "row": upper}
        t = sums.new_zeros(max(self.out_features, self.in_features))
        t[: self.out_features] += lower
        t[1 : self.in_features] += upper
        return {"t": t}
