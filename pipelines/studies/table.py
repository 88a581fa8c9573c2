"""How every study writes what it found: table.md to read, which is printed too, and table.json with all figures."""

from __future__ import annotations

import argparse
import io
import json
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich import box
from rich.console import Console
from rich.table import Table

from surm_seg.errors import INTERRUPTED, SurmError
from surm_seg.output_folder import check_writable, writing
from surm_seg.provenance import provenance
from surm_seg.volume import replacing

Row = dict[str, str]


@dataclass(frozen=True)
class Found:
    """What a study came to.

    Args:
        budget: one sentence on what every number was given.
        paragraphs: the table and what stands under it.
        results: all figures, for table.json.
        notes: what a reader of the table must know.
        packages: whose versions table.md names.
        pictures: file name -> content.
    """

    budget: str
    paragraphs: Sequence[str]
    results: Mapping[str, Any]
    notes: Sequence[str]
    packages: Sequence[str] = ("torch", "numpy")
    pictures: Mapping[str, str] = field(default_factory=dict)


def main(
    parser: argparse.ArgumentParser, study: Callable[[argparse.Namespace], Found], argv: Sequence[str] | None = None
) -> int:
    """A study without runs of `surm-seg train`: compute, print and write it; returns the exit status.

    Args:
        parser: its prog ends with the study's name.
    """
    parser.add_argument("--output", type=Path, default=Path("runs/studies"), help="default runs/studies")
    words = list(sys.argv[1:] if argv is None else argv)
    options = parser.parse_args(words)
    try:
        check_writable(options.output)
        found = study(options)
        with writing(options.output):
            write(options.output / parser.prog.rpartition(".")[2], [*parser.prog.split(), *words], found)
    except SurmError as error:
        print(f"error [{error.code}]: {error}", file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0


def counts(parser: argparse.ArgumentParser, **defaults: int) -> None:
    """Options that are whole numbers of 1 or more."""
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", type=_count, default=default, help=f"default {default}")


def _count(word: str) -> int:
    if not word.isdecimal() or int(word) < 1:
        raise argparse.ArgumentTypeError(f"{word} is not a whole number of 1 or more")
    return int(word)


def write(folder: Path, command_line: Sequence[str], found: Found) -> None:
    """The files of a study, table.md printed too."""
    where, command = provenance(), shlex.join(command_line)
    threads = torch.get_num_threads()
    results = {
        "study": folder.name,
        "command": command,
        "environment": {**where, "threads": threads},
        **found.results,
        "notes": found.notes,
    }
    versions = ", ".join(f"{name} {where['versions'][name]}" for name in found.packages)
    machine = f"{where['system']} {where['machine']}, torch threads: {threads}"
    measured = f"Measured on {where['time'][:10]}: {machine}, {versions}, commit {where['commit']}. {found.budget}"
    text = "\n\n".join([f"`{command}`", measured, *found.paragraphs, *found.notes]) + "\n"
    folder.mkdir(parents=True, exist_ok=True)
    files = {**found.pictures, "table.json": json.dumps(results, indent=1) + "\n", "table.md": text}
    for name, content in files.items():
        with replacing(folder / name) as file:
            file.write(content.encode())
    print(f"\n{text}", end="")


def spread(values: Sequence[float]) -> str:
    """Mean and sample standard deviation, the latter left out where there is one value."""
    mean = f"{np.mean(values):.3f}"
    return f"{mean} ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else mean


def markdown(rows: Sequence[Row]) -> str:
    """Rows of equal columns as a Markdown table that is aligned for reading as it is."""
    table = Table(*rows[0], box=box.MARKDOWN)
    for row in rows:
        table.add_row(*row.values())
    page = io.StringIO()
    Console(file=page, width=1000, markup=False, highlight=False).print(table)
    return "\n".join(line.strip() for line in page.getvalue().splitlines() if line.strip())
