"""The slice viewer: one component that draws in the browser and tells Python about finished actions only.

Scrolling, windowing, zoom, opacity and the organs' eyes stay in the browser. The voxels travel beside the app
(`app.serving`), the small facts of the screen as the `Scene`, and what the user finished comes back as an `Event`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from threading import Lock
from typing import Any, Literal

import streamlit as st
from streamlit.components.v2 import component

from app.serving import MODULES
from app.viewer.events import Event, event_of, received

__all__ = ["Jump", "Layer", "Organ", "Proposal", "Scene", "SliceScore", "viewer"]

_LOADER = """
const main = import(new URL("/surm/viewer/main.js", document.baseURI).href);
export default async (mounted) => (await main).default(mounted);
"""
_component = component("surm_viewer", css=(MODULES / "viewer.css").read_text("utf-8"), js=_LOADER)


@dataclass(frozen=True)
class Organ:
    """One row of the organ table; None is shown as not defined.

    Attributes:
        value: its label value, 1 to 255.
        colour: "#rrggbb".
        ml: volume in mL.
        dice: 0 to 1.
        hd95: 95th percentile of the surface distance in mm.
        flag: a few words that ask for attention, or "".
        texture: of its areas and lines: 0 plain, 1 stripes, 2 dots, 3 a grid.
        anatomy: "#rrggbb" in the colours of 3D Slicer, which the user may choose; "" where it has none.
    """

    value: int
    name: str
    colour: str
    ml: float | None = None
    dice: float | None = None
    hd95: float | None = None
    flag: str = ""
    texture: int = 0
    anatomy: str = ""


@dataclass(frozen=True)
class Layer:
    """A label map that is served beside the image, under the layer's key in `Scene.layers`.

    Attributes:
        name: shown on the screen.
        version: raised whenever the labels became others by anything but the viewer's own edits; they are then
            fetched again.
    """

    name: str
    version: int = 0


@dataclass(frozen=True)
class SliceScore:
    """One axial slice in the strip under the picture.

    Attributes:
        dice: 0 to 1 by organ value, or one number; None where both masks are empty.
        error_mm2: area on which prediction and reference differ; the worst slice is where it is greatest.
    """

    z: int
    dice: Mapping[int, float | None] | float | None
    error_mm2: float


@dataclass(frozen=True)
class Jump:
    """Moves the crosshair there, once for each new `id`; within the slice it stays where y and x are None."""

    id: int
    z: int
    y: int | None = None
    x: int | None = None


@dataclass(frozen=True)
class Proposal:
    """A mask of one slice, answered to a prompt: drawn, but no truth until the user accepts it as an edit.

    Attributes:
        value: label value of the organ it would become.
        rle: `app.rle.encode` of the slice's mask; what is not 0 is proposed.
    """

    id: int
    z: int
    value: int
    rle: str


@dataclass(frozen=True)
class Scene:
    """What the viewer shows; small, and never the voxels.

    Attributes:
        token: of `app.serving.publish`.
        case: the case id, named on the screen.
        shape: voxels along (z, y, x).
        spacing: mm along (z, y, x); None where it is unknown, which the screen then says.
        layers: label maps by their served name; "prediction" and "reference" give the modes.
        compare: the two layers side by side in the layout "compare".
        editable: the layer that brush, eraser and accepted proposals change; None takes them away.
        version: what tells where edits go; every edit comes back with that of its time.
        prompts: whether box and point prompts are answered.
        window: width and centre in HU the first time; the user's own afterwards.
    """

    token: str
    case: str
    shape: tuple[int, int, int]
    spacing: tuple[float, float, float] | None = None
    organs: Sequence[Organ] = ()
    layers: Mapping[str, Layer] = field(default_factory=dict)
    slices: Sequence[SliceScore] = ()
    layout: Literal["planes", "compare"] = "planes"
    compare: tuple[str, str] | None = None
    editable: str | None = None
    version: int = 0
    prompts: bool = False
    jump: Jump | None = None
    window: tuple[int, int] | None = None
    proposal: Proposal | None = None


def viewer(key: str, scene: Scene, act: Callable[[Event], None] | None = None) -> None:
    """Mount the viewer.

    Args:
        key: of the component; one viewer keeps its place, zoom and window as long as its key stays.
        scene: compared by the browser with the last one; only what changed is fetched or drawn again.
        act: called before the script runs again, once for each finished action, in their order and without loss. Only
            where Streamlit breaks it off, as it may wherever `st.session_state` is used, is it called once more.
    """
    taken: _Taken = st.session_state.setdefault(f"{key} taken", _Taken())

    def take() -> None:
        with taken.lock:
            sent = received(st.session_state[key].event)
            taken.last = [name for name in sent if name in taken.all]
            for name, raw in sent.items():
                if name in taken.all:
                    continue
                try:
                    event = event_of(raw, scene.shape)
                    if act:
                        act(event)
                except Exception:  # an error is the page's to show, once; to be broken off is no Exception
                    taken.add(name)
                    raise
                taken.add(name)

    _component(key=key, data=_facts(key, scene, taken.last), on_event_change=take)


@dataclass
class _Taken:
    """Ids of the events that were acted upon: all, and those that the browser sent last.

    An object with a lock, for two reasons: Streamlit starts the next run of a script in another thread while the last
    one is still busy, and writing to the session state is where it breaks runs off.
    """

    all: set[str] = field(default_factory=set)
    last: list[str] = field(default_factory=list)
    lock: Lock = field(default_factory=Lock)

    def add(self, name: str) -> None:
        self.all.add(name)
        self.last.append(name)


def _facts(key: str, scene: Scene, seen: Sequence[str]) -> dict[str, Any]:
    """The scene as the browser reads it, with the ids of the events that were taken."""
    facts = asdict(scene)
    facts["data"] = f"/surm/data/{facts.pop('token')}/"
    return facts | {"convention": "radiological", "key": key, "seen": [*seen]}
