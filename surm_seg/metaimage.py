"""NRRD (.nrrd, .nhdr) and MetaImage (.mha, .mhd) files, read with the same suspicion as NIfTI.

ITK fills what a header leaves out with defaults, follows a data file wherever it points, takes a file that is too
short or too long, and holds the volume a second time; so header and voxels are read here, and ITK is what the tests
compare with.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from surm_seg import nifti
from surm_seg.grid import header_of
from surm_seg.stream import GZIP_OR_ZLIB, Refuse, Stream, refusing, regular_file

ENDINGS = (".nrrd", ".nhdr", ".mha", ".mhd")
DETACHED = (".nhdr", ".mhd")  # headers whose voxels may lie in another file
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
_ALIASES = {name.replace(" ", ""): name for name in ("data file", "line skip", "byte skip", "old min", "old max")}

_NUMBER = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?")
_VECTOR = r"\( *([^(), ]+) *, *([^(), ]+) *, *([^(), ]+) *\)"

# World axes of a file -> RAS+, by which x and y are turned round. MetaImage is always LPS.
_LPS = (-1, -1, 1)
_SPACES = {
    "ras": (1, 1, 1), "right-anterior-superior": (1, 1, 1), "las": (-1, 1, 1), "left-anterior-superior": (-1, 1, 1),
    "lps": _LPS, "left-posterior-superior": _LPS,
}  # fmt: skip


@dataclass(frozen=True)
class _Text:
    """What a text header says about its voxels.

    Args:
        kind: numpy type with its byte order.
        affine: 4 x 4, voxel index (i, j, k, 1) -> RAS+ mm.
        data_file: name of the file beside it that holds the voxels, None where they follow the header.
        packed: gzip or zlib.
    """

    shape: tuple[int, int, int]
    kind: str
    affine: np.ndarray
    data_file: str | None
    packed: bool


@dataclass(frozen=True)
class MetaImage:
    """One file with a checked header. Made by `opened`.

    Args:
        data: the file that holds the voxels.
        start: bytes before them.
    """

    path: Path
    header: nifti.Header
    data: Path
    start: int
    packed: bool

    def slabs(self) -> Iterator[tuple[slice, np.ndarray]]:
        """Yield (range of k, values of shape (i, j, len)) as stored; use none before the iteration ends."""
        with regular_file(self.data) as file:
            file.seek(self.start)
            stream = Stream(file, refusing(self.path), GZIP_OR_ZLIB if self.packed else None)
            yield from stream.slabs(self.header.shape, self.header.dtype)


def opened(path: Path, max_voxels: int = nifti.MAX_VOXELS) -> MetaImage:
    """Read and check the header; raises BadInput."""
    refuse = refusing(path)
    with regular_file(path) as file:
        nrrd = path.name.lower().endswith((".nrrd", ".nhdr"))
        text = _nrrd(_nrrd_lines(file, refuse), refuse) if nrrd else _meta(_meta_lines(file, refuse), refuse)
        start = file.tell()
    header = header_of(text.shape, text.affine, np.dtype(text.kind), max_voxels, refuse)
    if text.data_file is None:
        return MetaImage(path, header, path, start, text.packed)
    return MetaImage(path, header, path.parent / text.data_file, 0, text.packed)


def _line(file: BinaryIO, refuse: Refuse) -> str:
    """The next line, without its end; '' only for an empty one."""
    line = file.readline(MAX_HEADER_BYTES)
    if not line.endswith(b"\n") or file.tell() > MAX_HEADER_BYTES:
        refuse("truncated", "ends before its header does, or is not an image; copy or export it again")
    return line.decode("utf-8", "replace").rstrip("\r\n")


def _meta_lines(file: BinaryIO, refuse: Refuse) -> dict[str, str]:
    """Key -> value, up to and with ElementDataFile, which ends the header."""
    found: dict[str, str] = {}
    while "ElementDataFile" not in found:
        key, equals, value = (part.strip() for part in _line(file, refuse).partition("="))
        if not equals or key in found:
            refuse("not-metaimage", "is not a MetaImage file, or says a thing twice; convert it")
        found[key] = value
    return found


def _nrrd_lines(file: BinaryIO, refuse: Refuse) -> dict[str, str]:
    """Field -> description, up to the empty line (or the end of a detached header)."""
    if not re.fullmatch(r"NRRD000\d", _line(file, refuse)):
        refuse("not-nrrd", "is not an NRRD file; convert it")
    found: dict[str, str] = {}
    while file.tell() < os.fstat(file.fileno()).st_size and (line := _line(file, refuse)):
        if line.startswith("#") or ":=" in line:  # comments, and key/value pairs, which say nothing about voxels
            continue
        field, colon, value = (part.strip() for part in line.partition(":"))
        field = _ALIASES.get(field.lower(), field.lower())
        if not colon or field in found:
            refuse("not-nrrd", "is not an NRRD file, or says a thing twice; convert it")
        found[field] = value
    return found


def _meta(found: dict[str, str], refuse: Refuse) -> _Text:
    """Accept binary voxels, one channel, unscaled, with their place in the patient stated in mm."""
    if not _flag(found.get("BinaryData", "False"), refuse) or found.get("HeaderSize", "0") != "0":
        refuse("datatype", "does not hold plain binary voxels; save it again")
    shape = _shape(found.get("NDims", ""), found.get("DimSize", ""), refuse)
    kind = _META.get(found.get("ElementType", ""))
    if kind is None or found.get("ElementNumberOfChannels", "1") != "1":
        refuse("datatype", "stores voxels of a kind that cannot be read; save it as 8 to 64 bit integers or floats")
    orders = {_flag(found[key], refuse) for key in ("BinaryDataByteOrderMSB", "ElementByteOrderMSB") if key in found}
    if len(orders) == 2:
        refuse("datatype", "states its byte order twice and differently; save it again")
    scaling = [
        found.get(f"ElementToIntensityFunction{name}", plain) for name, plain in (("Slope", "1"), ("Offset", "0"))
    ]
    if _numbers(" ".join(scaling), 2, refuse).tolist() != [1, 0]:
        refuse("bad-scaling", "scales its voxels, which few programs heed; save it again with the values themselves")
    if found.get("DistanceUnits", "mm") not in ("mm", "?"):
        refuse("units", "measures space in another unit than mm; convert it to millimetres")
    matrix = [found[key] for key in ("TransformMatrix", "Rotation", "Orientation") if key in found]
    place = [found[key] for key in ("Offset", "Position", "Origin") if key in found]
    if len(matrix) != 1 or len(place) != 1 or "ElementSpacing" not in found:
        refuse("no-orientation", "does not say once how it lies in the patient; export it again")
    directions, spacing = _numbers(matrix[0], 9, refuse).reshape(3, 3), _numbers(found["ElementSpacing"], 3, refuse)
    if spacing.min() <= 0:
        refuse("bad-spacing", f"has voxels of {spacing.tolist()} mm, which no CT has; mend its spacing")
    if np.abs(np.linalg.norm(directions, axis=1) - 1).max() > nifti.MAX_SHEAR:
        refuse("bad-affine", "has directions that are not of length 1; export it again")
    affine = _affine(directions * spacing[:, None], _numbers(place[0], 3, refuse), _LPS)
    name = None if found["ElementDataFile"].lower() == "local" else _beside(found["ElementDataFile"], refuse)
    packed = _flag(found.get("CompressedData", "False"), refuse)
    return _Text(shape, (">" if True in orders else "<") + kind, affine, name, packed)


def _nrrd(found: dict[str, str], refuse: Refuse) -> _Text:
    """Accept raw or gzip voxels, one channel, unscaled, with their place in the patient stated in mm."""
    encoding = found.get("encoding", "").lower()
    if encoding not in ("raw", "gz", "gzip"):
        refuse("datatype", "is coded in a way that cannot be read; save it raw or with gzip")
    if any(found.get(f"{unit} skip", "0") != "0" for unit in ("line", "byte")):
        refuse("bad-offset", "skips bytes before its voxels; save it again")
    shape = _shape(found.get("dimension", ""), found.get("sizes", ""), refuse)
    kind = _NRRD.get(found.get("type", "").lower())
    if kind is None:
        refuse("datatype", "stores voxels of a kind that cannot be read; save it as 8 to 64 bit integers or floats")
    order = {"little": "<", "big": ">"}.get(found.get("endian", "little" if kind[1] == "1" else "").lower())
    if order is None:
        refuse("datatype", "does not say in which order its bytes are; save it again")
    if {"old min", "old max"} & set(found):
        refuse("bad-scaling", "scales its voxels, which few programs heed; save it again with the values themselves")
    world = _SPACES.get(found.get("space", "").lower())
    if world is None or not {"space directions", "space origin"} <= set(found):
        refuse("no-orientation", "does not say how it lies in the patient (space RAS, LAS or LPS); export it again")
    if {"spacings", "axis mins", "axis maxs"} & set(found):
        refuse("bad-affine", "states its spacing twice; export it again")
    if set(re.findall(r'"(.*?)"', found.get("space units", ""))) - {"mm"}:
        refuse("units", "measures space in another unit than mm; convert it to millimetres")
    directions, origin = _vectors(found["space directions"], 3, refuse), _vectors(found["space origin"], 1, refuse)
    affine = _affine(directions, origin[0], world)
    name = None if "data file" not in found else _beside(found["data file"], refuse)
    return _Text(shape, order + kind, affine, name, encoding != "raw")


def _flag(text: str, refuse: Refuse) -> bool:
    if text.lower() not in ("true", "false"):
        refuse("datatype", "answers neither True nor False where its header must; save it again")
    return text.lower() == "true"


def _shape(rank: str, sizes: str, refuse: Refuse) -> tuple[int, int, int]:
    """Three dimensions, from the text of their number and of their sizes."""
    if not re.fullmatch(r"-?[0-9]{1,9}( +-?[0-9]{1,9})*", sizes):
        refuse("bad-dimensions", "states no usable dimensions; export it again")
    shape = [int(number) for number in sizes.split()]
    if rank != str(len(shape)):
        refuse("bad-dimensions", "states its dimensions twice and differently, or not at all; export it again")
    if len(shape) != 3:
        refuse("not-3d", f"has {len(shape)} dimensions; extract one 3D volume and give that")
    if min(shape) < 1:
        refuse("bad-dimensions", f"announces impossible dimensions {shape}; export it again")
    return shape[0], shape[1], shape[2]


def _numbers(text: str, count: int, refuse: Refuse) -> np.ndarray:
    """Exactly `count` finite decimal numbers between blanks."""
    words = text.split()
    numbers = np.array([float(word) if _NUMBER.fullmatch(word) else np.nan for word in words])
    if numbers.shape != (count,) or not np.isfinite(numbers).all():
        refuse("bad-affine", "does not place itself in space with finite numbers; export it again")
    return numbers


def _vectors(text: str, count: int, refuse: Refuse) -> np.ndarray:
    """NRRD vectors (x,y,z) between blanks, as (count, 3)."""
    match = re.fullmatch(" +".join([_VECTOR] * count), text)
    return _numbers(" ".join(match.groups()) if match else "", 3 * count, refuse).reshape(count, 3)


def _affine(steps: np.ndarray, origin: np.ndarray, world: tuple[int, int, int]) -> np.ndarray:
    """4 x 4 in RAS+ mm.

    Args:
        steps: (axis i j k, world x y z), from one voxel to the next, mm.
        world: +1 or -1 for each axis of the file's world that grows as RAS+, or against it.
    """
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = steps.T, origin
    return np.diag([*world, 1.0]) @ affine


def _beside(name: str, refuse: Refuse) -> str:
    """The name of one file in the header's own folder."""
    if not name or re.search(r"[/\\%\0]|^\.|^LIST\b|\s\d", name):
        refuse("data-file", "keeps its voxels in several files or in another folder; save it as one file")
    return name
