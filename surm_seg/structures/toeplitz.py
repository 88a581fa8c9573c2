"""Toeplitz matrices: constant along every diagonal, rectangles included."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from surm_seg.errors import BadConfig
from surm_seg.structures.base import Generators, Structure
from surm_seg.structures.circulant import Circulant
from surm_seg.structures.diagonals import constant_along_diagonals, diagonal_sums
from surm_seg.structures.skew_circulant import SkewCirculant


class Toeplitz(Structure):
    """T[i, j] = t[i - j] with out + in - 1 values (SURM, arXiv 2406.17740, section 3); full rank in general.

    `column` is the first column from the top, `row` the first row without its corner, as in scipy.linalg.toeplitz.
    A Toeplitz matrix of side n = max(out, in) is the sum of a circulant and a skew-circulant one, so a product costs
    twice theirs.

    Args:
        symmetric: T[i, j] = t[|i - j|], with max(out, in) values in `t` instead.
        factored: the paper's form, the product of two symmetric Toeplitz matrices: 2 n values in `t` and `u`, square
            sizes only. Not a Toeplitz matrix, and `project` does not exist for it.
    """

    name = "toeplitz"
    by_fft = True

    def __init__(self, out_features: int, in_features: int, symmetric: bool = False, factored: bool = False) -> None:
        super().__init__(out_features, in_features)
        if factored and out_features != in_features:
            raise BadConfig(
                "structure-option",
                f"toeplitz factored=True is for square matrices, not {out_features} x {in_features}.",
            )
        self.symmetric = symmetric
        self.factor = Toeplitz(out_features, in_features, symmetric=True) if factored else None
        self.side = max(out_features, in_features)
        self.circulant, self.skew = Circulant(self.side, self.side), SkewCirculant(self.side, self.side)

    @classmethod
    def ladder(cls, out_features: int, in_features: int) -> Iterator[dict[str, Any]]:
        yield {"symmetric": True}
        yield {}

    @property
    def generators(self) -> dict[str, tuple[int, ...]]:
        if self.factor:
            return {"t": (self.side,), "u": (self.side,)}
        if self.symmetric:
            return {"t": (self.side,)}
        return {"column": (self.out_features,), "row": (self.in_features - 1,)}

    def init(self) -> Generators:
        start = {name: torch.zeros(shape) for name, shape in self.generators.items()}
        return start | {"u": torch.randn(self.side) / self.side**0.5} if self.factor else start

    def dense(self, generators: Generators) -> Float[Tensor, "out in"]:
        if self.factor:
            return self.factor.dense({"t": generators["t"]}) @ self.factor.dense({"t": generators["u"]})
        return constant_along_diagonals(self._values(generators), self.out_features, self.in_features)

    def matvec(self, generators: Generators, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        if self.factor:
            return self.factor.matvec({"t": generators["t"]}, self.factor.matvec({"t": generators["u"]}, x))
        values = self._values(generators)
        lower = _padded(values[self.in_features - 1 :], self.side)
        upper = _padded(values[: self.in_features - 1].flip(0), self.side - 1).flip(0)
        wrapped = torch.cat([upper.new_zeros(1), upper])
        x = _padded(x, self.side)
        around = self.circulant.matvec({"c": (lower + wrapped)[None, None] / 2}, x)
        turned = self.skew.matvec({"c": (lower - wrapped)[None, None] / 2}, x)
        return (around + turned)[..., : self.out_features]

    def project(self, matrix: Float[Tensor, "out in"]) -> Generators:
        """Means along the diagonals; raises BadConfig for the factored form, which has no closed projection."""
        if self.factor:
            raise BadConfig("structure-project", "toeplitz factored=True has no projection; use the plain form.")
        sums = self._adjoint(diagonal_sums(matrix))
        counts = self._adjoint(diagonal_sums(torch.ones_like(matrix)))
        return {name: value / counts[name] for name, value in sums.items()}

    def pullback(self, generators: Generators, weight_grad: Float[Tensor, "out in"]) -> Generators:
        return super().pullback(generators, weight_grad) if self.factor else self._adjoint(diagonal_sums(weight_grad))

    def generator_grads(
        self,
        generators: Sequence[Generators],
        x: Float[Tensor, "tokens in"],
        grads_y: Sequence[Float[Tensor, "tokens out"]],
    ) -> list[Generators]:
        if self.factor:
            return super().generator_grads(generators, x, grads_y)
        dtype = next(iter(generators[0].values())).dtype
        c = [{"c": x.new_empty(1, 1, self.side, dtype=dtype)}] * len(generators)
        inputs, outputs = _padded(x, self.side), [_padded(grad_y, self.side) for grad_y in grads_y]
        around = self.circulant.generator_grads(c, inputs, outputs)
        turned = self.skew.generator_grads(c, inputs, outputs)
        return [self._from_cyclic(a["c"][0, 0], t["c"][0, 0]) for a, t in zip(around, turned, strict=True)]

    def _from_cyclic(self, around: Float[Tensor, " side"], turned: Float[Tensor, " side"]) -> Generators:
        """Sums along the diagonals, from those of a circulant (lower + upper) and a skew-circulant (lower - upper)."""
        lower, upper = (around + turned) / 2, (around - turned) / 2
        return self._adjoint(torch.cat([upper[self.side - self.in_features + 1 :], lower[: self.out_features]]))

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
        t = sums.new_zeros(self.side)
        t[: self.out_features] += lower
        t[1 : self.in_features] += upper
        return {"t": t}


def _padded(x: Float[Tensor, "*batch features"], size: int) -> Float[Tensor, "*batch size"]:
    return torch.nn.functional.pad(x, (0, size - x.shape[-1])) if x.shape[-1] < size else x
