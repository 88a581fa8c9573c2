"""What `bench kernel` compares: our layers, PEFT's, and plain ways to write the same."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import peft
import torch
from peft import C3AConfig, FourierFTConfig, GraloraConfig, LoKrConfig, LoraConfig, OFTConfig
from torch import Tensor, nn

from surm_seg import SurmConfig
from surm_seg.bench.cell import (
    OFT_BLOCK,
    Cell,
    c3a_flops,
    lora_flops,
    oft_flops,
    second_product_flops,
    spectral_flops,
    structure_flops,
    weight_gradient_flops,
)
from surm_seg.kernel import GradMethod, structured_linear
from surm_seg.structures import make, names

DROPOUT = 0.1
SAMED_RANK = 4  # of each of SAMed's two branches
VALUES_STD = 0.1  # of all trainable values: deltas come out as large as the weight, so that an error in them shows

SETTINGS: dict[str, list[dict[str, Any]]] = {"low_rank": [{"rank": 8}], "displacement": [{"rank": 2}, {"rank": 4}]}
"""Options of the structures that are not measured with their defaults."""


@dataclass(frozen=True)
class Layer:
    """An adapted layer, ready to be measured.

    Args:
        delta: what it adds to the weight (out, in), differentiable; None where only the layer itself knows.
        flops: operations per token beyond the frozen layer's, None where there is no simple formula.
        dropout: of the delta's input.
    """

    module: nn.Module
    delta: Callable[[], Tensor] | None = None
    flops: float | None = 0
    dropout: float = 0

    @property
    def trainable(self) -> dict[str, nn.Parameter]:
        return {name: value for name, value in self.module.named_parameters() if value.requires_grad}


@dataclass(frozen=True)
class Variant:
    """A row of the table.

    Args:
        method: what --methods calls it.
        adapts: the part of the layer it changes.
        build: the layer around a frozen linear one, with random trainable values.
        foreign: not ours: what it raises is a refusal, and no failure of the benchmark.
        forward_only: measured without gradients, against the frozen layer's forward alone.
    """

    label: str
    method: str
    adapts: str
    build: Callable[[Cell, nn.Linear], Layer]
    foreign: bool = False
    forward_only: bool = False


def variants(cell: Cell, methods: Sequence[str], grads: Sequence[GradMethod]) -> Iterator[Variant]:
    """The frozen layer, then all that `methods` (default: everything) names and the layout has."""
    for variant in _all_variants(cell, grads):
        if not methods or variant.method in methods or variant.method == "frozen":
            yield variant


def known_methods() -> list[str]:
    """What --methods may name, in the order of the table."""
    cell = Cell("fused", 1, 1, "float32")
    return list(dict.fromkeys(variant.method for variant in _all_variants(cell, ["auto"])))


def _all_variants(cell: Cell, grads: Sequence[GradMethod]) -> Iterator[Variant]:
    sliced, whole = ("q, v", "whole") if cell.layout == "fused" else ("all", "all")
    yield Variant("frozen nn.Linear", "frozen", "–", lambda _, linear: Layer(linear))
    for name in names():
        for options in SETTINGS.get(name, [{}]):
            for grad in grads:
                words = [name, *(f"{key}={value}" for key, value in options.items())]
                label = " ".join(words if grad == "auto" else [*words, f"({grad})"])
                yield Variant(label, name, sliced, _structured(name, options, grad))
    yield Variant(f"circulant dropout={DROPOUT}", "circulant_dropout", sliced, _with_dropout)
    yield Variant("circulant, FFT per token, autograd", "fft_per_token", sliced, _fft_per_token)
    yield Variant("circulant, dense delta, autograd", "dense_autograd", sliced, _dense_autograd)
    if cell.layout == "fused":
        yield Variant(f"LoRA r={SAMED_RANK} as SAMed", "lora_samed", sliced, _lora_as_samed)
    for method, (label, config, flops) in PEFT.items():
        yield Variant(label, method, whole, _from_peft(config, flops), foreign=True)
    yield Variant("frozen nn.Linear, forward", "frozen", "–", lambda _, linear: Layer(linear), forward_only=True)
    yield Variant("circulant merged, forward", "merged", sliced, _merged, forward_only=True)


PEFT: dict[str, tuple[str, Callable[[Cell], Any], Callable[[Cell], float]]] = {
    "peft_lora": (
        "PEFT LoRA r=8",
        lambda _: LoraConfig(r=8, target_modules=["linear"]),
        lambda cell: lora_flops(8, cell.width, cell.out_features),
    ),
    "peft_c3a": (
        "PEFT C3A",
        lambda cell: C3AConfig(block_size=cell.width, target_modules=["linear"]),
        c3a_flops,
    ),
    "peft_lokr": ("PEFT LoKr r=8", lambda _: LoKrConfig(r=8, target_modules=["linear"]), second_product_flops),
    "peft_oft": (
        f"PEFT OFT b={OFT_BLOCK}",
        lambda _: OFTConfig(r=0, oft_block_size=OFT_BLOCK, target_modules=["linear"]),
        oft_flops,
    ),
    "peft_fourierft": (
        "PEFT FourierFT 1000",
        lambda _: FourierFTConfig(n_frequency=1000, target_modules=["linear"]),
        second_product_flops,
    ),
    "peft_gralora": (
        "PEFT GraLoRA r=8",
        lambda _: GraloraConfig(r=8, target_modules=["linear"]),
        lambda cell: lora_flops(8, cell.width, cell.out_features),  # block by block what LoRA does at once
    ),
}
"""Method -> label, PEFT configuration of a model whose one layer is called `linear`, operations per token."""


def _adapted(linear: nn.Linear, config: Any) -> Any:
    """The layer that PEFT puts in the place of a linear one, with random trainable values."""
    model = peft.get_peft_model(nn.ModuleDict({"linear": linear}), config)
    return _drawn(model.base_model.model["linear"])  # pyright: ignore[reportIndexIssue, reportCallIssue, reportArgumentType]


def _drawn(module: Any) -> Any:
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=VALUES_STD)
    return module


def _placed(cell: Cell, blocks: Sequence[Tensor]) -> Tensor:
    """Blocks on their rows of a matrix (out, in), 0 elsewhere; differentiable."""
    if cell.layout == "square":
        return blocks[0]
    q, v = blocks
    return torch.cat([q, torch.zeros_like(q), v])


def _structured(
    name: str, options: dict[str, Any], grad: GradMethod = "auto", dropout: float = 0
) -> Callable[[Cell, nn.Linear], Layer]:
    def build(cell: Cell, linear: nn.Linear) -> Layer:
        parts = ["q", "v"] if cell.layout == "fused" else None
        config = SurmConfig(structure=name, options=options, target_modules=["linear"], parts=parts, dropout=dropout)
        layer = _adapted(linear, config)
        structure = make(name, cell.width, cell.width, **options)
        used = "gemm" if grad == "auto" and linear.weight.is_cuda else grad
        return Layer(
            layer if grad == "auto" else _Forced(layer, grad),
            lambda: _placed(cell, [delta.structure.dense(delta.generators) for delta in layer.deltas()]),
            structure_flops(structure, len(cell.spans), used),
            dropout,
        )

    return build


class _Forced(nn.Module):
    """Our layer with a chosen way to make the generators' gradients."""

    def __init__(self, layer: Any, grad: GradMethod) -> None:
        super().__init__()
        self.layer = layer
        self.grad: GradMethod = grad

    def forward(self, x: Tensor) -> Tensor:
        base = self.layer.base_layer
        return structured_linear(x, base.weight, base.bias, self.layer.deltas(), self.grad)


def _with_dropout(cell: Cell, linear: nn.Linear) -> Layer:
    layer = _structured("circulant", {}, dropout=DROPOUT)(cell, linear)
    return Layer(layer.module, layer.delta, spectral_flops(cell, shared=False), DROPOUT)


def _merged(cell: Cell, linear: nn.Linear) -> Layer:
    """Merged in place, as an adapter that can still be taken off; merge_and_unload leaves a plain nn.Linear."""
    layer = _structured("circulant", {})(cell, copy.deepcopy(linear))
    layer.module.eval()
    layer.module.merge()  # pyright: ignore[reportCallIssue]
    return Layer(layer.module, layer.delta)


def _added(cell: Cell, y: Tensor, branches: Iterable[Tensor]) -> Tensor:
    """y plus the outputs of branches: on a fused projection in place, as SAMed does."""
    if cell.layout == "square":
        return y + next(iter(branches)).to(y.dtype)
    for (start, stop), branch in zip(cell.spans, branches, strict=True):
        y[..., start:stop] += branch.to(y.dtype)
    return y


def _circulants(cell: Cell, columns: Sequence[Tensor]) -> Tensor:
    """The delta (out, in) of first columns (1, 1, width), by the structure's own `dense`."""
    structure = make("circulant", cell.width, cell.width)
    return _placed(cell, [structure.dense({"c": c}) for c in columns])


class _PlainCirculant(nn.Module):
    """Circulant deltas as one writes them without a backward of one's own."""

    def __init__(self, cell: Cell, linear: nn.Linear) -> None:
        super().__init__()
        self.cell, self.linear = cell, linear
        shape = (1, 1, cell.width)
        self.c = nn.ParameterList(torch.zeros(shape, device=linear.weight.device) for _ in cell.spans)

    def delta(self) -> Tensor:
        return _circulants(self.cell, list(self.c))


class _FFTPerToken(_PlainCirculant):
    def forward(self, x: Tensor) -> Tensor:
        spectrum = torch.fft.rfft(x.float())
        branches = (torch.fft.irfft(spectrum * torch.fft.rfft(c.flatten()), n=self.cell.width) for c in self.c)
        return _added(self.cell, self.linear(x), branches)


class _DenseAutograd(_PlainCirculant):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, (self.linear.weight + self.delta()).to(x.dtype), self.linear.bias)


def _fft_per_token(cell: Cell, linear: nn.Linear) -> Layer:
    module = _drawn(_FFTPerToken(cell, linear))
    return Layer(module, module.delta, spectral_flops(cell, shared=True))


def _dense_autograd(cell: Cell, linear: nn.Linear) -> Layer:
    module = _drawn(_DenseAutograd(cell, linear))
    return Layer(module, module.delta, weight_gradient_flops(cell))


class _SamedLora(nn.Module):
    """Two low-rank branches whose outputs are added into the slices q and v of the fused projection's output."""

    def __init__(self, cell: Cell, linear: nn.Linear) -> None:
        super().__init__()
        self.cell, self.linear = cell, linear
        device, n = linear.weight.device, cell.width
        self.A = nn.ParameterList(torch.zeros(SAMED_RANK, n, device=device) for _ in cell.spans)
        self.B = nn.ParameterList(torch.zeros(n, SAMED_RANK, device=device) for _ in cell.spans)

    def forward(self, x: Tensor) -> Tensor:
        factors = zip(self.A, self.B, strict=True)
        branches = (nn.functional.linear(nn.functional.linear(x.to(A.dtype), A), B) for A, B in factors)
        return _added(self.cell, self.linear(x), branches)

    def delta(self) -> Tensor:
        return _placed(self.cell, [B @ A for A, B in zip(self.A, self.B, strict=True)])


def _lora_as_samed(cell: Cell, linear: nn.Linear) -> Layer:
    module = _drawn(_SamedLora(cell, linear))
    return Layer(module, module.delta, len(cell.spans) * lora_flops(SAMED_RANK, cell.width, cell.width))


def _from_peft(config: Callable[[Cell], Any], flops: Callable[[Cell], float]) -> Callable[[Cell, nn.Linear], Layer]:
    def build(cell: Cell, linear: nn.Linear) -> Layer:
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)  # with one, PEFT replaces a setting that does not fit
            return Layer(_adapted(linear, config(cell)), flops=flops(cell))

    return build
