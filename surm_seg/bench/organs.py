"""Label maps of eight organs, as large and as uneven as real ones, and predictions of them that are wrong."""

from __future__ import annotations

from math import pi

import numpy as np

from surm_seg.errors import BadConfig

SPACING_MM = (3.0, 0.8, 0.8)

# Organ -> centre and half axes as shares of the volume's sides (z, y, x): sizes of an adult's in 444 x 410 x 410 mm.
ORGANS: dict[str, tuple[tuple[float, float, float], tuple[float, float, float]]] = {
    "liver": ((0.55, 0.42, 0.30), (0.18, 0.20, 0.18)),
    "spleen": ((0.58, 0.60, 0.78), (0.11, 0.09, 0.06)),
    "right_kidney": ((0.38, 0.68, 0.36), (0.12, 0.07, 0.065)),
    "left_kidney": ((0.40, 0.68, 0.64), (0.12, 0.07, 0.065)),
    "gallbladder": ((0.34, 0.34, 0.36), (0.07, 0.045, 0.04)),
    "stomach": ((0.58, 0.33, 0.62), (0.10, 0.11, 0.12)),
    "aorta": ((0.50, 0.57, 0.50), (0.34, 0.028, 0.028)),
    "pancreas": ((0.42, 0.48, 0.50), (0.05, 0.04, 0.13)),
}

RELIEF = 0.06  # how far a surface rises and falls, as a share of the organ's radius
GROWN, SHRUNK = 1.04, 0.96  # what a prediction makes of an organ's radius, by turns
CUT = 0.8  # half axes along x, beyond which the prediction misses the organ
FALSE_PIECE = 0.1  # of the organ's half axes


def label_maps(count: int, shape: tuple[int, int, int], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Prediction and reference: uint8, axes (z, y, x), the first `count` of ORGANS as 1, 2, ...

    Each organ of the prediction lies a voxel off, is too thick or too thin, lacks its tip, has a surface of its own,
    and comes with a small false piece outside it. Raises BadConfig for a volume too small for them.
    """
    rng = np.random.default_rng(seed)
    prediction, reference = np.zeros((2, *shape), np.uint8)
    for value, (centre, half) in enumerate(list(ORGANS.values())[:count], 1):
        middle, axes, phases = np.multiply(centre, shape), np.multiply(half, shape), rng.uniform(0, 2 * pi, 3)
        _paint(reference, value, middle, axes, phases)
        grown = axes * (GROWN if value % 2 else SHRUNK)
        _paint(prediction, value, middle + rng.choice((-1, 1), 3), grown, phases + rng.normal(0, 0.3, 3), CUT)
        outside = np.clip(middle + axes * rng.choice((-1, 1), 3), 0, shape)
        _paint(prediction, value, outside, np.maximum(1, FALSE_PIECE * axes), phases)
    for labels in (prediction, reference):
        if not np.bincount(labels.ravel(), minlength=count + 1).all():
            raise BadConfig("bench-shape", f"Organs vanish in {list(shape)} voxels; give a larger --shape.")
    return prediction, reference


def _paint(
    labels: np.ndarray, value: int, middle: np.ndarray, axes: np.ndarray, phases: np.ndarray, cut: float = np.inf
) -> None:
    """Write an uneven ellipsoid, without the part beyond `cut` half axes along x; sizes in voxels."""
    reach = axes * (1 + 3 * RELIEF)
    starts = np.maximum(np.floor(middle - reach), 0).astype(int)
    stops = np.minimum(np.ceil(middle + reach) + 1, labels.shape).astype(int)
    box = tuple(slice(start, stop) for start, stop in zip(starts, stops, strict=True))
    places = [(np.arange(side.start, side.stop) - m) / a for side, m, a in zip(box, middle, axes, strict=True)]
    z, y, x = np.meshgrid(*places, indexing="ij", sparse=True)
    radius = 1 + RELIEF * sum(np.sin(6 * place + phase) for place, phase in zip((z, y, x), phases, strict=True))
    labels[box][(z**2 + y**2 + x**2 < radius**2) & (x < cut)] = value
