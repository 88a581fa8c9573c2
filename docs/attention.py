"""Seconds of the encoder's attention, forward and with gradients: in groups of heads, at once, and fused by torch.

python docs/attention.py        on the CPU; the shapes are those of a ViT-B at 512 pixels
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor

from surm_seg.backbones.sam_encoder import attend, fused

ROUNDS = 9
HEADS, CHANNELS = 12, 64
SHAPES = {"global block": (1, 1024, 64), "whole windows": (4, 196, 28), "edge windows": (2, 56, 29)}
"""Windows, tokens and channels that carry relative positions."""


def at_once(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """All weights of all heads, kept for the way back."""
    return (q @ k.mT).softmax(-1, dtype=q.dtype) @ v


def seconds(form: Callable[[Tensor, Tensor, Tensor], Tensor], inputs: list[Tensor]) -> tuple[float, float]:
    """Forward alone, and forward with gradients."""
    begun = time.perf_counter()
    output = form(*inputs)
    forward = time.perf_counter()
    torch.autograd.grad(output.sum(), inputs)
    return forward - begun, time.perf_counter() - begun


def main() -> None:
    forms = {"groups of heads": attend, "at once": at_once, "fused": fused}
    print(f"milliseconds, forward / with gradients, {torch.get_num_threads()} threads, torch {torch.__version__}")
    for dtype in (torch.float32, torch.bfloat16):
        for name, (windows, tokens, positions) in SHAPES.items():
            torch.manual_seed(0)
            channels = (CHANNELS + positions, CHANNELS + positions, CHANNELS)
            inputs = [torch.randn(windows, HEADS, tokens, c).div(8).to(dtype).requires_grad_() for c in channels]
            times: dict[str, list[tuple[float, float]]] = {form: [] for form in forms}
            for _ in range(ROUNDS + 1):  # interleaved; the first round does not count
                for form, call in forms.items():
                    times[form].append(seconds(call, inputs))
            found = [
                f"{form} {' / '.join(f'{1000 * median(part):.1f}' for part in zip(*measured[1:], strict=True))}"
                for form, measured in times.items()
            ]
            print(f"{str(dtype)[6:]:8} {name:13} " + "; ".join(found))


if __name__ == "__main__":
    main()
