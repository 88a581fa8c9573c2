"""Low-rank matrices: LoRA, on the same contract and kernel as every other structure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from surm_seg.errors import BadConfig
from surm_seg.structures.base import Generators, Structure, chunks


class LowRank(Structure):
    """(alpha / rank) B A, with A (rank, in) and B (out, rank) (LoRA, arXiv 2106.09685; rsLoRA, arXiv 2312.03732).

    Args:
        rank: 1 <= rank <= min(out, in).
        alpha: default `rank`, which makes the factor 1.
        rslora: divide alpha by sqrt(rank) instead of rank.
    """

    name = "low_rank"

    def __init__(
        self, out_features: int, in_features: int, rank: int = 8, alpha: int | float | None = None, rslora: bool = False
    ) -> None:
        super().__init__(out_features, in_features)
        if not 1 <= rank <= min(out_features, in_features):
            raise BadConfig(
                "structure-option", f"low_rank rank {rank} is not in 1..min(out, in) of {out_features} x {in_features}."
            )
        self.rank = rank
        self.factor = (rank if alpha is None else alpha) / (rank**0.5 if rslora else rank)
        if self.factor == 0:
            raise BadConfig("structure-option", "low_rank alpha 0 would switch the delta off for ever.")

    @classmethod
    def ladder(cls, out_features: int, in_features: int) -> Iterator[dict[str, Any]]:
        return ({"rank": rank} for rank in range(1, min(out_features, in_features) + 1))

    @property
    def generators(self) -> dict[str, tuple[int, ...]]:
        return {"A": (self.rank, self.in_features), "B": (self.out_features, self.rank)}

    def init(self) -> Generators:
        A = torch.randn(self.rank, self.in_features) / self.in_features**0.5
        return {"A": A, "B": torch.zeros(self.out_features, self.rank)}

    def dense(self, generators: Generators) -> Float[Tensor, "out in"]:
        return self.factor * (generators["B"] @ generators["A"])

    def matvec(self, generators: Generators, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        A, B = (generators[name].to(x.dtype) for name in "AB")
        return self.factor * ((x @ A.mT) @ B.mT)

    def project(self, matrix: Float[Tensor, "out in"]) -> Generators:
        U, S, V = torch.linalg.svd(matrix, full_matrices=False)
        root = (S[: self.rank] / abs(self.factor)).sqrt()
        sign = 1 if self.factor > 0 else -1
        return {"A": root[:, None] * V[: self.rank], "B": sign * U[:, : self.rank] * root}

    def generator_grads(
        self,
        generators: Sequence[Generators],
        x: Float[Tensor, "tokens in"],
        grads_y: Sequence[Float[Tensor, "tokens out"]],
    ) -> list[Generators]:
        pairs = thin_gradients([(g["A"], g["B"]) for g in generators], x, grads_y)
        return [{"A": self.factor * grad_A, "B": self.factor * grad_B} for grad_A, grad_B in pairs]


def thin_gradients(
    factors: Sequence[tuple[Float[Tensor, "rank in"], Float[Tensor, "out rank"]]],
    x: Float[Tensor, "tokens in"],
    grads_y: Sequence[Float[Tensor, "tokens out"]],
) -> list[tuple[Tensor, Tensor]]:
    """Gradients of A and B where y = x A^T B^T, for several pairs that read the same x; in the factors' precision.

    Products with a few columns wait for memory, not for arithmetic: the tokens go by chunks that stay in the cache, the
    long side of every product is contiguous, and x is read once for all A. Half the time of the plain form (measured).
    """
    A = torch.cat([A for A, _ in factors]).to(x.dtype)
    B = [B.to(x.dtype).mT for _, B in factors]
    grad_A = torch.zeros_like(A, dtype=factors[0][0].dtype)
    grad_B = [torch.zeros_like(B, dtype=B.dtype).mT.contiguous() for _, B in factors]
    ranks = [len(b) for b in B]
    for x_chunk, grad_chunks in chunks(x, grads_y):
        inner = (A @ x_chunk.mT).split(ranks)
        back = torch.cat([b @ grad.mT for b, grad in zip(B, grad_chunks, strict=True)])
        grad_A += back @ x_chunk
        for total, features, grad in zip(grad_B, inner, grad_chunks, strict=True):
            total += features @ grad
    return [(a, b.mT) for a, b in zip(grad_A.split(ranks), grad_B, strict=True)]
