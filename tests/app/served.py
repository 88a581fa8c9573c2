"""The whole app as a running server, started as a user does."""

from __future__ import annotations

import http.client
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from staging import PATIENCE, free_port, listening

MAIN = Path(__file__).parents[2] / "app" / "main.py"


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
def started(folder: Path, way: str = "surm-seg", ttl: int | None = None, port: int = 0) -> Iterator[Server]:
    """The app over a workspace, started as a user does, as long as the block runs.

    Args:
        ttl: seconds that it keeps what a page that was closed has brought.
        port: of an app before it, for a page that waits for one; 0 takes a free one.
    """
    port = port or free_port()
    command = {
        "surm-seg": ["-m", "surm_seg.app", "--workspace", str(folder), "--no-browser", "--port", str(port)],
        "streamlit": ["-m", "streamlit", "run", str(MAIN), "--server.port", str(port)],
    }[way]
    settings = {} if ttl is None else {"STREAMLIT_SERVER_DISCONNECTED_SESSION_TTL": str(ttl)}
    log = folder.parent / f"{way}.log"
    with listening([sys.executable, *command], port, folder, settings, log) as process:
        yield Server(port, process, folder, log)


def wait_for(found: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not found():
        assert time.monotonic() < end
        time.sleep(0.1)
