"""What `bench kernel` measures on, and the arithmetic that its variants cannot do without."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from surm_seg.kernel import GradMethod
from surm_seg.structures import Structure

Layout = Literal["fused", "square"]
Precision = Literal["float32", "bfloat16"]

OFT_BLOCK = 32


@dataclass(frozen=True)
class Cell:
    """A layer, and the tokens that go through it."""

    layout: Layout
    width: int
    tokens: int
    dtype: Precision

    @property
    def out_features(self) -> int:
        return 3 * self.width if self.layout == "fused" else self.width

    @property
    def spans(self) -> list[tuple[int, int]]:
        """Rows [start, stop) of the weight that get a delta: q and v of a fused projection, or all."""
        return [(0, self.width), (2 * self.width, 3 * self.width)] if self.layout == "fused" else [(0, self.width)]

    @property
    def frozen_flops(self) -> float:
        """Per token: one product forward and one back, two operations per entry of the weight."""
        return 4 * self.width * self.out_features

    def __str__(self) -> str:
        return f"{self.layout} {self.width} -> {self.out_features}, {self.tokens} tokens, {self.dtype}"


# Arithmetic per token, in operations (a multiply-add is two). What is done once per step, such as building W + delta,
# is left out: it vanishes against many tokens. n = in, m = out, r = rank, a real FFT of length b is 2.5 b log2 b.


def real_fft(length: int) -> float:
    return 2.5 * length * math.log2(length)


def structure_flops(structure: Structure, parts: int, grad: GradMethod) -> float | None:
    """Of the gradients of `parts` equal structures that read the same x; nothing is added to the products with x."""
    n, m, shapes = structure.in_features, structure.out_features, structure.generators
    if grad == "gemm" or type(structure).generator_grads is Structure.generator_grads:
        return parts * 2 * m * n  # the slices' weight gradient
    match structure.name:
        case "circulant" | "skew_circulant":
            # Spectra of q blocks of x and p blocks of grad_y; p q complex multiply-adds per frequency. A skew-circulant
            # block of even side takes complex transforms of half the length, which is the same.
            p, q, b = shapes["c"]
            return (q + parts * p) * real_fft(b) + parts * 8 * p * q * (b // 2 + 1)
        case "toeplitz":  # as a circulant plus a skew-circulant matrix of side b
            b = max(n, m)
            return 2 * ((1 + parts) * real_fft(b) + parts * 8 * (b // 2 + 1))
        case "low_rank":  # per value: once for the features or back, once for its gradient
            return parts * 4 * structure.parameters
        case "monarch":  # the same with the zeros between the blocks written out, where that is cheaper
            blocks, rank, _ = shapes["R"]
            return parts * min(4 * blocks * rank * (n + m), 2 * m * n)
        case "kronecker":  # both halves of the product, once forward and once back
            (rank, a, b), (_, c, d) = shapes["A"], shapes["B"]
            return parts * 4 * rank * b * c * (a + d)
    return None


def spectral_flops(cell: Cell, shared: bool) -> float:
    """Circulant branches by FFT and autograd: x and grad_y there, y and grad_x back; three products of spectra."""
    parts, b = len(cell.spans), cell.width
    transforms = 2 * parts + (2 if shared else 2 * parts)
    return transforms * real_fft(b) + parts * 3 * 8 * (b // 2 + 1)


def lora_flops(rank: int, n: int, m: int) -> float:
    """Both factors forward, back, and for their own gradients."""
    return 3 * 2 * rank * (n + m)


def c3a_flops(cell: Cell) -> float:
    """Complex transforms of x twice, grad_x, y and grad_y; three complex products per pair of blocks and frequency."""
    b, p = cell.width, cell.out_features // cell.width
    return (3 + 2 * p) * 2 * real_fft(b) + 3 * 8 * p * b


def weight_gradient_flops(cell: Cell) -> float:
    """Of the whole layer: what autograd makes for a dense delta."""
    return 2 * cell.width * cell.out_features


def second_product_flops(cell: Cell) -> float:
    """A dense delta beside the weight: a product forward, one back, and its gradient."""
    return 6 * cell.width * cell.out_features


def oft_flops(cell: Cell) -> float:
    """Every block of x rotated forward and back, and the rotation's gradient."""
    return 6 * cell.width * OFT_BLOCK
