"""`surm-seg predict`: segment volumes with a trained run; label maps come back on each input's own grid.

OUTPUT/X.nii.gz            label map of X.nii.gz, X.nrrd, ...
      /series-<digest>.nii.gz, .dcm   of a DICOM series, the second as DICOM-SEG; named by its content
      /manifest.json       run, versions, and per case digests, volumes and warnings
      /case_key.json       which folder each series was, for the user only (mode 0600)
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, Literal

import numpy as np

from surm_seg import cli, domain
from surm_seg.errors import BadConfig, BadInput, SurmError
from surm_seg.provenance import provenance
from surm_seg.volume import (
    Volume,
    digest,
    file_digest,
    modality,
    read_grid,
    read_image,
    replacing,
    stem,
    volumes_in,
    write_dicom_seg,
    write_labels,
)


@dataclass
class PredictConfig(cli.Common):
    """Segment volumes with a trained run.

    Args:
        output: folder for the label maps, named like their inputs, and manifest.json; default predictions/RUN.
        run: run folder that `train` wrote.
        input: a NIfTI, NRRD or MetaImage file, the folder of a DICOM series, or a folder of either.
        tta: flip averages every slice's prediction with that of its mirror image; takes twice the time.
        keep_largest: of every organ, keep the largest connected piece only.
    """

    run: Path | None = None
    input: Path | None = None
    tta: Literal["none", "flip"] = "none"
    keep_largest: bool = False


def main(argv: Sequence[str] | None = None) -> int:
    cli.offline()
    config = cli.parse("predict", PredictConfig, argv)
    return cli.run(lambda: predict(config), debug=config.debug)


def predict(config: PredictConfig) -> int:
    """Run a parsed command; a failed case is listed and never stops the others, a finished one is not repeated."""
    if config.run is None or config.input is None:
        raise BadConfig("missing-option", "Give both --run RUN and --input FILE or FOLDER.")
    reporter = cli.Reporter(config.quiet)
    paths = inputs(config.input)
    output = config.output or Path("predictions") / config.run.resolve().name
    _check_targets(paths, output)
    device = cli.device_named(config.device)
    trained = importlib.import_module("pipelines.inference").load_run(config.run, device)
    if config.dry_run:
        outcomes = [attempt(lambda path=path: read_grid(path).shape, path) for path in paths]
        good = [shape for shape in outcomes if isinstance(shape, tuple)]
        reporter.say(
            f"dry run: {len(good)} of {len(paths)} volumes, {sum(map(prod, good)) / 1e6:.1f} M voxels, to {output}"
        )
        return status(len(good), len(paths))
    output.mkdir(parents=True, exist_ok=True)
    options = {"tta": config.tta, "keep_largest": config.keep_largest}
    facts = {"run": trained.facts, "options": options, "precision": trained.precision, "labels": list(trained.labels)}
    done = finished(output / "manifest.json", facts)
    cases: list[dict[str, Any]] = []
    key: dict[str, str] = {}
    for path in reporter.track(paths, "predicting", len(paths)):
        outcome = attempt(lambda path=path: segment(path, output, partial(trained, **options), trained, done), path)
        cases.append({"error": outcome} if isinstance(outcome, str) else outcome)
        _write_json(output / "manifest.json", {**facts, "device": device, **provenance(), "cases": cases})
        if isinstance(outcome, str):
            continue
        if path.is_dir():
            key[case_name(path, outcome["input"])] = str(path)
            _write_json(output / "case_key.json", key, 0o600)
        for warning in outcome["warnings"]:
            reporter.say(f"warning: {path.name}: {warning}")
        found = ", ".join(f"{organ} {ml:.0f} mL" for organ, ml in outcome["volumes_ml"].items() if ml)
        reporter.say(f"{path.name}: {found or 'no organ found'}")
    good = sum("error" not in case for case in cases)
    reporter.say(f"{good} of {len(paths)} volumes segmented; label maps and manifest.json in {output}")
    return status(good, len(paths))


def segment(
    path: Path, output: Path, model: Callable[..., np.ndarray], trained: Any, done: Mapping[str, dict[str, Any]]
) -> dict[str, Any]:
    """Write one label map; returns its entry of the manifest, the earlier one where nothing has changed."""
    content, start = digest(path), time.monotonic()
    name = case_name(path, content)
    files = {"output": output / name} | ({"dicom_seg": output / f"{stem(Path(name))}.dcm"} if path.is_dir() else {})
    before = done.get(content)
    if before and all(file.is_file() and file_digest(file) == before.get(role) for role, file in files.items()):
        return before
    volume = read_image(path)
    warnings = domain.differences(domain.facts_of(volume, modality(path)), trained.facts.get("fingerprint", {}))
    found = model(volume.lps())
    voxels = volume.grid.restore(found)
    write_labels(files["output"], voxels, volume.grid)
    if "dicom_seg" in files:
        write_dicom_seg(files["dicom_seg"], voxels, trained.labels, path)
    return {
        "input": content,
        **{role: file_digest(file) for role, file in files.items()},
        "volumes_ml": volumes_ml(found, trained.labels, volume),
        "warnings": warnings,
        "seconds": round(time.monotonic() - start, 3),
    }


def case_name(path: Path, content: str) -> str:
    """The file name of a volume's label map: the input's, or for a series, whose folder may tell the patient, a digest.

    Args:
        content: the volume's digest.
    """
    if path.is_dir():
        return f"series-{content[:8]}.nii.gz"
    return path.name if path.name.lower().endswith(".nii") else f"{stem(path)}.nii.gz"


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


def finished(manifest: Path, facts: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Input digest -> entry, of a manifest that the same run wrote with the same options; {} without one."""
    try:
        content = json.loads(manifest.read_text())
        same = content["run"]["adapter_sha256"] == facts["run"]["adapter_sha256"]
        same = same and content["options"] == facts["options"]
        return {case["input"]: case for case in content["cases"] if same and "error" not in case}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def inputs(path: Path) -> list[Path]:
    """The volumes that a file or folder stands for; raises BadInput where there are none."""
    if not path.exists():
        raise BadInput("no-volumes", f"There is no {path}; give --input a volume, a DICOM series or a folder of them.")
    found = volumes_in(path) if path.is_dir() else [path]
    if not found:
        sentence = (
            f"{path} holds no volume (.nii, .nii.gz, .nrrd, .mha, ...) and no DICOM series; give a folder of them."
        )
        raise BadInput("no-volumes", sentence)
    return found


def _check_targets(paths: Sequence[Path], output: Path) -> None:
    """Raises BadConfig or BadInput where a label map would replace an input, or another input's label map."""
    inputs, names = {path.resolve() for path in paths}, [case_name(path, "") for path in paths if path.is_file()]
    if any((output / name).resolve() in inputs for name in names):
        raise BadConfig("predict-output", f"--output {output} is where the inputs are; choose another folder.")
    twice = [name for name, times in Counter(names).items() if times > 1]
    if twice:
        raise BadInput("ambiguous", f"Several inputs would be written as {twice[0]}; rename one of them.")


def _write_json(path: Path, content: Mapping[str, Any], mode: int = 0o666) -> None:
    with replacing(path, mode) as file:
        file.write(json.dumps(content, indent=1).encode() + b"\n")


def volumes_ml(labels: np.ndarray, names: Sequence[str], volume: Volume) -> dict[str, float]:
    """Organ name -> volume in mL."""
    voxel_ml = abs(float(np.linalg.det(volume.grid.affine[:3, :3]))) / 1000
    counts = np.bincount(labels.reshape(-1), minlength=len(names) + 1)
    return {name: round(int(counts[value]) * voxel_ml, 3) for value, name in enumerate(names, 1)}


if __name__ == "__main__":
    sys.exit(main())
