"""The records of a run: one JSON line per step, and the same for TensorBoard."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from torch.utils.tensorboard.writer import SummaryWriter

from surm_seg.task import Record
from surm_seg.volume import replacing


@contextmanager
def training_log(folder: Path, start: int) -> Iterator[Callable[[Record], None]]:
    """Append records to metrics.jsonl and TensorBoard; lines after step `start`, of a run that died, are dropped."""
    path = folder / "metrics.jsonl"
    whole = path.read_text().split("\n")[:-1] if start and path.exists() else []  # the last may be cut
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        file.writelines(f"{line}\n".encode() for line in whole if json.loads(line)["step"] <= start)
    board = SummaryWriter(folder / "tensorboard", purge_step=start + 1)
    with path.open("a") as out, _no_traceback_of_threads(), board:

        def log(record: Record) -> None:
            out.write(json.dumps({k: round(v, 6) if k != "step" else v for k, v in record.items()}) + "\n")
            out.flush()
            for name, value in record.items():
                if name != "step":
                    board.add_scalar(name, value, int(record["step"]))

        yield log


@contextmanager
def _no_traceback_of_threads() -> Iterator[None]:
    """TensorBoard's thread prints one for a full disk, which its next call here raises as well, to be told in words."""
    before = threading.excepthook
    threading.excepthook = lambda failure: None if isinstance(failure.exc_value, OSError) else before(failure)
    try:
        yield
    finally:
        threading.excepthook = before
