"""Trainings by the dozen, each in a process of its own: one that dies takes no other with it, and its memory is known.

FOLDER/NAME              run of `surm-seg train`
      /NAME/cell.json    its words, seconds and memory; there once it is finished, and then it is not run again
"""

from __future__ import annotations

import hashlib
import io
import json
import multiprocessing
import os
import re
import resource
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import redirect_stderr
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from surm_seg.checkpoint import checkpoints
from surm_seg.errors import INTERRUPTED, SurmError
from surm_seg.volume import replacing

PRELOADED = ["pipelines.supervised", "surm_seg.engine"]
"""What every cell needs, imported once for all."""

Train = Callable[[Sequence[str]], int]
"""`surm_seg.train.main`, or its like in a module of its own."""


@dataclass(frozen=True)
class Cell:
    """A training.

    Args:
        name: of its folder; it tells cells apart whose options differ.
        words: options of `surm-seg train`, without --output.
    """

    name: str
    words: tuple[str, ...]


@dataclass(frozen=True)
class Done:
    """What came of a cell.

    Args:
        folder: of its run.
        seconds: that it took, without the imports that all cells share, since it last went on; 0 where it failed.
        peak_bytes: resident at most.
        error: why it is not finished.
    """

    folder: Path
    seconds: float = 0.0
    peak_bytes: int = 0
    error: SurmError | None = None


def digest(words: Sequence[str], *others: str) -> str:
    """Eight digits that tell trainings apart: by their options, by what is in a file of options, and by others."""
    files = [file for word, file in pairwise(words) if word == "--config"]
    files += [word.partition("=")[2] for word in words if word.startswith("--config=")]
    texts = [Path(file).read_text(errors="replace") for file in files if Path(file).is_file()]
    return hashlib.sha256(json.dumps([words, texts, others]).encode()).hexdigest()[:8]


def carried_out(
    cells: Sequence[Cell],
    folder: Path,
    train: Train,
    jobs: int = 1,
    *,
    resume: bool = False,
    preloaded: Sequence[str] = PRELOADED,
) -> Iterator[tuple[Cell, Done]]:
    """Run the cells that are not finished yet, `jobs` at a time, and yield all as they come to their ends.

    Cells are begun in their order. A failure is an outcome; only an interruption ends the others: those that run save
    what they have, and no process outlives this one.

    Args:
        resume: one that was cut goes on from its newest checkpoint, where it has any; otherwise it is begun anew.
        preloaded: modules that every cell needs, imported once for all; the first cells of a process decide.
    """
    multiprocessing.get_context("forkserver").set_forkserver_preload([*preloaded])
    running: list[BaseProcess] = []
    apart = partial(_apart, train=train, threads=max(1, (os.cpu_count() or 1) // jobs), running=running)
    with ThreadPoolExecutor(jobs) as pool:
        started = {pool.submit(_one, cell, folder / cell.name, apart, resume): cell for cell in cells}
        try:
            for future in as_completed(started):
                yield started[future], future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in running:
                process.terminate()


def _one(cell: Cell, run: Path, apart: Callable[[Sequence[str]], tuple[float, int]], resume: bool) -> Done:
    known = _finished(cell, run)
    if known is not None:
        return known
    words = [*cell.words, "--output", str(run), "--quiet"]
    if resume and checkpoints(run / "checkpoints"):
        words.append("--resume")
    else:
        shutil.rmtree(run, ignore_errors=True)
    try:
        seconds, peak = apart(words)
    except SurmError as error:
        return Done(run, error=error)
    record = {"words": cell.words, "seconds": seconds, "peak_bytes": peak}
    with replacing(run / "cell.json") as file:
        file.write(json.dumps(record).encode())
    return Done(run, seconds, peak)


def _finished(cell: Cell, run: Path) -> Done | None:
    try:
        record: Mapping[str, Any] = json.loads((run / "cell.json").read_bytes())
        if tuple(record["words"]) == cell.words:
            return Done(run, record["seconds"], record["peak_bytes"])
    except (OSError, ValueError, KeyError):
        pass
    return None


def _apart(words: Sequence[str], train: Train, threads: int, running: list[BaseProcess]) -> tuple[float, int]:
    """Train in a process that ends with this one; returns its seconds and its peak of memory in bytes.

    Args:
        running: where the process is noted.

    Raises:
        SurmError: what the command said, or that the process was killed.
        KeyboardInterrupt: the command was interrupted.
    """
    context = multiprocessing.get_context("forkserver")
    ours, theirs = context.Pipe()
    process = context.Process(target=_child, args=(theirs, train, list(words), threads))
    process.start()
    running.append(process)
    theirs.close()
    try:
        status, said, seconds, peak = ours.recv()
    except EOFError:
        process.join()
        sentence = (
            f"The process was killed (exit status {process.exitcode}); memory is the usual cause: run fewer jobs."
        )
        raise SurmError("cell-killed", sentence) from None
    process.join()
    if status == INTERRUPTED:
        raise KeyboardInterrupt
    if status:
        raise _failure(status, said)
    return seconds, peak


def _failure(status: int, said: str) -> SurmError:
    """The last line that a command printed, as the error it stands for."""
    last = said.strip().rpartition("\n")[2]
    known = re.fullmatch(r"error \[([\w-]+)\]: (.*)", last)
    error = SurmError(known[1] if known else "option", known[2] if known else last)
    error.exit_status = status
    return error


def quiet_failure(command: Train, words: Sequence[str]) -> None:
    """Run a command in this process; raises as the processes of cells do where it fails."""
    status, said = _run(command, words)
    if status == INTERRUPTED:
        raise KeyboardInterrupt
    if status:
        raise _failure(status, said)


def _run(command: Train, words: Sequence[str]) -> tuple[int, str]:
    said, words = io.StringIO(), [word for word in words if word != "--debug"]  # which would not say it in a line
    try:
        with redirect_stderr(said):
            return command(words), said.getvalue()
    except SystemExit as ended:
        return int(ended.code or 0), said.getvalue()


def _child(pipe: Connection, train: Train, words: list[str], threads: int) -> None:
    import torch

    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    multiprocessing.set_start_method(None, force=True)  # loaders start as anywhere else: a SAM cannot be pickled
    torch.set_num_threads(threads)
    start = time.monotonic()
    status, said = _run(train, words)
    pipe.send((status, said, time.monotonic() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024))
