"""What training needs to go on exactly where it stopped, and its way to and from checkpoints."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from surm_seg.checkpoint import checkpoints, load_checkpoint, save_checkpoint, sweep
from surm_seg.distributed import ALONE, Ranks
from surm_seg.errors import BadConfig

KEPT_CHECKPOINTS = 2
COUNTERS = ("bad_steps", "best_score", "best_step", "stale", "parts", "draws")


class TrainingState:
    """Everything that training needs to go on exactly: weights, optimiser, counters, best so far.

    Data and random numbers are a function of the seed and the step, so that none of their state is kept.

    Args:
        parts: micro-batches that each process computes its share of a batch in.
        ranks: the processes that train together; all restore what the first one finds.
    """

    def __init__(
        self,
        folder: Path,
        trained: dict[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        parts: int = 1,
        ranks: Ranks = ALONE,
    ) -> None:
        self.checkpoints = folder / "checkpoints"
        self.trained, self.optimizer = trained, optimizer
        self.parts, self.ranks = parts, ranks
        self.step = self.bad_steps = self.best_step = self.stale = 0
        self.draws = False
        self.best_score: float | None = None
        self.best: dict[str, Tensor] = {}

    def remember(self, score: float | None) -> None:
        """Keep the weights of the best score; `stale` counts the validations since."""
        if score is None:
            return
        self.stale += 1
        if self.best_score is None or score > self.best_score:
            self.best_score, self.best_step, self.stale = score, self.step, 0
            self.best = {name: p.detach().clone() for name, p in self.trained.items()}

    def take_best(self) -> None:
        """Put the best weights into the model; without a score these are the last."""
        if self.best_score is None:
            self.best_step = self.step
        with torch.no_grad():
            for name, value in self.best.items():
                self.trained[name].copy_(value)

    def save(self) -> None:
        names = list(self.trained)
        moments = {
            f"{key}:{names[index]}": torch.as_tensor(value)
            for index, entry in self.optimizer.state_dict()["state"].items()
            for key, value in entry.items()
        }
        files = {"model": self.trained, "optimizer": moments, "best": self.best}
        facts = {name: getattr(self, name) for name in COUNTERS}
        save_checkpoint(self.checkpoints, self.step, files, facts | {"processes": self.ranks.count})
        sweep(self.checkpoints, KEPT_CHECKPOINTS)

    def restore(self) -> None:
        """Take over the newest checkpoint.

        Raises:
            BadConfig: there is none; or it is of another model or version; or the model draws random numbers and
                another number of processes would draw others.
        """
        found = self.ranks.told(lambda: checkpoints(self.checkpoints))
        if not found:
            raise BadConfig(
                "resume-nothing", f"There is no checkpoint in {self.checkpoints} to resume; start without --resume."
            )
        files, facts = load_checkpoint(found[-1])
        model = files["model"]
        same_shapes = {n: v.shape for n, v in model.items()} == {n: p.shape for n, p in self.trained.items()}
        if not same_shapes or not facts.keys() >= {*COUNTERS, "processes"}:
            raise BadConfig(
                "resume-model",
                f"{found[-1]} was written by another model or version; resume with the run's own configuration.",
            )
        if facts["draws"] and facts["processes"] != self.ranks.count:
            raise BadConfig(
                "resume-processes",
                f"{found[-1]} was written by {facts['processes']} processes and its model draws random numbers "
                f"(dropout), which {self.ranks.count} would draw differently; resume with {facts['processes']}.",
            )
        with torch.no_grad():
            for name, parameter in self.trained.items():
                parameter.copy_(model[name])
        content = self.optimizer.state_dict()
        entries: dict[int, dict[str, Tensor]] = {}
        index = {name: i for i, name in enumerate(self.trained)}
        for key, value in files["optimizer"].items():
            kind, _, name = key.partition(":")
            entries.setdefault(index[name], {})[kind] = value
        self.optimizer.load_state_dict({**content, "state": entries})
        self.step = facts["step"]
        facts["parts"] = max(self.parts, facts["parts"])  # memory may have been short
        for name in COUNTERS:
            setattr(self, name, facts[name])
        self.best = {name: value.to(self.trained[name].device) for name, value in files["best"].items()}
