"""NIfTI-1 files, read with suspicion and written reproducibly.

A damaged file is refused with a sentence, never turned into wrong voxels.
nibabel understands the header; the bytes are read here, once, front to back, with every length taken from the header
and the stream verified to its end, because a cut or flipped gzip otherwise decodes into plausible nonsense.
"""

from __future__ import annotations

import gzip
import io
import logging
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import BinaryIO, NoReturn
from xml.etree import ElementTree

import nibabel as nib
import numpy as np
from nibabel.spatialimages import HeaderDataError

from surm_seg.errors import BadInput
from surm_seg.stream import GZIP, Refuse, Stream, refusing, regular_file

MAX_VOXELS = 512 * 512 * 1500
"""Default voxel budget: a 1.5 m whole-body CT at 1 mm."""

MAX_SLICE_VOXELS = 4096 * 4096
"""Most voxels of one slice (i, j), which is the least that is held in memory; CT has 512 x 512 to 2048 x 2048."""

MAX_EXTENSION_BYTES = 16 * 2**20
"""Longest stretch accepted between header and voxels; real label tables take 13 kB."""

ENDINGS = (".nii.gz", ".nii")
HEADER_BYTES = 348
FIRST_VOXEL = 352  # header and the four bytes that announce extensions

# NIfTI-1 datatype code -> numpy type. Left out on purpose: RGB, complex, float128 and single bits.
DATATYPES = {
    2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8", 256: "i1", 512: "u2", 768: "u4", 1024: "i8", 1280: "u8",
}  # fmt: skip
UNITS_UNKNOWN, UNITS_MM = 0, 2
MAX_SHEAR = 1e-3  # cosine between two axes that are meant to be perpendicular
SPACING_MM = (0.01, 100.0)  # outside this range a header is damaged or not in millimetres

# nibabel reports what it repairs (qfac 0, negative pixdim) on standard error; a repair needs no reader.
_SILENT = logging.Logger("surm_seg.nifti", level=logging.CRITICAL + 1)


@dataclass(frozen=True)
class Header:
    """What the voxels of one file look like.

    Args:
        shape: (i, j, k), the first index varying fastest in the file.
        dtype: stored type with its byte order.
        offset: bytes before the first voxel.
        scaling: (slope, intercept) to apply to the stored values, or None.
        fields: the header as nibabel sees it after its own harmless repairs.
    """

    shape: tuple[int, int, int]
    dtype: np.dtype
    offset: int
    scaling: tuple[float, float] | None
    fields: nib.Nifti1Header


class NiftiFile:
    """One open file: its header, and its voxels once, in file order. Made by `opened`."""

    def __init__(self, path: Path, file: BinaryIO, max_voxels: int) -> None:
        self.path = path
        refuse = refusing(path)
        self._stream = Stream(file, refuse, GZIP if path.name.lower().endswith(".gz") else None)
        self.header = _parse(self._stream.read(HEADER_BYTES).tobytes(), refuse, max_voxels)
        self.extensions = self._stream.read(self.header.offset - HEADER_BYTES).tobytes()

    def slabs(self) -> Iterator[tuple[slice, np.ndarray]]:
        """Yield (range of k, values of shape (i, j, len)): integers as stored, or float64 where scaled.

        The stream is verified to its end after the last slab: use no voxel before the iteration has finished.
        """
        return self._stream.slabs(self.header.shape, self.header.dtype, self.header.scaling)


@contextmanager
def opened(path: Path, max_voxels: int = MAX_VOXELS) -> Iterator[NiftiFile]:
    """Open a .nii or .nii.gz file and read its header; raises BadInput for anything that is not one."""
    if not path.name.lower().endswith(ENDINGS):
        raise BadInput("not-nifti", f"{path} is not named .nii or .nii.gz; convert it to NIfTI.")
    with regular_file(path) as file:
        yield NiftiFile(path, file, max_voxels)


def write(file: io.BufferedIOBase, header: nib.Nifti1Header, voxels: np.ndarray, *, packed: bool) -> None:
    """Write a single-file NIfTI-1 image; the same content gives the same bytes.

    Args:
        header: of dtype uint8 and the voxels' shape.
        voxels: 0..255 with axes (i, j, k).
        packed: gzip it, with neither name nor time in the gzip header.
    """
    if packed:
        with gzip.GzipFile(filename="", mode="wb", fileobj=file, mtime=0, compresslevel=6) as inner:
            return write(inner, header, voxels, packed=False)
    header["vox_offset"] = FIRST_VOXEL
    file.write(header.binaryblock + bytes(FIRST_VOXEL - HEADER_BYTES))
    for k in range(voxels.shape[2]):
        file.write(voxels[:, :, k].astype(np.uint8).tobytes(order="F"))


def _parse(block: bytes, refuse: Refuse, max_voxels: int) -> Header:
    """The 348 header bytes, checked field by field; raises BadInput."""
    raw = _fields(block, refuse)
    if block[344:348] != b"n+1\0":
        refuse("bad-magic", "is not a single-file NIfTI-1 image (.hdr/.img pairs too must be converted to .nii.gz)")
    rank, *extent = (int(n) for n in raw["dim"])
    if not 1 <= rank <= 7 or min(extent[:rank]) < 1:
        refuse("bad-dimensions", f"announces impossible dimensions {[rank, *extent]}; export it again")
    shape = extent[:rank]
    while len(shape) > 3 and shape[-1] == 1:
        shape.pop()
    if len(shape) != 3:
        refuse("not-3d", f"has {len(shape)} dimensions {tuple(shape)}; extract one 3D volume and give that")
    i, j, k = shape
    check_size((i, j, k), max_voxels, refuse)
    if int(raw["datatype"]) not in DATATYPES:
        refuse("datatype", f"stores datatype {int(raw['datatype'])}; only 8 to 64 bit integers and floats can be read")
    dtype = np.dtype(raw.endianness + DATATYPES[int(raw["datatype"])])
    if int(raw["bitpix"]) != 8 * dtype.itemsize:
        refuse("datatype", f"calls its {dtype.name} voxels {int(raw['bitpix'])} bit wide; export it again")
    offset = float(raw["vox_offset"])
    if not FIRST_VOXEL <= offset <= MAX_EXTENSION_BYTES or offset != int(offset):
        refuse("bad-offset", f"places its voxels at byte {offset}, which cannot be; export it again")
    scaling = _scaling(raw, dtype, refuse)
    try:
        raw.check_fix(logger=_SILENT)
    except HeaderDataError:
        refuse("bad-header", "has a header that contradicts itself; export it again")
    _check_geometry(raw, refuse)
    return Header((i, j, k), dtype, int(offset), scaling, raw)


def _fields(block: bytes, refuse: Refuse) -> nib.Nifti1Header:
    """The header in its own byte order, which shows in the first field: the header's size."""
    if struct.pack("<i", 540) == block[:4] or struct.pack(">i", 540) == block[:4]:
        refuse("not-nifti", "is a NIfTI-2 file; convert it to NIfTI-1")
    for order in "<>":
        if struct.pack(f"{order}i", HEADER_BYTES) == block[:4]:
            return nib.Nifti1Header(block, endianness=order, check=False)
    refuse("not-nifti", "is not a NIfTI file (gzip files need the ending .nii.gz); convert it")


def _scaling(raw: nib.Nifti1Header, dtype: np.dtype, refuse: Refuse) -> tuple[float, float] | None:
    """NIfTI-1: a slope of 0 means unscaled, and so does NaN, as nibabel writes it."""
    slope, inter = float(raw["scl_slope"]), float(raw["scl_inter"])
    if slope == 0 or np.isnan(slope):
        return None
    largest = float(np.iinfo(dtype).max) if dtype.kind in "iu" else 1.0
    if not abs(slope) * largest + abs(inter) <= float(np.finfo(np.float32).max):
        refuse("bad-scaling", f"scales its voxels by {slope} and {inter}, beyond any number; export it again")
    return None if (slope, inter) == (1.0, 0.0) else (slope, inter)


def _check_geometry(raw: nib.Nifti1Header, refuse: Refuse) -> None:
    """Accept only a header that states, in mm, how the voxels lie in the patient."""
    if int(raw["xyzt_units"]) & 7 not in (UNITS_UNKNOWN, UNITS_MM):
        refuse("units", "measures space in metres or microns; convert it to millimetres")
    if not int(raw["sform_code"]) and not int(raw["qform_code"]):
        refuse("no-orientation", "says nowhere how it lies in the patient (sform and qform code 0); export it again")
    try:
        with np.errstate(all="ignore"):
            affine = np.asarray(raw.get_best_affine(), np.float64)
    except (HeaderDataError, ValueError):  # a quaternion longer than 1
        affine = np.full((4, 4), np.nan)
    check_affine(affine, refuse)


def check_size(shape: tuple[int, int, int], max_voxels: int, refuse: Refuse) -> None:
    """Accept no more voxels than the budget, nor a slice that is a volume of its own."""
    if (voxels := prod(shape)) > max_voxels:
        refuse("too-large", f"announces {voxels:,} voxels, over the limit of {max_voxels:,}; crop or resample it")
    if max(shape) > np.iinfo(np.int16).max:  # what a NIfTI header, and so a Grid, can state
        refuse("too-large", f"announces {max(shape):,} voxels along one axis, which no CT has; crop or resample it")
    if shape[0] * shape[1] > MAX_SLICE_VOXELS:
        refuse("too-large", f"announces slices of {shape[0]} x {shape[1]} voxels, which no CT has; crop or resample it")


def check_affine(affine: np.ndarray, refuse: Refuse) -> None:
    """Accept only a finite 4 x 4 affine with a plausible spacing in mm and perpendicular axes."""
    if not np.isfinite(affine).all():
        refuse("bad-affine", "has an affine that is not finite; export it again")
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    if not ((spacing >= SPACING_MM[0]) & (spacing <= SPACING_MM[1])).all():
        refuse("bad-spacing", f"has voxels of {spacing.tolist()} mm, which no CT has; mend its affine")
    cosines = affine[:3, :3] / spacing
    if np.abs(cosines.T @ cosines - np.eye(3)).max() > MAX_SHEAR:
        refuse("shear", "has axes that are not perpendicular (gantry tilt?); resample it to an upright grid")


class _NoDoctype(ElementTree.TreeBuilder):
    """A label table declares no document type; without one there are no entities to expand or fetch."""

    def doctype(self, name: str, pubid: str | None, system: str | None) -> NoReturn:
        raise ElementTree.ParseError("document type")


def label_table(file: NiftiFile) -> dict[int, str] | None:
    """Class names by label value from a Caret label-table extension (as TotalSegmentator writes), None without one.

    Raises BadInput where there is a table that cannot be read.
    """
    contents = _contents(file.extensions, file.header.fields.endianness)
    text = next((content for content in contents if b"<LabelTable" in content), None)
    if text is None:
        return None
    try:
        root = ElementTree.fromstring(text.strip(b"\0 \r\n"), ElementTree.XMLParser(target=_NoDoctype()))
        entries = [(int(label.attrib["Key"]), (label.text or "").strip()) for label in root.iter("Label")]
    except (ElementTree.ParseError, LookupError, ValueError) as error:
        raise BadInput("label-table", f"{file.path} carries a class table that cannot be read; give one.") from error
    if len(dict(entries)) != len(entries):
        raise BadInput("label-table", f"{file.path} carries a class table that names a value twice; give one.")
    return dict(entries)


def _contents(extensions: bytes, order: str) -> Iterator[bytes]:
    """The bodies of the extensions: four flag bytes, then (size, code, body) each, the size counting itself."""
    position = 4
    while position + 8 <= len(extensions) and extensions[0]:
        size, _ = struct.unpack_from(f"{order}ii", extensions, position)
        if size < 8:
            return
        yield extensions[position + 8 : position + size]
        position += size
