"""What the first page offers where there is nothing to look at yet."""

from __future__ import annotations

from collections.abc import Sequence

import streamlit as st

from app import jobs, screen
from app.workspace import Run, Study, Workspace

POLL = "2s"
FOLDER = "runs/demo"
"""Where the README's `make demo` puts it, too."""


def offer(workspace: Workspace, runs: Sequence[Run], found: Sequence[Study]) -> None:
    """Say what is missing, and offer to make it; or show how far that is."""
    job = training(workspace, FOLDER)
    if job is not None and job.state == "running":
        follow(workspace)
        return
    missing = "no trained run" if found else "neither a case nor a trained run" if not runs else "no case"
    with st.container(border=True):
        st.markdown(
            f"There is {missing} in this workspace yet. **The demo** generates 16 patients, trains on 10 of them and "
            "scores 4 held-out ones; it takes 2 to 3 minutes on two processor cores and needs no download. Or train on "
            "your own data set on the page Train, and upload a volume below."
        )
        if job is not None and job.state == "failed":
            st.error(screen.plain(job.trouble))
        resumable = (workspace.folder / FOLDER / "config.yaml").exists()
        if st.button("Go on with the demo" if resumable else "Make the demo", type="primary", disabled=bool(runs)):
            words = ["--output", FOLDER, *(["--resume"] if resumable else [])]
            jobs.start("train", words, workspace.folder / "jobs", work=workspace.folder)
            st.rerun()


def training(workspace: Workspace, output: str) -> jobs.Job | None:
    """The last job that trained into this run folder, relative to the workspace."""
    folder = (workspace.folder / output).resolve()
    started = (job for job in jobs.jobs(workspace.folder / "jobs") if job.kind == "train")
    return next((job for job in started if job.output is not None and job.output.resolve() == folder), None)


@st.fragment(run_every=POLL)
@screen.guarded
def follow(workspace: Workspace) -> None:
    """How far the demo is; it goes on when this page is closed."""
    job = training(workspace, FOLDER)
    if job is None or job.state != "running":
        st.rerun()
    share = job.progress
    with st.container(border=True):
        words = "generating patients and loading" if share is None else f"training: {share:.0%}"
        st.progress(share or 0.0, f"The demo is being made, {words}. This page may be closed meanwhile.")
        lines = [screen.plain(line) for line in job.log_tail(3)]
        st.code("\n".join(lines) or "starting", language=None)
        if st.button("Stop", key="stop demo"):
            job.cancel()
