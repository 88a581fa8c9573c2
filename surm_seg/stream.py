"""The bytes of a file the user named: front to back, unpacked on the way, verified to their end.

A cut or flipped gzip otherwise decodes into plausible nonsense, and a small one into gigabytes: nothing is unpacked
beyond what was asked for.
"""

from __future__ import annotations

import os
import stat
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NoReturn

import numpy as np

from surm_seg.errors import BadInput

SLAB_VOXELS = 2**19  # 4 MB as float64; a slab is at least one slice
CHUNK_BYTES = 2**20

# What zlib's wbits calls the containers.
GZIP = 31
GZIP_OR_ZLIB = 47

Refuse = Callable[[str, str], NoReturn]


def refusing(path: Path) -> Refuse:
    """A function (code, what is wrong with this file and how to mend it) that raises BadInput."""

    def refuse(code: str, what: str) -> NoReturn:
        raise BadInput(code, f"{path} {what}.")

    return refuse


@contextmanager
def regular_file(path: Path) -> Iterator[BinaryIO]:
    """A regular file that is not empty, opened for reading; raises BadInput for anything else."""
    refuse = refusing(path)
    try:
        # NONBLOCK: opening a FIFO must not hang. NOFOLLOW: a link could lead out of the folder the user named.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        if path.is_symlink():
            refuse("not-a-file", "is a symbolic link; give the file itself")
        reason = getattr(error, "strerror", "no such name")
        raise BadInput("unreadable", f"{path} cannot be opened ({reason}); check name and rights.") from error
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            refuse("not-a-file", "is not a regular file; give an image file")
        if status.st_size == 0:
            refuse("empty-file", "is empty; copy or export it again")
        with open(descriptor, "rb", closefd=False) as file:
            yield file
    finally:
        os.close(descriptor)


class Stream:
    """What an open file holds from where it stands.

    Args:
        packed: the container to unpack, None where the bytes are as stored.
    """

    def __init__(self, file: BinaryIO, refuse: Refuse, packed: int | None = None) -> None:
        self._file = file
        self._refuse = refuse
        self._inflater = None if packed is None else zlib.decompressobj(packed)

    def slabs(
        self, shape: tuple[int, int, int], dtype: np.dtype, scaling: tuple[float, float] | None = None
    ) -> Iterator[tuple[slice, np.ndarray]]:
        """Yield (range of k, finite values of shape (i, j, len)), which must be all that is left; raises BadInput.

        The stream is verified to its end after the last slab: use no voxel before the iteration has finished.

        Args:
            shape: (i, j, k), the first index varying fastest.
            dtype: stored type with its byte order.
            scaling: (slope, intercept) that turn the stored values into float64.
        """
        i, j, depth = shape
        thickness = max(1, SLAB_VOXELS // (i * j))
        for start in range(0, depth, thickness):
            stop = min(start + thickness, depth)
            raw = self.read(i * j * (stop - start) * dtype.itemsize)
            values = raw.view(dtype).reshape((i, j, stop - start), order="F")
            if scaling is not None:
                with np.errstate(over="ignore", invalid="ignore"):
                    values = values.astype(np.float64)
                    values *= scaling[0]
                    values += scaling[1]
            if values.dtype.kind == "f" and not np.isfinite(values).all():
                self._refuse("non-finite-voxels", "holds NaN or infinite voxels; replace them (air is -1024 HU)")
            yield slice(start, stop), values
        if self._some(1):
            self._refuse("trailing-data", "is longer than the voxels its header announces; export it again")
        if self._inflater is not None and (self._inflater.unused_data or self._file.read(1)):
            self._refuse("trailing-data", "has bytes after its packed voxels; unpack it and compress it again")

    def read(self, count: int) -> np.ndarray:
        """Exactly `count` bytes as uint8; raises BadInput. Memory is taken as they arrive, not as announced."""
        data = np.empty(count, np.uint8)
        filled = 0
        while filled < count:
            some = self._some(min(count - filled, CHUNK_BYTES))
            if not some:
                self._refuse("truncated", "ends before its header and voxels do; copy or export it again")
            data[filled : filled + len(some)] = np.frombuffer(some, np.uint8)
            filled += len(some)
        return data

    def _some(self, limit: int) -> bytes:
        """Up to `limit` further bytes; nothing only at the verified end (zlib checks CRC and length there)."""
        if self._inflater is None:
            return self._file.read(limit)
        while not self._inflater.eof:
            chunk = self._inflater.unconsumed_tail or self._file.read(CHUNK_BYTES)
            try:
                data = self._inflater.decompress(chunk, limit)
            except zlib.error:
                self._refuse("damaged-gzip", "is not intact where it is packed; copy or export it again")
            if data:
                return data
            if not chunk:
                self._refuse("truncated", "is packed and was cut short; copy or export it again")
        return b""
