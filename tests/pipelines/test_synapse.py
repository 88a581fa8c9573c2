"""The Synapse benchmark's published facts: as published is silent, and every departure names what happened."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.examination import Examined, from_json
from pipelines.formats.synapse import BENCHMARK, TEST
from pipelines.phantom import UPPER_ABDOMEN, write
from pipelines.synapse import Check, check, check_dataset, is_benchmark
from surm_seg import prepare
from surm_seg.cases import PROTOCOL, SCHEMA, Dataset
from surm_seg.domain import Facts
from surm_seg.grid import Grid
from surm_seg.labels import SYNAPSE

# The organs of one patient, as LPS indices (z, y, x) of a volume of 512 x 512, and their voxels.
PLACES = dict(
    spleen=(80, 300, 400), right_kidney=(60, 330, 170), left_kidney=(60, 330, 350), gallbladder=(70, 220, 180),
    liver=(85, 230, 150), stomach=(85, 200, 330), aorta=(60, 290, 265), pancreas=(75, 240, 260),
)  # fmt: skip
VOXELS = dict(zip(SYNAPSE, (90_000, 60_000, 60_000, 12_000, 600_000, 150_000, 30_000, 35_000), strict=True))
RAW_HU = {"min": -1024, "p1": -1000, "p99": 280, "max": 2900}


def slices(number: int) -> int:
    """Slices of a case: 2,212 in the 18 training cases and 1,567 in the 12 test cases."""
    same = sorted(BENCHMARK & TEST if number in TEST else BENCHMARK - TEST)
    total = 1567 if number in TEST else 2212
    return total // len(same) + (same.index(number) < total % len(same))


Change = Callable[[dict[str, Any]], object]


def benchmark(folder: Path, change: Change = lambda _: None, change_case: Change = lambda _: None) -> Dataset:
    """A manifest on disk as the real data give it, maybe changed; the arrays themselves are not needed."""
    records = []
    for n in sorted(BENCHMARK):
        shape, spacing = (slices(n), 512, 512), (3.0, 0.76, 0.76)
        grid = Grid.from_affine((512, 512, shape[0]), np.diag([-0.76, 0.76, 3.0, 1.0]))
        record: dict[str, Any] = {
            "id": f"case{n:04d}", "split": "test" if n in TEST else "val" if n in (5, 6, 7) else "train",
            "shape": list(shape), "spacing": list(spacing), "axcodes": "LAS", "grid": grid.to_json(), "inputs": {},
            "image_sha256": "", "label_sha256": "", "hu": RAW_HU, "histogram": dict(VOXELS),
        }  # fmt: skip
        change_case(record)
        records.append(record)
    manifest = {
        "schema": SCHEMA, "protocol": PROTOCOL, "format": "synapse", "labels": list(SYNAPSE),
        "fingerprint": {}, "cases": records,
    }  # fmt: skip
    change(manifest)
    (folder / "dataset.json").write_text(json.dumps(manifest))
    return Dataset.open(folder)


def examined(dataset: Dataset, change: Callable[[Examined], Examined] = lambda case: case) -> list[Examined]:
    """The cases as reading their labels would find them."""
    found = []
    for case in dataset.cases:
        facts = Facts(case.shape, case.spacing, "LAS", case.hu)
        centres = {organ: PLACES[organ] for organ, count in (case.histogram or {}).items() if count}
        floats = {organ: (float(z), float(y), float(x)) for organ, (z, y, x) in centres.items()}
        found.append(change(Examined(case.id, facts, case.histogram, floats)))
    return found


def departures(checks: list[Check]) -> dict[str, str]:
    return {one.what: f"{one.found}: {one.cause}" for one in checks if one.cause}


def test_the_benchmark_as_published_departs_in_nothing(tmp_path: Path) -> None:
    dataset = benchmark(tmp_path)
    checks = check(dataset, examined(dataset))
    assert is_benchmark(dataset) and departures(checks) == {}
    assert next(one.found for one in checks if one.what == "slices") == "3779, 2212"
    facts = {one.what for one in checks}
    assert facts >= {"cases", "split", "slices", "label table", "HU", "slice distance", "pixel size", "organs"}


def drop_slice(record: dict[str, Any]) -> None:
    record["grid"]["shape"][2] -= record["id"] == "case0005"


def few_without_gallbladder(record: dict[str, Any]) -> None:
    record["histogram"]["gallbladder"] *= record["id"] not in ("case0005", "case0009")


@pytest.mark.parametrize("change", [drop_slice, few_without_gallbladder])
def test_what_is_legitimate_is_passed_over(change: Change, tmp_path: Path) -> None:
    """The published list lacks one slice, and some patients lost their gallbladder."""
    dataset = benchmark(tmp_path, change_case=change)
    assert departures(check(dataset, examined(dataset))) == {}


def windowed(manifest: dict[str, Any]) -> None:
    manifest["format"] = "transunet"
    for record in manifest["cases"]:
        record |= {"spacing": None, "hu": {"min": -125, "p1": -125, "p99": 275, "max": 275}}


def test_the_preprocessed_arrays_are_checked_against_their_window(tmp_path: Path) -> None:
    dataset = benchmark(tmp_path, windowed)
    assert is_benchmark(dataset) and departures(check(dataset, examined(dataset))) == {}
    for record in (manifest := json.loads((tmp_path / "dataset.json").read_text()))["cases"]:
        record["hu"] = RAW_HU
    (tmp_path / "dataset.json").write_text(json.dumps(manifest))
    dataset = Dataset.open(tmp_path)
    assert "not windowed" in departures(check(dataset, examined(dataset)))["HU"]


def split_of(split: str, *names: str) -> Change:
    def change(record: dict[str, Any]) -> None:
        record["split"] = split if record["id"] in names else record["split"]

    return change


MANIFESTS: dict[str, tuple[str, Change, str]] = {
    "a case is missing": ("cases", lambda m: m["cases"].pop(3), "29, without case0004: an incomplete copy"),
    "another label table": ("label table", lambda m: m["labels"].reverse() or m["labels"].pop(), "prepare without"),
}
CASES: dict[str, tuple[str, Change, str]] = {
    "a test case is trained on": ("split", split_of("train", "case0008"), "case0008 not among them: trained on the"),
    "a training case is held out": ("split", split_of("test", "case0005"), "also case0005: a split of your own"),
    "thick slices": ("slice distance", lambda r: r.update(spacing=[8.0, 0.76, 0.76]), "resampled or cropped"),
    "resampled pixels": ("pixel size", lambda r: r.update(spacing=[3.0, 1.5, 1.5]), "case0001: 1.5"),
    "windowed": ("HU", lambda r: r.update(hu={"min": -125, "p1": -125, "p99": 275, "max": 275}), "windowed, shifted"),
    "shifted": ("HU", lambda r: r.update(hu={"min": 0, "p1": 24, "p99": 1304, "max": 4095}), "shifted by 1024"),
    "cropped slices": ("slices", lambda r: r["grid"]["shape"].__setitem__(2, 70), "2100, 1260: other volumes"),
    "smaller pixels": ("pixels of a slice", lambda r: r["grid"].update(shape=[256, 256, 120]), "case0001: 256x256"),
    "no liver": ("organs", lambda r: r["histogram"].update(liver=0), "liver: absent in 30"),
    "no gallbladder": ("organs", lambda r: r["histogram"].update(gallbladder=0), "labels were lost"),
    "labels 5 and 6 exchanged": (
        "sizes of organs",
        lambda r: r["histogram"].update(liver=VOXELS["stomach"], stomach=VOXELS["liver"]),
        "liver is smaller than stomach in 30 of the 30 cases that show both",
    ),
}


@pytest.mark.parametrize("broken", [*MANIFESTS, *CASES])
def test_every_departure_is_found_and_explained(broken: str, tmp_path: Path) -> None:
    if broken in CASES:
        what, change, sentence = CASES[broken]
        dataset = benchmark(tmp_path, change_case=change)
    else:
        what, change, sentence = MANIFESTS[broken]
        dataset = benchmark(tmp_path, change)
    assert sentence in departures(check(dataset, examined(dataset)))[what]


def mirrored(case: Examined) -> Examined:
    return dataclasses.replace(case, centres={o: (z, y, 511 - x) for o, (z, y, x) in case.centres.items()})


def transposed(case: Examined) -> Examined:
    return dataclasses.replace(case, centres={o: (z, x, y) for o, (z, y, x) in case.centres.items()})


@pytest.mark.parametrize(
    ("change", "found"), [(mirrored, "left and right exchanged"), (transposed, "transposed")], ids=["mirror", "turn"]
)
def test_flipped_and_transposed_cases_are_told_apart(
    change: Callable[[Examined], Examined], found: str, tmp_path: Path
) -> None:
    dataset = benchmark(tmp_path)
    wrong = departures(check(dataset, examined(dataset, change)))
    assert list(wrong) == ["where organs lie"] and f"case0001: {found}" in wrong["where organs lie"]


def test_a_case_survives_the_way_through_a_file(tmp_path: Path) -> None:
    case = examined(benchmark(tmp_path))[0]
    for one in (case, Examined("x", error="[code] sentence"), dataclasses.replace(case, cut=("liver",))):
        assert from_json(json.loads(json.dumps(dataclasses.asdict(one)))) == one


SMALL = dataclasses.replace(UPPER_ABDOMEN, grid=(48, 48), spacing_mm=(7.5, 8.5), slices=(12, 14), slice_mm=(12, 18))


def plainly(items: Any, *_: object) -> Iterator[Any]:
    yield from items


@pytest.mark.parametrize(("first", "status", "benchmark"), [(1, 3, True), (51, 0, False)])
def test_a_prepared_data_set_is_checked_as_what_it_claims_to_be(
    first: int, status: int, benchmark: bool, tmp_path: Path
) -> None:
    """Generated patients in the benchmark's layout contradict it under its numbers, and under others are fine."""
    write(tmp_path / "raw", range(900, 903), SMALL, first_id=first)
    assert prepare.main([str(tmp_path / "raw"), "--output", str(tmp_path / "data"), "--workers", "1", "--quiet"]) == 0
    lines: list[str] = []
    dataset = Dataset.open(tmp_path / "data")
    assert check_dataset(dataset, plainly, lines.append) == status
    text = "\n".join(lines)
    assert f"case{first:04d}" in text and "3 ok, 0 odd, 0 failed of 3" in text
    assert ("Synapse benchmark" in text) is benchmark
    assert ("slices of a case: other volumes" in text) is benchmark and ("incomplete copy" in text) is benchmark


def test_a_damaged_array_contradicts_and_does_not_stop_the_check(tmp_path: Path) -> None:
    write(tmp_path / "raw", range(900, 903), SMALL, first_id=51)
    assert prepare.main([str(tmp_path / "raw"), "--output", str(tmp_path / "data"), "--workers", "1", "--quiet"]) == 0
    array = tmp_path / "data/cases/case0052/image.npy"
    array.write_bytes(array.read_bytes()[:-1] + b"\x7f")
    lines: list[str] = []
    assert check_dataset(Dataset.open(tmp_path / "data"), plainly, lines.append) == 3
    assert "image.npy of case case0052" in "\n".join(lines) and lines[-1] == "2 ok, 0 odd, 1 failed of 3"
