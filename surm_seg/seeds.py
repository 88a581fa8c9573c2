"""Several seeds of one training: what their scores come to."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from surm_seg.errors import Corrupt
from surm_seg.volume import replacing

SCHEMA = "surm-seg/seeds-1"


def over_seeds(folder: Path, runs: Mapping[int, Path]) -> dict[str, Any]:
    """Write seeds.csv, the mean of every metric for each seed and organ, and seeds.json, their mean and SD over seeds.

    Args:
        folder: where to.
        runs: seed -> run folder with scores/summary.json.

    Returns:
        The content of seeds.json: as a summary.json is, with statistics over seeds in the place of those over cases.

    Raises:
        Corrupt: the scores of a run are absent or damaged.
    """
    summaries = {seed: _summary(run) for seed, run in runs.items()}
    protocols = {
        protocol: {
            "overall": _statistics([one["protocols"][protocol]["overall"] for one in summaries.values()]),
            "organs": {
                organ: _statistics([one["protocols"][protocol]["organs"][organ] for one in summaries.values()])
                for organ in content["organs"]
            },
        }
        for protocol, content in next(iter(summaries.values()))["protocols"].items()
    }
    result = {"schema": SCHEMA, "seeds": list(runs), "protocols": protocols}
    for name, text in (("seeds.csv", _table(summaries)), ("seeds.json", json.dumps(result, indent=2) + "\n")):
        with replacing(folder / name) as file:
            file.write(text.encode())
    return result


def _summary(run: Path) -> dict[str, Any]:
    path = run / "scores" / "summary.json"
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise Corrupt("scores-unreadable", f"{path} is missing or damaged; score {run} again.") from error


def _statistics(seeds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean and sample SD over seeds of each metric's mean; missed and absent organs are added up."""
    result: dict[str, Any] = {}
    for name, first in seeds[0].items():
        if isinstance(first, int):
            result[name] = sum(seed[name] for seed in seeds)
            continue
        means = [seed[name]["mean"] for seed in seeds if seed[name]["mean"] is not None]
        result[name] = {
            "mean": float(np.mean(means)) if means else None,
            "sd": float(np.std(means, ddof=1)) if len(means) > 1 else None,
            "n": len(means),
        }
    return result


def _table(summaries: Mapping[int, Mapping[str, Any]]) -> str:
    """A line per seed, protocol and organ, and one for the mean over cases; an empty cell is undefined."""
    lines = []
    for seed, summary in summaries.items():
        for protocol, content in summary["protocols"].items():
            for organ, metrics in {**content["organs"], "overall": content["overall"]}.items():
                means = {name: value["mean"] for name, value in metrics.items() if isinstance(value, dict)}
                lines.append({"seed": seed, "protocol": protocol, "organ": organ, **means})
    table = io.StringIO()
    writer = csv.DictWriter(table, dict.fromkeys(name for line in lines for name in line), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return table.getvalue()
