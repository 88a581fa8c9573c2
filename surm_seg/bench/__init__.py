"""`surm-seg bench NAME`: how fast and how large things are, as ratios measured side by side in one run."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from dataclasses import fields

from surm_seg import cli

BENCHMARKS = {
    "kernel": (
        "surm_seg.bench.kernel",
        "one adapted layer against the frozen one, for every structure and PEFT method",
    ),
    "step": ("surm_seg.bench.step", "training step, forward and prediction of SAM against its own modules as SAMed"),
    "data": ("surm_seg.bench.data", "making training slices, alone and beside the model that takes them"),
    "engine": ("surm_seg.bench.engine", "a training by the shared engine against a bare loop of torch"),
    "metrics": ("surm_seg.bench.metrics", "Dice, HD95 and NSD of eight organs against medpy's and MONAI's"),
    "prepare": ("surm_seg.bench.prepare", "preparing CT volumes against MONAI's transforms"),
}
"""Name -> the module with its `Config` and `run(config) -> exit status`, and what it measures."""

DEFAULT = "kernel"
"""Whose options are meant where no name comes first."""


def main(argv: Sequence[str] | None = None) -> int:
    name, *options = list(sys.argv[1:] if argv is None else argv) or [""]
    if name.startswith("-"):
        name, options = DEFAULT, [name, *options]
    wanted_help = "--help" in options or "-h" in options
    if wanted_help or name not in BENCHMARKS:
        lines = ["usage: surm-seg bench NAME [options]", ""]
        lines += [f"  {known:<10} {text}" for known, (_, text) in BENCHMARKS.items()]
        print("\n".join([*lines, ""]), file=sys.stdout if wanted_help else sys.stderr)
    if name not in BENCHMARKS:
        return 2
    benchmark = importlib.import_module(BENCHMARKS[name][0])
    lists = {field.name for field in fields(benchmark.Config) if str(field.type).startswith("list[")}
    config = cli.parse(f"bench {name}", benchmark.Config, _gathered(options, lists))
    return cli.run(lambda: benchmark.run(config), debug=config.debug)


def _gathered(arguments: Sequence[str], lists: set[str]) -> list[str]:
    """Options that are lists take all bare words after them: --width 192 768 = --width=[192,768]."""
    result: list[str] = []
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        name, equals, value = word.partition("=")
        if word.startswith("--") and name[2:].replace("-", "_") in lists:
            values = [value] if equals else []
            while rest and not rest[0].startswith("--"):
                values.append(rest.pop(0))
            joined = ",".join(values)
            word = f"{name}={joined if joined.startswith('[') else f'[{joined}]'}"
        result.append(word)
    return result
