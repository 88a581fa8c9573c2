"""`surm-seg bench data`: how fast training slices are made, and how fast a model takes them."""

from __future__ import annotations

import copy
import importlib
import math
import multiprocessing
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from surm_seg import backbones, cli
from surm_seg.bench.cell import Precision
from surm_seg.bench.comparison import save
from surm_seg.bench.meter import environment, threads
from surm_seg.bench.table import NONE, table
from surm_seg.engine import EngineConfig, fit
from surm_seg.errors import BadConfig
from surm_seg.precision import fast_precision
from surm_seg.prepare import PrepareConfig, prepare
from surm_seg.task import Batch, Record, Task

PATIENTS = 4
SKIPPED = 4  # steps, until the loaders' stores are empty and everything is warm
WHAT = {
    "alone": "slices made, no model",
    "appetite": "model training on a slice that is there",
    "both": "model training on slices as they are made",
    "beside": "slices made, a model training on a slice that is there",
}


@dataclass
class Config(cli.Common):
    """Measure the training data pipeline: alone, beside training, and what the model could take.

    Args:
        output: folder for data.json, which has every raw figure; default `bench`.
        backbone: the model; sam_tiny has embedded weights, others get random ones.
        recipes: named defaults of `surm-seg train`.
        workers: loader processes; 0 makes slices in the training process.
        batch: slices of a step; by default the recipe's own.
        slices: that each figure is taken over, at least.
        data: a prepared data set; by default generated patients.
        image_size: side of the input in pixels; by default the recipe's own.
        threads: of torch; one per processor by default.
    """

    backbone: str = "sam_tiny"
    recipes: list[str] = field(default_factory=lambda: ["default", "samed"])
    workers: list[int] = field(default_factory=lambda: [0, 1, 2])
    batch: int | None = None
    slices: int = 240
    data: str | None = None
    image_size: int | None = None
    threads: int | None = None


class Unlearnt(Task):
    """A task's samples, and nothing to compute with them."""

    def __init__(self, task: Task) -> None:
        self.task, self.model = task, nn.Linear(1, 1)

    def __len__(self) -> int:
        return len(self.task)

    def sampling_weights(self) -> np.ndarray | None:
        return self.task.sampling_weights()

    def sample(self, index: int, rng: np.random.Generator) -> Batch:
        return self.task.sample(index, rng)

    def loss(self, batch: Batch) -> Tensor:
        return torch.stack([p.sum() for p in self.model.parameters()]).sum()

    def validate(self) -> Record:
        return {}


def fed(task: Any) -> Any:
    """The task, always with the same sample, which costs nothing to make."""
    first, result = task.sample(0, np.random.default_rng(0)), copy.copy(task)
    result.sample = lambda index, rng: first
    return result


@dataclass(frozen=True)
class Job:
    """A recipe on a data set; small enough to be sent to another process."""

    config: Config
    recipe: str
    data: str
    device: str
    precision: Precision

    def task(self) -> Any:
        """What `surm-seg train --recipe` creates."""
        segmentation = importlib.import_module("pipelines.segmentation")
        own = {"weights": "auto" if self.config.backbone == "sam_tiny" else "random", "validate_on": "none"}
        own |= {"image_size": self.config.image_size} if self.config.image_size else {}
        options = self._chosen(segmentation.Config) | {"data": self.data, "backbone": self.config.backbone, **own}
        return segmentation.create(segmentation.Config(**options), self.config.seed)

    def engine(self) -> EngineConfig:
        """The recipe's steps, as many as there are slices to measure."""
        own = EngineConfig(**self._chosen(EngineConfig))
        size = self.config.batch or own.batch_size
        steps = SKIPPED + math.ceil(self.config.slices / size)
        return replace(own, batch_size=size, steps=steps, validate_every=0, precision=self.precision)

    def _chosen(self, config: type) -> dict[str, Any]:
        recipe = importlib.import_module("pipelines.segmentation").RECIPES[self.recipe]
        return {option.name: recipe[option.name] for option in fields(config) if option.name in recipe}


@dataclass(frozen=True)
class Ends:
    """When the steps of a training ended, from the last of the SKIPPED ones on.

    Args:
        clock: seconds of a clock that all processes share.
        cpu: processor seconds of the training process.
        batch: slices of a step.
    """

    clock: list[float]
    cpu: list[float]
    batch: int

    @property
    def slices(self) -> int:
        return self.batch * (len(self.clock) - 1)

    @property
    def per_second(self) -> float:
        return self.slices / (self.clock[-1] - self.clock[0])

    def during(self, other: Ends) -> float:
        """Slices per second between the other's first and last end."""
        start, stop = other.clock[0], other.clock[-1]
        steps = np.interp([start, stop], self.clock, range(len(self.clock)))
        return self.batch * float(steps[1] - steps[0]) / (stop - start)


class _EnoughError(Exception):
    """Ends a training whose length is another's."""


def trained(job: Job, task: Task, workers: int, over: Callable[[], bool] | None = None) -> Ends:
    """Train with `engine.fit`: over the job's slices, or until something else is `over`, asked once warm."""
    seen: list[tuple[float, float]] = []
    engine = replace(job.engine(), workers=workers)
    if over is not None:
        engine = replace(engine, steps=sys.maxsize, checkpoint_every=sys.maxsize)

    def note(record: Record) -> None:
        seen.append((time.monotonic(), time.process_time()))
        if over is not None and len(seen) >= SKIPPED and over():
            raise _EnoughError

    with TemporaryDirectory() as folder, suppress(_EnoughError):
        fit(task, engine, Path(folder), seed=job.config.seed, device=job.device, report=note)
    clock, cpu = zip(*seen[SKIPPED - 1 :], strict=True)
    return Ends(list(clock), list(cpu), engine.batch_size)


def made(job: Job, workers: int, start_method: str) -> Ends:
    """The data pipeline with no model behind it, in a process of its own; its loaders start as a training's would."""
    multiprocessing.set_start_method(start_method, force=True)
    return trained(job, Unlearnt(job.task()), workers)


def fresh_process() -> ProcessPoolExecutor:
    """A process that has done nothing yet but import."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["surm_seg.bench.step", "pipelines.segmentation"])
    return ProcessPoolExecutor(1, mp_context=context)


def measured(job: Job) -> list[dict[str, Any]]:
    """Rows of data.json for one recipe; `beside` is measured with one worker."""
    task, workers = job.task(), job.config.workers
    rows = [_row(job, "alone", n, trained(job, Unlearnt(task), n)) for n in workers]
    appetite = trained(job, fed(task), 0)
    rows.append(_row(job, "appetite", None, appetite))
    rows += [_row(job, "both", n, trained(job, task, n)) for n in workers]
    with fresh_process() as process:
        making: list[Future[Ends]] = []

        def over() -> bool:
            if not making:  # training is warm
                making.append(process.submit(made, job, 1, multiprocessing.get_start_method()))
            return making[0].done()

        meanwhile = trained(job, fed(task), 0, over)
    beside = making[0].result()
    rows.append(_row(job, "beside", 1, beside) | {"trained_per_s": meanwhile.during(beside)})
    return [row | {"of_appetite": row["slices_per_s"] / appetite.per_second} for row in rows]


def run(config: Config) -> int:
    """Measure every recipe and print the table."""
    known = importlib.import_module("pipelines.recipes").RECIPES
    least = min(config.slices, config.batch or 1, config.threads or 1, *(n + 1 for n in config.workers))
    if least < 1 or not set(config.recipes) <= set(known) or config.backbone not in backbones.names():
        sentence = f"--recipes are {', '.join(known)}, --backbone is one of {', '.join(backbones.names())}"
        raise BadConfig("bench-option", f"{sentence}; --slices, --batch and --threads 1 or more, --workers 0 or more.")
    device, reporter = cli.device_named(config.device), cli.Reporter(config.quiet)
    if config.dry_run:
        reporter.say(f"would make {config.slices} slices and train {config.backbone}, {', '.join(config.recipes)}")
        return 0
    rows: list[dict[str, Any]] = []
    with TemporaryDirectory() as folder, threads(config.threads):
        where, data = environment(device), prepared(config.data, Path(folder), config.seed)
        precision = fast_precision(torch.device(device))  # once: a second answer could be another
        for recipe in reporter.track(config.recipes, "measuring", len(config.recipes)):
            rows += measured(Job(config, recipe, data, device, precision))
    results = {"benchmark": "data", "options": asdict(config), "environment": where, "rows": rows}
    save(results, config.output or Path("bench"))
    reporter.say(markdown(results))
    return 0


def prepared(data: str | None, folder: Path, seed: int) -> str:
    """The user's data set, or generated patients prepared in the folder."""
    if data is None:
        request = PrepareConfig(source="phantom", output=folder / "data", cases=PATIENTS, workers=1, seed=seed)
        prepare(request, cli.Reporter(quiet=True))
    return data or str(folder / "data")


def markdown(results: Mapping[str, Any]) -> str:
    """The rows as a dated table, relative to each recipe's appetite."""
    where = results["environment"]
    header = ["recipe", "what", "workers", "slices/s", "of the appetite", "processor ms per slice"]
    rows = [
        [
            row["recipe"],
            WHAT[row["what"]],
            NONE if row["workers"] is None else str(row["workers"]),
            f"{row['slices_per_s']:.1f}" + (f" (trained {row['trained_per_s']:.1f})" if "trained_per_s" in row else ""),
            f"{row['of_appetite']:.2f}",
            NONE if row["workers"] else f"{row['cpu_ms']:.1f}",
        ]
        for row in results["rows"]
    ]
    versions = ", ".join(f"{name} {where['versions'][name]}" for name in ("torch", "monai"))
    place = f"Measured on {where['time'][:10]}: {where['processor']}, {where['threads']} threads of torch, {versions}"
    return f"{place}; {results['options']['backbone']}.\n\n{table(header, rows)}"


def _row(job: Job, what: str, workers: int | None, ends: Ends) -> dict[str, Any]:
    return {
        "recipe": job.recipe,
        "what": what,
        "workers": workers,
        "batch": ends.batch,
        "slices_per_s": ends.per_second,
        "cpu_ms": 1000 * (ends.cpu[-1] - ends.cpu[0]) / ends.slices,
        "clock_s": ends.clock,
    }
