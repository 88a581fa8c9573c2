"""Tasks in worker processes: every one is run, every failure is named, and nothing outlives the parent."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed

from surm_seg import cli
from surm_seg.errors import BadInput, SurmError

PRELOADED = ["surm_seg.prepare"]
"""What the tasks need, imported once and shared by all workers."""


def run_all(tasks: Sequence[Callable[[], None]], title: str, workers: int, reporter: cli.Reporter) -> None:
    """Run all tasks, also after one failed, so that every bad file is named on standard error; raises BadInput then."""
    outcomes = _outcomes(tasks, min(workers, len(tasks)))
    refused = [outcome for outcome in reporter.track(outcomes, title, len(tasks)) if outcome is not None]
    if len(refused) == 1:
        raise refused[0]
    if refused:
        for error in refused:
            print(f"error [{error.code}]: {error}", file=sys.stderr)
        counted = f"{len(refused)} of {len(tasks)} cases could not be prepared"
        raise BadInput("cases-failed", f"{counted}; mend or remove the files named above.")


def _outcomes(tasks: Sequence[Callable[[], None]], workers: int) -> Iterator[SurmError | None]:
    if workers <= 1:
        yield from map(_outcome, tasks)
        return
    # Not fork: a child of a process with threads can deadlock. Not spawn: every worker would import torch anew.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker) as pool:
        try:
            for future in as_completed([pool.submit(_outcome, task) for task in tasks]):
                yield future.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _outcome(task: Callable[[], None]) -> SurmError | None:
    """None, or what went wrong, to be raised by the parent."""
    try:
        task()
    except SurmError as error:
        return error
    except OSError as error:
        where = error.filename or "while writing"
        return BadInput("disk", f"{error.strerror} ({where}); free space or check rights.")
    except MemoryError:
        return BadInput("memory", "A case does not fit into memory; give fewer --workers, or crop the volume.")
    return None


def _start_worker() -> None:
    """Ctrl-C is the parent's business, and a worker does not outlive a killed parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
