"""Which program, on what machine, when: for the records beside runs and predictions."""

from __future__ import annotations

import platform
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("surm-seg", "torch", "monai", "peft", "transformers", "accelerate", "nibabel", "segment-anything", "numpy")


def provenance() -> dict[str, Any]:
    """Time, versions, commit (where the program runs from its own checkout) and machine."""
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "commit": _commit(),
        "versions": {package: _version(package) for package in PACKAGES},
        "python": platform.python_version(),
        "system": platform.system(),
        "machine": platform.machine(),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of the checkout this file is tracked in; an installed copy inside somebody's repository has none."""
    here = Path(__file__)
    git = ["git", "-C", str(here.parent)]
    try:
        subprocess.run([*git, "ls-files", "--error-unmatch", here.name], capture_output=True, check=True)
        described = subprocess.run(
            [*git, "describe", "--always", "--dirty"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return described.stdout.strip()
