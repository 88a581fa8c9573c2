"""Writing a prepared data set (see `surm_seg.cases`): cases one by one, then the manifest that makes them one."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from surm_seg.cases import CASE_ID, PROTOCOL, SCHEMA, SPLITS, Dataset, case_of
from surm_seg.errors import Corrupt
from surm_seg.fingerprint import hu_summary, label_histogram, over_cases
from surm_seg.volume import Volume, replacing, sync_folder


def write_case(
    dataset: Path,
    case_id: str,
    image: Volume,
    label: np.ndarray | None,
    labels: Sequence[str],
    inputs: Mapping[str, str],
    *,
    spacing_known: bool = True,
) -> None:
    """Store one case under `dataset`; atomic. An older one of that id stays in use until `write_dataset`.

    Args:
        image: int16 HU.
        label: uint8 on the image's grid, axes (i, j, k), values up to len(labels); None when unlabelled.
        inputs: SHA-256 of everything the arrays depend on, by role.
        spacing_known: whether the grid's voxel size is the patient's, not a stand-in.
    """
    assert CASE_ID.fullmatch(case_id) and image.voxels.dtype == np.int16
    final, building = dataset / "cases" / case_id, dataset / "cases" / f".{case_id}.{os.getpid()}.part"
    if final.exists():
        final = _waiting(dataset, case_id)
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    try:
        view = image.lps()
        record: dict[str, Any] = {
            "id": case_id,
            "shape": list(view.shape),
            "spacing": list(image.grid.lps_spacing) if spacing_known else None,
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
    for folder in (dataset / "cases").iterdir():
        if folder.name not in splits:  # a case that is no longer asked for
            shutil.rmtree(folder)
    return Dataset.open(dataset)


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
        case = replace(case_of(dataset, record | {"split": "train"}), folder=folder)
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
