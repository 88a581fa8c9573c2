"""The part of the page Train that makes a data set of a folder of volumes and label maps: a job, as a training is."""

from __future__ import annotations

import re

import streamlit as st

from app import jobs, screen
from app.workspace import Workspace
from surm_seg import prepare
from surm_seg.errors import BadConfig, BadInput

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,39}")
"""Of the folders that this page makes."""


def form(workspace: Workspace) -> None:
    """Choose a folder, see what is in it, prepare it; and how far that is."""
    with st.expander("Prepare a folder of volumes and label maps"), screen.sentences():
        screen.newest_job(workspace.folder / "jobs", "prepare", "looking at the files")
        stated = st.text_input(
            "Folder", help="On this machine. Its layout is found by itself, and nothing in it is changed."
        )
        if not stated:
            return
        source = workspace.folder / stated
        if not source.is_dir():
            raise BadInput("source", "There is no such folder on this machine; give the whole path of one.")
        proposed = re.sub(r"[^A-Za-z0-9]+", "-", source.resolve().name).strip("-")[:40] or "mine"
        name = st.text_input("Name of the data set", proposed, max_chars=40)
        if not NAME.fullmatch(name):
            raise BadConfig("data-name", "A data set's name is made of letters, digits, - and _; choose another.")
        output = workspace.folder / "data" / name
        planned = prepare.plan(prepare.PrepareConfig(source=str(source), output=output))
        st.caption(f"Layout {planned.source.format}: {planned.summary}.")
        if st.button("Prepare", type="primary"):
            words = [str(source.resolve()), "--output", str(output)]
            jobs.start("prepare", words, workspace.folder / "jobs", work=workspace.folder)
            st.rerun()
