"""A clinician draws while the app does not answer: nothing is lost without a word, and every stroke is stored once."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from clinic import shared_workspace
from playwright.sync_api import Browser, BrowserContext, Page, WebSocketRoute, expect
from served import Server, started, wait_for
from staging import PATIENCE, free_port
from watching import corner, go, pixels, press, settle

LAPTOP = {"width": 1366, "height": 768}


@pytest.fixture
def folder(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    shutil.copytree(shared_workspace(tmp_path_factory), tmp_path / "clinic")
    return tmp_path / "clinic"


@pytest.fixture
def context(browser: Browser) -> Iterator[BrowserContext]:
    with browser.new_context(viewport=LAPTOP) as context:  # pyright: ignore[reportArgumentType]
        context.set_default_timeout(PATIENCE * 1000)
        yield context


@pytest.fixture
def review(context: BrowserContext) -> Iterator[Callable[[Server], Page]]:
    """Open the page Review with a brush in the hand, and find errors of the page afterwards."""
    errors: list[str] = []

    def open_at(server: Server) -> Page:
        page = context.new_page()
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("dialog", lambda dialog: dialog.accept())
        page.goto(f"{server.url}/review?run=demo")
        ready(page)
        press(page, "b")
        return page

    yield open_at
    assert errors == []


def ready(page: Page) -> None:
    page.wait_for_selector('.viewer[data-ready="true"]')
    page.wait_for_function(
        """() => [...document.querySelectorAll("*")].some(each =>
            each.shadowRoot?.querySelector(".title")?.textContent.includes("z ") &&
            !each.shadowRoot.querySelector(".title").textContent.includes("loading"))"""
    )


def stroke(page: Page, z: int, right: float) -> None:
    """A stroke downwards on an axial slice, at this share of the picture's width."""
    go(page, z)
    left, top = corner(page, "axial")
    rows, columns = pixels(page, "axial").shape[:2]
    page.mouse.move(left + columns * right, top + rows * 0.4)
    page.mouse.down()
    page.mouse.move(left + columns * right, top + rows * 0.6, steps=3)
    page.mouse.up()
    settle(page)


def edits(folder: Path, version: int = 1) -> list[int]:
    """The slices of a version's journal, one of each line."""
    (journal,) = folder.glob(f"reviews/*/*/v{version:03d}/journal.jsonl")
    lines = [json.loads(line.partition(b"} ")[2]) for line in journal.read_bytes().splitlines()]
    assert len({line["event"] for line in lines}) == len(lines)
    return [line["edit"][0] for line in lines]


def saved(page: Page, slices: int) -> None:
    expect(page.get_by_text(f"{slices} slices corrected, all saved")).to_be_visible(timeout=PATIENCE * 1000)
    expect(page.locator(".unsaved")).to_be_hidden()


def picture(page: Page, z: int) -> np.ndarray:
    go(page, z)
    ready(page)
    settle(page)
    return pixels(page, "axial")


def interrupted(context: BrowserContext, way: str) -> list[bool]:
    """A switch, off at first, for what pages of this context and the app say "to the app" or "to the page"."""
    switch = [False]

    def between(socket: WebSocketRoute) -> None:
        server = socket.connect_to_server()
        sender, receiver = (socket, server) if way == "to the app" else (server, socket)
        sender.on_message(lambda message: None if switch[0] else receiver.send(message))

    context.route_web_socket(re.compile("/_stcore/stream"), between)
    return switch


def test_strokes_drawn_while_the_app_is_down_are_stored_when_it_is_back(
    folder: Path, review: Callable[[Server], Page], photograph: Callable[[Page, str], None]
) -> None:
    """The first one was kept just before the app was killed: it is not made again, and neither are the others."""
    port = free_port()
    with started(folder, port=port) as server:
        page = review(server)
        press(page, "h")
        stroke(page, 3, 0.4)
        expect(page.get_by_text("1 slice corrected, all saved")).to_be_visible()
        assert page.locator(".unsaved").is_hidden()
        server.process.kill()
        server.process.wait()
        page.get_by_text("Connection error").wait_for()
        page.get_by_role("button", name="Close").click()
        stroke(page, 4, 0.45)
        stroke(page, 4, 0.55)
        stroke(page, 5, 0.5)
        page.get_by_role("status").get_by_text("3 strokes not saved yet").wait_for()
        photograph(page, "unsaved")
        drawn = [picture(page, z) for z in (4, 5)]
        page.wait_for_timeout(6000)  # they are sent once more meanwhile, to nobody
        assert edits(folder) == [3]
    with started(folder, port=port):
        saved(page, 3)
        assert edits(folder) == [3, 4, 4, 5]
        for z, before in zip((4, 5), drawn, strict=True):
            assert np.array_equal(picture(page, z), before)
        page.reload()
        ready(page)
        press(page, "h")
        assert np.array_equal(picture(page, 4), drawn[0])
        assert edits(folder) == [3, 4, 4, 5]


def test_a_page_that_is_reloaded_meanwhile_still_has_them(
    folder: Path, context: BrowserContext, review: Callable[[Server], Page]
) -> None:
    """The network is gone, so that the strokes reach nobody; the tab keeps them over the reload."""
    cut = interrupted(context, "to the app")
    with started(folder) as server:
        page = review(server)
        cut[0] = True
        stroke(page, 4, 0.45)
        stroke(page, 5, 0.5)
        page.get_by_role("status").get_by_text("2 strokes not saved yet").wait_for()
        assert not [*folder.glob("reviews/*/*/v*")]
        cut[0] = False
        page.reload()
        saved(page, 2)
        assert edits(folder) == [4, 5]
        page.wait_for_timeout(6000)
        assert edits(folder) == [4, 5]


def test_an_answer_that_was_lost_makes_no_stroke_twice(
    folder: Path, context: BrowserContext, review: Callable[[Server], Page]
) -> None:
    """What the app says is held back: it has stored the strokes, and the page cannot know."""
    deaf = interrupted(context, "to the page")
    with started(folder) as server:
        page = review(server)
        deaf[0] = True
        stroke(page, 4, 0.45)
        stroke(page, 5, 0.5)
        page.get_by_role("status").get_by_text("2 strokes not saved yet").wait_for()
        wait_for(lambda: bool([*folder.glob("reviews/*/*/v001/journal.jsonl")]) and edits(folder) == [4, 5])
        page.wait_for_timeout(6000)  # sent again, and known
        deaf[0] = False
        page.reload()
        saved(page, 2)
        assert edits(folder) == [4, 5]
