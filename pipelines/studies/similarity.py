"""How alike two models are, and what a weight change is like: representations, directions, spectra."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


def linear_cka(X: Float[Tensor, "examples _"], Y: Float[Tensor, "examples _"]) -> float:
    """Linear centred kernel alignment of two representations of the same examples, 0 to 1 (arXiv 1905.00414).

    |Y^T X|^2 / (|X^T X| |Y^T Y|) with centred columns. The same for any turn and any scaling of all of X, and not for a
    linear map that stretches some directions more than others. 0 where one of them is constant.
    """
    X, Y = (Z - Z.mean(0) for Z in (X, Y))
    own = (X.mT @ X).norm() * (Y.mT @ Y).norm()
    return float((Y.mT @ X).square().sum() / own) if own > 0 else 0.0


def cosine(A: Float[Tensor, "out in"], B: Float[Tensor, "out in"]) -> float:
    """Of the angle between two matrices as vectors; 0 where one of them is zero."""
    lengths = A.norm() * B.norm()
    return float(((A * B).sum() / lengths).clamp(-1, 1)) if lengths > 0 else 0.0


@dataclass(frozen=True)
class Spectrum:
    """What the singular values of a matrix say.

    Args:
        values: over the largest, falling.
        effective_rank: exponential of the entropy of the values over their sum (Roy and Vetterli, 2007).
        numerical_rank: values above the larger side x float32's epsilon.
        singular: whether that is less than the smaller side.
        top: values k -> share of the squared norm in the k largest.
    """

    values: list[float]
    effective_rank: float
    numerical_rank: int
    singular: bool
    top: dict[int, float]


def spectrum(matrix: Float[Tensor, "out in"], leading: tuple[int, ...] = (1, 4, 16)) -> Spectrum:
    """Of a matrix that is not zero.

    Args:
        leading: numbers of values for `top`; more than there are count as all.
    """
    values = torch.linalg.svdvals(matrix)
    values = values / values[0]
    shares = values / values.sum()
    entropy = -torch.special.xlogy(shares, shares).sum()
    rank = int((values > max(matrix.shape) * torch.finfo(torch.float32).eps).sum())
    energy = values.square().cumsum(0) / values.square().sum()
    return Spectrum(
        values=values.tolist(),
        effective_rank=float(entropy.exp()),
        numerical_rank=rank,
        singular=rank < min(matrix.shape),
        top={k: float(energy[min(k, len(values)) - 1]) for k in leading},
    )
