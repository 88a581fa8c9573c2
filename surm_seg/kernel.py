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
"""How generator gradients are made: `fft` from the structure's own products of x and grad_y (for circulants, sums in
frequency space), `gemm` from one weight-gradient product and a pullback. `auto`: `gemm` on a GPU for structures that
use Fourier transforms, and `fft` elsewhere."""

LOST = 0.2
"""Share of the deltas lost in rounding from which they are better computed apart from a weight of low precision."""


@dataclass(frozen=True)
class Delta:
    """scale * structure(generators), added to the rows [start, stop) of a weight (out, in)."""

    structure: Structure
    generators: Generators
    scale: float
    start: int
    stop: int


@torch.no_grad()
def add_deltas(
    weight: Float[Tensor, "out in"], deltas: Sequence[Delta], dtype: torch.dtype | None = None
) -> Float[Tensor, "out in"]:
    """weight + the deltas on their rows; summed in float32 at least, rounded once. Not differentiable.

    Args:
        dtype: of the result; default is the weight's.
    """
    weight = weight.detach()
    total = torch.empty_like(weight, dtype=weight.dtype if dtype is None else dtype)
    end = 0
    for start, stop in _covered(deltas):
        total[end:start] = weight[end:start]
        rows = total[start:stop]
        inside = [delta for delta in deltas if start <= delta.start < stop]
        if len(inside) == 1:
            dense = inside[0].structure.dense(inside[0].generators)
            torch.add(weight[start:stop], dense, alpha=inside[0].scale, out=rows)
        else:
            rows.copy_(_sum(weight[start:stop], inside, start))
        end = stop
    total[end:] = weight[end:]
    return total


def _sum(weight: Tensor, deltas: Sequence[Delta], first: int, every: int = 1) -> Tensor:
    """Rows of the weight, numbered from `first`, plus several deltas on them; one row in `every`."""
    rows = weight[::every].to(torch.promote_types(weight.dtype, torch.float32), copy=True)
    for delta in deltas:
        start, stop = delta.start - first, delta.stop - first
        skipped = -start % every  # rows of the delta before the first that is looked at
        dense = delta.structure.dense(delta.generators)[skipped::every]
        rows[(start + skipped) // every : -(-stop // every)].add_(dense, alpha=delta.scale)
    return rows


@torch.no_grad()
def lost_in_rounding(weight: Float[Tensor, "out in"], deltas: Sequence[Delta], every: int = 1) -> float:
    """|round(W + D) - W - D| / |D|: the share of the deltas that a weight of low precision swallows; 0 without any.

    Args:
        every: look at one row in so many.
    """
    lost, size = [weight.new_zeros((), dtype=torch.float32)], [weight.new_zeros((), dtype=torch.float32)]
    for start, stop in _covered(deltas):
        rows = weight[start:stop]
        exact = _sum(rows, [delta for delta in deltas if start <= delta.start < stop], start, every)
        lost.append((exact.to(weight.dtype) - exact).norm().float())
        size.append((exact - rows[::every]).norm().float())
    whole = float(torch.stack(size).norm())
    return float(torch.stack(lost).norm()) / whole if whole else 0.0


def _covered(deltas: Sequence[Delta]) -> list[tuple[int, int]]:
    """The rows that carry deltas, as intervals that do not meet."""
    intervals: list[tuple[int, int]] = []
    for start, stop in sorted((d.start, d.stop) for d in deltas):
        if intervals and start < intervals[-1][1]:
            intervals[-1] = (intervals[-1][0], max(stop, intervals[-1][1]))
        else:
            intervals.append((start, stop))
    return intervals


class _StructuredLinear(torch.autograd.Function):
    """Saves x and the leaves only; weight + deltas is built again for grad_x, since memory costs more than adding."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        deltas: Sequence[Delta],
        method: GradMethod,
        *leaves: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, *leaves)
        ctx.deltas, ctx.method = deltas, method
        ctx.bias_dtype = None if bias is None else bias.dtype
        total = _summed(x, weight, _rebound(deltas, leaves))
        return torch.nn.functional.linear(x, total, None if bias is None else bias.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight, *leaves = ctx.saved_tensors
        deltas = _rebound(ctx.deltas, leaves)
        with torch.autocast(x.device.type, enabled=False):
            grad_x = grad_y @ _summed(x, weight, deltas) if ctx.needs_input_grad[0] else None
            x, grad_y = x.reshape(-1, x.shape[-1]), grad_y.reshape(-1, grad_y.shape[-1])
            grad_weight = (grad_y.mT @ x).to(weight.dtype) if ctx.needs_input_grad[1] else None
            grad_bias = grad_y.sum(0).to(ctx.bias_dtype) if ctx.needs_input_grad[2] else None
            grads = _generator_grads(deltas, x, grad_y, ctx.method)
        return grad_x, grad_weight, grad_bias, None, None, *grads


def structured_linear(
    x: Float[Tensor, "*batch in"],
    weight: Float[Tensor, "out in"] | None,
    bias: Float[Tensor, " out"] | None,
    deltas: Sequence[Delta],
    grad: GradMethod = "auto",
) -> Float[Tensor, "*batch out"]:
    """x (weight + deltas)^T + bias; differentiable once, in x, the generators, the weight and the bias.

    Without a weight the deltas are all there is: x deltas^T + bias.

    Under autocast the product runs in the autocast type, also when backward runs outside the autocast block. Costs one
    product forward and one back, as the frozen layer does, plus the generators' own gradients.
    """
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    leaves = [value for delta in deltas for value in delta.generators.values()]
    with torch.autocast(device, enabled=False):
        return _StructuredLinear.apply(x.to(dtype), weight, bias, tuple(deltas), grad, *leaves)


def _summed(x: Tensor, weight: Tensor | None, deltas: Sequence[Delta]) -> Tensor:
    """weight + deltas in the type of x."""
    if weight is None:
        weight = x.new_zeros(max(delta.stop for delta in deltas), x.shape[-1])
    return add_deltas(weight, deltas, x.dtype)


def _rebound(deltas: Sequence[Delta], leaves: Sequence[Tensor]) -> list[Delta]:
    """The deltas with the saved tensors as their generators, in the order structured_linear flattened them."""
    values = iter(leaves)
    return [Delta(d.structure, {name: next(values) for name in d.generators}, d.scale, d.start, d.stop) for d in deltas]


def _generator_grads(
    deltas: Sequence[Delta], x: Float[Tensor, "tokens in"], grad_y: Float[Tensor, "tokens out"], method: GradMethod
) -> list[Tensor]:
    """Gradients of all generators, in the deltas' order; members of one structure share the work on x."""
    found: dict[int, Generators] = {}
    for members in _by_structure(deltas):
        structure = deltas[members[0]].structure
        rows = [grad_y[:, deltas[i].start : deltas[i].stop] for i in members]
        generators = [deltas[i].generators for i in members]
        if method == "gemm" or (method == "auto" and structure.by_fft and x.device.type == "cuda"):
            grads = Structure.generator_grads(structure, generators, x, rows)
        else:
            grads = structure.generator_grads(generators, x, rows)
        for i, grad in zip(members, grads, strict=True):
            found[i] = grad
    return [delta.scale * found[i][name] for i, delta in enumerate(deltas) for name in delta.generators]


def _by_structure(deltas: Sequence[Delta]) -> list[list[int]]:
    """Positions of the deltas, those of equal structure together."""
    groups: list[list[int]] = []
    for i, delta in enumerate(deltas):
        for group in groups:
            if deltas[group[0]].structure == delta.structure:
                group.append(i)
                break
        else:
            groups.append([i])
    return groups
