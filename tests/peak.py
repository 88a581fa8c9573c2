"""How much memory reading takes: `peaks`, and the process it starts, `python peak.py PATH ...`.

A process of its own, because what a process once used at most never falls; here the kernel is asked to forget it before
each path. Linux only.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from surm_seg.errors import BadInput
from surm_seg.volume import read_image, read_labels


@dataclass(frozen=True)
class Peak:
    """What reading one path came to.

    Args:
        verdict: read, or the code of the refusal.
        volume: bytes of the voxels that were returned.
        peak: most bytes in use above those before, the volume included.
    """

    verdict: str
    volume: int
    peak: int


def peaks(paths: Sequence[Path]) -> list[Peak]:
    """Read the paths one after the other in a fresh process; label maps are those with `label` in their names."""
    command = [sys.executable, __file__, *map(str, paths)]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return [Peak(**json.loads(line)) for line in printed.splitlines()]


def in_use(field: str) -> int:
    """A field of this process's memory status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def measured(path: Path) -> Peak:
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM := VmRSS
    before = in_use("VmRSS")
    try:
        volume = read_labels(path) if "label" in path.name else read_image(path)
        verdict, size = "read", volume.voxels.nbytes
    except BadInput as refused:
        verdict, size = refused.code, 0
    return Peak(verdict, size, in_use("VmHWM") - before)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(json.dumps(asdict(measured(Path(name)))), flush=True)
