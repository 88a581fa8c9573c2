"""Overlap slice by slice: the lines of `slices.csv`, and which slices of a case are worth looking at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Integer

COLUMNS = (
    "case", "organ", "z", "dice", "reference_pixels", "predicted_pixels", "reference_mm2", "predicted_mm2",
)  # fmt: skip
"""The columns of slices.csv; z counts from the lowest axial slice, 0. The areas in mm2 are empty without a spacing."""

LARGE_ENOUGH = 0.25
"""Share of a case's largest organ area that a slice needs to be ranked: the Dice of few pixels says nothing."""


@dataclass(frozen=True)
class SliceRow:
    """One organ in one axial slice that the prediction or the reference shows it in.

    Args:
        z: 0 is the lowest.
        common: pixels that both give to the organ.
        reference: pixels.
        predicted: pixels.
        pixel_mm2: area of a pixel, None when unknown.
    """

    case: str
    organ: str
    z: int
    common: int
    reference: int
    predicted: int
    pixel_mm2: float | None

    @property
    def dice(self) -> float:
        """0..1; always defined."""
        return 2 * self.common / (self.reference + self.predicted)

    def cells(self) -> tuple[str | int | float | None, ...]:
        """The line of slices.csv."""
        pixels = self.reference, self.predicted
        areas = [None if self.pixel_mm2 is None else round(n * self.pixel_mm2, 3) for n in pixels]
        return self.case, self.organ, self.z, self.dice, *pixels, *areas


def slice_rows(
    prediction: Integer[np.ndarray, "z y x"],
    reference: Integer[np.ndarray, "z y x"],
    labels: Sequence[str],
    spacing: Sequence[float] | None,
    case: str,
) -> list[SliceRow]:
    """Compare two label maps slice by slice; organs outermost, empty ones left out.

    Args:
        prediction: values 0..len(labels); organ `labels[k]` is k + 1.
        reference: the same for the reference.
        spacing: mm along (z, y, x), None when unknown.

    Cost: one histogram of the pairs of labels per slice, some 2 ms for 512 x 512 pixels.
    """
    n = len(labels) + 1
    pairs = np.stack([np.bincount((p.astype(np.intp) * n + r).ravel(), minlength=n * n).reshape(n, n)
                      for p, r in zip(prediction, reference, strict=True)])  # fmt: skip
    predicted, true, pixel = pairs.sum(2), pairs.sum(1), None if spacing is None else float(spacing[1] * spacing[2])
    return [
        SliceRow(case, organ, z, int(pairs[z, k, k]), int(true[z, k]), int(predicted[z, k]), pixel)
        for k, organ in enumerate(labels, 1)
        for z in np.flatnonzero(true[:, k] + predicted[:, k]).tolist()
    ]


def overlap_by_slice(rows: Sequence[SliceRow]) -> dict[int, float]:
    """Slice -> Dice of all organs of a case together, 2 x pixels agreed on / pixels of both, where they are large.

    A slice is ranked where its organs take up at least LARGE_ENOUGH of the largest area of a slice.
    """
    common: dict[int, int] = {}
    total: dict[int, int] = {}
    for row in rows:
        common[row.z] = common.get(row.z, 0) + row.common
        total[row.z] = total.get(row.z, 0) + row.reference + row.predicted
    enough = LARGE_ENOUGH * max(total.values(), default=0)
    return {z: 2 * common[z] / total[z] for z in sorted(total) if total[z] >= enough}


def telling_slices(rows: Sequence[SliceRow]) -> dict[str, tuple[int, float]]:
    """worst, median and best of the ranked slices of a case, with their overlap; fewer where there are fewer."""
    ranked = sorted(overlap_by_slice(rows).items(), key=lambda entry: (entry[1], entry[0]))
    if not ranked:
        return {}
    places = {"worst": 0, "median": len(ranked) // 2, "best": len(ranked) - 1}
    seen: dict[int, str] = {}
    for name, place in places.items():
        seen.setdefault(place, name)
    return {name: ranked[place] for place, name in seen.items()}
