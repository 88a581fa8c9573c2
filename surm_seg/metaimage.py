"""NRRD (.nrrd, .nhdr) and MetaImage (.mha, .mhd) files: the text header checked here, the voxels read by SimpleITK.

ITK fills what a header leaves out with defaults, follows a data file wherever it points, and takes a file that is too
short or too long; so all of that is refused before it is asked.
"""

from __future__ import annotations

import os
import re
import stat
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NoReturn

import numpy as np
import SimpleITK as sitk

from surm_seg import nifti
from surm_seg.errors import BadInput
from surm_seg.grid import header_of

ENDINGS = (".nrrd", ".nhdr", ".mha", ".mhd")
MAX_HEADER_BYTES = 2**20  # of text before the voxels; segmentations of 3D Slicer with 100 segments take 60 kB

# Names of the stored types, in either format -> numpy type.
_META = {
    "MET_CHAR": "i1", "MET_UCHAR": "u1", "MET_SHORT": "i2", "MET_USHORT": "u2", "MET_INT": "i4", "MET_UINT": "u4",
    "MET_LONG_LONG": "i8", "MET_ULONG_LONG": "u8", "MET_FLOAT": "f4", "MET_DOUBLE": "f8",
}  # fmt: skip
_NRRD = {
    name: kind
    for kind, names in {
        "i1": "signed char/int8/int8_t", "u1": "uchar/unsigned char/uint8/uint8_t",
        "i2": "short/short int/signed short/signed short int/int16/int16_t",
        "u2": "ushort/unsigned short/unsigned short int/uint16/uint16_t", "i4": "int/signed int/int32/int32_t",
        "u4": "uint/unsigned int/uint32/uint32_t",
        "i8": "longlong/long long/long long int/signed long long/signed long long int/int64/int64_t",
        "u8": "ulonglong/unsigned long long/unsigned long long int/uint64/uint64_t", "f4": "float", "f8": "double",
    }.items()
    for name in names.split("/")
}  # fmt: skip
_SPACES = {"ras", "las", "lps", "right-anterior-superior", "left-anterior-superior", "left-posterior-superior"}


@dataclass(frozen=True)
class _Text:
    """What a text header says about its voxels.

    Args:
        data_file: name of the file beside it that holds the voxels, None where they follow the header.
        packed: gzip or zlib.
    """

    shape: list[int]
    kind: str | None
    data_file: str | None
    packed: bool


class MetaImage:
    """One file with a checked header and voxels of the right length. Made by `opened`."""

    def __init__(self, path: Path, header: nifti.Header) -> None:
        self.path = path
        self.header = header

    def slabs(self) -> Iterator[tuple[slice, np.ndarray]]:
        """Yield (range of k, values of shape (i, j, len)), of the whole volume, which ITK reads at once."""
        try:
            image = sitk.ReadImage(str(self.path))
        except RuntimeError as error:
            raise BadInput("damaged-pixels", f"{self.path} cannot be decoded; copy or export it again.") from error
        values = sitk.GetArrayViewFromImage(image).transpose(2, 1, 0)
        assert values.shape == self.header.shape, (values.shape, self.header.shape)
        for k in range(values.shape[2]):
            plane = values[:, :, k : k + 1]
            if plane.dtype.kind == "f" and not np.isfinite(plane).all():
                sentence = f"{self.path} holds NaN or infinite voxels; replace them (air is -1024 HU)."
                raise BadInput("non-finite-voxels", sentence)
            yield slice(k, k + 1), plane


def opened(path: Path, max_voxels: int = nifti.MAX_VOXELS) -> MetaImage:
    """Check the header and the length of the voxels (a packed file is unpacked once for it); raises BadInput."""

    def refuse(code: str, what: str) -> NoReturn:
        raise BadInput(code, f"{path} {what}.")

    with _regular(path) as file:
        nrrd = path.name.lower().endswith((".nrrd", ".nhdr"))
        text = _nrrd(_nrrd_lines(file, refuse), refuse) if nrrd else _meta(_meta_lines(file, refuse), refuse)
        if len(text.shape) != 3:
            refuse("not-3d", f"has {len(text.shape)} dimensions; extract one 3D volume and give that")
        if min(text.shape) < 1:
            refuse("bad-dimensions", f"announces impossible dimensions {text.shape}; export it again")
        if text.kind is None:
            refuse("datatype", "stores voxels of a kind that cannot be read; save it as 8 to 64 bit integers or floats")
        i, j, k = text.shape
        nifti.check_size((i, j, k), max_voxels, refuse)
        expected = i * j * k * np.dtype(text.kind).itemsize
        if text.data_file is None:
            _check_length(file, expected, text.packed, refuse)
        else:
            with _regular(path.parent / text.data_file) as beside:
                _check_length(beside, expected, text.packed, refuse)
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        raise BadInput("bad-header", f"{path} has a header that contradicts itself; export it again.") from error
    if reader.GetSize() != (i, j, k) or reader.GetNumberOfComponents() != 1:
        refuse("bad-header", "has a header that contradicts itself; export it again")
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(reader.GetDirection(), (3, 3)) * reader.GetSpacing()
    affine[:3, 3] = reader.GetOrigin()
    affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine  # ITK's world is LPS
    return MetaImage(path, header_of((i, j, k), affine, np.dtype(text.kind), max_voxels, refuse))


@contextmanager
def _regular(path: Path) -> Iterator[BinaryIO]:
    """A regular file, opened; never a link, and a FIFO does not hang."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        if path.is_symlink():
            raise BadInput("not-a-file", f"{path} is a symbolic link; give the file itself.") from error
        raise BadInput("unreadable", f"{path} cannot be opened ({error.strerror}); check name and rights.") from error
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise BadInput("not-a-file", f"{path} is not a regular file; give an image file.")
        if status.st_size == 0:
            raise BadInput("empty-file", f"{path} is empty; copy or export it again.")
        with open(descriptor, "rb", closefd=False) as file:
            yield file
    finally:
        os.close(descriptor)


def _line(file: BinaryIO, refuse: nifti.Refuse) -> str:
    """The next line, without its end; '' only for an empty one."""
    line = file.readline(MAX_HEADER_BYTES)
    if not line.endswith(b"\n") or file.tell() > MAX_HEADER_BYTES:
        refuse("truncated", "ends before its header does, or is not an image; copy or export it again")
    return line.decode("utf-8", "replace").rstrip("\r\n")


def _meta_lines(file: BinaryIO, refuse: nifti.Refuse) -> dict[str, str]:
    """Key -> value, up to and with ElementDataFile, which ends the header."""
    found: dict[str, str] = {}
    while "ElementDataFile" not in found:
        key, equals, value = (part.strip() for part in _line(file, refuse).partition("="))
        if not equals or key in found:
            refuse("not-metaimage", "is not a MetaImage file, or says a thing twice; convert it")
        found[key] = value
    return found


def _nrrd_lines(file: BinaryIO, refuse: nifti.Refuse) -> dict[str, str]:
    """Field -> description, up to the empty line (or the end of a detached header)."""
    if not re.fullmatch(r"NRRD000\d", _line(file, refuse)):
        refuse("not-nrrd", "is not an NRRD file; convert it")
    found: dict[str, str] = {}
    while file.tell() < os.fstat(file.fileno()).st_size and (line := _line(file, refuse)):
        if line.startswith("#") or ":=" in line:  # comments, and key/value pairs, which say nothing about voxels
            continue
        field, colon, value = (part.strip() for part in line.partition(":"))
        field = field.lower().replace("datafile", "data file")
        if not colon or field in found:
            refuse("not-nrrd", "is not an NRRD file, or says a thing twice; convert it")
        found[field] = value
    return found


def _meta(found: dict[str, str], refuse: nifti.Refuse) -> _Text:
    """Accept binary voxels, one channel, with their place in the patient stated."""
    if found.get("BinaryData", "").lower() != "true" or found.get("HeaderSize", "0") != "0":
        refuse("datatype", "does not hold plain binary voxels; save it again")
    if "NDims" not in found or _int_list(found["NDims"], refuse) != [len(_int_list(found.get("DimSize", ""), refuse))]:
        refuse("bad-dimensions", "states its dimensions twice and differently, or not at all; export it again")
    kind = _META.get(found.get("ElementType", "")) if found.get("ElementNumberOfChannels", "1") == "1" else None
    matrix = [found[key] for key in ("TransformMatrix", "Rotation", "Orientation") if key in found]
    place = [found[key] for key in ("Offset", "Position", "Origin") if key in found]
    if len(matrix) != 1 or len(place) != 1 or "ElementSpacing" not in found:
        refuse("no-orientation", "does not say once how it lies in the patient; export it again")
    _check_finite(" ".join([*matrix, *place, found["ElementSpacing"]]), 15, refuse)
    name = None if found["ElementDataFile"].lower() == "local" else _beside(found["ElementDataFile"], refuse)
    packed = found.get("CompressedData", "False").lower() == "true"
    return _Text(_int_list(found["DimSize"], refuse), kind, name, packed)


def _nrrd(found: dict[str, str], refuse: nifti.Refuse) -> _Text:
    """Accept raw or gzip voxels, one channel, with their place in the patient stated in mm."""
    encoding = found.get("encoding", "").lower()
    if encoding not in ("raw", "gz", "gzip"):
        refuse("datatype", "is coded in a way that cannot be read; save it raw or with gzip")
    if any(found.get(f"{unit} skip", found.get(f"{unit}skip", "0")) != "0" for unit in ("line", "byte")):
        refuse("bad-offset", "skips bytes before its voxels; save it again")
    shape = _int_list(found.get("sizes", ""), refuse)
    if _int_list(found.get("dimension", ""), refuse) != [len(shape)]:
        refuse("bad-dimensions", "states its dimensions twice and differently, or not at all; export it again")
    if len(shape) == 3:
        if not {"space directions", "space origin"} <= set(found) or found.get("space", "").lower() not in _SPACES:
            refuse("no-orientation", "does not say how it lies in the patient (space RAS, LAS or LPS); export it again")
        _check_finite(f"{found['space directions']} {found['space origin']}", 12, refuse)
        if set(re.findall(r'"(.*?)"', found.get("space units", ""))) - {"mm"}:
            refuse("units", "measures space in another unit than mm; convert it to millimetres")
    name = None if "data file" not in found else _beside(found["data file"], refuse)
    return _Text(shape, _NRRD.get(found.get("type", "").lower()), name, encoding != "raw")


def _int_list(text: str, refuse: nifti.Refuse) -> list[int]:
    """Whole numbers between blanks."""
    if not re.fullmatch(r"-?\d{1,9}( +-?\d{1,9})*", text):
        refuse("bad-dimensions", "states no usable dimensions; export it again")
    return [int(number) for number in text.split()]


def _check_finite(text: str, count: int, refuse: nifti.Refuse) -> None:
    """Accept exactly `count` finite numbers between blanks, commas and brackets."""
    try:
        numbers = np.array(re.sub(r"[(),]", " ", text).split(), np.float64)
    except ValueError:
        numbers = np.empty(0)
    if numbers.shape != (count,) or not np.isfinite(numbers).all():
        refuse("bad-affine", "has an affine that is not finite; export it again")


def _beside(name: str, refuse: nifti.Refuse) -> str:
    """The name of one file in the header's own folder."""
    if not name or re.search(r"[/\\%]|^\.|^LIST\b|\s\d", name):
        refuse("data-file", "keeps its voxels in several files or in another folder; save it as one file")
    return name


def _check_length(file: BinaryIO, expected: int, packed: bool, refuse: nifti.Refuse) -> None:
    """Accept exactly the expected bytes up to the file's end; gzip and zlib streams are verified to theirs."""
    if not packed:
        length = os.fstat(file.fileno()).st_size - file.tell()
    else:
        length, inflater = 0, zlib.decompressobj(wbits=47)  # 47: zlib or gzip, whichever it is
        try:
            while not inflater.eof and length <= expected:
                chunk = inflater.unconsumed_tail or file.read(nifti.CHUNK_BYTES)
                data = inflater.decompress(chunk, nifti.CHUNK_BYTES)
                if not data and not chunk:
                    refuse("truncated", "was cut short; copy or export it again")
                length += len(data)
        except zlib.error:
            refuse("damaged-gzip", "is not intact inside; copy or export it again")
        if inflater.unused_data or (length == expected and file.read(1)):
            refuse("trailing-data", "has bytes after its voxels; export it again")
    if length < expected:
        refuse("truncated", "ends before its header and voxels do; copy or export it again")
    if length > expected:
        refuse("trailing-data", "is longer than the voxels its header announces; export it again")
