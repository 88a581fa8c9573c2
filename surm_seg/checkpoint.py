"""Training state on disk: safetensors and JSON only, made visible by one rename, checked by digest when read.

CHECKPOINTS/step-00000400/state.json        what the caller put there, digests of the files and of itself
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
from surm_seg.volume import sync_folder

STEP = re.compile(r"step-(\d{8})")


def save_checkpoint(
    folder: Path, step: int, files: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]
) -> Path:
    """Write FOLDER/step-N atomically: complete under that name, or not there at all.

    Args:
        folder: made where it is missing; its parents are not, since a run folder that has vanished must not come back
            without its records.
        files: name without suffix -> tensors.
        state: anything JSON can hold.

    Raises:
        BadInput: the disk is full or the folder cannot be written; earlier checkpoints are untouched.
    """
    target = folder / f"step-{step:08d}"
    partial = _hidden(target, "new")
    try:
        folder.mkdir(exist_ok=True)
        partial.mkdir()
        digests = {}
        for name, tensors in files.items():
            content = save({key: value.detach().cpu().contiguous() for key, value in tensors.items()})
            digests[f"{name}.safetensors"] = hashlib.sha256(content).hexdigest()
            _write(partial / f"{name}.safetensors", content)
        content = {**state, "step": step, "digests": digests}
        _write(partial / "state.json", json.dumps({**content, "sha256": _digest(content)}).encode())
        sync_folder(partial)
        discard(target)
        os.replace(partial, target)
        sync_folder(folder)
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
        if state.pop("sha256") != _digest(state):
            raise _changed(path, "state.json")
        files = {}
        for name, digest in state["digests"].items():
            content = (path / name).read_bytes()
            if hashlib.sha256(content).hexdigest() != digest:
                raise _changed(path, name)
            files[name.removesuffix(".safetensors")] = load(content)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise Corrupt(
            "checkpoint-unreadable",
            f"{path} is incomplete or damaged ({type(error).__name__}); delete it and resume again.",
        ) from error
    return files, state


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(path for path in folder.glob("step-*") if STEP.fullmatch(path.name))


def set_damaged_aside(folder: Path) -> list[Path]:
    """Rename every checkpoint that is newer than the newest sound one to damaged-NAME, and return the new paths.

    Raises Corrupt, with nothing renamed, where there are checkpoints and none is sound.
    """
    damaged = []
    for path in reversed(checkpoints(folder)):
        try:
            load_checkpoint(path)
            break
        except Corrupt:
            damaged.append(path)
    else:
        if damaged:
            names = ", ".join(path.name for path in damaged)
            raise Corrupt("checkpoints-damaged", f"No checkpoint in {folder} is whole ({names}); start a new run.")
    aside = [path.with_name(f"damaged-{path.name}") for path in damaged]
    for path, new in zip(damaged, aside, strict=True):
        discard(new)
        os.replace(path, new)
    return aside


def sweep(folder: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints."""
    for path in checkpoints(folder)[:-keep]:
        discard(path)


def discard(path: Path) -> None:
    """Delete a checkpoint, if it is there; a process killed meanwhile leaves no half of it under its name."""
    if path.exists():
        hidden = _hidden(path, "old")
        os.replace(path, hidden)
        shutil.rmtree(hidden)


def _hidden(path: Path, kind: str) -> Path:
    """Where a checkpoint is while it is not whole; free, although a killed process of our number may have left one."""
    hidden = path.with_name(f".{path.name}.{os.getpid()}.{kind}.part")
    shutil.rmtree(hidden, ignore_errors=True)
    return hidden


def _digest(state: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def _changed(path: Path, name: str) -> Corrupt:
    sentence = f"{path / name} has changed since it was written; delete {path.name} and resume."
    return Corrupt("checkpoint-digest", sentence)


def _write(path: Path, content: bytes) -> None:
    """Onto the disk, in a folder that nobody sees yet."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
