"""What is on disk: runs, prepared cases, predictions and their scores.

    WORKSPACE/runs/R          runs of `surm-seg train`, finished or not
             /data/D          prepared data sets
             /predictions/P   label maps of `surm-seg predict`
             /reviews/CASE/R  the app's own: predictions made here, their scores, corrected versions, exports
             /uploads/*       volumes that were uploaded, under random names, deleted minutes after their page is closed
             /jobs/*          records of what the app started

A folder that is still being written, or is damaged, is named with the reason and hides nothing else.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import yaml

from app.corrections import versions
from app.scores import Score, kept_score, scores_in
from surm_seg import domain
from surm_seg.cases import Case, Dataset, is_prepared
from surm_seg.errors import SurmError
from surm_seg.volume import file_digest, read_labels, replacing, volumes_in

DEMO = "demo"
DEPTH = 4
"""Levels of folders that are searched for label maps."""

_unpacking = Lock()


@dataclass(frozen=True)
class Run:
    """A folder below runs/.

    Args:
        facts: run.json, {} where it is not there yet.
        options: config.yaml, likewise.
        problem: why it cannot be used, empty where it can.
    """

    name: str
    folder: Path
    facts: Mapping[str, Any]
    options: Mapping[str, Any]
    problem: str = ""

    @property
    def labels(self) -> tuple[str, ...]:
        """Organ names; label value = position + 1."""
        return tuple(map(str, self.facts.get("labels", ())))

    @property
    def identity(self) -> str:
        """Name of the folders of what this run predicted; another one once it is trained anew."""
        weights = self.facts.get("adapter_sha256", {}).get("adapter_model.safetensors") or "unfinished"
        return f"{self.name.replace('/', '.')}-{weights[:8]}"

    @property
    def described(self) -> str:
        """Structure and backbone, for menus."""
        return f"{self.options.get('structure', '?')} on {self.options.get('backbone', '?')}"


@dataclass(frozen=True)
class Study:
    """A volume that can be looked at.

    Args:
        key: begins the name of its folder below reviews/ and stands in links; says nothing about the patient.
        source: name of the data set, or "upload".
        labels: organs of its reference; () without one.
        data: digest of the data set, as runs name it.
        original: what was uploaded, a file or the folder of a DICOM series; None for a prepared case.
        modality: CT, MR, ... as a DICOM series states it.
    """

    key: str
    case: Case
    source: str
    labels: tuple[str, ...] = ()
    data: str = ""
    original: Path | None = None
    modality: str | None = None

    @property
    def name(self) -> str:
        return self.case.id

    @property
    def scored_against(self) -> list[Any]:
        """What decides, beside a label map, what it scores; plain JSON values."""
        return [self.case.label_sha256, list(self.labels), self.case.spacing]


@dataclass(frozen=True)
class Workspace:
    """The folder that the app works in, read anew at every question."""

    folder: Path = Path()

    def runs(self) -> list[Run]:
        """All runs, usable ones first, the demo before them and then the newest."""
        found = [_run(folder, name) for name, folder in self._run_folders()]
        changed = {run.name: max(map(_changed, run.folder.glob("*.json*")), default=0) for run in found}
        return sorted(found, key=lambda run: (bool(run.problem), run.name != DEMO, -changed[run.name], run.name))

    def run(self, name: str) -> Run | None:
        return next((run for run in self.runs() if run.name == name), None)

    def datasets(self) -> tuple[list[Dataset], list[str]]:
        """The prepared data sets, and a sentence about each that cannot be opened."""
        found, broken = [], []
        for folder in sorted(_folders(self.folder / "data")):
            if is_prepared(folder):
                try:
                    found.append(Dataset.open(folder))
                except SurmError as error:
                    broken.append(f"{folder.name}: {error} [{error.code}]")
        return found, broken

    def studies(self) -> list[Study]:
        """The prepared cases of all data sets."""
        return [
            Study(f"{dataset.folder.name}.{case.id}", case, dataset.folder.name, dataset.labels, dataset.digest)
            for dataset in self.datasets()[0]
            for case in dataset.cases
        ]

    def review(self, study: Study, run: Run) -> Path:
        """The folder of what was made here of a case with a run; another one once the case has other voxels."""
        return self.folder / "reviews" / f"{study.key}-{study.case.image_sha256[:8]}" / run.identity

    def scored(self, study: Study, run: Run) -> Path:
        """The folder of what the prediction scores against the case's reference; another one for another reference."""
        return self.review(study, run) / f"scores-{(study.case.label_sha256 or 'none')[:8]}"

    def prediction(self, study: Study, run: Run) -> Path | None:
        """The label map of a case by a run: made here, at the end of the training, or by `predict`; maybe none."""
        own = self.review(study, run) / "prediction.npy"
        if _whole(own):
            return own
        ours = run.folder / "predictions" / f"{study.name}.nii.gz"
        if study.data and study.data == run.facts.get("data_sha256") and ours.exists():
            return ours
        return self._predicted(study.case.inputs.get("image"), run)

    def voxels(self, study: Study, run: Run) -> np.ndarray | None:
        """The prediction as uint8 (z, y, x), a memory map; None where there is none.

        A NIfTI label map is unpacked into the review's folder on first use.
        """
        with _unpacking:  # two pages that ask at once would write into one file
            found = self.prediction(study, run)
            if found is None:
                return None
            if found.suffix != ".npy":
                volume = read_labels(found)
                found = store(self.review(study, run), volume.lps().astype(np.uint8))
        return np.load(found, mmap_mode="r", allow_pickle=False)

    def scores(self, run: Run, studies: Sequence[Study], *, corrected: bool = False) -> dict[str, Score]:
        """Study key -> score, of the cases that were scored here, and those at the end of the training.

        Args:
            corrected: of the newest version, where a case has been corrected; else of the prediction.
        """
        found: dict[str, Score] = {}
        at_the_end = scores_in(run.folder / "scores" / "cases.csv")
        for study in studies:
            made = versions(self.review(study, run)) if corrected else []
            if made:
                found[study.key] = kept_score(made[-1], study.scored_against)
                continue
            score = scores_in(self.scored(study, run) / "cases.csv").get(study.name)
            if score is None and study.data == run.facts.get("data_sha256"):
                score = at_the_end.get(study.name)
            if score is not None:
                found[study.key] = score
        return found

    def label_folders(self) -> list[Path]:
        """Folders that hold label maps or volumes, for the batch evaluation, relative to the workspace."""
        tops = [self.folder / name for name in ("predictions", "runs", "data")]
        tops += [path for path in _folders(self.folder) if path.name not in _OURS and path not in tops]
        found = {path for top in tops for path in _below(top, DEPTH) if any(path.glob("*.nii*"))}
        return sorted(path.relative_to(self.folder) for path in found)

    def _run_folders(self) -> Iterator[tuple[str, Path]]:
        for folder in _folders(self.folder / "runs"):
            seeds = sorted(folder.glob("seed-*"))
            if seeds:
                yield from ((f"{folder.name}/{seed.name}", seed) for seed in seeds)
            else:
                yield folder.name, folder

    def _predicted(self, content: str | None, run: Run) -> Path | None:
        """A label map of `predict` for an input of this digest; manifests name neither, so digests are compared."""
        for manifest in (self.folder / "predictions").glob("*/manifest.json"):
            adapter, outputs = _predictions(manifest, _changed(manifest))
            if content not in outputs or adapter != run.facts.get("adapter_sha256"):
                continue
            for path in volumes_in(manifest.parent):
                if path.is_file() and _digest(path, _changed(path)) == outputs[content]:
                    return path
        return None


def store(folder: Path, labels: np.ndarray) -> Path:
    """Write a prediction, uint8 (z, y, x), where `Workspace.voxels` finds it; atomic."""
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / "prediction.npy") as file:
        np.save(file, labels)
    return folder / "prediction.npy"


def unlike(study: Study, run: Run) -> list[str]:
    """Sentences on what sets a case apart from those the run was trained on."""
    facts = replace(domain.facts_of_case(study.case), modality=study.modality)
    return domain.differences(facts, run.facts.get("fingerprint", {}))


def _whole(array: Path) -> bool:
    """Whether an array is there with all its bytes; one that was cut by a full disk or a copy is as none."""
    try:
        np.load(array, mmap_mode="r", allow_pickle=False)
        return True
    except (OSError, ValueError, EOFError):
        return False


_OURS = {"reviews", "uploads", "jobs", "reports"}


def _run(folder: Path, name: str) -> Run:
    try:
        facts = json.loads((folder / "run.json").read_bytes())
        options = yaml.safe_load((folder / "config.yaml").read_text())
        if not isinstance(facts, dict) or not isinstance(options, dict):
            raise ValueError("no records")
    except FileNotFoundError:
        return Run(name, folder, {}, {}, "is still being set up, or is no run")
    except (OSError, ValueError, yaml.YAMLError):
        return Run(name, folder, {}, {}, "has damaged records; restore them, or train again")
    if not isinstance(facts.get("adapter_sha256"), dict):
        return Run(name, folder, facts, options, "is not finished; let its training end, or resume it")
    return Run(name, folder, facts, options)


def _folders(place: Path) -> list[Path]:
    if not place.is_dir():
        return []
    return [path for path in place.iterdir() if path.is_dir() and not path.name.startswith(".")]


def _below(place: Path, levels: int) -> Iterator[Path]:
    if place.is_dir():
        yield place
        for path in _folders(place) if levels else ():
            yield from _below(path, levels - 1)


def _changed(path: Path) -> int:
    """When a file was changed, in nanoseconds; 0 where it is gone, as the files of who is writing may be."""
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


@lru_cache(maxsize=256)
def _predictions(manifest: Path, changed: int) -> tuple[Any, dict[str, str]]:
    """Of a manifest of `predict`, the digests of the adapter, and input -> output of the cases that were segmented."""
    try:
        record = json.loads(manifest.read_bytes())
        cases = [case for case in record["cases"] if "error" not in case]
        return record["run"]["adapter_sha256"], {case["input"]: case["output"] for case in cases}
    except (OSError, ValueError, KeyError, TypeError):
        return None, {}


@lru_cache(maxsize=4096)
def _digest(path: Path, changed: int) -> str:
    return file_digest(path)
