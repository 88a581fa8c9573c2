"""The scores of a case while it is corrected: after an edit only what it touched is computed anew."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from threading import Lock

import numpy as np
from scipy.ndimage import find_objects

from surm_seg.metrics import PROTOCOLS, joint_box, score
from surm_seg.report import Row
from surm_seg.scored import Scored, score_case
from surm_seg.slices import slice_rows

_NOTHING: tuple[frozenset[int], frozenset[int]] = (frozenset(), frozenset())


class Scores:
    """What a label map scores against its reference under both protocols; always what `score_case` would say.

    Threads may change the labels and ask for scores at once: what is told last is always what the labels are.

    Args:
        labels: uint8, axes (z, y, x); organ `organs[k]` is k + 1. Kept as it is, and read again after every edit.
        reference: the same for the reference.
        spacing: mm along (z, y, x), None when unknown.
        known: what scoring these label maps came to, where that has been done; else that is done when first asked for.
    """

    def __init__(
        self,
        labels: np.ndarray,
        reference: np.ndarray,
        organs: Sequence[str],
        spacing: Sequence[float] | None,
        case: str,
        known: Scored | None = None,
    ) -> None:
        self.labels, self.reference, self.organs, self.spacing, self.case = labels, reference, organs, spacing, case
        self._known, self._scoring, self._noting = known, Lock(), Lock()
        self._stale: tuple[frozenset[int], frozenset[int]] = _NOTHING  # slices and organs that were edited since
        self._boxes: dict[int, tuple[slice, ...]] = {}  # label value -> what holds it on both sides; never shrinks
        for labelled in (labels, reference):
            self._look(labelled)
        self._wrong = np.array([np.count_nonzero(p != r) for p, r in zip(labels, reference, strict=True)])

    def changed(self, z: int, organs: Iterable[int], labels: np.ndarray | None = None) -> None:
        """Note an edit, which is in the label map already; it is scored when scores are next asked for.

        Args:
            organs: the label values that some voxel lost or gained.
            labels: the label map that is edited from now on, of the same voxels but for this edit.
        """
        with self._noting:
            self.labels = self.labels if labels is None else labels
            self._stale = self._stale[0] | {z}, self._stale[1] | {*organs}
            self._wrong[z] = np.count_nonzero(self.labels[z] != self.reference[z])

    @property
    def ready(self) -> bool:
        """Whether `scored` is known already."""
        with self._noting:
            return self._known is not None and self._stale is _NOTHING

    @property
    def scored(self) -> Scored:
        """All scores of the labels as they stand; what is not known yet is computed.

        Cost: the first time a pass over the case, then one over the box around each edited organ, and its surfaces'
        distances.
        """
        with self._scoring:
            while not self.ready:
                with self._noting:
                    stale, labels = self._stale, self.labels
                known = self._again(labels, *stale)
                with self._noting:
                    self._known = known
                    if self._stale is stale:  # else an edit may have been read half: the loop reads it whole
                        self._stale = _NOTHING
            assert self._known is not None
            return self._known

    @property
    def settled(self) -> Scored:
        """Without waiting, the scores that are known: of the organs and slices that no edit has touched since."""
        with self._noting:
            if self._known is None:
                return Scored([], [])
            zs, changed = self._stale[0], {self.organs[value - 1] for value in self._stale[1]}
            rows = [row for row in self._known.rows if row.score.organ not in changed]
            return Scored(rows, [row for row in self._known.slices if row.z not in zs])

    @property
    def error_mm2(self) -> np.ndarray:
        """Per axial slice, the area on which the two disagree; in pixels where the spacing is unknown."""
        return self._wrong * (1.0 if self.spacing is None else float(self.spacing[1] * self.spacing[2]))

    @property
    def worst(self) -> int:
        """The slice with the greatest error area, the lowest of several."""
        return int(self._wrong.argmax())

    def _again(self, labels: np.ndarray, zs: Iterable[int], organs: Iterable[int]) -> Scored:
        """All scores, of which those of these slices and organs are computed; all where none is known."""
        for z in zs:
            self._look(labels[z : z + 1], z)
        if self._known is None:
            return score_case(labels, self.reference, self.organs, self.spacing, self.case)
        rows, slices = self._known.rows, self._known.slices
        fresh = {key: row for value in organs for key, row in self._rows(labels, value, rows[0].data_hash)}
        for z in zs:
            found = slice_rows(labels[z : z + 1], self.reference[z : z + 1], self.organs, self.spacing, self.case)
            slices = [row for row in slices if row.z != z] + [replace(row, z=z) for row in found]
        order = {organ: place for place, organ in enumerate(self.organs)}
        kept = [fresh.get((row.score.organ, row.score.protocol), row) for row in rows]
        return Scored(kept, sorted(slices, key=lambda row: (order[row.organ], row.z)))

    def _look(self, labels: np.ndarray, lowest: int = 0) -> None:
        """Widen the boxes to what these slices hold; the first of them is slice `lowest`."""
        for value, found in enumerate(find_objects(labels, len(self.organs)), 1):
            if found is not None:
                box = slice(found[0].start + lowest, found[0].stop + lowest), *found[1:]
                self._boxes[value] = joint_box([self._boxes.get(value), box])

    def _rows(self, labels: np.ndarray, value: int, data_hash: str) -> list[tuple[tuple[str, str], Row]]:
        """(organ, protocol) -> row, of one organ alone."""
        organ, box = self.organs[value - 1], self._boxes.get(value, ...)
        if not (labels[box] == value).any():
            box = ...  # the HD95 of an organ that was missed is the diagonal of the whole image
        masks = [(labelled[box] == value).view(np.uint8) for labelled in (labels, self.reference)]
        scores = score(masks[0], masks[1], [organ], self.spacing, tuple(PROTOCOLS))
        return [((organ, one.protocol), Row(self.case, one, data_hash)) for one in scores]
