"""What cases.csv says of every case: the numbers of the lists and tables."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from surm_seg.metrics import RECOMMENDED


@dataclass(frozen=True)
class Score:
    """What scoring one case came to, by the recommended protocol.

    Args:
        dice: mean over the organs it is defined for; None where it is for none.
        organs: name -> dice, hd95_mm and spacing, as cases.csv has them; None and "" where undefined.
    """

    dice: float | None
    organs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def scores_in(table: Path) -> dict[str, Score]:
    """Case -> score, of a cases.csv; {} where there is none that can be read."""
    try:
        with table.open(newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["protocol"] == RECOMMENDED]
        cases: dict[str, dict[str, dict[str, Any]]] = {}
        for row in rows:
            numbers = {name: float(row[name]) if row[name] else None for name in ("dice", "hd95_mm")}
            cases.setdefault(row["case"], {})[row["organ"]] = numbers | {"spacing": row["spacing"]}
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return {case: Score(mean_dice(list(organs.values())), organs) for case, organs in cases.items()}


def mean_dice(organs: Sequence[Mapping[str, Any]]) -> float | None:
    """Mean over the organs whose Dice is defined."""
    values = [organ["dice"] for organ in organs if organ["dice"] is not None]
    return float(np.mean(values)) if values else None
