"""A clinician's corrections: nothing is lost, nothing is overwritten, and everything can be taken back."""

from __future__ import annotations

import multiprocessing
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from app.corrections import Correction, versions
from surm_seg.errors import BadInput, Corrupt

REPOSITORY = Path(__file__).resolve().parents[2]
FORK = multiprocessing.get_context("fork")
ABOUT = {"labels": ["liver", "spleen", "aorta"], "run": "demo"}
SHAPE = (5, 48, 40)


def drawn(number: int, shape: tuple[int, int] = SHAPE[1:]) -> np.ndarray:
    """A slice full of small pieces, the same for the same number."""
    return np.random.default_rng(number).integers(0, 4, shape).astype(np.uint8)


@pytest.fixture
def base() -> np.ndarray:
    return np.stack([drawn(1000 + z) for z in range(SHAPE[0])])


def test_undo_and_redo_walk_through_all_states_also_after_the_tab_was_closed(tmp_path: Path, base: np.ndarray) -> None:
    rng = np.random.default_rng(0)
    states, place = [base.copy()], 0
    correction = Correction.open(tmp_path, base, ABOUT)
    for number in range(80):
        action = rng.choice(["edit", "edit", "undo", "redo", "close"])
        if action == "edit":
            z = int(rng.integers(SHAPE[0]))
            after = states[place].copy()
            after[z, 5:20, 3:30] = drawn(number)[5:20, 3:30]
            assert correction.apply(z, after[z]).organs == {1, 2, 3}
            states, place = [*states[: place + 1], after], place + 1
        elif action == "undo":
            edit = correction.undo()
            assert (edit is None) == (place == 0)
            place = max(0, place - 1)
        elif action == "redo":
            edit = correction.redo()
            assert (edit is None) == (place == len(states) - 1)
            place = min(len(states) - 1, place + 1)
        else:
            revision = correction.revision
            del correction
            correction = Correction.open(tmp_path, base, ABOUT)
            assert correction.revision == revision
        assert np.array_equal(correction.labels, states[place])
        assert (correction.can_undo, correction.can_redo) == (place > 0, place < len(states) - 1)
    assert [path.name for path in versions(tmp_path)] == ["v001"]
    assert np.array_equal(np.load(tmp_path / "v001" / "labels.npy"), states[place])


@pytest.mark.parametrize("closed", [False, True])
def test_undo_and_redo_that_arrive_as_edits_are_undo_and_redo(tmp_path: Path, base: np.ndarray, closed: bool) -> None:
    """The browser's Ctrl Z sends the slice as it was; the page's buttons must go on from there, in either order."""

    def correction() -> Correction:
        return Correction.open(tmp_path, base, ABOUT)

    def states() -> tuple[bool, bool]:
        return held.can_undo, held.can_redo

    held, strokes = correction(), [drawn(1), drawn(2)]
    for stroke in strokes:
        held.apply(1, stroke)
    held.apply(1, strokes[0])  # the browser's undo
    if closed:
        del held
        held = correction()
    assert states() == (True, True) and held.undo() and np.array_equal(held.labels, base)
    held.apply(1, strokes[0])  # the browser's redo of what the page took back
    if closed:
        del held
        held = correction()
    assert states() == (True, True) and held.redo() and np.array_equal(held.labels[1], strokes[1])
    assert held.undo() and held.undo() and states() == (False, True)
    held.apply(1, strokes[1])  # a stroke that was never taken back alone, from here
    assert states() == (True, False) and held.undo() and np.array_equal(held.labels, base)


def test_an_edit_says_which_organs_it_gave_and_took(tmp_path: Path) -> None:
    correction = Correction.open(tmp_path, np.zeros(SHAPE, np.uint8), ABOUT)
    stroke = np.zeros(SHAPE[1:], np.uint8)
    stroke[3:5, 3:5] = 2
    assert correction.apply(4, stroke).organs == {2}
    assert correction.apply(4, stroke).organs == set() and correction.revision == 1  # nothing to keep
    stroke[3, 3] = 1
    edit = correction.apply(4, stroke)
    assert (edit.z, edit.organs, correction.edited) == (4, {1, 2}, {4})


def test_every_version_stands_beside_the_others(tmp_path: Path, base: np.ndarray) -> None:
    """A fresh start, or another prediction, begins the next version; what was there keeps every byte."""
    np.save(tmp_path / "prediction.npy", base)
    prediction = (tmp_path / "prediction.npy").read_bytes()
    Correction.open(tmp_path, np.load(tmp_path / "prediction.npy", mmap_mode="r"), ABOUT).apply(0, drawn(1))
    first = {path.name: path.read_bytes() for path in (tmp_path / "v001").iterdir()}
    Correction.open(tmp_path, base, ABOUT, fresh=True).apply(0, drawn(2))
    other = Correction.open(tmp_path, base[::-1], ABOUT)
    assert other.version == 3 and np.array_equal(other.labels, base[::-1])
    assert [path.name for path in versions(tmp_path)] == ["v001", "v002", "v003"]
    assert {path.name: path.read_bytes() for path in (tmp_path / "v001").iterdir()} == first
    assert (tmp_path / "prediction.npy").read_bytes() == prediction
    with pytest.raises(ValueError, match="read-only"):
        other.labels[0, 0, 0] = 1


def editing(folder: Path, base: np.ndarray, first: int, pipe: int) -> None:
    """Draw one slice after the other, and say each when it is acknowledged."""
    correction = Correction.open(folder, base, ABOUT)
    for number in range(first, 10_000):
        correction.apply(number % len(base), drawn(number, (160, 160)))
        os.write(pipe, f"{number}\n".encode())


def test_a_kill_in_mid_write_loses_nothing_that_was_acknowledged(tmp_path: Path) -> None:
    base, rng, known, seen = np.zeros((3, 160, 160), np.uint8), np.random.default_rng(1), 0, set()
    for _ in range(10):
        reading, writing = os.pipe()
        process = FORK.Process(target=editing, args=(tmp_path, base, known + 1, writing))
        process.start()
        os.close(writing)
        said = os.read(reading, 100)
        time.sleep(rng.uniform(0, 0.03))
        process.kill()
        process.join()
        acknowledged = int((said + os.read(reading, 10**6)).split()[-1])
        os.close(reading)
        whole = (tmp_path / "v001" / "journal.jsonl").read_bytes().endswith(b"\n")
        correction = Correction.open(tmp_path, base, ABOUT)
        known = correction.revision
        seen.add((known - acknowledged, whole))
        assert acknowledged <= known <= acknowledged + 1
        expected = base.copy()
        for number in range(max(1, known - 2), known + 1):
            expected[number % 3] = drawn(number, (160, 160))
        assert np.array_equal(correction.labels, expected)
        del correction
    assert len(seen) > 1, "every kill struck between two edits; the test saw nothing"


@pytest.mark.parametrize("kept", [0.0, 0.3, 0.999])
def test_a_line_that_was_cut_off_is_as_if_it_had_never_been(tmp_path: Path, base: np.ndarray, kept: float) -> None:
    folder = Correction.open(tmp_path, base, ABOUT).folder
    journal = folder / "journal.jsonl"
    Correction.reopen(folder).apply(1, drawn(1))
    before, whole = Correction.reopen(folder).labels.copy(), journal.stat().st_size
    Correction.reopen(folder).apply(1, drawn(2))  # its slice is in labels.npy, as if a kill had hit the journal's disk
    os.truncate(journal, whole + int(kept * (journal.stat().st_size - whole)))
    correction = Correction.open(tmp_path, base, ABOUT)
    assert np.array_equal(correction.labels, before) and correction.revision == 1
    correction.apply(2, drawn(3))
    del correction
    assert np.array_equal(Correction.open(tmp_path, base, ABOUT).labels[2], drawn(3))


def test_damage_is_told_and_never_used(tmp_path: Path, base: np.ndarray) -> None:
    folder = Correction.open(tmp_path, base, ABOUT).folder
    for number in range(3):
        Correction.reopen(folder).apply(number, drawn(number))
    journal = bytearray((folder / "journal.jsonl").read_bytes())
    journal[len(journal) // 2] ^= 1
    (folder / "journal.jsonl").write_bytes(journal)
    with pytest.raises(Corrupt, match="v001 of this case is damaged"):
        Correction.open(tmp_path, base, ABOUT)
    assert Correction.open(tmp_path, base, ABOUT, fresh=True).version == 2
    (tmp_path / "v002" / "labels.npy").write_bytes(b"")
    with pytest.raises(Corrupt):
        Correction.open(tmp_path, base, ABOUT)


def test_what_is_no_slice_of_the_case_changes_nothing(tmp_path: Path, base: np.ndarray) -> None:
    correction = Correction.open(tmp_path, base, ABOUT)
    wrong = [(5, drawn(0)), (-1, drawn(0)), (0, drawn(0).T), (0, drawn(0).astype(np.int16)), (0, drawn(0) + 1)]
    for z, labels in wrong:
        with pytest.raises(BadInput):
            correction.apply(z, labels)
    assert correction.revision == 0 and np.array_equal(correction.labels, base)


def on_a_full_disk(folder: Path, base: np.ndarray, pipe: int) -> None:
    correction = Correction.open(folder, base, ABOUT)
    correction.apply(0, drawn(1))
    size = (folder / "v001" / "journal.jsonl").stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 100, resource.RLIM_INFINITY))  # a file system may not be mounted
    try:
        correction.apply(1, drawn(2))
    except BadInput as error:
        os.write(pipe, error.code.encode())
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    correction.apply(2, drawn(3))


def test_a_full_disk_refuses_the_edit_and_keeps_the_others(tmp_path: Path, base: np.ndarray) -> None:
    reading, writing = os.pipe()
    process = FORK.Process(target=on_a_full_disk, args=(tmp_path, base, writing))
    process.start()
    process.join()
    os.close(writing)
    assert os.read(reading, 100) == b"edit-disk"
    os.close(reading)
    expected = base.copy()
    expected[0], expected[2] = drawn(1), drawn(3)
    assert np.array_equal(Correction.open(tmp_path, base, ABOUT).labels, expected)


OTHER_PROGRAM = """
import sys
from pathlib import Path
from app.corrections import Correction
from surm_seg.errors import BadInput
try:
    Correction.reopen(Path(sys.argv[1]))
except BadInput as error:
    print(error.code)
"""


def test_two_tabs_share_a_version_and_two_programs_do_not(tmp_path: Path, base: np.ndarray) -> None:
    one, two = Correction.open(tmp_path, base, ABOUT), Correction.open(tmp_path, base, ABOUT)
    one.apply(0, drawn(1), before=base[0])
    assert two.revision == 1 and np.array_equal(two.labels[0], drawn(1))
    words = [sys.executable, "-c", OTHER_PROGRAM, str(one.folder)]
    said = subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "busy"
    assert two.undo() is not None and np.array_equal(one.labels, base)


def test_what_was_drawn_on_labels_that_are_no_more_changes_nothing(tmp_path: Path, base: np.ndarray) -> None:
    correction = Correction.open(tmp_path, base, ABOUT)
    seen = correction.apply(0, drawn(1)).revision
    correction.apply(0, drawn(2), before=drawn(1))
    for late in (lambda: correction.apply(0, drawn(3), before=drawn(1)), lambda: correction.undo(seen=seen)):
        with pytest.raises(BadInput, match="changed meanwhile"):
            late()
    assert correction.revision == 2 and np.array_equal(correction.labels[0], drawn(2))
    correction.apply(1, drawn(3), before=base[1])  # another slice is as it was
    assert np.array_equal(correction.labels[:2], [drawn(2), drawn(3)])


@pytest.mark.parametrize("closed", [False, True])
def test_an_edit_that_comes_twice_is_made_once(tmp_path: Path, base: np.ndarray, closed: bool) -> None:
    """Its answer was lost: also after a restart, and whatever has been drawn or taken back meanwhile."""
    correction = Correction.open(tmp_path, base, ABOUT)
    sent = [(0, base[0], drawn(1), "a"), (0, drawn(1), drawn(2), "b"), (0, drawn(2), drawn(1), "c")]  # c takes b back
    for z, before, after, event in sent:
        correction.apply(z, after, before=before, event=event)
    correction.undo()
    correction.apply(2, drawn(3))
    expected, revision = correction.labels.copy(), correction.revision
    if closed:
        del correction
        correction = Correction.open(tmp_path, base, ABOUT)
    for z, before, after, event in sent:
        assert correction.apply(z, after, before=before, event=event).organs == set()
    assert np.array_equal(correction.labels, expected) and correction.revision == revision
