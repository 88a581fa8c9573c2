"""W(G, H) against scipy's circulants, and the containments that give the family its name."""

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor

from surm_seg.errors import BadConfig
from surm_seg.structures import make


def skew(column: np.ndarray) -> np.ndarray:
    return scipy.linalg.toeplitz(column, np.concatenate([column[:1], -column[:0:-1]]))


def shifts(n: int) -> tuple[Tensor, Tensor]:
    """Z_1 and Z_-1: one step down, with 1 or -1 in the corner."""
    down = torch.diag(torch.ones(n - 1, dtype=torch.float64), -1)
    corner = torch.zeros(n, n, dtype=torch.float64)
    corner[0, -1] = 1
    return down + corner, down - corner


def drawn(n: int, rank: int, **options: int) -> tuple:
    structure = make("displacement", n, n, rank=rank, **options)
    values = {k: torch.randn(shape, dtype=torch.float64) for k, shape in structure.generators.items()}
    return structure, values


@pytest.mark.parametrize("rank", [1, 2, 5])
@pytest.mark.parametrize("n", [1, 2, 7, 12])
def test_dense_is_the_sum_of_products(n: int, rank: int) -> None:
    rank = min(rank, n)
    structure, g = drawn(n, rank)
    G, H = g["G"][0, 0].numpy(), g["H"][0, 0].numpy()
    expected = sum(scipy.linalg.circulant(G[:, i]) @ skew(H[:, i]) for i in range(rank))
    np.testing.assert_allclose(structure.dense(g), expected, atol=1e-12)


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_the_displacement_has_the_rank_of_the_generators(rank: int) -> None:
    structure, g = drawn(12, rank)
    plus, minus = shifts(12)
    W = structure.dense(g)
    assert torch.linalg.matrix_rank(plus @ W - W @ minus) == rank


@pytest.mark.parametrize(
    ("rank", "member"),
    [
        (1, scipy.linalg.circulant(np.arange(1.0, 10) ** 2)),
        (1, skew(np.arange(1.0, 10) ** 2)),
        (2, scipy.linalg.toeplitz(np.arange(1.0, 10), np.cos(np.arange(9)))),
        (2, np.linalg.inv(scipy.linalg.toeplitz(0.5 ** np.arange(9), 0.3 ** np.arange(9)))),
        (9, np.random.default_rng(0).normal(size=(9, 9))),
    ],
    ids=["circulant", "skew-circulant", "toeplitz", "inverse of toeplitz", "any"],
)
def test_it_holds(rank: int, member: np.ndarray) -> None:
    structure = make("displacement", 9, 9, rank=rank)
    matrix = torch.from_numpy(member)
    assert (structure.dense(structure.project(matrix)) - matrix).norm() <= 1e-8 * matrix.norm()


def test_projection_beats_the_nearest_circulant_and_the_truncation_it_starts_from() -> None:
    matrix = torch.randn(10, 10, dtype=torch.float64)
    structure, circulant = make("displacement", 10, 10, rank=2), make("circulant", 10, 10)
    error = (matrix - structure.dense(structure.project(matrix))).norm()
    assert error < (matrix - circulant.dense(circulant.project(matrix))).norm()
    plus, minus = shifts(10)
    U, S, V = torch.linalg.svd(plus @ matrix - matrix @ minus)
    start = {"G": (U[:, :2] * S[:2] / 2)[None, None], "H": V[:2].T.flip(0)[None, None]}
    assert error < (matrix - structure.dense(start)).norm()


def test_it_comes_as_near_as_half_its_rank_in_low_rank() -> None:
    left, right = torch.randn(12, 2, dtype=torch.float64), torch.randn(2, 12, dtype=torch.float64)
    matrix = left @ right + 0.2 * torch.randn(12, 12, dtype=torch.float64)
    structure, low_rank = make("displacement", 12, 12, rank=4), make("low_rank", 12, 12, rank=2)
    error = (matrix - structure.dense(structure.project(matrix))).norm()
    assert error <= (matrix - low_rank.dense(low_rank.project(matrix))).norm()


def test_error_falls_as_the_rank_grows() -> None:
    matrix = torch.randn(8, 8, dtype=torch.float64)
    errors = []
    for rank in range(1, 9):
        structure = make("displacement", 8, 8, rank=rank)
        errors.append(float((matrix - structure.dense(structure.project(matrix))).norm()))
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-10


def test_blocks_and_parameters() -> None:
    structure = make("displacement", 768, 768)
    assert structure.parameters == 2 * 2 * 768
    blocks, g = drawn(8, 1, block=4)
    assert blocks.parameters == 2 * 1 * 4 * 4
    corner = scipy.linalg.circulant(g["G"][1, 0, :, 0].numpy()) @ skew(g["H"][1, 0, :, 0].numpy())
    np.testing.assert_allclose(blocks.dense(g)[4:, :4], corner, atol=1e-12)


@pytest.mark.parametrize("options", [dict(rank=0), dict(rank=9), dict(block=0), dict(block=9), dict(rank=5, block=4)])
def test_impossible_options_are_refused(options: dict) -> None:
    with pytest.raises(BadConfig, match="displacement"):
        make("displacement", 8, 8, **options)
