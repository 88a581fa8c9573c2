"""Output folders: what the disk refuses is one sentence, and some exist complete or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from surm_seg.errors import BadConfig, BadInput
from surm_seg.volume import sync_folder


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """What the disk refuses within the block becomes BadInput."""
    try:
        yield
    except OSError as error:
        sentence = f"{folder} cannot be written ({error.strerror}); choose --output or free space."
        raise BadInput("output", sentence) from error


def check_writable(folder: Path) -> None:
    """Raises BadInput where a folder cannot be made or written in; leaves nothing behind."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    with writing(folder), TemporaryDirectory(dir=there):
        pass


def free(folder: Path, command: str) -> Path:
    """The resolved path of a folder that is absent or empty; raises BadConfig where it holds anything.

    Args:
        command: begins the error's code.
    """
    folder = folder.resolve()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        sentence = f"--output {folder} exists and is not an empty folder; choose another."
        raise BadConfig(f"{command}-output", sentence)
    return folder


@contextmanager
def appearing(folder: Path, command: str) -> Iterator[Path]:
    """A folder to fill, which becomes `folder` when the block succeeds and disappears when it fails.

    Raises BadInput where the disk refuses.
    """
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    try:
        partial.mkdir(parents=True)
        yield partial
        for path in (*partial.rglob("*"), partial):
            sync_folder(path)  # a file is made to last just as a folder is
        os.replace(partial, folder)
        sync_folder(folder.parent)
    except OSError as error:
        sentence = f"{folder} cannot be written ({error.strerror}); give another --output."
        raise BadInput(f"{command}-write", sentence) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
