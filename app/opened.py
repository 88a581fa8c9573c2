"""A case on a session's screen: its arrays, the version that is being corrected, its scores, and its scene."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import RLock

import numpy as np

from app import rle, segmenting, serving
from app.corrections import Correction, Edit, newest_version, number_of, stale, versions
from app.figures import counted, organs_of, slices_of
from app.rescore import Scores
from app.scores import keep_score
from app.take_away import Review, export
from app.viewer import Jump, Layer, Proposal, Scene, events
from app.workspace import Run, Study, Workspace
from surm_seg.errors import BadInput, SurmError
from surm_seg.metrics import RECOMMENDED, OrganScore
from surm_seg.scored import Scored

EDITED, REFERENCE = "prediction", "reference"
"""Names of the served layers."""

CHANGES_BITS = 40
"""Of the number that changes of a layer begin with: few enough for it to be exact in the browser."""


@dataclass(eq=False)
class Opened:
    """A prediction under review; made by `open_case`.

    Args:
        folder: of its versions.
        reference: uint8 (z, y, x); None where there is none of these organs.
        labels: the same of what is on the screen: the prediction, or one of its versions.
        counts: voxels per slice and label value.
        correction: the version on the screen; None where that is the prediction.
        earlier: the newest version when this one, or the prediction, came on the screen.
        seen: revision of the correction that the browser shows; another page may be ahead of it.
        changes: of the labels by anything but the browser's own strokes, from a number that no other opening begins at.
        answers: to prompts, so far.
        trouble: why its newest version is not what is shown.
    """

    study: Study
    run: Run
    folder: Path
    image: np.ndarray
    reference: np.ndarray | None
    token: str
    labels: np.ndarray = field(init=False)
    counts: np.ndarray = field(init=False)
    correction: Correction | None = None
    scores: Scores | None = None
    earlier: int = 0
    seen: int = 0
    changes: int = field(default_factory=lambda: secrets.randbits(CHANGES_BITS))
    proposal: Proposal | None = None
    jump: Jump | None = None
    answers: int = 0
    trouble: SurmError | None = None
    _lock: RLock = field(default_factory=RLock)

    @property
    def spacing(self) -> tuple[float, float, float] | None:
        return self.study.case.spacing

    def edited(self, stroke: events.Edit) -> None:
        """Keep a slice as the browser drew it; the first stroke on the prediction begins a version. `score` scores it.

        A stroke that was on its way for long, also since another opening of this case, goes to the version that it was
        drawn for, once, as long as its slice is there as it was drawn on.

        Raises what `Correction.apply` does; the browser then fetches the labels that are kept.
        """
        try:
            with self._lock:
                correction = self._at(stroke.version)
                edit = correction.apply(stroke.z, stroke.labels, before=stroke.before, event=stroke.id)
                self._changed(edit)
                self.proposal = None
                if stroke.layer != self.changes:  # drawn on other labels than the browser has now, or is fetching
                    self.changes += 1
        except SurmError:
            self.changes += 1
            raise

    def undo(self) -> None:
        """Take the last edit back, also one of an earlier visit; raises where another page has edited since."""
        if self.correction is not None:
            self._redrawn(self.correction.undo)

    def redo(self) -> None:
        if self.correction is not None:
            self._redrawn(self.correction.redo)

    def begin_anew(self) -> None:
        """Begin the next version from the prediction; the others stay as they are."""
        self._put(Correction.open(self.folder, self._prediction(), self._about(), fresh=True))

    def show(self, number: int) -> None:
        """Put a version on the screen, or with 0 the prediction; raises what `Correction.reopen` does."""
        folder = {number_of(path): path for path in versions(self.folder)}.get(number)
        self._put(None if folder is None else Correction.reopen(folder))

    def asked(self, prompt: events.Prompt) -> None:
        """Answer a prompt with a proposal; raises what `Resident.prompt` does."""
        mask = segmenting.resident(self.run).prompt(self.image, prompt.z, prompt.points, prompt.box)
        self.answers += 1
        self.proposal = Proposal(self.answers, prompt.z, prompt.value, rle.encode(mask.astype(np.uint8)))

    def scene(self, *, prompts: bool) -> Scene:
        """What the viewer draws."""
        self._catch_up()
        layers = {EDITED: Layer("Prediction" if self.correction is None else self.version, self.changes)}
        layers |= {} if self.reference is None else {REFERENCE: Layer("Reference")}
        return Scene(
            token=self.token,
            case=self.study.name,
            shape=self.study.case.shape,
            spacing=self.spacing,
            organs=organs_of(self.run.labels, self.counts.sum(0), self.spacing, self._organs(settled=True)),
            layers=layers,
            slices=slices_of(self.scores, self.run.labels),
            editable=EDITED,
            version=self.number or self.earlier + 1,
            prompts=prompts,
            jump=self.jump,
            proposal=self.proposal,
        )

    def take_away(self) -> dict[str, Path]:
        """Write what there is to take away into the review's folder; the files by name. Raises BadInput."""
        self._catch_up()
        with self._lock, self.correction.lock if self.correction else nullcontext():
            labels, scores = np.array(self.labels), self.scores
            same = self.correction is None or self.correction.revision == self.seen
            scored = scores.scored if scores and scores.ready and same else None
        series = self.study.original if self.study.original and self.study.original.is_dir() else None
        origin = {"run": self.run.name, "structure": self.run.options.get("structure"), "labels": self.version}
        review = Review(
            case=self.study.name,
            labels=labels,
            organs=self.run.labels,
            grid=self.study.case.grid,
            spacing=self.spacing,
            image=self.image,
            reference=self.reference,
            series=series,
            origin=origin,
            scored=scored,
        )
        return export(review, self.folder / "take_away" / self.version.replace(" ", "-"))

    @property
    def number(self) -> int:
        """Of the version on the screen; 0 is the prediction."""
        return 0 if self.correction is None else self.correction.version

    @property
    def version(self) -> str:
        return f"version {self.number}" if self.number else "prediction"

    @property
    def ready(self) -> bool:
        """Whether it is scored as far as it can be; what is on the screen does not wait for that."""
        return self.scores is None or self.scores.ready

    def score(self) -> None:
        """Score it now, and leave the score for the lists; seconds for a large case."""
        if self.scores is not None:
            self.scores.scored  # noqa: B018
            self._keep_score()

    @property
    def scored(self) -> dict[str, OrganScore]:
        """Organ -> its scores by the recommended protocol; {} without a reference."""
        return self._organs()

    def _organs(self, *, settled: bool = False) -> dict[str, OrganScore]:
        """The same, or of those organs alone whose scores need not be waited for."""
        found = Scored([], []) if self.scores is None else self.scores.settled if settled else self.scores.scored
        return {row.score.organ: row.score for row in found.rows if row.score.protocol == RECOMMENDED}

    def _at(self, number: int) -> Correction:
        """The version that a stroke was drawn for, on the screen; begun by its first stroke. Raises BadInput."""
        if self.number != number:
            with Correction.opening:  # another page may be about to begin the same version
                newest = newest_version(self.folder)
                if self.number or number <= newest:  # else the prediction is what was drawn on
                    self.show(number if number <= newest else 0)
                if number == newest + 1:
                    self._begin()
        if self.correction is None or self.number != number:
            raise stale()
        return self.correction

    def _begin(self) -> None:
        """Go on from the prediction to the next version, which has its voxels and its scores."""
        self.correction = Correction.open(self.folder, self._prediction(), self._about(), fresh=True)
        self.labels, self.seen = self.correction.labels, self.correction.revision
        self._serve()

    def _prediction(self) -> np.ndarray:
        return np.load(self.folder / "prediction.npy", mmap_mode="r", allow_pickle=False)

    def _about(self) -> dict[str, object]:
        facts = {"case": self.study.key, "run": self.run.name, "adapter": dict(self.run.facts["adapter_sha256"])}
        return {"labels": list(self.run.labels), **facts}

    def _put(self, correction: Correction | None) -> None:
        with self._lock:
            self._take(correction)
            self.changes += 1
            self.proposal = None

    def _take(self, correction: Correction | None) -> None:
        """Show a version, or the prediction, in the place of what was shown; `score` scores it."""
        with correction.lock if correction else nullcontext():  # else it might count half of another page's edit
            self.correction, self.earlier = correction, newest_version(self.folder)
            self.labels = self._prediction() if correction is None else correction.labels
            self.seen = 0 if correction is None else correction.revision
            self.counts = counted(self.labels, len(self.run.labels))
            if self.reference is not None:
                self.scores = Scores(self.labels, self.reference, self.run.labels, self.spacing, self.study.name)
        self._serve()

    def _serve(self) -> None:
        with suppress(KeyError):  # of a page that was closed meanwhile; what it drew is kept all the same
            serving.replace(self.token, EDITED, self.labels)

    def _catch_up(self) -> None:
        """Show and score what another page of this server has made of the version meanwhile."""
        with self._lock:
            if self.correction is not None and self.correction.revision != self.seen:
                self._take(self.correction)
                self.changes += 1

    def _redrawn(self, step: Callable[..., Edit | None]) -> None:
        with self._lock:
            edit = step(seen=self.seen)
            if edit is None:
                return
            self._changed(edit)
            self.changes += 1
            self.jump = Jump(self.changes, edit.z)

    def _changed(self, edit: Edit) -> None:
        """Note an edit of the version on the screen; one that another page's came before is left to `_catch_up`."""
        if edit.revision != self.seen + 1:
            return
        self.seen = edit.revision
        self.counts[edit.z] = np.bincount(self.labels[edit.z].ravel(), minlength=self.counts.shape[1])
        if self.scores is not None:
            self.scores.changed(edit.z, edit.organs, self.labels)

    def _keep_score(self) -> None:
        """Leave the score beside the version, for the lists; not where it has been changed meanwhile."""
        with self._lock:
            version, scores = self.correction, self.scores
            if version is None or scores is None or not scores.ready:
                return
            with version.lock, suppress(OSError):  # a list without this score loses nothing
                if version.revision == self.seen:
                    keep_score(version.folder, self.study.scored_against, scores.scored.rows)


def open_case(owner: str, workspace: Workspace, study: Study, run: Run, *, corrected: bool = True) -> Opened:
    """Open a case's prediction by a run; raises BadInput where there is none.

    Args:
        owner: of what is served, for `serving.withdraw`.
        corrected: in its newest version, where it has been corrected; else as the run made it.

    Cost: a look at every voxel of both label maps; scores are computed when they are asked for.
    """
    prediction = workspace.voxels(study, run)
    if prediction is None:
        sentence = f"{study.name} has not been segmented by {run.name} yet; do so on the page Cases."
        raise BadInput("no-prediction", sentence)
    if prediction.shape != study.case.shape:
        sentence = f"The label map of {study.name} has another shape than its volume; segment anew."
        raise BadInput("grids-differ", sentence)
    reference = reference_of(study, run)
    image, layers = study.case.image, {EDITED: prediction} | ({} if reference is None else {REFERENCE: reference})
    token = serving.publish(owner, serving.Shown(image, layers))
    opened = Opened(study, run, workspace.review(study, run), image, reference, token)
    opened.show(newest_version(opened.folder) if corrected else 0)
    return opened


def reference_of(study: Study, run: Run) -> np.ndarray | None:
    """The reference, where it numbers its organs as the run does."""
    return study.case.label if study.labels == run.labels else None
