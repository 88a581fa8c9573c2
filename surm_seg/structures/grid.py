"""Rectangles as grids of square blocks, the last row and column of which are cropped."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from surm_seg.errors import BadConfig


class Grid:
    """ceil(out / b) x ceil(in / b) blocks of side b over an (out, in) matrix.

    Args:
        block: the side b, 1 <= b <= max(out, in); None is min(out, in).
        family: named in the error.

    Raises:
        BadConfig: a block that does not fit.
    """

    def __init__(self, out_features: int, in_features: int, block: int | None, family: str) -> None:
        self.block = min(out_features, in_features) if block is None else block
        if not 1 <= self.block <= max(out_features, in_features):
            raise BadConfig(
                "structure-option", f"{family} block {block} does not fit a {out_features} x {in_features} matrix."
            )
        self.out_features, self.in_features = out_features, in_features
        self.rows = -(-out_features // self.block)
        self.columns = -(-in_features // self.block)

    def cut(self, matrix: Float[Tensor, "out in"]) -> Float[Tensor, "rows columns block block"]:
        """The blocks, padded with zeros where they are cropped."""
        below, right = self.rows * self.block - self.out_features, self.columns * self.block - self.in_features
        padded = torch.nn.functional.pad(matrix, (0, right, 0, below)) if below or right else matrix
        return padded.unflatten(1, (self.columns, self.block)).unflatten(0, (self.rows, self.block)).transpose(1, 2)

    def joined(self, blocks: Float[Tensor, "rows columns block block"]) -> Float[Tensor, "out in"]:
        """The matrix of these blocks, cropped."""
        whole = blocks[0, 0] if self.rows == self.columns == 1 else blocks.transpose(1, 2).flatten(2, 3).flatten(0, 1)
        return whole[: self.out_features, : self.in_features]

    def split(self, x: Float[Tensor, "*batch features"]) -> Float[Tensor, "*batch blocks block"]:
        """Inputs or outputs by block, padded with zeros."""
        missing = -x.shape[-1] % self.block
        padded = torch.nn.functional.pad(x, (0, missing)) if missing else x
        return padded.unflatten(-1, (-1, self.block))
