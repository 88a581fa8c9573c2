"""What comes from the browser is untrusted: read strictly, and what is no event holds up none of the others."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from app.rle import encode
from app.viewer.events import Edit, Place, Prompt, event_of, received
from surm_seg.errors import BadInput

SHAPE = (4, 3, 5)
LABELS = np.arange(15, dtype=np.uint8).reshape(3, 5)
PROMPT = {"kind": "prompt", "z": 3, "value": 2, "points": [[4, 2, 1]], "box": [0, 1, 4, 2]}


EDIT = {"kind": "edit", "z": 1, "after": encode(LABELS), "before": encode(LABELS // 2), "version": 7, "layer": 2**40}
EDIT |= {"id": "a"}


def test_what_has_an_id_is_taken_in_its_order() -> None:
    sent = [{"id": "b"}, "noise", {"no": "id"}, {"id": 4}, {"id": "x" * 65}, {"id": "a"}]
    assert [*received(sent)] == ["b", "a"] and not received(None)


def test_an_event_is_read_as_what_it_says() -> None:
    edit = event_of(EDIT, SHAPE)
    assert isinstance(edit, Edit) and (edit.z, edit.version, edit.layer, edit.id) == (1, 7, 2**40, "a")
    assert np.array_equal(edit.labels, LABELS) and np.array_equal(edit.before, LABELS // 2)
    assert event_of({"kind": "place", "z": 3, "y": 2, "x": 4}, SHAPE) == Place(3, 2, 4)
    assert event_of(PROMPT, SHAPE) == Prompt(3, 2, ((4, 2, 1),), (0, 1, 4, 2))


@pytest.mark.parametrize(
    "raw",
    [
        {},
        {"kind": "delete", "z": 0},
        {"kind": "place", "z": 4, "y": 0, "x": 0},
        {"kind": "place", "z": 0, "y": -1, "x": 0},
        {"kind": "place", "z": 0, "y": 0.5, "x": 0},
        EDIT | {"after": None},
        EDIT | {"after": encode(LABELS[:2])},
        EDIT | {"before": "no runs"},
        EDIT | {"version": "0"},
        {name: fact for name, fact in EDIT.items() if name != "layer"},
        PROMPT | {"points": [[5, 0, 1]]},
        PROMPT | {"points": [[0, 0, 2]]},
        PROMPT | {"box": [0, 0, 1]},
        PROMPT | {"value": 256},
    ],
)
def test_what_is_no_event_of_this_volume_is_refused(raw: dict[str, Any]) -> None:
    with pytest.raises(BadInput):
        event_of(raw, SHAPE)
