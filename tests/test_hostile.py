"""Damaged, hostile and unusual NIfTI files: each gets its verdict, and never a wrong voxel."""

from __future__ import annotations

import gzip
import struct
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from nifti_bytes import LPS, NOISE, PACKED, PLAIN, SHAPE, VOXELS, flipped, image_bytes, zeros_packed
from peak import peaks

from surm_seg.errors import BadInput
from surm_seg.volume import read_grid, read_image, read_labels

pytestmark = pytest.mark.filterwarnings("error")

MAX_PEAK = 100e6  # bytes, of which the interpreter has none

Truth = tuple[np.ndarray, np.ndarray]  # voxels (i, j, k), affine 4 x 4 in RAS+ mm


def big_endian() -> bytes:
    return nib.Nifti1Image(VOXELS.astype(">i2"), LPS, nib.Nifti1Header(endianness=">")).to_bytes()


def sheared(millimetres: float = 0.01) -> np.ndarray:
    affine = LPS.copy()
    affine[1, 2] = millimetres
    return affine


OBLIQUE = np.array([[0.48, -0.8, 0.72, 1], [0.64, 0.6, 0.96, -2], [-0.6, 0, 1.6, 3], [0, 0, 0, 1]])
ONE_VOXEL = (VOXELS == 7).astype(np.uint8) * 5
LONG = np.arange(1000, dtype=np.int16).reshape(1, 1, 1000)
PLAIN_FLOAT = image_bytes(VOXELS.astype(np.float32))
LATE = image_bytes(vox_offset=1000)[:352] + bytes(648) + PLAIN[352:]
ANNOUNCING = image_bytes(dim=[3, 512, 512, 1500, 1, 1, 1, 1])
BY_QUATERNION = image_bytes(sform_code=0, qform_code=1, quatern_d=1, pixdim=[1, 2, 3, 4] + [1] * 4)
LEFT_HANDED = image_bytes(sform_code=0, qform_code=1, quatern_d=1, pixdim=[-1, 2, 3, 4] + [1] * 4)

# What is in the file -> its name, its bytes, and the code it is refused with or what must be read.
FILES: dict[str, tuple[str, bytes, str | Truth]] = {
    "empty": ("x.nii", b"", "empty-file"),
    "header cut": ("x.nii", PLAIN[:200], "truncated"),
    "header only": ("x.nii", PLAIN[:352], "truncated"),
    "voxels cut": ("x.nii", PLAIN[:-1], "truncated"),
    "trailing bytes": ("x.nii", PLAIN + b"\0", "trailing-data"),
    "gzip header only": ("x.nii.gz", gzip.compress(PLAIN[:352]), "truncated"),
    "gzip cut": ("x.nii.gz", NOISE[: len(NOISE) // 2], "truncated"),
    "gzip without its checksum": ("x.nii.gz", NOISE[:-8], "truncated"),
    "gzip with a wrong checksum": ("x.nii.gz", flipped(PACKED, len(PACKED) - 8), "damaged-gzip"),
    "gzip with a wrong length": ("x.nii.gz", flipped(PACKED, len(PACKED) - 1), "damaged-gzip"),
    "gzip longer than its voxels": ("x.nii.gz", gzip.compress(PLAIN + b"\0"), "trailing-data"),
    "bytes after the gzip": ("x.nii.gz", PACKED + b"junk", "trailing-data"),
    "zeros after the gzip": ("x.nii.gz", PACKED + bytes(8), "trailing-data"),
    "plain named .gz": ("x.nii.gz", PLAIN, "damaged-gzip"),
    "gzip named .nii": ("x.nii", gzip.compress(PLAIN, 0), "not-nifti"),
    "text": ("x.nii", b"not an image " * 50, "not-nifti"),
    "another name": ("x.img", PLAIN, "not-nifti"),
    "NIfTI-2": ("x.nii", nib.Nifti2Image(VOXELS, LPS).to_bytes(), "not-nifti"),
    "pair": ("x.nii", image_bytes(magic=b"ni1"), "bad-magic"),
    "no magic": ("x.nii", image_bytes(magic=b"abc"), "bad-magic"),
    "negative dimension": ("x.nii", image_bytes(dim=[3, -4, 5, 6, 1, 1, 1, 1]), "bad-dimensions"),
    "zero dimension": ("x.nii", image_bytes(dim=[3, 4, 0, 6, 1, 1, 1, 1]), "bad-dimensions"),
    "no dimensions": ("x.nii", image_bytes(dim=[0, 4, 5, 6, 1, 1, 1, 1]), "bad-dimensions"),
    "2D": ("x.nii", image_bytes(dim=[2, 20, 6, 1, 1, 1, 1, 1]), "not-3d"),
    "4D": ("x.nii", image_bytes(dim=[4, 4, 5, 3, 2, 1, 1, 1]), "not-3d"),
    "bomb": ("x.nii.gz", gzip.compress(image_bytes(dim=[3, 32767, 32767, 32767, 1, 1, 1, 1])), "too-large"),
    "RGB": ("x.nii", image_bytes(datatype=128, bitpix=24), "datatype"),
    "complex": ("x.nii", image_bytes(datatype=32, bitpix=64), "datatype"),
    "unknown datatype": ("x.nii", image_bytes(datatype=5), "datatype"),
    "datatype against bitpix": ("x.nii", image_bytes(datatype=16, bitpix=16), "datatype"),
    "offset in the header": ("x.nii", image_bytes(vox_offset=0), "bad-offset"),
    "offset NaN": ("x.nii", image_bytes(vox_offset=np.nan), "bad-offset"),
    "offset too far": ("x.nii", image_bytes(vox_offset=1e12), "bad-offset"),
    "offset fraction": ("x.nii", image_bytes(vox_offset=352.5), "bad-offset"),
    "affine NaN": ("x.nii", image_bytes(srow_x=[np.nan, 0, 0, 0]), "bad-affine"),
    "affine infinite": ("x.nii", image_bytes(srow_x=[-1, 0, 0, np.inf]), "bad-affine"),
    "affine singular": ("x.nii", image_bytes(srow_x=[0, 0, 0, 0]), "bad-spacing"),
    "affine with equal columns": ("x.nii", image_bytes(srow_x=[1, 1, 0, 0], srow_y=[0, 0, 0, 0]), "shear"),
    "quaternion too long": ("x.nii", image_bytes(sform_code=0, qform_code=1, quatern_b=2), "bad-affine"),
    "kilometre voxels": ("x.nii", image_bytes(srow_z=[0, 0, 1e6, 0]), "bad-spacing"),
    "shear": ("x.nii", image_bytes(affine=sheared()), "shear"),
    "metres": ("x.nii", image_bytes(xyzt_units=1), "units"),
    "no orientation": ("x.nii", image_bytes(sform_code=0, qform_code=0), "no-orientation"),
    "slope infinite": ("x.nii", image_bytes(scl_slope=np.inf, scl_inter=0), "bad-scaling"),
    "slope leaves float32": ("x.nii", image_bytes(scl_slope=3e38, scl_inter=0), "bad-scaling"),
    "intercept NaN": ("x.nii", image_bytes(scl_slope=1, scl_inter=np.nan), "bad-scaling"),
    "voxel NaN": ("x.nii", image_bytes(np.full(SHAPE, np.nan, np.float32)), "non-finite-voxels"),
    "voxel infinite": ("x.nii.gz", gzip.compress(image_bytes(np.full(SHAPE, -np.inf))), "non-finite-voxels"),
    "HU outside int16": ("x.nii", image_bytes(np.full(SHAPE, 40000, np.int32)), "value-range"),
    "HU scaled outside int16": ("x.nii", image_bytes(scl_slope=1000, scl_inter=0), "value-range"),
    "gzip of a gzip": ("x.nii.gz", gzip.compress(gzip.compress(PLAIN, 0)), "not-nifti"),
    "two gzip members": ("x.nii.gz", PACKED + PACKED, "trailing-data"),
    "gzip with unknown flags": ("x.nii.gz", flipped(PACKED, 3, 0xE0), "damaged-gzip"),
    "gzip of ten bytes": ("x.nii.gz", PACKED[:10], "truncated"),
    "gzip of nothing": ("x.nii.gz", gzip.compress(b""), "truncated"),
    "2 MB that unpack to 2 GiB": ("x.nii.gz", zeros_packed(PLAIN, 2048), "trailing-data"),
    "2 GiB where the header should be": ("x.nii.gz", zeros_packed(b"", 2048), "not-nifti"),
    "786 MB announced, 592 bytes there": ("x.nii", ANNOUNCING, "truncated"),
    "786 MB announced, gzip": (
        "x.nii.gz",
        gzip.compress(image_bytes(dim=[3, 512, 512, 1500, 1, 1, 1, 1])),
        "truncated",
    ),
    "a slice of 300 million voxels": ("x.nii", image_bytes(dim=[3, 30000, 10000, 1, 1, 1, 1, 1]), "too-large"),
    "nothing but zeros": ("x.nii", bytes(1000), "not-nifti"),
    "Analyze 7.5": ("x.nii", image_bytes(magic=b""), "bad-magic"),
    "size field of the other byte order": ("x.nii", PLAIN[3::-1] + PLAIN[4:], "bad-dimensions"),
    "eight dimensions": ("x.nii", image_bytes(dim=[8, 4, 5, 6, 1, 1, 1, 1]), "bad-dimensions"),
    "negative number of dimensions": ("x.nii", image_bytes(dim=[-3, 4, 5, 6, 1, 1, 1, 1]), "bad-dimensions"),
    "zero fourth dimension": ("x.nii", image_bytes(dim=[4, 4, 5, 6, 0, 1, 1, 1]), "bad-dimensions"),
    "7D": ("x.nii", image_bytes(dim=[7, 4, 5, 3, 1, 1, 1, 2]), "not-3d"),
    "RGBA": ("x.nii", image_bytes(datatype=2304, bitpix=32), "datatype"),
    "complex of 16 bytes": ("x.nii", image_bytes(datatype=1792, bitpix=128), "datatype"),
    "float of 16 bytes": ("x.nii", image_bytes(datatype=1536, bitpix=128), "datatype"),
    "single bits": ("x.nii", image_bytes(datatype=1, bitpix=1), "datatype"),
    "no bitpix": ("x.nii", image_bytes(bitpix=0), "datatype"),
    "wider datatype than the voxels": ("x.nii", image_bytes(datatype=8, bitpix=32), "truncated"),
    "narrower datatype than the voxels": ("x.nii", image_bytes(datatype=2, bitpix=8), "trailing-data"),
    "offset negative": ("x.nii", image_bytes(vox_offset=-352), "bad-offset"),
    "offset infinite": ("x.nii", image_bytes(vox_offset=np.inf), "bad-offset"),
    "offset beyond the file": ("x.nii", image_bytes(vox_offset=2**23), "truncated"),
    "offset late": ("x.nii", image_bytes(vox_offset=368), "truncated"),
    "one column zero": ("x.nii", image_bytes(srow_z=[0, 0, 0, 0]), "bad-spacing"),
    "micrometre voxels": ("x.nii", image_bytes(affine=np.diag([1e-3, 1e-3, 1e-3, 1])), "bad-spacing"),
    "qform offset NaN": ("x.nii", image_bytes(sform_code=0, qform_code=1, qoffset_x=np.nan), "bad-affine"),
    "quaternion NaN": ("x.nii", image_bytes(sform_code=0, qform_code=1, quatern_c=np.nan), "bad-affine"),
    "qform voxels infinite": (
        "x.nii",
        image_bytes(sform_code=0, qform_code=1, pixdim=[1, 1, 1, np.inf, 1, 1, 1, 1]),
        "bad-affine",
    ),
    "microns": ("x.nii", image_bytes(xyzt_units=3), "units"),
    "slope minus infinity": ("x.nii", image_bytes(scl_slope=-np.inf, scl_inter=0), "bad-scaling"),
    "intercept infinite": ("x.nii", image_bytes(scl_slope=1, scl_inter=np.inf), "bad-scaling"),
    "last voxel NaN": ("x.nii", PLAIN_FLOAT[:-4] + struct.pack("<f", np.nan), "non-finite-voxels"),
    "HU beyond any integer": ("x.nii", image_bytes(np.full(SHAPE, 1e300)), "value-range"),
    "HU of unsigned 64 bit": ("x.nii", image_bytes(np.full(SHAPE, 2**64 - 1, np.uint64)), "value-range"),
    # What is unusual and right.
    "plain": ("x.nii", PLAIN, (VOXELS, LPS)),
    "gzip": ("x.nii.gz", PACKED, (VOXELS, LPS)),
    "capital letters": ("X.NII.GZ", PACKED, (VOXELS, LPS)),
    "gzip, fastest": ("x.nii.gz", gzip.compress(PLAIN, 1), (VOXELS, LPS)),
    "gzip, stored": ("x.nii.gz", gzip.compress(PLAIN, 0), (VOXELS, LPS)),
    "big-endian": ("x.nii", big_endian(), (VOXELS, LPS)),
    "big-endian gzip": ("x.nii.gz", gzip.compress(big_endian()), (VOXELS, LPS)),
    "oblique": ("x.nii", image_bytes(affine=OBLIQUE), (VOXELS, OBLIQUE)),
    "flipped axes": ("x.nii", image_bytes(affine=np.diag([0.7, 0.8, -2.5, 1])), (VOXELS, np.diag([0.7, 0.8, -2.5, 1]))),
    "axes in another order": ("x.nii", image_bytes(affine=LPS[[2, 0, 1, 3]]), (VOXELS, LPS[[2, 0, 1, 3]])),
    "0.3 mm": ("x.nii", image_bytes(affine=np.diag([0.3, 0.3, 0.3, 1])), (VOXELS, np.diag([0.3, 0.3, 0.3, 1]))),
    "5 mm": ("x.nii", image_bytes(affine=np.diag([-5.0, -5, 5, 1])), (VOXELS, np.diag([-5.0, -5, 5, 1]))),
    "shear below a thousandth": ("x.nii", image_bytes(affine=sheared(1e-3)), (VOXELS, sheared(1e-3))),
    "int8": ("x.nii", image_bytes(VOXELS.astype(np.int8)), (VOXELS, LPS)),
    "uint16": ("x.nii", image_bytes(np.abs(VOXELS).astype(np.uint16)), (np.abs(VOXELS), LPS)),
    "int64": ("x.nii", image_bytes(VOXELS.astype(np.int64)), (VOXELS, LPS)),
    "float32": ("x.nii", PLAIN_FLOAT, (VOXELS, LPS)),
    "float64": ("x.nii.gz", gzip.compress(image_bytes(VOXELS.astype(np.float64))), (VOXELS, LPS)),
    "scaled": ("x.nii", image_bytes(scl_slope=2, scl_inter=-1024), (VOXELS * 2 - 1024, LPS)),
    "slope 0 means unscaled": ("x.nii", image_bytes(scl_slope=0, scl_inter=9), (VOXELS, LPS)),
    "slope NaN means unscaled": ("x.nii", image_bytes(scl_slope=np.nan, scl_inter=np.nan), (VOXELS, LPS)),
    "an organ of one voxel": ("x.nii.gz", gzip.compress(image_bytes(ONE_VOXEL)), (ONE_VOXEL, LPS)),
    "one voxel in all": ("x.nii", image_bytes(VOXELS[:1, :1, :1]), (VOXELS[:1, :1, :1], LPS)),
    "a thousand slices of one voxel": ("x.nii", image_bytes(LONG), (LONG, LPS)),
    "4D with one volume": ("x.nii", image_bytes(dim=[4, 4, 5, 6, 1, 1, 1, 1]), (VOXELS, LPS)),
    "millimetres and seconds": ("x.nii", image_bytes(xyzt_units=10), (VOXELS, LPS)),
    "bytes before the voxels": ("x.nii", LATE, (VOXELS, LPS)),
    "by quaternion": ("x.nii", BY_QUATERNION, (VOXELS, np.diag([-2.0, -3, 4, 1]))),
    "left-handed by quaternion": ("x.nii", LEFT_HANDED, (VOXELS, np.diag([-2.0, -3, -4, 1]))),
    "NaN where no code says to look": ("x.nii", image_bytes(quatern_b=np.nan, qoffset_x=np.inf), (VOXELS, LPS)),
    "a name in every text": (
        "x.nii",
        image_bytes(descrip=b"d" * 80, aux_file=b"\xff" * 24, db_name=b"n"),
        (VOXELS, LPS),
    ),
}


@pytest.mark.parametrize("case", FILES)
def test_every_file_gets_its_verdict(case: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    name, data, verdict = FILES[case]
    path = tmp_path / name
    path.write_bytes(data)
    if isinstance(verdict, str):
        with pytest.raises(BadInput, match=name) as refused:
            read_image(path)
        assert refused.value.code == verdict
    else:
        assert_read(path, verdict)
    assert capfd.readouterr() == ("", "")


def assert_read(path: Path, truth: Truth) -> None:
    for volume in (read_image(path), read_labels(path)):
        np.testing.assert_array_equal(volume.voxels, truth[0])
        np.testing.assert_allclose(volume.grid.affine, truth[1], rtol=0, atol=1e-6)
        assert volume.grid == read_grid(path)


def test_there_are_more_verdicts_than_promised() -> None:
    verdicts = [verdict for _, _, verdict in FILES.values()]
    assert sum(isinstance(verdict, str) for verdict in verdicts) >= 52
    assert sum(not isinstance(verdict, str) for verdict in verdicts) >= 25


@pytest.mark.parametrize("mask", [0x01, 0x10, 0x80, 0xFF])
def test_a_changed_byte_anywhere_in_a_gzip_never_yields_other_voxels(mask: int, tmp_path: Path) -> None:
    path = tmp_path / "x.nii.gz"
    path.write_bytes(NOISE)
    truth = read_image(path)
    for position in range(len(NOISE)):
        path.write_bytes(flipped(NOISE, position, mask))
        try:
            volume = read_image(path)
        except BadInput:
            continue
        # The time in the gzip header, or the length of a code that no byte uses: nothing that a voxel depends on.
        np.testing.assert_array_equal(volume.voxels, truth.voxels)
        assert volume.grid == truth.grid


@pytest.mark.parametrize(("name", "data"), [("x.nii", PLAIN), ("x.nii.gz", NOISE)])
def test_a_file_cut_anywhere_is_refused(name: str, data: bytes, tmp_path: Path) -> None:
    for length in range(len(data)):
        (tmp_path / name).write_bytes(data[:length])
        with pytest.raises(BadInput) as refused:
            read_image(tmp_path / name)
        assert refused.value.code == ("truncated" if length else "empty-file")


@pytest.mark.skipif(sys.platform != "linux", reason="memory is measured through /proc")
def test_no_file_takes_more_memory_than_its_bytes_deserve(tmp_path: Path) -> None:
    paths = []
    for number, (name, data, _) in enumerate(FILES.values()):
        paths.append(tmp_path / f"{number}{name}")
        paths[-1].write_bytes(data)
    found = peaks([paths[0], *paths])[1:]
    assert [peak.verdict for peak in found] == [v if isinstance(v, str) else "read" for _, _, v in FILES.values()]
    print(f"at most {max(peak.peak for peak in found) / 1e6:.0f} MB")
    assert max(peak.peak for peak in found) < MAX_PEAK
