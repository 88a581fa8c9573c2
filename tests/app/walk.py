"""A clinician's walk: the demo, a real CT and a real DICOM series, with a picture of every step.

`python tests/app/walk.py [--workspace .] [--pictures build/walk]`, with runs/demo in the workspace (`make demo`); the
real ones need the data that SURM_SHARED names. Every step waits for what it must lead to, and what is taken away is
opened again: the walk fails where the app does. Prints a line per step, with its seconds.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import highdicom
import nibabel as nib
import numpy as np
from playwright.sync_api import Locator, Page, expect, sync_playwright
from served import started
from staging import FLAGS, chromium_path
from watching import press, settle, state

from surm_seg import prepare

SHARED = Path(os.environ.get("SURM_SHARED", Path(__file__).parents[3] / "shared"), "data")
CT, SERIES = SHARED / "ct-case-a", SHARED / "ct-case-b-dicom" / "dicom"
CT_LABELS = "labels_total_v1_104class.nii.gz"

PATIENCE = 180_000
"""Milliseconds; the first segmentation loads the backbone, and takes some ten seconds."""

LIVER_SCORED = re.compile(r"liver\s+\d+\s+0\.\d+")
"""Volume and Dice, in the organs' table."""


@dataclass
class Walk:
    """A browser on a running app.

    Args:
        pictures: folder for what was seen.
    """

    page: Page
    pictures: Path

    @contextmanager
    def step(self, name: str, picture: str = "") -> Iterator[None]:
        """Something a clinician does, and the screen when it is done."""
        start = perf_counter()
        yield
        self.page.wait_for_selector('.stApp[data-test-script-state="notRunning"]')
        settle(self.page)
        print(f"{perf_counter() - start:7.2f} s  {name}", flush=True)
        if picture:
            self.page.screenshot(path=self.pictures / f"{picture}.png")

    def turn_to(self, page: str) -> None:
        """Another page, by the links on top."""
        self.page.get_by_test_id("stTopNavLink").get_by_text(page, exact=True).click()
        self.page.wait_for_url(re.compile(r":\d+/(\?.*)?$" if page == "Cases" else rf"/{page.lower()}(\?.*)?$"))

    def viewer(self) -> Locator:
        """The viewer, once its slice is drawn."""
        self.page.wait_for_selector('.viewer[data-ready="true"]')
        return self.page.locator(".viewer")

    def button(self, name: str) -> Locator:
        return self.page.get_by_role("button", name=name, exact=True)

    def stroke(self, organ: str, tool: str = "b") -> None:
        """Choose an organ, and draw a line with the brush or the eraser across the middle of the axial picture."""
        self.table.get_by_text(organ, exact=True).click()
        press(self.page, tool)
        box = self.page.locator('.pane[data-plane="axial"]').bounding_box()
        assert box
        x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        self.page.mouse.move(x - 40, y)
        self.page.mouse.down()
        self.page.mouse.move(x + 40, y + 10, steps=8)
        self.page.mouse.up()

    @property
    def table(self) -> Locator:
        """The organ table: volumes and scores."""
        return self.page.locator(".side .table")

    def rescored(self, before: str) -> str:
        """The organs' table once it is another than before, and the liver has its score."""
        expect(self.table).not_to_have_text(before, use_inner_text=True)
        expect(self.table).to_have_text(LIVER_SCORED, use_inner_text=True)
        return self.table.inner_text()

    def taken(self, folder: Path) -> dict[str, Path]:
        """Make the files of what is on the screen, and download each."""
        self.page.get_by_text("Take away", exact=True).click()
        self.button("Make the files").click()
        self.button("volumes.csv").wait_for()
        found = {}
        for button in self.page.get_by_test_id("stDownloadButton").get_by_role("button").all():
            with self.page.expect_download() as download:
                button.click()
            found[button.inner_text()] = folder / download.value.suggested_filename
            download.value.save_as(found[button.inner_text()])
        return found


def generated(walk: Walk, folder: Path) -> None:
    """The demo's patients: worst first, find what is wrong, correct it, see the scores, take it away, come again."""
    page = walk.page
    with walk.step("the list of cases, worst first", "1-cases"):
        walk.button("Open in Review").wait_for()
    with walk.step("the worst case in Review", "2-review"):
        walk.button("Open in Review").click()
        walk.viewer()
    with walk.step("its worst slice, and where it is wrong", "3-error"):
        press(page, "w", "e")
        assert state(page)["mode"] == "error"
    with walk.step("a stroke, scored at once", "4-corrected"):
        before = walk.table.inner_text()
        walk.stroke("liver")
        page.get_by_text("1 slice corrected").wait_for()
        after = walk.rescored(before)
    with walk.step("taken back by the page, and made again"):
        walk.button("Undo").click()
        expect(walk.table).to_have_text(before, use_inner_text=True)
        walk.button("Redo").click()
        expect(walk.table).to_have_text(after, use_inner_text=True)
    with walk.step("taken away: label map, tables, report", "5-taken"):
        files = walk.taken(folder)
    _opened_again(files)
    with walk.step("the page is closed and opened again: the version is there", "6-again"):
        page.reload()
        walk.viewer()
        page.get_by_text("1 slice corrected").wait_for()
        expect(walk.table).to_have_text(after, use_inner_text=True)
    with walk.step("beside the reference", "7-compare"):
        walk.turn_to("Compare")
        walk.viewer()
    for number, name in enumerate(("Train", "Reports", "About"), 8):
        with walk.step(f"the page {name}", f"{number}-{name.lower()}"):
            walk.turn_to(name)
            page.wait_for_timeout(1500)


def real_ct(walk: Walk, folder: Path) -> None:
    """A prepared CT of another kind than the run was trained on: what the app says, and does."""
    page = walk.page
    with walk.step("a real CT: unlike the training cases", "11-ct-case"):
        page.goto(f"{page.url.partition('?')[0].rpartition('/')[0]}/?case=ct-case-a.case001")
        page.get_by_text("Unlike the training cases").wait_for()
    with walk.step("segmented by the demo"):
        page.get_by_role("button", name="Segment with").click()
        page.get_by_role("button", name="Open in Review").and_(page.locator(":enabled")).wait_for()
    with walk.step("in Review, at its worst slice", "12-ct-review"):
        walk.button("Open in Review").click()
        walk.viewer()
        press(page, "w", "e")
    with walk.step("corrected and scored", "13-ct-corrected"):
        before = walk.table.inner_text()
        walk.stroke("liver")
        walk.rescored(before)
        expect(page.get_by_role("radio", checked=True)).to_have_count(1)
    with walk.step("taken away"):
        _opened_again(walk.taken(folder))


def real_series(walk: Walk, folder: Path) -> None:
    """A DICOM series that the clinician brings along."""
    page = walk.page
    with walk.step("a DICOM series is uploaded", "14-series"):
        walk.turn_to("Cases")
        page.get_by_test_id("stFileUploaderDropzoneInput").first.set_input_files(sorted(SERIES.iterdir()))
        walk.button("Read the volume").and_(page.locator(":enabled")).click()
        page.get_by_role("button", name="Segment with").wait_for()
    with walk.step("segmented by the demo"):
        page.get_by_role("button", name="Segment with").click()
        page.get_by_role("button", name="Open in Review").and_(page.locator(":enabled")).wait_for()
    with walk.step("in Review; no reference, no score", "15-series-review"):
        walk.button("Open in Review").click()
        walk.viewer()
    with walk.step("corrected", "16-series-corrected"):
        walk.stroke("liver")
        page.get_by_text("1 slice corrected").wait_for()
    with walk.step("taken away: DICOM-SEG too"):
        files = walk.taken(folder)
    _opened_again(files)
    (segmentation,) = (path for path in files.values() if path.suffix == ".dcm")
    found = highdicom.seg.segread(segmentation)
    assert found.number_of_segments >= 1 and found.pixel_array.any()


def _opened_again(files: dict[str, Path]) -> None:
    """Label map, table and facts agree with each other, and the report asks for nothing outside."""
    (labels,) = (path for path in files.values() if path.name.endswith(".nii.gz"))
    image = nib.load(labels)
    voxels = np.asarray(image.dataobj)  # pyright: ignore[reportAttributeAccessIssue]
    millilitres = abs(np.linalg.det(image.affine[:3, :3])) / 1000  # pyright: ignore[reportAttributeAccessIssue]
    rows = list(csv.DictReader(files["volumes.csv"].read_text().splitlines()))
    assert rows
    for row in rows:
        count = np.count_nonzero(voxels == int(row["label"]))
        assert count == int(row["voxels"]) and abs(count * millilitres - float(row["ml"])) < 0.01, row
    json.loads(files["review.json"].read_text())
    for path in files.values():
        if path.suffix == ".html":
            assert "http" not in path.read_text().replace("http://www.w3.org", "")


def _workspace(original: Path, place: Path, real: bool) -> Path:
    """A workspace of the walk's own: the demo, and all of the real CT, held out, with the organs of the demo."""
    workspace = place / "workspace"
    for part in ("runs/demo", "data/phantom"):
        shutil.copytree(original / part, workspace / part)
    if real:
        (source := place / "source" / "a").mkdir(parents=True)
        for name in ("ct.nii.gz", CT_LABELS):
            shutil.copy(CT / name, source / name)
        (source.parent / "split.yaml").write_text("test: [a]\ntrain: []\n")
        words = ["--format", "totalsegmentator", "--label", CT_LABELS, "--classes", "v1", "--quiet"]
        words += ["--split", str(source.parent / "split.yaml"), "--output", str(workspace / "data" / "ct-case-a")]
        assert prepare.main([str(source.parent), *words]) == 0
    return workspace


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workspace", type=Path, default=Path(), help="with runs/demo; default here")
    parser.add_argument("--pictures", type=Path, default=Path("build/walk"), help="default build/walk")
    options = parser.parse_args(argv)
    if not (options.workspace / "runs" / "demo" / "scores").is_dir():
        parser.error(f"{options.workspace} has no runs/demo: make demo")
    options.pictures.mkdir(parents=True, exist_ok=True)
    real = SERIES.is_dir()
    if not real:
        print(f"no {SHARED}: the walk leaves the real cases out", flush=True)
    with (
        tempfile.TemporaryDirectory() as folder,
        started(_workspace(options.workspace, Path(folder), real)) as server,
        sync_playwright() as playwright,
    ):
        browser = playwright.chromium.launch(executable_path=chromium_path(), args=list(FLAGS))
        page = browser.new_context(viewport={"width": 1440, "height": 900}).new_page()
        page.set_default_timeout(PATIENCE)
        expect.set_options(timeout=PATIENCE)
        errors: list[str] = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(server.url)
        walk = Walk(page, options.pictures)
        try:
            for part in (generated, real_ct, real_series) if real else (generated,):
                (own := Path(folder) / part.__name__).mkdir()
                part(walk, own)
        except BaseException:
            page.screenshot(path=options.pictures / "failed.png")
            raise
        browser.close()
    print("\n".join(errors) or "no error on any page")
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
