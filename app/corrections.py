"""Corrections of a case's label map: a version of its own beside the prediction, with every edit on disk and undo.

REVIEW/v001/about.json    what the version was made from: organs, run, digest of the label map it began with
           /labels.npy    uint8, axes (z, y, x): the label map as it stands
           /journal.jsonl one line per edit, undo and redo, with the browser's event that it was: one that comes twice
                          is made once

The journal is written first and the label map follows it. Whatever a killed process left, opening the version again
makes the slices that were edited what the journal says; a line that was cut off had not been acknowledged.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from threading import RLock
from typing import Any, ClassVar, Literal
from weakref import WeakValueDictionary, finalize

import numpy as np

from app import rle
from app.journal import Journal
from surm_seg.errors import BadInput, Corrupt
from surm_seg.lock import held
from surm_seg.output_folder import appearing

_VERSION = re.compile(r"v(\d{3,})")


@dataclass(frozen=True)
class Edit:
    """A slice that has been changed.

    Args:
        organs: label values that some voxel of it lost or gained, background left out.
        revision: the version's, with this change.
    """

    z: int
    organs: frozenset[int]
    revision: int


@dataclass(frozen=True)
class _Entry:
    """A journal line: a slice before and after, as run lengths."""

    z: int
    before: str
    after: str


def versions(review: Path) -> list[Path]:
    """The versions in a review folder, oldest first; those that are being made do not show."""
    found = [path for path in review.glob("v*") if _VERSION.fullmatch(path.name)]
    return sorted(found, key=number_of)


def number_of(version: Path) -> int:
    """1 of REVIEW/v001."""
    return int(version.name[1:])


def newest_version(review: Path) -> int:
    """Number of the newest version in a review folder, 0 where there is none."""
    return max(map(number_of, versions(review)), default=0)


def journal_bytes(version: Path) -> int:
    """Another number after every change of a version, and known without opening it."""
    return (version / "journal.jsonl").stat().st_size


class Correction:
    """One version, held by this process; made by `Correction.open`, and shared by all who open it here.

    Every change is on disk when the call returns. Several threads may call it, each change is whole; who holds its
    `lock` is alone with it, and no version is begun while somebody holds `Correction.opening`.

    Args:
        folder: REVIEW/v001.
    """

    _opened: ClassVar[WeakValueDictionary[Path, Correction]] = WeakValueDictionary()
    opening: ClassVar = RLock()

    def __init__(self, folder: Path) -> None:
        self.folder, self.version = folder, number_of(folder)
        self.lock, holding = RLock(), ExitStack()
        holding.enter_context(held(folder, "corrected"))
        finalize(self, holding.close)
        self.about, self._labels = _contents(folder)
        self._done: list[_Entry] = []
        self._undone: list[_Entry] = []
        self._events: set[str] = set()
        self.revision = 0
        try:
            self._journal = Journal(folder / "journal.jsonl")
        except (OSError, ValueError) as error:
            raise _damaged(folder) from error
        self._replay()

    @classmethod
    def open(cls, review: Path, base: np.ndarray, about: Mapping[str, Any], *, fresh: bool = False) -> Correction:
        """Go on with the newest version that was begun from this label map, or begin the next one.

        Args:
            review: folder of the versions, made where missing; the prediction itself is never written to.
            base: uint8 labels, axes (z, y, x); organ `about["labels"][k]` is k + 1.
            about: plain JSON values to keep with the version: labels, and whatever else tells where it came from.
            fresh: begin the next version in any case.

        Raises:
            BadInput: another process holds the version, or the disk refuses.
            Corrupt: its files are damaged.
        """
        stated = {**about, "labels": list(about["labels"]), "base_sha256": _digest_of(base), "shape": [*base.shape]}
        with cls.opening:
            earlier = versions(review)
            if earlier and not fresh and _contents(earlier[-1])[0] == stated:
                return cls.reopen(earlier[-1])
            folder = review / f"v{(number_of(earlier[-1]) if earlier else 0) + 1:03d}"
            with appearing(folder, "correction") as partial:
                np.save(partial / "labels.npy", np.ascontiguousarray(base, np.uint8))
                (partial / "about.json").write_text(json.dumps(stated, indent=1) + "\n")
                (partial / "journal.jsonl").touch()
            return cls.reopen(folder)

    @classmethod
    def reopen(cls, folder: Path) -> Correction:
        """A version as it was left; raises as `open` does."""
        with cls.opening:
            folder = folder.resolve()
            known = cls._opened.get(folder)
            if known is None:
                known = cls._opened[folder] = cls(folder)
            return known

    @property
    def labels(self) -> np.ndarray:
        """uint8, axes (z, y, x): the label map as it stands and will stand after further edits; read-only."""
        view = self._labels.view()
        view.flags.writeable = False
        return view

    @property
    def edited(self) -> frozenset[int]:
        """The slices that differ from what the version began with, as far as edits in effect can tell."""
        return frozenset(entry.z for entry in self._done)

    @property
    def can_undo(self) -> bool:
        return bool(self._done)

    @property
    def can_redo(self) -> bool:
        return bool(self._undone)

    def apply(self, z: int, labels: np.ndarray, *, before: np.ndarray | None = None, event: str = "") -> Edit:
        """Replace a slice by these labels (uint8, axes (y, x)); what had been undone is forgotten.

        What takes the last edit in effect back is kept as its undo, and what makes the last undone edit once more as
        its redo: the browser has a history of its own, whose steps arrive as edits.

        Args:
            before: the slice that they were drawn on; None for whatever it is.
            event: what tells this edit from any other; one that was made already is not made again. "" for none.

        Raises:
            BadInput: not a slice of this label map, or a label that is no organ; or the slice has been changed since,
                or the disk refuses, and then it stays as it is.
        """
        depth, *size = self._labels.shape
        if not 0 <= z < depth or labels.shape != tuple(size) or labels.dtype != np.uint8:
            raise BadInput("edit-shape", f"The edit is not a slice of this case ({size[0]} x {size[1]} voxels).")
        if labels.max(initial=0) > len(self.about["labels"]):
            raise BadInput("edit-label", "The edit holds a label that stands for no organ; choose one of the table.")
        with self.lock:
            if event in self._events:
                return Edit(z, frozenset(), self.revision)
            if before is not None and not np.array_equal(self._labels[z], before):
                raise stale()
            entry = _Entry(z, rle.encode(self._labels[z]), rle.encode(labels))
            if entry.before == entry.after:
                return Edit(z, frozenset(), self.revision)
            if self._done[-1:] == [_Entry(z, entry.after, entry.before)]:
                return self._step("undo", self._done, self._undone, event)
            if self._undone[-1:] == [entry]:
                return self._step("redo", self._undone, self._done, event)
            self._write({"edit": [entry.z, entry.before, entry.after]}, event)
            self._done.append(entry)
            self._undone.clear()
            return self._show(z, labels)

    def undo(self, *, seen: int | None = None) -> Edit | None:
        """Take the last edit in effect back; None where there is none.

        Args:
            seen: revision that is on the screen, as for `redo`; None for whichever it is.

        Raises:
            BadInput: somebody else has changed the version since, or the disk refuses.
        """
        with self.lock:
            self._check_seen(seen)
            return self._step("undo", self._done, self._undone) if self._done else None

    def redo(self, *, seen: int | None = None) -> Edit | None:
        """Make the edit that was last taken back once more; None where there is none."""
        with self.lock:
            self._check_seen(seen)
            return self._step("redo", self._undone, self._done) if self._undone else None

    def _step(self, way: Literal["undo", "redo"], source: list[_Entry], target: list[_Entry], event: str = "") -> Edit:
        self._write({way: len(source)}, event)
        entry = source.pop()
        target.append(entry)
        return self._show(entry.z, self._decoded(entry.before if way == "undo" else entry.after))

    def _show(self, z: int, labels: np.ndarray) -> Edit:
        before = self._labels[z].copy()
        self._labels[z] = labels
        moved = before != labels
        touched = np.union1d(before[moved], labels[moved])
        return Edit(z, frozenset(touched[touched > 0].tolist()), self.revision)

    def _check_seen(self, seen: int | None) -> None:
        if seen not in (None, self.revision):
            raise stale()

    def _write(self, line: Mapping[str, Any], event: str) -> None:
        self._journal.append({**line, "event": event} if event else line)
        self._note(event)

    def _note(self, event: str) -> None:
        """Count a change that is on disk."""
        self.revision += 1
        if event:
            self._events.add(event)

    def _replay(self) -> None:
        """Bring the stacks and the edited slices to what the journal says."""
        first: dict[int, str] = {}
        for line in self._journal.lines:
            if "edit" in line:
                self._done.append(_Entry(*line["edit"]))
                self._undone.clear()
                first.setdefault(self._done[-1].z, self._done[-1].before)
            else:
                source, target = (self._done, self._undone) if "undo" in line else (self._undone, self._done)
                target.append(source.pop())
            self._note(line.get("event", ""))
        for z, runs in (first | {entry.z: entry.after for entry in self._done}).items():
            self._labels[z] = self._decoded(runs)

    def _decoded(self, runs: str) -> np.ndarray:
        _, rows, columns = self._labels.shape
        return rle.decode(runs, (rows, columns))


def _contents(folder: Path) -> tuple[dict[str, Any], np.memmap]:
    """What a version began from, and its label map; raises Corrupt."""
    try:
        about = json.loads((folder / "about.json").read_bytes())
        labels = np.load(folder / "labels.npy", mmap_mode="r+", allow_pickle=False)
        if [*labels.shape] != about["shape"] or labels.dtype != np.uint8 or not isinstance(labels, np.memmap):
            raise ValueError("not the label map of this version")
        return about, labels
    except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
        raise _damaged(folder) from error


def stale() -> BadInput:
    """Of what was drawn on labels that are no longer there."""
    return BadInput("edit-stale", "The labels have changed meanwhile. They are shown as they are now: draw once more.")


def _damaged(folder: Path) -> Corrupt:
    return Corrupt(
        "correction", f"Version {folder.name} of this case is damaged; choose another one, or draw on the prediction."
    )


def _digest_of(labels: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(labels, np.uint8).data).hexdigest()
