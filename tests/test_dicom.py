"""DICOM series: read where they lie in the patient, whatever the files are called; anything doubtful is refused."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from pydicom import dcmread, uid
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.sequence import Sequence

from surm_seg.dicom import read_series
from surm_seg.errors import BadInput
from surm_seg.volume import Volume, label_names, read_grid, read_image, read_labels

CANARY = "Zyxwvut"  # planted in every text of the patient
SERIES = "1.2.826.0.1.3680043.8.498.1234567890"
SIZE = (16, 12)  # columns, rows; much smaller ones GDCM cannot read when they are RLE coded
LPS_TO_RAS = np.array([-1.0, -1.0, 1.0])
AXIAL = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)


def stored(k: int) -> np.ndarray:
    """Voxels (rows, columns) of slice k, all different."""
    return (np.arange(-96, 96, dtype="<i2") + 1000 * k).reshape(12, 16)


def header(k: int, cosines: tuple[float, ...] = AXIAL, step: float = 2.5) -> Dataset:
    """Slice k of a small series, as a scanner writes it."""
    normal = np.cross(cosines[:3], cosines[3:])
    one = Dataset()
    one.file_meta = FileMetaDataset()
    one.file_meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian
    one.SOPClassUID, one.SOPInstanceUID = uid.CTImageStorage, f"{SERIES}.{k + 1}"
    one.StudyInstanceUID, one.SeriesInstanceUID = f"{SERIES}.77", SERIES
    one.PatientName = one.PatientID = one.SeriesDescription = one.StudyDescription = one.InstitutionName = CANARY
    one.Modality, one.InstanceNumber = "CT", k + 1
    one.Columns, one.Rows = SIZE
    one.PixelSpacing = [0.7, 0.8]  # between rows, between columns
    one.ImageOrientationPatient = [round(c, 6) for c in cosines]
    one.ImagePositionPatient = np.round(np.array([-10.0, 20.0, 30.0]) + k * step * normal, 6).tolist()
    one.BitsAllocated = one.BitsStored = 16
    one.HighBit, one.PixelRepresentation = 15, 1
    one.SamplesPerPixel, one.PhotometricInterpretation = 1, "MONOCHROME2"
    one.RescaleSlope, one.RescaleIntercept = 1, -1024
    one.PixelData = stored(k).tobytes()
    return one


def write(folder: Path, slices: list[Dataset], name: str = "IM{:03d}") -> Path:
    folder.mkdir(exist_ok=True)
    for n, one in enumerate(slices):
        one.save_as(folder / name.format(n), enforce_file_format=True)
    return folder


def corners(volume: Volume) -> np.ndarray:
    """Indices (8, 3) of the corner voxels."""
    return np.indices((2, 2, 2)).reshape(3, 8).T * (np.array(volume.grid.shape) - 1)


def assert_lies_where_itk_says(volume: Volume, folder: Path) -> None:
    """ITK's own series reader, which must agree on axes, voxels and millimetres."""
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder)))
    image = reader.Execute()
    assert image.GetSize() == volume.grid.shape
    np.testing.assert_array_equal(sitk.GetArrayFromImage(image).transpose(2, 1, 0), volume.voxels)
    for index in corners(volume):
        theirs = np.array(image.TransformIndexToPhysicalPoint(index.tolist())) * LPS_TO_RAS
        ours = volume.grid.affine @ [*index, 1]
        np.testing.assert_allclose(ours[:3], theirs, atol=1e-3)


OBLIQUE = tuple(
    np.array([[np.cos(0.3), np.sin(0.3), 0], [-np.sin(0.3) * np.cos(0.2), np.cos(0.3) * np.cos(0.2), np.sin(0.2)]])
    .ravel()
    .tolist()
)
PLANES = {
    "axial": AXIAL,
    "coronal": (1.0, 0.0, 0.0, 0.0, 0.0, -1.0),
    "sagittal": (0.0, 1.0, 0.0, 0.0, 0.0, -1.0),
    "feet first": (-1.0, 0.0, 0.0, 0.0, 1.0, 0.0),
    "oblique": OBLIQUE,
}


@pytest.mark.parametrize("plane", PLANES)
@pytest.mark.parametrize("order", ["forward", "reversed", "shuffled"])
def test_slices_are_stacked_by_position_not_by_name(plane: str, order: str, tmp_path: Path) -> None:
    slices = [header(k, PLANES[plane]) for k in range(6)]
    names = {"forward": range(6), "reversed": range(5, -1, -1), "shuffled": (3, 0, 5, 1, 4, 2)}[order]
    volume = read_series(write(tmp_path / "x", [slices[k] for k in names]))
    np.testing.assert_array_equal(volume.voxels, np.stack([stored(k).T - 1024 for k in range(6)], axis=2))
    np.testing.assert_allclose(volume.grid.spacing, (0.8, 0.7, 2.5), atol=1e-5)
    assert volume.voxels.dtype == np.int16
    assert_lies_where_itk_says(volume, tmp_path / "x")
    expected = np.array([-10.0, 20.0, 30.0]) * LPS_TO_RAS
    np.testing.assert_allclose(volume.grid.affine[:3, 3], expected, atol=1e-4)


def test_a_folder_is_read_wherever_a_file_is(tmp_path: Path) -> None:
    folder = write(tmp_path / "x", [header(k) for k in range(3)])
    (folder / ".DS_Store").write_text("")
    (folder / "README").write_text("not an image")
    (folder / "below").mkdir()
    assert read_grid(folder) == read_image(folder).grid == read_series(str(folder)).grid
    np.testing.assert_array_equal(read_image(folder).voxels, read_labels(folder).voxels)
    assert read_grid(folder).axcodes == ("L", "P", "S") and label_names(folder) is None


def test_every_slice_has_its_own_scale_to_hu(tmp_path: Path) -> None:
    slices = [header(k) for k in range(3)]
    slices[0].RescaleSlope, slices[1].RescaleSlope, slices[2].RescaleIntercept = 2, "0.5", -1000
    volume = read_series(write(tmp_path / "x", slices))
    expected = [stored(0) * 2 - 1024, np.rint(stored(1) * 0.5 - 1024), stored(2) - 1000]
    np.testing.assert_array_equal(volume.voxels, np.stack([plane.T for plane in expected], axis=2))


@pytest.mark.parametrize("syntax", [uid.ImplicitVRLittleEndian, uid.ExplicitVRBigEndian, uid.RLELossless])
def test_other_transfer_syntaxes_hold_the_same_voxels(syntax: uid.UID, tmp_path: Path) -> None:
    slices = [header(k) for k in range(3)]
    for k, one in enumerate(slices):
        if syntax.is_compressed:
            one.compress(syntax)
        else:
            one.file_meta.TransferSyntaxUID = syntax
            one.PixelData = stored(k).astype("<i2" if syntax.is_little_endian else ">i2").tobytes()
    volume = read_series(write(tmp_path / "x", slices))
    np.testing.assert_array_equal(volume.voxels, np.stack([stored(k).T - 1024 for k in range(3)], axis=2))


def test_positions_rounded_to_two_decimals_are_even(tmp_path: Path) -> None:
    slices = [header(k, step=0.625) for k in range(9)]
    for one in slices:
        one.ImagePositionPatient = np.round(np.array(one.ImagePositionPatient, float), 2).tolist()
    assert read_series(write(tmp_path / "x", slices)).grid.spacing[2] == pytest.approx(0.625, abs=2e-3)


def moved(slices: list[Dataset], k: int, mm: tuple[float, float, float]) -> None:
    slices[k].ImagePositionPatient = (np.array(slices[k].ImagePositionPatient, float) + mm).tolist()


def several(slices: list[Dataset]) -> None:
    for one in slices[3:]:
        one.SeriesInstanceUID = SERIES[:-1] + "9"


def tilted(slices: list[Dataset]) -> None:
    for k in range(len(slices)):
        moved(slices, k, (0, 0.2 * k, 0))


def cut_pixels(slices: list[Dataset]) -> None:
    slices[2].PixelData = slices[2].PixelData[:-4]


def all_of(**tags: object) -> Callable[[list[Dataset]], None]:
    def change(slices: list[Dataset]) -> None:
        for one in slices:
            one.update(tags)

    return change


def one_of(**tags: object) -> Callable[[list[Dataset]], None]:
    return lambda slices: slices[2].update(tags)


def without(keyword: str) -> Callable[[list[Dataset]], None]:
    return lambda slices: delattr(slices[2], keyword)


def deflated(slices: list[Dataset]) -> None:
    slices[0].file_meta.TransferSyntaxUID = uid.DeflatedExplicitVRLittleEndian


def packed_and_absurd(slices: list[Dataset]) -> None:
    for one in slices:
        one.compress(uid.RLELossless)
        one.Rows = one.Columns = 6000


def video(slices: list[Dataset]) -> None:
    slices[0].file_meta.TransferSyntaxUID = uid.MPEG2MPML
    slices[0].PixelData = encapsulate([b"video"])
    slices[0]["PixelData"].is_undefined_length = True


def colour(slices: list[Dataset]) -> None:
    for one in slices:
        one.SamplesPerPixel, one.PhotometricInterpretation, one.PlanarConfiguration = 3, "RGB", 0
        one.PixelData = one.PixelData * 3


REFUSED: dict[str, tuple[Callable[[list[Dataset]], object], str]] = {
    "several series": (several, "several-series"),
    "a slice missing": (lambda s: s.pop(2), "missing-slices"),
    "two slices missing": (lambda s: (s.pop(2), s.pop(2)), "missing-slices"),
    "a slice out of step": (lambda s: moved(s, 2, (0, 0, 0.5)), "unequal-slices"),
    "the last slice 2 % out of step": (lambda s: moved(s, 5, (0, 0, 0.05)), "unequal-slices"),
    "two at one position": (lambda s: moved(s, 2, (0, 0, 2.5)), "duplicate-slices"),
    "all at one position": (all_of(ImagePositionPatient=[0, 0, 0]), "duplicate-slices"),
    "gantry tilt": (tilted, "gantry-tilt"),
    "one slice sideways": (lambda s: moved(s, 2, (1, 0, 0)), "gantry-tilt"),
    "one slice turned": (one_of(ImageOrientationPatient=list(PLANES["coronal"])), "inconsistent-series"),
    "another pixel spacing": (one_of(PixelSpacing=[0.7, 0.81]), "inconsistent-series"),
    "another size": (one_of(Rows=6, PixelData=bytes(192)), "inconsistent-series"),
    "a single slice": (lambda s: s.__delitem__(slice(1, None)), "single-slice"),
    "colour": (colour, "colour"),
    "unsigned or signed, who knows": (without("PixelRepresentation"), "bad-header"),
    "neither signed nor unsigned": (all_of(PixelRepresentation=2), "datatype"),
    "more bits than there are": (all_of(BitsStored=17, HighBit=16), "datatype"),
    "bits in another place": (all_of(BitsStored=12, HighBit=15), "datatype"),
    "single bits": (all_of(BitsAllocated=1, BitsStored=1, HighBit=0, PixelData=bytes(24)), "datatype"),
    "a slope without an intercept": (without("RescaleIntercept"), "bad-scaling"),
    "an intercept without a slope": (without("RescaleSlope"), "bad-scaling"),
    "absurd size, packed": (packed_and_absurd, "too-large"),
    "inverted": (all_of(PhotometricInterpretation="MONOCHROME1"), "colour"),
    "several frames": (all_of(NumberOfFrames=2, Rows=6), "multi-frame"),
    "deflated": (deflated, "deflated"),
    "video": (video, "transfer-syntax"),
    "no position": (without("ImagePositionPatient"), "bad-header"),
    "no orientation": (without("ImageOrientationPatient"), "bad-header"),
    "no pixel spacing": (without("PixelSpacing"), "bad-header"),
    "no pixels": (without("PixelData"), "truncated"),
    "fewer pixels": (cut_pixels, "truncated"),
    "zero pixel spacing": (all_of(PixelSpacing=[0, 0.7]), "bad-spacing"),
    "no directions": (all_of(ImageOrientationPatient=[0] * 6), "bad-affine"),
    "directions not perpendicular": (all_of(ImageOrientationPatient=[1, 0, 0, 0.6, 0.8, 0]), "bad-affine"),
    "absurd size": (all_of(Rows=65535, Columns=65535), "truncated"),
    "no rows": (all_of(Rows=0), "bad-dimensions"),
    "slope zero": (all_of(RescaleSlope=0), "bad-scaling"),
    "slope leaves float32": (all_of(RescaleSlope="1e30"), "bad-scaling"),
    "table instead of a slope": (all_of(ModalityLUTSequence=Sequence([Dataset()])), "bad-scaling"),
    "HU outside int16": (all_of(RescaleSlope=1000), "value-range"),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_a_doubtful_series_is_refused_without_a_word_of_the_patient(
    fault: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    change, code = REFUSED[fault]
    slices = [header(k) for k in range(6)]
    change(slices)
    write(tmp_path / "folder", slices)
    with pytest.raises(BadInput, match="folder") as refused:
        read_image(tmp_path / "folder")
    assert refused.value.code == code
    assert CANARY not in str(refused.value) + "".join(capfd.readouterr())


def test_one_of_several_series_can_be_named(tmp_path: Path) -> None:
    slices = [header(k) for k in range(7)]
    several(slices)
    write(tmp_path / "x", slices)
    with pytest.raises(BadInput, match=r"567890 \(3 slices of 16 x 12\), 567899 \(4 slices of 16 x 12\)"):
        read_series(tmp_path / "x")
    assert read_series(tmp_path / "x", "90").grid.shape == (16, 12, 3)
    for unclear in ("5", "1234567"):
        with pytest.raises(BadInput) as refused:
            read_series(tmp_path / "x", unclear)
        assert refused.value.code == "no-such-series"


def test_the_voxel_budget_is_checked_before_any_pixel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(tmp_path / "x", [header(k) for k in range(3)])
    assert read_series(folder, max_voxels=576).grid.shape == (16, 12, 3)
    monkeypatch.setattr("surm_seg.dicom.sitk.ImageFileReader", None)
    with pytest.raises(BadInput) as refused:
        read_image(folder, max_voxels=575)
    assert refused.value.code == "too-large"


@pytest.mark.parametrize("syntax", [uid.ExplicitVRLittleEndian, uid.RLELossless])
def test_a_file_cut_anywhere_is_refused(syntax: uid.UID, tmp_path: Path) -> None:
    slices = [header(k) for k in range(3)]
    if syntax.is_compressed:
        for one in slices:
            one.compress(syntax)
    folder = write(tmp_path / "x", slices, "IM{:03d}.dcm")
    assert read_image(folder).grid.shape == (16, 12, 3)
    whole = (folder / "IM002.dcm").read_bytes()
    for length in [*range(0, len(whole), 7), len(whole) - 1]:
        (folder / "IM002.dcm").write_bytes(whole[:length])
        with pytest.raises(BadInput):
            read_image(folder)


def pydicom_sees(folder: Path) -> np.ndarray:
    """HU with axes (i, j, k), by pydicom alone."""
    slices = [dcmread(path) for path in folder.iterdir()]
    slices.sort(key=lambda one: float(one.ImagePositionPatient[2]))
    planes = [one.pixel_array * float(one.RescaleSlope) + float(one.RescaleIntercept) for one in slices]
    return np.rint(np.stack(planes).transpose(2, 1, 0))


@pytest.mark.parametrize("mask", [0x01, 0x11])
def test_any_changed_byte_of_a_header_is_read_as_pydicom_reads_it_or_refused(
    mask: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = write(tmp_path / "x", [header(k) for k in range(3)], "IM{:03d}.dcm")
    whole = (folder / "IM001.dcm").read_bytes()
    before = pydicom_sees(folder)
    for position in range(mask % 3, len(whole) - 2 * SIZE[0] * SIZE[1], 3):
        (folder / "IM001.dcm").write_bytes(whole[:position] + bytes([whole[position] ^ mask]) + whole[position + 1 :])
        try:
            voxels = read_image(folder).voxels
        except BadInput as refused:
            assert CANARY not in str(refused)
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                expected = pydicom_sees(folder)
            except AttributeError:  # it insists on a tag that has only one possible value, or says nothing about voxels
                expected = before
        np.testing.assert_array_equal(voxels, expected)
    assert CANARY not in "".join(capfd.readouterr())


def test_reports_and_directories_beside_the_images_are_passed_over(tmp_path: Path) -> None:
    report, directory = header(3), header(4)
    for one, kind in ((report, uid.EnhancedSRStorage), (directory, uid.MediaStorageDirectoryStorage)):
        one.SOPClassUID, one.SeriesInstanceUID = kind, SERIES + ".5"
        for keyword in ("Rows", "Columns", "PixelData"):
            delattr(one, keyword)
    folder = write(tmp_path / "x", [header(0), header(1), header(2), report, directory])
    assert read_image(folder).grid.shape == (16, 12, 3)


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    folder = write(tmp_path / "x", [header(k) for k in range(3)])
    (tmp_path / "link").symlink_to(folder)
    with pytest.raises(BadInput) as refused:
        read_image(tmp_path / "link")
    assert refused.value.code == "not-a-file"
    os.mkfifo(folder / "pipe")
    with pytest.raises(BadInput) as refused:
        read_image(folder)
    assert refused.value.code == "not-a-file"
    (folder / "pipe").unlink()
    (folder / "IM003").symlink_to("IM002")
    with pytest.raises(BadInput) as refused:
        read_image(folder)
    assert refused.value.code == "not-a-file"


def test_a_folder_without_dicom_says_so(tmp_path: Path) -> None:
    (tmp_path / "README").write_text("nothing here")
    with pytest.raises(BadInput) as refused:
        read_image(tmp_path)
    assert refused.value.code == "no-dicom"
    (tmp_path / "a.dcm").write_text("not DICOM")
    with pytest.raises(BadInput) as refused:
        read_image(tmp_path)
    assert refused.value.code == "not-dicom"


def test_a_real_ct_lies_where_itk_says_and_its_labels_fit_after_one_flip(shared_data: Path) -> None:
    case = shared_data / "ct-case-b-dicom"
    if not case.is_dir():
        pytest.skip("no real DICOM case here: set SURM_SHARED to the folder that holds data/ct-case-b-dicom")
    volume = read_image(case / "dicom")
    assert volume.grid.shape == (512, 512, 20) and volume.grid.axcodes == ("L", "P", "S")
    np.testing.assert_allclose(volume.grid.spacing, (0.9765625, 0.9765625, 2.0))
    assert volume.voxels.min() == -1024 and 1000 < volume.voxels.max() <= 3071
    assert_lies_where_itk_says(volume, case / "dicom")

    labels = read_labels(case / "labels_total_v2_117class.nii.gz")
    assert labels.grid.axcodes == ("L", "A", "S")
    flip = np.array([[1, 0, 0, 0], [0, -1, 0, volume.grid.shape[1] - 1], [0, 0, 1, 0], [0, 0, 0, 1]])
    np.testing.assert_allclose(labels.grid.affine, volume.grid.affine @ flip, atol=1e-4)
    # The flip is what the radiological view undoes: there, organs lie on tissue (aorta 52, liver 5, spleen 1).
    image, organs = volume.lps(), labels.lps()
    assert image.shape == organs.shape
    present = [organ for organ in (1, 5, 52) if (organs == organ).sum() > 1000]
    assert present
    for organ in present:
        assert 0 < np.median(image[organs == organ]) < 300
    assert ((image > -200)[organs > 0]).mean() > 0.9
