"""Monarch against its definition, written out feature by feature."""

import itertools

import pytest
import torch
from drawing import drawn
from torch import Tensor

from surm_seg.errors import BadConfig
from surm_seg.structures import make, within

SHAPES = [(16, 16, 4, 4), (12, 20, 4, 2), (24, 12, 4, 6), (12, 18, 3, 7), (13, 10, 4, 3), (5, 12, 4, 4), (7, 5, 5, 3)]
"""out, in, blocks, rank; in the last three the blocks do not divide the sizes."""


def applied(R: Tensor, L: Tensor, x: Tensor, out_features: int) -> Tensor:
    """Multiply by block, shuffle, multiply by block, interleave."""
    N, r, length = R.shape
    padded = torch.zeros(N * length, dtype=x.dtype)
    padded[: len(x)] = x
    features = torch.cat([R[k] @ padded[k * length : (k + 1) * length] for k in range(N)])
    shuffled = torch.zeros(N, r, dtype=x.dtype)
    for f in range(N * r):
        shuffled[f % N, f // N] = features[f]
    y = torch.zeros(L.shape[1] * N, dtype=x.dtype)
    for block, position in itertools.product(range(N), range(L.shape[1])):
        y[position * N + block] = L[block, position] @ shuffled[block]
    return y[:out_features]


def cell(matrix: Tensor, block: int, run: int, blocks: int) -> Tensor:
    """The entries from one run of inputs to the outputs of one block."""
    length = -(-matrix.shape[1] // blocks)
    return matrix[block::blocks, run * length : (run + 1) * length]


def rank_of_cell(block: int, run: int, blocks: int, rank: int) -> int:
    return sum((run * rank + i) % blocks == block for i in range(rank))


@pytest.mark.parametrize(("out_features", "in_features", "blocks", "rank"), SHAPES)
def test_products_follow_the_definition(out_features: int, in_features: int, blocks: int, rank: int) -> None:
    structure = make("monarch", out_features, in_features, blocks=blocks, rank=rank)
    values = drawn(structure)
    x = torch.randn(6, in_features, dtype=torch.float64)
    expected = torch.stack([applied(values["R"], values["L"], row, out_features) for row in x])
    torch.testing.assert_close(structure.matvec(values, x), expected)
    torch.testing.assert_close(x @ structure.dense(values).T, expected)
    torch.testing.assert_close(structure.matvec(values, x[0]), expected[0])


def test_parameters() -> None:
    assert make("monarch", 768, 768).parameters == 4 * (768 + 768)
    assert make("monarch", 13, 10, blocks=4, rank=3).parameters == 3 * 4 * (3 + 4)


def test_one_block_is_low_rank() -> None:
    values = drawn(make("monarch", 9, 7, blocks=1, rank=3))
    low_rank = make("low_rank", 9, 7, rank=3).dense({"A": values["R"][0], "B": values["L"][0]})
    torch.testing.assert_close(make("monarch", 9, 7, blocks=1, rank=3).dense(values), low_rank)


@pytest.mark.parametrize(("out_features", "in_features", "blocks", "rank"), SHAPES[:4])
def test_rank_is_features_or_sides(out_features: int, in_features: int, blocks: int, rank: int) -> None:
    structure = make("monarch", out_features, in_features, blocks=blocks, rank=rank)
    found = torch.linalg.matrix_rank(structure.dense(drawn(structure)))
    assert found == min(blocks * rank, out_features, in_features)


def test_rank_of_each_cell() -> None:
    structure = make("monarch", 16, 20, blocks=4, rank=6)
    matrix = structure.dense(drawn(structure))
    ranks = [[int(torch.linalg.matrix_rank(cell(matrix, block, run, 4))) for run in range(4)] for block in range(4)]
    assert ranks == [[2, 1, 2, 1], [2, 1, 2, 1], [1, 2, 1, 2], [1, 2, 1, 2]]


@pytest.mark.parametrize(("blocks", "rank", "share"), [(4, 1, 0.25), (4, 2, 0.5), (4, 3, 0.75), (4, 4, 1), (2, 4, 1)])
def test_share_of_entries_that_are_not_zero(blocks: int, rank: int, share: float) -> None:
    structure = make("monarch", 16, 24, blocks=blocks, rank=rank)
    assert structure.dense(drawn(structure)).count_nonzero() == share * 16 * 24


@pytest.mark.parametrize(("out_features", "in_features", "blocks", "rank"), SHAPES)
def test_projection_truncates_each_cell(out_features: int, in_features: int, blocks: int, rank: int) -> None:
    structure = make("monarch", out_features, in_features, blocks=blocks, rank=rank)
    matrix = torch.randn(out_features, in_features, dtype=torch.float64)
    nearest = structure.dense(structure.project(matrix))
    for block, run in itertools.product(range(blocks), repeat=2):
        S = torch.linalg.svdvals(cell(matrix, block, run, blocks))
        lost = cell(matrix - nearest, block, run, blocks).norm()
        assert float(lost) == pytest.approx(float(S[rank_of_cell(block, run, blocks, rank) :].norm()), abs=1e-12)


def test_with_the_largest_rank_every_matrix_is_a_member() -> None:
    structure = make("monarch", 8, 12, blocks=4, rank=8)
    matrix = torch.randn(8, 12, dtype=torch.float64)
    torch.testing.assert_close(structure.dense(structure.project(matrix)), matrix)


@pytest.mark.parametrize(("out_features", "in_features", "blocks", "rank"), SHAPES)
def test_pullback_and_products_of_factors_are_autograd(
    out_features: int, in_features: int, blocks: int, rank: int
) -> None:
    structure = make("monarch", out_features, in_features, blocks=blocks, rank=rank)
    values = drawn(structure)
    leaves = {name: value.clone().requires_grad_() for name, value in values.items()}
    x, grad_y = (torch.randn(9, n, dtype=torch.float64) for n in (in_features, out_features))
    expected = torch.autograd.grad(x @ structure.dense(leaves).T, list(leaves.values()), grad_y)
    found = structure.generator_grad(values, x, grad_y), structure.pullback(values, grad_y.T @ x)
    for name, gradient in zip(leaves, expected, strict=True):
        torch.testing.assert_close(found[0][name], gradient)
        torch.testing.assert_close(found[1][name], gradient)


def test_a_budget_takes_fewer_blocks_where_the_default_does_not_fit() -> None:
    with pytest.raises(BadConfig, match="blocks 4 is not in"):
        make("monarch", 2, 6)
    assert within("monarch", 2, 6, budget=9).options == {"blocks": 2, "rank": 1}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"rank": 0}, "rank 0 is not in 1..8"),
        ({"rank": 9}, "rank 9 is not in 1..8, all that 4 blocks can use at 8 x 12"),
        ({"blocks": 0}, r"blocks 0 is not in 1..min\(out, in\) of 8 x 12"),
        ({"blocks": 9}, "blocks 9 is not in"),
    ],
)
def test_impossible_options_are_refused(options: dict, says: str) -> None:
    with pytest.raises(BadConfig, match=says):
        make("monarch", 8, 12, **options)
