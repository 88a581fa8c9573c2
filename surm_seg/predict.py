"""`surm-seg predict`: segment volumes with a trained run; label maps come back on each input's own grid."""

from __future__ import annotations

import importlib
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from surm_seg import cli
from surm_seg.cases import file_digest
from surm_seg.errors import BadConfig, BadInput, SurmError
from surm_seg.provenance import provenance
from surm_seg.volume import ENDINGS, Volume, read_grid, read_image, replacing, write_labels


@dataclass
class PredictConfig(cli.Common):
    """Segment NIfTI volumes with a trained run.

    Args:
        output: folder for the label maps, named like their inputs, and manifest.json; default predictions/RUN.
        run: run folder that `train` wrote.
        input: a .nii or .nii.gz file, or a folder of them.
    """

    run: Path | None = None
    input: Path | None = None


def main(argv: Sequence[str] | None = None) -> int:
    cli.offline()
    config = cli.parse("predict", PredictConfig, argv)
    return cli.run(lambda: predict(config), debug=config.debug)


def predict(config: PredictConfig) -> int:
    """Run a parsed command; a failed case is listed and never stops the others, a finished one is not repeated."""
    if config.run is None or config.input is None:
        raise BadConfig("missing-option", "Give both --run RUN and --input FILE or FOLDER.")
    reporter = cli.Reporter(config.quiet)
    files = inputs(config.input)
    output = config.output or Path("predictions") / config.run.resolve().name
    taken = {file.resolve() for file in files}
    if any((output / file.name).resolve() in taken for file in files):
        raise BadConfig("predict-output", f"--output {output} is where the inputs are; choose another folder.")
    device = cli.device_named(config.device)
    trained = importlib.import_module("pipelines.inference").load_run(config.run, device)
    if config.dry_run:
        outcomes = [attempt(lambda file=file: read_grid(file).shape, file) for file in files]
        good = [shape for shape in outcomes if isinstance(shape, tuple)]
        reporter.say(
            f"dry run: {len(good)} of {len(files)} volumes, {sum(map(prod, good)) / 1e6:.1f} M voxels, to {output}"
        )
        return status(len(good), len(files))
    output.mkdir(parents=True, exist_ok=True)
    facts = {"run": trained.facts, "precision": trained.precision, "labels": list(trained.labels), "device": device}
    done = finished(output / "manifest.json", trained.facts)
    cases: list[dict[str, Any]] = []
    for file in reporter.track(files, "predicting", len(files)):
        outcome = attempt(lambda file=file: segment(file, output / file.name, trained, done), file)
        cases.append({"error": outcome} if isinstance(outcome, str) else outcome)
        content = {**facts, **provenance(), "cases": cases}
        with replacing(output / "manifest.json") as out:
            out.write(json.dumps(content, indent=1).encode() + b"\n")
        if not isinstance(outcome, str):
            found = ", ".join(f"{organ} {ml:.0f} mL" for organ, ml in outcome["volumes_ml"].items() if ml)
            reporter.say(f"{file.name}: {found or 'no organ found'}")
    good = sum("error" not in case for case in cases)
    reporter.say(f"{good} of {len(files)} volumes segmented; label maps and manifest.json in {output}")
    return status(good, len(files))


def segment(file: Path, target: Path, trained: Any, done: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Write one label map; returns its entry of the manifest, the earlier one where nothing has changed."""
    digest, start = file_digest(file), time.monotonic()
    before = done.get(digest)
    if before and target.is_file() and file_digest(target) == before["output"]:
        return before
    volume = read_image(file)
    found = trained(volume.lps())
    write_labels(target, volume.grid.restore(found), volume.grid)
    volumes = volumes_ml(found, trained.labels, volume)
    seconds = round(time.monotonic() - start, 3)
    return {"input": digest, "output": file_digest(target), "volumes_ml": volumes, "seconds": seconds}


def attempt(work: Callable[[], Any], file: Path) -> Any:
    """What the work returns, or, after a line on standard error, the code of what stopped it."""
    try:
        return work()
    except (SurmError, OSError, MemoryError) as error:
        code = error.code if isinstance(error, SurmError) else type(error).__name__
        print(f"error [{code}]: {file.name}: {error}", file=sys.stderr)
        return code


def status(good: int, total: int) -> int:
    """Exit status of a batch."""
    if good == total:
        return 0
    return cli.SOME_CASES_FAILED if good else BadInput.exit_status


def finished(manifest: Path, facts: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Input digest -> entry, of a manifest that the same run wrote; {} without one."""
    try:
        content = json.loads(manifest.read_text())
        same = content["run"]["adapter_sha256"] == facts["adapter_sha256"]
        return {case["input"]: case for case in content["cases"] if same and "error" not in case}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


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
