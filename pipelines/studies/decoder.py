"""What the decoder's training buys: full, structured and frozen, against the parameters that each trains.

python -m pipelines.studies.decoder
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from itertools import product
from typing import Any

import numpy as np

from pipelines.studies import runs
from pipelines.studies.data import CT, CT_NOTE, PHANTOM
from pipelines.studies.runs import Cell, Finished, Options, Row, Study

DECODERS = ("full", "structured", "frozen")
STRUCTURES: Mapping[str, dict[str, Any]] = {"circulant": {}, "low_rank": {"rank": 4}}


def cells(options: Options) -> list[Cell]:
    """The first structure on all data before the second."""
    return [
        Cell(data, seed, decoder=decoder, structure=structure, structure_options=chosen)
        for (structure, chosen), seed, data, decoder in product(
            STRUCTURES.items(), range(options.seeds), (PHANTOM, CT), DECODERS
        )
    ]


def rows(finished: Finished) -> tuple[list[Row], dict[str, Any]]:
    """A row per data set, structure and decoder; Dice is the mean over the seeds that are finished."""
    kinds = dict.fromkeys((cell.data, cell.structure, cell.decoder) for cell in finished)
    table = []
    for data, structure, decoder in sorted(kinds, key=lambda kind: (kind[0] != PHANTOM, kind[1])):
        alike = [
            run
            for cell, run in finished.items()
            if (cell.data, cell.structure, cell.decoder) == (data, structure, decoder)
        ]
        adapter, trained = alike[0].parameters["encoder_adapter"], alike[0].parameters["decoder"]
        table.append({
            "data": data,
            "structure": structure,
            "decoder": decoder,
            "Dice": f"{np.mean([run.dice for run in alike]):.3f}",
            "encoder": f"{adapter:,}",
            "decoder parameters": f"{trained:,}",
            "trained": f"{adapter + trained:,}",
            "model": f"{alike[0].parameters['model']:,}",
        })  # fmt: skip
    return table, {}


STUDY = Study(
    "decoder",
    "Train sam_tiny with a full, a structured and a frozen decoder, once each.",
    1,
    cells,
    rows,
    (
        "Dice: mean over held-out cases of the mean over organs. Deltas on q and v of the frozen pre-trained encoder; "
        "low_rank has rank 4. structured gives the same structure to the decoder's frozen transformer; frozen trains "
        "only the mask tokens and heads of the new classes.",
        "phantom: the demonstration's patients, whose like the backbone was pre-trained on, under other seeds.",
        CT_NOTE,
    ),
)

if __name__ == "__main__":
    sys.exit(runs.main(STUDY))
