"""`surm-seg app`: the clinician's viewer in the browser, on this machine alone.

The workspace is the folder where the commands were run: the app reads its runs/, data/ and predictions/, and writes
reviews/ and uploads/ beside them.
"""

from __future__ import annotations

import importlib.util
import os
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from surm_seg import cli
from surm_seg.errors import BadConfig, BadInput

LOOPBACK = "127.0.0.1"
DEVICE = "SURM_DEVICE"
"""Environment variable that tells the server where its models are."""

PORTS = range(8501, 8521)
"""Tried in turn where no --port is given."""


@dataclass
class AppConfig(cli.Common):
    """Look at cases, correct and compare segmentations, train and report, in the browser.

    Args:
        output: not used; the app writes into the workspace.
        seed: not used; the page Train asks for one.
        workspace: folder that holds runs/, data/ and predictions/.
        port: of the loopback address; 0 takes the first free one from 8501 on.
        browser: open a browser; --no-browser does not.
    """

    workspace: Path = Path(".")
    port: int = 0
    browser: bool = True


def main(argv: Sequence[str] | None = None) -> int:
    cli.offline()
    arguments = list(sys.argv[1:] if argv is None else argv)
    words = ["--browser=false" if word == "--no-browser" else word for word in arguments]
    config = cli.parse("app", AppConfig, words)
    return cli.run(lambda: serve(config), debug=config.debug)


def serve(config: AppConfig) -> int:
    """Become the server of the workspace: this process ends when the server does.

    Raises:
        BadInput: there is no such workspace.
        BadConfig: the port is taken.
        NoDevice: the device for the models is not here.
    """
    if not config.workspace.is_dir():
        sentence = f"There is no folder {config.workspace}; give --workspace the folder that holds runs/ and data/."
        raise BadInput("no-workspace", sentence)
    found = importlib.util.find_spec("app.main")
    assert found is not None and found.origin is not None, "the package app is installed with surm_seg"
    port = _free_port(config.port)
    words = ["--server.port", str(port), "--server.headless", str(not config.browser).lower()]
    device = cli.device_named(config.device)
    if not config.quiet:
        print(f"surm-seg app: http://{LOOPBACK}:{port} (Ctrl-C ends it)", flush=True)
    if config.dry_run:
        return 0
    os.chdir(config.workspace)
    command = [sys.executable, "-m", "streamlit", "run", found.origin, *words]
    os.execve(sys.executable, command, os.environ | {DEVICE: device})


def _free_port(wanted: int) -> int:
    if not 0 <= wanted < 1 << 16:
        raise BadConfig("port", f"--port {wanted} is no port; choose one from 1 to 65535, or 0 for the first free one.")
    for port in [wanted] if wanted else PORTS:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((LOOPBACK, port))
            except OSError:
                continue
            return port
    sentence = f"port {wanted} is taken" if wanted else f"the ports {PORTS.start} to {PORTS.stop - 1} are taken"
    raise BadConfig("port", f"{sentence.capitalize()} on {LOOPBACK}; choose another with --port.")


if __name__ == "__main__":
    sys.exit(main())
