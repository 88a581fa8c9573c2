"""`surm-seg search`: find which structure goes where, by gradients (no training) or by training.

    surm-seg search --by gradient --budget 2048 --task glue --name agreement
    surm-seg search --by training --trials 24 --task glue --name agreement

By gradient, one pass over calibration batches gives every place of the asked roles the structure, or none, with which
the budget captures most of the gradient (`pipelines.search`). By training, Ray Tune trains structures, sizes,
roles and learning rates that are drawn, and ASHA stops what lags behind; what no other trial beats in both score and
parameters is the front.
Options that are not the search's own are those of `surm-seg train`.

OUTPUT/table.md              what was found, and table.json with every figure
      /train.yaml            `surm-seg train --config` trains what was found
      /adapter_config.json   by gradient: the same as a SurmConfig, for PEFT
      /picture.svg           by training: score against parameters
      /trials                by training: the runs; the same command goes on where it was cut
      /precision.json        by training: what --precision auto came to
"""

from __future__ import annotations

import difflib
import json
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from pipelines import search
from pipelines.studies.table import write
from surm_seg import cli, cluster, search_tables, structures, train
from surm_seg.distributed import ALONE
from surm_seg.engine import EngineConfig
from surm_seg.errors import BadConfig, BadInput
from surm_seg.loading import loaded
from surm_seg.lock import held
from surm_seg.output_folder import check_writable, writing
from surm_seg.task import Order, Task
from surm_seg.trials import FAILED, REDUCTION, RUNGS, Plan, Result, Trial, created, front
from surm_seg.volume import replacing

NOT_OURS = (
    "output", "method", "method_options", "structure", "structure_options", "overrides", "learning_rate", "seeds",
    "resume", "validate_every", "checkpoint_every", "patience",
)  # fmt: skip
"""Options of `train` that the search sets itself."""

TRAIN = "train.yaml"


Parsed = tuple[train.TrainConfig, EngineConfig, Any]
"""The options of a training."""


@dataclass(frozen=True)
class Asked:
    """The search's own options, and those of `surm-seg train`."""

    command: tuple[str, ...]
    by: str
    families: tuple[str, ...]
    budget: int
    batches: int
    trials: int
    sizes: tuple[float, float]
    rates: tuple[float, float]
    jobs: int | None
    ray_address: str | None
    output: Path
    dry_run: bool
    words: tuple[str, ...]


def main(argv: Sequence[str] | None = None) -> int:
    cli.offline()
    arguments = list(sys.argv[1:] if argv is None else argv)
    return cli.run(lambda: _main(arguments), debug="--debug" in arguments)


def _main(arguments: list[str]) -> int:
    asked = _asked(arguments)
    task_type, config, engine, options = train.parsed(asked.words)
    if not {"roles", "overrides"} <= vars(options).keys():
        raise BadConfig("search-task", f"--task {config.task} has no --roles and --overrides, which a search chooses.")
    check_writable(asked.output)
    if asked.by == "training" and getattr(options, "validate_on", "") == "none":
        sentence = "--validate_on none leaves no score to search by; give --validate_on val, or --by gradient."
        raise BadConfig("search-score", sentence)
    task = created(task_type, replace(config, dry_run=asked.dry_run), options)
    if task is None:
        return 0
    by = _by_gradient if asked.by == "gradient" else _by_training
    with writing(asked.output):
        return by(asked, task, (config, engine, options))


def _asked(arguments: list[str]) -> Asked:
    parser = cli.around_train("search")
    parser.add_argument("--by", choices=("gradient", "training"), default="gradient", help="default gradient")
    parser.add_argument("--structures", default="all", help="joined by commas; default all")
    parser.add_argument("--budget", type=int, default=0, help="gradient: parameters; default as many as rank 1 has")
    parser.add_argument("--batches", type=int, default=16, help="gradient: calibration batches; default 16")
    parser.add_argument("--trials", type=int, default=24, help="training: how many are drawn; default 24")
    parser.add_argument("--sizes", default="0.5,8", help="training: parameters, times those of rank 1; default 0.5,8")
    parser.add_argument("--learning_rates", "--learning-rates", default="5e-4,2e-2", help="training; default 5e-4,2e-2")
    parser.add_argument("--jobs", type=int, help="training: trials at once on this machine; default one for each CPU")
    parser.add_argument(
        "--ray_address", "--ray-address", help="training: of a running Ray cluster; default is to start Ray"
    )
    parser.add_argument("--output", type=Path, default=Path("runs/search"), help="default runs/search")
    parser.add_argument("--dry-run", "--dry_run", action="store_true", help="say what would be done")
    own, words = cli.own_and_train(parser, arguments, NOT_OURS)
    families = structures.names() if own.structures == "all" else tuple(filter(None, own.structures.split(",")))
    for name in families:
        if name not in structures.names():
            near = difflib.get_close_matches(name, structures.names())
            meant = f"did you mean {' or '.join(near)}? There are" if near else "choose among"
            sentence = f"--structures names no structure {name!r}; {meant} {', '.join(structures.names())}."
            raise BadConfig("structure-name", sentence)
    jobs = 1 if own.jobs is None else own.jobs
    if not families or own.budget < 0 or min(own.batches, own.trials, jobs) < 1:
        sentence = "--structures must name one, --batches, --trials and --jobs be 1 or more, --budget not negative."
        raise BadConfig("search-option", sentence)
    sizes, rates = _range("sizes", own.sizes), _range("learning_rates", own.learning_rates)
    return Asked(
        ("surm-seg", "search", *arguments), own.by, tuple(dict.fromkeys(families)), own.budget, own.batches, own.trials,
        sizes, rates, own.jobs, own.ray_address, own.output, own.dry_run, tuple(words),
    )  # fmt: skip


def _range(option: str, text: str) -> tuple[float, float]:
    try:
        least, most = (float(number) for number in text.split(","))
    except ValueError as error:
        raise BadConfig("search-option", f"--{option} {text} is not LEAST,MOST.") from error
    if not 0 < least <= most < float("inf"):
        raise BadConfig("search-option", f"--{option} {text} must be positive and not fall.")
    return least, most


def _by_gradient(asked: Asked, task: Task, parsed: Parsed) -> int:
    config, engine, _ = parsed
    places = search.places(task)
    budget = asked.budget or sum(sum(place.size) for place in places)
    least = min(search.least(place, asked.families) for place in places)
    if least > budget:
        sentence = f"No structure has as few parameters as --budget {budget}; the smallest has {least}."
        raise BadConfig("search-budget", sentence)
    print(f"{len(places)} places, {budget:,} parameters, {asked.batches} batches of {engine.batch_size}")
    if asked.dry_run:
        return 0
    device = cli.device_named(config.device)
    order = Order(task, engine.batch_size, config.seed, range(asked.batches), ALONE)
    with loaded(task, order, config.seed, engine.workers) as batches:
        places = search.with_gradients(task, batches, seed=config.seed, device=device)
    reporter = cli.Reporter(config.quiet)
    choices = [
        search.members(place, asked.families, budget) for place in reporter.track(places, "projecting", len(places))
    ]
    chosen = search.allotted(choices, budget)
    if not any(chosen):
        raise BadInput("search-gradient", "The gradient is 0 at every place; look at the model's weights and the data.")
    overrides = search.overrides(places, chosen)
    model: Any = task.model
    with held(asked.output, "searched"):
        replace(model.peft_config["default"], overrides=overrides).save_pretrained(str(asked.output))
        _write_training(asked, {"overrides": overrides}, parsed)
        given = (
            f"Budget {budget:,} parameters; {asked.batches} batches of {engine.batch_size}; "
            f"surm-seg train {' '.join(asked.words)}."
        )
        found = search_tables.of_places(asked.families, places, choices, chosen, budget, given, asked.output / TRAIN)
        write(asked.output, asked.command, found)
    return 0


def _by_training(asked: Asked, task: Task, parsed: Parsed) -> int:
    config, engine, options = parsed
    places = search.places(task)
    shapes = {role: [place.size for place in places if place.part == role] for role in options.roles}
    missing = [role for role, found in shapes.items() if not found]
    if missing:
        raise BadConfig("role", f"No adapted place of the task's model is called {' or '.join(missing)}.")
    if asked.ray_address is None:  # the machines of a cluster have devices of their own
        cli.device_named(config.device)
    steps = engine.for_samples(len(task)).steps
    plan = Plan(
        words=asked.words, shapes=shapes, families=asked.families, sizes=asked.sizes,
        rates=asked.rates, trials=asked.trials, steps=steps, rung=-(-steps // REDUCTION**RUNGS), seed=config.seed,
        device=config.device, output=asked.output.absolute(), home=Path.cwd(),
    )  # fmt: skip
    drawn = plan.drawn()
    print(f"{len(drawn)} different trials of at most {steps} steps, first looked at after {plan.rung}")
    if asked.dry_run:
        return 0
    with held(asked.output, "searched"):
        plan, results = _carried_out(plan, drawn, asked, engine.precision == "auto")
        found = search_tables.of_trials(plan, results, asked.output / TRAIN)
        best = front(results)
        if best:
            chosen = best[-1].trial
            entry = {"structure": chosen.structure, "options": dict(chosen.options)}
            values = {"roles": list(chosen.roles), "learning_rate": chosen.rate,
                      "overrides": dict.fromkeys(chosen.roles, entry)}  # fmt: skip
            _write_training(asked, values, parsed)
        write(asked.output, asked.command, found)
    failed = any(one.outcome == FAILED for one in results)
    return BadInput.exit_status if not best else cli.SOME_CASES_FAILED if failed else 0


def _carried_out(plan: Plan, drawn: Sequence[Trial], asked: Asked, auto: bool) -> tuple[Plan, list[Result]]:
    """Run or go on with the search on Ray; where the precision is `auto`, the plan comes back with what it is."""
    # A signal is for the command, and relative paths are not those of Tune's folders.
    os.environ |= {"TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1", "TUNE_DISABLE_SIGINT_HANDLER": "1"}
    os.environ |= {"RAY_CHDIR_TO_TRIAL_DIR": "0", "RAY_AIR_NEW_OUTPUT": "0"}
    with cluster.joined(asked.ray_address, asked.jobs, "use --by gradient"):
        try:
            from surm_seg.asha import searched, with_precision
        except ModuleNotFoundError as error:
            sentence = f"Ray Tune needs the package {error.name}: pip install 'surm-seg[cluster]'."
            raise BadConfig("cluster-extra", sentence) from error
        logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # what fails is told by our own lines
        plan = with_precision(plan) if auto else plan
        with TemporaryDirectory(prefix=".tune.", suffix=f".{os.getpid()}.part", dir=plan.output) as records:
            return plan, searched(plan, drawn, Path(records))


def _write_training(asked: Asked, values: Mapping[str, Any], parsed: Parsed) -> None:
    """A --config file for `surm-seg train`: what the search was given, and what it found."""
    resolved = {name: value for part in parsed for name, value in asdict(part).items()}
    given = {word.partition("=")[0][2:].replace("-", "_") for word in asked.words if word.startswith("--")}
    kept = resolved if "config" in given else {name: resolved[name] for name in resolved if name in given}
    shown = {name: value for name, value in kept.items() if name not in train.NOT_STORED} | dict(values)
    with replacing(asked.output / TRAIN) as file:
        file.write(yaml.safe_dump(json.loads(json.dumps(shown, default=str)), sort_keys=False).encode())


if __name__ == "__main__":
    sys.exit(main())
