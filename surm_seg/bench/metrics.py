"""`surm-seg bench metrics`: Dice, HD95 and NSD of eight organs against medpy's and MONAI's, equal numbers first."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.ndimage import find_objects
from torch import Tensor

from surm_seg import cli
from surm_seg.bench.comparison import Method, markdown, measured, save
from surm_seg.bench.meter import environment, threads
from surm_seg.bench.organs import ORGANS, SPACING_MM, label_maps
from surm_seg.errors import BadConfig, SurmError
from surm_seg.metrics import NSD_TOLERANCE_MM, PROTOCOLS, RECOMMENDED, SAMED, score

TOLERANCE = {"dice": 1e-6, "hd95_vox": 1e-4, "hd95_mm": 1e-4, "nsd": 1e-4}
"""How far two implementations may differ; MONAI computes in float32."""

OURS = "surm-seg"
SMALL = (24, 64, 64)  # voxels, on which everything is computed and compared once before anything is timed

Values = dict[str, list[float]]
"""Metric -> value of each organ."""

Masks = list[tuple[np.ndarray, np.ndarray]]
"""Prediction and reference of each organ: bool."""


@dataclass
class Config(cli.Common):
    """Measure our metrics, medpy's and MONAI's on the same volumes; exit status 1 where their values differ.

    Args:
        output: folder for metrics.json, which has every raw figure; default `bench`.
        organs: how many, from one to eight; the first is the largest.
        shape: voxels along (z, y, x), 3 x 0.8 x 0.8 mm large.
        repeats: measurements of ours; the others' take minutes and are done once.
        threads: of torch, and of the row that scores organs in parallel; one per processor by default.
    """

    organs: int = len(ORGANS)
    shape: list[int] = field(default_factory=lambda: [148, 512, 512])
    repeats: int = 7
    threads: int | None = None


def run(config: Config) -> int:
    """Generate the organs, measure, compare the values, print the table."""
    least = min(config.organs, config.repeats, config.threads or 1, *config.shape)
    if least < 1 or config.organs > len(ORGANS) or len(config.shape) != 3:
        sentence = f"--organs must be 1 to {len(ORGANS)}, --shape three numbers, --repeats and --threads 1 or more."
        raise BadConfig("bench-option", sentence)
    if find_spec("medpy") is None:
        raise BadConfig("bench-package", "medpy is not installed, with which this compares; run: pip install medpy.")
    output, reporter = config.output or Path("bench"), cli.Reporter(config.quiet)
    size = "x".join(map(str, config.shape))
    if config.dry_run:
        reporter.say(f"would score {config.organs} organs of {size} voxels with surm-seg, medpy and MONAI")
        return 0
    with threads(config.threads), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # MONAI warns of its own use of what it deprecates
        where = environment("cpu")
        where["versions"]["medpy"] = version("medpy")
        check({method.label: method.compute() for method in _methods(config, SMALL)})
        methods = _methods(config, (config.shape[0], config.shape[1], config.shape[2]))
        rows = measured(methods, check, config.repeats, config.seed, reporter)
    results = {"benchmark": "metrics", "options": asdict(config), "environment": where, "rows": rows}
    save(results, output)
    reporter.say(f"{config.organs} organs, {size} voxels; all values agree.\n")
    reporter.say(markdown(results, ("numpy", "medpy", "monai")))
    reporter.say(f"\n{_totals(rows)}")
    return 0


def check(found: Mapping[str, Values]) -> None:
    """Raises SurmError where a value is not ours: timing it would be worthless."""
    for label, values in found.items():
        for metric, theirs in values.items():
            ours = found[OURS][metric]
            apart = np.abs(np.subtract(ours, theirs))
            worst = int(np.argmax(apart))  # of NaN, which is never equal, the first
            if not apart[worst] <= TOLERANCE[metric]:
                organ = list(ORGANS)[worst]
                sentence = f"{metric} of the {organ} is {ours[worst]} by {OURS} and {theirs[worst]} by {label}"
                raise SurmError("bench-differs", f"{sentence}; find out which is wrong before timing either.")


def _methods(config: Config, shape: tuple[int, int, int]) -> list[Method]:
    """Every row of the table; the first is ours with all metrics, on one thread."""
    prediction, reference = label_maps(config.organs, shape, config.seed)
    return [*_ours(prediction, reference), *_others(prediction, reference)]


def _ours(prediction: np.ndarray, reference: np.ndarray) -> list[Method]:
    names, workers = tuple(ORGANS)[: int(reference.max())], torch.get_num_threads()

    def values(protocols: Sequence[str], threads: int) -> Values:
        rows = score(prediction, reference, names, SPACING_MM, protocols, workers=threads)
        return {
            metric: [getattr(row, metric) for row in rows if row.protocol == protocol]
            for protocol in protocols
            for metric in PROTOCOLS[protocol]
        }

    both = "Dice, HD95 in mm and voxels, NSD"
    return [
        Method(OURS, f"{both}; one thread", partial(values, tuple(PROTOCOLS), 1)),
        Method(f"{OURS}, parallel", f"{both}; {workers} threads", partial(values, tuple(PROTOCOLS), workers)),
        Method(f"{OURS} {RECOMMENDED}", "Dice, HD95 in mm, NSD; one thread", partial(values, (RECOMMENDED,), 1)),
        Method(f"{OURS} {SAMED}", "Dice, HD95 in voxels; one thread", partial(values, (SAMED,), 1)),
    ]


def _others(prediction: np.ndarray, reference: np.ndarray) -> list[Method]:
    """medpy's and MONAI's, given masks made beforehand: whole volumes, as their users do, and cut to each organ."""
    from medpy.metric import binary

    count = int(reference.max())
    whole: Masks = [(prediction == value, reference == value) for value in range(1, count + 1)]
    cut: Masks = []
    for masks in whole:
        (box,) = find_objects(np.logical_or(*masks).astype(np.uint8))
        cut.append((masks[0][box], masks[1][box]))
    one_hot = [torch.from_numpy(np.stack(channels))[None] for channels in zip(*whole, strict=True)]
    boxes = [(torch.from_numpy(mask)[None, None], torch.from_numpy(true)[None, None]) for mask, true in cut]

    def medpy(metric: str, function: Callable[..., float], given: Masks) -> Values:
        return {metric: [float(function(mask, true)) for mask, true in given]}

    on_whole, on_box = "whole volumes; one thread", "each organ's box; one thread"
    return [
        Method("medpy hd95", f"HD95 in voxels, {on_whole}", partial(medpy, "hd95_vox", binary.hd95, whole), slow=True),
        Method("medpy dc", f"Dice, {on_whole}", partial(medpy, "dice", binary.dc, whole), slow=True),
        *_monai([(one_hot[0], one_hot[1])], "one-hot volume", ""),
        Method("medpy hd95, cut", f"HD95 in voxels, {on_box}", partial(medpy, "hd95_vox", binary.hd95, cut), slow=True),
        *_monai(boxes, "each organ's box", ", cut"),
    ]


def _monai(batches: Sequence[tuple[Tensor, Tensor]], given: str, mark: str) -> list[Method]:
    """A method per metric.

    Args:
        batches: prediction and reference, bool, axes (1, organ, z, y, x).
        given, mark: what `batches` are, for the table, and what that adds to the labels.
    """
    from monai.metrics.hausdorff_distance import compute_hausdorff_distance
    from monai.metrics.meandice import compute_dice
    from monai.metrics.surface_dice import compute_surface_dice

    def nsd(prediction: Tensor, reference: Tensor, **options: Any) -> Tensor:
        tolerances = [NSD_TOLERANCE_MM] * prediction.shape[1]
        return compute_surface_dice(prediction, reference, tolerances, use_subvoxels=True, **options)

    in_mm = {"spacing": list(SPACING_MM)}
    functions: dict[str, tuple[str, Callable[..., Tensor]]] = {
        "Dice": ("dice", compute_dice),
        "HD95": ("hd95_mm", partial(compute_hausdorff_distance, percentile=95, **in_mm)),
        "NSD": ("nsd", partial(nsd, **in_mm)),
    }

    def values(metric: str, function: Callable[..., Tensor]) -> Values:
        found = (function(prediction, reference, include_background=True) for prediction, reference in batches)
        return {metric: [value for tensor in found for value in tensor.flatten().tolist()]}

    return [
        Method(f"MONAI {title}{mark}", f"{title}, {given}", partial(values, metric, function), slow=True)
        for title, (metric, function) in functions.items()
    ]


def _totals(rows: Sequence[Mapping[str, Any]]) -> str:
    """What the others take for the same metrics, as a multiple of our row that has all of them on one thread."""
    ratio = {row["label"]: row["ratio"] for row in rows}
    monai = sum(ratio[f"MONAI {title}"] for title in ("Dice", "HD95", "NSD"))
    return (
        f"{OURS} on one thread gives all four values {ratio['medpy hd95']:.0f} times as fast as medpy gives HD95 alone,"
        f" and {monai:.1f} times as fast as MONAI gives Dice, HD95 and NSD."
    )
