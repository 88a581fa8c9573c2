"""Circulant blocks against scipy.linalg.circulant."""

import numpy as np
import pytest
import scipy.linalg
import torch

from surm_seg.errors import BadConfig
from surm_seg.structures import make


@pytest.mark.parametrize(
    ("out_features", "in_features", "block", "parameters"),
    [
        (6, 6, None, 6),
        (7, 7, None, 7),
        (768, 768, None, 768),
        (12, 5, None, 15),
        (8, 8, 2, 32),
        (10, 7, 4, 24),
        (5, 9, 9, 9),
    ],
)
def test_dense_is_a_cropped_grid_of_scipy_circulants(
    out_features: int, in_features: int, block: int | None, parameters: int
) -> None:
    structure = make("circulant", out_features, in_features, block=block)
    c = torch.randn(structure.generators["c"], dtype=torch.float64)
    rows, columns, _ = c.shape
    grid = np.block([[scipy.linalg.circulant(c[p, q].numpy()) for q in range(columns)] for p in range(rows)])
    np.testing.assert_array_equal(structure.dense({"c": c}), grid[:out_features, :in_features])
    assert structure.parameters == parameters


def test_a_768_to_1000_layer_has_1536_parameters() -> None:
    assert make("circulant", 1000, 768).parameters == 1536


def test_projection_of_a_cropped_grid_averages_only_what_is_inside() -> None:
    structure = make("circulant", 5, 3)
    ones = structure.dense(structure.project(torch.ones(5, 3, dtype=torch.float64)))
    torch.testing.assert_close(ones, torch.ones(5, 3, dtype=torch.float64))


def test_what_projection_leaves_is_orthogonal_to_every_member() -> None:
    structure = make("circulant", 9, 6, block=4)
    matrix = torch.randn(9, 6, dtype=torch.float64)
    rest = matrix - structure.dense(structure.project(matrix))
    member = structure.dense({"c": torch.randn(structure.generators["c"], dtype=torch.float64)})
    assert abs(float((rest * member).sum())) < 1e-12


@pytest.mark.parametrize("block", [0, -1, 9])
def test_blocks_that_do_not_fit_are_refused(block: int) -> None:
    with pytest.raises(BadConfig, match="does not fit"):
        make("circulant", 8, 4, block=block)
