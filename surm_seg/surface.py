"""Surfaces of binary masks: their border voxels, and the small area elements between voxels.

The two surfaces serve two metrics and are never mixed. HD95 looks at *border voxels*: voxels of the mask with a
6-neighbour outside it. NSD looks at *area elements*: one per 2x2x2 neighbourhood that holds both inside and outside
voxels, placed at the corner the eight voxels share, so the surface lies half a voxel outside the border voxels.
What lies beyond the array is outside the mask.

Source of the area elements: Nikolov et al., "Deep learning to achieve clinically applicable segmentation of head and
neck anatomy for radiotherapy", arXiv:1809.04430, and DeepMind's surface-distance, whose 256 areas follow from the rules
in `_vector_areas`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import product

import numpy as np

Point = tuple[int, int, int]
Triangles = list[tuple[Point, Point, Point]]

CORNERS: list[Point] = [(z, y, x) for z, y, x in product((0, 1), repeat=3)]
"""The corners of a neighbourhood; corner n is bit n of its code."""


def border_voxels(mask: np.ndarray) -> np.ndarray:
    """Bool mask of the voxels of `mask` (bool, 3D) that a 6-connected erosion removes; same shape."""
    padded = np.pad(mask, 1)
    core = padded[1:-1, 1:-1, 1:-1].copy()
    for axis in range(3):
        for start in (0, 2):
            window = [slice(1, -1)] * 3
            window[axis] = slice(start, start + mask.shape[axis])
            core &= padded[tuple(window)]
    return mask & ~core


def neighbour_codes(mask: np.ndarray) -> np.ndarray:
    """Code of every 2x2x2 neighbourhood of `mask` (bool, 3D): uint8, one longer than the mask along each axis.

    Element [z, y, x] describes the voxels z-1..z, y-1..y, x-1..x; 0 is wholly outside, 255 wholly inside.
    """
    codes = np.pad(mask, 1).view(np.uint8)
    for axis, shift in ((2, 1), (1, 2), (0, 4)):
        near = codes[tuple(slice(None, -1) if a == axis else slice(None) for a in range(3))]
        far = codes[tuple(slice(1, None) if a == axis else slice(None) for a in range(3))]
        codes = near | (far << shift)
    return codes


def element_areas(spacing: Sequence[float]) -> np.ndarray:
    """Surface area in mm^2 inside a neighbourhood of each code: float64, shape (256,).

    Args:
        spacing: mm between voxels along the three axes of the mask.
    """
    d, h, w = spacing
    return np.linalg.norm(_vector_areas() * (h * w, d * w, d * h), axis=-1).sum(axis=-1)


@lru_cache(maxsize=1)
def _vector_areas() -> np.ndarray:
    """Vector areas, for unit spacing, of the triangles of each code: shape (256, 4, 3), zero where there are fewer.

    Marching cubes with two rules that make it unique. Corners are cut off from the outside in groups joined by edges;
    where more than four corners are inside, the outside ones are cut off instead, so a mask and its complement have the
    same surface. The cut of a group runs through the midpoints of the edges that leave it; a cut of more than three
    points is divided into the triangles with the greatest total area.
    """
    table = np.zeros((256, 4, 3))
    for code in range(256):
        corners = {corner for bit, corner in enumerate(CORNERS) if code >> bit & 1}
        if len(corners) > 4:
            corners = set(CORNERS) - corners
        triangles = [triangle for group in _groups(corners) for triangle in _largest_cut(_cut(group))]
        for index, triangle in enumerate(triangles):
            table[code, index] = _vector_area(triangle)
    return table


def _are_joined(a: Point, b: Point) -> bool:
    return sum(p != q for p, q in zip(a, b, strict=True)) == 1


def _groups(corners: set[Point]) -> list[set[Point]]:
    """The corners, divided into groups that edges of the cube join."""
    groups: list[set[Point]] = []
    for corner in sorted(corners):
        touching = [group for group in groups if any(_are_joined(corner, other) for other in group)]
        groups = [group for group in groups if group not in touching] + [{corner}.union(*touching)]
    return groups


def _cut(group: set[Point]) -> list[Point]:
    """Midpoints, in half edges, of the edges that leave a group, in order around it.

    Consecutive midpoints lie on one face of the cube; a group never leaves a face more than once.
    """
    left = {
        (corner[0] + other[0], corner[1] + other[1], corner[2] + other[2])
        for corner in group
        for other in CORNERS
        if other not in group and _are_joined(corner, other)
    }
    loop = [left.pop()]
    while left:
        following = next(p for p in sorted(left) if any(a == b != 1 for a, b in zip(p, loop[-1], strict=True)))
        left.remove(following)
        loop.append(following)
    return loop


def _largest_cut(loop: list[Point]) -> Triangles:
    """The triangulation of a closed loop with the greatest area."""
    if len(loop) < 3:
        return []
    # Every triangulation has exactly one triangle on the edge between the first and the last point.
    candidates = [
        [(loop[0], loop[k], loop[-1]), *_largest_cut(loop[: k + 1]), *_largest_cut(loop[k:])]
        for k in range(1, len(loop) - 1)
    ]
    return max(candidates, key=lambda triangles: sum(float(np.linalg.norm(_vector_area(t))) for t in triangles))


def _vector_area(triangle: tuple[Point, Point, Point]) -> np.ndarray:
    """Half the cross product of two sides, which are given in half edges."""
    a, b, c = np.asarray(triangle) / 2
    return np.cross(b - a, c - a) / 2
