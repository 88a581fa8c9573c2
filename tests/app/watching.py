"""What a test sees of the viewer: its state, its pixels, the slices that were shown, what it told Python."""

from __future__ import annotations

import base64
import io
import json
from typing import Any

import numpy as np
from PIL import Image
from playwright.sync_api import Page


def state(page: Page) -> dict[str, str]:
    """The viewer's data attributes."""
    return page.locator(".viewer").evaluate("root => ({...root.dataset})")


def at(page: Page) -> tuple[int, int, int]:
    """The crosshair's voxel (z, y, x)."""
    now = state(page)
    return int(now["z"]), int(now["y"]), int(now["x"])


def settle(page: Page) -> None:
    """Wait until what was asked for is drawn: two frames."""
    page.evaluate("() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")


def press(page: Page, *keys: str) -> None:
    for key in keys:
        page.locator(".viewer").press(key)
    settle(page)


def go(page: Page, z: int) -> None:
    """Show an axial slice, by the keyboard."""
    press(page, "Home", *["ArrowUp"] * z)
    page.wait_for_selector(f'.viewer[data-z="{z}"]')


def window(page: Page, width: int, centre: int) -> None:
    """Type a window."""
    for title, value in (("Window width in HU", width), ("Window centre in HU", centre)):
        field = page.get_by_label(title)
        field.fill(str(value))
        field.press("Enter")
    settle(page)


def pixels(page: Page, plane: str, canvas: str = "base", nth: int = 0) -> np.ndarray:
    """RGBA (rows, columns) of a pane's canvas in device pixels: slice and labels, or ("top") what moves above."""
    found = page.locator(f'.pane[data-plane="{plane}"] canvas.{canvas}').nth(nth)
    data = found.evaluate("canvas => canvas.toDataURL('image/png')").split(",")[1]
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGBA")).astype(int)


def middle(mask: np.ndarray) -> tuple[float, float]:
    """Middle (x, y) of the pixels of a mask."""
    rows, columns = np.nonzero(mask)
    assert len(rows), "nothing there"
    return (columns.min() + columns.max() + 1) / 2, (rows.min() + rows.max() + 1) / 2


def corner(page: Page, plane: str) -> tuple[float, float]:
    """Where a pane begins in the window (x, y)."""
    box = page.locator(f'.pane[data-plane="{plane}"]').first.bounding_box()
    assert box
    return box["x"], box["y"]


def told(page: Page, count: int) -> list[dict[str, Any]]:
    """The finished actions as Python knows them, once there are `count` of them."""
    page.wait_for_function("n => JSON.parse(document.querySelector('#told').textContent).length >= n", arg=count)
    return json.loads(page.locator("#told").inner_text())


def watch_slices(page: Page) -> None:
    """From now on remember every z at which a slice was drawn."""
    page.locator(".viewer").evaluate(
        """root => {
            window.shown = [];
            new MutationObserver(() => window.shown.push(Number(root.dataset.z)))
                .observe(root, {attributes: true, attributeFilter: ["data-drawn"]});
        }"""
    )


def slices_shown(page: Page) -> list[int]:
    return page.evaluate("window.shown")
