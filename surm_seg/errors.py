"""The errors a user can cause or meet: one sentence, a stable code, and an exit status.

The message says what is wrong, in which file or option, and how to mend it. Anything else that is raised is our own
mistake and ends a command with exit status 1.
"""

from __future__ import annotations

INTERRUPTED = 130
"""Exit status of a command that its user ends."""


class SurmError(Exception):
    """Base of the user-facing errors.

    Args:
        code: stable kebab-case identifier, for programs; it never changes once released.
        message: what is wrong, where, and what to do about it.
    """

    exit_status = 1

    def __init__(self, code: str, message: str) -> None:
        super().__init__(code, message)  # both, so that an error survives the way out of a worker process
        self.code = code

    def __str__(self) -> str:
        return self.args[1]


class BadConfig(SurmError):
    """An option, or a combination of options, that cannot work (exit status 2)."""

    exit_status = 2


class BadInput(SurmError):
    """A file or folder that cannot be used as it is (exit status 3)."""

    exit_status = 3


class Corrupt(SurmError):
    """A file this project wrote, whose content no longer agrees with its digest or schema (exit status 3)."""

    exit_status = 3


class NoDevice(SurmError):
    """The requested device is absent or out of memory (exit status 4)."""

    exit_status = 4
