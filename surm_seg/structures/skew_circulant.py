"""Skew-circulant matrices: circulant with the entries above the diagonal negated."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from surm_seg.structures.circulant import Circulant


class SkewCirculant(Circulant):
    """S[i, j] = c[i - j] for i >= j and -c[i - j + b] above the diagonal; blocks, counts and costs as for circulant.

    exp(i pi k / b) twists it into a circulant matrix (Davis, Circulant Matrices, 1979, section 3.2.1), so products use
    complex transforms of length b.
    """

    name = "skew_circulant"
    above = -1

    def _transform(self, x: Float[Tensor, "*batch block"]) -> Tensor:
        return torch.fft.fft(x * self._twist(x.dtype, x.device))

    def _inverse(self, spectrum: Tensor) -> Float[Tensor, "*batch block"]:
        y = torch.fft.ifft(spectrum)
        return (y * self._twist(y.real.dtype, y.device).conj()).real

    def _twist(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """exp(i pi k / b), from a float64 table whatever the precision of the product."""
        angle = torch.arange(self.block, dtype=torch.float64, device=device) * (torch.pi / self.block)
        table = torch.polar(torch.ones_like(angle), angle)
        return table.to(torch.complex128 if dtype == torch.float64 else torch.complex64)
