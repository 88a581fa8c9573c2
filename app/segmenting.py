"""Segmenting a case from a page: a thread of the server, with progress, cancel, and one resident backbone for all.

What runs is found again by any page and any session, under the case and the run; a closed tab stops nothing.

REVIEW/asked   an empty file: this was asked for, and has not come to an end

Where the app was ended meanwhile, the next one begins it anew. It does so once, for what ends the app again may be the
cause of its end; and never for an upload, which is gone with the app that it was brought to.
"""

from __future__ import annotations

import importlib
import logging
import os
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event, Lock, Semaphore, Thread
from typing import Any

import numpy as np
import torch

from app.workspace import Run, Study, Workspace, store
from surm_seg.app import DEVICE
from surm_seg.cli import device_named
from surm_seg.errors import SurmError
from surm_seg.report import write_scores
from surm_seg.scored import score_case

ASKED = "asked"

_log = logging.getLogger("surm_seg.app")
_lock, _loading = Lock(), Lock()
_turn = Semaphore(1)  # cores and memory are for one volume at a time; the others wait for their turn
_residents: dict[tuple[str, ...], Any] = {}
_works: dict[tuple[str, str], Work] = {}


class Cancelled(Exception):
    """The user asked for the end."""


@dataclass(eq=False)
class Work:
    """One case being segmented by one run.

    Args:
        share: done, 0..1.
        state: waiting, running, done, cancelled or failed.
        error: why it failed.
    """

    study: Study
    run: Run
    share: float = 0.0
    state: str = "waiting"
    error: SurmError | None = None
    _end: Event = field(default_factory=Event)

    @property
    def over(self) -> bool:
        return self.state in ("done", "cancelled", "failed")

    def cancel(self) -> None:
        """End it after the slices it is at."""
        self._end.set()

    def told(self, share: float) -> None:
        """Note the progress, or end where that was asked for."""
        if self._end.is_set():
            raise Cancelled
        self.share = share


def begin(workspace: Workspace, study: Study, run: Run, *, resumable: bool = True) -> Work:
    """Segment a case in the background; the same work where it is already on its way.

    Args:
        resumable: whether the next app goes on with it.
    """
    with _lock:
        known = _works.get((study.key, run.identity))
        if known is not None and not known.over:
            return known
        work = _works[study.key, run.identity] = Work(study, run)
    if resumable and study.original is None:
        with suppress(OSError):  # a disk that refuses this refuses the result, too
            asked = _asked(workspace, study, run)
            asked.parent.mkdir(parents=True, exist_ok=True)
            asked.touch()
    Thread(target=_carry_out, args=(workspace, work), daemon=True, name="segmenting").start()
    return work


def resume(workspace: Workspace) -> None:
    """Begin anew what an app that was ended was asked for; what this one knows of is left alone."""
    unfinished = set((workspace.folder / "reviews").glob(f"*/*/{ASKED}"))
    if not unfinished:
        return
    for study in workspace.studies():
        for run in workspace.runs():
            asked = _asked(workspace, study, run)
            if asked in unfinished and not run.problem and work_on(study, run) is None:
                asked.unlink(missing_ok=True)
                begin(workspace, study, run, resumable=False)


def work_on(study: Study, run: Run) -> Work | None:
    """The last work on a case with a run since the server was started."""
    return _works.get((study.key, run.identity))


def resident(run: Run) -> Any:
    """The `pipelines.resident.Resident` of a run's backbone, made once for the server.

    The import takes seconds (MONAI), so that it waits for the first question. One processor is left to the pages.
    """
    key = tuple(str(value) for value in (*map(run.options.get, ("backbone", "weights")), run.facts.get("base_sha256")))
    with _loading:
        if key not in _residents:
            if not _residents:
                torch.set_num_threads(max(1, torch.get_num_threads() - 1))
            device = device_named(os.environ.get(DEVICE, "auto"))
            _residents[key] = importlib.import_module("pipelines.resident").Resident.of(run.folder, device)
        return _residents[key]


def _carry_out(workspace: Workspace, work: Work) -> None:
    study, run = work.study, work.run
    try:
        with _turn:
            work.told(0.0)
            work.state = "running"
            found = resident(run).segment(run.folder, study.case.image, work.told)
        store(workspace.review(study, run), found)
        score(workspace, study, run, found)
        work.state = "done"
    except Cancelled:
        work.state = "cancelled"
    except SurmError as error:
        work.error, work.state = error, "failed"
        _log.warning("segmenting: %s", error.code)
    except Exception as error:  # a worker has nobody to raise to
        work.error = SurmError("worker-lost", f"The worker stopped ({type(error).__name__}); start it again.")
        work.state = "failed"
        _log.error("segmenting: unexpected %s", type(error).__name__)
    finally:
        _asked(workspace, study, run).unlink(missing_ok=True)


def _asked(workspace: Workspace, study: Study, run: Run) -> Path:
    return workspace.review(study, run) / ASKED


def score(workspace: Workspace, study: Study, run: Run, found: np.ndarray) -> None:
    """Leave cases.csv below the prediction where the case has a reference of the same organs."""
    reference = study.case.label
    if reference is not None and study.labels == run.labels:
        scored = score_case(found, reference, run.labels, study.case.spacing, study.name)
        adapter = str(run.options.get("structure", ""))
        folder, seed = workspace.scored(study, run), run.options.get("seed")
        write_scores(folder, scored.rows, scored.slices, run=run.name, adapter=adapter, seed=seed)
