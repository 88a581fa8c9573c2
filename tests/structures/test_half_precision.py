"""Half-precision inputs meet float32 generators, as under autocast."""

import pytest
import torch
from drawing import drawn

from surm_seg.structures import make, names

CASES = [*((name, {}) for name in names()), ("kronecker", {"rank": 8})]
"""Few terms of a Kronecker sum have gradients of their own, and many take those of the weight."""


@pytest.mark.parametrize(("name", "options"), CASES)
def test_half_precision_inputs_give_gradients_in_the_generators_type(name: str, options: dict[str, int]) -> None:
    torch.manual_seed(0)
    structure = make(name, 24, 48, **options)
    values = drawn(structure, torch.float32)
    x, grad_y = torch.randn(40, 48), torch.randn(40, 24)
    assert structure.matvec(values, x.bfloat16()).dtype == torch.bfloat16
    expected = structure.generator_grad(values, x, grad_y)
    found = structure.generator_grad(values, x.bfloat16(), grad_y.bfloat16())
    for generator, gradient in found.items():
        assert gradient.dtype == torch.float32
        assert (gradient - expected[generator]).norm() < 0.03 * expected[generator].norm()
