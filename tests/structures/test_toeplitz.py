"""Toeplitz against scipy.linalg.toeplitz."""

import numpy as np
import pytest
import scipy.linalg
import torch

from surm_seg.errors import BadConfig
from surm_seg.structures import make

SIZES = [(6, 6), (5, 9), (9, 5), (1, 4), (4, 1), (1, 1)]


@pytest.mark.parametrize(("out_features", "in_features"), SIZES)
def test_dense_is_scipys(out_features: int, in_features: int) -> None:
    structure = make("toeplitz", out_features, in_features)
    values = {name: torch.randn(shape, dtype=torch.float64) for name, shape in structure.generators.items()}
    row = np.concatenate([values["column"][:1].numpy(), values["row"].numpy()])
    np.testing.assert_array_equal(structure.dense(values), scipy.linalg.toeplitz(values["column"].numpy(), row))
    assert structure.parameters == out_features + in_features - 1


@pytest.mark.parametrize(("out_features", "in_features"), SIZES)
def test_symmetric_depends_on_the_distance_from_the_diagonal(out_features: int, in_features: int) -> None:
    structure = make("toeplitz", out_features, in_features, symmetric=True)
    t = torch.randn(structure.generators["t"], dtype=torch.float64)
    i, j = np.indices((out_features, in_features))
    np.testing.assert_array_equal(structure.dense({"t": t}), t.numpy()[abs(i - j)])
    assert structure.parameters == max(out_features, in_features)
    x, grad_y = torch.randn(7, in_features, dtype=torch.float64), torch.randn(7, out_features, dtype=torch.float64)
    torch.testing.assert_close(structure.matvec({"t": t}, x), x @ structure.dense({"t": t}).T)
    leaf = t.clone().requires_grad_()
    (expected,) = torch.autograd.grad(x @ structure.dense({"t": leaf}).T, leaf, grad_y)
    torch.testing.assert_close(structure.generator_grad({"t": t}, x, grad_y)["t"], expected)
    torch.testing.assert_close(structure.project(structure.dense({"t": t}))["t"], t)


def test_what_projection_leaves_is_orthogonal_to_every_member() -> None:
    structure = make("toeplitz", 7, 4)
    matrix = torch.randn(7, 4, dtype=torch.float64)
    rest = matrix - structure.dense(structure.project(matrix))
    member = {name: torch.randn(shape, dtype=torch.float64) for name, shape in structure.generators.items()}
    assert abs(float((rest * structure.dense(member)).sum())) < 1e-12


def test_the_papers_factored_form_is_a_product_of_symmetric_ones_and_cannot_be_projected_on() -> None:
    structure = make("toeplitz", 6, 6, factored=True)
    t, u = torch.randn(2, 6, dtype=torch.float64)
    expected = scipy.linalg.toeplitz(t.numpy()) @ scipy.linalg.toeplitz(u.numpy())
    np.testing.assert_allclose(structure.dense({"t": t, "u": u}), expected, atol=1e-12)
    assert structure.parameters == 12
    with pytest.raises(BadConfig, match="no projection"):
        structure.project(torch.eye(6, dtype=torch.float64))
    with pytest.raises(BadConfig, match="square matrices, not 6 x 5"):
        make("toeplitz", 6, 5, factored=True)
