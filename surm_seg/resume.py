"""What a run was started with, and what may be different when it goes on."""

from __future__ import annotations

import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

import yaml

from surm_seg.checkpoint import checkpoints, set_damaged_aside
from surm_seg.errors import BadConfig

MAY_CHANGE = ("workers", "device")
"""Options that a resumed run may be given anew, because the data do not depend on them."""


def config_file(run: Path) -> Path:
    """What makes a folder a run."""
    return run / "config.yaml"


def stored_config(run: Path, resume: bool) -> dict[str, Any]:
    """The configuration of the run to resume, {} for a new one; refuses to overwrite a run and to resume none."""
    stored = config_file(run)
    if not resume:
        if stored.exists():
            raise BadConfig("run-exists", f"{run} already holds a run; use --resume, or choose another --output.")
        return {}
    if not stored.exists():
        raise BadConfig("resume-nothing", f"{run} holds no run to resume; start it without --resume.")
    return yaml.safe_load(stored.read_text())


def changes(
    run: Path, what: str, before: dict[str, Any], now: dict[str, Any], allowed: Collection[str] = ()
) -> list[str]:
    """What a resumed run would find changed, as sentences; raises BadConfig naming what is not allowed to.

    Args:
        what: the values are.
        allowed: names among them; those of MAY_CHANGE are as if they had not changed.
    """
    unknown = [name for name in allowed if name not in now]
    if unknown:
        raise BadConfig("allow", f"--allow {','.join(unknown)}: there is no such option; name those that may change.")
    changed = {
        name: f"{name}: {before[name]!r} -> {value!r}"
        for name, value in now.items()
        if name in before and name not in MAY_CHANGE and before[name] != value
    }
    refused = [sentence for name, sentence in changed.items() if name not in allowed]
    if refused:
        sentence = f"{run} was started with another {what} ({'; '.join(refused)}); change it back."
        raise BadConfig("resume-changed", sentence)
    return list(changed.values())


def without_damaged(run: Path) -> bool:
    """Whether there is a checkpoint to go on from; newer ones that are damaged are set aside, with a warning.

    None is no error: the run may have died before its first save.

    Raises Corrupt where all are damaged.
    """
    aside = set_damaged_aside(run / "checkpoints")
    found = checkpoints(run / "checkpoints")
    for path in aside:
        print(f"warning: {path} is a damaged checkpoint; going on from {found[-1].name}", file=sys.stderr)
    return bool(found)
