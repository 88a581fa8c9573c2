"""The server as it is started: reachable from this machine alone, and silent about files, folders and patients."""

import gzip
import http.client
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import pytest
from clinic import shared_workspace
from playwright.sync_api import Browser, Page
from staging import free_port
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect
from websockets.typing import Origin

CANARY = "CanaryPatient4711"
MAIN = Path(__file__).parents[2] / "app" / "main.py"
PATIENCE = 60.0


@dataclass(frozen=True)
class Server:
    """A running app."""

    port: int
    process: subprocess.Popen[bytes]
    workspace: Path
    log: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def get(self, path: str, method: str = "GET", **headers: str) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        connection.request(method, path, headers=headers)
        answer = connection.getresponse()
        return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()


@contextmanager
def started(folder: Path, way: str = "surm-seg") -> Iterator[Server]:
    """The app over a workspace, started as a user does."""
    port = free_port()
    command = {
        "surm-seg": ["-m", "surm_seg.app", "--workspace", str(folder), "--no-browser", "--port", str(port)],
        "streamlit": ["-m", "streamlit", "run", str(MAIN), "--server.port", str(port)],
    }[way]
    with (folder.parent / f"{way}.log").open("wb") as log:
        process = subprocess.Popen([sys.executable, *command], cwd=folder, stdout=log, stderr=subprocess.STDOUT)
        server = Server(port, process, folder, Path(log.name))
        try:
            wait_for(lambda: answers(server))
            yield server
        finally:
            process.terminate()
            process.wait(20)


def answers(server: Server) -> bool:
    assert server.process.poll() is None, server.log.read_text()
    try:
        urllib.request.urlopen(f"{server.url}/_stcore/health", timeout=2).close()
        return True
    except OSError:
        return False


def wait_for(found: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not found():
        assert time.monotonic() < end
        time.sleep(0.1)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("served")
    shutil.copytree(shared_workspace(tmp_path_factory), folder / "clinic")
    with started(folder / "clinic") as running:
        yield running


@pytest.fixture
def page(browser: Browser, server: Server) -> Iterator[Page]:
    context = browser.new_context(viewport={"width": 1366, "height": 768})
    yield context.new_page()
    context.close()


@pytest.mark.parametrize("way", ["surm-seg", "streamlit"])
def test_either_way_of_starting_serves_this_machine_alone_and_says_what_it_is_not_for(
    tmp_path: Path, browser: Browser, way: str
) -> None:
    """The first visit may be a bookmark of any page, which Streamlit must not draw on its own."""
    (tmp_path / "empty").mkdir()
    with started(tmp_path / "empty", way) as server:
        listening = {c.laddr.ip for c in psutil.Process(server.process.pid).net_connections() if c.status == "LISTEN"}
        assert listening == {"127.0.0.1"}
        assert "127.0.0.1" in server.log.read_text() or way == "streamlit"
        assert server.get("/", host="evil.example")[0] == 400
        page = browser.new_page()
        page.goto(f"{server.url}/review")
        assert "Not a medical device" in page.locator(".surm-banner").inner_text(timeout=PATIENCE * 1000)
        page.close()


def test_every_answer_tells_the_browser_to_ask_nobody_else(server: Server) -> None:
    for path in ("/", "/surm/viewer/main.js", "/surm/data/nothing/image", "/_stcore/health"):
        headers = server.get(path)[1]
        assert "default-src 'self'" in headers["content-security-policy"] and "http" not in headers[
            "content-security-policy"
        ].replace("https:", "http:")
        assert (headers["x-content-type-options"], headers["x-frame-options"]) == ("nosniff", "DENY")
        assert "access-control-allow-origin" not in headers


def test_an_upload_without_the_page_s_token_is_refused(server: Server) -> None:
    assert server.get("/_stcore/upload_file/session/file", "PUT")[0] == 403


def test_another_site_cannot_open_a_session(server: Server) -> None:
    def knock(origin: str) -> int:
        try:
            with connect(f"ws://127.0.0.1:{server.port}/_stcore/stream", origin=Origin(origin)):
                return 101
        except InvalidStatus as refusal:
            return refusal.response.status_code

    assert (knock("http://evil.example"), knock(server.url)) == (403, 101)


@pytest.mark.parametrize(
    "path",
    [
        "/surm/viewer/",
        "/surm/viewer/__init__.py",
        "/surm/viewer/..%2fserving.py",
        "/surm/data/",
        "/surm/data/x/image",
        "/app/static/run.json",
        "/runs/demo/run.json",
        "/data/phantom/case_key.json",
        "/media/",
        "/..%2f..%2fetc%2fpasswd",
    ],
)
def test_nothing_is_listed_and_no_file_is_served(server: Server, path: str) -> None:
    status, _, body = server.get(path)
    told = body.decode(errors="replace")
    assert status in (200, 301, 400, 404) and (status != 200 or "<title>Streamlit</title>" in told)
    assert not any(word in told for word in ("root:", "circulant", "case0001", "import ", str(server.workspace)))


def test_a_patient_s_name_reaches_no_log_and_no_error_the_page_beyond_a_sentence(server: Server, page: Page) -> None:
    """A broken volume and a damaged record, both under a name that must not be repeated."""
    broken = gzip.compress(b"no volume" + CANARY.encode())
    (server.workspace / "runs" / "demo" / "scores" / "summary.json").write_text(f'{{"{CANARY}": 1}}')
    page.goto(server.url)
    page.wait_for_selector(".surm-title")
    chosen = {"name": f"{CANARY}.nii.gz", "mimeType": "application/gzip", "buffer": broken}
    page.locator("[data-testid=stFileUploaderDropzoneInput]").first.set_input_files(chosen)  # pyright: ignore
    page.get_by_role("button", name="Read the volume").click()
    page.wait_for_selector("[data-testid=stAlert]")
    said = page.locator("[data-testid=stAlert]").first.inner_text()
    assert "The upload" in said
    page.goto(f"{server.url}/reports")
    page.wait_for_selector("[data-testid=stAlert]")
    assert "KeyError" in page.locator("[data-testid=stAlert]").first.inner_text()
    text = page.inner_text("body")
    for told in (server.log.read_text(), said, text):
        assert "Traceback" not in told and CANARY not in told and str(server.workspace) not in told
    written = [path for path in server.workspace.rglob("*") if path.is_file() and path.name != "summary.json"]
    assert not [path for path in written if CANARY in path.name or CANARY.encode() in path.read_bytes()]


def test_pages_make_no_request_to_another_machine(server: Server, page: Page) -> None:
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    for name in ("", "review", "compare", "train", "about"):
        page.goto(f"{server.url}/{name}")
        page.wait_for_selector(".surm-banner")
        page.wait_for_timeout(500)
    assert asked and all(url.startswith((server.url, "data:", "blob:")) for url in asked)


def test_a_closed_tab_takes_its_upload_along(tmp_path: Path, browser: Browser) -> None:
    """The volume is on disk while its page is open, and gone soon after."""
    (tmp_path / "empty").mkdir()
    import nibabel as nib

    volume = nib.Nifti1Image(np.zeros((20, 20, 4), np.int16), np.eye(4)).to_bytes()
    with started(tmp_path / "empty") as server:
        page = browser.new_page()
        page.goto(server.url)
        chosen = {"name": "a.nii", "mimeType": "application/octet-stream", "buffer": volume}
        page.locator("[data-testid=stFileUploaderDropzoneInput]").first.set_input_files(chosen)  # pyright: ignore
        page.get_by_role("button", name="Read the volume").click()
        wait_for(lambda: bool([*server.workspace.glob("uploads/*/*/image.npy")]))
        page.close()
        wait_for(lambda: not [*server.workspace.glob("uploads/*/*")])


def test_the_port_that_is_taken_is_named(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        words = ["-m", "surm_seg.app", "--workspace", str(tmp_path), "--port", str(taken.getsockname()[1])]
        done = subprocess.run([sys.executable, *words], capture_output=True, text=True)
    assert done.returncode == 2 and "error [port]" in done.stderr


def test_a_workspace_that_is_not_there_is_named(tmp_path: Path) -> None:
    words = ["-m", "surm_seg.app", "--workspace", str(tmp_path / "absent")]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True)
    assert done.returncode == 3 and "error [no-workspace]" in done.stderr
