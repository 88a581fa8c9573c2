"""Skew-circulants against their definition, and against circulants."""

import numpy as np
import pytest
import torch

from surm_seg.structures import make


@pytest.mark.parametrize("size", [1, 2, 5, 8])
def test_dense_is_the_definition(size: int) -> None:
    c = torch.randn(1, 1, size, dtype=torch.float64)
    i, j = np.indices((size, size))
    expected = c[0, 0].numpy()[(i - j) % size] * np.where(i >= j, 1, -1)
    np.testing.assert_array_equal(make("skew_circulant", size, size).dense({"c": c}), expected)


@pytest.mark.parametrize("size", [5, 8])
def test_products_of_skew_circulants_are_skew_circulant_and_commute(size: int) -> None:
    structure = make("skew_circulant", size, size)
    A, B = (structure.dense({"c": torch.randn(1, 1, size, dtype=torch.float64)}) for _ in range(2))
    torch.testing.assert_close(A @ B, B @ A)
    torch.testing.assert_close(structure.dense(structure.project(A @ B)), A @ B)


def test_a_general_toeplitz_matrix_is_a_circulant_plus_a_skew_circulant() -> None:
    toeplitz, size = make("toeplitz", 6, 6), 6
    matrix = toeplitz.dense({n: torch.randn(s, dtype=torch.float64) for n, s in toeplitz.generators.items()})
    parts = [make(name, size, size) for name in ("circulant", "skew_circulant")]
    column, row = matrix[:, 0], torch.cat([matrix[:1, 0], matrix[0, 1:].flip(0)])
    found = [
        part.dense({"c": c[None, None]})
        for part, c in zip(parts, ((column + row) / 2, (column - row) / 2), strict=True)
    ]
    torch.testing.assert_close(found[0] + found[1], matrix)


def test_rectangles_are_grids_of_blocks() -> None:
    structure = make("skew_circulant", 7, 10, block=4)
    assert structure.generators == {"c": (2, 3, 4)}
    c = torch.randn(2, 3, 4, dtype=torch.float64)
    block = make("skew_circulant", 4, 4)
    rows = [torch.cat([block.dense({"c": c[p : p + 1, q : q + 1]}) for q in range(3)], 1) for p in range(2)]
    assert torch.equal(structure.dense({"c": c}), torch.cat(rows)[:7, :10])
