"""NIfTI files as bytes, with any header, for the tests of what reads them."""

from __future__ import annotations

import gzip
import struct
import zlib

import nibabel as nib
import numpy as np

SHAPE = (4, 5, 6)
VOXELS = np.arange(120, dtype=np.int16).reshape(SHAPE) - 60
LPS = np.diag([-0.7, -0.8, 2.5, 1.0])


def image_bytes(voxels: np.ndarray = VOXELS, affine: np.ndarray | None = LPS, **header: object) -> bytes:
    """An uncompressed file with header fields set as given, whatever nibabel thinks of them."""
    data = nib.Nifti1Image(voxels, affine, dtype=voxels.dtype).to_bytes()
    fields = nib.Nifti1Header(data[:348], check=False)
    fields["vox_offset"] = 352
    for name, value in header.items():
        fields[name] = value
    return fields.binaryblock + data[348:]


def flipped(data: bytes, position: int, mask: int = 0xFF) -> bytes:
    return data[:position] + bytes([data[position] ^ mask]) + data[position + 1 :]


def zeros_packed(head: bytes, megabytes: int, *, checked: bool = False) -> bytes:
    """A gzip of `head` and so many MiB of zeros, a thousandth of that long, made without packing them all.

    Args:
        checked: compute its checksum, which takes a second per GiB; without, only the end of it is wrong.
    """

    def part(data: bytes) -> bytes:  # after a full flush, parts can be strung together
        packer = zlib.compressobj(9, zlib.DEFLATED, -15)
        return packer.compress(data) + packer.flush(zlib.Z_FULL_FLUSH)

    zeros = bytes(2**20)
    digest = zlib.crc32(head)
    for _ in range(megabytes if checked else 0):
        digest = zlib.crc32(zeros, digest)
    end = struct.pack("<II", digest, (len(head) + megabytes * len(zeros)) % 2**32)
    start = b"\x1f\x8b\x08" + bytes(6) + b"\xff"
    return start + part(head) + part(zeros) * megabytes + zlib.compressobj(9, zlib.DEFLATED, -15).flush() + end


PLAIN = image_bytes()
PACKED = gzip.compress(PLAIN, mtime=0)
NOISE = gzip.compress(image_bytes(np.random.default_rng(0).integers(-999, 999, SHAPE, dtype=np.int16)), mtime=0)
