"""The records of a run, as TensorBoard itself reads them."""

from __future__ import annotations

import json
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from surm_seg.training_log import training_log


def test_steps_after_a_resume_replace_those_of_the_run_that_died(tmp_path: Path) -> None:
    with training_log(tmp_path, 0) as log:
        for step in range(1, 6):
            log({"step": step, "loss": step / 4})
    with training_log(tmp_path, 3) as log:
        for step in range(4, 8):
            log({"step": step, "loss": 10.0 * step} | ({"score": 0.5} if step == 7 else {}))
    wanted = {1: 0.25, 2: 0.5, 3: 0.75, 4: 40, 5: 50, 6: 60, 7: 70}
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert {line["step"]: line["loss"] for line in lines} == wanted and len(lines) == len(wanted)
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert [(one.step, one.value) for one in board.Scalars("loss")] == list(wanted.items())
    assert [(one.step, one.value) for one in board.Scalars("score")] == [(7, 0.5)]


def test_a_record_is_readable_while_training_goes_on(tmp_path: Path) -> None:
    with training_log(tmp_path, 0) as log:
        log({"step": 1, "loss": 0.5})
        board = EventAccumulator(str(tmp_path / "tensorboard"))
        board.Reload()
        assert [one.value for one in board.Scalars("loss")] == [0.5]
