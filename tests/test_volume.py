"""The door for voxels: damaged files are refused with a code, good ones come through exactly, and geometry is kept."""

from __future__ import annotations

import gzip
import itertools
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import given, settings
from hypothesis import strategies as st
from nibabel.affines import from_matvec
from nifti_bytes import LPS, PACKED, PLAIN, SHAPE, VOXELS, image_bytes

from surm_seg.errors import BadInput
from surm_seg.volume import (
    Grid,
    Volume,
    digest,
    label_names,
    read_grid,
    read_image,
    read_labels,
    replacing,
    volumes_in,
    write_labels,
)

ORIENTATIONS = [
    "".join(axes) for order in itertools.permutations(["LR", "PA", "IS"]) for axes in itertools.product(*order)
]


def nibabel_affine(path: Path) -> np.ndarray:
    return np.asarray(nib.Nifti1Image.load(path).affine)


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    (tmp_path / "x.nii").write_bytes(PLAIN)
    (tmp_path / "link.nii").symlink_to("x.nii")
    (tmp_path / "folder.nii").mkdir()
    os.mkfifo(tmp_path / "pipe.nii")
    for name in ("link.nii", "folder.nii", "pipe.nii"):
        with pytest.raises(BadInput) as refused:
            read_image(tmp_path / name)
        assert refused.value.code == "not-a-file"
    with pytest.raises(BadInput) as refused:
        read_image(tmp_path / "absent.nii")
    assert refused.value.code == "unreadable"


def test_the_voxel_budget_is_the_callers(tmp_path: Path) -> None:
    (tmp_path / "x.nii").write_bytes(PLAIN)
    assert read_image(tmp_path / "x.nii", max_voxels=120).grid.shape == SHAPE
    with pytest.raises(BadInput) as refused:
        read_image(tmp_path / "x.nii", max_voxels=119)
    assert refused.value.code == "too-large"


@pytest.mark.parametrize("name", ["x.nii", "x.nii.gz"])
@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("kind", ["i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "f4", "f8"])
def test_every_stored_type_and_byte_order_reads_exactly(kind: str, order: str, name: str, tmp_path: Path) -> None:
    voxels = np.arange(120).reshape(SHAPE) - (60 if kind[0] != "u" else 0)
    header = nib.Nifti1Header(endianness=order)
    header.set_data_dtype(np.dtype(kind))
    data = nib.Nifti1Image(voxels.astype(kind), LPS, header, dtype=np.dtype(kind)).to_bytes()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    read = read_image(tmp_path / name)
    assert read.voxels.dtype == np.int16
    np.testing.assert_array_equal(read.voxels, voxels)
    labels = read_labels(tmp_path / name)
    assert labels.voxels.dtype.kind in "iu" and labels.voxels.dtype.isnative
    np.testing.assert_array_equal(labels.voxels, voxels)


def test_scaling_is_applied_and_fractional_hu_are_rounded(tmp_path: Path) -> None:
    (tmp_path / "x.nii").write_bytes(image_bytes(scl_slope=0.5, scl_inter=-10.2))
    np.testing.assert_array_equal(read_image(tmp_path / "x.nii").voxels, np.rint(VOXELS * 0.5 - np.float32(10.2)))
    (tmp_path / "y.nii").write_bytes(image_bytes(scl_slope=0, scl_inter=7))
    np.testing.assert_array_equal(read_image(tmp_path / "y.nii").voxels, VOXELS)


def test_a_single_voxel_and_a_trailing_singleton_dimension_are_3d(tmp_path: Path) -> None:
    (tmp_path / "one.nii").write_bytes(image_bytes(VOXELS[:1, :1, :1]))
    assert read_image(tmp_path / "one.nii").voxels.shape == (1, 1, 1)
    (tmp_path / "four.nii").write_bytes(image_bytes(dim=[4, 4, 5, 6, 1, 1, 1, 1]))
    np.testing.assert_array_equal(read_image(tmp_path / "four.nii").voxels, VOXELS)


def test_many_slabs_read_as_one_volume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("surm_seg.stream.SLAB_VOXELS", 50)
    monkeypatch.setattr("surm_seg.stream.CHUNK_BYTES", 7)
    (tmp_path / "x.nii.gz").write_bytes(PACKED)
    np.testing.assert_array_equal(read_image(tmp_path / "x.nii.gz").voxels, VOXELS)


def test_labels_must_be_whole_numbers(tmp_path: Path) -> None:
    (tmp_path / "whole.nii").write_bytes(image_bytes(np.full(SHAPE, 104.0)))
    assert (read_labels(tmp_path / "whole.nii").voxels == 104).all()
    (tmp_path / "half.nii").write_bytes(image_bytes(np.full(SHAPE, 1.5, np.float32)))
    with pytest.raises(BadInput) as refused:
        read_labels(tmp_path / "half.nii")
    assert refused.value.code == "labels-not-integer"


@given(
    orientation=st.sampled_from(ORIENTATIONS),
    shape=st.tuples(*[st.integers(1, 5)] * 3),
    spacing=st.tuples(*[st.floats(0.3, 5)] * 3),
    tilt=st.floats(-0.3, 0.3),
    origin=st.tuples(*[st.floats(-500, 500)] * 3),
)
@settings(max_examples=150, deadline=None)
def test_the_radiological_view_is_lps_and_restores_exactly(orientation, shape, spacing, tilt, origin) -> None:
    steps = nib.orientations.inv_ornt_aff(
        nib.orientations.ornt_transform(
            nib.orientations.axcodes2ornt(orientation), nib.orientations.axcodes2ornt("RAS")
        ),
        shape,
    )
    rotation = np.eye(4)
    rotation[:2, :2] = [[np.cos(tilt), -np.sin(tilt)], [np.sin(tilt), np.cos(tilt)]]
    affine = rotation @ np.linalg.inv(steps) @ np.diag([*spacing, 1.0])
    affine[:3, 3] = origin
    grid = Grid.from_affine(shape, affine)
    assert "".join(grid.axcodes) == orientation
    voxels = np.arange(np.prod(shape)).reshape(shape)
    volume = Volume(voxels, grid)
    to_lps = nib.orientations.ornt_transform(nib.io_orientation(grid.affine), nib.orientations.axcodes2ornt("LPS"))
    np.testing.assert_array_equal(volume.lps(), nib.orientations.apply_orientation(voxels, to_lps).transpose(2, 1, 0))
    assert volume.lps().base is not None and np.shares_memory(volume.lps(), voxels)
    assert grid.lps_shape == volume.lps().shape
    one_step = [np.linalg.norm(grid.affine[:3, axis]) for axis in np.argsort(to_lps[:, 0])[::-1]]
    np.testing.assert_allclose(grid.lps_spacing, one_step)
    np.testing.assert_array_equal(grid.restore(volume.lps()), voxels)
    assert Grid.from_json(json.loads(json.dumps(grid.to_json()))) == grid


def qform_only() -> bytes:
    """An oblique, flipped affine that only the quaternion states."""
    image = nib.Nifti1Image(VOXELS, None)
    angle = 0.2
    affine = np.array([[np.cos(angle), -np.sin(angle), 0, 3], [np.sin(angle), np.cos(angle), 0, -7], [0, 0, 1, 11]])
    affine = np.vstack([affine * [-0.71, 0.83, 2.5, 1], [0, 0, 0, 1]])
    image.set_qform(affine, code=1)
    image.set_sform(None, code=0)
    return image.to_bytes()


SOURCES = {
    "sform only": lambda: image_bytes(affine=from_matvec(np.diag([0.1, -1 / 3, 3.3]), [0.1, 0.2, 1 / 7])),
    "qform only": qform_only,
    "both, different codes": lambda: image_bytes(
        sform_code=4, qform_code=1, quatern_d=1, pixdim=[-1, 2, 3, 4] + [1] * 4
    ),
    "qfac 0": lambda: image_bytes(sform_code=0, qform_code=2, pixdim=[0, 2, 3, 4] + [1] * 4),
    "NaN in the unused quaternion": lambda: image_bytes(quatern_b=np.nan, qoffset_x=np.inf),
}


@pytest.mark.parametrize("source", SOURCES)
def test_labels_are_written_back_on_the_same_affine_bit_for_bit(source: str, tmp_path: Path) -> None:
    (tmp_path / "source.nii").write_bytes(SOURCES[source]())
    given_image = nib.Nifti1Image.load(tmp_path / "source.nii")
    grid = read_grid(tmp_path / "source.nii")
    assert grid.affine.tobytes() == nibabel_affine(tmp_path / "source.nii").tobytes()
    labels = (np.arange(120) % 9).reshape(SHAPE)
    write_labels(tmp_path / "out.nii.gz", labels, grid)
    written = nib.Nifti1Image.load(tmp_path / "out.nii.gz")
    assert nibabel_affine(tmp_path / "out.nii.gz").tobytes() == grid.affine.tobytes()
    for field in ("sform_code", "qform_code", "xyzt_units"):
        assert written.header[field] == given_image.header[field]
    assert written.get_data_dtype() == np.uint8
    np.testing.assert_array_equal(np.asarray(written.dataobj), labels)
    assert read_grid(tmp_path / "out.nii.gz") == grid


def test_writing_twice_gives_the_same_bytes_whatever_the_name(tmp_path: Path) -> None:
    grid = Grid.from_affine(SHAPE, LPS)
    for name in ("a.nii.gz", "b.nii.gz"):
        write_labels(tmp_path / name, VOXELS.clip(0), grid)
    assert (tmp_path / "a.nii.gz").read_bytes() == (tmp_path / "b.nii.gz").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.nii.gz", "b.nii.gz"]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("old")
    with pytest.raises(RuntimeError), replacing(tmp_path / "x") as file:
        file.write(b"new")
        raise RuntimeError
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("x", "old")]


def test_a_digest_tells_the_voxels_also_where_they_lie_in_another_file(tmp_path: Path) -> None:
    image = sitk.GetImageFromArray(np.zeros((3, 4, 5), np.int16))
    sitk.WriteImage(image, str(tmp_path / "x.mhd"))
    before = digest(tmp_path / "x.mhd")
    raw = tmp_path / "x.raw"
    raw.write_bytes(b"\1" + raw.read_bytes()[1:])
    assert digest(tmp_path / "x.mhd") != before


def test_a_folder_stands_for_its_files_and_for_the_series_below_it(tmp_path: Path) -> None:
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "deep" / "er" / "slice").write_bytes(bytes(128) + b"DICM")
    for name in ("b.nii", "a.NRRD", "._a.nii", "notes.txt"):
        (tmp_path / name).write_bytes(b"x")
    os.symlink(tmp_path / "deep", tmp_path / "link")
    assert volumes_in(tmp_path) == [tmp_path / "a.NRRD", tmp_path / "b.nii", tmp_path / "deep" / "er"]
    assert volumes_in(tmp_path / "deep" / "er") == [tmp_path / "deep" / "er"]


def test_grids_match_within_a_thousandth_of_a_millimetre_at_every_corner() -> None:
    grid = Grid.from_affine((101, 5, 6), LPS)
    near, far, turned = LPS.copy(), LPS.copy(), LPS.copy()
    near[0, 3] += 5e-4
    far[0, 3] += 2e-3
    turned[0, 0] += 2e-5  # 2 micrometres only at the hundredth voxel
    assert grid.matches(Grid.from_affine((101, 5, 6), near))
    assert not grid.matches(Grid.from_affine((101, 5, 6), far))
    assert not grid.matches(Grid.from_affine((101, 5, 6), turned))
    assert not grid.matches(Grid.from_affine((101, 5, 7), LPS))
    assert grid.matches(Grid.from_affine((101, 5, 6), far), tolerance_mm=0.01)


def with_extension(content: bytes) -> bytes:
    """PLAIN with one extension between header and voxels."""
    content += bytes(-(len(content) + 8) % 16)
    extension = struct.pack("<ii", len(content) + 8, 0) + content
    return image_bytes(vox_offset=352 + len(extension))[:348] + b"\1\0\0\0" + extension + PLAIN[352:]


TABLE = '<?xml version="1.0"?><CaretExtension><LabelTable>{}</LabelTable></CaretExtension>'


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (
            TABLE.format('<Label Key="1"><![CDATA[spleen]]></Label><Label Key="52">aorta</Label>'),
            {1: "spleen", 52: "aorta"},
        ),
        ("a comment of some scanner", None),
    ],
)
def test_class_names_come_from_the_label_table_extension(content: str, expected: object, tmp_path: Path) -> None:
    (tmp_path / "x.nii").write_bytes(with_extension(content.encode()))
    assert label_names(tmp_path / "x.nii") == expected
    np.testing.assert_array_equal(read_image(tmp_path / "x.nii").voxels, VOXELS)


@pytest.mark.parametrize(
    "content",
    [
        TABLE.format('<Label Key="one">spleen</Label>'),
        TABLE.format("<Label>spleen</Label>"),
        TABLE.format('<Label Key="1">spleen</Label><Label Key="1">liver</Label>'),
        TABLE.format("<Label"),
        '<!DOCTYPE x [<!ENTITY a "spleen">]><LabelTable><Label Key="1">&a;</Label></LabelTable>',
    ],
)
def test_a_broken_or_hostile_label_table_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "x.nii").write_bytes(with_extension(content.encode()))
    with pytest.raises(BadInput) as refused:
        label_names(tmp_path / "x.nii")
    assert refused.value.code == "label-table"


def test_a_file_without_extension_names_no_classes(tmp_path: Path, write_nifti: Callable[..., Path]) -> None:
    assert label_names(write_nifti(tmp_path / "x.nii.gz", VOXELS)) is None


def test_the_shipped_label_maps_say_what_they_hold(shared_data: Path) -> None:
    case = shared_data / "ct-case-a"
    names = label_names(case / "labels_total_v2_117class_slices_082_111.nii.gz")
    assert names is not None and len(names) == 117
    assert (names[1], names[5], names[7], names[52]) == ("spleen", "liver", "pancreas", "aorta")
    assert label_names(case / "labels_total_v1_104class.nii.gz") is None
    image, labels = read_image(case / "ct.nii.gz"), read_labels(case / "labels_total_v1_104class.nii.gz")
    assert image.grid.matches(labels.grid) and image.grid.axcodes == ("R", "A", "S")
    assert labels.voxels.max() == 104
