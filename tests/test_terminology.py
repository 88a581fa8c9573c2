"""Organ names as DICOM codes, and colours for them."""

from __future__ import annotations

import math

from surm_seg.labels import SYNAPSE
from surm_seg.terminology import PRIVATE_SCHEME, colour, concept


def test_only_names_that_leave_no_doubt_get_a_snomed_code() -> None:
    assert [concept(name).kind.scheme_designator for name in SYNAPSE] == ["SCT"] * len(SYNAPSE)
    assert concept("Kidney, left") == concept("left_kidney") != concept("right_kidney")
    assert concept("kidney").side is None and concept("kidney").kind == concept("left_kidney").kind
    assert concept("Gall bladder") == concept("gallbladder") != concept("urinary_bladder")
    for name in ("left_liver", "kidney_tumor", "left_right_kidney", "prostate/uterus", "liver 2", "", "nierechts"):
        assert concept(name).kind.scheme_designator == concept(name).category.scheme_designator == PRIVATE_SCHEME
    assert concept("a").kind != concept("b").kind


def test_neighbouring_labels_have_colours_far_apart() -> None:
    for number in range(1, 256):
        assert all(math.dist(colour(number), colour(number + step)) > 10 for step in (1, 2, 3))
