"""The prepared data set on disk: one folder per case with memory-mapped arrays, and a manifest written last.

    DATASET/dataset.json        labels, splits, digests, what the training cases look like
    DATASET/sheet.png           one slice of every case with its organs outlined, to be looked at
    DATASET/case_key.json       case id -> the user's own file names; private (mode 0600)
    DATASET/cases/ID/image.npy  int16 HU, axes (z, y, x) growing to Superior, Posterior, Left
    DATASET/cases/ID/label.npy  uint8, same axes; organ k of `labels` is k + 1; absent when unlabelled
    DATASET/cases/ID/case.json  the case's part of the manifest, so that preparing can be resumed

A case folder appears by one rename and dataset.json after all of them: what can be seen is complete. A case that would
replace another waits beside it as cases/.ID.new until the new manifest is there to be put in place, so that preparing
again and failing leaves the old data set as it was.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from surm_seg.errors import BadConfig, BadInput, Corrupt
from surm_seg.volume import Grid, file_digest

SCHEMA = "surm-seg/dataset-1"
PROTOCOL = 1  # raised when the same input would be prepared to other voxels
SPLITS = ("train", "val", "test")
CASE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True)
class Case:
    """One prepared volume.

    Args:
        id: safe to print and log; says nothing about the patient.
        split: train, val or test.
        folder: holds image.npy and label.npy.
        grid: of the source image, to write results back on it.
        spacing: mm along (z, y, x); None where the source does not know, whatever its grid says.
        inputs: SHA-256 of what the case was made from, by role.
        hu: min, p1, p99 and max of the image.
        histogram: voxels per organ; None when unlabelled.
    """

    id: str
    split: str
    folder: Path
    grid: Grid
    spacing: tuple[float, float, float] | None
    inputs: Mapping[str, str]
    image_sha256: str
    label_sha256: str | None
    hu: Mapping[str, int]
    histogram: Mapping[str, int] | None

    @property
    def shape(self) -> tuple[int, int, int]:
        """Voxels along (z, y, x)."""
        return self.grid.lps_shape

    @property
    def image(self) -> np.ndarray:
        """int16 HU, axes (z, y, x), memory-mapped read-only; raises Corrupt."""
        return self._array("image.npy", np.dtype(np.int16))

    @property
    def label(self) -> np.ndarray | None:
        """uint8, axes (z, y, x), memory-mapped read-only; None when unlabelled. Raises Corrupt."""
        return None if self.label_sha256 is None else self._array("label.npy", np.dtype(np.uint8))

    def verify(self) -> None:
        """Read the arrays and compare their digests; raises Corrupt naming the case."""
        for name, digest in (("image.npy", self.image_sha256), ("label.npy", self.label_sha256)):
            try:
                if digest is not None and file_digest(self.folder / name) != digest:
                    raise self._damaged(name)
            except OSError as error:
                raise self._damaged(name) from error

    def _array(self, name: str, dtype: np.dtype) -> np.ndarray:
        try:
            array = np.load(self.folder / name, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise self._damaged(name) from error
        if array.shape != self.shape or array.dtype != dtype:
            raise self._damaged(name)
        return array

    def _damaged(self, name: str) -> Corrupt:
        dataset = self.folder.parent.parent
        return Corrupt("array", f"{name} of case {self.id} in {dataset} is damaged; prepare the data set again.")


@dataclass(frozen=True)
class Dataset:
    """A prepared data set.

    Args:
        labels: organ names; label value = position + 1.
        format: layout of the source it was prepared from.
        fingerprint: [low, high] over the training cases of what a new volume can be compared with.
        digest: SHA-256 of dataset.json, which holds the digests of all arrays.
    """

    folder: Path
    labels: tuple[str, ...]
    format: str
    cases: tuple[Case, ...]
    fingerprint: Mapping[str, Any]
    digest: str

    @classmethod
    def open(cls, folder: str | Path) -> Dataset:
        """Read the manifest; raises BadInput where there is none of this schema, Corrupt for a malformed one."""
        folder = Path(folder)
        try:
            text = (folder / "dataset.json").read_bytes()
        except OSError as error:
            sentence = f"{folder} holds no prepared data set; run: surm-seg prepare SOURCE --output {folder}"
            raise BadInput("no-dataset", sentence) from error
        try:
            data = json.loads(text)
            if (data["schema"], data["protocol"]) != (SCHEMA, PROTOCOL):
                sentence = f"{folder} was prepared by another version of surm-seg; prepare it again."
                raise BadInput("dataset-schema", sentence)
            cases = tuple(case_of(folder, record) for record in data["cases"])
            labels, source = tuple(map(str, data["labels"])), str(data["format"])
            fingerprint = dict(data["fingerprint"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise Corrupt("dataset-manifest", f"{folder / 'dataset.json'} is malformed; prepare it again.") from error
        return cls(folder, labels, source, cases, fingerprint, hashlib.sha256(text).hexdigest())

    def split(self, name: str) -> tuple[Case, ...]:
        """The cases of train, val or test; maybe none."""
        if name not in SPLITS:
            raise BadConfig("split", f"There is no split {name!r}; choose one of {', '.join(SPLITS)}.")
        return tuple(case for case in self.cases if case.split == name)

    def case(self, case_id: str) -> Case:
        for case in self.cases:
            if case.id == case_id:
                return case
        known = ", ".join(case.id for case in self.cases[:4])
        raise BadInput(
            "no-case", f"{self.folder} has no case {case_id!r}; it has {known}, ... ({len(self.cases)} cases)."
        )

    def verify(self) -> None:
        """Recompute the digest of every array; raises Corrupt naming the first damaged case."""
        for case in self.cases:
            case.verify()


def is_prepared(folder: Path) -> bool:
    """Whether the dataset.json of a folder is ours, of whatever version; nnU-Net data has one of its own."""
    try:
        return str(json.loads((folder / "dataset.json").read_bytes())["schema"]).startswith("surm-seg/")
    except (OSError, ValueError, KeyError, TypeError):
        return False


def case_of(dataset: Path, record: Mapping[str, Any]) -> Case:
    """A manifest entry as a case under this data set; raises ValueError, KeyError or TypeError when it is none."""
    if not CASE_ID.fullmatch(record["id"]) or record["split"] not in SPLITS:
        raise ValueError("not a case")
    stored: dict[str, Any] = {field.name: record[field.name] for field in fields(Case) if field.name != "folder"}
    spacing = None if record["spacing"] is None else tuple(map(float, record["spacing"]))
    stored |= {"folder": dataset / "cases" / record["id"], "spacing": spacing}
    stored["grid"] = Grid.from_json(record["grid"])
    return Case(**stored)
