"""Skew-circulant matrices: circulant with the entries above the diagonal negated."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from surm_seg.structures.circulant import Circulant


class SkewCirculant(Circulant):
    """S[i, j] = c[i - j] for i >= j and -c[i - j + b] above the diagonal; blocks, counts and costs as for circulant.

    Multiplication of polynomials modulo z^b + 1, which exp(i pi k / b) twists into a cyclic one (Davis, Circulant
    Matrices, 1979, section 3.2.1). For even b, z^b + 1 = (z^(b/2) - i)(z^(b/2) + i) and the second factor holds only
    the conjugate of the first: one complex transform of length b / 2 carries all of a real vector.
    """

    name = "skew_circulant"
    above = -1

    def transform(self, x: Float[Tensor, "*batch block"]) -> Tensor:
        twist = _twist(self.block, x.dtype, x.device)
        if self.block % 2:
            return torch.fft.fft(x * twist)
        low, high = x.chunk(2, -1)
        return torch.fft.fft(torch.complex(low, high) * twist)

    def inverse(self, spectrum: Tensor) -> Float[Tensor, "*batch block"]:
        y = torch.fft.ifft(spectrum)
        y = y * _twist(self.block, y.real.dtype, y.device).conj()
        return y.real if self.block % 2 else torch.cat([y.real, y.imag], -1)


def _twist(block: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """exp(i pi k / b) for the entries that are transformed, from a float64 table whatever the product's precision."""
    count = block if block % 2 else block // 2
    angle = torch.arange(count, dtype=torch.float64, device=device) * (torch.pi / block)
    table = torch.polar(torch.ones_like(angle), angle)
    return table.to(torch.complex128 if dtype == torch.float64 else torch.complex64)
