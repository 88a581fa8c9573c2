"""Scores that follow a correction: always those of scoring the whole case again."""

from __future__ import annotations

import numpy as np
import pytest

from app.rescore import Scores
from surm_seg.scored import score_case

ORGANS = ("liver", "spleen", "aorta", "pancreas")
SHAPE = (7, 24, 20)


def blobs(seed: int) -> np.ndarray:
    """A box per organ, jittered; the last organ is in every other map only."""
    rng, labels = np.random.default_rng(seed), np.zeros(SHAPE, np.uint8)
    for value in range(1, 4 + seed % 2):
        z, y, x = rng.integers(0, 3), 5 * value - 4 + rng.integers(0, 3), rng.integers(0, 9)
        labels[z : z + 4, y : y + 5, x : x + 9] = value
    return labels


@pytest.mark.parametrize("spacing", [(2.5, 0.8, 0.7), None])
def test_scores_after_any_edits_are_those_of_the_whole_case(spacing: tuple[float, float, float] | None) -> None:
    """Also where an organ appears or vanishes on either side, in one edit or in several at once."""
    rng, labels, reference = np.random.default_rng(2), blobs(2), blobs(3)
    scores = Scores(labels, reference, ORGANS, spacing, "case1")
    for _ in range(25):
        zs = rng.choice(SHAPE[0], rng.integers(1, 3), replace=False).tolist()
        organs: set[int] = set()
        for z in zs:
            before = labels[z].copy()
            y, x = rng.integers(0, 16, 2)
            labels[z, y : y + 8, x : x + 8] = rng.integers(0, 5)
            organs |= {*before[before != labels[z]].tolist(), *labels[z][before != labels[z]].tolist()} - {0}
        for z in zs:
            scores.changed(z, organs)
        assert scores.scored == score_case(labels, reference, ORGANS, spacing, "case1")
    labels[:] = 0
    for z in range(SHAPE[0]):
        scores.changed(z, range(1, 5))
    assert scores.scored == score_case(labels, reference, ORGANS, spacing, "case1")


def test_the_worst_slice_has_the_greatest_error_area_and_not_the_lowest_dice() -> None:
    """A single wrong pixel has Dice 0; twenty wrong ones at the edge of a large organ are worth looking at."""
    reference = np.zeros(SHAPE, np.uint8)
    reference[3, 2:20, 2:20] = 1
    labels = reference.copy()
    labels[3, 2, 2:20], labels[5, 0, 0] = 2, 1
    scores = Scores(labels, reference, ORGANS, (2.5, 0.8, 0.7), "case1")
    assert scores.worst == 3
    np.testing.assert_allclose(scores.error_mm2, [0, 0, 0, 18 * 0.56, 0, 0.56, 0])
    labels[3, 2, 2:20] = 1
    scores.changed(3, [1, 2])
    assert scores.worst == 5 and scores.error_mm2[3] == 0
