"""The two kinds of failure that a user meets; everything else is our bug and keeps its traceback."""

from __future__ import annotations

_LONGEST = 1000
"""Characters of one part of a message."""


class UserError(Exception):
    """A mistake that the user can fix: printed once, by `cli`, without a traceback; exit code 2.

    Every argument goes to the base class, so the error survives pickling between Ray processes.

    Args:
        what: One sentence that says what is wrong.
        where: The file (and line), key, column or row.
        expected: What would have been right.
        found: What was there.
        fix: What to do now.
    """

    exit_code = 2

    def __init__(self, what: str, where: str = "", expected: str = "", found: str = "", fix: str = "") -> None:
        super().__init__(what, where, expected, found, fix)
        self.what, self.where, self.expected, self.found, self.fix = what, where, expected, found, fix

    def __str__(self) -> str:
        what = "\n".join(_printable(line) for line in self.what.split("\n"))
        lines = [f"{_printable(self.where)}: {what}" if self.where else what]
        for label, text in (("expected", self.expected), ("found", self.found), ("fix", self.fix)):
            if text:
                lines.append(f"  {label}: {_printable(text)}")
        return "\n".join(lines)


def _printable(text: str) -> str:
    """The text in one line: names and cells may hold line ends, or codes that a terminal obeys."""
    if not text.isprintable():
        text = "".join(
            letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text[:_LONGEST]
        )
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


class RunFailed(Exception):
    """A run that ended without its result although the job is well formed (loss not finite, machines lost too often).

    Printed like a `UserError`, with exit code 1. Takes one message, so it survives pickling.
    """

    exit_code = 1
