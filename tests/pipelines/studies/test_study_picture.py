"""Pictures of studies: every dot stands over its number on the axis."""

from __future__ import annotations

from itertools import pairwise
from xml.etree import ElementTree

import pytest

from pipelines.studies.picture import page, scatter


def _axis_and_dots(**points: float) -> tuple[dict[str, float], list[float]]:
    panel = scatter("title", "values", {name: (x, 0.5, 0.1) for name, x in points.items()})
    root = ElementTree.fromstring(page([[panel]]))
    texts = [(part.text, float(part.get("x", ""))) for part in root.iter("{http://www.w3.org/2000/svg}text")]
    dots = [float(part.get("cx", "")) for part in root.iter("{http://www.w3.org/2000/svg}circle")]
    return {text: x for text, x in texts if text and text[0].isdigit() and "." not in text}, dots


def test_powers_of_ten_stand_below_their_numbers_and_none_below_a_number_of_its_own() -> None:
    axis, dots = _axis_and_dots(probe=0, small=1e3, large=1e6)
    assert list(axis) == ["0", "1k", "10k", "100k", "1M"]
    assert dots == pytest.approx([axis["0"], axis["1k"], axis["1M"]])


def test_numbers_do_not_run_into_each_other() -> None:
    axis, _ = _axis_and_dots(probe=0, small=2, large=9e5)
    places = sorted((x, len(text)) for text, x in axis.items())
    letter = 6.5  # units of a digit at this size
    for (x, length), (after, next_length) in pairwise(places):
        assert after - x >= letter * (length + next_length) / 2


@pytest.mark.parametrize("value", [0, 1, 500])
def test_one_dot_is_a_picture_too(value: float) -> None:
    axis, (dot,) = _axis_and_dots(only=value)
    assert min(axis.values()) <= dot <= max(axis.values())
