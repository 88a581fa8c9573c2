"""NRRD and MetaImage files: the same voxels at the same millimetres as ITK wrote, or a refusal."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from nifti_bytes import zeros_packed

from surm_seg.errors import BadInput
from surm_seg.volume import read_grid, read_image, read_labels, stem

SHAPE = (4, 5, 6)
VOXELS = np.arange(120, dtype=np.int16).reshape(SHAPE) - 60
NAMES = ["x.nrrd", "x.nhdr", "x.mha", "x.mhd"]
DIRECTION = [[np.cos(0.3), -np.sin(0.3), 0], [np.sin(0.3), np.cos(0.3), 0], [0, 0, -1]]


def write(path: Path, voxels: np.ndarray = VOXELS, *, packed: bool = False) -> sitk.Image:
    """An oblique, flipped image of voxels (i, j, k), written by ITK."""
    image = sitk.GetImageFromArray(np.ascontiguousarray(voxels.T))
    image.SetSpacing((0.75, 0.875, 2.5))
    image.SetOrigin((-10.5, 20.25, 30.125))
    image.SetDirection(np.ravel(DIRECTION).tolist())
    sitk.WriteImage(image, str(path), useCompression=packed)
    return image


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_voxels_come_back_at_the_same_millimetres(name: str, packed: bool, tmp_path: Path) -> None:
    image = write(tmp_path / name, packed=packed)
    volume = read_image(tmp_path / name)
    np.testing.assert_array_equal(volume.voxels, VOXELS)
    assert volume.voxels.dtype == np.int16 and volume.grid == read_grid(tmp_path / name)
    for corner in np.indices((2, 2, 2)).reshape(3, 8).T * (np.array(SHAPE) - 1):
        x, y, z = image.TransformIndexToPhysicalPoint(corner.tolist())
        np.testing.assert_allclose((volume.grid.affine @ [*corner, 1])[:3], (-x, -y, z), atol=1e-4)


@pytest.mark.parametrize("kind", ["i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "f4", "f8"])
@pytest.mark.parametrize("name", ["x.nrrd", "x.mha"])
def test_every_stored_type_reads_exactly(name: str, kind: str, tmp_path: Path) -> None:
    voxels = (np.arange(120).reshape(SHAPE) - (0 if kind[0] == "u" else 60)).astype(kind)
    write(tmp_path / name, voxels)
    np.testing.assert_array_equal(read_image(tmp_path / name).voxels, voxels)
    labels = read_labels(tmp_path / name).voxels
    assert labels.dtype == (kind if kind in ("i1", "u1", "i2", "u2") else np.int32)
    np.testing.assert_array_equal(labels, voxels)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", ["x.nrrd", "x.mha"])
def test_a_file_of_another_length_is_refused(name: str, packed: bool, tmp_path: Path) -> None:
    write(tmp_path / name, packed=packed)
    whole = (tmp_path / name).read_bytes()
    for length in [*range(0, len(whole), 3), len(whole) - 1]:
        (tmp_path / name).write_bytes(whole[:length])
        with pytest.raises(BadInput, match=name) as refused:
            read_image(tmp_path / name)
    assert refused.value.code == "truncated"
    (tmp_path / name).write_bytes(whole + b"\0")
    with pytest.raises(BadInput) as refused:
        read_image(tmp_path / name)
    assert refused.value.code == "trailing-data"


@pytest.mark.parametrize("name", ["x.nrrd", "x.mha"])
def test_a_flipped_byte_in_packed_voxels_never_yields_others(name: str, tmp_path: Path) -> None:
    write(tmp_path / name, packed=True)
    whole = (tmp_path / name).read_bytes()
    for position in range(len(whole) - 80, len(whole)):
        (tmp_path / name).write_bytes(whole[:position] + bytes([whole[position] ^ 0xFF]) + whole[position + 1 :])
        with pytest.raises(BadInput):
            read_image(tmp_path / name)


def seen(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """ITK's voxels with axes (i, j, k), and its affine in RAS+ mm; raises RuntimeError where it refuses."""
    image = sitk.ReadImage(str(path))
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
    affine[:3, 3] = image.GetOrigin()
    return sitk.GetArrayFromImage(image).transpose(2, 1, 0), np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine


@pytest.mark.parametrize("mask", [0x04, 0x11])
@pytest.mark.parametrize("name", ["x.nrrd", "x.mha"])
def test_any_changed_byte_of_a_header_is_read_as_itk_reads_it_or_refused(name: str, mask: int, tmp_path: Path) -> None:
    path = tmp_path / name
    write(path)
    before = seen(path)
    whole = path.read_bytes()
    for position in range(len(whole) - VOXELS.nbytes):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ mask]) + whole[position + 1 :])
        try:
            volume = read_image(path)
        except BadInput:
            continue
        try:
            voxels, affine = seen(path)
        except RuntimeError:  # over a field that says nothing about voxels
            voxels, affine = before
        np.testing.assert_array_equal(volume.voxels, voxels)
        np.testing.assert_allclose(volume.grid.affine, affine, rtol=1e-6)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", ["x.nrrd", "x.mha"])
def test_a_small_file_that_unpacks_to_gigabytes_is_refused(name: str, packed: bool, tmp_path: Path) -> None:
    write(tmp_path / name, packed=True)
    head = (tmp_path / name).read_bytes().split(b"\n\n" if name == "x.nrrd" else b"LOCAL\n")[0]
    head += b"\n\n" if name == "x.nrrd" else b"LOCAL\n"
    bomb = zeros_packed(b"", 1024)
    (tmp_path / name).write_bytes(head + (bomb if packed else bomb[:20]))
    with pytest.raises(BadInput) as refused:
        read_image(tmp_path / name)
    assert refused.value.code == ("trailing-data" if packed else "truncated")


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("x.mha", b"BinaryDataByteOrderMSB = False", b"BinaryDataByteOrderMSB = True"),
        ("x.nrrd", b"endian: little", b"endian: big"),
        ("x.nrrd", b"left-posterior-superior", b"right-anterior-superior"),
        ("x.nrrd", b"left-posterior-superior", b"LAS"),
        ("x.nrrd", b"kinds:", b"# a comment\nsegment:=Name, patient\nkinds:"),
        ("x.mha", b"Offset", b"Position"),
    ],
)
def test_what_a_header_may_also_say_is_read_as_itk_reads_it(name: str, old: bytes, new: bytes, tmp_path: Path) -> None:
    write(tmp_path / name)
    whole = (tmp_path / name).read_bytes()
    assert old in whole
    (tmp_path / name).write_bytes(whole.replace(old, new, 1))
    volume, (voxels, affine) = read_image(tmp_path / name), seen(tmp_path / name)
    np.testing.assert_array_equal(volume.voxels, voxels)
    np.testing.assert_allclose(volume.grid.affine, affine, rtol=1e-6)


CHANGED = {
    "4D": ("x.mha", b"NDims = 3", b"NDims = 4", "bad-dimensions"),
    "4D NRRD": ("x.nrrd", b"dimension: 3\n", b"dimension: 4\n", "bad-dimensions"),
    "bomb": ("x.mha", b"DimSize = 4 5 6", b"DimSize = 40000 50000 60000", "too-large"),
    "bomb NRRD": ("x.nrrd", b"sizes: 4 5 6", b"sizes: 40000 50000 60000", "too-large"),
    "zero": ("x.mha", b"DimSize = 4 5 6", b"DimSize = 4 0 6", "bad-dimensions"),
    "negative": ("x.nrrd", b"sizes: 4 5 6", b"sizes: 4 -5 6", "bad-dimensions"),
    "origin NaN": ("x.mha", b"Offset = -10.5", b"Offset = nan", "bad-affine"),
    "origin infinite": ("x.nrrd", b"(-10.5,", b"(inf,", "bad-affine"),
    "spacing zero": ("x.mha", b"ElementSpacing = 0.75", b"ElementSpacing = 0", "bad-spacing"),
    "kilometre voxels": ("x.mha", b"ElementSpacing = 0.75", b"ElementSpacing = 1e6", "bad-spacing"),
    "no origin": ("x.mha", b"Offset =", b"Comment =", "no-orientation"),
    "no space": ("x.nrrd", b"space: left-posterior-superior\n", b"", "no-orientation"),
    "unknown space": ("x.nrrd", b"left-posterior-superior", b"scanner-xyz", "no-orientation"),
    "text voxels": ("x.mha", b"BinaryData = True", b"BinaryData = False", "datatype"),
    "hex voxels": ("x.nrrd", b"encoding: raw", b"encoding: hex", "datatype"),
    "unknown type": ("x.mha", b"MET_SHORT", b"MET_OTHER", "datatype"),
    "twice": ("x.mha", b"NDims = 3\n", b"NDims = 3\nNDims = 3\n", "not-metaimage"),
    "twice in NRRD": ("x.nrrd", b"sizes: 4 5 6\n", b"sizes: 4 5 6\nsizes: 4 5 6\n", "not-nrrd"),
    "skipped bytes": ("x.nrrd", b"encoding: raw\n", b"encoding: raw\nbyte skip: 2\n", "bad-offset"),
    "skipped header": ("x.mha", b"NDims = 3\n", b"NDims = 3\nHeaderSize = 2\n", "datatype"),
    "no magic": ("x.nrrd", b"NRRD", b"XXXX", "not-nrrd"),
    "three numbers of dimensions": ("x.mha", b"DimSize = 4 5 6", b"DimSize = 4 5", "bad-dimensions"),
    "fewer voxels than announced": ("x.nrrd", b"sizes: 4 5 6", b"sizes: 4 5 7", "truncated"),
    "more voxels than announced": ("x.mha", b"DimSize = 4 5 6", b"DimSize = 4 5 5", "trailing-data"),
    "800 MB announced": ("x.mha", b"DimSize = 4 5 6", b"DimSize = 512 512 1500", "truncated"),
    "a huge slice": ("x.nrrd", b"sizes: 4 5 6", b"sizes: 30000 10000 1", "too-large"),
    "wider type": ("x.nrrd", b"type: short", b"type: int", "truncated"),
    "narrower type": ("x.mha", b"MET_SHORT", b"MET_UCHAR", "trailing-data"),
    "two channels": ("x.mha", b"NDims = 3\n", b"NDims = 3\nElementNumberOfChannels = 2\n", "datatype"),
    "packed, it says": ("x.mha", b"CompressedData = False", b"CompressedData = True", "damaged-gzip"),
    "packed, NRRD says": ("x.nrrd", b"encoding: raw", b"encoding: gzip", "damaged-gzip"),
    "perhaps packed": ("x.mha", b"CompressedData = False", b"CompressedData = Maybe", "datatype"),
    "two byte orders": ("x.mha", b"NDims = 3\n", b"NDims = 3\nElementByteOrderMSB = True\n", "datatype"),
    "no byte order": ("x.nrrd", b"endian: little\n", b"", "datatype"),
    "scaled": ("x.mha", b"NDims = 3\n", b"NDims = 3\nElementToIntensityFunctionSlope = 2\n", "bad-scaling"),
    "scaled NRRD": ("x.nrrd", b"encoding: raw\n", b"encoding: raw\noldmin: 0\nold max: 9\n", "bad-scaling"),
    "centimetres": ("x.mha", b"NDims = 3\n", b"NDims = 3\nDistanceUnits = cm\n", "units"),
    "metres": ("x.nrrd", b"encoding: raw\n", b'encoding: raw\nspace units: "m" "m" "m"\n', "units"),
    "spacing negative": ("x.mha", b"ElementSpacing = 0.75", b"ElementSpacing = -0.75", "bad-spacing"),
    "spacing twice": ("x.nrrd", b"encoding: raw\n", b"encoding: raw\nspacings: 1 1 1\n", "bad-affine"),
    "long directions": ("x.mha", b"Matrix = 0.9553", b"Matrix = 1.9553", "bad-affine"),
    "shear": ("x.mha", b"Matrix = 0.95533648912560598 0.29552020666133955", b"Matrix = 1 0", "shear"),
    "shear NRRD": (
        "x.nrrd",
        b"directions: (0.71650236684420454,0.22164015499600465,",
        b"directions: (0.75,0,",
        "shear",
    ),
    "singular": ("x.nrrd", b"(0,0,-2.5)", b"(0,0,0)", "bad-spacing"),
    "four numbers of origin": ("x.nrrd", b"(-10.5,", b"(-10.5,1,", "bad-affine"),
    "comma for a sign": ("x.mha", b"0 0 -1", b"0 0 ,1", "bad-affine"),
    "bracket for a sign": ("x.nrrd", b"(0,0,-2.5)", b"(0,0,)2.5)", "bad-affine"),
    "NaN": ("x.mha", VOXELS.T.astype("<f4").tobytes()[:4], b"\0\0\xc0\x7f", "non-finite-voxels"),
}


@pytest.mark.parametrize("fault", CHANGED)
def test_a_doubtful_header_is_refused(fault: str, tmp_path: Path) -> None:
    name, old, new, code = CHANGED[fault]
    write(tmp_path / name, VOXELS.astype(np.float32) if fault == "NaN" else VOXELS)
    whole = (tmp_path / name).read_bytes()
    assert old in whole
    (tmp_path / name).write_bytes(whole.replace(old, new, 1))
    with pytest.raises(BadInput, match=name) as refused:
        read_image(tmp_path / name)
    assert refused.value.code == code


@pytest.mark.parametrize("name", ["../x.raw", "..", "/tmp/x.raw", "below/../x.raw", "x%d.raw 1 6 1", "LIST", ".hidden"])
@pytest.mark.parametrize("header", ["x.mhd", "x.nhdr"])
def test_voxels_lie_in_one_file_beside_their_header(header: str, name: str, tmp_path: Path) -> None:
    write(tmp_path / header)
    whole = (tmp_path / header).read_text()
    stored = "x.raw"
    assert stored in whole
    (tmp_path / header).write_text(whole.replace(stored, name))
    with pytest.raises(BadInput) as refused:
        read_image(tmp_path / header)
    assert refused.value.code == "data-file"


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    write(tmp_path / "x.mhd")
    (tmp_path / "link.mhd").symlink_to("x.mhd")
    (tmp_path / "folder.mha").mkdir()
    os.mkfifo(tmp_path / "pipe.nrrd")
    (tmp_path / "x.raw").rename(tmp_path / "y.raw")
    (tmp_path / "x.raw").symlink_to("y.raw")
    for name, code in {
        "link.mhd": "not-a-file",
        "folder.mha": "not-a-file",
        "pipe.nrrd": "not-a-file",
        "x.mhd": "not-a-file",
        "absent.mha": "unreadable",
    }.items():
        with pytest.raises(BadInput) as refused:
            read_image(tmp_path / name)
        assert refused.value.code == code, name


def test_two_dimensions_and_colour_are_refused(tmp_path: Path) -> None:
    sitk.WriteImage(sitk.Image([4, 5], sitk.sitkInt16), str(tmp_path / "flat.nrrd"))
    sitk.WriteImage(sitk.Image([4, 5, 6], sitk.sitkVectorUInt8, 3), str(tmp_path / "colour.nrrd"))
    sitk.WriteImage(sitk.Image([4, 5, 6], sitk.sitkVectorUInt8, 3), str(tmp_path / "colour.mha"))
    for name, code in {"flat.nrrd": "not-3d", "colour.nrrd": "not-3d", "colour.mha": "datatype"}.items():
        with pytest.raises(BadInput) as refused:
            read_image(tmp_path / name)
        assert refused.value.code == code, name


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz", "a.nrrd", "a.nhdr", "a.mha", "a.MHD"])
def test_the_stem_of_a_volume_has_no_ending(name: str) -> None:
    assert stem(Path(name)) == "a"
