"""`surm-seg evaluate`: score predicted label maps against references, on their common grid."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from pathlib import Path

import numpy as np
from scipy.ndimage import affine_transform

from surm_seg import cli
from surm_seg.errors import BadConfig, BadInput, SurmError
from surm_seg.labels import SYNAPSE, LabelMap, read_table
from surm_seg.metrics import NSD_TOLERANCE_MM, PROTOCOLS
from surm_seg.report import Row, dice_table, score_pair, write_scores
from surm_seg.volume import ENDINGS, Grid, Volume, bare_name, read_grid, read_labels, replacing, stem

__all__ = ["EvaluateConfig", "evaluate", "label_table", "main", "match", "score_pair"]

MAX_NAMED = 8  # files named where none has a counterpart
MAX_PUBLIC_DIGITS = 4  # img0001 numbers a volume of a data set; longer numbers may be a patient's


@dataclass
class EvaluateConfig(cli.Common):
    """Score predicted label maps against references.

    Args:
        output: folder for cases.csv and summary.json; default `scores` beside the prediction folder, or `evaluation`
            where those are a training run's own.
        prediction: a .nii or .nii.gz label map, or a folder of them.
        reference: the same; files of equal name belong together, two single files always do.
        labels: synapse, or a YAML file `value: organ` (an empty organ is background), for both sides.
        protocols: recommended, samed-2023 or both.
        nsd_tolerance: mm within which two surfaces agree.
        resample: bring a prediction on another grid to the reference's by nearest neighbour, instead of refusing it.
        workers: threads; default is one per CPU.
        keep_names: use file names as case names; they may identify patients.
    """

    prediction: Path | None = None
    reference: Path | None = None
    labels: str = "synapse"
    protocols: list[str] = field(default_factory=lambda: list(PROTOCOLS))
    nsd_tolerance: float = NSD_TOLERANCE_MM
    resample: bool = False
    workers: int | None = None
    keep_names: bool = False


@dataclass(frozen=True)
class Pair:
    """A case: its name in the scores, and its two files."""

    case: str
    prediction: Path
    reference: Path


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
    table = label_table(config.labels)
    output = _output(config, prediction)
    pairs, left_over = match(prediction, reference, keep_names=config.keep_names)
    if not pairs:
        for sentence in left_over[:MAX_NAMED]:
            print(f"error [unmatched]: {sentence}", file=sys.stderr)
        sentence = (
            f"No file of {prediction} matches one of {reference} by name; name predictions like their references."
        )
        raise BadInput("none-matched", sentence)
    for sentence in left_over:
        reporter.say(sentence)
    workers = config.workers or os.cpu_count() or 1
    body = _check_grids if config.dry_run else partial(_score_case, table=table, threads=max(1, workers // len(pairs)))
    title = "checking" if config.dry_run else "scoring"
    with ThreadPoolExecutor(min(workers, len(pairs))) as pool:
        outcomes = pool.map(partial(_outcome, body, config=config), pairs)
        finished = list(reporter.track(outcomes, title, len(pairs)))
    failures = [outcome for outcome in finished if isinstance(outcome, Failure)]
    for failure in failures:
        print(f"error [{failure.code}]: {stem(failure.pair.prediction)}: {failure.sentence}", file=sys.stderr)
    if len(failures) == len(pairs):
        return BadInput.exit_status
    if config.dry_run:
        reporter.say(f"dry run: {len(pairs) - len(failures)} of {len(pairs)} cases can be scored; nothing written")
    else:
        rows = [row for outcome in finished if not isinstance(outcome, Failure) for row in outcome]
        try:
            summary = write_scores(output, rows, nsd_tolerance=config.nsd_tolerance)
            if not config.keep_names:
                _write_key(output, pairs)
        except OSError as error:
            sentence = f"{output} cannot be written ({error.strerror}); choose --output or free space."
            raise BadInput("output", sentence) from error
        reporter.say(dice_table(summary))
        reporter.say(
            f"{len(pairs) - len(failures)} of {len(pairs)} cases scored; cases.csv and summary.json in {output}"
        )
    return cli.SOME_CASES_FAILED if failures else 0


def label_table(labels: str) -> LabelMap:
    """The label table `synapse`, or that of a YAML file; raises BadConfig."""
    if labels == "synapse":
        return LabelMap(SYNAPSE, dict(enumerate(SYNAPSE, 1)))
    return read_table(Path(labels))


def match(prediction: Path, reference: Path, *, keep_names: bool = False) -> tuple[list[Pair], list[str]]:
    """Files that belong together, by name, and a sentence about every file that has no counterpart or several.

    Names are compared without their ending, the prefixes img, label and case, and the suffixes _0000, _gt and _seg.
    Two single files are a pair whatever their names. A case is called after the prediction with `keep_names`, after its
    number in img0001, label0001 or case0001, which identifies nobody, and else case001, ... in the order of the names.
    """
    predictions, references = _volumes(prediction), _volumes(reference)
    if prediction.is_file() and reference.is_file():
        found, left_over = {bare_name(prediction): (prediction, reference)}, []
    else:
        found, left_over = {}, []
        for name in sorted({*predictions, *references}):
            ours, theirs = predictions.get(name, []), references.get(name, [])
            if len(ours) == len(theirs) == 1:
                found[name] = (ours[0], theirs[0])
            elif len(ours) > 1 or len(theirs) > 1:
                files = ", ".join(str(path) for path in (*ours, *theirs))
                left_over.append(f"not scored, because their names are ambiguous: {files}")
            else:
                left_over.append(f"not scored, because there is no counterpart: {(*ours, *theirs)[0]}")
    public = {name: f"case{name}" for name in found if _is_public(name)}
    free = (case for case in (f"case{n:03d}" for n in count(1)) if case not in public.values())
    pairs = []
    for name, (ours, theirs) in found.items():
        case = stem(ours) if keep_names else public[name] if name in public else next(free)
        pairs.append(Pair(case, ours, theirs))
    return pairs, left_over


def _is_public(name: str) -> bool:
    return name.isascii() and name.isdigit() and len(name) <= MAX_PUBLIC_DIGITS


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
    return config.prediction, config.reference


def _output(config: EvaluateConfig, prediction: Path) -> Path:
    """Where the scores go; raises BadConfig where they would mix with a prepared data set, whose key they share."""
    folder = (prediction if prediction.is_dir() else prediction.parent).resolve().parent
    # config.yaml: the folder of a training run, whose scores are its own.
    output = config.output or folder / ("evaluation" if (folder / "config.yaml").exists() else "scores")
    if (output / "dataset.json").exists():
        raise BadConfig("output", f"{output} holds a data set; choose another --output.")
    return output


def _write_key(folder: Path, pairs: Sequence[Pair]) -> None:
    """The user's own file names by case, for the user only."""
    key = {pair.case: [pair.prediction.name, pair.reference.name] for pair in pairs}
    with replacing(folder / "case_key.json", 0o600) as file:
        file.write(json.dumps(key, indent=1).encode() + b"\n")


def _volumes(path: Path) -> dict[str, list[Path]]:
    """The NIfTI files that a file or folder stands for, by the part of their name that identifies the case."""
    if not path.exists():
        raise BadInput("no-volumes", f"There is no {path}; give a label map or a folder of them.")
    # Hidden files are not data: macOS leaves `._case.nii.gz` on shared disks.
    files = [file for file in path.iterdir() if not file.name.startswith(".")] if path.is_dir() else [path]
    found: dict[str, list[Path]] = {}
    for file in sorted(files):
        if file.name.lower().endswith(ENDINGS):
            found.setdefault(bare_name(file), []).append(file)
    return found


def _outcome(body: Callable[..., list[Row]], pair: Pair, config: EvaluateConfig) -> list[Row] | Failure:
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


def _score_case(pair: Pair, config: EvaluateConfig, *, table: LabelMap, threads: int) -> list[Row]:
    _check_grids(pair, config)
    prediction, reference = read_labels(pair.prediction), read_labels(pair.reference)
    if not prediction.grid.matches(reference.grid):
        prediction = _onto(reference.grid, prediction)
    return score_pair(
        table.apply(reference.grid.lps(prediction.voxels), str(pair.prediction)),
        table.apply(reference.lps(), str(pair.reference)),
        table.names,
        reference.grid.lps_spacing,
        pair.case,
        protocols=config.protocols,
        nsd_tolerance=config.nsd_tolerance,
        workers=threads,
    )


def _onto(grid: Grid, labels: Volume) -> Volume:
    """The label map on another grid, each voxel the nearest one's value and background beyond the edge."""
    to_source = np.linalg.inv(labels.grid.affine) @ grid.affine
    return Volume(affine_transform(labels.voxels, to_source, output_shape=grid.shape, order=0), grid)


def _described(grid: Grid) -> str:
    return f"{'x'.join(map(str, grid.shape))} voxels of {'x'.join(f'{mm:g}' for mm in grid.spacing)} mm"


if __name__ == "__main__":
    sys.exit(main())
