"""What the studies of training share: their options and the runs they are made of.

OUTPUT/data          data sets, see `pipelines.studies.data`
      /cells/NAME    a run of `surm-seg train` each; a finished one is not repeated, one that was cut is begun anew
      /STUDY         table.md, and table.json with all figures behind it

Studies with one OUTPUT share what they have in common.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import importlib
import io
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.studies.data import prepared
from pipelines.studies.table import Found, Row, markdown, write
from surm_seg.cases import Dataset
from surm_seg.errors import INTERRUPTED, BadInput, Corrupt, SurmError
from surm_seg.lock import held
from surm_seg.metrics import RECOMMENDED
from surm_seg.output_folder import writing

SOME_FAILED = 5  # exit status, as of every command


@dataclass(frozen=True)
class Options:
    """What a study is run with; every cell gets the same budget.

    Args:
        output: folder for data, runs and tables.
        ct: folder of ct-case-a.
        patients: generated for each of the phantom worlds; a quarter is held out.
        seeds: runs of every cell, with seeds 0, 1, ...
        precision: of training and scoring: one for all cells, whatever the machine.
    """

    output: Path
    ct: Path
    patients: int
    steps: int
    seeds: int
    image_size: int
    batch_size: int
    precision: str


@dataclass(frozen=True)
class Cell:
    """One training: what it differs in from the others."""

    data: str
    seed: int
    weights: str = "auto"
    decoder: str = "full"
    structure: str = "circulant"
    structure_options: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __str__(self) -> str:
        return f"{self.data}-{self.weights}-{self.decoder}-{self.structure}-seed{self.seed}"


@dataclass(frozen=True)
class Run:
    """What a finished cell came to.

    Args:
        cases: mean Dice of each held-out case over its organs, by the recommended protocol.
        parameters: trained ones of encoder_adapter and decoder, and all of the model.
        made: when, and by which commit.
    """

    folder: Path
    data: Path
    cases: dict[str, float]
    parameters: dict[str, int]
    made: dict[str, str | None]

    @property
    def dice(self) -> float:
        return float(np.mean(list(self.cases.values())))


Finished = Mapping[Cell, Run]


@dataclass(frozen=True)
class Study:
    """What makes a study: its cells, and the table that the finished ones are turned into.

    Args:
        name: of its module.
        text: one line for --help.
        seeds: default of --seeds.
        cells: in the order they are run.
        rows: of the table (column -> text), and the figures behind it that are in no cell.
        notes: what a reader of the table must know.
    """

    name: str
    text: str
    seeds: int
    cells: Callable[[Options], list[Cell]]
    rows: Callable[[Finished], tuple[list[Row], dict[str, Any]]]
    notes: tuple[str, ...]


def main(study: Study, argv: Sequence[str] | None = None) -> int:
    """Run what is missing of a study, print and write its table; 5 where some cells failed, 3 where all did."""
    words = list(sys.argv[1:] if argv is None else argv)
    options = _options(study, words)
    try:
        with writing(options.output), held(options.output, "studied"):
            finished, failed = carried_out(study.cells(options), options)
            _write(study, words, options, finished, failed)
    except SurmError as error:
        print(f"error [{error.code}]: {error}", file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        return INTERRUPTED
    return (SOME_FAILED if finished else BadInput.exit_status) if failed else 0


def carried_out(cells: Sequence[Cell], options: Options) -> tuple[dict[Cell, Run], dict[Cell, str]]:
    """The cells that are finished, and the error codes of those that failed."""
    finished: dict[Cell, Run] = {}
    failed: dict[Cell, str] = {}
    for number, cell in enumerate(cells, 1):
        place = f"{number}/{len(cells)} {cell}"
        try:
            finished[cell] = run = _run(cell, options)
            print(f"{place}: Dice {run.dice:.3f}", flush=True)
        except SurmError as error:
            failed[cell] = error.code
            print(f"{place}: failed [{error.code}]: {error}", file=sys.stderr, flush=True)
    return finished, failed


def _run(cell: Cell, options: Options) -> Run:
    data = prepared(cell.data, options.output / "data", options.patients, options.ct, partial(command, "prepare"))
    settings = {
        **{name: value for name, value in asdict(cell).items() if name != "data"},
        **{name: getattr(options, name) for name in ("steps", "image_size", "batch_size", "precision")},
        "validate_on": "none",  # the last step is scored: nothing is chosen, so nothing can be chosen in one's favour
        "validate_every": 0,
        "checkpoint_every": options.steps,
        "device": "cpu",
    }
    key = hashlib.sha256(json.dumps([settings, Dataset.open(data).digest]).encode()).hexdigest()
    folder = options.output / "cells" / f"{cell}-{key[:8]}"
    run = _finished(folder, data)
    if run is None:
        shutil.rmtree(folder, ignore_errors=True)
        words = [
            f"--{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in settings.items()
        ]
        command("train", [*words, "--data", str(data), "--output", str(folder)])
        run = _finished(folder, data)
    if run is None:
        raise Corrupt("cell-unreadable", f"The records of {folder} cannot be read; repeat the command.")
    return run


def command(name: str, arguments: list[str]) -> None:
    """`surm-seg NAME`, quietly and in this process; raises SurmError with the code and sentence that it ends with."""
    said = io.StringIO()
    try:
        with redirect_stderr(said):
            status = importlib.import_module(f"surm_seg.{name}").main([*arguments, "--quiet"])
    except SystemExit as stop:
        status = stop.code
    if status == INTERRUPTED:
        raise KeyboardInterrupt
    if status:
        last = said.getvalue().strip().rpartition("\n")[2]
        known = re.fullmatch(r"error \[([\w-]+)\]: (.*)", last)
        raise SurmError(known[1] if known else "option", known[2] if known else last)


def _finished(folder: Path, data: Path) -> Run | None:
    """What a cell came to; None where it is not finished, or its records are damaged."""
    dice: dict[str, list[float]] = {}
    try:
        record = json.loads((folder / "run.json").read_bytes())
        made = {name: record[name] for name in ("finished", "commit")}
        for line in csv.DictReader((folder / "scores" / "cases.csv").read_text().splitlines()):
            if line["protocol"] == RECOMMENDED and line["dice"]:
                dice.setdefault(line["case"], []).append(float(line["dice"]))
        cases = {case: float(np.mean(values)) for case, values in dice.items()}
        return Run(folder, data, cases, record["parameters"], made)
    except (OSError, ValueError, KeyError):
        return None


def _options(study: Study, words: list[str]) -> Options:
    parser = argparse.ArgumentParser(prog=f"python -m pipelines.studies.{study.name}", description=study.text)
    ct = Path(os.environ.get("SURM_SHARED", "../shared"), "data", "ct-case-a")
    parser.add_argument("--output", type=Path, default=Path("runs/studies"), help="default runs/studies")
    parser.add_argument("--ct", type=Path, default=ct, help="folder of ct-case-a; default $SURM_SHARED/data/ct-case-a")
    for name, default in (
        ("patients", 24),
        ("steps", 200),
        ("seeds", study.seeds),
        ("image_size", 256),
        ("batch_size", 8),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default {default}")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="bfloat16", help="default bfloat16")
    options = Options(**vars(parser.parse_args(words)))
    if min(options.patients - 1, options.steps, options.seeds) < 1:
        parser.error("--patients must be 2 or more, --steps and --seeds 1 or more")
    return options


def _write(study: Study, words: list[str], options: Options, finished: Finished, failed: Mapping[Cell, str]) -> None:
    rows, figures = study.rows(finished)
    cells = [
        {**asdict(cell), "dice": run.dice, "cases": run.cases, "parameters": run.parameters, **run.made}
        for cell, run in finished.items()
    ]
    results = {
        "options": {name: value for name, value in asdict(options).items() if not isinstance(value, Path)},
        "cells": [*cells, *({**asdict(cell), "error": code} for cell, code in failed.items())],
        "rows": rows,
        "figures": figures,
    }
    budget = f"{options.steps} steps of {options.batch_size} slices at {options.image_size} pixels, {options.precision}"
    paragraphs = [
        markdown(rows) if rows else "No cell finished.",
        *(f"Failed: {cell} [{code}]." for cell, code in failed.items()),
    ]
    found = Found(f"Every run: {budget}.", paragraphs, results, study.notes, ("torch", "monai", "peft"))
    write(options.output / study.name, ["python", "-m", f"pipelines.studies.{study.name}", *words], found)
