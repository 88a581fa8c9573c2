"""`surm-seg prepare SOURCE`: CT volumes and labels -> a prepared data set (see cases.py).

Everything about the layout is checked before anything is written. Cases are prepared in parallel, each appears by one
rename, and a second run goes on where the first one stopped. A run that fails leaves an older data set in that folder
as it was, and says which files it could not use.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib
import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from surm_seg import cli
from surm_seg.cases import CASE_ID, SPLITS, Dataset, file_digest, finished, write_case, write_dataset
from surm_seg.errors import BadConfig, BadInput
from surm_seg.labels import LabelMap
from surm_seg.pool import run_all
from surm_seg.volume import Grid, read_grid, read_image, read_labels

BYTES_PER_VOXEL = 3  # int16 image and uint8 label


@dataclass
class PrepareConfig(cli.Common):
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
        workers: processes; default is one per CPU.
        keep_names: use the source's case names as ids; they may identify patients.
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
    output = config.output or Path("data") / Path(config.source).resolve().name
    _check_output(output, Path(config.source))
    wanted = {field.name: getattr(config, field.name) for field in fields(formats.Options) if field.name != "output"}
    options = formats.Options(output=output, **wanted)
    try:
        source = formats.read(Path(config.source), config.format, options)
    except OSError as error:
        sentence = f"{error.filename or config.source} cannot be read ({error.strerror}); check name and rights."
        raise BadInput("source", sentence) from error
    jobs = []
    for number, case in enumerate(source.cases, 1):
        case_id = case.name if source.public or config.keep_names else f"case{number:03d}"
        if not CASE_ID.fullmatch(case_id):
            raise BadInput("case-name", f"{case.image} cannot keep its name; rename it to letters, digits, . _ and -.")
        jobs.append(Job(output, case_id, case.image, tuple((f.path, f.map) for f in case.labels), source.organs))
    return Plan(output, source, tuple(jobs))


def prepare(config: PrepareConfig, reporter: cli.Reporter) -> Dataset:
    """Prepare the source and return the data set; raises BadInput naming the file that cannot be used."""
    return carry_out(plan(config), config.workers or os.cpu_count() or 1, reporter)


def carry_out(planned: Plan, workers: int, reporter: cli.Reporter) -> Dataset:
    """Generate, prepare and write what the plan says; the manifest comes last. Raises BadInput."""
    try:
        dataset = _carry_out(planned, workers, reporter)
    except OSError as error:
        sentence = f"{planned.output} cannot be written ({error.strerror}); choose --output or free space."
        raise BadInput("output", sentence) from error
    absent = [organ for organ in dataset.labels if not any((c.histogram or {}).get(organ) for c in dataset.cases)]
    if absent:
        reporter.say(f"note: no case contains {', '.join(absent)}; check the label table")
    reporter.say(f"{planned.summary}: {planned.output}")
    return dataset


def _carry_out(planned: Plan, workers: int, reporter: cli.Reporter) -> Dataset:
    output, source = planned.output, planned.source
    generating = [case.generate for case in source.cases if case.generate]
    if not generating:
        check_space(planned, [check_headers(job) for job in planned.jobs])
    with _locked(output):
        for leftover in (output / "cases").glob(".*.part"):
            shutil.rmtree(leftover)
        run_all(generating, "generating", workers, reporter)
        run_all([partial(prepare_case, job) for job in planned.jobs], "preparing", workers, reporter)
        cases = {job.case_id: case for job, case in zip(planned.jobs, source.cases, strict=True)}
        splits = {case_id: case.split for case_id, case in cases.items()}
        key = {case_id: [c.name, str(c.image), *(str(file.path) for file in c.labels)] for case_id, c in cases.items()}
        return write_dataset(output, source.format, source.organs, splits, key)


def main(arguments: Sequence[str] | None = None) -> int:
    config: PrepareConfig = cli.parse("prepare", PrepareConfig, arguments, positional="source")
    reporter = cli.Reporter(config.quiet)

    def body() -> None:
        if config.dry_run:
            show(plan(config), reporter)
        else:
            prepare(config, reporter)

    return cli.run(body, debug=config.debug)


def show(planned: Plan, reporter: cli.Reporter) -> None:
    """Print the plan and check every header, writing nothing."""
    grids = []
    for job, case in zip(planned.jobs, planned.source.cases, strict=True):
        if case.generate:
            reporter.say(f"{job.case_id} {case.split:<5} to be generated")
            continue
        grids.append(check_headers(job))
        size, spacing = "x".join(map(str, grids[-1].lps_shape)), "x".join(f"{mm:.3g}" for mm in grids[-1].lps_spacing)
        reporter.say(f"{job.case_id} {case.split:<5} {size} voxels, {spacing} mm: {job.image}")
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
    maps = [(label_map.names, sorted(label_map.raw.items())) for _, label_map in job.labels]
    inputs = {
        "image": file_digest(job.image),
        "label": _digest([file_digest(path) for path, _ in job.labels]),
        "label_map": _digest([job.organs, maps]),
    }
    if finished(job.output, job.case_id, inputs):
        return
    image = read_image(job.image)
    label: np.ndarray | None = None
    for path, label_map in job.labels:
        organs = label_map.apply(read_labels(path).voxels, str(path))
        if label is None:
            label = organs
        else:
            np.copyto(label, organs, where=organs > 0)
    write_case(job.output, job.case_id, image, label, job.organs, inputs)


def check_space(planned: Plan, grids: Sequence[Grid]) -> None:
    """Raises BadInput when the disk cannot hold the cases that are not there yet."""
    output = planned.output.absolute()
    cases = zip(planned.jobs, grids, strict=True)
    fresh = [prod(grid.shape) for job, grid in cases if not (output / "cases" / job.case_id).exists()]
    needed = BYTES_PER_VOXEL * sum(fresh)
    free = shutil.disk_usage(next(place for place in (output, *output.parents) if place.exists())).free
    if needed > free:
        sentence = f"{planned.output} needs {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB are free; choose --output."
        raise BadInput("disk-full", sentence)


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


@contextmanager
def _locked(output: Path) -> Iterator[None]:
    """Hold the output folder; raises BadInput while another process does. What stays empty is removed at the end."""
    lock, made = output / ".lock", not output.exists()
    output.mkdir(parents=True, exist_ok=True)
    with open(lock, "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not lock.exists() or not os.path.samestat(os.fstat(file.fileno()), lock.stat()):
                raise BlockingIOError  # its holder finished, and removed it, between our open and flock
        except BlockingIOError as error:
            file.seek(0)
            raise BadInput("busy", f"{output} is being prepared by process {file.read()}; wait for it.") from error
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)
            for folder in [output / "cases", output] if made else [output / "cases"]:
                with suppress(OSError):  # not empty, or never made
                    folder.rmdir()


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


if __name__ == "__main__":
    sys.exit(main())
