"""Plots as SVG: every number is drawn, where it belongs, in text that any XML reader takes."""

from __future__ import annotations

from xml.etree import ElementTree

import numpy as np
import pytest

from surm_seg.charts import MAX_POINTS, curve, dot_plot


def parts(drawing: str, tag: str) -> list[ElementTree.Element]:
    return list(ElementTree.fromstring(drawing).iter(tag))


def texts(drawing: str) -> list[str]:
    return [part.text or "" for part in parts(drawing, "text")]


def test_every_case_is_a_dot_in_its_organs_colour_and_in_order() -> None:
    values = {"left_kidney": [0.9, 0.2, 0.9, 0.9], "liver": [0.5]}
    drawing = dot_plot(values, {"left_kidney": "#112233", "liver": "#445566"})
    dots = parts(drawing, "circle")
    places = {
        colour: [float(d.get("cx", 0)) for d in dots if d.get("fill") == colour] for colour in ("#112233", "#445566")
    }
    first, *others = places["#112233"]
    assert [len(found) for found in places.values()] == [4, 1]
    assert first < places["#445566"][0] < others[0] == others[1] == others[2]
    equal = [(dot.get("cx"), dot.get("cy")) for dot in dots]
    assert len(set(equal)) == len(equal)  # equal values lie beside each other
    assert {"left kidney", "median 0.900, n 4", "median 0.500, n 1"} <= set(texts(drawing))


def test_an_organ_without_a_value_says_so() -> None:
    assert "not defined" in texts(dot_plot({"liver": []}, {}))


@pytest.mark.parametrize(("lowest", "start"), [(0.0, 0.0), (0.55, 0.5), (0.97, 0.8)])
def test_the_axis_ends_at_one_and_starts_below_the_lowest(lowest: float, start: float) -> None:
    drawing = dot_plot({"liver": [lowest, 1.0]}, {})
    numbers = [float(text) for text in texts(drawing) if text.replace(".", "").isdigit()]
    assert max(numbers) == 1 and start <= min(numbers) <= start + 0.1
    assert all(0 < float(dot.get("cx", 0)) < 680 for dot in parts(drawing, "circle"))


def test_names_are_escaped() -> None:
    assert "<x>" in texts(dot_plot({"<x>": [0.5]}, {}))


def test_a_curve_keeps_few_points_and_averages_many() -> None:
    for count, drawn in ((5, 5), (10_000, MAX_POINTS)):
        (line,) = parts(curve([(n, float(np.exp(-n / 100))) for n in range(count)]), "polyline")
        places = np.array([point.split(",") for point in line.get("points", "").split()], float)
        assert len(places) == drawn
        assert (np.diff(places[:, 0]) > 0).all() and (np.diff(places[:, 1]) >= 0).all()  # falls: y grows downwards


@pytest.mark.parametrize("ys", [[0.2], [3.0, 3.0], [0.0, 0.0], [-5.0, 1e6], [0.8712, 0.8719]])
def test_the_numbers_at_the_side_enclose_the_curve(ys: list[float]) -> None:
    drawing = curve(list(enumerate(ys)), marks=True)
    numbers = [float(text) for text in texts(drawing) if not text.startswith("step")]
    assert min(numbers) <= min(ys) and max(ys) <= max(numbers) and len(set(numbers)) == len(numbers)
    assert all(8 <= float(dot.get("cy", -1)) <= 146 for dot in parts(drawing, "circle"))
    assert len(parts(drawing, "circle")) == len(ys)
