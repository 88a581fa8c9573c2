"""Trainings that are compared, each at its best learning rate: what `surm-seg sweep` and some studies are made of.

The rate of an arm is chosen on the validation set with seed 0; the test set is then read at that rate, over all seeds.
Methods differ in their best rates by orders of magnitude, and a search that ends short of one would be a verdict on the
search: while an arm's best rate is the lowest or highest that it was tried at, it is tried beyond it.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.supervised import summary_of
from surm_seg.cells import Cell, Done, Train, carried_out, digest
from surm_seg.errors import BadInput

SEED = "{seed}"


@dataclass(frozen=True)
class Comparison:
    """What is run.

    Args:
        arms: name, as a part of a folder's name -> the options of `surm-seg train` that no other arm has; SEED in them
            stands for the seed.
        rates: learning rates that every arm is tried at, rising.
        beyond: more rates that an arm may be tried at, each as far beyond the edge as the edge is from its neighbour.
        seeds: 0, 1, ... at the best rate.
        jobs: runs at once.
        folder: of the runs; a finished one is not repeated.
        words: options of `surm-seg train` that all runs share.
    """

    arms: Mapping[str, Sequence[str]]
    rates: Sequence[float]
    seeds: int
    jobs: int
    folder: Path
    words: Sequence[str]
    beyond: int = 3

    def cell(self, arm: str, rate: float, seed: int) -> Cell:
        own = (word.replace(SEED, str(seed)) for word in self.arms[arm])
        words = (*self.words, *own, "--learning_rate", repr(rate), "--seed", str(seed))
        return Cell(f"{arm}-{rate:g}-seed{seed}-{digest(words)}", words)

    @property
    def fewest(self) -> int:
        """Number of runs where none fails and no best rate is at an edge."""
        return len(self.arms) * (len(self.rates) + self.seeds - 1)

    def further(self, tried: Sequence[float], best: float) -> float | None:
        """The next rate for an arm, after these; None where its best one is no edge, or enough were tried."""
        rates = sorted(tried)
        if len(self.rates) < 2 or len(rates) >= len(self.rates) + self.beyond or best not in (rates[0], rates[-1]):
            return None
        edge, neighbour = rates[:2] if best == rates[0] else rates[:-3:-1]
        return float(f"{edge * edge / neighbour:.3g}")


@dataclass(frozen=True)
class Selected:
    """An arm at its best learning rate.

    Args:
        at_the_edge: whether that rate is the lowest or highest that was tried, so that a better one may lie beyond.
        validation: what each rate came to, of those that finished with a finite score.
        runs: of all seeds that finished, at the best rate.
        score: name of the metric that stands for the others.
        metrics: of the test set, by seed.
        parameters: trained ones, of `surm_seg.methods.Parameters`.
        options: of the method.
    """

    arm: str
    rate: float
    at_the_edge: bool
    validation: Mapping[float, float]
    runs: Mapping[int, Done]
    score: str
    metrics: Mapping[int, Mapping[str, float]]
    parameters: Mapping[str, int]
    options: Mapping[str, Any]

    @property
    def scores(self) -> list[float]:
        """Of the test set, a value for each seed."""
        return [metrics[self.score] for metrics in self.metrics.values()]

    @property
    def shown_rate(self) -> str:
        """For a table."""
        return f"{self.rate:g}{' (edge)' if self.at_the_edge else ''}"

    def figures(self) -> dict[str, Any]:
        """For table.json."""
        return {
            "options": self.options,
            "parameters": self.parameters,
            "rate": self.rate,
            "validation": {f"{rate:g}": value for rate, value in self.validation.items()},
            "test": {str(seed): metrics for seed, metrics in self.metrics.items()},
            "seconds": {str(seed): done.seconds for seed, done in self.runs.items()},
            "peak_bytes": {str(seed): done.peak_bytes for seed, done in self.runs.items()},
        }


def selected(comparison: Comparison, train: Train) -> tuple[dict[str, Selected], dict[str, str]]:
    """What finished, in the order of the arms, and the error of every cell that failed.

    Args:
        train: `surm_seg.train.main`, which no pipeline may import.

    Raises:
        BadInput: runs of an earlier call were trained on other data or another model.
    """
    failed: dict[str, str] = {}
    tried: dict[str, dict[float, Cell]] = {arm: {} for arm in comparison.arms}
    validation: dict[str, dict[float, float]] = {arm: {} for arm in comparison.arms}
    done: dict[str, Done] = {}
    wanted = [(arm, rate) for arm in comparison.arms for rate in comparison.rates]
    while wanted:
        for arm, rate in wanted:
            tried[arm][rate] = comparison.cell(arm, rate, 0)
        done |= dict(_told([tried[arm][rate] for arm, rate in wanted], comparison, train, failed))
        for arm, rate in wanted:
            if (cell := tried[arm][rate]).name in done:
                score = _validated(done[cell.name].folder)
                if math.isfinite(score):
                    validation[arm][rate] = score
                else:
                    failed[cell.name] = f"[score] Its validation score is {score}, which says nothing of its rate."
        best = {arm: max(scores, key=scores.__getitem__) for arm, scores in validation.items() if scores}
        more = {arm: comparison.further(list(tried[arm]), rate) for arm, rate in best.items()}
        wanted = [(arm, rate) for arm, rate in more.items() if rate is not None]
    others = range(1, comparison.seeds)
    seeds = {(arm, seed): comparison.cell(arm, rate, seed) for arm, rate in best.items() for seed in others}
    done |= dict(_told(list(seeds.values()), comparison, train, failed))
    records = {name: json.loads((one.folder / "run.json").read_bytes()) for name, one in done.items()}
    _check_alike(records, comparison.folder)
    found = {}
    for arm, rate in best.items():
        cells = {0: tried[arm][rate], **{seed: seeds[arm, seed] for seed in others}}
        runs = {seed: done[cell.name] for seed, cell in cells.items() if cell.name in done}
        summaries = {seed: summary_of(run.folder) for seed, run in runs.items()}
        record = records[cells[0].name]
        found[arm] = Selected(
            arm,
            rate,
            len(tried[arm]) > 1 and rate in (min(tried[arm]), max(tried[arm])),
            validation[arm],
            runs,
            summaries[0]["score"],
            {seed: summary["metrics"] for seed, summary in summaries.items()},
            record["parameters"],
            record["method_options"],
        )
    return found, failed


def _check_alike(records: Mapping[str, Mapping[str, Any]], folder: Path) -> None:
    """Data and models are compared by content: their files may have been exchanged under the same names."""
    for what, key in (("data", "data_sha256"), ("model", "base_sha256")):
        by_digest: dict[str, list[str]] = {}
        for name, record in records.items():
            by_digest.setdefault(record[key], []).append(name)
        if len(by_digest) > 1:
            fewest = min(by_digest.values(), key=len)
            sentence = f"{folder} holds runs whose {what} differ, such as {fewest[0]}; start with another --output."
            raise BadInput("runs-differ", sentence)


def _told(
    cells: Sequence[Cell], comparison: Comparison, train: Train, failed: dict[str, str]
) -> Iterator[tuple[str, Done]]:
    """The cells that finish, with a line for each; the others' errors go to `failed`."""
    for number, (cell, done) in enumerate(carried_out(cells, comparison.folder, train, comparison.jobs), 1):
        if done.error is None:
            print(f"{number}/{len(cells)} {cell.name}: validation {_validated(done.folder):.4f}", flush=True)
            yield cell.name, done
        else:
            failed[cell.name] = f"[{done.error.code}] {done.error}"
            print(f"{number}/{len(cells)} {cell.name}: failed {failed[cell.name]}", file=sys.stderr, flush=True)


def _validated(run: Path) -> float:
    summary = summary_of(run)
    return summary["validation"][summary["score"]]
