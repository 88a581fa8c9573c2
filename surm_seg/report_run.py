"""What the report says about the run that made the predictions: read from its folder, without names of files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from surm_seg.errors import Corrupt

OPTIONS = (
    "backbone", "structure", "roles", "image_size", "window", "steps", "batch_size", "learning_rate", "schedule",
    "precision", "augment", "loss_at", "device", "seed", "recipe",
)  # fmt: skip
"""Options that are shown. Others may name files of the user's."""


@dataclass(frozen=True)
class RunFacts:
    """A training run.

    Args:
        parameters: trained in the encoder and in the decoder, and all.
        options: by name.
        data: number of training and validation cases, and the layout of the source.
        digests: SHA-256 by what it is of.
        environment: versions, commit and machine.
        loss: (step, loss).
        score: (step, mean Dice of the validation cases).
        trained_on_scored: whether the scored cases are the training cases.
    """

    name: str
    parameters: Mapping[str, int]
    options: Mapping[str, str]
    data: Mapping[str, str]
    digests: Mapping[str, str]
    environment: Mapping[str, str]
    loss: list[tuple[float, float]]
    score: list[tuple[float, float]]
    trained_on_scored: bool


def run_facts(run: Path) -> RunFacts:
    """Read run.json, config.yaml and metrics.jsonl of a run folder; raises Corrupt."""
    try:
        facts: dict[str, Any] = json.loads((run / "run.json").read_text())
        config: dict[str, Any] = yaml.safe_load((run / "config.yaml").read_text())
        log = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        machine = f"{facts['system']} {facts['machine']}, Python {facts['python']}"
        known = {name: version for name, version in facts["versions"].items() if version}
        cases = {f"{name} cases": str(len(facts[f"{name}_cases"])) for name in ("train", "validation")}
        adapter = {f"adapter, {name}": digest for name, digest in facts.get("adapter_sha256", {}).items() if digest}
        return RunFacts(
            run.resolve().name,
            facts["parameters"],
            {name: _text(config[name]) for name in OPTIONS if name in config},
            {"layout of the source": facts["data_format"], **cases},
            {"data set": facts["data_sha256"], "frozen model": facts["base_sha256"], **adapter},
            {"commit": facts["commit"] or "unknown", **known, "machine": machine, "trained": facts["time"]},
            [(line["step"], line["loss"]) for line in log if "loss" in line],
            [(line["step"], line["score"]) for line in log if "score" in line],
            config.get("score_on") == "train",
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError) as error:
        raise Corrupt("run-unreadable", f"The records of {run} are damaged: {error}.") from error


def _text(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
