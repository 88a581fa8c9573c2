"""DICOM Segmentation objects (DICOM-SEG) as label maps; `surm_seg.dicom_seg_writer` writes them.

pydicom reads the header, in which every frame says where it lies and what it marks; nothing is taken from it that
another part of the file contradicts. As in `surm_seg.dicom`, no tag that describes the patient is parsed.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import pydicom
from pydicom import uid
from pydicom.filereader import read_file_meta_info

from surm_seg import dicom, nifti
from surm_seg.errors import BadInput
from surm_seg.grid import header_of
from surm_seg.stream import Refuse, Stream, refusing, regular_file

SOP_CLASSES = (uid.SegmentationStorage, "1.2.840.10008.5.1.4.1.1.66.7")  # the second: Label Map Segmentation Storage

_TAGS: list[Any] = [
    "SpecificCharacterSet", "SegmentationType", "Rows", "Columns", "NumberOfFrames", "SamplesPerPixel", "BitsAllocated",
    "PixelRepresentation", "PixelPaddingValue", "SegmentSequence", "ReferencedSeriesSequence",
    "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence",
]  # fmt: skip


class _Frame(NamedTuple):
    """Where a frame belongs: its number in the file, and the segment it marks (0: it holds the numbers itself)."""

    index: int
    segment: int


class Segmentation:
    """A DICOM-SEG with a checked header; its slabs yield segment numbers. Made by `opened`.

    Args:
        names: the label of every segment by its number.
        frames: what there is to read of slice k; nothing where it is all background.
        bits: of a voxel in the file.
        offset: of the first frame, in bytes.
    """

    def __init__(
        self,
        path: Path,
        header: nifti.Header,
        names: dict[int, str],
        frames: dict[int, list[_Frame]],
        bits: int,
        offset: int,
    ) -> None:
        self.path = path
        self.header = header
        self.names = names
        self._frames, self._bits, self._offset = frames, bits, offset

    def slabs(self) -> Iterator[tuple[slice, np.ndarray]]:
        """Yield (k, segment numbers of shape (i, j, 1)); refused after the last one if segments overlap."""
        refuse = refusing(self.path)
        columns, rows, depth = self.header.shape
        described = np.zeros(2**16, bool)
        described[[0, *self.names]] = True
        overlapping = 0
        with regular_file(self.path) as file:
            for k in range(depth):
                plane = np.zeros(rows * columns, self.header.dtype)
                for frame in self._frames.get(k, ()):
                    values = self._values(file, frame.index, rows * columns, refuse)
                    if not frame.segment and not described[values].all():
                        refuse("unknown-label", "holds segment numbers that it does not describe; export it again")
                    marked = values != 0
                    overlapping += np.count_nonzero(plane[marked])
                    plane[marked] = frame.segment or values[marked]
                yield slice(k, k + 1), plane.reshape(rows, columns).T[:, :, None]
        if overlapping:
            what = f"has {overlapping:,} voxels in several segments at once; export them without overlap"
            refuse("overlapping-segments", what)

    def _values(self, file: BinaryIO, index: int, count: int, refuse: Refuse) -> np.ndarray:
        """The voxels of a frame; those of one bit follow each other without gaps, also from frame to frame."""
        first = index * count * self._bits
        file.seek(self._offset + first // 8)
        raw = Stream(file, refuse).read(-(-(first % 8 + count * self._bits) // 8))
        if self._bits == 1:
            return np.unpackbits(raw, bitorder="little")[first % 8 :][:count]
        return raw.view(f"<u{self._bits // 8}")


def opened(path: Path, max_voxels: int = nifti.MAX_VOXELS) -> Segmentation:
    """Read and check the header of a binary or label map DICOM-SEG; raises BadInput.

    Axes (i, j, k) are columns, rows, and slices in the direction of the normal. The slices reach as far as those of the
    series that the file refers to where it says which of them its frames are, else from the first frame to the last.
    Costs about 1 ms per frame; voxels are read slice by slice, by `slabs`.
    """
    refuse = refusing(path)
    with regular_file(path) as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if file.read(132)[128:] != b"DICM":
            refuse("not-dicom", "is not a DICOM file; copy or export it again")
        try:
            return _opened(path, file, max_voxels, refuse)
        except (BadInput, MemoryError):
            raise
        except Exception as error:  # on damage pydicom fails with whatever its converters raise, OSError too
            raise BadInput("bad-header", f"{path} has a damaged header; copy or export it again.") from error


def _opened(path: Path, file: BinaryIO, max_voxels: int, refuse: Refuse) -> Segmentation:
    meta = read_file_meta_info(path)
    if meta.MediaStorageSOPClassUID not in SOP_CLASSES:
        refuse("not-dicom-seg", "is DICOM, but no segmentation; of a CT series, give the folder")
    if meta.TransferSyntaxUID not in (uid.ImplicitVRLittleEndian, uid.ExplicitVRLittleEndian):
        refuse("transfer-syntax", "is compressed in a way that cannot be read; export it uncompressed")
    file.seek(0)
    dataset = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=_TAGS)
    names, bits = _content(dataset, refuse)
    columns, rows, count = int(dataset.Columns), int(dataset.Rows), int(dataset.NumberOfFrames)
    if count != len(dataset.PerFrameFunctionalGroupsSequence) or min(columns, rows, count) < 1:
        refuse("bad-dimensions", "announces another number of frames than it describes; export it again")
    if not dicom.whole_pixels(file, meta.TransferSyntaxUID, -(-columns * rows * count * bits // 8)):
        refuse("truncated", "has no pixels, or not as many as its header announces; copy or export it again")
    offset = file.tell()
    planes, affine = _stacked(dataset, refuse)
    before, depth = _extent(dataset, planes)
    affine[:3, 3] -= before * affine[:3, 2]
    dtype = np.dtype(np.uint8 if max(names) < 256 else np.uint16)
    header = header_of((columns, rows, depth), affine, dtype, max_voxels, refuse)
    segments = [
        int(one.ReferencedSegmentNumber) for one in _groups(dataset, "SegmentIdentificationSequence", bits == 1)
    ]
    frames: dict[int, list[_Frame]] = defaultdict(list)
    for index, (plane, segment) in enumerate(zip(planes, segments or [0] * count, strict=True)):
        if (bits == 1 and segment not in names) or segment in (one.segment for one in frames[plane + before]):
            refuse("bad-segments", "has a frame of no segment, or two of one at the same place; export it again")
        frames[plane + before].append(_Frame(index, segment))
    return Segmentation(path, header, names, dict(frames), bits, offset)


def _content(dataset: pydicom.Dataset, refuse: Refuse) -> tuple[dict[int, str], int]:
    """The label of every segment by its number, and the bits that a voxel takes."""
    bits = int(dataset.BitsAllocated)
    if dataset.SegmentationType not in ("BINARY", "LABELMAP"):
        refuse("fractional", "holds fractions of segments, not labels; export it as a binary segmentation")
    binary = dataset.SegmentationType == "BINARY"
    if bits not in ((1,) if binary else (8, 16)) or (dataset.SamplesPerPixel, dataset.PixelRepresentation) != (1, 0):
        refuse("datatype", "stores its voxels in a way that no segmentation does; export it again")
    if int(dataset.get("PixelPaddingValue") or 0) != 0:
        refuse("datatype", "has a background other than 0; export it as a binary segmentation")
    described = [(int(one.SegmentNumber), str(one.get("SegmentLabel") or "")) for one in dataset.SegmentSequence]
    names = {number: label for number, label in described if number or binary}  # 0 is a label map's background
    if len(dict(described)) != len(described) or not names or not 1 <= min(names) <= max(names) < 2**16:
        refuse("bad-segments", "describes no segments, or one twice; export it again")
    return names, bits


def _groups(dataset: pydicom.Dataset, keyword: str, present: bool = True) -> list[pydicom.Dataset]:
    """The functional group of every frame, its own or the one they share; nothing where it need not be present."""
    (shared,) = dataset.SharedFunctionalGroupsSequence
    found = []
    for own in dataset.PerFrameFunctionalGroupsSequence if present else ():
        (item,) = own.get(keyword) or shared[keyword].value
        found.append(item)
    return found


def _stacked(dataset: pydicom.Dataset, refuse: Refuse) -> tuple[list[int], np.ndarray]:
    """Which plane every frame lies on, counted from the lowest along the normal, and their affine (RAS+ mm)."""
    measures = _groups(dataset, "PixelMeasuresSequence")
    across = np.array([one.PixelSpacing for one in measures], np.float64)[:, ::-1]
    cosines = np.array(
        [one.ImageOrientationPatient for one in _groups(dataset, "PlaneOrientationSequence")], np.float64
    )
    positions = np.array([one.ImagePositionPatient for one in _groups(dataset, "PlanePositionSequence")], np.float64)
    if not (np.allclose(cosines, cosines[0], 0, dicom.SAME) and np.allclose(across, across[0], dicom.SAME, 0)):
        refuse("inconsistent-series", "has frames that differ in orientation or spacing; export it again")
    directions = cosines[0].reshape(2, 3)
    if not np.allclose(directions @ directions.T, np.eye(2), 0, 2 * nifti.MAX_SHEAR):
        refuse("bad-affine", "has an ImageOrientationPatient that is no pair of directions; export it again")
    rows, columns = directions / np.linalg.norm(directions, axis=1, keepdims=True)
    normal = np.cross(rows, columns)
    order = np.argsort(positions @ normal, kind="stable")
    offsets = positions[order] - positions[order[0]]
    heights = offsets @ normal
    if not np.isfinite(heights).all():
        refuse("bad-affine", "has positions that are not finite; export it again")
    if np.linalg.norm(offsets - np.outer(heights, normal), axis=1).max() > max(
        nifti.MAX_SHEAR * heights[-1], dicom.ROUNDING_MM
    ):
        refuse("shear", "has frames that are not stacked at right angles; resample it to an upright grid")
    planes, step = _planes(heights, measures[0], refuse)
    affine = np.eye(4)
    affine[:3, :3] = np.column_stack([rows * across[0][0], columns * across[0][1], normal * step])
    affine[:3, 3] = positions[order[0]]
    return planes[np.argsort(order)].tolist(), np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine


def _planes(heights: np.ndarray, measures: pydicom.Dataset, refuse: Refuse) -> tuple[np.ndarray, float]:
    """Whole numbers for heights in ascending order (mm, from 0), and the mm from one to the next.

    Planes without frames may lie between: the spacing is the stated one, or the smallest gap where none is stated.
    """
    gaps = np.diff(heights)
    apart = gaps[gaps > dicom.ROUNDING_MM]
    stated = measures.get("SpacingBetweenSlices")
    if stated is None:
        stated = apart.min() if apart.size else measures.SliceThickness
    step = abs(float(stated))
    if not nifti.SPACING_MM[0] <= step <= nifti.SPACING_MM[1]:
        refuse("bad-spacing", f"has slices {step:g} mm apart, which no CT has; export it again")
    planes = np.concatenate([[0], np.cumsum(np.rint(gaps / step))])  # step by step, so that rounding never adds up
    if planes[-1]:
        step = float(heights[-1] / planes[-1])
    tolerance = min(max(dicom.MAX_UNEVEN * step, dicom.ROUNDING_MM), step / 4)
    if np.abs(heights - planes * step).max() > tolerance:
        refuse("unequal-slices", "has frames at uneven distances; export it again")
    return planes.astype(np.int64), step


def _extent(dataset: pydicom.Dataset, planes: list[int]) -> tuple[int, int]:
    """How many slices come before the lowest plane, and how many there are in all.

    The frames' own planes, unless every frame names the one slice it was made from, and the series that is referred to
    lists its slices in the order of the planes (up or down).
    """
    own = 0, max(planes) + 1
    series = dataset.get("ReferencedSeriesSequence") or []
    if len(series) != 1:
        return own
    listed = {str(one.ReferencedSOPInstanceUID): n for n, one in enumerate(series[0].ReferencedInstanceSequence)}
    found = []
    for group in dataset.PerFrameFunctionalGroupsSequence:
        images = [image for one in group.get("DerivationImageSequence") or [] for image in one.SourceImageSequence]
        if len(images) != 1 or str(images[0].ReferencedSOPInstanceUID) not in listed:
            return own
        found.append(listed[str(images[0].ReferencedSOPInstanceUID)])
    up = {n - plane for n, plane in zip(found, planes, strict=True)}
    down = {n + plane for n, plane in zip(found, planes, strict=True)}
    if (len(up) == 1) == (len(down) == 1):  # neither, or both: a single plane
        return own
    before = up.pop() if len(up) == 1 else len(listed) - 1 - down.pop()
    return (before, len(listed)) if 0 <= before <= len(listed) - own[1] else own
