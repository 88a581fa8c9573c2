"""Organ names in the words of DICOM: a SNOMED CT code where the name leaves no doubt, a private one otherwise."""

from __future__ import annotations

import re
from hashlib import sha256
from math import cos, pi, sin, sqrt
from typing import NamedTuple

from pydicom.sr.codedict import codes
from pydicom.sr.coding import Code

PRIVATE_SCHEME = "99SURMSEG"  # DICOM leaves designators that begin with 99 to whoever needs one

_SINGLE = {
    "aorta": codes.SCT.Aorta,
    "bladder": codes.SCT.Bladder,
    "colon": codes.SCT.Colon,
    "duodenum": codes.SCT.Duodenum,
    "esophagus": codes.SCT.Esophagus,
    "gallbladder": codes.SCT.Gallbladder,
    "heart": codes.SCT.Heart,
    "inferior_vena_cava": codes.SCT.InferiorVenaCava,
    "liver": codes.SCT.Liver,
    "pancreas": codes.SCT.Pancreas,
    "portal_vein": codes.SCT.PortalVein,
    "prostate": codes.SCT.Prostate,
    "rectum": codes.SCT.Rectum,
    "small_intestine": codes.SCT.SmallIntestine,
    "spleen": codes.SCT.Spleen,
    "stomach": codes.SCT.Stomach,
    "uterus": codes.SCT.Uterus,
}
_PAIRED = {
    "adrenal_gland": codes.SCT.AdrenalGland,
    "femur": codes.SCT.Femur,
    "kidney": codes.SCT.Kidney,
    "lung": codes.SCT.Lung,
}
_SYNONYMS = {
    "gall_bladder": "gallbladder",
    "ivc": "inferior_vena_cava",
    "oesophagus": "esophagus",
    "postcava": "inferior_vena_cava",
    "small_bowel": "small_intestine",
    "urinary_bladder": "bladder",
}
_SIDES = {"left": codes.SCT.Left, "right": codes.SCT.Right}
_UNKNOWN = Code("UNSPECIFIED", PRIVATE_SCHEME, "Unspecified category")

# CIELab: at this lightness and distance from grey every hue can be shown on an sRGB screen.
_LIGHTNESS, _CHROMA = 70.0, 35.0
_GOLDEN_ANGLE = pi * (3 - sqrt(5))  # turning by it, no number of hues ever falls together


class Concept(NamedTuple):
    """What a segment is.

    Args:
        category: of CID 7150.
        kind: the structure itself, without its side.
        side: modifier of the kind (left or right), None where the name states none.
    """

    category: Code
    kind: Code
    side: Code | None


def concept(name: str) -> Concept:
    """The codes of an organ's name; side and organ in either order, any separators ("Kidney, left", "left_kidney").

    The side is a modifier and not part of the kind, as 3D Slicer's and TotalSegmentator's terminologies have it.
    """
    words = re.findall(r"\w+", name.lower().replace("_", " "))
    sides = [word for word in words if word in _SIDES]
    organ = "_".join(word for word in words if word not in _SIDES)
    organ = _SYNONYMS.get(organ, organ)
    if organ in _PAIRED and len(sides) <= 1:
        side = _SIDES[sides[0]] if sides else None
        return Concept(codes.SCT.AnatomicalStructure, _PAIRED[organ], side)
    if organ in _SINGLE and not sides:
        return Concept(codes.SCT.AnatomicalStructure, _SINGLE[organ], None)
    # A code value holds 16 characters, fewer than many names.
    digest = sha256(name.encode()).hexdigest()[:16]
    return Concept(_UNKNOWN, Code(digest, PRIVATE_SCHEME, name), None)


def colour(number: int) -> tuple[float, float, float]:
    """A colour for label value `number`, unlike those of its neighbours: CIELab (L*, a*, b*)."""
    hue = number * _GOLDEN_ANGLE
    return _LIGHTNESS, _CHROMA * cos(hue), _CHROMA * sin(hue)
