"""doctor as its user meets it: every kind of damage is done for real, named in one line, and never stops the rest."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import h5py
import nibabel as nib
import numpy as np
import pytest
from scipy.ndimage import zoom

from pipelines.phantom import UPPER_ABDOMEN, Patient, patient, write
from surm_seg import prepare, train
from surm_seg.doctor import main

Write = Callable[..., Path]
Capture = pytest.CaptureFixture[str]
SMALL = dataclasses.replace(
    UPPER_ABDOMEN, grid=(48, 48), spacing_mm=(7.5, 8.5), slices=(12, 14), slice_mm=(12, 18), no_gallbladder=0
)
FAST = ["--image_size", "64", "--batch_size", "4", "--precision", "float32", "--workers", "0", "--quiet"]


@pytest.fixture(scope="module")
def adults() -> list[Patient]:
    """Three patients with all organs, stored in one orientation."""
    world = dataclasses.replace(UPPER_ABDOMEN, no_gallbladder=0, orientations=("LAS",))
    return [patient(seed, world) for seed in (1, 2, 3)]


@pytest.fixture
def stored(tmp_path: Path, write_nifti: Write) -> Callable[[Sequence[Patient]], Path]:
    """Patients in BTCV layout, numbered from 51 up: not the benchmark's."""

    def store(patients: Sequence[Patient]) -> Path:
        for number, one in enumerate(patients, 51):
            write_nifti(tmp_path / "raw/img" / f"img{number:04d}.nii.gz", one.image, one.affine)
            write_nifti(tmp_path / "raw/label" / f"label{number:04d}.nii.gz", one.label, one.affine)
        return tmp_path / "raw"

    return store


def run(capsys: Capture, *words: object) -> tuple[int, str]:
    """Exit status and everything printed; one process, since most of these sources have three small cases."""
    status = main([*map(str, words), "--workers", "1"])
    printed = capsys.readouterr()
    return status, printed.out + printed.err


def line_of(name: str, text: str) -> str:
    return next(line for line in text.splitlines() if line.startswith(name))


def exchanged(label: np.ndarray, one: int, other: int) -> np.ndarray:
    table = np.arange(256, dtype=np.uint8)
    table[[one, other]] = other, one
    return table[label]


def scaled(affine: np.ndarray, *factors: float) -> np.ndarray:
    return affine @ np.diag([*factors, 1])


def picture(image: np.ndarray) -> np.ndarray:
    return np.rint((np.clip(image, -160, 240) + 160) / 400 * 255).astype(np.int16)


def nearly_without(label: np.ndarray, value: int) -> np.ndarray:
    """All but three voxels of an organ erased."""
    left = label.copy()
    left.reshape(-1)[np.flatnonzero(label == value)[3:]] = 0
    return left


def test_healthy_cases_are_ok_and_nothing_is_written(
    adults: list[Patient], stored: Callable, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = stored(adults)
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    status, text = run(capsys, source)
    assert status == 0 and "3 ok, 0 odd, 0 failed of 3" in text
    shape = adults[0].image.shape
    line = line_of("case0051", text)
    assert f"{shape[2]}x{shape[1]}x{shape[0]}" in line and "LAS" in line and "8 of 8" in line and line.endswith("ok")
    assert sorted(tmp_path.rglob("*")) == before


BREAKS = {
    "1024 too high?": (lambda p: dataclasses.replace(p, image=p.image + np.int16(1024)), "subtract 1024"),
    "1024 too low?": (lambda p: dataclasses.replace(p, image=p.image - np.int16(1024)), "add 1024"),
    "8-bit picture": (lambda p: dataclasses.replace(p, image=picture(p.image)), "none outside 0 to 255"),
    "nearly flat": (lambda p: dataclasses.replace(p, image=p.image // np.int16(200)), "export the CT in HU"),
    "windowed": (lambda p: dataclasses.replace(p, image=np.clip(p.image, -125, 275)), "cut off at -125 and 275"),
    "left and right exchanged": (
        lambda p: dataclasses.replace(p, label=p.label[::-1]),
        "left_kidney lies right of right_kidney",
    ),
    "front and back exchanged": (lambda p: dataclasses.replace(p, label=p.label[:, ::-1]), "in front of"),
    "head and feet exchanged": (lambda p: dataclasses.replace(p, label=p.label[..., ::-1]), "liver lies below"),
    "transposed": (lambda p: dataclasses.replace(p, label=p.label.swapaxes(0, 1)), "transpose the arrays"),
    "kidneys exchanged": (lambda p: dataclasses.replace(p, label=exchanged(p.label, 2, 3)), "exchange the two"),
    "unusual place": (
        lambda p: dataclasses.replace(p, label=exchanged(p.label, 1, 6)),
        "check the label table, or the",
    ),
    "tiny gallbladder": (lambda p: dataclasses.replace(p, label=nearly_without(p.label, 4)), "has 3 voxels"),
    "no organ": (lambda p: dataclasses.replace(p, label=np.zeros_like(p.label)), "check the table"),
    "thick slices": (lambda p: dataclasses.replace(p, affine=scaled(p.affine, 1, 1, 8)), "between slices"),
    "pixels not square": (
        lambda p: dataclasses.replace(p, affine=scaled(p.affine, 1, 1.4, 1)),
        "give the axial series",
    ),
    "slice distance differs": (
        lambda p: dataclasses.replace(p, affine=scaled(p.affine, 1, 1, 3)),
        "but case0052",
    ),
    "liver": (lambda p: dataclasses.replace(p, affine=scaled(p.affine, 0.55, 0.55, 0.55)), "of an adult usually 300"),
}


@pytest.mark.parametrize("what", BREAKS)
def test_one_odd_case_is_named_and_the_others_stay_ok(
    what: str, adults: list[Patient], stored: Callable, capsys: Capture
) -> None:
    damage, sentence = BREAKS[what]
    status, text = run(capsys, stored([adults[0], damage(adults[1]), adults[2]]))
    assert status == 0 and sentence in text
    assert what in line_of("case0052", text) or what == "slice distance differs"
    assert line_of("case0051", text).endswith("ok") and line_of("case0053", text).endswith("ok")


def test_what_several_cases_share_is_explained_once(adults: list[Patient], stored: Callable, capsys: Capture) -> None:
    flipped = [dataclasses.replace(one, label=one.label[::-1]) for one in adults]
    _, text = run(capsys, stored(flipped))
    assert text.count("left and right seem exchanged") == 1 and "(also case0052, case0053)" in text


def test_organs_of_the_wrong_size_betray_a_shifted_label_table(
    adults: list[Patient], stored: Callable, capsys: Capture
) -> None:
    _, text = run(capsys, stored([dataclasses.replace(p, label=exchanged(p.label, 6, 4)) for p in adults]))
    assert "liver is smaller than spleen in 3 of the 3 cases that show both: the two are exchanged, or" in text


def test_absent_organs_and_mixed_orientations_are_notes(
    adults: list[Patient], stored: Callable, capsys: Capture
) -> None:
    without = [dataclasses.replace(one, label=np.where(one.label == 11, 0, one.label)) for one in adults]
    without[0] = dataclasses.replace(without[0], label=np.where(without[0].label == 4, 0, without[0].label))
    turned = nib.as_closest_canonical(nib.Nifti1Image(without[1].image, without[1].affine))
    label = nib.as_closest_canonical(nib.Nifti1Image(without[1].label, without[1].affine))
    without[1] = Patient(np.asarray(turned.dataobj), np.asarray(label.dataobj), turned.affine)
    status, text = run(capsys, stored(without))
    assert status == 0 and "note: no case contains pancreas" in text
    assert "note: gallbladder is absent in 1 of 3 cases (case0051)" in text
    assert "note: axes are stored as LAS, RAS" in text and "3 ok, 0 odd, 0 failed" in text
    assert "7 of 8, no pancreas" in line_of("case0052", text)


def test_bad_files_are_lines_of_the_table_and_never_stop_the_rest(
    adults: list[Patient], stored: Callable, write_nifti: Write, capsys: Capture
) -> None:
    source = stored([*adults, adults[0]])
    image = source / "img/img0051.nii.gz"
    whole = image.read_bytes()
    image.write_bytes(whole[:-9])
    write_nifti(source / "label/label0052.nii.gz", np.full_like(adults[1].label, 99), adults[1].affine)
    write_nifti(source / "label/label0053.nii.gz", adults[2].label[..., :-1], adults[2].affine)
    status, text = run(capsys, source)
    assert status == 5 and "1 ok, 0 odd, 3 failed of 4" in text and "Traceback" not in text
    assert all(line_of(f"case005{n}", text).endswith("failed") for n in (1, 2, 3))
    assert line_of("case0054", text).endswith("ok")
    assert "img0051.nii.gz" in text and "[unknown-label]" in text and "[grid-mismatch]" in text
    (source / "label/label0054.nii.gz").write_bytes(b"not a volume")
    assert run(capsys, source)[0] == 3


def test_workers_change_nothing(adults: list[Patient], stored: Callable, capsys: Capture) -> None:
    source = stored(adults)
    status, alone = run(capsys, source)
    assert main([str(source), "--workers", "2"]) == status
    both = capsys.readouterr().out
    assert [line for line in both.splitlines() if "reading" not in line] == alone.splitlines()[1:]


def test_volumes_without_labels_are_judged_too(adults: list[Patient], stored: Callable, capsys: Capture) -> None:
    folder = stored([adults[0], dataclasses.replace(adults[1], image=adults[1].image + np.int16(1024))]) / "img"
    status, text = run(capsys, folder)
    assert status == 0 and "unlabelled" in line_of("img0051.nii.gz", text) and "subtract 1024" in text
    status, text = run(capsys, folder / "img0051.nii.gz")
    assert status == 0 and "1 ok, 0 odd" in text


def test_arrays_without_geometry_are_rewritten_only_to_be_looked_at(
    adults: list[Patient], tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TransUNet's arrays: slices, rows and columns of the LPS view, the window as [0, 1], labels in its order."""
    table = np.zeros(14, np.uint8)
    table[[8, 4, 3, 2, 6, 11, 1, 7]] = range(1, 9)
    (tmp_path / "npz/test_vol_h5").mkdir(parents=True)
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "scratch"))
    for number, one in enumerate(adults[:2], 1):
        views = (voxels.transpose(2, 1, 0)[:, ::-1] for voxels in (one.image, table[one.label]))
        image, label = (zoom(view, (1, 1.75, 1.75), order=0) for view in views)
        with h5py.File(tmp_path / f"npz/test_vol_h5/case000{number}.npy.h5", "w") as file:
            file["image"], file["label"] = (np.clip(image, -125, 275) + 125) / 400, label
    status, text = run(capsys, tmp_path / "npz")
    assert status == 0 and "unknown" in line_of("case0001", text) and "224x224" in line_of("case0002", text)
    assert "8 of 8" in line_of("case0001", text) and "2 ok, 0 odd, 0 failed of 2" in text
    assert line_of("case0001", text).endswith("windowed") and list((tmp_path / "scratch").iterdir()) == []


def test_what_is_not_there_is_told(tmp_path: Path, capsys: Capture) -> None:
    assert run(capsys)[0] == 2
    status, text = run(capsys, tmp_path / "absent")
    assert status == 3 and "There is no" in text
    (tmp_path / "empty").mkdir()
    assert run(capsys, tmp_path / "empty")[0] == 3
    status, text = run(capsys, tmp_path / "empty", "--run", tmp_path)
    assert status == 3 and "[no-run]" in text


def test_a_dry_run_only_counts(adults: list[Patient], stored: Callable, capsys: Capture) -> None:
    source = stored(adults)
    (source / "img/img0051.nii.gz").write_bytes(b"not read")
    assert run(capsys, source, "--dry-run") == (0, "dry run: 3 cases would be read\n")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prepared")
    write(folder / "raw", range(900, 903), SMALL, first_id=51)
    assert prepare.main([str(folder / "raw"), "--output", str(folder / "data"), "--quiet"]) == 0
    return folder / "data"


@pytest.fixture(scope="module")
def trained(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    words = ["--data", str(prepared), "--output", str(folder), "--steps", "4", "--validate_on", "none", "--warmup", "1"]
    assert train.main([*words, *FAST]) == 0
    return folder


def test_a_prepared_data_set_is_verified_case_by_case(prepared: Path, capsys: Capture) -> None:
    assert run(capsys, prepared)[0] == 0
    array = prepared / "cases/case0052/label.npy"
    whole = array.read_bytes()
    array.write_bytes(whole[:-1] + b"\x07")
    try:
        status, text = run(capsys, prepared)
    finally:
        array.write_bytes(whole)
    assert status == 5 and "label.npy of case case0052" in text and "1 failed of 3" in text


def test_volumes_are_compared_with_what_a_run_was_trained_on(
    trained: Path, adults: list[Patient], stored: Callable, capsys: Capture
) -> None:
    status, text = run(capsys, stored(adults), "--run", trained)
    spacing = json.loads((trained / "run.json").read_text())["fingerprint"]["spacing_mm"]["z"]
    assert status == 0 and "unlike training" in line_of("case0051", text)
    assert "slices are" in text and f"the training cases had {spacing[0]:.3g}" in text


def test_a_run_is_looked_at_part_by_part(trained: Path, prepared: Path, capsys: Capture) -> None:
    status, text = run(capsys, trained)
    assert status == 0 and "adapter      ok" in text and "1 intact" in text and "mean Dice" in text
    assert "is the one it was trained on" in text and "mm apart" in line_of("trained on", text)
    (checkpoint,) = (trained / "checkpoints").glob("step-*/model.safetensors")
    parts = {
        trained / "adapter/adapter_model.safetensors": "[adapter-digest]",
        checkpoint: "[checkpoint-digest]",
        trained / "scores/summary.json": "[scores-unreadable]",
        trained / "config.yaml": "[run-unreadable]",
    }
    for path, code in parts.items():
        whole = path.read_bytes()
        path.write_bytes(b"[1" if path.suffix in (".json", ".yaml") else whole[:-1] + bytes([whole[-1] ^ 1]))
        status, text = run(capsys, trained)
        path.write_bytes(whole)
        assert status == 3 and code in text, path
    prepared.rename(prepared.with_name("elsewhere"))
    status, text = run(capsys, trained)
    prepared.with_name("elsewhere").rename(prepared)
    assert status == 0 and "is not here; predicting works" in text


def test_real_cases(shared_data: Path, capsys: Capture) -> None:
    words = ["--label", "labels_total_v1_104class.nii.gz", "--classes", "v1"]
    status, text = run(capsys, shared_data / "ct-case-a", *words)
    assert status == 0 and line_of("ct-case-a", text).endswith("ok") and "112x101x122  3x3x3   RAS" in text
    status, text = run(capsys, shared_data / "ct-case-b-dicom")
    assert status == 0 and "20x512x512" in line_of("ct-case-b-dicom", text) and "1 ok, 0 odd" in text
    status, text = run(capsys, shared_data / "ct-case-b-dicom/dicom")
    assert status == 0 and "unlabelled" in line_of("dicom", text)
