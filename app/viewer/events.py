"""What a user finished in the viewer, as it comes from the browser: untrusted until it is read here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from app.rle import decode
from surm_seg.errors import BadInput


@dataclass(frozen=True)
class Edit:
    """A stroke, an undo, a redo or an accepted proposal: from now on slice z has these labels, uint8 (y, x).

    Attributes:
        before: what it was drawn on, likewise.
        version: `Scene.version` of that time.
        layer: version of the layer that it was drawn on.
        id: what tells it from every other one.
    """

    z: int
    labels: np.ndarray
    before: np.ndarray
    version: int
    layer: int
    id: str


@dataclass(frozen=True)
class Prompt:
    """What the user asks to have segmented on slice z, in voxels.

    Attributes:
        value: label value of the organ.
        points: (x, y, 1 for inside or 0 for outside).
        box: (x0, y0, x1, y1), both corners inside.
    """

    z: int
    value: int
    points: tuple[tuple[int, int, int], ...]
    box: tuple[int, int, int, int] | None


@dataclass(frozen=True)
class Place:
    """A voxel the user clicked on."""

    z: int
    y: int
    x: int


Event = Edit | Prompt | Place

LONGEST_ID = 64
"""Characters; the browser's own are 32."""


def received(sent: Any) -> dict[str, Any]:
    """Events in their order, not read yet, by their ids.

    Args:
        sent: the browser's list of all events that it does not know to be seen.
    """
    events = [raw for raw in sent or () if isinstance(raw, dict)]
    return {raw["id"]: raw for raw in events if isinstance(raw.get("id"), str) and len(raw["id"]) <= LONGEST_ID}


def event_of(raw: Any, shape: tuple[int, int, int]) -> Event:
    """What the browser tells, read.

    Args:
        shape: voxels along (z, y, x), which every coordinate is held against.

    Raises:
        BadInput: it is none of the three, or lies outside the volume.
    """
    try:
        return _event(raw, shape)
    except (KeyError, TypeError, ValueError):
        raise BadInput("viewer-event", "The viewer sent something that is no event: reload the page.") from None


def _event(raw: dict[str, Any], shape: tuple[int, int, int]) -> Event:
    depth, height, width = shape
    z = _index(raw["z"], depth)
    match raw["kind"]:
        case "edit":
            labels, before = (decode(raw[name], (height, width)) for name in ("after", "before"))
            return Edit(z, labels, before, _number(raw["version"]), _number(raw["layer"]), str(raw["id"]))
        case "place":
            return Place(z, _index(raw["y"], height), _index(raw["x"], width))
        case "prompt":
            points = tuple((_index(x, width), _index(y, height), _index(sign, 2)) for x, y, sign in raw["points"])
            box = None
            if raw["box"] is not None:
                x0, y0, x1, y1 = raw["box"]
                box = _index(x0, width), _index(y0, height), _index(x1, width), _index(y1, height)
            return Prompt(z, _index(raw["value"], 256), points, box)
    raise ValueError(raw["kind"])


def _index(value: Any, length: int) -> int:
    if not 0 <= _number(value) < length:
        raise ValueError(value)
    return value


def _number(value: Any) -> int:
    if not isinstance(value, int):
        raise ValueError(value)
    return value
