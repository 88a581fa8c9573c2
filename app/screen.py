"""What all pages share: the look, the banner, errors as one sentence, and what lives as long as a session."""

from __future__ import annotations

import logging
import re
import secrets
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import streamlit as st

from app import jobs, serving
from app.belongings import UPLOADS, Belongings, leave, take
from app.scores import Score
from app.segmenting import Work, resume
from app.uploads import Uploads, sweep
from app.workspace import Study, Workspace
from surm_seg.errors import SurmError

BANNER = "Research use only. Not a medical device."
UNDEFINED = "–"
"""Shown where a number is not defined; never 0 and never 1."""

ADDRESS = "session"
"""What the name of the belongings is called in the address, and in the session's state."""

MOST_OPENED = 4
"""Cases that a session keeps open, scores and all; what it made of the others is on disk."""

P = ParamSpec("P")
T = TypeVar("T")
_log = logging.getLogger("surm_seg.app")
_FOLDERS = re.compile(r"(?<![\w.])/(?:[^\s/,;:()'\"]+/)+")


@dataclass
class Session:
    """What one browser tab owns, and takes with it when it is closed.

    Args:
        belongings: what was uploaded in it, or in the one that it takes over from.
    """

    belongings: Belongings = field(default_factory=lambda: take(None))
    _opened: OrderedDict[tuple[str, ...], tuple[str, Any]] = field(default_factory=OrderedDict)
    _closed: bool = False

    @property
    def brought(self) -> list[Study]:
        """Its uploads as cases."""
        return self.belongings.brought

    @property
    def uploads(self) -> Uploads:
        """Where its uploads are stored."""
        return self.belongings.uploads

    def kept(self, key: tuple[str, ...], make: Callable[[str], T]) -> T:
        """What is on the screen under a key, made the first time, for the owner of what is served that `make` is told.

        The longest unused goes, and is served no more, where there are more than MOST_OPENED.
        """
        if key not in self._opened:
            owner = secrets.token_urlsafe(16)
            try:
                self._opened[key] = owner, make(owner)
            except BaseException:  # Streamlit's own ways to end a script are no Exceptions
                serving.withdraw(owner)
                raise
        self._opened.move_to_end(key)
        owner, found = self._opened[key]
        while len(self._opened) > MOST_OPENED:
            serving.withdraw(self._opened.popitem(last=False)[1][0])
        if self._closed:  # meanwhile, by another thread that could not know of it
            serving.withdraw(owner)
        return found

    def close(self) -> None:
        self._closed = True
        for owner, _ in list(self._opened.values()):
            serving.withdraw(owner)
        self._opened.clear()
        leave(self.belongings)


@st.cache_resource(scope="session", on_release=lambda session: session.close(), show_spinner=False)
def session() -> Session:
    """The session that is being drawn for; before its first page, what servers that died have left is put in order.

    Their uploads are deleted, and their segmentations begun anew.
    """
    sweep(UPLOADS)
    resume(Workspace())
    return Session(take(st.session_state.get(ADDRESS) or st.query_params.get(ADDRESS)))


def look() -> None:
    """Settings of the page, the style sheet, the banner and the session's name; first of all on every page."""
    st.set_page_config(page_title="surm-seg", layout="wide", initial_sidebar_state="auto")
    st.html(Path(__file__).with_name("screen.css"))
    st.html(f'<p class="surm-banner" role="note">{BANNER}</p>')
    if session().brought:
        st.session_state[ADDRESS] = name = session().belongings.name
        if st.query_params.get(ADDRESS) != name:  # another page begins with an empty address
            st.query_params[ADDRESS] = name


def title(text: str, remark: str = "") -> None:
    """The heading of a page, with what it is about in small print beside it."""
    st.html(f'<h1 class="surm-title">{text}<small>{remark}</small></h1>')


def plain(text: str) -> str:
    """A sentence without the folders of the server."""
    return _FOLDERS.sub("", text)


def refusal(error: SurmError) -> None:
    """What does not work and how to mend it, with the code."""
    st.error(f"{plain(str(error))}  \n`{error.code}`")


@contextmanager
def sentences() -> Iterator[None]:
    """What the block raises becomes one sentence with its code on the page; the log gets the code alone."""
    try:
        yield
    except SurmError as error:
        refusal(error)
        _log.warning("page: %s", error.code)
    except Exception as error:
        st.error(f"This did not work, for a reason nobody foresaw; the rest goes on.  \n`{type(error).__name__}`")
        _log.error("page: unexpected %s", type(error).__name__)


def guarded(body: Callable[P, None]) -> Callable[P, None]:
    """A part of a page, or a callback, whose errors become sentences."""

    @wraps(body)
    def within(*args: P.args, **kwargs: P.kwargs) -> None:
        with sentences():
            body(*args, **kwargs)

    return within


@st.fragment(run_every="1s")
@guarded
def follow(work: Work) -> None:
    """The progress of a segmentation, and its cancel button; the page is drawn anew at its end."""
    if work.over:
        st.rerun()
    if work.state == "waiting":
        what = "waiting for the segmentation before it"
    else:
        what = f"segmenting with {work.run.name}: {work.share:.0%}" if work.share else f"loading {work.run.name}"
    st.progress(work.share, what)
    st.button("Cancel", key=f"cancel {work.run.name}", on_click=work.cancel)


@st.fragment(run_every="1s")
@guarded
def newest_job(folder: Path, kind: jobs.Kind, first: str) -> None:
    """What the newest job of a kind is doing, or why it failed; the page is drawn anew at its end.

    Args:
        folder: of all jobs.
        first: what it does before it says anything.
    """
    job = next((job for job in jobs.jobs(folder) if job.kind == kind), None)
    if job is None:
        return
    if job.state == "running":
        st.session_state[f"watched {kind}"] = job.id
        st.progress(job.progress or 0.0, plain((job.log_tail(1) or [first])[0]))
        if st.button("Cancel", key=f"cancel {kind}"):
            job.cancel()
    elif st.session_state.pop(f"watched {kind}", None) == job.id:
        st.rerun()
    elif job.state == "failed":
        st.error(plain(job.trouble))


def spacings(scores: Iterable[Score]) -> str:
    """The spacings that HD95 was measured with, in words."""
    every = {organ["spacing"] for score in scores for organ in score.organs.values() if organ["spacing"]}
    if not every:
        return "HD95 is not defined: no spacing was known."
    used = [" x ".join(f"{float(mm):.3g}" for mm in spacing.split("x")) for spacing in sorted(every)]
    more = f" and {len(used) - 3} more" if len(used) > 3 else ""
    return f"HD95 was measured with {', '.join(used[:3])}{more} mm (z, y, x)."


def shown(value: float | None, digits: int = 3) -> str:
    """A number for a table, or the sign for an undefined one."""
    return UNDEFINED if value is None else f"{value:.{digits}f}"
