"""What training needs to go on exactly where it stopped, and its way to and from checkpoints."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from surm_seg.checkpoint import checkpoints, load_checkpoint, save_checkpoint, sweep
from surm_seg.errors import BadConfig

KEPT_CHECKPOINTS = 2


class TrainingState:
    """Everything that training needs to go on exactly: weights, optimiser, random state, counters, best so far."""

    def __init__(self, folder: Path, trained: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
        self.checkpoints = folder / "checkpoints"
        self.trained, self.optimizer = trained, optimizer
        self.step = self.bad_steps = self.best_step = 0
        self.best_score: float | None = None
        self.best: dict[str, Tensor] = {}

    def remember(self, score: float | None) -> None:
        if score is not None and (self.best_score is None or score > self.best_score):
            self.best_score, self.best_step = score, self.step
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
        random = {"cpu": torch.get_rng_state()}
        if torch.cuda.is_available():
            random["cuda"] = torch.cuda.get_rng_state()
        files = {"model": self.trained, "optimizer": moments, "random": random, "best": self.best}
        facts = {"bad_steps": self.bad_steps, "best_score": self.best_score, "best_step": self.best_step}
        save_checkpoint(self.checkpoints, self.step, files, facts)
        sweep(self.checkpoints, KEPT_CHECKPOINTS)

    def restore(self) -> None:
        """Take over the newest checkpoint; raises BadConfig where there is none or it is of another model."""
        found = checkpoints(self.checkpoints)
        if not found:
            raise BadConfig(
                "resume-nothing", f"There is no checkpoint in {self.checkpoints} to resume; start without --resume."
            )
        files, facts = load_checkpoint(found[-1])
        model = files["model"]
        if {n: v.shape for n, v in model.items()} != {n: p.shape for n, p in self.trained.items()}:
            raise BadConfig(
                "resume-model", f"{found[-1]} was written by another model; resume with the run's own configuration."
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
        torch.set_rng_state(files["random"]["cpu"])
        if "cuda" in files["random"] and torch.cuda.is_available():
            torch.cuda.set_rng_state(files["random"]["cuda"])
        self.step, self.bad_steps = facts["step"], facts["bad_steps"]
        self.best_score, self.best_step = facts["best_score"], facts["best_step"]
        self.best = {name: value.to(self.trained[name].device) for name, value in files["best"].items()}
