"""What becomes of uploads and of work when a page is reloaded or closed, and when the server dies."""

import shutil
from pathlib import Path
from urllib.parse import parse_qs, urlparse

import nibabel as nib
import numpy as np
import pytest
from clinic import at, shared_workspace
from playwright.sync_api import Browser, Page
from served import Server, started, wait_for

from app import segmenting
from app.workspace import Run, Study, Workspace
from surm_seg.volume import read_grid

VOLUME = nib.Nifti1Image(np.zeros((20, 20, 4), np.int16), np.eye(4)).to_bytes()


def choose(page: Page, content: bytes, name: str, nth: int = 0) -> None:
    chosen = {"name": name, "mimeType": "application/octet-stream", "buffer": content}
    page.locator("[data-testid=stFileUploaderDropzoneInput]").nth(nth).set_input_files(chosen)  # pyright: ignore


def bring(page: Page, content: bytes, name: str = "a.nii") -> None:
    """Upload a volume, and wait until it is the case that is looked at."""
    choose(page, content, name, nth=-1)
    page.get_by_role("button", name="Read the volume").click()
    page.get_by_role("heading", name="upload-").wait_for()


def stored(server: Server) -> list[Path]:
    return [*server.workspace.glob("uploads/*/upload-*/image.npy")]


def test_a_closed_tab_takes_its_upload_along(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, browser: Browser
) -> None:
    """The volume is on disk while its page is open, and gone soon after."""
    shutil.copytree(shared_workspace(tmp_path_factory), tmp_path / "clinic")
    with started(tmp_path / "clinic", ttl=1) as server:
        page = browser.new_page()
        page.goto(server.url)
        bring(page, VOLUME)
        assert stored(server)
        page.close()
        wait_for(lambda: not [*server.workspace.glob("uploads/*/*")])


def test_a_reload_keeps_what_was_brought_and_no_other_page_sees_it(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, browser: Browser
) -> None:
    """Also its reference; and a second tab of the same address shares both. Nothing is left behind, nor in the log."""
    shutil.copytree(shared_workspace(tmp_path_factory), tmp_path / "clinic")
    source = next((tmp_path / "clinic/data/phantom/source/img").iterdir())
    drawn = np.zeros(read_grid(source).shape, np.uint8)
    drawn[10:30, 10:30] = 1
    labels = nib.Nifti1Image(drawn, nib.load(source).affine).to_bytes()
    with started(tmp_path / "clinic", ttl=3) as server:
        page = browser.new_page()
        page.goto(server.url)
        bring(page, source.read_bytes(), "a.nii.gz")
        page.get_by_text("Add a reference to score against").click()
        choose(page, labels, "labels.nii", nth=0)
        page.get_by_role("button", name="Read the reference").click()
        page.get_by_text("Add a reference to score against").wait_for(state="hidden")
        (image,) = stored(server)
        page.reload()
        page.get_by_role("heading", name="upload-").wait_for()
        case = page.get_by_role("heading", name="upload-").inner_text()
        assert not page.get_by_text("Add a reference to score against").count()
        page.get_by_role("link", name="About").click()
        page.wait_for_url("**/about?*session=*")
        (name,) = parse_qs(urlparse(page.url).query)["session"]
        second, stranger = browser.new_page(), browser.new_page()
        second.goto(f"{server.url}/?session={name}&case={case}")
        second.get_by_role("heading", name=case).wait_for()
        stranger.goto(f"{server.url}/?session=guessed&case={case}")
        stranger.get_by_text("Upload a volume").wait_for()
        assert not stranger.get_by_role("heading", name=case).count()
        page.close()
        page = browser.new_page()
        page.wait_for_timeout(4000)
        assert stored(server) == [image]  # the second tab has it open
        second.close()
        wait_for(lambda: not [*server.workspace.glob("uploads/*/*")])
        stranger.close()
        page.close()
        assert name not in server.log.read_text()


def unsegmented() -> tuple[Workspace, Study, Run]:
    """The workspace here, a case that waits to be segmented, and the run to do it with."""
    workspace = Workspace()
    (run,) = workspace.runs()
    return workspace, next(study for study in workspace.studies() if study.case.split == "test"), run


def test_a_server_that_dies_leaves_neither_uploads_nor_half_a_segmentation(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, browser: Browser
) -> None:
    """Killed while it segments; the next one sweeps the uploads, and begins the segmentation anew by itself."""
    shutil.copytree(shared_workspace(tmp_path_factory), tmp_path / "clinic")
    with at(tmp_path / "clinic"):
        workspace, study, run = unsegmented()
    page = browser.new_page()
    button = page.get_by_role("button", name="Segment with demo")
    with started(tmp_path / "clinic") as server:
        page.goto(server.url)
        bring(page, VOLUME)
        page.goto(f"{server.url}/?case={study.key}")
        button.click()
        page.get_by_text("loading demo").or_(page.get_by_text("segmenting with demo")).first.wait_for()
        server.process.kill()
        server.process.wait()
        assert stored(server)
    with at(tmp_path / "clinic"):
        made = workspace.voxels(study, run)
        assert made is None or made.shape == study.case.shape
    with started(tmp_path / "clinic") as server:
        page.goto(f"{server.url}/?case={study.key}")
        page.get_by_role("button", name="Open in Review", disabled=False).wait_for()
        assert not page.locator("[data-testid=stAlertContentError]").count() and not button.count()
        wait_for(lambda: not stored(server))
    with at(tmp_path / "clinic"):
        made = workspace.voxels(study, run)
        assert made is not None and made.shape == study.case.shape
        assert not (workspace.review(study, run) / segmenting.ASKED).exists()
    page.close()


def test_a_segmentation_that_ends_the_app_twice_is_not_begun_a_third_time(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, browser: Browser
) -> None:
    shutil.copytree(shared_workspace(tmp_path_factory), tmp_path / "clinic")
    with at(tmp_path / "clinic"):
        workspace, study, run = unsegmented()
        asked = workspace.review(study, run).resolve() / segmenting.ASKED
        asked.parent.mkdir(parents=True)
        asked.touch()
    page = browser.new_page()
    for times in (1, 2):
        with started(tmp_path / "clinic") as server:
            page.goto(f"{server.url}/?case={study.key}")
            if times == 1:
                page.get_by_text("loading demo").or_(page.get_by_text("segmenting with demo")).first.wait_for()
                server.process.kill()
                server.process.wait()
                assert not asked.exists() and not (asked.parent / "prediction.npy").exists()
            else:
                page.get_by_role("button", name="Segment with demo").wait_for()
                assert not page.get_by_text("segmenting with demo").count()
    page.close()
