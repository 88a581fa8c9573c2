"""A frozen linear layer plus structured deltas as one matrix product, without the weight gradient on the way back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from surm_seg.structures.base import Generators, Structure

GradMethod = Literal["auto", "fft", "gemm"]
"""How generator gradients are made: from the structure's own products of x and grad_y (for circulants, sums in
frequency space), or by one weight-gradient GEMM and a pullback. `auto`: the first on a CPU, the second on a GPU."""


@dataclass(frozen=True)
class Delta:
    """scale * structure(generators), added to the rows [start, stop) of a weight (out, in)."""

    structure: Structure
    generators: Generators
    scale: float
    start: int
    stop: int


def add_deltas(weight: Float[Tensor, "out in"], deltas: Sequence[Delta]) -> Float[Tensor, "out in"]:
    """weight + the deltas on their rows, summed in the generators' precision (float32) or the weight's, if higher."""
    wide = max((g.dtype for d in deltas for g in d.generators.values()), key=lambda t: t.itemsize, default=weight.dtype)
    total = weight.detach().to(torch.promote_types(weight.dtype, wide), copy=True)
    for delta in deltas:
        total[delta.start : delta.stop].add_(delta.structure.dense(delta.generators), alpha=delta.scale)
    return total


class _StructuredLinear(torch.autograd.Function):
    """Saves x and the leaves only; weight + deltas is built again for grad_x, since memory costs more than adding."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        deltas: Sequence[Delta],
        method: GradMethod,
        *leaves: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, *leaves)
        ctx.deltas, ctx.method = deltas, method
        total = add_deltas(weight, _rebound(deltas, leaves)).to(x.dtype)
        return torch.nn.functional.linear(x, total, None if bias is None else bias.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight, *leaves = ctx.saved_tensors
        deltas = _rebound(ctx.deltas, leaves)
        with torch.autocast(x.device.type, enabled=False):
            grad_x = grad_y @ add_deltas(weight, deltas).to(grad_y.dtype) if ctx.needs_input_grad[0] else None
            x, grad_y = x.flatten(0, -2), grad_y.flatten(0, -2)
            grad_weight = (grad_y.mT @ x).to(weight.dtype) if ctx.needs_input_grad[1] else None
            grad_bias = grad_y.sum(0).to(weight.dtype) if ctx.needs_input_grad[2] else None
            grads = [grad for delta in deltas for grad in _generator_grads(delta, x, grad_y, ctx.method)]
        return grad_x, grad_weight, grad_bias, None, None, *grads


def structured_linear(
    x: Float[Tensor, "*batch in"],
    weight: Float[Tensor, "out in"],
    bias: Float[Tensor, " out"] | None,
    deltas: Sequence[Delta],
    grad: GradMethod = "auto",
) -> Float[Tensor, "*batch out"]:
    """x (weight + deltas)^T + bias; differentiable once, in x, the generators, the weight and the bias.

    Under autocast the product runs in the autocast type, also when backward runs outside the autocast block. Costs one
    product forward and one back, as the frozen layer does, plus the generators' own gradients.
    """
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    leaves = [value for delta in deltas for value in delta.generators.values()]
    with torch.autocast(device, enabled=False):
        return _StructuredLinear.apply(x.to(dtype), weight, bias, tuple(deltas), grad, *leaves)


def _rebound(deltas: Sequence[Delta], leaves: Sequence[Tensor]) -> list[Delta]:
    """The deltas with the saved tensors as their generators, in the order structured_linear flattened them."""
    values = iter(leaves)
    return [Delta(d.structure, {name: next(values) for name in d.generators}, d.scale, d.start, d.stop) for d in deltas]


def _generator_grads(
    delta: Delta, x: Float[Tensor, "tokens in"], grad_y: Float[Tensor, "tokens out"], method: GradMethod
) -> list[Tensor]:
    grad = grad_y[:, delta.start : delta.stop]
    if method == "gemm" or (method == "auto" and x.device.type == "cuda"):
        grads = Structure.generator_grad(delta.structure, delta.generators, x, grad)
    else:
        grads = delta.structure.generator_grad(delta.generators, x, grad)
    return [delta.scale * grads[name] for name in delta.generators]
