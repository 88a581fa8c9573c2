"""What the app starts, trainings above all: processes of their own, which neither a reload nor a restart ends.

JOBS/ID/job.json      what was started, and as which process (mode 0600: its words may name the user's files)
       /log           what the command said, without the names of its inputs
       /cancelled     there once the user asked to stop it
       /result.json   exit status; absent after a kill or a power cut

`python -m app.jobs JOBS/ID` is such a process: it runs the command of job.json as `python -m surm_seg.COMMAND` would.
"""

from __future__ import annotations

import importlib
import json
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import closing, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psutil
import yaml

from app.nameless import Nameless, private_names, value_of
from surm_seg.errors import INTERRUPTED, BadInput
from surm_seg.volume import replacing

Kind = Literal["train", "evaluate", "prepare"]
State = Literal["running", "finished", "failed", "cancelled"]

LOG_LINES = 20
TAIL_BYTES = 1 << 16
KIND_TO_OTHERS = 5
"""Niceness: the pages stay quick while a job takes all processors."""

SAME_BIRTH = 2.0
"""Seconds by which the birth of one process may seem to move: it is told from the clock, which is set now and then."""

_PROGRAMS = Path(__file__).parents[1]


@dataclass(frozen=True)
class Job:
    """A command that was started, wherever it has got to.

    Args:
        folder: JOBS/ID.
        kind: its command.
        argv: its words.
        work: folder it was started in; paths among the words are relative to it.
        started: seconds since 1970.
        process: its number.
        born: when that process was made, which tells it from a later one of the same number.
    """

    folder: Path
    kind: Kind
    argv: tuple[str, ...]
    work: Path
    started: float
    process: int
    born: float

    @property
    def id(self) -> str:
        return self.folder.name

    @property
    def output(self) -> Path | None:
        """The folder that the command writes to, where its words name one."""
        value = value_of(self.argv, "output")
        return None if value is None else self.work / value

    @property
    def status(self) -> int | None:
        """The exit status of the command; None while it runs, and after a kill."""
        try:
            return int(json.loads((self.folder / "result.json").read_bytes())["status"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    @property
    def state(self) -> State:
        """What has become of it."""
        if self._alive():
            return "running"
        status = self.status
        if status == 0:
            return "finished"
        return "cancelled" if status == INTERRUPTED or (self.folder / "cancelled").exists() else "failed"

    @property
    def progress(self) -> float | None:
        """Share that is done, 0..1, by the records of the run; None where it has none, as all but trainings."""
        if self.status == 0:
            return 1.0
        try:
            return self._trained() if self.kind == "train" else None
        except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
            return None

    def log_tail(self, lines: int = LOG_LINES) -> list[str]:
        """The last lines that the command said."""
        try:
            with open(self.folder / "log", "rb") as log:
                log.seek(max(0, log.seek(0, os.SEEK_END) - TAIL_BYTES))
                return log.read().decode(errors="replace").splitlines()[-lines:]
        except OSError:
            return []

    @property
    def trouble(self) -> str:
        """Of a failed one, why, and how to go on: its last words, or that it had no time for any."""
        if self.status is None:
            return "Its process was ended from outside, or by a lack of memory; start or resume it again."
        said = [line for line in self.log_tail() if line.strip()]
        return said[-1] if said else "It stopped without a word; start or resume it again."

    def cancel(self) -> None:
        """Ask it to stop: a training saves and can be resumed, a data set keeps cases, an evaluation leaves nothing.

        Asked again, it ends at once.
        """
        (self.folder / "cancelled").touch()
        if self._alive():
            os.kill(self.process, signal.SIGTERM)

    def _alive(self) -> bool:
        try:
            found = psutil.Process(self.process)
            same = abs(found.create_time() - self.born) <= SAME_BIRTH
            return same and found.status() != psutil.STATUS_ZOMBIE
        except psutil.Error:
            return False

    def _trained(self) -> float | None:
        run = self.output
        if run is None:
            return None
        steps = yaml.safe_load((run / "config.yaml").read_text())["steps"]
        with open(run / "metrics.jsonl", "rb") as log:
            log.seek(max(0, log.seek(0, os.SEEK_END) - TAIL_BYTES))
            whole = log.read().split(b"\n")[:-1]  # the last may be cut
        return min(1.0, json.loads(whole[-1])["step"] / steps) if whole else 0.0


def start(kind: Kind, argv: Sequence[str], folder: Path, *, work: Path | None = None) -> Job:
    """Start `surm-seg KIND ARGV` in a process that outlives this one.

    Args:
        argv: the command's options; name --output, or there is no progress to show.
        folder: of all jobs, made where missing.
        work: where to run it; the current folder by default.

    Raises:
        BadInput: the disk refuses.
    """
    work = (work or Path()).resolve()
    own = folder.resolve() / f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(4)}"
    process = None
    try:
        own.mkdir(parents=True)
        _write(own / "job.json", {"kind": kind, "argv": list(argv), "work": str(work)})
        places = os.pathsep.join(filter(None, (str(_PROGRAMS), os.environ.get("PYTHONPATH"))))
        with open(own / "log", "ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "app.jobs", str(own)],
                cwd=work,
                env=os.environ | {"PYTHONPATH": places},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        born = psutil.Process(process.pid).create_time()
        threading.Thread(target=process.wait, daemon=True).start()  # or it would stay as a zombie while the app runs
        job = Job(own, kind, tuple(argv), work, time.time(), process.pid, born)
        known = {"kind": kind, "argv": list(argv), "work": str(work), "started": job.started}
        _write(own / "job.json", known | {"process": job.process, "born": job.born})
    except OSError as error:
        if process is not None:
            process.kill()
        raise BadInput("job-start", f"The job cannot be started ({error.strerror}); free space.") from error
    return job


def jobs(folder: Path) -> list[Job]:
    """All jobs that were started, newest first, whichever app started them; what is no job is left out."""
    found = []
    for own in sorted(folder.resolve().glob("*/"), reverse=True):
        try:
            known = json.loads((own / "job.json").read_bytes())
            words, work = tuple(known["argv"]), Path(known["work"])
            found.append(Job(own, known["kind"], words, work, known["started"], known["process"], known["born"]))
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return sorted(found, key=lambda job: job.started, reverse=True)


def main(folder: Path) -> int:
    """What the process of a job does: run the command of its folder, and leave its exit status there."""
    known = json.loads((folder / "job.json").read_bytes())
    os.nice(KIND_TO_OTHERS)
    said = Nameless(private_names(known["argv"], Path(known["work"])))
    with closing(said), redirect_stdout(said), redirect_stderr(said):
        try:
            status = importlib.import_module(f"surm_seg.{known['kind']}").main(known["argv"])
        except SystemExit as ended:  # of words that are no options
            status = int(ended.code or 0)
    _write(folder / "result.json", {"status": status})
    return status


def _write(path: Path, content: dict[str, Any]) -> None:
    with replacing(path, 0o600) as file:
        file.write(json.dumps(content).encode() + b"\n")


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
