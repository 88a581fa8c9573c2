"""Kronecker sums against torch.kron, and their projection against the rearrangement written out."""

import itertools

import pytest
import torch
from drawing import drawn
from torch import Tensor

from surm_seg.errors import BadConfig
from surm_seg.structures import make


def rearranged(matrix: Tensor, a: int, b: int) -> Tensor:
    """One row per block of an a x b grid of blocks: its entries (Van Loan)."""
    c, d = matrix.shape[0] // a, matrix.shape[1] // b
    blocks = [matrix[i * c : (i + 1) * c, j * d : (j + 1) * d] for i in range(a) for j in range(b)]
    return torch.stack([block.flatten() for block in blocks])


SIZES = [(6, 6), (12, 18), (18, 12), (13, 13), (31, 17), (5, 12)]


@pytest.mark.parametrize(("size", "rank"), [*itertools.product(SIZES, [1, 3]), ((1, 1), 1), ((1, 6), 1)])
def test_dense_is_the_cropped_sum_of_torch_kron(size: tuple[int, int], rank: int) -> None:
    structure = make("kronecker", *size, rank=rank)
    values = drawn(structure)
    terms = [torch.kron(A, B) for A, B in zip(values["A"], values["B"], strict=True)]
    expected = torch.stack(terms).sum(0)[: size[0], : size[1]]
    torch.testing.assert_close(structure.dense(values), expected)
    x = torch.randn(2, 3, size[1], dtype=torch.float64)
    torch.testing.assert_close(structure.matvec(values, x), x @ expected.T)


@pytest.mark.parametrize(
    ("size", "A", "B", "parameters"),
    [
        ((768, 768), (32, 24), (24, 32), 1536),
        ((50, 50), (10, 5), (5, 10), 100),
        ((16, 16), (4, 4), (4, 4), 32),
        ((7, 7), (4, 2), (2, 4), 16),  # as 8
        ((13, 13), (5, 3), (3, 5), 30),  # 14 = 2 x 7 makes rank 4 of 13; 15 makes 9
        ((5, 12), (3, 3), (2, 4), 17),  # as 6 x 12
        ((1, 1), (1, 1), (1, 1), 2),
    ],
)
def test_default_factors(size: tuple[int, int], A: tuple[int, int], B: tuple[int, int], parameters: int) -> None:
    structure = make("kronecker", *size)
    assert structure.generators == {"A": (1, *A), "B": (1, *B)}
    assert structure.parameters == parameters


@pytest.mark.parametrize("size", [(24, 24), (50, 50), (60, 36), (26, 26), (768, 3072)])
def test_no_other_factors_are_better(size: tuple[int, int]) -> None:
    _, a, b = make("kronecker", *size).generators["A"]

    def worth(a: int, b: int) -> tuple[int, int, int]:
        c, d = size[0] // a, size[1] // b
        return -(a * b + c * d), min(a, b) * min(c, d), a

    divisors = [[n for n in range(1, s + 1) if s % n == 0] for s in size]
    assert worth(a, b) == max(worth(*factors) for factors in itertools.product(*divisors))


@pytest.mark.parametrize(("size", "rank"), [(12, 9), (50, 25), (13, 9)])
def test_the_rank_of_a_product_is_the_product_of_the_ranks(size: int, rank: int) -> None:
    """As 24 * 24 = 576 of 768."""
    structure = make("kronecker", size, size)
    assert torch.linalg.matrix_rank(structure.dense(drawn(structure))) == rank


@pytest.mark.parametrize("factors", [(24, 24), [24, 24]])
def test_square_factors_have_full_rank_for_a_few_more_parameters(factors: tuple[int, int] | list[int]) -> None:
    structure = make("kronecker", 768, 768, factors=factors)
    assert structure.generators == {"A": (1, 24, 24), "B": (1, 32, 32)} and structure.parameters == 1600
    small = make("kronecker", 12, 12, factors=(3, 3))
    assert torch.linalg.matrix_rank(small.dense(drawn(small))) == 12


def test_a_prime_size_with_its_own_factors_is_not_rounded_up() -> None:
    assert make("kronecker", 7, 6, factors=(7, 2)).generators == {"A": (1, 7, 2), "B": (1, 1, 3)}


@pytest.mark.parametrize(("size", "rank"), [((48, 48), 1), ((48, 48), 2), ((47, 60), 1), ((47, 60), 20)])
def test_gradients_with_and_without_the_weight_gradient(size: tuple[int, int], rank: int) -> None:
    """Few terms are cheaper one by one, and many through the weight gradient."""
    structure = make("kronecker", *size, rank=rank)
    values = drawn(structure)
    leaves = {name: value.clone().requires_grad_() for name, value in values.items()}
    x, grad_y = (torch.randn(9, n, dtype=torch.float64) for n in (size[1], size[0]))
    expected = torch.autograd.grad(x @ structure.dense(leaves).T, list(leaves.values()), grad_y)
    found = structure.generator_grad(values, x, grad_y)
    for name, gradient in zip(leaves, expected, strict=True):
        torch.testing.assert_close(found[name], gradient)


@pytest.mark.parametrize("rank", [1, 2, 5])
@pytest.mark.parametrize("size", [(12, 12), (8, 18)])
def test_projection_is_the_truncated_svd_of_the_rearrangement(size: tuple[int, int], rank: int) -> None:
    structure = make("kronecker", *size, rank=rank)
    matrix = torch.randn(size, dtype=torch.float64)
    values = structure.project(matrix)
    _, a, b = structure.generators["A"]
    S = torch.linalg.svdvals(rearranged(matrix, a, b))
    assert float((matrix - structure.dense(values)).norm()) == pytest.approx(float(S[rank:].norm()))
    torch.testing.assert_close(values["A"].flatten(1).norm(dim=1), values["B"].flatten(1).norm(dim=1))


def test_with_the_largest_rank_every_matrix_is_a_member() -> None:
    structure = make("kronecker", 8, 12, rank=8)
    matrix = torch.randn(8, 12, dtype=torch.float64)
    torch.testing.assert_close(structure.dense(structure.project(matrix)), matrix)


@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("size", [(7, 7), (13, 13), (12, 5), (5, 12), (31, 17)])
def test_projection_finds_members_that_are_cropped(size: tuple[int, int], rank: int) -> None:
    structure = make("kronecker", *size, rank=rank)
    for _ in range(3):
        member = structure.dense(drawn(structure))
        torch.testing.assert_close(structure.dense(structure.project(member)), member)


@pytest.mark.parametrize("size", [(7, 7), (12, 5), (31, 17), (30, 7)])
def test_projection_of_a_cropped_matrix_ignores_what_is_cropped(size: tuple[int, int]) -> None:
    """At least as near as the projection of the zero-padded matrix, and at an optimum: no multiple is nearer."""
    structure = make("kronecker", *size)
    (_, a, b), (_, c, d) = structure.generators["A"], structure.generators["B"]
    matrix = torch.randn(size, dtype=torch.float64)
    padded = torch.zeros(a * c, b * d, dtype=torch.float64)
    padded[: size[0], : size[1]] = matrix
    U, S, V = torch.linalg.svd(rearranged(padded, a, b), full_matrices=False)
    start = torch.kron(S[0] * U[:, 0].reshape(a, b), V[0].reshape(c, d))[: size[0], : size[1]]
    nearest = structure.dense(structure.project(matrix))
    assert (matrix - nearest).norm() <= (matrix - start).norm() + 1e-12
    assert abs(float(((matrix - nearest) * nearest).sum())) < 1e-4 * float(matrix.square().sum())


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"rank": 0}, "rank 0 is not in 1..8"),
        ({"rank": 9}, r"rank 9 is not in 1..8, .* 4 x 3 and 2 x 4"),
        ({"factors": (3, 4)}, r"\[3, 4\] are not a divisor of 8 and one of 12"),
        ({"factors": (4, 5)}, "not a divisor"),
        ({"factors": (0, 4)}, "not a divisor"),
        ({"factors": (-2, 4)}, "not a divisor"),
        ({"factors": [4]}, "not a divisor"),
        ({"factors": [2, 2, 2]}, "not a divisor"),
    ],
)
def test_impossible_options_are_refused(options: dict, says: str) -> None:
    with pytest.raises(BadConfig, match=says):
        make("kronecker", 8, 12, **options)
