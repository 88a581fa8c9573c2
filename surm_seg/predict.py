"""`surm-seg predict`: segment volumes with a trained run; label maps come back on each input's own grid."""

from __future__ import annotations

import importlib
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from surm_seg import cli
from surm_seg.cases import file_digest
from surm_seg.errors import BadConfig, BadInput, SurmError
from surm_seg.volume import Volume, read_grid, read_image, replacing, write_labels

ENDINGS = (".nii", ".nii.gz")


@dataclass
class PredictConfig(cli.Common):
    """Segment NIfTI volumes with a trained run.

    Args:
        output: folder for the label maps (named like their inputs), manifest.json and volumes; default RUN/predictions.
        run: run folder that `train` wrote.
        input: a .nii or .nii.gz file, or a folder of them.
    """

    run: Path = Path()
    input: Path = Path()


def main(argv: Sequence[str] | None = None) -> int:
    cli.offline()
    config = cli.parse("predict", PredictConfig, argv)
    return cli.run(lambda: predict(config), debug=config.debug)


def predict(config: PredictConfig) -> int:
    """Run a parsed command; a failed case is listed and never stops the others."""
    reporter = cli.Reporter(config.quiet)
    files = inputs(config.input)
    output = config.output or config.run / "predictions"
    taken = {file.resolve() for file in files}
    if any((output / file.name).resolve() in taken for file in files):
        raise BadConfig("predict-output", f"--output {output} is where the inputs are; choose another folder.")
    inference = importlib.import_module("pipelines.inference")
    trained = inference.load_run(config.run, cli.device_named(config.device))
    if config.dry_run:
        voxels = sum(prod(read_grid(file).shape) for file in files)
        reporter.say(f"dry run: {len(files)} volumes, {voxels / 1e6:.1f} M voxels, to {output}; nothing written")
        return 0
    output.mkdir(parents=True, exist_ok=True)
    cases: list[dict[str, Any]] = []
    for file in reporter.track(files, "predicting", len(files)):
        start = time.monotonic()
        try:
            volume = read_image(file)
            found = trained(volume.lps())
            write_labels(output / file.name, volume.grid.restore(found), volume.grid)
        except SurmError as error:
            print(f"error [{error.code}]: {error}", file=sys.stderr)
            cases.append({"input": file_digest(file) if file.is_file() else None, "error": error.code})
            continue
        volumes = volumes_ml(found, trained.labels, volume)
        cases.append(
            {
                "input": file_digest(file),
                "output": file_digest(output / file.name),
                "volumes_ml": volumes,
                "seconds": round(time.monotonic() - start, 3),
            }
        )
        listed = ", ".join(f"{organ} {ml:.0f} mL" for organ, ml in volumes.items() if ml)
        reporter.say(f"{file.name}: {listed or 'no organ found'}")
    manifest = {"run": trained.facts, "precision": trained.precision, "labels": list(trained.labels), "cases": cases}
    with replacing(output / "manifest.json") as out:
        out.write(json.dumps(manifest, indent=1).encode() + b"\n")
    failed = sum("error" in case for case in cases)
    reporter.say(f"{len(files) - failed} of {len(files)} volumes segmented; label maps and manifest.json in {output}")
    if failed == len(files):
        return BadInput.exit_status
    return cli.SOME_CASES_FAILED if failed else 0


def inputs(path: Path) -> list[Path]:
    """The NIfTI files that a file or folder stands for; raises BadInput where there are none."""
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.name.lower().endswith(ENDINGS))
        if not files:
            raise BadInput(
                "no-volumes", f"{path} holds no .nii or .nii.gz file; give --input a file or folder of volumes."
            )
        return files
    if not path.exists():
        raise BadInput("no-volumes", f"There is no {path}; give --input a file or folder of volumes.")
    return [path]


def volumes_ml(labels: np.ndarray, names: Sequence[str], volume: Volume) -> dict[str, float]:
    """Organ name -> volume in mL."""
    voxel_ml = abs(float(np.linalg.det(volume.grid.affine[:3, :3]))) / 1000
    counts = np.bincount(labels.reshape(-1), minlength=len(names) + 1)
    return {name: round(int(counts[value]) * voxel_ml, 3) for value, name in enumerate(names, 1)}


if __name__ == "__main__":
    sys.exit(main())
