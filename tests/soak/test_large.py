"""Whole-body CT and hostile files of full size; `make soak` sets SURM_SOAK. Needs 4 GB of memory and 2 GB of disk."""

from __future__ import annotations

import gzip
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from nifti_bytes import LPS, image_bytes, zeros_packed
from peak import peaks

pytestmark = pytest.mark.skipif("SURM_SOAK" not in os.environ, reason="takes minutes: make soak")

MOST_HOSTILE = 2.5e9
MOST_PREPARING = 4e9

# The highest memory use of the child alone: a parent's would count as well if it ran in this process.
MEASURED = """
import resource, subprocess, sys
code = subprocess.call([sys.executable, "-m", "surm_seg.prepare", *sys.argv[1:]])
print(code, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)
"""


def header(*shape: int, kind: int, bits: int) -> bytes:
    return image_bytes(dim=[3, *shape, 1, 1, 1, 1], datatype=kind, bitpix=bits)[:352]


def test_announced_sizes_never_exceed_the_promise(tmp_path: Path) -> None:
    files = {
        "largest float64, all there.nii.gz": (
            zeros_packed(header(512, 512, 1500, kind=64, bits=64), 3000, checked=True),
            "read",
        ),
        "largest slices, all there.nii.gz": (
            zeros_packed(header(4096, 4096, 23, kind=64, bits=64), 2944, checked=True),
            "read",
        ),
        "one slice too large.nii.gz": (zeros_packed(header(16384, 16384, 1, kind=2, bits=8), 256), "too-large"),
        "announced, one byte there.nii.gz": (
            zeros_packed(header(512, 512, 1500, kind=64, bits=64), 1, checked=True),
            "truncated",
        ),
        "8 GiB in 8 MB.nii.gz": (zeros_packed(header(512, 512, 2, kind=4, bits=16), 8192), "trailing-data"),
        "label, largest.nii.gz": (zeros_packed(header(512, 512, 1500, kind=8, bits=32), 1500, checked=True), "read"),
    }
    for name, (data, _) in files.items():
        (tmp_path / name).write_bytes(data)
    found = peaks([tmp_path / name for name in files])
    for name, peak in zip(files, found, strict=True):
        print(f"{name}: {peak.verdict}, {peak.peak / 1e6:.0f} MB")
    assert [peak.verdict for peak in found] == [verdict for _, verdict in files.values()]
    assert max(peak.peak for peak in found) < MOST_HOSTILE


def test_a_ct_of_512_x_512_x_800_is_prepared_within_4_gb(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(-1000, 1000, (512, 512, 8), dtype=np.int16)
    voxels = np.asfortranarray(np.tile(noise, (1, 1, 100)))
    source = tmp_path / "raw"
    source.mkdir()
    (source / "ct.nii.gz").write_bytes(gzip.compress(image_bytes(voxels, LPS), 1))
    (source / "label.nii.gz").write_bytes(gzip.compress(image_bytes((voxels > 900).astype(np.uint8), LPS), 1))
    (tmp_path / "labels.yaml").write_text("1: liver\n")
    arguments = [source, "--image", "ct.nii.gz", "--label", "label.nii.gz", "--labels", tmp_path / "labels.yaml"]
    arguments += ["--output", tmp_path / "out", "--workers", 1]
    command = [sys.executable, "-c", MEASURED, *map(str, arguments)]
    printed = subprocess.run(command, check=True, capture_output=True, text=True)
    code, most = map(int, printed.stdout.split()[-2:])
    print(f"prepare: {most / 1e9:.2f} GB at most")
    assert code == 0, printed
    assert (tmp_path / "out/dataset.json").exists() and most < MOST_PREPARING
