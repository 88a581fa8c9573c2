"""The records of a run: one JSON line per step, and the same for TensorBoard."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]
from tensorboard.compat.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]
from tensorboard.summary.writer.record_writer import RecordWriter

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
    with path.open("a") as out, _events(folder / "tensorboard") as event:
        event(step=start + 1, session_log=SessionLog(status=SessionLog.START))  # TensorBoard drops what was after it

        def log(record: Record) -> None:
            step = int(record["step"])
            out.write(json.dumps({k: round(v, 6) if k != "step" else v for k, v in record.items()}) + "\n")
            out.flush()
            values = [Summary.Value(tag=name, simple_value=v) for name, v in record.items() if name != "step"]
            event(step=step, summary=Summary(value=values))

        yield log


@contextmanager
def _events(folder: Path) -> Iterator[Callable[..., None]]:
    """Writes TensorBoard's events into a new file, by the fields of an Event.

    Without the thread of torch's SummaryWriter, for which every step of training would wait a little.
    """
    folder.mkdir(exist_ok=True)
    with (folder / f"events.out.tfevents.{time.time():.6f}.{os.uname().nodename}.{os.getpid()}").open("wb") as file:
        records = RecordWriter(file)

        def event(**fields: Any) -> None:
            records.write(Event(wall_time=time.time(), **fields).SerializeToString())
            records.flush()

        event(file_version="brain.Event:2")
        yield event
