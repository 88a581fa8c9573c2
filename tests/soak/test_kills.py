"""Two hundred kills while checkpoints are saved, and two hundred of a training; `make soak` sets SURM_SOAK."""

from __future__ import annotations

import os
from pathlib import Path

import kills
import pytest

pytestmark = pytest.mark.skipif("SURM_SOAK" not in os.environ, reason="takes minutes: make soak")

KILLS = 200


@pytest.mark.parametrize("work", [kills.saving, kills.training])
def test_no_kill_loses_a_saved_step(work: kills.Work, tmp_path: Path) -> None:
    lost, stages = kills.kill(work, tmp_path, 10**6, KILLS)
    struck = ", ".join(f"{name}: {count}" for name, count in sorted(stages.items()))
    print(f"{KILLS} kills while {work.__name__}, 0 unusable checkpoints, {lost} steps lost at most; {struck}")
    assert lost <= 0
