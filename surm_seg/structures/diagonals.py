"""Matrices that are constant along diagonals, and sums along diagonals: each the adjoint of the other."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def constant_along_diagonals(
    values: Float[Tensor, "*batch diagonals"], rows: int, columns: int
) -> Float[Tensor, "*batch rows columns"]:
    """T[i, j] = values[i - j + columns - 1], from rows + columns - 1 values; differentiable."""
    # Row i is a window of the reversed values; the last row's window comes first.
    return values.flip(-1).unfold(-1, columns, 1).flip(-2)


def diagonal_sums(matrix: Float[Tensor, "*batch rows columns"]) -> Float[Tensor, "*batch diagonals"]:
    """Sum over each diagonal, in the order of `constant_along_diagonals`."""
    rows, columns = matrix.shape[-2:]
    # In rows of one entry less, every row of the padded matrix starts one column further right than the one above.
    padded = torch.nn.functional.pad(matrix.flip(-1), (0, rows)).flatten(-2)[..., : -rows or None]
    return padded.unflatten(-1, (rows, rows + columns - 1)).sum(-2)
