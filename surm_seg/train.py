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
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml

from surm_seg import cli
from surm_seg.checkpoint import checkpoints
from surm_seg.engine import EngineConfig, fast_precision, fit
from surm_seg.errors import BadConfig
from surm_seg.prepare import PrepareConfig, plan, prepare, show
from surm_seg.provenance import provenance
from surm_seg.task import Record
from surm_seg.volume import replacing

PHANTOM = "phantom"
NOT_STORED = ("output", "resume", "dry_run", "quiet", "debug")
"""Options of one call, not of the run."""
MAY_CHANGE = ("workers", "device")
"""Options that a resumed run may be given anew, because the data do not depend on them."""


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
    try:
        given = vars(parser.parse_known_args(list(arguments))[0])
    except argparse.ArgumentError as error:
        raise BadConfig("option", f"{error.argument_name} {error.message}.") from error
    path = given.pop("config")
    try:
        stored = (yaml.safe_load(Path(path).read_text()) or {}) if path else {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise BadConfig("config-file", f"--config {path} cannot be read as YAML; check the file.") from error
    if not isinstance(stored, dict):
        raise BadConfig("config-file", f"--config {path} holds no options; write one `option: value` per line.")
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

    if config.seed < 0:
        raise BadConfig("seed", f"--seed {config.seed} must not be negative.")
    reporter = cli.Reporter(config.quiet)
    device = cli.device_named(config.device)
    run = config.output or Path("runs") / f"{time.strftime('%Y%m%d-%H%M%S')}-{config.task}"
    if getattr(options, "data", None) == PHANTOM:
        options.data = _phantom(config, task_type, options, reporter)
        if options.data is None:
            return 0
    before = _stored_config(run, config.resume)
    if engine.precision == "auto":  # measured once: a run goes on in the precision it was started with
        engine = dataclasses.replace(engine, precision=before.get("precision") or fast_precision(torch.device(device)))
    resolved = _plain({**asdict(config), **asdict(engine), **asdict(options), "device": device})
    resolved = {name: value for name, value in resolved.items() if name not in NOT_STORED}
    _refuse_differences(run, "configuration", before, resolved)
    task = task_type.create(options, config.seed)
    reporter.say(task.describe())
    facts = _plain(task.facts())
    if config.dry_run:
        needed = task.memory_needed(engine.batch_size, device)
        reporter.say(f"dry run: {engine.steps} steps of {engine.batch_size} on {device}, {engine.precision}")
        reporter.say(f"dry run: about {needed / 1e9:.1f} GB of memory for a step; nothing written")
        return cli.check_memory(needed, device)
    if config.resume:
        _refuse_differences(run, "data or weights", json.loads((run / "run.json").read_text()), facts)
    else:
        run.mkdir(parents=True, exist_ok=True)
        _write(run / "config.yaml", yaml.safe_dump(resolved, sort_keys=False))
        _write(run / "run.json", json.dumps({"task": config.task, **provenance(), **facts}, indent=1) + "\n")
    result = fit(
        task,
        engine,
        run,
        seed=config.seed,
        device=device,
        resume=config.resume and bool(checkpoints(run / "checkpoints")),  # it may have died before its first save
        report=_progress(reporter, engine.steps),
    )
    best = "" if result.best_score is None else f", best score {result.best_score:.4f} at step {result.best_step}"
    reporter.say(f"trained in {result.seconds:.0f} s{best}")
    return task.finish(run, device, reporter.track, reporter.say)


def _phantom(config: TrainConfig, task_type: ModuleType, options: Any, reporter: cli.Reporter) -> str | None:
    """The generated data set, prepared on first use; None where a dry run only names what would be done."""
    folder = Path("data") / PHANTOM
    if (folder / "dataset.json").exists():
        return str(folder)
    request = PrepareConfig(source=PHANTOM, output=folder)
    if config.dry_run:
        show(plan(request), reporter)
        task_type.check(options, config.seed)
        return None
    prepare(request, reporter)
    return str(folder)


def _stored_config(run: Path, resume: bool) -> dict[str, Any]:
    """The configuration of the run to resume, {} for a new one; refuses to overwrite a run and to resume none."""
    stored = run / "config.yaml"
    if not resume:
        if stored.exists():
            raise BadConfig("run-exists", f"{run} already holds a run; use --resume, or choose another --output.")
        return {}
    if not stored.exists():
        raise BadConfig("resume-nothing", f"{run} holds no run to resume; start it without --resume.")
    return yaml.safe_load(stored.read_text())


def _refuse_differences(run: Path, what: str, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise BadConfig naming what a resumed run would find changed."""
    changed = [
        f"{name}: {before[name]!r} -> {value!r}"
        for name, value in now.items()
        if name in before and name not in MAY_CHANGE and before[name] != value
    ]
    if changed:
        sentence = f"{run} was started with another {what} ({'; '.join(changed)}); change it back."
        raise BadConfig("resume-changed", sentence)


def _write(path: Path, text: str) -> None:
    with replacing(path) as file:
        file.write(text.encode())


def _progress(reporter: cli.Reporter, steps: int) -> Any:
    every = max(1, steps // 20)

    def show(record: Record) -> None:
        if record["step"] % every == 0 or "score" in record:
            score = f"  validation {record['score']:.4f}" if "score" in record else ""
            loss = f"loss {record['loss']:.4f}" if "loss" in record else "loss not finite, skipped"
            reporter.say(f"step {record['step']:.0f}/{steps}  {loss}  {record['seconds']:.0f} s{score}")

    return show


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """Only what YAML writes and reads back equal: paths as text, tuples as lists."""
    return json.loads(json.dumps(values, default=str))


if __name__ == "__main__":
    sys.exit(main())
