"""`surm-seg evaluate`: score predicted label maps against references, on their common grid."""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from scipy.ndimage import affine_transform

from surm_seg import cli, cluster
from surm_seg.errors import BadConfig, BadInput, SurmError
from surm_seg.labels import LabelMap, label_table, label_tables, numbered, predicted_organs
from surm_seg.matching import Pair, match, with_images
from surm_seg.metrics import NSD_TOLERANCE_MM, PROTOCOLS
from surm_seg.output_folder import check_writable, writing
from surm_seg.pool import Outcome, say_retries, threads
from surm_seg.report import Row, dice_table, write_scores
from surm_seg.report_page import Views, write_report
from surm_seg.scored import FOLDER, Scored, forget, keep, kept, key_of, score_case
from surm_seg.volume import Grid, Volume, digest, read_grid, read_image, read_labels, replacing, stem

MAX_NAMED = 8  # files named where none has a counterpart


@dataclass
class EvaluateConfig(cluster.Options):
    """Score predicted label maps against references.

    Args:
        output: folder for cases.csv, slices.csv, summary.json and report.html; default `scores` beside the prediction
            folder, or `evaluation` where those are a training run's own.
        prediction: a label map, or a folder of them.
        reference: the same; files of equal name belong together, two single files always do.
        image: the CT or a folder of them, matched likewise, to draw the outlines on in the report.
        labels: synapse, or a YAML file `value: organ` (an empty organ is background; `other:` makes background of all
            values that are not listed), for both sides; predictions of `predict` and of a run know their own numbers.
        reference_labels: the same for the reference, where its values mean something else; the organs must be the same.
        protocols: recommended, samed-2023 or both.
        nsd_tolerance: mm within which two surfaces agree.
        resample: bring a prediction on another grid to the reference's by nearest neighbour, instead of refusing it.
        workers: threads; default is one per CPU. A running Ray cluster uses the CPUs it has.
        keep_names: use file names as case names; they may identify patients.
    """

    prediction: Path | None = None
    reference: Path | None = None
    image: Path | None = None
    labels: str = "synapse"
    reference_labels: str | None = None
    protocols: list[str] = field(default_factory=lambda: list(PROTOCOLS))
    nsd_tolerance: float = NSD_TOLERANCE_MM
    resample: bool = False
    workers: int | None = None
    keep_names: bool = False


@dataclass(frozen=True)
class Failure:
    """Why a case has no scores."""

    pair: Pair
    code: str
    sentence: str


def main(argv: Sequence[str] | None = None) -> int:
    config = cli.parse("evaluate", EvaluateConfig, argv)
    return cli.run(lambda: evaluate(config), debug=config.debug)


def evaluate(config: EvaluateConfig) -> int:
    """Run a parsed command; a failed case is listed and never stops the others."""
    prediction, reference = _checked(config)
    reporter = cli.Reporter(config.quiet)
    organs = predicted_organs(prediction)
    ours = numbered(organs) if organs else label_table(config.labels)
    tables = label_tables(ours, label_table(config.reference_labels or config.labels))
    output = _output(config, prediction)
    pairs, unpaired = _cases(prediction, reference, config, reporter)
    if not config.dry_run:
        check_writable(output)
    workers = config.workers or os.cpu_count() or 1
    per_case = 1 if config.engine == "ray" else max(1, workers // len(pairs))
    scoring = partial(_score_case, output=output, tables=tables, known=kept(output), threads=per_case)
    title, body = ("checking", _check_grids) if config.dry_run else ("scoring", scoring)
    local = partial(threads, min(workers, len(pairs)))
    with cluster.engine_of(config, local, output / FOLDER, workers=config.workers) as engine:
        outcomes = list(reporter.track(engine(partial(_outcome, body, config=config), pairs), title, len(pairs)))
    say_retries(outcomes, reporter)
    finished = [_result(outcome, pairs) for outcome in sorted(outcomes, key=lambda outcome: outcome.number)]
    failures = [outcome for outcome in finished if isinstance(outcome, Failure)]
    for failure in failures:
        print(f"error [{failure.code}]: {stem(failure.pair.prediction)}: {failure.sentence}", file=sys.stderr)
    if len(failures) == len(pairs):
        return BadInput.exit_status
    good = f"{len(pairs) - len(failures)} of {len(pairs)} cases"
    if config.dry_run:
        reporter.say(f"dry run: {good} can be scored; nothing written")
        return cli.SOME_CASES_FAILED if failures else 0
    notes = [f"{failure.pair.case} could not be scored ({failure.code}) and is in no number." for failure in failures]
    if unpaired:
        notes.append(f"Files or groups of files that were left out, as their names match none or several: {unpaired}.")
    scored = Scored.joined(outcome for outcome in finished if isinstance(outcome, Scored))
    drawing = partial(_views, pairs={pair.case: pair for pair in pairs}, config=config, tables=tables)
    with writing(output):
        summary = write_scores(output, scored.rows, scored.slices, nsd_tolerance=config.nsd_tolerance)
        write_report(output, summary, scored.rows, scored.slices, drawing, notes=notes)
        forget(output, {pair.case for pair in pairs})
        if not config.keep_names:
            _write_key(output, pairs)
    reporter.say(dice_table(summary))
    reporter.say(f"{good} scored; report.html, cases.csv, slices.csv and summary.json in {output}")
    return cli.SOME_CASES_FAILED if failures else 0


def _cases(prediction: Path, reference: Path, config: EvaluateConfig, reporter: cli.Reporter) -> tuple[list[Pair], int]:
    """The cases, and how many files or groups of files are none; raises BadInput where there is no case."""
    pairs, left_over = match(prediction, reference, keep_names=config.keep_names)
    if not pairs:
        for sentence in left_over[:MAX_NAMED]:
            print(f"error [unmatched]: {sentence}", file=sys.stderr)
        sentence = (
            f"No file of {prediction} matches one of {reference} by name; name predictions like their references."
        )
        raise BadInput("none-matched", sentence)
    unpaired = len(left_over)
    if config.image is not None:
        pairs, without = with_images(pairs, config.image)
        left_over += without
    for sentence in left_over:
        reporter.say(sentence)
    return pairs, unpaired


def _checked(config: EvaluateConfig) -> tuple[Path, Path]:
    """Prediction and reference, once all options are known to make sense; raises BadConfig."""
    if config.prediction is None or config.reference is None:
        raise BadConfig("missing-option", "evaluate needs --prediction and --reference; each is a file or a folder.")
    unknown = sorted(set(config.protocols) - set(PROTOCOLS))
    if unknown or not config.protocols:
        asked = ", ".join(unknown) or "none"
        raise BadConfig("protocol", f"--protocols: {asked} cannot be used; choose among {', '.join(PROTOCOLS)}.")
    if not 0 <= config.nsd_tolerance < float("inf"):
        raise BadConfig("nsd-tolerance", f"--nsd_tolerance {config.nsd_tolerance} must be a number of mm from 0 up.")
    if config.workers is not None and config.workers < 1:
        raise BadConfig("workers", f"--workers {config.workers} must be 1 or more.")
    return config.shared(config.prediction), config.shared(config.reference)


def _output(config: EvaluateConfig, prediction: Path) -> Path:
    """Where the scores go; raises BadConfig where they would mix with a prepared data set, whose key they share."""
    folder = (prediction if prediction.is_dir() else prediction.parent).resolve().parent
    # config.yaml: the folder of a training run, whose scores are its own.
    output = config.shared(config.output or folder / ("evaluation" if (folder / "config.yaml").exists() else "scores"))
    if (output / "dataset.json").exists():
        raise BadConfig("output", f"{output} holds a data set; choose another --output.")
    return output


def _write_key(folder: Path, pairs: Sequence[Pair]) -> None:
    """The user's own file names by case, for the user only."""
    key = {pair.case: [pair.prediction.name, pair.reference.name] for pair in pairs}
    with replacing(folder / "case_key.json", 0o600) as file:
        file.write(json.dumps(key, indent=1).encode() + b"\n")


def _result(outcome: Outcome, pairs: Sequence[Pair]) -> Any:
    """What came of a case, also where none of the machines that worked on it came back."""
    error = outcome.error
    return outcome.value if error is None else Failure(pairs[outcome.number], error.code, str(error))


def _outcome(body: Callable[..., Any], pair: Pair, config: EvaluateConfig) -> Any:
    """What the body returns, or why it could not."""
    try:
        return body(pair, config)
    except SurmError as error:
        return Failure(pair, error.code, str(error))
    except OSError as error:
        return Failure(pair, "unreadable", f"it cannot be read ({error.strerror}); check the disk and rights.")
    except MemoryError:
        return Failure(pair, "memory", "it does not fit into memory; give fewer --workers, or crop the volume.")


def _check_grids(pair: Pair, config: EvaluateConfig) -> list[Row]:
    """No rows; raises BadInput where the two grids differ and must not."""
    ours, theirs = read_grid(pair.prediction), read_grid(pair.reference)
    if not config.resample and not ours.matches(theirs):
        raise BadInput(
            "grids-differ",
            f"{pair.prediction} ({_described(ours)}) does not lie on the grid of {pair.reference} "
            f"({_described(theirs)}); predict on that grid, or give --resample.",
        )
    return []


def _score_case(
    pair: Pair,
    config: EvaluateConfig,
    *,
    output: Path,
    tables: tuple[LabelMap, LabelMap],
    known: Mapping[str, Scored],
    threads: int,
) -> Scored:
    """Score a case and record it, or take the record of the same files, options and tables."""
    key = _key(pair, config, tables)
    scored = known[key].named(pair.case) if key in known else None
    if scored is None:
        prediction, reference, grid = _label_maps(pair, config, tables)
        scored = score_case(
            prediction,
            reference,
            tables[0].names,
            grid.lps_spacing,
            pair.case,
            protocols=config.protocols,
            nsd_tolerance=config.nsd_tolerance,
            workers=threads,
        )
    with writing(output):
        keep(output, pair.case, key, scored)
    return scored


def _key(pair: Pair, config: EvaluateConfig, tables: tuple[LabelMap, LabelMap]) -> str:
    """What a case is recorded under."""
    meanings = [[table.names, sorted(table.raw.items()), table.others] for table in tables]
    files = digest(pair.prediction), digest(pair.reference)
    return key_of([*files, meanings, config.protocols, config.nsd_tolerance, config.resample])


def _label_maps(
    pair: Pair, config: EvaluateConfig, tables: tuple[LabelMap, LabelMap]
) -> tuple[np.ndarray, np.ndarray, Grid]:
    """Organs of the prediction and of the reference, axes (z, y, x), on the reference's grid."""
    _check_grids(pair, config)
    prediction, reference = read_labels(pair.prediction), read_labels(pair.reference)
    if not prediction.grid.matches(reference.grid):
        prediction = _onto(reference.grid, prediction)
    ours = tables[0].apply(prediction.lps(), str(pair.prediction))
    return ours, tables[1].apply(reference.lps(), str(pair.reference)), reference.grid


def _views(
    case: str, *, pairs: Mapping[str, Pair], config: EvaluateConfig, tables: tuple[LabelMap, LabelMap]
) -> Views | None:
    """What the pictures of a case are drawn from; what cannot be read is said, and left out."""
    pair = pairs[case]
    maps = _outcome(partial(_label_maps, tables=tables), pair, config)
    image = None if pair.image is None else _outcome(_image, pair, config)
    for found in (maps, image):
        if isinstance(found, Failure):
            print(f"not drawn [{found.code}]: {stem(pair.prediction)}: {found.sentence}", file=sys.stderr)
    if isinstance(maps, Failure):
        return None
    prediction, reference, grid = maps
    return Views(image if isinstance(image, np.ndarray) else None, prediction, reference, grid.lps_spacing)


def _image(pair: Pair, config: EvaluateConfig) -> np.ndarray:
    """HU, axes (z, y, x); raises BadInput where the image lies elsewhere than the reference."""
    assert pair.image is not None
    image = read_image(pair.image)
    if not image.grid.matches(read_grid(pair.reference)):
        raise BadInput(
            "grids-differ", f"{pair.image} does not lie on the grid of {pair.reference}; give its own image."
        )
    return image.lps()


def _onto(grid: Grid, labels: Volume) -> Volume:
    """The label map on another grid, each voxel the nearest one's value and background beyond the edge."""
    to_source = np.linalg.inv(labels.grid.affine) @ grid.affine
    # Not `constant`, which takes the outer half of the border voxels for the outside.
    voxels = affine_transform(labels.voxels, to_source, output_shape=grid.shape, order=0, mode="grid-constant")
    return Volume(voxels, grid)


def _described(grid: Grid) -> str:
    return f"{'x'.join(map(str, grid.shape))} voxels of {'x'.join(f'{mm:g}' for mm in grid.spacing)} mm"


if __name__ == "__main__":
    sys.exit(importlib.import_module("surm_seg.evaluate").main())  # by its name, under which other machines know it
