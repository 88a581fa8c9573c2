"""The numbers on the screen: the organ table beside the pictures, and the strip of slices below them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from app.rescore import Scores
from app.viewer import Organ, SliceScore
from surm_seg.metrics import OrganScore
from surm_seg.pictures import anatomy_colour, colour, hexed, texture


def counted(labels: np.ndarray, organs: int) -> np.ndarray:
    """Voxels per slice and label value, background first."""
    return np.stack([np.bincount(plane.ravel(), minlength=organs + 1)[: organs + 1] for plane in labels])


def organs_of(
    names: Sequence[str], voxels: np.ndarray, spacing: Sequence[float] | None, scored: Mapping[str, OrganScore]
) -> list[Organ]:
    """The organ table: volumes in mL where the spacing is known, scores where there is a reference."""
    found = []
    for value, name in enumerate(names, 1):
        score = scored.get(name)
        found.append(
            Organ(
                value,
                name.replace("_", " "),
                hexed(colour(value)),
                None if spacing is None else float(voxels[value] * np.prod(spacing) / 1000),
                None if score is None else score.dice,
                None if score is None else score.hd95_mm,
                "" if score is None else _flag(score),
                texture(value),
                hexed(anatomy_colour(name)),
            )
        )
    return found


def _flag(score: OrganScore) -> str:
    if score.missed:
        return "missed"
    return "not in the reference" if score.absent and not score.prediction_empty else ""


def slices_of(scores: Scores | None, names: Sequence[str]) -> list[SliceScore]:
    """The strip under the picture: every slice with the area of error, and its organs' Dice once they are scored."""
    if scores is None:
        return []
    values = {name: value for value, name in enumerate(names, 1)}
    found: dict[int, dict[int, float | None]] = {}
    for row in scores.settled.slices:
        found.setdefault(row.z, {})[values[row.organ]] = row.dice
    return [SliceScore(z, found.get(z) or None, float(area)) for z, area in enumerate(scores.error_mm2)]
