"""Many browsers at once, as JSON: `python tests/app/load.py [--contexts 20] [--seconds 120]`; returns 1 where it fails.

Every context scrolls through a CT of 512 x 512 x 120 with the wheel. Each turn of the wheel must be answered by its
slice, no page may report an error, and the server may grow by 50 MB at most for each session after the first, its
memory maps counted once for all (`pss`: of pages that are shared, a part).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from playwright.async_api import Browser, Page, async_playwright
from staging import FLAGS, Stage, chromium_path, staged

SHAPE = (120, 512, 512)
MOST_GROWTH = 50.0
"""MB of the server for each session after the first."""

BURST = 20
"""Notches of the wheel between two looks at the slice."""

PATIENCE = 120_000
"""Milliseconds for a page to open, or a burst to be answered, while all the others want the processor too."""


@dataclass
class Reader:
    """One browser context: how much it asked for and got, and what went wrong."""

    page: Page
    asked: int = 0
    shown: int = 0
    errors: list[str] = field(default_factory=list)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--contexts", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=120)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, staged(Path(folder), SHAPE) as stage:
        report = asyncio.run(_load(stage, options.contexts, options.seconds))
    print(json.dumps(report, indent=1))
    good = not report["errors"] and report["asked"] == report["shown"] and report["growth_mb"] <= MOST_GROWTH
    return 0 if good else 1


async def _load(stage: Stage, contexts: int, seconds: float) -> dict[str, float]:
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=chromium_path(), args=list(FLAGS))
        readers = [await _opened(browser, stage)]
        first = _memory(stage)
        for _ in range(contexts - 1):
            readers.append(await _opened(browser, stage))
        end = time.monotonic() + seconds
        await asyncio.gather(*(_scroll(reader, end) for reader in readers))
        last = _memory(stage)
        await browser.close()
    for reader in readers:
        for error in reader.errors:
            print(error, file=sys.stderr)
    others = max(1, contexts - 1)
    return {
        "contexts": contexts,
        "seconds": seconds,
        "asked": sum(reader.asked for reader in readers),
        "shown": sum(reader.shown for reader in readers),
        "errors": sum(len(reader.errors) for reader in readers),
        "first_session_mb": round(first["pss"]),
        "growth_mb": round((last["pss"] - first["pss"]) / others, 1),
        "growth_rss_mb": round((last["rss"] - first["rss"]) / others, 1),
        "growth_private_mb": round((last["uss"] - first["uss"]) / others, 1),
    }


def _memory(stage: Stage) -> dict[str, float]:
    """MB of the server process."""
    info = psutil.Process(stage.pid).memory_full_info()
    return {name: getattr(info, name) / 1e6 for name in ("rss", "pss", "uss")}


async def _opened(browser: Browser, stage: Stage) -> Reader:
    context = await browser.new_context(viewport={"width": 1366, "height": 768})
    reader = Reader(await context.new_page())
    reader.page.set_default_timeout(PATIENCE)
    reader.page.on("pageerror", lambda error: reader.errors.append(str(error)))
    reader.page.on("console", lambda line: reader.errors.append(line.text) if line.type == "error" else None)
    await reader.page.goto(stage.url)
    await reader.page.wait_for_selector(f'.viewer[data-ready="true"][data-loaded="{SHAPE[0]}"]')
    return reader


async def _scroll(reader: Reader, end: float) -> None:
    """Up and down, in bursts; every burst is waited for, and the slices that were drawn are counted."""
    page = reader.page
    viewer = page.locator(".viewer")
    box = await page.locator('.pane[data-plane="axial"]').bounding_box()
    assert box
    await page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    await viewer.press("Home")
    await page.wait_for_selector('.viewer[data-z="0"]')
    before = int(await viewer.get_attribute("data-drawn") or 0)
    z, way = 0, 1
    while time.monotonic() < end:
        if not 0 <= z + way * BURST < SHAPE[0]:
            way = -way
        for _ in range(BURST):
            await page.mouse.wheel(0, -100 * way)
        z, reader.asked = z + way * BURST, reader.asked + BURST
        await page.wait_for_selector(f'.viewer[data-z="{z}"]')
    reader.shown = int(await viewer.get_attribute("data-drawn") or 0) - before


if __name__ == "__main__":
    sys.exit(main())
