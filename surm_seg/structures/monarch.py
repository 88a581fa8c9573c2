"""Monarch matrices: two block-diagonal factors with a shuffle between them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from surm_seg.errors import BadConfig
from surm_seg.structures.base import Generators, Structure
from surm_seg.structures.low_rank import thin_gradients

BLOCKS = 4
"""With as many features per block, the sparsest setting that leaves no entry of the matrix zero."""


class Monarch(Structure):
    """R_k maps run k of x to features k r .. k r + r - 1; L_l maps features l, l + N, ... to outputs l, l + N, ...

    N runs of ceil(in / N) inputs, N r features (MoRe, arXiv 2408.17383). Sizes that N does not divide are padded with
    zeros and cropped. Parameters: r N (ceil(in / N) + ceil(out / N)), and as many multiplications per token. The
    entries of one l and one k are a cell. Its rank is the number of features that both have: r / N, rounded up or down.
    So the matrix has rank min(N r, out, in), and min(1, r / N) of its entries are not zero. N = 1 is low rank.

    Args:
        blocks: N, 1 <= N <= min(out, in).
        rank: r, 1 <= r <= N min(ceil(in / N), ceil(out / N)); with the largest every matrix is a member.
    """

    name = "monarch"

    def __init__(self, out_features: int, in_features: int, blocks: int = BLOCKS, rank: int = 4) -> None:
        super().__init__(out_features, in_features)
        if not 1 <= blocks <= min(out_features, in_features):
            raise BadConfig(
                "structure-option",
                f"monarch blocks {blocks} is not in 1..min(out, in) of {out_features} x {in_features}.",
            )
        self.blocks = blocks
        self.inner, self.outer = -(-in_features // blocks), -(-out_features // blocks)
        self.largest_rank = blocks * min(self.inner, self.outer)
        usable = f"all that {blocks} blocks can use at {out_features} x {in_features}"
        self.rank = self._checked_rank(rank, self.largest_rank, usable)

    @classmethod
    def ladder(cls, out_features: int, in_features: int) -> Iterator[dict[str, Any]]:
        blocks = min(BLOCKS, out_features, in_features)
        largest = cls(out_features, in_features, blocks, rank=1).largest_rank
        return ({"blocks": blocks, "rank": rank} for rank in range(1, largest + 1))

    @property
    def generators(self) -> dict[str, tuple[int, ...]]:
        return {"R": (self.blocks, self.rank, self.inner), "L": (self.blocks, self.outer, self.rank)}

    @property
    def thin(self) -> bool:
        """Few features: `generator_grads` takes fewer operations by the whole factors than the weight gradient does."""
        features = self.blocks * self.rank
        return 2 * features * (self.in_features + self.out_features) <= self.in_features * self.out_features

    def init(self) -> Generators:
        shapes = self.generators
        return {"R": torch.randn(shapes["R"]) / self.inner**0.5, "L": torch.zeros(shapes["L"])}

    def dense(self, generators: Generators) -> Float[Tensor, "out in"]:
        by_output = generators["L"] @ self._spread(generators["R"])
        return by_output.transpose(0, 1).flatten(0, 1)[: self.out_features, : self.in_features]

    def matvec(self, generators: Generators, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        R, L = (generators[name].to(x.dtype) for name in "RL")
        features = self._shuffled(self._runs(x.reshape(-1, self.in_features)) @ R.mT)
        y = (features @ L.mT).permute(1, 2, 0).flatten(1)[:, : self.out_features]
        return y.reshape(*x.shape[:-1], self.out_features)

    def project(self, matrix: Float[Tensor, "out in"]) -> Generators:
        """The truncated singular value decomposition of each cell, at its own rank: the cells share no parameters."""
        cells = self._rows(matrix).unflatten(-1, (self.blocks, self.inner)).transpose(1, 2)
        U, S, V = torch.linalg.svd(cells, full_matrices=False)
        feature = torch.arange(self.blocks * self.rank, device=matrix.device)
        run = feature // self.rank
        # The features that a cell shares lie N apart, so that this is 0, 1, ... in each cell.
        place = feature % self.rank // self.blocks
        cell = feature % self.blocks, run
        root = S[*cell, place].sqrt()[:, None]
        R, L = root * V[*cell, place], root * U.mT[*cell, place]
        return {
            "R": R.unflatten(0, (self.blocks, self.rank)),
            "L": L.unflatten(0, (self.rank, self.blocks)).permute(1, 2, 0),
        }

    def pullback(self, generators: Generators, weight_grad: Float[Tensor, "out in"]) -> Generators:
        R, L = generators["R"], generators["L"]
        rows = self._rows(weight_grad)
        return {"R": self._gathered(L.mT @ rows), "L": rows @ self._spread(R).mT}

    def generator_grads(
        self,
        generators: Sequence[Generators],
        x: Float[Tensor, "tokens in"],
        grads_y: Sequence[Float[Tensor, "tokens out"]],
    ) -> list[Generators]:
        if not self.thin:
            return super().generator_grads(generators, x, grads_y)
        # With the zeros between the blocks written out, both factors are thin: more arithmetic, but the same reads of
        # x and grad_y, which is what takes the time.
        here = torch.eye(self.blocks, dtype=generators[0]["L"].dtype, device=x.device)[:, None, :, None]
        factors = []
        for g in generators:
            A = self._spread(g["R"]).flatten(0, 1)[:, : self.in_features]
            B = (g["L"][:, :, None] * here).transpose(0, 1).flatten(2).flatten(0, 1)[: self.out_features]
            factors.append((A, B))
        found = []
        for grad_A, grad_B in thin_gradients(factors, x, grads_y):
            by_run = self._padded(grad_A, self.inner).unflatten(0, (self.blocks, self.rank))
            by_output = self._padded(grad_B.mT, self.outer).unflatten(1, (self.outer, self.blocks))
            blocks = by_output.unflatten(0, (self.blocks, self.rank)).diagonal(dim1=0, dim2=3)
            found.append({"R": self._gathered(by_run), "L": blocks.permute(2, 1, 0)})
        return found

    def _padded(self, x: Float[Tensor, "tokens features"], length: int) -> Float[Tensor, "tokens padded"]:
        missing = self.blocks * length - x.shape[1]
        return torch.nn.functional.pad(x, (0, missing)) if missing else x

    def _runs(self, x: Float[Tensor, "tokens in"]) -> Float[Tensor, "run tokens inner"]:
        return self._padded(x, self.inner).unflatten(1, (self.blocks, self.inner)).transpose(0, 1)

    def _shuffled(self, features: Float[Tensor, "run tokens rank"]) -> Float[Tensor, "output tokens rank"]:
        """Feature f of each token at block f mod N, place f // N."""
        return features.transpose(0, 1).reshape(-1, self.rank, self.blocks).permute(2, 0, 1)

    def _spread(self, R: Float[Tensor, "run rank inner"]) -> Float[Tensor, "output rank padded"]:
        """The matrix from x to the shuffled features."""
        here = torch.eye(self.blocks, dtype=R.dtype, device=R.device)[:, None, :, None]
        return (R[:, :, None] * here).flatten(2).flatten(0, 1).unflatten(0, (self.rank, self.blocks)).transpose(0, 1)

    def _gathered(self, spread: Float[Tensor, "output rank padded"]) -> Float[Tensor, "run rank inner"]:
        """The transpose of `_spread`: its entries that are not zero everywhere."""
        runs = spread.transpose(0, 1).reshape(self.blocks, self.rank, self.blocks, self.inner)
        return runs.diagonal(dim1=0, dim2=2).permute(2, 0, 1)

    def _rows(self, matrix: Float[Tensor, "out in"]) -> Float[Tensor, "output outer padded"]:
        """The rows of each output block, padded with zeros."""
        below, right = self.blocks * self.outer - self.out_features, self.blocks * self.inner - self.in_features
        whole = torch.nn.functional.pad(matrix, (0, right, 0, below)) if below or right else matrix
        return whole.unflatten(0, (self.outer, self.blocks)).transpose(0, 1)
