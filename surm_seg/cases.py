"""The prepared data set on disk: one folder per case with memory-mapped arrays, and a manifest written last.

    DATASET/dataset.json        labels, splits, digests, what the training cases look like
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
import os
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from surm_seg.errors import BadConfig, BadInput, Corrupt
from surm_seg.fingerprint import hu_summary, label_histogram, over_cases
from surm_seg.volume import Grid, Volume, replacing, sync_folder

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
        inputs: SHA-256 of what the case was made from, by role.
        hu: min, p1, p99 and max of the image.
        histogram: voxels per organ; None when unlabelled.
    """

    id: str
    split: str
    folder: Path
    grid: Grid
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
    def spacing(self) -> tuple[float, float, float]:
        """mm along (z, y, x)."""
        return self.grid.lps_spacing

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
            cases = tuple(_case(folder, record) for record in data["cases"])
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


def write_case(
    dataset: Path,
    case_id: str,
    image: Volume,
    label: np.ndarray | None,
    labels: Sequence[str],
    inputs: Mapping[str, str],
) -> None:
    """Store one case under `dataset`; atomic. An older one of that id stays in use until `write_dataset`.

    Args:
        image: int16 HU.
        label: uint8 on the image's grid, axes (i, j, k), values up to len(labels); None when unlabelled.
        inputs: SHA-256 of everything the arrays depend on, by role.
    """
    assert CASE_ID.fullmatch(case_id) and image.voxels.dtype == np.int16
    final, building = dataset / "cases" / case_id, dataset / "cases" / f".{case_id}.part"
    if final.exists():
        final = _waiting(dataset, case_id)
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    try:
        view = image.lps()
        record: dict[str, Any] = {
            "id": case_id,
            "shape": list(view.shape),
            "spacing": list(image.grid.lps_spacing),
            "axcodes": "".join(image.grid.axcodes),
            "grid": image.grid.to_json(),
            "inputs": dict(inputs),
            "image_sha256": _save(building / "image.npy", view),
            "label_sha256": None,
            "hu": hu_summary(view),
            "histogram": None,
        }
        if label is not None:
            assert label.dtype == np.uint8 and label.shape == image.voxels.shape
            view = image.grid.lps(label)
            record["label_sha256"] = _save(building / "label.npy", view)
            record["histogram"] = label_histogram(view, labels)
        with replacing(building / "case.json") as file:
            _write_json(file, record)
        if final.exists():
            shutil.rmtree(final)
        os.rename(building, final)
        sync_folder(final.parent)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise


def finished(dataset: Path, case_id: str, inputs: Mapping[str, str]) -> bool:
    """Whether this case is there, made from these inputs, and intact; costs one read of its arrays.

    A case that waits to replace it is looked at too, and removed where the one in place will do.
    """
    waiting = _waiting(dataset, case_id)
    if _intact(dataset / "cases" / case_id, dataset, case_id, inputs):
        shutil.rmtree(waiting, ignore_errors=True)
        return True
    return _intact(waiting, dataset, case_id, inputs)


def write_dataset(
    dataset: Path, format: str, labels: Sequence[str], splits: Mapping[str, str], key: Mapping[str, Any] | None = None
) -> Dataset:
    """Make the written cases a data set: replaced cases, case_key.json, then dataset.json.

    What needs room on the disk is written first: an older data set survives until nothing but renames is left, and is
    then without a manifest for as long as they take.

    Args:
        splits: case id -> train, val or test; the order is kept.
        key: case id -> the source's own names, for the private file; None keeps none.
    """
    records = []
    for case_id, split in splits.items():
        assert split in SPLITS
        waiting = _waiting(dataset, case_id) / "case.json"
        path = waiting if waiting.exists() else dataset / "cases" / case_id / "case.json"
        records.append({"id": case_id, "split": split, **json.loads(path.read_bytes())})
    manifest = {
        "schema": SCHEMA,
        "protocol": PROTOCOL,
        "format": format,
        "labels": list(labels),
        "fingerprint": over_cases([record for record in records if record["split"] == "train"]),
        "cases": records,
    }
    with ExitStack() as files:  # closed last to first: the manifest is the last to appear
        _write_json(files.enter_context(replacing(dataset / "dataset.json")), manifest)
        if key is not None:
            _write_json(files.enter_context(replacing(dataset / "case_key.json", 0o600)), dict(key))
        _put_in_place(dataset, splits)
    return Dataset.open(dataset)


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _case(dataset: Path, record: Mapping[str, Any]) -> Case:
    """A manifest entry as a Case; raises ValueError, KeyError or TypeError when it is none."""
    if not CASE_ID.fullmatch(record["id"]) or record["split"] not in SPLITS:
        raise ValueError("not a case")
    stored = {field.name: record[field.name] for field in fields(Case) if field.name != "folder"}
    stored |= {"folder": dataset / "cases" / record["id"], "grid": Grid.from_json(record["grid"])}
    return Case(**stored)


def _waiting(dataset: Path, case_id: str) -> Path:
    """Where a case waits that will replace the one in place."""
    return dataset / "cases" / f".{case_id}.new"


def _put_in_place(dataset: Path, case_ids: Iterable[str]) -> None:
    """Replace cases by those that wait for it; one that waits in vain, for a case no longer asked for, is removed."""
    waiting = {_waiting(dataset, case_id): dataset / "cases" / case_id for case_id in case_ids}
    for new in (dataset / "cases").glob(".*.new"):
        if new in waiting:
            # The manifest that names the old arrays must not survive them.
            (dataset / "dataset.json").unlink(missing_ok=True)
            shutil.rmtree(waiting[new], ignore_errors=True)
            os.rename(new, waiting[new])
        else:
            shutil.rmtree(new)
    sync_folder(dataset / "cases")


def _intact(folder: Path, dataset: Path, case_id: str, inputs: Mapping[str, str]) -> bool:
    try:
        record = json.loads((folder / "case.json").read_bytes())
        case = replace(_case(dataset, record | {"split": "train"}), folder=folder)
        case.verify()
    except (OSError, ValueError, KeyError, TypeError, AttributeError, Corrupt):
        return False
    return case.id == case_id and dict(case.inputs) == dict(inputs)


def _save(path: Path, view: np.ndarray) -> str:
    """Write a (z, y, x) view as C-ordered .npy, one slice at a time, and return the file's SHA-256."""
    digest = hashlib.sha256()
    header = {"descr": np.lib.format.dtype_to_descr(view.dtype), "fortran_order": False, "shape": view.shape}
    with open(path, "w+b") as file:
        np.lib.format.write_array_header_1_0(file, header)
        file.seek(0)
        digest.update(file.read())
        for plane in view:
            data = np.ascontiguousarray(plane).data
            digest.update(data)
            file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def _write_json(file: BinaryIO, data: Mapping[str, Any]) -> None:
    file.write(json.dumps(data, indent=1, allow_nan=False).encode() + b"\n")
    file.flush()
