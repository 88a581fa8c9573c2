"""Work that the app starts: it outlives the app, is found again, stops when asked, and its log names nobody."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import psutil
from pages import LINE, until

from app import jobs
from app.jobs import Job


def test_a_training_ends_with_its_status_its_log_and_its_progress(place: Path) -> None:
    words = [*LINE, "--steps", "6", "--output", "runs/line"]
    done = jobs.start("train", words, place / "jobs", work=place)
    nonsense = jobs.start("train", ["--no-such-option"], place / "jobs", work=place)
    assert [job.state for job in (done, nonsense)] == ["running"] * 2
    until(lambda: "running" not in [job.state for job in (done, nonsense)])
    assert [job.state for job in (done, nonsense)] == ["finished", "failed"]
    assert (done.progress, done.status, nonsense.status) == (1.0, 0, 2)
    assert (place / "runs" / "line" / "run.json").exists() and done.output == place / "runs" / "line"
    assert any("trained in" in line for line in done.log_tail()) and len(done.log_tail(2)) == 2
    assert "no_such_option" in nonsense.log_tail()[-1]
    assert {job.id for job in jobs.jobs(place / "jobs")} == {done.id, nonsense.id}


def test_a_later_process_of_the_same_number_is_not_taken_for_the_job(tmp_path: Path) -> None:
    job = Job(tmp_path, "train", (), tmp_path, 0.0, os.getpid(), born=1.0)
    assert job.state == "failed" and job.log_tail() == [] and job.progress is None
    job.cancel()  # and this process goes on
    assert job.state == "cancelled"


def test_a_job_that_was_killed_does_not_give_its_progress_for_a_reason(place: Path) -> None:
    words = [*LINE, "--steps", "2000", "--pause", "0.05", "--output", "runs/slow"]
    job = jobs.start("train", words, place / "jobs", work=place)
    until(lambda: bool(job.progress))
    os.kill(job.process, signal.SIGKILL)
    until(lambda: job.state != "running")
    assert job.state == "failed" and "ended from outside" in job.trouble
    refused = jobs.start("train", ["--no-such-option"], place / "jobs", work=place)
    until(lambda: refused.state != "running")
    assert "no_such_option" in refused.trouble


def test_a_clock_that_was_set_does_not_lose_a_job(tmp_path: Path) -> None:
    born = psutil.Process().create_time() + 1.0
    assert Job(tmp_path, "train", (), tmp_path, 0.0, os.getpid(), born).state == "running"


def test_what_is_no_job_or_is_damaged_hides_none(tmp_path: Path) -> None:
    assert jobs.jobs(tmp_path / "jobs") == []
    for name, content in (("a", ""), ("b", "{}"), ("c", "[1]")):
        (tmp_path / "jobs" / name).mkdir(parents=True)
        (tmp_path / "jobs" / name / "job.json").write_text(content)
    (tmp_path / "jobs" / "d").mkdir()
    known = {"kind": "train", "argv": [], "work": "/", "started": 1.0, "process": 2**22, "born": 0.0}
    (tmp_path / "jobs" / "d" / "job.json").write_text(json.dumps(known))
    assert [(job.id, job.state) for job in jobs.jobs(tmp_path / "jobs")] == [("d", "failed")]


def test_the_log_of_an_evaluation_names_no_file_of_the_user(place: Path) -> None:
    """The command refuses these folders with sentences that quote them."""
    empty, twice = "ward/Smith, John", "ward/twice"
    for folder in (empty, twice):
        (place / folder).mkdir(parents=True)
    for ending in (".mha", ".nii.gz"):
        (place / twice / f"Doe_Jane_1960{ending}").write_bytes(b"not read")
    each = [
        jobs.start(
            "evaluate",
            [f"--prediction={prediction}", "--reference", reference, "--output", "out"],
            place / "jobs",
            work=place,
        )
        for prediction, reference in ((empty, twice), (twice, empty))
    ]
    until(lambda: all(job.state == "failed" for job in each))
    for job, named in zip(each, ("reference", "prediction"), strict=True):
        log = (job.folder / "log").read_text()
        assert "No file of the prediction matches one of the reference" in job.log_tail()[-1]
        assert f"{named} 1" in log and f"{named} 2" in log
        assert not any(name in log for name in ("Smith", "John", "Doe", "Jane"))
        assert (job.folder / "job.json").stat().st_mode & 0o077 == 0
