"""From two label maps of a case to rows, from rows to `cases.csv`, `slices.csv` and `summary.json`, and to a table.

An empty CSV cell and a JSON null mean undefined, and undefined values enter no mean.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from surm_seg import slices as by_slice
from surm_seg.metrics import NSD_TOLERANCE_MM, PROTOCOLS, RECOMMENDED, SAMED, OrganScore, score
from surm_seg.slices import SliceRow
from surm_seg.volume import replacing

SCHEMA = "surm-seg/scores-1"

RESAMPLES = 2000
"""Bootstrap resamples: the ends of a 95 % interval are then stable to about a tenth of its width."""

HASH_DIGITS = 16

COLUMNS = (
    "run", "adapter", "seed", "case", "organ", "protocol", "dice", "nsd", "hd95_mm", "hd95_vox", "reference_ml",
    "predicted_ml", "volume_error_ml", "reference_empty", "prediction_empty", "spacing", "data_hash",
)  # fmt: skip
"""The columns of cases.csv; `spacing` is mm along z, y, x, joined by x."""

_NOTE = "* samed-2023, for comparison with published tables: there a missed organ has HD95 0 and a false organ Dice 1."


@dataclass(frozen=True)
class Row:
    """One organ of one case under one protocol.

    Args:
        data_hash: fingerprint of the reference label map; rows of two runs may be compared where it is equal.
    """

    case: str
    score: OrganScore
    data_hash: str


def score_pair(
    prediction: np.ndarray,
    reference: np.ndarray,
    labels: Sequence[str],
    spacing: Sequence[float] | None,
    case: str,
    *,
    protocols: Sequence[str] = tuple(PROTOCOLS),
    nsd_tolerance: float = NSD_TOLERANCE_MM,
    workers: int = 1,
) -> list[Row]:
    """Score one case: what `evaluate` does with files and training with arrays, so that both give the same rows.

    Args:
        prediction: integer labels, axes (z, y, x); organ `labels[k]` is k + 1.
        reference: the same for the reference.
        spacing: mm along (z, y, x), None when unknown.
        case: name of the case.
        protocols: names from metrics.PROTOCOLS.
        nsd_tolerance: mm.
        workers: threads.
    """
    scores = score(prediction, reference, labels, spacing, protocols, nsd_tolerance=nsd_tolerance, workers=workers)
    data_hash = hashlib.sha256(f"{reference.shape}".encode())
    data_hash.update(np.ascontiguousarray(reference, np.uint8).data)
    return [Row(case, organ_score, data_hash.hexdigest()[:HASH_DIGITS]) for organ_score in scores]


def write_scores(
    folder: Path,
    rows: Sequence[Row],
    slices: Sequence[SliceRow] = (),
    *,
    run: str = "",
    adapter: str = "",
    seed: int | None = None,
    nsd_tolerance: float = NSD_TOLERANCE_MM,
) -> dict[str, Any]:
    """Write cases.csv, slices.csv and summary.json and return the summary; each appears complete or not at all.

    Args:
        folder: made where missing.
        run: name of the run that made the predictions.
        adapter: its fine-tuning method.
        seed: its seed.
        nsd_tolerance: mm, as the rows were scored with.
    """
    summary = summarise(rows, nsd_tolerance=nsd_tolerance)
    origin = {"run": run, "adapter": adapter, "seed": seed}
    lines = ([(origin | _cells(row))[column] for column in COLUMNS] for row in rows)
    texts = {
        "cases.csv": _csv(COLUMNS, lines),
        "slices.csv": _csv(by_slice.COLUMNS, (row.cells() for row in slices)),
        "summary.json": json.dumps(summary, indent=2) + "\n",
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        with replacing(folder / name) as file:
            file.write(text.encode())
    return summary


def _csv(columns: Sequence[str], lines: Iterable[Sequence[object]]) -> str:
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(lines)
    return table.getvalue()


def summarise(rows: Sequence[Row], *, nsd_tolerance: float = NSD_TOLERANCE_MM) -> dict[str, Any]:
    """The content of summary.json: per protocol, statistics of every metric for each organ and overall.

    `overall` is over cases: first the mean over the defined organs of each case, then the statistics of those means, so
    that a case counts once however many organs it shows. `missed` counts organs the prediction has nothing of, `absent`
    organs the reference does not have. `overall` and `organs` of `recommended` stand at top level too.
    """
    protocols = {}
    for protocol in dict.fromkeys(row.score.protocol for row in rows):
        scored = [row for row in rows if row.score.protocol == protocol]
        organs = dict.fromkeys(row.score.organ for row in scored)
        protocols[protocol] = {
            "overall": _overall(scored, PROTOCOLS[protocol]),
            "organs": {
                organ: _statistics_of([row for row in scored if row.score.organ == organ], PROTOCOLS[protocol])
                for organ in organs
            },
        }
    summary = {
        "schema": SCHEMA,
        "cases": len({row.case for row in rows}),
        "nsd_tolerance_mm": nsd_tolerance,
        "protocols": protocols,
    }
    return summary | protocols.get(RECOMMENDED, {})


def dice_table(summary: Mapping[str, Any]) -> str:
    """A summary as plain text: a line per organ and one for the mean, the protocols side by side.

    n counts the cases with a defined Dice; Dice is mean ± SD, the other metrics are means.
    """
    protocols: dict[str, Any] = summary["protocols"]
    if not protocols:
        return "no scores"
    header = ["organ", "n"]
    for protocol in protocols:
        header += ["Dice", "HD95 mm", "NSD", "missed"] if protocol == RECOMMENDED else ["Dice*", "HD95 vox*"]
    first = next(iter(protocols.values()))
    lines = [header]
    for organ in (*first["organs"], "mean"):
        found = [content["organs"].get(organ, content["overall"]) for content in protocols.values()]
        line = [organ, str(found[0]["dice"]["n"])]
        for protocol, statistics in zip(protocols, found, strict=True):
            line.append(_shown(statistics["dice"], 3, with_sd=True))
            if protocol == RECOMMENDED:
                line += [_shown(statistics["hd95_mm"], 2), _shown(statistics["nsd"], 3), str(statistics["missed"])]
            else:
                line.append(_shown(statistics["hd95_vox"], 2))
        lines.append(line)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    shown = [
        "  ".join([line[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(line[1:], widths[1:], strict=True))])
        for line in lines
    ]
    rule = "-" * len(shown[0])
    return "\n".join([shown[0], rule, *shown[1:-1], rule, shown[-1], *([_NOTE] if SAMED in protocols else [])])


def _cells(row: Row) -> dict[str, Any]:
    score = row.score
    return {
        "case": row.case,
        "organ": score.organ,
        "protocol": score.protocol,
        "dice": score.dice,
        "nsd": score.nsd,
        "hd95_mm": score.hd95_mm,
        "hd95_vox": score.hd95_vox,
        "reference_ml": score.reference_ml,
        "predicted_ml": score.predicted_ml,
        "volume_error_ml": score.volume_error_ml,
        "reference_empty": str(score.reference_empty).lower(),
        "prediction_empty": str(score.prediction_empty).lower(),
        "spacing": "" if score.spacing is None else "x".join(f"{mm:g}" for mm in score.spacing),
        "data_hash": row.data_hash,
    }


def _statistics_of(rows: Sequence[Row], metrics: Iterable[str]) -> dict[str, Any]:
    return {
        **{metric: _statistics(_defined(rows, metric), _reason(rows, metric)) for metric in metrics},
        "missed": sum(row.score.missed for row in rows),
        "absent": sum(row.score.absent for row in rows),
    }


def _overall(rows: Sequence[Row], metrics: Sequence[str]) -> dict[str, Any]:
    cases: dict[str, list[Row]] = {}
    for row in rows:
        cases.setdefault(row.case, []).append(row)
    result = {}
    for metric in metrics:
        per_case = [values for case in cases.values() if (values := _defined(case, metric))]
        result[metric] = _statistics([float(np.mean(values)) for values in per_case], _reason(rows, metric))
    return result | _statistics_of(rows, ())


def _defined(rows: Iterable[Row], metric: str) -> list[float]:
    return [value for row in rows if (value := getattr(row.score, metric)) is not None]


def _reason(rows: Iterable[Row], metric: str) -> str:
    """Why values of this metric are undefined, the most frequent reason first."""
    reasons = Counter(row.score.reasons[metric] for row in rows if metric in row.score.reasons)
    return "; ".join(reason for reason, _ in reasons.most_common())


def _statistics(values: Sequence[float], reason: str) -> dict[str, Any]:
    """Mean, sample SD, median, quartiles, n and bootstrap interval of the mean; None where undefined, with why."""
    n = len(values)
    if n == 0:
        return dict.fromkeys(("mean", "sd", "median", "iqr")) | {"n": 0, "ci95": None, "reason": reason or "no case"}
    result = {
        "mean": float(np.mean(values)),
        "sd": float(np.std(values, ddof=1)) if n > 1 else None,
        "median": float(np.median(values)),
        "iqr": np.percentile(values, (25, 75)).tolist(),
        "n": n,
        "ci95": _bootstrap_interval(np.asarray(values)) if n > 1 else None,
    }
    return result if n > 1 else result | {"reason": "one case has no spread"}


def _bootstrap_interval(values: np.ndarray) -> list[float]:
    """95 % percentile interval of the mean over resampled cases (Efron, 1979); the same for the same values."""
    picks = np.random.default_rng(0).integers(len(values), size=(RESAMPLES, len(values)))
    return np.percentile(values[picks].mean(axis=1), (2.5, 97.5)).tolist()


def _shown(statistics: Mapping[str, Any], digits: int, *, with_sd: bool = False) -> str:
    if statistics["mean"] is None:
        return "-"
    spread = f" ± {statistics['sd']:.{digits}f}" if with_sd and statistics["sd"] is not None else ""
    return f"{statistics['mean']:.{digits}f}{spread}"
