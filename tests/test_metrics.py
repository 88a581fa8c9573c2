"""Metrics against independent oracles: counting, brute force, medpy and MONAI; and the edge cases of both protocols."""

from __future__ import annotations

import math
from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from medpy.metric import binary
from monai.metrics.surface_dice import compute_surface_dice
from monai.metrics.utils import create_table_neighbour_code_to_surface_area
from scipy.spatial.distance import cdist

from surm_seg.metrics import PROTOCOLS, OrganScore, dice, hd95, nsd, score
from surm_seg.surface import CORNERS, border_voxels, element_areas, neighbour_codes

Labels = tuple[np.ndarray, np.ndarray]  # prediction, reference
Millimetres = tuple[float, float, float]

BOTH = tuple(PROTOCOLS)
ANISOTROPIC = (5.0, 0.7, 0.9)

spacings = st.tuples(*[st.sampled_from((0.7, 1.0, 1.5, 3.0, 5.0))] * 3)


@st.composite
def mask_pairs(draw: st.DrawFn) -> Labels:
    """Two non-empty masks of one shape; single voxels, full arrays and masks at the border all occur."""
    shape = draw(st.tuples(*[st.integers(1, 6)] * 3))
    masks = [draw(arrays(bool, shape, elements=st.booleans(), fill=st.booleans())) for _ in range(2)]
    for mask in masks:
        mask[tuple(draw(st.integers(0, n - 1)) for n in shape)] = True
    return masks[0], masks[1]


def box(shape: tuple[int, int, int], *sides: tuple[int, int]) -> np.ndarray:
    mask = np.zeros(shape, bool)
    mask[tuple(slice(*side) for side in sides)] = True
    return mask


def one(
    prediction: np.ndarray,
    reference: np.ndarray,
    protocol: str = "recommended",
    spacing: Millimetres | None = (1.0, 1.0, 1.0),
) -> OrganScore:
    """The row of the only organ."""
    (row,) = score(prediction.astype(np.uint8), reference.astype(np.uint8), ["liver"], spacing, (protocol,))
    return row


def directed_distances(start: np.ndarray, end: np.ndarray, spacing: Millimetres) -> np.ndarray:
    """The definition: voxels with a face towards the outside, every distance measured."""

    def border(mask: np.ndarray) -> np.ndarray:
        inside = {tuple(p) for p in np.argwhere(mask)}
        steps = [s for axis in range(3) for s in (np.eye(3, dtype=int)[axis], -np.eye(3, dtype=int)[axis])]
        points = [p for p in inside if any(tuple(np.add(p, step)) not in inside for step in steps)]
        return np.array(points) * spacing

    return cdist(border(start), border(end)).min(axis=1)


@settings(deadline=None)
@given(mask_pairs())
def test_dice_counts_voxels(masks: Labels) -> None:
    ours, theirs = ({tuple(p) for p in np.argwhere(mask)} for mask in masks)
    assert dice(*masks) == 2 * len(ours & theirs) / (len(ours) + len(theirs))


@settings(deadline=None)
@given(mask_pairs(), spacings)
def test_hd95_is_the_larger_directed_percentile(masks: Labels, spacing: Millimetres) -> None:
    prediction, reference = masks
    there = np.percentile(directed_distances(prediction, reference, spacing), 95)
    back = np.percentile(directed_distances(reference, prediction, spacing), 95)
    assert hd95(prediction, reference, spacing) == pytest.approx(max(there, back), abs=1e-9)


@settings(deadline=None)
@given(mask_pairs())
def test_samed_2023_is_medpy(masks: Labels) -> None:
    prediction, reference = masks
    row = one(prediction, reference, "samed-2023")
    assert row.dice == pytest.approx(binary.dc(prediction, reference), abs=1e-12)
    assert row.hd95_vox == pytest.approx(binary.hd95(prediction, reference), abs=1e-12)


@settings(deadline=None)
@given(mask_pairs(), spacings, st.sampled_from((0.5, 1.0, 2.0, 4.0)))
def test_nsd_is_monai_with_subvoxels(masks: Labels, spacing: Millimetres, tolerance: float) -> None:
    prediction, reference = (torch.from_numpy(mask)[None, None] for mask in masks)
    theirs = compute_surface_dice(
        prediction, reference, [tolerance], include_background=True, spacing=spacing, use_subvoxels=True
    )
    assert nsd(*masks, spacing, tolerance) == pytest.approx(float(theirs), abs=1e-5)


@settings(deadline=None)
@given(spacings)
def test_element_areas_are_deepminds(spacing: Millimetres) -> None:
    theirs, kernel = create_table_neighbour_code_to_surface_area(spacing)
    bits = kernel.numpy().reshape(2, 2, 2)
    codes = [
        sum(int(bits.item(corner)) for bit, corner in enumerate(CORNERS) if code >> bit & 1) for code in range(256)
    ]
    np.testing.assert_allclose(element_areas(spacing), theirs.numpy()[codes], rtol=1e-5)


def test_neighbour_code_holds_the_eight_voxels_around_a_corner() -> None:
    mask = np.random.default_rng(0).random((2, 3, 4)) > 0.5
    padded = np.pad(mask, 1)
    for at, code in np.ndenumerate(neighbour_codes(mask)):
        assert code == sum(int(padded[tuple(np.add(at, corner))]) << bit for bit, corner in enumerate(CORNERS))


def test_border_of_a_box_is_its_shell() -> None:
    solid = box((7, 7, 7), (1, 6), (1, 6), (1, 6))
    np.testing.assert_array_equal(border_voxels(solid), solid & ~box((7, 7, 7), (2, 5), (2, 5), (2, 5)))
    np.testing.assert_array_equal(border_voxels(np.ones((3, 3, 3), bool)), ~box((3, 3, 3), (1, 2), (1, 2), (1, 2)))


def test_a_far_blob_is_seen_by_recommended_and_not_by_medpy() -> None:
    reference = box((20, 20, 70), (0, 20), (0, 20), (0, 20))
    prediction = reference | box((20, 20, 70), (0, 6), (0, 6), (60, 66))
    assert binary.hd95(prediction, reference) == 0
    assert one(prediction, reference, "samed-2023").hd95_vox == 0
    oracle = np.percentile(directed_distances(prediction, reference, (1.0, 1.0, 1.0)), 95)
    assert one(prediction, reference).hd95_mm == pytest.approx(oracle) and oracle > 40


EMPTY, ORGAN = np.zeros((3, 4, 5), bool), box((3, 4, 5), (1, 2), (1, 3), (1, 4))


@pytest.mark.parametrize(
    ("prediction", "reference", "protocol", "expected", "reasons"),
    [
        (EMPTY, EMPTY, "recommended", (None,) * 4, dict.fromkeys(("dice", "nsd", "hd95_mm"), "both empty")),
        (ORGAN, EMPTY, "recommended", (0, None, None, None), {"nsd": "reference empty", "hd95_mm": "reference empty"}),
        (EMPTY, ORGAN, "recommended", (0, 0, math.hypot(3 * 5.0, 4 * 0.7, 5 * 0.9), None), {}),
        (ORGAN, ORGAN, "recommended", (1, 1, 0, None), {}),
        (EMPTY, EMPTY, "samed-2023", (0, None, None, 0), {}),
        (ORGAN, EMPTY, "samed-2023", (1, None, None, 0), {}),
        (EMPTY, ORGAN, "samed-2023", (0, None, None, 0), {}),
        (ORGAN, ORGAN, "samed-2023", (1, None, None, 0), {}),
    ],
)  # fmt: skip
def test_edge_cases(
    prediction: np.ndarray, reference: np.ndarray, protocol: str, expected: tuple, reasons: dict[str, str]
) -> None:
    row = one(prediction, reference, protocol, ANISOTROPIC)
    assert (row.dice, row.nsd, row.hd95_mm, row.hd95_vox) == expected
    assert row.reasons == reasons
    assert row.missed == (prediction is EMPTY and reference is ORGAN)
    assert row.absent == row.reference_empty == (reference is EMPTY)
    assert row.prediction_empty == (prediction is EMPTY)


def test_without_spacing_only_the_metrics_in_mm_are_undefined() -> None:
    for prediction in (ORGAN, EMPTY):
        row = one(prediction, ORGAN, spacing=None)
        assert row.dice is not None and row.nsd is row.hd95_mm is row.reference_ml is row.volume_error_ml is None
        assert row.reasons == {"nsd": "spacing unknown", "hd95_mm": "spacing unknown"}
    assert one(ORGAN, ORGAN, "samed-2023", spacing=None).hd95_vox == 0


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_distances_use_the_spacing_of_their_axis(axis: int) -> None:
    reference, prediction = np.zeros((2, 5, 5, 5), bool)
    reference[2, 2, 2] = prediction[tuple(4 if a == axis else 2 for a in range(3))] = True
    assert one(prediction, reference, spacing=ANISOTROPIC).hd95_mm == pytest.approx(2 * ANISOTROPIC[axis])
    assert one(prediction, reference, "samed-2023", ANISOTROPIC).hd95_vox == 2


def test_a_surface_exactly_the_tolerance_away_agrees() -> None:
    reference = box((10, 10, 10), (1, 5), (1, 5), (1, 5))
    prediction = np.roll(reference, 3, axis=0)
    fine = (0.1, 10.0, 10.0)  # 3 * 0.1 is a little more than 0.3 in floating point
    assert nsd(prediction, reference, fine, 0.3) == 1
    assert nsd(prediction, reference, fine, 0.29) < 1


def test_volumes_are_in_ml() -> None:
    row = one(ORGAN | box((3, 4, 5), (0, 1), (0, 1), (0, 1)), ORGAN, spacing=(10.0, 10.0, 5.0))
    assert (row.reference_ml, row.predicted_ml, row.volume_error_ml) == (3.0, 3.5, 0.5)


@pytest.fixture
def organs() -> Labels:
    """Three overlapping organs in two label maps; the fourth is nowhere."""
    rng = np.random.default_rng(3)
    reference = np.zeros((9, 14, 20), np.uint8)
    reference[2:6, 2:9, 3:9], reference[3:8, 4:12, 11:15], reference[7, 1:4, 1:4] = 1, 2, 3
    prediction = np.where(rng.random(reference.shape) < 0.1, 0, np.roll(reference, 1, axis=2)).astype(np.uint8)
    prediction[0, 0, 19] = 1
    return prediction, reference


def numbers(rows: list[OrganScore]) -> list[list[float | None]]:
    return [[row.dice, row.nsd, row.hd95_mm, row.hd95_vox, row.volume_error_ml] for row in rows]


def assert_same(rows: list[OrganScore], others: list[OrganScore]) -> None:
    for ours, theirs in zip(numbers(rows), numbers(others), strict=True):
        assert ours == [None if value is None else pytest.approx(value, rel=1e-9, abs=1e-9) for value in theirs]


NAMES = ["liver", "spleen", "aorta", "pancreas"]


def scored(organs: Labels, workers: int = 1) -> list[OrganScore]:
    return score(organs[0], organs[1], NAMES, ANISOTROPIC, BOTH, workers=workers)


@pytest.mark.parametrize("axes", list(permutations(range(3))))
def test_axis_order_and_direction_do_not_matter(organs: Labels, axes: tuple) -> None:
    prediction, reference = (labels.transpose(axes)[::-1, :, ::-1] for labels in organs)
    spacing = (ANISOTROPIC[axes[0]], ANISOTROPIC[axes[1]], ANISOTROPIC[axes[2]])
    assert_same(score(prediction, reference, NAMES, spacing, BOTH), scored(organs))


def test_background_around_the_organs_does_not_matter(organs: Labels) -> None:
    prediction, reference = (np.pad(labels, ((1, 2), (3, 0), (0, 4))) for labels in organs)
    assert_same(scored((prediction, reference)), scored(organs))


def test_organs_are_independent_and_in_order(organs: Labels) -> None:
    rows = scored(organs)
    assert [(row.organ, row.protocol) for row in rows] == [(name, protocol) for name in NAMES for protocol in BOTH]
    assert scored(organs, workers=2) == rows
    for value, name in enumerate(NAMES, 1):
        prediction, reference = ((labels == value).astype(np.int16) for labels in organs)
        alone = score(prediction, reference, [name], ANISOTROPIC, BOTH)
        assert alone == [row for row in rows if row.organ == name]


def test_label_maps_of_two_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="one 3D shape"):
        score(np.zeros((2, 2, 2), np.uint8), np.zeros((2, 2, 3), np.uint8), ["liver"], None)
