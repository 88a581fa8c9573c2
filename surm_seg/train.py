"""`surm-seg train`: fine-tune a backbone on a task, keep the best checkpoint, score the held-out cases.

RUN/config.yaml        every option, resolved; `--config` reads it back
   /run.json           versions, commit, data digest and fingerprint, parameters
   /metrics.jsonl      one line per step; the same in tensorboard/
   /checkpoints        what --resume goes on from
   /adapter            deltas and decoder in PEFT's format, with a model card
   /predictions        label maps of the scored cases, on their own grids
   /scores             cases.csv and summary.json
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml

from surm_seg import cli
from surm_seg.engine import EngineConfig, fast_precision, fit
from surm_seg.errors import BadConfig
from surm_seg.prepare import PrepareConfig, plan, prepare, show
from surm_seg.task import Record

PHANTOM = "phantom"
PACKAGES = ("surm-seg", "torch", "monai", "peft", "transformers", "accelerate", "nibabel", "segment-anything", "numpy")


@dataclass
class TrainConfig(cli.Common):
    """Fine-tune a backbone; without any option, sam_tiny on generated patients.

    Args:
        output: run folder; default runs/<time>-<task>.
        task: segmentation, or a module that defines a Task.
        recipe: a set of defaults that the task names; options override it.
        resume: go on with the run in --output from its newest checkpoint.
    """

    task: str = "segmentation"
    recipe: str = "default"
    resume: bool = False


def main(argv: Sequence[str] | None = None) -> int:
    cli.offline()
    arguments = list(sys.argv[1:] if argv is None else argv)
    return cli.run(lambda: _main(arguments), debug="--debug" in arguments)


def _main(arguments: list[str]) -> int:
    first = _first_look(arguments)
    task = task_module(first["task"])
    if first["recipe"] not in task.RECIPES:
        raise BadConfig("recipe", f"--recipe {first['recipe']} is unknown; choose among {', '.join(task.RECIPES)}.")
    config, engine, options = cli.parse(
        "train", (TrainConfig, EngineConfig, task.Config), arguments, defaults=first | task.RECIPES[first["recipe"]]
    )
    return train(task, config, engine, options)


def _first_look(arguments: Sequence[str]) -> dict[str, Any]:
    """The task and recipe, which decide what the other options are; from the options or the --config file."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name in ("--task", "--recipe", "--config"):
        parser.add_argument(name)
    given = vars(parser.parse_known_args(list(arguments))[0])
    path = given.pop("config")
    if path and not Path(path).is_file():
        raise BadConfig("config-file", f"--config {path} does not exist.")
    stored = (yaml.safe_load(Path(path).read_text()) or {}) if path else {}
    defaults = {"task": TrainConfig.task, "recipe": TrainConfig.recipe}
    return {name: given[name] or stored.get(name, default) for name, default in defaults.items()}


def task_module(name: str) -> ModuleType:
    """The module of a task: `segmentation` is pipelines.segmentation, a dotted name is taken as it is."""
    path = name if "." in name else f"pipelines.{name}"
    try:
        module = importlib.import_module(path)
    except ModuleNotFoundError as error:
        if error.name and path.startswith(error.name):
            raise BadConfig("task", f"--task {name}: there is no module {path}.") from error
        raise
    if not hasattr(module, "create"):
        raise BadConfig("task", f"--task {name}: {path} defines no task (it has no create).")
    return module


def train(task_type: ModuleType, config: TrainConfig, engine: EngineConfig, options: Any) -> int:
    """Run a parsed command; returns its exit status."""
    import torch

    reporter = cli.Reporter(config.quiet)
    device = cli.device_named(config.device)
    run = config.output or Path("runs") / f"{time.strftime('%Y%m%d-%H%M%S')}-{config.task}"
    if getattr(options, "data", None) == PHANTOM:
        options.data = _phantom(config, reporter)
        if options.data is None:
            return 0
    if engine.precision == "auto":
        engine = dataclasses.replace(engine, precision=fast_precision(torch.device(device)))
    resolved = {**asdict(config), **asdict(engine), **asdict(options), "output": run, "device": device}
    _check_run_folder(run, resolved, config.resume)
    task = task_type.create(options, config.seed)
    reporter.say(task.describe())
    if config.dry_run:
        reporter.say(
            f"dry run: {engine.steps} steps of {engine.batch_size} on {device}, {engine.precision}; nothing written"
        )
        return 0
    run.mkdir(parents=True, exist_ok=True)
    (run / "config.yaml").write_text(yaml.safe_dump(_plain(resolved), sort_keys=False))
    (run / "run.json").write_text(json.dumps({"task": config.task, **_provenance(), **task.facts()}, indent=1) + "\n")
    result = fit(
        task,
        engine,
        run,
        seed=config.seed,
        device=device,
        resume=config.resume,
        report=_progress(reporter, engine.steps),
    )
    best = "" if result.best_score is None else f", best score {result.best_score:.4f} at step {result.best_step}"
    reporter.say(f"trained in {result.seconds:.0f} s{best}")
    return task.finish(run, device, reporter.track, reporter.say)


def _phantom(config: TrainConfig, reporter: cli.Reporter) -> str | None:
    """The generated data set, prepared on first use; None where a dry run only names what would be done."""
    folder = Path("data") / PHANTOM
    if (folder / "dataset.json").exists():
        return str(folder)
    request = PrepareConfig(source=PHANTOM, output=folder)
    if config.dry_run:
        show(plan(request), reporter)
        return None
    prepare(request, reporter)
    return str(folder)


def _check_run_folder(run: Path, resolved: dict[str, Any], resume: bool) -> None:
    """Refuse to overwrite a run, and to resume one with another configuration."""
    stored = run / "config.yaml"
    if not resume:
        if stored.exists():
            raise BadConfig(
                "run-exists", f"{run} already holds a run; go on with --resume, or choose another --output."
            )
        return
    if not stored.exists():
        raise BadConfig("resume-nothing", f"{run} holds no run to resume; start it without --resume.")
    before, free = (
        yaml.safe_load(stored.read_text()),
        {"resume", "output", "quiet", "debug", "workers", "dry_run", "device"},
    )
    now = _plain(resolved)
    changed = [f"{k}: {before.get(k)!r} -> {v!r}" for k, v in now.items() if k not in free and before.get(k) != v]
    if changed:
        raise BadConfig(
            "resume-config", f"{run} was started with another configuration ({'; '.join(changed)}); change it back."
        )


def _progress(reporter: cli.Reporter, steps: int) -> Any:
    every = max(1, steps // 20)

    def show(record: Record) -> None:
        if record["step"] % every == 0 or "score" in record:
            score = f"  validation {record['score']:.4f}" if "score" in record else ""
            loss = f"loss {record['loss']:.4f}" if "loss" in record else "loss not finite, skipped"
            reporter.say(f"step {record['step']:.0f}/{steps}  {loss}  {record['seconds']:.0f} s{score}")

    return show


def _provenance() -> dict[str, Any]:
    """Versions, commit and machine, for the record."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = None
    machine = {"python": platform.python_version(), "system": platform.system(), "machine": platform.machine()}
    return {"started": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "commit": commit, "versions": versions, **machine}


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """Only what YAML writes and reads back equal: paths as text, tuples as lists."""
    return json.loads(json.dumps(values, default=str))


if __name__ == "__main__":
    sys.exit(main())
