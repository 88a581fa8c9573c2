"""How an array of Synapse labels lies in the patient, read from where its organs are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from surm_seg.errors import BadInput
from surm_seg.labels import SYNAPSE

# Label values 1 to 8. `transunet` is the order of the distributed arrays and of the paper's table, `samed` that of
# scripts that make such arrays from the raw data; 3 and 5 mean the same in both.
TABLES: Mapping[str, tuple[str, ...]] = {
    "transunet": (
        "aorta",
        "gallbladder",
        "left_kidney",
        "right_kidney",
        "liver",
        "pancreas",
        "spleen",
        "stomach",
    ),
    "samed": SYNAPSE,
}

# Where the second organ of a pair lies, seen from the first. Kidneys and aorta stand for the spine, which has no label.
# The stomach, which may hang low, does not say where up is. Unusual anatomy (situs inversus, a kidney in the pelvis)
# contradicts some pair and is refused.
WITNESSES: Mapping[str, tuple[tuple[str, str], ...]] = {
    "left": (
        ("right_kidney", "left_kidney"),
        ("liver", "spleen"),
        ("liver", "left_kidney"),
        ("aorta", "spleen"),
    ),
    "posterior": (
        ("stomach", "left_kidney"),
        ("stomach", "aorta"),
        ("pancreas", "aorta"),
        ("gallbladder", "right_kidney"),
        ("liver", "right_kidney"),
    ),
    "superior": (
        ("left_kidney", "spleen"),
        ("right_kidney", "liver"),
        ("right_kidney", "spleen"),
    ),
}
AXCODES = {"left": "RL", "posterior": "AP", "superior": "IS"}  # where an axis grows to, against and along the direction
SILENT_PIXELS, SILENT_SLICES = 0.02, 1.0  # organs nearer than this (of the side; slices) say nothing
CLEARLY = 1.5  # how much further apart the pairs lie from left to right than from front to back; 3 in a real patient
SURE = {1: "hardly sure: one pair of organs", 2: "fairly sure: two pairs of organs"}


@dataclass(frozen=True)
class Orientation:
    """How the arrays of a case lie in the patient.

    Args:
        table: which of TABLES its label values follow.
        axcodes: where slices, rows and columns grow to, each one of L R A P S I.
        agreeing: organ pairs that say so, by direction.
    """

    table: str
    axcodes: tuple[str, str, str]
    agreeing: Mapping[str, tuple[str, ...]]

    @property
    def sure(self) -> str:
        """How well founded, in words: as well as the direction with the fewest witnesses."""
        fewest = min(map(len, self.agreeing.values()))
        return SURE.get(fewest, f"sure: at least {fewest} pairs of organs") + " for each direction, none against"


def orientation(label: np.ndarray, where: str, classes: str | None = None) -> Orientation:
    """How an array of labels lies in the patient, and what its values mean; raises BadInput where organs disagree.

    Left and right lie along the in-plane axis on which the pairs of WITNESSES["left"] are furthest apart, front and
    back along the other. Each direction is what all its pairs say; one pair against it refuses the case. A case fits
    only one table: under the wrong one aorta and spleen change places.

    Args:
        label: axes (slice, row, column), values 0 to 8.
        where: names the case in errors.
        classes: key of TABLES; None tries each.
    """
    centres, side = _centres(label), label.shape[1]
    tried = {}
    for name in [classes] if classes else TABLES:
        organs = {organ: centres[value] for value, organ in enumerate(TABLES[name], 1) if value in centres}
        tried[name] = _orientation(organs, side)
    found = {name: result for name, result in tried.items() if not isinstance(result, str)}
    if len(found) > 1:
        tables = " or ".join(found)
        raise BadInput("class-table", f"{where} has too few organs to tell its label table; give --classes {tables}.")
    if not found:
        why = "; ".join(f"with labels as {name} has them, {reason}" for name, reason in tried.items())
        hint = "mend its labels, or leave it out with --split"
        raise BadInput("orientation", f"{where} does not show how it lies in the patient ({why}); {hint}.")
    ((name, (axcodes, agreeing)),) = found.items()
    return Orientation(name, axcodes, agreeing)


def _orientation(
    centres: Mapping[str, np.ndarray], side: int
) -> tuple[tuple[str, str, str], dict[str, tuple[str, ...]]] | str:
    """Axis codes and the agreeing pairs of each direction, or why there are none."""
    offsets = {
        direction: {f"{a} - {b}": centres[b] - centres[a] for a, b in pairs if a in centres and b in centres}
        for direction, pairs in WITNESSES.items()
    }
    if not offsets["left"]:
        return "there are no two organs to tell left from right"
    _, down, along = np.abs(list(offsets["left"].values())).sum(axis=0)
    if max(down, along) < CLEARLY * min(down, along):
        return f"{', '.join(offsets['left'])} lie as far apart down the rows as along them"
    left = 1 if down > along else 2
    axes = {"left": left, "posterior": 3 - left, "superior": 0}
    codes, agreeing = ["", "", ""], {}
    for direction, axis in axes.items():
        silent = SILENT_SLICES if axis == 0 else SILENT_PIXELS * side
        votes = {pair: bool(d[axis] > 0) for pair, d in offsets[direction].items() if abs(d[axis]) > silent}
        if not votes:
            return f"no two organs far enough apart to tell where {direction} is"
        sides = {vote: [pair for pair in votes if votes[pair] is vote] for vote in (True, False)}
        if all(sides.values()):
            against, others = sorted(sides.values(), key=len)
            return f"{', '.join(against)} against {', '.join(others)} on where {direction} is"
        grows = next(iter(votes.values()))
        codes[axis], agreeing[direction] = AXCODES[direction][grows], tuple(votes)
    return (codes[0], codes[1], codes[2]), agreeing


def _centres(label: np.ndarray) -> dict[int, np.ndarray]:
    """Mean index (slice, row, column) of every value above 0."""
    places = np.nonzero(label)
    values = label[places]
    count = np.bincount(values)
    sums = np.stack([np.bincount(values, weights=place) for place in places], axis=1)
    return {int(value): sums[value] / count[value] for value in np.flatnonzero(count)}
