"""A file of JSON lines that only grows: a line counts once it is on disk with its digest."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from errno import ENOSPC
from pathlib import Path
from typing import Any
from weakref import finalize

from surm_seg.errors import BadInput

DIGEST_DIGITS = 16
"""Of a line: enough to tell a line that is whole from one that is not."""


class Journal:
    """The lines of a file that is there; a last one that was cut off is cut away, for nobody was told of it.

    Args:
        lines: as they were when it was opened.

    Raises:
        ValueError: another line than the last is damaged.
    """

    def __init__(self, path: Path) -> None:
        raw = path.read_bytes().splitlines(keepends=True)
        whole = [_parsed(line) for line in raw]
        if whole and whole[-1] is None:
            with open(path, "r+b") as journal:
                journal.truncate(sum(map(len, raw[:-1])))
            whole.pop()
        self.lines = [line for line in whole if line is not None]
        if len(self.lines) < len(whole):
            raise ValueError("a line is damaged")
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND)
        finalize(self, os.close, self._file)

    def append(self, line: Mapping[str, Any]) -> None:
        """Write a line, which is on disk when the call returns; raises BadInput where the disk refuses it."""
        text = json.dumps(line).encode()
        whole = json.dumps({"sha256": hashlib.sha256(text).hexdigest()[:DIGEST_DIGITS]}).encode() + b" " + text + b"\n"
        end = os.fstat(self._file).st_size
        try:
            if os.write(self._file, whole) < len(whole):
                raise OSError(ENOSPC, os.strerror(ENOSPC))
            os.fsync(self._file)
        except OSError as error:
            os.truncate(self._file, end)
            raise BadInput(
                "edit-disk", f"The edit was not made: {error.strerror}; free space, then repeat it."
            ) from error


def _parsed(line: bytes) -> dict[str, Any] | None:
    """The content of a line; None where it is not whole."""
    stated, _, text = line.removesuffix(b"\n").partition(b"} ")
    try:
        same = json.loads(stated + b"}")["sha256"] == hashlib.sha256(text).hexdigest()[:DIGEST_DIGITS]
        return json.loads(text) if same and line.endswith(b"\n") else None
    except (ValueError, KeyError, TypeError):
        return None
