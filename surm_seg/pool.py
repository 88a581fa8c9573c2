"""A batch: one piece of work done on many items, each by itself; every item is tried, every failure is an outcome.

An engine says where: here, in threads, in processes, or on other machines (`surm_seg.cluster`). Work and items may be
sent away, and an item whose machine died is worked on again: what the work writes must appear by one rename, and be the
same whoever wrote it.
"""

from __future__ import annotations

import multiprocessing
import operator
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

from surm_seg import cli
from surm_seg.errors import BadInput, SurmError

PRELOADED = ["surm_seg.dataset_writer", "surm_seg.pictures"]
"""What the tasks need, imported once and shared by all workers; never a command, which may be running as __main__."""


@dataclass(frozen=True)
class Outcome:
    """What came of one item.

    Args:
        number: its position in the batch.
        value: what the work returned.
        error: why it returned nothing.
        retries: how often the work was begun anew, because the machine that did it was lost.
    """

    number: int
    value: Any = None
    error: SurmError | None = None
    retries: int = 0


Engine: TypeAlias = Callable[[Callable[[Any], Any], Sequence[Any]], Iterator[Outcome]]
"""(work, items) -> the outcomes, each as soon as it is known."""


def attempt(work: Callable[[Any], Any], number: int, item: Any) -> Outcome:
    """Do the work on one item; what is wrong with the item, the disk or memory is its outcome, all else is raised."""
    try:
        return Outcome(number, work(item))
    except SurmError as error:
        return Outcome(number, error=error)
    except OSError as error:
        where = error.filename or "while writing"
        return Outcome(number, error=BadInput("disk", f"{error.strerror} ({where}); free space or check rights."))
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and type(error).__name__ != "OutOfMemoryError":  # torch's
            raise
        sentence = "A case does not fit into memory; run fewer at once, or crop the volume."
        return Outcome(number, error=BadInput("memory", sentence))


def here(work: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Outcome]:
    """One item after the other, in this process."""
    return (attempt(work, number, item) for number, item in enumerate(items))


def threads(workers: int, work: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Outcome]:
    """In so many threads of this process."""
    return _pooled(ThreadPoolExecutor(workers), work, items)


def processes(workers: int, work: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Outcome]:
    """In so many processes of this machine; none outlives this one."""
    if min(workers, len(items)) <= 1:
        return here(work, items)
    # Not fork: a child of a process with threads can deadlock. Not spawn: every worker would import torch anew.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    pool = ProcessPoolExecutor(min(workers, len(items)), mp_context=context, initializer=_start_worker)
    return _pooled(pool, work, items)


def run_all(tasks: Sequence[Callable[[], None]], title: str, engine: Engine | int, reporter: cli.Reporter) -> None:
    """Run all tasks, also after one failed, so that every bad file is named on standard error; raises BadInput then.

    Args:
        engine: what runs them; a number is as many processes of this machine.
    """
    run = partial(processes, engine) if isinstance(engine, int) else engine
    outcomes = run(operator.call, tasks)
    finished = list(reporter.track(outcomes, title, len(tasks)))
    say_retries(finished, reporter)
    refused = [outcome.error for outcome in finished if outcome.error]
    if len(refused) == 1:
        raise refused[0]
    if refused:
        for error in refused:
            print(f"error [{error.code}]: {error}", file=sys.stderr)
        counted = f"{len(refused)} of {len(tasks)} cases could not be prepared"
        raise BadInput("cases-failed", f"{counted}; mend or remove the files named above.")


def say_retries(outcomes: Sequence[Outcome], reporter: cli.Reporter) -> None:
    """A line on the machines that were lost, if any were."""
    if lost := sum(outcome.retries for outcome in outcomes):
        reporter.say(f"note: machines were lost at work; cases begun anew: {lost}")


def _pooled(pool: Executor, work: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Outcome]:
    try:
        for future in as_completed([pool.submit(attempt, work, number, item) for number, item in enumerate(items)]):
            yield future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _start_worker() -> None:
    """Ctrl-C is the parent's business, and a worker does not outlive a killed parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
