"""Scores slice by slice: they add up to the volume's, and few pixels never make a slice the worst."""

from __future__ import annotations

import numpy as np
import pytest

from surm_seg.metrics import score
from surm_seg.slices import overlap_by_slice, slice_rows, telling_slices

LABELS = ["spleen", "liver", "aorta"]


def maps(seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 4, (6, 9, 11)).astype(np.uint8), rng.integers(0, 4, (6, 9, 11)).astype(np.uint8)


def test_slices_add_up_to_the_volume() -> None:
    prediction, reference = maps(0)
    rows = slice_rows(prediction, reference, LABELS, (3.0, 0.5, 2.0), "a")
    for whole in score(prediction, reference, LABELS, (3.0, 0.5, 2.0)):
        own = [row for row in rows if row.organ == whole.organ]
        assert 2 * sum(r.common for r in own) / sum(r.reference + r.predicted for r in own) == whole.dice
        areas = np.array([row.cells()[-2:] for row in own], np.float64).sum(0)
        assert areas * 3.0 / 1000 == pytest.approx([whole.reference_ml, whole.predicted_ml])


def test_a_slice_is_scored_where_either_side_shows_the_organ() -> None:
    prediction, reference = np.zeros((2, 4, 3, 3), np.uint8)
    prediction[0, 0, 0], reference[1, 0, :2], prediction[1, 0, 1] = 2, 2, 2
    rows = slice_rows(prediction, reference, LABELS, None, "case7")
    assert [row.cells() for row in rows] == [
        ("case7", "liver", 0, 0.0, 0, 1, None, None),
        ("case7", "liver", 1, 2 / 3, 2, 1, None, None),
    ]


def test_prediction_and_reference_are_not_mixed_up() -> None:
    prediction, reference = maps(1)
    there = {(r.organ, r.z): (r.reference, r.predicted) for r in slice_rows(prediction, reference, LABELS, None, "a")}
    back = {(r.organ, r.z): (r.predicted, r.reference) for r in slice_rows(reference, prediction, LABELS, None, "a")}
    assert there == back
    assert there["aorta", 4] == ((reference[4] == 3).sum(), (prediction[4] == 3).sum())


def test_few_pixels_are_never_the_worst_slice() -> None:
    reference = np.zeros((4, 10, 10), np.uint8)
    reference[:3, :8, :8] = 1
    prediction = reference.copy()
    prediction[1, :4] = 0
    prediction[2, :1] = 0
    reference[3, 9, 9] = 1  # missed, but one pixel
    rows = slice_rows(prediction, reference, LABELS, None, "a")
    assert 3 not in overlap_by_slice(rows)
    assert {name: z for name, (z, _) in telling_slices(rows).items()} == {"worst": 1, "median": 2, "best": 0}
    assert telling_slices(rows)["best"] == (0, 1.0)


def test_organs_taken_for_each_other_lower_the_overlap() -> None:
    reference = np.full((1, 4, 4), 1, np.uint8)
    prediction = reference.copy()
    prediction[0, :2] = 2
    assert overlap_by_slice(slice_rows(prediction, reference, LABELS, None, "a")) == {0: 0.5}


def test_fewer_slices_give_fewer_pictures_and_none_gives_none() -> None:
    one = np.full((1, 2, 2), 1, np.uint8)
    assert list(telling_slices(slice_rows(one, one, LABELS, None, "a"))) == ["worst"]
    empty = np.zeros((3, 2, 2), np.uint8)
    assert slice_rows(empty, empty, LABELS, None, "a") == [] and telling_slices([]) == {}
