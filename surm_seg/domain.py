"""Is this volume like what the adapter was trained on? Each difference is one sentence with both numbers.

The model sees slices scaled to one size, so what counts is how much of the patient a picture shows, how far slices are
apart, and whether HU mean what they meant in training. What the fingerprint or the volume does not know is not judged.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from surm_seg.cases import Case
from surm_seg.fingerprint import hu_summary
from surm_seg.volume import Volume

LENGTH_TOLERANCE = 1.25  # factor: organs vary by as much between adults, and so does what augmentation shows
SCAN_TOLERANCE = 2.0  # factor: a scan twice as long as any in training shows parts of the body that none showed
FAT_HU = -200  # any CT of a patient has fat and air below it; how far below is padding, of no interest
LOW_TOLERANCE_HU = 100  # of the 1st percentile: more is a cut-off or shifted scale, for no patient lacks fat
HIGH_TOLERANCE_HU = 300  # of the 99th: less is the share of bone and of contrast medium

AIR_HU = -900  # a scan with air around or inside the patient reaches below it
TISSUE_HU = -100  # the 99th percentile of a patient is above it
DENSE_HU = 1000  # and below it, but for metal and a picture of bone alone
FLAT_HU = 100  # a patient's values spread over more
EIGHT_BIT = 255

Range: TypeAlias = Sequence[float | int]
"""[low, high] over the training cases."""


@dataclass(frozen=True)
class Facts:
    """What is known of one volume.

    Args:
        shape: voxels along (z, y, x).
        spacing: mm along (z, y, x); None when unknown.
        orientation: axis codes of the stored file, e.g. LPS.
        hu: min, p1, p99 and max.
        modality: as DICOM names it, e.g. CT; None when unknown.
    """

    shape: tuple[int, int, int]
    spacing: tuple[float, float, float] | None
    orientation: str
    hu: Mapping[str, int]
    modality: str | None = None

    @property
    def extent(self) -> tuple[float, float, float] | None:
        """mm along (z, y, x); None when unknown."""
        if self.spacing is None:
            return None
        z, y, x = (n * mm for n, mm in zip(self.shape, self.spacing, strict=True))
        return z, y, x


def facts_of(volume: Volume, modality: str | None = None) -> Facts:
    """The facts of a volume in HU; one pass over its voxels, 0.1 s for 512 x 512 x 150."""
    view, grid = volume.lps(), volume.grid
    return Facts(grid.lps_shape, grid.lps_spacing, "".join(grid.axcodes), hu_summary(view), modality)


def facts_of_case(case: Case) -> Facts:
    """The facts of a prepared case, from its manifest alone."""
    return Facts(case.shape, case.spacing, "".join(case.grid.axcodes), case.hu)


def differences(facts: Facts, fingerprint: Mapping[str, Any]) -> list[str]:
    """Sentences on what sets a volume apart from the training cases; [] when it fits. Costs nothing.

    Args:
        fingerprint: `fingerprint.over_cases` of the training cases, maybe of an older version; {} judges nothing.
    """
    rules = (_modality, _spacing, _extent, _hu, _orientation)
    return [sentence for rule in rules for sentence in rule(facts, fingerprint)]


def calibration(hu: Mapping[str, int]) -> tuple[str, str] | None:
    """What makes values doubtful as HU, in a few words and in a sentence that says how to mend it; None for CT."""
    low, high = hu["p1"], hu["p99"]
    values = f"values lie between {low} and {high} (1st to 99th percentile)"
    if high - low < FLAT_HU:
        return "nearly flat", f"{values}: empty, or scaled to other numbers; export the CT in HU"
    if hu["min"] >= 0 and hu["max"] <= EIGHT_BIT:
        return "8-bit picture", f"{values}, none outside 0 to {EIGHT_BIT}: a picture of the CT; export it in HU"
    if high > DENSE_HU:
        return "1024 too high?", (
            f"{values}: as if 1024 too high, the rescale intercept forgotten (or mostly metal and bone); subtract 1024"
        )
    if high < TISSUE_HU:
        return "1024 too low?", f"{values}: as if 1024 too low, the intercept applied twice; add 1024"
    if hu["min"] >= 0:
        return "not HU", f"{values}, without air at about -1000: MR, or CT without calibration; export the CT in HU"
    if hu["min"] > AIR_HU and (low == hu["min"] or high == hu["max"]):
        cut = f"values are cut off at {hu['min']} and {hu['max']}"
        return "windowed", f"{cut}: a display window; fine where it holds the window of training, else export all HU"
    return None


def _modality(facts: Facts, fingerprint: Mapping[str, Any]) -> Iterator[str]:
    if facts.modality not in (None, "CT"):
        yield f"the file's modality is {facts.modality}; the training cases were CT: expect nothing useful"


def _spacing(facts: Facts, fingerprint: Mapping[str, Any]) -> Iterator[str]:
    if facts.spacing is None:
        return
    known = fingerprint.get("spacing_mm") or {}
    slices, *pixels = facts.spacing
    consequence = "expect thin organs to be missed", "neighbouring slices look more alike than any in training"
    yield from _length(slices, known.get("z"), "slices are", " apart", consequence)
    for mm, axis in zip(pixels, "yx", strict=True):
        consequence = "expect small organs to be missed", "outlines are smoother than any in training"
        found = [*_length(mm, known.get(axis), "pixels are", " wide", consequence)]
        if found:  # the other axis would say the same again
            yield found[0]
            return


def _extent(facts: Facts, fingerprint: Mapping[str, Any]) -> Iterator[str]:
    if facts.extent is None:
        return
    known, (length, *sides) = fingerprint.get("field_of_view_mm") or {}, facts.extent
    seen = fingerprint.get("scan_length_mm")
    if seen and length > SCAN_TOLERANCE * seen[1]:
        yield (
            f"the scan is {length:.0f} mm long; the training cases had {between(seen)} mm: expect organs to be found "
            "where there are none, in parts of the body the model never saw"
        )
    for mm, axis in zip(sides, "yx", strict=True):
        consequence = "organs look smaller than any in training", "organs look larger than any in training"
        found = [*_length(mm, known.get(axis), "the picture is", " wide", consequence)]
        if found:
            yield found[0]
            return


def _length(mm: float, known: Range | None, what: str, how: str, consequence: tuple[str, str]) -> Iterator[str]:
    """A sentence where a length is more than LENGTH_TOLERANCE above, or below, all lengths of training."""
    if not known or known[0] / LENGTH_TOLERANCE <= mm <= known[1] * LENGTH_TOLERANCE:
        return
    expected = consequence[0] if mm > known[1] else consequence[1]
    yield f"{what} {_number(mm)} mm{how}; the training cases had {between(known)} mm: {expected}"


def _hu(facts: Facts, fingerprint: Mapping[str, Any]) -> Iterator[str]:
    """Compared as training saw them: where its cases were cut off at a window, what lies beyond is the same."""
    known = fingerprint.get("hu")
    if not known:
        return
    low, high = facts.hu["p1"], facts.hu["p99"]
    (low_least, low_most), (high_least, high_most) = known["p1"], known["p99"]
    seen_low = max(low, FAT_HU, low_least if known["min"][0] == low_least else FAT_HU)
    seen_high = min(high, high_most) if known["max"][1] == high_most else high
    low_fits = max(low_least, FAT_HU) - LOW_TOLERANCE_HU <= seen_low <= max(low_most, FAT_HU) + LOW_TOLERANCE_HU
    if low_fits and high_least - HIGH_TOLERANCE_HU <= seen_high <= high_most + HIGH_TOLERANCE_HU:
        return
    doubt = calibration(facts.hu)
    why = doubt[1] if doubt else "another part of the body, contrast or scanner setting"
    yield (
        f"1 % of its values are below {low} HU and 1 % above {high}; of the training cases, below "
        f"{between(known['p1'])} and above {between(known['p99'])}: {why}"
    )


def _orientation(facts: Facts, fingerprint: Mapping[str, Any]) -> Iterator[str]:
    """Harmless where headers are right, for every volume is turned to one view; a wrong header shows here first."""
    known = fingerprint.get("orientations")
    if known and facts.orientation not in known:
        yield (
            f"its axes are stored as {facts.orientation}, those of the training cases as {', '.join(known)}: it is "
            "turned to the same view; if left and right come out exchanged, its header is wrong"
        )


def between(known: Range) -> str:
    """A range in words: its two ends, or one number."""
    low, high = map(_number, known)
    return low if low == high else f"{low} to {high}"


def _number(value: float | int) -> str:
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
