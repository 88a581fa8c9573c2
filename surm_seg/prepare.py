"""`surm-seg prepare SOURCE`: CT volumes and labels -> a prepared data set (see cases.py).

Everything about the layout is checked before anything is written. Cases are prepared in parallel, each appears by one
rename, and a second run goes on where the first one stopped. A run that fails leaves an older data set in that folder
as it was, and says which files it could not use.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from surm_seg import cli, cluster
from surm_seg.cases import CASE_ID, SPLITS, Dataset, is_prepared
from surm_seg.dataset_writer import finished, write_case, write_dataset
from surm_seg.errors import BadConfig, BadInput
from surm_seg.labels import LabelMap
from surm_seg.lock import held
from surm_seg.output_folder import writing
from surm_seg.pictures import png, richest_slice, sheet, slice_picture
from surm_seg.pool import Engine, processes, run_all
from surm_seg.volume import Grid, digest, read_grid, read_image, read_labels, replacing

BYTES_PER_VOXEL = 3  # int16 image and uint8 label


@dataclass
class PrepareConfig(cluster.Options):
    """Options of prepare; --output defaults to data/NAME.

    Args:
        source: folder with the volumes, or the word phantom for generated ones.
        format: layout of the source; auto finds it.
        labels: synapse, or a YAML file `value: organ`; default is the format's own.
        image: file name or glob of the images inside the source.
        label: file name or glob of the label maps inside the source.
        classes: class table of a multi-label TotalSegmentator file, v1 or v2.
        split: YAML file with lists of case names under train, val and test.
        cases: how many phantoms to generate.
        workers: processes; default is one per CPU. A running Ray cluster uses the CPUs it has.
        keep_names: use the source's case names as ids; they may identify patients.
        check: examine the prepared cases, and compare the Synapse benchmark with what is published about it; SOURCE may
            be a prepared data set.
    """

    source: str = "phantom"
    format: str = "auto"
    labels: str | None = None
    image: str | None = None
    label: str | None = None
    classes: str | None = None
    split: Path | None = None
    cases: int = 16
    workers: int | None = None
    keep_names: bool = False
    check: bool = False


@dataclass(frozen=True)
class Job:
    """One case to prepare; sent to another process.

    Args:
        labels: files painted over each other in this order, with what their values mean.
    """

    output: Path
    case_id: str
    image: Path
    labels: tuple[tuple[Path, LabelMap], ...]
    organs: tuple[str, ...]
    spacing_known: bool


@dataclass(frozen=True)
class Plan:
    """What prepare will do: the source as its format lists it, and one job per case."""

    output: Path
    source: Any  # pipelines.formats.Source, which this package may not import by statement
    jobs: tuple[Job, ...]

    @property
    def summary(self) -> str:
        splits = Counter(case.split for case in self.source.cases)
        return ", ".join(f"{splits[name]} {name}" for name in SPLITS) + f" cases, {len(self.source.organs)} organs"


def plan(config: PrepareConfig) -> Plan:
    """Find the format and list the cases; reads no voxels and writes nothing. Raises BadInput or BadConfig."""
    if config.workers is not None and config.workers < 1:
        raise BadConfig("workers", f"--workers {config.workers} must be 1 or more.")
    formats = importlib.import_module("pipelines.formats")
    place = Path(config.source)
    place = config.shared(place) if place.exists() else place  # or a word, phantom
    output = config.shared(config.output or Path("data") / place.resolve().name)
    _check_output(output, place)
    wanted = {field.name: getattr(config, field.name) for field in fields(formats.Options) if field.name != "output"}
    options = formats.Options(output=output, **wanted)
    try:
        source = formats.read(place, config.format, options)
    except OSError as error:
        sentence = f"{error.filename or config.source} cannot be read ({error.strerror}); check name and rights."
        raise BadInput("source", sentence) from error
    jobs = []
    for number, case in enumerate(source.cases, 1):
        case_id = case.name if source.public or config.keep_names else f"case{number:03d}"
        if not CASE_ID.fullmatch(case_id):
            raise BadInput("case-name", f"{case.image} cannot keep its name; rename it to letters, digits, . _ and -.")
        labels = tuple((file.path, file.map) for file in case.labels)
        jobs.append(Job(output, case_id, case.image, labels, source.organs, source.spacing_known))
    return Plan(output, source, tuple(jobs))


def prepare(config: PrepareConfig, reporter: cli.Reporter) -> Dataset:
    """Prepare the source and return the data set; raises BadInput naming the file that cannot be used."""
    planned = plan(config)
    local = partial(processes, config.workers or os.cpu_count() or 1)
    written = planned.output / "source", planned.output / "cases"
    with cluster.engine_of(config, local, *written, workers=config.workers) as engine:
        return carry_out(planned, engine, reporter)


def carry_out(planned: Plan, engine: Engine, reporter: cli.Reporter) -> Dataset:
    """Generate, prepare and write what the plan says; the manifest comes last. Raises BadInput."""
    with writing(planned.output):
        dataset = _carry_out(planned, engine, reporter)
    with replacing(planned.output / "sheet.png") as file:
        file.write(png(contact_sheet(dataset)))
    absent = [organ for organ in dataset.labels if not any((c.histogram or {}).get(organ) for c in dataset.cases)]
    if absent:
        reporter.say(f"note: no case contains {', '.join(absent)}; check the label table")
    reporter.say(f"{planned.summary}: {planned.output}")
    return dataset


def contact_sheet(dataset: Dataset) -> Image.Image:
    """One slice of every case with its organs outlined, so that a human sees at once whether left is left."""
    entries = []
    for case in dataset.cases:
        label = case.label
        z = case.shape[0] // 2 if label is None else richest_slice(label)
        plane = None if label is None else label[z]
        entries.append((case.id, slice_picture(case.image[z], plane, None, (case.spacing or (1, 1, 1))[1:])))
    return sheet(entries, dataset.labels)


def _carry_out(planned: Plan, engine: Engine, reporter: cli.Reporter) -> Dataset:
    output, source = planned.output, planned.source
    generating = [case.generate for case in source.cases if case.generate]
    if not generating:
        check_space(planned, [check_headers(job) for job in planned.jobs])
    with held(output, "prepared"):
        try:
            run_all(generating, "generating", engine, reporter)
            run_all([partial(prepare_case, job) for job in planned.jobs], "preparing", engine, reporter)
        finally:
            with suppress(OSError):  # not empty, or never made
                (output / "cases").rmdir()
        cases = {job.case_id: case for job, case in zip(planned.jobs, source.cases, strict=True)}
        splits = {case_id: case.split for case_id, case in cases.items()}
        key = {case_id: [c.name, str(c.image), *(str(file.path) for file in c.labels)] for case_id, c in cases.items()}
        return write_dataset(output, source.format, source.organs, splits, key)


def main(arguments: Sequence[str] | None = None) -> int:
    config: PrepareConfig = cli.parse("prepare", PrepareConfig, arguments, positional="source")
    reporter = cli.Reporter(config.quiet)

    def body() -> int:
        if config.dry_run:
            show(plan(config), reporter)
            return 0
        made = config.check and is_prepared(Path(config.source))
        dataset = Dataset.open(config.source) if made else prepare(config, reporter)
        if not config.check:
            return 0
        return importlib.import_module("pipelines.synapse").check_dataset(dataset, reporter.track, reporter.say)

    return cli.run(body, debug=config.debug)


def show(planned: Plan, reporter: cli.Reporter) -> None:
    """Print the plan and check every header, writing nothing."""
    grids = []
    for job, case in zip(planned.jobs, planned.source.cases, strict=True):
        if case.generate:
            reporter.say(f"{job.case_id} {case.split:<5} to be generated")
            continue
        grids.append(check_headers(job))
        size = "x".join(map(str, grids[-1].lps_shape))
        spacing = "x".join(f"{mm:.3g}" for mm in grids[-1].lps_spacing) + " mm"
        reporter.say(
            f"{job.case_id} {case.split:<5} {size} voxels, "
            f"{spacing if job.spacing_known else 'spacing unknown'}: {job.image}"
        )
    if len(grids) == len(planned.jobs):
        check_space(planned, grids)
    gigabytes = BYTES_PER_VOXEL * sum(prod(grid.shape) for grid in grids) / 1e9
    reporter.say(f"{planned.summary}, {gigabytes:.2f} GB, would be written to {planned.output}")


def check_headers(job: Job) -> Grid:
    """The image's grid, from headers alone; raises BadInput when a label map lies elsewhere."""
    grid = read_grid(job.image)
    for path, _ in job.labels:
        if not grid.matches(read_grid(path)):
            sentence = f"{path} does not lie on the grid of {job.image} (shape or affine differ); resample the labels."
            raise BadInput("grid-mismatch", sentence)
    return grid


def prepare_case(job: Job) -> None:
    """Read, map and store one case, unless it is there already, made from the same files and label table."""
    maps = [(known.names, sorted(known.raw.items()), known.others) for _, known in job.labels]
    inputs = {
        "image": digest(job.image),
        "label": _digest([digest(path) for path, _ in job.labels]),
        "label_map": _digest([job.organs, maps]),
    }
    if not job.spacing_known:
        inputs["spacing"] = "unknown"
    if finished(job.output, job.case_id, inputs):
        return
    image = read_image(job.image)
    label: np.ndarray | None = None
    for path, label_map in job.labels:
        organs = label_map.apply(image.grid.restore(read_labels(path).lps()), str(path))
        if label is None:
            label = organs
        else:
            np.copyto(label, organs, where=organs > 0)
    write_case(job.output, job.case_id, image, label, job.organs, inputs, spacing_known=job.spacing_known)


def check_space(planned: Plan, grids: Sequence[Grid]) -> None:
    """Raises BadInput when the disk cannot hold the cases that are not there yet."""
    cases = zip(planned.jobs, grids, strict=True)
    fresh = [prod(grid.shape) for job, grid in cases if not (planned.output / "cases" / job.case_id).exists()]
    cli.check_space(planned.output, BYTES_PER_VOXEL * sum(fresh))


def _check_output(output: Path, source: Path) -> None:
    """Never write over a source: nnU-Net data has a dataset.json of its own."""
    try:
        ours = str(json.loads((output / "dataset.json").read_bytes())["schema"]).startswith("surm-seg/")
    except (FileNotFoundError, NotADirectoryError):
        ours = output.resolve() != source.resolve()
    except (OSError, ValueError, KeyError, TypeError):
        ours = False
    if not ours:
        raise BadConfig("output", f"{output} holds other data than a prepared data set; choose another --output.")


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


if __name__ == "__main__":
    sys.exit(importlib.import_module("surm_seg.prepare").main())  # by its name, under which other machines know it
