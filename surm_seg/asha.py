"""What Ray Tune does in a search by training. Importing this needs Ray."""

from __future__ import annotations

import os
import pickle
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
import torch
from ray import tune
from ray.exceptions import RayActorError, RayTaskError
from ray.tune import Callback
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler

from surm_seg import cli, cluster, trials
from surm_seg.errors import BadInput, SurmError
from surm_seg.precision import fast_precision, kept_precision
from surm_seg.trials import FAILED, FINISHED, REDUCTION, STOPPED, Plan, Result, Trial

NUMBER = "number"
"""All that Tune knows of a trial: its place among those drawn."""


def searched(plan: Plan, drawn: Sequence[Trial], records: Path) -> list[Result]:
    """What the trials drawn come to, in their order; Tune's own files go to `records`."""
    told = Told(plan, drawn)
    tuner = tune.Tuner(
        tune.with_resources(tune.with_parameters(_trial, plan=plan, drawn=drawn), {"cpu": 1, "gpu": _gpus(plan)}),
        param_space={NUMBER: tune.grid_search(list(range(len(drawn))))},
        tune_config=tune.TuneConfig(scheduler=BySize(plan, drawn), reuse_actors=True),
        run_config=tune.RunConfig(name="trials", storage_path=str(records), callbacks=[told], verbose=0),
    )
    tuner.fit()
    return [told.ended[number] for number in sorted(told.ended)]


def with_precision(plan: Plan) -> Plan:
    """The plan with the precision that is fast where its trials run, once for all of them."""

    def measure() -> str:
        measured = ray.remote(num_cpus=1, num_gpus=_gpus(plan))(_precision)
        try:
            return ray.get(measured.remote(plan.device))
        except RayTaskError as error:
            raise cluster.cause(error) from error

    return replace(plan, words=(*plan.words, "--precision", kept_precision(plan.output, plan.words, measure)))


def _precision(device: str) -> str:
    return fast_precision(torch.device(cli.device_named(device)))


def _gpus(plan: Plan) -> int:
    """Of each trial: one, where the cluster has any, and none for --device cpu."""
    return int(plan.device != "cpu" and ray.cluster_resources().get("GPU", 0) >= 1)


def _trial(config: Mapping[str, Any], plan: Plan, drawn: Sequence[Trial]) -> None:
    try:
        os.chdir(plan.home)
    except OSError as error:
        sentence = f"{socket.gethostname()} has no {plan.home}; start the search in a folder that all machines share."
        raise BadInput("trial-home", sentence) from error
    trials.run(plan, drawn[config[NUMBER]], tune.report)


def _why(trial: Any) -> str:
    """What Tune knows of a trial that ended without saying why."""
    if trial.pickled_error_file is None:  # below a heading
        return trials.said(SurmError("trial", Path(trial.error_file).read_text().splitlines()[1]))
    error = cluster.cause(pickle.loads(Path(trial.pickled_error_file).read_bytes()))
    if isinstance(error, RayActorError) and not error.actor_init_failed:
        return "[trial-killed] Its process was killed; memory is the usual cause: use fewer --jobs."
    return trials.said(error)


class BySize(FIFOScheduler):
    """ASHA (arXiv 1810.05934) in each class of sizes by itself: see `Trial.size_class`."""

    def __init__(self, plan: Plan, drawn: Sequence[Trial]) -> None:
        super().__init__()
        classes = {
            size_class: ASHAScheduler("step", "score", "max", plan.steps, plan.rung, REDUCTION)
            for size_class in {trial.size_class for trial in drawn}
        }
        self._asha = [classes[trial.size_class] for trial in drawn]

    def _of(self, trial: Any) -> ASHAScheduler:
        return self._asha[trial.config[NUMBER]]

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        self._of(trial).on_trial_add(tune_controller, trial)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        return self._of(trial).on_trial_result(tune_controller, trial, result)

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        self._of(trial).on_trial_complete(tune_controller, trial, result)

    def on_trial_remove(self, tune_controller: Any, trial: Any) -> None:
        self._of(trial).on_trial_remove(tune_controller, trial)


class Told(Callback):
    """Keeps how each trial ended, and says so; what its own process could not write down is in no folder.

    Args:
        ended: number -> result, so far.
    """

    def __init__(self, plan: Plan, drawn: Sequence[Trial]) -> None:
        self._plan, self._drawn = plan, drawn
        self.ended: dict[int, Result] = {}

    def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        self._end(trial.config[NUMBER], "")

    def on_trial_error(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        self._end(trial.config[NUMBER], _why(trial))

    def _end(self, number: int, why: str) -> None:
        plan, trial = self._plan, self._drawn[number]
        folder, found = plan.folder(trial), trials.result(plan, trial)
        if why:
            found = replace(found, outcome=FAILED, why=why)
        elif not found.outcome:
            found = replace(found, outcome=FINISHED if found.steps >= plan.steps else STOPPED)
            trials.conclude(folder, found.outcome)
        self.ended[number] = found
        score = "" if found.score is None else f" validation {found.score:.4f}"
        what = f"{found.outcome} after {found.steps} of {plan.steps} steps" if not found.why else f"failed {found.why}"
        line = f"{len(self.ended)}/{len(self._drawn)} {folder.name.rpartition('-')[0]}:{score}, {what}"
        print(line, file=sys.stderr if found.why else sys.stdout, flush=True)
