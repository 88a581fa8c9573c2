"""The laws every structure keeps. Names and sizes come from the registry: nothing can be added untested."""

import itertools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

import surm_seg.structures as family
from surm_seg.errors import BadConfig
from surm_seg.structures import Structure

SIZES = [(8, 8), (7, 7), (13, 13), (12, 5), (5, 12), (16, 24), (31, 17), (9, 9)]
NAMED_SIZES = list(itertools.product(family.names(), SIZES))
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 6e-2}


def small(name: str, size: tuple[int, int]) -> Structure:
    """A structure at a size, with options that fit it where the defaults would not."""
    options = {"rank": 3} if name == "low_rank" else {}
    return family.make(name, *size, **options)


def drawn(structure: Structure, dtype: torch.dtype = torch.float64, seed: int = 0) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return {
        n: torch.randn(shape, generator=rng, dtype=torch.float64).to(dtype) for n, shape in structure.generators.items()
    }


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("name", "size"), NAMED_SIZES)
def test_matvec_is_the_dense_product(name: str, size: tuple[int, int], dtype: torch.dtype) -> None:
    structure = small(name, size)
    generators = drawn(structure, dtype)
    x = torch.randn(3, 2, size[1], dtype=torch.float64).to(dtype)
    wide = {n: value.double() for n, value in generators.items()}
    expected = x.double() @ structure.dense(wide).T
    found = structure.matvec(generators, x)
    assert found.shape == (3, 2, size[0]) and found.dtype == dtype
    assert (found.double() - expected).abs().max() <= TOLERANCE[dtype] * (1 + expected.abs().max())


@pytest.mark.parametrize(("name", "size"), NAMED_SIZES)
def test_matvec_is_linear(name: str, size: tuple[int, int]) -> None:
    structure = small(name, size)
    generators = drawn(structure)
    x, y = torch.randn(2, 4, size[1], dtype=torch.float64)
    found = structure.matvec(generators, 2 * x - 3 * y)
    torch.testing.assert_close(found, 2 * structure.matvec(generators, x) - 3 * structure.matvec(generators, y))


@pytest.mark.parametrize(("name", "size"), NAMED_SIZES)
def test_gradients_of_dense_and_matvec_are_right(name: str, size: tuple[int, int]) -> None:
    structure = small(name, size)
    leaves = {n: value.requires_grad_() for n, value in drawn(structure).items()}
    x = torch.randn(2, size[1], dtype=torch.float64, requires_grad=True)
    names = list(leaves)
    assert torch.autograd.gradcheck(
        lambda x, *values: structure.matvec(dict(zip(names, values, strict=True)), x), (x, *leaves.values())
    )
    assert torch.autograd.gradcheck(
        lambda *values: structure.dense(dict(zip(names, values, strict=True))), tuple(leaves.values())
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("name", "size"), NAMED_SIZES)
def test_generator_grad_in_lower_precision(name: str, size: tuple[int, int], dtype: torch.dtype) -> None:
    structure = small(name, size)
    generators = drawn(structure, dtype)
    x, grad_y = (torch.randn(40, n, dtype=torch.float64).to(dtype) for n in (size[1], size[0]))
    wide = {n: value.double() for n, value in generators.items()}
    expected = structure.generator_grad(wide, x.double(), grad_y.double())
    for generator, value in structure.generator_grad(generators, x, grad_y).items():
        assert value.dtype == dtype
        assert (value.double() - expected[generator]).norm() <= TOLERANCE[dtype] * expected[generator].norm()


@pytest.mark.parametrize("tokens", [0, 1, 600])
@pytest.mark.parametrize(("name", "size"), NAMED_SIZES)
def test_generator_grad_is_autograd_through_dense(name: str, size: tuple[int, int], tokens: int) -> None:
    structure = small(name, size)
    leaves = {n: value.requires_grad_() for n, value in drawn(structure).items()}
    x, grad_y = torch.randn(tokens, size[1], dtype=torch.float64), torch.randn(tokens, size[0], dtype=torch.float64)
    expected = torch.autograd.grad(x @ structure.dense(leaves).T, list(leaves.values()), grad_y)
    detached = {n: value.detach() for n, value in leaves.items()}
    by_structure = structure.generator_grad(detached, x, grad_y)
    [by_weight_gradient] = Structure.generator_grads(structure, [detached], x, [grad_y])
    for generator, gradient in zip(leaves, expected, strict=True):
        torch.testing.assert_close(by_structure[generator], gradient)
        torch.testing.assert_close(by_weight_gradient[generator], gradient)


@pytest.mark.parametrize(("name", "size"), NAMED_SIZES)
def test_init_is_zero_with_a_gradient_that_is_not(name: str, size: tuple[int, int]) -> None:
    structure = small(name, size)
    generators = structure.init()
    assert {n: tuple(value.shape) for n, value in generators.items()} == structure.generators
    assert all(value.dtype == torch.float32 for value in generators.values())
    assert structure.dense(generators).count_nonzero() == 0
    grads = structure.generator_grad(generators, torch.randn(5, size[1]), torch.randn(5, size[0]))
    assert sum(float(grad.abs().sum()) for grad in grads.values()) > 0


@pytest.mark.parametrize(("name", "size"), NAMED_SIZES)
def test_projection_keeps_members_and_beats_random_ones(name: str, size: tuple[int, int]) -> None:
    structure = small(name, size)
    member = structure.dense(drawn(structure))
    torch.testing.assert_close(structure.dense(structure.project(member)), member)
    matrix = torch.randn(size, dtype=torch.float64)
    nearest = structure.dense(structure.project(matrix))
    error = (matrix - nearest).norm()
    for seed in range(5):
        other = structure.dense(drawn(structure, seed=seed))
        best_scale = (matrix * other).sum() / other.square().sum()
        assert error <= (matrix - best_scale * other).norm() + 1e-9
    assert (matrix - structure.dense(structure.project(nearest))).norm() == pytest.approx(float(error))


@pytest.mark.parametrize(("name", "size"), NAMED_SIZES)
def test_parameters_count_the_generators(name: str, size: tuple[int, int]) -> None:
    structure = small(name, size)
    assert structure.parameters == sum(value.numel() for value in structure.init().values())


@pytest.mark.parametrize(("name", "size"), NAMED_SIZES)
def test_a_budget_chooses_the_largest_member_that_fits(name: str, size: tuple[int, int]) -> None:
    options = list(type(small(name, size)).ladder(*size))
    counts = [family.make(name, *size, **o).parameters for o in options]
    assert counts == sorted(counts)
    assert family.within(name, *size, budget=counts[-1] + 1).parameters == counts[-1]
    chosen = family.within(name, *size, budget=counts[0])
    assert chosen.parameters == counts[0]
    assert family.make(name, *size, **chosen.options).generators == chosen.generators
    with pytest.raises(BadConfig, match=f"has {counts[0]} parameters, more than"):
        family.within(name, *size, budget=counts[0] - 1)


@pytest.mark.parametrize("size", [(0, 4), (4, 0), (-1, 3)])
@pytest.mark.parametrize("name", family.names())
def test_impossible_sizes_are_refused(name: str, size: tuple[int, int]) -> None:
    with pytest.raises(BadConfig, match="sizes of at least 1"):
        family.make(name, *size)


def test_unknown_names_and_options_are_refused() -> None:
    with pytest.raises(BadConfig, match=r"circulant, .*low_rank"):
        family.make("circular", 4, 4)
    with pytest.raises(BadConfig, match="no option \\['rank'\\]; it takes \\['block', 'factored'\\]"):
        family.make("circulant", 4, 4, rank=2)


TOY = """
import torch
from surm_seg.structures.base import Structure

class Diagonal(Structure):
    '''d on the main diagonal.'''

    name = "toy_diagonal"

    @property
    def generators(self):
        return {"d": (min(self.out_features, self.in_features),)}

    def init(self):
        return {"d": torch.zeros(self.generators["d"])}

    def dense(self, generators):
        d = generators["d"]
        eye = torch.eye(self.out_features, self.in_features, dtype=d.dtype)
        return eye[:, : len(d)] @ torch.diag(d) @ torch.eye(len(d), self.in_features, dtype=d.dtype)

    def project(self, matrix):
        return {"d": matrix.diagonal().clone()}
"""


def test_a_new_structure_needs_one_file(tmp_path: Path) -> None:
    """A file in the folder is all: the laws here, the kernel's and the tuner's tests find it and hold."""
    tests = Path(__file__).parents[1]
    for folder in ("surm_seg", "pipelines"):
        shutil.copytree(tests.parent / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for test in ("structures/test_contract.py", "test_kernel.py", "test_tuner.py"):
        (tmp_path / test).parent.mkdir(exist_ok=True)
        shutil.copy(tests / test, tmp_path / test)
    (tmp_path / "surm_seg" / "structures" / "toy_diagonal.py").write_text(TOY)
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "toy_diagonal", "."],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout
    assert int(run.stdout.rpartition(" passed")[0].split()[-1]) > 60, run.stdout
