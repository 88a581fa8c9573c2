"""What CT volumes look like in a few numbers, exactly and without copying them: HU, label shares, ranges over cases."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import prod
from typing import Any

import numpy as np

from surm_seg.labels import run_ends

HU_OFFSET = 32768  # int16 -> index of a histogram bin


def hu_summary(image: np.ndarray) -> dict[str, int]:
    """Minimum, 1st and 99th percentile, and maximum of an int16 volume, as values that occur in it."""
    counts = np.zeros(2 * HU_OFFSET, np.int64)
    for plane in image:
        counts += np.bincount(plane.ravel().astype(np.int32) + HU_OFFSET, minlength=len(counts))
    below = np.cumsum(counts)
    ranks = {"min": 1, "p1": 0.01 * image.size, "p99": 0.99 * image.size, "max": image.size}
    return {name: int(np.searchsorted(below, rank)) - HU_OFFSET for name, rank in ranks.items()}


def label_histogram(label: np.ndarray, labels: Sequence[str]) -> dict[str, int]:
    """Voxels per organ of a uint8 label map."""
    counts = np.zeros(256, np.int64)
    for plane in label:
        flat = plane.ravel()
        ends = run_ends(flat)
        np.add.at(counts, flat[ends], np.diff(ends, prepend=-1))
    return {organ: int(counts[value]) for value, organ in enumerate(labels, 1)}


def over_cases(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """[low, high] over manifest entries with shape, spacing, hu, axcodes and histogram; of none, only their number.

    Cases whose spacing is None (unknown) say nothing about lengths; where no case knows it, these ranges are None.
    """
    if not records:
        return {"cases": 0}
    histograms = [(record["histogram"], prod(record["shape"])) for record in records if record["histogram"] is not None]
    organs = histograms[0][0] if histograms else ()
    extents = [[mm * n for mm, n in zip(r["spacing"], r["shape"], strict=True)] for r in records if r["spacing"]]
    spacings = [record["spacing"] for record in records if record["spacing"]]
    return {
        "cases": len(records),
        "spacing_mm": {axis: _span(mm[n] for mm in spacings) for n, axis in enumerate("zyx")},
        "scan_length_mm": _span(mm[0] for mm in extents),
        "field_of_view_mm": {axis: _span(mm[n] for mm in extents) for n, axis in enumerate("yx", 1)},
        "hu": {name: _span(r["hu"][name] for r in records) for name in ("min", "p1", "p99", "max")},
        "orientations": sorted({r["axcodes"] for r in records}),
        "label_share": {organ: _span(counts[organ] / voxels for counts, voxels in histograms) for organ in organs},
    }


def _span(values: Iterable[float | int]) -> list[float | int] | None:
    values = list(values)
    return [min(values), max(values)] if values else None
