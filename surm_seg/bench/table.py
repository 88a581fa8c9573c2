"""Benchmark results as tables that are plain text and Markdown at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

NONE = "–"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, aligned for reading as it is."""
    widths = [max(len(line[i]) for line in (header, *rows)) for i in range(len(header))]
    ruled = [header, ["-" * width for width in widths], *rows]
    return "\n".join(
        f"| {' | '.join(word.ljust(width) for word, width in zip(line, widths, strict=True))} |" for line in ruled
    )


def cell_table(cell: Mapping[str, Any]) -> str:
    """One cell of kernel.json."""
    header = ["variant", "adapts", "trainable", "wall time (IQR)", "CPU time", "peak memory", "floor"]
    rows = [
        [v["label"], v["adapts"], _count(v), _wall(v), *_numbers(v, "cpu_ratio", "peak_ratio", "floor")]
        for v in cell["variants"]
    ]
    title = f"{_layer(cell)}, {cell['tokens']} tokens, {cell['rounds']} rounds"
    return "\n\n".join([f"\n{title}", table(header, rows), *_notes(cell)])


def markdown(results: Mapping[str, Any]) -> str:
    """All of kernel.json as a dated document: a table per layer, with the token counts side by side."""
    where = results["environment"]
    versions = ", ".join(f"{name} {where['versions'][name]}" for name in ("torch", "peft"))
    lines = [
        f"Measured on {where['time'][:10]}: {where['processor']}, {where['threads']} threads of torch, {versions}.",
        "Forward and backward of one layer relative to the frozen `nn.Linear` (rows called forward: forward alone): "
        "wall time (distance between the quartiles over the rounds) / CPU time / peak memory. "
        "Floor: operations, without those that do not grow with the tokens.",
    ]
    for title, group in groupby(results["cells"], _layer):
        cells = list(group)
        header = ["variant", "adapts", "trainable", "floor", *(f"{cell['tokens']} tokens" for cell in cells)]
        rows = [
            [v["label"], v["adapts"], _count(v), *_numbers(v, "floor"), *(_figures(cell, v["label"]) for cell in cells)]
            for v in cells[0]["variants"]
        ]
        lines += [f"### {title}", table(header, rows), *_notes(cells[0])]
    return "\n\n".join(lines)


def _layer(cell: Mapping[str, Any]) -> str:
    fused = cell["layout"] == "fused"
    width = cell["width"]
    return f"{cell['layout']} {width} -> {3 * width if fused else width}, {cell['dtype']}"


def _figures(cell: Mapping[str, Any], label: str) -> str:
    variant = next(v for v in cell["variants"] if v["label"] == label)
    return NONE if variant["refused"] else " / ".join([_wall(variant), *_numbers(variant, "cpu_ratio", "peak_ratio")])


def _notes(cell: Mapping[str, Any]) -> list[str]:
    refused = [f"{v['label']} cannot be measured: {v['refused']}" for v in cell["variants"] if v["refused"]]
    lost = ", ".join(f"{share:.2f} at std {std}" for std, share in cell["rounding"].items())
    rounding = f"Circulant delta lost in {cell['dtype']}, |round(W + D) - W - D| / |D|, W of std 0.02: {lost}."
    return [*refused, *([rounding] if lost else [])]


def _count(variant: Mapping[str, Any]) -> str:
    return NONE if variant["refused"] else f"{variant['parameters']:,}"


def _wall(variant: Mapping[str, Any]) -> str:
    return NONE if variant["refused"] else f"{variant['wall_ratio']:.2f} ({variant['wall_spread']:.2f})"


def _numbers(variant: Mapping[str, Any], *names: str) -> list[str]:
    values = [variant.get(name) for name in names]
    return [NONE if value is None else f"{value:.2f}" for value in values]
