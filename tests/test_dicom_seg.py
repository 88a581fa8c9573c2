"""DICOM-SEG read as label maps: whole, on the grid of the series; anything doubtful is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import highdicom as hd
import numpy as np
import pydicom
import pytest
import test_dicom as series_on_disk
from pydicom import uid
from pydicom.dataset import Dataset
from test_dicom_seg_writer import CANARY, ORGANS, folder_of, labels_on, read, written

from surm_seg import dicom, dicom_seg
from surm_seg.errors import BadInput
from surm_seg.grid import grid_of
from surm_seg.terminology import concept


@pytest.fixture
def example(tmp_path: Path) -> Path:
    """A DICOM-SEG of three organs on an oblique series."""
    series = dicom.opened(folder_of(tmp_path / "ct", "oblique"))
    return written(tmp_path / "folder.dcm", labels_on(series), ORGANS, series)


def test_the_slices_may_be_listed_downwards_or_not_at_all(tmp_path: Path, example: Path) -> None:
    labels = read(example)
    header = pydicom.dcmread(example)
    header.ReferencedSeriesSequence[0].ReferencedInstanceSequence.reverse()
    header.save_as(tmp_path / "down.dcm")
    np.testing.assert_array_equal(read(tmp_path / "down.dcm").voxels, labels.voxels)
    assert read(tmp_path / "down.dcm").grid.matches(labels.grid)
    del header.ReferencedSeriesSequence
    header.save_as(tmp_path / "none.dcm")
    own = read(tmp_path / "none.dcm")
    np.testing.assert_array_equal(own.voxels, labels.voxels[:, :, 1:-2])
    np.testing.assert_allclose(own.grid.affine @ [0, 0, -1, 1], labels.grid.affine[:, 3], atol=1e-3)


def changed(one: Dataset, **tags: object) -> None:
    for keyword, value in tags.items():
        setattr(one, keyword, value)


def group(header: Dataset, n: int, keyword: str) -> Dataset:
    return header.PerFrameFunctionalGroupsSequence[n][keyword].value[0]


def moved(header: Dataset, n: int, mm: tuple[float, float, float]) -> None:
    place = group(header, n, "PlanePositionSequence")
    place.ImagePositionPatient = (np.array(place.ImagePositionPatient, float) + mm).tolist()


def shared(header: Dataset, keyword: str) -> Dataset:
    return header.SharedFunctionalGroupsSequence[0][keyword].value[0]


def relabelled(header: Dataset, n: int, number: int) -> None:
    group(header, n, "SegmentIdentificationSequence").ReferencedSegmentNumber = number


def of_syntax(header: Dataset, syntax: uid.UID) -> None:
    header.file_meta.TransferSyntaxUID = syntax


REFUSED: dict[str, tuple[Callable[[Dataset], object], str]] = {
    "fractions": (lambda h: changed(h, SegmentationType="FRACTIONAL", BitsAllocated=8), "fractional"),
    "more frames than described": (lambda h: changed(h, NumberOfFrames=h.NumberOfFrames + 1), "bad-dimensions"),
    "fewer frames than described": (lambda h: changed(h, NumberOfFrames=1), "bad-dimensions"),
    "no frames": (lambda h: changed(h, NumberOfFrames=0, PerFrameFunctionalGroupsSequence=[]), "bad-dimensions"),
    "a frame not described": (lambda h: h.PerFrameFunctionalGroupsSequence.pop(), "bad-dimensions"),
    "pixels missing": (lambda h: changed(h, PixelData=h.PixelData[:-2]), "truncated"),
    "too many pixels": (lambda h: changed(h, PixelData=h.PixelData + bytes(24)), "truncated"),
    "no pixels": (lambda h: h.pop("PixelData"), "truncated"),
    "a larger picture": (lambda h: changed(h, Rows=65535, Columns=65535), "truncated"),
    "eight bits": (lambda h: changed(h, BitsAllocated=8), "datatype"),
    "overlapping": (lambda h: changed(h, PixelData=b"\xff" * len(h.PixelData)), "overlapping-segments"),
    "a frame twice": (lambda h: relabelled(h, 0, 2), "bad-segments"),
    "a frame of no segment": (lambda h: relabelled(h, 0, 9), "bad-segments"),
    "a segment twice": (lambda h: changed(h.SegmentSequence[1], SegmentNumber=1), "bad-segments"),
    "segment 0": (lambda h: changed(h.SegmentSequence[0], SegmentNumber=0), "bad-segments"),
    "no segments": (lambda h: changed(h, SegmentSequence=[]), "bad-segments"),
    "no segment of a frame": (lambda h: h.PerFrameFunctionalGroupsSequence[0].pop(0x0062000A), "bad-header"),
    "no position": (lambda h: group(h, 1, "PlanePositionSequence").pop("ImagePositionPatient"), "bad-header"),
    "no orientation": (lambda h: h.SharedFunctionalGroupsSequence[0].pop("PlaneOrientationSequence"), "bad-header"),
    "no thickness": (lambda h: h.SharedFunctionalGroupsSequence[0].pop("PixelMeasuresSequence"), "bad-header"),
    "a frame out of step": (lambda h: moved(h, 1, tuple(0.5 * NORMAL)), "unequal-slices"),
    "a frame aside": (lambda h: moved(h, 1, tuple(2.0 * np.array(series_on_disk.OBLIQUE[:3]))), "shear"),
    "an infinite position": (lambda h: moved(h, 1, (0, 0, 1e300)), "shear"),
    "a frame a mile away": (lambda h: moved(h, 1, tuple(2.5e7 * NORMAL)), "too-large"),
    "no distance": (lambda h: changed(shared(h, "PixelMeasuresSequence"), SpacingBetweenSlices=0), "bad-spacing"),
    "no pixel spacing": (lambda h: changed(shared(h, "PixelMeasuresSequence"), PixelSpacing=[0, 1]), "bad-spacing"),
    "no directions": (
        lambda h: changed(shared(h, "PlaneOrientationSequence"), ImageOrientationPatient=[1, 0, 0, 1, 0, 0]),
        "bad-affine",
    ),
    "deflated": (lambda h: of_syntax(h, uid.DeflatedExplicitVRLittleEndian), "transfer-syntax"),
    "a CT": (lambda h: changed(h, SOPClassUID=uid.CTImageStorage), "not-dicom-seg"),
}
PLACE = "PlanePositionSequence"
NORMAL = np.cross(series_on_disk.OBLIQUE[:3], series_on_disk.OBLIQUE[3:])


@pytest.mark.parametrize("fault", REFUSED)
def test_a_doubtful_file_is_refused_without_a_word_of_the_patient(
    fault: str, example: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    change, code = REFUSED[fault]
    header = pydicom.dcmread(example)
    change(header)
    header.save_as(example, enforce_file_format=True)
    with pytest.raises(BadInput, match="folder") as refused:
        read(example)
    assert refused.value.code == code
    assert CANARY not in str(refused.value) + "".join(capfd.readouterr())


def test_overlapping_voxels_are_counted(example: Path) -> None:
    header = pydicom.dcmread(example)
    bits = np.unpackbits(np.frombuffer(header.PixelData, np.uint8), bitorder="little").reshape(-1, 12, 16)
    same = [n for n in range(len(bits)) if group(header, n, PLACE) == group(header, 0, PLACE)]
    bits[same, 3, 4:9] = 1
    header.PixelData = np.packbits(bits, bitorder="little").tobytes()
    header.save_as(example)
    with pytest.raises(BadInput, match="10 voxels in several segments") as refused:
        read(example)
    assert refused.value.code == "overlapping-segments" and len(same) == 3


def test_a_file_cut_anywhere_is_refused(example: Path) -> None:
    whole = example.read_bytes()
    for length in [*range(1, len(whole), 97), len(whole) - 1]:
        example.write_bytes(whole[:length])
        with pytest.raises(BadInput):
            read(example)


def test_any_flipped_byte_of_a_header_is_read_or_refused(example: Path, capfd: pytest.CaptureFixture[str]) -> None:
    whole = example.read_bytes()
    for position in range(0, len(whole), 97):
        example.write_bytes(whole[:position] + bytes([whole[position] ^ 0x11]) + whole[position + 1 :])
        try:
            read(example)
        except BadInput as refused:
            assert CANARY not in str(refused)
    assert CANARY not in "".join(capfd.readouterr())


def label_map(path: Path, labels: np.ndarray, names: dict[int, str], series: dicom.Series) -> Path:
    """A DICOM-SEG of the newer kind, whose voxels are the segment numbers, as highdicom writes it."""
    sources = [pydicom.dcmread(one.path) for one in series.slices]
    for one in sources:
        one.SliceThickness, one.PatientName = 2.5, "A^B"
    algorithm = hd.AlgorithmIdentificationSequence("x", concept("liver").category, "1")
    hd.seg.Segmentation(
        sources, labels.transpose(2, 1, 0).copy(), "LABELMAP",
        [hd.seg.SegmentDescription(n, name, *concept(name)[:2], "AUTOMATIC", algorithm) for n, name in names.items()],
        hd.UID(), 1, hd.UID(), 1, "x", "x", "1", "1",
    ).save_as(path)  # fmt: skip
    return path


@pytest.mark.parametrize(("number", "dtype"), [(7, np.uint8), (300, np.uint16)])
def test_label_maps_are_read_with_their_own_numbers(number: int, dtype: type, tmp_path: Path) -> None:
    series = dicom.opened(folder_of(tmp_path / "ct", "coronal"))
    labels = (labels_on(series) > 1).astype(np.uint16) * number
    path = label_map(tmp_path / "folder.dcm", labels, {3: "spleen", number: "liver"}, series)
    volume = read(path)
    np.testing.assert_array_equal(volume.voxels, labels)
    assert volume.grid.matches(grid_of(series)) and volume.voxels.dtype == dtype
    assert dicom_seg.opened(path).names == {3: "spleen", number: "liver"}
    header = pydicom.dcmread(path)
    header.PixelData = header.PixelData[:-2] + b"\x05\x00"
    header.save_as(path)
    with pytest.raises(BadInput, match="does not describe") as refused:
        read(path)
    assert refused.value.code == "unknown-label"


def test_segment_numbers_need_not_start_at_one(example: Path) -> None:
    labels = read(example).voxels
    header = pydicom.dcmread(example)
    for segment in header.SegmentSequence:
        segment.SegmentNumber += 400
    for n in range(header.NumberOfFrames):
        relabelled(header, n, group(header, n, "SegmentIdentificationSequence").ReferencedSegmentNumber + 400)
    header.save_as(example)
    assert dicom_seg.opened(example).names == {401: "liver", 402: "kidney_right", 403: "lesion"}
    np.testing.assert_array_equal(read(example).voxels, np.where(labels, labels.astype(int) + 400, 0))


def test_the_voxel_budget_counts_the_whole_extent(example: Path) -> None:
    assert dicom_seg.opened(example, 16 * 12 * 8).header.shape == (16, 12, 8)
    with pytest.raises(BadInput) as refused:
        dicom_seg.opened(example, 16 * 12 * 8 - 1)
    assert refused.value.code == "too-large"


def test_only_a_regular_dicom_file_is_opened(tmp_path: Path, example: Path) -> None:
    (tmp_path / "link.dcm").symlink_to(example)
    (tmp_path / "text.dcm").write_text("not DICOM")
    for name, code in {"link.dcm": "not-a-file", "text.dcm": "not-dicom", "absent.dcm": "unreadable"}.items():
        with pytest.raises(BadInput) as refused:
            dicom_seg.opened(tmp_path / name)
        assert refused.value.code == code
