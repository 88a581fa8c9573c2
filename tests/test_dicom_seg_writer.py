"""DICOM-SEG written beside its series: the same labels at the same millimetres, for every reader."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import highdicom as hd
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
import test_dicom as series_on_disk
from pydicom import uid

from surm_seg import dicom, dicom_seg, dicom_seg_writer
from surm_seg.errors import BadInput
from surm_seg.grid import Volume, grid_of, labels_of
from surm_seg.labels import SYNAPSE
from surm_seg.terminology import PRIVATE_SCHEME

CANARY = series_on_disk.CANARY
ORGANS = ("liver", "kidney_right", "lesion")


def labels_on(series: dicom.Series, organs: int = 3, seed: int = 0) -> np.ndarray:
    """Labels 0..organs on the grid of a series, mostly background, none in the first and the last two slices."""
    draw = np.random.default_rng(seed)
    labels = draw.integers(1, organs + 1, series.header.shape).astype(np.uint8)
    labels[draw.random(labels.shape) < 0.9] = 0
    labels[:, :, [0, -2, -1]] = 0
    return labels


def folder_of(path: Path, plane: str = "axial", count: int = 8, **tags: object) -> Path:
    """A small series on disk, with tags changed in every slice (None: taken out)."""
    slices = [series_on_disk.header(k, series_on_disk.PLANES[plane]) for k in range(count)]
    for one in slices:
        one.file_meta.MediaStorageSOPClassUID = one.SOPClassUID
        one.file_meta.MediaStorageSOPInstanceUID = one.SOPInstanceUID
        one.PatientName = one.PatientID = CANARY
        for keyword in ("PatientBirthDate", "StudyDate", "StudyTime", "AccessionNumber", "StudyID", "PatientSex"):
            setattr(one, keyword, "")
        one.FrameOfReferenceUID = f"{series_on_disk.SERIES}.88"
        for keyword, value in tags.items():
            if value is None:
                one.pop(keyword, None)
            else:
                setattr(one, keyword, value)
    return series_on_disk.write(path, slices)


def written(path: Path, labels: np.ndarray, names: tuple[str, ...], series: dicom.Series) -> Path:
    with open(path, "wb") as file:
        dicom_seg_writer.write(file, labels, names, series)
    return path


def read(path: Path) -> Volume:
    return labels_of(dicom_seg.opened(path))


def places(path: Path) -> dict[int, np.ndarray]:
    """Segment number -> where its voxels lie (LPS mm, sorted), by ITK's voxels and the standard's own formula."""
    header = pydicom.dcmread(path)
    frames = sitk.GetArrayFromImage(sitk.ReadImage(str(path)))
    np.testing.assert_array_equal(frames > 0, np.atleast_3d(header.pixel_array > 0))
    (shared,) = header.SharedFunctionalGroupsSequence
    spacing = np.array(shared.PixelMeasuresSequence[0].PixelSpacing, float)
    cosines = np.array(shared.PlaneOrientationSequence[0].ImageOrientationPatient, float)
    found: dict[int, list[np.ndarray]] = {}
    for frame, own in zip(frames, header.PerFrameFunctionalGroupsSequence, strict=True):
        segment = own.get("SegmentIdentificationSequence") or shared.SegmentIdentificationSequence
        position = np.array(own.PlanePositionSequence[0].ImagePositionPatient, float)
        row, column = np.nonzero(frame)
        # PS3.3 C.7.6.2.1.1: the first cosines point along a row, in which the column index grows.
        mm = position + np.outer(column * spacing[1], cosines[:3]) + np.outer(row * spacing[0], cosines[3:])
        found.setdefault(int(segment[0].ReferencedSegmentNumber), []).append(mm)
    return {number: in_order(np.concatenate(parts)) for number, parts in found.items()}


def in_order(mm: np.ndarray) -> np.ndarray:
    return mm[np.lexsort(np.round(mm, 3).T)]


def assert_lies_where_the_series_does(path: Path, labels: np.ndarray, series: dicom.Series) -> None:
    affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ grid_of(series).affine
    found = places(path)
    assert {number for number, mm in found.items() if len(mm)} == set(np.unique(labels)) - {0}
    for number, mm in found.items():
        expected = np.argwhere(labels == number) @ affine[:3, :3].T + affine[:3, 3]
        np.testing.assert_allclose(mm, in_order(expected), atol=1e-3)


@pytest.mark.parametrize("plane", series_on_disk.PLANES)
def test_what_is_written_lies_where_the_series_does_and_reads_back(plane: str, tmp_path: Path) -> None:
    series = dicom.opened(folder_of(tmp_path / "ct", plane))
    labels = labels_on(series)
    path = written(tmp_path / "seg.dcm", labels, ORGANS, series)
    assert_lies_where_the_series_does(path, labels, series)
    again = read(path)
    np.testing.assert_array_equal(again.voxels, labels)
    assert again.grid.matches(grid_of(series)) and again.grid.shape == labels.shape
    assert dicom_seg.opened(path).names == {1: "liver", 2: "kidney_right", 3: "lesion"}


@pytest.mark.parametrize("k", [None, 0, 3, 7])
def test_a_single_voxel_or_none_reads_back_on_the_whole_grid(k: int | None, tmp_path: Path) -> None:
    series = dicom.opened(folder_of(tmp_path / "ct", "feet first"))
    labels = np.zeros(series.header.shape, np.uint8)
    if k is not None:
        labels[15, 11, k] = 2
    path = written(tmp_path / "seg.dcm", labels, ORGANS, series)
    assert_lies_where_the_series_does(path, labels, series)
    np.testing.assert_array_equal(read(path).voxels, labels)
    assert read(path).grid.matches(grid_of(series))


def test_the_object_belongs_to_patient_and_study_and_names_its_slices(tmp_path: Path) -> None:
    name = "山田^太郎"
    tags = {"SpecificCharacterSet": ["", "ISO 2022 IR 87"], "PatientName": name, "StudyDate": "20200102"}
    series = dicom.opened(folder_of(tmp_path / "ct", **tags, PatientSex="F"))
    labels = labels_on(series)
    header = pydicom.dcmread(written(tmp_path / "seg.dcm", labels, ("Leber – groß", "b", "c"), series))
    assert (header.PatientName, header.PatientID, header.PatientSex) == (name, CANARY, "F")
    assert (header.StudyInstanceUID, header.StudyDate) == (f"{series_on_disk.SERIES}.77", "20200102")
    assert header.FrameOfReferenceUID == f"{series_on_disk.SERIES}.88" and header.Modality == "SEG"
    assert header.SegmentSequence[0].SegmentLabel == "Leber – groß"
    (referred,) = header.ReferencedSeriesSequence
    assert referred.SeriesInstanceUID == series_on_disk.SERIES != header.SeriesInstanceUID
    for own in header.PerFrameFunctionalGroupsSequence:
        (image,) = own.DerivationImageSequence[0].SourceImageSequence
        k = int(image.ReferencedSOPInstanceUID.rsplit(".", 1)[1]) - 1
        position = series_on_disk.header(k).ImagePositionPatient
        assert own.PlanePositionSequence[0].ImagePositionPatient == position


def test_highdicom_reads_the_same_organs_codes_and_colours(tmp_path: Path) -> None:
    series = dicom.opened(folder_of(tmp_path / "ct", "oblique"))
    example = written(tmp_path / "seg.dcm", labels_on(series), ORGANS, series)
    theirs = hd.seg.segread(example)
    ours = read(example)
    geometry = theirs.get_volume(combine_segments=True)
    for index in np.argwhere(geometry.array)[::20]:
        place = np.linalg.inv(ours.grid.affine) @ np.diag([-1, -1, 1, 1]) @ geometry.affine @ [*index, 1]
        np.testing.assert_allclose(place, np.rint(place), atol=1e-3)
        assert ours.voxels[tuple(np.rint(place[:3]).astype(int))] == geometry.array[tuple(index)]
    liver, kidney, lesion = (theirs.get_segment_description(number) for number in (1, 2, 3))
    assert (liver.segmented_property_type.value, kidney.segmented_property_type.value) == ("10200004", "64033007")
    (side,) = kidney.SegmentedPropertyTypeCodeSequence[0].SegmentedPropertyTypeModifierCodeSequence
    assert (side.CodeValue, side.CodeMeaning) == ("24028007", "Right")
    assert lesion.segmented_property_type.scheme_designator == PRIVATE_SCHEME
    assert liver.algorithm_type.value == "AUTOMATIC" and liver.algorithm_identification.name == "surm-seg"
    assert len({tuple(one.RecommendedDisplayCIELabValue) for one in theirs.SegmentSequence}) == 3


def test_writing_twice_gives_the_same_object(tmp_path: Path) -> None:
    series = dicom.opened(folder_of(tmp_path / "ct"))
    labels = labels_on(series)
    first, again = (pydicom.dcmread(written(tmp_path / n, labels, ORGANS, series)) for n in ("a.dcm", "b.dcm"))
    assert (first.SOPInstanceUID, first.SeriesInstanceUID) == (again.SOPInstanceUID, again.SeriesInstanceUID)
    assert first.PixelData == again.PixelData
    other = pydicom.dcmread(written(tmp_path / "c.dcm", labels[::-1], ORGANS, series))
    renamed = pydicom.dcmread(written(tmp_path / "d.dcm", labels, ("liver", "spleen", "lesion"), series))
    assert len({one.SOPInstanceUID for one in (first, other, renamed)}) == 3


HEADERS: dict[str, dict[str, Any]] = {
    "nothing of the patient": dict.fromkeys(["PatientName", "PatientID", "PatientBirthDate", "PatientSex"]),
    "nothing of the study": dict.fromkeys(
        ["StudyInstanceUID", "StudyDate", "StudyTime", "StudyID", "StudyDescription"]
    ),
    "empty UIDs": {"StudyInstanceUID": "", "SeriesInstanceUID": "", "FrameOfReferenceUID": ""},
    "no frame of reference": {"FrameOfReferenceUID": None},
    "class and instance only before the data set": {"SOPClassUID": None, "SOPInstanceUID": None},
    "a thickness of its own": {"SliceThickness": 5, "SpacingBetweenSlices": 1},
}


@pytest.mark.parametrize("case", HEADERS)
def test_anonymised_series_are_written_too(case: str, tmp_path: Path) -> None:
    series = dicom.opened(folder_of(tmp_path / "ct", **HEADERS[case]))
    labels = labels_on(series)
    path = written(tmp_path / "seg.dcm", labels, ORGANS, series)
    np.testing.assert_array_equal(read(path).voxels, labels)
    header = pydicom.dcmread(path)
    for keyword in ("StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID", "SOPInstanceUID"):
        assert uid.UID(header[keyword].value).is_valid
    assert "PatientID" in header and "StudyDate" in header


UNWRITABLE: dict[str, tuple[dict[str, object], tuple[str, ...], str]] = {
    "one instance for all": ({"SOPInstanceUID": "1.2.3"}, ORGANS, "bad-header"),
    "an unknown kind of image": ({"SOPClassUID": "1.2.3"}, ORGANS, "bad-header"),
    "a long name": ({}, ("a" * 65, "b", "c"), "organ-name"),
    "a name that splits": ({}, ("a\\b", "b", "c"), "organ-name"),
    "no name": ({}, ("", "b", "c"), "organ-name"),
}


@pytest.mark.parametrize("case", UNWRITABLE)
def test_what_cannot_be_written_is_refused_without_a_word_of_the_patient(
    case: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    tags, names, code = UNWRITABLE[case]
    series = dicom.opened(folder_of(tmp_path / "folder", **tags))
    with pytest.raises(BadInput) as refused:
        written(tmp_path / "seg.dcm", labels_on(series), names, series)
    assert refused.value.code == code and not (tmp_path / "seg.dcm").read_bytes()
    assert CANARY not in str(refused.value) + "".join(capfd.readouterr())


def test_slices_of_two_frames_of_reference_are_refused(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "folder")
    one = pydicom.dcmread(folder / "IM003")
    one.FrameOfReferenceUID = "1.2.3"
    one.save_as(folder / "IM003")
    series = dicom.opened(folder)
    with pytest.raises(BadInput, match="differ in FrameOfReferenceUID"):
        written(tmp_path / "seg.dcm", labels_on(series), ORGANS, series)


def test_impossible_dates_and_sexes_are_left_empty(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = folder_of(tmp_path / "folder")
    for path in folder.iterdir():
        whole = pydicom.dcmread(path)
        whole.PatientSex, whole.PatientName = "UNKNOWN", f"{CANARY}^^^^^^^"
        whole.StudyDate = "29991231"
        whole.save_as(path)
        path.write_bytes(path.read_bytes().replace(b"29991231", b"someday!"))
    series = dicom.opened(folder)
    header = pydicom.dcmread(written(tmp_path / "seg.dcm", labels_on(series), ORGANS, series))
    assert (header.StudyDate, header.PatientSex) == ("", "")
    assert CANARY not in "".join(capfd.readouterr())


def test_organs_of_a_real_ct_lie_where_its_slices_do(shared_data: Path, tmp_path: Path) -> None:
    case = shared_data / "ct-case-b-dicom"
    if not case.is_dir():
        pytest.skip("no real DICOM case here: set SURM_SHARED to the folder that holds data/ct-case-b-dicom")
    series = dicom.opened(case / "dicom")
    labels = labels_on(series, len(SYNAPSE))
    labels[:, :, ::3] = 0
    labels[::5] = 0
    path = written(tmp_path / "seg.dcm", labels, SYNAPSE, series)
    np.testing.assert_array_equal(read(path).voxels, labels)
    assert read(path).grid.matches(grid_of(series))
    assert list(dicom_seg.opened(path).names.values()) == list(SYNAPSE)
    assert_lies_where_the_series_does(path, labels, series)
