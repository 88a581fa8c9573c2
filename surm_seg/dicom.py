"""DICOM series: one folder in, one volume out.

pydicom reads every header and nothing is decoded before all of them agree; SimpleITK then decodes slice by slice,
in the order of the positions along the normal, whatever the files are called. A tag that describes the patient is
never parsed (`TAGS` is all that is), so none can reach a message.
"""

from __future__ import annotations

import logging
import os
import re
import stat
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import numpy as np
import pydicom
import SimpleITK as sitk
from pydicom import uid
from pydicom.filereader import read_file_meta_info

from surm_seg import nifti
from surm_seg.errors import BadInput
from surm_seg.grid import Volume, header_of, image_of
from surm_seg.stream import Refuse, refusing, regular_file

# Warnings and log lines of both libraries quote tags, of a damaged header even the patient's name; what they warn about
# is refused here, or harmless.
sitk.ProcessObject.SetGlobalWarningDisplay(False)
logging.getLogger("pydicom").setLevel(logging.CRITICAL + 1)

ENDINGS = (".dcm", ".dicom", ".ima")  # a file so named must be DICOM; any other may be, and is ignored if not
TAGS: list[Any] = [
    "SeriesInstanceUID", "Modality", "Rows", "Columns", "NumberOfFrames", "SamplesPerPixel",
    "PhotometricInterpretation", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "PixelSpacing",
    "ImageOrientationPatient", "ImagePositionPatient", "RescaleSlope", "RescaleIntercept", "ModalityLUTSequence",
]  # fmt: skip
NATIVE = (uid.ImplicitVRLittleEndian, uid.ExplicitVRLittleEndian, uid.ExplicitVRBigEndian)
ENCAPSULATED = (
    uid.RLELossless, uid.JPEGBaseline8Bit, uid.JPEGExtended12Bit, uid.JPEGLossless, uid.JPEGLosslessSV1,
    uid.JPEGLSLossless, uid.JPEGLSNearLossless, uid.JPEG2000Lossless, uid.JPEG2000,
)  # fmt: skip

_UID = re.compile(r"[0-9.]{0,64}")  # empty where someone anonymised with a heavy hand
_IMAGE = re.compile(r"\bImage Storage\b")  # in the name of a SOP class, unlike reports, plans and structure sets

MAX_UNEVEN = 1e-2  # by which a gap between slices may differ from the others, as a part of it
ROUNDING_MM = 0.02  # and what is never held against it: positions are often written with two decimals
SAME = 1e-4  # direction cosines, and parts of the pixel spacing, that differ by less are equal
SHORT_UID = 6  # digits of a series' UID that a message shows
MAX_LISTED = 8  # series that a message lists


@dataclass(frozen=True, eq=False)
class Slice:
    """One file, its header read.

    Args:
        series: the series' UID.
        columns_rows: voxels along (i, j).
        header: the tags in TAGS, as far as the file has them.
        pixels: whether pixel data of the right length follow the header.
    """

    path: Path
    series: str
    columns_rows: tuple[int, int]
    header: pydicom.Dataset
    pixels: bool

    def numbers(self, keyword: str, count: int, default: float | None = None) -> np.ndarray:
        """The finite numbers of a tag; raises BadInput."""
        try:
            values = np.atleast_1d(np.asarray(self.header.get(keyword, default), np.float64))
        except Exception:  # pydicom converts on access, and fails on damage with whatever its converters raise
            values = np.empty(0)
        if values.shape != (count,) or not np.isfinite(values).all():
            self.refuse("bad-header", f"has no usable {keyword}; export it again")
        return values

    def refuse(self, code: str, what: str) -> NoReturn:
        refusing(self.path)(code, what)


class Series:
    """One series with checked headers, its slices in the order of their positions. Made by `opened`."""

    def __init__(self, path: Path, slices: list[Slice], header: nifti.Header) -> None:
        self.path = path
        self.header = header
        self.slices = slices

    @property
    def modality(self) -> str | None:
        """CT, MR, ...; None where it is not stated."""
        stated = str(self.slices[0].header.get("Modality", ""))
        return stated if re.fullmatch("[A-Z]{2,16}", stated) else None  # a damaged length could bring more into it

    def slabs(self) -> Iterator[tuple[slice, np.ndarray]]:
        """Yield (k, values of shape (i, j, 1)) slice by slice, rescaled to HU."""
        for k, one in enumerate(self.slices):
            reader = sitk.ImageFileReader()
            reader.SetImageIO("GDCMImageIO")
            reader.SetFileName(str(one.path))
            try:
                image = reader.Execute()
            except RuntimeError as error:
                raise BadInput("damaged-pixels", f"{one.path} cannot be decoded; copy or export it again.") from error
            if image.GetSize() != (*one.columns_rows, 1) or image.GetNumberOfComponentsPerPixel() != 1:
                one.refuse("damaged-pixels", "holds another picture than its header announces; export it again")
            yield slice(k, k + 1), sitk.GetArrayViewFromImage(image).transpose(2, 1, 0)


def read_series(folder: str | Path, series: str | None = None, *, max_voxels: int = nifti.MAX_VOXELS) -> Volume:
    """The series in a folder (not in folders below it) as int16 HU; raises BadInput.

    Axes (i, j, k) are columns, rows, and slices in the direction of the normal (rows' direction x columns').

    Args:
        series: the series' UID, or its last digits, where the folder holds several.
    """
    return image_of(opened(Path(folder), max_voxels, series))


def opened(folder: Path, max_voxels: int = nifti.MAX_VOXELS, series: str | None = None) -> Series:
    """Read and check all headers of a series; raises BadInput."""
    refuse = refusing(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # see above: they too quote what they found
        slices = _one_series(_slices(folder, refuse), series, refuse)
        for one in slices:
            _check(one)
        slices, affine = _stacked(slices, refuse)
    shape = (*slices[0].columns_rows, len(slices))
    return Series(folder, slices, header_of(shape, affine, np.dtype(np.int32), max_voxels, refuse))


def _slices(folder: Path, refuse: Refuse) -> list[Slice]:
    """All DICOM images of the folder."""
    if folder.is_symlink() or not folder.is_dir():
        refuse("not-a-file", "is not a folder, or only a link to one; give the folder of a DICOM series itself")
    try:
        names = sorted(name for name in os.listdir(folder) if not name.startswith("."))
        found = [one for name in names if (one := _slice(folder / name)) is not None]
    except OSError as error:
        raise BadInput("unreadable", f"{folder} cannot be read ({error.strerror}); check its rights.") from error
    if not found:
        refuse("no-dicom", "holds no DICOM images; give a folder with the files of one series, or a NIfTI file")
    return found


def _slice(path: Path) -> Slice | None:
    """The header of one file, None where it is no DICOM image; raises BadInput and OSError."""
    if stat.S_ISDIR(path.lstat().st_mode):
        return None
    refuse = refusing(path)
    with regular_file(path) as file:
        if file.read(132)[128:] != b"DICM":
            if path.name.lower().endswith(ENDINGS):
                refuse("not-dicom", "is not a DICOM file; copy or export it again")
            return None
        try:
            meta = read_file_meta_info(path)
            syntax = uid.UID(meta.get("TransferSyntaxUID", ""))
            if meta.get("MediaStorageSOPClassUID") == uid.MediaStorageDirectoryStorage:
                return None
            if syntax == uid.DeflatedExplicitVRLittleEndian:  # before the next step, which inflates it whole
                refuse("deflated", "is deflated as a whole; export it again with another transfer syntax")
            file.seek(0)
            header = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=TAGS)
            series = str(header.SeriesInstanceUID)
            if not _UID.fullmatch(series):  # a damaged length could bring the patient's name into it
                refuse("bad-header", "has a damaged header; copy or export it again")
            if "Rows" not in header and not _IMAGE.search(uid.UID(meta.MediaStorageSOPClassUID).name):
                return None
            size = (int(header.Columns), int(header.Rows))  # an image cut before them is damaged, not something else
            bits = int(header.get("BitsAllocated", 0))
            header.get("PhotometricInterpretation")  # converted here, where failing is expected
        except (BadInput, OSError):
            raise
        except Exception as error:  # on damage pydicom fails with whatever its converters raise
            raise BadInput("bad-header", f"{path} has a damaged header; copy or export it again.") from error
        if syntax not in NATIVE + ENCAPSULATED:
            refuse("transfer-syntax", "is coded in a way that cannot be read; export it uncompressed")
        if min(size) < 1:
            refuse("bad-dimensions", f"announces impossible dimensions {list(size)}; export it again")
        expected = size[0] * size[1] * bits // 8 if syntax in NATIVE else None
        return Slice(path, series, size, header, whole_pixels(file, syntax, expected))


def whole_pixels(file: BinaryIO, syntax: uid.UID, expected: int | None) -> bool:
    """Whether whole pixel data follow: of the expected bytes, or fragments up to their delimiter where it is None."""
    order = "little" if syntax.is_little_endian else "big"
    tag = file.read(4)
    if tag != (b"\xe0\x7f\x10\x00" if order == "little" else b"\x7f\xe0\x00\x10"):
        return False
    if not syntax.is_implicit_VR and file.read(4)[:2] not in (b"OB", b"OW"):
        return False
    length = int.from_bytes(file.read(4), order)
    if expected is not None:
        return expected <= length <= expected + 1 and file.tell() + length <= os.fstat(file.fileno()).st_size
    while len(item := file.read(8)) == 8 and item[:4] == b"\xfe\xff\x00\xe0":
        file.seek(int.from_bytes(item[4:], "little"), os.SEEK_CUR)
    return item == b"\xfe\xff\xdd\xe0\0\0\0\0"


def _one_series(slices: list[Slice], series: str | None, refuse: Refuse) -> list[Slice]:
    """The slices of the series asked for, or of the only one."""
    groups: dict[str, list[Slice]] = {}
    for one in slices:
        groups.setdefault(one.series, []).append(one)
    chosen = [members for name, members in groups.items() if series is None or name.endswith(series)]
    if len(chosen) == 1:
        return chosen[0]
    tail = next((n for n in range(SHORT_UID, 64) if len({name[-n:] for name in groups}) == len(groups)), 64)
    listed = []
    for name, members in list(groups.items())[:MAX_LISTED]:
        columns, rows = members[0].columns_rows
        listed.append(f"{name[-tail:] or 'none'} ({len(members)} slices of {columns} x {rows})")
    more = ", ..." if len(groups) > MAX_LISTED else ""
    sentence = f"holds {len(groups)} series, by the last digits of their UID: {', '.join(listed)}{more}"
    if series is not None:
        refuse("no-such-series", f"{sentence}; name exactly one of them")
    refuse("several-series", f"{sentence}; give each a folder of its own")


def _check(one: Slice) -> None:
    """Accept one plain grey picture, complete, with a linear scale to HU."""
    if one.numbers("NumberOfFrames", 1, 1) != 1:
        one.refuse("multi-frame", "holds several frames (enhanced DICOM); export it as one file per slice, or as NIfTI")
    if one.numbers("SamplesPerPixel", 1, 1) != 1 or one.header.get("PhotometricInterpretation") != "MONOCHROME2":
        one.refuse("colour", "is not a plain grey picture (MONOCHROME2); give the original CT slices")
    tags = ("BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation")
    allocated, stored, high, signed = (one.numbers(tag, 1)[0] for tag in tags)
    if allocated not in (8, 16, 32) or not 1 <= stored <= allocated or high != stored - 1 or signed not in (0, 1):
        one.refuse("datatype", "does not store plain integers of 8, 16 or 32 bit; export it again")
    if len({tag in one.header for tag in ("RescaleSlope", "RescaleIntercept")}) == 2:  # decoders invent the other
        one.refuse("bad-scaling", "has a RescaleSlope without a RescaleIntercept, or the reverse; export it again")
    slope, inter = one.numbers("RescaleSlope", 1, 1), one.numbers("RescaleIntercept", 1, 0)
    if not slope or abs(slope) * 2.0**32 + abs(inter) > float(np.finfo(np.float32).max):
        one.refuse("bad-scaling", "has a RescaleSlope or RescaleIntercept that cannot be; export it again")
    if "ModalityLUTSequence" in one.header:
        one.refuse("bad-scaling", "maps its voxels through a table, not a slope; export it as NIfTI")
    if not one.pixels:
        one.refuse("truncated", "has no pixels, or not as many as its header announces; copy or export it again")


def _stacked(slices: list[Slice], refuse: Refuse) -> tuple[list[Slice], np.ndarray]:
    """The slices in the order of their positions along the normal, and the affine of the stack (RAS+ mm)."""
    if len(slices) < 2:
        refuse("single-slice", "holds one slice, which has no thickness; give the whole series")
    across = [one.numbers("PixelSpacing", 2)[::-1] for one in slices]  # stored as (between rows, between columns)
    cosines = [one.numbers("ImageOrientationPatient", 6).reshape(2, 3) for one in slices]
    same_size = len({one.columns_rows for one in slices}) == 1
    if not (same_size and np.allclose(across, across[0], SAME, 0) and np.allclose(cosines, cosines[0], 0, SAME)):
        refuse("inconsistent-series", "has slices that differ in size or orientation; export the CT slices alone")
    lengths = np.linalg.norm(cosines[0], axis=1)
    if max(*np.abs(lengths - 1), abs(cosines[0][0] @ cosines[0][1])) > nifti.MAX_SHEAR:
        refuse("bad-affine", "has an ImageOrientationPatient that is no pair of directions; export it again")
    rows, columns = cosines[0] / lengths[:, None]
    normal = np.cross(rows, columns)
    positions = np.stack([one.numbers("ImagePositionPatient", 3) for one in slices])
    order = np.argsort(positions @ normal, kind="stable")
    step = _step(positions[order], normal, refuse)
    affine = np.eye(4)
    affine[:3, :3] = np.column_stack([rows * across[0][0], columns * across[0][1], normal * step])
    affine[:3, 3] = positions[order[0]]
    return [slices[n] for n in order], np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine


def _step(positions: np.ndarray, normal: np.ndarray, refuse: Refuse) -> float:
    """mm from slice to slice, of positions (n, 3) ordered along the normal; raises BadInput where they are uneven."""
    offsets = positions - positions[0]
    heights = offsets @ normal
    gaps = np.diff(heights)
    if gaps.min() < ROUNDING_MM:
        refuse("duplicate-slices", "has several slices at one position (time points or phases?); export one of each")
    sideways = np.linalg.norm(offsets - np.outer(heights, normal), axis=1).max()
    if sideways > max(nifti.MAX_SHEAR * heights[-1], ROUNDING_MM):
        refuse(
            "gantry-tilt",
            "was scanned with a tilted gantry: its slices are not stacked at right angles; "
            "straighten it with dcm2niix and give the NIfTI file",
        )
    tolerance = max(MAX_UNEVEN * float(np.median(gaps)), ROUNDING_MM)
    multiples = np.rint(gaps / gaps.min())
    if multiples.max() > 1 and np.abs(gaps - multiples * gaps.min()).max() <= tolerance:
        missing = int((multiples - 1).sum())
        refuse("missing-slices", f"lacks {missing} of {len(gaps) + 1 + missing} slices; copy or export it completely")
    step = float(heights[-1] / len(gaps))
    drift = np.abs(heights - step * np.arange(len(heights)))
    if max(np.abs(gaps - np.median(gaps)).max(), drift.max()) > tolerance:
        span = f"{gaps.min():.3g} to {gaps.max():.3g} mm apart"
        refuse("unequal-slices", f"has slices {span}; export them evenly spaced, or resample to NIfTI")
    return step
