"""Reading takes at most half a volume more than the volume it returns, in every format."""

from __future__ import annotations

import gzip
import sys
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from nifti_bytes import image_bytes
from peak import peaks
from test_dicom import header, write

SHAPE = (512, 512, 128)  # 64 MiB as int16: much more than the slabs, which do not grow with the volume
MOST = 1.5

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory is measured through /proc")


def dicom(folder: Path, voxels: np.ndarray) -> Path:
    slices = []
    for k in range(voxels.shape[2]):
        slices.append(header(k % 2))
        slices[-1].ImagePositionPatient = [0, 0, k]
        slices[-1].Rows = slices[-1].Columns = 512
        slices[-1].PixelData = voxels[:, :, k].T.tobytes()
    return write(folder, slices)


def test_reading_takes_half_a_volume_more_than_it_returns(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(-1000, 1000, (512, 512, 4), dtype=np.int16)
    voxels = np.asfortranarray(np.tile(noise, (1, 1, SHAPE[2] // 4)))
    (tmp_path / "int16.nii.gz").write_bytes(gzip.compress(image_bytes(voxels), 1))
    (tmp_path / "scaled.nii").write_bytes(image_bytes(voxels, scl_slope=0.5, scl_inter=-0.25))
    (tmp_path / "float32.nii").write_bytes(image_bytes(voxels.astype(np.float32)))
    (tmp_path / "label.nii.gz").write_bytes(gzip.compress(image_bytes((voxels > 900).astype(np.uint8)), 1))
    (tmp_path / "label-float.nii").write_bytes(image_bytes((voxels > 900).astype(np.float32)))
    image = sitk.GetImageFromArray(voxels.transpose(2, 1, 0))
    sitk.WriteImage(image, str(tmp_path / "int16.mha"), useCompression=True, compressionLevel=1)
    sitk.WriteImage(sitk.Cast(image, sitk.sitkFloat32), str(tmp_path / "float32.nhdr"))
    dicom(tmp_path / "dicom", voxels)
    paths = sorted(path for path in tmp_path.iterdir() if path.suffix != ".raw")
    found = dict(zip([path.name for path in paths], peaks([paths[0], *paths])[1:], strict=True))
    assert len(found) == 8
    for name, peak in found.items():
        print(f"{name}: {peak.peak / peak.volume:.2f} times its {peak.volume / 1e6:.0f} MB")
        assert peak.verdict == "read" and peak.peak <= MOST * peak.volume, (name, peak)
