"""What CT volumes look like in a few numbers, exactly and without copying them: HU, label shares, ranges over cases."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import prod
from typing import Any

import numpy as np

HU_OFFSET = 32768  # int16 -> index of a histogram bin


def hu_summary(image: np.ndarray) -> dict[str, int]:
    """Minimum, 1st and 99th percentile, and maximum of an int16 volume, as values that occur in it."""
    below = np.cumsum(_counts(image, 2 * HU_OFFSET, HU_OFFSET))
    ranks = {"min": 1, "p1": 0.01 * image.size, "p99": 0.99 * image.size, "max": image.size}
    return {name: int(np.searchsorted(below, rank)) - HU_OFFSET for name, rank in ranks.items()}


def label_histogram(label: np.ndarray, labels: Sequence[str]) -> dict[str, int]:
    """Voxels per organ of a uint8 label map."""
    counts = _counts(label, 256)
    return {organ: int(counts[value]) for value, organ in enumerate(labels, 1)}


def over_cases(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """[low, high] over manifest entries with shape, spacing, hu, axcodes and histogram; of none, only their number."""
    if not records:
        return {"cases": 0}
    histograms = [(record["histogram"], prod(record["shape"])) for record in records if record["histogram"] is not None]
    organs = histograms[0][0] if histograms else ()
    extent = {"y": 1, "x": 2}
    return {
        "cases": len(records),
        "spacing_mm": {axis: _span(r["spacing"][n] for r in records) for n, axis in enumerate("zyx")},
        "field_of_view_mm": {a: _span(r["spacing"][n] * r["shape"][n] for r in records) for a, n in extent.items()},
        "hu": {name: _span(r["hu"][name] for r in records) for name in ("min", "p1", "p99", "max")},
        "orientations": sorted({r["axcodes"] for r in records}),
        "label_share": {organ: _span(counts[organ] / voxels for counts, voxels in histograms) for organ in organs},
    }


def _span(values: Iterable[float | int]) -> list[float | int]:
    values = list(values)
    return [min(values), max(values)]


def _counts(volume: np.ndarray, bins: int, offset: int = 0) -> np.ndarray:
    """How often each value from -offset up occurs."""
    counts = np.zeros(bins, np.int64)
    for plane in volume:
        counts += np.bincount(plane.ravel().astype(np.int32) + offset, minlength=bins)
    return counts
