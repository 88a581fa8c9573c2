"""`surm-seg sweep`: methods x learning rates x seeds on one task; a table and a picture.

    surm-seg sweep --methods circulant,lora --budget 20000 --task glue --name cola --data CoLA --model DIR

Without --budget every method has its own usual size, and the table says so.

Each method's learning rate is chosen on the validation set with the first seed, also beyond the given ones where the
best of these is an edge; the test set is then read at the winner, over all seeds. Options that are not the sweep's own
are those of `surm-seg train`.

OUTPUT/cells           the runs; a finished one is not repeated, so that a sweep that was cut goes on
      /table.md        what they come to, and table.json with every figure
      /picture.svg     quality against trained parameters
      /precision.json  what --precision auto came to, with the first of the runs
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median

import numpy as np
import torch

from pipelines.selection import Comparison, Selected, selected
from pipelines.studies.picture import page, scatter
from pipelines.studies.table import Found, Row, markdown, spread, write
from surm_seg import cli, methods, train
from surm_seg.cells import quiet_failure
from surm_seg.errors import BadConfig, BadInput, SurmError
from surm_seg.lock import held
from surm_seg.output_folder import check_writable, writing
from surm_seg.precision import fast_precision, kept_precision

METHODS = (
    "circulant", "toeplitz", "kronecker", "monarch", "circulant_adapter", "houlsby", "lora", "dora", "c3a", "bitfit",
    "ln_tuning", "linear_probe", "full",
)  # fmt: skip
RATES = (5e-4, 2e-3, 8e-3)
NOT_OURS = ("output", "method", "learning_rate", "seed", "seeds", "quiet", "dry_run", "resume")
"""Options of `train` that the sweep sets itself."""


def main(argv: Sequence[str] | None = None) -> int:
    cli.offline()
    arguments = list(sys.argv[1:] if argv is None else argv)
    return cli.run(lambda: _main(arguments), debug="--debug" in arguments)


def _main(arguments: list[str]) -> int:
    sweep, output, dry_run = _asked(arguments)
    if "--print_config" in sweep.words:
        return train.main(sweep.words)
    check_writable(output)
    _check(sweep, output)
    size = f"{len(sweep.arms)} methods x {len(sweep.rates)} learning rates, then {sweep.seeds} seeds"
    print(f"{size}: {sweep.fewest} runs, and more where a best rate is an edge")
    if dry_run:
        return 0
    with writing(output), held(output, "swept"):
        sweep = replace(sweep, words=_settled(sweep.words, output))
        results, failed = selected(sweep, train.main)
        write(output, ["surm-seg", "sweep", *arguments], _found(sweep, results, failed))
    return (cli.SOME_CASES_FAILED if results else BadInput.exit_status) if failed else 0


def _asked(arguments: list[str]) -> tuple[Comparison, Path, bool]:
    parser = cli.around_train("sweep")
    parser.add_argument("--methods", default=",".join(METHODS), help="joined by commas, or all; default %(default)s")
    rates = ",".join(f"{rate:g}" for rate in RATES)
    parser.add_argument("--learning_rates", "--learning-rates", default=rates, help="at first; default %(default)s")
    parser.add_argument("--seeds", type=int, default=3, help="runs at each method's best rate; default 3")
    beyond = "further rates, while the best is an edge; default %(default)s"
    parser.add_argument("--beyond", type=int, default=Comparison.beyond, help=beyond)
    parser.add_argument("--jobs", type=int, default=1, help="runs at once; default 1")
    parser.add_argument("--output", type=Path, default=Path("runs/sweep"), help="default runs/sweep")
    parser.add_argument("--dry-run", "--dry_run", action="store_true", help="say what would be run")
    own, words = cli.own_and_train(parser, arguments, NOT_OURS)
    chosen = methods.names() if own.methods == "all" else tuple(filter(None, own.methods.split(",")))
    for name in chosen:
        methods.check(name)
    try:
        rates = tuple(sorted({float(rate) for rate in own.learning_rates.split(",")}))
    except ValueError as error:
        raise BadConfig("sweep-option", f"--learning_rates {own.learning_rates}: {error}.") from error
    if not chosen or min(own.seeds, own.jobs, own.beyond + 1) < 1:
        sentence = "--methods must name one, --seeds and --jobs must be 1 or more, --beyond not negative."
        raise BadConfig("sweep-option", sentence)
    arms = {method: ("--method", method) for method in chosen}
    return (
        Comparison(arms, rates, own.seeds, own.jobs, own.output / "cells", words, own.beyond),
        own.output,
        own.dry_run,
    )


def _settled(words: Sequence[str], output: Path) -> Sequence[str]:
    """The words with the precision that --precision auto comes to, once for all runs."""
    _, config, engine, _ = train.parsed(words)
    if engine.precision != "auto":
        return words
    device = torch.device(cli.device_named(config.device))
    return [*words, "--precision", kept_precision(output, words, lambda: fast_precision(device))]


def _check(sweep: Comparison, output: Path) -> None:
    """Raise what the first method is refused for, where all of them are: it is no matter of methods then."""
    refused: list[SurmError] = []
    for method in sweep.arms:
        cell = sweep.cell(method, sweep.rates[0], 0)
        try:
            quiet_failure(train.main, [*cell.words, "--dry-run", "--quiet", "--output", str(output / cell.name)])
            return
        except SurmError as error:
            refused.append(error)
    raise refused[0]


def _found(sweep: Comparison, results: Mapping[str, Selected], failed: Mapping[str, str]) -> Found:
    """The table, every figure behind it, and the picture."""
    rows: list[Row] = []
    points: dict[str, tuple[float, float, float]] = {}
    score = ""
    for method, result in results.items():
        score, values, count = result.score, result.scores, result.parameters["method"]
        rows.append({
            "method": method,
            "parameters": f"{count:,}",
            "rate": result.shown_rate,
            "validation": f"{result.validation[result.rate]:.3f}",
            score: spread(values),
            "seeds": str(len(values)),
            "seconds": f"{median(done.seconds for done in result.runs.values()):.0f}",
            "peak MB": f"{max(done.peak_bytes for done in result.runs.values()) / 1e6:.0f}",
        })  # fmt: skip
        sd = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
        points[method] = (count, float(np.mean(values)), sd)
    rows.sort(key=lambda row: -points[row["method"]][1])
    paragraphs = [markdown(rows) if rows else "No cell finished."]
    paragraphs += [f"Failed: {name} {why}" for name, why in failed.items()]
    rates = ", ".join(f"{rate:g}" for rate in sweep.rates)
    budget = f"Every run: surm-seg train {' '.join(sweep.words)}; learning rates {rates}."
    notes = [
        "Parameters: trained values besides the head, which every method trains. The rate is chosen on the validation "
        f"set with one seed; up to {sweep.beyond} more are tried while the best is the lowest or highest, and where it "
        "still is one, (edge) says so. The score is of the test set, mean and sample SD over the seeds. Seconds and "
        "peak memory are of the whole process, its scoring too.",
    ]
    if not train.parsed(sweep.words)[3].budget:
        notes.append("No budget was matched: every method trains as many values as it usually does.")
    picture = (
        {"picture.svg": page([[scatter(f"{score} of the test set", "trained parameters besides the head", points)]])}
        if points
        else {}
    )
    figures = [{"method": method, **result.figures()} for method, result in results.items()]
    results_json = {"results": figures, "failed": dict(failed), "rates": sweep.rates, "words": sweep.words}
    return Found(budget, paragraphs, results_json, notes, ("torch", "transformers", "peft"), picture)


if __name__ == "__main__":
    sys.exit(main())
