"""Is a labelled CT what it should be? Rules over one case and over the cases of a set, and their report.

Nothing here refuses a case: what cannot be read has been refused before. A rule says what is odd, or notes what is
rare, and how to mend it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np

from pipelines.examination import Examined
from pipelines.organ_axes import CLEARLY, SILENT_PIXELS, SILENT_SLICES, WITNESSES
from surm_seg.domain import between, calibration, differences
from surm_seg.fingerprint import over_cases

MAX_ANISOTROPY = 10  # slice distance over pixel size: the coarsest public abdominal sets stay below
MAX_PIXEL_RATIO = 1.1  # an axial slice has square pixels
OUTLIER = 2.0  # factor from the median of the set
MIN_VOXELS = 5  # no organ is as small as that; a slip of the pen is

# mL between which an adult's complete organ lies, with wide margins for disease; outside is worth a look, not an error.
USUAL_ML: Mapping[str, tuple[int, int]] = {
    "liver": (300, 4000),
    "spleen": (20, 2000),
    "right_kidney": (20, 600),
    "left_kidney": (20, 600),
}
# In nearly every patient the first is larger; where most cases disagree, the names are wrong.
LARGER = (
    ("liver", "spleen"),
    ("liver", "stomach"),
    ("liver", "aorta"),
    ("liver", "right_kidney"),
    ("spleen", "gallbladder"),
    ("stomach", "gallbladder"),
    ("right_kidney", "gallbladder"),
)
# Direction of WITNESSES: axis of (z, y, x) that grows to it, what a contradiction exchanges, the opposite.
DIRECTIONS = {
    "left": (2, "left and right", "right of"),
    "posterior": (1, "front and back", "in front of"),
    "superior": (0, "head and feet", "below"),
}


@dataclass(frozen=True)
class Finding:
    """What a rule found.

    Args:
        what: a few words, for a table.
        sentence: with numbers, and how to mend it.
        odd: False for what is only rare, or said for information.
    """

    what: str
    sentence: str
    odd: bool = True


def judge(case: Examined, fingerprint: Mapping[str, Any] | None = None) -> list[Finding]:
    """All findings on one case; with a run's fingerprint, also what sets it apart from the training cases."""
    if case.facts is None:
        return [Finding("failed", case.error or "")]
    found = [finding for rule in RULES for finding in rule(case)]
    return found + [Finding("unlike training", text) for text in differences(case.facts, fingerprint or {})]


def judge_set(cases: Sequence[Examined]) -> list[Finding]:
    """All findings on what can be seen only by comparing cases."""
    readable = [case for case in cases if case.facts is not None]
    return [finding for rule in SET_RULES for finding in rule(readable)]


HEADER = ("case", "voxels zyx", "mm zyx", "axes", "HU 1-99 %", "HU min-max", "organs", "organ voxels", "verdict")


def report(cases: Sequence[Examined], say: Callable[[str], None], fingerprint: Mapping[str, Any] | None = None) -> bool:
    """Print a line per case, what was found in sentences, and the set in one line; whether anything is odd.

    Args:
        fingerprint: of a run's training cases, to compare every case with.
    """
    judged = [(case, judge(case, fingerprint)) for case in cases]
    say(aligned([HEADER, *(_cells(case, found) for case, found in judged)]))
    for text in _sentences(judged):
        say(text)
    whole = judge_set(cases)
    for finding in whole:
        say(f"{'' if finding.odd else 'note: '}{finding.sentence}")
    say(overview(over_cases([_record(case) for case in cases if case.facts is not None])))
    failed = sum(case.facts is None for case in cases)
    odd = sum(any(finding.odd for finding in found) for _, found in judged) - failed
    say(f"{len(cases) - odd - failed} ok, {odd} odd, {failed} failed of {len(cases)}")
    return bool(odd or failed or any(finding.odd for finding in whole))


def overview(fingerprint: Mapping[str, Any]) -> str:
    """A fingerprint in one line; an older one tells less."""
    told = [f"cases: {fingerprint.get('cases', 0)}"]
    spacing, hu = fingerprint.get("spacing_mm") or {}, fingerprint.get("hu")
    known = {axis: between(mm) for axis, mm in spacing.items() if mm}
    if known:
        told.append(f"slices {known['z']} mm apart, pixels {known['x']} mm wide")
    if hu:
        told.append(f"1 % of values below {between(hu['p1'])} and 1 % above {between(hu['p99'])} HU")
    if codes := fingerprint.get("orientations"):
        told.append(f"stored as {', '.join(codes)}")
    return "; ".join(told)


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Rows of cells as plain text, every column as wide as its widest cell; the last is left as it is."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rows = ["  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)) for line in lines]
    return "\n".join(row.rstrip() for row in rows)


def _cells(case: Examined, found: Sequence[Finding]) -> list[str]:
    verdict = ", ".join(dict.fromkeys(finding.what for finding in found)) or "ok"
    if case.facts is None:
        return [case.name, *[""] * (len(HEADER) - 2), verdict]
    facts, hu = case.facts, case.facts.hu
    spacing = "x".join(f"{mm:.3g}" for mm in facts.spacing) if facts.spacing else "unknown"
    organs, voxels = "unlabelled", ""
    if case.voxels is not None:
        absent = [organ for organ in case.voxels if organ not in case.present]
        organs = f"{len(case.present)} of {len(case.voxels)}" + (f", no {listed(absent)}" if absent else "")
        voxels = f"{sum(case.voxels.values()):,}"
    size = "x".join(map(str, facts.shape))
    values = [f"{hu['p1']}..{hu['p99']}", f"{hu['min']}..{hu['max']}"]
    return [case.name, size, spacing, facts.orientation, *values, organs, voxels, verdict]


def _sentences(judged: Sequence[tuple[Examined, Sequence[Finding]]]) -> Iterator[str]:
    """Every kind of finding once, in the words of the first case that has it; every failure by itself."""
    alike: dict[tuple[str, ...], list[tuple[str, Finding]]] = {}
    for case, found in judged:
        for finding in found:
            kind = (case.name,) if case.facts is None else (finding.what, *finding.sentence.split()[:2])
            alike.setdefault(kind, []).append((case.name, finding))
    for (first, finding), *others in alike.values():
        also = f" (also {listed(name for name, _ in others)})" if others else ""
        yield f"{'' if finding.odd else 'note: '}{first}: {finding.sentence}{also}"


def _record(case: Examined) -> dict[str, Any]:
    """A case as `over_cases` takes it."""
    assert case.facts is not None
    facts = case.facts
    return {
        "shape": facts.shape,
        "spacing": facts.spacing,
        "hu": facts.hu,
        "axcodes": facts.orientation,
        "histogram": None,
    }


def _values(case: Examined) -> Iterator[Finding]:
    assert case.facts is not None
    if doubt := calibration(case.facts.hu):
        what, sentence = doubt
        yield Finding(what, sentence, odd=what != "windowed")


def _voxel(case: Examined) -> Iterator[Finding]:
    if case.facts is None or case.facts.spacing is None:
        return
    z, y, x = case.facts.spacing
    if max(y, x) > MAX_PIXEL_RATIO * min(y, x):
        yield Finding(
            "pixels not square",
            f"pixels are {y:.3g} x {x:.3g} mm, as in a coronal or sagittal series; give the axial series where there "
            "is one",
            odd=False,
        )
    elif z > MAX_ANISOTROPY * max(y, x):
        sentence = f"slices are {z:.3g} mm apart and pixels {x:.3g} mm wide: thin organs fall between slices"
        yield Finding("thick slices", f"{sentence}; give a finer reconstruction where there is one", odd=False)


def _organs(case: Examined) -> Iterator[Finding]:
    if case.voxels is not None and not case.present:
        yield Finding("no organ", "the label map holds no organ of the table; check the table, or leave the case out")
    for organ in case.present:
        count = (case.voxels or {})[organ]
        if count < MIN_VOXELS:
            sentence = f"{organ} has {count} voxels: a slip of the pen, or the end of an organ outside the scan"
            yield Finding(f"tiny {organ}", f"{sentence}; remove or complete it")
        size, (least, most) = case.millilitres(organ), USUAL_ML.get(organ, (0, 0))
        if size is not None and most and not least <= size <= most:
            sentence = f"{organ} has {size:.0f} mL, of an adult usually {least} to {most}"
            yield Finding(f"{organ} {size:.0f} mL", f"{sentence}; check spacing and label, or it is a child", odd=False)


def places(case: Examined) -> Iterator[Finding]:
    """Organs of a case against what anatomy says of pairs of them; the LPS view grows to Superior, Posterior, Left."""
    if case.facts is None:
        return
    across = [_offset(case, pair) for pair in WITNESSES["left"] if pair[0] in case.centres and pair[1] in case.centres]
    _, down, along = np.abs(across).sum(axis=0) if across else (0, 0, 0)
    if down > CLEARLY * along:
        sentence = "left and right organs lie in front of each other: rows and columns seem exchanged"
        yield Finding("transposed", f"{sentence}; transpose the arrays, or mend the affine")
        return
    for direction, (axis, exchanged, opposite) in DIRECTIONS.items():
        silent = SILENT_SLICES if axis == 0 else SILENT_PIXELS * case.facts.shape[axis]
        pairs = [pair for pair in WITNESSES[direction] if pair[0] in case.centres and pair[1] in case.centres]
        against = [pair for pair in pairs if _offset(case, pair)[axis] < -silent]
        agreeing = [pair for pair in pairs if _offset(case, pair)[axis] > silent]
        told = ", ".join(f"{second} lies {opposite} {first}" for first, second in against)
        if against and not agreeing:
            sentence = f"{exchanged} seem exchanged: {told}; mend the affine of image and label, or flip what is wrong"
            yield Finding(f"{exchanged} exchanged", sentence)
        elif ("right_kidney", "left_kidney") in against:
            yield Finding(
                "kidneys exchanged", f"{told}, but other organs lie right; exchange the two in the label table"
            )
        elif against:
            sentence = f"{told}, but other organs lie as they should; check the label table, or the anatomy is rare"
            yield Finding("unusual place", sentence, odd=len(against) > len(agreeing))


def _offset(case: Examined, pair: tuple[str, str]) -> np.ndarray:
    """Voxels (z, y, x) from the first organ to the second."""
    first, second = pair
    return np.subtract(case.centres[second], case.centres[first])


def _spacings(cases: Sequence[Examined]) -> Iterator[Finding]:
    known = [(case.name, case.facts.spacing) for case in cases if case.facts and case.facts.spacing]
    for axis, what in ((0, "slice distance"), (2, "pixel size")):
        usual = median(mm[axis] for _, mm in known) if len(known) > 2 else 0.0
        off = [(name, mm[axis]) for name, mm in known if usual and not usual / OUTLIER <= mm[axis] <= usual * OUTLIER]
        if off:
            told = ", ".join(f"{name} {mm:.3g} mm" for name, mm in off)
            sentence = f"the {what} of the set is {usual:.3g} mm (median), but {told}; check the headers of these"
            yield Finding(f"{what} differs", sentence)


def _orientations(cases: Sequence[Examined]) -> Iterator[Finding]:
    codes = sorted({case.facts.orientation for case in cases if case.facts})
    if len(codes) > 1:
        sentence = f"axes are stored as {', '.join(codes)}; all are turned to one view, so this is fine"
        yield Finding("orientations differ", sentence, odd=False)


def _absent(cases: Sequence[Examined]) -> Iterator[Finding]:
    labelled = [case for case in cases if case.voxels is not None]
    if labelled and len(labelled) < len(cases):
        sentence = f"{len(cases) - len(labelled)} of {len(cases)} cases have no label map; they cannot be trained on"
        yield Finding("unlabelled", sentence, odd=False)
    organs = list((labelled[0].voxels or {}) if labelled else ())
    lacking = {organ: [case.name for case in labelled if organ not in case.present] for organ in organs}
    never = [organ for organ, names in lacking.items() if len(names) == len(labelled)]
    if never:
        sentence = f"no case contains {', '.join(never)}; fine for a part of the body, else check the label table"
        yield Finding("organs absent", sentence, odd=False)
    for organ, names in lacking.items():
        if names and organ not in never:
            sentence = f"{organ} is absent in {len(names)} of {len(labelled)} cases ({listed(names)})"
            yield Finding(f"{organ} absent", f"{sentence}; fine where removed or outside the scan", odd=False)


def sizes(cases: Sequence[Examined]) -> Iterator[Finding]:
    """Organs whose names are doubtful, because another one is larger in most cases than it should be."""
    for larger, smaller in LARGER:
        both = [(case.voxels or {}) for case in cases if {larger, smaller} <= {*case.present} - {*case.cut}]
        wrong = sum(voxels[larger] < voxels[smaller] for voxels in both)
        if 2 * wrong > len(both):
            sentence = f"{larger} is smaller than {smaller} in {wrong} of the {len(both)} cases that show both"
            cause = "the two are exchanged, or the label table is shifted; check it"
            yield Finding(f"{larger} < {smaller}", f"{sentence}: {cause}")


RULES: tuple[Callable[[Examined], Iterator[Finding]], ...] = (_values, _voxel, _organs, places)
SET_RULES: tuple[Callable[[Sequence[Examined]], Iterator[Finding]], ...] = (_spacings, _orientations, _absent, sizes)


def listed(names: Iterable[str], most: int = 4) -> str:
    """The first few, and how many more."""
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
