"""Does pre-training help? The frozen pre-trained sam_tiny against the same network frozen at random, at equal budget.

python -m pipelines.studies.pretraining
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from itertools import product
from typing import Any

import numpy as np

from pipelines.studies import runs
from pipelines.studies.data import CT, CT_NOTE, SHIFTED, SHIFTED_NOTE
from pipelines.studies.runs import Cell, Finished, Options, Row, Run, Study
from surm_seg.statistics import paired

PRETRAINED, RANDOM = "auto", "random"


def cells(options: Options) -> list[Cell]:
    """Seed by seed, so that a study that is cut has whole pairs."""
    return [
        Cell(data, seed, weights)
        for seed, data, weights in product(range(options.seeds), (SHIFTED, CT), (RANDOM, PRETRAINED))
    ]


def rows(finished: Finished) -> tuple[list[Row], dict[str, Any]]:
    """A row per data set, from the seeds that both backbones have finished."""
    table: list[Row] = []
    figures: dict[str, Any] = {}
    for data in dict.fromkeys(cell.data for cell in finished):
        both = [
            (finished[cell], finished[Cell(data, cell.seed, PRETRAINED)])
            for cell in finished
            if cell.data == data and cell.weights == RANDOM and Cell(data, cell.seed, PRETRAINED) in finished
        ]
        if both:
            row, figures[data] = _compared(both)
            table.append({"data": data, **row})
    return table, figures


def _compared(both: Sequence[tuple[Run, Run]]) -> tuple[Row, dict[str, Any]]:
    """Means over seeds, and the paired difference: seed by seed, and over patients where there are several."""
    differences = [pretrained.dice - random.dice for random, pretrained in both]
    by_patient = [
        (float(np.mean([run.cases[case] for run, _ in both])), float(np.mean([run.cases[case] for _, run in both])))
        for case in both[0][0].cases
    ]
    statistics, parameters = paired(by_patient), both[0][0].parameters
    interval = "–"
    if statistics.ci95_low is not None:
        interval = f"{statistics.ci95_low:+.3f} to {statistics.ci95_high:+.3f}"
    row = {
        "held-out cases": str(len(by_patient)),
        "seeds": str(len(both)),
        "Dice, random": _spread([random.dice for random, _ in both]),
        "Dice, pre-trained": _spread([pretrained.dice for _, pretrained in both]),
        "difference": _spread(differences, "+"),
        "95 % over patients": interval,
        "encoder": f"{parameters['encoder_adapter']:,}",
        "decoder": f"{parameters['decoder']:,}",
        "model": f"{parameters['model']:,}",
    }
    return row, {"difference_by_seed": differences, "over_patients": asdict(statistics)}


def _spread(values: Sequence[float], sign: str = "") -> str:
    return f"{np.mean(values):{sign}.3f} ({min(values):{sign}.3f} to {max(values):{sign}.3f})"


STUDY = Study(
    "pretraining",
    "Compare the frozen pre-trained sam_tiny with the same network frozen at random, at equal budget.",
    3,
    cells,
    rows,
    (
        "Dice: mean over held-out cases of the mean over organs (least to most over seeds). random: all of sam_tiny as "
        "its modules initialise it. Both: circulant deltas on q and v of the frozen encoder, the whole decoder, "
        "the same slices in the same order. encoder, decoder: trained parameters.",
        SHIFTED_NOTE,
        CT_NOTE,
    ),
)

if __name__ == "__main__":
    sys.exit(runs.main(STUDY))
