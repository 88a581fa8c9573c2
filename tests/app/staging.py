"""Starting the viewer's stage as a user would start an app, and the Chromium that looks at it."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

FLAGS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip
SHAPE = (24, 96, 80)
"""Of the phantom that most tests look at: no two lengths are alike."""

REPOSITORY = Path(__file__).parents[2]

PATIENCE = 60.0
"""Seconds that a server may take to answer for the first time."""


@dataclass(frozen=True)
class Stage:
    """A running server: where it listens, its process, and the folder of its volume."""

    url: str
    pid: int
    folder: Path


def chromium_path() -> str | None:
    """The system's Chromium, or None."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def staged(
    folder: Path, shape: tuple[int, int, int], layout: str = "planes", site: Path = REPOSITORY
) -> Iterator[Stage]:
    """The stage over an orientation phantom of this shape, as long as the block runs; the package is that of `site`."""
    port = free_port()
    settings = {"STAGE_FOLDER": str(folder), "STAGE_SHAPE": ",".join(map(str, shape)), "STAGE_LAYOUT": layout}
    settings["STAGE_SITE"] = str(site)
    options = {
        "server.address": "127.0.0.1", "server.port": port, "server.headless": "true", "theme.base": "dark",
        "browser.gatherUsageStats": "false", "server.fileWatcherType": "none",
    }  # fmt: skip
    command = [sys.executable, "-m", "streamlit", "run", str(Path(__file__).with_name("stage.py"))]
    command += [f"--{name}={value}" for name, value in options.items()]
    with (folder / "server.log").open("w") as log:
        server = subprocess.Popen(command, env=os.environ | settings, cwd=folder, stdout=log, stderr=subprocess.STDOUT)
        try:
            url = f"http://127.0.0.1:{port}"
            _await_answer(f"{url}/_stcore/health", server)
            yield Stage(url, server.pid, folder)
        finally:
            server.terminate()
            server.wait(10)


def _await_answer(url: str, server: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end and server.poll() is None:
        try:
            urllib.request.urlopen(url, timeout=2).close()
            return
        except OSError:
            time.sleep(0.1)
    raise RuntimeError(f"the stage did not answer at {url}; its log is server.log")
