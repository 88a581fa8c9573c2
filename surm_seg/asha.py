"""What Ray Tune does in a search by training. Importing this needs Ray."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune import Callback
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler
from ray.tune.search.basic_variant import BasicVariantGenerator

from surm_seg import trials
from surm_seg.trials import FAILED, FINISHED, REDUCTION, SIZE_CLASS, STOPPED, Plan, Result


def searched(plan: Plan, records: Path) -> list[Result]:
    """The results of all trials, in the order in which they were drawn; Tune's own files go to `records`."""
    gpus = int(plan.gpu and ray.cluster_resources().get("GPU", 0) >= 1)
    space = {
        "structure": tune.choice(list(plan.families)),
        "roles": tune.choice(["+".join(roles) for roles in plan.placements()]),
        "size": tune.loguniform(*plan.sizes),
        "learning_rate": tune.loguniform(*plan.rates),
    }
    told = Told(plan)
    tuner = tune.Tuner(
        tune.with_resources(tune.with_parameters(_trial, plan=plan), {"cpu": 1, "gpu": gpus}),
        param_space=space,
        tune_config=tune.TuneConfig(
            num_samples=plan.trials,
            search_alg=BasicVariantGenerator(random_state=plan.seed),
            scheduler=BySize(plan),
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(name="trials", storage_path=str(records), callbacks=[told], verbose=0),
    )
    return [trials.result(plan, plan.trial(one.config)) for one in tuner.fit() if one.config]


def _trial(drawn: dict[str, Any], plan: Plan) -> None:
    os.chdir(plan.home)
    trials.run(plan, plan.trial(drawn), tune.report)


class BySize(FIFOScheduler):
    """ASHA (arXiv 1810.05934) in each class of sizes by itself: see `SIZE_CLASS`."""

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        least, most = plan.sizes
        self._least = least
        classes = max(1, math.ceil(math.log(most / least, SIZE_CLASS)))
        self._classes = [
            ASHAScheduler("step", "score", "max", plan.steps, plan.rung, REDUCTION) for _ in range(classes)
        ]

    def _of(self, trial: Any) -> ASHAScheduler:
        place = int(math.log(trial.config["size"] / self._least, SIZE_CLASS))
        return self._classes[min(max(place, 0), len(self._classes) - 1)]

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        self._of(trial).on_trial_add(tune_controller, trial)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        return self._of(trial).on_trial_result(tune_controller, trial, result)

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        self._of(trial).on_trial_complete(tune_controller, trial, result)

    def on_trial_remove(self, tune_controller: Any, trial: Any) -> None:
        self._of(trial).on_trial_remove(tune_controller, trial)


class Told(Callback):
    """Writes down how each trial ended, and says so."""

    def __init__(self, plan: Plan) -> None:
        self._plan, self._ended = plan, 0

    def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        self._end(trial.config, None)

    def on_trial_error(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        self._end(trial.config, "[trial-killed] Its process was killed; memory is the usual cause: use fewer --jobs.")

    def _end(self, drawn: Mapping[str, Any], killed: str | None) -> None:
        plan, trial = self._plan, self._plan.trial(drawn)
        folder = plan.folder(trial)
        if killed:
            trials.conclude(folder, FAILED, killed)
        found = trials.result(plan, trial)
        if not found.outcome:
            trials.conclude(folder, FINISHED if found.steps >= plan.steps else STOPPED)
            found = trials.result(plan, trial)
        self._ended += 1
        score = "" if found.score is None else f" validation {found.score:.4f}"
        what = f"{found.outcome} after {found.steps} of {plan.steps} steps" if not found.why else f"failed {found.why}"
        line = f"{self._ended}/{plan.trials} {folder.name.rpartition('-')[0]}:{score}, {what}"
        print(line, file=sys.stderr if found.why else sys.stdout, flush=True)
