"""One task done in several ways: the results are compared before any time is believed."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from surm_seg import cli
from surm_seg.bench.meter import Step, Times, interleaved, no_collection
from surm_seg.bench.table import NONE, table
from surm_seg.volume import replacing


@dataclass(frozen=True)
class Method:
    """A row of the table.

    Args:
        what: it computes, in words.
        compute: the task itself.
        processes: that share the work; the times of processors are known for one only.
        slow: measured once, while the others are measured in every round.
    """

    label: str
    what: str
    compute: Callable[[], Any]
    processes: int = 1
    slow: bool = False


def measured(
    methods: Sequence[Method],
    check: Callable[[Mapping[str, Any]], object],
    rounds: int,
    seed: int,
    reporter: cli.Reporter,
) -> list[dict[str, Any]]:
    """Rows with the seconds of each round, and the ratio of the medians to the first method's.

    The slow methods are spread over the rounds.

    Args:
        check: gets the results of a round by label, the first method's among them; raises SurmError.
    """
    times, slow = {method.label: Times() for method in methods}, [method for method in methods if method.slow]
    for number in reporter.track(range(rounds), "measuring", rounds):
        results: dict[str, Any] = {}
        chosen = [*(method for method in methods if not method.slow), *slow[number::rounds]]
        steps = {method.label: _kept(method, results) for method in chosen}
        with no_collection():
            for label, once in interleaved(steps, "cpu", 1, seed + number).items():
                times[label].wall += once.wall
                times[label].cpu += once.cpu
        check(results)
    base = median(times[methods[0].label].wall)
    return [
        {
            "label": method.label,
            "what": method.what,
            "processes": method.processes,
            "wall_s": times[method.label].wall,
            "cpu_s": times[method.label].cpu,
            "ratio": median(times[method.label].wall) / base,
        }
        for method in methods
    ]


def save(results: Mapping[str, Any], folder: Path) -> None:
    """Write every raw figure to `folder`/BENCHMARK.json."""
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / f"{results['benchmark']}.json") as file:
        file.write(json.dumps(results, indent=1, default=str).encode() + b"\n")


def markdown(results: Mapping[str, Any], packages: Sequence[str]) -> str:
    """The rows as a dated table, relative to the first of them."""
    where = results["environment"]
    versions = ", ".join(f"{name} {where['versions'][name]}" for name in packages)
    header = ["", "what", "seconds (least to most)", "processor s", "ratio"]
    rows = [
        [
            row["label"],
            row["what"],
            f"{median(row['wall_s']):.3g} ({min(row['wall_s']):.3g} to {max(row['wall_s']):.3g})",
            f"{median(row['cpu_s']):.3g}" if row["processes"] == 1 else NONE,
            f"{row['ratio']:.3g}",
        ]
        for row in results["rows"]
    ]
    place = f"Measured on {where['time'][:10]}: {where['processor']}, {where['threads']} threads of torch, {versions}."
    return f"{place}\n\n{table(header, rows)}"


def _kept(method: Method, results: dict[str, Any]) -> Step:
    def step() -> None:
        results[method.label] = method.compute()

    return step
