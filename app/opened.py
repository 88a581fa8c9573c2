"""A case on a session's screen: its arrays, the version that is being corrected, its scores, and its scene."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from threading import RLock

import numpy as np

from app import rle, segmenting, serving
from app.corrections import Correction, Edit, versions
from app.rescore import Scores
from app.take_away import Review, export
from app.viewer import Jump, Layer, Organ, Proposal, Scene, SliceScore, events
from app.workspace import Run, Study, Workspace
from surm_seg.errors import BadInput, SurmError
from surm_seg.metrics import RECOMMENDED, OrganScore
from surm_seg.pictures import colour

EDITED, REFERENCE = "prediction", "reference"
"""Names of the served layers."""


@dataclass(eq=False)
class Opened:
    """A prediction under review; made by `open_case`.

    Args:
        folder: of its versions.
        labels: what is on the screen, uint8 (z, y, x): the prediction, or the version that is being corrected.
        reference: the same of the reference; None where there is none of these organs.
        counts: voxels per slice and label value.
        correction: None before the first edit.
        seen: revision of the correction that the browser shows; another page may be ahead of it.
        changes: of the labels by anything but the browser's own strokes.
        answers: to prompts, so far.
    """

    study: Study
    run: Run
    folder: Path
    image: np.ndarray
    labels: np.ndarray
    reference: np.ndarray | None
    counts: np.ndarray
    token: str
    correction: Correction | None = None
    scores: Scores | None = None
    seen: int = 0
    changes: int = 0
    proposal: Proposal | None = None
    jump: Jump | None = None
    answers: int = 0
    _lock: RLock = field(default_factory=RLock)

    @property
    def spacing(self) -> tuple[float, float, float] | None:
        return self.study.case.spacing

    def edited(self, z: int, labels: np.ndarray) -> None:
        """Keep a slice as the browser drew it, and score it; the first edit begins a version.

        Raises what `Correction.apply` does; the browser then fetches the labels that are kept.
        """
        try:
            with self._lock:
                if self.correction is None:
                    self._begin()
                    self.seen = 0  # what was drawn on is the prediction, whatever another page has made of it
                assert self.correction is not None
                edit = self.correction.apply(z, labels, seen=self.seen)
                self.seen = edit.revision
        except SurmError:
            self.changes += 1
            raise
        self._changed(edit)
        self.proposal = None

    def undo(self) -> None:
        """Take the last edit back, also one of an earlier visit; raises where another page has edited since."""
        if self.correction is not None:
            self._redrawn(self.correction.undo)

    def redo(self) -> None:
        if self.correction is not None:
            self._redrawn(self.correction.redo)

    def begin_anew(self) -> None:
        """Begin the next version from the prediction; the last one stays as it is."""
        base = self._prediction()
        self._take(Correction.open(self.folder, base, self._about(), fresh=True))
        self.changes += 1

    def asked(self, prompt: events.Prompt) -> None:
        """Answer a prompt with a proposal; raises what `Resident.prompt` does."""
        mask = segmenting.resident(self.run).prompt(self.image, prompt.z, prompt.points, prompt.box)
        self.answers += 1
        self.proposal = Proposal(self.answers, prompt.z, prompt.value, rle.encode(mask.astype(np.uint8)))

    def scene(self, *, prompts: bool) -> Scene:
        """What the viewer draws."""
        self._catch_up()
        layers = {EDITED: Layer("Prediction" if self.correction is None else self.version, self.changes)}
        if self.reference is not None:
            layers[REFERENCE] = Layer("Reference")
        return Scene(
            token=self.token,
            case=self.study.name,
            shape=self.study.case.shape,
            spacing=self.spacing,
            organs=organs_of(self.run.labels, self.counts.sum(0), self.spacing, self.scored),
            layers=layers,
            slices=slices_of(self.scores, self.run.labels),
            editable=EDITED,
            prompts=prompts,
            jump=self.jump,
            proposal=self.proposal,
        )

    def take_away(self) -> dict[str, Path]:
        """Write what there is to take away into the review's folder; the files by name. Raises BadInput."""
        self._catch_up()
        series = self.study.original if self.study.original and self.study.original.is_dir() else None
        origin = {"run": self.run.name, "structure": self.run.options.get("structure"), "labels": self.version}
        review = Review(
            case=self.study.name,
            labels=self.labels,
            organs=self.run.labels,
            grid=self.study.case.grid,
            spacing=self.spacing,
            image=self.image,
            reference=self.reference,
            series=series,
            origin=origin,
            scored=self.scores.scored if self.scores else None,
        )
        return export(review, self.folder / "take_away" / self.version.replace(" ", "-"))

    @property
    def version(self) -> str:
        return "prediction" if self.correction is None else f"version {self.correction.version}"

    @property
    def scored(self) -> dict[str, OrganScore]:
        """Organ -> its scores by the recommended protocol; {} without a reference."""
        rows = self.scores.scored.rows if self.scores else ()
        return {row.score.organ: row.score for row in rows if row.score.protocol == RECOMMENDED}

    def _begin(self) -> None:
        if self.correction is None:
            self._take(Correction.open(self.folder, self._prediction(), self._about()))

    def _prediction(self) -> np.ndarray:
        return np.load(self.folder / "prediction.npy", mmap_mode="r", allow_pickle=False)

    def _about(self) -> dict[str, object]:
        facts = {"case": self.study.key, "run": self.run.name, "adapter": dict(self.run.facts["adapter_sha256"])}
        return {"labels": list(self.run.labels), **facts}

    def _take(self, correction: Correction) -> None:
        """Show and score a version in the place of what was shown."""
        self.correction, self.labels, self.seen = correction, correction.labels, correction.revision
        self.counts = counted(self.labels, len(self.run.labels))
        serving.replace(self.token, EDITED, self.labels)
        if self.reference is not None:
            self.scores = Scores(self.labels, self.reference, self.run.labels, self.spacing, self.study.name)

    def _catch_up(self) -> None:
        """Show and score what another page of this server has made of the version meanwhile."""
        with self._lock:
            if self.correction is not None and self.correction.revision != self.seen:
                self._take(self.correction)
                self.changes += 1

    def _redrawn(self, step: Callable[..., Edit | None]) -> None:
        with self._lock:
            edit = step(seen=self.seen)
            self.seen = edit.revision if edit else self.seen
        if edit is not None:
            self._changed(edit)
            self.changes += 1
            self.jump = Jump(self.changes, edit.z)

    def _changed(self, edit: Edit) -> None:
        self.counts[edit.z] = np.bincount(self.labels[edit.z].ravel(), minlength=self.counts.shape[1])
        if self.scores is not None and edit.organs:
            self.scores.update([edit.z], edit.organs)


def open_case(owner: str, workspace: Workspace, study: Study, run: Run, *, corrected: bool = True) -> Opened:
    """Open a case's prediction by a run; raises BadInput where there is none.

    Args:
        owner: of what is served, for `serving.withdraw`.
        corrected: in its newest version, where it has been corrected; else as the run made it.

    Cost: scoring the case once, seconds for a large one; nothing else reads whole volumes.
    """
    prediction = workspace.voxels(study, run)
    if prediction is None:
        sentence = f"{study.name} has not been segmented by {run.name} yet; do so on the page Cases."
        raise BadInput("no-prediction", sentence)
    if prediction.shape != study.case.shape:
        raise BadInput(
            "grids-differ", f"The label map of {study.name} has another shape than its volume; segment anew."
        )
    reference = reference_of(study, run)
    layers = {EDITED: prediction} | ({} if reference is None else {REFERENCE: reference})
    image = study.case.image
    token = serving.publish(owner, serving.Shown(image, layers))
    folder, counts = workspace.review(study, run), counted(prediction, len(run.labels))
    opened = Opened(study, run, folder, image, prediction, reference, counts, token)
    if corrected and versions(folder):
        opened._begin()
    elif reference is not None:
        opened.scores = Scores(prediction, reference, run.labels, study.case.spacing, study.name)
    return opened


def reference_of(study: Study, run: Run) -> np.ndarray | None:
    """The reference, where it numbers its organs as the run does."""
    return study.case.label if study.labels == run.labels else None


def counted(labels: np.ndarray, organs: int) -> np.ndarray:
    """Voxels per slice and label value, background first."""
    return np.stack([np.bincount(plane.ravel(), minlength=organs + 1)[: organs + 1] for plane in labels])


def organs_of(
    names: Sequence[str],
    voxels: np.ndarray,
    spacing: Sequence[float] | None,
    scored: Mapping[str, OrganScore],
) -> list[Organ]:
    """The organ table: volumes in mL where the spacing is known, scores where there is a reference."""
    found = []
    for value, name in enumerate(names, 1):
        score = scored.get(name)
        flag = "" if score is None else _flag(score)
        found.append(
            Organ(
                value,
                name.replace("_", " "),
                "#{:02x}{:02x}{:02x}".format(*colour(value)),
                None if spacing is None else float(voxels[value] * np.prod(spacing) / 1000),
                None if score is None else score.dice,
                None if score is None else score.hd95_mm,
                flag,
            )
        )
    return found


def _flag(score: OrganScore) -> str:
    if score.missed:
        return "missed"
    return "not in the reference" if score.absent and not score.prediction_empty else ""


def slices_of(scores: Scores | None, names: Sequence[str]) -> list[SliceScore]:
    """The strip under the picture: every slice with its organs' Dice and the area of error."""
    if scores is None:
        return []
    values = {name: value for value, name in enumerate(names, 1)}
    found: dict[int, dict[int, float | None]] = {}
    for row in scores.scored.slices:
        found.setdefault(row.z, {})[values[row.organ]] = row.dice
    return [SliceScore(z, found.get(z) or None, float(area)) for z, area in enumerate(scores.error_mm2)]
