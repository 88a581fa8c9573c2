"""The Synapse 18/12 benchmark: what is published about it, and whether a prepared data set agrees.

Sources: the BTCV challenge (synapse.org, syn3193805) for sizes and spacing; TransUNet (arXiv 2102.04306) for the cases,
the split and the number of slices. SAMed (arXiv 2304.13785) uses the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from pipelines.examination import Examined, attempt, examine
from pipelines.formats.synapse import BENCHMARK, TEST
from pipelines.formats.transunet import NAME as TRANSUNET
from pipelines.formats.transunet import WINDOW_HU
from pipelines.plausibility import aligned, listed, places, report, sizes
from surm_seg.cases import Dataset
from surm_seg.errors import BadInput
from surm_seg.labels import SYNAPSE

CASES = {f"case{n:04d}" for n in BENCHMARK}
TEST_CASES = {f"case{n:04d}" for n in TEST}
SLICES = 3779
TRAINING_SLICES = (2211, 2212)  # the published list has 2,211, papers quote 2,212
SLICES_PER_CASE = (85, 198)
SLICE_MM = (2.5, 5.0)
PIXEL_MM = (0.54, 0.98)
MM_SLACK = 0.01  # published with two decimals
AIR_HU, BONE_HU, LARGEST_HU = -900, 500, 4095  # raw volumes reach from about -1024 to 3071
MAY_LACK = ("gallbladder", "right_kidney", "left_kidney")  # some patients lost one; the challenge says so
FEW = 0.25  # of the cases

PROBABLY_OTHER = "other volumes under these numbers, or resampled or cropped ones; take the challenge's own files"


@dataclass(frozen=True)
class Check:
    """One published fact against what was found.

    Args:
        cause: what probably happened and how to mend it; empty where all is as published.
    """

    what: str
    expected: str
    found: str
    cause: str = ""


def is_benchmark(dataset: Dataset) -> bool:
    """Whether a data set is meant as the benchmark: in one of its layouts, with its case numbers."""
    return dataset.format in ("synapse", TRANSUNET) and CASES.issuperset(case.id for case in dataset.cases)


def check(dataset: Dataset, cases: Sequence[Examined]) -> list[Check]:
    """Every published fact against the data set; costs nothing.

    Args:
        cases: of the data set, in any order.
    """
    readable = [case for case in cases if case.facts is not None]
    rules = (_case_ids, _split, _slices, _labels)
    return [rule(dataset) for rule in rules] + [*_voxels(dataset, readable), *_anatomy(readable)]


def check_dataset(
    dataset: Dataset, track: Callable[..., Iterator[Callable[[], Examined]]], say: Callable[[str], None]
) -> int:
    """Read a data set and print what it is: a line per case, and for the benchmark every published fact.

    Args:
        track: (items, title, total) -> the items, showing progress.
        say: prints a line.

    Returns:
        Exit status: 0, or 3 where something contradicts what is published or what anatomy allows.
    """
    tasks = [partial(attempt, case.id, partial(examine, case, dataset.labels)) for case in dataset.cases]
    cases = [task() for task in track(tasks, "checking", len(tasks))]
    odd = report(cases, say)
    if not is_benchmark(dataset):
        return BadInput.exit_status if odd else 0
    checks = check(dataset, cases)
    rows = [(one.what, "differs" if one.cause else "as published", one.expected, one.found) for one in checks]
    say(aligned([("Synapse benchmark", "verdict", "expected", "found"), *rows]))
    for one in checks:
        if one.cause:
            say(f"{one.what}: {one.cause}")
    return BadInput.exit_status if odd or any(one.cause for one in checks) else 0


def _case_ids(dataset: Dataset) -> Check:
    missing = sorted(CASES - {case.id for case in dataset.cases})
    what, expected = "cases", f"{len(CASES)}: 1 to 10 and 21 to 40"
    if not missing:
        return Check(what, expected, str(len(dataset.cases)))
    found = f"{len(dataset.cases)}, without {listed(missing)}"
    return Check(what, expected, found, "an incomplete copy; scores of a part do not compare with published ones")


def _split(dataset: Dataset) -> Check:
    what, expected = "split", f"{len(TEST_CASES)} test cases, the published ones"
    test = {case.id for case in dataset.split("test")}
    there = TEST_CASES & {case.id for case in dataset.cases}
    found = f"{len(test)} test cases"
    if leaked := sorted(there - test):
        return Check(
            what, expected, f"{found}, {listed(leaked)} not among them", "trained on the test set; omit --split"
        )
    if more := sorted(test - there):
        return Check(what, expected, f"{found}, also {listed(more)}", "a split of your own; omit --split to compare")
    return Check(what, expected, found)


def _slices(dataset: Dataset) -> Check:
    """The two counts of the training cases are both accepted; the rest is in the test cases."""
    what = "slices"
    expected = f"{SLICES} in all, {' or '.join(map(str, TRAINING_SLICES))} in the 18 training cases"
    counts = {case.id: case.shape[0] for case in dataset.cases}
    training = sum(n for name, n in counts.items() if name not in TEST_CASES)
    found = f"{sum(counts.values())}, {training}"
    if counts.keys() != CASES:
        return Check(what, expected, f"{found} in {len(counts)} cases", "cases are missing, see above")
    # The published list of slices lacks one, and what is prepared from it does so too.
    whole = SLICES - sum(counts.values()) in (0, 1) and training in TRAINING_SLICES
    return Check(what, expected, found, "" if whole else PROBABLY_OTHER)


def _labels(dataset: Dataset) -> Check:
    what, expected = "label table", f"the {len(SYNAPSE)} organs of the benchmark"
    if sorted(dataset.labels) == sorted(SYNAPSE):
        return Check(what, expected, "as expected")
    return Check(what, expected, ", ".join(dataset.labels), "another label table; prepare without --labels")


def _voxels(dataset: Dataset, cases: Sequence[Examined]) -> Iterator[Check]:
    facts = {case.name: case.facts for case in cases if case.facts is not None}
    low, high = SLICES_PER_CASE
    wrong = {name: one.shape[0] for name, one in facts.items() if not low <= one.shape[0] <= high}
    yield _each("slices of a case", f"{low} to {high}", wrong, PROBABLY_OTHER)
    sides = (224, 512) if dataset.format == TRANSUNET else (512,)
    wrong = {n: "x".join(map(str, f.shape[1:])) for n, f in facts.items() if {*f.shape[1:]} not in [{s} for s in sides]}
    yield _each("pixels of a slice", " or ".join(f"{side}x{side}" for side in sides), wrong, PROBABLY_OTHER)
    if dataset.format == TRANSUNET:
        low, high = WINDOW_HU
        wrong = {name: _reach(f.hu) for name, f in facts.items() if f.hu["min"] < low or f.hu["max"] > high}
        yield _each("HU", f"within the window {low} to {high}", wrong, "arrays that were not windowed; make them anew")
        return
    raw = {name: f.hu["min"] <= AIR_HU and BONE_HU <= f.hu["max"] <= LARGEST_HU for name, f in facts.items()}
    wrong = {name: _reach(facts[name].hu) for name, fits in raw.items() if not fits}
    yield _each(
        "HU",
        "about -1024 to up to 3071",
        wrong,
        "windowed, shifted by 1024 or not in HU; take the challenge's own files",
    )
    for what, axis, (low, high) in (("slice distance", 0, SLICE_MM), ("pixel size", 2, PIXEL_MM)):
        found = {name: f.spacing[axis] for name, f in facts.items() if f.spacing}
        wrong = {name: f"{mm:.3g}" for name, mm in found.items() if not low - MM_SLACK <= mm <= high + MM_SLACK}
        yield _each(what, f"{low} to {high} mm", wrong, PROBABLY_OTHER)


def _anatomy(cases: Sequence[Examined]) -> Iterator[Check]:
    lacking = {organ: [case.name for case in cases if organ not in case.present] for organ in SYNAPSE}
    wrong = {
        organ: f"absent in {len(names)} ({listed(names)})"
        for organ, names in lacking.items()
        if len(names) > (max(1, FEW * len(cases)) if organ in MAY_LACK else 0)
    }
    expected = f"in every case; {', '.join(MAY_LACK)} may be missing in a few"
    yield _each(
        "organs", expected, wrong, "labels were lost or the label table is shifted; see the sizes of the organs"
    )
    wrong = {case.name: found.what for case in cases for found in places(case) if found.odd}
    yield _each(
        "where organs lie", "left kidney and spleen on the left", wrong, "flipped or transposed arrays or labels"
    )
    wrong = {found.what: found.sentence for found in sizes(cases)}
    yield _each("sizes of organs", "the liver largest, the gallbladder smallest", wrong, "labels exchanged or shifted")


def _each(what: str, expected: str, wrong: Mapping[str, Any], cause: str) -> Check:
    """A fact that holds for every case, or the cases it does not hold for."""
    if not wrong:
        return Check(what, expected, "as expected")
    return Check(what, expected, listed([f"{name}: {found}" for name, found in wrong.items()]), cause)


def _reach(hu: Mapping[str, int]) -> str:
    return f"{hu['min']} to {hu['max']}"
