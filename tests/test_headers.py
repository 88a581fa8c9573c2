"""NIfTI headers with any number in any field: a refusal with a code, or the volume that nibabel sees in the same file.

300 files by default; SURM_DRAWS sets another number (`make soak`: 50,000).
"""

from __future__ import annotations

import gzip
import os
import re
import resource
import struct
import warnings
from math import prod
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from nifti_bytes import LPS, SHAPE

from surm_seg.errors import BadInput
from surm_seg.volume import read_image

DRAWS = int(os.environ.get("SURM_DRAWS", "300"))
BATCH = min(DRAWS, 1000)  # drawn at once: what hypothesis remembers of them grows
FIELDS = {name: (kind, offset) for name, (kind, offset, *_) in (nib.Nifti1Header.template_dtype.fields or {}).items()}
KINDS = {2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8", 256: "i1", 512: "u2", 768: "u4", 1024: "i8", 1280: "u8"}
MAX_VOXELS = 2**14  # that a file of this test holds, whatever its header announces
MAX_GROWTH_KB = 300_000  # of the process, whatever sizes the headers announce

# Numbers at the edges of what a field may hold, which any bytes would rarely hit.
EDGES: dict[str, list[float]] = {
    "sizeof_hdr": [348, 540, 0, -348],
    "dim": [0, 1, 2, 3, 4, 5, 7, 8, -1, 40, 32767, -32768],
    "datatype": [*KINDS, 0, 1, 32, 128, 1536, 1792, 2048, 2304],
    "bitpix": [0, 1, 8, 16, 24, 32, 64, 128],
    "vox_offset": [352, 353, 352.5, 368, 1000, 0, 348, -352, 1e9],
    "sform_code": [0, 1, 2, 3, 4, 5, -1],
    "qform_code": [0, 1, 2, 3, 4, 5, -1],
    "xyzt_units": [0, 1, 2, 3, 4, 10, 255],
}
FLOATS = [0, -0.0, 1, -1, 0.5, 2, 1e-3, 1e3, 1e-40, 3.4e38, -3.4e38, np.nan, np.inf, -np.inf]


@st.composite
def headers(draw: st.DrawFn) -> tuple[bytes, int]:
    """348 bytes, and how many of their fields hold something else than a small, sound volume's."""
    order, kind = draw(st.sampled_from("<>")), draw(st.sampled_from(sorted(KINDS)))
    header = nib.Nifti1Header(endianness=order)
    header.set_data_shape(SHAPE)
    header["datatype"], header["bitpix"] = kind, 8 * np.dtype(KINDS[kind]).itemsize
    header["vox_offset"], header["magic"] = 352, b"n+1"
    header.set_sform(LPS, code=draw(st.integers(0, 4)))
    header.set_qform(LPS, code=draw(st.integers(1, 4)))
    block = bytearray(header.binaryblock)
    spoiled = draw(st.lists(st.sampled_from(sorted(FIELDS)), max_size=4, unique=True))
    for name in spoiled:
        field, offset = FIELDS[name]
        element = np.dtype(field.base).newbyteorder(order)
        edges = EDGES.get(name, FLOATS if element.kind == "f" else [])
        values = st.binary(min_size=element.itemsize, max_size=element.itemsize)
        if edges:
            values |= st.sampled_from([np.array([edge]).astype(element).tobytes() for edge in edges])
        for start in range(offset, offset + field.itemsize, element.itemsize):
            if draw(st.booleans()):
                block[start : start + element.itemsize] = draw(values)
    return bytes(block), len(spoiled)


def voxel_bytes(block: bytes) -> bytes:
    """As many voxels after the header as it announces, where that is a sane number; seeded by the header."""
    order = "<" if struct.unpack("<i", block[:4])[0] == 348 else ">"
    rank, *extent = struct.unpack(f"{order}8h", block[40:56])
    (code,) = struct.unpack(f"{order}h", block[70:72])
    (offset,) = struct.unpack(f"{order}f", block[108:112])
    count = prod(extent[: max(0, min(rank, 7))])
    skipped = int(offset) - 348 if 352 <= offset <= 2000 else 4
    values = np.random.default_rng(list(block[:112])).integers(0, 99, count if 0 < count < MAX_VOXELS else 120)
    return bytes(skipped) + values.astype(order + KINDS.get(code, "i2")).tobytes()


def nibabel_sees(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Voxels as whole HU with axes (i, j, k), and the affine."""
    with nib.imageglobals.LoggingOutputSuppressor(), np.errstate(all="ignore"):
        image = nib.Nifti1Image.load(path)
        stored = np.asarray(image.dataobj.get_unscaled())
    scaling = image.dataobj.slope, image.dataobj.inter
    values = stored if scaling == (1, 0) else stored.astype(np.float64) * scaling[0] + scaling[1]
    return np.rint(values).reshape(values.shape[:3]), np.asarray(image.affine)


@given(headers(), st.booleans())
@settings(
    max_examples=BATCH,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.generate, Phase.shrink],
)
def read_and_compare(folder: Path, counts: dict[str, int], drawn: tuple[bytes, int], packed: bool) -> None:
    block, spoiled = drawn
    data = block + voxel_bytes(block)
    path = folder / ("x.nii.gz" if packed else "x.nii")
    path.write_bytes(gzip.compress(data, 1) if packed else data)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            volume = read_image(path)
    except BadInput as refused:
        counts[refused.code] = counts.get(refused.code, 0) + 1
        assert spoiled, refused
        assert re.fullmatch("[a-z0-9]+(-[a-z0-9]+)*", refused.code) and str(refused).startswith(str(path))
        return
    counts["read"] = counts.get("read", 0) + 1
    voxels, affine = nibabel_sees(path)
    np.testing.assert_array_equal(volume.voxels, voxels)
    np.testing.assert_array_equal(volume.grid.affine, affine)


@pytest.mark.parametrize("number", range(DRAWS // BATCH))
def test_any_header_is_read_as_nibabel_reads_it_or_refused(
    number: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    counts: dict[str, int] = {}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seed(number)(read_and_compare)(tmp_path, counts)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MAX_GROWTH_KB
    assert capfd.readouterr() == ("", "")
    assert len(counts) >= 10 and counts["read"] >= BATCH // 10, counts
