"""`surm-seg bench kernel`: forward and backward of one adapted layer against the frozen one, all in one run."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor, nn

from surm_seg import cli
from surm_seg.bench.cell import Cell, Layout, Precision
from surm_seg.bench.meter import Step, Times, check_meter, environment, interleaved, no_collection, peak_bytes, threads
from surm_seg.bench.table import cell_table, markdown
from surm_seg.bench.variants import Layer, Variant, known_methods, variants
from surm_seg.errors import BadConfig, SurmError
from surm_seg.kernel import Delta, GradMethod, lost_in_rounding
from surm_seg.structures import make
from surm_seg.volume import replacing

FULL = {"width": [192, 768, 1024, 1280], "tokens": [1024, 4096, 16384], "dtype": ["float32", "bfloat16"]}
QUICK = {"width": [768], "tokens": [1024, 4096], "dtype": ["float32"]}

CELL_SECONDS = 20  # for the rounds of a cell, unless that is fewer than the least
LEAST_ROUNDS, MOST_ROUNDS = 3, 50
WEIGHT_STD = 0.02  # of trained transformers' projections
ROUNDED_STDS = (1e-3, 1e-4, 3e-5)  # of deltas that are added to a weight of low precision
CHECKED_TOKENS = 600  # more than two of the kernel's chunks, the last one cut
TOLERANCE = {"float32": 1e-3, "bfloat16": 3e-2}  # |difference| / |expected|; bfloat16 has 8 bits


@dataclass
class Config(cli.Common):
    """Measure one adapted layer: time, memory and arithmetic relative to the frozen nn.Linear.

    Args:
        output: folder for kernel.json, which has every raw figure; default `bench`.
        width: input features; 192 768 1024 1280 by default.
        tokens: rows of x; 1024 4096 16384 by default.
        layout: square, or fused: three times as wide, with deltas on its slices q and v; both by default.
        dtype: of x and the frozen weight; float32 bfloat16 by default. Trainable values are float32.
        methods: rows to measure beside the frozen layer; all by default.
        grad: how our generators get their gradients; auto by default, and on a GPU fft and gemm as well.
        rounds: measurements of each row; by default as many as fit into 20 seconds per cell.
        threads: of torch; one per processor by default.
        quick: width 768, 1024 and 4096 tokens, float32, where these are not given.
        markdown: print one Markdown document at the end instead of a table per cell.
    """

    width: list[int] | None = None
    tokens: list[int] | None = None
    layout: list[Layout] | None = None
    dtype: list[Precision] | None = None
    methods: list[str] | None = None
    grad: list[GradMethod] | None = None
    rounds: int | None = None
    threads: int | None = None
    quick: bool = False
    markdown: bool = False


def run(config: Config) -> int:
    """Measure every cell; kernel.json is written anew after each."""
    cells = _cells(config)
    device = cli.device_named(config.device)
    output = config.output or Path("bench")
    reporter = cli.Reporter(config.quiet)
    reporter.console.stderr = config.markdown  # standard output is the document's
    if config.dry_run:
        reporter.say("\n".join(f"would measure {cell} on {device}" for cell in cells))
        return 0
    output.mkdir(parents=True, exist_ok=True)
    with threads(config.threads):
        check_meter(device)
        where = environment(device)
        results: dict[str, Any] = {"benchmark": "kernel", "options": asdict(config), "environment": where, "cells": []}
        for cell in reporter.track(cells, "measuring", len(cells)):
            with no_collection():
                results["cells"].append(measured(cell, config, device))
            with replacing(output / "kernel.json") as file:
                file.write(json.dumps(results, indent=1, default=str).encode() + b"\n")
            if not config.markdown:
                reporter.say(cell_table(results["cells"][-1]))
    if config.markdown:
        print(markdown(results))
    reporter.say(f"{len(cells)} cells measured; every figure is in {output / 'kernel.json'}")
    return 0


def measured(cell: Cell, config: Config, device: str) -> dict[str, Any]:
    """A cell of kernel.json; raises SurmError where one of our layers computes something wrong."""
    torch.manual_seed(config.seed)
    linear = nn.Linear(cell.width, cell.out_features, device=device, dtype=getattr(torch, cell.dtype))
    linear.requires_grad_(False)
    for parameter in linear.parameters():
        parameter.normal_(std=WEIGHT_STD)
    x = torch.randn(1, cell.tokens, cell.width, device=device, dtype=linear.weight.dtype, requires_grad=True)
    grad_y = torch.randn(1, cell.tokens, cell.out_features, device=device, dtype=linear.weight.dtype)
    rows: dict[str, dict[str, Any]] = {}
    steps: dict[str, Step] = {}
    for variant in variants(cell, config.methods or [], config.grad or _grads(device)):
        row = rows[variant.label] = _row(variant)
        try:
            layer = variant.build(cell, linear)
            _check(variant, layer, linear, cell, x, grad_y)
            step = _step(layer, x, grad_y, variant.forward_only)
            row["peak_bytes"] = peak_bytes(step, device)
        except Exception as error:
            if not (variant.foreign or isinstance(error, BadConfig)):
                raise
            row["refused"] = f"{type(error).__name__}: {error}".splitlines()[0]
            continue
        steps[variant.label] = step
        row["parameters"] = 0 if variant.forward_only else sum(p.numel() for p in layer.trainable.values())
        row["floor"] = None if layer.flops is None else 1 + layer.flops / cell.frozen_flops
    warm_up = interleaved(steps, device, 1, config.seed)
    rounds = config.rounds or _affordable(warm_up)
    for label, times in interleaved(steps, device, rounds, config.seed).items():
        rows[label] |= {"wall_s": times.wall, "cpu_s": times.cpu}
    for row in rows.values():
        if row["refused"] is None:
            row |= _ratios(row, rows[row["baseline"]])
    return {**asdict(cell), "rounds": rounds, "rounding": _rounding(cell, linear), "variants": list(rows.values())}


def _cells(config: Config) -> list[Cell]:
    """What the options ask for; raises BadConfig."""
    for name in ("width", "tokens", "rounds", "threads"):
        value = getattr(config, name)
        least = 2 if name in ("width", "rounds") else 1
        if any(
            number < least for number in (value if isinstance(value, list) else [least if value is None else value])
        ):
            raise BadConfig("bench-option", f"--{name} must be {least} or more.")
    unknown = sorted(set(config.methods or []) - set(known_methods()))
    if unknown:
        raise BadConfig(
            "bench-method", f"--methods: {', '.join(unknown)} is unknown; choose among {', '.join(known_methods())}."
        )
    defaults = QUICK if config.quick else FULL
    axes = (
        config.layout or ["fused", "square"],
        config.width or defaults["width"],
        config.dtype or defaults["dtype"],
        config.tokens or defaults["tokens"],
    )
    return [Cell(layout, width, tokens, dtype) for layout, width, dtype, tokens in product(*axes)]


def _grads(device: str) -> Sequence[GradMethod]:
    return ("auto", "fft", "gemm") if device.startswith("cuda") else ("auto",)


def _row(variant: Variant) -> dict[str, Any]:
    return {
        "label": variant.label,
        "method": variant.method,
        "adapts": variant.adapts,
        "baseline": "frozen nn.Linear, forward" if variant.forward_only else "frozen nn.Linear",
        "refused": None,
    }


def _step(layer: Layer, x: Tensor, grad_y: Tensor, forward_only: bool) -> Callable[[], list[Tensor]]:
    """Forward and backward; the output, the gradient of x and those of the layer are alive together at its end."""
    values = list(layer.trainable.values())
    leaves = [x, *values]

    def forward() -> list[Tensor]:
        with torch.no_grad():
            return [layer.module(x)]

    def both() -> list[Tensor]:
        with torch.no_grad():
            for value in values:
                value.add_(0)  # changed, as by an optimiser: nothing that depends on values may be kept
        y = layer.module(x)
        return [y, *torch.autograd.grad(y, leaves, grad_y)]

    return forward if forward_only else both


def _check(variant: Variant, layer: Layer, linear: nn.Linear, cell: Cell, x: Tensor, grad_y: Tensor) -> None:
    """Run once, on a few tokens, and compare with the dense delta and plain autograd where the delta is known.

    Raises:
        SurmError: the layer is wrong; timing it would be worthless.
    """
    x, grad_y = x.detach()[:, :CHECKED_TOKENS].requires_grad_(), grad_y[:, :CHECKED_TOKENS]
    torch.manual_seed(0)
    found = _step(layer, x, grad_y, variant.forward_only)()
    if layer.delta is None:
        return
    weight, bias, leaves = linear.weight.float(), linear.bias.float(), layer.trainable
    if variant.forward_only:
        merged = (weight + layer.delta()).detach().to(x.dtype)
        same = torch.equal(found[0], nn.functional.linear(x, merged, linear.bias))
        errors = {"output": 0.0 if same else 1.0}
    else:
        torch.manual_seed(0)  # the same inputs are dropped again
        kept = nn.functional.dropout(torch.ones_like(x), layer.dropout).float()
        wide = x.detach().float().requires_grad_()
        y = nn.functional.linear(wide, weight, bias) + nn.functional.linear(wide * kept, layer.delta())
        expected = [y, *torch.autograd.grad(y, [wide, *leaves.values()], grad_y.float())]
        pairs = zip(["output", "gradient of x", *leaves], found, expected, strict=True)
        errors = {name: float(((a.float() - b).norm() / b.norm()).detach()) for name, a, b in pairs}
    for name, error in errors.items():
        if not error <= TOLERANCE[cell.dtype]:
            raise SurmError(
                "bench-wrong",
                f"{variant.label} on {cell}: {name} differs from the dense computation by {error:.1e} of its size; "
                "mend the layer before timing it.",
            )


def _affordable(warm_up: Mapping[str, Times]) -> int:
    """Rounds that fit into CELL_SECONDS."""
    seconds = sum(times.wall[0] for times in warm_up.values())
    return min(max(int(CELL_SECONDS / seconds), LEAST_ROUNDS), MOST_ROUNDS)


def _ratios(row: Mapping[str, Any], baseline: Mapping[str, Any]) -> dict[str, float]:
    """Medians relative to the baseline's; spread: between the quartiles of the ratios within each round."""
    paired = [ours / theirs for ours, theirs in zip(row["wall_s"], baseline["wall_s"], strict=True)]
    low, _, high = quantiles(paired, n=4, method="inclusive")
    return {
        "wall_ratio": median(row["wall_s"]) / median(baseline["wall_s"]),
        "wall_spread": high - low,
        "cpu_ratio": median(row["cpu_s"]) / median(baseline["cpu_s"]),
        "peak_ratio": row["peak_bytes"] / baseline["peak_bytes"],
    }


def _rounding(cell: Cell, linear: nn.Linear) -> dict[str, float]:
    """Std of a circulant delta -> |round(W + D) - W - D| / |D|: what a weight of low precision swallows of it."""
    if cell.dtype == "float32":
        return {}
    structure = make("circulant", cell.width, cell.width)
    result = {}
    for std in ROUNDED_STDS:
        c = std * torch.randn(structure.generators["c"], device=linear.weight.device)
        delta = Delta(structure, {"c": c}, 1.0, 0, cell.width)
        result[f"{std:g}"] = lost_in_rounding(linear.weight[: cell.width], [delta])
    return result
