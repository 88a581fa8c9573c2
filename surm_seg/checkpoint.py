"""Training state on disk: safetensors and JSON only, made visible by one rename, checked by digest when read.

CHECKPOINTS/step-00000400/state.json        digests of the files, and what the caller put there
                         /model.safetensors ...
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load, save
from torch import Tensor

from surm_seg.errors import BadInput, Corrupt

STEP = re.compile(r"step-(\d{8})")


def save_checkpoint(
    folder: Path, step: int, files: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]
) -> Path:
    """Write FOLDER/step-N atomically: complete under that name, or not there at all.

    Args:
        files: name without suffix -> tensors.
        state: anything JSON can hold.

    Raises:
        BadInput: the disk is full or the folder cannot be written; earlier checkpoints are untouched.
    """
    target = folder / f"step-{step:08d}"
    partial = folder / f".{target.name}.{os.getpid()}.part"
    try:
        partial.mkdir(parents=True, exist_ok=True)
        digests = {}
        for name, tensors in files.items():
            content = save({key: value.detach().cpu().contiguous() for key, value in tensors.items()})
            digests[f"{name}.safetensors"] = hashlib.sha256(content).hexdigest()
            _write_durably(partial / f"{name}.safetensors", content)
        _write_durably(partial / "state.json", json.dumps({**state, "step": step, "digests": digests}).encode())
        if target.exists():
            shutil.rmtree(target)
        os.replace(partial, target)
    except OSError as error:
        raise BadInput(
            "checkpoint-write",
            f"The checkpoint {target} cannot be written ({error.strerror}); earlier ones are intact.",
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def load_checkpoint(path: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Files and state of one checkpoint; raises Corrupt where a digest or the schema disagrees."""
    try:
        state = json.loads((path / "state.json").read_text())
        files = {}
        for name, digest in state["digests"].items():
            content = (path / name).read_bytes()
            if hashlib.sha256(content).hexdigest() != digest:
                raise Corrupt(
                    "checkpoint-digest",
                    f"{path / name} has changed since it was written; delete {path.name} and resume.",
                )
            files[name.removesuffix(".safetensors")] = load(content)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Corrupt(
            "checkpoint-unreadable",
            f"{path} is incomplete or damaged ({type(error).__name__}); delete it and resume again.",
        ) from error
    return files, state


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(path for path in folder.glob("step-*") if STEP.fullmatch(path.name))


def sweep(folder: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints, and what interrupted writers left."""
    for path in checkpoints(folder)[:-keep]:
        shutil.rmtree(path)
    for path in folder.glob(".step-*.part"):
        shutil.rmtree(path, ignore_errors=True)


def _write_durably(path: Path, content: bytes) -> None:
    with path.open("wb") as out:
        out.write(content)
        out.flush()
        os.fsync(out.fileno())
