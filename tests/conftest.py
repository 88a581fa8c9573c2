"""What several tests share: real NIfTI files on disk, and the real CT cases where they are mounted."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

REPOSITORY = Path(__file__).resolve().parents[1]

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # Shells start what runs in the background so, and the commands that tests interrupt would inherit it.
    signal.signal(signal.SIGINT, signal.default_int_handler)

if "PYTEST_XDIST_WORKER" in os.environ:
    # Before torch is imported, and for the commands that tests start: processes side by side that use all processors
    # each take several times as long.
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def write_nifti() -> Callable[..., Path]:
    """Write voxels (i, j, k) as NIfTI with an affine in mm (default: 2 mm, LPS), and return the path."""

    def write(path: Path, voxels: np.ndarray, affine: np.ndarray | None = None) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        nib.save(nib.Nifti1Image(voxels, np.diag([-2.0, -2.0, 2.0, 1.0]) if affine is None else affine), path)
        return path

    return write


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here asks for a download: whoever opens a connection to another machine is found out."""
    connect = socket.socket.connect

    def loopback_only(self: socket.socket, address: Any) -> None:
        local = self.family == socket.AF_UNIX or str(address[0]) in ("127.0.0.1", "::1", "localhost")
        assert local, f"a connection to {address} was asked for"
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", loopback_only)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real cases; the test is skipped where it is absent."""
    folder = (REPOSITORY / os.environ.get("SURM_SHARED", "../shared") / "data").resolve()
    if not folder.is_dir():
        pytest.skip("no real cases here: set SURM_SHARED to the folder that holds data/ct-case-a")
    return folder
