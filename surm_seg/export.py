"""`surm-seg export`: a trained run as a model for other programs, ONNX or a MONAI bundle, checked before it appears."""

from __future__ import annotations

import importlib
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from surm_seg import cli
from surm_seg.errors import BadConfig
from surm_seg.output_folder import appearing, free

WRITERS = {"onnx": "pipelines.onnx_export", "bundle": "pipelines.bundle"}
"""--to -> the module whose `write(run, trained, folder)` fills a folder and returns a sentence about it."""


@dataclass
class ExportConfig(cli.Common):
    """Export a trained run.

    Args:
        output: folder for the export, absent or empty; default RUN-TO beside the run.
        device: not used; an export is made and checked on the CPU.
        dry_run: load the run and write nothing.
        run: run folder that `train` wrote.
        to: onnx, a graph for ONNX Runtime with model.json beside it; or bundle, a folder for `python -m monai.bundle`.
    """

    run: str | None = None
    to: str = ""


def main(argv: Sequence[str] | None = None) -> int:
    cli.offline()
    config = cli.parse("export", ExportConfig, argv, positional="run")
    return cli.run(lambda: export(config), debug=config.debug)


def export(config: ExportConfig) -> int:
    """Run a parsed command."""
    if config.run is None:
        raise BadConfig("missing-option", "Give a RUN: the folder that `surm-seg train` wrote.")
    run, reporter = Path(config.run).resolve(), cli.Reporter(config.quiet)
    writer = _writer(config.to)
    output = free(config.output or run.with_name(f"{run.name}-{config.to}"), "export")
    trained = importlib.import_module("pipelines.inference").load_run(run, "cpu")
    if config.dry_run:
        reporter.say(f"dry run: {len(trained.labels)} organs at {trained.input.image_size} pixels, to {output}")
        return 0
    start = time.monotonic()
    with appearing(output, "export") as folder:
        finding = writer.write(run, trained, folder)
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    reporter.say(f"{output}: {size / 1e6:.1f} MB in {time.monotonic() - start:.0f} s. {finding}")
    return 0


def _writer(name: str) -> ModuleType:
    if name not in WRITERS:
        raise BadConfig("export-to", f"--to names {name or 'nothing'}; choose among {', '.join(WRITERS)}.")
    try:
        return importlib.import_module(WRITERS[name])
    except ImportError as error:
        sentence = f"--to {name} needs the package {error.name}: pip install 'surm-seg[export]'."
        raise BadConfig("export-extra", sentence) from error


if __name__ == "__main__":
    sys.exit(main())
