"""How long a reproduction will take here: a few steps of every method, and a prediction and its scoring, measured."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from pipelines.inference import Trained
from pipelines.phantom import on_grid, write
from pipelines.recipes import base_model
from pipelines.studies.table import Row, markdown
from pipelines.synapse import SLICES, TEST_CASES, TRAINING_SLICES
from surm_seg import cli, prepare, train
from surm_seg.engine import EngineConfig, fit
from surm_seg.precision import fast_precision
from surm_seg.reproduce.synapse import SIDE
from surm_seg.scored import score_case
from surm_seg.task import Record

TRAINED_ON, SCORED = 5, 1  # numbers of the benchmark: of a training and of a test case
PATIENT_SLICES = 16  # thick ones, through all organs
PREDICTED = 8  # slices
SHIFT = 2  # pixels that a prediction is off, where its scoring is timed
HOUR = 3600.0  # seconds

Words = Mapping[str, Sequence[str]]
"""Method -> options of `surm-seg train`, without --data."""


@dataclass(frozen=True)
class Extent:
    """How much there is to learn and to predict.

    Args:
        side: pixels of a slice.
        cases: of the test set.
        slices: of the test set.
        training: slices of the training cases.
        origin: where these numbers come from.
    """

    side: int
    cases: int
    slices: int
    training: int
    origin: str


@dataclass(frozen=True)
class Sample:
    """How steps are timed: `skipped` ones while stores fill and caches warm up, then `counted` ones.

    Args:
        batch: slices of a step.
    """

    batch: int
    skipped: int
    counted: int


def extent(planned: prepare.Plan | None) -> Extent:
    """What the files' headers tell; what is published, where there are no files or headers are still to be made."""
    if planned is None or any(case.generate for case in planned.source.cases):
        training = max(TRAINING_SLICES)
        return Extent(SIDE, len(TEST_CASES), SLICES - training, training, "as published")
    cases = zip(planned.jobs, planned.source.cases, strict=True)
    shapes = [(prepare.check_headers(job).lps_shape, case.split == "test") for job, case in cases]
    test = [shape[0] for shape, held_out in shapes if held_out]
    side, total = max(max(shape[1:]) for shape, _ in shapes), sum(shape[0] for shape, _ in shapes)
    return Extent(side, len(test), sum(test), total - sum(test), "by the files' headers")


def tell(words: Words, seeds: int, size: Extent, scratch: Path, reporter: cli.Reporter) -> int:
    """Measure, print the hours of every method and of all, and from what; raises NoDevice where memory is too small.

    Args:
        scratch: an empty folder.
    """
    first = next(iter(words))
    _, config, engine, _ = train.parsed(words[first])
    device, engine = cli.device_named(config.device), engine.for_samples(size.training)
    if engine.precision == "auto":
        engine = replace(engine, precision=fast_precision(torch.device(device)))
    sample, create = _sample(engine, device), partial(_created, words, _patients(scratch, size.side))
    steps = {
        name: _seconds_of_step(create(name), engine, sample, scratch / name, device)
        for name in reporter.track(words, "measuring", len(words))
    }
    task = create(first)
    scoring = _seconds_of_scoring(task, engine.precision, size, device)
    reporter.say(_table(steps, engine.steps, scoring, seeds))
    reporter.say(
        f"Extrapolated from {sample.counted} steps of {sample.batch} slices of every method, {PREDICTED} predicted "
        f"slices and a scored patient of {PATIENT_SLICES}, all {size.side} pixels wide and generated, in "
        f"{engine.precision} on {device} with {torch.get_num_threads()} threads; to {engine.steps:,} steps of "
        f"{engine.batch_size} slices and {size.slices:,} test slices in {size.cases} cases ({size.origin}), one run "
        "after the other. Preparing, checking, starting, checkpoints and reports come on top."
    )
    needed = task.memory_needed(engine.micro_batch(1), device)
    reporter.say(f"A training step needs about {needed / 1e9:.1f} GB; --accumulate N divides what its slices need.")
    return cli.check_memory(needed, device)


def _table(steps: Mapping[str, float], count: int, scoring: float, seeds: int) -> str:
    rows: list[Row] = []
    for name, seconds in steps.items():
        training, rest = seeds * count * seconds / HOUR, seeds * scoring / HOUR
        hours = {"training h": training, "prediction + scoring h": rest, "all h": training + rest}
        shown = {column: f"{value:,.2f}" for column, value in hours.items()}
        rows.append({"method": name, "seeds": str(seeds), "seconds a step": f"{seconds:.3g}", **shown})
    training, rest = seeds * count * sum(steps.values()) / HOUR, seeds * len(steps) * scoring / HOUR
    total = (f"{value:,.2f}" for value in (training, rest, training + rest))
    rows.append(dict(zip(rows[0], ("all", str(seeds), "", *total), strict=True)))
    return markdown(rows)


def _patients(folder: Path, side: int) -> Path:
    """A prepared data set of two generated patients with slices of that size."""
    world = on_grid(side, (PATIENT_SLICES, PATIENT_SLICES))
    for number in (TRAINED_ON, SCORED):
        write(folder / "patients", [number], world, first_id=number)
    request = prepare.PrepareConfig(source=str(folder / "patients"), output=folder / "data", workers=1)
    prepare.prepare(request, cli.Reporter(quiet=True))
    return folder / "data"


def _created(words: Words, data: Path, name: str) -> Any:
    """The task of a method, as `surm-seg train` makes it."""
    task_type, _, _, options = train.parsed([*words[name], "--data", str(data)])
    return task_type.create(options, 0)


def _sample(engine: EngineConfig, device: str) -> Sample:
    """On a CPU seconds are in proportion to slices, so that two of them are enough; a GPU wants the whole batch."""
    if device.startswith("cuda"):
        return Sample(engine.batch_size, skipped=6, counted=12)
    return Sample(min(2, engine.batch_size), skipped=1, counted=3)


def _seconds_of_step(task: Any, engine: EngineConfig, sample: Sample, folder: Path, device: str) -> float:
    """Of a whole batch, with its loading."""
    steps, ends = sample.skipped + sample.counted, list[float]()
    parts = min(engine.accumulate, sample.batch)
    short = replace(engine, steps=steps, batch_size=sample.batch, accumulate=parts, validate_every=0)

    def note(record: Record) -> None:
        ends.append(record["seconds"])

    fit(task, short, folder, seed=0, device=device, report=note)
    return median(np.diff(ends[sample.skipped - 1 :])) * engine.batch_size / sample.batch


def _seconds_of_scoring(task: Any, precision: str, size: Extent, device: str) -> float:
    """Prediction and scoring of the test set. Deltas are merged into the base for it: one time for all methods."""
    labels, case = task.dataset.labels, task.scored_cases[0]
    base = base_model(task.config, task.backbone, len(labels), 0).to(device).eval()
    trained = Trained(base, task.input, labels, precision, {})
    trained(case.image[:1])  # warms up
    start = time.monotonic()
    trained(case.image[:PREDICTED])
    predicted = time.monotonic()
    label = np.asarray(case.label)
    score_case(np.roll(label, SHIFT, axis=2), label, labels, case.spacing, case.id)
    scored = time.monotonic()
    return size.slices * ((predicted - start) / PREDICTED + (scored - predicted) / len(label))
