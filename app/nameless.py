"""What the log of a job says in the place of the users' file names, which may be names of patients."""

from __future__ import annotations

import io
import os
import re
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

from pipelines.formats import formats
from surm_seg.volume import stem, volumes_in

PRIVATE = ("prediction", "reference", "image")
"""Options whose files may be called after patients."""

SHORTEST_NAME = 3
"""Characters of a file name that a log leaves out: shorter ones tell nobody's name, and are words of sentences."""


class Nameless(io.TextIOBase):
    """Standard output, line by line, with private texts replaced.

    Args:
        private: text -> what stands for it.
    """

    encoding = "utf-8"

    def __init__(self, private: Mapping[str, str]) -> None:
        self._private = private
        longest_first = sorted(map(re.escape, private), key=len, reverse=True)
        self._found = re.compile(rf"(?<!\w)(?:{'|'.join(longest_first)})(?!\w)" if private else "(?!)")
        self._pending = ""
        self._lock = threading.RLock()

    def writable(self) -> bool:
        return True

    def write(self, text: str, /) -> int:
        with self._lock:
            *lines, self._pending = (self._pending + text).split("\n")
            for line in lines:
                self._out(line + "\n")
        return len(text)

    def flush(self) -> None:
        """Nothing: a line that is not whole may end within a name."""

    def close(self) -> None:
        with self._lock:
            self._out(self._pending)
            self._pending = ""
        super().close()

    def _out(self, text: str) -> None:
        if text:
            os.write(1, self._found.sub(lambda match: self._private[match[0]], text).encode(errors="replace"))


def private_names(argv: Sequence[str], work: Path) -> dict[str, str]:
    """What of a command's files may tell a patient, as its messages may have it -> what the log says instead."""
    found: dict[str, str] = {}
    if argv and not argv[0].startswith("-"):
        found |= _source_names(work / argv[0])
    for option in PRIVATE:
        stated = value_of(argv, option)
        if stated is None:
            continue
        source = work / stated
        found |= dict.fromkeys((str(source), stated, source.name, stem(source)), f"the {option}")
        for number, path in enumerate(volumes_in(source) if source.is_dir() else [source], 1):
            for member in (path, *(path.iterdir() if path.is_dir() else ())):
                texts = (str(member), str(Path(stated, member.relative_to(source))), member.name, stem(member))
                found |= dict.fromkeys(texts, f"{option} {number}")
    return {text: instead for text, instead in found.items() if len(text) >= SHORTEST_NAME}


def _source_names(source: Path) -> dict[str, str]:
    """The same of all that lies below what is prepared, but for the words that a layout prescribes."""
    public = set(re.findall(r"[\w.]+", " ".join(layout.LAYOUT for layout in formats().values())))
    found = dict.fromkeys((str(source), source.name), "the source")
    for number, path in enumerate(sorted(path for path in source.rglob("*") if path.is_file()), 1):
        within = path.relative_to(source)
        found |= dict.fromkeys(set(within.parts[:-1]) - public, "a folder of the source")
        found |= dict.fromkeys({path.name, stem(path)} - public, f"file {number} of the source")
        found |= dict.fromkeys((str(path), str(within)), f"file {number} of the source")
    return found


def value_of(argv: Sequence[str], option: str) -> str | None:
    """The value of an option among a command's words."""
    for word, following in zip(argv, (*argv[1:], None), strict=True):
        if word == f"--{option}":
            return following
        if word.startswith(f"--{option}="):
            return word.partition("=")[2]
    return None
