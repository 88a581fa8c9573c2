"""Random members of a structure, for the tests of this folder."""

from __future__ import annotations

import torch
from torch import Tensor

from surm_seg.structures import Structure


def drawn(structure: Structure, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Generators from a normal distribution, the same up to rounding in every type."""
    return {name: torch.randn(shape, dtype=torch.float64).to(dtype) for name, shape in structure.generators.items()}
