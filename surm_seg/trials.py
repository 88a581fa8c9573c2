"""Search by training: structure, size, placement and learning rate are drawn, Ray Tune trains what was drawn, and ASHA
stops what lags behind.

OUTPUT/trials/NAME               a training by the engine, with its checkpoints
      /trials/NAME/outcome.json  finished, stopped by ASHA, or failed and why

The seed settles which trials are drawn, and their folders remember all that they found. A search that was cut is
started as before: each trial first tells again what it found, so that ASHA knows it, and only those without an outcome
go on, from their checkpoints. All machines of a cluster share OUTPUT and have this package.
"""

from __future__ import annotations

import itertools
import json
import math
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

from surm_seg import cli, structures, train
from surm_seg.cells import digest
from surm_seg.engine import fit
from surm_seg.errors import BadConfig, SurmError
from surm_seg.lock import held
from surm_seg.resume import without_damaged
from surm_seg.surm_methods import OURS
from surm_seg.task import Record, Task
from surm_seg.volume import replacing

REDUCTION = 3
"""ASHA lets the best of so many go on at each rung, and each rung is so many times as far as the one before it."""

RUNGS = 2
"""Below the whole training."""

DRAWS = 16
"""As many times as there are to be trials, at most: where sizes and rates leave little choice, draws repeat."""

FINISHED, STOPPED, FAILED = "finished", "stopped", "failed"


@dataclass(frozen=True)
class Trial:
    """What is drawn for a training.

    Args:
        options: of the structure.
        parameters: that its deltas have.
    """

    structure: str
    options: Mapping[str, Any]
    roles: tuple[str, ...]
    rate: float
    parameters: int

    @property
    def size_class(self) -> int:
        """ASHA compares only trials of one class, whose parameters differ by less than a factor of 4.

        The score is one of two objectives: compared with all others, small trials would always be stopped.
        """
        return (self.parameters.bit_length() - 1) // 2

    @property
    def words(self) -> list[str]:
        """Options of `surm-seg train`."""
        entry = {"structure": self.structure, "options": self.options}
        overrides = {role: entry for role in self.roles}
        placed = ["--roles", json.dumps(self.roles), "--overrides", json.dumps(overrides)]
        return [*placed, "--learning_rate", repr(self.rate)]


@dataclass(frozen=True)
class Plan:
    """A search.

    Args:
        words: options of `surm-seg train` that all trials share.
        shapes: role -> (out, in) of its places.
        families: structures to choose from.
        sizes: least and most parameters, in multiples of those that rank 1 has at the same places.
        rates: least and most learning rate.
        trials: to be drawn.
        rung: steps between validations, the first of which is ASHA's first rung.
        device: as it was asked for, so that each machine finds its own.
        home: folder in which relative paths mean what they say.
    """

    words: tuple[str, ...]
    shapes: Mapping[str, Sequence[tuple[int, int]]]
    families: tuple[str, ...]
    sizes: tuple[float, float]
    rates: tuple[float, float]
    trials: int
    steps: int
    rung: int
    seed: int
    device: str
    output: Path
    home: Path

    def placements(self) -> list[tuple[str, ...]]:
        """Every choice of roles, without the empty one."""
        roles = list(self.shapes)
        return [some for n in range(1, len(roles) + 1) for some in itertools.combinations(roles, n)]

    def drawn(self) -> list[Trial]:
        """The trials that the seed settles, each but once; fewer than asked for where draws hardly differ."""
        rng, placements, found = random.Random(self.seed), self.placements(), list[Trial]()
        for _ in range(DRAWS * self.trials):
            size, rate = (math.exp(rng.uniform(*map(math.log, bounds))) for bounds in (self.sizes, self.rates))
            trial = self.trial(rng.choice(self.families), rng.choice(placements), size, rate)
            if trial not in found:
                found.append(trial)
            if len(found) == self.trials:
                break
        return found

    def trial(self, structure: str, roles: tuple[str, ...], size: float, rate: float) -> Trial:
        """Of a structure, the member whose size at these roles is nearest to so many times that of rank 1."""
        shapes = tuple(shape for role in roles for shape in self.shapes[role])
        wanted = size * sum(map(sum, shapes))
        options, parameters = min(_members(structure, shapes), key=lambda member: abs(member[1] - wanted))
        return Trial(structure, options, roles, float(f"{rate:.3g}"), parameters)

    def folder(self, trial: Trial) -> Path:
        key = digest([*self.words, *trial.words], str(self.steps), str(self.rung))
        name = f"{trial.structure}-{trial.parameters}-{'+'.join(trial.roles)}-{trial.rate:g}"
        return self.output / "trials" / f"{name}-{key}"


@lru_cache
def _members(structure: str, shapes: tuple[tuple[int, int], ...]) -> list[tuple[dict[str, Any], int]]:
    """Options, and the parameters that places of these shapes have with them."""
    times = Counter(shapes).items()
    return [
        (options, sum(n * structures.make(structure, *shape, **options).parameters for shape, n in times))
        for options in OURS[structure].ladder(shapes)
    ]


@dataclass(frozen=True)
class Result:
    """What a trial came to.

    Args:
        score: best of its validations; None where it has no finite one.
        steps: done.
        outcome: finished, stopped or failed.
        why: it failed.
    """

    trial: Trial
    score: float | None
    steps: int
    outcome: str
    why: str = ""


def created(task_type: ModuleType, config: train.TrainConfig, options: Any) -> Task | None:
    """The task of a parsed command line, its generated data prepared on first use; None where a dry run says so."""
    if getattr(options, "data", None) == train.PHANTOM:
        options.data = train.phantom(config, task_type, options, cli.Reporter(quiet=not config.dry_run))
        if options.data is None:
            return None
    return task_type.create(options, config.seed)


def run(plan: Plan, trial: Trial, tell: Any) -> None:
    """A trial from where it is to its end; what fails is its outcome.

    Args:
        tell: takes {"step", "score", "best"} of each validation.

    Raises:
        BadInput: another process trains it.
    """
    folder = plan.folder(trial)
    with held(folder, "trained"):
        try:
            known = validations(folder)
            best = -math.inf
            for step, score in known:
                best = max(best, score)
                tell({"step": step, "score": score, "best": best})
            if outcome(folder)[0] not in (FINISHED, STOPPED):
                (folder / "outcome.json").unlink(missing_ok=True)
                _train(plan, trial, folder, known, tell)
        except Exception as error:
            conclude(folder, FAILED, said(error))


def said(error: Exception) -> str:
    """A failure in one line."""
    failure = error if isinstance(error, SurmError) else SurmError("trial", f"{type(error).__name__}: {error}")
    return f"[{failure.code}] {failure}".splitlines()[0]


def _train(plan: Plan, trial: Trial, folder: Path, known: Sequence[tuple[int, float]], tell: Any) -> None:
    task_type, config, engine, options = train.parsed([*plan.words, *trial.words])
    task = created(task_type, replace(config, dry_run=False), options)
    assert task is not None, "this is no dry run"
    engine = replace(engine.for_samples(len(task)), validate_every=plan.rung, checkpoint_every=plan.rung)
    best, last = max((score for _, score in known), default=-math.inf), known[-1][0] if known else 0

    def told(record: Record) -> None:
        nonlocal best
        step, score = int(record["step"]), record.get("score")
        if score is None and (step % plan.rung == 0 or step == engine.steps):
            raise BadConfig("search-score", "The task has no validation score to search by; give it validation data.")
        if score is not None and math.isfinite(score) and step > last:
            best = max(best, score)
            tell({"step": step, "score": score, "best": best})

    device = cli.device_named(config.device)
    fit(task, engine, folder, seed=config.seed, device=device, resume=without_damaged(folder), report=told)


def _log(folder: Path) -> Iterator[Record]:
    """What a trial has written down of its steps; a line that was cut is none."""
    path = folder / "metrics.jsonl"
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            yield json.loads(line)
        except ValueError:
            return


def validations(folder: Path) -> list[tuple[int, float]]:
    """Step and score of each that a trial has done; what is not finite is no score."""
    scores = [(int(record["step"]), record["score"]) for record in _log(folder) if "score" in record]
    return [(step, score) for step, score in scores if math.isfinite(score)]


def conclude(folder: Path, what: str, why: str = "") -> None:
    """Write down how a trial ended."""
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / "outcome.json") as file:
        file.write(json.dumps({"outcome": what, "why": why}).encode())


def outcome(folder: Path) -> tuple[str, str]:
    """How a trial ended, and why; ("", "") where it has not."""
    try:
        record = json.loads((folder / "outcome.json").read_bytes())
        return record["outcome"], record["why"]
    except (OSError, ValueError, KeyError):
        return "", ""


def result(plan: Plan, trial: Trial) -> Result:
    """What a trial has come to so far."""
    folder = plan.folder(trial)
    best = max((score for _, score in validations(folder)), default=None)
    steps = max((int(record["step"]) for record in _log(folder)), default=0)
    return Result(trial, best, steps, *outcome(folder))


def front(results: Sequence[Result]) -> list[Result]:
    """Those that no other beats, with a better score and no more parameters; by rising parameters."""
    found: list[Result] = []
    scored = [one for one in results if one.score is not None]
    for one in sorted(scored, key=lambda one: (one.trial.parameters, -(one.score or 0.0))):
        if not found or (one.score or 0.0) > (found[-1].score or 0.0):
            found.append(one)
    return found
