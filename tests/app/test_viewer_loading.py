"""How the picture comes: at once, also of a long volume; again where the network failed; from an installed wheel."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from urllib.parse import parse_qs, urlparse

import numpy as np
from orientation import phantom
from playwright.sync_api import Page, Route
from staging import REPOSITORY, SHAPE, Stage, staged
from watching import go, pixels, press, state

from app.rle import encode

IMAGE = re.compile("/surm/data/.*/image")


def long_volume(folder: Path, shape: tuple[int, int, int], z: int) -> None:
    """Arrays of which only one slice takes room on the disk."""
    for name, dtype in (("image", np.int16), ("reference", np.uint8), ("prediction", np.uint8)):
        array = np.lib.format.open_memmap(folder / f"{name}.npy", "w+", dtype, shape)
        if name != "reference":
            array[z] = np.arange(shape[2]) % 256 if name == "image" else 1


def test_the_first_slice_is_shown_before_the_rest_of_800_has_come(page: Page, tmp_path: Path) -> None:
    shape = (800, 512, 512)
    long_volume(tmp_path, shape, 321)
    held: list[Route] = []

    def slowly(route: Route) -> None:
        """The slice in view passes; all that is asked for beyond it is held."""
        asked = parse_qs(urlparse(route.request.url).query)
        route.continue_() if int(asked["to"][0]) - int(asked["from"][0]) == 1 else held.append(route)

    with staged(tmp_path, shape) as stage:
        page.route(re.compile("/surm/data/"), slowly)
        page.goto(stage.url)
        page.wait_for_selector('.viewer[data-ready="true"][data-loaded="1"]')
        assert state(page)["z"] == "321"  # its error area is the only one
        assert np.ptp(pixels(page, "axial")[..., 0]) > 50 and held
        press(page, "Home")
        page.wait_for_selector(
            '.viewer[data-z="0"][data-ready="true"][data-loaded="2"]'
        )  # what is scrolled to comes before the rest
        page.unroute_all()
        page.goto("about:blank")


def test_labels_are_fetched_again_under_a_new_version(page: Page) -> None:
    go(page, SHAPE[0] // 2)
    press(page, "h")

    def coloured() -> int:
        return int((np.ptp(pixels(page, "axial")[..., :3], axis=2) > 20).sum())

    assert coloured()
    with page.expect_response(re.compile(r"layers/prediction\?.*version=1")):
        page.get_by_role("button", name="Renew").click()
    page.wait_for_selector(f'.viewer[data-loaded="{SHAPE[0]}"]')
    page.wait_for_load_state("networkidle")
    assert coloured() == 0
    press(page, "r")
    assert coloured()


def test_a_server_that_stumbles_is_asked_again(page: Page) -> None:
    stumbles: list[str] = []

    def stumble(route: Route) -> None:
        if len(stumbles) < 2:
            stumbles.append(route.request.url)
            route.fulfill(status=503) if len(stumbles) == 1 else route.abort()
        else:
            route.continue_()

    page.route(IMAGE, stumble)
    page.reload()
    page.wait_for_selector(f'.viewer[data-ready="true"][data-loaded="{SHAPE[0]}"]')
    assert len(stumbles) == 2


def test_what_failed_to_come_is_asked_for_again_by_who_looks_at_it(page: Page) -> None:
    """The sentence goes away when the slice arrives, and the rest of the volume follows."""
    page.route(IMAGE, lambda route: route.fulfill(status=503))
    page.reload()
    waiting = page.locator('.pane[data-plane="axial"] .waiting')
    waiting.get_by_text("does not answer").wait_for()
    page.unroute_all()
    press(page, "ArrowUp")
    page.wait_for_selector(f'.viewer[data-ready="true"][data-loaded="{SHAPE[0]}"]')
    assert not waiting.is_visible()


def test_a_case_that_is_gone_is_one_sentence_on_the_picture(page: Page) -> None:
    page.route(IMAGE, lambda route: route.fulfill(status=404))
    page.reload()
    waiting = page.locator('.pane[data-plane="axial"] .waiting')
    waiting.get_by_text("no longer served").wait_for()
    assert waiting.inner_text() == "This case is no longer served to this page. Reload the page."


MOUNTED = """async seen => {
    const {default: mount} = await import("/surm/viewer/main.js");
    const box = document.body.appendChild(document.createElement("div"));
    const scene = {data: "/surm/data/none/", shape: [2, 4, 4], spacing: null, organs: [], layers: {}, slices: [],
        layout: "planes", convention: "radiological", key: "one", seen: []};
    const show = facts => mount({data: {...scene, ...facts}, parentElement: box, setTriggerValue: () => {}});
    seen.overtaken = show({case: "one"});
    show({case: "two"});
    seen.last = show({case: "two", jump: {id: 1, z: 0, y: null, x: 3}});
    seen.root = box.firstChild;
    seen.box = box;
}"""


def test_a_viewer_lets_go_of_the_case_before_and_ends_only_when_it_is_gone(page: Page) -> None:
    """Streamlit ends a scene that was overtaken while the next one is already shown."""
    page.evaluate(f"({MOUNTED})(window.seen = {{}})")
    client = page.context.new_cdp_session(page)
    root = client.send("Runtime.evaluate", {"expression": "window.seen.root"})["result"]["objectId"]
    listeners = client.send("DOMDebugger.getEventListeners", {"objectId": root})["listeners"]
    kinds = [listener["type"] for listener in listeners]
    assert sorted(kinds) == ["click", "keydown", "keyup"]
    page.evaluate("window.seen.overtaken()")
    assert page.evaluate("window.seen.root.isConnected && window.seen.root.innerText.includes('two')")
    page.wait_for_selector('.viewer[data-z="0"][data-y="2"][data-x="3"]')
    page.evaluate("window.seen.box.remove()")
    page.evaluate("window.seen.last()")
    assert page.evaluate("window.seen.box.childElementCount") == 0


def test_both_languages_write_a_slice_alike(page: Page) -> None:
    labels = phantom(SHAPE).prediction[SHAPE[0] // 2]
    text = page.evaluate(
        "async labels => (await import('/surm/viewer/rle.js')).encode(Uint8Array.from(labels))", labels.ravel().tolist()
    )
    assert text == encode(labels)
    back = page.evaluate(
        "async ([text, length]) => Array.from((await import('/surm/viewer/rle.js')).decode(text, length))",
        [text, labels.size],
    )
    assert back == labels.ravel().tolist()


def test_the_viewer_works_from_an_installed_wheel(open_viewer: Callable[..., Page], tmp_path: Path) -> None:
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir"]
    subprocess.run([*build, str(tmp_path), str(REPOSITORY)], check=True, cwd=tmp_path)
    site = tmp_path / "site"
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        wheel.extractall(site)
    with staged(tmp_path, SHAPE, site=site) as stage:
        page = open_viewer(stage)
        assert page.locator("#package").inner_text() == str(site / "app" / "serving.py")


def test_pages_do_not_share_what_they_show(open_viewer: Callable[..., Page], stage: Stage) -> None:
    tokens = []
    for _ in range(2):
        page = open_viewer(stage)
        fetched = page.evaluate("performance.getEntriesByType('resource').map(entry => entry.name)")
        tokens.append({url.split("/data/")[1].split("/")[0] for url in fetched if "/surm/data/" in url})
    assert len(tokens[0]) == len(tokens[1]) == 1 and tokens[0] != tokens[1]
