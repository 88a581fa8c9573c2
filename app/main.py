"""The server: Streamlit's pages and, beside them, the routes that the slice component draws from.

`surm-seg app` starts it, and so does `streamlit run app/main.py`.
"""

from __future__ import annotations

import logging
from pathlib import Path

import streamlit as st
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app import serving
from surm_seg import cli

POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; worker-src 'self' blob:; "
    "connect-src 'self' data: blob: ws://127.0.0.1:* ws://localhost:*; "
    "frame-ancestors 'none'; form-action 'none'; base-uri 'self'; object-src 'none'"
)
"""The browser itself refuses every request to another machine. Streamlit's own scripts need inline and eval."""

HEADERS = {
    b"content-security-policy": POLICY.encode(),
    b"referrer-policy": b"no-referrer",
    b"x-content-type-options": b"nosniff",
    b"x-frame-options": b"DENY",
}


LOOPBACK = ("127.0.0.1", "localhost")
"""The names a browser may call this server by where the settings name none: any other could be a rebound one."""


class Guarded:
    """Every answer carries the headers above."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                others = [(name, value) for name, value in message["headers"] if name.lower() not in HEADERS]
                message["headers"] = [*others, *HEADERS.items()]
            await send(message)

        await self.app(scope, receive, with_headers)


def without_words(record: logging.LogRecord) -> bool:
    """Streamlit logs what a script raised, traceback and message, which may hold names: keep the kind of error."""
    if record.exc_info:
        kind = record.exc_info[0]
        record.msg, record.args = "%s while a page was drawn", (kind.__name__ if kind else "an error",)
        record.exc_info = record.exc_text = None
    return True


cli.offline()
logging.getLogger("streamlit.error_util").addFilter(without_words)

app = st.App(
    Path(__file__).parent / "pages" / "home.py",
    routes=serving.routes(),
    middleware=[
        Middleware(TrustedHostMiddleware, allowed_hosts=st.get_option("server.allowedHosts") or LOOPBACK),
        Middleware(Guarded),
    ],
)
