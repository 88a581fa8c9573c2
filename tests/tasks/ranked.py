"""A task to be searched that trains in no time, and whose scores are known: circulant is better than any other."""

from __future__ import annotations

import math
import os
import signal
from dataclasses import dataclass, field
from typing import Any, Literal

from test_engine import Line
from torch import Tensor, nn

from surm_seg.surm_config import SurmConfig
from surm_seg.task import Batch, Record
from surm_seg.tuner import adapt

RECIPES: dict[str, dict[str, Any]] = {"default": {}}


@dataclass
class Config:
    """Options of the ranked task.

    Args:
        roles: among q and v.
        overrides: structures there.
        others: what becomes of other structures: a low score, one that is not finite, none, or a killed process.
    """

    roles: tuple[str, ...] = ("q", "v")
    overrides: dict[str, dict[str, Any]] = field(default_factory=dict)
    others: Literal["low", "nan", "none", "killed"] = "low"


class Ranked(Line):
    def __init__(self, config: Config) -> None:
        super().__init__()
        linear = {"inner": nn.Linear(1, 16), "q_proj": nn.Linear(16, 16), "v_proj": nn.Linear(16, 16)}
        base = nn.Sequential()
        for name, module in (linear | {"outer": nn.Linear(16, 1)}).items():
            base.add_module(name, module)
        self.model = adapt(base, SurmConfig(parts=list(config.roles), overrides=config.overrides))
        worse = any(one["structure"] != "circulant" for one in config.overrides.values())
        self.what = config.others if worse else "high"

    def loss(self, batch: Batch) -> Tensor:
        if self.what == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        return super().loss(batch)

    def validate(self) -> Record:
        return {} if self.what == "none" else {"score": {"high": 1.0, "low": 0.0}.get(self.what, math.nan)}


def create(config: Config, seed: int) -> Ranked:
    return Ranked(config)
