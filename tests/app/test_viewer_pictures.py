"""What a radiologist sees: sides, planes, window, organs, errors."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from orientation import BODY, MARKS, SPLEEN, STRANGE, boxes, phantom
from playwright.sync_api import Page
from skimage.measure import label
from staging import SHAPE, Stage
from watching import at, corner, go, middle, pixels, press, settle, state, window

PLANES = {"axial": tuple("APRL"), "coronal": tuple("SIRL"), "sagittal": tuple("SIAP")}
"""The marks above, below, left and right of each picture."""

AXES = {"axial": (1, 2), "coronal": (0, 2), "sagittal": (0, 1)}
"""Which of (z, y, x) are a picture's rows and columns."""


def plain(page: Page) -> None:
    """Nothing but grey values: HU -1000 to 1550 in steps of ten."""
    press(page, "h", " ")
    window(page, 2550, 275)
    go(page, SHAPE[0] // 2)


def of_mark(page: Page, plane: str, letter: str) -> np.ndarray:
    """Where a picture has the brightness of a mark: the largest such place, for smoothed edges have any brightness."""
    grey = pixels(page, plane)[..., 0]
    places = np.asarray(label(np.abs(grey - (MARKS[letter] + 1000) / 10) <= 1))
    return places == np.argmax(np.bincount(places.ravel())[1:]) + 1


def test_every_side_of_the_patient_is_where_its_letter_is(page: Page) -> None:
    plain(page)
    for plane, (above, below, left, right) in PLANES.items():
        rows, columns = pixels(page, plane).shape[:2]
        for letter, place in ((above, (None, 0)), (below, (None, 1)), (left, (0, None)), (right, (1, None))):
            x, y = middle(of_mark(page, plane, letter))
            for part, wanted in zip((x / columns, y / rows), place, strict=True):
                assert (part < 0.5) == (wanted == 0) if wanted is not None else abs(part - 0.5) < 0.04, (plane, letter)
        for letter, side in zip((above, below, left, right), ("above", "below", "left", "right"), strict=True):
            assert page.locator(f'.pane[data-plane="{plane}"] .mark.{side}').inner_text() == letter
        assert page.locator(f'.pane[data-plane="{plane}"] .convention').inner_text() == "radiological"


def test_planes_have_the_patients_proportions(page: Page) -> None:
    plain(page)
    where, spacing = boxes(SHAPE), np.array((2.5, 0.8, 0.8))
    for plane, (above, below, left, right) in PLANES.items():

        def apart(one: str, other: str, axis: int) -> tuple[float, float]:
            """Pixels and millimetres between two marks."""
            seen = [middle(of_mark(page, plane, letter)) for letter in (one, other)]  # noqa: B023
            real = [
                np.array([part.start + part.stop - 1 for part in where[letter]]) / 2 * spacing
                for letter in (one, other)
            ]
            return abs(seen[1][axis] - seen[0][axis]), float(np.abs(real[1] - real[0]).max())

        high, wide = apart(above, below, 1), apart(left, right, 0)
        assert high[0] / wide[0] == pytest.approx(high[1] / wide[1], rel=0.02), plane


@pytest.mark.parametrize("plane", PLANES)
def test_a_click_hits_the_voxel_that_is_seen_there_also_after_zoom_and_pan(page: Page, plane: str) -> None:
    plain(page)
    left, top = corner(page, plane)
    for letter in (PLANES[plane][0], PLANES[plane][2]):
        page.mouse.move(*where_seen(page, plane, letter))
        page.keyboard.down("Control")
        page.mouse.wheel(0, -400)
        page.keyboard.up("Control")
        page.mouse.down(button="middle")
        page.mouse.move(left + 90, top + 90)
        page.mouse.up(button="middle")
        settle(page)
        page.mouse.click(*where_seen(page, plane, letter))
        settle(page)
        rows, columns = AXES[plane]
        box = boxes(SHAPE)[letter]
        for axis in (rows, columns):
            assert at(page)[axis] == (box[axis].start + box[axis].stop - 1) // 2, (plane, letter)
        page.get_by_title("Fit the picture (F)").click()
        for name in ("coronal", "sagittal", "axial"):
            reset_to_middle(page, name)


def where_seen(page: Page, plane: str, letter: str) -> tuple[float, float]:
    """The middle of a mark in the window."""
    left, top = corner(page, plane)
    x, y = middle(of_mark(page, plane, letter))
    return left + x, top + y


def reset_to_middle(page: Page, plane: str) -> None:
    left, top = corner(page, plane)
    rows, columns = pixels(page, plane).shape[:2]
    page.mouse.click(left + columns / 2 + 1, top + rows / 2 + 1)
    settle(page)


def test_window_by_key_by_number_and_by_dragging(page: Page) -> None:
    go(page, SHAPE[0] // 2)
    left, top = corner(page, "axial")
    for key, expected in zip("12345", ("400/40", "150/90", "150/30", "1500/-600", "2500/480"), strict=True):
        press(page, key)
        assert state(page)["window"] == expected
        width, centre = map(int, expected.split("/"))
        body = np.clip(int((BODY - centre + width / 2) / width * 255 + 0.5), 0, 255)
        rows, columns = pixels(page, "axial").shape[:2]
        assert tuple(pixels(page, "axial")[rows // 2 + 15, columns // 2 + 15, :3]) == (body,) * 3
    window(page, 300, 50)
    assert state(page)["window"] == "300/50"
    page.mouse.move(left + 100, top + 100)
    page.mouse.down(button="right")
    page.mouse.move(left + 150, top + 80)
    page.mouse.up(button="right")
    settle(page)
    assert state(page)["window"] == "400/10"


def test_organs_are_hidden_by_space_by_eye_and_drawn_as_outline(page: Page) -> None:
    go(page, SHAPE[0] // 2)
    press(page, "h")

    def coloured() -> int:
        colours = pixels(page, "axial")[..., :3]
        return int((np.ptp(colours, axis=2) > 20).sum())

    filled = coloured()
    press(page, "o")
    assert 0 < coloured() < filled / 3
    press(page, "o", " ")
    assert coloured() == 0
    press(page, " ")
    assert coloured() == filled
    page.get_by_title("Hide liver").click()
    settle(page)
    without = coloured()
    assert without < filled
    page.get_by_title("Show or hide all organs").click()
    settle(page)
    assert coloured() == 0
    page.get_by_title("Show or hide all organs").click()
    settle(page)
    assert coloured() == filled


def test_an_outline_is_sharp_at_any_zoom(page: Page) -> None:
    """Of the outline's own colour and nothing between, however large a voxel is drawn."""
    press(page, "h", "o")
    page.locator(".viewer").evaluate("root => root.focus()")
    left, top = corner(page, "axial")
    page.mouse.move(left + 250, top + 180)
    for _ in range(2):
        colours = pixels(page, "axial")[..., :3].reshape(-1, 3)
        assert set(map(tuple, colours[np.ptp(colours, axis=1) > 0])) <= {
            (255, 126, 181),
            (76, 216, 255),
            (245, 230, 65),
        }
        page.keyboard.down("Control")
        page.mouse.wheel(0, -500)
        page.keyboard.up("Control")
        settle(page)


def test_errors_differ_by_colour_and_by_pattern(page: Page) -> None:
    made = phantom(SHAPE)
    z = SHAPE[0] * 3 // 8
    go(page, z)
    press(page, "h", "e")
    assert state(page)["mode"] == "error" and page.locator(".legend").inner_text().split("\n") == [
        "Agrees", "Too much", "Missed", "Other organ",
    ]  # fmt: skip
    rows, columns = np.nonzero(made.prediction[z] == STRANGE)
    wrong = seen_at(page, rows[len(rows) // 2], columns[len(columns) // 2])
    assert wrong[..., 0].mean() > wrong[..., 2].mean() + 20  # too much is orange
    assert wrong.std(axis=(0, 1)).max() > 10  # and striped
    z = int(
        np.argmax((made.reference == SPLEEN).sum(axis=(1, 2)) * ((made.prediction == SPLEEN).sum(axis=(1, 2)) == 0))
    )
    missed = (made.reference[z] == SPLEEN) & (made.prediction[z] == 0)
    assert missed.any()
    go(page, z)
    rows, columns = np.nonzero(missed)
    lost = seen_at(page, int(rows.mean()), int(columns.mean()))
    assert lost[..., 2].mean() > lost[..., 0].mean() + 20 and lost.std(axis=(0, 1)).max() > 10  # blue, dotted


def seen_at(page: Page, y: int, x: int) -> np.ndarray:
    """The pixels of some voxels of the axial picture around (y, x)."""
    picture = pixels(page, "axial")[..., :3]
    scale = min(picture.shape[0] / SHAPE[1], picture.shape[1] / SHAPE[2])
    row = picture.shape[0] / 2 + (y + 0.5 - SHAPE[1] / 2) * scale
    column = picture.shape[1] / 2 + (x + 0.5 - SHAPE[2] / 2) * scale
    half = 5
    return picture[int(row) - half : int(row) + half, int(column) - half : int(column) + half]


def test_the_table_says_what_is_not_defined_and_whose_millimetres(page: Page) -> None:
    rows = page.locator(".table tr[data-organ]")
    assert rows.nth(0).inner_text().split() == ["liver", "1512", "0.913", "6.3"]
    assert rows.nth(2).inner_text().split() == ["pancreas", "8.2", "–", "–"]
    assert page.locator(".table tr.flag").inner_text().strip() == "3 pieces, 41 mL away from the largest"
    assert "spacing 0.8 × 0.8 × 2.5 mm (x, y, z)" in page.locator(".note").inner_text()


def test_the_pointer_reads_voxel_hu_and_organs(page: Page) -> None:
    plain(page)
    x, y = where_seen(page, "axial", "R")
    page.mouse.move(x, y)
    settle(page)
    box = boxes(SHAPE)["R"]
    middle_y, middle_x = ((part.start + part.stop - 1) // 2 for part in box[1:])
    text = page.locator('.pane[data-plane="axial"] .readout').inner_text()
    assert f"x {middle_x}  y {middle_y}  z {SHAPE[0] // 2}" in text and f"{MARKS['R']} HU" in text
    assert "Reference: none" in text


def test_a_pointer_that_rests_reads_the_slice_that_is_scrolled_to(page: Page) -> None:
    made, z = phantom(SHAPE), SHAPE[0] * 3 // 8
    rows, columns = np.nonzero(made.prediction[z] == STRANGE)
    y, x = int(rows.mean()), int(columns.mean())
    go(page, z - 1)
    left, top = corner(page, "axial")
    height, width = pixels(page, "axial").shape[:2]
    scale = min(height / SHAPE[1], width / SHAPE[2])
    page.mouse.move(
        left + width / 2 + (x + 0.5 - SHAPE[2] / 2) * scale, top + height / 2 + (y + 0.5 - SHAPE[1] / 2) * scale
    )
    readout = page.locator('.pane[data-plane="axial"] .readout')
    for way, there in ((0, z - 1), (-100, z), (-100, z + 1), (100, z)):
        page.mouse.wheel(0, way)
        page.wait_for_selector(f'.viewer[data-z="{there}"]')
        settle(page)
        organ = "pancreas" if there == z else "none"
        assert readout.inner_text().startswith(f"x {x}  y {y}  z {there}   {made.image[there, y, x]} HU")
        assert f"Prediction: {organ}" in readout.inner_text()


def test_filled_organs_have_edges_of_their_own_colour(page: Page) -> None:
    """At half opacity two colours may be one to a colour-blind eye; edges are nearly opaque."""
    go(page, SHAPE[0] // 2)
    press(page, "h")
    far = np.abs(pixels(page, "axial")[..., :3] - (255, 126, 181)).max(axis=2)
    assert (far < 30).sum() > 100


def test_help_is_the_list_of_keys(page: Page) -> None:
    assert page.locator(".help").is_hidden()
    press(page, "?")
    text = page.locator(".help").inner_text()
    assert "worst slice" in text and "Narrow liver 150 / 30" in text and "Two fingers" in text
    press(page, "Escape")
    assert page.locator(".help").is_hidden()


def test_the_controls_are_one_row_on_1100_pixels(page: Page) -> None:
    outside = page.viewport_size["width"] - page.locator(".viewer").bounding_box()["width"]  # type: ignore[index]
    page.set_viewport_size({"width": int(1100 + outside), "height": 768})
    for key in "vqb":
        press(page, key)
        tops = [one.bounding_box()["y"] for one in page.locator(".bar > :visible").all()]  # type: ignore[index]
        assert max(tops) - min(tops) < 20, key


@pytest.mark.parametrize("size", [(1366, 768), (1024, 768), (768, 1024)])
def test_everything_is_within_reach_on_a_laptop_and_on_tablets(
    open_viewer: Callable[..., Page], stage: Stage, size: tuple[int, int]
) -> None:
    page = open_viewer(stage, size=size)
    box = page.locator(".viewer").bounding_box()
    assert box
    for part in (".bar", ".pane >> nth=0", ".pane >> nth=1", ".pane >> nth=2", ".strip", ".side"):
        inner = page.locator(part).first.bounding_box()
        assert inner and inner["width"] > 100 and inner["height"] > 30, part
        assert inner["x"] >= box["x"] - 1 and inner["x"] + inner["width"] <= box["x"] + box["width"] + 1, part
        assert inner["y"] + inner["height"] <= size[1], part
    for button in page.locator(".bar button:visible").all():
        inner = button.bounding_box()
        assert inner and inner["x"] + inner["width"] <= box["x"] + box["width"]
