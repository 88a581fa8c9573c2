"""How fast the viewer is, as JSON: `python tests/app/measure.py [--steps 119]`, a CT of 512 x 512 x 120 in Chromium.

wheel_to_slice_ms: from the event's own time until its slice is drawn. first_picture_ms: from the moment the page mounts
the viewer until the first slice is drawn; page_ms: the same from an empty browser, with Streamlit's own start.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path

from playwright.sync_api import Browser, Page, sync_playwright
from staging import FLAGS, Stage, chromium_path, staged
from watching import slices_shown, watch_slices

SHAPE = (120, 512, 512)
PAGES = 3

_TIMED = """root => {
    window.waiting = [];
    window.took = [];
    root.addEventListener("wheel", event => window.waiting.push(event.timeStamp), {capture: true});
    new MutationObserver(() => {
        const since = window.waiting.shift();
        if (since !== undefined) window.took.push(performance.now() - since);
    }).observe(root, {attributes: true, attributeFilter: ["data-drawn"]});
}"""
_FIRST = """() => {
    const module = performance.getEntriesByType("resource").find(entry => entry.name.endsWith("/surm/viewer/main.js"));
    return performance.now() - module.startTime;
}"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=SHAPE[0] - 1, help="slices to scroll through")
    parser.add_argument("--pause", type=int, default=16, help="milliseconds between two notches of the wheel")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, staged(Path(folder), SHAPE) as stage, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium_path(), args=list(FLAGS))
        _opened(browser, stage)[0].context.close()  # makes the phantom
        pages = [_opened(browser, stage) for _ in range(PAGES)]
        for page, _ in pages[1:]:
            page.context.close()
        figures = {name: round(statistics.median(times[name] for _, times in pages)) for name in pages[0][1]}
        print(json.dumps(figures | _scrolled(pages[0][0], options.steps, options.pause), indent=1))
        browser.close()


def _opened(browser: Browser, stage: Stage) -> tuple[Page, dict[str, float]]:
    """A page of a fresh profile, with the times until its first picture and until the whole volume, in ms."""
    page = browser.new_context(viewport={"width": 1366, "height": 768}).new_page()
    page.goto(stage.url)
    page.wait_for_selector('.viewer[data-ready="true"]')
    times = {"first_picture_ms": page.evaluate(_FIRST), "page_ms": page.evaluate("performance.now()")}
    page.wait_for_selector(f'.viewer[data-loaded="{SHAPE[0]}"]')
    return page, times | {"whole_volume_ms": page.evaluate(_FIRST)}


def _scrolled(page: Page, steps: int, pause: int) -> dict[str, object]:
    frames, requests = [], []
    page.locator(".viewer").press("Home")
    page.wait_for_selector('.viewer[data-z="0"]')
    page.wait_for_load_state("networkidle")
    page.on("request", lambda request: requests.append(request.url))
    session = page.context.new_cdp_session(page)
    session.send("Network.enable")
    for name in ("Network.webSocketFrameSent", "Network.webSocketFrameReceived"):
        session.on(name, lambda frame: frames.append(len(frame["response"]["payloadData"])))
    page.locator(".viewer").evaluate(_TIMED)
    watch_slices(page)
    box = page.locator('.pane[data-plane="axial"]').bounding_box()
    assert box
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    for _ in range(steps):
        page.mouse.wheel(0, -100)
        page.wait_for_timeout(pause)
    page.wait_for_selector(f'.viewer[data-z="{steps}"]')
    took = sorted(page.evaluate("window.took"))
    return {
        "wheel_to_slice_ms": {
            "median": round(statistics.median(took), 1),
            "p95": round(took[int(len(took) * 0.95)], 1),
            "worst": round(took[-1], 1),
        },
        "slices_asked": steps,
        "slices_shown": len(slices_shown(page)),
        "websocket_bytes": sum(frames),
        "requests": len(requests),
    }


if __name__ == "__main__":
    main()
