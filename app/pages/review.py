"""Review: look at a segmentation, find what is wrong, correct it, score it again, take it away."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import streamlit as st

from app import choice, screen, segmenting
from app.corrections import newest_version, number_of, versions
from app.opened import Opened, open_case
from app.scores import Score
from app.screen import shown
from app.viewer import events, viewer
from app.workspace import Run, Study, Workspace
from surm_seg.errors import Corrupt

MIME = {".gz": "application/gzip", ".dcm": "application/dicom", ".csv": "text/csv", ".json": "application/json"}


def show() -> None:
    workspace = Workspace()
    nothing = "There is nothing to review yet: the page Cases makes the demo, or takes a volume."
    runs, found = choice.runs_and_studies(workspace, "Review", nothing)
    with st.sidebar:
        run = choice.run_menu(runs)
        scores = workspace.scores(run, found, corrected=True)
        ready = [study for study in found if workspace.prediction(study, run) is not None]
        if not ready:
            st.info(f"{run.name} has segmented no case yet; do so on the page Cases.")
            return
        study = listed(choice.worst_first(ready, scores), scores)
    opened = kept(workspace, study, run)

    @screen.guarded
    def act(event: events.Event) -> None:
        if isinstance(event, events.Edit):
            opened.edited(event)
        elif isinstance(event, events.Prompt):
            opened.asked(event)

    if opened.trouble and not opened.number and newest_version(opened.folder) == opened.earlier:
        screen.refusal(opened.trouble)
    with st.sidebar:
        version(opened)
        take_away(opened)
    viewer(f"review {opened.folder}", opened.scene(prompts=bool(st.session_state.get("prompts"))), act)
    if not opened.ready:  # the picture is on its way already
        with st.sidebar, st.spinner("Scoring"):
            opened.score()
        st.rerun()


def listed(found: Sequence[Study], scores: Mapping[str, Score]) -> Study:
    """The cases that can be reviewed, worst first; the chosen one."""
    keys = [study.key for study in found]
    before = choice.current(found)
    names = {study.key: named(study, scores.get(study.key, Score(None))) for study in found}
    picked = st.radio(
        "Cases, worst Dice first",
        keys,
        index=keys.index(before.key),
        format_func=lambda key: names[key],
        key=f"review list {hash(tuple(names.items()))}",  # of other lines Streamlit would forget which was chosen
    )
    choice.remember(case=picked)
    return found[keys.index(picked)]


def named(study: Study, score: Score) -> str:
    """A line of the list: the Dice, and of which version it is where that is not the prediction."""
    return f"{shown(score.dice)}  {study.name}" + (f"  ·  v{score.version}" if score.version else "")


def kept(workspace: Workspace, study: Study, run: Run) -> Opened:
    """The case as this session has it open; opened the first time.

    Where its newest version is damaged the page says so, and shows the prediction.
    """
    key = ("review", study.key, run.identity, str(study.case.label_sha256))

    def opened(owner: str) -> Opened:
        with st.spinner("Opening"):
            return open_case(owner, workspace, study, run)

    def uncorrected(owner: str, trouble: Corrupt) -> Opened:
        found = open_case(owner, workspace, study, run, corrected=False)
        found.trouble = trouble
        return found

    try:
        return screen.session().kept(key, opened)
    except Corrupt as error:
        if error.code != "correction":
            raise
        return screen.session().kept(key, partial(uncorrected, trouble=error))


def version(opened: Opened) -> None:
    """What is on the screen, that it is safe, the ways back, and what else there is."""
    made = [number_of(path) for path in versions(opened.folder)]
    if made:
        key = f"version {opened.study.key} {opened.run.identity}"
        st.session_state[key] = opened.number  # a stroke or a button may have begun another one
        choose = screen.guarded(lambda: opened.show(st.session_state[key]))
        names = {0: "The prediction, uncorrected"} | {number: f"Version {number}" for number in made}
        st.selectbox("Shown", [*reversed(made), 0], format_func=lambda each: names[each], key=key, on_change=choose)
    correction = opened.correction
    if correction is None:
        st.caption(f"The prediction as it is; a stroke begins version {max(made, default=0) + 1} beside it.")
    else:
        slices = len(correction.edited)
        counted = "1 slice" if slices == 1 else f"{slices} slices"
        st.caption(f"**{opened.version.capitalize()}**, {counted} corrected, all saved; the prediction is untouched.")
    with st.container(horizontal=True, gap="small"):
        st.button("Undo", on_click=screen.guarded(opened.undo), disabled=not (correction and correction.can_undo))
        st.button("Redo", on_click=screen.guarded(opened.redo), disabled=not (correction and correction.can_redo))
        st.button(
            "New",
            on_click=screen.guarded(opened.begin_anew),
            disabled=correction is None,
            help="Begin another version from the prediction; this one stays, and can be chosen again.",
        )
    answer = screen.guarded(lambda: answering(opened.run))
    st.toggle("Box and point prompts", key="prompts", on_change=answer, help="Answered by the frozen backbone")


def answering(run: Run) -> None:
    """Load the backbone before the first prompt; one that answers none, or is not there, leaves the switch off."""
    if not st.session_state.get("prompts"):
        return
    st.session_state["prompts"] = False
    if segmenting.resident(run).prompts:
        st.session_state["prompts"] = True
    else:
        st.toast("This run's backbone answers no prompts; one of the SAM family does.")


def take_away(opened: Opened) -> None:
    """The files of what is on the screen, made when asked for."""
    with st.expander("Take away"), screen.sentences():
        st.caption("Label map on the input's grid, volumes, scores and report of what is on the screen.")
        if opened.study.original is None:
            st.caption("No DICOM-SEG: a prepared case does not know its series; upload the series to get one.")
        key = f"taken {opened.study.key} {opened.run.identity}"
        now = (opened.version, opened.correction.revision if opened.correction else 0)
        if st.button("Make the files"):
            with st.spinner("Writing on the grid of the input"):
                st.session_state[key] = (now, opened.take_away())
        made, files = st.session_state.get(key, (None, {}))
        if files and made != now:
            st.caption("Corrected since: make the files again.")
        elif files:
            for name, path in files.items():
                mime = MIME.get(path.suffix, "text/html")
                content = path.read_bytes()
                st.download_button(name, content, name, mime, key=f"take {name}", on_click="ignore", width="stretch")


show()
