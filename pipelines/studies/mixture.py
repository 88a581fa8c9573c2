"""Does a mixture that calibration gradients choose beat one structure everywhere, at the same budget?

    python -m pipelines.studies.mixture

Each arm trains about as many values beside the head as LoRA of rank 1 has on q and v: one structure on q and v of every
layer, or the mixture that `surm-seg search --by gradient` finds, anew for every seed: on q and v too (`mixture`), or
anywhere in the layers (`mixture_anywhere`). Learning rates are chosen as `pipelines.selection` does.

OUTPUT/mixture/searches        a search for each task, mixture and seed
              /cells           a run each; a finished one is not repeated, one that was cut is begun anew
              /table.md        and table.json with every figure
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.selection import SEED, Comparison, Selected, selected
from pipelines.studies.runs import command
from pipelines.studies.table import Found, Row, counts, main, markdown, spread
from surm_seg import structures

TASKS: Mapping[str, tuple[str, ...]] = {
    "agreement": ("--task", "glue", "--name", "agreement"),
    "digits": ("--task", "vision", "--name", "digits"),
}
COMMON = ("--device", "cpu", "--precision", "float32")
RATES = (2e-3, 8e-3, 3.2e-2)
MIXTURES: Mapping[str, tuple[str, ...]] = {
    "mixture": (),
    "mixture_anywhere": ("--roles", json.dumps(["q", "k", "v", "out", "mlp_in", "mlp_out"])),
}
"""What a search is given."""
MIXTURE = next(iter(MIXTURES))

NOTES = (
    "Parameters: trained values besides the head, with the first seed. Captured: share of the squared calibration "
    "gradient on q and v that the arm can follow in a first step, first seed. The rate is chosen on the validation set "
    "with one seed; (edge) is the lowest or highest that was tried. The score is of the test set, mean ± sample SD "
    "over the seeds; mixture - arm: the same of the differences seed by seed.",
    "Three seeds of small models that were pretrained here: a difference within its SD is none, and nothing here says "
    "how large models or other budgets behave.",
)


@dataclass(frozen=True)
class Study:
    """Where everything is, and what it is trained with beside the tasks' own recipes."""

    folder: Path
    seeds: int
    jobs: int = 1
    words: tuple[str, ...] = ()

    def search(self, task: str, mixture: str, seed: int | str) -> Path:
        """The folder of a search."""
        return self.folder / "searches" / f"{task}-{mixture}-seed{seed}"

    def searched(self, task: str, mixture: str, seed: int) -> dict[str, Any]:
        """What a search found, which is carried out where it has not been."""
        folder = self.search(task, mixture, seed)
        if not (folder / "table.json").exists():
            print(f"searching {folder.name}", flush=True)
            words = [*TASKS[task], *COMMON, *self.words, *MIXTURES[mixture], "--seed", str(seed)]
            budget = [] if mixture == MIXTURE else ["--budget", str(self.searched(task, MIXTURE, 0)["budget"])]
            command("search", ["--by", "gradient", *budget, *words, "--output", str(folder)])
        return json.loads((folder / "table.json").read_bytes())

    def arms(self, task: str) -> dict[str, Sequence[str]]:
        """The mixtures, searched for with every seed, and every structure at the budget of the first."""
        budget = str(self.searched(task, MIXTURE, 0)["budget"])
        for mixture in MIXTURES:
            for seed in range(self.seeds):
                self.searched(task, mixture, seed)
        mixed: dict[str, Sequence[str]] = {
            name: ("--config", str(self.search(task, name, SEED) / "train.yaml")) for name in MIXTURES
        }
        shared = (*TASKS[task], *COMMON, *self.words, "--budget", budget)
        return mixed | {name: (*shared, "--method", name) for name in structures.names()}

    def carried_out(self, task: str) -> tuple[dict[str, Selected], dict[str, str]]:
        """The arms that finished, and the errors of the runs that did not."""
        cells = self.folder / "cells" / task
        comparison = Comparison(self.arms(task), RATES, self.seeds, self.jobs, cells, ())
        return selected(comparison, importlib.import_module("surm_seg.train").main)


def study(options: argparse.Namespace) -> Found:
    made = Study(options.output / "mixture", options.seeds, options.jobs)
    finished: dict[str, dict[str, Selected]] = {}
    failed: dict[str, str] = {}
    for task in TASKS:
        finished[task], errors = made.carried_out(task)
        failed |= {f"{task} {name}": why for name, why in errors.items()}
    return found(made, finished, failed)


def found(made: Study, finished: Mapping[str, Mapping[str, Selected]], failed: Mapping[str, str]) -> Found:
    paragraphs: list[str] = []
    verdicts: list[dict[str, Any]] = []
    for task, results in finished.items():
        arms = sorted(results.values(), key=lambda arm: -np.mean(arm.scores))
        captured = {one["structure"]: one["captured"] for one in made.searched(task, MIXTURE, 0)["compared"]}
        if arms:
            rows = markdown(list(_rows(arms, captured)))
            paragraphs += [f"**{task}**, {arms[0].score}:\n\n{rows}", _proxy(arms, captured)]
        for mixture in (arm for arm in arms if arm.arm in MIXTURES):
            given = (f"seed {seed}: {_given(made.searched(task, mixture.arm, seed))}" for seed in mixture.metrics)
            verdict = _verdict(mixture, [arm for arm in arms if arm.arm not in MIXTURES])
            verdicts.append({"task": task, "arm": mixture.arm, **verdict})
            paragraphs.append(f"{mixture.arm} gave the places of {task}, {'; '.join(given)}. {verdict['text']}")
    paragraphs += [f"Failed: {name} {why}" for name, why in failed.items()]
    figures = [{"task": t, "arm": name, **arm.figures()} for t, arms in finished.items() for name, arm in arms.items()]
    results = {"arms": figures, "verdicts": verdicts, "failed": dict(failed), "rates": RATES}
    budget = f"Every run: the default recipe of its task, learning rates {', '.join(f'{rate:g}' for rate in RATES)}."
    return Found(budget, paragraphs, results, NOTES, ("torch", "transformers", "peft"))


def _rows(arms: Sequence[Selected], captured: Mapping[str, float]) -> Iterator[Row]:
    mixtures = {name: next((arm for arm in arms if arm.arm == name), None) for name in MIXTURES}
    for arm in arms:
        yield {
            "arm": arm.arm,
            "parameters": f"{arm.parameters['method']:,}",
            "captured": f"{captured[arm.arm]:.3f}" if arm.arm in captured else "",
            "rate": arm.shown_rate,
            "test": spread(arm.scores),
            **{
                f"{name} - arm": spread(_differences(mixture, arm)) if mixture and mixture is not arm else ""
                for name, mixture in mixtures.items()
            },
        }


def _differences(mixture: Selected, arm: Selected) -> list[float]:
    """Seed by seed."""
    both = [seed for seed in arm.metrics if seed in mixture.metrics]
    return [mixture.metrics[seed][mixture.score] - arm.metrics[seed][arm.score] for seed in both]


def _verdict(mixture: Selected, others: Sequence[Selected]) -> dict[str, Any]:
    """Against all uniform arms, and against the one that validation would have chosen."""
    wins = sum(np.mean(_differences(mixture, arm)) > 0 for arm in others)
    text = f"Its mean is above that of {wins} of {len(others)} uniform structures."
    if others:
        chosen = max(others, key=lambda arm: arm.validation[arm.rate])
        text += (
            f" Against {chosen.arm}, the uniform one with the best validation score: "
            f"{spread(_differences(mixture, chosen))}."
        )
    return {"wins": int(wins), "of": len(others), "text": text}


def _proxy(arms: Sequence[Selected], captured: Mapping[str, float]) -> str:
    """Whether what a uniform structure captures tells how it scores."""
    from scipy.stats import spearmanr

    known = [arm for arm in arms if arm.arm not in MIXTURES and arm.arm in captured]
    if len(known) < 3:
        return "Too few uniform structures finished to tell whether what they capture tells how they score."
    ranks: Any = spearmanr([captured[arm.arm] for arm in known], [np.mean(arm.scores) for arm in known])
    return (
        "Spearman's rank correlation of captured share and test score over the uniform structures: "
        f"{float(ranks.statistic):.2f}."
    )


def _given(search: Mapping[str, Any]) -> str:
    times = Counter(place["chosen"]["structure"] if place["chosen"] else "none" for place in search["places"])
    return " and ".join(f"{name} {count}" for name, count in times.most_common())


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(
        prog="python -m pipelines.studies.mixture",
        description="A mixture chosen by calibration gradients against one structure everywhere.",
    )
    counts(options, seeds=3, jobs=2)
    return options


if __name__ == "__main__":
    sys.exit(main(parser(), study))
