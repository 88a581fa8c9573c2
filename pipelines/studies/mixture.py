"""Does a mixture that calibration gradients choose beat one structure everywhere, at the same budget?

    python -m pipelines.studies.mixture

Each arm trains about as many values beside the head as LoRA of rank 1 has on q and v: one structure on q and v of every
layer, or the mixture that `surm-seg search --by gradient` finds, anew for every seed: on q and v too (`mixture`), or
anywhere in the layers (`mixture_anywhere`). The learning rate of each arm is the best
of RATES on the validation set with the first seed; the test set is then read at that rate, over all seeds.

OUTPUT/mixture/searches        a search for each task and seed
              /cells           a run each; a finished one is not repeated, one that was cut is begun anew
              /table.md        and table.json with every figure
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.studies.runs import command
from pipelines.studies.table import Found, Row, counts, main, markdown, spread
from pipelines.supervised import summary_of
from surm_seg import structures
from surm_seg.errors import SurmError

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
MIXTURE, ANYWHERE = MIXTURES

NOTES = (
    "Parameters: trained values besides the head, mean over the seeds for the mixture. Captured: share of the squared "
    "calibration gradient that the arm can follow in a first step, seed 0. The rate is chosen on the validation set "
    "with one seed; (edge) is the lowest or highest that was tried. The score is of the test set, mean ± sample SD "
    "over the seeds; mixture - arm: the same of the differences seed by seed.",
    "Three seeds of small models that were pretrained here: a difference within its SD is none, and nothing here says "
    "how large models or other budgets behave.",
)


@dataclass(frozen=True)
class Arm:
    """What an arm came to on a task.

    Args:
        validation: learning rate -> score with the first seed.
        test: seed -> score, at the best rate.
    """

    task: str
    name: str
    metric: str
    parameters: float
    captured: float | None
    rate: float
    validation: Mapping[float, float]
    test: Mapping[int, float]


@dataclass(frozen=True)
class Study:
    """Where everything is, and what it is trained with beside the tasks' own recipes."""

    folder: Path
    seeds: int
    words: tuple[str, ...] = ()

    def search(self, task: str, seed: int, mixture: str = MIXTURE) -> Path:
        """The folder of a finished search."""
        folder = self.folder / "searches" / f"{task}-{mixture}-seed{seed}"
        if not (folder / "table.json").exists():
            print(f"searching {folder.name}", flush=True)
            words = [*TASKS[task], *COMMON, *self.words, *MIXTURES[mixture], "--seed", str(seed)]
            budget = [] if mixture == MIXTURE else ["--budget", str(self.budget(task))]
            command("search", ["--by", "gradient", *budget, *words, "--output", str(folder)])
        return folder

    def budget(self, task: str) -> int:
        """That of rank 1 on q and v."""
        return json.loads((self.search(task, 0) / "table.json").read_bytes())["budget"]

    def run(self, task: str, arm: str, rate: float, seed: int) -> Path:
        """The folder of a finished run."""
        run = self.folder / "cells" / f"{task}-{arm}-{rate:g}-seed{seed}"
        if (run / "scores" / "summary.json").exists():
            return run
        shutil.rmtree(run, ignore_errors=True)
        if arm in MIXTURES:
            chosen = ["--config", str(self.search(task, seed, arm) / "train.yaml")]
        else:
            chosen = [*TASKS[task], *COMMON, *self.words, "--method", arm, "--budget", str(self.budget(task))]
        command("train", [*chosen, "--learning_rate", repr(rate), "--seed", str(seed), "--output", str(run)])
        print(f"{run.name}: validation {validated(run):.4f}", flush=True)
        return run

    def arm(self, task: str, name: str) -> Arm:
        tried = {rate: self.run(task, name, rate, 0) for rate in RATES}
        validation = {rate: validated(run) for rate, run in tried.items()}
        best = max(validation, key=validation.__getitem__)
        runs = {seed: self.run(task, name, best, seed) for seed in range(self.seeds)}
        summaries = {seed: summary_of(run) for seed, run in runs.items()}
        metric = summaries[0]["score"]
        trained = [json.loads((run / "run.json").read_bytes())["parameters"]["method"] for run in runs.values()]
        compared = json.loads((self.search(task, 0) / "table.json").read_bytes())["compared"]
        # Anywhere, the share is of another, larger gradient.
        captured = next((one["captured"] for one in compared if one["structure"] == name), None)
        test = {seed: summary["metrics"][metric] for seed, summary in summaries.items()}
        return Arm(task, name, metric, float(np.mean(trained)), captured, best, validation, test)


def validated(run: Path) -> float:
    summary = summary_of(run)
    return summary["validation"][summary["score"]]


def study(options: argparse.Namespace) -> Found:
    made = Study(options.output / "mixture", options.seeds)
    arms: list[Arm] = []
    failed: dict[str, str] = {}
    for task in TASKS:
        for name in (*MIXTURES, *structures.names()):
            try:
                arms.append(made.arm(task, name))
            except SurmError as error:
                failed[f"{task} {name}"] = f"[{error.code}] {error}"
                print(f"{task} {name}: failed {failed[f'{task} {name}']}", file=sys.stderr, flush=True)
    return found(made, arms, failed)


def found(made: Study, arms: Sequence[Arm], failed: Mapping[str, str]) -> Found:
    paragraphs: list[str] = []
    verdicts: list[dict[str, Any]] = []
    for task in TASKS:
        here = sorted((arm for arm in arms if arm.task == task), key=lambda arm: -np.mean(list(arm.test.values())))
        if here:
            paragraphs.append(f"**{task}**, {here[0].metric}:\n\n{markdown(list(_rows(here)))}")
            paragraphs.append(_proxy(here))
        for mixture in (arm for arm in here if arm.name in MIXTURES):
            searches = {seed: made.search(task, seed, mixture.name) for seed in mixture.test}
            places = "; ".join(f"seed {seed}: {_given(folder)}" for seed, folder in searches.items())
            verdicts.append(_verdict(mixture, [arm for arm in here if arm.name not in MIXTURES]))
            paragraphs.append(f"{mixture.name} gave the places of {task}, {places}. {verdicts[-1]['text']}")
    paragraphs += [f"Failed: {name} {why}" for name, why in failed.items()]
    results = {
        "arms": [
            {**vars(arm), "validation": {f"{rate:g}": score for rate, score in arm.validation.items()}} for arm in arms
        ],
        "verdicts": verdicts,
        "failed": dict(failed),
        "rates": RATES,
    }
    budget = f"Every run: the default recipe of its task, learning rates {', '.join(f'{rate:g}' for rate in RATES)}."
    return Found(budget, paragraphs, results, NOTES, ("torch", "transformers", "peft"))


def _rows(arms: Sequence[Arm]) -> Iterator[Row]:
    mixtures = {name: next((arm for arm in arms if arm.name == name), None) for name in MIXTURES}
    for arm in arms:
        edge = " (edge)" if arm.rate in (RATES[0], RATES[-1]) else ""
        yield {
            "arm": arm.name,
            "parameters": f"{arm.parameters:,.0f}",
            "captured": "" if arm.captured is None else f"{arm.captured:.3f}",
            "rate": f"{arm.rate:g}{edge}",
            "test": spread(list(arm.test.values())),
            **{
                f"{name} - arm": spread(_differences(mixture, arm)) if mixture and mixture is not arm else ""
                for name, mixture in mixtures.items()
            },
        }


def _differences(mixture: Arm, arm: Arm) -> list[float]:
    return [mixture.test[seed] - score for seed, score in arm.test.items() if seed in mixture.test]


def _verdict(mixture: Arm, others: Sequence[Arm]) -> dict[str, Any]:
    """Against all uniform arms, and against the one that validation would have chosen."""
    wins = sum(np.mean(_differences(mixture, arm)) > 0 for arm in others)
    text = f"Its mean is above that of {wins} of {len(others)} uniform structures."
    if others:
        chosen = max(others, key=lambda arm: arm.validation[arm.rate])
        text += (
            f" Against {chosen.name}, the uniform one with the best validation score: "
            f"{spread(_differences(mixture, chosen))}."
        )
    return {"task": mixture.task, "arm": mixture.name, "wins": int(wins), "of": len(others), "text": text}


def _proxy(arms: Sequence[Arm]) -> str:
    """Whether what a uniform structure captures tells how it scores."""
    from scipy.stats import spearmanr

    known = [arm for arm in arms if arm.name not in MIXTURES and arm.captured is not None]
    if len(known) < 3:
        return "Too few uniform structures finished to tell whether what they capture tells how they score."
    found: Any = spearmanr([arm.captured for arm in known], [np.mean(list(arm.test.values())) for arm in known])
    return (
        "Spearman's rank correlation of captured share and test score over the uniform structures: "
        f"{float(found.statistic):.2f}."
    )


def _given(search: Path) -> str:
    places = json.loads((search / "table.json").read_bytes())["places"]
    times = Counter(place["chosen"]["structure"] if place["chosen"] else "none" for place in places)
    return " and ".join(f"{name} {count}" for name, count in times.most_common())


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(
        prog="python -m pipelines.studies.mixture",
        description="A mixture chosen by calibration gradients against one structure everywhere.",
    )
    counts(options, seeds=3)
    return options


if __name__ == "__main__":
    sys.exit(main(parser(), study))
