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
import multiprocessing
import os
import shutil
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from surm_seg import cli
from surm_seg.cases import CASE_ID, SPLITS, Dataset, file_digest, finished, write_case, write_dataset
from surm_seg.errors import BadConfig, BadInput, SurmError
from surm_seg.labels import LabelMap
from surm_seg.volume import Grid, read_grid, read_image, read_labels

BYTES_PER_VOXEL = 3  # int16 image and uint8 label

Refusal = tuple[type[SurmError], str, str]


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
        _run(generating, "generating", workers, reporter)
        _run([partial(prepare_case, job) for job in planned.jobs], "preparing", workers, reporter)
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


def _run(tasks: Sequence[Callable[[], None]], title: str, workers: int, reporter: cli.Reporter) -> None:
    """Run all tasks, also after one failed, so that every bad file is named on standard error; raises BadInput then."""
    outcomes = _outcomes(tasks, min(workers, len(tasks)))
    refused = [outcome for outcome in reporter.track(outcomes, title, len(tasks)) if outcome is not None]
    if len(refused) == 1:
        kind, code, sentence = refused[0]
        raise kind(code, sentence)
    if refused:
        for _, code, sentence in refused:
            print(f"error [{code}]: {sentence}", file=sys.stderr)
        counted = f"{len(refused)} of {len(tasks)} cases could not be prepared"
        raise BadInput("cases-failed", f"{counted}; mend or remove the files named above.")


def _outcomes(tasks: Sequence[Callable[[], None]], workers: int) -> Iterator[Refusal | None]:
    if workers <= 1:
        yield from map(_outcome, tasks)
        return
    # Not fork: a child of a process with threads can deadlock. Not spawn: every worker would import torch anew.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker) as pool:
        try:
            for future in as_completed([pool.submit(_outcome, task) for task in tasks]):
                yield future.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _outcome(task: Callable[[], None]) -> Refusal | None:
    """None, or the parts of the error: an exception of two arguments does not travel between processes."""
    try:
        task()
    except SurmError as error:
        return type(error), error.code, str(error)
    except OSError as error:
        return BadInput, "disk", f"{error.strerror} ({error.filename or 'while writing'}); free space or check rights."
    except MemoryError:
        return BadInput, "memory", "A case does not fit into memory; give fewer --workers, or crop the volume."
    return None


def _start_worker() -> None:
    """Ctrl-C is the parent's business, and a worker does not outlive a killed parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


if __name__ == "__main__":
    sys.exit(main())
