"""`surm-seg doctor WHAT`: is this data what it should be? A line per case, and how to mend what is odd.

WHAT is anything that `prepare` accepts, volumes without labels, a prepared data set, or a run. A source is read exactly
as `prepare` reads it, case by case into a temporary folder, so that what passes here can be prepared.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from surm_seg import cli
from surm_seg.cases import Dataset, case_of, is_prepared
from surm_seg.checkpoint import checkpoints, load_checkpoint
from surm_seg.errors import BadConfig, BadInput, Corrupt, SurmError
from surm_seg.pool import run_all
from surm_seg.prepare import Job, PrepareConfig, check_headers, plan, prepare_case
from surm_seg.volume import volumes_in


@dataclass
class DoctorConfig(cli.Common):
    """Look at data, at a prepared data set or at a run, before time is spent on it; writes nothing.

    Args:
        source: folder as for prepare, a volume or a folder of volumes, a prepared data set, or a run.
        run: compare every volume with what this run was trained on.
        format: layout of the source; auto finds it.
        labels: synapse, or a YAML file `value: organ`; default is the format's own.
        image: file name or glob of the images inside the source.
        label: file name or glob of the label maps inside the source.
        classes: class table of a multi-label TotalSegmentator file, v1 or v2.
        workers: processes; default is one per CPU.
    """

    source: str = ""
    run: Path | None = None
    format: str = "auto"
    labels: str | None = None
    image: str | None = None
    label: str | None = None
    classes: str | None = None
    workers: int | None = None


@dataclass(frozen=True)
class Visit:
    """One case to look at; sent to another process.

    Args:
        name: as the terminal shows it.
        work: reads the case; raises what is wrong with it.
        record: file that takes what was found.
    """

    name: str
    work: Callable[[], Any]
    record: Path

    def __call__(self) -> None:
        found = importlib.import_module("pipelines.examination").attempt(self.name, self.work)
        self.record.write_text(json.dumps(asdict(found)))


def main(argv: Sequence[str] | None = None) -> int:
    cli.offline()
    config = cli.parse("doctor", DoctorConfig, argv, positional="source")
    return cli.run(lambda: doctor(config), debug=config.debug)


def doctor(config: DoctorConfig) -> int:
    """Run a parsed command; 0 also where something is odd, 5 or 3 where some or all cases cannot be used."""
    if not config.source:
        raise BadConfig("missing-option", "Name what to look at: a folder with volumes, a prepared data set or a run.")
    source, reporter = Path(config.source), cli.Reporter(config.quiet)
    if (source / "run.json").is_file():
        return look_at_run(source, reporter)
    fingerprint = _run_record(config.run).get("fingerprint", {}) if config.run else {}
    with tempfile.TemporaryDirectory(prefix="surm-seg-doctor-") as scratch:
        cases = [Visit(n, w, Path(scratch) / f"{i}.json") for i, (n, w) in enumerate(_cases(config, Path(scratch)))]
        if config.dry_run:
            reporter.say(f"dry run: {len(cases)} cases would be read")
            return 0
        run_all(cases, "reading", config.workers or os.cpu_count() or 1, reporter)
        restored = importlib.import_module("pipelines.examination").from_json
        found = [restored(json.loads(case.record.read_text())) for case in cases]
    importlib.import_module("pipelines.plausibility").report(found, reporter.say, fingerprint)
    failed = sum(case.error is not None for case in found)
    if failed == len(found):
        return BadInput.exit_status
    return cli.SOME_CASES_FAILED if failed else 0


def _cases(config: DoctorConfig, scratch: Path) -> list[tuple[str, Callable[[], Any]]]:
    """Name and work of every case; raises BadInput where there is none."""
    source, examine = Path(config.source), importlib.import_module("pipelines.examination").examine
    if is_prepared(source):
        dataset = Dataset.open(source)
        return [(case.id, partial(examine, case, dataset.labels)) for case in dataset.cases]
    jobs: list[tuple[str, Job, Callable[[], None] | None]]
    try:
        options = {name: getattr(config, name) for name in ("format", "labels", "image", "label", "classes", "workers")}
        planned = plan(PrepareConfig(source=config.source, output=scratch / "data", seed=config.seed, **options))
        listed = zip(planned.jobs, planned.source.cases, strict=True)
        jobs = [(case.name, job, case.generate) for job, case in listed]
    except BadInput as error:
        if error.code not in ("format", "unpaired") or config.format != "auto":
            raise
        if not source.exists():
            raise BadInput("no-source", f"There is no {source}; name a folder, a volume or a run.") from error
        paths = volumes_in(source) if source.is_dir() else [source]
        if not paths:
            raise
        jobs = [(p.name, Job(scratch / "data", f"case{n}", p, (), (), True), None) for n, p in enumerate(paths)]
    return [(name, partial(examine_job, name, job, generate)) for name, job, generate in jobs]


def examine_job(name: str, job: Job, generate: Callable[[], None] | None = None) -> Any:
    """Prepare one case, look at it and throw it away; raises what `prepare` would raise for it."""
    examine = importlib.import_module("pipelines.examination").examine
    folder = job.output / "cases" / job.case_id
    try:
        if generate:
            generate()
        check_headers(job)
        prepare_case(job)
        record = json.loads((folder / "case.json").read_bytes())
        return examine(case_of(job.output, {**record, "split": "train"}), job.organs, name)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        for path in (job.image, *(path for path, _ in job.labels)) if generate else ():
            path.unlink(missing_ok=True)


def look_at_run(run: Path, reporter: cli.Reporter) -> int:
    """Print what a run holds and whether it is whole; 3 where it cannot be used or resumed."""
    facts = _run_record(run)
    checks = {
        "config": partial(_config, run),
        "adapter": partial(_adapter, run),
        "checkpoints": partial(_checkpoints, run),
        "scores": partial(_scores, run),
        "data set": partial(_data, run, facts),
    }
    broken = 0
    for name, check in checks.items():
        try:
            verdict = check()
        except SurmError as error:
            verdict, broken = f"damaged: [{error.code}] {error}", broken + 1
        reporter.say(f"{name:<12} {verdict}")
    overview = importlib.import_module("pipelines.plausibility").overview
    reporter.say(f"{'trained on':<12} {overview(facts.get('fingerprint', {}))}")
    return BadInput.exit_status if broken else 0


def _config(run: Path) -> str:
    config = _stored_config(run)
    return ", ".join(f"{name} {config[name]}" for name in ("backbone", "structure", "data", "seed") if name in config)


def _adapter(run: Path) -> str:
    trained = importlib.import_module("pipelines.inference").load_run(run, "cpu")
    return f"ok: digests agree and it loads; {', '.join(trained.labels)}"


def _checkpoints(run: Path) -> str:
    kept = checkpoints(run / "checkpoints")
    for path in kept:
        load_checkpoint(path)
    return f"ok: {len(kept)} intact, newest {kept[-1].name}" if kept else "none kept; the run cannot be resumed"


def _scores(run: Path) -> str:
    path = run / "scores" / "summary.json"
    if not path.is_file():
        return "none; score it with surm-seg evaluate"
    try:
        summary = json.loads(path.read_bytes())
        mean = summary["overall"]["dice"]["mean"]
        return f"mean Dice {'undefined' if mean is None else format(float(mean), '.4f')} over {summary['cases']} cases"
    except (ValueError, KeyError, TypeError) as error:
        raise Corrupt("scores-unreadable", f"{path} is malformed; score the run again.") from error


def _data(run: Path, facts: Mapping[str, Any]) -> str:
    """Whether the data set it was trained on is still there and the same; without it the run can still be used."""
    folder = Path(_stored_config(run).get("data", ""))
    if not (folder / "dataset.json").is_file():
        return f"{folder} is not here; predicting works, resuming does not"
    same = Dataset.open(folder).digest == facts.get("data_sha256")
    return f"{folder} {'is the one it was trained on' if same else 'has changed since; resuming is refused'}"


def _stored_config(run: Path) -> dict[str, Any]:
    try:
        return dict(yaml.safe_load((run / "config.yaml").read_text()))
    except (OSError, ValueError, TypeError, yaml.YAMLError) as error:
        raise Corrupt("run-unreadable", f"{run / 'config.yaml'} is missing or damaged; restore it.") from error


def _run_record(run: Path) -> dict[str, Any]:
    """run.json; raises BadInput where there is none, Corrupt for a damaged one."""
    try:
        return dict(json.loads((run / "run.json").read_bytes()))
    except OSError as error:
        raise BadInput("no-run", f"{run} is not a run folder (it has no run.json); give --run RUN.") from error
    except (ValueError, TypeError) as error:
        raise Corrupt("run-unreadable", f"{run / 'run.json'} is damaged; restore it.") from error


if __name__ == "__main__":
    sys.exit(main())
