"""Reports: score a folder of predictions against references, and take home what runs and evaluations came to."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import streamlit as st
import yaml

from app import jobs, screen
from app.scores import scores_in
from app.uploads import table_of
from app.workspace import Workspace
from surm_seg.errors import BadInput, Corrupt, SurmError
from surm_seg.labels import OTHER, SYNAPSE, LabelMap, label_tables, numbered, predicted_organs, read_table
from surm_seg.volume import label_names, read_labels, volumes_in

OWN = "as their files say, or as in the predictions"
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
        screen.newest_job(workspace.folder / "jobs", "evaluate", "reading the label maps")
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
    known = predicted_organs(workspace.folder / prediction)
    organs = known or SYNAPSE
    chosen = st.selectbox(
        "Label values of the references",
        [OWN, *tables],
        help="Other numbers are told by a YAML file in the workspace, a line `value: organ` for each.",
    )
    folder = workspace.folder / reference
    try:
        table, why = (read_table(workspace.folder / chosen), chosen) if chosen != OWN else own_table(folder, organs)
        predicted = numbered(organs) if known or chosen == OWN else table  # a file is for both sides of unknown numbers
        if predicted is table:
            st.caption(f"The predictions are read by {chosen}, too.")
        else:
            st.caption(f"1, 2, ... of the predictions are {', '.join(organs).replace('_', ' ')}.")
        st.caption(taken_for(folder, table, why))
        label_tables(predicted, table)
    except SurmError as error:  # of a choice that is not made yet: no error, and nothing to score
        st.warning(f"{screen.plain(str(error))}  \n`{error.code}`")
        return
    if st.button("Score", type="primary"):
        output = workspace.folder / "reports" / time.strftime("%Y%m%d-%H%M%S")
        output.mkdir(parents=True, exist_ok=True)
        words = ["--prediction", prediction, "--reference", reference, "--output", str(output)]
        for option, meaning in (("labels", predicted), ("reference_labels", table)):
            (output / f"{option}.yaml").write_text(yaml.safe_dump(written(meaning), sort_keys=False))
            words += [f"--{option}", str(output / f"{option}.yaml")]
        words += ["--image", image] if image else []
        jobs.start("evaluate", words, workspace.folder / "jobs", work=workspace.folder)
        st.rerun()


def own_table(reference: Path, organs: Sequence[str]) -> tuple[LabelMap, str]:
    """What a folder's values mean, and by what: its record, its files' own tables, or the predictions.

    Raises:
        BadInput: the folder says itself that it has not all of the organs.
    """
    if own := dict(enumerate(predicted_organs(reference), 1)):
        return table_of(organs, own), "the record beside them"
    told = [label_names(path) for path in files_of(reference)]
    if any(one != told[0] for one in told):
        sentence = "The reference files do not all say the same of their values; choose a YAML file for all of them."
        raise BadInput("labels-differ", sentence)
    if told and told[0]:
        return table_of(organs, told[0]), "their own tables of classes"
    return numbered(organs), "the predictions"


def taken_for(reference: Path, table: LabelMap, why: str) -> str:
    """What the values of the first reference file are taken for; raises BadInput where one stands for no organ."""
    files = files_of(reference)
    if not files:
        raise BadInput("no-volumes", "The folder of references holds no label map; choose another.")
    meaning = {
        value: table.raw.get(value) or "background" for value in values_in(files[0], files[0].stat().st_mtime_ns)
    }
    if missing := [value for value in meaning if value not in table.raw and not table.others]:
        raise BadInput(
            "unknown-label",
            f"The first reference file holds the values {', '.join(map(str, missing[:8]))}, which by {why} are no "
            "organs; choose a YAML file that says what they are.",
        )
    told = ", ".join(f"{value} {organ}" for value, organ in meaning.items()).replace("_", " ") or "no organ"
    return f"The first reference file holds, by {why}: {told}."


@lru_cache(maxsize=64)
def values_in(path: Path, changed: int) -> tuple[int, ...]:
    """The label values of a file but 0, of its state at a time in nanoseconds."""
    values = np.unique(read_labels(path).voxels)
    return tuple(int(value) for value in values if value)


def files_of(folder: Path) -> list[Path]:
    """The label maps that `evaluate` would take."""
    return [path for path in volumes_in(folder) if path.is_file()]


def written(table: LabelMap) -> dict[int | str, str | None]:
    """A table as a YAML file has it."""
    return {**table.raw, **({OTHER: None} if table.others else {})}


def existing(workspace: Workspace) -> None:
    """Scores of runs and of evaluations: a table, and the files to download."""
    folders = {f"run {run.name}": run.folder / "scores" for run in workspace.runs()}
    made = sorted((workspace.folder / "reports").glob("*/"), reverse=True)
    folders = {f"evaluation {folder.name}": folder for folder in made} | folders
    found = {name: folder for name, folder in folders.items() if (folder / "summary.json").exists()}
    if not found:
        st.info("No scores yet: a training scores its held-out cases, and the form on the left scores any folder.")
        return
    name = st.selectbox("Scores of", list(found))
    folder = found[name]
    try:
        summary = json.loads((folder / "summary.json").read_bytes())
        cases = int(summary["cases"])
        lines = table(next(iter(summary["protocols"].values()), {"organs": {}, "overall": None}))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise Corrupt("scores-unreadable", f"The scores of the {name} are damaged; score its folder again.") from error
    st.dataframe(lines, hide_index=True, placeholder=screen.UNDEFINED, column_config=_FORMATS)
    st.caption(
        f"{cases} cases. Means over the cases where a number is defined (n); where prediction and reference "
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
