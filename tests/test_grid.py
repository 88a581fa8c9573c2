"""Two grids are the same where their voxels lie at the same millimetres, however the file orders its axes."""

from __future__ import annotations

from itertools import permutations, product

import nibabel as nib
import numpy as np
import pytest

from surm_seg.volume import Grid, Volume

TILTED = np.array(
    [[-0.8, 0.05, 0.02, 11.0], [-0.05, -0.8, 0.1, -7.0], [0.03, 0.08, 2.5, 3.0], [0, 0, 0, 1]], np.float64
)  # axes in LPS, a few degrees oblique


@pytest.mark.parametrize("axes", permutations(range(3)))
@pytest.mark.parametrize("flips", product((1, -1), repeat=3))
def test_a_turned_file_lies_on_the_same_grid_and_its_voxels_fit(axes: tuple[int, ...], flips: tuple[int, ...]) -> None:
    voxels = np.arange(4 * 5 * 6, dtype=np.int16).reshape(4, 5, 6)
    image = nib.Nifti1Image(voxels, TILTED)
    turned = image.as_reoriented(np.column_stack([axes, flips]))
    there = Volume(np.asarray(turned.dataobj), Grid.from_affine(turned.shape, turned.affine))
    grid = Grid.from_affine(voxels.shape, TILTED)
    assert grid.matches(there.grid) and there.grid.matches(grid)
    np.testing.assert_array_equal(grid.restore(there.lps()), voxels)


@pytest.mark.parametrize("axis", range(3))
def test_a_mirrored_patient_does_not_lie_on_the_same_grid(axis: int) -> None:
    """Only the direction stated in the header changes: the same millimetres are then other voxels."""
    mirrored = TILTED.copy()
    mirrored[:, axis] *= -1
    assert not Grid.from_affine((4, 5, 6), TILTED).matches(Grid.from_affine((4, 5, 6), mirrored))
