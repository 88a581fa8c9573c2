"""What bfloat16 changes in predictions: one trained run predicts the held-out phantoms in both precisions.

python -m pipelines.studies.precision
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from pipelines.inference import Trained, load_run
from pipelines.studies import runs
from pipelines.studies.data import PHANTOM
from pipelines.studies.runs import Cell, Finished, Options, Row, Run, Study
from surm_seg.cases import Case, Dataset
from surm_seg.metrics import score
from surm_seg.precision import store_frozen

TARGET = 0.001
"""Difference of mean Dice that bfloat16 may make."""

PRECISIONS = ("float32", "bfloat16")


@dataclass(frozen=True)
class Compared:
    """A case predicted in both precisions.

    Args:
        dice: organ -> Dice in float32 and in bfloat16; organs defined in both.
        changed: organ -> voxels that one prediction gives to it and the other does not.
        voxels: organ -> voxels that either gives to it.
        differing: voxels whose label differs, of `total`.
    """

    dice: dict[str, tuple[float, float]]
    changed: dict[str, int]
    voxels: dict[str, int]
    differing: int
    total: int


def cells(options: Options) -> list[Cell]:
    return [Cell(PHANTOM, seed) for seed in range(options.seeds)]


def rows(finished: Finished) -> tuple[list[Row], dict[str, Any]]:
    """A row per organ and one for the mean Dice, over all held-out cases of all runs."""
    compared = [case for run in finished.values() for case in predicted_twice(run)]
    if not compared:
        return [], {}
    organs = [organ for organ in compared[0].voxels if any(organ in case.dice for case in compared)]
    table, figures = [], {}
    for organ in organs:
        dice = np.mean([case.dice[organ] for case in compared if organ in case.dice], 0)
        changed, voxels = (sum(getattr(case, name)[organ] for case in compared) for name in ("changed", "voxels"))
        figures[organ] = {**_figures(dice), "changed": changed, "voxels": voxels}
        table.append(_row(organ, dice, changed / max(1, voxels)))
    dice = np.mean([np.mean(list(case.dice.values()), 0) for case in compared if case.dice], 0)
    changed, voxels = sum(case.differing for case in compared), sum(case.total for case in compared)
    worst = max(figures, key=lambda organ: abs(figures[organ]["difference"]), default=None)
    figures["mean"] = {
        "worst_organ": worst,
        **_figures(dice),
        "changed": changed,
        "voxels": voxels,
        "target": TARGET,
        "cases": len(compared),
    }
    return [*table, _row("mean", dice, changed / voxels)], figures


def predicted_twice(run: Run) -> list[Compared]:
    """Every held-out case as `surm-seg predict` segments it: bfloat16 with its frozen weights kept in it."""
    models = [replace(load_run(run.folder, "cpu"), precision=name) for name in PRECISIONS]
    store_frozen(models[1].model.requires_grad_(False), torch.bfloat16)
    return [_compared(case, models) for case in Dataset.open(run.data).split("test")]


def _compared(case: Case, models: Sequence[Trained]) -> Compared:
    reference, labels = case.label, models[0].labels
    assert reference is not None, "the phantoms are labelled"
    found = [model(case.image) for model in models]
    scores = zip(*(score(one, reference, labels, None) for one in found), strict=True)
    masks = {organ: [one == value for one in found] for value, organ in enumerate(labels, 1)}
    return Compared(
        {a.organ: (a.dice, b.dice) for a, b in scores if a.dice is not None and b.dice is not None},
        {organ: int(np.count_nonzero(a ^ b)) for organ, (a, b) in masks.items()},
        {organ: int(np.count_nonzero(a | b)) for organ, (a, b) in masks.items()},
        int(np.count_nonzero(found[0] != found[1])),
        reference.size,
    )


def _figures(dice: np.ndarray) -> dict[str, Any]:
    return {**dict(zip(PRECISIONS, dice.tolist(), strict=True)), "difference": float(dice[1] - dice[0])}


def _row(organ: str, dice: np.ndarray, share: float) -> Row:
    return {
        "organ": organ,
        "Dice, float32": f"{dice[0]:.5f}",
        "Dice, bfloat16": f"{dice[1]:.5f}",
        "difference": f"{dice[1] - dice[0]:+.5f}",
        "differing voxels": f"{share:.3%}",
    }


STUDY = Study(
    "precision",
    "Predict the held-out phantoms with one trained run in float32 and in bfloat16, and compare the Dice.",
    1,
    cells,
    rows,
    (
        f"Dice by the recommended protocol; aimed at: mean Dice differs by less than {TARGET}. Differing voxels: of "
        "those that either prediction gives to the organ; in the last row, of all voxels.",
    ),
)

if __name__ == "__main__":
    sys.exit(runs.main(STUDY))
