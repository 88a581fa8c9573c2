"""`surm-seg train`: fine-tune a backbone on a task, keep the best checkpoint, score the held-out cases.

RUN/config.yaml        every option, resolved; `--config` reads it back
   /run.json           versions, commit, data digest and fingerprint, parameters, when it was finished
   /metrics.jsonl      one line per step; the same in tensorboard/
   /checkpoints        what --resume goes on from
   /adapter            deltas and decoder in PEFT's format, with a model card
   /predictions        label maps of the scored cases, on their own grids
   /scores             cases.csv, slices.csv, summary.json and report.html

With --seeds 3: three of these, RUN/seed-0 and so on, and RUN/seeds.csv and seeds.json with what they come to.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from surm_seg import cli
from surm_seg.checkpoint import checkpoints
from surm_seg.distributed import join
from surm_seg.engine import EngineConfig, fit
from surm_seg.errors import BadConfig, BadInput
from surm_seg.lock import held
from surm_seg.precision import fast_precision
from surm_seg.prepare import PrepareConfig, plan, prepare, show
from surm_seg.provenance import provenance
from surm_seg.resume import changes, config_file, stored_config, without_damaged
from surm_seg.task import Record
from surm_seg.training_state import KEPT_CHECKPOINTS
from surm_seg.volume import replacing

PHANTOM = "phantom"
NOT_STORED = ("output", "resume", "allow", "seeds", "dry_run", "quiet", "debug")
"""Options of one call, not of the run."""
COUNTED_BY = {"epochs": "steps", "warmup_share": "warmup"}
"""Options that stand in the place of others."""
COPIES = 4
"""Of the trained weights in a checkpoint: now, at the best validation, and the optimiser's two moments."""


@dataclass
class TrainConfig(cli.Common):
    """Fine-tune a backbone; without any option, sam_tiny on generated patients.

    Args:
        output: run folder; default runs/<time>-<task>.
        task: segmentation, or a module that defines a Task.
        recipe: a set of defaults that the task names; options override it.
        resume: go on with the run in --output from its newest checkpoint.
        allow: options that a resumed run may change, joined by commas.
        seeds: train this many runs, with --seed, --seed + 1, ...; 0 for one run, in --output itself.
    """

    task: str = "segmentation"
    recipe: str = "default"
    resume: bool = False
    allow: str = ""
    seeds: int = 0

    def __post_init__(self) -> None:
        for name in ("seed", "seeds"):
            if getattr(self, name) < 0:
                raise BadConfig("seed", f"--{name} {getattr(self, name)} must not be negative.")


def main(argv: Sequence[str] | None = None) -> int:
    cli.offline()
    arguments = list(sys.argv[1:] if argv is None else argv)
    return cli.run(lambda: _main(arguments), debug="--debug" in arguments)


def _main(arguments: list[str]) -> int:
    return train(*parsed(arguments))


def parsed(arguments: Sequence[str]) -> tuple[ModuleType, TrainConfig, EngineConfig, Any]:
    """What `train` is called with for a command line; raises BadConfig, and SystemExit for an unknown option."""
    first = _first_look(arguments)
    task = task_module(first["task"])
    if first["recipe"] not in task.RECIPES:
        raise BadConfig("recipe", f"--recipe {first['recipe']} is unknown; choose among {', '.join(task.RECIPES)}.")
    given = {word.partition("=")[0].replace("-", "_").lstrip("_") for word in arguments if word.startswith("--")}
    recipe = {
        name: value
        for name, value in task.RECIPES[first["recipe"]].items()
        if COUNTED_BY.get(name) not in given  # a number of steps that is asked for goes before a recipe's share of them
    }
    return task, *cli.parse("train", (TrainConfig, EngineConfig, task.Config), arguments, defaults=first | recipe)


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
    ranks, _ = join(cli.device_named(config.device))
    engine.micro_batch(ranks.count)  # for what it refuses
    run = ranks.told(lambda: config.output or Path("runs") / f"{time.strftime('%Y%m%d-%H%M%S')}-{config.task}")
    return (_train_seeds if config.seeds else _train_one)(task_type, run, config, engine, options)


def _train_seeds(task_type: ModuleType, run: Path, config: TrainConfig, engine: EngineConfig, options: Any) -> int:
    """One run after the other, and their scores together; a resumed one passes over those that are finished."""
    runs = {seed: run / f"seed-{seed}" for seed in range(config.seed, config.seed + config.seeds)}
    ranks, _ = join(cli.device_named(config.device))
    started = ranks.told(lambda: [folder for folder in runs.values() if config_file(folder).exists()])
    ranks.told(lambda: stored_config((started or [run])[0], config.resume))  # for what it refuses
    for seed, folder in runs.items():
        one = replace(config, seed=seed, resume=folder in started)
        status = _train_one(task_type, folder, one, engine, copy.copy(options))
        if status:
            return status
    if ranks.first and not config.dry_run:
        reporter = cli.Reporter(config.quiet)
        reporter.say(f"mean and SD over the seeds {', '.join(map(str, runs))}; seeds.csv and seeds.json in {run}")
        reporter.say(task_type.over_seeds(run, runs))
    return 0


def _train_one(task_type: ModuleType, run: Path, config: TrainConfig, engine: EngineConfig, options: Any) -> int:
    import torch

    device = cli.device_named(config.device)
    ranks, own_device = join(device)
    reporter = cli.Reporter(config.quiet or not ranks.first)
    if getattr(options, "data", None) == PHANTOM:
        options.data = ranks.told(lambda: phantom(config, task_type, options, reporter))
        if options.data is None:
            return 0
    before = ranks.told(lambda: stored_config(run, config.resume))
    if engine.precision == "auto":  # measured once: a run goes on in the precision it was started with
        fast = before.get("precision") or ranks.told(lambda: fast_precision(torch.device(own_device)))
        engine = replace(engine, precision=fast)
    resolved = _plain({**asdict(config), **asdict(engine), **asdict(options), "device": device})
    resolved = {name: value for name, value in resolved.items() if name not in NOT_STORED}
    allowed = [name.strip().replace("-", "_") for name in config.allow.split(",") if name.strip()]
    changed = changes(run, "configuration", before, resolved, allowed)
    task = task_type.create(options, config.seed)
    engine = engine.for_samples(len(task))
    reporter.say(task.describe())
    facts = _plain(task.facts())
    if config.dry_run:
        needed = task.memory_needed(engine.micro_batch(ranks.count), own_device)
        reporter.say(f"dry run: {engine.steps} steps of {engine.batch_size} on {device}, {engine.precision}")
        reporter.say(f"dry run: about {needed / 1e9:.1f} GB of memory for a step; nothing written")
        return cli.check_memory(needed, own_device)
    _check_space(run, task)
    try:
        with held(run, "trained") if ranks.first else nullcontext():
            if ranks.told(lambda: _opened(run, config, resolved, facts, changed)):
                return _carry_out(task, run, engine, config, reporter)
            reporter.say(f"{run} is finished")
            return 0
    except OSError as error:
        sentence = f"{error.filename or run}: {error.strerror}; mend that, then start again, or go on with --resume."
        raise BadInput("run-write", sentence) from error


def _opened(
    run: Path, config: TrainConfig, resolved: dict[str, Any], facts: dict[str, Any], changed: list[str]
) -> bool:
    """Write the records of a new run, or compare those of an old one; False for a finished one among several seeds."""
    if config.resume:
        record = json.loads((run / "run.json").read_text())
        changes(run, "data or weights", record, facts)
        if config.seeds and "finished" in record and not changed:
            return False
    else:
        stored_config(run, resume=False)  # again: another process may have been here meanwhile
        record = {"task": config.task, **provenance(), **facts}
    if changed or not config.resume:
        record.pop("finished", None)
        _write(run / "run.json", record | {"changed": record.get("changed", []) + changed})
        with replacing(config_file(run)) as file:
            file.write(yaml.safe_dump(resolved, sort_keys=False).encode())
    return True


def _carry_out(task: Any, run: Path, engine: EngineConfig, config: TrainConfig, reporter: cli.Reporter) -> int:
    """Train, and let the task finish the run: its adapter, predictions and scores."""
    ranks, device = join(cli.device_named(config.device))
    resume = ranks.told(lambda: config.resume and without_damaged(run))
    with _progress(reporter, engine.steps) as report:
        result = fit(task, engine, run, seed=config.seed, device=device, resume=resume, ranks=ranks, report=report)
    best = "" if result.best_score is None else f", best score {result.best_score:.4f} at step {result.best_step}"
    reporter.say(f"trained in {result.seconds:.0f} s{best}")
    status = ranks.told(lambda: task.finish(run, device, reporter.track, reporter.say))
    if ranks.first and status == 0:
        record = json.loads((run / "run.json").read_text())
        done = {"steps": result.steps, "best_step": result.best_step, "accumulate": result.accumulate}
        done |= {"processes": ranks.count, "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
        _write(run / "run.json", record | done)
    return status


def phantom(config: TrainConfig, task_type: ModuleType, options: Any, reporter: cli.Reporter) -> str | None:
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


def _check_space(run: Path, task: Any) -> None:
    """Raise BadInput where the disk cannot hold the checkpoints that are kept, and the next one beside them."""
    trained = sum(p.numel() * p.element_size() for p in task.model.parameters() if p.requires_grad)
    more = KEPT_CHECKPOINTS + 1 - len(checkpoints(run / "checkpoints"))
    cli.check_space(run, more * COPIES * trained)


def _write(path: Path, record: dict[str, Any]) -> None:
    with replacing(path) as file:
        file.write((json.dumps(record, indent=1) + "\n").encode())


@contextmanager
def _progress(reporter: cli.Reporter, steps: int) -> Iterator[Callable[[Record], None]]:
    """Show records as they come: in a bar on a terminal, every so often in a line elsewhere, validations always so."""
    every = max(1, steps // 20)
    live = reporter.console.is_terminal and not reporter.console.quiet
    columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.description}"), console=reporter.console, disable=not live) as bar:
        job = bar.add_task("", total=steps)

        def show(record: Record) -> None:
            step, score = int(record["step"]), f"  validation {record['score']:.4f}" if "score" in record else ""
            loss = f"loss {record['loss']:.4f}" if "loss" in record else "loss not finite, skipped"
            bar.update(job, completed=step, description=loss)
            if score or not (live or step % every):
                reporter.say(f"step {step}/{steps}  {loss}  {record['seconds']:.0f} s{score}")
            if "accumulate" in record:
                parts = f"{record['accumulate']:.0f} parts"
                reporter.say(f"step {step}: memory is short; from here on steps are computed in {parts}, same loss")
            if "stopped_early" in record:
                reporter.say(f"step {step}: stopped, as --patience asks; the validation score no longer grows")

        yield show


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """Only what YAML writes and reads back equal: paths as text, tuples as lists."""
    return json.loads(json.dumps(values, default=str))


if __name__ == "__main__":
    sys.exit(main())
