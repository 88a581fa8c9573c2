"""What scoring a case came to, and its record on disk, so that a run that was stopped goes on with the next case.

OUTPUT/.cases/CASE.json holds one scored case, the digest of what it was scored from, and its own digest.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from surm_seg.metrics import OrganScore
from surm_seg.report import Row, score_pair
from surm_seg.slices import SliceRow, slice_rows
from surm_seg.volume import replacing

SCHEMA = "surm-seg/scored-1"
"""Changes when the same volumes would get other scores."""

FOLDER = ".cases"


@dataclass(frozen=True)
class Scored:
    """The rows of a case, or of several."""

    rows: list[Row]
    slices: list[SliceRow]

    @classmethod
    def joined(cls, cases: Iterable[Scored]) -> Scored:
        """The rows of several cases in order."""
        known = list(cases)
        return cls([row for case in known for row in case.rows], [row for case in known for row in case.slices])

    def named(self, case: str) -> Scored:
        """The same under another case name."""
        return Scored([replace(row, case=case) for row in self.rows], [replace(row, case=case) for row in self.slices])


def score_case(
    prediction: np.ndarray,
    reference: np.ndarray,
    labels: Sequence[str],
    spacing: Sequence[float] | None,
    case: str,
    **options: Any,
) -> Scored:
    """`report.score_pair`, whose arguments and options these are, and `slices.slice_rows` of one case."""
    rows = score_pair(prediction, reference, labels, spacing, case, **options)
    return Scored(rows, slice_rows(prediction, reference, labels, spacing, case))


def key_of(facts: Any) -> str:
    """Digest of everything that decides a case's scores, as plain JSON values."""
    return hashlib.sha256(json.dumps([SCHEMA, facts]).encode()).hexdigest()


def keep(output: Path, case: str, key: str, scored: Scored) -> None:
    """Write the record of a case under its key; atomic."""
    content = json.dumps(asdict(scored))
    folder = output / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / f"{case}.json") as file:
        file.write(json.dumps({"key": key, "sha256": _digest(content), "content": content}).encode())


def kept(output: Path) -> dict[str, Scored]:
    """The recorded cases by key; records that are damaged or of another version are left out."""
    found = {}
    for path in sorted((output / FOLDER).glob("*.json")):
        try:
            record = json.loads(path.read_bytes())
            if _digest(record["content"]) == record["sha256"]:
                found[str(record["key"])] = _scored(json.loads(record["content"]))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
    return found


def forget(output: Path, cases: Collection[str]) -> None:
    """Remove the records of all other cases: their files are gone, or have got another name."""
    for path in (output / FOLDER).glob("*.json"):
        if path.stem not in cases:
            path.unlink()


def _scored(content: dict[str, Any]) -> Scored:
    rows = []
    for row in content["rows"]:
        spacing = row["score"]["spacing"]
        score = OrganScore(**row["score"] | {"spacing": None if spacing is None else tuple(spacing)})
        rows.append(Row(row["case"], score, row["data_hash"]))
    return Scored(rows, [SliceRow(**row) for row in content["slices"]])


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
