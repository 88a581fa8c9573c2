"""Reports: score a folder of predictions against references, and take home what runs and evaluations came to."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import streamlit as st

from app import jobs, screen
from app.scores import scores_in
from app.workspace import Workspace
from surm_seg.labels import SYNAPSE, predicted_organs

POLL = "1s"
SAME = "as in the predictions"
FILES = {
    "report.html": ("HTML report", "text/html"),
    "cases.csv": ("Cases, CSV", "text/csv"),
    "slices.csv": ("Slices, CSV", "text/csv"),
    "summary.json": ("Summary, JSON", "application/json"),
}


def show() -> None:
    workspace = Workspace()
    screen.title("Reports", "Dice, HD95 and NSD against references")
    left, right = st.columns([2, 3], gap="large")
    with left, screen.sentences():
        st.subheader("Score a folder")
        form(workspace)
        progress(workspace)
    with right, screen.sentences():
        existing(workspace)


def form(workspace: Workspace) -> None:
    """Predictions against references; both are folders of this workspace."""
    folders = [str(folder) for folder in workspace.label_folders()]
    if len(folders) < 2:
        st.info("Put a folder of predictions and one of references into this workspace; they are found by their files.")
        return
    predicted = [folder for folder in folders if folder.startswith(("predictions", "runs"))] or folders
    prediction = st.selectbox("Predictions", predicted)
    others = sorted(set(folders) - {prediction}, key=lambda folder: (folder.startswith("runs"), "label" not in folder))
    reference = st.selectbox("References", others)
    image = st.selectbox("CT to draw outlines on", [None, *folders], format_func=lambda folder: folder or "none")
    tables = sorted(str(path.relative_to(workspace.folder)) for path in workspace.folder.glob("*.y*ml"))
    organs = predicted_organs(workspace.folder / prediction) or SYNAPSE
    labels = st.selectbox(
        "Label values of the references",
        [SAME, *tables],
        help="Other numbers are told by a YAML file in the workspace, a line `value: organ` for each.",
    )
    st.caption(f"1, 2, ... of the predictions are {', '.join(organs).replace('_', ' ')}.")
    if st.button("Score", type="primary"):
        output = workspace.folder / "reports" / time.strftime("%Y%m%d-%H%M%S")
        table = workspace.folder / labels
        if labels == SAME:
            output.mkdir(parents=True, exist_ok=True)
            table = output / "labels.yaml"
            table.write_text("".join(f"{value}: {organ}\n" for value, organ in enumerate(organs, 1)))
        words = ["--prediction", prediction, "--reference", reference, "--output", str(output)]
        words += ["--labels", str(table), *(["--image", image] if image else [])]
        jobs.start("evaluate", words, workspace.folder / "jobs", work=workspace.folder)
        st.rerun()


@st.fragment(run_every=POLL)
@screen.guarded
def progress(workspace: Workspace) -> None:
    """What the newest evaluation is doing, or why it failed."""
    job = next((job for job in jobs.jobs(workspace.folder / "jobs") if job.kind == "evaluate"), None)
    if job is None:
        return
    if job.state == "running":
        st.session_state["scoring"] = job.id
        lines = job.log_tail(1) or ["reading the label maps"]
        st.progress(job.progress or 0.0, screen.plain(lines[0]))
        if st.button("Cancel", key="cancel scoring"):
            job.cancel()
    elif st.session_state.pop("scoring", None) == job.id:
        st.rerun()
    elif job.state == "failed":
        lines = [line for line in job.log_tail() if line.strip()] or ["It stopped without a word; start it again."]
        st.error(screen.plain(lines[-1]))


def existing(workspace: Workspace) -> None:
    """Scores of runs and of evaluations: a table, and the files to download."""
    folders = {f"run {run.name}": run.folder / "scores" for run in workspace.runs()}
    made = sorted((workspace.folder / "reports").glob("*/"), reverse=True)
    folders = {f"evaluation {folder.name}": folder for folder in made} | folders
    found = {name: folder for name, folder in folders.items() if (folder / "summary.json").exists()}
    if not found:
        st.info("No scores yet: a training scores its held-out cases, and the form on the left scores any folder.")
        return
    folder = found[st.selectbox("Scores of", list(found))]
    summary = json.loads((folder / "summary.json").read_bytes())
    first = next(iter(summary["protocols"].values()), {"organs": {}, "overall": None})
    st.dataframe(table(first), hide_index=True, placeholder=screen.UNDEFINED, column_config=_FORMATS)
    st.caption(
        f"{summary['cases']} cases. Means over the cases where a number is defined (n); where prediction and reference "
        f"are both empty it is not, and enters none. {screen.spacings(scores_in(folder / 'cases.csv').values())}"
    )
    downloads(folder)


_FORMATS: dict[str, Any] = {
    name: st.column_config.NumberColumn(format=f"%.{digits}f")
    for name, digits in {"Dice": 3, "SD": 3, "HD95 mm": 2, "NSD": 3}.items()
}


def table(protocol: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A line per organ of a summary, and one for the mean."""
    named: Sequence[tuple[str, Any]] = [*protocol["organs"].items(), ("mean", protocol["overall"])]
    return [
        {
            "Organ": organ.replace("_", " "),
            "n": statistics["dice"]["n"],
            "Dice": statistics["dice"]["mean"],
            "SD": statistics["dice"]["sd"],
            "HD95 mm": statistics.get("hd95_mm", {}).get("mean"),
            "NSD": statistics.get("nsd", {}).get("mean"),
            "Missed": statistics["missed"],
        }
        for organ, statistics in named
        if statistics
    ]


def downloads(folder: Path) -> None:
    """A button per file."""
    with st.container(horizontal=True):
        for name, (label, mime) in FILES.items():
            if (folder / name).exists():
                st.download_button(label, (folder / name).read_bytes(), name, mime, on_click="ignore")


show()
