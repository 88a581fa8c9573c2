"""`surm-seg predict`: segment volumes with a trained run; label maps come back on each input's own grid.

OUTPUT/X.nii.gz            label map of X.nii.gz, X.nrrd, ...
      /series-<digest>.nii.gz, .dcm   of a DICOM series, the second as DICOM-SEG; named by its content
      /manifest.json       run, versions, and per case digests, volumes, warnings and retries
      /case_key.json       which folder each series was, for the user only (mode 0600)
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from math import prod
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from surm_seg import cli, cluster, domain
from surm_seg.dicom_seg_writer import check_names
from surm_seg.errors import BadConfig, BadInput, SurmError
from surm_seg.lock import held
from surm_seg.pool import Outcome, here
from surm_seg.precision import store_frozen
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
class PredictConfig(cluster.Options):
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
    reporter, run = cli.Reporter(config.quiet), config.shared(config.run)
    paths = inputs(config.shared(config.input))
    output = config.shared(config.output or Path("predictions") / run.resolve().name)
    _check_targets(paths, output)
    loaded.cache_clear()  # the folder may hold another run by now
    device = config.device if config.engine == "ray" else cli.device_named(config.device)
    trained = loaded(run, "cpu" if config.engine == "ray" else device)
    if config.dry_run:
        return _dry_run(paths, output, reporter)
    options = {"tta": config.tta, "keep_largest": config.keep_largest}
    facts = {"run": trained.facts, "options": options, "precision": trained.precision, "labels": list(trained.labels)}
    done = finished(output / "manifest.json", facts)
    if config.tta == "flip" and not trained.knows_mirrors:
        reporter.say("warning: this run was trained without mirrored slices; --tta flip makes its label maps worse")
    if any(path.is_dir() for path in paths):
        check_names(trained.labels)
    work = partial(segment, output=output, run=run, device=device, options=options, done=done)
    with held(output, "written to"), cluster.engine_of(config, here, output, gpu=device != "cpu") as engine:
        stated = {**facts, "device": device, **provenance()}
        record = Record(output, stated, paths, reporter, _still_there(done, output))
        for outcome in reporter.track(engine(work, paths), "predicting", len(paths)):
            record.add(outcome)
    good = sum("error" not in case for case in record.cases.values())
    reporter.say(f"{good} of {len(paths)} volumes segmented; label maps and manifest.json in {output}")
    return status(good, len(paths))


@lru_cache(maxsize=1)
def loaded(run: Path, device: str) -> Any:
    """The `pipelines.inference.Trained` of a run, kept by this process; raises what `load_run` does, and NoDevice."""
    trained = importlib.import_module("pipelines.inference").load_run(run, cli.device_named(device))
    if trained.precision == "bfloat16":
        store_frozen(trained.model.requires_grad_(False), torch.bfloat16)
    return trained


def segment(
    path: Path, *, output: Path, run: Path, device: str, options: Mapping[str, Any], done: Mapping[str, dict[str, Any]]
) -> dict[str, Any]:
    """Write one label map; returns its entry of the manifest, the earlier one where nothing has changed.

    Args:
        options: of the call of a `Trained`.
        done: what `finished` found.
    """
    content, start = digest(path), time.monotonic()
    name = case_name(path, content)
    files = {"output": output / name} | ({"dicom_seg": output / f"{stem(Path(name))}.dcm"} if path.is_dir() else {})
    before = done.get(content)
    if before and all(file.is_file() and file_digest(file) == before.get(role) for role, file in files.items()):
        return before
    volume, trained = read_image(path), loaded(run, device)
    warnings = domain.differences(domain.facts_of(volume, modality(path)), trained.facts.get("fingerprint", {}))
    for warning in warnings:
        print(f"warning: {path.name}: {warning}", file=sys.stderr, flush=True)  # before the work, which may take long
    found = trained(volume.lps(), **options)
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


@dataclass
class Record:
    """What came of the cases so far, on the terminal and in the output folder.

    Args:
        facts: of the manifest, besides its cases.
        earlier: input digest -> entry, of other calls; those that are not asked for again are kept.
        cases: their entries by position.
    """

    output: Path
    facts: Mapping[str, Any]
    paths: Sequence[Path]
    reporter: cli.Reporter
    earlier: dict[str, dict[str, Any]]
    cases: dict[int, dict[str, Any]] = field(default_factory=dict)

    def add(self, outcome: Outcome) -> None:
        """Say it, and write the manifest anew, its cases in the order of the inputs."""
        path = self.paths[outcome.number]
        entry = _failed(path, outcome.error) if outcome.error else outcome.value
        self.cases[outcome.number] = {"retries": outcome.retries, **entry}
        self.earlier.pop(entry.get("input", ""), None)
        cases = [self.cases[number] for number in sorted(self.cases)]
        _write_json(self.output / "manifest.json", {**self.facts, "cases": [*cases, *self.earlier.values()]})
        if outcome.error:
            return
        if path.is_dir():
            key = self.output / "case_key.json"
            known = json.loads(key.read_bytes()) if key.exists() else {}
            _write_json(key, known | {case_name(path, entry["input"]): str(path)}, 0o600)
        found = ", ".join(f"{organ} {ml:.0f} mL" for organ, ml in entry["volumes_ml"].items() if ml)
        self.reporter.say(f"{path.name}: {found or 'no organ found'}")


def _failed(path: Path, error: SurmError) -> dict[str, Any]:
    print(f"error [{error.code}]: {path.name}: {error}", file=sys.stderr)
    return {"error": error.code}


def _dry_run(paths: Sequence[Path], output: Path, reporter: cli.Reporter) -> int:
    """Read the headers, say how much there is to do, write nothing."""
    outcomes = list(here(read_grid, paths))
    for outcome in outcomes:
        if outcome.error:
            _failed(paths[outcome.number], outcome.error)
    sizes = [prod(outcome.value.shape) for outcome in outcomes if outcome.error is None]
    reporter.say(f"dry run: {len(sizes)} of {len(paths)} volumes, {sum(sizes) / 1e6:.1f} M voxels, to {output}")
    return status(len(sizes), len(paths))


def case_name(path: Path, content: str) -> str:
    """The file name of a volume's label map: the input's, or for a series, whose folder may tell the patient, a digest.

    Args:
        content: the volume's digest.
    """
    if path.is_dir():
        return f"series-{content[:8]}.nii.gz"
    return path.name if path.name.lower().endswith(".nii") else f"{stem(path)}.nii.gz"


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


def _still_there(done: Mapping[str, dict[str, Any]], output: Path) -> dict[str, dict[str, Any]]:
    """Those entries of a manifest whose label maps lie in the output folder unchanged."""
    present = {file_digest(path) for path in output.glob("*.nii*")} if done else set()
    return {content: entry for content, entry in done.items() if entry["output"] in present}


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
    kinds = {volume.is_dir() for volume in found}
    if len(kinds) > 1:
        sentence = f"{path} holds DICOM series and other volumes, maybe label maps; name the one to segment by --input."
        raise BadInput("ambiguous", sentence)
    return found


def _check_targets(paths: Sequence[Path], output: Path) -> None:
    """Raises BadConfig or BadInput where a label map would replace an input, or another input's label map."""
    inputs, names = {path.resolve() for path in paths}, [case_name(path, "") for path in paths if path.is_file()]
    if output.resolve() in inputs or any((output / name).resolve() in inputs for name in names):
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
    sys.exit(importlib.import_module("surm_seg.predict").main())  # by its name, under which other machines know it
