"""The prepared data set on disk: complete or not there, detected when damaged, read back as it was written."""

from __future__ import annotations

import hashlib
import json
import stat
from pathlib import Path

import numpy as np
import pytest

from surm_seg.cases import Dataset
from surm_seg.dataset_writer import finished, write_case, write_dataset
from surm_seg.errors import BadConfig, BadInput, Corrupt
from surm_seg.volume import Grid, Volume

ORGANS = ("liver", "spleen")
RAS = Grid.from_affine((4, 5, 6), np.diag([1.0, 1.5, 3.0, 1.0]))
INPUTS = {"image": "a" * 64, "label": "b" * 64}


def volume(seed: int = 0) -> Volume:
    return Volume(np.random.default_rng(seed).integers(-1000, 1000, RAS.shape, np.int16), RAS)


def label() -> np.ndarray:
    voxels = np.zeros(RAS.shape, np.uint8)
    voxels[0, 0, 0] = 1  # the patient's leftmost, hindmost, lowest corner, as indices grow to Right, Anterior, Superior
    voxels[1:3, 1, 1] = 2
    return voxels


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    """Two training cases and an unlabelled test case."""
    for number, labels in enumerate((label(), label(), None)):
        write_case(tmp_path, f"case{number:03d}", volume(number), labels, ORGANS, INPUTS)
    splits = {"case000": "train", "case001": "train", "case002": "test"}
    return write_dataset(tmp_path, "folder", ORGANS, splits, {"case000": ["Doe^Jane"]})


def test_a_case_reads_back_in_the_radiological_view(dataset: Dataset) -> None:
    case = dataset.case("case000")
    assert case.image.dtype == np.int16 and not case.image.flags.writeable and isinstance(case.image, np.memmap)
    np.testing.assert_array_equal(case.image, volume(0).lps())
    assert case.label is not None and case.label.dtype == np.uint8
    np.testing.assert_array_equal(RAS.restore(np.asarray(case.label)), label())
    assert case.label[0, -1, -1] == 1  # lowest slice, last row, last column
    assert (case.shape, case.spacing, case.grid) == ((6, 5, 4), (3.0, 1.5, 1.0), RAS)
    assert case.histogram == {"liver": 1, "spleen": 2}
    assert dataset.case("case002").label is None and dataset.case("case002").histogram is None


def test_hu_summary_is_that_of_a_sorted_volume(dataset: Dataset) -> None:
    case = dataset.case("case001")
    values = np.sort(case.image, axis=None)
    assert (case.hu["min"], case.hu["max"]) == (values[0], values[-1])
    assert case.hu["p1"] == np.percentile(values, 1, method="inverted_cdf")
    assert case.hu["p99"] == np.percentile(values, 99, method="inverted_cdf")


def test_splits_and_fingerprint_describe_the_training_cases_only(dataset: Dataset) -> None:
    assert [case.id for case in dataset.split("train")] == ["case000", "case001"]
    assert [case.id for case in dataset.split("test")] == ["case002"] and dataset.split("val") == ()
    fingerprint = dataset.fingerprint
    assert fingerprint["cases"] == 2 and fingerprint["orientations"] == ["RAS"]
    assert fingerprint["spacing_mm"] == {"z": [3.0, 3.0], "y": [1.5, 1.5], "x": [1.0, 1.0]}
    assert fingerprint["field_of_view_mm"] == {"y": [7.5, 7.5], "x": [4.0, 4.0]}
    assert fingerprint["label_share"] == {"liver": [1 / 120, 1 / 120], "spleen": [2 / 120, 2 / 120]}
    with pytest.raises(BadConfig):
        dataset.split("validation")
    with pytest.raises(BadInput, match="case000"):
        dataset.case("case9")


def test_the_digest_is_that_of_the_manifest_and_repeats(dataset: Dataset) -> None:
    manifest = dataset.folder / "dataset.json"
    assert dataset.digest == hashlib.sha256(manifest.read_bytes()).hexdigest() == Dataset.open(dataset.folder).digest
    again = write_dataset(dataset.folder, "folder", ORGANS, {case.id: case.split for case in dataset.cases})
    assert again.digest == dataset.digest


def test_the_users_own_names_are_readable_by_the_user_only(dataset: Dataset) -> None:
    key = dataset.folder / "case_key.json"
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    others = [path for path in dataset.folder.rglob("*") if path.is_file() and path != key]
    assert b"Doe" in key.read_bytes() and not any(b"Doe" in path.read_bytes() for path in others)


@pytest.mark.parametrize("name", ["image.npy", "label.npy"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "replace"])
def test_a_damaged_array_is_found_and_named(name: str, damage: str, dataset: Dataset) -> None:
    dataset.verify()
    path = dataset.folder / "cases" / "case001" / name
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[-1] ^= 1
        path.write_bytes(data)
    elif damage == "cut":
        path.write_bytes(data[:-50])
    elif damage == "remove":
        path.unlink()
    else:
        np.save(path, np.zeros((2, 2), np.float32))
    with pytest.raises(Corrupt, match="case001"):
        dataset.verify()
    assert not finished(dataset.folder, "case001", INPUTS)
    if damage != "flip":  # a flipped voxel is only seen by reading everything
        with pytest.raises(Corrupt, match="case001"):
            getattr(dataset.case("case001"), name.removesuffix(".npy"))


def test_a_folder_without_manifest_tells_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="prepare"):
        Dataset.open(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda text: text[:-20], Corrupt),
        (lambda text: "[]", Corrupt),
        (lambda text: json.dumps({"labels": {"liver": 1}}), Corrupt),
        (lambda text: text.replace('"image_sha256"', '"other"'), Corrupt),
        (lambda text: text.replace('"id": "case000"', '"id": "../../etc"'), Corrupt),
        (lambda text: text.replace('"test"', '"exam"'), Corrupt),
        (lambda text: text.replace("dataset-1", "dataset-99"), BadInput),
        (lambda text: text.replace('"protocol": 1', '"protocol": 0'), BadInput),
    ],
)
def test_a_manifest_that_is_not_ours_is_refused(change, error: type[Exception], dataset: Dataset) -> None:
    manifest = dataset.folder / "dataset.json"
    manifest.write_text(change(manifest.read_text()))
    with pytest.raises(error):
        Dataset.open(dataset.folder)


def test_a_case_is_finished_only_for_the_inputs_it_was_made_from(dataset: Dataset) -> None:
    assert finished(dataset.folder, "case000", INPUTS)
    assert not finished(dataset.folder, "case000", INPUTS | {"label": "c" * 64})
    assert not finished(dataset.folder, "case009", INPUTS)


def test_a_case_is_replaced_together_with_the_manifest(dataset: Dataset) -> None:
    changed = INPUTS | {"image": "d" * 64}
    for case_id in ("case000", "case001"):
        write_case(dataset.folder, case_id, volume(7), label(), ORGANS, changed)
    dataset.verify()
    assert Dataset.open(dataset.folder).digest == dataset.digest
    assert finished(dataset.folder, "case000", changed)  # and need not be made again
    again = write_dataset(dataset.folder, "folder", ORGANS, {"case000": "train"})
    again.verify()
    np.testing.assert_array_equal(again.case("case000").image, volume(7).lps())
    assert not list((dataset.folder / "cases").glob(".*"))


def test_a_case_that_waits_is_dropped_when_the_one_in_place_is_asked_for(dataset: Dataset) -> None:
    write_case(dataset.folder, "case000", volume(7), label(), ORGANS, INPUTS | {"image": "d" * 64})
    assert finished(dataset.folder, "case000", INPUTS)
    again = write_dataset(dataset.folder, "folder", ORGANS, {case.id: case.split for case in dataset.cases})
    assert again.digest == dataset.digest
    again.verify()


def test_a_case_that_is_no_longer_asked_for_leaves_nothing(dataset: Dataset) -> None:
    write_dataset(dataset.folder, "folder", ORGANS, {"case000": "train"})
    assert [path.name for path in (dataset.folder / "cases").iterdir()] == ["case000"]


def test_a_manifest_that_cannot_be_written_leaves_the_old_data_set(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    write_case(dataset.folder, "case000", volume(7), label(), ORGANS, INPUTS | {"image": "d" * 64})
    monkeypatch.setattr("surm_seg.dataset_writer._write_json", full)
    with pytest.raises(OSError, match="No space"):
        write_dataset(dataset.folder, "folder", ORGANS, {"case000": "train"}, {"case000": ["Roe"]})
    Dataset.open(dataset.folder).verify()
    assert "Doe" in (dataset.folder / "case_key.json").read_text()


def test_a_case_that_fails_while_being_written_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> dict[str, int]:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("surm_seg.dataset_writer.label_histogram", full)
    with pytest.raises(OSError, match="No space"):
        write_case(tmp_path, "case000", volume(), label(), ORGANS, INPUTS)
    assert list((tmp_path / "cases").iterdir()) == []
