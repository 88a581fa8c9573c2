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


@pytest.mark.parametrize("name", ["circulant", "skew_circulant"])
def test_the_papers_factored_form_is_the_same_class_with_twice_the_parameters(name: str) -> None:
    plain, factored = make(name, 6, 6), make(name, 6, 6, factored=True)
    assert factored.parameters == 2 * plain.parameters
    g = {n: torch.randn(shape, dtype=torch.float64) for n, shape in factored.generators.items()}
    torch.testing.assert_close(factored.dense(g), plain.dense({"c": g["c"] * g["r"]}))
    matrix = torch.randn(6, 6, dtype=torch.float64)
    nearest = factored.project(matrix)
    assert torch.equal(nearest["r"], torch.ones_like(nearest["r"]))
    assert torch.equal(nearest["c"], plain.project(matrix)["c"])


@pytest.mark.parametrize("name", ["circulant", "skew_circulant", "toeplitz"])
def test_factored_forms_start_at_zero_and_have_their_gradients(name: str) -> None:
    structure = make(name, 6, 6, factored=True)
    start = structure.init()
    assert structure.dense(start).count_nonzero() == 0
    x, grad_y = torch.randn(300, 6, dtype=torch.float64), torch.randn(300, 6, dtype=torch.float64)
    assert any(g.norm() > 0 for g in structure.generator_grad(start, x.float(), grad_y.float()).values())
    leaves = {n: torch.randn_like(v, dtype=torch.float64).requires_grad_() for n, v in start.items()}
    expected = torch.autograd.grad(x @ structure.dense(leaves).T, list(leaves.values()), grad_y)
    torch.testing.assert_close(structure.matvec(leaves, x), x @ structure.dense(leaves).T)
    found = structure.generator_grad({n: v.detach() for n, v in leaves.items()}, x, grad_y)
    for gradient, value in zip(expected, found.values(), strict=True):
        torch.testing.assert_close(value, gradient)


def test_the_count_of_the_papers() -> None:
    """12 layers of width 768: q, k, v and q, v, plain and factored (SURM, arXiv 2406.17740)."""
    plain, factored = make("circulant", 768, 768).parameters, make("circulant", 768, 768, factored=True).parameters
    assert (36 * plain, 36 * factored, 24 * plain, 24 * factored) == (27_648, 55_296, 18_432, 36_864)
