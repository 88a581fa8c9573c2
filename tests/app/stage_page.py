"""The page of `stage.py`: the viewer, and under it, as text, what it told Python."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, cast

import numpy as np
import streamlit as st
from orientation import phantom

from app import serving
from app.rle import encode
from app.viewer import Jump, Layer, Organ, Proposal, Scene, SliceScore, viewer
from app.viewer.events import Edit, Event, Prompt
from surm_seg.pictures import anatomy_colour, colour, hexed, texture

PHANTOM = (
    Organ(1, "liver", "#ff7eb5", 1512.3, 0.913, 6.25),
    Organ(2, "spleen", "#4cd8ff", 201.4, 0.712, 11.5, "3 pieces, 41 mL away from the largest"),
    Organ(3, "pancreas", "#f5e641", 8.2, None, None),
)
SPACING = (2.5, 0.8, 0.8)


st.set_page_config(layout="wide")


@st.cache_resource
def made() -> Path:
    """The folder with the phantom's arrays; those that are there are taken as they are."""
    folder, shape = (
        Path(os.environ["STAGE_FOLDER"]),
        tuple(int(length) for length in os.environ["STAGE_SHAPE"].split(",")),
    )
    if not (folder / "prediction.npy").exists():
        patient = phantom(cast(tuple[int, int, int], shape))
        for name in ("image", "reference", "prediction"):
            np.save(folder / f"{name}.npy", getattr(patient, name))
    return folder


@st.cache_resource
def shared() -> tuple[np.ndarray, np.ndarray]:
    """Image and reference as memory maps, opened once for all sessions."""
    return np.load(made() / "image.npy", mmap_mode="r"), np.load(made() / "reference.npy", mmap_mode="r")


@st.cache_data
def organs() -> Sequence[Organ]:
    """Those of the phantom, or as a page would list the ones that are named."""
    names = [name for name in os.environ["STAGE_ORGANS"].split(",") if name]
    if not names:
        return PHANTOM
    return [
        Organ(value, name, hexed(colour(value)), 10.0, texture=texture(value), anatomy=hexed(anatomy_colour(name)))
        for value, name in enumerate((name.replace("_", " ") for name in names), 1)
    ]


@st.cache_resource(scope="session", on_release=serving.withdraw, show_spinner=False)
def owner() -> str:
    """Of what this session shows; nothing of it is served when the session is over."""
    return os.urandom(8).hex()


@st.cache_data
def scores() -> list[SliceScore]:
    """Dice and error area of every slice, as a page would know them from the evaluation."""
    found, many = [], len(organs()) + 1
    for z, (truth, said) in enumerate(zip(shared()[1], np.load(made() / "prediction.npy", mmap_mode="r"), strict=True)):
        both = np.bincount((truth * many + said).ravel(), minlength=many**2).reshape(many, many)
        area = both.sum(axis=0) + both.sum(axis=1)
        dice = {value: 2 * both[value, value] / area[value] for value in range(1, many) if area[value]}
        found.append(SliceScore(z, dice, float(both.sum() - np.trace(both)) * SPACING[1] * SPACING[2]))
    return found


image, reference = shared()
state = st.session_state
state.setdefault("events", [])
state.setdefault("version", 0)
if "prediction" not in state:  # a session's own: written to in memory, the file stays
    state["prediction"] = np.load(made() / "prediction.npy", mmap_mode="c")
prediction = state["prediction"]


def act(event: Event) -> None:
    match event:
        case Edit(z, labels):
            prediction[z] = labels
            edit = {"kind": "edit", "z": z, "rle": encode(labels), "before": encode(event.before)}
            state["events"].append(edit | {"version": event.version, "layer": event.layer})
        case Prompt():
            state["events"].append(
                {"kind": "prompt", "z": event.z, "value": event.value, "points": event.points, "box": event.box}
            )
            disc = np.hypot(*np.indices(image.shape[1:]) - np.array(image.shape[1:])[:, None, None] / 2) < 6
            state["proposal"] = Proposal(len(state["events"]), event.z, event.value, encode(disc.astype(np.uint8)))
        case _:
            state["events"].append({"kind": "place", "z": event.z, "y": event.y, "x": event.x})


layout = cast(Literal["planes", "compare"], os.environ.get("STAGE_LAYOUT", "planes"))
shown = serving.Shown(image, {"prediction": prediction, "reference": reference})
with st.sidebar:
    jump = Jump(1, 3, 5, 7) if st.button("Jump") else state.get("jump")
    state["jump"] = jump
    if st.button("Renew"):
        state["version"] += 1
        prediction[:] = 0
scene = Scene(
    token=serving.publish(owner(), shown),
    case="case 007",
    shape=image.shape,
    spacing=SPACING,
    organs=organs(),
    layers={"prediction": Layer("Prediction", state["version"]), "reference": Layer("Reference")},
    slices=scores(),
    layout=layout,
    compare=("prediction", "reference") if layout == "compare" else None,
    editable="prediction",
    prompts=True,
    jump=jump,
    proposal=state.get("proposal"),
)
viewer("stage", scene, act)
st.html(f'<pre id="package">{serving.__file__}</pre>')
st.html(f'<pre id="told" style="white-space:pre-wrap">{json.dumps(state["events"])}</pre>')
