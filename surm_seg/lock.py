"""One process at a time writes into a folder."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from surm_seg.errors import BadInput

_descriptors: set[int] = set()


@contextmanager
def held(folder: Path, activity: str) -> Iterator[None]:
    """Hold a folder, made where it is missing and removed again where it stays empty.

    The kernel keeps the lock (flock), so that it ends with its process, however that ends. Before the block runs, what
    killed holders were writing is swept.

    Args:
        activity: what the holder does to the folder, such as "prepared"; another process is told.

    Raises:
        BadInput: another process holds it; the sentence names its number, host and time.
        OSError: as the file system does.
    """
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    lock = folder / ".lock"
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
    _descriptors.add(descriptor)
    try:
        _take(descriptor, folder, lock, activity)
        try:
            sweep(folder)
            yield
        finally:
            with suppress(OSError):  # the folder has vanished, or is not empty
                lock.unlink(missing_ok=True)
                if made:
                    folder.rmdir()
    finally:
        _descriptors.discard(descriptor)
        os.close(descriptor)


def sweep(folder: Path) -> None:
    """Remove what killed processes were writing below a folder: `.NAME.PROCESS.part`, or `.NAME.PROCESS.KIND.part`."""
    for leftover in sorted(folder.rglob(".*.part")):
        if re.search(r"\.\d+(\.\w+)?\.part$", leftover.name):
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink(missing_ok=True)


def _take(descriptor: int, folder: Path, lock: Path, activity: str) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not lock.exists() or not os.path.samestat(os.fstat(descriptor), lock.stat()):
            raise BlockingIOError  # its holder finished, and removed it, between our open and flock
    except BlockingIOError as error:
        owner = os.pread(descriptor, 200, 0).decode(errors="replace") or "another process"
        raise BadInput("busy", f"{folder} is being {activity} by {owner}; wait for it, or end it.") from error
    os.ftruncate(descriptor, 0)
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()} since {since}".encode(), 0)


def _let_go() -> None:
    """A loader's worker, forked from the holder, would keep the lock when the holder is killed."""
    for descriptor in _descriptors:
        os.close(descriptor)
    _descriptors.clear()


os.register_at_fork(after_in_child=_let_go)
