"""Sums of Kronecker products."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from surm_seg.errors import BadConfig
from surm_seg.structures.base import Generators, Structure, chunks
from surm_seg.structures.refine import alternating_least_squares


class Kronecker(Structure):
    """sum_k A_k (x) B_k with A_k (a, b), B_k (c, d), a c = out and b d = in (SURM, arXiv 2406.17740; torch.kron).

    Parameters: rank * (ab + cd). Entry (i c + p, j d + q) of a product is A[i, j] B[p, q], its rank that of A times
    that of B. Products with x cost rank * bc * (a + d) per token; the matrix is not built for them.

    Args:
        rank: number of terms, 1 <= rank <= min(ab, cd); with the largest every matrix is a member.
        factors: (a, b), divisors of out and in. Default: the fewest parameters; among equals the largest rank that a
            product can have, min(a, b) * min(c, d); then the largest a. A prime size has no useful divisors: by default
            it is rounded up to the next n whose n x n product can have half the prime's rank, and the matrix cropped.
    """

    name = "kronecker"

    def __init__(
        self, out_features: int, in_features: int, rank: int = 1, factors: Sequence[int] | None = None
    ) -> None:
        super().__init__(out_features, in_features)
        if factors is None:
            self.rows, self.columns = _rounded_up(out_features), _rounded_up(in_features)
            factors = _best_factors(self.rows, self.columns)
        else:
            self.rows, self.columns = out_features, in_features
            pair = isinstance(factors, Sequence) and len(factors) == 2 and all(isinstance(f, int) for f in factors)
            if not pair or min(factors) < 1 or self.rows % factors[0] or self.columns % factors[1]:
                raise BadConfig(
                    "structure-option",
                    f"kronecker factors {list(factors) if pair else factors} are not a divisor of {out_features} and "
                    f"one of {in_features}.",
                )
        self.a, self.b = factors
        self.c, self.d = self.rows // self.a, self.columns // self.b
        self.largest_rank = min(self.a * self.b, self.c * self.d)
        entries = f"the entries of the smaller of the factors {self.a} x {self.b} and {self.c} x {self.d}"
        self.rank = self._checked_rank(rank, self.largest_rank, entries)

    @classmethod
    def ladder(cls, out_features: int, in_features: int) -> Iterator[dict[str, Any]]:
        return ({"rank": rank} for rank in range(1, cls(out_features, in_features).largest_rank + 1))

    @property
    def generators(self) -> dict[str, tuple[int, ...]]:
        return {"A": (self.rank, self.a, self.b), "B": (self.rank, self.c, self.d)}

    def init(self) -> Generators:
        """B is 0. A has variance 1 / b, its fan-in: B's gradient is grad_y times A_k x, which then varies as x does."""
        shapes = self.generators
        return {"A": torch.randn(shapes["A"]) / self.b**0.5, "B": torch.zeros(shapes["B"])}

    def dense(self, generators: Generators) -> Float[Tensor, "out in"]:
        whole = torch.einsum("kab,kcd->acbd", generators["A"], generators["B"]).flatten(2).flatten(0, 1)
        return whole[: self.out_features, : self.in_features]

    def matvec(self, generators: Generators, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        A, B = (generators[name].to(x.dtype) for name in "AB")
        # All terms at once: (*batch, b, rank, c), and then a sum over b and rank.
        inner = (self._split(x, self.b, self.d) @ B.flatten(0, 1).mT).unflatten(-1, (self.rank, self.c))
        y = A.permute(1, 2, 0).flatten(1) @ inner.flatten(-3, -2)
        return y.flatten(-2)[..., : self.out_features]

    def project(self, matrix: Float[Tensor, "out in"]) -> Generators:
        """Exact, except where a prime size is cropped: there, members are found, and else a local optimum."""
        rearranged = self._rearranged(matrix)
        start = self._truncated(rearranged)
        if (self.rows, self.columns) == (self.out_features, self.in_features):
            return start
        # A member's factor B can be read off the rows that are known whole.
        whole = self._rearranged(torch.ones_like(matrix)).bool().all(1, keepdim=True)
        fits = [
            alternating_least_squares(self, generators, matrix, "AB")
            for generators in (start, self._truncated(rearranged * whole))
        ]
        return min(fits, key=lambda fit: float((matrix - self.dense(fit)).norm()))

    def _truncated(self, rearranged: Float[Tensor, "ab cd"]) -> Generators:
        U, S, V = torch.linalg.svd(rearranged, full_matrices=False)
        root = S[: self.rank, None].sqrt()
        A, B = root * U[:, : self.rank].mT, root * V[: self.rank]
        return {"A": A.unflatten(1, (self.a, self.b)), "B": B.unflatten(1, (self.c, self.d))}

    def pullback(self, generators: Generators, weight_grad: Float[Tensor, "out in"]) -> Generators:
        A, B = (generators[name].flatten(1) for name in "AB")
        rearranged = self._rearranged(weight_grad)
        grads = {"A": B @ rearranged.mT, "B": A @ rearranged}
        return {name: grad.view_as(generators[name]) for name, grad in grads.items()}

    def generator_grads(
        self,
        generators: Sequence[Generators],
        x: Float[Tensor, "tokens in"],
        grads_y: Sequence[Float[Tensor, "tokens out"]],
    ) -> list[Generators]:
        if 2 * self.rank * self.b * self.c * (self.a + self.d) > self.out_features * self.in_features:
            return super().generator_grads(generators, x, grads_y)
        totals = [{name: torch.zeros_like(value) for name, value in g.items()} for g in generators]
        for x_chunk, grad_chunks in chunks(x, grads_y):
            # With the outer index first every product is one of plain matrices.
            inputs = self._split(x_chunk, self.b, self.d).transpose(0, 1).flatten(0, 1)
            for g, total, grad in zip(generators, totals, grad_chunks, strict=True):
                outputs = self._split(grad, self.a, self.c).transpose(0, 1).reshape(self.a, -1)
                for k in range(self.rank):
                    A, B = g["A"][k].to(x.dtype), g["B"][k].to(x.dtype)
                    total["A"][k] += outputs @ (inputs @ B.mT).view(self.b, -1).mT
                    total["B"][k] += (A.mT @ outputs).view(-1, self.c).mT @ inputs
        return totals

    def _split(self, x: Float[Tensor, "*batch features"], outer: int, inner: int) -> Tensor:
        """(*batch, outer, inner), padded with zeros where a prime size was rounded up."""
        missing = outer * inner - x.shape[-1]
        return (torch.nn.functional.pad(x, (0, missing)) if missing else x).unflatten(-1, (outer, inner))

    def _rearranged(self, matrix: Float[Tensor, "out in"]) -> Float[Tensor, "ab cd"]:
        """A (x) B becomes the outer product of their entries (Van Loan and Pitsianis, 1993); 0 where it is cropped."""
        below, right = self.rows - self.out_features, self.columns - self.in_features
        whole = torch.nn.functional.pad(matrix, (0, right, 0, below)) if below or right else matrix
        return (
            whole.unflatten(1, (self.b, self.d)).unflatten(0, (self.a, self.c)).transpose(1, 2).flatten(2).flatten(0, 1)
        )


def _best_factors(rows: int, columns: int) -> tuple[int, int]:
    """The default (a, b)."""

    def rule(factors: tuple[int, int]) -> tuple[int, ...]:
        a, b = factors
        return a * b + (rows // a) * (columns // b), -_rank_of_product(rows, columns, a, b), -a, b

    return min(((a, b) for a in _divisors(rows) for b in _divisors(columns)), key=rule)


def _rank_of_product(rows: int, columns: int, a: int, b: int) -> int:
    """The largest that A (x) B can have."""
    return min(a, b) * min(rows // a, columns // b)


def _rounded_up(size: int) -> int:
    """Itself unless prime."""
    if size == 1 or len(_divisors(size)) > 2:
        return size
    rounded = size
    while 2 * _rank_of_product(rounded, rounded, *_best_factors(rounded, rounded)) < size:
        rounded += 1
    return rounded


def _divisors(size: int) -> list[int]:
    return [divisor for divisor in range(1, size + 1) if size % divisor == 0]
