"""Volumes that a browser sends: read like any other, under names of ours, refused with a sentence, gone at the end."""

from __future__ import annotations

import gzip
import io
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from test_dicom import CANARY, header
from test_dicom import write as write_dicom

from app.uploads import Uploads
from surm_seg.cases import Case
from surm_seg.errors import BadInput
from surm_seg.lock import held
from surm_seg.volume import Grid, digest, read_image, write_dicom_seg

AFFINE = np.array([[-2.0, 0, 0, 30], [0, 1.5, 0, -40], [0, 0, 4, 7], [0, 0, 0, 1]])  # L, A, S
ORGANS = ("liver", "spleen")


class Sent(io.BytesIO):
    """What Streamlit hands over: bytes, and the name on the user's disk."""

    def __init__(self, content: bytes, name: str) -> None:
        super().__init__(content)
        self.name = name


def sent(path: Path, name: str | None = None) -> Sent:
    return Sent(path.read_bytes(), name or path.name)


def voxels(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(-1000, 1000, (9, 8, 7)).astype(np.int16)


@pytest.fixture
def nifti(tmp_path: Path, write_nifti: Callable[..., Path]) -> Path:
    return write_nifti(tmp_path / "mine" / f"{CANARY}.nii.gz", voxels(), AFFINE)


@pytest.fixture
def uploads(tmp_path: Path) -> Uploads:
    return Uploads(tmp_path / "uploads")


def test_a_nifti_file_becomes_a_case(uploads: Uploads, nifti: Path) -> None:
    upload = uploads.receive([sent(nifti)])
    volume = read_image(nifti)
    assert isinstance(upload.case, Case) and np.array_equal(upload.case.image, volume.lps())
    assert isinstance(upload.case.image, np.memmap)
    assert upload.case.grid == volume.grid and upload.case.spacing == (4.0, 1.5, 2.0)
    assert upload.case.inputs == {"image": digest(nifti)} and digest(upload.original) == digest(nifti)
    assert upload.case.label is None and upload.modality is None
    upload.case.verify()


def test_the_files_of_a_dicom_series_become_a_case_whatever_they_are_called(uploads: Uploads, tmp_path: Path) -> None:
    folder = write_dicom(tmp_path / "cd", [header(k) for k in (2, 0, 3, 1)])
    files = [sent(path, "same name") for path in sorted(folder.iterdir())]
    upload = uploads.receive([*files, Sent(b"read me", "README.txt")])
    assert np.array_equal(upload.case.image, read_image(folder).lps())
    assert (upload.original.is_dir(), upload.modality, upload.case.grid) == (True, "CT", read_image(folder).grid)


def test_nothing_of_the_users_names_is_kept(uploads: Uploads, nifti: Path, tmp_path: Path) -> None:
    uploads.receive([sent(nifti)])
    series = write_dicom(tmp_path / CANARY, [header(k) for k in range(2)])
    upload = uploads.receive([sent(path, f"{CANARY}.dcm") for path in series.iterdir()])
    kept = [path for path in uploads.folder.rglob("*") if path.is_file() and path.parent != upload.original]
    assert kept and not any(CANARY in str(path) or CANARY.encode() in path.read_bytes() for path in kept)
    assert CANARY not in str(upload) and not any(CANARY in path.name for path in upload.original.iterdir())


def test_two_uploads_of_one_name_stand_side_by_side(uploads: Uploads, nifti: Path, tmp_path: Path) -> None:
    nib.save(nib.Nifti1Image(voxels(1), AFFINE), tmp_path / nifti.name)
    one, two = uploads.receive([sent(nifti)]), uploads.receive([sent(tmp_path / nifti.name)])
    assert one.case.id != two.case.id and not np.array_equal(one.case.image, two.case.image)
    uploads.forget(one)
    assert not one.original.exists() and two.case.image.any()


def test_a_session_takes_its_uploads_with_it_and_a_dead_server_leaves_none(tmp_path: Path, nifti: Path) -> None:
    root = tmp_path / "uploads"
    one, two = Uploads(root), Uploads(root)
    kept = two.receive([sent(nifti)])
    one.receive([sent(nifti)])
    one.close()
    one.close()
    assert [path.name for path in root.iterdir()] == [two.folder.name]
    (root / "0123" / "upload-1").mkdir(parents=True)  # of a session whose server was killed: nobody holds it
    (root / "0123" / "upload-1" / "volume.nii.gz").touch()
    with held(root / "4567", "used"):
        three = Uploads(root)
        assert {path.name for path in root.iterdir()} == {two.folder.name, three.folder.name, "4567"}
    assert kept.case.image.any()


def cut(path: Path) -> bytes:
    return path.read_bytes()[:-20]


def four_dimensional() -> bytes:
    return gzip.compress(nib.Nifti1Image(np.zeros((4, 4, 4, 2), np.int16), AFFINE).to_bytes())


def test_what_cannot_be_read_is_refused_without_a_path_and_leaves_nothing(
    uploads: Uploads, nifti: Path, tmp_path: Path
) -> None:
    slices = write_dicom(tmp_path / "series", [header(k) for k in (0, 1, 3, 4)])
    other = header(9)
    other.SeriesInstanceUID = "1.2.3"
    several = write_dicom(tmp_path / "several", [header(0), header(1), other])
    bent = header(1)
    del bent.PixelSpacing
    broken = write_dicom(tmp_path / "broken", [header(0), bent, header(2)])
    cases: dict[str, list[Sent]] = {
        "upload-kind": [Sent(b"PK\3\4", "all.zip")],
        "empty-file": [Sent(b"", f"{CANARY}.nii")],
        "truncated": [Sent(cut(nifti), f"{CANARY}.nii.gz")],
        "not-nifti": [Sent(b"x" * 4000, f"{CANARY}.nii")],
        "not-3d": [Sent(four_dimensional(), f"{CANARY}.nii.gz")],
        "missing-slices": [sent(path) for path in slices.iterdir()],
        "several-series": [sent(path) for path in several.iterdir()],
        "bad-header": [sent(path) for path in sorted(broken.iterdir())],
        "single-slice": [sent(slices / "IM000.dcm") if (slices / "IM000.dcm").exists() else sent(slices / "IM000")],
    }
    for code, files in cases.items():
        with pytest.raises(BadInput) as refusal:
            uploads.receive(files)
        told = str(refusal.value)
        assert refusal.value.code == code and told[0].isupper() and told.endswith(".")
        assert str(tmp_path) not in told and CANARY not in told and "/" not in told.replace("and/or", "")
        if code == "bad-header":
            assert told.startswith("File 2 of the upload has no usable PixelSpacing")
    for files in ([], [sent(nifti), sent(nifti)]):
        with pytest.raises(BadInput, match=r"give one \.nii"):
            uploads.receive(files)
    assert [path for path in uploads.folder.iterdir() if path.name != ".lock"] == []


def test_the_cap_counts_all_files_as_they_come(tmp_path: Path, nifti: Path) -> None:
    small = Uploads(tmp_path / "small", most_bytes=nifti.stat().st_size)
    small.receive([sent(nifti)])
    series = write_dicom(tmp_path / "series", [header(k) for k in range(8)])
    size = sum(path.stat().st_size for path in series.iterdir())
    capped = Uploads(tmp_path / "capped", most_bytes=size - 1)
    with pytest.raises(BadInput, match="larger than 0 MB"):
        capped.receive([sent(path) for path in series.iterdir()])
    assert not any(capped.folder.rglob("0*"))


def labels() -> np.ndarray:
    return np.random.default_rng(3).integers(0, 3, (9, 8, 7)).astype(np.uint8)


def test_a_label_map_becomes_the_reference(
    uploads: Uploads, nifti: Path, tmp_path: Path, write_nifti: Callable[..., Path]
) -> None:
    """In whatever order the file stores its axes, as long as it lies on the volume."""
    upload = uploads.receive([sent(nifti)])
    expected = Grid.from_affine((9, 8, 7), AFFINE).lps(labels())
    straight = write_nifti(tmp_path / "l.nii.gz", labels(), AFFINE)
    turned = nib.load(straight).as_reoriented(np.array([[1, -1], [2, 1], [0, 1]]))
    nib.save(turned, tmp_path / "turned.nii")
    for path in (straight, tmp_path / "turned.nii"):
        case = uploads.receive_labels(upload, sent(path), ORGANS).case
        case.verify()
        assert np.array_equal(case.label, expected)
        assert case.histogram == {"liver": (expected == 1).sum(), "spleen": (expected == 2).sum()}
    assert sorted(path.name for path in uploads.folder.iterdir()) == sorted([".lock", case.id])


def test_a_segmentation_is_understood_by_the_names_of_its_classes(uploads: Uploads, tmp_path: Path) -> None:
    folder = write_dicom(tmp_path / "series", [header(k) for k in range(4)])
    upload = uploads.receive([sent(path) for path in folder.iterdir()])
    drawn = np.random.default_rng(0).integers(0, 4, upload.case.grid.shape).astype(np.uint8)
    write_dicom_seg(tmp_path / "seg", drawn, ("kidney_right", "spleen", "liver"), folder)
    case = uploads.receive_labels(upload, sent(tmp_path / "seg"), ("liver", "right_kidney")).case
    assert np.array_equal(case.label, case.grid.lps(np.array([0, 2, 0, 1], np.uint8)[drawn]))
    with pytest.raises(BadInput, match="none called aorta"):
        uploads.receive_labels(upload, sent(tmp_path / "seg"), ("liver", "aorta"))


def test_a_label_map_that_does_not_fit_is_refused(
    uploads: Uploads, nifti: Path, tmp_path: Path, write_nifti: Callable[..., Path]
) -> None:
    upload = uploads.receive([sent(nifti)])
    moved = AFFINE.copy()
    moved[0, 3] += 1
    wrong = {
        "has 7x8x8 voxels": write_nifti(tmp_path / "a.nii.gz", labels()[:8], AFFINE),
        "lies elsewhere": write_nifti(tmp_path / "b.nii.gz", labels(), moved),
        r"label values \[3\]": write_nifti(tmp_path / "c.nii.gz", labels() + (labels() == 2), AFFINE),
        "holds fractions": write_nifti(tmp_path / "d.nii.gz", labels() / np.float32(2), AFFINE),
    }
    for sentence, path in wrong.items():
        with pytest.raises(BadInput, match=sentence) as refusal:
            uploads.receive_labels(upload, sent(path), ORGANS)
        assert str(tmp_path) not in str(refusal.value)
    assert sorted(path.name for path in upload.case.folder.iterdir()) == ["image.npy", "volume.nii.gz"]
