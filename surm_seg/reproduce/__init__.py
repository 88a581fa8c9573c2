"""`surm-seg reproduce synapse`: a published benchmark from its files to a table beside the published numbers.

    surm-seg reproduce synapse --source BTCV --weights sam_vit_b_01ec64.pth
    surm-seg reproduce synapse --rehearse

The source is prepared and checked against what is published about it; then LoRA and every structure are trained by
one recipe, SAMed's, over the seeds: all with the first seed, then all with the next. Options that are not this
command's own are those of `surm-seg train`, for all runs alike.

OUTPUT/data          the prepared data set
      /cells         the runs; a finished one is not repeated, one that was cut goes on from its newest checkpoint
      /seeds         for every method, what its seeds come to by both protocols
      /table.md      what was found beside what is quoted, and table.json with every figure
      /picture.svg   Dice against trained parameters of the encoder
"""

from __future__ import annotations

import difflib
import importlib
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from pipelines.studies.table import write
from surm_seg import cli, prepare, train
from surm_seg.cases import Dataset
from surm_seg.cells import Cell, Done, carried_out, digest, quiet_failure
from surm_seg.errors import BadConfig, BadInput
from surm_seg.lock import held
from surm_seg.output_folder import check_writable, writing
from surm_seg.reproduce.findings import Result, dice_of, found
from surm_seg.reproduce.synapse import (
    ARMS,
    BACKBONE,
    RECIPE,
    REHEARSAL,
    REHEARSAL_JOBS,
    WHERE_DATA,
    WHERE_WEIGHTS,
    Arm,
    write_rehearsal,
)

BENCHMARKS = ("synapse",)
LAYOUTS = ("synapse", "transunet")
NOT_OURS = (
    "output", "task", "recipe", "data", "structure", "structure_options", "seed", "quiet", "dry_run", "resume",
)  # fmt: skip
"""Options of `train` that are set here in every run."""

PRELOADED = ("pipelines.segmentation", "surm_seg.engine")


@dataclass(frozen=True)
class Reproduction:
    """What is run.

    Args:
        source: folder of the benchmark; None where it is generated, or a dry run goes by what is published.
        words: options of `surm-seg train` that all runs share, beside the data.
    """

    source: Path | None
    rehearsal: bool
    seeds: int
    jobs: int
    output: Path
    words: tuple[str, ...]

    @property
    def data(self) -> Path:
        return self.output / "data"

    def words_of(self, arm: Arm) -> tuple[str, ...]:
        """Options of a run, beside its seed and data: all but the arm's structure are the same in every run."""
        own = ("--structure", arm.structure, "--structure_options", json.dumps(arm.options))
        return (*RECIPE, *self.words, *own)

    def cells(self, data: str) -> dict[Cell, tuple[Arm, int]]:
        """All runs in their order, each with its arm and seed.

        Args:
            data: digest of the data set; runs on other data are other runs.
        """
        cells = {}
        for seed in range(self.seeds):
            for arm in ARMS:
                words = (*self.words_of(arm), "--data", str(self.data), "--seed", str(seed))
                cells[Cell(f"{arm.name}-seed{seed}-{digest(words, data)}", words)] = arm, seed
        return cells


def main(argv: Sequence[str] | None = None) -> int:
    cli.offline()
    arguments = list(sys.argv[1:] if argv is None else argv)
    return cli.run(lambda: _main(arguments), debug="--debug" in arguments)


def _main(arguments: list[str]) -> int:
    asked, dry_run = _asked(arguments)
    if "--print_config" in asked.words:
        return train.main(asked.words_of(ARMS[0]))
    reporter = cli.Reporter()
    check_writable(asked.output)
    if asked.source:
        _planned(asked, asked.source, asked.data)
    _check_weights(asked)
    if dry_run:
        return _told_hours(asked, reporter)
    with writing(asked.output), held(asked.output, "reproduced"):
        dataset, agrees = _prepared(asked, reporter)
        cells = asked.cells(dataset.digest)
        first = next(iter(cells))
        place = asked.output / "cells" / first.name
        if not place.exists():
            quiet_failure(train.main, [*first.words, "--dry-run", "--quiet", "--output", str(place)])
        results, failed = _run(asked, cells)
        facts = {"folder": asked.output / "seeds", "words": (*RECIPE, *asked.words)}
        table = found(results, failed, **facts, rehearsal=asked.rehearsal, agrees=agrees)
        write(asked.output, ["surm-seg", "reproduce", *arguments], table)
    return (cli.SOME_CASES_FAILED if results else BadInput.exit_status) if failed else 0


def _asked(arguments: list[str]) -> tuple[Reproduction, bool]:
    benchmark, arguments = BENCHMARKS[0], list(arguments)
    if arguments and not arguments[0].startswith("-"):
        benchmark = arguments.pop(0)
    parser = cli.around_train("reproduce")
    parser.usage = f"surm-seg reproduce {'|'.join(BENCHMARKS)} [options]"
    parser.add_argument("--source", type=Path, help="folder of the benchmark's volumes, as it was downloaded")
    parser.add_argument("--weights", help="SAM's ViT-B checkpoint, sam_vit_b_01ec64.pth")
    parser.add_argument("--rehearse", action="store_true", help="the whole at toy size, on generated patients")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each method; default 3")
    parser.add_argument("--jobs", type=int, help=f"runs at once; default 1, in a rehearsal {REHEARSAL_JOBS}")
    parser.add_argument("--output", type=Path, help="default runs/reproduce-synapse, or runs/rehearsal")
    parser.add_argument("--dry-run", "--dry_run", action="store_true", help="say how long it will take")
    own, words = cli.own_and_train(parser, arguments, NOT_OURS)
    if benchmark not in BENCHMARKS:
        near = difflib.get_close_matches(benchmark, BENCHMARKS, cutoff=0.3)
        hint = f"did you mean {' or '.join(near)}?" if near else f"there is {', '.join(BENCHMARKS)}."
        raise BadConfig("benchmark-name", f"There is no benchmark {benchmark!r} to reproduce; {hint}")
    jobs = (REHEARSAL_JOBS if own.rehearse else 1) if own.jobs is None else own.jobs
    if own.seeds < 1 or jobs < 1:
        raise BadConfig("reproduce-option", "--seeds and --jobs must be 1 or more.")
    trains = not (own.rehearse or own.dry_run or "--print_config" in words)
    if own.source is None and trains:
        raise BadConfig("reproduce-source", f"--source is missing. {WHERE_DATA}")
    if own.source is not None and not own.source.is_dir():
        raise BadInput("source-missing", f"There is no folder {own.source}. {WHERE_DATA}")
    toy = REHEARSAL if own.rehearse else ("--backbone", BACKBONE)
    if own.weights is None and trains:
        raise BadConfig("reproduce-weights", f"--weights is missing. {WHERE_WEIGHTS}")
    weights = own.weights or ("auto" if own.rehearse else "random")  # which take as long as any
    output = own.output or Path("runs") / ("rehearsal" if own.rehearse else f"reproduce-{benchmark}")
    shared = (*toy, "--weights", weights, *words)
    return Reproduction(own.source, own.rehearse, own.seeds, jobs, output, shared), own.dry_run


def _check_weights(asked: Reproduction) -> None:
    """Raise what building the first model raises: weights that are absent, damaged or another model's, and options."""
    task, _, _, options = train.parsed(asked.words_of(ARMS[0]))
    try:
        task.check(options, 0)
    except BadInput as error:
        raise BadInput(error.code, f"{error} {WHERE_WEIGHTS}") from error


def _told_hours(asked: Reproduction, reporter: cli.Reporter) -> int:
    hours = importlib.import_module("surm_seg.reproduce.hours")
    with TemporaryDirectory() as folder:
        scratch = Path(folder)
        source = asked.source or (write_rehearsal(scratch / "source") if asked.rehearsal else None)
        planned = _planned(asked, source, scratch / "planned") if source else None
        words = {arm.name: asked.words_of(arm) for arm in ARMS}
        return hours.tell(words, asked.seeds, hours.extent(planned), scratch, reporter)


def _prepared(asked: Reproduction, reporter: cli.Reporter) -> tuple[Dataset, bool]:
    """The prepared data set, and whether it agrees with what is published; raises BadInput where it has to."""
    synapse = importlib.import_module("pipelines.synapse")
    source = asked.source or write_rehearsal(asked.output / "source")
    dataset = prepare.prepare(prepare.PrepareConfig(source=str(source), output=asked.data), reporter)
    plausible = synapse.check_dataset(dataset, reporter.track, reporter.say) == 0
    agrees = plausible and synapse.is_benchmark(dataset)
    if not agrees and not asked.rehearsal:
        sentence = f"{source} is not the benchmark as published (see above); nothing was trained."
        raise BadInput("benchmark-differs", f"{sentence} {WHERE_DATA}")
    return dataset, agrees


def _planned(asked: Reproduction, source: Path, output: Path) -> prepare.Plan:
    """The benchmark's cases in the source, by name; raises BadInput for another layout, or for more or fewer cases."""
    synapse = importlib.import_module("pipelines.synapse")
    try:
        planned = prepare.plan(prepare.PrepareConfig(source=str(source), output=output))
    except BadInput as error:
        raise BadInput(error.code, f"{error} {WHERE_DATA}") from error
    if planned.source.format not in LAYOUTS:
        layouts = " or ".join(LAYOUTS)
        sentence = f"{source} is laid out as {planned.source.format}, not as {layouts}."
        raise BadInput("benchmark-layout", f"{sentence} {WHERE_DATA}")
    there = {job.case_id for job in planned.jobs}
    missing, more = sorted(synapse.CASES - there), sorted(there - synapse.CASES)
    if more and not asked.rehearsal:  # the published split is known for the benchmark's own cases only
        sentence = f"{source} also holds {', '.join(more)}, not of the benchmark; move them elsewhere."
        raise BadInput("benchmark-cases", f"{sentence} {WHERE_DATA}")
    if missing and not asked.rehearsal:
        sentence = f"{source} lacks {len(missing)} of the benchmark's {len(synapse.CASES)} cases: {', '.join(missing)}."
        raise BadInput("benchmark-cases", f"{sentence} {WHERE_DATA}")
    return planned


def _run(asked: Reproduction, cells: dict[Cell, tuple[Arm, int]]) -> tuple[list[Result], dict[str, str]]:
    """The finished runs of every arm, and the error of every run that failed."""
    done: dict[Arm, dict[int, Done]] = {arm: {} for arm in ARMS}
    failed: dict[str, str] = {}
    for number, (cell, outcome) in enumerate(_outcomes(asked, list(cells)), 1):
        place = f"{number}/{len(cells)} {cell.name}"
        if outcome.error is None:
            arm, seed = cells[cell]
            done[arm][seed] = outcome
            print(f"{place}: Dice {dice_of(outcome.folder)}", flush=True)
        else:
            failed[cell.name] = f"[{outcome.error.code}] {outcome.error}"
            print(f"{place}: failed {failed[cell.name]}", file=sys.stderr, flush=True)
    return [Result(arm, dict(sorted(runs.items()))) for arm, runs in done.items() if runs], failed


def _outcomes(asked: Reproduction, cells: Sequence[Cell]) -> Iterator[tuple[Cell, Done]]:
    return carried_out(cells, asked.output / "cells", train.main, asked.jobs, resume=True, preloaded=PRELOADED)
